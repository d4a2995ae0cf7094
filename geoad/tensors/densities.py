"""Densities: numbers that pick up a power of |det J| when the chart changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from geoad import transport
from geoad.charts import Chart, Point
from geoad.errors import VarianceError
from geoad.params import is_wrapped, register_pytree
from geoad.repr import value_summary
from geoad.tensors.base import Axis, TypedTensor, is_scalar, require_same_place

__all__ = ["Density", "LogDensity"]

Scalar = float | Tensor


class _Weighted(TypedTensor):
    __slots__ = ("_weight", "value")

    value: Tensor
    _weight: float

    def __init__(self, chart: Chart, value: Tensor, weight: float, at: Point) -> None:
        self._put(chart=chart, value=value, _weight=weight, at=at)

    @property
    def axes(self) -> tuple[Axis, ...]:
        return ()

    @property
    def weight(self) -> float:
        return self._weight

    @property
    def batch_shape(self) -> torch.Size:
        return self.value.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        return self.value.device

    @property
    def components(self) -> Tensor:
        """The plain number in this chart."""
        return self.value

    def ravel(self) -> Tensor:
        """The plain number in this chart."""
        return self.value

    to_dense = ravel

    def __repr__(self) -> str:
        kind = f"{type(self).__name__}('{self.chart.name}', weight={self.weight:g}"
        return f"{kind}, {value_summary(self.value)}, {str(self.dtype).removeprefix('torch.')}, {self.device})"

    def _cast(self, dtype: torch.dtype, device: torch.device) -> Self:
        return type(self)(self.chart, self.value.to(device, dtype), self.weight, self.at.to(dtype=dtype, device=device))

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(self.chart, fn(self.value), self.weight, self.at)

    def carry(self, *, to: Point, chart: Chart) -> Self:
        """The density at point `to` with the same number *in `chart`*."""
        return type(self)(chart, self.to(chart).value, self.weight, to.to(chart)).to(to.chart)

    def __float__(self) -> float:
        raise VarianceError(
            f"float() of a {type(self).__name__} of weight {self.weight:g}: its number depends on the chart. Only weight 0 is a "
            "plain number: divide by a density of the same weight (a volume form, det G), or take .components."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.chart, self.value, self.weight, self.at)


class Density(_Weighted):
    """A density of weight w: moves by |det J⁻¹|^w.

    √det G and probability densities have weight 1, the determinant of a (0,2) tensor has weight 2. Products add weights,
    quotients subtract them, powers scale them; what has weight 0 is a plain scalar.
    """

    __slots__ = ()

    def _to_chart(self, chart: Chart) -> Self:
        factor = (-self.weight * transport.log_abs_det(self.at, chart)).exp()
        return type(self)(chart, self.value * factor, self.weight, self.at.to(chart))

    def _new(self, value: Tensor, weight: float) -> Density | Tensor:
        return value if weight == 0 else Density(self.chart, value, weight, self.at)

    def plus(self, other: Any, sign: float = 1.0) -> Density:
        """self ± other, for equal weights."""
        if not isinstance(other, Density) or other.weight != self.weight:
            found = f"a Density of weight {other.weight:g}" if isinstance(other, Density) else type(other).__name__
            raise VarianceError(
                f"cannot add a Density of weight {self.weight:g} and {found}: they move by different powers of |det J|, so the "
                "sum would depend on the chart. Multiply by a density that evens out the weights first, or use .components."
            )
        require_same_place(self, other, "add")
        return Density(self.chart, self.value + sign * other.value, self.weight, self.at)

    def times(self, other: Any) -> Density | Tensor:
        """self · other: weights add."""
        if isinstance(other, Density):
            require_same_place(self, other, "multiply")
            return self._new(self.value * other.value, self.weight + other.weight)
        return Density(self.chart, self.value * _scalar(other, "multiply a Density with"), self.weight, self.at)

    def over(self, other: Any) -> Density | Tensor:
        """self / other: weights subtract."""
        if isinstance(other, Density):
            require_same_place(self, other, "divide")
            return self._new(self.value / other.value, self.weight - other.weight)
        return Density(self.chart, self.value / _scalar(other, "divide a Density by"), self.weight, self.at)

    def power(self, exponent: float) -> Density | Tensor:
        """self to a real power: the weight scales."""
        return self._new(self.value**exponent, self.weight * exponent)

    def sqrt(self) -> Density | Tensor:
        """√self, of half the weight."""
        return self._new(self.value.sqrt(), self.weight / 2)

    def abs(self) -> Density:
        """|self|."""
        return Density(self.chart, self.value.abs(), self.weight, self.at)

    def log(self) -> LogDensity:
        """log self, a `LogDensity` of the same weight."""
        if not is_wrapped({"": self.value}) and bool((self.value < 0).any()):
            raise VarianceError("the logarithm of a negative density has no real value. Use density.abs().log().")
        return LogDensity(self.chart, self.value.log(), self.weight, self.at)


class LogDensity(_Weighted):
    """The logarithm of a density of weight w: moves by adding -w log |det J|.

    Sums add weights, scalars scale them; a sum of weight 0 is a plain scalar. Thus logdet H - logdet G is a number, while
    logdet H alone is not.
    """

    __slots__ = ()

    def _to_chart(self, chart: Chart) -> Self:
        shift = self.weight * transport.log_abs_det(self.at, chart)
        return type(self)(chart, self.value - shift, self.weight, self.at.to(chart))

    def _new(self, value: Tensor, weight: float) -> LogDensity | Tensor:
        return value if weight == 0 else LogDensity(self.chart, value, weight, self.at)

    def plus(self, other: Any, sign: float = 1.0) -> LogDensity | Tensor:
        """self ± other: weights add (a plain scalar has weight 0)."""
        if isinstance(other, LogDensity):
            require_same_place(self, other, "add")
            return self._new(self.value + sign * other.value, self.weight + sign * other.weight)
        return LogDensity(self.chart, self.value + sign * _scalar(other, "add to a LogDensity"), self.weight, self.at)

    def times(self, other: Any) -> LogDensity | Tensor:
        """c · self, for a number c: the weight scales."""
        if isinstance(other, Tensor) and not is_wrapped({"": other}):
            other = other.item() if other.ndim == 0 else other
        if not is_scalar(other) or isinstance(other, Tensor):
            raise VarianceError(
                f"a LogDensity is multiplied by plain numbers only, found {type(other).__name__}: the weight scales with the "
                "factor, so it must be known. Pass a float; the product of two log-densities has no law."
            )
        return self._new(self.value * other, self.weight * float(other))

    def exp(self) -> Density:
        """exp self, a `Density` of the same weight."""
        return Density(self.chart, self.value.exp(), self.weight, self.at)


def _scalar(thing: Any, what: str) -> Scalar:
    if not is_scalar(thing):
        raise VarianceError(
            f"cannot {what} a {type(thing).__name__}: the rule is for densities at the same point and for numbers. Take "
            ".components if you mean the numbers."
        )
    return thing


def _unflatten(cls: type[_Weighted]) -> Callable[[Any, Any], _Weighted]:
    def build(children: list[Any], context: Any) -> _Weighted:
        chart, weight, at = context
        return cls(chart, children[0], weight, at if at is not None else children[1])

    return build


def _flatten(tensor: _Weighted) -> tuple[list[Any], Any]:
    if is_wrapped(tensor.at.blocks) or tensor.at.batch_shape:
        return [tensor.value, tensor.at], (tensor.chart, tensor.weight, None)
    return [tensor.value], (tensor.chart, tensor.weight, tensor.at)


for _cls in (Density, LogDensity):
    register_pytree(_cls, _flatten, _unflatten(_cls))
