"""Derivatives of sums of functions of plain blocks: plain tensors in and out, one part at a time.

A *part* is ``(coefficient, function of blocks)``; an objective is an iterable of parts (the batches of a data set), so
memory is bounded by the largest part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from geoad.errors import GeometryError
from geoad.kernels import products, spread
from geoad.params import Blocks, axpy, scale

__all__ = ["Part", "Shared", "gradient", "hessian_product", "require_scalar", "value", "value_and_gradient"]

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
        if isinstance(fn, Shared):
            result, slope = fn.value_and_gradient(x)
        else:
            slope, result = products.gradient(_with_value(fn), x)
        if coefficient != 1:
            slope, result = scale(coefficient, slope), coefficient * result
        total = (result, slope) if total is None else (total[0] + result, axpy(1.0, total[1], slope))
    return _require(total)


def _with_value(fn: Callable[[Blocks], Tensor]) -> Callable[[Blocks], tuple[Tensor, Tensor]]:
    def both(x: Blocks) -> tuple[Tensor, Tensor]:
        result = require_scalar(fn(x))
        return result, result

    return both


def hessian_product(parts: Iterable[Part], x: Blocks, v: Blocks) -> Blocks:
    """Σ c ∇²f(x) v."""
    total: Blocks | None = None
    for coefficient, fn in parts:
        product: Blocks = fn.hessian_product(x, v) if isinstance(fn, Shared) else products.hessian_product(fn, x, v)
        if coefficient != 1:
            product = scale(coefficient, product)
        total = product if total is None else axpy(1.0, total, product)
    return _require(total)


class Shared:
    """Σ_r Σ c f(x) over processes r that have parts of their own: a function as any other, and one exchange for a derivative.

    Args:
        own: the parts of this process; called for each pass.
        exchange: the processes.
        call: what the function is, the same in all of them.
    """

    def __init__(self, own: Callable[[], Iterable[Part]], exchange: spread.Exchange, call: str) -> None:
        self.own, self.exchange, self.call = own, exchange, call

    def _summed(self, what: str, x: Blocks, compute: Callable[[Blocks], Any], along: Blocks | None = None) -> Any:
        call = f"{what} of {self.call} at the point {spread.fingerprint(x)}"
        if along is not None:
            call += f" along {spread.fingerprint(along)}"
        with self.exchange.guarded(call):
            mine = compute(spread.spread(x, self.exchange, call))
        return spread.total(mine, self.exchange, call)

    def __call__(self, x: Blocks) -> Tensor:
        return self._summed("value", x, lambda y: value(self.own(), y))

    def value_and_gradient(self, x: Blocks) -> tuple[Tensor, Blocks]:
        """As the function `value_and_gradient`."""
        return self._summed("value and gradient", x, lambda y: value_and_gradient(self.own(), y))

    def hessian_product(self, x: Blocks, v: Blocks) -> Blocks:
        """As the function `hessian_product`."""

        def compute(y: Blocks) -> Blocks:
            return hessian_product(self.own(), y, spread.spread(v, self.exchange, self.call))

        return self._summed("Hessian product", x, compute, v)

    def after(self, way: Callable[[Blocks], Blocks]) -> Shared:
        """The function of the coordinates that `way` starts from."""

        def own() -> Iterable[Part]:
            for coefficient, fn in self.own():
                yield coefficient, lambda x, fn=fn: fn(way(x))

        return Shared(own, self.exchange, self.call)
