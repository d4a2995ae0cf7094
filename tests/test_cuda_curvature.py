"""Curvature, kernels and function space on a device, against the same on the CPU; the CPU is a device, too."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import geoad
from geoad import GeometryError
from geoad.curvature import GGN, Fisher, Hessian, LowRank, OutputMatrix
from geoad.curvature.likelihoods import Categorical, Family, Gaussian
from geoad.distributed import all_reduce, shard
from geoad.metrics import Euclidean
from geoad.params import Blocks

N = 12
X = torch.linspace(-2.0, 2.0, 4 * N, dtype=torch.float64).reshape(N, 4).mul(3).cos()
Y = torch.arange(N) % 3
R = torch.linspace(-1.0, 1.5, 3 * N, dtype=torch.float64).reshape(N, 3).sin()

cuda = pytest.mark.cuda
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])


def conv() -> nn.Module:
    """A convolution, a norm, an attention, and a parameter that belongs to no layer."""
    torch.manual_seed(0)
    return _Net()


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2, padding=1)
        self.norm = nn.GroupNorm(1, 2)
        self.attend = nn.MultiheadAttention(2, 1, batch_first=True)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x.reshape(-1, 1, 2, 2))).tanh().flatten(2).mT
        h, _ = self.attend(h, h, h, need_weights=False)
        return self.head(h.mean(1) * self.scale)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


NETWORKS = {"conv": conv, "mlp": mlp}


class Twin:
    """A network on the CPU and on the device, each at the same point, and the data on both."""

    def __init__(self, make: Callable[[], nn.Module], device: str) -> None:
        net = make().double()
        self.here = geoad.GeoModule(net)
        self.there = geoad.GeoModule(copy.deepcopy(net).to(device))
        self.device = torch.device(device)

    @property
    def sides(self) -> tuple[tuple[geoad.GeoModule, torch.device], ...]:
        return (self.here, torch.device("cpu")), (self.there, self.device)

    def agree(
        self,
        fn: Callable[..., Tensor],
        targets: Tensor = Y,
        tolerance: float = 1e-9,
        bounds: tuple[int, ...] = (),
    ) -> None:
        """`fn` (network, batches) gives the same numbers on both, and those of the device are there.

        With `bounds` of the memory it is ``fn(network, batches, bound)``: all of them on the device, the first on the CPU.
        """
        (here, cpu), (there, device) = self.sides
        wanted = fn(here, batches(cpu, targets), *bounds[:1])
        for bound in [(each,) for each in bounds] or [()]:
            found = fn(there, batches(device, targets), *bound)
            assert found.device.type == self.device.type
            torch.testing.assert_close(found.cpu(), wanted, rtol=tolerance, atol=tolerance)


def batches(device: torch.device | str, targets: Tensor = Y) -> list[Any]:
    """Ragged ones."""
    return list(zip(X.to(device).split(5), targets.to(device).split(5), strict=True))


def direction(geo: geoad.GeoModule) -> Any:
    p = geo.point()
    return p.chart.vector({name: (3 * block + 1).sin() for name, block in p.blocks.items()}, at=p)


def covector(geo: geoad.GeoModule) -> Any:
    p = geo.point()
    return p.chart.covector({name: (2 * block + 1).cos() for name, block in p.blocks.items()}, at=p)


# -- matrices ----------------------------------------------------------------------------------------------------------------

REPRESENTATIONS = ("dense", "block_diagonal", "diagonal", "quasi_diagonal", "kfac", "ekfac", "low_rank", LowRank(3), "implicit")
KINDS = ("exact", "empirical", "covariance")


def tolerance(representation: Any) -> float:
    """Eigenvectors differ between devices by rounding over the gaps of their eigenvalues."""
    return 1e-7 if representation in ("ekfac", LowRank(3)) else 1e-9


@on_devices
@pytest.mark.parametrize("representation", REPRESENTATIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_matrices(kind: str, representation: Any, device: str) -> None:
    if (kind, representation) == ("covariance", "kfac"):
        pytest.skip("has no Kronecker factors")

    def matrix(geo: geoad.GeoModule, data: list[Any], most: int) -> Tensor:
        return Fisher(geo, data, kind=kind, representation=representation, max_memory=most)(geo.point()).to_dense()

    Twin(conv, device).agree(matrix, tolerance=tolerance(representation), bounds=(1 << 28, 1 << 12))


NORMAL = Family(lambda f: torch.distributions.Normal(f[..., 0], f[..., 1].exp()))
LOSSES: dict[str, tuple[Any, Tensor]] = {
    "ignored": (Categorical(ignore_index=1), Y),
    "probabilities": ("categorical", R.softmax(-1)),
    "bernoulli": ("bernoulli", R.sigmoid()),
    "poisson": ("poisson", R.abs()),
    "gaussian": ("gaussian", R),
    "variances": (Gaussian(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)), R),
    "covariance": (Gaussian(torch.eye(3, dtype=torch.float64) + 0.1), R),  # stays on the CPU
    "cross_entropy": (F.cross_entropy, Y),
    "mse_loss": (F.mse_loss, R),
    "a function": (lambda f, y: (f - y).pow(4).sum(-1).mean(), R),
    "a matrix": (OutputMatrix(lambda f, y: f.square() + 1), R),
}


@on_devices
@pytest.mark.parametrize("name", LOSSES)
def test_likelihoods(name: str, device: str) -> None:
    likelihood, targets = LOSSES[name]
    twin = Twin(mlp, device)
    for representation in ("diagonal", "low_rank"):
        twin.agree(
            lambda geo, data, r=representation: GGN(geo, data, likelihood, representation=r)(geo.point()).to_dense(), targets
        )
    twin.agree(lambda geo, data: GGN(geo, data, likelihood)(geo.point()).mv(direction(geo)).ravel(), targets)


@on_devices
def test_a_distribution(device: str) -> None:
    Twin(mlp, device).agree(lambda geo, data: Fisher(geo, data, NORMAL, representation="dense")(geo.point()).to_dense())


@on_devices
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "poisson", "gaussian", NORMAL])
def test_labels_drawn_there(likelihood: Any, device: str) -> None:
    """They come from a generator of the device, so they are others than on the CPU; the matrix is the one of these labels."""
    twin = Twin(mlp, device)
    fields = [
        Fisher(
            twin.there, batches(device), likelihood, kind="mc", samples=3, representation=representation, generator=generator
        )
        for representation, generator in (
            ("diagonal", torch.Generator(device).manual_seed(3)),
            ("implicit", torch.Generator(device).manual_seed(3)),
            ("diagonal", torch.Generator().manual_seed(3)),
        )
    ]
    assert fields[0].seed == fields[1].seed
    p = twin.there.point()
    entries = fields[0](p).to_dense()
    torch.testing.assert_close(fields[0](p).to_dense(), entries, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(fields[1](p).to_dense().diagonal(), entries.diagonal(), rtol=1e-9, atol=1e-12)
    assert fields[2](p).to_dense().device.type == device  # the seed alone comes from the generator
    labels = [batch.labels for batch in fields[0].swept(p.blocks)]
    assert all(each.device.type == device for each in labels)
    plain = Fisher(twin.here, batches("cpu"), likelihood, kind="mc", samples=3)
    plain.drawn = [each.cpu() for each in labels]
    wanted = torch.stack([_column(plain, twin.here.point().blocks, i)[i] for i in range(len(entries))])
    torch.testing.assert_close(entries.diagonal().cpu(), wanted, rtol=1e-9, atol=1e-12)


def _column(field: Fisher, x: Blocks, i: int) -> Tensor:
    """A column of Σ w JᵀAJ with the labels that are given."""
    layout = field.home.layout
    unit = torch.zeros(layout.dim, dtype=torch.float64).index_fill(0, torch.tensor(i), 1.0)
    return sum(layout.ravel(term(layout.unravel(unit))) for term in field.terms(x))  # pyright: ignore


# -- products and solves -----------------------------------------------------------------------------------------------------


@on_devices
@pytest.mark.parametrize("network", NETWORKS)
def test_products(network: str, device: str) -> None:
    """The first one, the one that is recorded, and those that are replayed; and many at once."""
    twin = Twin(NETWORKS[network], device)

    def several(make: Callable[[geoad.GeoModule, list[Any]], Any]) -> Callable[[geoad.GeoModule, list[Any]], Tensor]:
        def products(geo: geoad.GeoModule, data: list[Any]) -> Tensor:
            value, v = make(geo, data), direction(geo)
            return torch.stack([value.mv(v).ravel() for _ in range(4)])

        return products

    twin.agree(several(lambda geo, data: Fisher(geo, data)(geo.point())))
    twin.agree(several(lambda geo, data: GGN(geo, data, F.cross_entropy)(geo.point())))
    twin.agree(several(lambda geo, data: geoad.hessian(geo.loss(F.cross_entropy, data))(geo.point())))
    twin.agree(lambda geo, data: Hessian(geo.loss(F.cross_entropy, data), representation="dense")(geo.point()).to_dense())


@on_devices
@pytest.mark.parametrize("representation", ["dense", "block_diagonal", "diagonal", "kfac", "ekfac", "low_rank", "implicit"])
def test_damped_solves(representation: str, device: str) -> None:
    twin = Twin(mlp, device)

    def solved(geo: geoad.GeoModule, data: list[Any]) -> Tensor:
        return Fisher(geo, data, representation=representation)(geo.point()).solve(covector(geo), damping=0.1).ravel()

    twin.agree(solved, tolerance=tolerance(representation))
    twin.agree(lambda geo, data: _metric(geo, data, representation).sharp(covector(geo)).ravel(), tolerance=1e-7)


def _metric(geo: geoad.GeoModule, data: list[Any], representation: str) -> Any:
    return (Fisher(geo, data, representation=representation) + 0.1 * Euclidean(geo.reference))(geo.point())


@on_devices
def test_dual_solves(device: str) -> None:
    def solved(geo: geoad.GeoModule, data: list[Any], most: int) -> Tensor:
        solver = geoad.DualSolver(Fisher(geo, data), geo.point(), damping=0.1, max_memory=most)
        return torch.cat([solver.solve(covector(geo)).ravel(), solver.logdet()[None]])

    Twin(conv, device).agree(solved, bounds=(1 << 28, 1 << 12))


@on_devices
@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_of_samples(network: str, device: str) -> None:
    twin = Twin(NETWORKS[network], device)
    twin.agree(
        lambda geo, data, m: geoad.per_sample_grads(geo.loss(F.cross_entropy, data), max_memory=m)(geo.point()).ravel(),
        bounds=(1 << 28, 1 << 10),
    )
    twin.agree(lambda geo, data: geoad.grad(geo.loss(F.cross_entropy, data))(geo.point()).ravel())


# -- kernels and function space ----------------------------------------------------------------------------------------------


@on_devices
@pytest.mark.parametrize("contract", ["none", "trace", "diagonal"])
@pytest.mark.parametrize("network", NETWORKS)
def test_kernels(network: str, contract: str, device: str) -> None:
    twin = Twin(NETWORKS[network], device)
    twin.agree(lambda geo, data, m: _kernel(geo, data, contract=contract, max_memory=m).to_dense(), bounds=(1 << 28, 1 << 14))
    twin.agree(lambda geo, data: geoad.ntk(geo, data[0][0], data[1][0][:3], contract=contract)(geo.point()).to_dense())
    for representation in ("diagonal", "kfac") if network == "mlp" else ():
        damped = lambda geo, data, r=representation: Fisher(geo, data, representation=r) + 0.1 * Euclidean(geo.reference)  # noqa: E731
        twin.agree(
            lambda geo, data, d=damped: _kernel(geo, data, contract=contract, metric=d(geo, data)).to_dense(), tolerance=1e-8
        )


def _kernel(geo: geoad.GeoModule, data: list[Any], **options: Any) -> Any:
    return geoad.ntk(geo, torch.cat([x for x, _ in data]), **options)(geo.point())


@on_devices
def test_function_space(device: str) -> None:
    twin = Twin(conv, device)
    jacobian = lambda geo, data: geoad.jacobian(geoad.FunctionSpace(geo, data[0][0]))(geo.point())  # noqa: E731
    twin.agree(lambda geo, data: geoad.pushforward(geoad.FunctionSpace(geo, data[0][0]), direction(geo)).ravel())
    twin.agree(lambda geo, data: jacobian(geo, data).to_dense())
    twin.agree(lambda geo, data: geoad.linearized(geo)(data[0][0]))


# -- generators --------------------------------------------------------------------------------------------------------------


@on_devices
def test_generators_of_either_device(device: str) -> None:
    """Numbers are drawn on the device of the generator and then moved: one of the CPU gives the same everywhere."""
    twin = Twin(mlp, device)
    twin.agree(lambda geo, data: _metric(geo, data, "dense").sample(2, generator=torch.Generator().manual_seed(1)).ravel())
    there = _metric(twin.there, batches(device), "dense")
    assert there.sample(2, generator=torch.Generator(device).manual_seed(1)).ravel().device.type == device
    for generator in (torch.Generator(), torch.Generator(device)):
        geo = twin.there
        psi = geo.reference.reparametrize(geoad.maps.Affine(generator=generator.manual_seed(1)), name="psi").target
        moved = geo.point().to(psi)
        assert moved.ravel().device.type == device
        torch.testing.assert_close(moved.to(geo.reference).ravel(), geo.point().ravel())


# -- mistakes ----------------------------------------------------------------------------------------------------------------


def elsewhere(device: str) -> str:
    """A device on which the data are not."""
    return "meta" if device == "cpu" else "cpu"


@on_devices
@pytest.mark.parametrize("field", [Fisher, GGN], ids=["Fisher", "GGN"])
@pytest.mark.parametrize("representation", ["implicit", "diagonal"])
def test_labels_of_another_device_are_refused(field: Any, representation: str, device: str) -> None:
    geo, (x, y) = Twin(mlp, device).there, (X.to(device), Y.to(elsewhere(device)))
    options = {"kind": "empirical"} if field is Fisher else {}
    with pytest.raises(GeometryError, match=r"the outputs are on .*, the targets on .*y\.to\("):
        field(geo, (x, y), representation=representation, **options)(geo.point()).mv(direction(geo))


@cuda
def test_inputs_of_another_device_are_refused() -> None:
    geo = Twin(mlp, "cuda").there
    for call in (
        lambda: Fisher(geo, X, representation="diagonal")(geo.point()),
        lambda: Fisher(geo, X)(geo.point()).mv(direction(geo)),
        lambda: geoad.ntk(geo, X)(geo.point()),
        lambda: geoad.grad(geo.loss(F.cross_entropy, (X, Y)))(geo.point()),
    ):
        with pytest.raises(GeometryError, match=r"(?s)inputs are on cpu, the parameters on cuda.*Move one of them"):
            call()


@on_devices
def test_what_is_wrong_with_the_data_is_told_and_the_device_lives(device: str) -> None:
    """No kernel of the device is given labels or probabilities that end the process."""
    geo = Twin(mlp, device).there
    x, y = X.clone().to(device), Y.clone().to(device)
    x[-1, 0], y[-1] = torch.nan, 7
    good = X.to(device)
    for kind, data, message in (
        ("exact", x, "not finite"),
        ("mc", x, "not finite"),
        ("empirical", (good, y), "labels must lie between 0 and 2"),
    ):
        for representation in ("diagonal", "implicit"):
            with pytest.raises(GeometryError, match=message):
                Fisher(geo, data, kind=kind, representation=representation)(geo.point()).mv(direction(geo))
    for likelihood in ("bernoulli", "poisson", "gaussian"):
        with pytest.raises(GeometryError, match="not finite"):
            Fisher(geo, x, likelihood, kind="mc", representation="diagonal")(geo.point())
    assert float(torch.ones(2, device=device).sum()) == 2.0


# -- memory and time ---------------------------------------------------------------------------------------------------------


@cuda
@pytest.mark.parametrize("representation", ["diagonal", "kfac", "dense"])
def test_memory_follows_its_bound(representation: str) -> None:
    torch.manual_seed(0)
    geo = geoad.GeoModule(nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10)).cuda())
    x = torch.randn(4096, 64, device="cuda")
    peaks: list[int] = []
    for memory in (1 << 30, 1 << 23):
        field = Fisher(geo, x, representation=representation, max_memory=memory)
        field(geo.point())
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value = field(geo.point())
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del value
    result = {"diagonal": 4 * 19210, "kfac": 1 << 20, "dense": 4 * 19210**2}[representation]
    assert peaks[1] < peaks[0] and peaks[1] < 2 * result + (1 << 26)


@cuda
@pytest.mark.parametrize("representation", ["dense", "diagonal", "kfac", "low_rank"])
@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
def test_no_wait_in_each_batch(kind: str, representation: str) -> None:
    """As tests/test_device.py counts them on the CPU, told by torch itself."""
    geo = Twin(mlp, "cuda").there
    x, y = X.cuda(), Y.cuda()
    counts: list[int] = []
    for count in (2, 6):
        data = list(itertools.islice(zip(x.split(2), y.split(2), strict=True), count))
        field, p = Fisher(geo, data, kind=kind, representation=representation), geo.point()
        field(p)
        with waiting() as found:
            field(p)
        counts.append(len(found))
    assert counts[0] == counts[1]


class waiting:
    """What torch says where the host waits for the device."""

    def __enter__(self) -> list[Any]:
        self.caught = warnings.catch_warnings(record=True)
        found: Any = self.caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return found

    def __exit__(self, *error: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.caught.__exit__(*error)


# -- one process with a group ------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(device: str, tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group({"cpu": "gloo", "cuda": "nccl"}[device], store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def same(a: Tensor, b: Tensor) -> None:
    """The same bits; on a GPU, whose sums may be taken in any order, nearly."""
    bound = 0.0 if a.device.type == "cpu" else 1e-11
    torch.testing.assert_close(a, b, rtol=bound, atol=bound)


@on_devices
@pytest.mark.parametrize("representation", ["dense", "ekfac", "low_rank", "implicit"])
def test_a_shard_of_one_process(representation: str, device: str, alone: None) -> None:
    geo = Twin(conv, device).there
    data = (X.to(device), Y.to(device))
    mine, whole = (Fisher(geo, each, representation=representation)(geo.point()).to_dense() for each in (shard(data), data))
    assert mine.device.type == device
    same(mine, whole)
    losses = [geoad.grad(geo.loss(F.cross_entropy, each))(geo.point()).ravel() for each in (shard(data), data)]
    same(*losses)
    ((_, block),) = geoad.ntk(geo, shard(data[0])).blocks(geo.point())
    torch.testing.assert_close(block, geoad.ntk(geo, data[0])(geo.point()).components)


@on_devices
def test_what_lives_on_the_cpu_goes_through_any_group(device: str, alone: None) -> None:
    assert all_reduce(2.5) == 2.5
    x = torch.arange(3.0)
    assert torch.equal(all_reduce(x, "sum"), x) and all_reduce(x, "sum").device.type == "cpu"
    geo = Twin(mlp, "cpu").here
    w = geoad.grad(geo.loss(F.cross_entropy, (X, Y)))(geo.point())
    assert torch.equal(all_reduce(w).ravel(), w.ravel())
