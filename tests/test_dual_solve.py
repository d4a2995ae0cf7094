"""Dual solves: sums of fields, structured metrics, covariances, precision, memory, several processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import distributed_cases
import dual_cases
import pytest
import torch
import torch.nn.functional as F
from test_function_space import SPD, bent, near, network, random
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import geoad
from geoad import maps
from geoad.curvature import GGN, Categorical, Fisher, Hessian, LowRank
from geoad.errors import ChartMismatchError, GeometryError, SingularMetricError, StructureNotPreservedError, VarianceError
from geoad.metrics import Constant, Diagonal, Euclidean

X2 = torch.linspace(-1.0, 2.0, 12).double().reshape(4, 3).sin()
Y2 = torch.tensor([2, 0, 1, 1])


def entries(geo: geoad.GeoModule) -> dict[str, Tensor]:
    return {
        name: torch.linspace(0.1, 1.0, shape.numel()).double().reshape(shape) for name, shape in geo.reference.layout.items()
    }


def ridge(net: nn.Module) -> Tensor:
    return sum((w.square().sum() for w in net.parameters()), torch.zeros(()))


# what is asked for, as a function of (geo, Fisher over x, other Fisher of that representation, reference metric); and its rows
SUMS: dict[str, tuple[Any, int]] = {
    "with the reference metric": (lambda geo, A, other, R: A + 0.1 * R, 14),
    "two data sets and a diagonal prior": (
        lambda geo, A, other, R: 2.0 * A + 3 * other("implicit") + Diagonal(geo.reference, entries(geo)),
        22,
    ),
    "less a small one": (lambda geo, A, other, R: R + A - 0.01 * other("dense"), 22),
    "negative": (lambda geo, A, other, R: 5 * R - A, 14),
    "zero times": (lambda geo, A, other, R: A + 0 * other("implicit") + R, 14),
    "KFAC": (lambda geo, A, other, R: A + other("kfac") + 0.1 * R, 14),
    "EKFAC": (lambda geo, A, other, R: A + other("ekfac") + 0.1 * R, 14),
    "blocks": (lambda geo, A, other, R: A + other("block_diagonal") + 0.1 * R, 14),
    "a mix": (lambda geo, A, other, R: A + other({"0.*": "diagonal", "*": "kfac"}) + 0.1 * R, 14),
    "truncated": (lambda geo, A, other, R: A + other(LowRank(3)) + 0.1 * R, 14),
    "a dense metric of another chart": (
        lambda geo, A, other, R: A + Constant(bent(geo), SPD @ SPD.T + torch.eye(38).double()),
        14,
    ),
    "a Hessian": (lambda geo, A, other, R: A + 0.5 * Hessian(geo.scalar_field(ridge)), 14),
    "an indefinite rest": (lambda geo, A, other, R: A + R - 3.0 * other("diagonal"), 14),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_of_fields(name: str) -> None:
    """The terms with rows, and all others in their own structure, in two charts; with further damping too."""
    geo, x, _ = network()
    p, R = geo.point(), Euclidean(geo.reference)
    field = SUMS[name][0](geo, Fisher(geo, x), lambda r: Fisher(geo, (X2, Y2), representation=r), R)
    w = random(p.chart, p, False)
    matrix = field(p).to_dense()
    solver = geoad.DualSolver(field, p)
    assert solver.size == SUMS[name][1]
    near(solver.solve(w).ravel(), torch.linalg.solve(matrix, w.ravel()))
    q = p.to(bent(geo))
    near(
        geoad.dual_solve(field, q, w.to(q.chart), 0.2).to(p.chart).ravel(),
        torch.linalg.solve(matrix + 0.2 * torch.eye(38), w.ravel()),
    )


def test_logdet_of_a_sum() -> None:
    """log det(F + B) - log det B for the rest B."""
    geo, x, _ = network()
    p, prior = geo.point(), Diagonal(geo.reference, entries(geo))
    field = 2.0 * Fisher(geo, x) + Fisher(geo, X2)
    near(
        geoad.DualSolver(field + prior, p).logdet(),
        torch.logdet((field + prior)(p).to_dense()) - torch.logdet(prior(p).to_dense()),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_covariance_of_the_gradients(reduction: str) -> None:
    geo, x, y = network()
    p = geo.point()
    field = Fisher(geo, [(x[:3], y[:3]), (x[3:], y[3:])], kind="covariance", reduction=reduction)
    w, full = random(p.chart, p, False, 2), field(p).to_dense() + 0.1 * torch.eye(38)
    solver = geoad.DualSolver(field, p, 0.1)
    near(solver.solve(w).ravel(), torch.linalg.solve(full, w.ravel().T).T)
    near(solver.logdet(), torch.logdet(full / 0.1))


def test_other_charts() -> None:
    """Redundant coordinates: the lift of the solution. Below an immersion: the restricted system."""
    geo, x, y = network()
    p, loss = geo.point(), geo.loss(F.cross_entropy, (x, y))
    field = Fisher(geo, x) + Diagonal(geo.reference, entries(geo))
    q = p.to(geo.reference.reparametrize({"*.weight": maps.WeightNorm()}, name="redundant").target)
    found = geoad.dual_solve(field, q, geoad.grad(loss)(q))
    near(found.to(geo.reference).ravel(), geoad.dual_solve(field, p, geoad.grad(loss)(p)).ravel())
    q = p.to(geo.reference.reparametrize({"0.*": maps.Frozen(p)}, name="part").target)
    w = geoad.grad(loss)(q)
    near(geoad.dual_solve(field, q, w).ravel(), torch.linalg.solve(field(q).to_dense(), w.ravel()))


def test_another_damping() -> None:
    geo, x, _ = network()
    p, field = geo.point(), Fisher(geo, x)
    w, solver = random(p.chart, p, False), geoad.DualSolver(field, p, 0.1)
    for damping in (1e-3, 10.0):
        other = solver.damped(damping)
        assert other.gram is solver.gram
        near(other.solve(w).ravel(), geoad.dual_solve(field, p, w, damping).ravel())
        near(other.logdet(), geoad.DualSolver(field, p, damping).logdet())
    near(solver.solve(w).ravel(), geoad.dual_solve(field, p, w, 0.1).ravel())
    assert "14 rows" in repr(solver)
    with pytest.raises(GeometryError, match="another damping"):
        geoad.DualSolver(field + Euclidean(geo.reference), p).damped(0.1)
    with pytest.raises(GeometryError, match="damping"):
        solver.damped(0.0)


def test_differentiable_in_the_damping() -> None:
    """∂v/∂λ = -(F + λ)⁻¹ v."""
    geo, x, _ = network()
    p, damping = geo.point(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    w = random(p.chart, p, False)
    full = Fisher(geo, x)(p).to_dense() + 0.1 * torch.eye(38)
    v = geoad.dual_solve(Fisher(geo, x), p, w, damping).ravel()
    (slope,) = torch.autograd.grad(v.square().sum(), damping)
    near(slope, -2 * v.detach() @ torch.linalg.solve(full, v.detach()))


def test_transforms_of_a_solve() -> None:
    """Batched by vmap, and differentiated in the right-hand side."""
    geo, x, _ = network()
    p = geo.point()
    solver, rows = geoad.DualSolver(Fisher(geo, x), p, 0.1), random(p.chart, p, False, 3).ravel()

    def solved(row: Tensor) -> Tensor:
        return solver.solve(p.chart.covector(p.chart.layout.unravel(row), at=p)).ravel()

    inverse = torch.linalg.inv(Fisher(geo, x)(p).to_dense() + 0.1 * torch.eye(38))
    near(torch.func.vmap(solved)(rows), rows @ inverse)
    row = rows[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(solved(row).square().sum(), row)
    near(slope, 2 * inverse @ (inverse @ rows[0]))


# -- precision ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_small_damping(dtype: torch.dtype) -> None:
    """As good as the condition of the matrix allows, or refused: never a number that is wrong in silence."""
    geo, x, _ = network()
    p = geo.point()
    w, F_ = random(p.chart, p, False), Fisher(geo, x)(p).to_dense()
    low = geoad.GeoModule(copy.deepcopy(geo.wrapped).to(dtype))
    q = low.point()
    right = low.reference.covector(low.reference.layout.unravel(w.ravel().to(dtype)), at=q)
    refused = []
    for power in range(-1, -15, -1):
        damping = 10.0**power
        wanted = torch.linalg.solve(F_ + damping * torch.eye(38), w.ravel())
        condition = float(torch.linalg.matrix_norm(F_, 2)) / damping
        try:
            found = geoad.dual_solve(Fisher(low, x.to(dtype)), q, right, damping).ravel().double()
        except SingularMetricError as error:
            assert "too small" in str(error)
            refused.append(condition)
            continue
        assert not refused
        assert float((found - wanted).norm() / wanted.norm()) < 30 * torch.finfo(dtype).eps * max(1.0, condition)
    if dtype != torch.float64:
        assert refused and refused[0] * torch.finfo(dtype).eps > 1e-3
    else:
        assert not refused


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_saturated_outputs(scale: float) -> None:
    """Classes of probability zero: A has more null directions than that of a softmax."""
    geo, x, _ = network()
    net = copy.deepcopy(geo.wrapped)
    with torch.no_grad():
        net[2].weight.mul_(scale)  # pyright: ignore
    geo = geoad.GeoModule(net)
    p, field = geo.point(), Fisher(geo, x)
    w = random(p.chart, p, False)
    near(
        geoad.dual_solve(field, p, w, 1e-3).ravel(),
        torch.linalg.solve(field(p).to_dense() + 1e-3 * torch.eye(38), w.ravel()),
        1e-8,
    )


def test_more_rows_than_parameters() -> None:
    geo, _, _ = network()
    x, p = torch.randn(40, 3, dtype=torch.float64), geo.point()
    field, w = Fisher(geo, x, reduction="sum"), random(p.chart, p, False)
    solver = geoad.DualSolver(field, p, 0.01)
    assert solver.size == 80
    near(solver.solve(w).ravel(), torch.linalg.solve(field(p).to_dense() + 0.01 * torch.eye(38), w.ravel()), 1e-8)


def test_push_through() -> None:
    """(JᵀAJ + λ)⁻¹Jᵀu = Jᵀ(A JJᵀ + λ)⁻¹u, for a Gaussian: gradients are solved for in the space of outputs."""
    geo, x, _ = network()
    p, space = geo.point(), geoad.FunctionSpace(geo, x)
    J, u = space.jacobian(p), random(space.chart, space(p), False)
    kernel = J.pushforward(Euclidean(geo.reference)(p).inverse()).to_dense()
    within = torch.linalg.solve(kernel + 0.1 * torch.eye(21), u.ravel())
    wanted = J.pullback(space.chart.covector(within.reshape(7, 3), at=space(p)))
    field = Fisher(geo, x, "gaussian", reduction="sum")
    near(geoad.dual_solve(field, p, J.pullback(u), 0.1).ravel(), wanted.ravel())


# -- memory ------------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf._base is None and leaf.untyped_storage().nbytes():
                self.numel = max(self.numel, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def test_no_rows_are_multiplied_out() -> None:
    """What went in and what came back of the layers is enough, for the reference metric and one that is Kronecker."""
    torch.manual_seed(0)
    geo = geoad.GeoModule(nn.Sequential(nn.Linear(50, 80), nn.Tanh(), nn.Linear(80, 4)).double())
    x, p = torch.randn(10, 50, dtype=torch.float64), geo.point()
    w, kfac = random(p.chart, p, False), Fisher(geo, torch.randn(100, 50).double(), "gaussian", representation="kfac")
    geoad.DualSolver(Fisher(geo, x), p, 0.1)
    for metric in (None, kfac):
        with Largest() as seen:
            geoad.DualSolver(Fisher(geo, x), p, 0.1, metric).solve(w)
        assert seen.numel <= 100 * 4 * 80  # signals, of the metric too; all rows together are 10 * 3 * 4404 = 132,120


def test_chunks() -> None:
    """Rows that are multiplied out come a few at a time."""
    geo, x, _ = network()
    p, metric = geo.point(), Constant(geo.reference, SPD @ SPD.T + torch.eye(38).double())
    field, w = Fisher(geo, [x[:3], x[3:]]), random(p.chart, p, False)
    whole = geoad.DualSolver(field, p, 0.1, metric)
    for memory in (1, 20_000):
        small = geoad.DualSolver(field, p, 0.1, metric, max_memory=memory)
        near(small.gram, whole.gram)
        assert torch.equal(small.gram, small.gram.mT)
        near(small.solve(w).ravel(), whole.solve(w).ravel())


# -- refusals ----------------------------------------------------------------------------------------------------------------


def test_refused() -> None:
    geo, x, y = network()
    p, field, R = geo.point(), Fisher(geo, (x, y)), Euclidean(geo.reference)
    both = p.retract(random(p.chart, p, True), torch.ones(2, dtype=torch.float64))
    with pytest.raises(GeometryError, match="batch of points"):
        geoad.DualSolver(field, both, 0.1)
    with pytest.raises(ChartMismatchError, match="point of the network"):
        geoad.DualSolver(field, dict(p.components), 0.1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(VarianceError, match="is a field"):
        geoad.DualSolver(field, p, 0.1, R(p))
    with pytest.raises(GeometryError, match="at least 0"):
        geoad.DualSolver(field + R, p, -0.1)
    with pytest.raises(StructureNotPreservedError, match="not their values"):
        geoad.DualSolver(field(p), p, 0.1)
    with pytest.raises(StructureNotPreservedError, match="exact"):
        geoad.DualSolver(Fisher(geo, x, representation="kfac") + R, p)
    with pytest.raises(GeometryError, match="not finite"):
        geoad.dual_solve(field, p, torch.nan * random(p.chart, p, False), 0.1)
    with pytest.raises(SingularMetricError):
        geoad.DualSolver(field + Fisher(geo, X2, representation="kfac"), p)
    with pytest.raises(ChartMismatchError):
        geoad.DualSolver(field, p, 0.1, Euclidean(network(1)[0].reference))
    with pytest.raises(GeometryError, match="classes"):
        geoad.DualSolver(GGN(geo, (x, y + 7), Categorical()), p, 0.1)


# -- several processes -------------------------------------------------------------------------------------------------------


def test_two_processes(tmp_path: Path) -> None:
    distributed_cases.start(dual_cases.CHECKS, tmp_path)
