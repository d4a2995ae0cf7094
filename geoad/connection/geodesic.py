"""Geodesics: the straight lines of a metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from geoad.charts import Chart, Point, same_manifold, same_point
from geoad.connection.crossing import Place, gathered, require_inside, scattered, seen, travel
from geoad.connection.integrate import Time, integrate, require_finite, times_of
from geoad.connection.levi_civita import LeviCivita
from geoad.errors import BasePointError, ChartMismatchError, VarianceError
from geoad.fields.metric import FormField
from geoad.operators import CG
from geoad.params import Blocks, Layout, axpy
from geoad.tensors import Vector, describe

__all__ = ["geodesic"]


def geodesic(
    metric: FormField | None,
    p: Point,
    v: Vector,
    t: float | Tensor | Sequence[float | Tensor] = 1.0,
    *,
    steps: int = 64,
    method: str = "rk4",
    return_velocity: bool = False,
    solver: CG | None = None,
    chart: Chart | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    r"""The point at time t of the geodesic :math:`\ddot x^k = -\Gamma^k_{ij}\,\dot x^i \dot x^j` from p with velocity v.

    With t = 1 this is the exponential map. The equation is integrated in the home chart of the metric field and the result seen
    in the chart of p, so every chart gets the same curve. It is matrix-free but for the solve with the metric: one product with
    the connection (a few gradients) and one solve for each evaluation. Where the metric is constant in its home chart, the
    geodesic is the straight line of that chart, exactly; with ``metric=None`` it is that of the reference chart, as for
    ``p.retract(v, t)``.

    With a metric field of an `Atlas` (``atlas.metric_field``) every step is taken in a chart that has room around the point:
    the curve goes over to another chart where the margin there is twice as large, and where a step would leave the domain.

    Args:
        metric: a metric field, or None for the flat reference metric.
        p: where it starts; a batch of points gives a batch of geodesics.
        v: the velocity, a `Vector` at p; batch axes behind those of p give one geodesic each.
        t: a number (or 0-dimensional tensor): the result is one `Point`. A sequence or 1-dimensional tensor of times, of either
            sign and in any order: the result is a list.
        steps: number of Runge-Kutta steps of equal length to the largest of the times; between neighbouring times the steps are
            no longer. Fixed steps, so that every chart takes the same ones and the result is differentiable in p, v and t. The
            error falls as steps⁻⁴: compare two values to judge it.
        method: "rk4"; or "scipy" (DOP853, no derivatives) or "torchdiffeq" (dopri5), which choose their steps by tolerances of
            1e-10 in double precision and need ``pip install geoad[ode]``.
        return_velocity: give pairs (Point, Vector) instead of points; the vector is the velocity there.
        solver: how to solve with the metric, e.g. ``geoad.operators.CG(tol=1e-6)``. Default: a factorisation where the size
            allows.
        chart: the chart of the result. Default: the chart of p; on an atlas this only where no other one has a margin more
            than twice as large at the end, else that one.
        options: further keyword arguments for scipy's ``solve_ivp`` or torchdiffeq's ``odeint``.

    Shapes:
        points in the layout of the chart of p, with the batch axes of v.

    Raises:
        VarianceError: v is not a vector, or `metric` is no metric field.
        BasePointError: v lives at another point.
        ChartDomainError: the curve leaves the domain of the home chart, or a result that of the chart of p.
        SingularMetricError: the metric is singular somewhere on the curve.

    >>> import math, torch, geoad
    >>> sphere = geoad.Chart({"x": (2,)}, name="colatitude, longitude")
    >>> G = sphere.metric_field(lambda x: torch.diag(torch.stack([torch.ones_like(x[0]), x[0].sin() ** 2])))
    >>> p = sphere.point(torch.tensor([math.pi / 2, 0.0]))
    >>> v = sphere.vector(torch.tensor([0.0, 1.0]), at=p)
    >>> geoad.geodesic(G, p, v, 0.5).components    # along the equator
    tensor([1.5708, 0.5000])
    """
    connection = LeviCivita(metric, "a geodesic", solver)
    _require_velocity(p, v)
    times, single = times_of(t)

    def solve(local: LeviCivita, x: Blocks, u: Blocks, when: Sequence[Time], count: int) -> list[tuple[Blocks, Blocks]]:
        home = local.home(p.chart)
        found = integrate(_equation(local, home), _state(x, u), when, method=method, steps=count, options=options)
        return [_parts(state, home.layout) for state in found]

    if metric is not None and metric.by_chart and p.chart.ground.joined is not None:
        results = _crossing(connection, p, v, times, steps, solve, chart, return_velocity)
        return results[0] if single else results
    connection = connection.local(p)
    home = connection.home(p.chart)
    x, u = _together(home.layout, p.to(home).blocks, v.to(home).blocks)
    states = [(axpy(time, u, x), u) for time in times] if connection.flat else solve(connection, x, u, times, steps)
    results = [_result(home, p, chart or p.chart, *state, return_velocity) for state in states]
    return results[0] if single else results


def _require_velocity(p: Point, v: Vector) -> None:
    if not isinstance(p, Point):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ChartMismatchError(
            f"a geodesic starts at a Point, found {describe(p)}. Plain numbers have no chart; pass geo.point() or "
            "chart.point(x)."
        )
    if not isinstance(v, Vector):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise VarianceError(
            f"a geodesic starts with a velocity, a Vector, found {describe(v)}. A differential has no direction until a "
            "metric gives it one: metric.sharp(covector), or geoad.riemannian_grad(L, metric)(p)."
        )
    if not same_manifold(v.chart, p.chart):
        raise ChartMismatchError(
            f"the point is in chart '{p.chart.name}', the velocity in chart '{v.chart.name}' of another manifold. Use a "
            "vector of the same manifold."
        )
    if not same_point(p, v.at.to(p.chart)):
        raise BasePointError(
            "the velocity lives at another point than the geodesic starts from. Tangent spaces of different points cannot be "
            "identified without saying how; use v.carry(to=p, chart=...) or geoad.parallel_transport(metric, curve, v)."
        )


_Solve = Callable[[LeviCivita, Blocks, Blocks, Sequence[Time], int], list[tuple[Blocks, Blocks]]]


def _crossing(
    connection: LeviCivita,
    p: Point,
    v: Vector,
    times: Sequence[Time],
    steps: int,
    solve: _Solve,
    chart: Chart | None,
    with_velocity: bool,
) -> list[Any]:
    """The results on an atlas, where each curve of a batch goes its own way through the charts."""
    root = p.chart.reference
    atlas = root.joined
    assert atlas is not None

    def piece(place: Place, h: Time) -> Place:
        local = connection.local(place.point)
        there = place.to(local.home(place.chart))
        assert there.u is not None
        ((x, u),) = solve(local, there.x, there.u, [h], 1)
        require_inside(there.chart, x)
        return Place(there.chart, x, u)

    x, u = _together(root.layout, p.to(root).blocks, v.to(root).blocks)
    batch = root.layout.batch_shape(x)
    if batch.numel() == 0:
        empty = _result(root, p, chart or p.chart, x, u, with_velocity)
        return [empty for _ in times]
    curves = [travel(atlas, place, times, steps, piece) for place in scattered(root, x, u)]
    results = [gathered(atlas, [curve[i] for curve in curves], batch, chart, p.chart) for i in range(len(times))]
    return results if with_velocity else [point for point, _ in results]


def _together(layout: Layout, x: Blocks, u: Blocks) -> tuple[Blocks, Blocks]:
    """The point repeated for further batch axes of the velocity, which lie behind its own."""
    batch, wanted = layout.batch_shape(x), layout.batch_shape(u)
    if batch == wanted:
        return x, u
    extra = len(wanted) - len(batch)
    repeated: Blocks = {}
    for name, shape in layout.items():
        block = x[name].reshape(*batch, *(1 for _ in range(extra)), *shape)
        repeated[name] = block.expand((*wanted, *shape))
    return repeated, u


# -- the state: coordinates and velocity in one dict -----------------------------------------------------------------------


def _state(x: Blocks, u: Blocks) -> Blocks:
    return {**{f"x:{name}": block for name, block in x.items()}, **{f"v:{name}": block for name, block in u.items()}}


def _parts(state: Blocks, layout: Layout) -> tuple[Blocks, Blocks]:
    return {name: state[f"x:{name}"] for name in layout}, {name: state[f"v:{name}"] for name in layout}


def _equation(connection: LeviCivita, home: Chart) -> Callable[[Blocks], Blocks]:
    def rate(state: Blocks) -> Blocks:
        require_finite(state)
        x, u = _parts(state, home.layout)
        require_inside(home, x)
        return _state(u, connection.acceleration(x, u))

    return rate


def _result(home: Chart, start: Point, chart: Chart, x: Blocks, u: Blocks, with_velocity: bool) -> Any:
    point = home.point(x)
    there = seen(point, start, chart)
    return (there, Vector(home, u, point).to(chart)) if with_velocity else there
