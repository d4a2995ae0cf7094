"""Parallel transport along a curve."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.charts import Atlas, Chart, Point
from geoad.connection.crossing import comfortable
from geoad.connection.integrate import require_finite, require_steps
from geoad.connection.levi_civita import LeviCivita, near
from geoad.errors import BasePointError, ChartDomainError, ChartMismatchError, GeometryError, VarianceError
from geoad.fields.metric import FormField
from geoad.operators import CG
from geoad.params import Blocks, Layout, axpy, sub
from geoad.tensors import Density, GeoTensor, LogDensity, Rank1, Rank2, TypedTensor, describe
from geoad.tensors.general import as_general

__all__ = ["MATRIX_FREE", "parallel_transport"]

MATRIX_FREE = 64
"""Above this number of coordinates vectors and covectors are transported without the matrix Γ(ẋ)."""

T = TypeVar("T", bound=TypedTensor)
Curve = Sequence[Point] | Callable[[Any], Point]
_Piece = Callable[[float], tuple[Blocks, Blocks]]


def parallel_transport(metric: FormField | None, curve: Curve, tensor: T, *, steps: int = 64, solver: CG | None = None) -> T:
    r"""`tensor`, carried along a curve by the Levi-Civita connection of a metric field.

    Solves :math:`\dot T^k = -\Gamma^k_{ij}\,\dot x^i T^j` for each upper and
    :math:`\dot T_k = \Gamma^j_{ik}\,\dot x^i T_j` for each lower index, in the home chart of the field. Lengths and angles, and
    all contractions, are kept. The (d, d) matrix Γ(ẋ) is made twice a step; in more than 64 coordinates single vectors and
    covectors do without it, by one product with the connection and one solve for each of the four evaluations. Axes of other
    spaces, frame and batch axes are untouched. With a metric that is constant in its home chart (or None: the flat reference
    metric) the components in that chart stay the same, on any curve.

    Args:
        metric: a metric field, or None.
        curve: two or more Points, joined by straight segments of the home chart of the field; or a function of s in [0, 1] that
            gives a `Point` and is differentiable by ``torch.func.jvp`` (s is a 0-dimensional tensor).
        tensor: any typed object at the start of the curve.
        steps: number of Runge-Kutta steps for the whole curve, at least one for each segment; the error falls as steps⁻⁴.
        solver: how to solve with the metric, see `geodesic`.

    Returns:
        The object of the same type at the end of the curve, in the chart of `tensor`.

    Raises:
        BasePointError: `tensor` does not live at the start of the curve.
        ChartDomainError: the curve leaves the domain of the home chart of the metric.
        SingularMetricError: the metric is singular somewhere on the curve.

    >>> import torch, geoad
    >>> polar = geoad.Chart({"x": (2,)}, name="polar")
    >>> G = polar.metric_field(lambda x: torch.diag(torch.stack([torch.ones_like(x[0]), x[0] ** 2])))
    >>> curve = lambda s: polar.point(torch.stack([torch.ones_like(s), s]))
    >>> v = polar.vector(torch.tensor([1.0, 0.0]), at=curve(torch.tensor(0.0)))
    >>> geoad.parallel_transport(G, curve, v).components    # the plane is flat: the same arrow, seen from angle 1
    tensor([ 0.5403, -0.8415])
    """
    connection = LeviCivita(metric, "parallel transport", solver)
    if not isinstance(tensor, TypedTensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise VarianceError(
            f"only typed objects are transported, found {describe(tensor)}. Plain numbers have no law; give them a type with "
            "chart.vector(x, at=p), chart.covector(x, at=p), ..."
        )
    atlas = tensor.chart.ground.joined
    if metric is not None and metric.by_chart and atlas is not None:
        return _crossing(metric, atlas, curve, tensor, steps, solver)
    connection = connection.local(tensor.at)
    home = connection.home(tensor.chart)
    start, end, pieces = _pieces(curve, home, tensor)
    if not near(tensor.at.to(home), start):
        raise BasePointError(
            f"{describe(tensor)} does not live at the start of the curve. Parallel transport begins where the object is; "
            "start the curve at T.at, or reverse it."
        )
    goal = end.to(tensor.chart)
    if connection.flat:
        return cast(Any, tensor).carry(to=goal, chart=home)
    here = tensor.to(home)
    if isinstance(here, (Density, LogDensity)):
        return cast(Any, _density(connection, here, end)).to(tensor.chart)
    data = here.ravel() if isinstance(here, Rank1) else as_general(here).data
    equation = _equation(connection, here, len(start.batch_shape))
    require_steps(steps)
    count = max(1, math.ceil(steps / max(1, len(pieces))))
    for piece in pieces:
        data = _march(equation, piece, data, count)
    return _rebuilt(here, data, end).to(tensor.chart)


# -- on an atlas -----------------------------------------------------------------------------------------------------------


def _crossing(metric: FormField, atlas: Atlas, curve: Any, tensor: T, steps: int, solver: CG | None) -> T:
    """The transport in runs of steps through one chart each; the result is in the chart of `tensor` if that is comfortable."""
    require_steps(steps)
    if not callable(curve):
        raise GeometryError(
            "on an atlas a curve is a function of s in [0, 1] that gives a Point: the segments between listed points would be "
            "straight in one chart and bent in another. Pass for instance lambda s: geoad.geodesic(metric, p, v, s)."
        )
    at = cast("Callable[[Any], Any]", curve)
    stops = [at(torch.tensor(i / (2 * steps), dtype=tensor.dtype, device=tensor.device)) for i in range(2 * steps + 1)]
    runs: list[tuple[Chart, int]] = []
    chart = tensor.chart
    for i in range(steps):
        charts = comfortable(atlas, [_a_point(each) for each in stops[2 * i : 2 * i + 3]], chart)
        if not charts:
            raise ChartDomainError(
                f"no chart of the atlas '{atlas.name}' contains the curve from s = {i / steps:.4g} to {(i + 1) / steps:.4g}, "
                "one step of the transport. Choose more steps=, so that a step is shorter than the charts overlap."
            )
        if not runs or charts[0] != chart.reference:
            runs.append((charts[0], i))
        chart = charts[0]
    moved = tensor
    for (chart, first), last in zip(runs, [*(i for _, i in runs[1:]), steps], strict=True):
        local = metric.local(stops[2 * first].to(chart))
        part = _part(at, first / steps, last / steps)
        moved = parallel_transport(local, part, moved.to(chart), steps=last - first, solver=solver)
    charts = comfortable(atlas, [moved.at], tensor.chart)
    return moved.to(tensor.chart if charts[0] == tensor.chart.reference else charts[0])


def _part(curve: Callable[[Any], Any], a: float, b: float) -> Callable[[Any], Any]:
    return lambda s: curve(a + (b - a) * s)


# -- the curve ---------------------------------------------------------------------------------------------------------


def _pieces(curve: Any, home: Chart, tensor: TypedTensor) -> tuple[Point, Point, list[_Piece]]:
    """Start, end, and for each smooth piece the function s -> (coordinates, velocity) on [0, 1], all in `home`."""
    if callable(curve):
        at = _parametrised(cast("Callable[[Any], Any]", curve), home, tensor)
        return home.point(at(0.0)[0]), home.point(at(1.0)[0]), [_checked(at, home)]
    points = [_in_home(each, home) for each in cast("Sequence[Any]", curve)]
    if not points:
        raise GeometryError("the curve is empty. Pass at least its first and last Point, or a function of s in [0, 1].")
    pieces = [_checked(_segment(a.blocks, b.blocks), home) for a, b in itertools.pairwise(points)]
    return points[0], points[-1], pieces


def _in_home(p: Any, home: Chart) -> Point:
    return _a_point(p).to(home)


def _a_point(p: Any) -> Point:
    if not isinstance(p, Point):
        raise ChartMismatchError(
            f"a curve is made of Points, found {describe(p)}. Plain numbers have no chart; use chart.point(x)."
        )
    return p


def _segment(a: Blocks, b: Blocks) -> _Piece:
    velocity = sub(b, a)
    return lambda s: (axpy(s, velocity, a), velocity)


def _parametrised(curve: Callable[[Any], Any], home: Chart, tensor: TypedTensor) -> _Piece:
    def blocks(s: Tensor) -> Blocks:
        return _in_home(curve(s), home).blocks

    def at(s: float) -> tuple[Blocks, Blocks]:
        now = torch.as_tensor(s, dtype=tensor.dtype, device=tensor.device)
        result: Any = torch.func.jvp(blocks, (now,), (torch.ones_like(now),))
        return result

    return at


def _checked(piece: _Piece, home: Chart) -> _Piece:
    """The same piece; leaving the domain of `home` raises."""
    if not home.bounded:
        return piece

    def at(s: float) -> tuple[Blocks, Blocks]:
        x, velocity = piece(s)
        return home.point(x).blocks, velocity

    return at


# -- the equation --------------------------------------------------------------------------------------------------------


_Generator = Callable[[Tensor], Tensor]
"""dT/ds as a function of the dense components of T, at a point of the curve."""


def _equation(connection: LeviCivita, tensor: TypedTensor, points: int) -> Callable[[Blocks, Blocks], _Generator]:
    """The generator of the transport at given coordinates and velocity."""
    layout = tensor.chart.layout
    if isinstance(tensor, Rank1) and len(tensor.batch_shape) == points and layout.dim > MATRIX_FREE:
        return _matrix_free(connection, tensor.up, layout)
    axes = [axis.up if axis.chart == tensor.chart else None for axis in tensor.axes]

    def at(x: Blocks, velocity: Blocks) -> _Generator:
        matrix = connection.along(x, velocity)

        def generator(data: Tensor) -> Tensor:
            total = torch.zeros_like(data)
            for axis, up in enumerate(axes):
                if up is None:
                    continue
                last = data.movedim(axis - len(axes), -1)
                rows = last.reshape(*last.shape[:points], -1, layout.dim)
                turned = -(rows @ matrix.mT) if up else rows @ matrix
                total = total + turned.reshape(last.shape).movedim(-1, axis - len(axes))
            return total

        return generator

    return at


def _matrix_free(connection: LeviCivita, up: bool, layout: Layout) -> Callable[[Blocks, Blocks], _Generator]:
    def at(x: Blocks, velocity: Blocks) -> _Generator:
        def vector(data: Tensor) -> Tensor:
            return -layout.ravel(connection.raised(x, connection.lowered(x, velocity, layout.unravel(data))))

        def covector(data: Tensor) -> Tensor:
            return layout.ravel(connection.contracted(x, velocity, connection.raised(x, layout.unravel(data))))

        return vector if up else covector

    return at


def _march(equation: Callable[[Blocks, Blocks], _Generator], piece: _Piece, data: Tensor, steps: int) -> Tensor:
    """Classical Runge-Kutta steps through one piece of the curve; the equation is linear in T."""
    h = 1.0 / steps
    ahead = equation(*piece(0.0))
    for i in range(steps):
        here, middle, ahead = ahead, equation(*piece((i + 0.5) * h)), equation(*piece((i + 1) * h))
        k1 = here(data)
        k2 = middle(data + h / 2 * k1)
        k3 = middle(data + h / 2 * k2)
        k4 = ahead(data + h * k3)
        data = data + h / 6 * (k1 + 2 * (k2 + k3) + k4)
        require_finite({"": data})
    return data


# -- the result ------------------------------------------------------------------------------------------------------------


def _rebuilt(tensor: TypedTensor, data: Tensor, end: Point) -> Any:
    match tensor:
        case Rank1():
            return type(tensor)(end.chart, end.chart.layout.unravel(data), end)
        case Rank2():
            if tensor.op.symmetric and tensor.ups[0] == tensor.ups[1]:
                data = 0.5 * (data + data.mT)
            op = ops.Dense(end.chart.layout, data, symmetric=tensor.op.symmetric, definite=tensor.op.definite)
            return type(tensor)(end.chart, op, end, home=end.chart, ups=tensor.ups)
        case _:
            assert isinstance(tensor, GeoTensor)
            return GeoTensor(data, tensor.axes, end)


def _density(connection: LeviCivita, tensor: Density | LogDensity, end: Point) -> Density | LogDensity:
    """The volume √det G is parallel, so the ratio to its power stays the same, on any curve."""
    assert connection.metric is not None
    before, after = connection.metric(tensor.at).logdet().value, connection.metric(end).logdet().value
    gain = 0.5 * tensor.weight * (after - before)
    value = tensor.value + gain if isinstance(tensor, LogDensity) else tensor.value * gain.exp()
    return type(tensor)(end.chart, value, tensor.weight, end)
