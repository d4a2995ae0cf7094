"""Connections: Christoffel symbols, geodesics, parallel transport, covariant derivatives."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import geoad
from geoad import maps
from geoad.connection import Christoffel
from geoad.errors import (
    BasePointError,
    ChartDomainError,
    ChartMismatchError,
    GeometryError,
    SingularMetricError,
    VarianceError,
)
from geoad.maps.select import Recipe

# torch itself warns when its forward mode is used for the first time
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def close(a: Tensor, b: Tensor, tol: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def rough(x: Tensor) -> Tensor:
    """A metric without symmetries: M Mᵀ + diag(exp(x)) with M depending on x.

    No products with constants: in forward mode they cost torch 2.13 more than a millisecond each.
    """
    d = x.shape[0]
    m = x[:, None] @ torch.arange(1.0, d + 1, dtype=x.dtype).cos()[None, :] + x.sin()[:, None]
    return m @ m.mT + torch.diag(x.exp())


def sphere(x: Tensor) -> Tensor:
    """The unit sphere in colatitude and longitude."""
    return torch.diag(torch.stack([torch.ones_like(x[0]), x[0].sin() * x[0].sin()]))


def stereographic(x: Tensor) -> Tensor:
    """The unit sphere, projected from a pole."""
    return 4 / (1 + (x**2).sum()) ** 2 * torch.eye(2, dtype=x.dtype)


def gaussian(x: Tensor) -> Tensor:
    """The Fisher metric of N(mu, sigma) in (mu, sigma): a hyperbolic plane of curvature -1/2."""
    return torch.diag(torch.stack([x[1] ** -2, 2 * x[1] ** -2]))


def symbols_by_formula(matrix: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Γ[k, i, j] by the textbook formula in loops."""
    d = len(x)
    slope: Any = torch.func.jacfwd(matrix)(x)  # [i, j, l] = ∂_l G_ij
    inverse = torch.linalg.inv(matrix(x))
    result = torch.zeros(d, d, d)
    for k in range(d):
        for i in range(d):
            for j in range(d):
                for m in range(d):
                    result[k, i, j] += 0.5 * inverse[k, m] * (slope[j, m, i] + slope[i, m, j] - slope[i, j, m])
    return result


CHARTS: dict[str, Callable[[], Recipe]] = {
    "softplus": maps.Softplus,
    "sinh": maps.Sinh,
    "affine": maps.Affine,
    "polar": maps.Polar,
    "coupling": maps.Coupling,
    "orthogonal": maps.Orthogonal,
    "composed": lambda: maps.Compose(maps.Affine(), maps.Asinh(), maps.Polar()),
}


def pair(recipe: str, d: int = 3) -> tuple[geoad.Chart, geoad.Chart, geoad.Point]:
    """A chart, another one of the same manifold, and a point."""
    theta = geoad.Chart({"x": (d,)}, name="theta")
    torch.manual_seed(1)
    psi = theta.reparametrize(CHARTS[recipe](), name="psi").target
    return theta, psi, theta.point(0.4 + 0.3 * torch.arange(1.0, d + 1).cos())


