"""What fits into memory: the size of portions, and results that are too large for the machine."""

from __future__ import annotations

import logging
import math
import os
import sys
from typing import Any

import torch
from torch import Tensor

from geoad.errors import GeometryError

__all__ = ["MOST", "bytes_of", "even", "fitting", "report", "require_memory"]

logger = logging.getLogger("geoad")

_REMEDY = "Use another representation: 'kfac', 'diagonal' or 'implicit'."


def bytes_of(max_memory: Any) -> int:
    """``max_memory=`` as a whole number of bytes.

    Raises:
        GeometryError: it is no positive number.

    >>> from geoad.kernels.memory import bytes_of
    >>> bytes_of(1e9)
    1000000000
    """
    if (
        isinstance(max_memory, (int, float))
        and not isinstance(max_memory, bool)
        and math.isfinite(max_memory)
        and max_memory >= 1
    ):
        return int(max_memory)
    raise GeometryError(
        f"max_memory={max_memory!r} is no number of bytes, at least 1, that intermediate results could be bound by: pass e.g. "
        "max_memory=2**30 for a GiB."
    )


MOST = 1024
"""Samples that are taken together at most: more of them are not faster."""


def fitting(bound: int, each: int, fixed: int = 0, most: int = sys.maxsize) -> int:
    """How many things of `each` bytes fit into `bound` bytes beside `fixed` ones; at least one, and at most `most`.

    >>> from geoad.kernels.memory import fitting
    >>> fitting(1000, each=90, fixed=100), fitting(1000, each=90, most=4), fitting(10, each=90)
    (10, 4, 1)
    """
    return max(1, min(most, (bound - fixed) // max(1, each)))


def even(count: int, most: int) -> int:
    """The size of portions of `count` things: as few portions as `most` allows, all of one size but for the last.

    >>> from geoad.kernels.memory import even
    >>> even(10, 9), even(10, 3), even(10, 100), even(0, 5)
    (5, 3, 10, 1)
    """
    return -(-count // -(-count // most)) if count else 1


def report(count: int, each: int, least: int, bound: int, what: str = "samples") -> None:
    """Log how many things are taken together, and that a single one is too much.

    Args:
        count: the number.
        each: bytes for one of them.
        least: bytes for the smallest portion of one.
        bound: ``max_memory=``, in bytes, or the share of it that is meant for this.
        what: their name.
    """
    logger.info("%d %s at a time, %d bytes each, within %d bytes", count, what, each, bound)
    if least > bound:
        logger.warning(
            "max_memory leaves %d bytes for what is worked on, and one of the %s alone takes %d: they are taken one by one. "
            "Pass a larger max_memory=, or take a representation that needs less ('implicit').",
            bound,
            what,
            least,
        )


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
