"""Connections: Christoffel symbols and covariant derivatives."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from connection_cases import (
    CHARTS,
    close,
    matrix_in,
    pair,
    rough,
    sphere,
    symbols_by_formula,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import geoad
from geoad import maps
from geoad.connection import Christoffel
from geoad.errors import BasePointError, ChartMismatchError, GeometryError, SingularMetricError, VarianceError

# torch itself warns when its forward mode is used for the first time
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


# -- Christoffel symbols -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 4])
def test_symbols_by_formula(d: int) -> None:
    theta = geoad.Chart({"x": (d,)}, name="theta")
    x = torch.linspace(0.3, 0.9, d)
    found = geoad.christoffel(theta.metric_field(rough))(theta.point(x))
    assert isinstance(found, Christoffel)
    assert found.components.shape == (d, d, d)
    close(found.components, symbols_by_formula(rough, x))
    assert torch.equal(found.components, found.components.mT)


@pytest.mark.parametrize("recipe", CHARTS)
def test_affine_law(recipe: str) -> None:
    """Moving the symbols = computing them in psi from the metric's own components there."""
    theta, psi, p = pair(recipe)
    moved = geoad.christoffel(theta.metric_field(rough))(p.to(psi))
    assert moved.chart is psi
    y = p.to(psi).ravel()
    close(moved.components, symbols_by_formula(matrix_in(psi, rough), y), 1e-9)
    # a field whose home is psi is the same connection
    own = geoad.christoffel(psi.metric_field(matrix_in(psi, rough)))(p)
    assert own.chart is theta
    close(own.components, symbols_by_formula(rough, p.ravel()), 1e-9)
    close(moved.to(theta).components, symbols_by_formula(rough, p.ravel()), 1e-9)


@pytest.mark.parametrize("recipe", CHARTS)
def test_default_connection(recipe: str) -> None:
    """The flat reference connection: zero at home, the second derivative of the chart elsewhere."""
    theta, psi, p = pair(recipe)
    assert not geoad.christoffel()(p).components.any()
    flat = geoad.christoffel()(p.to(psi)).components
    euclid = geoad.christoffel(geoad.metrics.Euclidean(theta))(p.to(psi)).components
    identity = matrix_in(psi, lambda x: torch.eye(3, dtype=x.dtype))
    close(flat, symbols_by_formula(identity, p.to(psi).ravel()), 1e-9)
    close(flat, euclid)
    assert bool(flat.any()) != (recipe in ("affine", "orthogonal"))
    # Γ_ψ(v,v) = -∂²φ(u,u), u = J⁻¹ v
    v = torch.tensor([0.3, -1.0, 0.5])
    u = psi.vector(v, at=p).to(theta).components
    assert psi.parent is not None
    bound = psi.parent.map

    def forward(x: Tensor) -> Tensor:
        return bound.forward({"x": x})["x"]

    def push(x: Tensor) -> Tensor:
        return torch.func.jvp(forward, (x,), (u,))[1]

    bend = torch.func.jvp(push, (p.ravel(),), (u,))[1]
    close(torch.einsum("kij,i,j->k", flat, v, v), -bend, 1e-9)


def test_symbols_between_siblings() -> None:
    """Through the tree of charts, two steps up and one down."""
    theta, first, p = pair("softplus")
    second = first.reparametrize(maps.Sinh(), name="second").target
    third = theta.reparametrize(maps.Affine(), name="third").target
    field = second.metric_field(rough)
    start = geoad.christoffel(field)(p.to(second))
    close(start.to(third).to(second).components, start.components)
    close(start.to(third).components, geoad.christoffel(field)(p.to(third)).components)
    assert third.parent is not None
    assert third.parent(start.to(theta)).chart is third  # a reparametrization moves them too


