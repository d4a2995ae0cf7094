"""Data sets as something that can be gone through again and again in batches of known size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from geoad.errors import GeometryError

__all__ = ["Batches", "batch_size", "split_batch", "take", "without_targets"]

_TARGETS = ("labels", "label", "targets", "target", "y")


class Batches:
    """Data in any of the accepted forms, as batches ``(inputs, targets)``.

    Accepted: one batch, ``(x, y)`` or a mapping; a sequence of batches; a ``DataLoader`` or any other iterable that can be
    started again. One-shot iterators are refused, for a derivative goes through the data more than once.
    """

    def __init__(self, data: Any) -> None:
        if isinstance(data, Iterator):
            raise GeometryError(
                f"the data are a one-shot iterator ({type(data).__name__}): the first derivative would use it up and the next one would "
                "see no data. Pass a list of the batches, list(iterator), or the DataLoader itself."
            )
        self._source: Iterable[Any] = [data] if _is_batch(data) else cast("Iterable[Any]", data)
        if not hasattr(self._source, "__iter__"):
            raise GeometryError(
                f"data must be (x, y), a mapping, a list of batches or a DataLoader, found {type(data).__name__}. Each batch is a pair of "
                "inputs and targets, or a mapping."
            )
        if isinstance(self._source, Sequence) and len(self._source) == 0:
            raise GeometryError("the data set is empty: a mean over nothing is undefined. Pass at least one batch.")
        self._total: int | None = None

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """The batches as (inputs, targets)."""
        for batch in self._source:
            yield split_batch(batch)

    @property
    def total(self) -> int:
        """The number of samples; counted once."""
        if self._total is None:
            self._total = sum(batch_size(inputs) for inputs, _ in self)
            if self._total == 0:
                raise GeometryError(
                    "the data set is empty: a mean over nothing is undefined. Pass a loader that yields at least one batch."
                )
        return self._total


def _is_batch(data: Any) -> bool:
    if isinstance(data, Mapping):
        return True
    if isinstance(data, Tensor):
        return True
    return isinstance(data, tuple) and len(data) == 2 and all(isinstance(each, (Tensor, Mapping)) for each in data)


def split_batch(batch: Any) -> tuple[Any, Any]:
    """(inputs, targets) of one batch.

    The targets of a mapping are its entry "labels", "label", "targets", "target" or "y", or else the mapping itself; a batch that
    is one tensor has no targets (None).
    """
    if isinstance(batch, Mapping):
        key = next((name for name in _TARGETS if name in batch), None)
        return batch, batch if key is None else batch[key]
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Sequence) and len(batch) == 2:
        return batch[0], batch[1]
    raise GeometryError(
        f"a batch must be (inputs, targets) or a mapping, found {type(batch).__name__}. Wrap the data accordingly, or collate them "
        "in the DataLoader."
    )


def batch_size(inputs: Any) -> int:
    """The number of samples: the length of the first tensor's first axis."""
    if isinstance(inputs, Tensor):
        if inputs.ndim == 0:
            raise GeometryError("a batch of inputs needs a sample axis in front, found a 0-dimensional tensor. Use x.unsqueeze(0).")
        return inputs.shape[0]
    values: Iterable[Any] = inputs.values() if isinstance(inputs, Mapping) else inputs
    for each in values:
        if isinstance(each, (Tensor, Mapping, list, tuple)):
            return batch_size(each)
    raise GeometryError(
        f"cannot tell the number of samples of a batch of type {type(inputs).__name__}: it contains no tensor. Batches are tensors or "
        "mappings of tensors with the samples along the first axis."
    )


def take(inputs: Any, index: slice) -> Any:
    """Some samples of a batch of inputs (tensors, mappings, sequences)."""
    if isinstance(inputs, Tensor):
        return inputs[index]
    if isinstance(inputs, Mapping):
        return {name: take(each, index) for name, each in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(take(each, index) for each in inputs)
    return inputs


def without_targets(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a mapping that are inputs: all but the targets."""
    key = next((name for name in _TARGETS if name in inputs), None)
    return {name: value for name, value in inputs.items() if name != key}
