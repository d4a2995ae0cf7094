"""Gram matrices K = R₁ G⁻¹ R₂ᵀ of the rows of samples, from what went in and what came back of every layer.

`features` brings rows into the form in which inner products are cheap, `gram` multiplies two sets of them; `gram_of_rows` is
both for rows of any seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geoad.kernels.kernel_terms import Explicit, Outer, Positions, Term, add_equal_products, add_products, agreed
from geoad.kernels.layered import Rows
from geoad.kernels.layers import Layer, layers_of, rows_of_layer
from geoad.kernels.positions import inputs_at, signals_at
from geoad.kernels.uses import EmbeddingUse
from geoad.params import Blocks

__all__ = [
    "CONTRACTIONS",
    "DifferentStructure",
    "Features",
    "Group",
    "features",
    "gram",
    "gram_of_rows",
    "mirror",
    "squared_norms",
]

CONTRACTIONS = ("none", "trace", "diagonal")
"""All pairs of outputs; summed over equal outputs; equal outputs only."""


_Inverse = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Group:
    """Blocks whose rows are multiplied with the inverse of a metric of their own.

    Attributes:
        names: the blocks.
        scale: the inverse is this number.
        move: the rows (batch, ...) of the blocks as those of other coordinates, or None.
        solve: G⁻¹ of such rows, or None for the identity.
        layer: (G_out⁻¹, G_in⁻¹), as products from the right, if the metric is the Kronecker product G_out ⊗ G_in on the layer
            of these blocks, the bias last. `solve` takes its place where the rows have no such structure.
        transposed: that layer is stored with its inputs first.
    """

    names: tuple[str, ...]
    scale: Tensor | None = None
    move: Callable[[Blocks], Blocks] | None = None
    solve: Callable[[Blocks], Blocks] | None = None
    layer: _Inverse | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Features:
    """Rows of n samples and K seeds as a sum of terms.

    Attributes:
        terms: none share a block; the same blocks in the same order for all samples of a data set, as a rule.
        samples, seeds: n and K.
    """

    terms: list[Term]
    samples: int
    seeds: int

    @property
    def numbers(self) -> int:
        """How many numbers are held."""
        return sum(term.numbers for term in self.terms)


def features(
    rows: Rows,
    groups: Sequence[Group],
    *,
    dual: bool = False,
    contract: str = "none",
    places: int = 1,
    partners: int = 1,
    structured: bool = True,
) -> Features:
    """The terms of rows.

    Args:
        rows: of n samples and K seeds.
        groups: the blocks with their metrics; together all of them.
        dual: multiply with the inverse metrics: one of two sides of an inner product has it.
        contract: one of `CONTRACTIONS`.
        places: seeds are (places, outputs); other places count as samples where outputs are contracted.
        partners: against how many samples these will be multiplied, to choose the form by its cost.
        structured: use the structure of layers; without it all rows are explicit.
    """
    terms = [term for group in groups for term in _of_group(rows, group, dual, structured)]
    samples, seeds = rows.samples, rows.seeds
    if contract != "none":
        if places > 1:
            terms = [term.split(places) for term in terms]
            samples, seeds, partners = samples * places, seeds // places, partners * places
        if contract == "trace":
            terms, seeds = [term.merged() for term in terms], 1
    return Features(_joined([_chosen(term, partners, contract) for term in terms]), samples, seeds)


def _chosen(term: Term, partners: int, contract: str) -> Term:
    if not isinstance(term, Positions) or term.count:
        return term
    judged = term.seed(0) if contract == "diagonal" else term
    return term.explicit() if judged.prefers_explicit(partners) else term


def _joined(terms: list[Term]) -> list[Term]:
    """Explicit terms side by side: one product of matrices for all of them."""
    explicit = [term for term in terms if isinstance(term, Explicit)]
    others = [term for term in terms if not isinstance(term, Explicit)]
    if len(explicit) < 2:
        return explicit + others
    names = tuple(name for term in explicit for name in term.names)
    return [Explicit(names, torch.cat([term.left for term in explicit], -1)), *others]


def _of_group(rows: Rows, group: Group, dual: bool, structured: bool) -> list[Term]:
    general = group.move is not None or group.solve is not None
    if not structured or (general and not _is_layer(rows, group)):
        terms: list[Term] = [_solved(rows, group, dual)]
    else:
        layers, rest = layers_of(rows.plan, group.names)
        terms = [_of_layer(layer, rows, group.layer if dual else None) for layer in layers]
        terms += [Explicit((name,), rows.explicit(name)) for name in rest]
    return [term.scaled(group.scale.to(term.left.dtype)) for term in terms] if dual and group.scale is not None else terms


def _is_layer(rows: Rows, group: Group) -> bool:
    """The blocks form the layer on which the metric is a Kronecker product."""
    if group.layer is None:
        return False
    layers, rest = layers_of(rows.plan, group.names)
    if rest or len(layers) != 1 or layers[0].groups > 1:
        return False
    return layers[0].names == group.names and layers[0].transposed == group.transposed


def _solved(rows: Rows, group: Group, dual: bool) -> Explicit:
    """Explicit rows, in other coordinates or multiplied with an inverse."""
    count = rows.samples * rows.seeds
    blocks = {name: rows.explicit(name).reshape(count, *rows.layout[name]) for name in group.names}
    if group.move is not None:
        blocks = group.move(blocks)
    if dual and group.solve is not None:
        blocks = group.solve(blocks)
    flat = [block.reshape(rows.samples, rows.seeds, -1) for block in blocks.values()]
    return Explicit(group.names, torch.cat(flat, -1))


def _of_layer(layer: Layer, rows: Rows, inverse: _Inverse | None) -> Term:
    uses = layer.uses(rows)
    left = _side_by_side([signals_at(each.use, each.g) for each in uses], 3)  # (n, K, groups, t, o): uses are positions as well
    if layer.weight is None:
        return Explicit(layer.names, _turned(left.sum(3).flatten(2), inverse))
    if layer.table:
        return _of_tokens(layer, rows, left[:, :, 0], inverse)
    if layer.groups > 1:
        return Explicit(layer.names, rows_of_layer(layer, uses).flatten(2))
    right = _side_by_side([inputs_at(each.use, each.a).to(rows.dtype) for each in uses], 2)[:, 0]
    if layer.bias is not None:
        right = torch.cat([right, torch.ones_like(right[..., :1])], -1)
    left = left[:, :, 0]
    if inverse is not None:
        left, right = inverse[0](left), inverse[1](right)
    if left.shape[2] == 1:
        return Outer(layer.names, left[:, :, 0], right[:, 0])
    return Positions(layer.names, left, right)


def _side_by_side(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _turned(left: Tensor, inverse: _Inverse | None) -> Tensor:
    """The rows of a bias alone, whose input is 1."""
    return left if inverse is None else inverse[0](left) * inverse[1](left.new_ones(1, 1))


def _of_tokens(layer: Layer, rows: Rows, left: Tensor, inverse: _Inverse | None) -> Positions:
    tokens: list[Tensor] = []
    for each in layer.uses(rows):
        assert isinstance(each.use, EmbeddingUse)
        a = each.a.reshape(rows.samples, -1)
        tokens.append(a if each.use.padding is None else torch.where(a == each.use.padding, -1, a))
    joined = torch.cat(tokens, 1)
    if inverse is not None:
        weight = inverse[1](left.new_ones(layer.part.shape[0]))  # diagonal
        left = inverse[0](left) * weight[joined.clamp_min(0)][:, None, :, None]
    return Positions(layer.names, left, joined, layer.part.shape[0])


# -- products ----------------------------------------------------------------------------------------------------------------


def gram(total: Tensor, a: Features, b: Features, *, upper: bool = False) -> None:
    """Write all inner products to `total`: (n, K, m, K'), or (K, n, m) for those of equal seeds alone.

    Args:
        total: where to.
        a: one side.
        b: the other side.
        upper: both sides are the same samples in the same order, and what lies below the diagonal is not needed.

    Raises:
        DifferentStructure: the sides do not have terms of the same blocks.
    """
    pairs = [agreed(*pair) for pair in _matched(a, b)]
    width = total[0].numel() if total.ndim == 4 else total[:, 0].numel()
    for rows in _tiles(a.samples, a.seeds, width * total.element_size(), upper):
        columns = slice(rows.start, None) if upper else slice(None)
        target = total[:, rows, columns] if total.ndim == 3 else total[rows, :, columns]
        write = add_equal_products if total.ndim == 3 else add_products
        for i, (x, y) in enumerate(pairs):
            write(target, x.part(rows), y.part(columns), fresh=i == 0)


_TILE = 1 << 22
"""Bytes of the result that are worked on at once: terms are added while it is in the cache."""


def _tiles(n: int, seeds: int, width: int, upper: bool) -> Iterable[slice]:
    """Samples whose share of the result, `width` bytes each, is worked on at once; no fewer than make a product worth while."""
    step = _TILE // max(1, width)
    step = max(1, -(-64 // max(1, seeds)), min(step, -(-n // 8)) if upper else step)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


class DifferentStructure(Exception):
    """The two sides have terms of different blocks."""


def _matched(a: Features, b: Features) -> list[tuple[Term, Term]]:
    """Terms of the same blocks in pairs."""
    theirs = {term.names: term for term in b.terms}
    if [term.names for term in a.terms] == list(theirs):
        return list(zip(a.terms, b.terms, strict=True))
    if {term.names for term in a.terms} != set(theirs):
        raise DifferentStructure
    return [(term, theirs[term.names]) for term in a.terms]


def squared_norms(a: Features, b: Features) -> Tensor:
    """The inner products of each row with itself, (n, K)."""
    total: Tensor | None = None
    for x, y in (agreed(*pair) for pair in _matched(a, b)):
        if isinstance(x, Positions):
            x, y = x.explicit(), y.explicit()
        found = (x.left * y.left).sum(-1)
        if isinstance(x, Outer) and isinstance(y, Outer):
            found *= (x.right * y.right).sum(-1, keepdim=True)
        total = found if total is None else total + found
    assert total is not None
    return total


def mirror(total: Tensor, step: int = 128) -> None:
    """Write what lies above the diagonal of (..., n, n) below it, and make the blocks on it symmetric to the last bit."""
    size = total.shape[-1]
    for start in range(0, size, step):
        stop = min(start + step, size)
        total[..., stop:, start:stop] = total[..., start:stop, stop:].mT
        square = total[..., start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).mT)


def gram_of_rows(first: Rows, second: Rows | None = None) -> Tensor:
    """R₁R₂ᵀ (n, K, m, K') of the rows of any seeds; symmetric to the last bit with one argument.

    For instance the inner products of the vectors Jᵀu that a dual (Woodbury) solve needs.
    """
    groups, other = [Group(tuple(first.layout))], first if second is None else second

    def made(structured: bool) -> Tensor:
        a = features(first, groups, partners=other.samples, structured=structured)
        b = a if second is None else features(second, groups, partners=first.samples, structured=structured)
        total = a.terms[0].left.new_empty(a.samples, a.seeds, b.samples, b.seeds)
        gram(total, a, b, upper=second is None)
        if second is None:
            mirror(total.view(a.samples * a.seeds, -1))
        return total

    try:
        return made(structured=True)
    except DifferentStructure:
        return made(structured=False)
