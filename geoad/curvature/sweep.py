"""One pass over the data: the rows sᵀJ of every sample, chunk by chunk, handed to whoever collects them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from geoad.curvature.likelihoods.roots import Portion, Seeds
from geoad.data import take
from geoad.errors import GeometryError
from geoad.kernels.jacobians import batched
from geoad.kernels.layered import Linearized, Outputs, glance, linearize, trial
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
    most: int = 1024,
    progress: bool = False,
    total: int | None = None,
    page: Page | None = None,
    compiled: Compiled | None = None,
) -> None:
    """Go through the data once; `page` is told of each batch that is done, and says where to go on.

    The number of samples that are taken together follows from what the first one needs, so that the rows and what the
    consumers make of them stay within `max_memory` bytes; it is at least one and not more than `most`. Where one sample is too
    much, its seeds are made and pulled in portions; a single one is always taken, and so is a tuple of seeds as a whole.
    """
    x = plans.x
    layout = Layout({name: block.shape for name, block in x.items()})
    step = 0 if page is None else page.step
    room = max_memory // max(4, first(x).element_size())

    def numbers(sample: Linearized, count: int) -> int:
        rows = sample.outline(count)
        return rows.numbers_of_a_sample() + max((c.numbers_of_a_sample(rows) for c in consumers), default=0)

    def fitting(each: int) -> int:
        return max(1, min(most, room // max(1, each)))

    known: Linearized | None = None
    with progress_bar(progress, total) as bar:
        for batch in batches:
            sample, start = plans.trial(batch.inputs), 0
            if not step or (known is not None and sample is not known):  # samples of another form need another room
                step = fitting(numbers(sample, _count(seeds(sample.outputs, take(batch.labels, slice(0, 1))))))
            known = sample
            while start < batch.size:
                if compiled is not None and (done := compiled(sample.plan, batch, start, step, consumers)):
                    start += done
                    if bar is not None:
                        bar.update(done)
                    continue
                part = slice(start, start + _even(batch.size - start, step))
                chunk = linearize(plans.outputs, layout, x, take(batch.inputs, part), sample.plan)
                found = seeds(chunk.outputs, take(batch.labels, part))
                each = numbers(chunk, _count(found))
                if chunk.plan is not sample.plan and fitting(each) < chunk.outputs.shape[0]:
                    step = fitting(each)  # it lost its structure, and is larger than was thought
                    continue
                squared = frozenset(range(len(chunk.plan.uses))).intersection(*(c.squared(chunk.plan) for c in consumers))
                for rows, signs in _pulled(chunk, found, squared, each, numbers(chunk, 1), room):
                    for consumer in consumers:
                        consumer.add(rows, signs)
                start += chunk.outputs.shape[0]
                if bar is not None:
                    bar.update(chunk.outputs.shape[0])
                step = fitting(each)
            if page is not None:
                page.done(step)


def _count(seeds: Portion | Seeds) -> int:
    return len(seeds) if isinstance(seeds, Seeds) else len(seeds[0])


def _pulled(
    chunk: Linearized, seeds: Portion | Seeds, squared: Set[int], each: int, one: int, room: int
) -> Iterator[tuple[Rows, Tensor | None]]:
    """The rows of a chunk, as many seeds at a time as have `room`; all take `each` numbers a sample, a single one `one`."""
    if not isinstance(seeds, Seeds):
        yield chunk.pull(*seeds, squared), seeds[1]
        return
    count, step = len(seeds), len(seeds)
    room = room // chunk.outputs.shape[0]
    if each > room and count > 1:
        # the seed itself, and as much again as its rows for what the backward pass works with
        width = 2 * max(1, -(-(each - one) // (count - 1))) + seeds.columns[0, 0].numel()
        step = _even(count, min(count, max(1, (room - one) // width)))
    for start in range(0, max(1, count), max(1, step)):
        s, signs = seeds.part(slice(start, start + step))
        rows = chunk.pull(s, signs, squared)
        yield rows if start == 0 else replace(rows, further=True), signs


def _even(left: int, step: int) -> int:
    """`left` samples or seeds in as few portions as `step` allows, of one size."""
    return -(-left // -(-left // step))


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
