"""Tangent kernels: against plain Jacobians, in all charts, with metrics, between data sets, matrix-free."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import geoad
from geoad import operators as ops
from geoad.curvature import Difference, Fisher
from geoad.kernels import kernel_gram, kernel_terms
from geoad.kernels.kernel_gram import gram_of_rows
from geoad.kernels.kernel_terms import Positions, add_products
from geoad.kernels.layered import linearize, plan_of
from geoad.kernels.rows import Rows
from geoad.metrics import Constant, Diagonal, Euclidean
from geoad.params import Layout


def jacobian(net: nn.Module, x: object) -> Tensor:
    """The Jacobian (n, ..., c, d) by plain torch, the parameters in their order."""
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    args = x if isinstance(x, tuple) else (x,)
    j = jacrev(lambda q: functional_call(net, q, args))(parameters)
    lead = functional_call(net, parameters, args).ndim
    return torch.cat([block.reshape(*block.shape[:lead], -1) for block in j.values()], -1)


def near(a: Tensor, b: Tensor, rtol: float = 1e-10) -> None:
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * max(1e-3, float(b.abs().max())))


class Twice(nn.Module):
    """One weight at two places, and a convolution in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 2, groups=2)
        self.shared = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).mT
        return self.scale * self.head(self.shared(self.shared(h).tanh()).mean(1))


class Words(nn.Module):
    """An embedding with padding, an output at each position."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=0)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.table(x)).cumsum(1).tanh())


class Others(nn.Module):
    """Parameters without structure, of no size, without axes, and unused."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 3))
        self.number = nn.Parameter(torch.tensor(0.3))
        self.nothing = nn.Parameter(torch.zeros(0, 2))
        self.unused = nn.Parameter(torch.ones(2))
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer((x @ torch.linalg.matrix_exp(self.matrix)) * self.number.sin() + self.nothing.sum())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.ConvTranspose2d(3, 2, 2), nn.Flatten(), nn.Linear(50, 3))


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 7, shape)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (mlp, lambda n: torch.randn(n, 4)),
    "conv": (conv, lambda n: torch.randn(n, 2, 4, 4)),
    "twice": (Twice, lambda n: torch.randn(n, 4, 5)),
    "words": (Words, lambda n: tokens(n, 5)),
    "others": (Others, lambda n: torch.randn(n, 3)),
    "numbers": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)), lambda n: torch.randn(n, 3)),
}
every_case = pytest.mark.parametrize("name", CASES)


def case(name: str, *counts: int) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    make, data = CASES[name]
    return make(), [data(n) for n in counts]


def by_outputs(j: Tensor) -> Tensor:
    """(c, n · places, d)."""
    j = j if j.ndim > 2 else j.unsqueeze(-2)
    return j.movedim(-2, 0).flatten(1, -2)


# -- the kernel --------------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("max_memory", [1 << 28, 1])
def test_kernels_are_products_of_jacobians(name: str, max_memory: int) -> None:
    net, (x, y) = case(name, 3, 2)
    geo = geoad.GeoModule(net)
    p = geo.point()
    j, k = jacobian(net, x), jacobian(net, y)
    for second, other in ((None, j), (y, k)):
        full = torch.tensordot(j, other, ([-1], [-1]))
        value = geoad.ntk(geo, x, second, max_memory=max_memory)(p)
        near(value.components, full)
        each = by_outputs(j) @ by_outputs(other).mT
        near(geoad.ntk(geo, x, second, contract="trace", max_memory=max_memory)(p).to_dense(), each.sum(0))
        near(geoad.ntk(geo, x, second, contract="diagonal", max_memory=max_memory)(p).to_dense(), each)
        blocks = list(geoad.ntk(geo, x, second, max_memory=max_memory).blocks(p))
        near(torch.cat([block for _, block in blocks]), full)
        assert [place.start for place, _ in blocks] == [0, *(place.stop for place, _ in blocks[:-1])]
        assert len(blocks) == 3 or max_memory > 1
    near(geoad.ntk(geo, x, max_memory=max_memory).squared_norms(p), j.square().sum(-1))


