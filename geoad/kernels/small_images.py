"""Convolutions of small images, as products with one matrix.

A convolution is a linear map of images. Where these are small, so is its matrix, and one product of matrices takes less time
than loops over places, though it multiplies zeros as well; most of all for derivatives, which are such products again.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from geoad.kernels.positions import patches
from geoad.kernels.uses import ConvUse

__all__ = ["Window", "convolved", "is_small"]

_FEW = 1 << 15
"""So many numbers may a matrix have: with more, torch's convolutions are faster, unless most of a kernel lies outside."""


@dataclass(frozen=True)
class Window:
    """How a convolution goes over an image, of any number of axes.

    Attributes:
        image: the shape of the places that it reads.
        kernel: the shape of the window.
        stride: its steps.
        padding: zeros on both sides.
        dilation: the steps inside of the window.
    """

    image: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def places(self) -> tuple[int, ...]:
        """The shape of the places that it writes; negative where the window does not fit."""
        spans = [step * (size - 1) + 1 for size, step in zip(self.kernel, self.dilation, strict=True)]
        rest = [n + 2 * pad - span for n, pad, span in zip(self.image, self.padding, spans, strict=True)]
        return tuple(left // step + 1 if left >= 0 else -1 for left, step in zip(rest, self.stride, strict=True))

    def use(self, out: int) -> ConvUse:
        """The use of a layer with so many channels of outputs."""
        around, ones = tuple((pad, pad) for pad in self.padding), (1,) * len(self.kernel)
        return ConvUse(None, None, (out, *self.places), 1, self.kernel, self.stride, self.dilation, around, ones)


def is_small(window: Window, weight: Tensor) -> bool:
    """The matrix of the convolution with `weight` (out, in, *kernel) is worth being made."""
    places = window.places
    if min(places) < 0 or min(window.image) == 0:
        return False
    read, written = math.prod(window.image), math.prod(places)
    count = weight.shape[0] * weight.shape[1] * read * written
    return count <= _FEW or 2 * read <= math.prod(window.kernel)


def convolved(window: Window, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x * w + b of images x (n, in, *image), as the product with a matrix of shape (in · image, out · places).

    Args:
        window: how the weight goes over the images.
        x: the images; their numbers must be finite, for each meets the zeros of the matrix.
        weight: (out, in, *kernel).
        bias: (out,).

    Returns:
        Images (n, out, *places), differentiable any number of times.

    >>> import torch
    >>> from geoad.kernels.small_images import Window, convolved
    >>> window = Window(image=(4,), kernel=(2,), stride=(1,), padding=(0,), dilation=(1,))
    >>> convolved(window, torch.arange(4.0).view(1, 1, 4), torch.tensor([[[1.0, 10.0]]]))
    tensor([[[10., 21., 32.]]])
    """
    out, channels = weight.shape[:2]
    images, numbers = x.flatten(1), [weight.flatten(), weight.new_zeros(1)]
    if bias is not None:  # of one more place, where every image is 1
        images, numbers = torch.cat([images, images.new_ones(len(x), 1)], 1), [*numbers, bias]
    table = _numbers(window, out, channels, bias is not None)
    matrix = torch.cat(numbers).index_select(0, table.flatten()).view(table.shape)
    return (images @ matrix).view(len(x), out, *window.places)


@functools.lru_cache(maxsize=16)
def _numbers(window: Window, out: int, channels: int, bias: bool) -> Tensor:
    """Which number stands at each place of the matrix: those of the weight in their order, then zero, then the bias."""
    read, written, size = math.prod(window.image), math.prod(window.places), math.prod(window.kernel)
    named = torch.arange(1, read + 1, device="cpu").view(1, 1, *window.image)
    seen = patches(window.use(out), named)[0, 0]  # (places, kernel): what lies below each number, 0 for padding
    hit = torch.full((written, read + 1), -1, device="cpu")
    hit = hit.scatter(1, seen, torch.arange(size, device="cpu").expand(written, size))[:, 1:].T[None, :, None, :]
    first = torch.arange(out * channels, device="cpu").view(out, channels).T * size  # where the kernel of (in, out) begins
    zero = out * channels * size
    table = (first[:, None, :, None] + hit).masked_fill(hit < 0, zero).view(channels * read, out * written)
    if not bias:
        return table
    last = torch.arange(zero + 1, zero + 1 + out, device="cpu").repeat_interleave(written)
    return torch.cat([table, last[None]])
