"""Densities: numbers that pick up a power of |det J| when the chart changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from geoad import transport
from geoad.charts import Chart, Point
from geoad.errors import BasePointError, VarianceError
from geoad.params import insert_axes, is_wrapped, register_pytree
from geoad.repr import value_summary
from geoad.tensors.base import Axis, TypedTensor, describe, is_scalar, plain_scalar, require_same_place

__all__ = ["Density", "LogDensity", "Weights"]

Scalar = float | Tensor
Weights = tuple[tuple[Chart, float], ...]
"""Weights in further spaces, for determinants of two-point tensors."""


def _combine(a: Weights, b: Weights, sign: float) -> Weights:
    total = dict(a)
    for chart, weight in b:
        total[chart] = total.get(chart, 0) + sign * weight
    return tuple((chart, weight) for chart, weight in total.items() if weight != 0)


class _Weighted(TypedTensor):
    """One number with a weight; ``foreign`` holds weights in other spaces, whose charts stay as they are."""

    __slots__ = ("_weight", "foreign", "value")

    value: Tensor
    _weight: float
    foreign: Weights

    def __init__(self, chart: Chart, value: Tensor, weight: float, at: Point, foreign: Weights = ()) -> None:
        self._put(chart=chart, value=value, _weight=weight, at=at, foreign=foreign)

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

    @property
    def is_plain(self) -> bool:
        """True if every weight is 0: the number is the same in all charts."""
        return self._weight == 0 and not self.foreign

    def __repr__(self) -> str:
        also = "".join(f", weight={weight:g} in '{chart.name}'" for chart, weight in self.foreign)
        kind = f"{type(self).__name__}('{self.chart.name}', weight={self.weight:g}{also}"
        return f"{kind}, {value_summary(self.value)}, {str(self.dtype).removeprefix('torch.')}, {self.device})"

    def _cast(self, dtype: torch.dtype, device: torch.device) -> Self:
        at = self.at.to(dtype=dtype, device=device)
        return type(self)(self.chart, self.value.to(device, dtype), self.weight, at, self.foreign)

    def map_numbers(self, fn: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(self.chart, fn(self.value), self.weight, self.at, self.foreign)

    def _log_abs_det(self, chart: Chart) -> Tensor:
        self.at.check_fresh()
        result = transport.log_abs_det(self.at, chart)
        return insert_axes(result, result.ndim, self.value.ndim - result.ndim)

    def _new(self, value: Tensor, weight: float, foreign: Weights) -> Any:
        return value if weight == 0 and not foreign else type(self)(self.chart, value, weight, self.at, foreign)

    def carry(self, *, to: Point, chart: Chart) -> Self:
        """The density at point `to` with the same number *in `chart`*."""
        return type(self)(chart, self.to(chart).value, self.weight, to.to(chart), self.foreign).to(to.chart)

    def __float__(self) -> float:
        if self.is_plain:
            return float(self.value)
        raise VarianceError(
            f"float() of a {type(self).__name__} of weight {self.weight:g}: its number depends on the chart. Only weight "
            "0 is a "
            "plain number: divide by a density of the same weight (a volume form, det G), or take .components."
        )

    def compare(self, other: Any, relation: Callable[[Tensor, Any], Tensor]) -> Tensor:
        """relation(self, other), a plain boolean, for equal weights at the same point: |det J|^w > 0 keeps the order.

        A `Density` compares with the number 0 too.
        """
        if isinstance(other, type(self)) and (other.weight, set(other.foreign)) == (self.weight, set(self.foreign)):
            require_same_place(self, other, "compare")
            return relation(self.value, other.value)
        if self.is_plain or (isinstance(self, Density) and is_scalar(other) and float(other) == 0):
            return relation(self.value, other)
        raise VarianceError(
            f"cannot compare {describe(self)} with {describe(other)}: numbers of different weights change by different "
            "factors, so "
            "the order depends on the chart. Divide by a density that evens out the weights, or compare .components."
        )

    def _reduced(self, dim: Any) -> list[int]:
        """The batch axes to reduce; axes of the base point may not be mixed."""
        own = len(self.at.batch_shape)
        dims = list(range(self.value.ndim)) if dim is None else [dim] if isinstance(dim, int) else list(dim)
        dims = [d % self.value.ndim if self.value.ndim else d for d in dims]
        if any(d < own for d in dims):
            raise BasePointError(
                f"cannot combine a {describe(self)} over axes along which the base point varies: densities at different "
                "points live in "
                "different spaces. Divide by a density of the same weight first, or carry them to one point: "
                "T.carry(to=p, chart=reference)."
            )
        return dims

    def sum(self, dim: Any = None) -> Any:
        """The sum over batch axes (log-densities: weights add)."""
        dims = self._reduced(dim)
        value = self.value.sum(dims)
        count = self.value.numel() // max(value.numel(), 1) if isinstance(self, LogDensity) else 1
        return self._new(value, self.weight * count, tuple((chart, w * count) for chart, w in self.foreign))

    def mean(self, dim: Any = None) -> Any:
        """The mean over batch axes."""
        return self._new(self.value.mean(self._reduced(dim)), self.weight, self.foreign)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.chart, self.value, self.weight, self.at, self.foreign)


class Density(_Weighted):
    """A density of weight w: moves by |det J⁻¹|^w.

    √det G and probability densities have weight 1, the determinant of a (0,2) tensor has weight 2. Products add weights,
    quotients subtract them, powers scale them; what has weight 0 is a plain scalar.

    The determinant of a two-point tensor is a density in two spaces: |det ∂ψ/∂θ| has weight 1 in θ and -1 in ψ. Its product
    with a density of the other space is the pulled-back density: ``J.det() * rho`` for `rho` of weight 1 in ψ.

    >>> import torch, geoad
    >>> x = geoad.Chart({"x": (2,)}, name="x")
    >>> G = x.metric(torch.diag(torch.tensor([1.0, 4.0])), at=x.point(torch.zeros(2)))
    >>> G.det().sqrt().to(x.reparametrize(geoad.maps.Scale(3.0), name="3x").target)
    Density('3x', weight=1, 0.222222, float32, cpu)
    """

    __slots__ = ()

    def _to_chart(self, chart: Chart) -> Self:
        factor = (-self.weight * self._log_abs_det(chart)).exp()
        return type(self)(chart, self.value * factor, self.weight, self.at.to(chart), self.foreign)

    def plus(self, other: Any, sign: float = 1.0) -> Density:
        """self ± other, for equal weights."""
        if not isinstance(other, Density) or (other.weight, set(other.foreign)) != (self.weight, set(self.foreign)):
            raise VarianceError(
                f"cannot add {describe(self)} and {describe(other)}: they move by different powers of |det J|, so the "
                "sum would depend on the chart. Multiply by a density that evens out the weights first, or use .components."
            )
        require_same_place(self, other, "add")
        return Density(self.chart, self.value + sign * other.value, self.weight, self.at, self.foreign)

    def times(self, other: Any) -> Density | Tensor:
        """self · other: weights add."""
        return self._product(other, 1.0)

    def over(self, other: Any) -> Density | Tensor:
        """self / other: weights subtract."""
        return self._product(other, -1.0)

    def _product(self, other: Any, sign: float) -> Any:
        if not isinstance(other, Density):
            factor = _scalar(other, self, "multiply or divide")
            value = self.value * factor if sign > 0 else self.value / factor
            return Density(self.chart, value, self.weight, self.at, self.foreign)
        theirs: Weights = other.foreign
        if self.chart != other.chart and any(chart == self.chart for chart, _ in theirs):
            return (other if sign > 0 else other.power(-1.0)).times(self)  # pyright: ignore[reportAttributeAccessIssue]
        value = self.value * other.value if sign > 0 else self.value / other.value
        if any(chart == other.chart for chart, _ in self.foreign) and other.chart != self.chart:
            return self._new(value, self.weight, _combine(self.foreign, (*theirs, (other.chart, other.weight)), sign))
        require_same_place(self, other, "multiply")
        return self._new(value, self.weight + sign * other.weight, _combine(self.foreign, theirs, sign))

    def power(self, exponent: float) -> Density | Tensor:
        """self to a real power: the weight scales."""
        foreign = tuple((chart, weight * exponent) for chart, weight in self.foreign) if exponent else ()
        return self._new(self.value**exponent, self.weight * exponent, foreign)

    pow = power

    def sqrt(self) -> Density | Tensor:
        """√self, of half the weight."""
        return self._new(self.value.sqrt(), self.weight / 2, tuple((chart, w / 2) for chart, w in self.foreign))

    def abs(self) -> Density:
        """|self|."""
        return self.map_numbers(torch.abs)

    def prod(self, dim: int | None = None) -> Density | Tensor:
        """The product over batch axes: weights add."""
        dims = self._reduced(dim)
        value = self.value
        for axis in sorted(dims, reverse=True):
            value = value.prod(axis)
        count = self.value.numel() // max(value.numel(), 1)
        return self._new(value, self.weight * count, tuple((chart, w * count) for chart, w in self.foreign))

    def log(self) -> LogDensity:
        """log self, a `LogDensity` of the same weight."""
        if not is_wrapped({"": self.value}) and bool((self.value < 0).any()):
            raise VarianceError("the logarithm of a negative density has no real value. Use density.abs().log().")
        return LogDensity(self.chart, self.value.log(), self.weight, self.at, self.foreign)


class LogDensity(_Weighted):
    """The logarithm of a density of weight w: moves by adding -w log |det J|.

    Sums add weights, scalars scale them; a sum of weight 0 is a plain scalar. Thus logdet H - logdet G is a number, while
    logdet H alone is not.
    """

    __slots__ = ()

    def _to_chart(self, chart: Chart) -> Self:
        shift = self.weight * self._log_abs_det(chart)
        return type(self)(chart, self.value - shift, self.weight, self.at.to(chart), self.foreign)

    def plus(self, other: Any, sign: float = 1.0) -> LogDensity | Tensor:
        """self ± other: weights add (a plain scalar has weight 0)."""
        if not isinstance(other, LogDensity):
            return self._new(self.value + sign * _scalar(other, self, "add"), self.weight, self.foreign)
        value, theirs = self.value + sign * other.value, other.foreign
        if self.chart != other.chart and any(chart == self.chart for chart, _ in theirs):
            foreign = _combine(tuple((chart, sign * w) for chart, w in theirs), ((self.chart, self.weight), *self.foreign), 1.0)
            weight = sign * other.weight
            return value if weight == 0 and not foreign else LogDensity(other.chart, value, weight, other.at, foreign)
        if any(chart == other.chart for chart, _ in self.foreign) and other.chart != self.chart:
            return self._new(value, self.weight, _combine(self.foreign, (*theirs, (other.chart, other.weight)), sign))
        require_same_place(self, other, "add")
        return self._new(value, self.weight + sign * other.weight, _combine(self.foreign, theirs, sign))

    def times(self, other: Any) -> LogDensity | Tensor:
        """c · self, for a number c: the weight scales."""
        if isinstance(other, Tensor) and other.ndim == 0 and not is_wrapped({"": other}):
            other = other.item()
        if not is_scalar(other) or isinstance(other, Tensor):
            raise VarianceError(
                f"a LogDensity is multiplied by plain numbers only, found {describe(other)}: the weight scales with the "
                "factor, so it must be known. Pass a float; the product of two log-densities has no law."
            )
        factor = float(other)
        foreign = tuple((chart, weight * factor) for chart, weight in self.foreign) if factor else ()
        return self._new(self.value * factor, self.weight * factor, foreign)

    def exp(self) -> Density:
        """exp self, a `Density` of the same weight."""
        return Density(self.chart, self.value.exp(), self.weight, self.at, self.foreign)


def _scalar(thing: Any, density: _Weighted, what: str) -> Scalar:
    """A number, or a plain tensor with one number for each element of the batch."""
    if is_scalar(thing):
        return plain_scalar(thing)
    if isinstance(thing, Tensor) and thing.shape == density.batch_shape:
        return thing
    raise VarianceError(
        f"cannot {what} {describe(density)} and {describe(thing)}: the rule is for densities at the same point and for "
        "numbers. Take "
        ".components if you mean the numbers."
    )


def determinant_weights(axes: Sequence[Axis], own: Chart) -> tuple[float, Weights]:
    """(weight in the space of `own`, weights in other spaces) of the determinant of a tensor with these two axes."""
    weight, foreign = 0.0, ()
    for axis in axes:
        step = -1.0 if axis.up else 1.0
        if axis.chart is None:
            continue
        if axis.chart == own:
            weight += step
        else:
            foreign = _combine(foreign, ((axis.chart, step),), 1.0)
    return weight, foreign


def _unflatten(cls: type[_Weighted]) -> Callable[[Any, Any], _Weighted]:
    def build(children: list[Any], context: Any) -> _Weighted:
        chart, weight, at, foreign = context
        return cls(chart, children[0], weight, at if at is not None else children[1], foreign)

    return build


def _flatten(tensor: _Weighted) -> tuple[list[Any], Any]:
    if is_wrapped(tensor.at.blocks) or tensor.at.batch_shape:
        return [tensor.value, tensor.at], (tensor.chart, tensor.weight, None, tensor.foreign)
    return [tensor.value], (tensor.chart, tensor.weight, tensor.at, tensor.foreign)


for _cls in (Density, LogDensity):
    register_pytree(_cls, _flatten, _unflatten(_cls))
