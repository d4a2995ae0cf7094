"""Outputs with many positions (images, sequences): seeds in portions give the same matrices, and take bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import geoad
from geoad.curvature import (
    GGN,
    KFAC,
    Bernoulli,
    BlockDiagonal,
    Categorical,
    Family,
    Fisher,
    Gaussian,
    Likelihood,
    OutputMatrix,
    Poisson,
)
from geoad.curvature.likelihoods.roots import Seeds
from geoad.kernels import layered

SIGMA = torch.tensor([[2.0, 0.5, -0.3], [0.5, 1.0, 0.2], [-0.3, 0.2, 0.7]], dtype=torch.float64)


class Sequences(nn.Module):
    """Tokens (n, T) to outputs (n, T, 3), with positions that see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=0)
        self.mix = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.mix(self.table(tokens).mT).mT.tanh()))


def images() -> tuple[nn.Module, Tensor]:
    """A segmentation net, (n, 2, 4, 5) to (n, 3, 4, 5)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.ConvTranspose2d(3, 3, 3, padding=1), nn.Tanh())
    return nn.Sequential(*net, nn.Conv2d(3, 3, 1)).double(), torch.randn(3, 2, 4, 5, dtype=torch.float64)


def sequences() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    return Sequences().double(), torch.randint(7, (4, 6))


def indefinite(f: Tensor, y: Any) -> Tensor:
    """(n, ..., 3, 3), of either sign."""
    return torch.diag_embed(f.sin()) + 0.1 * f.unsqueeze(-1) * f.unsqueeze(-2)


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"images": images, "sequences": sequences}
LIKELIHOODS: dict[str, tuple[str, Likelihood]] = {
    "categorical images": ("images", Categorical(axis=1)),
    "categorical sequences": ("sequences", Categorical()),
    "bernoulli images": ("images", Bernoulli()),
    "poisson sequences": ("sequences", Poisson()),
    "gaussian sequences": ("sequences", Gaussian(SIGMA)),
    "gaussian images": ("images", Gaussian(0.5)),
    "family sequences": ("sequences", Family(lambda f: torch.distributions.Normal(f[..., 0], f[..., 1:].exp().sum(-1)))),
}
REPRESENTATIONS: dict[str, Any] = {
    "dense": "dense",
    "block_diagonal": "block_diagonal",
    "diagonal": "diagonal",
    "quasi_diagonal": "quasi_diagonal",
    "kfac": "kfac",
    "kfac, reduced": KFAC(sharing="reduce"),
    "kfac, separate": KFAC(bias="separate"),
    "ekfac": "ekfac",
    "low_rank": "low_rank",
    "mixed": {"*.weight": "kfac", "*": "diagonal"},
}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def pulled_back(net: nn.Module, x: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The mean over samples of JᵀAJ by plain torch.func, from f ↦ (t ↦ A(f) t) for outputs (1, ...)."""
    theta = dict(net.named_parameters())
    total = torch.zeros(())
    for i in range(len(x)):

        def outputs(blocks: dict[str, Tensor], one: Tensor = x[i : i + 1]) -> Tensor:
            return torch.func.functional_call(net, blocks, one)

        f: Tensor = outputs(theta)
        jacobian = torch.func.jacrev(outputs)(theta)
        j = torch.cat([jacobian[name].reshape(f.numel(), -1) for name in theta], 1)
        units = torch.eye(f.numel(), dtype=f.dtype).reshape(-1, *f.shape)
        a = torch.stack([product(f, unit).flatten() for unit in units], 1)
        total = total + j.mT @ a @ j / len(x)
    return total.detach()


