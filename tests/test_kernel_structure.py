"""Tangent kernels: structure of metrics, derivatives, memory, host reads, and data that have no fixed order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import geoad
from geoad import tangent
from geoad.curvature import Difference, Fisher
from geoad.kernels import kernel_gram, kernel_terms
from geoad.metrics import Constant, Diagonal, Euclidean


def jacobian(net: nn.Module, x: Tensor) -> Tensor:
    """The Jacobian (n, ..., c, d) by plain torch."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    j = jacrev(lambda q: functional_call(net, q, (x,)))(parameters)
    lead = functional_call(net, parameters, (x,)).ndim
    return torch.cat([block.reshape(*block.shape[:lead], -1) for block in j.values()], -1)


def near(a: Tensor, b: Tensor, rtol: float = 1e-9) -> None:
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


class Words(nn.Module):
    """An embedding with padding, an output at each position."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4, padding_idx=0)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).cumsum(1).tanh())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))


def conv() -> nn.Module:
    first = [nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Tanh(), nn.ConvTranspose2d(4, 2, 2), nn.Tanh()]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(32, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (mlp, lambda n: torch.randn(n, 4)),
    "conv": (conv, lambda n: torch.randn(n, 2, 3, 3)),
    "words": (Words, lambda n: torch.randint(0, 9, (n, 4))),
}


def case(name: str, *counts: int) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    make, data = NETS[name]
    return make(), [data(n) for n in counts]


# -- metrics -----------------------------------------------------------------------------------------------------------------


def metric_of(kind: str, geo: geoad.GeoModule, x: Tensor) -> geoad.FormField:
    theta = geo.reference
    if kind == "entries":
        return Diagonal(theta, {name: 0.5 + torch.rand(shape) for name, shape in theta.layout.items()})
    return Fisher(geo, x, "categorical", representation=kind) + 0.2 * Euclidean(theta)


KINDS = ["entries", "diagonal", "kfac", "ekfac", "block_diagonal", "dense", "low_rank"]


@pytest.mark.parametrize("slower", [-1e9, 1e9], ids=["structure", "rows"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETS)
def test_inverse_metrics_by_their_structure(name: str, kind: str, slower: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighted outer products or rows multiplied out, in every contraction: J G⁻¹ Jᵀ of dense matrices."""
    monkeypatch.setattr(kernel_terms, "_SLOWER", slower)
    monkeypatch.setattr(kernel_terms, "_ROOM", 1 << 10)
    monkeypatch.setattr(kernel_terms.Weighted, "prefers_explicit", lambda _: slower > 0)
    net, (x, y) = case(name, 5, 3)
    geo = geoad.GeoModule(net)
    p, metric = geo.point(), metric_of(kind, geo, x)
    inverse = torch.linalg.inv(metric(p).to_dense())
    j, k = jacobian(net, x), jacobian(net, y)
    for second, other in ((None, j), (y, k)):
        near(geoad.ntk(geo, x, second, metric)(p).components, torch.tensordot(j @ inverse, other, ([-1], [-1])))
        a, b = (each.movedim(-2, 0).flatten(1, -2) for each in (j, other))
        each = a @ inverse @ b.mT
        near(geoad.ntk(geo, x, second, metric, contract="diagonal")(p).to_dense(), each)
        near(geoad.ntk(geo, x, second, metric, contract="trace")(p).to_dense(), each.sum(0))
    near(geoad.ntk(geo, x, metric=metric).squared_norms(p), ((j @ inverse) * j).sum(-1))


@pytest.mark.parametrize("kind", ["entries", "kfac", "ekfac"])
def test_damped_metrics_need_no_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x,) = case("mlp", 6)
    geo = geoad.GeoModule(net)
    metric, p = metric_of(kind, geo, x), geo.point()
    wanted = geoad.ntk(geo, x, metric=metric)(p).to_dense()
    monkeypatch.setattr(kernel_gram, "_solved", None)
    monkeypatch.setattr(kernel_terms.Weighted, "prefers_explicit", lambda _: False)
    monkeypatch.setattr(kernel_terms.Weighted, "explicit", None)
    near(geoad.ntk(geo, x, metric=metric)(p).to_dense(), wanted)


