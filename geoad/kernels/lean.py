"""Operations without the waste in torch's formulas for their second derivatives.

Where a gradient is differentiated again (``torch.autograd.grad`` twice), torch 2.13 computes for a convolution the cotangent of
its input whether or not somebody asks for it: for the first layer, whose input are the data, this costs as much as the whole
gradient of that layer. And for ReLU and max pooling it computes, adds and sends back zeros. `Lean` evaluates these operations
as functions with the same values and with derivatives of every order.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from geoad.kernels.ladder import at_top_level
from geoad.kernels.positions import patches
from geoad.kernels.small_images import Window, convolved, is_small
from geoad.kernels.spelled import FormulaMode

__all__ = ["Lean"]

_MANY = 1 << 15
"""Below so many numbers, calling a function of ours costs more than the zeros."""


class Lean(FormulaMode):
    """Convolutions of data, ReLU and max pooling, for derivatives by plain autograd; under a transform they are left to torch.

    >>> import torch
    >>> from geoad.kernels.lean import Lean
    >>> x, w = torch.ones(1, 1, 3), torch.ones(1, 1, 2, requires_grad=True)
    >>> with Lean():
    ...     y = torch.nn.functional.conv1d(x, w)
    >>> torch.autograd.grad(y.square().sum(), w)
    (tensor([[[8., 8.]]]),)
    """

    def __exit__(self, *error: Any) -> None:
        _local.rectified = None
        super().__exit__(*error)


# -- convolutions ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """How a convolution goes over its input."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def fits(self, x: Tensor, w: Tensor, b: Tensor | None) -> bool:
        """These numbers make sense for these tensors."""
        steps = [*self.stride, *self.dilation]
        axes = {len(each) for each in (self.stride, self.padding, self.dilation)}
        right = axes == {w.ndim - 2} and min(steps) > 0 and min(self.padding) >= 0 and self.groups > 0
        return right and x.shape[1] == w.shape[1] * self.groups and (b is None or b.shape == w.shape[:1])

    def window(self, x: Tensor, w: Tensor) -> Window:
        """The same without channels."""
        shapes = x.shape[2:], w.shape[2:], self.stride, self.padding, self.dilation
        return Window(*(tuple(shape) for shape in shapes))

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


