"""Hypothesis strategies: charts, changes of coordinates, points, tensors, metric fields and small networks.

Everything is float64, seeded (the same example gives the same numbers on every machine), inside the domain of its chart and
well-conditioned: a failure means a wrong formula, not a lost digit.

>>> import geoad
>>> from hypothesis import given, settings, strategies as st
>>> @settings(max_examples=3, database=None)
... @given(st.data())
... def test_norm_is_invariant(data):
...     p = data.draw(geoad.testing.strategies.points(data.draw(geoad.testing.strategies.charts())))
...     psi = data.draw(geoad.testing.strategies.reparametrizations(p.chart, at=p)).target
...     v, G = data.draw(geoad.testing.strategies.vectors(p)), data.draw(geoad.testing.strategies.metrics(p))
...     assert abs(G.norm(v) - G.to(psi).norm(v.to(psi))) < 1e-10 * G.norm(v)
>>> test_norm_is_invariant()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from geoad import maps
from geoad import metrics as named
from geoad.charts import Chart, Point, Reparametrization
from geoad.errors import ChartDomainError, GeometryError
from geoad.fields import MetricField
from geoad.maps.select import Recipe, bind
from geoad.params import Blocks, Layout
from geoad.tensors import Cometric, Covector, Endomorphism, Form, Metric, Vector
from geoad.testing.bent import BentImmersion, BentSubmersion
from geoad.testing.networks import NETWORKS, SmallNetwork, build
from geoad.testing.recipes import RECIPES, applicable, condition, generic_blocks, inside

try:
    from hypothesis import assume
    from hypothesis import strategies as st
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "geoad.testing.strategies draws examples with hypothesis, which is not installed. The assertions of "
        "geoad.testing work without it; for the strategies install the extra: pip install geoad[test]."
    ) from error

__all__ = [
    "charts",
    "cometrics",
    "condition",
    "covectors",
    "endomorphisms",
    "forms",
    "immersions",
    "metric_fields",
    "metrics",
    "points",
    "points_above",
    "recipes",
    "reparametrizations",
    "seeds",
    "small_networks",
    "submersions",
    "vectors",
]

_SHAPES: list[tuple[int, ...]] = [(2,), (), (1,), (3,), (2, 2), (1, 3), (3, 1), (2, 1, 2)]
_TRIES = 40


def seeds() -> st.SearchStrategy[int]:
    """Seeds of a ``torch.Generator``; they shrink to 0."""
    return st.integers(0, 2**20)


@st.composite
def charts(draw: st.DrawFn, *, max_blocks: int = 3, max_dim: int = 12) -> Chart:
    """Reference charts of free manifolds: one or several blocks, with 0-dimensional blocks and blocks of length 1."""
    shapes = draw(st.lists(st.sampled_from(_SHAPES), min_size=1, max_size=max_blocks))
    kept: dict[str, tuple[int, ...]] = {}
    dim = 0
    for name, shape in zip("xyzuvw"[: len(shapes)], shapes, strict=False):
        if not kept or dim + math.prod(shape) <= max_dim:
            kept[name] = shape
            dim += math.prod(shape)
    return Chart(kept, "free", plain=draw(st.booleans()) if len(kept) == 1 else None)


def _layout(where: Chart | Layout) -> Layout:
    return where.layout if isinstance(where, Chart) else where


@st.composite
def recipes(draw: st.DrawFn, where: Chart | Layout, *, max_maps: int = 3) -> Recipe:
    """Recipes for `where`: one map of `geoad.maps`, a composition of up to `max_maps`, an inverse, or a map for each pattern.

    They need not be defined everywhere; `reparametrizations` draws only what is defined at a given point.
    """
    return draw(_plans(_layout(where), max_maps))(draw(seeds()))


_Plan = Callable[[int], Recipe]
"""A recipe as a function of the seed that its numbers are drawn with."""


@st.composite
def _plans(draw: st.DrawFn, layout: Layout, max_maps: int) -> _Plan:
    known = applicable(layout)
    kind = draw(st.sampled_from(["one", "composition", "patterns", "inverse"]))
    if kind == "patterns":
        chosen = draw(st.lists(st.sampled_from(layout.names), min_size=1, max_size=len(layout), unique=True))
        each = {name: draw(st.sampled_from(applicable(layout.restrict([name])))) for name in chosen}
        return lambda seed: {name: _single(RECIPES[key](_draws(seed))) for name, key in each.items()}
    if kind == "composition" and max_maps > 1:
        keys = draw(st.lists(st.sampled_from(known), min_size=2, max_size=max_maps))
        return lambda seed: maps.Compose(*(RECIPES[key](_draws(seed + i)) for i, key in enumerate(keys)))
    key = draw(st.sampled_from(known))
    if kind == "inverse":
        return lambda seed: maps.Inverse(RECIPES[key](_draws(seed)))
    return lambda seed: RECIPES[key](_draws(seed))


def _draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _single(recipe: Recipe) -> maps.Map:
    return recipe if isinstance(recipe, maps.Map) else maps.Compose(recipe)


@st.composite
def reparametrizations(
    draw: st.DrawFn, chart: Chart, *, at: Point | None = None, max_maps: int = 3, max_condition: float = 1e3
) -> Reparametrization:
    """Changes of coordinates from `chart`, of every kind that `recipes` draws.

    `chart` is the source, a reference chart or any other. `at` is a point that has coordinates in the new chart, with
    cond J ≤ `max_condition` there; by default a generic point, to be replaced by those of `points` of the new chart.
    Compositions are of up to `max_maps` maps.
    """
    plan = draw(_plans(chart.layout, max_maps))
    seed = draw(seeds())
    for shift in range(_TRIES):
        x = at.to(chart).blocks if at is not None else _generic(chart, seed + shift)
        recipe = plan(seed + shift)
        if x is not None and inside(bind(recipe, chart.layout), x, max_condition):
            return chart.reparametrize(plan(seed + shift), "psi" if chart.parent is None else f"{chart.name}'")
    assume(False)
    raise AssertionError("unreachable")  # pragma: no cover


def _generic(chart: Chart, seed: int, batch: Sequence[int] = ()) -> Blocks | None:
    """Generic coordinates of the reference chart seen in `chart`, or None if they are outside its domain."""
    home = chart.reference
    try:
        return home.point(generic_blocks(home.layout, seed, batch)).to(chart).blocks
    except ChartDomainError:
        return None


@st.composite
def points(draw: st.DrawFn, chart: Chart, *, batch_shape: Sequence[int] = (), max_condition: float = 1e3) -> Point:
    """Points with coordinates in `chart`: generic points of its reference chart (0.1 < |θ_i| < 0.9), seen in `chart`.

    With `batch_shape` a batch of points; the condition number is then not checked.
    """
    seed = draw(seeds())
    for shift in range(_TRIES):
        home = chart.reference
        p = home.point(generic_blocks(home.layout, seed + shift, batch_shape))
        try:
            moved = p.to(chart)
        except ChartDomainError:
            continue
        if chart.parent is None or batch_shape or condition(chart, p) <= max_condition:
            return moved
    assume(False)
    raise AssertionError("unreachable")  # pragma: no cover


_EVERYWHERE = ("affine", "asinh", "sinh", "householder", "coupling")
"""Changes of coordinates that are defined everywhere, with values everywhere."""


@st.composite
def _around(draw: st.DrawFn, layout: Layout, make: Callable[[int], Recipe]) -> Recipe:
    """A recipe alone, or behind or before a change of coordinates."""
    seed = draw(seeds())
    recipe = make(seed)
    where = draw(st.sampled_from(["alone", "below", "above"]))
    if where == "alone":
        return recipe
    image = layout if where == "below" else Layout(bind(make(seed), layout).image_shapes)
    key = draw(st.sampled_from([name for name in applicable(image) if name in _EVERYWHERE]))
    other = RECIPES[key](_draws(seed + 1))
    return maps.Compose(other, recipe) if where == "below" else maps.Compose(recipe, other)


@st.composite
def submersions(draw: st.DrawFn, chart: Chart) -> Reparametrization:
    """Redundant coordinates for `chart`: `maps.Submersion` of random functions, `WeightNorm`, `Factorization` of full rank.

    Alone, or behind or before a change of coordinates. Points of them are drawn by `points_above`.
    """
    layout = chart.layout
    matrices = [name for name, shape in layout.items() if len(shape) >= 2]
    rows = [name for name, shape in layout.items() if len(shape) >= 1]
    kind = draw(st.sampled_from(["bent", *["weight norm"] * bool(rows), *["factors"] * bool(matrices)]))
    extra = draw(st.integers(1, 3))

    def make(seed: int) -> Recipe:
        if kind == "bent":
            return BentSubmersion(extra, generator=_draws(seed))
        if kind == "weight norm":
            return dict.fromkeys(rows, maps.WeightNorm(None if extra == 3 else 0))
        ranks = {name: min(layout[name][0], layout[name][1:].numel()) + extra - 1 for name in matrices}
        return {name: maps.Factorization(rank) for name, rank in ranks.items()}

    return chart.reparametrize(draw(_around(layout, make)), "redundant")


@st.composite
def immersions(draw: st.DrawFn, chart: Chart) -> Reparametrization:
    """Fewer coordinates than `chart`: `maps.Immersion` of random functions, `Subspace`, `Frozen` and `Tied` blocks.

    Alone, or behind or before a change of coordinates. Points of them are drawn by `points_above`.
    """
    layout = chart.layout
    frozen = layout.names[: len(layout) - 1]
    tied = len(set(layout.values())) < len(layout)
    kind = draw(st.sampled_from(["bent", "subspace", *["frozen"] * bool(frozen), *["tied"] * tied]))
    dim = draw(st.integers(1, layout.dim))

    def make(seed: int) -> Recipe:
        if kind == "bent":
            return BentImmersion(dim, generator=_draws(seed))
        if kind == "subspace":
            offset = generic_blocks(layout, seed)
            return maps.Subspace(dim, offset, orthonormal=bool(seed % 2), generator=_draws(seed))
        return maps.Tied() if kind == "tied" else dict.fromkeys(frozen, maps.Frozen(generic_blocks(layout, seed)))

    return chart.reparametrize(draw(_around(layout, make)), "submanifold")


@st.composite
def points_above(draw: st.DrawFn, phi: Reparametrization, *, max_condition: float = 1e3) -> Point:
    """Points of the target of a submersion or immersion, generic there, where its Jacobian has a bounded condition number."""
    seed, layout = draw(seeds()), phi.target.layout
    for shift in range(_TRIES):
        y = generic_blocks(layout, seed + shift)
        if phi.map.outside_image(y) is not None:
            continue
        jacobian: Any = torch.func.jacrev(lambda flat: phi.source.layout.ravel(phi.map.invert(layout.unravel(flat))))(
            layout.ravel(y)
        )
        if float(torch.linalg.cond(jacobian)) <= max_condition:
            return phi.target.point(y)
    assume(False)
    raise AssertionError("unreachable")  # pragma: no cover


def _normal(p: Point, seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=_draws(seed), dtype=torch.float64).to(p.device, p.dtype)


def vectors(p: Point) -> st.SearchStrategy[Vector]:
    """Vectors at p, in its chart."""
    return st.builds(lambda seed: p.chart.vector(p.chart.layout.unravel(_normal(p, seed, p.chart.dim)), at=p), seeds())


def covectors(p: Point) -> st.SearchStrategy[Covector]:
    """Covectors at p, in its chart."""
    return st.builds(lambda seed: p.chart.covector(p.chart.layout.unravel(_normal(p, seed, p.chart.dim)), at=p), seeds())


def _positive(p: Point, seed: int) -> Tensor:
    """A symmetric matrix with eigenvalues between 1 and about 5."""
    d = p.chart.dim
    half = _normal(p, seed, d, d) / math.sqrt(d)
    return half @ half.mT + torch.eye(d, dtype=p.dtype, device=p.device)


@st.composite
def forms(draw: st.DrawFn, p: Point, *, symmetric: bool | None = None) -> Form:
    """Bilinear forms at p, in its chart; symmetric or not (None: either). Symmetric ones are indefinite."""
    seed = draw(seeds())
    matrix = _normal(p, seed, p.chart.dim, p.chart.dim)
    if symmetric if symmetric is not None else draw(st.booleans()):
        matrix = matrix + matrix.mT
    return p.chart.form(matrix, at=p)


def metrics(p: Point) -> st.SearchStrategy[Metric]:
    """Positive definite metrics at p, in its chart: dense or diagonal, with eigenvalues of order 1."""

    def make(seed: int, diagonal: bool) -> Metric:
        matrix = _positive(p, seed)
        return p.chart.metric(torch.diag(matrix.diagonal()) if diagonal else matrix, at=p)

    return st.builds(make, seeds(), st.booleans())


def cometrics(p: Point) -> st.SearchStrategy[Cometric]:
    """Positive definite (2,0) tensors at p, in its chart."""
    return st.builds(lambda seed: p.chart.cometric(_positive(p, seed), at=p), seeds())


def endomorphisms(p: Point) -> st.SearchStrategy[Endomorphism]:
    """Linear maps of the tangent space at p, in its chart, of positive determinant as a rule."""

    def make(seed: int) -> Endomorphism:
        d = p.chart.dim
        return p.chart.endomorphism(0.4 * _normal(p, seed, d, d) / math.sqrt(d) + torch.eye(d, dtype=p.dtype), at=p)

    return st.builds(make, seeds())


@st.composite
def metric_fields(draw: st.DrawFn, chart: Chart) -> MetricField:
    """Metric fields whose numbers are given in `chart`, positive definite with eigenvalues of order 1.

    Euclidean, constant, diagonal, a function of the point, conformal, or a sum.
    """
    seed, d = draw(seeds()), chart.dim
    kind = draw(st.sampled_from(["euclidean", "constant", "diagonal", "function", "conformal", "sum"]))
    half = torch.randn(d, d, generator=_draws(seed), dtype=torch.float64) / math.sqrt(d)
    euclidean = named.Euclidean(chart)

    def function(components: Any) -> Tensor:
        x = chart.layout.ravel(chart.pack(components))
        bent = torch.outer(torch.sin(x), torch.sin(x)) + torch.diag(0.5 * torch.cos(x))
        return bent + torch.eye(d, dtype=x.dtype, device=x.device) + (half @ half.mT).to(x)

    if kind == "function":
        return chart.metric_field(function)
    if kind == "conformal":
        bump = chart.scalar_field(lambda x: torch.exp(0.3 * torch.sin(chart.layout.ravel(chart.pack(x))).sum()))
        return _as_metric(bump * euclidean)
    if kind == "constant":
        return named.Constant(chart, half @ half.mT + torch.eye(d, dtype=torch.float64))
    if kind == "diagonal":
        return named.Diagonal(chart, chart.layout.unravel(1 + half[0].abs()))
    return _as_metric(0.5 * euclidean + chart.metric_field(function)) if kind == "sum" else euclidean


def _as_metric(field: Any) -> MetricField:
    if not isinstance(field, MetricField):
        raise GeometryError(f"expected a metric field, found {type(field).__name__}; build it from metric fields.")
    return field


def small_networks(names: Sequence[str] = NETWORKS) -> st.SearchStrategy[SmallNetwork]:
    """Small networks with data: MLP, convolution, tied weights, layer norm, a frozen parameter, bare parameters, buffers.

    Each example is built anew, so that a test may train it.

    Args:
        names: which of `geoad.testing.networks.NETWORKS`.
    """
    return st.builds(build, st.sampled_from(list(names)), seeds())
