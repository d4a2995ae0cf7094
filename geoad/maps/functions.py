"""A change of coordinates from a pair of plain functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from geoad.errors import GeometryError
from geoad.maps.base import Diffeomorphism
from geoad.maps.domain import Domain, DomainLike
from geoad.params import Blocks

__all__ = ["Functions"]


class Functions(Diffeomorphism):
    r"""ψ = forward(θ), θ = inverse(ψ), on all matched blocks at once; Jacobian products by autodiff.

    That the two are inverse to each other is not noticed at use, for points remember where they came from: check it with
    ``atlas.check_cocycle(points)``, or with `geoad.testing.DiffeomorphismConformance`.

    Args:
        forward: a function of the components of a single point: a tensor if there is one block, else a dict name -> tensor.
        inverse: the way back.
        domain: where `forward` is defined, see `geoad.maps.domain.Domain`: ``{words: predicate}``, or a predicate.
        image: where `inverse` is defined.

    To be pickled, all of them have to be functions of a module.

    >>> import torch, geoad
    >>> chart = geoad.Chart({"x": (2,)}, name="x")
    >>> shear = geoad.maps.Functions(lambda x: x + x.flip(0).sin() * 0.1 * torch.tensor([1.0, 0.0]),
    ...                              lambda y: y - y.flip(0).sin() * 0.1 * torch.tensor([1.0, 0.0]))
    >>> psi = chart.reparametrize(shear).target
    >>> chart.point(torch.tensor([1.0, 0.0])).to(psi).components
    tensor([1., 0.])
    """

    def __init__(
        self,
        forward: Callable[[Any], Any],
        inverse: Callable[[Any], Any],
        domain: DomainLike | Domain | None = None,
        image: DomainLike | Domain | None = None,
    ) -> None:
        super().__init__()
        for name, fn in (("forward", forward), ("inverse", inverse)):
            if not callable(fn):
                raise GeometryError(
                    f"{name} must be a function of components, found {type(fn).__name__}. A change of coordinates must be "
                    "known in both directions, for objects move both ways; pass Functions(forward, inverse)."
                )
        self.pair = (forward, inverse)
        self.domain, self.image = Domain.of(domain), Domain.of(image)

    def _components(self, blocks: Blocks) -> Any:
        return next(iter(blocks.values())) if len(blocks) == 1 else dict(blocks)

    def _apply_function(self, fn: Callable[[Any], Any], blocks: Blocks) -> Blocks:
        layout = self.bound_layout()
        value = fn(self._components(blocks))
        if isinstance(value, Tensor) and len(layout) == 1:
            value = {layout.names[0]: value}
        if not isinstance(value, dict):
            raise GeometryError(
                f"a function of a change of coordinates returned {type(value).__name__}; the chart has {layout}. Return a "
                "tensor if there is one block, else a dict name -> tensor."
            )
        return layout.check(value, "the value of a change of coordinates")

    def forward(self, x: Blocks) -> Blocks:
        return self._apply_function(self.pair[0], x)

    def invert(self, y: Blocks) -> Blocks:
        return self._apply_function(self.pair[1], y)

    @property
    def full_domain(self) -> bool:
        return self.domain is None

    def outside_domain(self, x: Blocks) -> str | None:
        return None if self.domain is None else self.domain.violated(self._components(x))

    def outside_image(self, y: Blocks) -> str | None:
        return None if self.image is None else self.image.violated(self._components(y))
