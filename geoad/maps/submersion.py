"""Redundant coordinates: more numbers than the network has degrees of freedom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from geoad.errors import ChartDomainError, GeometryError
from geoad.maps.smooth import Shapes, SmoothMap
from geoad.params import Blocks, Layout, add, is_wrapped, sub

__all__ = ["Submersion", "TotalMetric"]

TotalMetric = Mapping[str, Any] | Callable[[Any], Tensor] | None
"""The metric on ψ that says which directions are horizontal."""

_DENSE_LIMIT = 4096


class Submersion(SmoothMap):
    r"""A smooth map :math:`\pi: \psi \mapsto \theta` onto θ, whose Jacobian :math:`J` (d × D, D > d) has full rank.

    Many ψ, a *fibre*, stand for the same θ. The directions along the fibre, ker J, are vertical; those orthogonal to
    it in a metric M on ψ are horizontal. With :math:`H = M^{-1}J^\top(JM^{-1}J^\top)^{-1}`:

    ==================  ==============================  ===========================================================
    object              from θ to ψ                     from ψ to θ
    ==================  ==============================  ===========================================================
    point               section                         π
    vector              horizontal lift, :math:`H v`    :math:`J v`
    (0,k), functions    pullback, :math:`J^\top ω`      only if basic (zero on vertical vectors): :math:`H^\top ω`
    (2,0)               lift, :math:`H C H^\top`        :math:`J C J^\top`
    (1,1)               :math:`H E J`                   only if E maps ker J into itself: :math:`J E H`
    density             refused                         refused
    ==================  ==============================  ===========================================================

    A pulled-back metric is semidefinite and is used through the horizontal space (`geoad.HorizontalMetric`);
    determinants exist as quotients only, `geoad.quotient_logdet`. A step in θ is followed in ψ by `near`, so that
    ``p.retract(v)`` stays near p in its fibre, and ``p.retract(v, 0)`` is p.

    Args:
        project: π; takes the parts of ψ (a dict part -> tensor, or the tensor of a bare shape), returns the block θ.
        section: a ψ over every θ; takes θ, returns the parts.
        shapes: the shapes of the parts, see `SmoothMap`.
        metric: M, the metric on the total space: None for the Euclidean one in ψ, a mapping part -> positive number(s)
            for a constant diagonal one, or a function of the parts that returns the (D, D) matrix.
        joint: one map for all matched blocks.

    A subclass overrides `inverse_value` (π), `value` (the section), `part_shapes`, and where there are closed forms
    ``push_block`` (H), ``pull_block`` (Hᵀ), ``push_inverse_block`` (J), ``pull_inverse_block`` (Jᵀ) and `near_value`.

    >>> import torch, geoad
    >>> chart = geoad.Chart({"x": (2,)}, name="x")
    >>> total = geoad.maps.Submersion(lambda y: y["a"] + y["b"], lambda x: {"a": x, "b": 0 * x}, {"a": (2,), "b": (2,)})
    >>> psi = chart.reparametrize(total, name="ab").target
    >>> p = chart.point(torch.tensor([1.0, 2.0]))
    >>> chart.vector(torch.tensor([1.0, 0.0]), at=p).to(psi).components
    {'x_a': tensor([0.5000, 0.0000]), 'x_b': tensor([0.5000, 0.0000])}

    Source: B. O'Neill, The fundamental equations of a submersion (1966).
    """

    law = "submersion"

    def __init__(
        self,
        project: Callable[[Any], Any] | None = None,
        section: Callable[[Any], Any] | None = None,
        shapes: Shapes | None = None,
        *,
        metric: TotalMetric = None,
        joint: bool = False,
    ) -> None:
        super().__init__(project, shapes, section, joint=joint)
        self.metric = metric

    def prepare(self, layout: Layout) -> None:
        super().prepare(layout)
        if isinstance(self.metric, Mapping):
            self._check_weights(self.metric)

    def _check_weights(self, weights: Mapping[str, Any]) -> None:
        if set(weights) != set(self._parts):
            raise GeometryError(
                f"the metric of {type(self).__name__} names the parts {sorted(weights)}, ψ has {sorted(self._parts)}. The lift "
                "of vectors depends on all of them; give one positive number for each part."
            )
        for part, weight in weights.items():
            if not bool((torch.as_tensor(weight) > 0).all()):
                raise GeometryError(f"the metric of {type(self).__name__} must be positive, found {weight} for part '{part}'.")

    # -- the horizontal lift -------------------------------------------------------------------------------------------

    def _lowered(self, y: Blocks, jacobian: Tensor) -> Tensor:
        """M⁻¹ Jᵀ (D × d)."""
        if self.metric is None:
            return jacobian.mT
        if isinstance(self.metric, Mapping):
            given = {self._parts[part]: weight for part, weight in cast("Mapping[str, Any]", self.metric).items()}
            weights = [
                torch.as_tensor(given[name], dtype=jacobian.dtype, device=jacobian.device).expand(shape).reshape(-1)
                for name, shape in self.image_shapes.items()
            ]
            return jacobian.mT / torch.cat(weights)[:, None]
        return torch.linalg.solve(self.metric(self.parts_of(y)), jacobian.mT)

    def horizontal(self, y: Blocks) -> Tensor:
        """H at ψ = y as a matrix (dim ψ, dim θ).

        Raises:
            ChartDomainError: the Jacobian at y has not full rank, so the map is no submersion there.
        """
        theta = self.bound_layout()
        if theta.dim > _DENSE_LIMIT:
            raise GeometryError(
                f"the horizontal lift of {type(self).__name__} on {theta.dim} coordinates was asked for by least squares, "
                f"which builds a matrix of that size (limit {_DENSE_LIMIT}). Give the subclass closed forms: push_block and "
                "pull_block."
            )
        jacobian = self.dense_jacobian(y)
        lowered = self._lowered(y, jacobian)
        gram = jacobian @ lowered
        if not is_wrapped({"": gram}):
            spectrum = torch.linalg.eigvalsh(0.5 * (gram + gram.mT))
            if not bool(spectrum[0] > torch.finfo(gram.dtype).eps * theta.dim * spectrum[-1]):
                raise ChartDomainError(
                    f"{type(self).__name__} is no submersion at this point: its Jacobian has a rank below {theta.dim}, so some "
                    "directions of θ have no lift. Move the point, or use maps.SmoothMap, which needs no rank (and moves less)."
                )
        return torch.linalg.solve(gram, lowered.mT).mT

    def push_block(self, x: Any, y: Any, v: Any) -> Any:
        """The horizontal lift H v."""
        at = self._image_blocks(y)
        flat = self.bound_layout().ravel(self._theta_blocks(v))
        return self.parts_of(self.image_layout().unravel(self.horizontal(at) @ flat))

    def pull_block(self, x: Any, y: Any, w: Any) -> Any:
        """Hᵀ w."""
        at = self._image_blocks(y)
        flat = self.image_layout().ravel(self._image_blocks(w))
        return self.theta_of(self.bound_layout().unravel(self.horizontal(at).mT @ flat))

    # -- following a step ----------------------------------------------------------------------------------------------

    def near(self, x: Blocks, y: Blocks) -> Blocks:
        return self._image_blocks(self.near_value(self.theta_of(x), self.parts_of(y)))

    def near_value(self, x: Any, y: Any) -> Any:
        """The ψ over θ = `x` that continues `y`: by Newton's method along horizontal directions; y itself if π(y) = x."""
        goal, point = self._theta_blocks(x), self._image_blocks(y)
        layout = self.bound_layout()
        start = self.invert(point)
        for s in (0.25, 0.5, 0.75, 1.0):  # in stages: a far goal is reached along the straight line of θ
            stage = {name: torch.lerp(start[name], goal[name], s) for name in layout} if s < 1 else goal
            point = self._newton(stage, point, sharp=s == 1)
        return self.parts_of(point)

    def _newton(self, goal: Blocks, point: Blocks, *, sharp: bool) -> Blocks:
        layout = self.bound_layout()
        size = 1 + layout.ravel(goal).abs().amax()
        traced = is_wrapped({**goal, **point})
        tolerance = (4 if sharp else 1e3) * torch.finfo(size.dtype).eps * size
        for _ in range(30):
            here = self.invert(point)
            residual = sub(goal, here)
            if not traced and bool(layout.ravel(residual).abs().amax() <= tolerance):
                return point
            point = add(point, self.push(here, point, residual))
        error = layout.ravel(sub(goal, self.invert(point))).abs().amax()
        if not traced and not bool(error <= 1e3 * tolerance):
            raise ChartDomainError(
                f"the step leaves the part of the fibre bundle of {type(self).__name__} that Newton's method reaches from the "
                "present ψ. Take a shorter step, or give the subclass near_value."
            )
        return point
