"""The method forms of the typing table: ``T.add(U)`` is ``torch.add(T, U)``, by the same rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from geoad.errors import VarianceError

__all__ = ["HANDLERS", "Methods"]

HANDLERS: dict[Any, Callable[..., Any]] = {}
"""The allow-list of torch functions, filled by `geoad.tensors.gate`."""


class UntypedAttributeError(VarianceError, AttributeError):
    """An attribute of ``torch.Tensor`` that has no meaning for a typed object; ``hasattr`` sees it as missing."""


_HINTS = {
    "norm": "For an invariant length say with respect to which metric: G.norm(v).",
    "item": "Contract it to a scalar first (w(v), G(u, v), E.trace()); the plain numbers are in .components.",
    "shape": "Use .type, .batch_shape and .chart.dim, or .components.shape.",
    "backward": "Differentiate with geoad.grad(L)(p), or call backward() on a scalar contraction.",
    "grad": "Gradients of a module are typed as geo.grad; use geoad.grad(L)(p).",
    "eigh": "Use geoad.eigh(B, metric=G).",
}


class Methods:
    """What a typed object does through the gate of ``torch.*`` functions."""

    __slots__ = ()

    def add(self, other: Any, *, alpha: float = 1.0) -> Any:
        """``self + alpha * other``: the same type, chart and base point."""
        return HANDLERS[torch.add](self, other, alpha=alpha)

    def sub(self, other: Any, *, alpha: float = 1.0) -> Any:
        """``self - alpha * other``: the same type, chart and base point."""
        return HANDLERS[torch.sub](self, other, alpha=alpha)

    def mul(self, other: Any) -> Any:
        """``self * other`` for a scalar (densities: also for a density)."""
        return HANDLERS["mul"](self, other)

    def div(self, other: Any) -> Any:
        """``self / other`` for a scalar (densities: also for a density)."""
        return HANDLERS["div"](self, other)

    def neg(self) -> Any:
        """``-self``."""
        return HANDLERS["mul"](self, -1.0)

    def matmul(self, other: Any) -> Any:
        """``self @ other``: contract the last index with the first of `other`."""
        return HANDLERS["matmul"](self, other)

    def dot(self, other: Any) -> Any:
        """The full contraction of two objects with one index each, of opposite variance."""
        return HANDLERS["matmul"](self, other)

    def outer(self, other: Any) -> Any:
        """The tensor product of two objects with one index each."""
        return HANDLERS[torch.outer](self, other)

    def transpose(self, dim0: int = -2, dim1: int = -1) -> Any:
        """The same tensor with two indices exchanged."""
        return HANDLERS[torch.transpose](self, dim0, dim1)

    def permute(self, *order: int) -> Any:
        """The same tensor with its indices in another order."""
        return HANDLERS[torch.permute](self, *order)

    def mean(self, dim: Any = None) -> Any:
        """The mean over batch axes (all, or those in `dim`)."""
        return HANDLERS[torch.mean](self, dim)

    def sum(self, dim: Any = None) -> Any:
        """The sum over batch axes (all, or those in `dim`)."""
        return HANDLERS[torch.sum](self, dim)

    def isfinite(self) -> Any:
        """One flag for each element of the batch: are all numbers finite."""
        return HANDLERS[torch.isfinite](self)

    # -- order: only densities have one ------------------------------------------------------------------------------------

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> Any:
        if self is other:
            return True
        if isinstance(other, (Methods, torch.Tensor, int, float)):
            return HANDLERS["eq"](self, other)
        return NotImplemented

    def __lt__(self, other: Any) -> Any:
        return HANDLERS[torch.lt](self, other)

    def __le__(self, other: Any) -> Any:
        return HANDLERS[torch.le](self, other)

    def __gt__(self, other: Any) -> Any:
        return HANDLERS[torch.gt](self, other)

    def __ge__(self, other: Any) -> Any:
        return HANDLERS[torch.ge](self, other)

    if not TYPE_CHECKING:  # a type checker should report unknown attributes

        def __getattr__(self, name: str) -> NoReturn:
            cls = type(self).__name__
            if name.startswith("__") or not hasattr(torch.Tensor, name):
                raise AttributeError(f"'{cls}' object has no attribute '{name}'")
            hint = _HINTS.get(name, "It has no law under a change of chart.")
            raise UntypedAttributeError(
                f"torch.Tensor.{name} is not defined for a {cls}: its result would depend on the chart. {hint} The plain "
                "numbers are in "
                ".components (or .ravel(), .to_dense())."
            )
