"""Maps that cannot be undone: other, fewer or redundant coordinates for the same network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from geoad.errors import GeometryError, NotADiffeomorphismError
from geoad.maps.base import Map, no_law
from geoad.params import Blocks, Layout

__all__ = ["Shapes", "SmoothMap"]

Shapes = Mapping[str, Any] | tuple[int, ...] | Callable[[Any], Any]
"""Shapes of the blocks of ψ: by the name of the part, or one bare shape; or a function of the shape of θ."""


class SmoothMap(Map):
    r"""A smooth map :math:`f: \psi \mapsto \theta` of any rank, e.g. a factorisation of deficient rank.

    It moves points, vectors and (k,0) tensors from ψ to θ (by :math:`J = ∂θ/∂ψ`), and functions, differentials and
    (0,k) tensors from θ to ψ (by :math:`J^\top`). Nothing else has a law, and is refused by name; `Submersion` and
    `Immersion` have more laws.

    Each matched block of θ is mapped by itself. The blocks of ψ that stand for ``0.weight`` are named
    ``0.weight_<part>``, or ``0.weight`` where the only part has no name. With ``joint=True`` the map receives all
    matched blocks at once, and the parts are the names of ψ.

    Args:
        fn: f; takes the parts of ψ (a dict part -> tensor, or the tensor of a bare shape) and returns the block θ
            (``joint``: a dict of blocks).
        shapes: the shapes of the parts, ``{"a": (3,), "b": (2, 2)}``; a bare shape for one part without a name; or a
            function of the shape of θ (``joint``: of the dict of shapes) that returns either.
        section: a ψ over θ, for the θ where there is one; without it no point goes from θ to ψ.
        joint: one map for all matched blocks.

    A subclass overrides `inverse_value` (f), `part_shapes`, and perhaps `value` (the section), the checks `bad_domain`
    (of the section) and `bad_image` (of ψ), and the products ``push_inverse_block`` and ``pull_inverse_block`` where
    there is a closed form.

    >>> import torch, geoad
    >>> chart = geoad.Chart({"x": (3,)}, name="x")
    >>> outer = geoad.maps.SmoothMap(lambda y: y["a"] * y["b"], {"a": (3,), "b": ()})
    >>> psi = chart.reparametrize(outer, name="ab").target
    >>> q = psi.point({"x_a": torch.tensor([1.0, 2.0, 3.0]), "x_b": torch.tensor(2.0)})
    >>> q.to(chart).components
    tensor([2., 4., 6.])
    """

    law = "smooth"
    joint = False

    def __init__(
        self,
        fn: Callable[[Any], Any] | None = None,
        shapes: Shapes | None = None,
        section: Callable[[Any], Any] | None = None,
        *,
        joint: bool = False,
    ) -> None:
        super().__init__()
        self._fn, self._shapes, self._section = fn, shapes, section
        self.joint = joint
        self.blockwise = not joint
        self._parts: dict[str, str] = {}
        self._images: dict[str, torch.Size] = {}

    # -- blocks ------------------------------------------------------------------------------------------------------

    def part_shapes(self, shape: Any) -> Any:
        """The shapes of the parts of ψ, for a block of this shape (``joint``: for a dict of shapes)."""
        if self._shapes is None:
            raise GeometryError(
                f"{type(self).__name__} does not say which blocks ψ has. Pass shapes={{part: shape}} (a bare shape for one "
                "part, or a function of the shape of θ), or override part_shapes."
            )
        return self._shapes(shape) if callable(self._shapes) else self._shapes

    def bind(self, layout: Layout) -> Any:
        if not self.joint and len(layout) != 1:
            raise GeometryError(
                f"{type(self).__name__} maps one block at a time, but was bound to {list(layout.names)}. Use "
                "chart.reparametrize, which binds a copy to each block."
            )
        return super().bind(layout)

    def prepare(self, layout: Layout) -> None:
        name = layout.names[0]
        given: Any = self.part_shapes(dict(layout.items()) if self.joint else layout[name])
        shapes = dict(cast("Mapping[str, Any]", given)) if isinstance(given, Mapping) else {"": given}
        prefix = "" if self.joint else name
        self._bare = "" in shapes
        self._parts = {part: _part_name(prefix, part) for part in shapes}
        self._images = {self._parts[part]: torch.Size(shape) for part, shape in shapes.items()}
        self._theta = name
        self.prepare_parts(layout)

    def prepare_parts(self, layout: Layout) -> None:
        """Hook of `bind`: check the shapes, draw random numbers, register buffers."""

    @property
    def image_shapes(self) -> dict[str, torch.Size]:
        self.bound_layout()
        return dict(self._images)

    def image_layout(self) -> Layout:
        """The blocks of ψ."""
        return Layout(self.image_shapes)

    def theta_of(self, x: Blocks) -> Any:
        """Blocks of θ as the functions of a subclass see them."""
        return x if self.joint else x[self._theta]

    def parts_of(self, y: Blocks) -> Any:
        """Blocks of ψ as the functions of a subclass see them."""
        parts = {part: y[name] for part, name in self._parts.items()}
        return parts[""] if self._bare else parts

    def _theta_blocks(self, theta: Any) -> Blocks:
        if self.joint:
            return {name: theta[name] for name in self.bound_layout()}
        return {self._theta: theta}

    def _image_blocks(self, parts: Any) -> Blocks:
        given: dict[str, Tensor] = {"": parts} if self._bare else parts
        return {name: given[part] for part, name in self._parts.items()}

    # -- on parts, for subclasses --------------------------------------------------------------------------------------

    def inverse_value(self, y: Any) -> Any:
        """θ = f(ψ)."""
        if self._fn is None:
            raise GeometryError(
                f"{type(self).__name__} has no function ψ ↦ θ. Pass it as the first argument, or override inverse_value."
            )
        return self._fn(y)

    def value(self, x: Any) -> Any:
        """A ψ over θ."""
        if self._section is None:
            raise NotADiffeomorphismError(
                f"a point has no law from θ to ψ under {type(self).__name__}: there may be no ψ over θ, or many. Make the "
                "point in ψ, psi.point(...), and move it to θ; or give the map a section."
            )
        return self._section(x)

    def bad_domain(self, x: Any) -> str | None:
        """The condition that θ violates where the section is not defined, or None."""
        return None

    def bad_image(self, y: Any) -> str | None:
        """The condition that ψ violates where it is outside the domain of f, or None."""
        return None

    def push_inverse_block(self, x: Any, y: Any, v: Any) -> Any:
        """J v of a ψ-vector."""
        return torch.func.jvp(self.inverse_value, (y,), (v,))[1]

    def pull_inverse_block(self, x: Any, y: Any, w: Any) -> Any:
        """Jᵀ w of a θ-covector."""
        return torch.func.vjp(self.inverse_value, y)[1](w)[0]

    def push_block(self, x: Any, y: Any, v: Any) -> Any:
        """A θ-vector in ψ."""
        raise no_law(self, "a vector", "from θ to ψ")

    def pull_block(self, x: Any, y: Any, w: Any) -> Any:
        """A ψ-covector in θ."""
        raise no_law(self, "a covector", "from ψ to θ")

    # -- on blocks -----------------------------------------------------------------------------------------------------

    def forward(self, x: Blocks) -> Blocks:
        return self._image_blocks(self.value(self.theta_of(x)))

    def invert(self, y: Blocks) -> Blocks:
        return self._theta_blocks(self.inverse_value(self.parts_of(y)))

    def outside_domain(self, x: Blocks) -> str | None:
        return self._locate(self.bad_domain(self.theta_of(x)))

    def outside_image(self, y: Blocks) -> str | None:
        return self._locate(self.bad_image(self.parts_of(y)))

    def _locate(self, condition: str | None) -> str | None:
        return condition if condition is None or self.joint else f"block '{self._theta}': {condition}"

    def push(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        return self._image_blocks(self.push_block(self.theta_of(x), self.parts_of(y), self.theta_of(v)))

    def pull(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        return self._theta_blocks(self.pull_block(self.theta_of(x), self.parts_of(y), self.parts_of(w)))

    def push_inverse(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        return self._theta_blocks(self.push_inverse_block(self.theta_of(x), self.parts_of(y), self.parts_of(v)))

    def pull_inverse(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        return self._image_blocks(self.pull_inverse_block(self.theta_of(x), self.parts_of(y), self.theta_of(w)))

    def dense_jacobian(self, y: Blocks) -> Tensor:
        """∂θ/∂ψ at ψ = y as a matrix (dim θ, dim ψ)."""
        theta, psi = self.bound_layout(), self.image_layout()

        def raveled(vector: Tensor) -> Tensor:
            return theta.ravel(self.invert(psi.unravel(vector)))

        mode: Any = torch.func.jacfwd if psi.dim <= theta.dim else torch.func.jacrev
        return cast(Tensor, mode(raveled)(psi.ravel(y)))


def _part_name(prefix: str, part: str) -> str:
    return "_".join(each for each in (prefix, part) if each)