def test_symbols_of_dict_charts() -> None:
    shapes = {"w": (2, 2), "s": (), "b": (1,)}
    theta = geoad.Chart(shapes, name="net")
    psi = theta.reparametrize({"w": maps.Sinh(), "s": maps.Exp(), "*": maps.Identity()}, name="psi").target
    layout = theta.layout
    field = theta.metric_field(lambda blocks: rough(layout.ravel(blocks)))
    x = torch.linspace(0.2, 0.8, 6)
    p = theta.point(layout.unravel(x))
    close(geoad.christoffel(field)(p).components, symbols_by_formula(rough, x))
    moved = geoad.christoffel(field)(p.to(psi))
    assert moved.components.shape == (6, 6, 6)
    close(moved.to(theta).components, symbols_by_formula(rough, x))


def test_symbols_of_one_number() -> None:
    line = geoad.Chart({"a": ()}, name="line")
    field = line.metric_field(lambda a: a.exp().reshape(1, 1))
    p = line.point(torch.tensor(0.3))
    close(geoad.christoffel(field)(p).components, torch.full((1, 1, 1), 0.5))
    psi = line.reparametrize(maps.Sinh()).target
    found = geoad.geodesic(field, p.to(psi), line.vector(torch.tensor(1.0), at=p).to(psi), 0.7, steps=64)
    # arc length exp(a/2) grows linearly
    close(found.to(line).components, 2 * torch.log(torch.tensor(math.exp(0.15) * (1 + 0.35))), 1e-10)


def test_sums_and_conformal_fields() -> None:
    theta, _, p = pair("sinh")
    parts = theta.metric_field(rough) + 0.3 * geoad.metrics.Euclidean(theta)
    close(geoad.christoffel(parts)(p).components, symbols_by_formula(lambda x: rough(x) + 0.3 * torch.eye(3), p.ravel()))
    factor = theta.scalar_field(lambda x: (x**2).sum().exp())
    conformal = theta.metric_field(rough) * factor
    wanted = symbols_by_formula(lambda x: rough(x) * (x**2).sum().exp(), p.ravel())
    close(geoad.christoffel(conformal)(p).components, wanted)


def test_batches_and_vmap() -> None:
    theta, psi, _ = pair("softplus")
    field = theta.metric_field(rough)
    points = theta.point(0.3 + torch.rand(4, 3)).to(psi)
    batched = geoad.christoffel(field)(points)
    mapped = torch.func.vmap(geoad.christoffel(field))(points)
    assert batched.batch_shape == mapped.batch_shape == (4,)
    for i in range(4):
        single = geoad.christoffel(field)(psi.point(points.ravel()[i]))
        close(batched.components[i], single.components)
        close(mapped[i].components, single.components)
        close(batched[i].to(theta).components, single.to(theta).components)
    close(mapped.to(theta).components, batched.to(theta).components)
    twice = geoad.christoffel(field)(theta.point(0.3 + torch.rand(2, 2, 3)))
    assert twice.components.shape == (2, 2, 3, 3, 3)


def test_symbols_are_differentiable() -> None:
    theta = geoad.Chart({"x": (2,)})
    field = theta.metric_field(rough)
    x = torch.tensor([0.4, 0.6], requires_grad=True)
    geoad.christoffel(field)(theta.point(x)).components.sum().backward()
    assert x.grad is not None
    slope: Any = torch.func.grad(lambda y: geoad.christoffel(field)(theta.point(y)).components.sum())(x.detach())
    close(x.grad, slope)
    h = torch.tensor([1e-5, 0.0])
    difference = sum(s * geoad.christoffel(field)(theta.point(x.detach() + s * h)).components.sum() / 2e-5 for s in (1, -1))
    close(slope[0], torch.as_tensor(difference), 1e-6)


def test_symbols_of_float32() -> None:
    theta, psi, p = pair("softplus")
    single = geoad.christoffel(theta.metric_field(rough))(p.to(psi).to(torch.float32))
    double = geoad.christoffel(theta.metric_field(rough))(p.to(psi))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.to(torch.float64).components, double.components, rtol=1e-4, atol=1e-4)


