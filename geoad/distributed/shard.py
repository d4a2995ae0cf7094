"""A data set of which every process goes through its own part."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from geoad.data import Batches, batch_size, take
from geoad.distributed.exchange import ProcessError, ProcessGroup
from geoad.errors import GeometryError
from geoad.kernels.spread import digest, fingerprint
from geoad.kernels.stamps import depend

__all__ = ["Shard", "shard"]

_WAYS = ("auto", "samples", "batches", "process")


def shard(data: Any, group: Any = None, *, by: str = "auto") -> Shard:
    r"""The part of a data set that belongs to this process, for ``geo.loss``, `geoad.curvature.Fisher` and all that take data.

    What is computed over it is completed by the other processes: values, differentials, Hessian products, and curvature
    matrices in every representation are those of the whole data set, up to rounding, and the same bits in all processes:

    .. math:: \sum_n \ell_n = \sum_r \sum_{n \in \text{part}_r} \ell_n

    All processes must make the same calls, as with ``torch.distributed`` itself; each call says first what it is, at which
    point, and where they differ all raise.

    Args:
        data: what `geo.loss` takes: (x, y), a tensor, a mapping, a list of batches, a ``DataLoader``. The same in all
            processes, or a ``DataLoader`` with a ``DistributedSampler``, of which the samples that it doubles (to give each
            process as many) are left out.
        group: the process group. Default: all processes.
        by: "samples" (of each batch its r-th portion), "batches" (every size-th batch), "process" (the data are this process's
            own part already, and may be of any length); "auto" takes "process" for a ``DistributedSampler``, else "batches" if
            there are enough of them, else "samples".

    Raises:
        GeometryError: the data are a one-shot iterator or come in random order; the sampler is that of another process.
        ProcessError: the processes do not hold the same data, or one of them would get none. Raised in all of them.

    The data are gone through once, to count and to compare them. With "batches", labels drawn for a Monte-Carlo Fisher are
    those that one process would draw; otherwise they are independent of them.

    >>> import geoad
    >>> # torchrun --nproc-per-node 2 ...
    >>> # L = geo.loss(F.cross_entropy, geoad.distributed.shard((x, y)))
    """
    return Shard(data, group, by=by)


class Shard(Batches):
    """The part of a data set that belongs to this process; see `shard`.

    Attributes:
        sizes: the number of samples of each process.
        by: how the data are divided.
    """

    def __init__(self, data: Any, group: Any = None, *, by: str = "auto") -> None:
        self.exchange = self.processes = ProcessGroup(group)
        self._views: list[tuple[Any, Any]] | None = None
        with self.processes.guarded("shard the data"):
            if by not in _WAYS:
                raise GeometryError(f"by={by!r} is not known. Available: {list(_WAYS)}.")
            if isinstance(data, Batches):
                raise GeometryError(f"the data are a {type(data).__name__} already. Pass the data themselves.")
            super().__init__(data)
            self.sampler = _sampler(self._source)
            self.by = "process" if self.sampler is not None else by
            self._require_fixed_order(by)
            count, seen = self._survey()
        if self.by == "auto":
            self.by = "batches" if count >= self.processes.size else "samples"
        self.processes.agree(f"shard by {self.by}, {self._sampler_words()}")
        if self.by != "process":
            self.processes.agree(f"shard the data: {seen}")
        with self.processes.guarded("count the samples"):
            if self.by == "samples" and self.lasting:
                self._views = list(self._portions())
            self._total = sum(batch_size(inputs) for inputs, _ in self)
        self.sizes: list[int] = self.processes.gathered(self._total, "count the samples")
        if 0 in self.sizes:
            raise ProcessError(
                f"the data were sharded by {self.by} over {self.processes.size} processes with {self.sizes} samples: one would "
                "have nothing to do. Use fewer processes, by='samples', or smaller batches."
            )

    # -- what is checked ---------------------------------------------------------------------------------------------------

    def _sampler_words(self) -> str:
        """What must be the same in the samplers of all processes."""
        if self.sampler is None:
            return "no DistributedSampler"
        s = self.sampler
        epoch = f", seed {s.seed}, epoch {s.epoch}" if s.shuffle else ""
        return f"DistributedSampler over {len(s.dataset)} samples, drop_last={s.drop_last}{epoch}"  # pyright: ignore

    def _require_fixed_order(self, by: str) -> None:
        if self.sampler is not None:
            place = (self.sampler.rank, self.sampler.num_replicas)
            if by not in ("auto", "process") or place != (self.processes.rank, self.processes.size):
                raise GeometryError(
                    f"the loader has a DistributedSampler for process {place[0]} of {place[1]}, found by={by!r} in process "
                    f"{self.processes.rank} of {self.processes.size}. The data would be divided twice or belong to another "
                    "process; pass DistributedSampler(dataset, num_replicas=size, rank=rank) of this group, or none."
                )
        elif by != "process" and any(isinstance(each, _RANDOM) for each in _samplers(self._source)):
            raise GeometryError(
                "the loader shuffles: each process would draw an order of its own, and the parts would overlap. Sums do not "
                "depend on the order: use DataLoader(dataset, batch_size, shuffle=False), or a DistributedSampler."
            )

    def _survey(self) -> tuple[int, str]:
        """The number of batches of all data, and a word for what they hold."""
        if self.by == "process":
            return 0, ""
        words = [fingerprint([inputs, targets]) for inputs, targets in super().__iter__()]
        return len(words), f"{len(words)} batches {digest(' '.join(words)):014x}"

    # -- the part ------------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """The batches of this process as (inputs, targets)."""
        depend(self)
        if self.sampler is not None:
            yield from _trimmed(super().__iter__(), _genuine(self.sampler))
        elif self.by == "process":
            yield from super().__iter__()
        elif self.by == "batches":
            yield from islice(super().__iter__(), self.processes.rank, None, self.processes.size)
        else:
            yield from self._portions() if self._views is None else self._views

    def _portions(self) -> Iterator[tuple[Any, Any]]:
        """Of each batch, the samples of this process."""
        rank, size = self.processes.rank, self.processes.size
        for inputs, targets in super().__iter__():
            count = batch_size(inputs)
            part = slice(count * rank // size, count * (rank + 1) // size)
            if part.start < part.stop:
                yield take(inputs, part), take(targets, part)

    @property
    def total(self) -> int:
        """The number of samples of all processes."""
        return sum(self.sizes)

    @property
    def own(self) -> int:
        """The number of samples of this process."""
        return self.sizes[self.processes.rank]

    def number(self, batch: int) -> int:
        """A number that no other batch has, in any process; with "batches" its place in the data."""
        return batch * self.processes.size + self.processes.rank

    def described(self) -> str:
        """What must be the same in all processes."""
        return f"{self.total} samples by {self.by}, {self._sampler_words()}"


_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def _sampler(source: Any) -> DistributedSampler[Any] | None:
    return next((each for each in _samplers(source) if isinstance(each, DistributedSampler)), None)


def _samplers(source: Any) -> list[Any]:
    if not isinstance(source, DataLoader):
        return []
    return [getattr(source, "sampler", None), getattr(getattr(source, "batch_sampler", None), "sampler", None)]


def _genuine(sampler: DistributedSampler[Any]) -> int:
    """How many of the samples that a sampler yields come for the first time: those that fill up come last."""
    there = min(len(sampler.dataset), sampler.total_size)  # pyright: ignore
    return len(range(sampler.rank, there, sampler.num_replicas))


def _trimmed(batches: Iterator[tuple[Any, Any]], count: int) -> Iterator[tuple[Any, Any]]:
    """The first `count` samples of some batches."""
    for inputs, targets in batches:
        size = batch_size(inputs)
        kept = slice(0, min(size, count))
        count -= size
        if kept.stop:
            yield (inputs, targets) if kept.stop == size else (take(inputs, kept), take(targets, kept))
        if count <= 0:
            return
