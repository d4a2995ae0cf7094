"""How the blocks of a layer form a stack of matrices, one row for each output unit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.params import Blocks, Layout, insert_axes

__all__ = ["Arrangement"]


@dataclass(frozen=True)
class Arrangement:
    r"""The blocks of a layer as a tensor of shape (groups, o, i): o outputs and i inputs in each of the groups.

    ==============================  =======================================  ==========================
    block                           its shape                                entries of a row
    ==============================  =======================================  ==========================
    weight (linear, convolution)    (groups · o, i', k...)                   i = i' · k
    weight, ``transposed``          (groups · i', o, k...)                   i = i' · k
    bias, with a weight             (groups · o,)                            one more, the last
    bias alone                      any, raveled                             i = 1
    ==============================  =======================================  ==========================

    Transposed are the weights of ``x @ W`` (GPT-2), of transposed convolutions, and embeddings (V, o), whose inputs are the
    indices.

    >>> from geoad.params import Layout
    >>> layout = Layout({"conv.weight": (6, 2, 3, 3), "conv.bias": (6,)})
    >>> Arrangement("conv.weight", "conv.bias", groups=2).sizes(layout)
    (2, 3, 19)
    """

    weight: str | None = None
    bias: str | None = None
    transposed: bool = False
    groups: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """The blocks."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    def check(self, layout: Layout) -> None:
        """Raise `GeometryError` if the blocks do not form such a tensor."""
        names = self.names
        unknown = [name for name in names if name not in layout]
        weight = None if self.weight is None or unknown else layout[self.weight]
        if not names or unknown or len(set(names)) < len(names):
            found = f"the blocks {list(names)}, of which the layout ({list(layout.names)}) lacks {unknown}"
        elif weight is not None and (len(weight) < 2 or weight[0] % self.groups):
            found = f"a weight of shape {tuple(weight)} in {self.groups} groups"
        elif self.bias is not None and weight is not None and layout[self.bias] != (self._units(weight),):
            found = f"a weight of shape {tuple(weight)} with a bias of shape {tuple(layout[self.bias])}"
        elif weight is None and self.groups > 1 and layout[names[0]].numel() % self.groups:
            found = f"a bias of shape {tuple(layout[names[0]])} in {self.groups} groups"
        else:
            return
        raise GeometryError(
            f"an arrangement of a layer was asked for {found}. It takes a weight (groups · o, i, ...) (transposed: "
            "(groups · i, o, ...)) and a bias (groups · o,), or one of them; name blocks that fit."
        )

    def _units(self, weight: torch.Size) -> int:
        return weight[1] * self.groups if self.transposed else weight[0]

    def sizes(self, layout: Layout) -> tuple[int, int, int]:
        """(groups, o, i)."""
        if self.weight is None:
            return self.groups, layout[self.names[0]].numel() // self.groups, 1
        weight = layout[self.weight]
        units = self._units(weight) // self.groups
        inputs = weight.numel() // max(1, units * self.groups) if units else weight[1:].numel()
        return self.groups, units, inputs + (self.bias is not None)

    def matrix(self, layout: Layout, blocks: Blocks) -> Tensor:
        """The tensor (*batch, groups, o, i) of the blocks."""
        if self.weight is None:
            name = self.names[0]
            block, (groups, units, _) = blocks[name], self.sizes(layout)
            return block.reshape(*block.shape[: block.ndim - len(layout[name])], groups, units, 1)
        rows = self.rows(layout, blocks[self.weight])
        if self.bias is None:
            return rows
        bias = blocks[self.bias]
        column = bias.reshape(*bias.shape[:-1], *rows.shape[-3:-1], 1)
        return torch.cat([rows, column], -1)

    def rows(self, layout: Layout, block: Tensor) -> Tensor:
        """The weight alone, (*batch, groups, o, i), without the column of the bias."""
        assert self.weight is not None
        shape = layout[self.weight]
        batch = block.shape[: block.ndim - len(shape)]
        groups, units, inputs = self.sizes(layout)
        inputs -= self.bias is not None
        if self.transposed:
            block = block.reshape(*batch, groups, shape[0] // groups, units, shape[2:].numel()).transpose(-3, -2)
        return block.reshape(*batch, groups, units, inputs)

    def block(self, layout: Layout, rows: Tensor) -> Tensor:
        """The weight of its rows."""
        assert self.weight is not None
        shape, batch = layout[self.weight], rows.shape[:-3]
        if self.transposed:
            groups, units, _ = self.sizes(layout)
            rows = rows.reshape(*batch, groups, units, shape[0] // groups, shape[2:].numel()).transpose(-3, -2)
        return rows.reshape(*batch, *shape)

    def blocks(self, layout: Layout, matrix: Tensor) -> Blocks:
        """The inverse of `matrix`, in the order of the layout."""
        batch = matrix.shape[:-3]
        if self.weight is None:
            name = self.names[0]
            return {name: matrix.reshape((*batch, *layout[name]))}
        if self.bias is None:
            return {self.weight: self.block(layout, matrix)}
        parts = {
            self.weight: self.block(layout, matrix[..., :-1]),
            self.bias: matrix[..., -1].reshape((*batch, *layout[self.bias])),
        }
        return {name: parts[name] for name in layout.names}

    def places(self, layout: Layout) -> Tensor:
        """Where the entries of the tensor lie in the raveled blocks, (groups, o, i)."""
        return self.matrix(layout, layout.unravel(torch.arange(layout.dim, device="cpu"))).long()


def outer(left: Tensor, right: Tensor) -> Tensor:
    """(*, g, o) and (*, g, i) -> (*, g, o, i)."""
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def over_groups(factor: Tensor) -> Tensor:
    """A number for each element of a batch, with axes for (g, o, i)."""
    return insert_axes(factor, factor.ndim, 3) if factor.ndim else factor