def test_the_cost_of_weighted_layers_grows_with_the_square_of_the_outputs_only() -> None:
    """Rows multiplied out of K outputs: K · o · i numbers a sample; in structure K · o + i."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 10))
    geo, x = geoad.GeoModule(net), torch.randn(4, 30)
    metric = metric_of("kfac", geo, x)
    held: list[int] = []
    found = kernel_gram.features

    def features(*args: Any, **options: Any) -> kernel_gram.Features:
        made = found(*args, **options)
        held.append(made.numbers // made.samples)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("geoad.tangent.data.features", features)
        geoad.ntk(geo, x, metric=metric)(geo.point())
    assert max(held) <= 10 * (40 + 10) + (31 + 41)


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
def test_half_precision_metrics(kind: str) -> None:
    net, (x,) = case("mlp", 6)
    geo = geoad.GeoModule(net)
    wanted = geoad.ntk(geo, x, metric=metric_of(kind, geo, x))(geo.point()).to_dense()
    low, z = geoad.GeoModule(net.bfloat16()), x.bfloat16()
    found = geoad.ntk(low, z, metric=metric_of(kind, low, z))(low.point()).to_dense()
    assert found.dtype == torch.bfloat16 and (found.double() - wanted).norm() < 0.15 * wanted.norm()


def test_forms_that_are_not_symmetric_are_refused() -> None:
    net, (x,) = case("mlp", 3)
    geo = geoad.GeoModule(net)
    negative = -1.0 * Euclidean(geo.reference)
    j = jacobian(net, x).flatten(0, 1)
    near(geoad.ntk(geo, x, metric=negative)(geo.point()).to_dense(), -j @ j.T)


# -- derivatives -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "kfac", "ekfac", "constant"])
@pytest.mark.parametrize("contract", ["none", "trace", "diagonal"])
def test_kernels_are_differentiable(kind: str | None, contract: str) -> None:
    """In the point, by torch.func in both modes and by autograd, against differences."""
    net, (x,) = case("mlp", 3)
    geo = geoad.GeoModule(net)
    theta, p = geo.reference, geo.point()
    root = torch.randn(theta.dim, theta.dim) / theta.dim
    constant = Constant(theta, root @ root.T + torch.eye(theta.dim))
    metric = None if kind is None else constant if kind == "constant" else metric_of(kind, geo, x)
    weights = torch.linspace(0, 1, {"none": 81, "trace": 9, "diagonal": 27}[contract])

    def number(blocks: dict[str, Tensor]) -> Tensor:
        return geoad.ntk(geo, x, metric=metric, contract=contract)(theta.point(blocks)).to_dense().flatten() @ weights

    v = {name: torch.randn(shape) for name, shape in theta.layout.items()}
    step = 1e-5
    ends = [number({name: block + t * v[name] for name, block in p.blocks.items()}) for t in (step, -step)]
    wanted = (ends[0] - ends[1]) / (2 * step)
    gradient = torch.func.grad(number)(p.blocks)
    near(sum((gradient[name] * v[name]).sum() for name in v), wanted, 1e-6)  # pyright: ignore
    near(torch.func.jvp(number, (p.blocks,), (v,))[1], wanted, 1e-6)
    leaves = {name: block.clone().requires_grad_() for name, block in p.blocks.items()}
    found = torch.autograd.grad(number(leaves), list(leaves.values()), allow_unused=True)
    near(sum((g * v[name]).sum() for name, g in zip(leaves, found, strict=True) if g is not None), wanted, 1e-6)  # pyright: ignore


def test_derivatives_of_what_belongs_to_kernels() -> None:
    net, (x, y) = case("mlp", 3, 2)
    geo = geoad.GeoModule(net)
    theta, p = geo.reference, geo.point()
    j = jacobian(net, x)
    slope = torch.func.grad(lambda b: geoad.ntk(geo, x).squared_norms(theta.point(b)).sum())(p.blocks)
    wanted = torch.func.grad(lambda b: geoad.ntk(geo, x)(theta.point(b)).to_dense().trace())(p.blocks)
    for name in slope:
        near(slope[name], wanted[name])
    stacked = {name: torch.stack([block, 2 * block]) for name, block in p.blocks.items()}
    found = torch.func.vmap(lambda b: geoad.ntk(geo, x, y)(theta.point(b)).components)(stacked)
    near(found[0], torch.tensordot(j, jacobian(net, y), ([-1], [-1])))
    in_data = torch.func.grad(lambda z: geoad.ntk(geo, z)(p).to_dense().sum())(x)
    assert in_data.abs().min() > 0
    with pytest.raises(geoad.GeometryError, match="zero in silence"):
        torch.func.grad(lambda b: sum(rows.sum() for _, rows in geoad.ntk(geo, x).blocks(theta.point(b))))(p.blocks)


# -- data --------------------------------------------------------------------------------------------------------------------


class Shuffled:
    """Batches in another order every time."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.passes = x, 0

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        self.passes += 1
        yield from ((part, None) for part in self.x.roll(self.passes, 0).split(3))


def test_data_without_a_fixed_order_are_refused() -> None:
    net, (x,) = case("mlp", 6)
    geo = geoad.GeoModule(net)
    loader = DataLoader(TensorDataset(x, torch.zeros(6)), batch_size=2, shuffle=True)
    with pytest.raises(geoad.GeometryError, match="RandomSampler"):
        geoad.ntk(geo, loader)
    with pytest.raises(geoad.GeometryError, match="another order"):
        tangent.kernel_ridge(geoad.ntk(geo, Shuffled(x)), geo.point(), torch.zeros(6, 3))
    with pytest.raises(geoad.GeometryError, match="another order"):
        geoad.ntk(geo, Shuffled(x), max_memory=1)(geo.point())


