"""Data sets as something that can be gone through again and again in batches of known size."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from geoad.errors import GeometryError
from geoad.kernels.finite import how_many
from geoad.kernels.spread import Exchange
from geoad.kernels.stamps import Same, depend
from geoad.params import Blocks

__all__ = [
    "Batches",
    "batch_size",
    "plain_inputs",
    "refuse_spoilt",
    "require_match",
    "split_batch",
    "spoilt_by",
    "take",
    "without_targets",
]

_TARGETS = ("labels", "label", "targets", "target", "y")
_ALL_INPUTS = "all of these are inputs"
"""The one key of a mapping around one that has an entry of such a name as an input, for its targets are beside it."""


class Batches:
    """Data in any of the accepted forms, as batches ``(inputs, targets)``.

    Accepted: one batch, that is ``(x, y)``, ``(x, None)``, a tensor or a mapping; a sequence of batches; a ``DataLoader`` or
    any other iterable that can be started again. One-shot iterators are refused, for a derivative goes through the data more
    than once. A tuple (x, y) of two tensors is always one batch, also if y is a tuple of several targets. A list ``[x, y]``, as
    a ``DataLoader`` yields it, is one batch if x and y differ in dtype or in the shape of a sample, and two batches of inputs
    otherwise; ``[(x1, None), (x2, None)]`` are two batches of inputs whatever their shapes. Tensors of several kinds in a
    longer list are no batches of one data set and are refused: several inputs form one batch as ``((x1, x2), y)``.

    Attributes:
        exchange: where the sums over the batches are completed, if other processes have batches too; see `geoad.distributed`.
        pair: two tensors that might be inputs with targets as well as two batches of inputs, and whether they were read as one
            batch; see `require_meant`.
    """

    exchange: Exchange | None = None
    pair: tuple[Tensor, Tensor, bool] | None = None

    def __init__(self, data: Any) -> None:
        if isinstance(data, Batches) and data.exchange is not None:
            raise GeometryError(
                f"the data are a {type(data).__name__}, shared out among processes, and what they were passed to computes from "
                "the data of one process alone: it would be wrong in silence. Sharded data go into geo.loss, the fields of "
                "geoad.curvature and geoad.ntk(...).blocks; here pass plain data."
            )
        if isinstance(data, Iterator):
            raise GeometryError(
                f"the data are a one-shot iterator ({type(data).__name__}): the first derivative would use it up and the next "
                "one would see no data. Pass a list of the batches, list(iterator), or the DataLoader itself."
            )
        if isinstance(data, Dataset) and not isinstance(data, Iterable):
            raise GeometryError(
                f"the data are a {type(data).__name__}, which yields single samples. Losses and curvatures need batches; wrap "
                "it in a torch.utils.data.DataLoader(dataset, batch_size=...)."
            )
        _require_tensors(data)
        self._source: Iterable[Any] = [data] if _is_batch(data) else cast("Iterable[Any]", data)
        alike = _pair(data)
        self.pair = None if alike is None else (*alike, _is_batch(data))
        if not isinstance(self._source, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise GeometryError(
                f"data must be (x, y), a mapping, a list of batches or a DataLoader, found {type(data).__name__}. Each batch "
                "is a pair of inputs and targets, or a mapping."
            )
        if isinstance(self._source, Sequence) and len(self._source) == 0:
            raise GeometryError("the data set is empty: a mean over nothing is undefined. Pass at least one batch.")
        self._total: int | None = None

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """The batches as (inputs, targets)."""
        depend(self)
        for batch in self._source:
            yield split_batch(batch)

    def sized(self) -> Iterator[tuple[int, Any, Any]]:
        """The batches that hold samples, as (number of samples, inputs, targets).

        Raises:
            GeometryError: another number of samples came than in an earlier pass.
        """
        seen = 0
        for inputs, targets in self:
            size = batch_size(inputs)
            seen += size
            if size:
                yield size, inputs, targets
        if seen == 0:
            raise GeometryError(
                "the data set is empty: a mean over nothing is undefined. Pass a loader that yields at least one batch."
            )
        if self._total is None:
            self._total = seen
        elif seen != self._total:
            raise GeometryError(
                f"the data gave {seen} samples in this pass and {self._total} in an earlier one, so a mean over them is "
                "undefined. A derivative goes through the data more than once; pass something that yields the same samples "
                "every time."
            )

    def require_meant(self, outputs: Tensor, are_targets: Callable[[Tensor], bool | None]) -> None:
        """Refuse two tensors that were read as one batch, or as two, where the outputs of a network speak against it.

        Args:
            outputs: those of some samples, (n, ..., c).
            are_targets: whether a tensor (n, ...) has the form of targets for them; None: that cannot be said.
        """
        if self.pair is None:
            return
        x, y, together = self.pair
        alike, fit = x.shape == y.shape, are_targets(y[:1].expand(outputs.shape[0], *y.shape[1:]))
        shape = ", ".join(map(str, outputs.shape[1:]))
        found = f"two tensors, {x.dtype} of shapes {tuple(x.shape)} and {tuple(y.shape)}, for outputs of shape (n, {shape})"
        if together and fit is False and (alike or not x.is_floating_point()):
            raise GeometryError(
                f"the data are {found}. They are read as inputs and targets, and the second has the form of inputs, not of "
                "targets: the result would be that of the first one alone. Pass two batches of inputs as [(x1, None), (x2, "
                "None)], or torch.cat([x1, x2])."
            )
        if not together and fit is True and alike:
            raise GeometryError(
                f"the data are a list of {found}. They may be inputs with their targets, or two batches of inputs, which gives "
                "another result. Pass a tuple (x, y) for the one, [(x1, None), (x2, None)] for the other."
            )

    @property
    def lasting(self) -> bool:
        """The batches are the same tensors in every pass; a loader makes them anew, perhaps in another order."""
        return isinstance(self._source, Sequence)

    def stamp(self) -> Hashable:
        """Which tensors the batches are, where they last."""
        return tuple(Same(each) for batch in self._source for each in _tensors(batch)) if self.lasting else Same(self._source)

    @property
    def total(self) -> int:
        """The number of samples; counted once."""
        if self._total is None:
            for _ in self.sized():
                pass
        assert self._total is not None
        return self._total

    @property
    def own(self) -> int:
        """The number of samples in this process."""
        return self.total

    def number(self, batch: int) -> int:
        """A number for a batch of this process, which no other has: the place of the batch in the data, where it has one."""
        return batch

    def described(self) -> str:
        """What must be the same in all processes."""
        return f"{self.total} samples"


def _is_batch(data: Any) -> bool:
    if isinstance(data, (Mapping, Tensor)):
        return True
    if not isinstance(data, (tuple, list)) or len(cast("Sequence[Any]", data)) != 2:
        return False
    first, second = cast("Sequence[Any]", data)
    if isinstance(first, (Tensor, Mapping)) and isinstance(second, (tuple, list)):
        return True  # several targets
    if isinstance(data, tuple):
        return second is None or isinstance(second, (Tensor, Mapping))
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)) or first.ndim == 0 or second.ndim == 0:
        return False
    return len(first) == len(second) and (first.dtype != second.dtype or first.shape != second.shape)


def _pair(data: Any) -> tuple[Tensor, Tensor] | None:
    """Two tensors of one dtype, with as many samples and as many axes."""
    if not isinstance(data, (tuple, list)) or len(cast("Sequence[Any]", data)) != 2:
        return None
    x, y = cast("Sequence[Any]", data)
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or x.ndim == 0:
        return None
    return (x, y) if x.dtype == y.dtype and x.ndim == y.ndim and len(x) == len(y) else None


def _require_tensors(data: Any) -> None:
    """Refuse arrays and lists of numbers in the place of tensors, and tensors of several kinds in a list of batches."""
    parts = list(cast("Sequence[Any]", data)) if isinstance(data, (tuple, list)) else [data]
    what = ("inputs", "targets") if len(parts) == 2 and isinstance(parts[0], (Tensor, Mapping)) else ("inputs",)
    for name, part in zip(what, parts, strict=False):
        numbers = isinstance(part, (tuple, list)) and name == "targets" and next(_tensors(part), None) is None
        if numbers or (hasattr(part, "__array__") and not isinstance(part, Tensor)):
            raise GeometryError(
                f"the {name} are a {type(part).__name__}, and derivatives are taken of tensors. Make one of it: "
                "torch.as_tensor(...), of the dtype of the network, or of integers for labels."
            )
    if len(parts) > 1 and all(isinstance(part, Tensor) for part in parts) and not _is_batch(data):
        kinds = {f"{part.dtype}, {part.ndim} axes" for part in parts}
        if len(kinds) > 1:
            raise GeometryError(
                f"the data are {len(parts)} tensors of several kinds ({'; '.join(sorted(kinds))}) with "
                f"{sorted({len(part) if part.ndim else 0 for part in parts})} samples, which are no batches of one data set. "
                "Inputs and targets of one batch have the same length, (x, y); several inputs are a tuple, ((x1, x2), y)."
            )


def split_batch(batch: Any) -> tuple[Any, Any]:
    """(inputs, targets) of one batch.

    The targets of a mapping are its entry "labels", "label", "targets", "target" or "y", or else the mapping itself; a batch
    that is one tensor, or a sequence that holds just one thing, has no targets (None). In a pair (mapping, targets) the whole
    mapping is inputs.
    """
    if isinstance(batch, Mapping):
        key = _target_key(cast("Mapping[str, Any]", batch))
        return batch, batch if key is None else batch[key]
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(cast("Sequence[Any]", batch)) in (1, 2):
        parts = cast("Sequence[Any]", batch)
        if len(parts) == 1:
            return parts[0], None
        named = isinstance(parts[0], Mapping) and _target_key(cast("Mapping[str, Any]", parts[0])) is not None
        return {_ALL_INPUTS: parts[0]} if named else parts[0], parts[1]
    found = type(batch).__name__
    if isinstance(batch, Sequence):
        found += f" of length {len(cast('Sequence[Any]', batch))}"
    raise GeometryError(
        f"a batch must be (inputs, targets) or a mapping, found {found}. With several inputs pass ((x1, x2), y), or collate "
        "the batches in the DataLoader accordingly."
    )


def batch_size(inputs: Any) -> int:
    """The number of samples: the length of the first tensor's first axis."""
    size = _size(inputs)
    if size is None:
        found = "a 0-dimensional tensor" if isinstance(inputs, Tensor) else f"a {type(inputs).__name__} without such a tensor"
        raise GeometryError(
            "cannot tell the number of samples of a batch of inputs: it needs a tensor with a sample axis in front, found "
            f"{found}. Batches are tensors, or mappings and tuples of tensors, with the samples along the first axis; use "
            "x.unsqueeze(0) for one sample."
        )
    return size


