"""Kernel matrices block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from geoad.curvature.sweep import progress_bar
from geoad.data import refuse_spoilt
from geoad.kernels.kernel_gram import DifferentStructure, Features, Group, gram, mirror, squared_norms
from geoad.kernels.memory import require_memory
from geoad.params import Blocks, first
from geoad.tangent.data import Chunk, Data, Form, chunks

__all__ = ["Request", "kernel_matrix", "norms", "row_blocks"]


@dataclass(frozen=True)
class Request:
    """What a kernel matrix is made of.

    Attributes:
        left: the data of the rows.
        right: the data of the columns; the same object for a kernel of one data set.
        groups: the blocks of the network with the metric at the point.
        contract: what becomes of the outputs, see `geoad.ntk`.
        max_memory: bytes for everything beside the result.
        progress: show a bar over the samples of the rows.
    """

    left: Data
    right: Data
    groups: list[Group]
    contract: str
    max_memory: int
    progress: bool

    @property
    def symmetric(self) -> bool:
        """Rows and columns are the same."""
        return self.left is self.right

    def bar(self) -> AbstractContextManager[Any]:
        """A bar over the samples of the rows, or None."""
        return progress_bar(self.progress, self.left.batches.total if self.progress else None)


def kernel_matrix(request: Request, theta: Blocks) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """K, and the outputs of both data sets in parts.

    K has the axes (n, K, m, K') with K outputs of a sample; (n, m) where the outputs are contracted (other places than those of
    the last axis count as samples); (c, n, m) where only equal outputs meet.
    """
    try:
        return _matrix(request, theta, structured=True)
    except DifferentStructure:
        return _matrix(request, theta, structured=False)


def _matrix(request: Request, theta: Blocks, structured: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    columns = _Columns(request, theta, structured)
    total: Tensor | None = None
    seen: list[Tensor] = []
    with request.bar() as bar:
        for chunk in columns.of_rows():
            seen.append(chunk.outputs)
            for other in columns.from_place(chunk.place.start if request.symmetric else 0):
                total = _empty(request, theta, chunk, other) if total is None else total
                same = request.symmetric and chunk.place == other.place
                gram(_block(total, chunk, other), chunk.plain, other.dual, upper=same)
            if bar is not None:
                bar.update(chunk.place.stop - chunk.place.start)
    assert total is not None
    if request.symmetric:
        mirror(total if total.ndim == 3 else total.view(total.shape[0] * total.shape[1], -1))
    _require_finite(_telling(total, request.symmetric), request, theta)
    shaped = total if total.ndim == 3 or request.contract == "none" else total[:, 0, :, 0]
    return shaped.to(first(theta).dtype), seen, columns.outputs()


def _telling(total: Tensor, symmetric: bool) -> Tensor:
    """Numbers that are finite if all of them are: rows of finite length have finite inner products."""
    if not symmetric:
        return total.flatten(1).sum(1, dtype=torch.promote_types(total.dtype, torch.float64))
    square = total if total.ndim == 3 else total.view(total.shape[0] * total.shape[1], -1)
    return square.diagonal(dim1=-2, dim2=-1)


def _require_finite(numbers: Tensor, request: Request, theta: Blocks) -> None:
    """Raise if some numbers that were made of a kernel are not finite."""
    if not bool(numbers.isfinite().all()):
        refuse_spoilt("the tangent kernel", theta, request.left.batches, request.right.batches, targets=False)


def row_blocks(request: Request, theta: Blocks) -> Iterator[tuple[slice, Tensor]]:
    """(samples, their rows of K), one block after another: no more is held than a block and what `max_memory` says."""
    done, telling = 0, list[Tensor]()
    with request.bar() as bar:
        for structured in (True, False):
            columns = _Columns(request, theta, structured)
            try:
                for chunk in columns.of_rows(done):
                    for part in _parts(request, theta, chunk, columns.kept is None):
                        block = _rows(request, theta, columns, part)
                        telling.append(_telling(block, False).sum())
                        yield part.place, block
                        done = part.place.stop
                        if bar is not None:
                            bar.update(part.place.stop - part.place.start)
                break
            except DifferentStructure:
                continue
    _require_finite(torch.stack(telling), request, theta)


_PASSES = 4
"""How many times more often columns are made, at most, for smaller blocks."""


def _parts(request: Request, theta: Blocks, chunk: Chunk, made_anew: bool) -> Iterator[Chunk]:
    """Fewer samples: as many as have rows that fit into the memory, but not many more passes over the columns."""
    each, count = _per_sample(chunk, chunk.plain), chunk.place.stop - chunk.place.start
    seeds = chunk.plain.seeds * (1 if request.contract == "diagonal" else chunk.plain.seeds)
    width = each * seeds * request.right.batches.total * each * max(4, first(theta).element_size())
    step = max(1, request.max_memory // (2 * max(1, width)), -(-count // _PASSES) if made_anew else 1)
    if step >= count:
        yield chunk
        return
    for low in range(0, count, step):
        own = slice(low, min(low + step, count))
        features = [side.part(_places(own, each)) for side in (chunk.plain, chunk.dual)]
        place = slice(chunk.place.start + own.start, chunk.place.start + own.stop)
        yield Chunk(place, chunk.outputs[own], features[0], features[1])


def _rows(request: Request, theta: Blocks, columns: _Columns, chunk: Chunk) -> Tensor:
    """All columns for the samples of a chunk."""
    block: Tensor | None = None
    here = replace(chunk, place=slice(0, chunk.place.stop - chunk.place.start))
    for other in columns.from_place(0):
        block = _empty(request, theta, chunk, other, rows=chunk.plain.samples) if block is None else block
        gram(_block(block, here, other), chunk.plain, other.dual)
    assert block is not None
    shaped = block if block.ndim == 3 or request.contract == "none" else block[:, 0, :, 0]
    return shaped.to(first(theta).dtype)


def norms(request: Request, theta: Blocks) -> Tensor:
    """The diagonal of K, (n, K)."""
    form = Form(request.groups, "none", True, request.max_memory // 2)
    found = torch.cat([squared_norms(chunk.plain, chunk.dual) for chunk in chunks(request.left, theta, form)])
    _require_finite(found, request, theta)
    return found.to(first(theta).dtype)


class _Columns:
    """The chunks of both sides: all are held where they fit, or else made anew for each chunk of the rows."""

    def __init__(self, request: Request, theta: Blocks, structured: bool) -> None:
        self.request, self.theta = request, theta
        self.form = Form(request.groups, request.contract, structured, request.max_memory // 4)
        self.kept: list[Chunk] | None = None
        self.seen: dict[int, Tensor] = {}
        self._keep()

    def _keep(self) -> None:
        room, width = self.request.max_memory // 2, max(4, first(self.theta).element_size())
        kept: list[Chunk] = []
        for chunk in self._made(self.request.right, 0, self.request.left.batches.total):
            kept.append(chunk)
            numbers = chunk.plain.numbers + (chunk.dual.numbers if chunk.dual is not chunk.plain else 0)
            room -= numbers * width
            self.seen[chunk.place.start] = chunk.outputs
            if room < 0:
                return
        self.kept = kept

    def _made(self, data: Data, start: int, partners: int) -> Iterator[Chunk]:
        return chunks(data, self.theta, self.form, start, partners)

    def of_rows(self, start: int = 0) -> Iterator[Chunk]:
        """The chunks of the rows from a sample on."""
        if self.request.symmetric and self.kept is not None and start == 0:
            yield from self.kept
        else:
            yield from self._made(self.request.left, start, self.request.right.batches.total)

    def from_place(self, start: int) -> Iterator[Chunk]:
        """The chunks of the columns that begin at `start` or later."""
        if self.kept is not None:
            yield from (chunk for chunk in self.kept if chunk.place.start >= start)
            return
        for chunk in self._made(self.request.right, start, self.request.left.batches.total):
            self.seen[chunk.place.start] = chunk.outputs
            yield chunk

    def outputs(self) -> list[Tensor]:
        """The outputs of the columns, in order."""
        return [self.seen[start] for start in sorted(self.seen)]


def _per_sample(chunk: Chunk, features: Features) -> int:
    """How many rows of the kernel there are for a sample: places, where outputs are contracted."""
    return features.samples // max(1, chunk.place.stop - chunk.place.start)


def _empty(request: Request, theta: Blocks, chunk: Chunk, other: Chunk, rows: int | None = None) -> Tensor:
    n = request.left.batches.total * _per_sample(chunk, chunk.plain) if rows is None else rows
    m = request.right.batches.total * _per_sample(other, other.dual)
    a, b = chunk.plain.seeds, other.dual.seeds
    shape = (a, n, m) if request.contract == "diagonal" else (n, a, m, b)
    like = first(theta)
    dtype = torch.promote_types(like.dtype, torch.float32)
    remedy = "Go through its rows, field.blocks(p), contract the outputs, contract='trace', or take representation='implicit'."
    require_memory(prod(shape) * dtype.itemsize, f"a kernel matrix with the axes {shape}", like, remedy)
    return like.new_empty(shape, dtype=dtype)


def _block(total: Tensor, chunk: Chunk, other: Chunk) -> Tensor:
    """The view of the entries for two chunks."""
    rows, columns = _places(chunk.place, _per_sample(chunk, chunk.plain)), _places(other.place, _per_sample(other, other.dual))
    return total[:, rows, columns] if total.ndim == 3 else total[rows, :, columns]


def _places(place: slice, each: int) -> slice:
    return slice(place.start * each, place.stop * each)
