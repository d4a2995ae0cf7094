"""Fields on an atlas, given chart by chart or combined of fields in different charts: at each point one of them is asked."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from geoad.charts import Atlas, Chart, Point, makers, path, singles
from geoad.errors import ChartDomainError, ChartMismatchError, GeometryError
from geoad.fields.metric import FormField, InChart, MetricField
from geoad.fields.scalar import ScalarField, require_point
from geoad.params import unwrapped
from geoad.tensors import Form, Metric
from geoad.tensors.base import is_scalar

__all__ = ["FormByChart", "GatheredForm", "GatheredScalar", "ScalarByChart"]


class _NoSource:
    """A field without one home has no parts."""

    def parts(self) -> Any:
        raise GeometryError(_NO_HOME)


_NO_HOME = (
    "this field is given in several charts of an atlas, so it has no numbers in one chart for all points. Evaluate it at a "
    "point, field(p), or take field.local(p), the field as it is computed around p."
)


class _Scalar(ScalarField):
    """A scalar field that is computed in different charts at different points."""

    by_chart = True

    def __init__(self, home: Chart) -> None:
        super().__init__(home, _NoSource())

    def to(self, chart: Any) -> ScalarField:
        super().to(chart)  # raises for another manifold
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, chart=chart)
        return twin

    def in_home(self, chart: Chart) -> ScalarField:
        """The same function of the points of `chart`, as one field there."""
        return chart.scalar_field(lambda components: self(chart.point(components)))

    def function(self, chart: Chart | None = None) -> Callable[[Any], Tensor]:
        home = chart or self.chart
        return lambda components: self(home.point(components))

    def _sum(self, other: Any, sign: float) -> ScalarField:
        if is_scalar(other):
            return GatheredScalar(lambda field: field + sign * other, self)
        return super()._sum(other, sign)

    def __mul__(self, other: Any) -> Any:
        if is_scalar(other):
            return GatheredScalar(lambda field: field * other, self)
        return super().__mul__(other)

    __rmul__ = __mul__

    def map(self, fn: Callable[[Tensor], Tensor]) -> ScalarField:
        return GatheredScalar(lambda field: field.map(fn), self)


class _Form(MetricField):
    """A field of forms that is computed in different charts at different points."""

    by_chart = True

    def operator(self, x: Any) -> Any:
        raise GeometryError(_NO_HOME)

    def product(self, x: Any, v: Any) -> Any:
        raise GeometryError(_NO_HOME)


# -- combined of others -------------------------------------------------------------------------------------------------


def _meet(fields: Sequence[Any], p: Point) -> list[Any]:
    """The local fields at p, in one tree of charts; raises if p lies outside of the chart of one of them."""
    found = [field.local(p) if _placed(field) else field for field in fields]
    homes = [field.home for field in found if _placed(field)]
    for home in homes:
        p.to(home)
    tree = next((home for home in homes if home.reference == p.chart.reference), homes[0])
    return [_in_tree(field, tree) if _placed(field) else field for field in found]


def _one_manifold(fields: Sequence[Any]) -> Chart:
    """The home of the first field; raises if another one lives on another manifold."""
    homes = [field.home for field in fields if _placed(field)]
    for home in homes:
        path(homes[0], home)
    return homes[0]


def _in_tree(field: Any, home: Chart) -> Any:
    """The local field, moved to `home` if it comes from another tree of the atlas."""
    if field.home.reference == home.reference:
        return field
    return field.in_home(home) if isinstance(field, ScalarField) else InChart(field, home)


def _placed(field: Any) -> bool:
    return isinstance(field, ScalarField) or field.placed


class GatheredScalar(_Scalar):
    """op(f, g, ...) of scalar fields in different charts of an atlas."""

    def __init__(self, op: Callable[..., ScalarField], *fields: ScalarField) -> None:
        super().__init__(_one_manifold(fields))
        self.op, self.fields = op, fields

    def local(self, p: Point) -> ScalarField:
        return self.op(*_meet(self.fields, p))


class GatheredForm(_Form):
    """op(F, G, ...) of fields of forms (and functions) in different charts of an atlas."""

    def __init__(
        self, op: Callable[..., FormField], fields: Sequence[Any], value_class: builtins.type[Form], definite: bool
    ) -> None:
        super().__init__(_one_manifold(fields))
        self.op, self.fields = op, tuple(fields)
        self.value_class, self.definite = value_class, definite

    def local(self, p: Point) -> FormField:
        return self.op(*_meet(self.fields, p)).local(p)


# -- given chart by chart -----------------------------------------------------------------------------------------------


class _Charts:
    """One field for each chart of an atlas, and which of them to ask at a point."""

    def __init__(self, atlas: Atlas, functions: Mapping[Any, Any], make: Callable[[Chart, Any], Any]) -> None:
        if not isinstance(functions, Mapping) or not functions:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise GeometryError(
                f"a field on the atlas '{atlas.name}' is given by {{chart: function}} with at least one chart, found "
                f"{type(functions).__name__}. A function of plain components has no meaning without the chart that they are in."
            )
        self.atlas = atlas
        self.fields = {atlas.chart(chart).uid: make(atlas.chart(chart), fn) for chart, fn in functions.items()}
        self.charts = [chart for chart in atlas.charts if chart.uid in self.fields]

    def at(self, p: Point) -> Any:
        """The field in the chart of p, or in another chart that contains p."""
        root = require_point(p, self.charts[0], f"a field on the atlas '{self.atlas.name}'").chart.reference
        if root.uid in self.fields:
            return self.fields[root.uid]
        if unwrapped(p.blocks) is None:  # values cannot be read: as everywhere inside of transforms, domains are not checked
            near = [chart for chart in self.charts if self.atlas.direct(root, chart) is not None]
            return self.fields[(near or self.charts)[0].uid]
        containing = [chart for chart in self.atlas.charts_at(p) if chart.uid in self.fields]
        if not containing:
            raise ChartDomainError(
                f"the field is given in the charts {[chart.name for chart in self.charts]} of the atlas "
                f"'{self.atlas.name}', "
                f"{'no one of which contains the whole batch' if p.batch_shape else 'none of which contains the point'}"
                f", seen in chart '{p.chart.name}'. A field has values where one of its charts covers; give it in more charts"
                f"{', or evaluate the points one by one' if p.batch_shape else ''}."
            )
        return self.fields[containing[0].uid]

    def compatible(
        self, points: Point | Sequence[Point], tolerance: float | None, numbers: Callable[[Any, Chart], Tensor]
    ) -> float:
        """The largest relative difference of the values in different charts; raises above the tolerance."""
        worst = 0.0
        for point in [points] if isinstance(points, Point) else points:
            for blocks in singles(point.blocks, point.chart):
                p = Point(point.chart, blocks)
                limit = 1e5 * torch.finfo(p.dtype).eps if tolerance is None else tolerance
                charts = [chart for chart in self.atlas.charts_at(p) if chart.uid in self.fields]
                values = [numbers(self.fields[chart.uid](p.to(chart)), charts[0]) for chart in charts]
                for chart, value in zip(charts[1:], values[1:], strict=True):
                    error = float((value - values[0]).abs().max() / (1 + values[0].abs().max()))
                    if not error <= limit:
                        raise GeometryError(
                            f"the functions given in the charts '{charts[0].name}' and '{chart.name}' are not one field: at "
                            f"{p.to(charts[0]).ravel().tolist()} in '{charts[0].name}' their values differ by {error:.3g} "
                            f"(relative; allowed is {limit:.3g}). Then results depend on the chart; mend one of the functions."
                        )
                    worst = max(worst, error)
        return worst


class ScalarByChart(_Scalar):
    """A function on an atlas; see `Atlas.scalar_field`."""

    def __init__(self, atlas: Atlas, functions: Mapping[Any, Any]) -> None:
        self.charts = _Charts(atlas, functions, _scalar_in)
        super().__init__(self.charts.charts[0])

    def local(self, p: Point) -> ScalarField:
        return self.charts.at(p)

    def check_compatible(self, points: Point | Sequence[Point], *, tolerance: float | None = None) -> float:
        """Check at sample points that the functions agree where their charts overlap; the largest relative difference."""
        return self.charts.compatible(points, tolerance, lambda value, chart: value)


class FormByChart(_Form):
    """A metric field on an atlas; see `Atlas.metric_field`."""

    def __init__(self, atlas: Atlas, functions: Mapping[Any, Any]) -> None:
        self.charts = _Charts(atlas, functions, _metric_in)
        super().__init__(self.charts.charts[0])
        fields = self.charts.fields.values()
        self.value_class = Metric if all(issubclass(field.value_class, Metric) for field in fields) else Form
        self.definite = all(field.definite for field in fields)

    def local(self, p: Point) -> FormField:
        return self.charts.at(p).local(p)

    def check_compatible(self, points: Point | Sequence[Point], *, tolerance: float | None = None) -> float:
        """Check at sample points that the matrices are one field where the charts overlap; the largest relative difference."""
        return self.charts.compatible(points, tolerance, lambda value, chart: value.to(chart).to_dense())


def _scalar_in(chart: Chart, given: Any) -> ScalarField:
    return _own(chart, given) if isinstance(given, ScalarField) else chart.scalar_field(given)


def _metric_in(chart: Chart, given: Any) -> FormField:
    return _own(chart, given) if isinstance(given, FormField) else chart.metric_field(given)


def _own(chart: Chart, field: Any) -> Any:
    if field.by_chart or field.home.reference != chart:
        raise ChartMismatchError(
            f"the field given for chart '{chart.name}' is computed in chart '{field.home.name}', which is neither this chart "
            "nor made of it by reparametrize. Give it under the chart that it is computed in."
        )
    return field


makers["gathered_scalar"] = GatheredScalar
makers["gathered_form"] = GatheredForm
makers["atlas_scalar_field"] = ScalarByChart
makers["atlas_metric_field"] = FormByChart
