"""Blocks that are kept as they are, and blocks that are equal to each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.maps.anchor import anchored, plain
from geoad.maps.immersion import Immersion
from geoad.params import Blocks, Layout

__all__ = ["Frozen", "Tied"]


class Frozen(Immersion):
    r"""Every matched block keeps the value that it has in `base`, and has no coordinates in ψ; an immersion.

    Vectors are tangent if they vanish in these blocks, :math:`J^\top ω` leaves these blocks of ω out.

    Args:
        base: a point of any chart of the manifold, or a dict name -> tensor.

    Raises:
        GeometryError: there is no base, or every block of a chart is frozen.
        ChartDomainError: a point with another value in these blocks.

    >>> import torch, geoad
    >>> chart = geoad.Chart({"w": (2,), "b": (2,)}, name="wb")
    >>> p = chart.point({"w": torch.ones(2), "b": torch.zeros(2)})
    >>> psi = chart.reparametrize({"b": geoad.maps.Frozen(p)}, name="w only").target
    >>> psi.layout, psi.point(torch.tensor([2.0, 3.0])).to(chart).components
    (Layout(w: (2,)), {'w': tensor([2., 3.]), 'b': tensor([0., 0.])})
    """

    linear = True

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = plain(base)

    def part_shapes(self, shape: Any) -> dict[str, tuple[int, ...]]:
        return {}

    def prepare_parts(self, layout: Layout) -> None:
        kept = anchored(self.base, layout, "Frozen", "the values that are kept")
        self.base = None
        self.register_buffer("kept", kept[layout.names[0]])

    def parts_of(self, y: Blocks) -> Tensor | None:
        """Some block of ψ, to tell dtype and device: there are none that stand for this block."""
        return next(iter(y.values()), None)

    def inverse_value(self, y: Tensor | None) -> Tensor:
        return self.get_buffer("kept") if y is None else self.constant("kept", y)

    def value(self, x: Tensor) -> dict[str, Tensor]:
        return {}

    def bad_domain(self, x: Tensor) -> str | None:
        kept = self.constant("kept", x)
        return _unequal(x, kept, f"the frozen block '{self._theta}' must have the value it is frozen at")

    def push_block(self, x: Tensor, y: Any, v: Tensor) -> dict[str, Tensor]:
        return {}

    def pull_block(self, x: Tensor, y: Any, w: Any) -> Tensor:
        return torch.zeros_like(x)

    def push_inverse_block(self, x: Tensor, y: Any, v: Any) -> Tensor:
        return torch.zeros_like(x)

    def pull_inverse_block(self, x: Tensor, y: Any, w: Tensor) -> dict[str, Tensor]:
        return {}


class Tied(Immersion):
    r"""All matched blocks of one shape are equal: they are one block of ψ, named after the first; an immersion.

    For a group of n blocks: :math:`J z = (z, ..., z)`, :math:`J^+ v` is the mean, :math:`J^\top ω` the sum of the blocks.

    Raises:
        GeometryError: no two of the matched blocks have the same shape.
        ChartDomainError: a point at which the blocks are not equal.

    >>> import torch, geoad
    >>> chart = geoad.Chart({"a": (2,), "b": (2,)}, name="ab")
    >>> psi = chart.reparametrize(geoad.maps.Tied(), name="tied").target
    >>> psi.point(torch.ones(2)).to(chart).components
    {'a': tensor([1., 1.]), 'b': tensor([1., 1.])}
    """

    linear = True

    def __init__(self) -> None:
        super().__init__(joint=True)

    def part_shapes(self, shape: Any) -> dict[str, torch.Size]:
        shapes: dict[str, torch.Size] = shape
        first: dict[torch.Size, str] = {}
        self._first = {name: first.setdefault(size, name) for name, size in shapes.items()}
        if len(first) == len(shapes):
            found = {name: tuple(size) for name, size in shapes.items()}
            raise GeometryError(
                f"Tied was given {found}, of which no two have the same shape, so nothing can be tied. Only equal blocks can "
                "be one block; mend the name pattern, or transpose in the network."
            )
        self._sizes = {name: float(list(self._first.values()).count(name)) for name in first.values()}
        return {name: shapes[name] for name in first.values()}

    def _summed(self, blocks: Blocks) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for name, group in self._first.items():
            total[group] = total[group] + blocks[name] if group in total else blocks[name]
        return total

    def _means(self, blocks: Blocks) -> dict[str, Tensor]:
        return {group: block / self._sizes[group] for group, block in self._summed(blocks).items()}

    def inverse_value(self, y: dict[str, Tensor]) -> Blocks:
        return {name: y[group] for name, group in self._first.items()}

    def value(self, x: Blocks) -> dict[str, Tensor]:
        return {group: x[group] for group in self._sizes}

    def bad_domain(self, x: Blocks) -> str | None:
        for name, group in self._first.items():
            words = _unequal(x[name], x[group], f"the tied blocks '{group}' and '{name}' must be equal")
            if words is not None:
                return words
        return None

    def push_block(self, x: Blocks, y: Any, v: Blocks) -> dict[str, Tensor]:
        return self._means(v)

    def pull_block(self, x: Blocks, y: Any, w: dict[str, Tensor]) -> Blocks:
        return {name: w[group] / self._sizes[group] for name, group in self._first.items()}

    def push_inverse_block(self, x: Blocks, y: Any, v: dict[str, Tensor]) -> Blocks:
        return self.inverse_value(v)

    def pull_inverse_block(self, x: Blocks, y: Any, w: Blocks) -> dict[str, Tensor]:
        return self._summed(w)


def _unequal(a: Tensor, b: Tensor, words: str) -> str | None:
    """`words` with the difference, if a and b differ by more than rounding."""
    slack = 100 * torch.finfo(a.dtype).eps * (a.norm() + b.norm())
    apart = (a - b).norm()
    return None if bool(apart <= slack) else f"{words}, but the difference has the norm {float(apart):.6g}"
