"""Manifolds that no single chart covers, ready-made: spheres, tori, projective spaces, the punctured plane."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from geoad import maps
from geoad import operators as ops
from geoad.charts import Atlas, Chart, Point
from geoad.errors import ChartDomainError, GeometryError
from geoad.fields import MetricField
from geoad.metrics import Euclidean, Pullback
from geoad.params import Blocks, Layout

__all__ = ["ProjectiveSpace", "PuncturedPlane", "Sphere", "Torus"]


def _require_dim(dim: Any, what: str, largest: int | None = None) -> int:
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1 or (largest is not None and dim > largest):
        limit = "" if largest is None else f" and at most {largest} (it has 2^dim charts)"
        raise GeometryError(f"the dimension of {what} is a whole number of at least 1{limit}, found {dim!r}.")
    return dim


class _Embedded(Atlas):
    """An atlas whose manifold lies in a Euclidean space: `embed` gives its points there."""

    ambient: Chart

    def _embedding(self, chart: Chart, x: Tensor) -> Tensor:
        raise NotImplementedError

    def embed(self, p: Point) -> Tensor:
        """The point in the surrounding space, shape (*batch, n)."""
        here = p if p.chart in self.charts else p.to(self.chart(p.chart.reference))
        fn: Any = _Embedding(self, here.chart)
        for _ in here.batch_shape:
            fn = torch.func.vmap(fn)
        return fn(here.ravel())

    @property
    def metric(self) -> MetricField:
        """The metric that the surrounding Euclidean space induces: an `Atlas.metric_field` of pull-backs."""
        space = Euclidean(self.ambient)
        return self.metric_field({chart: Pullback(_Embedding(self, chart), space, chart) for chart in self.charts})


class _Embedding:
    """The embedding in one chart, as a function that can be pickled."""

    def __init__(self, atlas: _Embedded, chart: Chart) -> None:
        self.atlas, self.chart = atlas, chart

    def __call__(self, x: Tensor) -> Tensor:
        return self.atlas._embedding(self.chart, x)  # pyright: ignore[reportPrivateUsage]


# -- the sphere ----------------------------------------------------------------------------------------------------------


def _inner(x: Tensor) -> Tensor:
    """1 / (1 + |x|²): 1 in the middle of a stereographic chart, ½ on the equator, 0 at the pole that it misses."""
    return (x * x).sum().log1p().neg().exp()  # in forward mode, torch is slow with constants


class _Round:
    """The round metric in a stereographic chart."""

    def __init__(self, layout: Layout, radius: float) -> None:
        self.layout, self.radius = layout, radius

    def __call__(self, x: Tensor) -> ops.LinearOperator:
        twice = _inner(x)
        twice = twice + twice
        scale = twice if self.radius == 1 else self.radius * twice
        return ops.Multiple(self.layout, scale.square(), definite=True)


class Sphere(_Embedded):
    r"""The sphere :math:`\{y ∈ R^{n+1} : |y| = R\}` by two stereographic charts, "north" and "south".

    The chart "north" has the north pole (0, ..., 0, R) in its middle, and all points but the south pole:
    :math:`y = R\,(2x,\, 1 - |x|^2) / (1 + |x|^2)`; "south" has the sign of the last coordinate turned. The transition is the
    inversion :math:`x ↦ x / |x|^2`, and ``sphere.metric`` the round metric :math:`4R^2/(1 + |x|^2)^2\,I`.

    >>> import torch, geoad
    >>> sphere = geoad.atlases.Sphere(2)
    >>> p = sphere.point(torch.tensor([0.6, 0.0, -0.8]))
    >>> p, sphere.embed(p)
    (Point('south', dim=2, float32, cpu), tensor([ 0.6000,  0.0000, -0.8000]))
    """

    def __init__(self, dim: int = 2, radius: float = 1.0) -> None:
        self.radius = float(radius)
        if not (math.isfinite(self.radius) and self.radius > 0):
            raise GeometryError(f"the radius of a sphere is a finite number > 0, found {radius}.")
        north, south = (Chart((_require_dim(dim, "a sphere"),), name) for name in ("north", "south"))
        super().__init__([north, south], {(north, south): maps.Inversion()}, name=f"S{dim}", margin=_inner)
        self.ambient = Chart((dim + 1,), name=f"R{dim + 1}")

    def _embedding(self, chart: Chart, x: Tensor) -> Tensor:
        square = (x * x).sum(-1, keepdim=True)
        height = 1 - square if chart.name == "north" else square - 1
        return self.radius * torch.cat([2 * x, height], -1) / (1 + square)

    @property
    def metric(self) -> MetricField:
        """4R² / (1 + |x|²)² I."""
        return self.metric_field({chart: _Round(chart.layout, self.radius) for chart in self.charts})

    def point(self, y: Any) -> Point:
        """The point of the sphere in the direction of y, in the chart whose pole is nearer.

        Raises:
            ChartDomainError: y = 0 has no direction.
        """
        arrow = torch.as_tensor(y)
        if arrow.shape != (self.dim + 1,):
            raise GeometryError(
                f"a point of {self.name} is given by {self.dim + 1} numbers, found a tensor of shape {tuple(arrow.shape)}. "
                "Pass its coordinates in the surrounding space; batches are made in a chart: sphere.chart('north').point(x)."
            )
        norm = arrow.norm()
        if not (norm > 0 and norm.isfinite()):
            raise ChartDomainError(f"the vector {arrow.tolist()} has no direction, so it is no point of {self.name}.")
        unit = arrow / norm
        chart = self.chart("north" if unit[-1] >= 0 else "south")
        return chart.point(unit[:-1] / (1 + unit[-1].abs()))


# -- angles ----------------------------------------------------------------------------------------------------------------


class _Arc:
    """Angles between `start` and start + 2π, one start for each."""

    def __init__(self, start: tuple[float, ...]) -> None:
        self.start = start

    def _offset(self, x: Tensor) -> Tensor:
        return x - x.new_tensor(self.start)

    def __call__(self, x: Tensor) -> Tensor:
        offset = self._offset(x)
        return (offset > 0) & (offset < 2 * math.pi)

    def margin(self, x: Tensor) -> Tensor:
        """The distance to the nearest cut."""
        offset = self._offset(x)
        return torch.minimum(offset, 2 * math.pi - offset).min()


class Torus(_Embedded):
    r"""The flat torus :math:`(R / 2πZ)^n` by :math:`2^n` charts of angles; ``Torus(1)`` is the circle.

    Each angle runs in (-π, π) or in (0, 2π); the name of a chart has a letter for each, "a" or "b". ``torus.metric`` is the
    flat metric Σ dφ_i², and ``torus.embed`` the product of unit circles in R^{2n}, which induces it.

    >>> import torch, geoad
    >>> circle = geoad.atlases.Torus(1)
    >>> circle.chart("a").point(torch.tensor([-1.0])).to(circle.chart("b")).components
    tensor([5.2832])
    """

    def __init__(self, dim: int = 2) -> None:
        names = ["".join(letters) for letters in itertools.product("ab", repeat=_require_dim(dim, "a torus", 6))]
        arcs = {name: _Arc(tuple(-math.pi if letter == "a" else 0.0 for letter in name)) for name in names}
        words = "each angle lies between its cuts, (-π, π) for a and (0, 2π) for b"
        charts = [Chart((dim,), name, domain={words: arcs[name]}) for name in names]
        pairs = itertools.combinations(charts, 2)
        transitions: dict[Any, Any] = {(a, b): maps.Wrap(arcs[a.name].start, arcs[b.name].start) for a, b in pairs}
        margins: dict[Any, Any] = {chart: arcs[chart.name].margin for chart in charts}
        super().__init__(charts, transitions, name=f"T{dim}", margin=margins)
        self.ambient = Chart((2 * dim,), name=f"R{2 * dim}")

    def _embedding(self, chart: Chart, x: Tensor) -> Tensor:
        return torch.stack([x.cos(), x.sin()], -1).flatten(-2)

    @property
    def metric(self) -> MetricField:
        """Σ dφ_i²."""
        return self.metric_field({chart: Euclidean(chart) for chart in self.charts})


class _Sector:
    """r > 0, and an angle in (cut - 2π, cut)."""

    def __init__(self, cut: float) -> None:
        self.arc = _Arc((cut - 2 * math.pi,))

    def __call__(self, x: Tensor) -> Tensor:
        return self.arc(x[1:])

    def margin(self, x: Tensor) -> Tensor:
        """The distance to the cut, as an angle."""
        return self.arc.margin(x[1:])


def _positive(x: Tensor) -> Tensor:
    return x[0] > 0


class PuncturedPlane(_Embedded):
    r"""The plane without the origin in polar coordinates (r, φ), by two charts with different cuts.

    "left" has its cut along the negative first axis, -π < φ < π, "right" along the positive one, 0 < φ < 2π.
    ``plane.metric`` is the Euclidean metric dr² + r² dφ².

    >>> import torch, geoad
    >>> plane = geoad.atlases.PuncturedPlane()
    >>> plane.chart("left").point(torch.tensor([2.0, -1.0])).to(plane.chart("right")).components
    tensor([2.0000, 5.2832])
    """

    def __init__(self) -> None:
        cuts = {"left": math.pi, "right": 2 * math.pi}
        sectors = {name: _Sector(cut) for name, cut in cuts.items()}
        ranges = {"left": "-π < φ < π", "right": "0 < φ < 2π"}
        charts = [Chart((2,), name, domain={"r > 0": _positive, ranges[name]: sectors[name]}) for name in cuts]
        left, right = (maps.PolarPlane(cut) for cut in cuts.values())
        transition = maps.Compose(maps.Inverse(left), right)
        margins: dict[Any, Any] = {chart: sectors[chart.name].margin for chart in charts}
        super().__init__(charts, {(charts[0], charts[1]): transition}, name="punctured plane", margin=margins)
        self.ambient = Chart((2,), name="xy")

    def _embedding(self, chart: Chart, x: Tensor) -> Tensor:
        return torch.stack([x[0] * x[1].cos(), x[0] * x[1].sin()])


# -- projective space ------------------------------------------------------------------------------------------------------


class _Affine(maps.Diffeomorphism):
    """From the chart in which homogeneous coordinate i is 1 to that in which j is."""

    def __init__(self, i: int, j: int) -> None:
        super().__init__()
        self.i, self.j = i, j

    def _other(self, x: Blocks, i: int, j: int) -> Blocks:
        (name,) = x
        lines = _homogeneous(x[name], i)
        scaled = lines / lines[..., j : j + 1]
        return {name: torch.cat([scaled[..., :j], scaled[..., j + 1 :]], -1)}

    def forward(self, x: Blocks) -> Blocks:
        return self._other(x, self.i, self.j)

    def invert(self, y: Blocks) -> Blocks:
        return self._other(y, self.j, self.i)

    def outside_domain(self, x: Blocks) -> str | None:
        return self._vanishes(x, self.i, self.j)

    def outside_image(self, y: Blocks) -> str | None:
        return self._vanishes(y, self.j, self.i)

    def _vanishes(self, x: Blocks, i: int, j: int) -> str | None:
        (name,) = x
        if bool((_homogeneous(x[name], i)[..., j] == 0).any()):
            return f"the homogeneous coordinate {j} must not be 0"
        return None


def _homogeneous(x: Tensor, i: int) -> Tensor:
    return torch.cat([x[..., :i], torch.ones_like(x[..., :1]), x[..., i:]], -1)


class ProjectiveSpace(Atlas):
    r"""The lines through the origin of :math:`R^{n+1}`, by n + 1 charts.

    Chart "i" has the lines with :math:`y_i ≠ 0`, by the ratios :math:`y_k / y_i`. ``space.metric`` is the round metric of the
    unit sphere, of which this is the quotient by y ↦ -y.

    >>> import torch, geoad
    >>> plane = geoad.atlases.ProjectiveSpace(2)
    >>> plane.point(torch.tensor([2.0, -4.0, 1.0])).to(plane.chart("0")).components
    tensor([-2.0000,  0.5000])
    """

    def __init__(self, dim: int = 2) -> None:
        charts = [Chart((dim,), str(i)) for i in range(_require_dim(dim, "a projective space") + 1)]
        pairs = itertools.combinations(range(dim + 1), 2)
        transitions: dict[Any, Any] = {(charts[i], charts[j]): _Affine(i, j) for i, j in pairs}
        super().__init__(charts, transitions, name=f"RP{dim}", margin=_inner)

    def point(self, y: Any) -> Point:
        """The line through y ≠ 0, in the chart of its largest coordinate."""
        line = torch.as_tensor(y)
        if line.shape != (self.dim + 1,) or not bool(line.isfinite().all()) or not bool((line != 0).any()):
            raise ChartDomainError(
                f"a point of {self.name} is a line through a vector of {self.dim + 1} finite numbers that are not all 0, found "
                f"{line.tolist()}."
            )
        i = int(line.abs().argmax())
        scaled = line / line[i]
        return self.chart(str(i)).point(torch.cat([scaled[:i], scaled[i + 1 :]]))

    @property
    def metric(self) -> MetricField:
        """The round metric ((1 + |x|²) I - x xᵀ) / (1 + |x|²)², the same in each chart."""
        return self.metric_field(dict.fromkeys(self.charts, _fubini_study))


def _fubini_study(x: Tensor) -> Tensor:
    inner = _inner(x)
    return torch.eye(len(x), dtype=x.dtype, device=x.device) * inner - torch.outer(x, x) * inner.square()
