"""Uses of layers position by position: J = Σ_t g_t ⊗ a_t, with the inputs a_t and the backward signals g_t at positions t."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor
from torch.nn import functional

from geoad.kernels.uses import AffineUse, ConvUse, EmbeddingUse, ScaleUse, ShiftUse, Use

__all__ = [
    "Factored",
    "columns_at",
    "inputs_at",
    "is_outer",
    "patches",
    "rows_of_bias",
    "rows_of_weight",
    "second_moment",
    "signals_at",
    "write_row",
]


@dataclass(frozen=True)
class Factored:
    """r[n, k, (o, i)] = left[n, k, o] · right[n, i], for a layer that is used once at one position.

    Attributes:
        flipped: the block holds the transposed matrix, r[n, k, (i, o)].
    """

    left: Tensor
    right: Tensor
    flipped: bool = False

    def dense(self) -> Tensor:
        """(n, K, o · i)."""
        product = self.left.unsqueeze(-1) * self.right[:, None, None, :]
        return (product.mT if self.flipped else product).flatten(2)


# -- positions ---------------------------------------------------------------------------------------------------------------


@singledispatch
def inputs_at(use: Use, a: Tensor) -> Tensor:
    """The inputs (n, groups, positions, in) of an affine use or a convolution."""
    raise NotImplementedError(type(use).__name__)


@inputs_at.register
def _(use: AffineUse, a: Tensor) -> Tensor:
    return a.reshape(a.shape[0], 1, math.prod(a.shape[1:-1]), a.shape[-1])


@inputs_at.register
def _(use: ConvUse, a: Tensor) -> Tensor:
    return patches(use, a)


@singledispatch
def signals_at(use: Use, g: Tensor) -> Tensor:
    """What came back, (..., *shape), as (..., groups, positions, out)."""
    raise NotImplementedError(type(use).__name__)


@signals_at.register
def _(use: AffineUse, g: Tensor) -> Tensor:
    lead = g.shape[: g.ndim - len(use.shape)]
    return g.reshape(*lead, 1, math.prod(use.shape[:-1]), use.shape[-1])


@signals_at.register
def _(use: ConvUse, g: Tensor) -> Tensor:
    lead, axes = g.shape[: g.ndim - len(use.shape)], len(use.kernel)
    shape = use.shape if len(use.shape) == axes + 2 else (1, *use.shape)
    g = g.reshape(*lead, shape[0], use.groups, shape[1] // use.groups, math.prod(shape[2:]))
    if shape[0] == 1:
        return g.squeeze(len(lead)).mT
    n = len(lead)
    return g.permute(*range(n), n + 1, n, n + 3, n + 2).flatten(n + 1, n + 2)


@singledispatch
def columns_at(use: Use, t: Tensor, inputs: bool = False) -> Tensor:
    """Inputs (n, ...) or signals (n, *shape) as columns, (groups, in or out, n · positions)."""
    t = inputs_at(use, t) if inputs else signals_at(use, t)
    return t.permute(1, 3, 0, 2).flatten(2)


@columns_at.register
def _(use: ConvUse, t: Tensor, inputs: bool = False) -> Tensor:
    # with positions innermost throughout, blocks of memory are copied as a whole
    if inputs:
        axes = len(use.kernel)
        view = _windows(use, t).permute(2, 3, *range(4 + axes, 4 + 2 * axes), 0, 1, *range(4, 4 + axes))
        return view.reshape(use.groups, math.prod(view.shape[1 : 2 + axes]), math.prod(view.shape[2 + axes :]))
    return signals_at(use, t).mT.permute(1, 2, 0, 3).flatten(2)


@signals_at.register
def _(use: EmbeddingUse, g: Tensor) -> Tensor:
    lead = g.shape[: g.ndim - len(use.shape)]
    return g.reshape(*lead, 1, math.prod(use.shape[:-1]), use.shape[-1])


def second_moment(use: Use, a: Tensor, bias: bool) -> Tensor:
    """Σ a aᵀ over samples and positions, (groups, in, in); with `bias` a 1 is appended to a."""
    if isinstance(use, ConvUse) and use.groups == 1 and a.shape[-len(use.kernel) - 1] * use.kernel[-1] > use.shape[-1]:
        square, side, count = _moment_channels_last(use, a)
    else:
        t = columns_at(use, a, inputs=True)
        square, side, count = t @ t.mT, t.sum(-1, keepdim=True), t.shape[-1]
    if not bias:
        return square
    corner = square.new_full((square.shape[0], 1, 1), float(count))
    return torch.cat([torch.cat([square, side], -1), torch.cat([side.mT, corner], -1)], -2)


def _moment_channels_last(use: ConvUse, a: Tensor) -> tuple[Tensor, Tensor, int]:
    """With channels innermost: for many channels on small images that copies longer blocks of memory."""
    axes, channels = len(use.kernel), a.shape[-len(use.kernel) - 1]
    a = _spread(use, a.reshape(-1, *a.shape[-axes - 1 :])).movedim(1, -1).contiguous()
    view = _slid(use, a, 1)
    flat = view.movedim(1 + axes, -1).reshape(-1, math.prod(use.kernel) * channels)
    order = torch.arange(flat.shape[1], device=a.device).reshape(-1, channels).T.flatten()
    return (flat.mT @ flat)[order][:, order][None], flat.sum(0)[order][None, :, None], flat.shape[0]


def _spread(use: ConvUse, a: Tensor) -> Tensor:
    """The input (m, channels, *space) with zeros between its entries and around, cut where padding is negative."""
    if any(step > 1 for step in use.spread):
        space = [(size - 1) * step + 1 for size, step in zip(a.shape[2:], use.spread, strict=True)]
        wide = a.new_zeros(*a.shape[:2], *space)
        wide[(slice(None), slice(None), *(slice(None, None, step) for step in use.spread))] = a
        a = wide
    around = [p for pair in reversed(use.padding) for p in pair]
    return functional.pad(a, around) if any(around) else a


def _slid(use: ConvUse, a: Tensor, first: int) -> Tensor:
    """A view of the patches along the spatial axes, which begin at `first`; the axes of the kernel come last."""
    for axis, (size, stride, step) in enumerate(zip(use.kernel, use.stride, use.dilation, strict=True), start=first):
        a = a.unfold(axis, step * (size - 1) + 1, stride)[..., ::step]
    return a.flip(tuple(range(-len(use.kernel), 0))) if use.transposed else a


def patches(use: ConvUse, a: Tensor) -> Tensor:
    """(n, groups, positions, in), where in runs over the channels of a group and the kernel."""
    return _patches_of(use, a)(slice(None))


def _patches_of(use: ConvUse, a: Tensor) -> Callable[[slice], Tensor]:
    """The `patches` of any of the samples."""
    axes, inside = len(use.kernel), math.prod(use.kernel) * a.shape[-len(use.kernel) - 1] // use.groups
    if use.shape[-1] <= _NARROW and (len(use.shape) == axes + 1 or use.shape[0] == 1):
        a = _spread(use, a.reshape(a.shape[0], *a.shape[-axes - 1 :]))
        flat, places = a.flatten(1), _places(use, a.shape[1:], a.device)
        shape = use.groups, len(places) // max(1, use.groups * inside), inside
        return lambda samples: (some := flat[samples]).index_select(1, places).view(some.shape[0], *shape)
    view = _windows(use, a).permute(0, 2, 3, *range(4 + axes, 4 + 2 * axes), 1, *range(4, 4 + axes))
    shape = use.groups, inside, math.prod(view.shape[3 + axes :])

    def copied(samples: slice) -> Tensor:
        some = view[samples]
        return some.reshape(some.shape[0], *shape).mT

    return copied


_NARROW = 8
"""Views are copied in runs of this length: where they are short, it is faster to look up each number."""


def _places(use: ConvUse, shape: torch.Size, device: torch.device) -> Tensor:
    """Where the numbers of the patches lie in a padded input (channels, *space), in the order of `patches`."""
    axes = len(use.kernel)
    view = _slid(use, torch.arange(shape.numel(), device=device).reshape(use.groups, -1, *shape[1:]), 2)
    return view.permute(0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes)).flatten()


def _windows(use: ConvUse, a: Tensor) -> Tensor:
    """A view of the patches, (n, batch, groups, channels of a group, *positions, *kernel)."""
    n, axes = a.shape[0], len(use.kernel)
    a = a.reshape(n, -1, *a.shape[-axes - 1 :])
    batch, channels = a.shape[1:3]
    a = _slid(use, _spread(use, a.flatten(0, 1)), 2)
    return a.reshape(n, batch, use.groups, channels // use.groups, *a.shape[2:])


# -- rows --------------------------------------------------------------------------------------------------------------------


@singledispatch
def rows_of_weight(use: Use, a: Tensor, g: Tensor) -> Factored | Tensor:
    """The rows (n, K, size) of the weight, from what went in (n, ...) and what came back (n, K, *shape)."""
    raise NotImplementedError(type(use).__name__)


@rows_of_weight.register(AffineUse)
@rows_of_weight.register(ConvUse)
def _(use: AffineUse | ConvUse, a: Tensor, g: Tensor) -> Factored | Tensor:
    part = use.weight
    assert part is not None
    right, left = inputs_at(use, a).to(g.dtype), signals_at(use, g)
    n, k, groups, positions, out = left.shape
    if is_outer(use):
        return Factored(left[:, :, 0, 0], right[:, 0, 0], part.flipped)
    if groups == 1:  # seeds and outputs in one axis: larger matrices
        joined = left[:, :, 0].mT.reshape(n, k * out, positions) @ right[:, 0]
        return part.place(joined.reshape(n, k, *part.shape))
    return part.place((left.mT @ right.unsqueeze(1)).reshape(n, k, *part.shape))


@rows_of_weight.register
def _(use: EmbeddingUse, a: Tensor, g: Tensor) -> Tensor:
    part = use.weight
    assert part is not None
    n, k, width = g.shape[0], g.shape[1], g.shape[-1]
    tokens, back = a.reshape(n, -1), g.reshape(n, k, -1, width)
    if use.padding is not None:
        back = back * (tokens != use.padding).to(g.dtype)[:, None, :, None]
    table = g.new_zeros(n, k, part.shape[0], width)
    index = tokens[:, None, :, None].expand(n, k, tokens.shape[1], width)
    return part.place(table.scatter_add_(2, index, back))


@rows_of_weight.register
def _(use: ScaleUse, a: Tensor, g: Tensor) -> Tensor:
    part = use.weight
    assert part is not None
    a = a.reshape(a.shape[0], 1, *[1] * (len(use.shape) - a.ndim + 1), *a.shape[1:])
    return part.place(_reduced(g * a, part.shape))


def write_row(use: Use, a: Tensor, back: Tensor, name: str, target: Tensor) -> bool:
    """Write the row of the weight or the bias for one seed to `target` (n, *shape), if that takes no explicit rows."""
    weight, bias = (part if part is not None and part.name == name else None for part in (use.weight, use.bias))
    if not isinstance(use, (AffineUse, ConvUse)) or (weight is not None and bias is not None):
        return False
    if weight is not None and weight.whole:
        return _write_product(use, a, back, target)
    if bias is not None and bias.whole:
        signals = signals_at(use, back)
        target.copy_((signals.squeeze(2) if signals.shape[2] == 1 else signals.sum(2)).reshape(target.shape))
        return True
    return False


def _write_product(use: AffineUse | ConvUse, a: Tensor, back: Tensor, target: Tensor) -> bool:
    """left · right, unless there are groups.

    Where positions are summed over, this is done by portions of the samples: patches and products that fit into the cache take
    no time to be copied to where they belong. (bmm is slow where its results do not lie side by side.)
    """
    left = signals_at(use, back)
    n, groups, positions, out = left.shape
    if groups != 1 or {a.dtype, left.dtype} != {target.dtype}:
        return False
    left, place = left[:, 0].mT, target.view(n, out, target[0].numel() // out if n and out else 0)
    if positions == 1:
        torch.mul(left, inputs_at(use, a)[:, 0], out=place)
        return True
    right = _patches_of(use, a) if isinstance(use, ConvUse) else inputs_at(use, a).__getitem__
    step = max(1, min(n, _CACHE // (place.element_size() * (out + positions) * max(1, place.shape[2]))))
    product = place.new_empty(step, *place.shape[1:])
    for start in range(0, n, step):
        some = slice(start, start + step)
        lines = left[some]
        place[some] = torch.bmm(lines, right(some)[:, 0], out=product[: len(lines)])
    return True


_CACHE = 1 << 20
"""Bytes that are near at hand."""


def rows_of_bias(use: Use, g: Tensor) -> Factored | Tensor:
    """The rows of the bias."""
    part = use.bias
    assert part is not None
    if isinstance(use, ShiftUse):
        return part.place(use.sign * _reduced(g, part.shape))
    total = signals_at(use, g).sum(3).flatten(2)
    if part.whole:
        return Factored(total, torch.ones_like(total[:, 0, :1]))
    return part.place(total)


def _reduced(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(n, K, ...) summed over the axes along which `shape` was broadcast."""
    missing = values.ndim - 2 - len(shape)
    if missing:
        values = values.flatten(2, 1 + missing).sum(2) if missing > 1 else values.sum(2)
    stretched = [axis + 2 for axis, size in enumerate(shape) if size == 1 and values.shape[axis + 2] != 1]
    return values.sum(stretched, keepdim=True) if stretched else values


def is_outer(use: Use) -> bool:
    """The rows of the weight are `Factored`: an affine use at one position, of the whole matrix or its transpose."""
    part = use.weight
    if part is None or not isinstance(use, AffineUse) or not (part.whole or part.flipped):
        return False
    return math.prod(use.shape[:-1]) == 1
