"""Per-block selection: which recipe acts on which blocks, by name pattern."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import cast

from torch import Tensor, nn

from geoad.errors import GeometryError
from geoad.maps.base import Diffeomorphism
from geoad.params import Blocks, Layout

__all__ = ["Blockwise", "Recipe", "bind"]

Recipe = Diffeomorphism | Mapping[str, Diffeomorphism]


class Blockwise(Diffeomorphism):
    """A bound map made of bound maps on disjoint sets of blocks; blocks of no part keep their coordinates."""

    def __init__(self, layout: Layout, parts: list[Diffeomorphism]) -> None:
        super().__init__()
        self.layout = layout
        self.parts = nn.ModuleList(parts)
        layouts = [part.bound_layout() for part in parts]
        self._names: list[tuple[str, ...]] = [each.names for each in layouts]
        self.elementwise = all(part.elementwise for part in parts)
        self.blockwise = all(part.blockwise for part in parts)
        self.monomial = all(part.monomial for part in parts)
        self.linear = all(part.linear for part in parts)

    def _each(self, method: str, given: Blocks, *ends: Blocks) -> Blocks:
        """Apply `method` of each part to its own blocks; the result keeps the order of the layout."""
        result = dict(given)
        for part, names in zip(self.parts, self._names, strict=True):
            arguments = [{name: blocks[name] for name in names} for blocks in (*ends, given)]
            result.update(getattr(part, method)(*arguments))
        return result

    def forward(self, x: Blocks) -> Blocks:
        return self._each("forward", x)

    def invert(self, y: Blocks) -> Blocks:
        return self._each("invert", y)

    def push(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        return self._each("push", v, x, y)

    def pull(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        return self._each("pull", w, x, y)

    def push_inverse(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        return self._each("push_inverse", v, x, y)

    def pull_inverse(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        return self._each("pull_inverse", w, x, y)

    def log_abs_det(self, x: Blocks, y: Blocks) -> Tensor:
        total = next(iter(x.values())).new_zeros(())
        for part, names in zip(self.parts, self._names, strict=True):
            bound = cast(Diffeomorphism, part)
            total = total + bound.log_abs_det({n: x[n] for n in names}, {n: y[n] for n in names})
        return total

    def _first_violation(self, method: str, blocks: Blocks) -> str | None:
        for part, names in zip(self.parts, self._names, strict=True):
            condition = cast("str | None", getattr(part, method)({name: blocks[name] for name in names}))
            if condition is not None:
                return condition
        return None

    @property
    def full_domain(self) -> bool:
        return all(cast(Diffeomorphism, part).full_domain for part in self.parts)

    def outside_domain(self, x: Blocks) -> str | None:
        return self._first_violation("outside_domain", x)

    def outside_image(self, y: Blocks) -> str | None:
        return self._first_violation("outside_image", y)


def bind(recipe: Recipe, layout: Layout) -> Diffeomorphism:
    """Bind `recipe` to the blocks of `layout`.

    A mapping ``{pattern: recipe}`` selects blocks by `fnmatch` pattern on their names, the first match wins, unmatched
    blocks keep their coordinates. A pattern that matches no name at all raises, and the message lists the names.
    """
    if isinstance(recipe, Diffeomorphism):
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
        if not isinstance(part, Diffeomorphism):  # pyright: ignore[reportUnnecessaryIsInstance]
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
    parts: list[Diffeomorphism] = []
    for pattern, names in chosen.items():
        if not names:
            continue
        part = recipe[pattern]
        if part.joint:
            parts.append(part.bind(layout.restrict(names)))
        else:
            parts.extend(part.bind(layout.restrict([name])) for name in names)
    return Blockwise(layout, parts)
