"""Parallel transport."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from connection_cases import (
    close,
    great_circle,
    pair,
    rough,
    sphere,
    stereographic,
)
from torch import Tensor

import geoad
from geoad import maps
from geoad.errors import BasePointError, ChartDomainError, ChartMismatchError, GeometryError, VarianceError

# torch itself warns when its forward mode is used for the first time
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


# -- parallel transport ------------------------------------------------------------------------------------------------


def test_latitude_circle() -> None:
    """Around a circle of latitude a vector turns by 2π cos θ."""
    chart = geoad.Chart({"x": (2,)}, name="sphere")
    field, colatitude = chart.metric_field(sphere), 0.9

    def circle(s: Tensor) -> geoad.Point:
        return chart.point(torch.stack([torch.full_like(s, colatitude), 2 * math.pi * s]))

    p = circle(torch.tensor(0.0))
    v = chart.vector(torch.tensor([0.7, 0.4]), at=p)
    end = geoad.parallel_transport(field, circle, v, steps=64)
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
        v = geoad.parallel_transport(field, curve, v, steps=32)
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
        return geoad.parallel_transport(field, curve, thing, steps=16)

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
    there = geoad.parallel_transport(field, curve, v, steps=24)
    back = geoad.parallel_transport(field, lambda s: curve(1 - s), there, steps=24)
    close(back.components, v.components, 1e-6)
    # a polygon; its segments are straight in the home chart
    corners = [curve(torch.tensor(s)) for s in (0.0, 0.3, 1.0)]
    along = geoad.parallel_transport(field, corners, v, steps=32)
    returned = geoad.parallel_transport(field, corners[::-1], along, steps=32)
    close(returned.components, v.components, 1e-8)
    close(field(corners[-1]).norm(along), field(corners[0]).norm(v), 1e-8)
    fine = geoad.parallel_transport(field, [curve(torch.tensor(s)) for s in torch.linspace(0, 1, 33).tolist()], v, steps=1)
    close(fine.components, there.components, 1e-3)
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
    end, velocity = geoad.geodesic(field, p, chart.vector(v, at=p), steps=24, return_velocity=True)
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
    carried = geoad.parallel_transport(field, [p, q], jacobian, steps=8)
    assert [str(axis) for axis in carried.axes] == [str(axis) for axis in jacobian.axes]
    for i in range(2):
        row = geoad.parallel_transport(field, [p, q], theta.covector(jacobian.data[i], at=p), steps=8)
        close(carried.data[i], row.components)
    _, frame = geoad.eigh(theta.form(torch.eye(3), at=p), metric=field(p))
    there = geoad.parallel_transport(field, [p, q], frame, steps=24)
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
