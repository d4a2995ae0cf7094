"""Permutations of the entries of a block, with or without signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.maps.base import BlockMap

__all__ = ["Permutation"]


class Permutation(BlockMap):
    """ψ_i = s_i θ_{π(i)}: a reordering of the entries, exact in every precision.

    Args:
        permutation: π as a sequence of indices; drawn if None.
        dim: the axis that is permuted, a slice as a whole (``dim=0`` of a weight: its output units). ``None``: the
            entries of the raveled block. Blocks without axes keep their only entry.
        signs: s, a sequence of 1 and -1 in the order of ψ, ``"random"``, or None for no signs.

    >>> import torch, geoad
    >>> chart = geoad.Chart({"x": (3,)}, name="x")
    >>> psi = chart.reparametrize(geoad.maps.Permutation([2, 0, 1], signs=[1, 1, -1])).target
    >>> chart.point(torch.tensor([1.0, 2.0, 3.0])).to(psi).components
    tensor([ 3.,  1., -2.])
    """

    linear = True
    monomial = True
    order: Tensor
    back: Tensor
    signs: Tensor

    def __init__(
        self,
        permutation: Sequence[int] | Tensor | None = None,
        dim: int | None = None,
        signs: Sequence[float] | Tensor | Literal["random"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.generator = generator
        self._order = None if permutation is None else torch.as_tensor(permutation).detach().clone()
        self._draws_signs = isinstance(signs, str)
        self._signs: Tensor | None = None
        if isinstance(signs, str) and signs != "random":
            raise GeometryError(
                f"Permutation got signs={signs!r}. A sign is 1 or -1; pass a sequence of them, 'random', or None."
            )
        if signs is not None and not isinstance(signs, str):
            self._signs = torch.as_tensor(signs).detach().to(dtype=torch.float64, copy=True)
            if not bool((self._signs.abs() == 1).all()):
                raise GeometryError(
                    f"Permutation got signs {self._signs.tolist()}. Numbers other than 1 and -1 stretch the axes and "
                    "are no permutation; use maps.Scale for factors."
                )

    def extra_repr(self) -> str:
        return f"dim={self.dim}"

    def prepare_block(self, shape: torch.Size) -> None:
        self._axis = self._find_axis(shape)
        size = shape.numel() if self._axis is None else shape[self._axis]
        order = self._order
        if order is None:
            order = torch.randperm(size, generator=self.generator, device=_device(self.generator)).cpu()
        elif order.shape != (size,) or not torch.equal(order.sort().values, torch.arange(size, device=order.device)):
            raise GeometryError(
                f"Permutation of shape {tuple(order.shape)} does not reorder the {size} entries of block '{self.name}' "
                f"with shape {tuple(shape)} (dim={self.dim}). Every index from 0 to {size - 1} has to occur once; pass "
                "such a sequence, or select the blocks by a pattern."
            )
        signs = self._signs
        if self._draws_signs:
            drawn = torch.randint(0, 2, (size,), generator=self.generator, device=_device(self.generator))
            signs = (2 * drawn - 1).to("cpu", torch.float64)
        if signs is not None and signs.shape != (size,):
            raise GeometryError(
                f"Permutation has signs of shape {tuple(signs.shape)} for {size} entries of block '{self.name}' "
                f"(dim={self.dim}). Each entry of ψ has one sign; pass {size} of them."
            )
        self._order = self._signs = None
        self.register_buffer("order", order.long())
        self.register_buffer("back", order.long().argsort())
        self._has_signs = signs is not None
        if signs is not None:
            self.register_buffer("signs", signs)

    def _find_axis(self, shape: torch.Size) -> int | None:
        if self.dim is None or len(shape) == 0:
            return None
        if not -len(shape) <= self.dim < len(shape):
            raise GeometryError(
                f"Permutation was asked to permute axis {self.dim} of block '{self.name}', which has shape "
                f"{tuple(shape)}. There is no such axis; choose dim=, or select the blocks by a pattern."
            )
        return self.dim % len(shape)

    def _permuted(self, block: Tensor, inverse: bool) -> Tensor:
        batch = block.shape[: block.ndim - len(self.shape)]
        behind = 0 if self._axis is None else len(self.shape) - self._axis - 1
        entries = block.reshape(*batch, -1) if self._axis is None else block
        axis = entries.ndim - 1 - behind
        signs = self.constant("signs", block).reshape(-1, *[1] * behind) if self._has_signs else None
        if inverse and signs is not None:
            entries = signs * entries
        order = self.back if inverse else self.order
        entries = entries.index_select(axis, order.to(block.device))
        if not inverse and signs is not None:
            entries = signs * entries
        return entries.reshape(block.shape)

    def value(self, x: Tensor) -> Tensor:
        return self._permuted(x, False)

    def inverse_value(self, y: Tensor) -> Tensor:
        return self._permuted(y, True)

    def push_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self._permuted(v, False)

    def pull_block(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return self._permuted(w, True)

    def push_inverse_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self._permuted(v, True)

    def pull_inverse_block(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return self._permuted(w, False)

    def log_abs_det_block(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(())


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