def test_symbols_have_their_own_algebra() -> None:
    theta, psi, p = pair("coupling")
    one, flat = geoad.christoffel(theta.metric_field(rough)), geoad.christoffel()
    difference = one(p) - flat(p)
    assert isinstance(difference, geoad.GeoTensor)
    assert difference.type == (1, 2)
    there = one(p.to(psi)) - flat(p.to(psi))
    close(difference.to(psi).components, there.components)  # a tensor
    close((flat(p.to(psi)) + there).components, one(p.to(psi)).components)
    close((one(p) - difference).components, torch.zeros(3, 3, 3))
    with pytest.raises(ChartMismatchError, match=r"\.to\(chart\)"):
        one(p) - flat(p.to(psi))
    with pytest.raises(BasePointError):
        one(p) - flat(theta.point(torch.ones(3)))
    refused: list[Callable[[Christoffel], Any]] = [
        lambda g: g + g,
        lambda g: 2 * g,
        lambda g: g * 2,
        lambda g: -g,
        lambda g: g @ g,
        lambda g: 1.0 + g,
        lambda g: g - 1.0,
        lambda g: g - theta.vector(torch.ones(3), at=p),
        lambda g: torch.einsum("kij,i->kj", g, torch.ones(3)),
        lambda g: torch.ones(3) * g,
        lambda g: bool(g),
    ]
    for use in refused:
        with pytest.raises(VarianceError):
            use(one(p))
    with pytest.raises(GeometryError, match="frozen"):
        one(p).data = torch.zeros(3, 3, 3)
    with pytest.raises(VarianceError, match="components"):
        one(p)[0]


def test_symbols_survive_copies() -> None:
    theta, psi, p = pair("softplus")
    found = geoad.christoffel(theta.metric_field(rough))(p.to(psi))
    assert copy.deepcopy(found) is found
    back = pickle.loads(pickle.dumps(found))
    assert back.chart == psi
    close(back.to(back.at.chart.reference).components, found.to(theta).components)
    assert repr(found) == "Christoffel('psi', dim=3, float64, cpu)"
    assert not found.detach().components.requires_grad


def test_learnable_chart() -> None:
    theta = geoad.Chart({"x": (2,)})
    phi = theta.reparametrize(maps.Scale(2.0, learnable=True))
    field = theta.metric_field(rough)
    p = theta.point(torch.tensor([0.4, 0.6]))
    found = geoad.christoffel(field)(p.to(phi.target))
    close(found.components, geoad.christoffel(field)(p).components / 2)
    (slope,) = torch.autograd.grad(found.components.sum(), list(phi.parameters()))
    close(slope, -found.components.sum().detach())  # Γ ~ 1/c, the parameter is log c
    stale = found
    with torch.no_grad():
        next(phi.parameters()).add_(0.1)
    with pytest.raises(BasePointError, match="learnable"):
        stale.to(theta)


def test_what_symbols_refuse() -> None:
    theta, _, p = pair("softplus")
    euclid = geoad.metrics.Euclidean(theta)
    with pytest.raises(VarianceError, match="metric field"):
        geoad.christoffel(euclid(p))  # type: ignore[arg-type]
    with pytest.raises(VarianceError, match="indefinite"):
        geoad.christoffel(theta.metric_field(rough) - euclid)  # type: ignore[arg-type]
    with pytest.raises(ChartMismatchError, match="another manifold"):
        geoad.christoffel(euclid)(geoad.Chart((3,)).point(torch.ones(3)))
    with pytest.raises(ChartMismatchError):
        geoad.christoffel(euclid)(torch.ones(3))  # type: ignore[arg-type]
    with pytest.raises(ChartMismatchError):
        geoad.christoffel()(torch.ones(3))  # type: ignore[arg-type]
    plane = geoad.Chart((2,), name="polar")
    polar = plane.metric_field(lambda x: torch.diag(torch.stack([torch.ones_like(x[0]), x[0] ** 2])))
    with pytest.raises(SingularMetricError):
        geoad.christoffel(polar)(plane.point(torch.tensor([0.0, 1.0])))
    with pytest.raises(SingularMetricError):  # in a batch as well
        geoad.christoffel(polar)(plane.point(torch.tensor([[1.0, 1.0], [0.0, 1.0]])))
    large = geoad.Chart((300,))
    with pytest.raises(GeometryError, match="geodesic"):
        geoad.christoffel()(large.point(torch.ones(300)))


