"""What results that are kept depend on beside tensors: the state of modules and data, as it was noted while they were made."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Hashable
from typing import Any

from torch import nn

__all__ = ["Anew", "Same", "depend", "stamp", "witnessed"]


class Same:
    """An object that is compared by identity, and cannot be mistaken for a later one at its address."""

    __slots__ = ("thing",)

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


class Anew:
    """Stands for what is not in the tensors of this process: what depends on it is computed anew each time."""


class _Local(threading.local):
    def __init__(self) -> None:
        self.witnesses: list[dict[int, Any]] = []


_local = _Local()


def depend(thing: Any) -> None:
    """Tell those who keep what is being computed that it depends on the state of `thing`."""
    for witness in _local.witnesses:
        witness[id(thing)] = thing


@contextlib.contextmanager
def witnessed() -> Generator[dict[int, Any]]:
    """The things that are named to `depend` in this block, by identity."""
    seen: dict[int, Any] = {}
    _local.witnesses.append(seen)
    try:
        yield seen
    finally:
        _local.witnesses.remove(seen)


def stamp(thing: Any) -> Hashable:
    """The state of `thing` beside the values of its tensors, to be compared: of a module, or of what has a `stamp` of its own.

    Of a module: the modes and hooks of its parts, which tensors they hold, and their attributes that are numbers or words.

    >>> import torch
    >>> from geoad.kernels.stamps import stamp
    >>> net = torch.nn.Dropout(0.5)
    >>> before = stamp(net)
    >>> before == stamp(net), before == stamp(net.eval())
    (True, False)
    """
    own = getattr(thing, "stamp", None)
    if callable(own):
        return own()
    if isinstance(thing, nn.Module):
        return tuple(_of_module(module) for module in thing.modules())
    return Same(thing)


def _of_module(module: nn.Module) -> Hashable:
    own = vars(module)
    return (
        tuple(Same(each) for held in ("_parameters", "_buffers") for each in own[held].values()),
        tuple(Same(each) for held in ("_forward_hooks", "_forward_pre_hooks") for each in own[held].values()),
        tuple(each for each in own.values() if isinstance(each, (bool, int, float, str))),
    )
