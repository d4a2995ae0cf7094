"""Pictures of charts: level lines of functions, coordinate lines, trajectories. Needs matplotlib: ``pip install geoad[plot]``.

Every function draws on the axes that it is given and returns them; without axes it makes a figure of its own. Nothing is shown
and no style is set. `chart` says in which coordinates the picture is drawn: the objects may live in any chart of the manifold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geoad.charts import Chart, Point
from geoad.errors import GeometryError
from geoad.fields import ScalarField

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["contours", "coordinate_lines", "spectrum", "trajectory"]

Range = tuple[float, float]


def axes_of(ax: Axes | None) -> Axes:
    """The given axes, or those of a new figure."""
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise GeometryError(
            "drawing needs matplotlib, which is not installed. It is an extra: pip install geoad[plot]. Only "
            "geoad.plotting and geoad.plotting_kernels use it."
        ) from error
    return pyplot.subplots()[1]


def _require_plane(chart: Chart, what: str) -> None:
    if chart.dim != 2:
        raise GeometryError(
            f"{what} are drawn in a plane, chart '{chart.name}' has {chart.dim} coordinates. Restrict the function to a "
            "plane first: a chart with two coordinates."
        )


def _mesh(xlim: Range, ylim: Range, nx: int, ny: int) -> tuple[Tensor, Tensor]:
    """Coordinates of a grid, two tensors of shape (ny, nx)."""
    x = torch.linspace(*xlim, nx, dtype=torch.float64, device="cpu")
    y = torch.linspace(*ylim, ny, dtype=torch.float64, device="cpu")
    grid = torch.meshgrid(x, y, indexing="xy")
    return grid[0], grid[1]


def _point(chart: Chart, x: Tensor, y: Tensor) -> Point:
    """The points with coordinates (x, y), a batch."""
    return chart.point(chart.unpack(chart.layout.unravel(torch.stack([x, y], dim=-1))))


def _numbers(points: Sequence[Point] | Point, chart: Chart) -> Tensor:
    """The coordinates of points in a chart, shape (n, 2)."""
    flat = [points.to(chart).ravel()] if isinstance(points, Point) else [p.to(chart).ravel() for p in points]
    return torch.cat([each.detach().cpu().reshape(-1, chart.dim) for each in flat])


def contours(
    field: ScalarField,
    chart: Chart,
    xlim: Range,
    ylim: Range,
    ax: Axes | None = None,
    *,
    levels: int | Sequence[float] = 12,
    resolution: int = 121,
    fill: bool = True,
    **style: Any,
) -> Axes:
    """The level sets of a function, seen in a chart with two coordinates.

    Args:
        field: the function; it may be made in any chart of the manifold.
        chart: the coordinates of the picture.
        xlim: the range of the first coordinate.
        ylim: the range of the second coordinate. The whole rectangle must lie in the domain of the chart.
        ax: the axes; None makes a figure.
        levels: the levels, or how many.
        resolution: points along each side.
        fill: colour the areas between the lines.
        **style: of the lines, for ``Axes.contour``; ``cmap`` is that of the areas.
    """
    _require_plane(chart, "level sets")
    ax = axes_of(ax)
    x, y = _mesh(xlim, ylim, resolution, resolution)
    with torch.no_grad():
        z = field(_point(chart, x.reshape(-1), y.reshape(-1))).reshape(x.shape)
    arrays = (x.numpy(), y.numpy(), z.numpy())
    cmap = style.pop("cmap", "Greys")
    if fill:
        ax.contourf(*arrays, levels=levels, cmap=cmap, alpha=0.45, extend="max")
    lines: dict[str, Any] = {"colors": "0.6", "linewidths": 0.6, **style}
    ax.contour(*arrays, levels=levels, **lines)
    ax.set_xlim(*xlim)
    ax.set_ylim(*ylim)
    return ax


def coordinate_lines(
    of: Chart,
    chart: Chart,
    xlim: Range,
    ylim: Range,
    ax: Axes | None = None,
    *,
    count: int = 9,
    resolution: int = 121,
    **style: Any,
) -> Axes:
    """The coordinate lines of one chart, seen in another.

    Args:
        of: the chart whose coordinates are constant along the lines.
        chart: the coordinates of the picture.
        xlim: the range of the first coordinate *of* ``of`` that is covered.
        ylim: the range of its second coordinate.
        ax: the axes; None makes a figure.
        count: lines of each family.
        resolution: points along each line.
        **style: of the lines, for ``Axes.plot``.
    """
    _require_plane(of, "coordinate lines")
    _require_plane(chart, "coordinate lines")
    ax = axes_of(ax)
    style = {"color": "0.55", "linewidth": 0.6, **style}
    first, second = _mesh(xlim, ylim, count, resolution)
    lines = [(first, second)]
    first, second = _mesh(xlim, ylim, resolution, count)
    lines.append((first.mT, second.mT))
    for x, y in lines:
        seen = _numbers(_point(of, x.reshape(-1), y.reshape(-1)), chart).reshape(*x.shape, 2)
        ax.plot(seen[..., 0].numpy(), seen[..., 1].numpy(), **style)
    return ax


def trajectory(
    points: Sequence[Point] | Point,
    chart: Chart,
    ax: Axes | None = None,
    *,
    label: str | None = None,
    ends: bool = True,
    **style: Any,
) -> Axes:
    """A sequence of points, seen in a chart with two coordinates.

    Args:
        points: the points, or a batch of them; in any chart of the manifold.
        chart: the coordinates of the picture.
        ax: the axes; None makes a figure.
        label: for the legend.
        ends: mark the first point with a disc and the last one with a star, in the colour of the line.
        **style: of the line, for ``Axes.plot``.
    """
    _require_plane(chart, "trajectories")
    ax = axes_of(ax)
    seen = _numbers(points, chart).numpy()
    (line,) = ax.plot(seen[:, 0], seen[:, 1], label=label, **style)
    if ends:
        mark: dict[str, Any] = {
            "color": line.get_color(),
            "linestyle": "none",
            "zorder": line.get_zorder() + 0.5,
            "markeredgecolor": "white",
        }
        ax.plot(*seen[0], marker="o", markersize=8, **mark)
        ax.plot(*seen[-1], marker="*", markersize=15, **mark)
    return ax


def spectrum(values: Sequence[Tensor], ax: Axes | None = None, *, labels: Sequence[str] = (), **style: Any) -> Axes:
    """Eigenvalues, descending, on a logarithmic scale: for instance those of G⁻¹H at several points.

    Args:
        values: one tensor of eigenvalues for each line; entries that are not positive are left out.
        ax: the axes; None makes a figure.
        labels: for the legend, one for each line.
        **style: of the lines, for ``Axes.plot``.
    """
    ax = axes_of(ax)
    for index, each in enumerate(values):
        sorted_values = each.detach().cpu().sort(descending=True).values
        rank = torch.arange(1, len(sorted_values) + 1, device="cpu")
        keep = sorted_values > 0
        ax.plot(rank[keep].numpy(), sorted_values[keep].numpy(), label=labels[index] if index < len(labels) else None, **style)
    ax.set_yscale("log")
    ax.set_xlabel("index")
    ax.set_ylabel("eigenvalue")
    return ax
