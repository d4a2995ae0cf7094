"""The numbers that a recipe refers to: the weights that LoRA adapts, the values of frozen blocks, the offset of a subspace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from geoad.errors import GeometryError
from geoad.maps.numbers import given_numbers
from geoad.params import Blocks, Layout

__all__ = ["anchored", "plain"]


def plain(base: Any) -> Any:
    """`base`, cut from autograd if it is a tensor: a parameter would become one of the map."""
    return base.detach() if isinstance(base, Tensor) else base


def anchored(base: Any, layout: Layout, who: str, role: str) -> Blocks:
    """The blocks of `layout` in `base` as float64 numbers of their own.

    Args:
        base: a single `Point` (its blocks are used as they are: ``chart.reparametrize`` has moved it), a mapping
            name -> tensor with these blocks among others, or a tensor if there is just one.
        layout: the blocks that are asked for.
        who: the class of the map, for messages.
        role: what the numbers are to it, for messages.

    Raises:
        GeometryError: there is no base, a block is missing, of another shape or not finite.
    """
    blocks: Any = getattr(base, "blocks", base)
    if isinstance(blocks, Tensor) and len(layout) == 1:
        blocks = {layout.names[0]: blocks}
    if not isinstance(blocks, Mapping):
        found = "nothing" if base is None else f"a {type(base).__name__}"
        raise GeometryError(
            f"{who} needs {role}, found {found}. They are part of the map: without them it is not known which weights its "
            "coordinates stand for. Pass a point of the network, geo.point(), or a dict name -> tensor."
        )
    given = cast("Mapping[str, Any]", blocks)
    missing = [name for name in layout if name not in given]
    if missing:
        raise GeometryError(
            f"{who} was bound to the blocks {list(layout.names)}, but {missing} are not among {role}: {list(given)}. Pass a "
            "point of the network, geo.point(), or leave these blocks out by name pattern."
        )
    found_blocks = {name: given_numbers(given[name], f"'{name}', of {role}") for name in layout}
    for name, shape in layout.items():
        if found_blocks[name].shape != shape:
            raise GeometryError(
                f"{who}: block '{name}' has shape {tuple(shape)}, but among {role} it has {tuple(found_blocks[name].shape)}. "
                "One set of numbers is needed, of the shape of the block; index a batch of points first, p[0]."
            )
    return found_blocks
