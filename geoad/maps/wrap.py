"""Angles, counted from another cut."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.maps.base import BlockMap, need
from geoad.maps.numbers import given_numbers

__all__ = ["Wrap"]

_Start = float | Sequence[float] | Tensor


class Wrap(BlockMap):
    r"""ψ = θ + 2πk with the whole number k for which ψ lies in (into, into + 2π), for θ in (start, start + 2π).

    The transition between two charts of a circle, or entry by entry of a torus. Its Jacobian is the identity; the cut of the
    new angle, where the angle jumps, is outside the domain.

    Args:
        start: where the angles θ begin; a number, or one for each entry.
        into: where the angles ψ begin.
        period: the length of the circle. Default 2π.

    >>> import math, torch, geoad
    >>> angle = geoad.Chart({"x": (1,)}, name="-π to π", domain={"|φ| < π": lambda x: x.abs() < math.pi})
    >>> positive = angle.reparametrize(geoad.maps.Wrap(start=-math.pi, into=0.0), name="0 to 2π").target
    >>> angle.point(torch.tensor([-1.0])).to(positive).components
    tensor([5.2832])
    """

    linear = True
    elementwise = True
    monomial = True

    def __init__(self, start: _Start = -math.pi, into: _Start = 0.0, period: float = 2 * math.pi) -> None:
        super().__init__()
        if not (math.isfinite(period) and period > 0):
            raise GeometryError(f"the period of Wrap must be finite and > 0, found {period}. Angles have the period 2π.")
        self.period = float(period)
        self.start: Tensor
        self.into: Tensor
        self.register_buffer("start", given_numbers(start, "the start of the angles"))
        self.register_buffer("into", given_numbers(into, "the start of the new angles"))

    def prepare_block(self, shape: torch.Size) -> None:
        for what, numbers in (("start", self.start), ("into", self.into)):
            if numbers.ndim and numbers.shape != shape:
                raise GeometryError(
                    f"{what}= of Wrap has shape {tuple(numbers.shape)}, the block '{self.name}' {tuple(shape)}. Each entry is "
                    "an angle with a cut of its own; pass one number for all, or as many as there are angles."
                )

    def _shifted(self, x: Tensor, start: Tensor) -> Tensor:
        return x - self.period * torch.floor((x - start) / self.period)

    def value(self, x: Tensor) -> Tensor:
        return self._shifted(x, self.constant("into", x))

    def inverse_value(self, y: Tensor) -> Tensor:
        return self._shifted(y, self.constant("start", y))

    def bad_domain(self, x: Tensor) -> str | None:
        return self._bad(x, "start", "θ") or self._bad(self.value(x), "into", "at the cut of the new angle; ψ")

    def bad_image(self, y: Tensor) -> str | None:
        return self._bad(y, "into", "ψ") or self._bad(self.inverse_value(y), "start", "at the cut of the old angle; θ")

    def _bad(self, x: Tensor, name: str, letter: str) -> str | None:
        start = self.constant(name, x)
        inside = (x > start) & (x < start + self.period)
        low, high = (f"{float(n.min()):.5g}" for n in (start, start + self.period))
        return need(inside, f"{letter} needs to lie in ({low}, {high})", x)

    def push_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return v

    def push_inverse_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return v

    def pull_block(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return w

    def pull_inverse_block(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return w

    def log_abs_det_block(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(())
