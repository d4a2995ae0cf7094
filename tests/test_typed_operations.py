"""Structured tensors in charts: closure of structure under maps, samples, powers, inner products, borders they cross."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import geoad
from geoad import operators as ops
from geoad import transport
from geoad.errors import GeometryError, SingularMetricError, VarianceError
from geoad.operators import Arrangement, LinearOperator
from geoad.params import Blocks, Layout
from geoad.tensors import DualEndomorphism

F64 = torch.float64
DRAWS = torch.Generator().manual_seed(5)
theta = geoad.Chart({"0.weight": (3, 2), "0.bias": (3,), "norm": (2,), "2.weight": (2, 3)}, name="theta")
LAYOUT = theta.layout
GROUPS = (("0.weight", "0.bias"), ("norm",), ("2.weight",))
FIRST, NORM, LAST = (LAYOUT.restrict(group) for group in GROUPS)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=DRAWS, dtype=F64)


def spd(n: int) -> Tensor:
    root = rand(n, n)
    return root @ root.mT / n + torch.eye(n, dtype=F64)


def positive(layout: Layout) -> Blocks:
    return {name: rand(*shape).square() + 0.5 for name, shape in layout.items()}


def blocks(layout: Layout, *batch: int) -> Blocks:
    return {name: rand(*batch, *shape) for name, shape in layout.items()}


def orthogonal(n: int) -> Tensor:
    return torch.linalg.qr(rand(n, n)).Q


def kronecker(layout: Layout = FIRST, weight: str = "0.weight", bias: str | None = "0.bias") -> ops.Kronecker:
    arrangement = Arrangement(weight, bias)
    _, units, inputs = arrangement.sizes(layout)
    return ops.Kronecker(layout, arrangement, spd(units)[None], spd(inputs)[None], definite=True)


def ekfac(layout: Layout = LAST, weight: str = "2.weight", bias: str | None = None) -> ops.EigenKronecker:
    arrangement = Arrangement(weight, bias)
    _, units, inputs = arrangement.sizes(layout)
    values = rand(1, units, inputs).square() + 0.5
    return ops.EigenKronecker(layout, arrangement, orthogonal(units)[None], orthogonal(inputs)[None], values, definite=True)


def in_blocks(first: LinearOperator, last: LinearOperator) -> ops.BlockDiagonal:
    norm = ops.Diagonal(NORM, positive(NORM), definite=True)
    return ops.BlockDiagonal(LAYOUT, dict(zip(GROUPS, (first, norm, last), strict=True)))


def low_rank(base: LinearOperator | None) -> ops.LowRank:
    return ops.LowRank(LAYOUT, blocks(LAYOUT, 4), base=base, definite=base is not None)


PAIR = ("0.weight", "0.bias")
entries = {name: block + 2 for name, block in positive(LAYOUT).items()}
OPERATORS: dict[str, LinearOperator] = {
    "multiple": ops.Multiple(LAYOUT, torch.tensor(2.0, dtype=F64), definite=True),
    "diagonal": ops.Diagonal(LAYOUT, positive(LAYOUT), definite=True),
    "dense": ops.Dense(LAYOUT, spd(LAYOUT.dim), definite=True),
    "low rank": low_rank(None),
    "low rank, diagonal": low_rank(ops.Diagonal(LAYOUT, positive(LAYOUT), definite=True)),
    "low rank, multiple": low_rank(ops.Multiple(LAYOUT, torch.tensor(1.5, dtype=F64), definite=True)),
    "quasi-diagonal": ops.QuasiDiagonal(LAYOUT, entries, {PAIR: 0.3 * rand(3, 2)}, definite=True),
    "block-diagonal": in_blocks(ops.Dense(FIRST, spd(9), definite=True), ops.Dense(LAST, spd(6), definite=True)),
    "kfac": in_blocks(kronecker(), kronecker(LAST, "2.weight", None)),
    "ekfac": in_blocks(ekfac(FIRST, *PAIR), ekfac()),
    "sum": ops.plus(in_blocks(kronecker(), ekfac()), low_rank(None), definite=True),
}
SINGULAR = ("low rank",)
maps = geoad.maps
generator = torch.Generator().manual_seed(0)
Q, P = spd(3), spd(2)
RECIPES: dict[str, Any] = {
    "asinh": maps.Asinh(),
    "scale": maps.Scale(2.0),
    "rescale": maps.Rescale(pairs=[("0", "2")], generator=generator),
    "permutation": {"2.weight": maps.Permutation([2, 0, 1, 5, 4, 3], signs=[1, -1, 1, 1, -1, 1])},
    "permuted units": {"0.*": maps.Permutation([2, 0, 1], dim=0)},
    "layer affine": {"0.*": maps.LayerAffine(Q, P), "2.*": maps.LayerAffine(generator=generator)},
    "one layer affine": maps.LayerAffine(generator=generator),
    "orthogonal": {"2.weight": maps.Orthogonal(orthogonal(3), side="right")},
    "householder": {"2.weight": maps.Householder(side="left", generator=generator)},
    "blocks of their own": {"0.*": maps.Affine(generator=generator), "2.*": maps.Asinh()},
    "one affine": maps.Affine(generator=generator),
    "composed": maps.Compose(maps.Scale(0.5), {"0.*": maps.LayerAffine(Q, P)}, {"norm": maps.Asinh()}),
    "inverse": maps.Inverse({"0.*": maps.LayerAffine(Q, P), "norm": maps.Scale(3.0)}),
}
CHARTS = {name: theta.reparametrize(recipe, name=name).target for name, recipe in RECIPES.items()}
CHARTS["chained"] = CHARTS["layer affine"].reparametrize({"norm": maps.Asinh()}, name="chained").target
p = theta.point(blocks(LAYOUT))

_D, _Q, _L, _B, _K, _E = "Diagonal", "QuasiDiagonal", "LowRank", "BlockDiagonal", "Kronecker", "EigenKronecker"
_ALWAYS = {"low rank": _L}
_DIAGONAL = {"multiple": _D, "diagonal": _D, "low rank, diagonal": _L, "low rank, multiple": _L, **_ALWAYS}
_LAYERS = {"block-diagonal": _B, "kfac": _B, "ekfac": _B, "sum": "Sum", **_ALWAYS}
CLOSED: dict[str, dict[str, str]] = {
    "asinh": {**_DIAGONAL, **_LAYERS, "quasi-diagonal": _Q},
    "scale": {**_DIAGONAL, **_LAYERS, "quasi-diagonal": _Q},
    "rescale": {**_DIAGONAL, **_LAYERS, "quasi-diagonal": _Q},
    "permutation": {**_DIAGONAL, **_LAYERS},
    "permuted units": {**_DIAGONAL, **_LAYERS},
    "layer affine": _LAYERS,
    "one layer affine": _LAYERS,
    "orthogonal": _LAYERS,
    "householder": _LAYERS,
    "blocks of their own": _LAYERS,
    "one affine": _ALWAYS,
    "composed": _LAYERS,
    "inverse": _LAYERS,
    "chained": _LAYERS,
}
"""Which structure a (0,2) tensor has after each map; the rest becomes a lazy congruence."""

PARTS: dict[tuple[str, str], tuple[str, str]] = {
    ("kfac", "layer affine"): (_K, _K),
    ("ekfac", "layer affine"): (_E, _E),
    ("kfac", "one layer affine"): (_K, _K),
    ("kfac", "orthogonal"): (_K, _K),
    ("ekfac", "householder"): (_E, _E),
    ("kfac", "permuted units"): (_K, _K),
    ("kfac", "inverse"): (_K, _K),
    ("ekfac", "chained"): (_E, _E),
    ("kfac", "blocks of their own"): ("Dense", "Dense"),
    ("kfac", "asinh"): ("Dense", "Dense"),
}


def close(got: Tensor, want: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("ups", [(False, False), (True, True), (True, False), (False, True)])
def test_structure_moves_by_the_law(chart: str, ups: tuple[bool, bool]) -> None:
    """Against `transport.dense`, which moves each index of the matrix."""
    end = CHARTS[chart]
    for name, op in OPERATORS.items():
        cls = {(False, False): geoad.Form, (True, True): geoad.Cometric, (True, False): geoad.Endomorphism}.get(ups)
        tensor = (cls(theta, op, p) if cls is not None else DualEndomorphism(theta, op, p)).to(end)
        operator = tensor.operator
        want = transport.dense(ops.to_dense(op), ups, p, end)
        matrix = operator.layout.ravel(operator.mv(operator.layout.unravel(torch.eye(end.dim, dtype=F64)))).mT
        close(matrix, want)
        close(ops.to_dense(operator), want)
        close(tensor.to_dense(), want)
        if operator.symmetric:
            close(matrix, matrix.mT)
        if operator.definite:
            assert bool((torch.linalg.eigvalsh(want) > 0).all())
        assert ups[0] != ups[1] or (operator.symmetric and operator.definite == op.definite)
        if ups == (False, False):
            assert type(operator).__name__ == CLOSED[chart].get(name, "Moved"), (name, chart)


@pytest.mark.parametrize(("name", "chart"), PARTS)
@pytest.mark.parametrize("up", [False, True])
def test_parts_keep_their_structure(name: str, chart: str, up: bool) -> None:
    cls = geoad.Cometric if up else geoad.Form
    operator = cls(theta, OPERATORS[name], p).to(CHARTS[chart]).operator
    assert isinstance(operator, ops.BlockDiagonal)
    assert (type(operator.parts[GROUPS[0]]).__name__, type(operator.parts[GROUPS[2]]).__name__) == PARTS[name, chart]


def test_oblique_bases_solve_and_have_determinants() -> None:
    metric = geoad.Metric(theta, OPERATORS["ekfac"], p).to(CHARTS["layer affine"])
    operator, matrix = metric.operator, metric.to_dense()
    b = blocks(LAYOUT)
    close(LAYOUT.ravel(ops.solve(operator, b, positive=True)), torch.linalg.solve(matrix, LAYOUT.ravel(b)))
    close(ops.slogdet(operator)[1], torch.linalg.slogdet(matrix).logabsdet)
    assert isinstance(operator, ops.BlockDiagonal)
    assert not operator.parts[GROUPS[0]].orthogonal  # pyright: ignore[reportAttributeAccessIssue]
    turned = geoad.Metric(theta, OPERATORS["ekfac"], p).to(CHARTS["householder"]).operator
    assert turned.parts[GROUPS[2]].orthogonal  # pyright: ignore[reportAttributeAccessIssue]


# -- carrying, copying, saving ---------------------------------------------------------------------------------------------


def form_of(name: str) -> Any:
    return (geoad.Form if name in SINGULAR else geoad.Metric)(theta, OPERATORS[name], p)


every = pytest.mark.parametrize("name", OPERATORS)


def same(a: Any, b: Any) -> None:
    assert type(a) is type(b) and type(a.op) is type(b.op) and a.chart == b.chart and a.home == b.home
    assert torch.equal(a.to_dense(), b.to_dense())
    assert (a.op.symmetric, a.op.definite) == (b.op.symmetric, b.op.definite)


@every
def test_carry_keeps_the_structure(name: str) -> None:
    q = theta.point(blocks(LAYOUT))
    form = form_of(name)
    carried = form.carry(to=q, chart=theta)
    assert carried.op is form.op and carried.at is q
    chart = CHARTS["layer affine"]
    there = form.carry(to=q, chart=chart)
    assert there.home == chart and there.chart == theta
    close(there.to(chart).to_dense(), form.to(chart).to_dense())
    average = 0.9 * carried + 0.1 * form_of(name).carry(to=q, chart=theta)
    close(average.to_dense(), form.to_dense())


@every
def test_saving_copying_and_casting(name: str) -> None:
    for form in (form_of(name), form_of(name).to(CHARTS["layer affine"])):
        same(form, pickle.loads(pickle.dumps(form)))
        same(form, copy.deepcopy(form))
        same(form, form.detach())
        same(form, form.clone())
        buffer = io.BytesIO()
        geoad.save(form, buffer)
        buffer.seek(0)
        same(form, geoad.load(buffer, theta))
        single = form.to(torch.float32)
        assert single.dtype == torch.float32 and type(single.op) is type(form.op)
        close(single.to_dense().double(), form.to_dense(), 1e-4)


@every
def test_they_cross_transforms_with_their_own_numbers(name: str) -> None:
    v = blocks(LAYOUT, 3)
    form = form_of(name)

    def product(factor: Tensor, v: Blocks, form: Any) -> Any:
        scaled = factor * form
        return scaled, scaled @ theta.vector(v, at=p)

    factors = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    stack, images = torch.func.vmap(product, in_dims=(0, 0, None))(factors, v, form)
    want = form.to_dense()
    close(images.ravel(), factors[:, None] * (LAYOUT.ravel(v) @ want))
    assert stack.batch_shape == (3,) and (name == "sum" or type(stack.op) is type(form.op))
    close(stack.to_dense(), factors[:, None, None] * want)


# -- operations --------------------------------------------------------------------------------------------------------------

METRICS = [name for name in OPERATORS if name not in SINGULAR]
SEEN = ("asinh", "layer affine", "one affine")


@pytest.mark.parametrize("name", METRICS)
def test_the_same_noise_gives_the_same_vectors_in_every_chart(name: str) -> None:
    form = form_of(name)

    def drawn(metric: Any) -> Any:
        return metric.sample(5, generator=torch.Generator().manual_seed(3))

    here = drawn(form)
    assert isinstance(here, geoad.Vector) and here.batch_shape == (5,)
    for chart in SEEN:
        there = drawn(form.to(CHARTS[chart]))
        assert there.chart == CHARTS[chart]
        close(there.to(theta).ravel(), here.ravel(), 1e-9)
        close(there.ravel(), here.to(CHARTS[chart]).ravel(), 1e-12)


def test_samples_have_the_inverse_metric_as_covariance() -> None:
    metric = form_of("kfac").to(CHARTS["one affine"])
    drawn = metric.sample(40_000, generator=torch.Generator().manual_seed(0)).ravel()
    want = torch.linalg.inv(metric.to_dense())
    assert float((drawn.mT @ drawn / len(drawn) - want).norm() / want.norm()) < 5 * (theta.dim / len(drawn)) ** 0.5


def test_samples_of_batches_of_metrics() -> None:
    points = theta.point(blocks(LAYOUT, 3))
    diagonal = ops.Diagonal(LAYOUT, {name: block.square() + 1 for name, block in blocks(LAYOUT, 3).items()}, definite=True)
    for op in (diagonal, OPERATORS["kfac"]):
        drawn = geoad.Metric(theta, op, points).sample(4)
        assert drawn.batch_shape == (3, 4)


def test_samples_need_a_positive_form() -> None:
    for form in (form_of("low rank"), form_of("dense") - 3 * form_of("dense")):
        with pytest.raises(SingularMetricError):
            form.sample(2)


@pytest.mark.parametrize("power", [-1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", [name for name in METRICS if name != "quasi-diagonal"])
def test_powers_are_tensors(name: str, power: float) -> None:
    """In every chart R (R⁻¹B)^p of the components; with the reference metric the matrix power at home."""
    form = form_of(name)
    values, vectors = torch.linalg.eigh(form.to_dense())
    want = (vectors * values**power) @ vectors.mT
    raised = form.power(power)
    close(raised.to_dense(), want)
    assert type(raised) is geoad.Metric
    chart = CHARTS["one affine"]
    close(form.to(chart).power(power).to_dense(), transport.dense(want, (False, False), p, chart), 1e-9)
    other = theta.metric(spd(theta.dim), at=p)
    g, b = other.to_dense(), form.to_dense()
    root = torch.linalg.cholesky(g)
    white = torch.linalg.solve(root, torch.linalg.solve(root, b).mT).mT
    values, vectors = torch.linalg.eigh(0.5 * (white + white.mT))
    close(form.power(power, metric=other).to_dense(), root @ ((vectors * values**power) @ vectors.mT) @ root.mT, 1e-9)
    close(form.to(chart).power(power, other.to(chart)).to(theta).to_dense(), form.power(power, other).to_dense(), 1e-8)


def test_powers_keep_structure_and_refuse() -> None:
    reference = geoad.metrics.Euclidean(theta)(p)
    assert [type(part) for part in form_of("kfac").power(0.5).op.parts.values()] == [ops.Kronecker, ops.Diagonal, ops.Kronecker]
    assert isinstance(form_of("low rank").power(2).op, ops.LowRank)
    close(form_of("dense").power(0.0).to_dense(), reference.to_dense())
    close(
        form_of("dense").power(2.0, metric=3 * reference).to_dense(),
        form_of("dense").to_dense() @ form_of("dense").to_dense() / 3,
    )
    with pytest.raises(SingularMetricError):
        form_of("low rank").power(-1.0)
    with pytest.raises(SingularMetricError, match="negative eigenvalue"):
        (form_of("diagonal") - 5 * form_of("diagonal")).power(0.5)
    with pytest.raises(VarianceError, match="not symmetric"):
        theta.form(rand(theta.dim, theta.dim), at=p).power(2)
    with pytest.raises(VarianceError, match="a metric"):
        form_of("dense").power(2, metric=form_of("low rank"))


FORMS = [("kfac", "ekfac"), ("low rank", "diagonal"), ("dense", "quasi-diagonal"), ("low rank", "low rank"), ("sum", "dense")]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("chart", [None, "one affine"])
def test_inner_products_are_invariant(metric: str, chart: str | None) -> None:
    g = form_of(metric)
    for a, b in (
        ("kfac", "ekfac"),
        ("low rank", "diagonal"),
        ("dense", "quasi-diagonal"),
        ("low rank", "low rank"),
        ("sum", "dense"),
    ):
        x, y = form_of(a), form_of(b)
        inverse = torch.linalg.inv(g.to_dense())
        want = (inverse @ x.to_dense() @ inverse @ y.to_dense()).trace()
        if chart is not None:
            end = CHARTS[chart]
            close(g.to(end).inner(x.to(end), y.to(end)), want, 1e-9)
            continue
        close(g.inner(x, y), want)
        close(g.frobenius(x).square(), (inverse @ x.to_dense() @ inverse @ x.to_dense()).trace())


def test_inner_product_of_a_form_that_is_not_symmetric() -> None:
    g, a = form_of("dense"), theta.form(rand(theta.dim, theta.dim), at=p)
    inverse = torch.linalg.inv(g.to_dense())
    close(g.frobenius(a).square(), (inverse @ a.to_dense() @ inverse @ a.to_dense().mT).trace())
    reference = geoad.metrics.Euclidean(theta)(p)
    close(reference.frobenius(a), torch.linalg.matrix_norm(a.to_dense()))
    with pytest.raises(VarianceError):
        g.inner(g, g.inverse())


def test_diagonals_are_refused_and_scipy_has_the_components_of_the_chart() -> None:
    pytest.importorskip("scipy")
    chart = CHARTS["one affine"]
    for tensor in (form_of("kfac"), form_of("kfac").to(chart), form_of("dense").inverse().to(chart)):
        with pytest.raises(VarianceError, match="a diagonal is no tensor"):
            tensor.diagonal()
        close(torch.from_numpy(tensor.to_scipy() @ torch.eye(theta.dim, dtype=F64).numpy()), tensor.to_dense())
        close(tensor.operator.layout.ravel(ops.diagonal(tensor.operator)), tensor.to_dense().diagonal())


# -- large ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide() -> Any:
    chart = geoad.Chart({"w": (120, 99), "b": (120,)}, name="wide")
    at = chart.point(blocks(chart.layout))
    op = ops.Kronecker(chart.layout, Arrangement("w", "b"), spd(120)[None], spd(100)[None], definite=True)
    return geoad.Metric(chart, op, at)


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "solve": lambda g: g.solve(g.chart.covector(blocks(g.chart.layout), at=g.at), damping=0.1),
    "damped": lambda g: g + 0.1 * geoad.metrics.Euclidean(g.chart)(g.at),
    "inverse": lambda g: g.inverse(damping=0.1),
    "logdet": lambda g: g.logdet(),
    "power": lambda g: g.power(-0.5),
    "sample": lambda g: g.sample(2),
    "inner": lambda g: geoad.metrics.Euclidean(g.chart)(g.at).frobenius(g),
    "trace": lambda g: geoad.metrics.Euclidean(g.chart)(g.at).trace(g),
    "eigh": lambda g: geoad.eigh(g, metric=2 * geoad.metrics.Euclidean(g.chart)(g.at), k=3),
    "carry": lambda g: g.carry(to=g.chart.point(blocks(g.chart.layout)), chart=g.chart),
    "cast": lambda g: g.to(torch.float32),
    "state": lambda g: geoad.from_state(geoad.to_state(g), g.chart),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_large_forms_never_become_dense(name: str, wide: Any) -> None:
    assert wide.chart.dim > ops.DENSE_LIMIT
    OPERATIONS[name](wide)
    assert not hasattr(wide.op, "dense")


def test_large_dense_factors_are_refused(wide: Any) -> None:
    for call in (wide.cholesky, wide.inverse_sqrt, lambda: wide.components):
        with pytest.raises(GeometryError, match="not made behind your back"):
            call()


def test_large_eigenvalues(wide: Any) -> None:
    reference = geoad.metrics.Euclidean(wide.chart)(wide.at)
    values, frame = geoad.eigh(wide, metric=2 * reference, k=3)
    left, right = (torch.linalg.eigvalsh(factor[0]) for factor in (wide.op.left, wide.op.right))
    close(values, (left[:, None] * right).flatten().sort(descending=True).values[:3] / 2, 1e-9)
    columns = wide.chart.layout.unravel(frame.components.mT)
    close(wide.chart.layout.ravel(wide.op.mv(columns)), 2 * values[:, None] * wide.chart.layout.ravel(columns), 1e-8)
