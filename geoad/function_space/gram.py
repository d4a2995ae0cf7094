"""Inner products of the rows of all samples, a pair of chunks at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from geoad.distributed.exchange import ProcessGroup
from geoad.distributed.rows import forms_of, in_turn
from geoad.kernels import kernel_gram
from geoad.kernels.kernel_gram import DifferentStructure, Features, Group, features, mirror
from geoad.kernels.memory import require_memory
from geoad.kernels.rows import Rows

__all__ = ["gram", "numbers_beside"]


def gram(chunks: Sequence[Rows], groups: Sequence[Group], room: int = 1 << 30, processes: ProcessGroup | None = None) -> Tensor:
    """R G⁻¹ Rᵀ for the rows R of samples with some seeds each, seeds fastest, symmetric to the last bit.

    Made of what went in and what came back of every layer; rows are multiplied out only where the metric or the network says
    so. The upper triangle of chunks is computed.

    Args:
        chunks: the rows; each chunk has seeds of its own number.
        groups: the blocks with the inverses of their metrics.
        room: bytes for what is kept of the chunks from one pair to the next.
        processes: where the other rows are, if `chunks` are those of this process. All get the whole result, in the order of
            the processes and the same to the last bit.
    """
    try:
        return _Gram(chunks, groups, room, structured=True).of(processes)
    except DifferentStructure:  # chunks of inputs of different forms
        return _Gram(chunks, groups, room, structured=False).of(processes)


def numbers_beside(groups: Sequence[Group], rows: Rows) -> int:
    """About how many numbers `gram` makes of the rows of a sample: they are multiplied out where a metric has no structure."""
    sizes = dict(zip(rows.layout.names, rows.layout.sizes, strict=True))
    general = (name for group in groups if group.explicit for name in group.names)
    return 3 * rows.seeds * sum(sizes[name] for name in general)


class _Block(NamedTuple):
    """Where the inner products of one chunk with others lie in the result."""

    place: slice
    samples: int
    seeds: int


class _Gram:
    """The features of chunks, made when they are needed and kept while there is room."""

    def __init__(self, chunks: Sequence[Rows], groups: Sequence[Group], room: int, structured: bool) -> None:
        self.chunks, self.groups, self.room, self.structured = chunks, groups, room, structured
        self.trivial = all(group.solve is None for group in groups)
        self.partners = sum(rows.samples for rows in chunks)
        self.kept: dict[tuple[int, bool], Features] = {}

    def made(self, i: int, dual: bool) -> Features:
        """The rows of a chunk, times G⁻¹ if `dual`."""
        key = (i, dual and not self.trivial)
        if key in self.kept:
            return self.kept[key]
        rows, structured = self.chunks[i], self.structured
        found = features(rows, self.groups, dual=key[1], partners=self.partners, structured=structured)
        size = found.numbers * found.terms[0].left.element_size()
        if size <= self.room:
            self.kept[key], self.room = found, self.room - size
        return found

    def of(self, processes: ProcessGroup | None) -> Tensor:
        """The result."""
        total = self._alone() if processes is None else self._shared(processes)
        mirror(total)
        return total

    def _alone(self) -> Tensor:
        blocks = _places([(rows.samples, rows.seeds) for rows in self.chunks])
        total = _empty(self.made(0, dual=False), blocks)
        for j, column in enumerate(blocks):
            theirs = self.made(j, dual=True)
            self.kept.pop((j, True), None)  # no other column needs it
            for i, row in enumerate(blocks[: j + 1]):
                _write(total, row, self.made(i, dual=False), column, theirs, upper=i == j)
        return total

    def _shared(self, processes: ProcessGroup) -> Tensor:
        """Own rows against those of all, which go round one chunk at a time; then the rows of all are put together."""
        call = f"the inner products of {self.chunks[0].layout.dim} parameters' rows"
        with processes.guarded(call):
            own = [self.made(i, dual=False) for i in range(len(self.chunks))]
        processes.agree(call)
        forms = forms_of(own, processes)
        if not forms.alike and self.structured:
            raise DifferentStructure
        sizes = [(samples, seeds) for chunks in forms.of for samples, seeds, _ in chunks]
        blocks = _places(sizes)
        first = sum(len(chunks) for chunks in forms.of[: processes.rank])
        mine = blocks[first : first + len(own)]
        with processes.guarded(call):
            total = _empty(own[0], blocks).zero_()
        columns: Iterator[Features] = in_turn(own, forms, processes, call)
        for column, theirs in zip(blocks, columns, strict=True):
            for i, row in enumerate(mine):
                _write(total, row, self.made(i, dual=True), column, theirs)
        return processes.sum([total], call)[0]


def _places(sizes: Sequence[tuple[int, int]]) -> list[_Block]:
    stops = list(accumulate(samples * seeds for samples, seeds in sizes))
    return [_Block(slice(stop - n * k, stop), n, k) for stop, (n, k) in zip(stops, sizes, strict=True)]


def _empty(like: Features, blocks: Sequence[_Block]) -> Tensor:
    size, one = blocks[-1].place.stop, like.terms[0].left
    remedy = "The dual is for few rows: solve by conjugate gradients, field(p).solve(w, damping=..., method=CG())."
    require_memory(size**2 * one.element_size(), f"the inner products of {size} rows", one, remedy)
    return one.new_empty(size, size)


def _write(total: Tensor, row: _Block, a: Features, column: _Block, b: Features, upper: bool = False) -> None:
    """The inner products of two chunks, in their place."""
    block = total.new_empty(row.samples, row.seeds, column.samples, column.seeds)
    kernel_gram.gram(block, a, b, upper=upper)
    total[row.place, column.place] = block.flatten(2).flatten(0, 1)
