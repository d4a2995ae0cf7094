"""Metric fields: a metric at every point."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.charts import Chart, Point, Reparametrization, makers, meeting, station
from geoad.errors import GeometryError, NotADiffeomorphismError, VarianceError
from geoad.fields.scalar import ScalarField, apart, require_point
from geoad.fields.transition import Transition
from geoad.kernels import derivatives
from geoad.operators import LinearOperator
from geoad.params import Blocks, axpy, is_wrapped, scale
from geoad.tensors import Form, Metric, as_operator, seen_from
from geoad.tensors.base import is_scalar

__all__ = ["FormField", "FunctionMetric", "InChart", "MetricField", "SumField", "over_points"]


class FormField:
    """A bilinear form at every point, computed in the chart ``home``: ``field(p)`` is its value, in the chart of p.

    A subclass gives `operator`, the value as an operator on plain blocks of ``home``, and may give a cheaper `product`, which
    must be differentiable in the point. Fields of one manifold add and scale.

    Attributes:
        home: the chart in which the numbers are computed (where structure is imposed).
        by_chart: given chart by chart on an atlas, so that only `local` says where the numbers are computed.
        constant: the components in ``home`` do not depend on the point, so the connection vanishes there.
        definite: known to be positive definite everywhere.
    """

    type = (0, 2)
    value_class: builtins.type[Form] = Form
    home: Chart
    chart: Chart
    by_chart: bool = False
    constant: bool = False
    definite: bool = False

    def __init__(self, home: Chart) -> None:
        self.home = self.chart = home

    def operator(self, x: Blocks) -> LinearOperator:
        """The form at the point with blocks `x` in ``home``."""
        raise NotImplementedError

    def product(self, x: Blocks, v: Blocks) -> Blocks:
        """G(x) v, differentiable in x and v."""
        return self.operator(x).mv(v)

    def local(self, p: Point) -> FormField:
        """The field as it is computed at p, with one ``home``: itself, unless it is given chart by chart on an atlas.

        At a point of a chart below an immersion it is the restricted field, with a home in that chart.
        """
        place = station(self.home, p.chart)
        return self if place is self.home else InChart(self, place)

    def home_at(self, p: Point) -> Chart:
        """The chart in which the value at p is computed."""
        return self.local(p).home

    @property
    def placed(self) -> bool:
        """The field knows its chart; if not, `place` says it."""
        return True

    def place(self, chart: Chart) -> FormField:
        """The same field, computed in `chart` if it did not know its chart yet."""
        return self

    def __call__(self, p: Point) -> Any:
        field = self.local(require_point(p, self.home, f"a {type(self).__name__} field"))
        if field is not self:
            return field(p)
        here = p.to(self.home)
        if here.batch_shape:
            return over_points(self, p)
        return seen_from(self.value_class, self.home, self.operator(here.blocks), p)

    def to(self, chart: Chart | Reparametrization) -> FormField:
        """The same field, presented in another chart of the manifold."""
        if isinstance(chart, Reparametrization):
            return chart(self)
        Transition(self.home, chart)  # raises for another manifold
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.chart = chart
        return twin

    def __repr__(self) -> str:
        return f"{type(self).__name__}('{self.home.name}', dim={self.home.dim})"

    # -- algebra -----------------------------------------------------------------------------------------------------

    def __add__(self, other: Any) -> FormField:
        if not isinstance(other, FormField):
            raise VarianceError(
                f"cannot add a {type(self).__name__} field and a {type(other).__name__}: damping needs to say whose "
                "identity it adds. "
                "Use field + lam * geoad.metrics.Euclidean(chart)."
            )
        return combined([(1.0, self), (1.0, other)])

    def __radd__(self, other: Any) -> FormField:
        if type(other) is int and other == 0:  # where sum(fields) starts
            return self
        return self + other  # raises

    def __sub__(self, other: Any) -> FormField:
        if not isinstance(other, FormField):
            return self + other  # raises
        return combined([(1.0, self), (-1.0, other)])

    def __mul__(self, factor: Any) -> FormField:
        if isinstance(factor, ScalarField):
            return self.scaled_by(factor)
        if not is_scalar(factor):
            raise VarianceError(
                f"a {type(self).__name__} field is scaled by numbers and scalar fields, found {type(factor).__name__}."
            )
        return combined([(factor if isinstance(factor, Tensor) else float(factor), self)])

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> FormField:
        return self * (1 / factor)

    def __neg__(self) -> FormField:
        return self * -1.0

    def scaled_by(self, factor: ScalarField) -> FormField:
        """The conformal field h G for a function h (positive, if G is to stay a metric)."""
        if apart(factor, self):
            return makers["gathered_form"](FormField.scaled_by, (self, factor), self.value_class, self.definite)
        return Conformal(factor, self)


class MetricField(FormField):
    """A metric at every point; its values are `Metric` objects. See `FormField`."""

    value_class = Metric


def over_points(field: Callable[[Point], Any], p: Point) -> Any:
    """The values of a field at a batch of points."""

    def at(q: Point) -> Any:
        return field(q)

    for _ in p.batch_shape:
        at = torch.func.vmap(at)
    return at(p)


Factor = float | Tensor


def _is_positive(factor: Factor) -> bool:
    """True if the factor is known to be > 0; the value of a traced tensor is not known."""
    if isinstance(factor, Tensor):
        return not is_wrapped({"": factor}) and bool(factor.detach() > 0)
    return factor > 0


Term = tuple[Factor, FormField]


def combined(terms: list[Term]) -> FormField:
    """Σ c_i field_i; where the fields are given in different charts of an atlas, summed at the point where it is asked for."""
    placed = [field for _, field in terms if field.placed]
    if not any(apart(placed[0], each) for each in placed):
        return SumField(terms)
    positive = all(_is_positive(factor) and issubclass(field.value_class, Metric) for factor, field in terms)
    factors = [factor for factor, _ in terms]
    return makers["gathered_form"](
        lambda *fields: SumField(list(zip(factors, fields, strict=True))),
        [field for _, field in terms],
        Metric if positive else Form,
        positive and any(field.definite for _, field in terms),
    )


class SumField(MetricField):
    """Σ c_i field_i; a metric field if all terms are and all coefficients are positive."""

    def __init__(self, terms: list[tuple[Factor, FormField]]) -> None:
        flat: list[tuple[Factor, FormField]] = []
        known = next((field.home.reference for _, field in terms if field.placed), None)
        for factor, field in terms if known is None else [(c, each.place(known)) for c, each in terms]:
            inner = field.terms if isinstance(field, SumField) else [(1.0, field)]
            flat.extend((factor * c, each) for c, each in inner)
        homes = [field.home for _, field in flat]
        for other in homes:
            Transition(homes[0], other)  # raises for another manifold
        home = meeting(homes)
        super().__init__(home)
        self.terms = flat
        self.constant = all(field.constant and field.home == home for _, field in flat)
        positive = all(_is_positive(factor) and issubclass(field.value_class, Metric) for factor, field in flat)
        self.value_class = Metric if positive else Form
        self.definite = positive and any(field.definite for _, field in flat)

    def parts_at_home(self) -> list[tuple[Factor, FormField]]:
        """The terms, each written in the home of the sum."""
        return [(c, field if field.home == self.home else InChart(field, self.home)) for c, field in self.terms]

    def operator(self, x: Blocks) -> LinearOperator:
        total: LinearOperator | None = None
        for factor, field in self.parts_at_home():
            term = ops.times(factor, field.operator(x), positive=_is_positive(factor))
            total = term if total is None else ops.plus(total, term, definite=self.definite)
        assert total is not None
        return total

    def product(self, x: Blocks, v: Blocks) -> Blocks:
        total: Blocks | None = None
        for factor, field in self.parts_at_home():
            term = field.product(x, v)
            total = scale(factor, term) if total is None else axpy(factor, term, total)
        assert total is not None
        return total


class InChart(MetricField):
    """A field computed in its own home and written in another chart: J⁻ᵀ G J⁻¹ on plain blocks.

    Below an immersion this is the induced metric; below a map that is not one to one it is degenerate.
    """

    def __init__(self, field: FormField, home: Chart) -> None:
        super().__init__(home)
        self.field = field
        self.value_class = field.value_class
        self.way = Transition(home, field.home)
        self.degenerate = any(bound.law in ("submersion", "smooth") for bound, _ in self.way.steps)
        self.definite = field.definite and not self.degenerate
        self.constant = field.constant and all(bound.linear for bound, _ in self.way.steps)

    def product(self, x: Blocks, v: Blocks) -> Blocks:
        return self.way.pull(x, self.field.product(self.way(x), self.way.push(x, v)))

    def operator(self, x: Blocks) -> LinearOperator:
        return CongruenceOperator(self.way, x, self.field.operator(self.way(x)), definite=self.definite)


def require_connection(field: FormField, what: str) -> None:
    """Raise `NotADiffeomorphismError` if the field is degenerate where it is needed, so that it has no connection."""
    if isinstance(field, InChart) and field.degenerate:
        raise NotADiffeomorphismError(
            f"{what} was asked in chart '{field.home.name}' with a metric of chart '{field.field.home.name}': the map between "
            "them is not one to one, so the metric is degenerate there and has no connection. Pass a metric of the chart "
            f"itself, metric=geoad.metrics.Euclidean({field.home.name}), or compute in '{field.field.home.name}'."
        )


class FieldOperator(ops.Implicit):
    """The value of a field at a point, by the field's own products."""

    def __init__(self, field: FormField, x: Blocks, *, definite: bool = False) -> None:
        super().__init__(field.home.layout, x, symmetric=True, definite=definite)
        self.field = field

    def mv(self, v: Blocks) -> Blocks:
        return self.field.product(self.x, v)