@pytest.fixture
def pulls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of seeds that are pulled each time."""
    seen: list[int] = []
    together = layered._Together  # pyright: ignore[reportPrivateUsage]
    plain = together.pull

    def watched(self: Any, seeds: Tensor, *rest: Any) -> Any:
        seen.append(len(seeds))
        return plain(self, seeds, *rest)

    monkeypatch.setattr(together, "pull", watched)
    return seen


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_portions_make_the_exact_matrix(name: str, pulls: list[int]) -> None:
    kind, likelihood = LIKELIHOODS[name]
    net, x = NETS[kind]()
    geo = geoad.GeoModule(net)
    expected = pulled_back(net, x, likelihood.fisher)
    found = Fisher(geo, x, likelihood, representation="dense", max_memory=1 << 12)(geo.point()).to_dense()
    close(found, expected)
    count = likelihood.columns((1, *net(x).shape[1:]))
    assert sum(pulls) == len(x) * count and max(pulls) < count
    pulls.clear()
    close(Fisher(geo, x, likelihood, representation="dense", max_memory=1 << 30)(geo.point()).to_dense(), expected)
    assert pulls == [count]


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("kind", NETS)
def test_every_representation_is_the_same_in_portions(kind: str, representation: str, pulls: list[int]) -> None:
    net, x = NETS[kind]()
    geo = geoad.GeoModule(net)
    likelihood = Categorical(axis=1 if kind == "images" else -1)
    data = [x[:1], x[1:]]  # batches of two sizes

    def value(max_memory: int) -> Tensor:
        options = {"representation": REPRESENTATIONS[representation], "max_memory": max_memory}
        return Fisher(geo, data, likelihood, **options)(geo.point()).to_dense()

    whole = value(1 << 30)
    assert min(pulls) == (40 if kind == "images" else 12)
    count = max(pulls)
    pulls.clear()
    close(value(1 << 13), whole)
    assert max(pulls) < count


@pytest.mark.parametrize("representation", ["dense", "diagonal", "low_rank", "ekfac"])
def test_signs_come_with_their_seeds(representation: str, pulls: list[int]) -> None:
    net, x = sequences()
    geo, matrix = geoad.GeoModule(net), OutputMatrix(indefinite, positive=False)
    data = (x, torch.zeros(len(x)))
    field = GGN(geo, data, matrix, representation=representation, max_memory=1 << 13)
    found = field(geo.point()).to_dense()
    assert max(pulls) < 18
    exact = pulled_back(net, x, lambda f, t: matrix.hessian(f, None, t))
    if representation in ("dense", "low_rank"):
        close(found, exact)
    elif representation == "diagonal":
        close(found, torch.diag(exact.diagonal()))
    close(found, GGN(geo, data, matrix, representation=representation)(geo.point()).to_dense())


@pytest.mark.parametrize("soft", [False, True])
def test_the_gauss_newton_matrix_of_cross_entropy_with_ignored_positions(soft: bool) -> None:
    net, x = images()
    geo = geoad.GeoModule(net)
    y: Tensor = torch.randint(3, (3, 4, 5))
    y[0], y[1, 2:] = -100, -100  # a sample without labels, another with some
    if soft:
        y = torch.rand(3, 3, 4, 5, dtype=torch.float64).softmax(1)
    theta, total = dict(net.named_parameters()), torch.zeros(())
    counted = 3 * 20 if soft else int((y != -100).sum())
    for i in range(3):

        def loss(f: Tensor, labels: Tensor = y[i : i + 1]) -> Tensor:
            return F.cross_entropy(f, labels, reduction="sum") / counted

        def outputs(blocks: dict[str, Tensor], one: Tensor = x[i : i + 1]) -> Tensor:
            return torch.func.functional_call(net, blocks, one)

        f = outputs(theta)
        jacobian = torch.func.jacrev(outputs)(theta)
        j = torch.cat([jacobian[name].reshape(f.numel(), -1) for name in theta], 1)
        total = total + j.mT @ torch.func.hessian(loss)(f).reshape(f.numel(), -1) @ j
    for max_memory in (1 << 12, 1 << 28):
        field = GGN(geo, (x, y), F.cross_entropy, representation="dense", max_memory=max_memory)
        close(field(geo.point()).to_dense(), total.detach())
    implicit = GGN(geo, (x, y), F.cross_entropy)(geo.point())
    v = geo.reference.vector(geo.reference.layout.unravel(torch.ones(len(total), dtype=torch.float64)), at=geo.point())
    close((implicit @ v).ravel(), total.detach().sum(1))


def test_many_drawn_labels_come_in_portions(pulls: list[int]) -> None:
    net, x = images()
    geo = geoad.GeoModule(net)

    def value(max_memory: int) -> Tensor:
        options: dict[str, Any] = {"kind": "mc", "samples": 50, "representation": "diagonal", "max_memory": max_memory}
        generator = torch.Generator().manual_seed(0)
        return Fisher(geo, x, Categorical(axis=1), generator=generator, **options)(geo.point()).to_dense()

    whole = value(1 << 30)
    pulls.clear()
    close(value(1 << 14), whole)
    assert max(pulls) < 50 and sum(pulls) == 150


# -- memory ------------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest storage of a result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor):
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("representation", ["kfac", "diagonal", "dense"])
def test_the_memory_of_a_segmentation_net_is_bounded(representation: str) -> None:
    """32 x 32 positions of 5 classes: all seeds would be 4096 of 5120 numbers, 80 MiB, and 128 MiB would come back."""
    torch.manual_seed(0)
    geo = geoad.GeoModule(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 5, 1)))
    x, room = torch.randn(1, 1, 32, 32), 1 << 24
    field = Fisher(geo, x, Categorical(axis=1), representation=representation, max_memory=room)
    with Largest() as seen:
        found = field(geo.point())
    assert 1 << 16 < seen.bytes <= room
    if representation == "diagonal":  # against Fisher products, which take no seeds
        implicit = Fisher(geo, x, Categorical(axis=1))(geo.point())
        unit = torch.zeros(geo.reference.layout.dim)
        unit[3] = 1
        v = geo.reference.vector(geo.reference.layout.unravel(unit), at=geo.point())
        torch.testing.assert_close(found.to_dense()[3, 3], (implicit @ v).ravel()[3], rtol=1e-4, atol=0)


def test_the_inputs_count_once_however_many_portions_there_are() -> None:
    """Samples of two forms have another number of portions each; the factors are those of the whole."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 1)).double()
    geo = geoad.GeoModule(net)
    data = [torch.randn(2, 2, 3, 3, dtype=torch.float64), torch.randn(1, 2, 6, 6, dtype=torch.float64)]
    for representation in ("kfac", KFAC(sharing="reduce"), "ekfac"):
        whole, parts = (
            Fisher(geo, data, Categorical(axis=1), representation=representation, max_memory=room)(geo.point()).to_dense()
            for room in (1 << 30, 1 << 13)
        )
        close(parts, whole)