def test_one_selection_has_one_space() -> None:
    net, (x,) = case("mlp", 4)
    geo = geoad.GeoModule(net)
    p = geo.point()
    for same in (
        [[2, 0], (2, 0), torch.tensor([2, 0]), [-1, 0]],
        [Difference(2, 0), Difference(-1, 0)],
        [None, range(3), [0, 1, 2]],
        [1, [1], -2],
    ):
        spaces = [geoad.ntk(geo, x, outputs=each)(p).chart for each in same]
        spaces += [geoad.FunctionSpace(geo, x, outputs=each).chart for each in same]
        assert all(each == spaces[0] for each in spaces)
    assert geoad.ntk(geo, x, outputs=[0, 2])(p).chart != geoad.ntk(geo, x, outputs=[2, 0])(p).chart


def test_functions_of_the_outputs_act_on_samples() -> None:
    net, (x,) = case("mlp", 4)
    geo = geoad.GeoModule(net)
    with pytest.raises(geoad.GeometryError, match="beside another one"):
        geoad.ntk(geo, x, outputs=lambda f: f - f.mean(0))(geo.point())
    for wrong in (lambda f: f.sum(), lambda f: f.argmax(-1)):
        with pytest.raises(geoad.GeometryError, match="real numbers with the samples"):
            geoad.ntk(geo, x, outputs=wrong)(geo.point())


class Root(nn.Module):
    """An infinite derivative at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).abs().sqrt().unsqueeze(-1)


def test_kernels_that_are_not_finite_are_refused() -> None:
    geo = geoad.GeoModule(Root())
    x = torch.ones(3, 2)
    for call in (
        lambda: geoad.ntk(geo, x)(geo.point()),
        lambda: geoad.ntk(geo, x, x[:2])(geo.point()),
        lambda: list(geoad.ntk(geo, x).blocks(geo.point())),
    ):
        with pytest.raises(geoad.GeometryError, match="not finite"):
            call()


# -- memory and host reads -----------------------------------------------------------------------------------------------------


def test_blocks_stay_within_the_memory() -> None:
    net, (x,) = case("mlp", 300)
    geo = geoad.GeoModule(net)
    field = geoad.ntk(geo, x, max_memory=1 << 20)
    blocks = list(field.blocks(geo.point()))
    assert max(rows.numel() * rows.element_size() for _, rows in blocks) <= 1 << 19
    j = jacobian(net, x).flatten(0, 1)
    near(torch.cat([rows for _, rows in blocks]).reshape(900, 900), j @ j.T)


class Reads(TorchDispatchMode):
    """How often numbers are read back to the host."""

    names = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "unique_dim", "unique_consecutive")

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.names:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("contract", ["none", "trace"])
@pytest.mark.parametrize("kind", [None, "kfac"])
def test_numbers_are_not_read_back_for_each_chunk(name: str, contract: str, kind: str | None) -> None:
    net, (x,) = case(name, 5)
    geo = geoad.GeoModule(net)
    p = geo.point()
    metric = None if kind is None else metric_of(kind, geo, x[:4])
    counts: list[Counter[str]] = []
    for max_memory in (1 << 28, 1 << 14):
        field = geoad.ntk(geo, x, metric=metric, contract=contract, max_memory=max_memory)
        field(p)
        with Reads() as reads:
            field(p)
        counts.append(reads.count)
    assert len(list(geoad.ntk(geo, x, max_memory=1 << 14).blocks(p))) > 1
    assert counts[0] == counts[1]
    assert counts[0].total() < 40


# -- estimates ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_standard_errors_are_honest(method: str) -> None:
    """Over 200 seeds: two of them cover about 95 %, and the estimates of the trace have no bias."""
    torch.manual_seed(0)
    kernel = _kernel_with(1 / torch.arange(1.0, 41.0))
    for estimate in (tangent.trace, tangent.effective_rank):
        wanted = float(estimate(kernel))
        hidden = geoad.Cometric(kernel.home, _Hidden(kernel.op), kernel.at)
        found = [estimate(hidden, 45, method=method, generator=torch.Generator().manual_seed(s)) for s in range(200)]
        inside = sum(abs(float(each) - wanted) <= 2 * float(each.error) for each in found)
        assert inside >= 170, (estimate.__name__, inside)
    traces = torch.tensor([float(tangent.trace(hidden, 45, method=method)) for _ in range(200)])
    assert abs(float(traces.mean()) - float(tangent.trace(kernel))) < 4 * float(traces.std()) / 200**0.5


def _kernel_with(values: Tensor) -> geoad.Cometric:
    """The kernel of a linear model with these eigenvalues."""
    n = len(values)
    geo = geoad.GeoModule(nn.Linear(n, 1, bias=False))
    q = torch.linalg.qr(torch.randn(n, n)).Q
    return geoad.ntk(geo, q * values.sqrt())(geo.point())


class _Hidden(geoad.operators.Implicit):
    """A matrix that is known by its products."""

    def __init__(self, op: geoad.operators.LinearOperator) -> None:
        super().__init__(op.layout, {"f": op.like}, symmetric=True)
        self.op = op

    def mv(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.op.mv(v)
