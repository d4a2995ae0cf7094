"""Flows: integral curves of vector fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from geoad.charts import Chart, Point
from geoad.connection.crossing import Place, gathered, require_inside, scattered, seen, travel
from geoad.connection.integrate import Time, integrate, require_finite, times_of
from geoad.connection.levi_civita import near
from geoad.errors import BasePointError, ChartMismatchError, VarianceError
from geoad.params import Blocks
from geoad.tensors import Vector, describe

__all__ = ["flow"]

VectorField = Callable[[Point], Vector]


def flow(
    field: VectorField,
    p: Point,
    t: float | Tensor | Sequence[float | Tensor] = 1.0,
    *,
    steps: int = 64,
    method: str = "rk4",
    chart: Chart | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    r"""The point at time t of the integral curve :math:`\dot x = v(x)` of a vector field that starts at p.

    Integrated in the reference chart, so that every chart takes the same steps. On an `Atlas` each step is taken in a chart
    that has room around the point, and the curve goes over from chart to chart: where the margin of another one is twice as
    large, and where a step would leave the domain.

    Args:
        field: a function ``Point -> Vector``, for instance ``geoad.riemannian_grad(L, metric)`` or
            ``lambda p: -geoad.riemannian_grad(L, metric)(p)``.
        p: where the curve starts; a batch of points gives a batch of curves.
        t: a number, or a sequence or 1-dimensional tensor of times (then the result is a list), of either sign.
        steps: number of steps to the largest of the times; the error of "rk4" falls as steps⁻⁴.
        method: "rk4", "scipy" or "torchdiffeq", see `geodesic`.
        chart: the chart of the result. Default: the chart of p; on an atlas this only where no other one has a margin more
            than twice as large at the end, else that one.
        options: further keyword arguments of scipy's or torchdiffeq's integrator.

    Raises:
        VarianceError: the field gives no vectors; a differential has no direction without a metric.
        BasePointError: the field gives vectors at other points than it is asked at.
        ChartDomainError: the curve leaves the domain of the reference chart, or all charts of the atlas.

    >>> import torch, geoad
    >>> line = geoad.Chart({"x": (1,)}, name="line")
    >>> growth = lambda p: line.vector(p.to(line).components, at=p)
    >>> geoad.flow(growth, line.point(torch.ones(1)), 1.0).components
    tensor([2.7183])
    """
    if not isinstance(p, Point):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ChartMismatchError(
            f"a flow starts at a Point, found {describe(p)}. Plain numbers have no chart; pass geo.point() or chart.point(x)."
        )
    times, single = times_of(t)
    home = p.chart.ground
    start = p.to(home)

    def solve(where: Chart, x: Blocks, when: Sequence[Time], count: int) -> list[Blocks]:
        return integrate(lambda y: _rate(field, where, y), x, when, method=method, steps=count, options=options)

    if home.joined is None:
        states = solve(home, start.blocks, times, steps)
        points = [seen(home.point(state), p, chart or p.chart) for state in states]
        return points[0] if single else points

    def piece(place: Place, h: Time) -> Place:
        (x,) = solve(place.chart, place.x, [h], 1)
        require_inside(place.chart, x)
        return Place(place.chart, x)

    atlas = home.joined
    if start.batch_shape.numel() == 0:
        return p.to(chart or p.chart) if single else [p.to(chart or p.chart) for _ in times]
    curves = [travel(atlas, place, times, steps, piece) for place in scattered(home, start.blocks)]
    points = [gathered(atlas, [curve[i] for curve in curves], start.batch_shape, chart, p.chart)[0] for i in range(len(times))]
    return points[0] if single else points


def _rate(field: VectorField, chart: Chart, x: Blocks) -> Blocks:
    """The components of the field in `chart`."""
    require_finite(x)
    require_inside(chart, x)
    here = Point(chart, x)
    value: Any = field(here)
    if not isinstance(value, Vector):
        raise VarianceError(
            f"a flow follows a vector field, found a field of {describe(value)}. Only a Vector says in which direction to go; "
            "for a function L use geoad.riemannian_grad(L, metric), for a covector metric.sharp."
        )
    moved = value.to(chart)
    if not near(moved.at, here):
        raise BasePointError(
            f"the vector field was asked at one point and returned {describe(value)} at another. A curve follows the vectors "
            "where it is; build the value at the point that is passed in: lambda p: chart.vector(..., at=p)."
        )
    return moved.blocks
