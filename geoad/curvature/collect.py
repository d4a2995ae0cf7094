"""What becomes of the rows of all samples: one collector for each representation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import singledispatch

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.curvature.representations import (
    BlockDiagonal,
    Dense,
    Diagonal,
    LowRank,
    Mixed,
    QuasiDiagonal,
    Representation,
    chosen,
    grouped,
    numbered,
)
from geoad.errors import GeometryError
from geoad.kernels.gram import GramSum
from geoad.kernels.layers import Layer
from geoad.kernels.memory import require_memory
from geoad.kernels.rows import Plan, Rows
from geoad.kernels.squares import add_cross, add_squares, coupled, squared
from geoad.operators import LinearOperator
from geoad.params import Blocks, Layout, first

__all__ = [
    "Collector",
    "Parts",
    "Task",
    "accumulation_dtype",
    "arrangement",
    "collectors",
    "exact_blocks",
]

Parts = dict[tuple[str, ...], LinearOperator]
"""Group of blocks -> the operator on it."""


class Task:
    """What collectors need to know.

    Attributes:
        x: the point, for dtype and device.
        plan: the structure of the network.
        positive: all signs are +1, so that results are semidefinite.
        max_memory: bytes for intermediate results.
        again: the data are gone through again rather than keeping rows, so that sums are all there is to save.
    """

    def __init__(self, x: Blocks, plan: Plan, positive: bool, max_memory: int, again: bool = False) -> None:
        self.x, self.plan, self.positive, self.max_memory, self.again = x, plan, positive, max_memory, again

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device of the result."""
        return first(self.x)


class Collector(ABC):
    """Takes the rows of one sweep after another until it has what it needs.

    Attributes:
        stages: how often it needs a sum over all data; between them, `finished` says if that takes another sweep.
        stacked: its state holds rows of samples side by side instead of sums over samples.
    """

    stages: int = 1
    stacked: bool = False

    @abstractmethod
    def add(self, rows: Rows, signs: Tensor | None) -> None:
        """Take the rows (n, K) of a chunk, and their signs (K, n) where not all are +1."""

    def numbers_of_a_sample(self, rows: Rows) -> int:
        """How many numbers `add` needs for each sample beside the rows."""
        return 0

    def telling(self) -> Iterable[Tensor]:
        """Numbers to be looked at before more is made of what was taken in this stage (no eigenvectors of nan)."""
        return ()

    def squared(self, plan: Plan) -> frozenset[int]:
        """The uses of which `add` needs no more than Σ_k σ_k g_k²."""
        return frozenset()

    def finished(self) -> bool:
        """After a sweep: no other one is needed."""
        return True

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What has been taken so far in this stage, by name."""

    @abstractmethod
    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from the state of another collector of the same kind, or from the sum of several."""

    @abstractmethod
    def parts(self) -> Parts:
        """The operators."""


@singledispatch
def collectors(representation: Representation, layout: Layout, task: Task) -> list[Collector]:
    """The collectors of a representation for the blocks of `layout`."""
    raise GeometryError(f"{representation} is not made from the rows of samples.")


@collectors.register
def _(representation: Mixed, layout: Layout, task: Task) -> list[Collector]:
    groups = chosen(numbered(representation), layout)
    return [each for names, (_, inner) in groups for each in collectors(inner, layout.restrict(names), task)]


# -- dense blocks ------------------------------------------------------------------------------------------------------------


class _Grams(Collector):
    """One dense matrix for each group of blocks."""

    def __init__(self, layout: Layout, groups: list[tuple[str, ...]], task: Task) -> None:
        self.layouts = [layout.restrict(names) for names in groups]
        require_memory(sum(each.dim**2 for each in self.layouts) * task.like.element_size(), f"blocks of {groups}", task.like)
        self.task, self.sums = task, GramSum(layout, groups)

    def add(self, rows: Rows, signs: Tensor | None) -> None:
        self.sums.add(rows, signs)

    def numbers_of_a_sample(self, rows: Rows) -> int:
        return self.sums.numbers_of_a_sample(rows)

    def state(self) -> dict[str, Tensor]:
        return self.sums.state()

    def load(self, state: dict[str, Tensor]) -> None:
        self.sums.load(state)

    def parts(self) -> Parts:
        matrices = self.sums.matrices()
        return {
            layout.names: _block(layout, matrix.to(self.task.like.dtype))
            for layout, matrix in zip(self.layouts, matrices, strict=True)
        }


def _block(layout: Layout, matrix: Tensor) -> LinearOperator:
    """A matrix on blocks; of no numbers (an empty parameter) a diagonal, for LAPACK takes no such matrices."""
    return ops.Dense(layout, matrix, symmetric=True) if layout.dim else ops.Diagonal(layout, layout.unravel(matrix.diagonal()))


@collectors.register
def _(representation: Dense, layout: Layout, task: Task) -> list[Collector]:
    return [_Grams(layout, [layout.names], task)]


@collectors.register
def _(representation: BlockDiagonal, layout: Layout, task: Task) -> list[Collector]:
    return exact_blocks(layout, grouped(representation, layout), task)


def exact_blocks(layout: Layout, groups: list[tuple[str, ...]], task: Task) -> list[Collector]:
    """A collector of the dense blocks of groups."""
    return [_Grams(layout, groups, task)]


