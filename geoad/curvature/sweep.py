"""One pass over the data: the rows sᵀJ of every sample, chunk by chunk, handed to whoever collects them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from geoad.curvature.likelihoods.roots import Portion, Seeds
from geoad.data import take
from geoad.errors import GeometryError
from geoad.kernels.jacobians import batched
from geoad.kernels.layered import Linearized, Outputs, glance, linearize, trial
from geoad.kernels.memory import MOST, even, fitting, report
from geoad.kernels.rows import Plan, Rows
from geoad.params import Blocks, Layout, first

__all__ = ["Batch", "Consumer", "Plans", "Portion", "Seeds", "sweep"]


class Batch(NamedTuple):
    """The samples of one batch, and what the curvature in output space needs to know of them."""

    size: int
    inputs: Any
    labels: Any


class Consumer(Protocol):
    """Collects rows."""

    def add(self, rows: Rows, signs: Tensor | None) -> None:
        """Take the rows (n, K) of a chunk, or of a portion of its seeds, and their signs (K, n) where not all are +1."""
        ...

    def numbers_of_a_sample(self, rows: Rows) -> int:
        """How many numbers `add` needs for each sample, judged by the rows of some."""
        ...

    def squared(self, plan: Plan) -> frozenset[int]:
        """The uses of which `add` needs no more than Σ_k σ_k g_k²."""
        ...


class Page(Protocol):
    """A pass over the data that is written down."""

    step: int

    def done(self, step: int) -> None:
        """A batch is done; `step` samples would be taken together next."""
        ...


Compiled = Callable[[Plan, Batch, int, int, Sequence[Any]], int]
"""(plan, batch, start, step, consumers) to the number of samples from `start` on that were added to the consumers."""


class Plans:
    """The plans of a network, one for each form of its inputs.

    Args:
        outputs: the network.
        x: the point.
        tried: a plan is right before the first samples are evaluated; else a network that ``vmap`` cannot batch shows then.
    """

    def __init__(self, outputs: Outputs, x: Blocks, *, tried: bool = True) -> None:
        self.outputs, self.x = outputs, x
        self.tried = tried
        self._known: dict[Any, Linearized] = {}

    def of(self, inputs: Any) -> Plan:
        """The plan for inputs of this form, made on the first sample."""
        return self.trial(inputs).plan

    def trial(self, inputs: Any) -> Linearized:
        """The first sample that had inputs of this form."""
        form = tuple((each.shape[1:], each.dtype) for each in batched(inputs))
        if form not in self._known:
            self._known[form] = self._look(take(inputs, slice(0, 1)))
        return self._known[form]

    def _look(self, sample: Any) -> Linearized:
        found = None if self.tried else glance(self.outputs, self.x, sample)
        return found if found is not None and len(found.outputs) else trial(self.outputs, self.x, sample)


def sweep(
    plans: Plans,
    batches: Iterable[Batch],
    seeds: Callable[[Tensor, Any], Portion | Seeds],
    consumers: Sequence[Consumer],
    *,
    max_memory: int,
    most: int = MOST,
    progress: bool = False,
    total: int | None = None,
    page: Page | None = None,
    compiled: Compiled | None = None,
) -> None:
    """Go through the data once; `page` is told of each batch that is done, and says where to go on.

    The number of samples that are taken together follows from what the first one needs, so that the rows and what the
    consumers make of them stay within `max_memory` bytes; it is at least one and not more than `most`. Where one sample is too
    much, its seeds are made and pulled in portions; a single one is always taken, and so is a tuple of seeds as a whole. What
    is decided is logged.
    """
    x = plans.x
    layout = Layout({name: block.shape for name, block in x.items()})
    step = 0 if page is None else page.step
    width = max(4, first(x).element_size())
    room = max_memory // width

    def numbers(sample: Linearized, found: Portion | Seeds, count: int) -> int:
        rows, used = sample.outline(count), count * sample.outputs[0].numel()
        used += found.numbers_of_a_sample if isinstance(found, Seeds) else 0
        return used + rows.numbers_of_a_sample() + max((c.numbers_of_a_sample(rows) for c in consumers), default=0)

    def taken(plan: Plan, batch: Batch, part: slice) -> tuple[int, int]:
        """Hand out the rows of some samples: how many these are, and what each needs. Nothing of them is left behind."""
        chunk = linearize(plans.outputs, layout, x, take(batch.inputs, part), plan)
        found = seeds(chunk.outputs, take(batch.labels, part))
        each = numbers(chunk, found, _count(found))
        if chunk.plan is not plan and fitting(room, each, most=most) < chunk.outputs.shape[0]:
            return 0, each  # it lost its structure, and is larger than was thought
        _hand_out(chunk, found, each, numbers(chunk, found, 1), room, consumers)
        return chunk.outputs.shape[0], each

    known: Linearized | None = None
    with progress_bar(progress, total) as bar:
        for batch in batches:
            sample, start = plans.trial(batch.inputs), 0
            if not step or (known is not None and sample is not known):  # samples of another form need another room
                found = seeds(sample.outputs, take(batch.labels, slice(0, 1)))
                each = numbers(sample, found, _count(found))
                step = fitting(room, each, most=most)
                least = numbers(sample, found, 1) if isinstance(found, Seeds) else each
                report(step, width * each, width * least, max_memory)
            known = sample
            while start < batch.size:
                if compiled is not None and (done := compiled(sample.plan, batch, start, step, consumers)):
                    start += done
                    if bar is not None:
                        bar.update(done)
                    continue
                done, each = taken(sample.plan, batch, slice(start, start + even(batch.size - start, step)))
                start, step = start + done, fitting(room, each, most=most)
                if bar is not None:
                    bar.update(done)
            if page is not None:
                page.done(step)


def _count(seeds: Portion | Seeds) -> int:
    return len(seeds) if isinstance(seeds, Seeds) else len(seeds[0])


def _hand_out(chunk: Linearized, seeds: Portion | Seeds, each: int, one: int, room: int, consumers: Sequence[Consumer]) -> None:
    """The rows of a chunk, as many seeds at a time as have `room`; all take `each` numbers a sample, a single one `one`."""
    squared = frozenset(range(len(chunk.plan.uses))).intersection(*(c.squared(chunk.plan) for c in consumers))
    if not isinstance(seeds, Seeds):
        _give(consumers, chunk.pull(*seeds, squared), seeds[1])
        return
    count, step = len(seeds), len(seeds)
    room = room // chunk.outputs.shape[0]
    if each > room and count > 1:
        # the seed itself, and as much again as its rows for what the backward pass works with
        width = 2 * max(1, -(-(each - one) // (count - 1))) + math.prod(seeds.shape)
        step = even(count, min(count, fitting(room, width, one)))
    for start in range(0, max(1, count), max(1, step)):
        s, signs = seeds.part(slice(start, start + step))
        _give(consumers, chunk.pull(s, signs, squared), signs, further=start > 0)


def _give(consumers: Sequence[Consumer], rows: Rows, signs: Tensor | None, further: bool = False) -> None:
    """Hand out rows; whoever calls this does not hold them, so that they are gone before the next ones are made."""
    rows = replace(rows, further=True) if further else rows
    for consumer in consumers:
        consumer.add(rows, signs)


class _Bar(Protocol):
    def update(self, n: float | None = 1) -> Any: ...


def progress_bar(progress: bool, total: int | None) -> AbstractContextManager[_Bar | None]:
    """A tqdm bar over samples, or nothing."""
    if not progress:
        return nullcontext()
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise GeometryError("progress=True needs tqdm, which is not installed: pip install 'geoad[progress]'.") from error
    bar: Any = tqdm(total=total, unit="sample")
    return bar
