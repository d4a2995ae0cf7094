"""Derivatives of sums of functions of plain blocks: plain tensors in and out, one part at a time.

A *part* is ``(coefficient, function of blocks)``; an objective is an iterable of parts (the batches of a data set), so
memory is bounded by the largest part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from geoad.errors import GeometryError
from geoad.kernels import products
from geoad.params import Blocks, axpy, scale

__all__ = ["Part", "gradient", "hessian_product", "require_scalar", "value", "value_and_gradient"]

Part = tuple[float, Callable[[Blocks], Tensor]]


def require_scalar(result: Any) -> Tensor:
    """`result` if it is a 0-dimensional tensor, else an error."""
    if not isinstance(result, Tensor) or result.ndim != 0:
        found = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise GeometryError(
            f"a scalar field must return a 0-dimensional tensor, found {found}. Its differential is a covector only for "
            "a single "
            "number; reduce the result (.sum(), .mean()), or use geoad.jacobian for maps into a space."
        )
    return result


def value(parts: Iterable[Part], x: Blocks) -> Tensor:
    """Σ c f(x)."""
    total: Tensor | None = None
    for coefficient, fn in parts:
        part = require_scalar(fn(x))
        part = part if coefficient == 1 else coefficient * part
        total = part if total is None else total + part
    return _require(total)


def _require(total: Any) -> Any:
    if total is None:
        raise GeometryError(
            "the data set is empty: there is no batch to evaluate the loss on, and a mean over nothing is undefined. Pass a "
            "loader that yields at least one batch."
        )
    return total


def gradient(parts: Iterable[Part], x: Blocks) -> Blocks:
    """Σ c ∇f(x)."""
    return value_and_gradient(parts, x)[1]


def value_and_gradient(parts: Iterable[Part], x: Blocks) -> tuple[Tensor, Blocks]:
    """Σ c f(x) and its gradient."""
    total: tuple[Tensor, Blocks] | None = None
    for coefficient, fn in parts:

        def with_value(blocks: Blocks, fn: Callable[[Blocks], Tensor] = fn) -> tuple[Tensor, Tensor]:
            result = require_scalar(fn(blocks))
            return result, result

        slope, result = products.gradient(with_value, x)
        if coefficient != 1:
            slope, result = scale(coefficient, slope), coefficient * result
        total = (result, slope) if total is None else (total[0] + result, axpy(1.0, total[1], slope))
    return _require(total)


def hessian_product(parts: Iterable[Part], x: Blocks, v: Blocks) -> Blocks:
    """Σ c ∇²f(x) v, forward over reverse where torch can."""
    total: Blocks | None = None
    for coefficient, fn in parts:
        product: Blocks = products.hessian_product(fn, x, v)
        if coefficient != 1:
            product = scale(coefficient, product)
        total = product if total is None else axpy(1.0, total, product)
    return _require(total)
