"""The derivative of outputs over a data set on plain numbers: J v, Jᵀ u, and the matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from geoad.curvature.sweep import Batch, Plans, sweep
from geoad.data import Batches
from geoad.errors import GeometryError
from geoad.kernels import products
from geoad.kernels.layered import Outputs, Rows
from geoad.kernels.linear import Repeated
from geoad.params import Blocks, Layout, add, first

__all__ = ["Derivative"]


class _Part(NamedTuple):
    """The products of one batch."""

    size: int
    push: Repeated
    pull: Repeated


class Derivative:
    """J of x ↦ (f(x, inputs of batch 1), f(x, inputs of batch 2), ...), at one point.

    What products at the same point share is kept, see `Repeated`, where the batches are the same tensors in every pass.

    Args:
        outputs: f.
        batches: the data; targets are left aside.
        x: the point.
        shape: (N, ..., c), that of all outputs together.
        max_memory: bytes for what is kept, and for intermediate results of `dense`.
    """

    def __init__(self, outputs: Outputs, batches: Batches, x: Blocks, shape: torch.Size, max_memory: int) -> None:
        self.outputs, self.batches, self.x, self.shape, self.max_memory = outputs, batches, x, shape, max_memory
        self.layout = Layout({name: block.shape for name, block in x.items()})
        self._kept: list[_Part] | None = None

    def _parts(self) -> Iterator[_Part]:
        if not self.batches.lasting:
            return (_part(self.outputs, self.x, size, inputs, 0) for size, inputs, _ in self.batches.sized())
        if self._kept is None:
            found = [(size, inputs) for size, inputs, _ in self.batches.sized()]
            room = self.max_memory // (2 * len(found))
            self._kept = [_part(self.outputs, self.x, size, inputs, room) for size, inputs in found]
        return iter(self._kept)

    def push(self, v: Blocks) -> Tensor:
        """J v, (*batch, N, ..., c)."""
        axes = len(self.layout.batch_shape(v))
        return torch.cat([part.push.batched(v, axes) for part in self._parts()], axes)

    def pull(self, u: Tensor) -> Blocks:
        """Jᵀ u for u (*batch, N, ..., c)."""
        axes, start = u.ndim - len(self.shape), 0
        total: Blocks | None = None
        for part in self._parts():
            term: Blocks = part.pull.batched(u.narrow(axes, start, part.size), axes)
            total = term if total is None else add(total, term)
            start += part.size
        assert total is not None
        return total

    def dense(self) -> Tensor:
        """J, (N·...·c, d): sample by sample in reverse mode, or column by column if there are few of them."""
        d, each = self.layout.dim, self.shape[1:].numel()
        if d <= each:
            eye = torch.eye(d, dtype=first(self.x).dtype, device=first(self.x).device)
            return self.push(self.layout.unravel(eye)).reshape(d, -1).mT
        found = _Written(first(self.x).new_empty(self.shape[0], each, d))
        self.sweep(found)
        return found.matrix.flatten(0, 1)

    def sweep(self, consumer: _Written | Kept) -> None:
        """Hand the rows of all outputs to `consumer`, chunk by chunk."""
        batches = (Batch(size, inputs, None) for size, inputs, _ in self.batches.sized())
        sweep(Plans(self.outputs, self.x), batches, lambda f, _: (_units(f), None), [consumer], max_memory=self.max_memory)

    def rows(self) -> list[Rows]:
        """The rows of all outputs, a few samples at a time, in the structure of layers."""
        kept = Kept()
        self.sweep(kept)
        return kept.rows


def _part(outputs: Outputs, x: Blocks, size: int, inputs: object, room: int) -> _Part:
    def fn(y: Blocks) -> Tensor:
        return outputs(y, inputs)

    push = Repeated(lambda: [lambda v: products.jvp(fn, x, v)[1]], room)
    pull = Repeated(lambda: [lambda u: products.vjp(fn, x)[1](u)], room)
    return _Part(size, push, pull)


def _units(f: Tensor) -> Tensor:
    """A seed for each output: (m, n, ..., c) with m = ...·c."""
    count = f.shape[1:].numel()
    eye = torch.eye(count, dtype=f.dtype, device=f.device).reshape(count, 1, *f.shape[1:])
    return eye.expand(count, *f.shape)


class _Written:
    """The rows in one tensor (N, m, d)."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.start = matrix, 0

    def add(self, rows: Rows, signs: Tensor | None) -> None:
        place = slice(self.start, self.start + rows.samples)
        for name, columns in rows.layout.offsets().items():
            self.matrix[place, :, columns] = rows.explicit(name).to(self.matrix.dtype)
        self.start += rows.samples

    def numbers_of_a_sample(self, rows: Rows) -> int:
        return rows.seeds * max(rows.layout.sizes)


class Kept:
    """The rows as they come."""

    def __init__(self) -> None:
        self.rows: list[Rows] = []

    def add(self, rows: Rows, signs: Tensor | None) -> None:
        """Keep them."""
        self.rows.append(rows)

    def numbers_of_a_sample(self, rows: Rows) -> int:
        """Nothing beside the rows."""
        return 0


def require_length(outputs: Tensor, size: int) -> None:
    """Refuse outputs that do not have one entry of their first axis for each sample."""
    if outputs.ndim == 0 or outputs.shape[0] != size:
        raise GeometryError(
            f"the network returned outputs of shape {tuple(outputs.shape)} for a batch of {size} samples. The outputs over "
            "data form a space if the samples come first, (n, ..., c); move that axis: "
            "GeoModule(net, forward=lambda net, x: net(x).movedim(1, 0))."
        )
