"""Functions of torch in the place of which formulas are evaluated while a mode is active."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch.overrides import TorchFunctionMode

__all__ = ["FormulaMode"]


class FormulaMode(TorchFunctionMode):
    """Evaluates ``formulas[func]`` for a function of torch; one that returns None leaves it to torch."""

    formulas: ClassVar[Mapping[Any, Callable[..., Any]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        formula = self.formulas.get(func)
        result = None if formula is None else formula(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is None else result
