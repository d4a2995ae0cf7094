"""Σ r² and Σ r_w r_b over samples and seeds: diagonals, and what couples biases to weights, without the rows of all samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from geoad.kernels.layers import Bases, Layer, explicit_rows, layers_of, numbers_of_rows, portions, rows_of_layer
from geoad.kernels.positions import inputs_at, signals_at
from geoad.kernels.rows import Plan, Rows, UseRows, joined
from geoad.kernels.uses import EmbeddingUse, Use
from geoad.params import Blocks

__all__ = ["add_cross", "add_squares", "coupled", "squared", "squares_in_basis"]


def squared(plan: Plan, names: Iterable[str]) -> frozenset[int]:
    """The uses of which the sums below need no more than Σ_k w g²: those of layers at one position, and of other blocks."""
    wanted = tuple(names)
    return plan.once(("squared", wanted), lambda: _squared(plan, wanted))


def _squared(plan: Plan, names: tuple[str, ...]) -> frozenset[int]:
    layers, others = layers_of(plan, names)
    groups = [(_uses_of(plan, layer.names), layer.table) for layer in layers]
    many = [found for found, table in groups if table or len(found) > 1 or _positions(plan.uses[found[0]]) > 1]
    return frozenset(range(len(plan.uses))).difference(*many, _uses_of(plan, others))


def _uses_of(plan: Plan, names: Iterable[str]) -> list[int]:
    return [i for i, use in enumerate(plan.uses) if not {*names}.isdisjoint(use.names)]


def _positions(use: Use) -> int:
    return signals_at(use, torch.empty(1, *use.shape, device="meta")).shape[2]


def add_squares(total: Blocks, rows: Rows, signs: Tensor | None = None) -> None:
    """Add Σ_n Σ_k w_kn r² to the blocks of `total`; w are signs or weights (K, n), by default 1.

    A layer that is used at one position needs one product of matrices, Σ_n (Σ_k g²) ⊗ a²; others go through their rows, a few
    samples at a time (for convolutions that is the cheaper order unless there are fewer positions than seeds; Rochette et al.
    2019). Tables are gone through by their tokens.
    """
    weights = None if signs is None else signs.mT.to(rows.dtype)
    layers, others = layers_of(rows.plan, total)
    for layer in layers:
        for name, squares in _by_block(layer, rows, weights):
            total[name] += squares.reshape(total[name].shape).to(total[name].dtype)
    for name in others:
        total[name] += _squares_of_rows(rows, name, weights).reshape(total[name].shape).to(total[name].dtype)


def _by_block(layer: Layer, rows: Rows, weights: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """Σ w r² for the blocks of a layer."""
    uses = layer.uses(rows)
    if uses and not layer.table and (layer.weight is None or _at_one_position(uses)):
        left = _squared_signals(uses, weights)
        if layer.weight is not None:
            yield layer.weight, layer.arranged(left.mT @ _inputs(uses[0], left.dtype).square())
        if layer.bias is not None:
            yield layer.bias, left.sum(1)
        return
    values = squares_in_basis(layer, rows, weights)  # the bias is the last input
    if layer.weight is None:
        yield layer.names[0], values
        return
    yield layer.weight, layer.arranged(values if layer.bias is None else values[..., :-1])
    if layer.bias is not None:
        yield layer.bias, values[..., -1]


def _squares_of_rows(rows: Rows, name: str, weights: Tensor | None) -> Tensor:
    """Σ w r² of explicit rows, (size,)."""
    uses = rows.of(name)
    if not uses:
        return _summed(rows.others[name].square(), weights)
    portion = portions(uses, 2 * rows.layout[name].numel() * rows.seeds)
    return _total(_summed(joined(name, each).square(), _of(weights, part)) for part, each in portion)


def _of(weights: Tensor | None, part: tuple[slice, slice]) -> Tensor | None:
    return None if weights is None else weights[part]


def _summed(values: Tensor, weights: Tensor | None) -> Tensor:
    """Σ_nk w v of (n, K, ...), flat."""
    flat = values.reshape(values.shape[0] * values.shape[1], -1)
    return flat.sum(0) if weights is None else weights.reshape(-1) @ flat


def _total(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total += part
    return total


# -- layers --------------------------------------------------------------------------------------------------------------------


def squares_in_basis(layer: Layer, rows: Rows, weights: Tensor | None, bases: Bases = (None, None)) -> Tensor:
    """Σ_nk w (U_Lᵀ R U_R)² for the rows R (groups, out, in) of a layer, in bases U_L (G, o, o) and U_R (G, i, i).

    Args:
        layer: the layer.
        rows: the rows of all blocks.
        weights: w (n, K), or None for 1.
        bases: None stands for the identity.
    """
    uses = layer.uses(rows)
    if not uses:
        values = explicit_rows(layer, rows, bases)
        return _summed(values.square(), weights).reshape(values.shape[2:])
    if layer.table:
        return _of_table(layer, rows, weights, bases)
    if layer.weight is None or _at_one_position(uses):
        return _of_outer(layer, uses, weights, bases)
    portion = portions(uses, numbers_of_rows(layer, uses))
    squares = (_summed(rows_of_layer(layer, each, bases).square_(), _of(weights, part)) for part, each in portion)
    groups, _, out = signals_at(uses[0].use, uses[0].like[:1]).shape[1:]
    return _total(squares).reshape(groups, out, -1)


def _at_one_position(uses: list[UseRows]) -> bool:
    """Rows are outer products."""
    return len(uses) == 1 and signals_at(uses[0].use, uses[0].like[:1]).shape[2] == 1


def _of_outer(layer: Layer, uses: list[UseRows], weights: Tensor | None, bases: Bases) -> Tensor:
    """(Σ_k w g²)ᵀ a², one product of matrices for each group: a layer at one position, or a bias alone, whose input is 1."""
    total = _squared_signals(uses, weights, bases[0])
    if layer.weight is None:
        return total.sum(1).unsqueeze(-1)
    right = _inputs(uses[0], total.dtype)
    if layer.bias is not None:
        right = torch.cat([right, torch.ones_like(right[..., :1])], -1)
    right = (right if bases[1] is None else right @ bases[1]).square()
    return total.mT @ right


def _squared_signals(uses: list[UseRows], weights: Tensor | None, basis: Tensor | None = None) -> Tensor:
    """Σ_k w g², (groups, n, out)."""
    if uses[0].squares is not None:
        return signals_at(uses[0].use, uses[0].squares)[:, :, 0].transpose(0, 1)
    total: Tensor | None = None
    for k in range(len(uses[0].back)):
        left = _summed_signals(uses, k)
        left = left if basis is None else left @ basis
        bent = left if weights is None else left * weights[:, k, None]
        total = left * bent if total is None else total.addcmul_(left, bent)
    assert total is not None
    return total


def _inputs(rows: UseRows, dtype: torch.dtype) -> Tensor:
    """What went into a layer at one position, (groups, n, in)."""
    return inputs_at(rows.use, rows.a).to(dtype)[:, :, 0].transpose(0, 1)


def _summed_signals(uses: list[UseRows], k: int) -> Tensor:
    """What came back for seed k, summed over uses and positions: (groups, n, out)."""
    signals = [signals_at(each.use, each.back[k]) for each in uses]
    summed = [each[:, :, 0] if each.shape[2] == 1 else each.sum(2) for each in signals]
    total = summed[0]
    for each in summed[1:]:
        total = total + each
    return total.transpose(0, 1)


def _of_table(layer: Layer, rows: Rows, weights: Tensor | None, bases: Bases) -> Tensor:
    """An embedding: (1, width, count), by the tokens that occur."""
    count, width = layer.part.shape
    uses = layer.uses(rows)
    total = uses[0].back[0].new_zeros(count, width)
    for part, each in portions(uses, rows.seeds * sum(use.back[0][0].numel() for use in uses)):
        tokens, back = _by_token(count, each)
        keys, place = torch.unique(tokens, return_inverse=True)
        sums = back.new_zeros(len(keys), *back.shape[1:]).index_add_(0, place, back)
        sums = (sums if bases[0] is None else sums @ bases[0][0]).square_()
        sums = sums.sum(1) if weights is None else (sums * weights[part][keys // count].unsqueeze(-1)).sum(1)
        total.index_add_(0, keys % count, sums)
    return total.mT.unsqueeze(0)


def _by_token(count: int, uses: list[UseRows]) -> tuple[Tensor, Tensor]:
    """(sample · count + token, what came back (K, width)) for each position that has a gradient."""
    tokens, signals = list[Tensor](), list[Tensor]()
    for each in uses:
        assert isinstance(each.use, EmbeddingUse)
        n, k = each.g.shape[:2]
        places = torch.arange(n, device=each.a.device).reshape(-1, *[1] * (each.a.ndim - 1))
        flat = (each.a + count * places).flatten()
        back = each.g.reshape(n, k, -1, each.g.shape[-1]).transpose(1, 2).flatten(0, 1)
        if each.use.padding is not None:
            kept = each.a.flatten() != each.use.padding
            flat, back = flat[kept], back[kept]
        tokens.append(flat)
        signals.append(back)
    return torch.cat(tokens), torch.cat(signals)


# -- weights with their biases ------------------------------------------------------------------------------------------------


def coupled(plan: Plan, names: list[str]) -> list[Layer]:
    """The layers among `names` with a bias that is always used with their weight: its units have a bias each."""
    return [layer for layer in layers_of(plan, names)[0] if layer.weight is not None and layer.bias is not None]


def add_cross(total: Tensor, layer: Layer, rows: Rows, signs: Tensor | None = None) -> None:
    """Add Σ_nk w r_w r_b for each weight and the bias of its unit to `total`, which has the shape of the weight.

    Args:
        total: what is added to.
        layer: one of `coupled`.
        rows: the rows of all blocks.
        signs: w (K, n), by default 1.
    """
    assert layer.bias is not None
    weights, uses = None if signs is None else signs.mT.to(rows.dtype), layer.uses(rows)

    def products() -> Iterator[Tensor]:
        if not uses:
            found = explicit_rows(layer, rows)
            yield _summed(found[..., :-1] * found[..., -1:], weights)
            return
        if _at_one_position(uses):  # g a times g 1
            left = _squared_signals(uses, weights)
            yield left.mT @ _inputs(uses[0], left.dtype)
            return
        for part, each in portions(uses, 2 * numbers_of_rows(layer, uses)):
            found = rows_of_layer(layer, each)
            yield _summed(found[..., :-1] * found[..., -1:], _of(weights, part))

    total += layer.arranged(_total(products())).reshape(total.shape).to(total.dtype)
