"""Random maps that cannot be undone, to test with: as curved as they may be while their Jacobian has full rank everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from geoad.maps import Immersion, Submersion
from geoad.maps.numbers import Numbers, draw
from geoad.maps.submersion import TotalMetric
from geoad.params import Blocks, Layout

__all__ = ["BentImmersion", "BentSubmersion"]

_BEND = 0.2
_STEPS = 45


def _dim(shapes: Mapping[str, torch.Size]) -> int:
    return sum(shape.numel() for shape in shapes.values())


def _register(bound: Numbers, rows: int, columns: int, generator: torch.Generator | None) -> None:
    """Draw P with singular values between ½ and 2, and two matrices of norm 1 for the bend."""
    rank = min(rows, columns)
    left, right = (torch.linalg.qr(draw(generator, size, rank)).Q for size in (rows, columns))
    sizes = torch.exp(math.log(2.0) * torch.tanh(draw(generator, rank)))
    bound.register_buffer("slope", left * sizes @ right.mT)
    for name, size in (("outer", rows), ("inner", columns)):
        half = draw(generator, size, columns)
        bound.register_buffer(name, half / torch.linalg.matrix_norm(half, 2))


def _value(bound: Numbers, y: Tensor) -> Tensor:
    """P y + a S sin(T y)."""
    wave = bound.constant("outer", y) @ torch.sin(bound.constant("inner", y) @ y)
    return bound.constant("slope", y) @ y + _BEND * wave


def _solved(bound: Numbers, x: Tensor) -> Tensor:
    """y = P⁺ (x - a S sin(T y)), iterated: a contraction by 2a = 0.4."""
    inverse = torch.linalg.pinv(bound.constant("slope", x))
    y = inverse @ x
    for _ in range(_STEPS):
        y = inverse @ (x - _value(bound, y)) + y
    return y


class BentSubmersion(Submersion):
    r"""θ = P ψ + a S sin(T ψ) on all matched blocks, with `extra` coordinates more than they have: a random submersion.

    The singular values of P lie between ½ and 2, :math:`a\,|S|\,|T| = 0.2`, so the Jacobian has full rank everywhere.
    The block of ψ is named "y".

    >>> import torch, geoad
    >>> from geoad.testing.bent import BentSubmersion
    >>> geoad.Chart({"x": (3,)}, "x").reparametrize(BentSubmersion(2), "y").target
    Chart('y', dim=5, from 'x')
    """

    def __init__(self, extra: int = 1, *, generator: torch.Generator | None = None, metric: TotalMetric = None) -> None:
        super().__init__(joint=True, metric=metric)
        self.extra = extra
        self.generator = generator

    def part_shapes(self, shape: Any) -> dict[str, tuple[int, ...]]:
        return {"y": (_dim(shape) + self.extra,)}

    def prepare_parts(self, layout: Layout) -> None:
        _register(self, layout.dim, layout.dim + self.extra, self.generator)

    def inverse_value(self, y: dict[str, Tensor]) -> Blocks:
        return self.bound_layout().unravel(_value(self, y["y"]))

    def value(self, x: Blocks) -> dict[str, Tensor]:
        return {"y": _solved(self, self.bound_layout().ravel(x))}


class BentImmersion(Immersion):
    r"""θ = P ψ + a S sin(T ψ) on all matched blocks, with `dim` coordinates ψ: a random immersion, see `BentSubmersion`.

    >>> import torch, geoad
    >>> from geoad.testing.bent import BentImmersion
    >>> geoad.Chart({"x": (3,)}, "x").reparametrize(BentImmersion(2), "y").target
    Chart('y', dim=2, from 'x')
    """

    def __init__(self, dim: int = 1, *, generator: torch.Generator | None = None) -> None:
        super().__init__(joint=True)
        self.dim = dim
        self.generator = generator

    def part_shapes(self, shape: Any) -> dict[str, tuple[int, ...]]:
        return {"y": (self.dim,)}

    def prepare_parts(self, layout: Layout) -> None:
        _register(self, layout.dim, self.dim, self.generator)

    def inverse_value(self, y: dict[str, Tensor]) -> Blocks:
        return self.bound_layout().unravel(_value(self, y["y"]))

    def value(self, x: Blocks) -> dict[str, Tensor]:
        return {"y": _solved(self, self.bound_layout().ravel(x))}
