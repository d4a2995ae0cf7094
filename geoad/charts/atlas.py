"""Atlases: charts that cover a manifold together, none of which need cover it alone."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from geoad.charts.batches import singles
from geoad.charts.chart import Chart, makers
from geoad.charts.cocycle import check
from geoad.charts.point import Point
from geoad.charts.reparametrization import Reparametrization
from geoad.errors import ChartDomainError, ChartMismatchError, GeometryError
from geoad.maps.functions import Functions
from geoad.maps.select import Recipe, bind
from geoad.params import outside_of_transforms, unwrapped

if TYPE_CHECKING:
    from geoad.fields import MetricField, ScalarField

__all__ = ["Atlas"]

ChartName = Chart | str
Margin = Callable[[Any], Any]
Step = tuple[Reparametrization, bool]


class Atlas:
    r"""Charts :math:`(U_i, θ_i)` of one manifold with the transitions :math:`θ_j ∘ θ_i^{-1}` on their overlaps.

    The charts have equal layouts; none of them is the reference chart of the manifold, so there is no default metric, no
    default connection and no straight line: what needs one asks for it. Everything else is as with other charts: points, typed
    objects and fields move between charts of the atlas (and those made of them by ``reparametrize``) with ``.to(chart)``, by
    the direct transition, or, where there is none, through the fewest further charts that contain the point.

    Args:
        charts: the charts, each a free chart of its own until now (no network's, not reparametrized, in no other atlas).
        transitions: ``{(a, b): how}`` with charts or their names; one direction is enough, the map is inverted for the other.
            `how` is a map of `geoad.maps` (its domain and image are the two pictures of the overlap), or a pair of functions
            (forward, inverse), see `geoad.maps.Functions` for their domains.
        name: shown in messages.
        margin: how far from its edge a chart is at a point: a function of its components with positive values, or a function
            for each chart. Curves (`geoad.geodesic`, `geoad.flow`) go over to another chart where its margin is twice as
            large. Default: 1 everywhere, so that they change chart only where they leave its domain.

    Raises:
        GeometryError: the charts differ in layout or share a name, are no free charts, or a transition is missing or learnable.

    Source: Kristiadi et al. (2023), appendix D.

    >>> import torch, geoad
    >>> north, south = geoad.Chart((2,), name="north"), geoad.Chart((2,), name="south")
    >>> sphere = geoad.Atlas([north, south], {(north, south): geoad.maps.Inversion()}, name="sphere")
    >>> north.point(torch.tensor([0.0, 4.0])).to(south).components
    tensor([0.0000, 0.2500])
    """

    def __init__(
        self,
        charts: Iterable[Chart],
        transitions: Mapping[tuple[ChartName, ChartName], Recipe | tuple[Callable[..., Any], Callable[..., Any]]],
        name: str = "",
        *,
        margin: Margin | Mapping[ChartName, Margin] | None = None,
    ) -> None:
        self.charts = tuple(charts)
        self.name = name or "atlas"
        self.uid = uuid.uuid4().hex
        _require_free(self.charts, self.name)
        self._transitions: dict[tuple[str, str], Reparametrization] = {}  # by uid: charts have no hash yet while unpickled
        for (start, end), how in transitions.items():
            self._join(self.chart(start), self.chart(end), how)
        self._margins: dict[str, Margin] = {}
        if margin is not None:
            given: Mapping[Any, Margin] = margin if isinstance(margin, Mapping) else dict.fromkeys(self.charts, margin)
            self._margins = {self.chart(chart).uid: fn for chart, fn in given.items()}
        self._require_connected()
        for chart in self.charts:
            chart.joined = self

    def __repr__(self) -> str:
        return f"Atlas('{self.name}', dim={self.dim}, charts={[chart.name for chart in self.charts]})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Atlas:
        """The atlas itself: it is frozen, and its charts keep their identity."""
        return self

    @property
    def dim(self) -> int:
        """The number of coordinates of each chart."""
        return self.charts[0].dim

    # -- charts and transitions ----------------------------------------------------------------------------------------

    def chart(self, name: ChartName) -> Chart:
        """The chart of this name; a chart of the atlas as it is."""
        for chart in self.charts:
            if chart.name == name or chart == name:
                return chart
        shown = name.name if isinstance(name, Chart) else name
        raise ChartMismatchError(
            f"the atlas '{self.name}' has no chart '{shown}', only {[chart.name for chart in self.charts]}. A chart made of "
            "one of these by reparametrize hangs in its tree and is no chart of the atlas; pass its .reference."
        )

    def _join(self, start: Chart, end: Chart, how: Any) -> None:
        if start == end or (start.uid, end.uid) in self._transitions or (end.uid, start.uid) in self._transitions:
            raise GeometryError(
                f"the transition from chart '{start.name}' to '{end.name}' is given twice, or leads nowhere. One direction is "
                "enough: a transition is invertible."
            )
        recipe = Functions(*cast("tuple[Any, Any]", how)) if isinstance(how, tuple) else how
        bound = bind(cast(Recipe, recipe), start.layout)
        if bound.learnable:
            raise GeometryError(
                f"the transition from chart '{start.name}' to '{end.name}' has learnable parameters. What an atlas is must not "
                "change while its points are alive; use a map without parameters, and reparametrize a chart of the atlas with "
                "the learnable one."
            )
        self._transitions[start.uid, end.uid] = Reparametrization(start, end, bound)

    def transition(self, start: ChartName, end: ChartName) -> Reparametrization:
        """The direct transition from chart `start` to chart `end`, as a `Reparametrization`."""
        a, b = self.chart(start), self.chart(end)
        step = self.direct(a, b)
        if step is None:
            raise ChartMismatchError(
                f"the atlas '{self.name}' has no direct transition from chart '{a.name}' to '{b.name}'. Objects are moved "
                "through further charts, point by point: call .to(chart) on the object."
            )
        return step[0] if step[1] else step[0].inverse

    def direct(self, a: Chart, b: Chart) -> Step | None:
        """The direct transition from a to b as a step of a path, or None."""
        """The direct transition from a to b as a step of a path, or None."""
        known = self._transitions.get((a.uid, b.uid))
        if known is not None:
            return known, True
        known = self._transitions.get((b.uid, a.uid))
        return None if known is None else (known, False)

    def way(self, start: Chart, end: Chart, at: Point | None = None) -> list[Step]:
        """The steps between two charts of the atlas: the direct one, else a shortest way, on which `at` lies if it is given."""
        direct = self.direct(start, end)
        if direct is not None:
            return [direct]
        ways = self._detours(start, end)
        first = next(ways)
        if at is None:
            return first
        return next((way for way in itertools.chain([first], ways) if _passes(at, start, way)), first)

    def _detours(self, start: Chart, end: Chart) -> Iterator[list[Step]]:
        """All ways between two charts that pass no chart twice, the shortest first."""
        ways: list[list[Chart]] = [[self.chart(start)]]
        while ways:
            for way in ways:
                if way[-1] == end:
                    yield [cast(Step, self.direct(a, b)) for a, b in itertools.pairwise(way)]
            open_ways = [way for way in ways if way[-1] != end]
            ways = [
                [*way, chart] for way in open_ways for chart in self.charts if chart not in way and self.direct(way[-1], chart)
            ]

    def require_one_way(self, start: Chart, end: Chart) -> None:
        """Raise if several detours lead from chart to chart, for then which one to take depends on the point."""
        if (
            start == end
            or self.direct(start, end) is not None
            or len(list(itertools.islice(self._detours(start, end), 2))) == 1
        ):
            return
        raise ChartMismatchError(
            f"the atlas '{self.name}' has no direct transition from chart '{start.name}' to '{end.name}', and several ways "
            "through further charts. Which one contains a point depends on it, so a function cannot be moved as a whole. "
            "Give the field in both charts, atlas.scalar_field({chart: fn, ...}), or the atlas the transition."
        )

    def _require_connected(self) -> None:
        reached = [self.charts[0]]
        for chart in reached:
            reached.extend(each for each in self.charts if each not in reached and self.direct(chart, each))
        lost = [chart.name for chart in self.charts if chart not in reached]
        if lost:
            raise GeometryError(
                f"no transitions lead from chart '{self.charts[0].name}' to {lost}. An atlas describes one connected "
                "manifold, in which objects can be moved from each chart to each other; give transitions for all overlaps."
            )

    # -- where a point lies ----------------------------------------------------------------------------------------------

    def margins(self, p: Point) -> dict[Chart, float]:
        """The charts of the atlas in which p has coordinates, with the margin there; the largest margin first.

        For a batch: the charts that contain all points, with the smallest of their margins.
        """
        here = self._plain(p)
        found: dict[Chart, float] = {}
        with outside_of_transforms():
            for chart in self.charts:
                try:
                    there = here.to(chart)
                except ChartDomainError:
                    continue
                found[chart] = self.margin(there)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def margin(self, p: Point) -> float:
        """The margin of a point in the chart of the atlas that it is seen in; of a batch the smallest."""
        here = self._plain(p)
        fn = self._margins.get(here.chart.uid)
        if fn is None:
            return 1.0
        with outside_of_transforms():
            margins = [float(fn(here.chart.unpack(single))) for single in singles(here.blocks, here.chart)]
        return min(margins, default=float("inf"))

    def charts_at(self, p: Point) -> list[Chart]:
        """The charts of the atlas in which p has coordinates, the one with the largest margin first."""
        return list(self.margins(p))

    def best(self, p: Point) -> Point:
        """p in the chart of the atlas with the largest margin."""
        return p.to(self.charts_at(p)[0])

    def _plain(self, p: Point) -> Point:
        """p in the chart of the atlas at the root of its tree, as plain values: which chart to use is no smooth question."""
        root = self.chart(p.chart.reference)
        moved = p.to(root)
        blocks = unwrapped(moved.blocks)
        if blocks is None:
            raise GeometryError(
                f"which chart of the atlas '{self.name}' a point lies in depends on its coordinates, and these cannot be read "
                "inside of vmap or of a compiled graph. Pass the whole batch of points instead, which is gone through one by "
                "one, or use a chart of the atlas throughout."
            )
        return moved if blocks is moved.blocks else Point(root, blocks)

    # -- checks ----------------------------------------------------------------------------------------------------------

    def check_cocycle(self, points: Point | Sequence[Point], *, tolerance: float | None = None) -> float:
        r"""Check at sample points that the transitions fit together, and their Jacobians.

        At each point, for all charts a, b, c that contain it and are joined directly: :math:`φ_{ba} ∘ φ_{ab} = \mathrm{id}` and
        :math:`φ_{bc} ∘ φ_{ab} = φ_{ac}`, the same for the Jacobians, and the Jacobian products of each map agree with the
        derivative of the map.

        Args:
            points: points (batches as well) on the overlaps.
            tolerance: largest error relative to the size of the numbers. Default: 10⁴ times the precision.

        Returns:
            the largest relative error found.

        Raises:
            GeometryError: a law does not hold; the message names the charts, the point and the error.
        """
        return check(self, [points] if isinstance(points, Point) else list(points), tolerance)

    # -- fields given chart by chart (defined on the floors above) -------------------------------------------------------

    def scalar_field(self, functions: Mapping[ChartName, Callable[[Any], Tensor]]) -> ScalarField:
        """The function on the manifold with the value ``functions[chart](components in the chart)``, for some or all charts.

        It is evaluated in the chart of the point, or else in one of those given that contains the point. That the functions are
        one function on the overlaps is checked by ``field.check_compatible(points)``.
        """
        return makers["atlas_scalar_field"](self, functions)

    def metric_field(self, functions: Mapping[ChartName, Any]) -> MetricField:
        """The metric field with the matrix ``functions[chart](components in the chart)``, given for some or all charts.

        A metric field that is computed in a chart may stand in the place of the function of that chart. See `scalar_field`.
        """
        return makers["atlas_metric_field"](self, functions)


def _passes(p: Point, start: Chart, steps: list[Step]) -> bool:
    """True if the point has coordinates in all charts on the way."""
    blocks = unwrapped(p.blocks)
    if blocks is None:
        return True
    try:
        with outside_of_transforms():
            here = Point(p.chart, blocks).to(start)
            for phi, along in steps:
                here = here.to(phi.target if along else phi.source)
    except ChartDomainError:
        return False
    return True


def _require_free(charts: Sequence[Chart], name: str) -> None:
    if not charts:
        raise GeometryError("an atlas needs at least one chart, none was given. Pass charts, geoad.Chart(shapes, name=...).")
    for i, chart in enumerate(charts):
        if not isinstance(chart, Chart):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise GeometryError(f"an atlas is made of charts, found {type(chart).__name__}. Make them by geoad.Chart(shapes).")
        if chart.parent is not None or chart.atlas is not None:
            owner = f"the atlas '{chart.atlas.name}'" if chart.atlas is not None else f"the tree of '{chart.reference.name}'"
            raise GeometryError(
                f"chart '{chart.name}' belongs to {owner} already, so the atlas '{name}' cannot join it to other charts: there "
                "would be two manifolds in one. Make a chart of its own, geoad.Chart(shapes, name=...), with a transition."
            )
        if chart.layout != charts[0].layout or chart.plain != charts[0].plain:
            raise GeometryError(
                f"chart '{chart.name}' has {chart.layout}, but '{charts[0].name}' has {charts[0].layout}. The charts of an "
                "atlas have the same names and shapes of blocks, in the same order, for the transitions keep them."
            )
        if any(chart.name == other.name for other in charts[:i]):
            raise GeometryError(f"two charts of the atlas '{name}' are called '{chart.name}'; they are found by their names.")
