"""The derivative of outputs over a data set on plain numbers: J v, Jᵀ u, and the matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geoad.curvature.likelihoods.roots import Seeds
from geoad.curvature.sweep import Batch, Plans, Portion, sweep
from geoad.data import Batches, refuse_spoilt, take
from geoad.kernels import products
from geoad.kernels.finite import FirstLook
from geoad.kernels.layered import Outputs, linearize
from geoad.kernels.linear import Repeated
from geoad.kernels.memory import MOST, even, fitting, report
from geoad.kernels.rows import Plan, Rows
from geoad.params import Blocks, Layout, add, first

__all__ = ["Derivative", "rows_of"]


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
        blame = functools.partial(refuse_spoilt, "the derivative of the outputs", x, batches, targets=False)
        self._looks = FirstLook(blame), FirstLook(blame)

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
        pushed = torch.cat([part.push.batched(v, axes) for part in self._parts()], axes)
        self._looks[0](v, {"": pushed})
        return pushed

    def pull(self, u: Tensor) -> Blocks:
        """Jᵀ u for u (*batch, N, ..., c)."""
        axes, start = u.ndim - len(self.shape), 0
        total: Blocks | None = None
        for part in self._parts():
            term: Blocks = part.pull.batched(u.narrow(axes, start, part.size), axes)
            total = term if total is None else add(total, term)
            start += part.size
        assert total is not None
        self._looks[1]({"": u}, total)
        return total

    def dense(self) -> Tensor:
        """J, (N·...·c, d): sample by sample in reverse mode, or column by column if there are few of them."""
        d, each = self.layout.dim, self.shape[1:].numel()
        if d <= each:
            eye = torch.eye(d, dtype=first(self.x).dtype, device=first(self.x).device)
            return self.push(self.layout.unravel(eye)).reshape(d, -1).mT
        found = first(self.x).new_empty(self.shape[0], each, d)
        batches = (Batch(size, inputs, None) for size, inputs, _ in self.batches.sized())
        sweep(Plans(self.outputs, self.x), batches, _each_output, [_Written(found)], max_memory=self.max_memory)
        self._looks[0]({}, {"": found})
        return found.flatten(0, 1)

    def rows(self, beside: Numbers | None = None) -> Iterator[Rows]:
        """The rows of all outputs, a few samples at a time, in the structure of layers; see `rows_of`."""
        batches = (Batch(size, inputs, None) for size, inputs, _ in self.batches.sized())
        plans = Plans(self.outputs, self.x)
        return (rows for rows, _ in rows_of(plans, batches, lambda f, _: (_units(f), None), self.max_memory, beside))


def _each_output(f: Tensor, _: Any) -> Seeds:
    return Seeds.of_diagonal(torch.ones_like(f))


class _Written:
    """Rows, written down as those of one output after another of one sample after another: (N, K, d)."""

    def __init__(self, result: Tensor) -> None:
        self.result, self.samples, self.seeds = result, slice(0, 0), 0

    def add(self, rows: Rows, signs: Tensor | None) -> None:
        """Write the rows of the next outputs of the same samples, or of the first ones of the next."""
        if not rows.further:
            self.samples, self.seeds = slice(self.samples.stop, self.samples.stop + rows.samples), 0
        seeds = slice(self.seeds, self.seeds + rows.seeds)
        self.seeds = seeds.stop
        for name, columns in rows.layout.offsets().items():
            self.result[self.samples, seeds, columns] = rows.explicit(name).to(self.result.dtype)

    def numbers_of_a_sample(self, rows: Rows) -> int:
        """The rows of a block, once more."""
        return rows.seeds * max(rows.layout.sizes)

    def squared(self, plan: Plan) -> frozenset[int]:
        """None: the rows themselves are written."""
        return frozenset()


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


Numbers = Callable[[Rows], int]
"""How many numbers are needed for each sample, judged by the rows of some."""


def rows_of(
    plans: Plans,
    batches: Iterable[Batch],
    seeds: Callable[[Tensor, Any], Portion],
    max_memory: int,
    beside: Numbers | None = None,
) -> Iterator[tuple[Rows, Portion]]:
    """The rows sᵀJ of some samples after another, each with its seeds; a sample is never divided.

    So many samples are taken together that the rows, and what is made `beside` them, stay within `max_memory` bytes; one sample
    is always taken.
    """
    layout = Layout({name: block.shape for name, block in plans.x.items()})
    width = max(4, first(plans.x).element_size())

    def each(rows: Rows) -> int:
        return width * (rows.numbers_of_a_sample() + (0 if beside is None else beside(rows)))

    step = 0
    for batch in batches:
        plan, start = plans.of(batch.inputs), 0
        if not step:
            sample = plans.trial(batch.inputs)
            size = each(sample.outline(len(seeds(sample.outputs, take(batch.labels, slice(0, 1)))[0])))
            step = fitting(max_memory, size, most=MOST)
            report(step, size, size, max_memory)
        while start < batch.size:
            part = slice(start, start + even(batch.size - start, step))
            linearized = linearize(plans.outputs, layout, plans.x, take(batch.inputs, part), plan)
            found = seeds(linearized.outputs, take(batch.labels, part))
            rows = linearized.pull(found[0])
            yield rows, found
            start, step = start + rows.samples, fitting(max_memory, each(rows), most=MOST)
            del linearized, found, rows  # before the next ones are made
