"""Layers: blocks that form matrices from inputs to outputs, with rows r = Σ_t g_t ⊗ a_t over the positions t of all uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geoad.kernels.positions import inputs_at, signals_at
from geoad.kernels.rows import Plan, Rows, UseRows
from geoad.kernels.uses import AffineUse, ConvUse, EmbeddingUse, Part, Use

__all__ = ["Bases", "Layer", "explicit_rows", "layers_of", "numbers_of_rows", "portions", "rows_of_layer", "single_layer"]

Bases = tuple[Tensor | None, Tensor | None]
"""U_L and U_R; None stands for the identity."""

_CACHE = 1 << 20
"""Bytes that a processor keeps at hand: explicit rows are made and used up in portions of this size."""

_ROOM = 1 << 26
"""Bytes of explicit rows of one sample, above which its seeds are parted too."""


@dataclass(frozen=True)
class Layer:
    """Blocks as a tensor (groups, out, in): a weight, with its bias as one more input if both are always used together.

    Attributes:
        weight: its name, or None for a bias alone.
        bias: its name, or None.
        transposed: the weight is stored with its inputs first: ``x @ W``, transposed convolutions, tables.
        groups: the groups of channels.
        table: an embedding, whose inputs are indices.
        part: how (groups, out, in...) lies in the block of the weight, or (groups · out,) in that of the bias.
    """

    weight: str | None
    bias: str | None
    transposed: bool
    groups: int
    table: bool
    part: Part

    @property
    def names(self) -> tuple[str, ...]:
        """The blocks."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    def arranged(self, values: Tensor) -> Tensor:
        """Numbers for (groups, out, in) as those of the raveled weight."""
        values = values.reshape(-1, values.shape[-1]).mT if self.table else values
        return self.part.place(values.reshape(self.part.shape))

    def uses(self, rows: Rows) -> list[UseRows]:
        """Its uses among the rows; none if this layer is not found in them: the network took another path."""
        return rows.of(self.names[0]) if layers_of(rows.plan, self.names)[0] == [self] else []


def layers_of(plan: Plan, names: Iterable[str], joint: bool = True) -> tuple[list[Layer], tuple[str, ...]]:
    """The layers among the blocks `names`, and the blocks that are in none.

    Args:
        plan: the structure of the network.
        names: the blocks to arrange.
        joint: a bias goes with its weight where both are always used together.
    """
    wanted = tuple(names)
    layers, others = plan.once(("layers", wanted, joint), lambda: _layers_of(plan, wanted, joint))
    return list(layers), others


def _layers_of(plan: Plan, wanted: tuple[str, ...], joint: bool) -> tuple[list[Layer], tuple[str, ...]]:
    layers = list[Layer]()
    for name in wanted:
        layer = single_layer(plan, name)
        if layer is None:
            continue
        partner = _partner(plan, layer) if joint else None
        if layer.weight is None and partner is not None and partner in wanted:
            continue  # it comes with its weight
        if layer.weight is not None and partner is not None and partner in wanted:
            layer = Layer(name, partner, layer.transposed, layer.groups, layer.table, layer.part)
        layers.append(layer)
    placed = {name for layer in layers for name in layer.names}
    return layers, tuple(name for name in wanted if name not in placed)


def single_layer(plan: Plan, name: str) -> Layer | None:
    """The layer of one block alone, or None if its uses are not all of one such kind."""
    return plan.once(("layer", name), lambda: _single_layer(plan, name))


def _single_layer(plan: Plan, name: str) -> Layer | None:
    uses = [use for use in plan.uses if name in use.names]
    if name not in plan.covered or not uses or any(use.names.count(name) != 1 or _both(use, name) for use in uses):
        return None
    found = {_layer_of(use, name) for use in uses}
    return found.pop() if len(found) == 1 else None


def _both(use: Use, name: str) -> bool:
    return use.weight is not None and use.bias is not None and use.weight.name == use.bias.name == name


