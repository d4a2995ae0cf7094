"""Operations without the waste in torch's formulas for their second derivatives.

Where a gradient is differentiated again (``torch.autograd.grad`` twice), torch 2.13 computes for a convolution the cotangent of
its input whether or not somebody asks for it: for the first layer, whose input are the data, this costs as much as the whole
gradient of that layer. And for ReLU it computes, adds and sends back zeros. `Lean` evaluates these operations as functions with
the same values and with derivatives of every order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from geoad.kernels.ladder import at_top_level
from geoad.kernels.spelled import FormulaMode

__all__ = ["Lean"]

_MANY = 1 << 15
"""Below so many numbers, calling a function of ours costs more than the zeros."""


class Lean(FormulaMode):
    """Convolutions of data and ReLU, for derivatives by plain autograd; under a transform they are left to torch.

    >>> import torch
    >>> from geoad.kernels.lean import Lean
    >>> x, w = torch.ones(1, 1, 3), torch.ones(1, 1, 2, requires_grad=True)
    >>> with Lean():
    ...     y = torch.nn.functional.conv1d(x, w)
    >>> torch.autograd.grad(y.square().sum(), w)
    (tensor([[[8., 8.]]]),)
    """


# -- convolutions ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """How a convolution goes over its input."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def convolved(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """x * w + b."""
        return torch.convolution(x, w, b, *self._arguments())

    def correlated(self, x: Tensor, g: Tensor, w: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        """The transpose of (w, b) ↦ x * w + b at g; of `w` only the shape matters."""
        backward: Any = torch.ops.aten.convolution_backward
        _, gw, gb = backward(g, x, w, [len(w)] if bias else None, *self._arguments(), [False, True, bias])
        return gw, gb

    def _arguments(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups


class _Convolution(torch.autograd.Function):
    """(w, b) ↦ x * w + b."""

    @staticmethod
    def forward(ctx: Any, form: _Form, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.form, ctx.bias = form, b is not None
        ctx.save_for_backward(x, w)
        return form.convolved(x, w, b)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        x, w = ctx.saved_tensors
        return None, None, *_Correlation.apply(ctx.form, x, cotangents[0], w.detach(), ctx.bias)


class _Correlation(torch.autograd.Function):
    """Its transpose."""

    @staticmethod
    def forward(ctx: Any, form: _Form, x: Tensor, g: Tensor, w: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        ctx.form = form
        ctx.save_for_backward(x)
        return form.correlated(x, g, w, bias)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return None, None, _Convolution.apply(ctx.form, *ctx.saved_tensors, *cotangents), None, None


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor | None:
    axes = weight.ndim - 2
    if isinstance(padding, str) or input.ndim != weight.ndim or not _is_linear(input, weight, bias):
        return None
    form = _Form(_each(stride, axes), _each(padding, axes), _each(dilation, axes), groups)
    return cast(Tensor, _Convolution.apply(form, input, weight, bias))


def _each(number: int | Sequence[int], axes: int) -> list[int]:
    numbers = [number] if isinstance(number, int) else list(number)
    return numbers * axes if len(numbers) == 1 else numbers


def _is_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Derivatives are recorded, and those by the weight alone."""
    plain = all(each is None or type(each) in (Tensor, torch.nn.Parameter) for each in (x, weight, bias))
    real = x.is_floating_point() and x.dtype == weight.dtype  # torch takes complex convolutions apart
    return plain and real and weight.requires_grad and not x.requires_grad and _recording(x)


def _recording(x: Tensor) -> bool:
    return torch.is_grad_enabled() and at_top_level() and not torch.is_autocast_enabled(x.device.type)


# -- ReLU --------------------------------------------------------------------------------------------------------------------


class _ReLU(torch.autograd.Function):
    """max(x, 0), with the derivative [x > 0] as a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return torch.ops.aten.threshold_backward(cotangents[0], ctx.saved_tensors[0].detach(), 0)


def _relu(input: Tensor, inplace: bool = False) -> Tensor | None:
    if inplace or input.numel() < _MANY or not (type(input) is Tensor and input.requires_grad and _recording(input)):
        return None
    return cast(Tensor, _ReLU.apply(input))


Lean.formulas = {
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    functional.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
}