def matrix_in(psi: geoad.Chart, matrix: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The components of a metric field in psi with plain torch.func: Kᵀ G(θ(ψ)) K."""
    assert psi.parent is not None
    bound = psi.parent.map

    def theta(y: Tensor) -> Tensor:
        return bound.invert({"x": y})["x"]

    def there(y: Tensor) -> Tensor:
        inverse: Any = torch.func.jacfwd(theta)(y)
        return inverse.mT @ matrix(theta(y)) @ inverse

    return there


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
    found = geoad.geodesic(field, p.to(psi), line.vector(torch.tensor(1.0), at=p).to(psi), 0.7, steps=200)
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


# -- geodesics ---------------------------------------------------------------------------------------------------------


def great_circle(x: Tensor, v: Tensor, time: float | Tensor) -> Tensor:
    """Colatitude and longitude on the great circle, by embedding the sphere."""

    def embed(a: Tensor) -> Tensor:
        return torch.stack([a[0].sin() * a[1].cos(), a[0].sin() * a[1].sin(), a[0].cos()])

    n, velocity = torch.func.jvp(embed, (x,), (v,))
    speed = velocity.norm()
    angle = speed * time
    q = n * torch.cos(angle) + velocity / speed * torch.sin(angle)
    return torch.stack([q[2].acos(), torch.atan2(q[1], q[0])])


def test_great_circles() -> None:
    chart = geoad.Chart({"x": (2,)}, name="sphere")
    field = chart.metric_field(sphere)
    x, v = torch.tensor([1.1, 0.2]), torch.tensor([0.4, 0.9])
    p = chart.point(x)
    start = chart.vector(v, at=p)
    times = [0.3, 1.0, -0.7, 0.0]
    found = geoad.geodesic(field, p, start, times, steps=128, return_velocity=True)
    for time, (point, velocity) in zip(times, found, strict=True):
        close(point.components, great_circle(x, v, time), 1e-9)
        close(field(point).norm(velocity), field(p).norm(start), 1e-9)  # energy
    close(found[-1][0].components, x)
    # half way around: the antipode
    half = math.pi / float(field(p).norm(start))
    close(geoad.geodesic(field, p, start, half, steps=200).components, torch.tensor([math.pi - 1.1, 0.2 + math.pi]), 1e-8)


def test_order_of_runge_kutta() -> None:
    chart = geoad.Chart({"x": (2,)})
    field = chart.metric_field(sphere)
    x, v = torch.tensor([1.1, 0.2]), torch.tensor([0.4, 0.9])
    p = chart.point(x)
    start, exact = chart.vector(v, at=p), great_circle(x, v, 1.0)
    errors = [float((geoad.geodesic(field, p, start, steps=n).components - exact).norm()) for n in (8, 16, 32)]
    for coarse, fine in itertools.pairwise(errors):
        assert 3.7 < math.log2(coarse / fine) < 4.3


@pytest.mark.parametrize("recipe", CHARTS)
def test_geodesic_is_the_same_in_every_chart(recipe: str) -> None:
    theta, psi, p = pair(recipe)
    field = theta.metric_field(rough)
    v = theta.vector(torch.tensor([0.2, -0.1, 0.15]), at=p)
    here, velocity = geoad.geodesic(field, p, v, steps=8, return_velocity=True)
    there, moved = geoad.geodesic(field, p.to(psi), v.to(psi), steps=8, return_velocity=True)
    assert there.chart is psi
    assert moved.chart is psi
    close(there.to(theta).components, here.components)
    close(moved.to(theta).components, velocity.components)
    # a field that is computed in psi takes other steps on the same curve
    own = geoad.geodesic(psi.metric_field(matrix_in(psi, rough)), p, v, steps=16)
    close(own.components, geoad.geodesic(field, p, v, steps=16).components, 1e-6)


def test_gaussians_lie_on_semicircles() -> None:
    """(μ/√2, σ) is a hyperbolic half-plane: geodesics are semicircles around points of its edge."""
    chart = geoad.Chart({"x": (2,)}, name="gaussians")
    field = chart.metric_field(gaussian)
    centre, radius, s = 0.3, 1.7, -0.8

    def curve(a: float) -> Tensor:
        return torch.tensor([math.sqrt(2) * (centre + radius * math.tanh(a)), radius / math.cosh(a)])

    p = chart.point(curve(s))
    cosh = math.cosh(s)
    v = chart.vector(torch.tensor([math.sqrt(2) * radius / cosh**2, -radius / cosh * math.tanh(s)]), at=p)
    close(field(p).norm(v), torch.tensor(math.sqrt(2)))
    for time in (0.5, 1.5, -1.0):
        close(geoad.geodesic(field, p, v, time, steps=64).components, curve(s + time), 1e-6)


def test_flat_metrics_are_exact() -> None:
    theta, psi, p = pair("softplus")
    v = theta.vector(torch.tensor([0.3, -0.1, 0.2]), at=p)
    line = p.retract(v, 0.5)
    for metric in (None, geoad.metrics.Euclidean(theta), geoad.metrics.Constant(theta, rough(torch.ones(3)))):
        assert torch.equal(geoad.geodesic(metric, p, v, 0.5).ravel(), line.ravel())
        close(geoad.geodesic(metric, p.to(psi), v.to(psi), 0.5).to(theta).ravel(), line.ravel())
    point, velocity = geoad.geodesic(None, p.to(psi), v.to(psi), 0.5, return_velocity=True)
    close(velocity.to(theta).components, v.components)
    close(point.to(theta).ravel(), line.ravel())
    # constant in psi: the straight line of psi
    other = geoad.geodesic(geoad.metrics.Euclidean(psi), p, v, 0.5)
    close(other.to(psi).ravel(), p.to(psi).ravel() + 0.5 * v.to(psi).ravel())


def test_times() -> None:
    chart = geoad.Chart({"x": (2,)})
    field = chart.metric_field(sphere)
    p = chart.point(torch.tensor([1.1, 0.2]))
    v = chart.vector(torch.tensor([0.4, 0.9]), at=p)
    alone = geoad.geodesic(field, p, v, 1.0, steps=40)
    listed = geoad.geodesic(field, p, v, torch.tensor([0.0, 0.25, 0.5, 1.0]), steps=40)
    close(listed[-1].ravel(), alone.ravel())  # the same steps
    assert torch.equal(listed[0].ravel(), p.ravel())
    assert geoad.geodesic(field, p, v, []) == []
    close(geoad.geodesic(field, p, v, torch.tensor(1.0), steps=40).ravel(), alone.ravel())
    back = geoad.geodesic(field, *geoad.geodesic(field, p, v, 1.0, return_velocity=True), -1.0)
    close(back.ravel(), p.ravel(), 1e-7)
    for wrong in ("1", None, torch.ones(2, 2), [[1.0]], True):
        with pytest.raises(GeometryError, match="t must be"):
            geoad.geodesic(field, p, v, wrong)  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match="finite"):
        geoad.geodesic(field, p, v, [1.0, math.inf])
    with pytest.raises(GeometryError, match="finite"):
        geoad.geodesic(field, p, v, math.nan)


def test_batches_of_geodesics() -> None:
    theta, psi, _ = pair("softplus")
    field = theta.metric_field(rough)
    points = theta.point(0.3 + torch.rand(2, 3)).to(psi)
    velocity = theta.vector(0.2 * torch.randn(2, 3), at=points.to(theta)).to(psi)
    batched = geoad.geodesic(field, points, velocity, steps=8)

    def one(q: geoad.Point, u: Tensor) -> Tensor:
        return geoad.geodesic(field, q, psi.vector(u, at=q), steps=8).ravel()

    mapped = torch.func.vmap(one)(points, velocity.components)
    for i in range(2):
        q = psi.point(points.ravel()[i])
        single = geoad.geodesic(field, q, psi.vector(velocity.ravel()[i], at=q), steps=8).ravel()
        close(batched.ravel()[i], single)
        close(mapped[i], single)
    # several velocities at every point
    many = theta.vector(0.2 * torch.randn(2, 4, 3), at=points.to(theta))
    found = geoad.geodesic(field, points.to(theta), many, steps=8)
    assert found.batch_shape == (2, 4)
    q = theta.point(points.to(theta).ravel()[1])
    close(found.ravel()[1, 2], geoad.geodesic(field, q, theta.vector(many.ravel()[1, 2], at=q), steps=8).ravel())


def test_exponential_map_is_differentiable() -> None:
    chart = geoad.Chart({"x": (2,)})
    field = chart.metric_field(sphere)

    def end(x: Tensor, v: Tensor, time: Tensor) -> Tensor:
        p = chart.point(x)
        return geoad.geodesic(field, p, chart.vector(v, at=p), time, steps=16).ravel()

    x, v, time = torch.tensor([1.1, 0.2]), torch.tensor([0.4, 0.9]), torch.tensor(0.8)
    forward: Any = torch.func.jacfwd(end, argnums=(0, 1, 2))(x, v, time)
    reverse: Any = torch.autograd.functional.jacobian(end, (x, v, time))
    for a, b in zip(forward, reverse, strict=True):
        close(a, b, 1e-9)
    h = 1e-5
    numeric = (end(x, v + torch.tensor([h, 0.0]), time) - end(x, v - torch.tensor([h, 0.0]), time)) / (2 * h)
    close(forward[1][:, 0], numeric, 1e-8)
    p = chart.point(x)
    _, velocity = geoad.geodesic(field, p, chart.vector(v, at=p), 0.8, steps=16, return_velocity=True)
    close(forward[2], velocity.components, 1e-5)


@pytest.mark.parametrize("method", ["scipy", "torchdiffeq"])
def test_integrators_agree(method: str) -> None:
    pytest.importorskip(method)
    theta, psi, p = pair("softplus")
    field = theta.metric_field(rough)
    v = theta.vector(torch.tensor([0.2, -0.1, 0.15]), at=p)
    times = [1.0, -0.5, 0.0, 0.4]
    ours = geoad.geodesic(field, p.to(psi), v.to(psi), times, steps=64, return_velocity=True)
    theirs = geoad.geodesic(field, p.to(psi), v.to(psi), times, method=method, return_velocity=True)
    for (a, u), (b, w) in zip(ours, theirs, strict=True):
        close(a.ravel(), b.ravel(), 1e-8)
        close(u.ravel(), w.ravel(), 1e-8)
    name = {"scipy": "RK45", "torchdiffeq": "dopri8"}[method]
    other = geoad.geodesic(field, p, v, method=method, options={"method": name, "rtol": 1e-9, "atol": 1e-9})
    close(other.to(psi).ravel(), ours[0][0].ravel(), 1e-7)
    single = geoad.geodesic(field, p.to(torch.float32), v.to(torch.float32), method=method)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.ravel().double(), other.ravel(), rtol=1e-4, atol=1e-4)


def test_derivatives_through_other_integrators() -> None:
    pytest.importorskip("torchdiffeq")
    pytest.importorskip("scipy")
    chart = geoad.Chart({"x": (2,)})
    field = chart.metric_field(sphere)

    def slope(method: str) -> Tensor:
        v = torch.tensor([0.4, 0.9], requires_grad=True)
        p = chart.point(torch.tensor([1.1, 0.2]))
        geoad.geodesic(field, p, chart.vector(v, at=p), method=method).ravel().sum().backward()
        assert v.grad is not None
        return v.grad

    close(slope("torchdiffeq"), slope("rk4"), 1e-6)
    with pytest.raises(GeometryError, match="no derivatives"):
        slope("scipy")


@pytest.mark.parametrize("method", ["scipy", "torchdiffeq"])
def test_missing_package(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chart = geoad.Chart({"x": (2,)})
    p = chart.point(torch.tensor([1.1, 0.2]))
    v = chart.vector(torch.ones(2), at=p)
    monkeypatch.setitem(sys.modules, "scipy.integrate" if method == "scipy" else method, None)
    with pytest.raises(GeometryError, match=r"pip install geoad\[ode\]"):
        geoad.geodesic(chart.metric_field(sphere), p, v, method=method)


def test_what_geodesics_refuse() -> None:
    chart = geoad.Chart({"x": (2,)}, name="sphere")
    field = chart.metric_field(sphere)
    p = chart.point(torch.tensor([1.1, 0.2]))
    v = chart.vector(torch.ones(2), at=p)
    with pytest.raises(VarianceError, match="sharp"):
        geoad.geodesic(field, p, chart.covector(torch.ones(2), at=p), 1.0)  # type: ignore[arg-type]
    with pytest.raises(BasePointError, match="carry"):
        geoad.geodesic(field, p, chart.vector(torch.ones(2), at=chart.point(torch.ones(2))), 1.0)
    with pytest.raises(ChartMismatchError):
        geoad.geodesic(field, p.ravel(), v, 1.0)  # type: ignore[arg-type]
    other = geoad.Chart({"x": (2,)}, name="other")
    q = other.point(torch.ones(2))
    with pytest.raises(ChartMismatchError):
        geoad.geodesic(field, p, other.vector(torch.ones(2), at=q))
    with pytest.raises(ChartMismatchError):
        geoad.geodesic(field, q, other.vector(torch.ones(2), at=q))
    for steps in (0, 1.5, True):
        with pytest.raises(GeometryError, match="steps="):
            geoad.geodesic(field, p, v, steps=steps)  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match="no integrator"):
        geoad.geodesic(field, p, v, method="euler")
    with pytest.raises(GeometryError, match="options"):
        geoad.geodesic(field, p, v, options={"rtol": 1e-3})


@pytest.mark.parametrize("method", ["rk4", "scipy", "torchdiffeq"])
def test_leaving_the_domain(method: str) -> None:
    if method != "rk4":
        pytest.importorskip(method)
    theta = geoad.Chart({"x": (2,)}, name="theta")
    psi = theta.reparametrize(maps.Exp(), name="positive").target
    p = psi.point(torch.tensor([0.5, 0.5]))
    v = psi.vector(torch.tensor([-1.0, 0.0]), at=p)
    # straight lines of psi end where a coordinate becomes 0, in the exact and in the integrated case
    with pytest.raises(ChartDomainError, match="positive"):
        geoad.geodesic(geoad.metrics.Euclidean(psi), p, v, 1.0)
    nearly = psi.metric_field(lambda x: torch.eye(2, dtype=x.dtype) + 1e-3 * torch.outer(x, x))
    with pytest.raises(ChartDomainError, match="positive"):
        geoad.geodesic(nearly, p, v, 1.0, method=method)
    with pytest.raises(ChartDomainError, match="positive"):
        geoad.geodesic(nearly, p.to(theta), v.to(theta), 1.0, method=method)
    # the domain of the chart of p counts for the result only: on the way the home chart is used
    half = theta.reparametrize(maps.Log(), name="half").target
    q = theta.point(torch.tensor([0.5, 0.5]))
    start, field = theta.vector(torch.tensor([-1.0, 0.0]), at=q).to(half), theta.metric_field(rough)
    with pytest.raises(ChartDomainError, match="half"):
        geoad.geodesic(field, q.to(half), start, 1.0, method=method)


def test_singular_on_the_way() -> None:
    chart = geoad.Chart({"x": (2,)}, name="polar")
    field = chart.metric_field(lambda x: torch.diag(torch.stack([torch.ones_like(x[0]), x[0] ** 2])))
    p = chart.point(torch.tensor([1.0, 0.0]))
    v = chart.vector(torch.tensor([-1.0, 0.0]), at=p)
    with pytest.raises(SingularMetricError):
        geoad.geodesic(field, p, v, 2.0, steps=8)
    both = chart.point(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    with pytest.raises(SingularMetricError):
        geoad.geodesic(field, both, chart.vector(torch.tensor([[-1.0, 0.0], [0.0, 1.0]]), at=both), 2.0, steps=8)


def test_large_manifold_with_an_iterative_solver() -> None:
    """Matrix-free: a pull-back metric on 60 coordinates, solved by conjugate gradients."""
    theta, out = geoad.Chart({"x": (60,)}, name="theta"), geoad.Chart({"y": (60,)}, name="out")
    mix = torch.linalg.qr(torch.randn(60, 60)).Q
    field = geoad.metrics.Pullback(lambda x: torch.sinh(mix @ x), geoad.metrics.Euclidean(out), chart=theta)
    p = theta.point(0.3 * torch.randn(60))
    v = theta.vector(torch.randn(60), at=p)
    direct = geoad.geodesic(field, p, v, 0.5, steps=12)
    iterated = geoad.geodesic(field, p, v, 0.5, steps=12, solver=geoad.operators.CG(tol=1e-12))
    close(direct.ravel(), iterated.ravel(), 1e-9)
    # the metric is flat: sinh(Q x) moves along a straight line
    y, u = torch.func.jvp(lambda x: torch.sinh(mix @ x), (p.ravel(),), (v.ravel(),))
    close(geoad.geodesic(field, p, v, 0.5, steps=32).ravel(), mix.mT @ torch.asinh(y + 0.5 * u), 1e-5)


# -- parallel transport ------------------------------------------------------------------------------------------------


def test_latitude_circle() -> None:
    """Around a circle of latitude a vector turns by 2π cos θ."""
    chart = geoad.Chart({"x": (2,)}, name="sphere")
    field, colatitude = chart.metric_field(sphere), 0.9

    def circle(s: Tensor) -> geoad.Point:
        return chart.point(torch.stack([torch.full_like(s, colatitude), 2 * math.pi * s]))

    p = circle(torch.tensor(0.0))
    v = chart.vector(torch.tensor([0.7, 0.4]), at=p)
    end = geoad.parallel_transport(field, circle, v, steps=100)
    angle, sine = 2 * math.pi * math.cos(colatitude), math.sin(colatitude)
    a, b = 0.7, 0.4 * sine
    turned = [a * math.cos(angle) + b * math.sin(angle), (b * math.cos(angle) - a * math.sin(angle)) / sine]
    close(end.components, torch.tensor(turned), 1e-6)
    close(end.at.components, torch.tensor([colatitude, 2 * math.pi]))


def test_spherical_triangle() -> None:
    """Around an octant of the sphere every vector turns by its area, π/2."""
    chart = geoad.Chart({"x": (2,)}, name="plane")
    field = chart.metric_field(stereographic)
    pole, east, north = (chart.point(torch.tensor(x)) for x in ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0]))

    def equator(s: Tensor) -> geoad.Point:
        return chart.point(torch.stack([torch.cos(math.pi / 2 * s), torch.sin(math.pi / 2 * s)]))

    v = chart.vector(torch.tensor([1.0, 0.5]), at=pole)
    for curve in ([pole, east], equator, [north, pole]):
        v = geoad.parallel_transport(field, curve, v, steps=64)
    close(v.components, torch.tensor([-0.5, 1.0]), 1e-7)


def curve_of(theta: geoad.Chart) -> Callable[[Tensor], geoad.Point]:
    def curve(s: Tensor) -> geoad.Point:
        return theta.point(torch.stack([0.4 + 0.4 * s, 0.5 * torch.cos(0.8 * s), 0.3 - 0.2 * s**2]))

    return curve


def test_isometry_of_all_types() -> None:
    """Everything that is made of G, u, v, w keeps its value."""
    theta = geoad.Chart({"x": (3,)}, name="theta")
    field, curve = theta.metric_field(rough), curve_of(theta)
    p, q = curve(torch.tensor(0.0)), curve(torch.tensor(1.0))
    u, v = (theta.vector(torch.tensor(x), at=p) for x in ([1.0, 0.0, 2.0], [0.3, -1.0, 0.5]))
    w = theta.covector(torch.tensor([0.2, 0.1, -0.7]), at=p)

    def carried(thing: Any) -> Any:
        return geoad.parallel_transport(field, curve, thing, steps=24)

    moved_u, moved_v, moved_w = carried(u), carried(v), carried(w)
    close(field(q)(moved_u, moved_v), field(p)(u, v), 1e-7)
    close(field(q).norm(moved_w), field(p).norm(w), 1e-7)
    close(moved_w(moved_u), w(u), 1e-7)
    form = theta.form(torch.randn(3, 3), at=p)
    close(carried(form)(moved_u, moved_v), form(u, v), 1e-7)
    moved = carried(field(p))
    assert isinstance(moved, geoad.Metric)
    assert torch.equal(moved.to_dense(), moved.to_dense().mT)
    close(moved.to_dense(), field(q).to_dense(), 1e-7)
    close(moved.sharp(moved_w).components, field(q).sharp(moved_w).components, 1e-7)
    inverse = carried(field(p).inverse())
    assert isinstance(inverse, geoad.Cometric)
    close(inverse.to_dense(), torch.linalg.inv(field(q).to_dense()), 1e-7)
    operator = field(p).inverse() @ (form + form.mT)
    moved = carried(operator)
    assert isinstance(moved, geoad.Endomorphism)
    close(moved.trace(), operator.trace(), 1e-7)
    close(moved(moved_u).components, carried(operator(u)).components, 1e-7)
    third = carried(torch.einsum("i,j,k->ijk", u, w, v))
    close(third.to_dense(), torch.einsum("i,j,k->ijk", moved_u, moved_w, moved_v).to_dense(), 1e-7)
    volume = field(p).det().sqrt()
    close(carried(volume).components, field(q).det().sqrt().components)
    close(carried(volume.log()).components, field(q).det().sqrt().log().components)


@pytest.mark.parametrize("recipe", ["softplus", "affine", "coupling"])
def test_transport_is_the_same_in_every_chart(recipe: str) -> None:
    theta, psi, _ = pair(recipe)
    field, curve = theta.metric_field(rough), curve_of(theta)
    p = curve(torch.tensor(0.0))
    u, w = theta.vector(torch.tensor([1.0, 0.0, 2.0]), at=p), theta.covector(torch.tensor([0.2, 0.1, -0.7]), at=p)
    form = theta.form(torch.randn(3, 3), at=p)
    for thing in (u, w, form, field(p), field(p).inverse() @ form, torch.einsum("i,j,k->ijk", u, w, w), field(p).det().sqrt()):
        here = geoad.parallel_transport(field, curve, thing, steps=4)
        there = geoad.parallel_transport(field, lambda s: curve(s).to(psi), thing.to(psi), steps=4)
        assert there.chart == psi
        assert type(there) is type(here) is type(thing)
        close(there.to(theta).ravel(), here.ravel(), 1e-10)


def test_without_the_matrix() -> None:
    """Above 64 coordinates vectors and covectors are transported by products only: the same numbers."""
    theta, out = geoad.Chart({"x": (70,)}, name="theta"), geoad.Chart({"y": (70,)}, name="out")
    mix = torch.linalg.qr(torch.randn(70, 70)).Q
    field = geoad.metrics.Pullback(lambda x: torch.sinh(mix @ x), geoad.metrics.Euclidean(out), chart=theta)
    p, q = theta.point(0.3 * torch.randn(70)), theta.point(0.3 * torch.randn(70))
    v, w = theta.vector(torch.randn(70), at=p), theta.covector(torch.randn(70), at=p)
    moved_v, moved_w = (geoad.parallel_transport(field, [p, q], each, steps=3) for each in (v, w))
    both = theta.vector(v.ravel().repeat(2, 1), at=p)  # a batch takes the other way
    close(geoad.parallel_transport(field, [p, q], both, steps=3).ravel()[1], moved_v.ravel(), 1e-8)
    both = theta.covector(w.ravel().repeat(2, 1), at=p)
    close(geoad.parallel_transport(field, [p, q], both, steps=3).ravel()[1], moved_w.ravel(), 1e-8)
    # the metric is flat: sinh(Q x) are its straight coordinates
    fine = geoad.parallel_transport(field, [p, q], v, steps=16)
    start, end = ((mix @ each.ravel()).cosh() for each in (p, q))
    close(fine.ravel(), mix.mT @ ((mix @ v.ravel()) * start / end), 1e-5)


def test_transport_and_back() -> None:
    theta, _, _ = pair("softplus")
    field, curve = theta.metric_field(rough), curve_of(theta)
    v = theta.vector(torch.tensor([0.3, -1.0, 0.5]), at=curve(torch.tensor(0.0)))
    there = geoad.parallel_transport(field, curve, v)
    back = geoad.parallel_transport(field, lambda s: curve(1 - s), there)
    close(back.components, v.components, 1e-6)
    # a polygon; its segments are straight in the home chart
    corners = [curve(torch.tensor(s)) for s in (0.0, 0.3, 1.0)]
    along = geoad.parallel_transport(field, corners, v, steps=64)
    returned = geoad.parallel_transport(field, corners[::-1], along, steps=64)
    close(returned.components, v.components, 1e-8)
    close(field(corners[-1]).norm(along), field(corners[0]).norm(v), 1e-8)
    fine = geoad.parallel_transport(field, [curve(torch.tensor(s)) for s in torch.linspace(0, 1, 65).tolist()], v)
    close(fine.components, geoad.parallel_transport(field, curve, v).components, 1e-4)
    close(geoad.parallel_transport(field, corners[:1], v).components, v.components)


def test_order_of_transport() -> None:
    theta, _, _ = pair("softplus")
    field, curve = theta.metric_field(rough), curve_of(theta)
    v = theta.vector(torch.tensor([0.3, -1.0, 0.5]), at=curve(torch.tensor(0.0)))
    exact = geoad.parallel_transport(field, curve, v, steps=64).components
    errors = [float((geoad.parallel_transport(field, curve, v, steps=n).components - exact).norm()) for n in (4, 8, 16)]
    for coarse, fine in itertools.pairwise(errors):
        assert 3.6 < math.log2(coarse / fine) < 4.4


def test_velocity_of_a_geodesic_is_parallel() -> None:
    chart = geoad.Chart({"x": (2,)})
    field = chart.metric_field(sphere)
    x, v = torch.tensor([1.1, 0.2]), torch.tensor([0.4, 0.9])
    p = chart.point(x)
    end, velocity = geoad.geodesic(field, p, chart.vector(v, at=p), return_velocity=True)
    carried = geoad.parallel_transport(field, lambda s: chart.point(great_circle(x, v, s)), chart.vector(v, at=p))
    close(carried.ravel(), velocity.ravel(), 1e-6)
    close(carried.at.ravel(), end.ravel(), 1e-7)
    # a geodesic is itself a curve that can be differentiated in its time
    short = geoad.parallel_transport(
        field,
        lambda s: geoad.geodesic(field, p, chart.vector(v, at=p), s / 8, steps=2),
        velocity.carry(to=p, chart=chart),
        steps=2,
    )
    assert short.batch_shape == ()


def test_flat_transport() -> None:
    theta, psi, p = pair("softplus")
    q = theta.point(torch.ones(3))
    v = theta.vector(torch.tensor([0.3, -1.0, 0.5]), at=p)
    form = theta.form(torch.randn(3, 3), at=p)
    for metric in (None, geoad.metrics.Euclidean(theta)):
        moved = geoad.parallel_transport(metric, [p, q], v.to(psi))
        assert moved.chart is psi
        close(moved.to(theta).components, v.components)
        close(geoad.parallel_transport(metric, [p, q], form.to(psi)).to(theta).to_dense(), form.to_dense())
    other = geoad.parallel_transport(geoad.metrics.Euclidean(psi), [p, q], v)
    close(other.to(psi).components, v.to(psi).components)


def test_batches_are_transported() -> None:
    theta, psi, _ = pair("softplus")
    field = theta.metric_field(rough)
    a, b = theta.point(0.3 + torch.rand(2, 3)), theta.point(0.3 + torch.rand(2, 3))
    vectors = theta.vector(torch.randn(2, 3), at=a)
    forms = theta.form(torch.randn(2, 3, 3), at=a)
    many = theta.vector(torch.randn(2, 5, 3), at=a)
    found = [geoad.parallel_transport(field, [a.to(psi), b], each.to(psi), steps=8) for each in (vectors, forms, many)]
    for i in range(2):
        p, q = theta.point(a.ravel()[i]), theta.point(b.ravel()[i])
        v = geoad.parallel_transport(field, [p, q], theta.vector(vectors.ravel()[i], at=p), steps=8)
        close(found[0].to(theta).ravel()[i], v.ravel())
        m = geoad.parallel_transport(field, [p, q], theta.form(forms.to_dense()[i], at=p), steps=8)
        close(found[1].to(theta).to_dense()[i], m.to_dense())
        u = geoad.parallel_transport(field, [p, q], theta.vector(many.ravel()[i, 3], at=p), steps=8)
        close(found[2].to(theta).ravel()[i, 3], u.ravel())

    def one(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        p = theta.point(x)
        return geoad.parallel_transport(field, [p, theta.point(y)], theta.vector(z, at=p), steps=8).components

    close(torch.func.vmap(one)(a.ravel(), b.ravel(), vectors.ravel()), found[0].to(theta).ravel())


def test_axes_of_other_spaces_are_untouched() -> None:
    """The Jacobian of a map: one axis of the outputs, one of the parameters. And a frame."""
    theta, _, p = pair("softplus")
    field, q = theta.metric_field(rough), theta.point(torch.ones(3))
    jacobian = geoad.jacobian(lambda x: torch.stack([x.sum(), (x**2).sum()]))(p)
    carried = geoad.parallel_transport(field, [p, q], jacobian)
    assert [str(axis) for axis in carried.axes] == [str(axis) for axis in jacobian.axes]
    for i in range(2):
        row = geoad.parallel_transport(field, [p, q], theta.covector(jacobian.data[i], at=p))
        close(carried.data[i], row.components)
    _, frame = geoad.eigh(theta.form(torch.eye(3), at=p), metric=field(p))
    there = geoad.parallel_transport(field, [p, q], frame, steps=64)
    close(torch.einsum("ia,ij,jb->ab", there.data, field(q).to_dense(), there.data), torch.eye(3), 1e-6)


def test_what_transport_refuses() -> None:
    theta, _, p = pair("softplus")
    field, q = theta.metric_field(rough), theta.point(torch.ones(3))
    v = theta.vector(torch.ones(3), at=p)
    with pytest.raises(BasePointError, match="start of the curve"):
        geoad.parallel_transport(field, [q, p], v)
    with pytest.raises(VarianceError):
        geoad.parallel_transport(field, [p, q], torch.ones(3))  # type: ignore[type-var]
    with pytest.raises(GeometryError, match="empty"):
        geoad.parallel_transport(field, [], v)
    with pytest.raises(ChartMismatchError, match="Points"):
        geoad.parallel_transport(field, [p.ravel(), q.ravel()], v)  # type: ignore[list-item]
    with pytest.raises(ChartMismatchError):
        geoad.parallel_transport(field, [geoad.Chart((3,)).point(torch.ones(3))], v)
    with pytest.raises(GeometryError, match="steps="):
        geoad.parallel_transport(field, [p, q], v, steps=0)
    positive = theta.reparametrize(maps.Exp(), name="positive").target
    own = positive.metric_field(rough)
    a = positive.point(torch.tensor([0.5, 1.0, 1.0]))

    def leaving(s: Tensor) -> geoad.Point:
        x = a.ravel() - 2 * s * torch.tensor([1.0, 0.0, 0.0])
        return positive.point(x)

    with pytest.raises(ChartDomainError, match="positive"):
        geoad.parallel_transport(own, leaving, positive.vector(torch.ones(3), at=a))


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
