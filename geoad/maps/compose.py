"""Composition and inversion of maps."""

from __future__ import annotations

from typing import Self, cast

from torch import Tensor, nn

from geoad.errors import GeometryError
from geoad.maps.base import Diffeomorphism
from geoad.maps.select import Recipe, bind
from geoad.params import Blocks, Layout

__all__ = ["Compose", "Inverse"]


class Compose(Diffeomorphism):
    r"""ψ = φ_n(... φ_2(φ_1(θ))): the maps act in the order in which they are given.

    Each argument is a recipe or a mapping from name patterns to recipes.

    >>> import torch, geoad
    >>> chart = geoad.Chart({"x": (1,)}, name="x")
    >>> psi = chart.reparametrize(geoad.maps.Compose(geoad.maps.Scale(2.0), geoad.maps.Exp())).target
    >>> chart.point(torch.tensor([0.0])).to(psi).components
    tensor([1.])
    """

    def __init__(self, *maps: Recipe) -> None:
        super().__init__()
        if len(maps) == 1 and isinstance(maps[0], (list, tuple)):
            maps = tuple(cast("list[Recipe]", maps[0]))
        if not maps:
            raise GeometryError("Compose needs at least one map, got none. Use maps.Identity() for the identity.")
        self.recipes: tuple[Recipe, ...] = maps
        self.steps = nn.ModuleList()

    def bind(self, layout: Layout) -> Self:
        if self.layout is not None:
            return super().bind(layout)  # raises: bound already
        return self.of([bind(recipe, layout) for recipe in self.recipes], layout=layout)

    @classmethod
    def of(cls, steps: list[Diffeomorphism], *, layout: Layout | None = None) -> Self:
        """The composition of maps that are bound already; `layout` is needed only if there are none."""
        bound = cls.__new__(cls)
        Diffeomorphism.__init__(bound)
        bound.recipes = ()
        bound.layout = layout if layout is not None else steps[0].layout
        bound.steps = nn.ModuleList(steps)
        bound.elementwise = all(step.elementwise for step in steps)
        bound.blockwise = all(step.blockwise for step in steps)
        bound.linear = all(step.linear for step in steps)
        return bound

    def _maps(self) -> list[Diffeomorphism]:
        return cast("list[Diffeomorphism]", list(self.steps))

    def forward(self, x: Blocks) -> Blocks:
        for step in self._maps():
            x = step.forward(x)
        return x

    def invert(self, y: Blocks) -> Blocks:
        for step in reversed(self._maps()):
            y = step.invert(y)
        return y

    def _stations(self, x: Blocks) -> list[Blocks]:
        stations = [x]
        for step in self._maps():
            stations.append(step.forward(stations[-1]))
        return stations

    def push(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        for step in self._maps():
            x, start = step.forward(x), x
            v = step.push(start, x, v)
        return v

    def pull(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        stations = self._stations(x)
        for i, step in reversed(list(enumerate(self._maps()))):
            w = step.pull(stations[i], stations[i + 1], w)
        return w

    def push_inverse(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        for step in reversed(self._maps()):
            y, end = step.invert(y), y
            v = step.push_inverse(y, end, v)
        return v

    def pull_inverse(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        for step in self._maps():
            x, start = step.forward(x), x
            w = step.pull_inverse(start, x, w)
        return w

    def log_abs_det(self, x: Blocks, y: Blocks) -> Tensor:
        stations = self._stations(x)
        total = next(iter(x.values())).new_zeros(())
        for i, step in enumerate(self._maps()):
            total = total + step.log_abs_det(stations[i], stations[i + 1])
        return total

    @property
    def full_domain(self) -> bool:
        return all(step.full_domain for step in self._maps())

    def outside_domain(self, x: Blocks) -> str | None:
        for step in self._maps():
            condition = step.outside_domain(x)
            if condition is not None:
                return condition
            x = step.forward(x)
        return None

    def outside_image(self, y: Blocks) -> str | None:
        for step in reversed(self._maps()):
            condition = step.outside_image(y)
            if condition is not None:
                return condition
            y = step.invert(y)
        return None


class Inverse(Diffeomorphism):
    """ψ = φ⁻¹(θ): a recipe turned around.

    >>> import torch, geoad
    >>> chart = geoad.Chart({"x": (1,)}, name="x")
    >>> psi = chart.reparametrize(geoad.maps.Inverse(geoad.maps.Log())).target  # the same as maps.Exp()
    >>> chart.point(torch.tensor([0.0])).to(psi).components
    tensor([1.])
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe: Recipe | None = recipe
        self.original: Diffeomorphism

    def bind(self, layout: Layout) -> Self:
        if self.recipe is None:
            return super().bind(layout)  # raises: bound already
        return self.of(bind(self.recipe, layout))

    @classmethod
    def of(cls, original: Diffeomorphism) -> Self:
        """The inverse of a map that is bound already."""
        bound = cls.__new__(cls)
        Diffeomorphism.__init__(bound)
        bound.recipe = None
        bound.layout = original.layout
        bound.original = original
        bound.elementwise = bound.original.elementwise
        bound.blockwise = bound.original.blockwise
        bound.monomial = bound.original.monomial
        bound.linear = bound.original.linear
        return bound

    def forward(self, x: Blocks) -> Blocks:
        return self.original.invert(x)

    def invert(self, y: Blocks) -> Blocks:
        return self.original.forward(y)

    def outside_domain(self, x: Blocks) -> str | None:
        return self.original.outside_image(x)

    @property
    def full_domain(self) -> bool:
        return False  # the image of the original may be anything

    def outside_image(self, y: Blocks) -> str | None:
        return self.original.outside_domain(y)

    def push(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        return self.original.push_inverse(y, x, v)

    def pull(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        return self.original.pull_inverse(y, x, w)

    def push_inverse(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        return self.original.push(y, x, v)

    def pull_inverse(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        return self.original.pull(y, x, w)

    def log_abs_det(self, x: Blocks, y: Blocks) -> Tensor:
        return -self.original.log_abs_det(y, x)