@dataclass(frozen=True)
class _Plane(_Form):
    """A convolution of a single channel, as products with the patches P (n, positions, in) of the input.

    Attributes:
        places: the shape of the positions.
    """

    places: tuple[int, ...]

    def convolved(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """P Wᵀ + b."""
        rows = w.flatten(1).expand(len(x), -1, -1)
        y = torch.bmm(rows, x.mT) if b is None else torch.baddbmm(b.unsqueeze(-1), rows, x.mT)
        return y.view(len(x), len(w), *self.places)

    def correlated(self, x: Tensor, g: Tensor, w: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
        """Σ gᵀ P, and Σ g."""
        g = g.flatten(2)
        return torch.bmm(g, x).sum(0).view(w.shape), g.sum((0, 2)) if bias else None


_ROOM = 1 << 21
"""Up to so many numbers patches are copied for it."""


def _plane(form: _Form, window: Window, x: Tensor, w: Tensor) -> tuple[_Form, Tensor]:
    """A convolution and its input, as patches where that is several times faster: for one channel, on CPU."""
    places = window.places
    count = len(x) * math.prod(places) * w[0].numel()
    if x.device.type != "cpu" or x.shape[1] != 1 or form.groups != 1 or min(places) < 0 or not _MANY <= count <= _ROOM:
        return form, x
    rows = patches(window.use(len(w)), x.unsqueeze(1))[:, 0]
    return _Plane(form.stride, form.padding, form.dilation, 1, places), rows.contiguous()


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
    if isinstance(padding, str) or input.ndim != weight.ndim or not _is_plain(input, weight, bias):
        return None
    form = _Form(_each(stride, axes), _each(padding, axes), _each(dilation, axes), groups)
    if not form.fits(input, weight, bias):
        return None  # torch will say what is wrong
    window = form.window(input, weight)
    if groups == 1 and input.device.type == "cpu" and is_small(window, weight) and math.isfinite(float(input.detach().sum())):
        return convolved(window, input, weight, bias)
    if input.requires_grad or not weight.requires_grad:
        return None
    return cast(Tensor, _Convolution.apply(*_plane(form, window, input, weight), weight, bias))


def _each(number: int | Sequence[int], axes: int) -> list[int]:
    numbers = [number] if isinstance(number, int) else list(number)
    return numbers * axes if len(numbers) == 1 else numbers


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Real numbers of one kind, by which derivatives are recorded."""
    plain = all(each is None or type(each) in (Tensor, torch.nn.Parameter) for each in (x, weight, bias))
    real = x.is_floating_point() and x.dtype == weight.dtype  # torch takes complex convolutions apart
    return plain and real and (weight.requires_grad or x.requires_grad) and _recording(x)


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
    if inplace or not _worthwhile(input):
        return None
    output = cast(Tensor, _ReLU.apply(input))
    _local.rectified = _Rectified(input, weakref.ref(output), (input._version, output._version))
    return output


@dataclass(frozen=True)
class _Rectified:
    """The last ReLU: what went in, and what came out."""

    input: Tensor
    output: weakref.ref[Tensor]
    versions: tuple[int, int]

    def gave(self, output: Tensor) -> bool:
        """`output` is max(input, 0), and no hook waits for its gradient."""
        same = self.output() is output and self.versions == (self.input._version, output._version)
        return same and not output.retains_grad and not output._backward_hooks


class _Local(threading.local):
    rectified: _Rectified | None = None


_local = _Local()


def _worthwhile(x: Tensor) -> bool:
    """Derivatives by `x` are recorded, and it has many numbers."""
    return x.numel() >= _MANY and type(x) is Tensor and x.requires_grad and x.is_floating_point() and _recording(x)


# -- max pooling -------------------------------------------------------------------------------------------------------------


_CHANNELS = 8
"""From so many channels on torch's vectors over channels pay for the other layout, on CPU."""


@dataclass(frozen=True)
class _Windows:
    """How max pooling goes over its input (samples, channels, *places), of two or three axes of places."""

    shape: tuple[int, ...]
    layout: tuple[int, ...]
    numbers: Sequence[list[int]]
    """Size, stride, padding and dilation."""
    ceil_mode: bool

    def pooled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The maxima and their places.

        Over channels that lie side by side torch's loop is several times faster than over planes; both take the first maximum.
        """
        axes = len(self.shape) - 2
        pool = getattr(torch.ops.aten, f"max_pool{axes}d_with_indices")
        if x.device.type == "cpu" and x.is_contiguous() and x.shape[1] >= _CHANNELS:
            beside = torch.channels_last if axes == 2 else torch.channels_last_3d
            y, at = pool(x.contiguous(memory_format=beside), *self.numbers, self.ceil_mode)
            return y.contiguous(), at.contiguous()
        return pool(x, *self.numbers, self.ceil_mode)

    def spread(self, g: Tensor, at: Tensor) -> Tensor:
        """The transpose of x ↦ x[at] at g."""
        backward = getattr(torch.ops.aten, f"max_pool{len(self.shape) - 2}d_with_indices_backward")
        like = g.new_empty_strided(self.shape, self.layout)  # its numbers do not matter
        return backward(g, like, *self.numbers, self.ceil_mode, at)


class _MaxPool(torch.autograd.Function):
    """x ↦ x[at], with the places of the maxima as constants."""

    @staticmethod
    def forward(ctx: Any, windows: _Windows, x: Tensor) -> Tensor:
        y, at = windows.pooled(x)
        ctx.windows = windows
        ctx.save_for_backward(at)
        return y

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return None, _Unpool.apply(ctx.windows, cotangents[0], *ctx.saved_tensors)


class _Unpool(torch.autograd.Function):
    """Its transpose."""

    @staticmethod
    def forward(ctx: Any, windows: _Windows, g: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(at)
        return windows.spread(g, at)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (at,) = ctx.saved_tensors
        return None, cotangents[0].flatten(2).gather(2, at.flatten(2)).view(at.shape), None


def _max_pool(axes: int) -> Callable[..., Tensor | None]:
    def formula(
        input: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Tensor | None:
        if return_indices or input.ndim != axes + 2 or not _worthwhile(input):
            return None
        before = _local.rectified
        before = before.input if before is not None and before.gave(input) else None  # max pooling and ReLU commute
        input = input if before is None else before
        step = kernel_size if stride is None or (not isinstance(stride, int) and not len(stride)) else stride
        numbers = [_each(each, axes) for each in (kernel_size, step, padding, dilation)]
        x = input if axes > 1 else input.unsqueeze(2)  # torch has it as one row too
        if axes == 1:
            numbers = [[n, *each] for n, each in zip((1, 1, 0, 1), numbers, strict=True)]
        y = cast(Tensor, _MaxPool.apply(_Windows(tuple(x.shape), x.stride(), numbers, ceil_mode), x))
        y = y if axes > 1 else y.squeeze(2)
        return y if before is None else torch.relu(y) if (fewer := _relu(y)) is None else fewer

    return formula


Lean.formulas = {
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    functional.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    functional.max_pool1d: _max_pool(1),
    functional.max_pool2d: _max_pool(2),
    functional.max_pool3d: _max_pool(3),
    torch.max_pool1d: _max_pool(1),
    torch.max_pool2d: _max_pool(2),
    torch.max_pool3d: _max_pool(3),
}