# -- covariant derivatives -----------------------------------------------------------------------------------------------


def function(x: Tensor) -> Tensor:
    return (x[0] * x[1]).sin() + x[2] ** 3 + x.prod() + (x[0] - 0.2).exp()


@pytest.mark.parametrize("recipe", CHARTS)
def test_metric_is_parallel(recipe: str) -> None:
    theta, psi, p = pair(recipe)
    field = theta.metric_field(rough)
    for at in (p, p.to(psi)):
        zero = geoad.covariant_derivative(field, field)(at)
        assert zero.type == (0, 3)
        close(zero.to_dense(), torch.zeros(3, 3, 3), 1e-9)
    inverse = geoad.covariant_derivative(lambda q: field(q).inverse(), field)(p)
    assert inverse.type == (2, 1)
    close(inverse.to_dense(), torch.zeros(3, 3, 3))
    volume = geoad.covariant_derivative(lambda q: field(q).det().sqrt().log(), field)(p.to(psi))
    assert isinstance(volume, geoad.Covector)
    close(volume.ravel(), torch.zeros(3), 1e-9)
    identity = geoad.covariant_derivative(lambda q: theta.endomorphism(torch.eye(3), at=q), field)(p)
    close(identity.to_dense(), torch.zeros(3, 3, 3))


@pytest.mark.parametrize("recipe", CHARTS)
def test_second_derivative_of_a_function_is_its_hessian(recipe: str) -> None:
    theta, psi, p = pair(recipe)
    loss = theta.scalar_field(function)
    for metric in (None, theta.metric_field(rough), psi.metric_field(matrix_in(psi, rough))):
        hessian = geoad.hessian(loss, metric)
        second = geoad.covariant_derivative(geoad.grad(loss), metric)(p.to(psi))
        assert isinstance(second, geoad.Form)
        close(second.to_dense(), hessian(p.to(psi)).to_dense(), 1e-9)
        close(second.to_dense(), second.to_dense().mT, 1e-9)  # no torsion
        if metric is not None:
            divergence = geoad.covariant_derivative(geoad.riemannian_grad(loss, metric), metric)(p)
            assert isinstance(divergence, geoad.Endomorphism)
            close(divergence.trace(), metric(p).trace(hessian(p)), 1e-9)
            close((metric(p) @ divergence).to_dense(), hessian(p).to_dense(), 1e-9)


@pytest.mark.parametrize("recipe", ["softplus", "coupling"])
def test_derivative_is_natural(recipe: str) -> None:
    """Computed in psi from plain components = computed in theta and moved."""
    theta, psi, p = pair(recipe)
    field = theta.metric_field(rough)

    def vector(q: geoad.Point) -> geoad.Vector:
        return theta.vector(torch.sin(q.to(theta).ravel()).flip(0) * 2, at=q.to(theta))

    assert psi.parent is not None
    bound = psi.parent.map
    y = p.to(psi).ravel()

    def components(z: Tensor) -> Tensor:
        x = bound.invert({"x": z})
        return bound.push(x, {"x": z}, {"x": torch.sin(x["x"]).flip(0) * 2})["x"]

    slope: Any = torch.func.jacfwd(components)(y)
    symbols = symbols_by_formula(matrix_in(psi, rough), y)
    wanted = slope + torch.einsum("akm,m->ak", symbols, components(y))
    close(geoad.covariant_derivative(vector, field)(p.to(psi)).to_dense(), wanted, 1e-9)
    close(geoad.covariant_derivative(vector, field)(p).to(psi).to_dense(), wanted, 1e-9)


