"""Curves on an atlas: integrated step by step, each step in a chart that has room around the point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from geoad import transport
from geoad.charts import Atlas, Chart, Point, same_space, singles
from geoad.connection.integrate import Time, visit
from geoad.errors import ChartDomainError
from geoad.params import Blocks, outside_of_transforms, unwrapped
from geoad.tensors import Vector

__all__ = ["Piece", "Place", "comfortable", "gathered", "require_inside", "scattered", "seen", "travel"]


@dataclass(frozen=True)
class Place:
    """A single point, and a tangent vector there or none, as plain blocks of a chart."""

    chart: Chart
    x: Blocks
    u: Blocks | None = None

    @property
    def point(self) -> Point:
        """The point, as one that nothing is remembered of."""
        return Point(self.chart, self.x)

    def to(self, chart: Chart) -> Place:
        """The same point and vector in another chart."""
        if chart == self.chart:
            return self
        here = self.point
        u = None if self.u is None else transport.vector(self.u, here, chart)
        return Place(chart, here.to(chart).blocks, u)


Piece = Callable[[Place, Time], Place]
"""The solution after a time h that is one step, in the chart of the place (or one of its tree)."""


def travel(atlas: Atlas, start: Place, times: Sequence[Time], steps: int, piece: Piece) -> list[Place]:
    """The places at `times`, by equal steps, each of which is taken in a comfortable chart.

    A step that leaves the domain of its chart is taken again in the next one that contains its beginning.
    """

    def leap(place: Place, h: Time) -> Place:
        refused: ChartDomainError | None = None
        for chart in comfortable(atlas, [place.point], place.chart):
            try:
                return piece(place.to(chart), h)
            except ChartDomainError as error:
                refused = error
        raise ChartDomainError(
            f"the curve leaves every chart of the atlas '{atlas.name}' within one step. Either it ends there, for no chart "
            "covers the rest of its way, or the step is longer than the charts overlap: choose more steps=."
        ) from refused

    return visit(start, times, steps, leap)


def comfortable(atlas: Atlas, points: Sequence[Point], now: Chart) -> list[Chart]:
    """The charts of the atlas that contain all the points: first that of `now` unless another margin is twice as large."""
    found = atlas.margins(points[0])
    for p in points[1:]:
        here = atlas.margins(p)
        found = {chart: min(margin, here[chart]) for chart, margin in found.items() if chart in here}
    order = sorted(found, key=lambda chart: -found[chart])
    root = now.reference
    if root in found and 2 * found[root] >= found[order[0]]:
        order = [root, *(chart for chart in order if chart != root)]
    return order


def require_inside(chart: Chart, x: Blocks) -> None:
    """Raise `ChartDomainError` outside of the domain of `chart`; values inside of jvp and grad are looked at as well."""
    plain = unwrapped(x) if chart.bounded else None
    if plain is not None:
        with outside_of_transforms():
            for single in singles(plain, chart):
                chart.check_domain(single, "the curve")


def seen(point: Point, start: Point, chart: Chart) -> Point:
    """The end of a curve from `start` in `chart`; in redundant coordinates the curve goes on in its fibres."""
    return point.to(chart) if same_space(point.chart, chart) else point.followed_from(start.to(chart))


# -- batches -------------------------------------------------------------------------------------------------------------


def scattered(chart: Chart, x: Blocks, u: Blocks | None = None) -> list[Place]:
    """The single places of a batch."""
    velocities = [None] * len(singles(x, chart)) if u is None else singles(u, chart)
    return [Place(chart, a, b) for a, b in zip(singles(x, chart), velocities, strict=True)]


def gathered(atlas: Atlas, places: Sequence[Place], batch: torch.Size, asked: Chart | None, start: Chart) -> tuple[Point, Any]:
    """The places as one batch, and their vectors (or None), in the chart that is asked for.

    Default: the chart of the start where it is comfortable at all the ends, else the chart with the largest margin there.
    """
    chart = asked
    if chart is None:
        charts = comfortable(atlas, [place.point for place in places], start)
        if not charts:
            raise ChartDomainError(
                f"no chart of the atlas '{atlas.name}' contains the ends of all {len(places)} curves of this batch, so they "
                "have no common coordinates. Go through the batch one by one, or ask for a chart= that contains them."
            )
        chart = start if charts[0] == start.reference else charts[0]
    if not batch:
        place = places[0].to(chart)
        point = chart.point(place.x)
        return point, None if place.u is None else Vector(chart, place.u, point)
    moved = [place.to(chart) for place in places]
    point = chart.point(_stacked(chart, [place.x for place in moved], batch))
    velocities = [place.u for place in moved if place.u is not None]
    return point, Vector(chart, _stacked(chart, velocities, batch), point) if len(velocities) == len(moved) else None


def _stacked(chart: Chart, blocks: Sequence[Blocks], batch: torch.Size) -> Blocks:
    return {name: torch.stack([each[name] for each in blocks]).reshape(*batch, *shape) for name, shape in chart.layout.items()}
