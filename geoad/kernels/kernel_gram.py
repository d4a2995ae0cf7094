"""Gram matrices K = R₁ G⁻¹ R₂ᵀ of the rows of samples, from what went in and what came back of every layer.

`features` brings rows into the form in which inner products are cheap, `gram` multiplies two sets of them; `gram_of_rows` is
both for rows of any seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geoad.kernels.kernel_terms import Explicit, Outer, Positions, Term, Weighted, add_equal_products, add_products, agreed
from geoad.kernels.layers import Layer, layers_of, rows_of_layer
from geoad.kernels.positions import inputs_at, signals_at
from geoad.kernels.rows import Rows
from geoad.kernels.uses import EmbeddingUse
from geoad.params import Blocks

__all__ = [
    "CONTRACTIONS",
    "DifferentStructure",
    "Features",
    "Group",
    "LayerRoot",
    "features",
    "gram",
    "gram_of_rows",
    "mirror",
    "squared_norms",
    "turned_by",
]

CONTRACTIONS = ("none", "trace", "diagonal")
"""All pairs of outputs; summed over equal outputs; equal outputs only."""


@dataclass(frozen=True)
class LayerRoot:
    """V ↦ w ∘ (U_Lᵀ V U_R) on a layer as (groups, out, in), the bias last: A with AᵀA = G⁻¹.

    Attributes:
        left, right: U_L (groups, out, out) and U_R (groups, in, in); a diagonal one is a column (groups, size, 1); None for the
            identity.
        weights: w (groups, out, in), or None for 1.
        transposed: the weight is stored with its inputs first.
        groups: the groups of channels.
    """

    left: Tensor | None
    right: Tensor | None
    weights: Tensor | None
    transposed: bool = False
    groups: int = 1


@dataclass(frozen=True)
class Group:
    """Blocks whose rows are multiplied with the inverse of a metric of their own.

    With a root A, AᵀA = G⁻¹, the rows on both sides are r Aᵀ: one set of features for both. Without, one side is solved for.

    Attributes:
        names: the blocks.
        scale: the inverse is this number.
        move: the rows (batch, ...) of the blocks as those of other coordinates, or None.
        solve: G⁻¹ of such rows, where there is no root.
        root: A of such rows.
        layer: A, if it has structure on the layer of these blocks. `root` takes its place where the rows have none.
        entries: the diagonal of A, if it is diagonal.
    """

    names: tuple[str, ...]
    scale: Tensor | None = None
    move: Callable[[Blocks], Blocks] | None = None
    solve: Callable[[Blocks], Blocks] | None = None
    root: Callable[[Blocks], Blocks] | None = None
    layer: LayerRoot | None = None
    entries: Blocks | None = None

    @property
    def explicit(self) -> bool:
        """Rows are multiplied out, whatever their structure."""
        general = self.move is not None or self.solve is not None or self.root is not None
        return general and self.layer is None and self.entries is None

    @property
    def weighted(self) -> bool:
        """The root has weights: inner products of outer products are no products of inner products."""
        return self.entries is not None or (self.layer is not None and self.layer.weights is not None)


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

    def part(self, samples: slice) -> Features:
        """Those of some samples."""
        return Features([term.part(samples) for term in self.terms], len(range(*samples.indices(self.samples))), self.seeds)


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
        dual: multiply with the inverse metrics that have no root: one of two sides of an inner product has them.
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
    if isinstance(term, Weighted):
        return term.explicit() if term.prefers_explicit() else term
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
    if not structured or group.explicit:
        terms: list[Term] = [_solved(rows, group, dual)]
    else:
        layers, rest = layers_of(rows.plan, group.names)
        if group.layer is not None and not _is_layer(layers, rest, group):
            return [_solved(rows, group, dual)]
        terms = [_of_layer(layer, rows, _root_of(layer, rows, group)) for layer in layers]
        terms += [_solved(rows, _restricted(group, name), dual) for name in rest]
    return terms if group.scale is None else [term.scaled(group.scale.sqrt().to(term.left.dtype)) for term in terms]


def _is_layer(layers: Sequence[Layer], rest: Sequence[str], group: Group) -> bool:
    """The blocks form the layer on which the root has structure."""
    if rest or len(layers) != 1 or group.layer is None or layers[0].names != group.names:
        return False
    return (layers[0].transposed, layers[0].groups) == (group.layer.transposed, group.layer.groups)


def _root_of(layer: Layer, rows: Rows, group: Group) -> LayerRoot | None:
    if group.entries is None:
        return group.layer
    names, values = layer.names, group.entries
    weights = layer.part.take(values[names[0]].flatten())
    if layer.weight is None:
        weights = weights.reshape(layer.groups, -1, 1)
    elif layer.table:
        weights = weights.mT.unsqueeze(0)
    else:
        weights = (weights.unsqueeze(0) if len(layer.part.shape) == 2 else weights).flatten(2)
    if layer.weight is not None and layer.bias is not None:
        weights = torch.cat([weights, values[layer.bias].reshape(*weights.shape[:2], 1)], -1)
    return LayerRoot(None, None, weights.to(rows.dtype), layer.transposed, layer.groups)


def _restricted(group: Group, name: str) -> Group:
    """The group for one of the blocks of a diagonal metric, or none at all."""
    entries = group.entries
    if entries is None:
        return Group((name,))
    return Group((name,), root=lambda blocks: {name: blocks[name] * entries[name].to(blocks[name].dtype)})


def _solved(rows: Rows, group: Group, dual: bool) -> Explicit:
    """Explicit rows, in other coordinates, times a root or an inverse."""
    count = rows.samples * rows.seeds
    blocks = {name: rows.explicit(name).reshape(count, *rows.layout[name]) for name in group.names}
    if group.move is not None:
        blocks = group.move(blocks)
    if group.root is not None:
        blocks = group.root(blocks)
    elif dual and group.solve is not None:
        blocks = group.solve(blocks)
    flat = [block.reshape(rows.samples, rows.seeds, -1) for block in blocks.values()]
    return Explicit(group.names, flat[0] if len(flat) == 1 else torch.cat(flat, -1))


def _of_layer(layer: Layer, rows: Rows, root: LayerRoot | None) -> Term:
    uses, root = layer.uses(rows), root or _PLAIN
    if layer.groups > 1 and layer.weight is not None:
        bases = tuple(None if each is None else each.to(rows.dtype) for each in (root.left, root.right))
        return Explicit(layer.names, _times(rows_of_layer(layer, uses, (bases[0], bases[1])), root.weights).flatten(2))
    left = _side_by_side([signals_at(each.use, each.g) for each in uses], 3)  # (n, K, groups, t, o): uses are positions as well
    left = turned_by(left, root.left)
    if layer.weight is None:
        summed = turned_by(left.sum(3).unsqueeze(-1), root.right)
        return Explicit(layer.names, _times(summed, root.weights).flatten(2))
    left = left[:, :, 0]
    if layer.table:
        return _of_tokens(layer, rows, left, root)
    right = _side_by_side([inputs_at(each.use, each.a).to(rows.dtype) for each in uses], 2)[:, 0]
    if layer.bias is not None:
        right = torch.cat([right, torch.ones_like(right[..., :1])], -1)
    right = turned_by(right, None if root.right is None else root.right[0])
    if left.shape[2] > 1:
        term = Positions(layer.names, left, right)
        return term if root.weights is None else _weighted_rows(term, root.weights[0])
    if root.weights is None:
        return Outer(layer.names, left[:, :, 0], right[:, 0])
    return Weighted(layer.names, left, right[:, 0], root.weights[0].to(rows.dtype))


_PLAIN = LayerRoot(None, None, None)


def _weighted_rows(term: Positions, weights: Tensor) -> Explicit:
    rows = term.explicit().left
    return Explicit(term.names, rows.mul_(weights.flatten().to(rows.dtype)))


def _side_by_side(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def turned_by(numbers: Tensor, basis: Tensor | None) -> Tensor:
    """In a basis, from the right; a diagonal one is a column."""
    if basis is None:
        return numbers
    basis = basis.to(numbers.dtype)
    return numbers * basis.mT if basis.shape[-1] == 1 else numbers @ basis


def _times(rows: Tensor, weights: Tensor | None) -> Tensor:
    return rows if weights is None else rows * weights.to(rows.dtype)


def _of_tokens(layer: Layer, rows: Rows, left: Tensor, root: LayerRoot) -> Positions:
    """Inputs that are unit vectors: what is diagonal for them goes to the other side."""
    tokens: list[Tensor] = []
    for each in layer.uses(rows):
        assert isinstance(each.use, EmbeddingUse)
        a = each.a.reshape(rows.samples, -1)
        tokens.append(a if each.use.padding is None else torch.where(a == each.use.padding, -1, a))
    joined = torch.cat(tokens, 1)
    for factor in (root.right, root.weights):
        if factor is not None:  # (1, tokens, 1) or (1, out, tokens)
            table = factor[0] if factor is root.right else factor[0].mT
            left = left * table[joined.clamp_min(0)].unsqueeze(1).to(left.dtype)
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
        found = _own_products(x, y)
        total = found if total is None else total + found
    assert total is not None
    return total


def _own_products(x: Term, y: Term) -> Tensor:
    if isinstance(x, Positions) and isinstance(y, Positions):
        return x.squared_norms(y)
    if isinstance(x, Weighted) or isinstance(y, Weighted):
        x, y = x.explicit(), y.explicit()
    found = (x.left * y.left).sum(-1)
    if isinstance(x, Outer) and isinstance(y, Outer):
        found *= (x.right * y.right).sum(-1, keepdim=True)
    return found


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
