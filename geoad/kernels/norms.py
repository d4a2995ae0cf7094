"""Normalisation layers whose second derivatives are right.

The fused ``layer_norm``, ``instance_norm`` and (in training mode) ``batch_norm`` of torch 2.13 treat the saved mean and
variance as constants in some second derivatives and are wrong in silence by tens of percent: under jvp of jvp (pytorch issue
196700), and under any derivative of a ``vmap``-ped vjp, which includes ``torch.func.hessian`` and ``jacfwd(jacrev(f))``. So is
every second derivative of the fused weight normalisation. Under nested transforms geoad evaluates networks with the formulas
of these layers instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from geoad.kernels import solves
from geoad.kernels.spelled import FormulaMode, orders

__all__ = ["SpelledOut", "spelled_out"]


def spelled_out() -> AbstractContextManager[Any]:
    """`SpelledOut` under derivatives of derivatives by ``torch.func`` (or in the compiler, which hides them), else nothing."""
    return SpelledOut() if orders() > 1 else nullcontext()


class SpelledOut(FormulaMode):
    """Layer, instance, batch and weight norm by their formulas; solves and determinants by those of `geoad.kernels.solves`.

    >>> import torch
    >>> from geoad.kernels.norms import SpelledOut
    >>> x, f = torch.tensor([[0.3, -1.0, 2.0]]), lambda x: torch.nn.functional.layer_norm(x, (3,))
    >>> with SpelledOut():
    ...     spelled = f(x)
    >>> torch.allclose(f(x), spelled)
    True
    """


def _normalised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dims = range(-len(normalized_shape), 0)
    return _affine(_normalised(input, tuple(dims), eps), weight, bias, tuple(normalized_shape))


def _channels(x: Tensor) -> tuple[int, ...]:
    return (1, -1, *[1] * (x.ndim - 2))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """In training mode; the running statistics are left as they are. In eval mode torch's own is right."""
    if not training:
        return None
    return _affine(_normalised(input, (0, *range(2, input.ndim)), eps), weight, bias, _channels(input))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if not use_input_stats:
        return None
    return _affine(_normalised(input, tuple(range(2, input.ndim)), eps), weight, bias, _channels(input))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = list(range(v.ndim)) if dim == -1 else [i for i in range(v.ndim) if i != dim]
    norm = torch.linalg.vector_norm(v, dim=others, keepdim=True) if others else v.abs()  # no axes would mean all
    return v * (g / norm.reshape(g.shape))


SpelledOut.formulas = {
    torch._weight_norm: _weight_norm,  # pyright: ignore
    functional.layer_norm: _layer_norm,
    functional.batch_norm: _batch_norm,
    functional.instance_norm: _instance_norm,
    **solves.FORMULAS,
}
