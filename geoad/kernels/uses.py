"""How layers use their parameters: each kind of use is linear in them, and says what their derivatives are made of.

A *use* is an operation of a network that is linear in a parameter; its input a and what comes back to its output, g, give the
derivative. Parameters may be seen through views (transposed, reshaped, sliced): a `Part` says which entries are meant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

__all__ = ["AffineUse", "ConvUse", "EmbeddingUse", "Part", "ScaleUse", "ShiftUse", "Use", "contiguous_strides"]


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides.

    >>> contiguous_strides((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


@dataclass(frozen=True, repr=False)
class Part:
    """Entries of a block, arranged in another shape: entry i lies at offset + Σ_a i_a strides_a of the raveled block."""

    name: str
    size: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @staticmethod
    def of(name: str, block: Tensor) -> Part:
        """The whole block."""
        shape = tuple(block.shape)
        return Part(name, block.numel(), shape, contiguous_strides(shape))

    def __repr__(self) -> str:
        return f"'{self.name}'" if self.whole else f"'{self.name}'[{self.offset}: {self.shape} by {self.strides}]"

    @property
    def whole(self) -> bool:
        """All entries in their order."""
        return self.offset == 0 and math.prod(self.shape) == self.size and self._in_order(self.shape, self.strides)

    @property
    def complete(self) -> bool:
        """All entries, each once, in any order of the axes."""
        if self.offset or math.prod(self.shape) != self.size:
            return False
        order = sorted(zip(self.strides, self.shape, strict=True), reverse=True)
        return self._in_order(tuple(n for _, n in order), tuple(s for s, _ in order))

    @property
    def flipped(self) -> bool:
        """A matrix whose transpose is the whole block."""
        if len(self.shape) != 2 or self.offset or math.prod(self.shape) != self.size:
            return False
        return self._in_order(self.shape[::-1], self.strides[::-1])

    @staticmethod
    def _in_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
        return all(n == 1 or s == t for n, s, t in zip(shape, strides, contiguous_strides(shape), strict=True))

    @property
    def t(self) -> Part:
        """The last two axes exchanged."""
        *lead, a, b = range(len(self.shape))
        return self.permuted((*lead, b, a))

    def permuted(self, axes: Sequence[int]) -> Part:
        """The axes in another order."""
        shape, strides = tuple(self.shape[i] for i in axes), tuple(self.strides[i] for i in axes)
        return Part(self.name, self.size, shape, strides, self.offset)

    def index(self, device: torch.device | None = None) -> Tensor:
        """The places of the entries in the raveled block, in this shape."""
        total = torch.full(self.shape, self.offset, device=device, dtype=torch.long)
        for axis, (n, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            steps = stride * torch.arange(n, device=device)
            total += steps.reshape(n, *[1] * (len(self.shape) - axis - 1))
        return total

    def place(self, values: Tensor) -> Tensor:
        """(..., *shape) -> (..., size): the entries where they belong, zero elsewhere."""
        lead = values.shape[: values.ndim - len(self.shape)]
        if self.whole:
            return values.reshape(*lead, self.size)
        if self.complete:
            n = len(lead)
            order = sorted(range(len(self.shape)), key=lambda axis: (-self.strides[axis], -self.shape[axis]))
            return values.permute(*range(n), *(n + axis for axis in order)).reshape(*lead, self.size)
        flat = values.reshape(*lead, math.prod(self.shape))
        return flat.new_zeros(*lead, self.size).index_add_(-1, self.index(values.device).flatten(), flat)

    def take(self, block: Tensor) -> Tensor:
        """(..., size) -> (..., *shape): the transpose of `place`."""
        if self.whole:
            return block.reshape(*block.shape[:-1], *self.shape)
        return block[..., self.index(block.device)]


@dataclass(frozen=True)
class Use:
    """An operation that is linear in parameters.

    Attributes:
        weight: what multiplies the input, or None if that is no parameter, or not covered.
        bias: what is added, or None.
        shape: the shape of the output for a single sample, with its batch axis of 1.
    """

    weight: Part | None
    bias: Part | None
    shape: tuple[int, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The blocks, each once."""
        return tuple(dict.fromkeys(part.name for part in (self.weight, self.bias) if part is not None))

    def only(self, names: frozenset[str]) -> Self | None:
        """The use as far as it concerns these blocks."""
        weight = self.weight if self.weight is not None and self.weight.name in names else None
        bias = self.bias if self.bias is not None and self.bias.name in names else None
        return None if weight is None and bias is None else replace(self, weight=weight, bias=bias)


@dataclass(frozen=True)
class AffineUse(Use):
    """out = a Wᵀ + b, with W (out, in) and b (out,)."""


@dataclass(frozen=True)
class ConvUse(Use):
    """A convolution: a Wᵀ + b at each position, where a are patches of the input.

    The weight has shape (groups, out, in, *kernel), out and in being those of a group. A transposed convolution is one of the
    input with ``spread - 1`` zeros between its entries, by the kernel turned round; here its patches are turned instead.

    Attributes:
        groups: the groups of channels.
        kernel: the size of the kernel.
        stride, dilation: for each spatial axis.
        padding: (before, after) for each spatial axis; negative ones cut off.
        spread: for each spatial axis, 1 for a usual convolution.
        transposed: the kernel is turned round.
    """

    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    spread: tuple[int, ...]
    transposed: bool = False


@dataclass(frozen=True)
class EmbeddingUse(Use):
    """out = W[a] for indices a, W (count, width); no derivative at `padding`."""

    padding: int | None = None


@dataclass(frozen=True)
class ScaleUse(Use):
    """out = s ⊙ a, broadcast."""


@dataclass(frozen=True)
class ShiftUse(Use):
    """out = a ± b, broadcast.

    Attributes:
        sign: of b.
    """

    sign: int = 1
