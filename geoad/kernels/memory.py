"""Whether a result fits into the machine."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from geoad.errors import GeometryError

__all__ = ["require_memory"]

_REMEDY = "Use another representation: 'kfac', 'diagonal' or 'implicit'."


def require_memory(size: int, what: str, like: Tensor, remedy: str = _REMEDY) -> None:
    """Raise if `size` bytes are more than the machine, or the device of `like`, has.

    Args:
        size: bytes.
        what: what would take them, for the message.
        like: a tensor on the device.
        remedy: what to do instead, a sentence or two.
    """
    if like.is_cuda:
        there = torch.cuda.get_device_properties(like.device).total_memory
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > there:
        raise GeometryError(
            f"{what} would take {size / 2**30:.1f} GiB, more than the {there / 2**30:.1f} GiB of this machine. {remedy}"
        )
