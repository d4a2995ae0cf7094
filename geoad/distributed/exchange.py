"""What processes tell each other: sums, joined tensors, and first of all that they are doing the same thing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from geoad.errors import GeometryError
from geoad.kernels.spread import digest
from geoad.params import outside_of_transforms

__all__ = ["ProcessError", "ProcessGroup", "require_group"]

T = TypeVar("T")


class ProcessError(GeometryError):
    """The processes do not go together: one has failed or ended, or they do different things."""


def require_group() -> None:
    """Raise unless ``torch.distributed`` is initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        raise GeometryError(
            "torch.distributed is not initialised in this process, so there is nothing to combine with. Start the processes by "
            "torchrun and call torch.distributed.init_process_group() first."
        )


class ProcessGroup:
    """The processes of a group of ``torch.distributed``, as a `geoad.kernels.spread.Exchange`.

    Before anything is sent, all processes compare what they are about to do by one message of five numbers: sums of tensors of
    different sizes would end (gloo) or stop (nccl) the job. So each call is two messages, or more if it holds very large
    tensors, which are summed in place one by one.

    Args:
        group: the process group. Default: all processes.
    """

    def __init__(self, group: Any = None) -> None:
        require_group()
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise GeometryError("this process does not belong to the group it is to work with. Call this in its members only.")
        self.kinds = [each.partition(":")[0] for each in dist.get_backend_config(group).split(",")]
        self.device = torch.device("cpu")  # of what the processes say to each other
        if "cpu" not in self.kinds:  # nccl
            self.device = torch.device(self.kinds[0], torch.get_device_module(self.kinds[0]).current_device())

    def __deepcopy__(self, memo: Any) -> ProcessGroup:
        return self

    # -- what all must agree on ----------------------------------------------------------------------------------------------

    def agree(self, call: str) -> None:
        """Raise `ProcessError` in all processes unless all are at the same `call`."""
        self.alike("", call)

    def alike(self, text: str, call: str = "compare") -> bool:
        """All processes have the same `text`; raises `ProcessError` in all of them unless all are at the same `call`."""
        together, same, failed = self._compared(call, text)
        if failed or not together:
            self._refuse(call, None)
        return same

    def _compared(self, call: str, text: str, failed: bool = False) -> tuple[bool, bool, bool]:
        """(all are at the same call, all have the same text, some process has failed)."""
        mine, said = digest(call), digest(text)
        with outside_of_transforms():
            told = torch.tensor([mine, -mine, said, -said, int(failed)], dtype=torch.int64, device=self.device)

            def message() -> list[int]:
                dist.all_reduce(told, dist.ReduceOp.MAX, group=self.group)
                return told.tolist()

            *keys, any_failed = self._run(message, call)
        return keys[0] == -keys[1], keys[2] == -keys[3], bool(any_failed)

    def _refuse(self, call: str, error: Exception | None) -> None:
        """Raise in all processes what some of them say."""
        said = self._gathered((call, None if error is None else f"{type(error).__name__}: {error}"))
        if error is not None:
            return
        broken = [f"process {rank}: {words}" for rank, (_, words) in enumerate(said) if words is not None]
        if broken:
            raise ProcessError(
                f"a computation over several processes was stopped ({call}), for it failed in another one. {'; '.join(broken)}"
            )
        lines = "\n".join(f"  process {rank}: {text}" for rank, (text, _) in enumerate(said))
        raise ProcessError(
            f"the processes do not do the same thing, so their results cannot be combined:\n{lines}\nAll processes must make "
            "the same calls in the same order, with the same network at the same point; only the data differ. Start them from "
            "the same state_dict and seed, and keep calls of geoad out of 'if rank == 0'."
        )

    @contextlib.contextmanager
    def guarded(self, call: str) -> Generator[None]:
        """Own work before an exchange: if it fails here, the others are told instead of left waiting."""
        try:
            yield
        except ProcessError:
            raise
        except Exception as error:
            with contextlib.suppress(ProcessError):
                self._compared(call, "", failed=True)
                self._refuse(call, error)
            raise

    # -- messages --------------------------------------------------------------------------------------------------------------

    def sum(self, tensors: Sequence[Tensor], call: str) -> list[Tensor]:
        """The sums over all processes, the same bits in each; tensors of the same forms in all of them."""
        self.agree(f"{call} {[(tuple(each.shape), str(each.dtype)) for each in tensors]}")
        with outside_of_transforms(), torch.no_grad():
            wide = [each.detach().to(_WIDER.get(each.dtype, each.dtype)) for each in tensors]
            done: dict[int, Tensor] = {}
            for places in _bundles(wide):
                done |= self._summed(wide, places, call)
            return [done[i].to(each.dtype) for i, each in enumerate(tensors)]

    def _summed(self, tensors: Sequence[Tensor], places: list[int], call: str) -> dict[int, Tensor]:
        """The sums of some of the tensors, by one message."""
        if len(places) == 1:
            flat = tensors[places[0]].clone(memory_format=torch.contiguous_format)
        else:
            flat = torch.cat([tensors[i].reshape(-1) for i in places])

        def message(each: Tensor) -> None:
            dist.all_reduce(each, group=self.group)

        flat = self._exchanged(flat, message, call)
        parts = flat.flatten().split([tensors[i].numel() for i in places])
        return {i: part.view(tensors[i].shape) for i, part in zip(places, parts, strict=True)}

    def joined(self, stacks: Sequence[Tensor], call: str) -> list[Tensor]:
        """Tensors side by side along the first axis, in the order of the processes: sums of what is padded with zeros."""
        counts = self.gathered([len(each) for each in stacks], call)
        padded: list[Tensor] = []
        for i, each in enumerate(stacks):
            start = sum(count[i] for count in counts[: self.rank])
            whole = each.new_zeros(sum(count[i] for count in counts), *each.shape[1:])
            whole[start : start + len(each)] = each
            padded.append(whole)
        return self.sum(padded, call)

    def gathered(self, thing: Any, call: str = "gather") -> list[Any]:
        """The (small, picklable) things of all processes; `call` says what they are and must be the same."""
        self.agree(f"{call}, gathered")
        return self._gathered(thing)

    def _gathered(self, thing: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        with outside_of_transforms():
            self._run(lambda: dist.all_gather_object(found, thing, group=self.group), "gather")
        return found

    def sent(self, tensor: Tensor, source: int, call: str) -> Tensor:
        """`tensor` as process `source` of the group has it, written over that of the others; to be agreed upon before."""
        place = source if self.group is None else dist.get_global_rank(self.group, source)

        def message(each: Tensor) -> None:
            dist.broadcast(each, place, group=self.group)

        return self._exchanged(tensor, message, call)

    def _exchanged(self, tensor: Tensor, message: Callable[[Tensor], object], call: str) -> Tensor:
        """`tensor` after a message that is written into it; by way of another device if the processes know no other."""
        there = tensor if tensor.device.type in self.kinds else tensor.to(self.device)
        self._run(lambda: message(there), call)
        return there.to(tensor.device)

    def _run(self, message: Callable[[], T], call: str) -> T:
        try:
            return message()
        except RuntimeError as error:
            raise ProcessError(
                f"an exchange between {self.size} processes failed in process {self.rank} ({call}): {error} Most likely "
                "another process has ended or is stuck (see its own output first), or it takes another path through the "
                "program. The time to wait is init_process_group(timeout=...). The group cannot be used any more: end this "
                "process, and go on from the last saved state."
            ) from error


_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
"""Sums are taken in single precision at least."""

_ALONE = 1 << 22
"""Tensors of more numbers than these are a message of their own, without another copy."""


def _bundles(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Which tensors go together."""
    bundles: dict[Any, list[int]] = {}
    for i, each in enumerate(tensors):
        key = i if each.numel() > _ALONE else (each.dtype, each.device)
        bundles.setdefault(key, []).append(i)
    return list(bundles.values())