# -- likelihoods of one's own --------------------------------------------------------------------------------------------------


class OwnRoot(Likelihood):
    """A = diag(f²) by all seeds at once."""

    def fisher(self, outputs: Tensor, t: Tensor) -> Tensor:
        return outputs.square() * t

    def root(self, outputs: Tensor, targets: Any = None) -> Tensor:
        n, size = len(outputs), outputs[0].numel()
        return torch.diag_embed(outputs.reshape(n, size)).movedim(1, 0).reshape(size, *outputs.shape)


class OwnSeeds(OwnRoot):
    """The same in portions."""

    root = Likelihood.root

    def seeds(self, outputs: Tensor, targets: Any = None) -> Seeds:
        return Seeds.at_positions(torch.diag_embed(outputs).movedim(-1, 0))


class Tempered(Categorical):
    """Twice the root is four times the matrix."""

    def fisher(self, outputs: Tensor, t: Tensor) -> Tensor:
        return 4 * super().fisher(outputs, t)

    def root(self, outputs: Tensor, targets: Any = None) -> Tensor:
        return 2 * super().root(outputs, targets)


@pytest.mark.parametrize("likelihood", [OwnRoot(), OwnSeeds(), Tempered()], ids=lambda each: type(each).__name__)
def test_roots_of_ones_own(likelihood: Likelihood) -> None:
    net, x = sequences()
    geo = geoad.GeoModule(net)
    exact = pulled_back(net, x, likelihood.fisher)
    for room in (1 << 12, 1 << 28):
        close(
            Fisher(geo, x, likelihood, representation=BlockDiagonal((("*",),)), max_memory=room)(geo.point()).to_dense(), exact
        )


@pytest.mark.parametrize("axis", [1, -1, 2])
@pytest.mark.parametrize("signed", [False, True])
def test_parts_of_seeds_are_parts_of_all(axis: int, signed: bool) -> None:
    local = torch.randn(2, 3, 4, 5, 6)  # 2 columns, 3 samples, 4 x 5 positions, 6 numbers
    seeds = Seeds.at_positions(local, local[..., 0].sign() if signed else None, axis)
    s, signs = seeds.all()
    assert len(seeds) == len(s) == 40 and s.movedim(axis + 1 if axis > 0 else axis, -1).shape == (40, 3, 4, 5, 6)
    for which in (slice(0, 7), slice(7, 40), slice(39, 40), slice(3, 3)):
        part, part_signs = seeds.part(which)
        assert torch.equal(part, s[which])
        assert signs is None if part_signs is None else torch.equal(part_signs, signs[which])  # type: ignore[index]
    moved = s.movedim(axis + 1 if axis > 0 else axis, -1)
    for p, (i, j) in enumerate((i, j) for i in range(4) for j in range(5)):
        assert torch.equal(moved[2 * p : 2 * p + 2, :, i, j], local[:, :, i, j])
        assert int(moved[2 * p : 2 * p + 2].count_nonzero()) == 36
