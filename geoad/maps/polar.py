r"""Polar coordinates: every row (or column) of a block as a radius and a direction.

Both kinds are *orthogonal* coordinates: with the scale factors :math:`h` (the lengths of the coordinate directions) and
an orthogonal matrix :math:`E` (their unit vectors as columns), the inverse map has the Jacobian
:math:`E \operatorname{diag} h`. So :math:`J = \operatorname{diag}(1/h) E^\top`, the four products are :math:`E` or
:math:`E^\top` with a scaling, and :math:`\log |\det J| = -\sum \log h`. :math:`E` is applied in a few passes over the
block.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, Literal

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.maps.base import BlockMap, need
from geoad.params import is_wrapped

__all__ = ["Polar"]


class Polar(BlockMap):
    r"""ψ = (r, n - 1 coordinates of the direction) for every vector of length n in a block.

    Args:
        dim: the axis along which the vectors run. ``-1`` (or 1): the rows of a weight, all axes behind the first taken
            together, so that every output unit or filter has one radius. ``0``: the columns, along the first axis.
            ``None``: the whole block is one vector. A block with one axis is one vector in any case.
        kind: the coordinates of the direction.

            * ``"hyperspherical"``: angles :math:`x_1 = r \cos φ_1`, :math:`x_2 = r \sin φ_1 \cos φ_2`, ...,
              :math:`x_n = r \sin φ_1 \cdots \sin φ_{n-1}` with :math:`0 < φ_k < π` and :math:`-π < φ_{n-1} < π`.
            * ``"stereographic"``: :math:`s = x_{2..n} / (r + x_1)`, the projection of the unit sphere from
              :math:`-e_1`; misses a single direction only and is better conditioned in high dimensions.

    The block keeps its shape: along the vector the first entry is r, the others are the direction. Vectors of length 1
    and scalars keep their value (with its sign, where |x| would lose it). Outside the domain are zero vectors, e.g. a
    bias that is initialised with zeros, and the directions in which a chart of the sphere ends: for angles the poles
    and the half-plane of the cut φ_{n-1} = ±π, for the projection its pole -e_1.

    >>> import torch, geoad
    >>> chart = geoad.Chart({"x": (2,)}, name="x")
    >>> psi = chart.reparametrize(geoad.maps.Polar()).target
    >>> chart.point(torch.tensor([3.0, 4.0])).to(psi).components
    tensor([5.0000, 0.9273])
    """

    def __init__(self, dim: int | None = -1, kind: Literal["hyperspherical", "stereographic"] = "hyperspherical") -> None:
        super().__init__()
        if dim not in (-1, 0, 1, None):
            raise GeometryError(
                f"Polar was asked for vectors along axis {dim!r}, but knows dim=-1 (rows: all axes behind the first), "
                "dim=0 (columns: the first axis) and dim=None (the whole block). The choice decides which numbers "
                "share a radius; pass one of these."
            )
        if kind not in ("hyperspherical", "stereographic"):
            raise GeometryError(
                f"Polar has no directions of kind {kind!r}; the kinds are 'hyperspherical' (angles) and "
                "'stereographic' (projection from a pole). They are different coordinates of the sphere; pass kind= "
                "one of them."
            )
        self.dim = dim
        self.kind = kind
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def prepare_block(self, shape: torch.Size) -> None:
        self._columns = self.dim == 0 and len(shape) > 1
        if len(shape) <= 1 or self.dim is None:
            count, length = 1, shape.numel()
        else:
            count, length = shape[0], shape[1:].numel()
        self._matrix = (count, length)
        self._length = count if self._columns else length
        self.linear = self._length == 1
        self.monomial = self._length == 1
        self.elementwise = self._length == 1

    def extra_repr(self) -> str:
        return f"dim={self.dim}, kind='{self.kind}'"

    # -- blocks as vectors along the last axis -----------------------------------------------------------------------

    def _rows(self, block: Tensor) -> Tensor:
        rows = block.reshape(*block.shape[: block.ndim - len(self.shape)], *self._matrix)
        return rows.mT if self._columns else rows

    def _block(self, rows: Tensor) -> Tensor:
        rows = rows.mT if self._columns else rows
        return rows.reshape(*rows.shape[:-2], *self.shape)

    # -- the norms ρ_k of the last θ, which the inverse map makes and the products at the same point need -------------------

    def _remember(self, x: Tensor, norms: Tensor) -> None:
        if not (is_wrapped({"": x}) or x.requires_grad or x.is_inference()):
            self._last = (weakref.ref(x, self._forget), x._version, norms)

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if self._last is not None and self._last[0] is gone:
            self._last = None

    def _recall(self, x: Tensor) -> Tensor | None:
        if self._last is None or x.requires_grad or torch.compiler.is_compiling():
            return None
        known, version, norms = self._last
        return norms if known() is x and version == x._version else None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last": None}

    # -- the map -----------------------------------------------------------------------------------------------------

    def value(self, x: Tensor) -> Tensor:
        if self._length == 1:
            return x
        rows = self._rows(x)
        return self._block(_to_angles(rows) if self.kind == "hyperspherical" else _to_projection(rows))

    def inverse_value(self, y: Tensor) -> Tensor:
        if self._length == 1:
            return y
        rows = self._rows(y)
        if self.kind == "stereographic":
            return self._block(_from_projection(rows))
        found, norms = _from_angles(rows)
        x = self._block(found)
        self._remember(x, norms)
        return x

    def bad_domain(self, x: Tensor) -> str | None:
        if self._length == 1:
            return need(x.isfinite(), "all components must be finite", x)
        rows = self._rows(x)
        size = rows.abs().amax(-1, keepdim=True)
        words = "no vector may be zero (the zero vector has no direction; a bias initialised with zeros is one)"
        condition = need((size > 0) & size.isfinite(), f"{words} or infinite", size)
        if condition is not None:
            return condition
        return self._bad_chart(self._rows(self.value(x)), "θ lies where these coordinates of the sphere end: ")

    def bad_image(self, y: Tensor) -> str | None:
        if self._length == 1:
            return need(y.isfinite(), "all components must be finite", y)
        return self._bad_chart(self._rows(y), "")

    def _bad_chart(self, y: Tensor, start: str) -> str | None:
        radius, direction = y[..., :1], y[..., 1:]
        condition = need((radius > 0) & radius.isfinite(), "the radius must be > 0 and finite", radius)
        if condition is not None:
            return condition
        if self.kind == "stereographic":
            words = "the square of the projected direction must be finite (the pole -e_1 has no image)"
            return need(_square(direction).isfinite(), start + words, direction.abs().amax(-1, keepdim=True))
        polar, last = direction[..., :-1], direction[..., -1:]
        return need(
            (polar > 0) & (polar < math.pi) & (polar.sin() > 0), f"{start}all angles but the last need 0 < φ < π", polar
        ) or need(last.abs() < math.pi, f"{start}the last angle needs -π < φ < π", last)

    # -- products ----------------------------------------------------------------------------------------------------

    def _frame(self, x: Tensor, y: Tensor) -> _Angles | _Projection:
        rows, radius = self._rows(x), self._rows(y)[..., :1]
        if self.kind == "stereographic":
            return _Projection(rows, radius)
        return _Angles(rows, radius, self._recall(x))

    def push_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        if self._length == 1:
            return v
        frame = self._frame(x, y)
        return self._block(frame.over_metric(frame.pull_inverse(self._rows(v))))

    def pull_block(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        if self._length == 1:
            return w
        frame = self._frame(x, y)
        return self._block(frame.push_inverse(frame.over_metric(self._rows(w))))

    def push_inverse_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        if self._length == 1:
            return v
        return self._block(self._frame(x, y).push_inverse(self._rows(v)))

    def pull_inverse_block(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        if self._length == 1:
            return w
        return self._block(self._frame(x, y).pull_inverse(self._rows(w)))

    def log_abs_det_block(self, x: Tensor, y: Tensor) -> Tensor:
        if self._length == 1:
            return x.new_zeros(())
        return -self._frame(x, y).log_scales()


def _unit(x: Tensor) -> Tensor:
    """The largest |entry| of each vector, a constant: squares of x / unit neither overflow nor underflow."""
    size = x.detach().abs().amax(-1, keepdim=True)
    return torch.where(size > 0, size, torch.ones_like(size))


def _square(x: Tensor) -> Tensor:
    return (x * x).sum(-1, keepdim=True)


def _sums_from(x: Tensor) -> Tensor:
    """S_k = x_k + x_{k+1} + ... + x_n, summed from the end: small tails keep their digits."""
    return x.flip(-1).cumsum(-1).flip(-1)


def _norms_from(x: Tensor, unit: Tensor) -> Tensor:
    """ρ_k = |(x_k, ..., x_n)| for k < n, given any number of the size of |x|."""
    scaled = x / unit
    return _sums_from(scaled * scaled)[..., :-1].sqrt() * unit


# -- angles ----------------------------------------------------------------------------------------------------------


def _to_angles(x: Tensor) -> Tensor:
    norms = _norms_from(x, _unit(x))
    opposite = torch.cat([norms[..., 1:], x[..., -1:]], dim=-1)
    return torch.cat([norms[..., :1], torch.atan2(opposite, x[..., :-1])], dim=-1)


def _from_angles(y: Tensor) -> tuple[Tensor, Tensor]:
    """x and the norms ρ_k."""
    radius, angles = y[..., :1], y[..., 1:]
    sines = angles.sin()
    # the product of the sines as a sum of logarithms: differentiable by every transform at the cost of a pass
    norms = radius * torch.cat([torch.ones_like(radius), sines[..., :-1].log().cumsum(-1).exp()], dim=-1)
    return torch.cat([norms * angles.cos(), norms[..., -1:] * sines[..., -1:]], dim=-1), norms


class _Angles:
    r"""Hyperspherical coordinates at x.

    With ρ_k = |(x_k, ..., x_n)|: scale factors 1, ρ_1, ..., ρ_{n-1}; the derivative of x by φ_k has the entries 0
    before k, :math:`-ρ_{k+1}` at k and :math:`x_k x_j / ρ_{k+1}` behind. In the last plane x_n stands for ρ_n, with its
    sign.
    """

    def __init__(self, x: Tensor, radius: Tensor, norms: Tensor | None = None) -> None:
        self.x = x
        self.head = x[..., :-1]
        self.norms = _norms_from(x, radius.detach()) if norms is None else norms
        self.opposite = torch.cat([self.norms[..., 1:], x[..., -1:]], dim=-1)

    def log_scales(self) -> Tensor:
        """log det h."""
        return self.norms.log().sum()

    def over_metric(self, u: Tensor) -> Tensor:
        """u / h², in two steps that do not overflow."""
        return torch.cat([u[..., :1], u[..., 1:] / self.norms / self.norms], dim=-1)

    def pull_inverse(self, w: Tensor) -> Tensor:
        """h Eᵀ w."""
        slopes = _sums_from(self.x * w)[..., :-1] / self.norms  # the derivative of each ρ_k along w
        behind = torch.cat([slopes[..., 1:], w[..., -1:]], dim=-1)
        return torch.cat([slopes[..., :1], self.head * behind - self.opposite * w[..., :-1]], dim=-1)

    def push_inverse(self, v: Tensor) -> Tensor:
        """E h v."""
        radial, angular = v[..., :1], v[..., 1:]
        turned = self.head * angular
        along = (torch.cat([radial, turned[..., :-1]], dim=-1) / self.norms).cumsum(-1)
        first = self.head * along - self.opposite * angular
        return torch.cat([first, self.x[..., -1:] * along[..., -1:] + turned[..., -1:]], dim=-1)


# -- projection ------------------------------------------------------------------------------------------------------


def _from_pole(radius: Tensor, first: Tensor, rest: Tensor) -> Tensor:
    """r + x_1, without cancellation for x_1 < 0."""
    behind = torch.where(first < 0, first, torch.zeros_like(first))  # no 0/0 in the branch that is not taken
    return torch.where(first < 0, _square(rest) / (radius - behind), radius + first)


def _to_projection(x: Tensor) -> Tensor:
    unit = _unit(x)
    scaled = x / unit
    radius, first, rest = _square(scaled).sqrt(), scaled[..., :1], scaled[..., 1:]
    return torch.cat([radius * unit, rest / _from_pole(radius, first, rest)], dim=-1)


def _from_projection(y: Tensor) -> Tensor:
    radius, s = y[..., :1], y[..., 1:]
    square = _square(s)
    share = radius / (1 + square)
    return torch.cat([share * (1 - square), 2 * share * s], dim=-1)


class _Projection:
    r"""Stereographic coordinates at x = r u.

    The projection is conformal: scale factors 1 and, for all of the direction, :math:`h = r + x_1`. E takes e_1 to u
    and the space of s to the tangent space of the sphere:
    :math:`E = \begin{pmatrix} u_1 & -b^\top \\ b & I - b b^\top / (1 + u_1) \end{pmatrix}` with :math:`b = u_{2..n}`.
    """

    def __init__(self, x: Tensor, radius: Tensor) -> None:
        self.radius = radius
        unit = x / self.radius
        self.first, self.rest = unit[..., :1], unit[..., 1:]
        self.share = _from_pole(torch.ones_like(self.radius), self.first, self.rest)
        self.scale = self.radius * self.share

    def log_scales(self) -> Tensor:
        """log det h."""
        return self.scale.log().sum() * self.rest.shape[-1]

    def over_metric(self, u: Tensor) -> Tensor:
        """u / h², in two steps that do not overflow."""
        return torch.cat([u[..., :1], u[..., 1:] / self.scale / self.scale], dim=-1)

    def pull_inverse(self, w: Tensor) -> Tensor:
        """h Eᵀ w."""
        first, rest = w[..., :1], w[..., 1:]
        across = (self.rest * rest).sum(-1, keepdim=True)
        turned = self.scale * rest - self.rest * (self.scale * first + self.radius * across)
        return torch.cat([self.first * first + across, turned], dim=-1)

    def push_inverse(self, v: Tensor) -> Tensor:
        """E h v."""
        radial, rest = v[..., :1], v[..., 1:]
        across = (self.rest * rest).sum(-1, keepdim=True)
        turned = self.scale * rest + self.rest * (radial - self.radius * across)
        return torch.cat([self.first * radial - self.scale * across, turned], dim=-1)
