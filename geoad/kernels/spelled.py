"""Functions of torch in the place of which formulas are evaluated while a mode is active."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any, ClassVar

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["FormulaMode", "OwnMode", "apart", "depth", "orders", "without_own_modes"]


def depth() -> float:
    """How many ``torch.func`` transforms are active; infinite in the compiler, where they are not seen."""
    if torch.compiler.is_compiling():
        return float("inf")
    level: int | None = torch._C._functorch.maybe_current_level()  # pyright: ignore
    return 0 if level is None else level


class _Local(threading.local):
    apart = 0


_local = _Local()


@contextlib.contextmanager
def apart() -> Generator[None]:
    """In this block two transforms are nested whose derivatives are not: what the inner one gives is not differentiated."""
    _local.apart += 1
    try:
        yield
    finally:
        _local.apart -= 1


def orders() -> float:
    """How many derivatives may be taken of each other by the transforms that are active."""
    return depth() - _local.apart


class OwnMode(TorchFunctionMode):
    """A mode of geoad, which has nothing to do with evaluations on the way that are not for their derivatives."""


class FormulaMode(OwnMode):
    """Evaluates ``formulas[func]`` for a function of torch; one that returns None leaves it to torch."""

    formulas: ClassVar[Mapping[Any, Callable[..., Any]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        formula = self.formulas.get(func)
        result = None if formula is None else formula(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is None else result


_overrides: Any = torch.overrides


@contextlib.contextmanager
def without_own_modes() -> Generator[None]:
    """In this block the innermost modes of geoad are not there: every call of torch would go through them."""
    taken: list[Any] = []
    while isinstance(_overrides._get_current_function_mode(), OwnMode):
        taken.append(_overrides._pop_mode())
    try:
        yield
    finally:
        for mode in reversed(taken):
            _overrides._push_mode(mode)
