"""assert_invariant and assert_equivariant: the same point, looked at in several charts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch

from geoad.charts import Chart, Point, Reparametrization, same_manifold
from geoad.errors import ChartMismatchError, GeometryError, NotADiffeomorphismError
from geoad.maps.base import Map
from geoad.module import GeoModule
from geoad.tensors import TypedTensor, describe
from geoad.testing.compare import difference, leaves, show
from geoad.testing.recipes import generic_blocks, standard_charts

__all__ = ["assert_equivariant", "assert_invariant"]

Charts = Mapping[str, Any] | Iterable[Any] | None


def assert_invariant(
    fn: Callable[[Any], Any],
    geo: GeoModule | Point | Chart,
    *,
    charts: Charts = None,
    rtol: float = 1e-8,
    atol: float = 1e-12,
    seed: int = 0,
) -> None:
    r"""Assert that `fn` returns the same numbers whatever chart its argument is in.

    What `fn` is called with is what you pass as `geo`:

    * a `GeoModule`: a deep copy of the module, moved to the chart. `fn` may train it; use ``g.point()`` for the point. Fields
      that were made with the original module may be used, they do not depend on its state but on the point. A function
      of a point, which cannot take a module, is called with the module's point in the chart instead;
    * a `Point`: the same point in the chart, ``p.to(chart)``;
    * a `Chart`: as with a point, at a generic point of its manifold.

    Every call starts with the same state of torch's random number generator. All charts are looked at before an error is
    raised, for *which* of them disagree tells much about the cause.

    Args:
        fn: returns numbers, tensors, or dicts, lists, tuples and dataclasses of them.
        geo: a module, a point or a chart.
        charts: where to look: charts, reparametrizations or recipes of `geoad.maps` (applied to the reference chart), in a
            mapping from names or in a list. Default: `geoad.testing.standard_charts`.
        rtol: largest allowed difference relative to the largest number in a tensor. For float32 pass 1e-3, or test a
            ``.double()`` network.
        atol: absolute difference that is always allowed.
        seed: of the standard charts and of the random state.

    Raises:
        AssertionError: the numbers differ; the message names the charts, both values, and likely causes.
        GeometryError: `fn` returned typed tensors: whether those agree is the question of `assert_equivariant`.

    >>> import torch, geoad
    >>> x = geoad.Chart({"x": (2,)}, name="x")
    >>> p, h = x.point(torch.tensor([1.0, 2.0]).double()), x.scalar_field(lambda x: (x ** 4).sum())
    >>> geoad.testing.assert_invariant(lambda p: geoad.riemannian_grad(h)(p).carry(to=p, chart=x)(geoad.grad(h)(p)), p)
    >>> geoad.testing.assert_invariant(lambda p: geoad.grad(h)(p).components.norm(), p)
    Traceback (most recent call last):
    AssertionError: the result depends on the chart...
    """

    def plain(result: Any) -> dict[str, Any]:
        found = dict(leaves(result))
        for where, leaf in found.items():
            if _is_typed(leaf):
                raise GeometryError(
                    f"assert_invariant compares numbers, but the function returned {describe(leaf)}{_at(where)}. Its "
                    "components differ between charts by the law of its type, as they should. Use "
                    "geoad.testing.assert_equivariant, or return an invariant of it: a pairing, a norm with respect "
                    "to a metric, the trace of an endomorphism."
                )
        return found

    _compare(fn, geo, charts, rtol, atol, seed, plain, "the result depends on the chart")


def assert_equivariant(
    fn: Callable[[Any], Any],
    geo: GeoModule | Point | Chart,
    *,
    charts: Charts = None,
    rtol: float = 1e-8,
    atol: float = 1e-12,
    seed: int = 0,
) -> None:
    """Assert that what `fn` returns in a chart, moved to the reference chart, is what it returns in the reference chart.

    As `assert_invariant`, but for typed results: points, vectors, forms, densities, Christoffel symbols; anything with
    ``.to(chart)``. Plain numbers among them are compared as they are, so they must be invariant. A `GeoModule`
    among the results stands for its point: ``def step(g): ...; return g`` tests an optimizer.

    Raises:
        AssertionError: the moved results differ; the message names the charts, both values, and likely causes.

    >>> import torch, geoad
    >>> x = geoad.Chart({"x": (2,)}, name="x")
    >>> p, h = x.point(torch.tensor([1.0, 2.0]).double()), x.scalar_field(lambda x: (x ** 4).sum())
    >>> geoad.testing.assert_equivariant(geoad.grad(h), p)
    >>> def raw_step(p):                        # gradient descent on the numbers of whatever chart p is in
    ...     return p.chart.point(p.components - 0.01 * geoad.grad(h)(p).components)
    >>> geoad.testing.assert_equivariant(raw_step, p)
    Traceback (most recent call last):
    AssertionError: the result is not the same object in every chart...
    """
    _compare(fn, geo, charts, rtol, atol, seed, _at_reference, "the result is not the same object in every chart")


def _is_typed(leaf: Any) -> bool:
    """True for points, typed tensors and Christoffel symbols; fields have a chart, but live at no point."""
    return isinstance(leaf, (Point, TypedTensor)) or (hasattr(leaf, "chart") and hasattr(leaf, "at"))


def _at_reference(result: Any) -> dict[str, Any]:
    """The plain numbers of a result after moving it to the reference chart."""
    moved: dict[str, Any] = {}
    for where, leaf in leaves(result):
        if isinstance(leaf, GeoModule):
            leaf = leaf.point()
        if _is_typed(leaf):
            thing = cast(Any, leaf)
            home = thing.to(thing.chart.reference)
            numbers = home.ravel() if isinstance(leaf, Point) else home.to_dense()
            moved[f"{where} (its class)"] = type(leaf).__name__
            moved[where] = numbers
            if not isinstance(leaf, Point):
                moved[f"{where}.at"] = home.at.ravel()
        else:
            moved[where] = leaf
    return moved


# -- the comparison --------------------------------------------------------------------------------------------------------


def _compare(
    fn: Callable[[Any], Any],
    geo: GeoModule | Point | Chart,
    charts: Charts,
    rtol: float,
    atol: float,
    seed: int,
    normalise: Callable[[Any], dict[str, Any]],
    headline: str,
) -> None:
    start, views = _views(geo, charts, seed)
    for name, chart in views.items():
        _require_inverse(start.point, chart, name)
    expected = _first_evaluation(fn, start, seed, normalise)
    wrong: dict[str, str] = {}
    for name, chart in views.items():
        found = _evaluate(fn, start, chart, f"chart '{name}'", seed, normalise)
        problem = _first_problem(expected, found, name, rtol, atol)
        if problem is not None:
            wrong[name] = problem
    if wrong:
        agree = [name for name in views if name not in wrong]
        raise AssertionError(_message(headline, wrong, agree, views, start.is_double, rtol))


class _Start:
    """What the function is applied to, for any chart."""

    def __init__(self, geo: GeoModule | Point | Chart, seed: int) -> None:
        self.module = geo if isinstance(geo, GeoModule) else None
        if isinstance(geo, Chart):
            home = geo.reference
            geo = home.point(generic_blocks(home.layout, seed))
        if not isinstance(geo, (GeoModule, Point)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise GeometryError(
                f"the second argument is a GeoModule, a Point or a Chart, found {type(geo).__name__}. A plain network "
                "has one chart only; wrap it: geoad.GeoModule(net)."
            )
        self.point = geo.point() if isinstance(geo, GeoModule) else geo
        self.reference = self.point.chart.reference
        self.is_double = self.point.dtype == torch.float64

    def at(self, chart: Chart) -> GeoModule | Point:
        """The module (a copy) or the point, in `chart`."""
        if self.module is None:
            return self.point.to(chart)
        return copy.deepcopy(self.module).to(chart)


def _first_evaluation(
    fn: Callable[[Any], Any], start: _Start, seed: int, normalise: Callable[[Any], dict[str, Any]]
) -> dict[str, Any]:
    """The numbers in the reference chart. What is given a module but can only take a point is found out here."""
    where = "the reference chart"
    try:
        return _evaluate(fn, start, start.reference, where, seed, normalise)
    except (AttributeError, TypeError, ChartMismatchError) as error:
        if start.module is None:
            raise
        module, start.module = start.module, None
        try:
            return _evaluate(fn, start, start.reference, where, seed, normalise)
        except AttributeError:  # it is no function of a point either: what it asked of the module was wrong
            start.module = module
            raise error from None


def _evaluate(
    fn: Callable[[Any], Any],
    start: _Start,
    chart: Chart,
    where: str,
    seed: int,
    normalise: Callable[[Any], dict[str, Any]],
) -> dict[str, Any]:
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
            torch.manual_seed(seed)
            return normalise(fn(start.at(chart)))
    except Exception as error:
        error.add_note(f"(raised while geoad.testing evaluated the function in {where})")
        raise


def _views(geo: GeoModule | Point | Chart, charts: Charts, seed: int) -> tuple[_Start, dict[str, Chart]]:
    start = _Start(geo, seed)
    if charts is None:
        return start, standard_charts(start.reference, seed=seed)
    if isinstance(charts, (Chart, Reparametrization, Map)):
        charts = [charts]
    named = cast("Mapping[str, Any]", charts) if isinstance(charts, Mapping) else None
    given: Iterable[tuple[str, Any]] = (("", each) for each in charts) if named is None else named.items()
    views: dict[str, Chart] = {}
    for name, each in given:
        chart = _as_chart(each, start.reference, name)
        key = name or chart.name
        views[key if key not in views else f"{key} ({len(views)})"] = chart
    if not views:
        raise GeometryError(
            "charts= is empty, so nothing would be compared and the assertion would always hold. Pass charts or "
            "recipes, or leave it out for the standard set."
        )
    return start, views


def _require_inverse(point: Point, chart: Chart, name: str) -> None:
    """Raise if the maps to `chart` and back do not undo one another: every comparison would be meaningless."""
    there = point.to(chart)
    back = chart.point(there.blocks).to(point.chart).ravel()
    start = point.ravel()
    error = float((back - start).abs().max()) / max(1.0, float(start.abs().max()))
    if not error <= 1e3 * torch.finfo(start.dtype).eps ** 0.75:
        raise NotADiffeomorphismError(
            f"the map to chart '{name}' and its inverse do not undo one another: there and back again moves the point "
            f"by {error:.2g} of "
            "its size. Everything computed in that chart belongs to another point. Mend the inverse of the map; "
            "geoad.testing.DiffeomorphismConformance tests all its parts."
        )


def _as_chart(given: Any, reference: Chart, name: str) -> Chart:
    if isinstance(given, Reparametrization):
        given = given.target
    if isinstance(given, (Map, Mapping)):
        return reference.reparametrize(cast(Any, given), name or type(given).__name__).target
    if isinstance(given, Chart) and same_manifold(given, reference):
        return given
    found = f"chart '{given.name}' of another manifold" if isinstance(given, Chart) else type(given).__name__
    raise GeometryError(
        f"charts= holds {found}; wanted are charts or reparametrizations of the manifold of '{reference.name}', or "
        "maps of geoad.maps (which are applied to its reference chart). The same point has to be seen in each."
    )


def _first_problem(expected: dict[str, Any], found: dict[str, Any], name: str, rtol: float, atol: float) -> str | None:
    if expected.keys() != found.keys():
        places = sorted(expected.keys() ^ found.keys())
        return f"the results are built differently: {places} are not in both"
    for where, value in expected.items():
        problem = difference(value, found[where], rtol, atol)
        if problem is not None:
            return f"{problem}{_at(where)}\n    reference chart: {show(value)}\n    chart '{name}': {show(found[where])}"
    return None


def _at(where: str) -> str:
    return f", at result{where}" if where else ""


# -- what may be the reason ------------------------------------------------------------------------------------------------

_OWN_METRIC = (
    "It survives orthogonal changes of coordinates but not a scaling: a norm, a trace, an identity matrix (damping "
    "λI, an isotropic prior, weight decay) or a plain gradient step of the chart's own coordinates is in it. Use a "
    "metric field: G.norm(v), G.trace(B), G.solve(w, damping=...), geoad.riemannian_grad, geoad.optim.Invariant."
)
_CURVED = (
    "It survives affine changes of coordinates but not curved ones: a plain second derivative (∂²L without the "
    "connection term) or a straight line of the chart's own coordinates is in it. Use geoad.hessian(L, metric), "
    "p.retract(v), geoad.interpolate."
)
_MIXED = (
    "It survives scalings but not maps that mix coordinates: something that is diagonal, block by block or entry by "
    "entry in the chart's own coordinates is in it (a diagonal Fisher built in ψ, Adam's moments, clipping by value, "
    "a sum of |entries|). Say where the structure is imposed (chart=geo.reference)."
)
_ANY = (
    "Likely: .components or .grad used as if they were numbers with a meaning; an autograd Hessian, a norm, a trace "
    "or an identity matrix of the chart's own coordinates; a torch.optim optimizer on geo.parameters(); random "
    "probes drawn in the chart; state that the function keeps from one call to the next."
)
_AFFINE = ("orthogonal", "scale", "layers", "affine")


def _hint(wrong: Iterable[str], agree: Iterable[str]) -> str:
    wrong, agree = set(wrong), set(agree)
    if {"scale", "layers"} & wrong and "orthogonal" in agree:
        return _OWN_METRIC
    if wrong and not wrong & set(_AFFINE) and set(_AFFINE) <= agree:
        return _CURVED
    if {"scale", "layers"} <= agree and {"orthogonal", "affine"} & wrong:
        return _MIXED
    return _ANY


def _message(
    headline: str, wrong: dict[str, str], agree: list[str], views: dict[str, Chart], is_double: bool, rtol: float
) -> str:
    lines = [f"{headline}: it disagrees with the reference chart in {len(wrong)} of {len(views)} charts."]
    lines += [f"  chart '{name}': {problem}" for name, problem in wrong.items()]
    lines.append(f"The charts that agree: {agree or 'none'}.")
    lines.append(_hint(wrong, agree))
    if not is_double and rtol < 1e-5:
        lines.append(
            f"The numbers are not float64: rounding alone exceeds rtol={rtol:g}. Test a .double() network, or pass rtol=1e-3."
        )
    return "\n".join(lines)