@every_case
@pytest.mark.parametrize("slower", [0, 1e9], ids=["pairs", "rows"])
def test_the_form_of_the_terms_does_not_matter(name: str, slower: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows multiplied out, or pairs of positions: the same kernel (0: pairs wherever there are positions, 1e9: rows)."""
    monkeypatch.setattr(kernel_terms, "_SLOWER", slower)
    monkeypatch.setattr(kernel_terms, "_ROOM", 1)
    net, (x, y) = case(name, 5, 3)
    geo = geoad.GeoModule(net)
    j, k = jacobian(net, x), jacobian(net, y)
    near(geoad.ntk(geo, x)(geo.point()).components, torch.tensordot(j, j, ([-1], [-1])))
    near(geoad.ntk(geo, x, y)(geo.point()).components, torch.tensordot(j, k, ([-1], [-1])))
    near(geoad.ntk(geo, x, contract="trace")(geo.point()).to_dense(), (by_outputs(j) @ by_outputs(j).mT).sum(0))


def rows_of(net: nn.Module, x: Tensor, seeds: int) -> tuple[Rows, Tensor]:
    """Rows of random seeds, and the same from the plain Jacobian."""
    geo = geoad.GeoModule(net)
    theta = geo.point().blocks
    plan = plan_of(geo.evaluate, theta, x[:1])
    linearized = linearize(geo.evaluate, Layout({k: v.shape for k, v in theta.items()}), theta, x, plan)
    s = torch.randn(seeds, *linearized.outputs.shape)
    wanted = torch.einsum("kn...,n...d->nkd", s, jacobian(net, x))
    return linearized.pull(s), wanted


@every_case
def test_inner_products_of_rows_of_any_seeds(name: str) -> None:
    net, (x, y) = case(name, 5, 3)
    (a, j), (b, k) = rows_of(net, x, 2), rows_of(net, y, 4)
    near(gram_of_rows(a, b), torch.einsum("nkd,mld->nkml", j, k))
    own = gram_of_rows(a)
    near(own, torch.einsum("nkd,mld->nkml", j, j))
    flat = own.reshape(10, 10)
    assert torch.equal(flat, flat.mT)


def test_rows_of_different_structure_are_multiplied_out() -> None:
    net, (x, y) = case("mlp", 4, 3)
    (a, j), (b, k) = rows_of(net, x, 2), rows_of(net, y, 2)
    broken = linearize(
        geoad.GeoModule(net).evaluate, b.layout, geoad.GeoModule(net).point().blocks, y, b.plan.without_structure("a test")
    )
    rows = broken.pull(torch.ones(2, 3, 3))
    k = torch.einsum("kn...,n...d->nkd", torch.ones(2, 3, 3), jacobian(net, y))
    near(gram_of_rows(a, rows), torch.einsum("nkd,mld->nkml", j, k))


def test_positions_of_different_number() -> None:
    """Sequences of 1 and of 5 positions have kernels with each other."""
    torch.manual_seed(0)
    net = Twice()
    x, y = torch.randn(4, 4, 2), torch.randn(3, 4, 6)
    geo = geoad.GeoModule(net)
    near(geoad.ntk(geo, x, y)(geo.point()).components, torch.tensordot(jacobian(net, x), jacobian(net, y), ([-1], [-1])))


def test_padding_tokens_have_no_inner_products() -> None:
    left = torch.randn(2, 1, 3, 4)
    term = Positions(("table",), left, torch.tensor([[-1, 2, 2], [1, -1, 2]]), 5)
    rows = term.explicit().left.flatten(1)
    wanted = (rows @ rows.T)[:, None, :, None]
    for slower in (0, 1e9):
        total = torch.empty(2, 1, 2, 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel_terms, "_SLOWER", slower)
            add_products(total, term, term, fresh=True)
        near(total, wanted)
    table = torch.zeros(2, 5, 4)
    for n, t in itertools.product(range(2), range(3)):
        token = int(term.right[n, t])
        if token >= 0:
            table[n, token] += left[n, 0, t]
    near(rows, table.flatten(1))


def test_kernels_are_symmetric_to_the_last_bit() -> None:
    net, (x,) = case("conv", 40)
    geo = geoad.GeoModule(net.float())
    for contract in ("none", "trace", "diagonal"):
        matrix = geoad.ntk(geo, x.float(), contract=contract, max_memory=1 << 19)(geo.point()).to_dense()
        assert torch.equal(matrix, matrix.mT)


@pytest.mark.parametrize("max_memory", [1 << 12, 1 << 14, 1 << 16])
def test_chunks_of_several_samples(max_memory: int) -> None:
    net, (x, y) = case("mlp", 23, 11)
    geo = geoad.GeoModule(net)
    j, k = jacobian(net, x), jacobian(net, y)
    near(geoad.ntk(geo, x, max_memory=max_memory)(geo.point()).components, torch.tensordot(j, j, ([-1], [-1])))
    near(geoad.ntk(geo, y, x, max_memory=max_memory)(geo.point()).components, torch.tensordot(k, j, ([-1], [-1])))


def test_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_gram, "_TILE", 1)
    net, (x, y) = case("mlp", 300, 90)
    geo, p = geoad.GeoModule(net), None
    p = geo.point()
    j, k = jacobian(net, x), jacobian(net, y)
    near(geoad.ntk(geo, x)(p).components, torch.tensordot(j, j, ([-1], [-1])))
    near(geoad.ntk(geo, x, y, contract="diagonal")(p).to_dense(), by_outputs(j) @ by_outputs(k).mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precisions(dtype: torch.dtype) -> None:
    net, (x,) = case("mlp", 9)
    wanted = torch.tensordot(jacobian(net, x), jacobian(net, x), ([-1], [-1])).reshape(27, 27)
    geo = geoad.GeoModule(net.to(dtype))
    found = geoad.ntk(geo, x.to(dtype))(geo.point()).to_dense()
    assert found.dtype == dtype
    assert (found.double() - wanted).norm() < 30 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize(
    ("outputs", "pick"),
    [
        (Difference(2, 0), lambda j: j[..., 2:, :] - j[..., :1, :]),
        ([2, 1], lambda j: j[..., [2, 1], :]),
        (1, lambda j: j[..., 1:2, :]),
        (lambda f: f.sum(-1), lambda j: j.sum(-2)),
    ],
)
def test_some_outputs(outputs: object, pick: Callable[[Tensor], Tensor]) -> None:
    net, (x, y) = case("mlp", 5, 3)
    geo = geoad.GeoModule(net)
    j, k = pick(jacobian(net, x)), pick(jacobian(net, y))
    near(geoad.ntk(geo, x, outputs=outputs)(geo.point()).components, torch.tensordot(j, j, ([-1], [-1])))
    near(geoad.ntk(geo, x, y, outputs=outputs)(geo.point()).components, torch.tensordot(j, k, ([-1], [-1])))


def test_forms_of_data() -> None:
    net, (x,) = case("mlp", 7)
    geo = geoad.GeoModule(net)
    wanted = geoad.ntk(geo, x)(geo.point()).to_dense()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(7)), batch_size=3)
    for data in ((x, torch.zeros(7)), [(x[:3], None), (x[3:], None)], loader, {"input": x}):
        near(geoad.ntk(geo, data)(geo.point()).to_dense(), wanted)
        near(geoad.ntk(geo, data, x)(geo.point()).to_dense(), wanted)
    with pytest.raises(geoad.GeometryError, match="one-shot"):
        geoad.ntk(geo, iter([x]))


# -- types -------------------------------------------------------------------------------------------------------------------


def test_types() -> None:
    net, (x, y) = case("mlp", 5, 4)
    geo = geoad.GeoModule(net)
    p = geo.point()
    value = geoad.ntk(geo, x)(p)
    assert isinstance(value, geoad.Cometric) and value.type == (2, 0)
    near(value.at.components, net(x).detach())
    assert geoad.ntk(geo, x, metric=Euclidean(geo.reference))(p).chart == value.chart  # the same space of outputs
    assert geoad.ntk(geo, x.clone())(p).chart != value.chart
    u = value.chart.covector(torch.randn(5, 3), at=value.at)
    assert isinstance(value @ u, geoad.Vector)
    two = geoad.ntk(geo, x, y)(p)
    assert isinstance(two, geoad.GeoTensor) and two.type == (2, 0) and two.components.shape == (5, 3, 4, 3)
    with pytest.raises(geoad.VarianceError, match="with respect to which metric"):
        value.trace()


def test_coverage_and_other_data() -> None:
    net, (x, y) = case("others", 4, 3)
    geo = geoad.GeoModule(net)
    field = geoad.ntk(geo, x, contract="trace")
    assert field.coverage()["layer.weight"] == "affine" and field.coverage()["matrix"].startswith("generic")
    assert field.with_data(y)(geo.point()).to_dense().shape == (3, 3)
    assert field.with_data(y, x)(geo.point()).to_dense().shape == (3, 4)
    assert "4 × 3 samples" in repr(field.with_data(x, y))


# -- charts and metrics --------------------------------------------------------------------------------------------------------


def charts(geo: geoad.GeoModule) -> list[geoad.Chart]:
    theta = geo.reference
    g = torch.Generator().manual_seed(3)
    bent = theta.reparametrize({"*.weight": geoad.maps.Softplus(), "*": geoad.maps.Sinh()}, name="psi").target
    mixed = bent.reparametrize(geoad.maps.Coupling(generator=g), name="mixed").target
    return [theta, bent, mixed]


def metrics(geo: geoad.GeoModule, x: Tensor) -> dict[str, geoad.FormField]:
    theta = geo.reference
    psi = theta.reparametrize(geoad.maps.Asinh(), name="asinh").target
    d = theta.dim
    root = torch.randn(d, d) / d**0.5
    parts: dict[tuple[str, ...], ops.LinearOperator] = {}
    for i in (0, 2, 4):
        names = (f"{i}.weight", f"{i}.bias")
        arrangement, layout = ops.Arrangement(*names), theta.layout.restrict(names)
        _, o, n = arrangement.sizes(layout)
        left, right = torch.randn(1, o, o), torch.randn(1, n, n)
        left, right = left @ left.mT + torch.eye(o), right @ right.mT + torch.eye(n)
        parts[names] = ops.Kronecker(layout, arrangement, left, right, definite=True)
    damping = 0.2 * Euclidean(theta)
    return {
        "multiple": 3.0 * Euclidean(theta),
        "diagonal": Diagonal(theta, {name: 1 + torch.rand(shape) for name, shape in theta.layout.items()}),
        "dense": Constant(theta, root @ root.T + torch.eye(d)),
        "kronecker": Constant(theta, ops.BlockDiagonal(theta.layout, parts)),
        "fisher": Fisher(geo, x, "categorical") + damping,
        "kfac": Fisher(geo, x, "categorical", representation="kfac") + damping,
        "in another chart": Constant(psi, root @ root.T + torch.eye(d)),
        "fisher, damped in another chart": Fisher(geo, x, "categorical") + 0.2 * Euclidean(psi),
    }


KINDS = [
    "multiple",
    "diagonal",
    "dense",
    "kronecker",
    "fisher",
    "kfac",
    "in another chart",
    "fisher, damped in another chart",
]


@pytest.mark.parametrize("kind", KINDS)
def test_metrics(kind: str) -> None:
    """J G⁻¹ Jᵀ from dense matrices in the reference chart; the same numbers in every chart."""
    net, (x, y) = case("mlp", 5, 4)
    geo = geoad.GeoModule(net)
    metric, p = metrics(geo, x)[kind], geo.point()
    inverse = torch.linalg.inv(metric(p).to_dense())
    j, k = jacobian(net, x), jacobian(net, y)
    full, between = torch.tensordot(j @ inverse, j, ([-1], [-1])), torch.tensordot(j @ inverse, k, ([-1], [-1]))
    for chart in charts(geo):
        q = chart.point(p.to(chart).components)  # a point that does not remember where it came from
        near(geoad.ntk(geo, x, metric=metric)(q).components, full, 1e-8)
        near(geoad.ntk(geo, x, y, metric)(q).components, between, 1e-8)
        near(geoad.ntk(geo, x, metric=metric, max_memory=1)(q).components, full, 1e-8)
        near(geoad.ntk(geo, x, metric=metric, contract="trace")(q).to_dense(), torch.einsum("ncmc->nm", full), 1e-8)
        near(geoad.ntk(geo, x, metric=metric).squared_norms(q).flatten(), full.reshape(15, 15).diagonal(), 1e-8)
        implicit = geoad.ntk(geo, x, metric=metric, representation="implicit")(q)
        u = implicit.chart.covector(torch.randn(2, 5, 3), at=implicit.at)
        near((implicit @ u).components, torch.einsum("ncmd,bmd->bnc", full, u.components), 1e-8)


def test_kronecker_metrics_keep_the_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inverse goes to the factors: no rows are solved for."""
    net, (x,) = case("mlp", 5)
    geo = geoad.GeoModule(net)
    metric = metrics(geo, x)["kronecker"]
    monkeypatch.setattr(kernel_gram, "_solved", None)
    geoad.ntk(geo, x, metric=metric)(geo.point())


def test_invariance_and_its_loss() -> None:
    """Without a metric the reference metric moves along; JJᵀ in other coordinates is another matrix."""
    net, (x,) = case("mlp", 5)
    geo = geoad.GeoModule(net)
    p = geo.point()
    wanted = geoad.ntk(geo, x)(p).to_dense()
    for chart in charts(geo)[1:]:
        q = chart.point(p.to(chart).components)
        near(geoad.ntk(geo, x)(q).to_dense(), wanted)
        j = geoad.jacobian(lambda blocks: functional_call(net, blocks, (x,)).flatten())(q)  # components ∂f/∂ψ
        naive = j.components @ j.components.T
        assert (naive - wanted).norm() > 0.2 * wanted.norm()
        near(geoad.ntk(geo, x, metric=Euclidean(chart))(p).to_dense(), naive)  # it belongs to another metric


def test_the_module_in_another_chart() -> None:
    net, (x,) = case("mlp", 5)
    geo = geoad.GeoModule(net)
    field = geoad.ntk(geo, x)
    wanted = field(geo.point()).to_dense()
    geo.to(charts(geo)[1])
    near(field(geo.point()).to_dense(), wanted)


def test_below_an_immersion_the_kernel_is_that_of_fewer_parameters() -> None:
    net, (x,) = case("mlp", 4)
    geo = geoad.GeoModule(net)
    theta = geo.reference
    basis = torch.randn(theta.dim, 5)
    chart = theta.reparametrize(geoad.maps.Subspace(basis, offset=geo.point())).target
    q = chart.point(torch.randn(5))
    inner = copy.deepcopy(net)
    inner.load_state_dict(q.to(theta).blocks)
    j = jacobian(inner, x)
    for metric, g in ((None, torch.eye(theta.dim)), (Diagonal(theta, 2.0), 2 * torch.eye(theta.dim))):
        wanted = j @ basis @ torch.linalg.inv(basis.T @ g @ basis) @ basis.T
        assert (torch.tensordot(wanted, j, ([-1], [-1])) - torch.tensordot(j, j, ([-1], [-1]))).norm() > 1
        near(geoad.ntk(geo, x, metric=metric)(q).components, torch.tensordot(wanted, j, ([-1], [-1])))
        implicit = geoad.ntk(geo, x, metric=metric, representation="implicit")(q)
        u = implicit.chart.covector(torch.randn(4, 3), at=implicit.at)
        near((implicit @ u).ravel(), torch.tensordot(wanted, j, ([-1], [-1])).reshape(12, 12) @ u.ravel())


def test_redundant_coordinates_give_the_same_kernel() -> None:
    net, (x,) = case("mlp", 4)
    geo = geoad.GeoModule(net)
    psi = geo.reference.reparametrize({"*.weight": geoad.maps.WeightNorm(), "*": geoad.maps.Identity()}).target
    p = geo.point()
    near(geoad.ntk(geo, x)(p.to(psi)).to_dense(), geoad.ntk(geo, x)(p).to_dense())


def test_fisher_and_kernel_have_the_same_spectrum() -> None:
    net, (x,) = case("mlp", 4)
    geo = geoad.GeoModule(net)
    p = geo.point()
    kernel = torch.linalg.eigvalsh(geoad.ntk(geo, x)(p).to_dense())
    fisher = torch.linalg.eigvalsh(Fisher(geo, x, "gaussian", representation="dense", reduction="sum")(p).to_dense())
    near(fisher[-12:], kernel, 1e-9)


# -- matrix-free -------------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("contract", ["none", "trace"])
def test_matrix_free_products(name: str, contract: str) -> None:
    net, (x,) = case(name, 6)
    geo = geoad.GeoModule(net)
    p = geo.point()
    dense = geoad.ntk(geo, x, contract=contract)(p)
    implicit = geoad.ntk(geo, [x[:4], x[4:]], contract=contract, representation="implicit")(p)
    near(implicit.to_dense(), dense.to_dense())
    shape = dense.chart.layout["f"]
    for lead in ((), (3,), (2, 2), ()):
        u = torch.randn(*lead, *shape)
        found = (implicit @ implicit.chart.covector(u, at=implicit.at)).components
        near(found, (u.reshape(*lead, -1) @ dense.to_dense()).reshape(u.shape), 1e-9)


def test_conjugate_gradients_and_lanczos() -> None:
    net, (x,) = case("mlp", 10)
    geo = geoad.GeoModule(net)
    kernel = geoad.ntk(geo, x, representation="implicit")(geo.point())
    matrix = geoad.ntk(geo, x)(geo.point()).to_dense()
    near(ops.eigh(kernel.op, None, 3)[0], torch.linalg.eigvalsh(matrix).flip(0)[:3], 1e-8)
    shifted = ops.plus(kernel.op, ops.Multiple(kernel.op.layout, torch.tensor(0.5)), definite=True)
    b = torch.randn(10, 3)
    found = ops.solve(shifted, {"f": b}, method=ops.CG(1e-12))["f"]
    near(found.flatten(), torch.linalg.solve(matrix + 0.5 * torch.eye(30), b.flatten()), 1e-8)


# -- refusals ----------------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    net, (x,) = case("mlp", 4)
    geo = geoad.GeoModule(net)
    p = geo.point()
    with pytest.raises(geoad.SingularMetricError):
        geoad.ntk(geo, x, metric=Fisher(geo, x, "categorical"))(p)
    with pytest.raises(geoad.GeometryError, match="finite"):
        geoad.ntk(geo, torch.full_like(x, torch.nan))(p)
    with pytest.raises(geoad.GeometryError, match="contract='sum'"):
        geoad.ntk(geo, x, contract="sum")
    with pytest.raises(geoad.GeometryError, match="representation"):
        geoad.ntk(geo, x, representation="kfac")
    with pytest.raises(geoad.GeometryError, match="two data sets"):
        geoad.ntk(geo, x, x, representation="implicit")
    with pytest.raises(geoad.GeometryError, match="GeoModule"):
        geoad.ntk(net, x)  # pyright: ignore
    with pytest.raises(geoad.GeometryError, match="metric field"):
        geoad.ntk(geo, x, metric=Euclidean(geo.reference)(p))
    with pytest.raises(geoad.GeometryError, match="batch of them"):
        geoad.ntk(geo, x)(geo.reference.point({k: torch.stack([v, v]) for k, v in p.blocks.items()}))
    with pytest.raises(geoad.GeometryError, match="manifold"):
        geoad.ntk(geo, x)(geoad.GeoModule(mlp()).point())


def test_kernels_larger_than_the_memory_are_refused() -> None:
    net, _ = case("mlp")
    geo = geoad.GeoModule(net)
    with pytest.raises(geoad.GeometryError, match=r"field\.blocks"):
        geoad.ntk(geo, torch.zeros(1, 4).expand(400_000, 4), max_memory=1 << 14)(geo.point())


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    net, (x,) = case("mlp", 4)
    geo = geoad.GeoModule(net)
    geoad.ntk(geo, x, progress=True)(geo.point())
    assert "4/4" in capsys.readouterr().err


def test_samples_that_depend_on_each_other_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    geo = geoad.GeoModule(net)
    with pytest.raises(geoad.GeometryError, match="statistics of the batch"):
        geoad.ntk(geo, torch.randn(4, 4))(geo.point())
    geo.eval()
    geoad.ntk(geo, torch.randn(4, 4))(geo.point())


def test_batches_with_outputs_of_different_shapes_are_refused() -> None:
    torch.manual_seed(0)
    geo = geoad.GeoModule(Words())
    with pytest.raises(geoad.GeometryError, match="different batches"):
        geoad.ntk(geo, [(tokens(2, 3), None), (tokens(2, 4), None)])(geo.point())
