"""The plane without a half line in polar coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.maps.base import BlockMap, need
from geoad.maps.numbers import given_numbers

__all__ = ["PolarPlane"]


class PolarPlane(BlockMap):
    r"""ψ = (r, φ) with :math:`x = c + r (\cos φ, \sin φ)`, for r > 0 and cut - 2π < φ < cut.

    The half line from the centre in the direction of the cut is outside the domain: no continuous angle exists on the whole
    punctured plane. Two such charts with different cuts cover it, see `geoad.atlases.PuncturedPlane`.

    With the unit vectors :math:`e_r, e_φ` the Jacobian is :math:`J = (e_r, e_φ / r)^\top`, and :math:`|\det J| = 1/r`.
    `Polar` has the same coordinates for the rows of weights, with the cut at π.

    Args:
        cut: the angle of the half line that is taken out. Default π: the negative first axis, with -π < φ < π.
        centre: the point c, two numbers.

    Shapes:
        the last axis of a block has 2 entries; each pair along it is a point of a plane.

    >>> import math, torch, geoad
    >>> xy = geoad.Chart({"x": (2,)}, name="xy")
    >>> polar = xy.reparametrize(geoad.maps.PolarPlane(cut=2 * math.pi), name="polar").target
    >>> xy.point(torch.tensor([0.0, -2.0])).to(polar).components    # 0 < φ < 2π
    tensor([2.0000, 4.7124])
    """

    def __init__(self, cut: float = math.pi, centre: Sequence[float] | Tensor = (0.0, 0.0)) -> None:
        super().__init__()
        numbers, middle = given_numbers(centre, "the centre of PolarPlane"), float(cut) - math.pi
        if numbers.shape != (2,) or not math.isfinite(middle):
            raise GeometryError(
                f"PolarPlane needs a finite angle for its cut and two numbers for its centre, found {cut} and a centre of "
                f"shape {tuple(numbers.shape)}. They say which half line is taken out; pass PolarPlane(math.pi, (0, 0))."
            )
        self.cut = float(cut)
        self.middle = middle  # the direction opposite to the cut: angles run from middle - π to middle + π
        self.centre: Tensor
        self.register_buffer("centre", numbers)

    def prepare_block(self, shape: torch.Size) -> None:
        if not shape or shape[-1] != 2:
            raise GeometryError(
                f"PolarPlane was given the block '{self.name}' of shape {tuple(shape)}, but maps pairs along the last axis, "
                "(..., 2). Polar coordinates of longer vectors are those of geoad.maps.Polar."
            )

    def extra_repr(self) -> str:
        return f"cut={self.cut:g}"

    # -- the map -------------------------------------------------------------------------------------------------------

    def _arrow(self, x: Tensor) -> Tensor:
        return x - self.constant("centre", x)

    def _offset(self, d: Tensor) -> Tensor:
        """The angle from the middle direction, -π to π: the arrow is turned first, so that the cut is that of atan2."""
        if self.middle == 0:
            return torch.atan2(d[..., 1], d[..., 0])
        c, s = math.cos(self.middle), math.sin(self.middle)
        return torch.atan2(c * d[..., 1] - s * d[..., 0], c * d[..., 0] + s * d[..., 1])

    def value(self, x: Tensor) -> Tensor:
        d = self._arrow(x)
        return torch.stack([torch.hypot(d[..., 0], d[..., 1]), self.middle + self._offset(d)], dim=-1)

    def inverse_value(self, y: Tensor) -> Tensor:
        radius, angle = y[..., 0], y[..., 1]
        return self.constant("centre", y) + torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)

    def bad_domain(self, x: Tensor) -> str | None:
        y = self.value(x)
        condition = need(y[..., 0] > 0, "the centre of polar coordinates has no angle (r > 0 is needed)", y[..., 0])
        return condition or self.bad_image(y, "the point lies on the cut: ")

    def bad_image(self, y: Tensor, start: str = "") -> str | None:
        radius, angle = y[..., 0], y[..., 1]
        low, high = (f"{number / math.pi:g}π" for number in (self.cut - 2 * math.pi, self.cut))
        return need((radius > 0) & radius.isfinite(), "the radius needs to be finite and r > 0", radius) or need(
            (angle - self.middle).abs() < math.pi, f"{start}the angle needs {low} < φ < {high}", angle
        )

    # -- products ------------------------------------------------------------------------------------------------------

    def _to_frame(self, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The components of v along e_r and e_φ."""
        c, s = y[..., 1].cos(), y[..., 1].sin()
        return c * v[..., 0] + s * v[..., 1], c * v[..., 1] - s * v[..., 0]

    def _from_frame(self, y: Tensor, radial: Tensor, turning: Tensor) -> Tensor:
        c, s = y[..., 1].cos(), y[..., 1].sin()
        return torch.stack([c * radial - s * turning, s * radial + c * turning], dim=-1)

    def push_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        radial, turning = self._to_frame(y, v)
        return torch.stack([radial, turning / y[..., 0]], dim=-1)

    def pull_block(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return self._from_frame(y, w[..., 0], w[..., 1] / y[..., 0])

    def push_inverse_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self._from_frame(y, v[..., 0], v[..., 1] * y[..., 0])

    def pull_inverse_block(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        radial, turning = self._to_frame(y, w)
        return torch.stack([radial, turning * y[..., 0]], dim=-1)

    def log_abs_det_block(self, x: Tensor, y: Tensor) -> Tensor:
        return -y[..., 0].log().sum()