def test_leibniz_rule_and_third_derivative() -> None:
    theta, psi, p = pair("softplus", 3)
    field, loss = theta.metric_field(rough), theta.scalar_field(function)
    first, hessian = geoad.grad(loss), geoad.hessian(loss, field)
    third = geoad.covariant_derivative(hessian, field)
    nested = geoad.covariant_derivative(geoad.covariant_derivative(first, field), field)
    assert third(p).type == (0, 3)
    close(third(p).to_dense(), nested(p).to_dense(), 1e-9)
    close(third(p.to(psi)).to_dense(), third(p).to(psi).to_dense(), 1e-9)
    fourth = geoad.covariant_derivative(third, field)(p)
    assert fourth.type == (0, 4)
    # symmetric in the first two indices, and ∇_l (∇_i∇_j f) exchanged by curvature only
    close(fourth.to_dense(), fourth.to_dense().transpose(0, 1), 1e-8)
    product = geoad.covariant_derivative(lambda q: torch.outer(first(q), geoad.riemannian_grad(loss, field)(q)), field)(p)
    gradient = geoad.riemannian_grad(loss, field)
    left = torch.einsum("ik,j->ijk", hessian(p).to_dense(), gradient(p).ravel())
    right = torch.einsum("i,jk->ijk", first(p).ravel(), geoad.covariant_derivative(gradient, field)(p).to_dense())
    close(product.to_dense(), left + right, 1e-10)


def test_ricci_identity_on_the_sphere() -> None:
    """∇_l∇_k ω_a - ∇_k∇_l ω_a = K (g_la ω_k - g_ka ω_l) with the curvature K = 1; the index of the outer derivative is last."""
    chart = geoad.Chart({"x": (2,)})
    field = chart.metric_field(sphere)

    def covector(q: geoad.Point) -> geoad.Covector:
        x = q.to(chart).ravel()
        return chart.covector(torch.stack([x[0] * x[1], x[1].sin() + x[0] ** 2]), at=q)

    p = chart.point(torch.tensor([0.9, 0.4]))
    second = geoad.covariant_derivative(geoad.covariant_derivative(covector, field), field)(p).to_dense()  # [a, k, l]
    g, w = field(p).to_dense(), covector(p).ravel()
    curvature = torch.einsum("la,k->akl", g, w) - torch.einsum("ka,l->akl", g, w)
    close(second - second.transpose(1, 2), curvature, 1e-10)


def test_functions_and_batches() -> None:
    theta, psi, p = pair("softplus")
    field, loss = theta.metric_field(rough), theta.scalar_field(function)
    differential = geoad.covariant_derivative(loss, field)(p.to(psi))
    assert isinstance(differential, geoad.Covector)
    close(differential.ravel(), geoad.grad(loss)(p.to(psi)).ravel())
    trace = geoad.covariant_derivative(lambda q: field(q).trace(geoad.hessian(loss, field)(q)), field)(p)
    close(trace.ravel(), torch.func.grad(lambda x: _laplacian(field, loss, theta.point(x)))(p.ravel()), 1e-9)
    points = theta.point(0.3 + torch.rand(3, 3)).to(psi)
    batched = geoad.covariant_derivative(geoad.grad(loss), field)(points)
    assert batched.batch_shape == (3,)
    mapped = torch.func.vmap(geoad.covariant_derivative(geoad.grad(loss), field))(points)
    for i in range(3):
        single = geoad.covariant_derivative(geoad.grad(loss), field)(psi.point(points.ravel()[i]))
        close(batched.to_dense()[i], single.to_dense(), 1e-10)
        close(mapped.to_dense()[i], single.to_dense(), 1e-10)


def _laplacian(field: Any, loss: Any, q: geoad.Point) -> Tensor:
    return field(q).trace(geoad.hessian(loss, field)(q))