class CongruenceOperator(ops.Implicit):
    """Jᵀ B J for the Jacobian of a way between charts at a point, and an operator B at its end."""

    def __init__(self, way: Transition, x: Blocks, op: LinearOperator, *, definite: bool = False) -> None:
        super().__init__(way.start.layout, x, symmetric=op.symmetric, definite=definite)
        self.way, self.op = way, op

    def mv(self, v: Blocks) -> Blocks:
        return self.way.pull(self.x, self.op.mv(self.way.push(self.x, v)))


class Conformal(MetricField):
    """h G."""

    def __init__(self, factor: ScalarField, field: FormField) -> None:
        super().__init__(field.home)
        self.factor, self.field = factor.in_home(field.home), field
        self.value_class = field.value_class

    def operator(self, x: Blocks) -> LinearOperator:
        h = derivatives.value(self.factor.parts(), x)
        if is_wrapped({"": h}):
            positive = False
        else:
            positive = bool(h > 0)
            if issubclass(self.value_class, Metric) and not positive:
                raise GeometryError(
                    f"a conformal factor must be positive, found {float(h):.6g}: otherwise h G is not a metric. Use "
                    "field.map(torch.exp)."
                )
        return ops.times(h, self.field.operator(x), positive=positive)

    def product(self, x: Blocks, v: Blocks) -> Blocks:
        return scale(derivatives.value(self.factor.parts(), x), self.field.product(x, v))


class FunctionMetric(MetricField):
    """The metric field whose matrix in `home` is ``fn(components)``: a (d, d) or (*s, *s) tensor, or nested dicts."""

    def __init__(self, home: Chart, fn: Callable[[Any], Any]) -> None:
        super().__init__(home)
        self.fn = fn

    def operator(self, x: Blocks) -> LinearOperator:
        matrix: Tensor | Any = self.fn(self.home.unpack(x))
        op = as_operator(self.home, matrix, "a metric field")
        if not is_wrapped({"": op.like}) and not bool(op.like.isfinite().all()):
            raise GeometryError(
                "the function of a metric field returned entries that are not finite (NaN or infinity). There is no "
                "metric at this "
                "point; check the function, and whether the point lies in its domain."
            )
        if not op.symmetric and not is_wrapped({"": op.like}):
            raise GeometryError(
                "the function of a metric field returned a matrix that is not symmetric. An inner product does not "
                "depend on the order "
                "of its arguments; return 0.5 * (M + M.mT)."
            )
        op.symmetric = True
        return op


makers["metric_field"] = FunctionMetric
