"""Composition and inversion of maps."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from geoad.errors import GeometryError, NotADiffeomorphismError
from geoad.maps.base import Map, join_laws
from geoad.maps.select import Recipe, bind, keep
from geoad.params import Blocks, Layout

__all__ = ["Compose", "Inverse"]


class Compose(Map):
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
        self._blocks_of: Callable[[Any], Blocks] = keep
        self.steps = nn.ModuleList()

    def bind(self, layout: Layout) -> Self:
        if self.layout is not None:
            return super().bind(layout)  # raises: bound already
        steps: list[Map] = []
        for recipe in self.recipes:
            here = Layout(steps[-1].image_shapes) if steps else layout
            steps.append(bind(recipe, here, functools.partial(self._blocks_before, steps[:])))
        return self.of(steps, layout=layout)

    def settled(self, blocks_of: Callable[[Any], Blocks]) -> Self:
        """The recipe with a way to see the base points of its parts in the chart in which it is about to be bound."""
        twin = copy.copy(self)
        twin._blocks_of = blocks_of
        return twin

    def _blocks_before(self, steps: list[Map], base: Any) -> Blocks:
        """The blocks of a base point between the steps: after those in `steps`, before the next."""
        blocks = self._blocks_of(base)
        for step in steps:
            blocks = step.forward({name: blocks[name] for name in step.bound_layout()})
        return blocks

    @classmethod
    def of(cls, steps: list[Map], *, layout: Layout | None = None) -> Self:
        """The composition of maps that are bound already; `layout` is needed only if there are none."""
        bound = cls.__new__(cls)
        Map.__init__(bound)
        bound.recipes = ()
        bound.layout = layout if layout is not None else steps[0].layout
        bound.steps = nn.ModuleList(steps)
        bound.elementwise = all(step.elementwise for step in steps)
        bound.blockwise = all(step.blockwise for step in steps)
        bound.linear = all(step.linear for step in steps)
        bound.law = join_laws(step.law for step in steps)
        return bound

    @property
    def image_shapes(self) -> dict[str, torch.Size]:
        return self._maps()[-1].image_shapes if len(self.steps) else super().image_shapes

    @property
    def by_section(self) -> bool:
        return any(step.by_section for step in self._maps())

    def _maps(self) -> list[Map]:
        return cast("list[Map]", list(self.steps))

    def forward(self, x: Blocks) -> Blocks:
        for step in self._maps():
            x = step.forward(x)
        return x

    def invert(self, y: Blocks) -> Blocks:
        for step in reversed(self._maps()):
            y = step.invert(y)
        return y

    def near(self, x: Blocks, y: Blocks) -> Blocks:
        over = [y]
        for step in reversed(self._maps()[1:]):
            over.append(step.invert(over[-1]))
        for step in self._maps():
            x = step.near(x, over.pop())
        return x

    def _stations(self, x: Blocks, y: Blocks) -> list[Blocks]:
        """The coordinates between the steps, from θ = x to ψ = y."""
        stations = [x]
        if self.law == "diffeomorphism":
            for step in self._maps():
                stations.append(step.forward(stations[-1]))
            return stations
        backwards = [y]  # many ψ lie over one θ: only the way back is sure to pass where y is
        for step in reversed(self._maps()[1:]):
            backwards.append(step.invert(backwards[-1]))
        return stations + backwards[::-1]

    def push(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        stations = self._stations(x, y)
        for i, step in enumerate(self._maps()):
            v = step.push(stations[i], stations[i + 1], v)
        return v

    def pull(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        stations = self._stations(x, y)
        for i, step in reversed(list(enumerate(self._maps()))):
            w = step.pull(stations[i], stations[i + 1], w)
        return w

    def push_inverse(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        for step in reversed(self._maps()):
            y, end = step.invert(y), y
            v = step.push_inverse(y, end, v)
        return v

    def pull_inverse(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        stations = self._stations(x, y)
        for i, step in enumerate(self._maps()):
            w = step.pull_inverse(stations[i], stations[i + 1], w)
        return w

    def log_abs_det(self, x: Blocks, y: Blocks) -> Tensor:
        stations = self._stations(x, y)
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


class Inverse(Map):
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
        self.original: Map

    def bind(self, layout: Layout) -> Self:
        if self.recipe is None:
            return super().bind(layout)  # raises: bound already
        original = bind(self.recipe, layout)
        if original.law != "diffeomorphism":
            raise NotADiffeomorphismError(
                f"Inverse of a map that is a {original.law}: it has no inverse that is a change of coordinates. Use the map "
                "itself; chart.reparametrize(map).inverse goes the other way."
            )
        return self.of(original)

    @classmethod
    def of(cls, original: Map) -> Self:
        """The inverse of a map that is bound already."""
        bound = cls.__new__(cls)
        Map.__init__(bound)
        bound.recipe = None
        bound.layout = Layout(original.image_shapes)
        bound.original = original
        bound.law = original.law
        bound.elementwise = bound.original.elementwise
        bound.blockwise = bound.original.blockwise
        bound.monomial = bound.original.monomial
        bound.linear = bound.original.linear
        return bound

    @property
    def image_shapes(self) -> dict[str, torch.Size]:
        return dict(self.original.bound_layout().items())

    @property
    def by_section(self) -> bool:
        return False  # from ψ to θ every map is a function

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
