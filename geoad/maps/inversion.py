"""Inversion in a sphere: the transition between the two stereographic charts of a sphere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.maps.base import BlockMap, need

__all__ = ["Inversion"]


class Inversion(BlockMap):
    r"""ψ = R² θ / |θ|² for θ ≠ 0, the whole block taken as one vector. It is its own inverse.

    The Jacobian :math:`J = \frac{R^2}{|θ|^2} (I - 2 \hat θ \hat θ^\top)` is a multiple of a reflection, so the map is
    conformal, and :math:`|\det J| = (R / |θ|)^{2n}`.

    Args:
        radius: R, a positive number.

    >>> import torch, geoad
    >>> chart = geoad.Chart({"x": (2,)}, name="north")
    >>> south = chart.reparametrize(geoad.maps.Inversion(), name="south").target
    >>> chart.point(torch.tensor([0.0, 4.0])).to(south).components
    tensor([0.0000, 0.2500])
    """

    def __init__(self, radius: float = 1.0) -> None:
        super().__init__()
        if not (math.isfinite(radius) and radius > 0):
            raise GeometryError(
                f"Inversion needs a finite radius > 0, found {radius}. Points on the sphere of that radius stay where they "
                "are; pass Inversion(1.0) for the unit sphere."
            )
        self.radius = float(radius)

    def extra_repr(self) -> str:
        return f"radius={self.radius:g}"

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        product = a * b
        axes = tuple(range(-len(self.shape), 0))
        return product.sum(axes, keepdim=True) if axes else product

    def value(self, x: Tensor) -> Tensor:
        return x * (self.radius**2 / self._dot(x, x))

    def inverse_value(self, y: Tensor) -> Tensor:
        return self.value(y)

    def bad_domain(self, x: Tensor) -> str | None:
        square = self._dot(x, x)
        fine = (square > 0) & square.isfinite() & self.value(x).isfinite().all()
        return need(fine, "the vector must not be zero (its image would be infinite) or too large to be squared", square)

    def bad_image(self, y: Tensor) -> str | None:
        return self.bad_domain(y)

    # -- products: with θ̂ = ψ̂, J is symmetric -------------------------------------------------------------------------

    def _reflected(self, x: Tensor, v: Tensor) -> Tensor:
        return v - x * (2 * self._dot(x, v) / self._dot(x, x))

    def push_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self._reflected(x, v) * (self.radius**2 / self._dot(x, x))

    def push_inverse_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self._reflected(x, v) * (self._dot(x, x) / self.radius**2)

    def pull_block(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return self.push_block(x, y, w)

    def pull_inverse_block(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return self.push_inverse_block(x, y, w)

    def log_abs_det_block(self, x: Tensor, y: Tensor) -> Tensor:
        square = self._dot(x, x).reshape(())
        return torch.log(self.radius**2 / square) * self.shape.numel()