def test_other_axes_are_carried_along() -> None:
    theta, psi, p = pair("softplus")
    field = theta.metric_field(rough)

    def fn(x: Tensor) -> Tensor:
        return torch.stack([function(x), (x**2).sum()])

    second = geoad.covariant_derivative(geoad.jacobian(fn), field)(p.to(psi))
    assert second.data.shape == (2, 3, 3)
    for i in range(2):
        hessian = geoad.hessian(theta.scalar_field(lambda x, i=i: fn(x)[i]), field)(p.to(psi))
        close(second.data[i], hessian.to_dense(), 1e-10)
    # a batch of covectors at one point
    batch = geoad.covariant_derivative(lambda q: theta.covector(torch.stack([q.to(theta).ravel()] * 4), at=q), field)(p)
    one = geoad.covariant_derivative(lambda q: theta.covector(q.to(theta).ravel(), at=q), field)(p)
    assert batch.batch_shape == (4,)
    close(batch.to_dense()[2], one.to_dense())


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3), st.sampled_from(["softplus", "coupling", "composed"]))
def test_natural_everywhere(shift: list[float], recipe: str) -> None:
    theta, psi, p = pair(recipe)
    field, loss = theta.metric_field(rough), theta.scalar_field(function)
    q = theta.point(p.ravel() + 0.1 * torch.tensor(shift))
    third = geoad.covariant_derivative(geoad.hessian(loss, field), field)
    close(third(q.to(psi)).to(theta).to_dense(), third(q).to_dense(), 1e-8)


def test_dict_charts() -> None:
    theta = geoad.Chart({"w": (2, 1), "s": ()}, name="net")
    psi = theta.reparametrize({"w": maps.Softplus(), "s": maps.Exp()}, name="psi").target
    layout = theta.layout
    field = theta.metric_field(lambda blocks: rough(layout.ravel(blocks)))
    loss = theta.scalar_field(lambda blocks: function(layout.ravel(blocks)))
    p = theta.point(layout.unravel(torch.tensor([0.3, 0.5, 0.2])))
    second = geoad.covariant_derivative(geoad.grad(loss), field)(p.to(psi))
    close(second.to_dense(), geoad.hessian(loss, field)(p.to(psi)).to_dense(), 1e-10)
    assert second.components["w"]["s"].shape == (2, 1)
    v = theta.vector(layout.unravel(torch.tensor([0.1, 0.2, -0.3])), at=p)
    end = geoad.geodesic(field, p.to(psi), v.to(psi), steps=8)
    carried = geoad.parallel_transport(field, [p, end], v.to(psi), steps=16)
    assert carried.components["w"].shape == (2, 1)
    close(field(end).norm(carried), field(p).norm(v), 1e-7)


def test_what_derivatives_refuse() -> None:
    theta, _, p = pair("softplus")
    field, loss = theta.metric_field(rough), theta.scalar_field(function)
    with pytest.raises(VarianceError, match=r"geoad\.grad\(L\)"):
        geoad.covariant_derivative(geoad.grad(loss)(p), field)  # type: ignore[arg-type]
    with pytest.raises(VarianceError, match="jacobian"):
        geoad.covariant_derivative(lambda q: q.ravel(), field)(p)
    with pytest.raises(VarianceError, match=r"\.log\(\)"):
        geoad.covariant_derivative(lambda q: field(q).det(), field)(p)
    with pytest.raises(BasePointError, match="at=p"):
        geoad.covariant_derivative(lambda q: geoad.grad(loss)(theta.point(torch.ones(3))), field)(p)
    with pytest.raises(VarianceError, match="metric field"):
        geoad.covariant_derivative(geoad.grad(loss), field(p))  # type: ignore[arg-type]
    other = geoad.Chart((3,), name="other")
    with pytest.raises(ChartMismatchError):
        geoad.covariant_derivative(geoad.grad(loss), geoad.metrics.Euclidean(other))(p)
    with pytest.raises(ChartMismatchError):
        geoad.covariant_derivative(loss, geoad.metrics.Euclidean(other))
    with pytest.raises(ChartMismatchError, match="manifold"):
        geoad.covariant_derivative(lambda q: other.vector(torch.ones(3), at=other.point(torch.ones(3))), field)(p)
    with pytest.raises(GeometryError, match="chunk_size"):
        geoad.covariant_derivative(loss, field, chunk_size=0)
    with pytest.raises(ChartMismatchError):
        geoad.covariant_derivative(loss, field)(p.ravel())  # type: ignore[arg-type]
