"""Per-block selection: which recipe acts on which blocks, by name pattern."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from geoad.errors import GeometryError
from geoad.maps.base import Map, join_laws
from geoad.params import Blocks, Layout

__all__ = ["Blockwise", "Recipe", "bind", "keep"]

Recipe = Map | Mapping[str, Map]


class Blockwise(Map):
    """A bound map made of bound maps on disjoint sets of blocks; blocks of no part keep their coordinates."""

    def __init__(self, layout: Layout, parts: list[Map]) -> None:
        super().__init__()
        self.layout = layout
        self.parts = nn.ModuleList(parts)
        self._names: list[tuple[str, ...]] = [part.bound_layout().names for part in parts]
        self._image_names: list[tuple[str, ...]] = [tuple(part.image_shapes) for part in parts]
        self.law = join_laws(part.law for part in parts)
        self.elementwise = all(part.elementwise for part in parts)
        self.blockwise = all(part.blockwise for part in parts)
        self.monomial = all(part.monomial for part in parts)
        self.linear = all(part.linear for part in parts)
        self._shapes = _join_images(layout, parts)
        self._same = tuple(self._shapes) == layout.names

    @property
    def image_shapes(self) -> dict[str, torch.Size]:
        return dict(self._shapes)

    @property
    def groups(self) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        groups = [group for part in self.parts for group in cast(Map, part).groups]
        mapped = {name for names in self._names for name in names}
        return groups + [((name,), (name,)) for name in self.bound_layout() if name not in mapped]

    def _each(self, method: str, result: str, *given: tuple[str, Blocks]) -> Blocks:
        """Apply `method` of each part to its own blocks; `result` and the tags of `given` say which side: "x" or "y"."""
        collected = dict(given[-1][1])
        for part, names, images in zip(self.parts, self._names, self._image_names, strict=True):
            sides = {"x": names, "y": images}
            # a part that has no blocks on one side (frozen ones) is given all of them: they tell dtype and device
            arguments = [{name: blocks[name] for name in sides[side] or blocks} for side, blocks in given]
            collected.update(getattr(part, method)(*arguments))
        if self._same:
            return collected
        order = self._shapes if result == "y" else self.bound_layout()
        return {name: collected[name] for name in order}

    def forward(self, x: Blocks) -> Blocks:
        return self._each("forward", "y", ("x", x))

    def invert(self, y: Blocks) -> Blocks:
        return self._each("invert", "x", ("y", y))

    def near(self, x: Blocks, y: Blocks) -> Blocks:
        moved = self._each("near", "y", ("x", x), ("y", y))
        kept = set(self.bound_layout().names) - {name for names in self._names for name in names}
        return moved | {name: x[name] for name in moved if name in kept}

    def push(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        return self._each("push", "y", ("x", x), ("y", y), ("x", v))

    def pull(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        return self._each("pull", "x", ("x", x), ("y", y), ("y", w))

    def push_inverse(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        return self._each("push_inverse", "x", ("x", x), ("y", y), ("y", v))

    def pull_inverse(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        return self._each("pull_inverse", "y", ("x", x), ("y", y), ("x", w))

    def log_abs_det(self, x: Blocks, y: Blocks) -> Tensor:
        total = next(iter(x.values())).new_zeros(())
        for part, names, images in zip(self.parts, self._names, self._image_names, strict=True):
            total = total + cast(Map, part).log_abs_det({n: x[n] for n in names}, {n: y[n] for n in images})
        return total

    def _first_violation(self, method: str, sides: list[tuple[str, ...]], blocks: Blocks) -> str | None:
        for part, names in zip(self.parts, sides, strict=True):
            condition = cast("str | None", getattr(part, method)({name: blocks[name] for name in names}))
            if condition is not None:
                return condition
        return None

    @property
    def full_domain(self) -> bool:
        return all(cast(Map, part).full_domain for part in self.parts)

    def outside_domain(self, x: Blocks) -> str | None:
        return self._first_violation("outside_domain", self._names, x)

    def outside_image(self, y: Blocks) -> str | None:
        return self._first_violation("outside_image", self._image_names, y)


def _join_images(layout: Layout, parts: list[Map]) -> dict[str, torch.Size]:
    """The blocks of ψ: in the order of θ, where those of a part stand in the place of the part's first block."""
    owner = {name: part for part in parts for name in part.bound_layout().names}
    shapes: dict[str, torch.Size] = {}
    done: set[int] = set()
    for name, shape in layout.items():
        part = owner.get(name)
        if part is None:
            new = {name: shape}
        else:
            new = {} if id(part) in done else part.image_shapes
            done.add(id(part))
        for each in new:
            if each in shapes:
                raise GeometryError(
                    f"the map makes two blocks of the name '{each}' (the blocks are {list(layout.names)}). A chart tells its "
                    "blocks apart by name; rename one of them in the network, or give the map other names for its parts."
                )
        shapes.update(new)
    if not shapes:
        raise GeometryError(
            "the map leaves no coordinate: all blocks are frozen. A chart needs at least one block; leave some of them out "
            "of the pattern."
        )
    return shapes


def keep(base: Any) -> Blocks:
    """The blocks of a base point in its own chart."""
    return base.blocks


def bind(recipe: Recipe, layout: Layout, blocks_of: Callable[[Any], Blocks] = keep) -> Map:
    """Bind `recipe` to the blocks of `layout`.

    `blocks_of` turns a point that a recipe refers to (its ``base``) into blocks of the chart that is reparametrized.

    A mapping ``{pattern: recipe}`` selects blocks by `fnmatch` pattern on their names, the first match wins, unmatched
    blocks keep their coordinates. A pattern that matches no name at all raises, and the message lists the names.
    """
    if isinstance(recipe, Map):
        recipe = {"*": recipe}
    if not isinstance(recipe, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        found = f"the class {recipe.__name__}" if isinstance(recipe, type) else type(recipe).__name__
        raise GeometryError(
            f"a reparametrization is built from a map of geoad.maps or {{pattern: map}}, found {found}. A map is an instance, "
            "geoad.maps.Softplus(); for a function of your own subclass geoad.maps.Elementwise."
        )
    chosen: dict[str, list[str]] = {pattern: [] for pattern in recipe}
    for name in layout.names:
        for pattern, names in chosen.items():
            if fnmatchcase(name, pattern):
                names.append(name)
                break
    for pattern, part in recipe.items():
        if not isinstance(part, Map):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise GeometryError(
                f"the recipe for pattern '{pattern}' is a {type(part).__name__}, not a map. A reparametrization is "
                "built from maps of geoad.maps; pass for instance {'*.weight': geoad.maps.Softplus()}."
            )
        if not any(fnmatchcase(name, pattern) for name in layout.names):
            raise GeometryError(
                f"the pattern '{pattern}' matches no block. The blocks are {list(layout.names)}. A pattern that "
                "matches nothing is nearly always a typing error and would leave the coordinates as they are; note "
                "that '*.weight' does not match a bare 'weight'. Mend the pattern or drop it."
            )
    parts: list[Map] = []
    for pattern, names in chosen.items():
        if not names:
            continue
        part = recipe[pattern].settled(blocks_of)
        if part.joint:
            parts.append(part.bind(layout.restrict(names)))
        else:
            parts.extend(part.bind(layout.restrict([name])) for name in names)
    return Blockwise(layout, parts)
