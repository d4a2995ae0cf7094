"""Geodesics."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from typing import Any

import pytest
import torch
from connection_cases import (
    CHARTS,
    close,
    gaussian,
    great_circle,
    matrix_in,
    pair,
    rough,
    sphere,
)
from torch import Tensor

import geoad
from geoad import maps
from geoad.errors import BasePointError, ChartDomainError, ChartMismatchError, GeometryError, SingularMetricError, VarianceError

# torch itself warns when its forward mode is used for the first time
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


# -- geodesics ---------------------------------------------------------------------------------------------------------


def test_great_circles() -> None:
    chart = geoad.Chart({"x": (2,)}, name="sphere")
    field = chart.metric_field(sphere)
    x, v = torch.tensor([1.1, 0.2]), torch.tensor([0.4, 0.9])
    p = chart.point(x)
    start = chart.vector(v, at=p)
    times = [0.3, 1.0, -0.7, 0.0]
    found = geoad.geodesic(field, p, start, times, steps=24, return_velocity=True)
    for time, (point, velocity) in zip(times, found, strict=True):
        close(point.components, great_circle(x, v, time), 1e-7)
        close(field(point).norm(velocity), field(p).norm(start), 1e-7)  # energy
    close(found[-1][0].components, x)
    # half way around: the antipode
    half = math.pi / float(field(p).norm(start))
    close(geoad.geodesic(field, p, start, half, steps=40).components, torch.tensor([math.pi - 1.1, 0.2 + math.pi]), 1e-6)


def test_order_of_runge_kutta() -> None:
    chart = geoad.Chart({"x": (2,)})
    field = chart.metric_field(sphere)
    x, v = torch.tensor([1.1, 0.2]), torch.tensor([0.4, 0.9])
    p = chart.point(x)
    start, exact = chart.vector(v, at=p), great_circle(x, v, 1.0)
    errors = [float((geoad.geodesic(field, p, start, steps=n).components - exact).norm()) for n in (8, 16, 32)]
    for coarse, fine in itertools.pairwise(errors):
        assert 3.7 < math.log2(coarse / fine) < 4.3


@functools.cache
def in_theta(steps: int) -> tuple[Tensor, Tensor]:
    """Where a geodesic of the rough metric ends, and how fast, without another chart: computed once for all of them."""
    theta, _, p = pair("affine")
    v = theta.vector(torch.tensor([0.2, -0.1, 0.15]), at=p)
    end, velocity = geoad.geodesic(theta.metric_field(rough), p, v, steps=steps, return_velocity=True)
    return end.components, velocity.components


@pytest.mark.parametrize("recipe", CHARTS)
def test_geodesic_is_the_same_in_every_chart(recipe: str) -> None:
    theta, psi, p = pair(recipe)
    field = theta.metric_field(rough)
    v = theta.vector(torch.tensor([0.2, -0.1, 0.15]), at=p)
    here, velocity = in_theta(8)
    there, moved = geoad.geodesic(field, p.to(psi), v.to(psi), steps=8, return_velocity=True)
    assert there.chart is psi
    assert moved.chart is psi
    close(there.to(theta).components, here)
    close(moved.to(theta).components, velocity)
    # a field that is computed in psi takes other steps on the same curve
    own = geoad.geodesic(psi.metric_field(matrix_in(psi, rough)), p, v, steps=10)
    close(own.components, in_theta(10)[0], 1e-6)


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
    times = (0.5, 1.5, -1.0)
    for time, point in zip(times, geoad.geodesic(field, p, v, times, steps=32), strict=True):
        close(point.components, curve(s + time), 1e-6)


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
    alone = geoad.geodesic(field, p, v, 1.0, steps=12)
    listed = geoad.geodesic(field, p, v, torch.tensor([0.0, 0.25, 0.5, 1.0]), steps=12)
    close(listed[-1].ravel(), alone.ravel())  # the same steps
    assert torch.equal(listed[0].ravel(), p.ravel())
    assert geoad.geodesic(field, p, v, []) == []
    close(geoad.geodesic(field, p, v, torch.tensor(1.0), steps=12).ravel(), alone.ravel())
    back = geoad.geodesic(field, *geoad.geodesic(field, p, v, 1.0, steps=24, return_velocity=True), -1.0, steps=24)
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
        return geoad.geodesic(field, p, chart.vector(v, at=p), time, steps=8).ravel()

    x, v, time = torch.tensor([1.1, 0.2]), torch.tensor([0.4, 0.9]), torch.tensor(0.8)
    forward: Any = torch.func.jacfwd(end, argnums=(0, 1, 2))(x, v, time)
    reverse: Any = torch.autograd.functional.jacobian(end, (x, v, time))
    for a, b in zip(forward, reverse, strict=True):
        close(a, b, 1e-9)
    h = 1e-5
    numeric = (end(x, v + torch.tensor([h, 0.0]), time) - end(x, v - torch.tensor([h, 0.0]), time)) / (2 * h)
    close(forward[1][:, 0], numeric, 1e-8)
    p = chart.point(x)
    _, velocity = geoad.geodesic(field, p, chart.vector(v, at=p), 0.8, steps=8, return_velocity=True)
    close(forward[2], velocity.components, 1e-5)


@pytest.mark.parametrize("method", ["scipy", "torchdiffeq"])
def test_integrators_agree(method: str) -> None:
    pytest.importorskip(method)
    theta, psi, p = pair("softplus")
    field = theta.metric_field(rough)
    v = theta.vector(torch.tensor([0.2, -0.1, 0.15]), at=p)
    times = [1.0, -0.5, 0.0, 0.4]
    ours = geoad.geodesic(field, p.to(psi), v.to(psi), times, steps=40, return_velocity=True)
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
        geoad.geodesic(field, p, chart.vector(v, at=p), steps=24, method=method).ravel().sum().backward()
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
        geoad.geodesic(nearly, p, v, 1.0, steps=16, method=method)
    with pytest.raises(ChartDomainError, match="positive"):
        geoad.geodesic(nearly, p.to(theta), v.to(theta), 1.0, steps=16, method=method)
    # the domain of the chart of p counts for the result only: on the way the home chart is used
    half = theta.reparametrize(maps.Log(), name="half").target
    q = theta.point(torch.tensor([0.5, 0.5]))
    start, field = theta.vector(torch.tensor([-1.0, 0.0]), at=q).to(half), theta.metric_field(rough)
    with pytest.raises(ChartDomainError, match="half"):
        geoad.geodesic(field, q.to(half), start, 1.0, steps=16, method=method)


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
    direct = geoad.geodesic(field, p, v, 0.5, steps=6)
    iterated = geoad.geodesic(field, p, v, 0.5, steps=6, solver=geoad.operators.CG(tol=1e-12))
    close(direct.ravel(), iterated.ravel(), 1e-9)
    # the metric is flat: sinh(Q x) moves along a straight line
    y, u = torch.func.jvp(lambda x: torch.sinh(mix @ x), (p.ravel(),), (v.ravel(),))
    close(geoad.geodesic(field, p, v, 0.5, steps=24).ravel(), mix.mT @ torch.asinh(y + 0.5 * u), 1e-5)