def _layer_of(use: Use, name: str) -> Layer | None:
    """What one use says of the block."""
    if not isinstance(use, (AffineUse, ConvUse, EmbeddingUse)):
        return None
    groups = use.groups if isinstance(use, ConvUse) else 1
    if use.bias is not None and use.bias.name == name:
        return Layer(None, name, False, groups, False, use.bias) if use.bias.whole else None
    part = use.weight
    assert part is not None
    if isinstance(use, EmbeddingUse):
        return Layer(name, None, True, 1, True, part) if part.whole else None
    if isinstance(use, ConvUse) and use.transposed:
        return Layer(name, None, True, groups, False, part) if part.complete else None
    if part.whole:
        return Layer(name, None, False, groups, False, part)
    return Layer(name, None, True, 1, False, part) if part.flipped else None


def _partner(plan: Plan, layer: Layer) -> str | None:
    """The weight of a bias or the bias of a weight, if neither is used without the other."""
    (name,) = layer.names
    pairs = {(use.weight and use.weight.name, use.bias and use.bias.name) for use in plan.uses if name in use.names}
    if len(pairs) != 1:
        return None
    weight, bias = pairs.pop()
    if weight is None or bias is None:
        return None
    other = bias if name == weight else weight
    if any(other in use.names and name not in use.names for use in plan.uses):
        return None
    return other if single_layer(plan, other) is not None else None


# -- rows in portions ----------------------------------------------------------------------------------------------------------


def portions(uses: Sequence[UseRows], numbers: int) -> Iterator[tuple[tuple[slice, slice], list[UseRows]]]:
    """The uses in portions of samples (and seeds), where a sample takes `numbers` numbers, within reach of the processor."""
    n, k, like = uses[0].back[0].shape[0], len(uses[0].back), uses[0].back[0]
    size = max(1, numbers * like.element_size())
    step, seeds = max(1, _CACHE // size), -(-k // -(-size // _ROOM))
    for start in range(0, n, step):
        part = slice(start, start + step)
        some = [each.part(part) for each in uses]
        for first in range(0, k, seeds):
            which = slice(first, first + seeds)
            yield (part, which), some if seeds >= k else [UseRows(each.use, each.a, each.back[which]) for each in some]


def rows_of_layer(layer: Layer, uses: Sequence[UseRows], bases: Bases = (None, None)) -> Tensor:
    """The rows of a layer with a weight that is no table, (n, K, groups, out, in), in bases (G, o, o) and (G, i, i)."""
    total: Tensor | None = None
    for each in uses:
        left, right = signals_at(each.use, each.g), inputs_at(each.use, each.a).to(each.g.dtype)
        if layer.bias is not None:
            right = torch.cat([right, torch.ones_like(right[..., :1])], -1)
        left = left if bases[0] is None else left @ bases[0]
        right = right if bases[1] is None else right @ bases[1]
        product = outer_products(left, right)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def explicit_rows(layer: Layer, rows: Rows, bases: Bases = (None, None)) -> Tensor:
    """The same for any layer, from rows without structure."""
    values = layer.part.take(rows.explicit(layer.names[0]))
    if layer.weight is None:
        values = values.unflatten(2, (layer.groups, -1)).unsqueeze(-1)
    elif layer.table:
        values = values.mT.unsqueeze(2)
    else:
        values = values.unsqueeze(2) if len(layer.part.shape) == 2 else values.flatten(4)
    if layer.weight is not None and layer.bias is not None:
        values = torch.cat([values, rows.explicit(layer.bias).reshape(*values.shape[:4], 1)], -1)
    values = values if bases[0] is None else bases[0].mT @ values
    return values if bases[1] is None else values @ bases[1]


def outer_products(left: Tensor, right: Tensor) -> Tensor:
    """Σ_t left[n, k, g, t, o] right[n, g, t, i]: (n, K, groups, o, i)."""
    n, k, groups, positions, out = left.shape
    if groups > 1:
        return left.mT @ right.unsqueeze(1)
    joined = left[:, :, 0].mT.reshape(n, k * out, positions) @ right[:, 0]  # seeds and outputs in one axis: larger matrices
    return joined.reshape(n, k, 1, out, right.shape[-1])


def numbers_of_rows(layer: Layer, uses: Sequence[UseRows]) -> int:
    """How many numbers `rows_of_layer` works with for each sample."""
    total = 0
    for each in uses:
        groups, positions, out = signals_at(each.use, each.back[0][:1]).shape[1:]
        inside = layer.part.size // max(1, out * groups) + 1
        total += len(each.back) * groups * out * (positions + inside) + groups * positions * inside
    return total
