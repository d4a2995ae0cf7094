"""One pass over the data: the rows sᵀJ of every sample, chunk by chunk, handed to whoever collects them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from geoad.data import take
from geoad.errors import GeometryError
from geoad.kernels.jacobians import batched
from geoad.kernels.layered import Linearized, Outputs, Plan, Rows, glance, linearize, trial
from geoad.params import Blocks, Layout, first

__all__ = ["Batch", "Consumer", "Plans", "Seeds", "sweep"]


class Batch(NamedTuple):
    """The samples of one batch, and what the curvature in output space needs to know of them."""

    size: int
    inputs: Any
    labels: Any


Seeds = tuple[Tensor, Tensor | None]
"""(s, signs): s of shape (K, n, ..., c), with A = Σ_k signs_k s_k s_kᵀ for each sample."""


class Consumer(Protocol):
    """Collects rows."""

    def add(self, rows: Rows, signs: Tensor | None) -> None:
        """Take the rows (n, K) of a chunk, and their signs (K, n) where not all are +1."""
        ...

    def numbers_of_a_sample(self, rows: Rows) -> int:
        """How many numbers `add` needs for each sample, judged by the rows of some."""
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
    seeds: Callable[[Tensor, Any], Seeds],
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
    consumers make of them stay within `max_memory` bytes; a single sample is always taken, and not more than `most`.
    """
    x = plans.x
    layout = Layout({name: block.shape for name, block in x.items()})
    step = 0 if page is None else page.step

    def room(rows: Rows) -> int:
        each = rows.numbers_of_a_sample() + max((c.numbers_of_a_sample(rows) for c in consumers), default=0)
        return max(1, min(most, max_memory // (max(1, each) * max(4, first(x).element_size()))))

    known: Linearized | None = None
    with progress_bar(progress, total) as bar:
        for batch in batches:
            sample, start = plans.trial(batch.inputs), 0
            plan = sample.plan
            if not step or (known is not None and sample is not known):  # samples of another form need another room
                step = room(sample.outline(len(seeds(sample.outputs, take(batch.labels, slice(0, 1)))[0])))
            known = sample
            while start < batch.size:
                if compiled is not None and (done := compiled(plan, batch, start, step, consumers)):
                    start += done
                    if bar is not None:
                        bar.update(done)
                    continue
                part = slice(start, start + _even(batch.size - start, step))
                linearized = linearize(plans.outputs, layout, x, take(batch.inputs, part), plan)
                s, signs = seeds(linearized.outputs, take(batch.labels, part))
                rows = linearized.pull(s)
                for consumer in consumers:
                    consumer.add(rows, signs)
                start += rows.samples
                if bar is not None:
                    bar.update(rows.samples)
                step = room(rows)
            if page is not None:
                page.done(step)


def _even(left: int, step: int) -> int:
    """`left` samples in as few portions as `step` allows, of one size."""
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