def _size(inputs: Any) -> int | None:
    if isinstance(inputs, Tensor):
        return inputs.shape[0] if inputs.ndim else None
    if isinstance(inputs, Mapping):
        inputs = tuple(cast("Mapping[str, Any]", inputs).values())
    if isinstance(inputs, (list, tuple)):
        sizes = (_size(each) for each in cast("Sequence[Any]", inputs))
        return next((size for size in sizes if size is not None), None)
    return None


def take(inputs: Any, index: slice) -> Any:
    """Some samples of a batch of inputs (tensors, mappings, sequences); what is no tensor stays."""
    if isinstance(inputs, Tensor):
        return inputs[index] if inputs.ndim else inputs
    if isinstance(inputs, Mapping):
        return {name: take(each, index) for name, each in cast("Mapping[str, Any]", inputs).items()}
    if isinstance(inputs, (list, tuple)):
        return tuple(take(each, index) for each in cast("Sequence[Any]", inputs))
    return inputs


def plain_inputs(inputs: Any) -> Any:
    """The inputs of a batch as they were given."""
    return inputs[_ALL_INPUTS] if isinstance(inputs, Mapping) and _ALL_INPUTS in inputs else inputs


def without_targets(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a mapping that are inputs: all but the targets."""
    if _ALL_INPUTS in inputs:
        return dict(inputs[_ALL_INPUTS])
    key = _target_key(inputs)
    return {name: value for name, value in inputs.items() if name != key}


def _target_key(batch: Mapping[str, Any]) -> str | None:
    return next((name for name in _TARGETS if name in batch), None)


def _tensors(data: Any) -> Iterator[Tensor]:
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, Mapping):
        for each in cast("Mapping[str, Any]", data).values():
            yield from _tensors(each)
    elif isinstance(data, (list, tuple)):
        for each in cast("Sequence[Any]", data):
            yield from _tensors(each)


def require_match(data: Any, others: Any, what: str, error: Exception, *, like: str = "the parameters") -> None:
    """Raise a clear error if device or dtype of `data` explain why an evaluation failed with `error`."""
    mine, theirs = list(_tensors(data)), list(_tensors(others))
    if not mine or not theirs:
        return
    devices = {str(each.device) for each in mine}
    expected = {str(each.device) for each in theirs}
    if devices != expected:
        raise GeometryError(
            f"{what} are on {_words(devices)}, {like} on {_words(expected)}, and the evaluation failed ({error}). Move one of "
            f"them: x.to('{min(expected)}') or geo.to(device)."
        ) from error
    kinds = {str(each.dtype) for each in mine if each.is_floating_point()}
    wanted = {str(each.dtype) for each in theirs if each.is_floating_point()}
    if kinds and wanted and kinds != wanted and not torch.is_autocast_enabled(theirs[0].device.type):
        raise GeometryError(
            f"{what} are {_words(kinds)}, {like} {_words(wanted)}, and the evaluation failed ({error}). Convert one of them: "
            f"x.to({min(wanted)}) or geo.to({min(kinds)})."
        ) from error
    if wanted and not kinds and any(word in str(error) for word in ("dtype", "scalar type")):
        raise GeometryError(
            f"{what} are {_words({str(each.dtype) for each in mine})}, {like} {_words(wanted)}, and the evaluation failed "
            f"({error}). If they are no indices, convert them: x.to({min(wanted)})."
        ) from error


def spoilt_by(x: Blocks, batches: Batches, *, targets: bool = True) -> str:
    """Which parameters or which data are not finite, for messages; empty if all are finite."""
    bad = [name for name, block in x.items() if not bool(block.isfinite().all())]
    if bad:
        return f"the parameters {bad} hold such numbers"
    for i, (inputs, given) in enumerate(batches):
        for what, tree in (("inputs", inputs), ("targets", given if targets else None)):
            found = (how_many(each) for each in _tensors(tree) if each.is_floating_point() and each.device.type != "meta")
            for words in filter(None, found):
                return f"the {what} of batch {i} hold {words}"
    return ""


def refuse_spoilt(what: str, x: Blocks, *data: Batches, targets: bool = True) -> NoReturn:
    """Raise for an object that is not finite, though the network's outputs are."""
    why = next(filter(None, (spoilt_by(x, each, targets=targets) for each in data)), "") or (
        "the parameters and the data are finite, so a derivative of the network (or a curvature of the likelihood) is not: a "
        "root or a norm at 0, or numbers too large for their precision"
    )
    raise GeometryError(
        f"{what} holds numbers that are not finite: {why}. What is made of it would be nan. Mend the data or the network "
        "there, go back to a finite point, or use float64."
    )


def _words(kinds: set[str]) -> str:
    return " and ".join(sorted(kinds))
