"""What would wait for a device, counted on any device; used by test_device.py."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READ = frozenset(
    (
        "_local_scalar_dense",  # item(), float(), int(), bool(), tolist() of an element
        "equal",
        "is_nonzero",
        "nonzero",
        "nonzero_static",
        "masked_select",
        "unique_consecutive",
        "_unique",
        "_unique2",
        "unique_dim",
        "bincount",
        "_linalg_check_errors",  # of cholesky, inv, solve: their _ex variants have none
    )
)
"""Operations whose result, or its shape, the host has to wait for."""

_BY_METHOD = frozenset(("tolist", "numpy", "cpu", "__array__"))
"""Methods that bring numbers to the host; some of them are seen by no dispatcher."""


class _Below(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        masked = name.startswith(("index", "_index_put")) and _masks(args)
        sized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in _READ or masked or sized:
            self.found[f"{name} at {_place()}"] += 1
        return func(*args, **(kwargs or {}))


class _Above(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _BY_METHOD:
            self.found[f"{func.__name__} at {_place()}"] += 1
        return func(*args, **(kwargs or {}))


def _masks(args: Any) -> bool:
    return any(
        isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8)
        for arg in args[1:]
        if isinstance(arg, (list, tuple))
        for each in arg
    )


def _place() -> str:
    """The innermost line of geoad."""
    for frame in reversed(traceback.extract_stack(limit=60)):
        if "/geoad/" in frame.filename:
            return f"{frame.filename.rpartition('/geoad/')[2]}:{frame.lineno} ({frame.name})"
    return "elsewhere"


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Count where the host would wait for the device, by operation and line."""
    found: Counter[str] = Counter()
    with _Above(found), _Below(found):
        yield found
