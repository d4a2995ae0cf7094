"""Bilinear forms, metrics, cometrics and endomorphisms: two typed axes around an operator.

The numbers stay in the chart where they were made (``home``); ``chart`` says how the object is seen. Moving it costs
nothing, products move their argument home and the result back, and everything invariant (trace, eigenvalues, solves,
random roots) is computed at home and is therefore the same number in every chart.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from geoad import operators as ops
from geoad import transport
from geoad.charts import Chart, Point, same_space
from geoad.errors import GeometryError, NotADiffeomorphismError, VarianceError
from geoad.operators import LinearOperator
from geoad.params import Blocks, insert_axes, map_blocks
from geoad.tensors.base import HANDLERS, Axis, TypedTensor, describe, require_same_numbers, require_same_place
from geoad.tensors.moved import Moved
from geoad.tensors.rank1 import Covector, Rank1, Vector

__all__ = ["Rank2", "common_home"]


class Rank2(TypedTensor):
    """Two typed axes of one manifold, e.g. the (1,1) tensor of type [_,^] that acts on covectors.

    Attributes:
        ups: variance of the first and the second axis (True is up).
        home: the chart in which ``op`` holds the numbers.
    """

    __slots__ = ("home", "op", "ups")

    kind: ClassVar[tuple[bool, bool] | None] = None
    home: Chart
    op: LinearOperator
    ups: tuple[bool, bool]

    def __init__(
        self, chart: Chart, op: LinearOperator, at: Point, *, home: Chart | None = None, ups: tuple[bool, bool] | None = None
    ) -> None:
        self._put(chart=chart, op=op, at=at, home=home or chart, ups=ups or self.kind)

    # -- type and numbers ----------------------------------------------------------------------------------------------

    @property
    def axes(self) -> tuple[Axis, ...]:
        dim = self.chart.dim
        return tuple(Axis(self.chart, up, dim) for up in self.ups)

    @property
    def batch_shape(self) -> torch.Size:
        own, points = ops.batch_shape(self.op), self.at.batch_shape
        return own if len(own) >= len(points) else points

    @property
    def dtype(self) -> torch.dtype:
        return self.op.like.dtype

    @property
    def device(self) -> torch.device:
        return self.op.like.device

    @property
    def operator(self) -> LinearOperator:
        """The operator on plain blocks in this chart; a lazy congruence where the object was made in another one."""
        return self.operator_in(self.chart)

    def operator_in(self, chart: Chart) -> LinearOperator:
        """The operator on plain blocks in `chart`, in its structure where the map keeps it."""
        if chart == self.home:
            return self.op
        return Moved.of(self.op, self.ups, self.at.to(self.home), chart)

    def to_dense(self) -> Tensor:
        """The matrix in this chart, shape (*batch, d, d), in the order of the chart."""
        home = ops.densify(self.op).matrix
        if home.ndim - 2 < len(self.at.batch_shape):
            home = home.expand(*self.at.batch_shape, *home.shape)
        if self.chart == self.home:
            return home
        return transport.dense(home, self.ups, self.at.to(self.home), self.chart)

    ravel = to_dense

    @property
    def components(self) -> Any:
        """The plain numbers: shape (*s, *s) for a free chart with one block of shape s, else dicts [row][column].

        Refused above a size for matrix-free objects; use ``.operator`` there.
        """
        ops.require_small(self.op, "components")
        layout, matrix = self.chart.layout, self.to_dense()
        batch = matrix.shape[:-2]
        if self.chart.plain:
            shape = layout[layout.names[0]]
            return matrix.reshape((*batch, *shape, *shape))
        slices = layout.offsets()
        return {
            row: {
                column: matrix[..., slices[row], slices[column]].reshape((*batch, *layout[row], *layout[column]))
                for column in layout.names
            }
            for row in layout.names
        }

    def __repr__(self) -> str:
        made = "" if self.chart == self.home else f", made in '{self.home.name}'"
        dtype = str(self.dtype).removeprefix("torch.")
        batch = f", batch={tuple(self.batch_shape)}" if self.batch_shape else ""
        structure = type(self.op).__name__.lower()
        name = type(self).__name__ if self.kind is not None else f"Rank2[{''.join('_^'[up] for up in self.ups)}]"
        return f"{name}('{self.chart.name}', dim={self.chart.dim}{batch}, {structure}{made}, {dtype}, {self.device})"

    # -- moving ----------------------------------------------------------------------------------------------------------

    def _like(self, op: LinearOperator, *, cls: type[Rank2] | None = None, ups: tuple[bool, bool] | None = None) -> Any:
        return (cls or type(self))(self.chart, op, self.at, home=self.home, ups=ups or (None if cls else self.ups))

    def _to_chart(self, chart: Chart) -> Self:
        self.at.check_fresh()
        if same_space(self.chart, chart):
            return type(self)(chart, self.op, self.at.to(chart), home=self.home, ups=self.ups)
        return HANDLERS["cross"](self, chart)

    def require_own_space(self, what: str) -> None:
        """Raise `NotADiffeomorphismError` if the object is seen in redundant coordinates, where `what` does not exist."""
        if not same_space(self.home, self.chart):
            raise NotADiffeomorphismError(
                f"{what} of {describe(self)} was asked in redundant coordinates of '{self.home.name}': there it is singular, "
                "for vertical directions do not change the network, and what remains is a quotient. Use "
                f"geoad.quotient_logdet(B, G), or take it in the other chart: T.to({self.home.name})."
            )

    def map_numbers(self, fn: Callable[[Tensor], Tensor]) -> Self:
        return self._like(ops.map_numbers(self.op, fn))

    def _cast(self, dtype: torch.dtype, device: torch.device) -> Self:
        if dtype == self.dtype and device == self.device:
            return self
        op = self.op
        if not op.materialised:
            ops.require_small(op, "changing the dtype or device of a matrix-free object")
            op = ops.densify(op)
        op = ops.map_numbers(op, lambda t: t.to(device, dtype))
        at = self.at.to(dtype=dtype, device=device)
        return type(self)(self.chart, op, at, home=self.home, ups=self.ups)

    def carry(self, *, to: Point, chart: Chart) -> Self:
        """The object at point `to` with the same components *in `chart`*."""
        op = self.operator_in(chart)
        if not op.materialised:
            ops.require_small(op, "carrying a matrix-free object to another point")
            op = ops.densify(op)
        there = type(self)(chart, op, to.to(chart), home=chart, ups=self.ups)
        return there.to(to.chart)

    def materialise(self) -> Self:
        """The same object with its matrix stored (at home): it no longer holds on to functions and data."""
        return self._like(ops.densify(self.op))

    # -- products --------------------------------------------------------------------------------------------------------

    def mv(self, other: Rank1) -> Any:
        """Contract the second axis with `other`: the same as ``self @ other``."""
        if not isinstance(other, Rank1) or other.up == self.ups[1]:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise VarianceError(_wrong_argument(self, other))
        if self.at is not other.at:
            require_same_place(self, other, "contract")
        try:
            return self._applied(other)
        except RuntimeError as error:
            require_same_numbers(self, other, "contract", error)
            raise

    def _applied(self, other: Rank1) -> Any:
        result = Vector if self.ups[0] else Covector
        chart, home, op = self.chart, self.home, self.op
        if chart is home:
            single = type(op) is ops.Dense and op.matrix.ndim == 2
            return result(chart, op.mv(other.blocks) if single else product(self, other.blocks), other.at)
        argument = other.to(home)
        return result(home, product(self, argument.blocks), argument.at).to(chart)

    def compose(self, other: Rank2) -> Any:
        """Contract the second axis with the first of `other`: the same as ``self @ other``."""
        if not isinstance(other, Rank2) or self.ups[1] == other.ups[0]:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise VarianceError(_wrong_argument(self, other))
        require_same_place(self, other, "contract")
        home, a, b = common_home(self, other)
        cls, ups = class_of((self.ups[0], other.ups[1]))
        return cls(self.chart, ops.compose(a, b), self.at, home=home, ups=ups)

    @property
    def mT(self) -> Any:
        """The transpose: axes exchanged."""
        cls, ups = class_of((self.ups[1], self.ups[0]))
        keep = type(self) if self.ups[0] == self.ups[1] else cls
        return keep(self.chart, ops.transpose(self.op), self.at, home=self.home, ups=ups)

    T = mT

    def diagonal(self, *_: Any) -> Any:
        """Refused: the diagonal entries of a tensor mean something else in every chart."""
        raise VarianceError(
            f"the diagonal of {describe(self)} was asked for: a diagonal is no tensor, its entries belong to the chart. With "
            "respect to a metric there are G.trace(B) and geoad.eigh(B, metric=G); for the plain entries in this chart use "
            "geoad.operators.diagonal(T.operator)."
        )

    def to_scipy(self) -> Any:
        """The components in this chart as a ``scipy.sparse.linalg.LinearOperator``, in the raveled order of the chart.

        Products only: nothing of size d × d is made.
        """
        return ops.to_scipy(self.operator)

    def __reduce__(self) -> tuple[Any, ...]:
        if not self.op.materialised:
            _require_picklable(self)
        return _restore, (type(self), self.chart, self.op, self.at, self.home, self.ups)


def _restore(cls: type[Rank2], chart: Chart, op: LinearOperator, at: Point, home: Chart, ups: tuple[bool, bool]) -> Rank2:
    return cls(chart, op, at, home=home, ups=ups)


def _require_picklable(tensor: Rank2) -> None:
    try:
        pickle.dumps(tensor.op)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise GeometryError(
            f"cannot pickle {describe(tensor)}: it is matrix-free and holds on to functions that cannot be pickled "
            f"({error}). Store "
            "its matrix first: T.materialise()."
        ) from error


def for_batch(tensor: Rank2, blocks: Blocks) -> LinearOperator:
    """The operator of `tensor` with its batch axes placed so that they broadcast with those of `blocks`.

    The batch axes of the base point come first in both; further ones broadcast as in torch.
    """
    wanted, own = len(tensor.home.layout.batch_shape(blocks)), len(ops.batch_shape(tensor.op))
    points = len(tensor.at.batch_shape)
    if not points or not own or wanted <= own:
        return tensor.op
    return ops.map_numbers(tensor.op, lambda stored: insert_axes(stored, points, wanted - own))


def product(tensor: Rank2, blocks: Blocks) -> Blocks:
    """A v under the batch axes of both."""
    op, layout = tensor.op, tensor.home.layout
    wanted, own, points = len(layout.batch_shape(blocks)), len(ops.batch_shape(op)), len(tensor.at.batch_shape)
    if op.materialised:
        if points and wanted < own:
            blocks = map_blocks(lambda block: insert_axes(block, points, own - wanted), blocks)
        return for_batch(tensor, blocks).mv(blocks)
    mapped: Callable[[Blocks], Blocks] = op.mv
    for _ in range(wanted - max(own, points)):
        mapped = torch.func.vmap(mapped, in_dims=points, out_dims=points)
    return mapped(blocks)


def common_home(a: Rank2, b: Rank2) -> tuple[Chart, LinearOperator, LinearOperator]:
    """A chart and both operators in it: the shared home, or the root of their space (the reference chart)."""
    if a.home == b.home:
        return a.home, a.op, b.op
    # under a map that cannot be undone the chart in which both are seen is the only one that is sure to serve both
    home = a.home.space if same_space(a.home, b.home) else a.chart
    return home, a.operator_in(home), b.operator_in(home)


CLASSES: dict[tuple[bool, bool], type[Rank2]] = {}
"""Which class stands for which pair of variances; filled by `geoad.tensors.forms`."""


def class_of(ups: tuple[bool, bool]) -> tuple[type[Rank2], tuple[bool, bool]]:
    """The class for a pair of variances."""
    return CLASSES.get(ups, Rank2), ups


def _wrong_argument(tensor: Rank2, other: object) -> str:
    second = "upper" if tensor.ups[1] else "lower"
    wanted = "a Covector (or another lower index)" if tensor.ups[1] else "a Vector (or another upper index)"
    hint = "convert it with metric.sharp / metric.flat"
    if isinstance(other, TypedTensor) and not isinstance(other, (Rank1, Rank2)):
        hint = "use torch.einsum for general tensors"
    elif isinstance(other, Tensor):
        hint = "give the numbers their type first: chart.vector(x, at=p) or chart.covector(x, at=p)"
    return (
        f"cannot contract the second index of {describe(tensor)} (a {second} index) with {describe(other)}: it takes {wanted}. "
        f"A sum over two indices of the same variance depends on the chart; insert a metric, or {hint}."
    )