# -- low rank ----------------------------------------------------------------------------------------------------------------


_SIGNS = ""
"""The name of the signs among those of the blocks."""


class _Columns(Collector):
    """All rows as they are, or the best part of them of some rank."""

    stacked = True

    def __init__(self, representation: LowRank, layout: Layout, task: Task) -> None:
        self.rank, self.layout, self.task = representation.rank, layout, task
        self.rows: list[Blocks] = []
        self.signs: list[Tensor] = []
        self.taken = 0

    def add(self, rows: Rows, signs: Tensor | None) -> None:
        count = rows.samples * rows.seeds
        self.taken += count * self.layout.dim * self.task.like.element_size()
        require_memory(self.taken, f"{sum(map(len, self.signs)) + count} columns of {self.layout.dim} numbers", self.task.like)
        self.rows.append({name: rows.explicit(name).reshape(count, *shape) for name, shape in self.layout.items()})
        self.signs.append(self.task.like.new_ones(count) if signs is None else signs.mT.reshape(-1).to(self.task.like))

    def numbers_of_a_sample(self, rows: Rows) -> int:
        return rows.seeds * self.layout.dim

    def state(self) -> dict[str, Tensor]:
        if len(self.rows) != 1:
            self.rows = [{name: torch.cat([each[name] for each in self.rows]) for name in self.layout}]
            self.signs = [torch.cat(self.signs)]
        return self.rows[0] | {_SIGNS: self.signs[0]}

    def load(self, state: dict[str, Tensor]) -> None:
        self.rows = [{name: state[name] for name in self.layout}]
        self.signs = [state[_SIGNS]]
        self.taken = len(state[_SIGNS]) * self.layout.dim * self.task.like.element_size()

    def telling(self) -> Iterable[Tensor]:
        return (block for each in self.rows for block in each.values()) if self.rank is not None else ()

    def parts(self) -> Parts:
        dtype = self.task.like.dtype
        factors = {name: torch.cat([each[name] for each in self.rows]).to(dtype) for name in self.layout}
        signs = None if self.task.positive else torch.cat(self.signs)
        self.rows = []
        op = ops.LowRank(self.layout, factors, signs=signs)
        return {self.layout.names: op if self.rank is None else _truncated(op, self.rank)}


@collectors.register
def _(representation: LowRank, layout: Layout, task: Task) -> list[Collector]:
    return [_Columns(representation, layout, task)]


def _truncated(op: ops.LowRank, rank: int) -> LinearOperator:
    """The part of the largest |eigenvalues|."""
    values, vectors = ops.eigh(op, None, min(rank, op.dim), "magnitude")
    factors = op.layout.unravel((vectors * values.abs().sqrt()).mT.contiguous())
    return ops.LowRank(op.layout, factors, signs=None if op.signs is None else values.sign())


# -- diagonals ---------------------------------------------------------------------------------------------------------------


class _Squares(Collector):
    """The diagonal, and for a quasi-diagonal representation what couples biases to the weights of their units."""

    def __init__(self, layout: Layout, task: Task, layers: list[Layer]) -> None:
        self.layout, self.layers = layout, layers
        self.dtype, wide = task.like.dtype, accumulation_dtype(task.like.dtype)
        self.total = {name: task.like.new_zeros(shape, dtype=wide) for name, shape in layout.items()}
        self.cross = [torch.zeros_like(self.total[each.names[0]]) for each in layers]

    def add(self, rows: Rows, signs: Tensor | None) -> None:
        add_squares(self.total, rows, signs)
        for layer, cross in zip(self.layers, self.cross, strict=True):
            add_cross(cross, layer, rows, signs)

    def squared(self, plan: Plan) -> frozenset[int]:
        known = set(self.layers) <= set(coupled(plan, list(self.layout)))
        return squared(plan, self.layout) if known else frozenset()

    def state(self) -> dict[str, Tensor]:
        return {f"diagonal {name}": block for name, block in self.total.items()} | {
            f"cross {layer.weight}": cross for layer, cross in zip(self.layers, self.cross, strict=True)
        }

    def load(self, state: dict[str, Tensor]) -> None:
        self.total = {name: state[f"diagonal {name}"] for name in self.total}
        self.cross = [state[f"cross {layer.weight}"] for layer in self.layers]

    def parts(self) -> Parts:
        entries = {name: block.to(self.dtype) for name, block in self.total.items()}
        if not self.layers:
            return {self.layout.names: ops.Diagonal(self.layout, entries)}
        cross = {arrangement(each): block.to(self.dtype) for each, block in zip(self.layers, self.cross, strict=True)}
        return {self.layout.names: ops.QuasiDiagonal(self.layout, entries, cross)}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)


def arrangement(layer: Layer) -> ops.Arrangement:
    """How the blocks of a layer form matrices."""
    return ops.Arrangement(layer.weight, layer.bias, layer.transposed, layer.groups)


@collectors.register
def _(representation: Diagonal, layout: Layout, task: Task) -> list[Collector]:
    return [_Squares(layout, task, [])]


@collectors.register
def _(representation: QuasiDiagonal, layout: Layout, task: Task) -> list[Collector]:
    return [_Squares(layout, task, coupled(task.plan, list(layout)))]
