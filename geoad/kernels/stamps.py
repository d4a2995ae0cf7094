"""What results that are kept depend on beside tensors: the state of modules and data, as it was noted while they were made."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Hashable, Mapping, Sequence
from typing import Any, cast

import torch
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

    Of a module: its parts, and of each the modes and hooks, which tensors it holds, and its attributes that are functions,
    numbers or words, or lists and mappings of these.

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
        return tuple(_of_module(module) for module in _parts(thing))
    return Same(thing)


def _parts(module: nn.Module) -> list[nn.Module]:
    """All modules inside, also those that are plain attributes, which torch does not register."""
    found: dict[int, nn.Module] = {}
    waiting = [module]
    while waiting:
        each = waiting.pop()
        if id(each) not in found:
            found[id(each)] = each
            own = vars(each)
            waiting += [part for part in (*own["_modules"].values(), *own.values()) if isinstance(part, nn.Module)]
    return list(found.values())


def _of_module(module: nn.Module) -> Hashable:
    own = vars(module)
    return (
        Same(module),
        tuple(Same(each) for held in ("_parameters", "_buffers") for each in own[held].values()),
        tuple(Same(each) for held in ("_forward_hooks", "_forward_pre_hooks") for each in own[held].values()),
        tuple((name, _plain(value)) for name, value in own.items() if name not in _REGISTRIES),
    )


_REGISTRIES = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))


def _plain(value: Any) -> Hashable:
    """What an attribute says by itself; objects of other kinds say nothing."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_plain(each) for each in cast("Sequence[Any]", value))
    if isinstance(value, Mapping):
        return tuple((str(key), _plain(each)) for key, each in cast("Mapping[Any, Any]", value).items())
    return Same(value) if callable(value) else None
