"""Conditions on values that are looked at once, when everything is computed, instead of one after another on the way.

To look at a number the host waits for the device. A loop over batches that checks each of them, outputs that are finite, labels
in range, would wait in each; so inside of `together` the conditions are gathered where the numbers are and read at the end. If
one of them does not hold, the loop is gone through again with every check where it stands, for the error that it raises there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.kernels.ladder import at_top_level

__all__ = ["holds", "settle", "together"]

T = TypeVar("T")


class _Gathered:
    """What has been asked since it was looked at last, device by device."""

    def __init__(self) -> None:
        self.so_far: dict[torch.device, Tensor] = {}

    def add(self, condition: Tensor) -> None:
        before = self.so_far.get(condition.device)
        self.so_far[condition.device] = condition if before is None else before & condition

    def hold(self) -> bool:
        """All of them hold; they are forgotten."""
        found, self.so_far = self.so_far, {}
        return all(bool(each) for each in found.values())


class _Broken(Exception):
    """A condition does not hold: for `together`, which finds out which one."""


class _Local(threading.local):
    def __init__(self) -> None:
        self.gathered: _Gathered | None = None


_local = _Local()


def holds(condition: Tensor) -> bool:
    """Whether a condition (a boolean of shape ()) holds; inside of `together` it is taken to hold for now.

    >>> import torch
    >>> from geoad.kernels.conditions import holds
    >>> x = torch.tensor([1.0, torch.nan])
    >>> if not holds(x.isfinite().all()):
    ...     print("not finite")
    not finite
    """
    if _local.gathered is None or not at_top_level():  # a wrapped condition would not outlive its transform
        return bool(condition)
    _local.gathered.add(condition.detach())
    return True


def settle() -> None:
    """Look at the conditions so far, before something is made of the numbers that lasts (is written to a file, say)."""
    if _local.gathered is not None and not _local.gathered.hold():
        raise _Broken


def together(compute: Callable[[], T], again: Callable[[], object] | None = None) -> T:
    """What `compute` returns, the conditions in it looked at once.

    Args:
        compute: the calculation; what it leaves behind when a condition did not hold is of no use.
        again: goes through the same conditions, to raise the error of the one that does not hold. Default: `compute`.

    >>> import torch
    >>> from geoad.kernels.conditions import holds, together
    >>> def root(x):
    ...     if not holds((x >= 0).all()):
    ...         raise ValueError(f"{x.min():.0f} is negative")
    ...     return x.sqrt()
    >>> together(lambda: [root(x) for x in torch.tensor([[4.0], [9.0]])])
    [tensor([2.]), tensor([3.])]
    >>> together(lambda: [root(x) for x in torch.tensor([[4.0], [-9.0]])])
    Traceback (most recent call last):
    ...
    ValueError: -9 is negative
    """
    if _local.gathered is not None:  # they are looked at by whoever began
        return compute()
    _local.gathered = gathered = _Gathered()
    try:
        result = compute()
        if gathered.hold():
            return result
    except _Broken:
        pass
    except Exception:
        if _unharmed(gathered):
            raise
    finally:
        _local.gathered = None
    (again or compute)()
    raise GeometryError(
        "values that were checked on the way were out of range (not finite, or labels that do not exist), but not when they "
        "were computed once more to say which. The data or the network are random: fix their seeds, or turn what is random off "
        "(net.eval())."
    )


def _unharmed(gathered: _Gathered) -> bool:
    """The conditions hold as far as can be seen; after an error of the device nothing can."""
    try:
        return gathered.hold()
    except RuntimeError:
        return True
