"""A tensor of any type: Jacobians between spaces, third covariant derivatives, frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from geoad import operators as ops
from geoad import transport
from geoad.charts import Chart, Point, same_manifold
from geoad.errors import BasePointError, ChartMismatchError, VarianceError
from geoad.params import Layout, is_wrapped, register_pytree
from geoad.tensors.base import HANDLERS, Axis, TypedTensor, describe
from geoad.tensors.densities import Density, LogDensity, determinant_weights
from geoad.tensors.rank1 import Covector, Rank1, Vector
from geoad.tensors.rank2 import Rank2, class_of

__all__ = ["GeoTensor", "as_general", "build", "dense_of"]


class GeoTensor(TypedTensor):
    """Dense components (*batch, n_1, ..., n_k), each axis raveled in the order of its chart and with its own type.

    ``chart`` and ``at`` are those of the base manifold (the parameters); axes may belong to other spaces too, for instance
    the outputs of a network: the Jacobian of a map f is of type [out^, θ_].
    """

    __slots__ = ("_axes", "data")

    data: Tensor
    _axes: tuple[Axis, ...]

    def __init__(self, data: Tensor, axes: Sequence[Axis], at: Point) -> None:
        self._put(chart=at.chart, at=at, data=data, _axes=tuple(axes))

    @property
    def axes(self) -> tuple[Axis, ...]:
        return self._axes

    @property
    def batch_shape(self) -> torch.Size:
        return self.data.shape[: self.data.ndim - len(self._axes)]

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    def to_dense(self) -> Tensor:
        """The components, one raveled axis for each index."""
        return self.data

    ravel = to_dense

    @property
    def components(self) -> Any:
        """The plain numbers; axes of free charts with one block get the shape of that block."""
        shape = list(self.batch_shape)
        for axis in self._axes:
            if axis.chart is not None and axis.chart.plain:
                layout = axis.chart.layout
                shape.extend(layout[layout.names[0]])
            else:
                shape.append(axis.size)
        return self.data.reshape(shape)

    def __repr__(self) -> str:
        indices = ", ".join(str(axis) for axis in self._axes)
        batch = f", batch={tuple(self.batch_shape)}" if self.batch_shape else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"GeoTensor([{indices}], {tuple(axis.size for axis in self._axes)}{batch}, {dtype}, {self.device})"

    def _to_chart(self, chart: Chart) -> Self:
        self.at.check_fresh()
        if not any(axis.chart is not None and same_manifold(axis.chart, chart) for axis in self._axes) and (
            not same_manifold(self.chart, chart)
        ):
            raise ChartMismatchError(
                f"cannot move {describe(self)} to chart '{chart.name}': none of its axes "
                f"[{', '.join(map(str, self._axes))}] belongs "
                "to that manifold. Only axes of the target chart's own manifold move."
            )
        if not same_manifold(self.chart, chart):
            raise BasePointError(
                f"cannot move the axes of {describe(self)} that belong to the space of chart '{chart.name}': the base "
                "point there "
                "is not known. Contract them, or move the components yourself."
            )
        ups = [axis.up if axis.chart == self.chart else None for axis in self._axes]
        axes = [Axis(chart, axis.up, chart.dim) if axis.chart == self.chart else axis for axis in self._axes]
        transport.require_law(self.chart, chart, ups.count(True), ups.count(False), describe(self))
        return type(self)(transport.dense(self.data, ups, self.at, chart, checked=True), axes, self.at.to(chart))

    def _cast(self, dtype: torch.dtype, device: torch.device) -> Self:
        return type(self)(self.data.to(device, dtype), self._axes, self.at.to(dtype=dtype, device=device))

    def map_numbers(self, fn: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(fn(self.data), self._axes, self.at)

    def carry(self, *, to: Point, chart: Chart) -> Self:
        """The object at point `to` with the same components *in `chart`*."""
        here = self.to(chart)
        return type(self)(here.data, here._axes, to.to(chart)).to(to.chart)

    def applied(self, argument: Rank1) -> Any:
        """T x over the last index without the dense numbers, for classes that do not hold them; None where they are at hand."""
        return None

    def mv(self, other: TypedTensor) -> Any:
        """Contract the last index with the first of `other`: the same as ``self @ other``."""
        return self @ other

    @property
    def mT(self) -> Self:
        """The transpose of a tensor with two indices."""
        if len(self._axes) != 2:
            raise VarianceError(f"the transpose is for two indices, {describe(self)} has {len(self._axes)}. Use torch.permute.")
        return type(self)(self.data.mT, self._axes[::-1], self.at)

    T = mT

    # -- two indices --------------------------------------------------------------------------------------------------------

    def _square(self, what: str) -> tuple[Axis, Axis]:
        if len(self._axes) != 2 or self._axes[0].size != self._axes[1].size:
            raise VarianceError(
                f"{what} is for tensors with two indices of the same length, found {self!r}. For the Jacobian J of a map "
                "between spaces of "
                "different dimension use J.mT @ G @ J with a metric G of the target."
            )
        return self._axes[0], self._axes[1]

    def inverse(self) -> Any:
        """The inverse, of type [b*, a*] for a tensor of type [a, b]: for ∂ψ/∂θ this is ∂θ/∂ψ."""
        a, b = self._square("the inverse")
        inverse = ops.inverse(ops.Dense(Layout({"": (a.size,)}), self.data))  # raises if it is singular
        return build(ops.to_dense(inverse), [b.dual(), a.dual()], self.at)

    def slogdet(self) -> tuple[Tensor, Any]:
        """(sign, log |det|): a `LogDensity` with a weight in each space, +1 for a lower and -1 for an upper index.

        The sign depends on the orientation of the charts, as far as they differ.
        """
        axes = self._square("the determinant")
        sign, value = ops.slogdet(ops.Dense(Layout({"": (axes[0].size,)}), self.data))
        weight, foreign = determinant_weights(axes, self.chart)
        return sign, LogDensity(self.chart, value, weight, self.at, foreign)

    def logdet(self) -> LogDensity:
        """log |det|, see `slogdet`."""
        return self.slogdet()[1]

    def det(self) -> Density:
        """|det|, a `Density` with a weight in each space: |det ∂ψ/∂θ| has weight 1 in θ and -1 in ψ."""
        return self.slogdet()[1].exp()

    def trace(self) -> Tensor:
        """The contraction of both indices, which must be dual to one another."""
        return HANDLERS[torch.trace](self)

    def solve(self, right: TypedTensor) -> Any:
        """x with A x = b, for b of the type of the first index."""
        return HANDLERS[torch.linalg.solve](self, right)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.data, self._axes, self.at)


def dense_of(tensor: TypedTensor) -> Tensor:
    """The dense components (*batch, n_1, ..., n_k) of any typed object, in its chart."""
    match tensor:
        case Rank1():
            return tensor.ravel()
        case Rank2():
            ops.require_small(tensor.op, "a general contraction")
            return tensor.to_dense()
        case GeoTensor():
            return tensor.data
        case _:
            return tensor.components  # pyright: ignore


def as_general(tensor: TypedTensor) -> GeoTensor:
    """Any typed object as a `GeoTensor`."""
    return tensor if isinstance(tensor, GeoTensor) else GeoTensor(dense_of(tensor), tensor.axes, tensor.at)


def build(data: Tensor, axes: Sequence[Axis], at: Point) -> Any:
    """The object with these axes, in its most special class; a plain tensor if no typed axis remains."""
    if all(axis.chart is None for axis in axes):
        return data
    chart = axes[0].chart
    if chart is not None and chart is not at.chart and chart != at.chart and all(axis.chart == chart for axis in axes):
        at = at.to(chart) if same_manifold(chart, at.chart) else at  # the image of a change of chart
    own = all(axis.chart is not None and axis.chart == at.chart for axis in axes)
    if own and len(axes) == 1:
        return (Vector if axes[0].up else Covector)(at.chart, at.chart.layout.unravel(data), at)
    if own and len(axes) == 2:
        cls, ups = class_of((axes[0].up, axes[1].up))
        op = ops.Dense(at.chart.layout, data, symmetric=ups[0] == ups[1] and ops.is_symmetric(data))
        return cls(at.chart, op, at, ups=ups)
    return GeoTensor(data, axes, at)


def _flatten(tensor: GeoTensor) -> tuple[list[Any], Any]:
    if is_wrapped(tensor.at.blocks) or tensor.at.batch_shape:
        return [tensor.data, tensor.at], (tensor.axes, None)
    return [tensor.data], (tensor.axes, tensor.at)


register_pytree(
    GeoTensor,
    _flatten,
    lambda children, context: GeoTensor(children[0], context[0], context[1] if context[1] is not None else children[1]),
)
