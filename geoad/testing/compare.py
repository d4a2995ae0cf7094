"""Results of a user's function, taken apart and compared number by number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.tensors import TypedTensor, describe

__all__ = ["Leaf", "difference", "leaves", "show"]

Leaf = tuple[str, Any]
"""(where it is in the result, the leaf)."""


def leaves(result: Any, where: str = "") -> Iterator[Leaf]:
    """The leaves of nested dicts, lists, tuples and dataclasses, with their places, like ``['a'][0]``."""
    if isinstance(result, Mapping):
        for key, value in result.items():
            yield from leaves(value, f"{where}[{key!r}]")
    elif isinstance(result, Sequence) and not isinstance(result, (str, bytes)) and not isinstance(result, TypedTensor):
        for i, value in enumerate(result):
            yield from leaves(value, f"{where}[{i}]")
    elif is_dataclass(result) and not isinstance(result, type):
        for field in fields(result):
            yield from leaves(getattr(result, field.name), f"{where}.{field.name}")
    else:
        yield where, result


def _numbers(leaf: Any) -> Tensor | None:
    """The leaf as a tensor of float64 or complex128 numbers, or None if it holds none."""
    if not isinstance(leaf, (Tensor, bool, int, float, complex)) and not hasattr(leaf, "__array__"):
        return None
    tensor = leaf if isinstance(leaf, Tensor) else torch.as_tensor(leaf)
    return tensor.detach().to("cpu", torch.complex128 if tensor.is_complex() else torch.float64)


def difference(expected: Any, found: Any, rtol: float, atol: float) -> str | None:
    """What is wrong with `found`, or None if both leaves agree.

    Tensors agree if they have the same shape and :math:`|a - b|_∞ ≤ rtol · max(|a|_∞, |b|_∞) + atol`; infinities must be the
    same, and a nan agrees with nothing. Leaves that hold no numbers (strings, None) must be equal.
    """
    a, b = _numbers(expected), _numbers(found)
    if a is None or b is None:
        if (a is None) != (b is None):
            return f"a {type(expected).__name__} here, a {type(found).__name__} there"
        return None if _equal(expected, found) else "they are not equal"
    if a.shape != b.shape:
        return f"the shapes are {tuple(a.shape)} and {tuple(b.shape)}"
    if bool(a.isnan().any()) or bool(b.isnan().any()):
        return "there are nans, which agree with nothing"
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(a[~finite], b[~finite]):
        return "one is infinite where the other is not"
    a, b = a[finite], b[finite]
    if a.numel() == 0:
        return None
    size = max(float(a.abs().max()), float(b.abs().max()))
    gap = float((a - b).abs().max())
    if gap <= rtol * size + atol:
        return None
    return f"they differ by {gap:.3g}, relative {gap / size:.2g} (allowed {rtol:.2g})"


def _equal(a: Any, b: Any) -> bool:
    for leaf in (a, b):
        if callable(leaf) or isinstance(leaf, TypedTensor):
            raise GeometryError(
                f"the function returned {describe(leaf)}, which holds no numbers to compare. Return numbers, tensors, "
                "typed tensors at a point, or dicts, lists and tuples of them; evaluate fields at the point first."
            )
    return bool(a == b)


def show(leaf: Any) -> str:
    """A leaf for a message: a few numbers, with all their digits."""
    tensor = _numbers(leaf)
    if tensor is None:
        return repr(leaf)
    if tensor.numel() == 1:
        return repr(tensor.item())
    first = ", ".join(f"{value:.10g}" for value in tensor.flatten()[:4].tolist())
    return f"[{first}{', ...' if tensor.numel() > 4 else ''}] of shape {tuple(tensor.shape)}"
