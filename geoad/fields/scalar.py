"""Functions on a manifold."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from functools import singledispatch
from typing import Any, Protocol

import torch
from torch import Tensor

from geoad import transport
from geoad.charts import (
    Chart,
    Components,
    Point,
    Reparametrization,
    makers,
    meeting,
    over_batch,
    path,
    same_manifold,
    section_between,
    why_apart,
)
from geoad.errors import ChartMismatchError, VarianceError
from geoad.fields.transition import Transition
from geoad.kernels import derivatives, products
from geoad.kernels.derivatives import Part
from geoad.kernels.ladder import visit
from geoad.params import Blocks
from geoad.tensors.base import is_scalar

__all__ = ["ScalarField", "Source", "apart", "require_point", "spoilt"]


class Source(Protocol):
    """Where the values of a scalar field come from: an iterable of parts that can be gone through again and again."""

    def parts(self) -> Iterable[Part]:
        """(coefficient, function of the blocks of the home chart) for each part; the field is their sum."""
        ...


class FunctionSource:
    """A function of the components in a chart."""

    def __init__(self, chart: Chart, fn: Callable[[Any], Tensor]) -> None:
        self.chart, self.fn = chart, fn

    def _evaluate(self, x: Blocks) -> Tensor:
        visit(self)
        return self.fn(self.chart.unpack(x))

    def parts(self) -> Iterable[Part]:
        """The one part."""
        return [(1.0, self._evaluate)]


class _Moved:
    def __init__(self, source: Source, transition: Transition) -> None:
        self.source, self.transition = source, transition

    def parts(self) -> Iterable[Part]:
        for coefficient, fn in self.source.parts():
            if isinstance(fn, derivatives.Shared):
                yield coefficient, fn.after(self.transition)
            else:
                yield coefficient, lambda x, fn=fn: fn(self.transition(x))


class _Linear:
    """Σ c_i · source_i."""

    def __init__(self, terms: list[tuple[float, Source]]) -> None:
        self.terms = terms

    def parts(self) -> Iterable[Part]:
        for factor, source in self.terms:
            for coefficient, fn in source.parts():
                yield factor * coefficient, fn


class _Combined:
    """op(f, g, ...) for a smooth op on scalars; not a sum of parts, so it is one part."""

    def __init__(self, op: Callable[..., Tensor], sources: list[Source]) -> None:
        self.op, self.sources = op, sources

    def _evaluate(self, x: Blocks) -> Tensor:
        return self.op(*(derivatives.value(source.parts(), x) for source in self.sources))

    def parts(self) -> Iterable[Part]:
        return [(1.0, self._evaluate)]


@singledispatch
def spoilt(source: Any, x: Blocks) -> str:
    """Why second derivatives of a source at `x` are not finite, where that is a fault of data or parameters; else empty.

    A function of one's own may well be infinite somewhere; only a loss over data knows what is wrong with it.
    """
    return ""


@spoilt.register
def _(source: _Moved, x: Blocks) -> str:
    return spoilt(source.source, source.transition(x))


@spoilt.register
def _(source: _Linear, x: Blocks) -> str:
    return next(filter(None, (spoilt(each, x) for _, each in source.terms)), "")


@spoilt.register
def _(source: _Combined, x: Blocks) -> str:
    return next(filter(None, (spoilt(each, x) for each in source.sources)), "")


class ScalarField:
    """A function on the manifold: a loss, a prior, a penalty. ``field(p)`` is its value, a plain scalar, in any chart of p.

    Fields add, scale and multiply: ``L + 0.5 * lam * R``. Make one with ``geo.loss(...)``, ``geo.scalar_field(fn)`` or
    ``chart.scalar_field(fn)``; its differential is ``geoad.grad(field)``.

    >>> import torch, geoad
    >>> xy = geoad.Chart({"x": (2,)}, name="xy")
    >>> r2 = xy.scalar_field(lambda x: (x ** 2).sum())
    >>> (r2 + 1.0)(xy.point(torch.tensor([1.0, 2.0])))
    tensor(6.)
    """

    type = (0, 0)
    by_chart: bool = False
    """The field is given chart by chart on an atlas: only `local` says where its numbers are computed."""

    def __init__(self, home: Chart, source: Source, *, chart: Chart | None = None) -> None:
        self.home = home
        self.source = source
        self.chart = chart or home

    def __repr__(self) -> str:
        return f"ScalarField('{self.home.name}', dim={self.home.dim})"

    def parts(self) -> Iterable[Part]:
        """The parts, as functions of the blocks of ``home``."""
        return self.source.parts()

    def local(self, p: Point) -> ScalarField:
        """The field as it is computed at p, with one ``home``: itself, unless it is given chart by chart on an atlas."""
        return self

    def __call__(self, p: Point) -> Tensor:
        """The value at p; for a batch of points one value each."""
        field = self.local(require_point(p, self.home, "a scalar field"))
        here = p.to(field.home)
        if section_between(p.chart, field.home) is not None:
            field._require_basic(here, p.chart)

        def at(x: Blocks) -> Tensor:
            return derivatives.value(field.parts(), x)

        return products.batched(at, len(here.batch_shape))(here.blocks)

    def _require_basic(self, here: Point, chart: Chart) -> None:
        """A function of redundant coordinates is one of `chart` only if it is constant along the fibres."""
        for phi, along in path(here.chart, chart):
            if not along and phi.map.law in ("immersion", "smooth"):
                raise transport.refusal("a function", phi, along)

        def slope(x: Blocks) -> Blocks:
            return derivatives.gradient(self.parts(), x)

        transport.covector(over_batch(slope, len(here.batch_shape), here.blocks), here, chart, checked=True)

    def to(self, chart: Chart | Reparametrization) -> ScalarField:
        """The same function, presented in another chart of the manifold: h becomes h∘φ⁻¹."""
        if isinstance(chart, Reparametrization):
            return chart(self)
        Transition(self.home, chart)  # raises for another manifold
        return ScalarField(self.home, self.source, chart=chart)

    def function(self, chart: Chart | None = None) -> Callable[[Components], Tensor]:
        """The plain function of the components in `chart` (default: the chart of the field)."""
        chart = chart or self.chart
        moved = self.in_home(chart)
        return lambda components: derivatives.value(moved.parts(), chart.pack(components))

    def in_home(self, chart: Chart) -> ScalarField:
        """The same function with its parts written in `chart`."""
        if chart == self.home:
            return self
        section = section_between(chart, self.home)
        if section is not None:
            raise transport.refusal(f"a function given in '{self.home.name}'", section, along=False)
        return ScalarField(chart, _Moved(self.source, Transition(chart, self.home)), chart=self.chart)

    # -- algebra -----------------------------------------------------------------------------------------------------

    def _with(self, other: ScalarField) -> tuple[Chart, Source, Source]:
        if self.home == other.home:
            return self.home, self.source, other.source
        home = meeting([self.home, other.home])
        return home, self.in_home(home).source, other.in_home(home).source

    def __add__(self, other: Any) -> ScalarField:
        return self._sum(other, 1.0)

    __radd__ = __add__

    def __sub__(self, other: Any) -> ScalarField:
        return self._sum(other, -1.0)

    def __rsub__(self, other: Any) -> ScalarField:
        return -self + other

    def _sum(self, other: Any, sign: float) -> ScalarField:
        if is_scalar(other):
            other = ScalarField(self.home, _Constant(other))
        if not isinstance(other, ScalarField):
            raise VarianceError(_not_scalar("add", other))
        if apart(self, other):
            return makers["gathered_scalar"](operator.add if sign > 0 else operator.sub, self, other)
        home, a, b = self._with(other)
        return ScalarField(home, _Linear([(1.0, a), (sign, b)]))

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, (int, float)):
            return ScalarField(self.home, _Linear([(float(other), self.source)]), chart=self.chart)
        if isinstance(other, Tensor) and other.ndim == 0:
            other = ScalarField(self.home, _Constant(other))
        if not isinstance(other, ScalarField):
            scaled_by = getattr(other, "scaled_by", None)
            if scaled_by is not None:
                return scaled_by(self)
            raise VarianceError(_not_scalar("multiply", other))
        if apart(self, other):
            return makers["gathered_scalar"](operator.mul, self, other)
        home, a, b = self._with(other)
        return ScalarField(home, _Combined(torch.mul, [a, b]))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> ScalarField:
        if is_scalar(other):
            return self * (1 / other)
        if not isinstance(other, ScalarField):
            raise VarianceError(_not_scalar("divide", other))
        if apart(self, other):
            return makers["gathered_scalar"](operator.truediv, self, other)
        home, a, b = self._with(other)
        return ScalarField(home, _Combined(torch.div, [a, b]))

    def __rtruediv__(self, other: Any) -> ScalarField:
        return self.map(torch.reciprocal) * other

    def __neg__(self) -> ScalarField:
        return self * -1.0

    def __pow__(self, exponent: float) -> ScalarField:
        return self.map(lambda h: h**exponent)

    def map(self, fn: Callable[[Tensor], Tensor]) -> ScalarField:
        """fn∘h for a smooth function of one number, e.g. ``field.map(torch.exp)``."""
        return ScalarField(self.home, _Combined(fn, [self.source]), chart=self.chart)


class _Constant:
    def __init__(self, number: Any) -> None:
        self.number = number

    def _evaluate(self, x: Blocks) -> Tensor:
        # a sum over nothing keeps the dependence on x that torch.func.grad asks for
        zero = next(iter(x.values())).sum() * 0
        return zero + self.number

    def parts(self) -> Iterable[Part]:
        return [(1.0, self._evaluate)]


def _not_scalar(what: str, other: Any) -> str:
    return (
        f"cannot {what} a ScalarField and a {type(other).__name__}: only functions on the same manifold and numbers "
        "combine. Make a "
        "field of a plain function first: chart.scalar_field(fn) or geo.scalar_field(fn)."
    )


def apart(a: Any, b: Any) -> bool:
    """True if two fields of an atlas are computed in charts that need not contain the same points.

    Then they meet only at a point, where both are asked for their `local` field.
    """
    if a.by_chart or b.by_chart:
        return True
    first, second = a.home.reference, b.home.reference
    return first != second and same_manifold(first, second)


def require_point(p: Any, chart: Chart, what: str) -> Point:
    """`p` as a `Point` of the manifold of `chart`, or an error."""
    if not isinstance(p, Point):
        raise ChartMismatchError(
            f"{what} is evaluated at a Point, found {type(p).__name__}. Plain numbers have no chart, so it is not known "
            "which point "
            "they mean. Pass geo.point() or chart.point(components)."
        )
    if not same_manifold(p.chart, chart):
        raise ChartMismatchError(
            f"{what} on the manifold of chart '{chart.reference.name}' was given a point of chart '{p.chart.name}', "
            "which belongs to another manifold. "
            + why_apart(chart, p.chart, "Make the point with a chart of the same manifold.")
        )
    return p


makers["scalar_field"] = lambda chart, fn: ScalarField(chart, FunctionSource(chart, fn))
