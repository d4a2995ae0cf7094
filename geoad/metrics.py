"""Metric fields with a name: Euclidean, constant, diagonal, pulled back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.charts import Chart, Point, Reparametrization, flat_reference
from geoad.errors import GeometryError, SingularMetricError
from geoad.fields.metric import FieldOperator, FormField, MetricField
from geoad.kernels import products
from geoad.operators import LinearOperator
from geoad.params import Blocks, first
from geoad.tensors import as_operator
from geoad.tensors.base import is_scalar

__all__ = ["Constant", "Diagonal", "Euclidean", "Pullback"]


def _like(tensor: Tensor, x: Blocks) -> Tensor:
    block = first(x)
    return tensor.to(device=block.device, dtype=block.dtype)


class Euclidean(MetricField):
    """The metric that is the identity matrix in `chart`, everywhere.

    ``Euclidean(geo.reference)`` is the default metric of geoad, the one that gradient descent assumes in silence; seen in
    another chart it is J⁻ᵀJ⁻¹. It is also what damping means: ``F + lam * Euclidean(theta)``.

    >>> import torch, geoad
    >>> x = geoad.Chart({"x": (2,)}, name="x")
    >>> psi = x.reparametrize(geoad.maps.Scale(3.0)).target
    >>> geoad.metrics.Euclidean(x)(x.point(torch.ones(2)).to(psi)).components
    tensor([[0.1111, 0.0000],
            [0.0000, 0.1111]])
    """

    constant = True
    definite = True

    def operator(self, x: Blocks) -> LinearOperator:
        return ops.Multiple(self.home.layout, first(x).new_ones(()), definite=True)

    def product(self, x: Blocks, v: Blocks) -> Blocks:
        return v


class Constant(MetricField):
    """The metric with the same components in `chart` everywhere.

    Args:
        chart: where the components are constant.
        operator: a (d, d) matrix, nested dicts [row][column], a `Metric` (its components in `chart` are taken), or a symmetric
            positive definite operator of `geoad.operators`.
    """

    constant = True
    definite = True

    def __init__(self, chart: Chart, operator: Any) -> None:
        super().__init__(chart)
        if hasattr(operator, "operator_in"):
            operator = operator.operator_in(chart)
        self.value = as_operator(chart, operator, "a constant metric")
        if not self.value.symmetric:
            raise GeometryError(
                "a constant metric must be symmetric, found a matrix that is not. An inner product does not depend on "
                "the order of its "
                "arguments; pass 0.5 * (M + M.mT)."
            )
        ops.inverse(self.value, positive=True)  # raises SingularMetricError if it is not positive definite
        self.value.definite = True

    def operator(self, x: Blocks) -> LinearOperator:
        value, block = self.value, first(x)
        if isinstance(value, ops.Dense) and (value.matrix.dtype != block.dtype or value.matrix.device != block.device):
            return ops.Dense(value.layout, _like(value.matrix, x), definite=True)
        return value


class Diagonal(MetricField):
    """The metric with the same diagonal matrix in `chart` everywhere.

    Args:
        chart: where the matrix is diagonal.
        entries: the positive entries: components in the layout of the chart, or one number.
    """

    constant = True
    definite = True

    def __init__(self, chart: Chart, entries: Any) -> None:
        super().__init__(chart)
        if isinstance(entries, (int, float)) or (isinstance(entries, Tensor) and entries.ndim == 0):
            number = torch.as_tensor(entries, dtype=torch.float64)
            entries = {name: number.expand(shape) for name, shape in chart.layout.items()}
        self.entries = chart.pack(entries, "a diagonal metric")
        smallest = min(float(block.min()) for block in self.entries.values() if block.numel())
        if not smallest > 0:
            raise SingularMetricError(
                f"a diagonal metric needs positive entries, found {smallest:.6g}. A metric that vanishes in some "
                "direction has no "
                "inverse; add a positive number to the entries."
            )

    def operator(self, x: Blocks) -> LinearOperator:
        return ops.Diagonal(self.home.layout, {name: _like(e, x) for name, e in self.entries.items()}, definite=True)


class Pullback(MetricField):
    r"""The pull-back :math:`J_f^\top A(f(x))\, J_f` of a metric field A under a map f. Semidefinite where J_f has a kernel.

    Args:
        map: a function of the plain components in `chart` with values in the chart of `metric`, or a `Reparametrization`.
        metric: the metric field on the target space, e.g. ``Euclidean(out)`` with ``out = geoad.Chart((n, c), name="out")``.
        chart: the chart that `map` takes its components in. Default: the reference chart of the point of evaluation.
    """

    def __init__(self, map: Callable[[Any], Any] | Reparametrization, metric: FormField, chart: Chart | None = None) -> None:
        if isinstance(map, Reparametrization):
            map.require_derivative("a pull-back")
            chart, bound = map.source, map.map
            super().__init__(chart)
            self.map: Callable[[Blocks], Blocks] = bound.forward
        else:
            if chart is not None:
                super().__init__(chart)
            self._given = map
            self.map = self._call
        self.given = (map, metric)
        self.metric = metric
        self.value_class = metric.value_class

    def _call(self, x: Blocks) -> Blocks:
        return self.metric.home.pack(self._given(self.home.unpack(x)), "the value of the map")

    def __repr__(self) -> str:
        return super().__repr__() if "home" in self.__dict__ else "Pullback(in the reference chart of its point)"

    def home_at(self, p: Point) -> Chart:
        return self.home if self.placed else self.place(p.chart.reference).home

    def __call__(self, p: Point) -> Any:
        if not self.placed:
            return self.place(p.chart.reference)(p)
        return super().__call__(p)

    @property
    def placed(self) -> bool:
        return "home" in self.__dict__

    def place(self, chart: Chart) -> FormField:
        if self.placed:
            return self
        what, remedy = "a pull-back of a map of plain components", "metrics.Pullback(map, metric, chart=...)"
        return Pullback(*self.given, chart=flat_reference(chart, what, remedy))

    def __mul__(self, factor: Any) -> FormField:
        if not self.placed and is_scalar(factor):  # Jᵀ(cA)J
            return Pullback(self.given[0], self.metric * factor)
        return super().__mul__(factor)

    __rmul__ = __mul__

    def __getattr__(self, name: str) -> Any:
        if name == "home":
            raise GeometryError(
                "this pull-back does not know its chart yet, and nothing that it is combined with says it. Say in which "
                "chart the map takes "
                "its components: metrics.Pullback(map, metric, chart=geo.reference)."
            )
        raise AttributeError(name)

    def operator(self, x: Blocks) -> LinearOperator:
        return FieldOperator(self, x)

    def product(self, x: Blocks, v: Blocks) -> Blocks:
        y, velocity, pull = products.push_pull(self.map, x, v)
        return pull(self.metric.product(y, velocity))
