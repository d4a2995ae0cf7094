"""Fewer coordinates: a curved or straight subspace of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geoad.errors import ChartDomainError, GeometryError, NotADiffeomorphismError
from geoad.maps.smooth import Shapes, SmoothMap
from geoad.params import Blocks, Layout, is_wrapped

__all__ = ["Immersion"]

_DENSE_LIMIT = 4096


class Immersion(SmoothMap):
    r"""A smooth map :math:`\iota: \psi \mapsto \theta` whose Jacobian :math:`J` (D × d, d < D) is one to one.

    ψ are the coordinates of a submanifold of the parameters: a subspace, frozen or tied parameters, a curve.

    ==================  ====================================  =================
    object              from θ to ψ                           from ψ to θ
    ==================  ====================================  =================
    point               only on the image                     ι
    vector              only if tangent: :math:`J^+ v`        :math:`J v`
    (0,k), functions    restriction, :math:`J^\top ω`         refused
    (2,0)               only if tangent                       :math:`J C J^\top`
    (1,1), densities    refused                               refused
    ==================  ====================================  =================

    The submanifold has the induced metric :math:`J^\top G J`. Hessians, sharps and endomorphisms are *recomputed* with
    it at a point in ψ: the restriction of the ambient Hessian is not the Hessian of the restriction.

    Args:
        embed: ι; takes the parts of ψ (a dict part -> tensor, or the tensor of a bare shape), returns the block θ.
        shapes: the shapes of the parts, see `SmoothMap`.
        locate: the parts of ψ for a θ on the image; what it returns is checked. Without it no point goes from θ to ψ.
        joint: one map for all matched blocks.

    A subclass overrides `inverse_value` (ι), `value` (locate), `part_shapes`, and where there are closed forms
    ``push_block`` (J⁺), ``pull_block`` (its transpose), ``push_inverse_block`` (J) and ``pull_inverse_block`` (Jᵀ).

    >>> import torch, geoad
    >>> chart = geoad.Chart({"x": (2,)}, name="x")
    >>> circle = geoad.maps.Immersion(lambda t: torch.stack([t.cos(), t.sin()]), (), lambda x: torch.atan2(x[1], x[0]))
    >>> psi = chart.reparametrize(circle, name="angle").target
    >>> q = psi.point(torch.tensor(0.0))
    >>> psi.vector(torch.tensor(2.0), at=q).to(chart).components
    tensor([-0.,  2.])
    """

    law = "immersion"

    def __init__(
        self,
        embed: Callable[[Any], Any] | None = None,
        shapes: Shapes | None = None,
        locate: Callable[[Any], Any] | None = None,
        *,
        joint: bool = False,
    ) -> None:
        super().__init__(embed, shapes, locate, joint=joint)

    def prepare(self, layout: Layout) -> None:
        super().prepare(layout)
        images = sum(shape.numel() for shape in self._images.values())
        if images > layout.dim:
            raise NotADiffeomorphismError(
                f"{type(self).__name__} maps {images} coordinates to {layout.dim}: that cannot be one to one. Redundant "
                "coordinates are a maps.Submersion, or a maps.SmoothMap if the rank is not full."
            )

    def value(self, x: Any) -> Any:
        if self._section is None:
            raise NotADiffeomorphismError(
                f"{type(self).__name__} does not know how to find ψ for a θ on its image. Make the point in ψ, psi.point(...), "
                "or give the map locate=, a function that returns ψ there."
            )
        return self._section(x)

    def bad_domain(self, x: Any) -> str | None:
        """θ is on the image if ι(locate(θ)) = θ, to rounding."""
        theta = self._theta_blocks(x)
        back = self.invert(self._image_blocks(self.value(x)))
        for name, block in theta.items():
            slack = 100 * torch.finfo(block.dtype).eps * (1 + block.abs())
            off = (back[name] - block).abs()
            if not bool((off <= slack).all()):
                return f"θ must lie on the image of {type(self).__name__}, but '{name}' is {float(off.max()):.3g} off it"
        return None

    @property
    def full_domain(self) -> bool:
        return False

    # -- the pseudo-inverse --------------------------------------------------------------------------------------------

    def left_inverse(self, y: Blocks) -> Tensor:
        """J⁺ at ψ = y as a matrix (dim ψ, dim θ).

        Raises:
            ChartDomainError: the Jacobian at y is not one to one, so the map is no immersion there.
        """
        jacobian = self.dense_jacobian(y)
        if min(jacobian.shape) > _DENSE_LIMIT:
            raise GeometryError(
                f"the pseudo-inverse of {type(self).__name__} on {jacobian.shape[1]} coordinates builds a matrix of that size "
                f"(limit {_DENSE_LIMIT}). Give the subclass closed forms: push_block and pull_block."
            )
        if not is_wrapped({"": jacobian}) and jacobian.numel():
            spectrum = torch.linalg.svdvals(jacobian)
            if not bool(spectrum[-1] > torch.finfo(jacobian.dtype).eps * max(jacobian.shape) * spectrum[0]):
                raise ChartDomainError(
                    f"{type(self).__name__} is no immersion at this point: its Jacobian has a rank below {jacobian.shape[1]}, "
                    "so ψ are no coordinates there. Move the point, or use maps.SmoothMap, which needs no rank."
                )
        return torch.linalg.pinv(jacobian)

    def push_block(self, x: Any, y: Any, v: Any) -> Any:
        """J⁺ v, for a tangent vector."""
        flat = self.bound_layout().ravel(self._theta_blocks(v))
        return self.parts_of(self.image_layout().unravel(self.left_inverse(self._image_blocks(y)) @ flat))

    def pull_block(self, x: Any, y: Any, w: Any) -> Any:
        """(J⁺)ᵀ w."""
        flat = self.image_layout().ravel(self._image_blocks(w))
        return self.theta_of(self.bound_layout().unravel(self.left_inverse(self._image_blocks(y)).mT @ flat))
