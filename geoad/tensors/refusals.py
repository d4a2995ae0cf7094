"""What the gate of ``torch.*`` functions refuses, with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from geoad.errors import VarianceError
from geoad.tensors.base import HANDLERS, TypedTensor, describe

__all__ = ["on", "refuse"]


def on(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let these torch functions through the gate."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        for function in functions:
            HANDLERS[function] = handler
        return handler

    return register


_REMEDIES = {
    "norm": "For an invariant length say with respect to which metric: G.norm(v).",
    "vector_norm": "For an invariant length say with respect to which metric: G.norm(v).",
    "matrix_norm": "For an invariant size use E = G.inverse() @ B and E.eigenvalues().",
    "dist": "For an invariant distance of vectors use G.norm(u - v).",
    "eigh": "Use geoad.eigh(B, metric=G): eigenvalues with respect to a metric, and a G-orthonormal frame.",
    "svd": "Singular values need an inner product on both sides; use geoad.eigh(B, metric=G).",
    "diagonal": "The diagonal depends on the chart.",
    "diag": "The diagonal depends on the chart.",
    "cat": "Typed axes are not concatenated; torch.stack makes a batch.",
    "eq": "To compare two objects of one type use torch.allclose(v, w) or torch.equal(v, w).",
    "ne": "To compare two objects of one type use torch.allclose(v, w) or torch.equal(v, w).",
    **dict.fromkeys(
        ("sub", "add", "isub", "iadd", "copy", "lerp", "addcmul", "addcdiv"),
        "Parameters and other plain numbers have no chart: move a point with p.retract(v, t), or step the parameters with "
        "geoad.optim.",
    ),
}


def refuse(func: Any, args: Any) -> Any:
    """Raise the error for a torch function that has no typing rule."""
    name = getattr(func, "__name__", str(func)).strip("_")
    if name == "get":  # an attribute of torch.Tensor that is asked for through the gate
        name = str(getattr(func, "__self__", func))
    found = next((describe(arg) for arg in args if isinstance(arg, TypedTensor)), "a typed object")
    short = name.removeprefix("linalg_")
    remedy = _REMEDIES.get(short, "It has no law under a change of chart.")
    raise VarianceError(
        f"torch.{'linalg.' if short != name else ''}{short} is not defined for {found}: its result would depend on the "
        f"chart. {remedy} The plain numbers are in "
        ".components (or .ravel(), .to_dense())."
    )


HANDLERS["refuse"] = refuse
