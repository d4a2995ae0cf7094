"""How the charts of a manifold hang together: the way from one to another, and where fields that are given in several meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from geoad.charts.chart import Chart
from geoad.errors import ChartMismatchError, GeometryError, NotADiffeomorphismError

if TYPE_CHECKING:
    from geoad.charts.point import Point
    from geoad.charts.reparametrization import Reparametrization

__all__ = ["flat_reference", "meeting", "path", "same_manifold", "same_space", "section_between", "station", "why_apart"]


def same_manifold(a: Chart, b: Chart) -> bool:
    """True if the charts belong to one manifold: they have the same reference chart, or roots in one atlas."""
    if a is b:
        return True
    first, second = a.reference, b.reference
    if first == second:
        return True
    return first.joined is not None and second.joined is not None and first.joined.uid == second.joined.uid


_APART = "Their charts belong to different manifolds, so no map relates them; build both from the same reference chart."


def why_apart(a: Chart, b: Chart, otherwise: str = _APART) -> str:
    """Words on two charts of different manifolds, if it is known what these are; else `otherwise`."""
    first, second = a.reference.about, b.reference.about
    if not (first and second):
        return otherwise
    return (
        f"The first belongs to {first}, the second to {second}: other data, another network or another choice of outputs, and "
        "what is computed at different samples does not mix. Make one geoad.FunctionSpace and use it for both."
    )


def same_space(a: Chart, b: Chart) -> bool:
    """True if the charts are related by changes of coordinates only, see `Chart.space`."""
    first, second = a.space, b.space
    return first == second or (first.joined is not None and second.joined is not None and same_manifold(first, second))


def flat_reference(chart: Chart, what: str, remedy: str) -> Chart:
    """The reference chart, whose Euclidean metric and straight lines are the default; on an atlas there is none.

    Args:
        chart: any chart of the manifold.
        what: what is asked by default, for the message: "the gradient without a metric".
        remedy: the call that names its metric, for the message.

    Raises:
        GeometryError: the manifold is covered by an atlas.
    """
    home = chart.reference
    if home.joined is None:
        return home
    names = ", ".join(f"'{each.name}'" for each in home.joined.charts)
    raise GeometryError(
        f"{what} needs a reference chart, but '{chart.name}' belongs to the atlas '{home.joined.name}' of the charts {names}, "
        "none of which stands out: each has another Euclidean metric and other straight lines, so the result would depend on "
        f"the choice. Say what is meant: {remedy}."
    )


def path(start: Chart, end: Chart, at: Point | None = None) -> list[tuple[Reparametrization, bool]]:
    """The steps from `start` to `end` through the tree of charts; True marks a step along φ, False one along φ⁻¹.

    Between charts of an atlas the way goes through a transition of the atlas. Where only a detour through further charts
    leads there, `at` chooses one on which the point has coordinates.

    Raises `ChartMismatchError` if the charts belong to different manifolds.
    """
    if start is end:
        return []
    above: dict[Chart, int] = {}  # not by uid: copies of a learnable chart may have been trained apart
    up: list[Reparametrization] = []
    chart: Chart = start
    while True:
        above[chart] = len(up)
        if chart == end:
            return [(phi, False) for phi in up]
        if chart.parent is None:
            break
        up.append(chart.parent)
        chart = chart.parent.source
    root = chart
    down: list[Reparametrization] = []
    chart = end
    while chart not in above:
        if chart.parent is None:
            across = _across(start, end, root, chart, at)
            return [(phi, False) for phi in up] + across + [(phi, True) for phi in reversed(down)]
        down.append(chart.parent)
        chart = chart.parent.source
    return [(phi, False) for phi in up[: above[chart]]] + [(phi, True) for phi in reversed(down)]


def station(home: Chart, chart: Chart) -> Chart:
    """Where an object that is given in `home` is computed for a point of `chart`: `home`, or the chart of an immersion between.

    Below an immersion (or a smooth map of any rank) metrics are the induced ones, and inverses and connections are those
    of the induced metric.
    """
    if same_space(home, chart):
        return home
    for phi, along in reversed(path(home, chart)):
        if along and phi.map.law in ("immersion", "smooth"):
            return phi.target
    return home


def section_between(start: Chart, end: Chart) -> Reparametrization | None:
    """The first map on the way that a function on `end` cannot be pulled back by, for it leads to ψ by a choice; or None."""
    if same_space(start, end):
        return None
    return next((phi for phi, along in path(start, end) if along and phi.map.law != "diffeomorphism"), None)


def meeting(homes: Sequence[Chart]) -> Chart:
    """A chart to which functions and forms that are given in these charts can all be pulled back.

    Raises:
        NotADiffeomorphismError: there is none.
    """
    first = homes[0]
    if all(each == first for each in homes):
        return first
    for chart in (first.reference, *homes):
        if all(section_between(chart, each) is None for each in homes):
            return chart
    raise NotADiffeomorphismError(
        f"the charts {sorted({each.name for each in homes})} lie on different branches of maps that cannot be undone, so "
        "fields given in them have no chart in common. Write one of them in a chart above both: chart.scalar_field(fn) or "
        "chart.metric_field(fn)."
    )


def _across(start: Chart, end: Chart, a: Chart, b: Chart, at: Point | None) -> list[tuple[Reparametrization, bool]]:
    """The way from tree to tree, between their roots, if these are charts of one atlas."""
    if not same_manifold(a, b):
        remedy = (
            "Only charts made from one another by reparametrize, or joined by a geoad.Atlas, share a manifold; make the second "
            "one with chart.reparametrize(...)."
        )
        raise ChartMismatchError(
            f"cannot go from chart '{start.name}' to chart '{end.name}': they belong to different manifolds (reference "
            f"charts '{a.name}' and '{b.name}'). {why_apart(a, b, remedy)}"
        )
    assert a.joined is not None
    return a.joined.way(a, b, at)
