"""Σ r rᵀ over samples and seeds as dense matrices, of all blocks or of groups of them: seeds are contracted before samples are.

For two layers with rows left ⊗ right, with S_n[o, p] = Σ_k left[n, k, o] left'[n, k, p], the block is
Σ_n S_n ⊗ (right_n right'_nᵀ), one product of matrices (o p × N)(N × i j). That costs 2·N·d² operations; to multiply the rows
out costs K times as many, and N·K·d numbers of memory. Where both layers are the same, both factors are symmetric, and a
quarter of that is left. A bias is one more column of its weight there. All other blocks of a group are one matrix of explicit
rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geoad.kernels.positions import Factored, is_outer
from geoad.kernels.rows import Rows
from geoad.params import Layout

__all__ = ["GramSum"]

_ROOM = 1 << 26
"""Bytes of intermediate products that are worth having at once."""


@dataclass(frozen=True)
class _Outer:
    """A layer with rows left ⊗ (right, 1): the names of weight and bias, the sizes, and whether the transposed is stored."""

    names: tuple[str, ...]
    out: int
    inside: int
    flipped: bool

    @property
    def columns(self) -> int:
        return self.inside + len(self.names) - 1


@dataclass(frozen=True)
class _Plain:
    """Blocks whose rows are explicit, side by side."""

    names: tuple[str, ...]


_Unit = _Outer | _Plain
_Key = tuple[_Unit, _Unit]


class GramSum:
    """Σ_n Σ_k r rᵀ over chunks, one matrix for each group of blocks.

    Args:
        layout: the blocks.
        groups: disjoint groups of names, each with a matrix of its own. Default: one group of all.
    """

    def __init__(self, layout: Layout, groups: Sequence[Sequence[str]] | None = None) -> None:
        self.layout = layout
        self.groups = [layout.restrict(names) for names in groups] if groups is not None else [layout]
        self._sums: list[dict[_Key, Tensor]] = [{} for _ in self.groups]

    def add(self, rows: Rows, signs: Tensor | None = None) -> None:
        """Add the rows of a chunk, with signs (or weights) (K, n)."""
        weights = None if signs is None else signs.mT
        for group, sums in zip(self.groups, self._sums, strict=True):
            units = _units(rows, group)
            for i, (a, left, x) in enumerate(units):
                bent = left if weights is None else left * weights.to(left.dtype).unsqueeze(-1)
                for b, right, y in units[i:]:
                    _accumulate(sums, (a, b), (bent, left, right), (x, y))

    def numbers_of_a_sample(self, rows: Rows) -> int:
        """How many numbers `add` makes of each sample: explicit rows, and once more side by side."""
        plain = [name for name in self.layout if len(rows.of(name)) != 1 or not is_outer(rows.of(name)[0].use)]
        sizes = [sum(self.layout[name].numel() for name in plain if name in group) for group in self.groups]
        return 2 * rows.seeds * max(sizes, default=0)

    def state(self) -> dict[str, Tensor]:
        """The sums so far; they add up over disjoint data."""
        return {_name(i, key): value for i, sums in enumerate(self._sums) for key, value in sums.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from other sums."""
        self._sums = [{} for _ in self.groups]
        for name, value in state.items():
            i, key = _named(name)
            self._sums[i][key] = value

    def matrices(self) -> list[Tensor]:
        """The matrix of each group, its blocks raveled in the order of the layout; the sums are used up."""
        return [_assembled(group, sums) for group, sums in zip(self.groups, self._sums, strict=True)]

    def matrix(self) -> Tensor:
        """The only matrix."""
        (result,) = self.matrices()
        return result


def _name(group: int, key: _Key) -> str:
    return json.dumps([group, *([type(unit) is _Outer, *vars(unit).values()] for unit in key)])


def _named(name: str) -> tuple[int, _Key]:
    group, *key = json.loads(name)
    a, b = (_Outer(tuple(names), *sizes) if outer else _Plain(tuple(names)) for outer, names, *sizes in key)
    return group, (a, b)


def _units(rows: Rows, group: Layout) -> list[tuple[_Unit, Tensor, Tensor | None]]:
    """(unit, left (n, K, o), right (n, i)) for layers; (unit, rows (n, K, size), None) for the rest."""
    found, plain = list[tuple[_Unit, Tensor, Tensor | None]](), dict[str, Tensor]()
    biases = _biases(rows, group)
    for name in group:
        if name in biases.values():
            continue
        block, bias = rows.block(name), biases.get(name)
        if not isinstance(block, Factored):
            plain[name] = block
            continue
        if bias is None and block.right.shape[-1] == 1:
            plain[name] = block.dense()
            continue
        right = block.right
        if bias is not None:
            right = torch.cat([right, torch.ones_like(right[:, :1])], 1)
        names = (name,) if bias is None else (name, bias)
        found.append((_Outer(names, block.left.shape[-1], block.right.shape[-1], block.flipped), block.left, right))
    if plain:
        joined = next(iter(plain.values())) if len(plain) == 1 else torch.cat(list(plain.values()), -1)
        found.append((_Plain(tuple(plain)), joined, None))
    return found


def _biases(rows: Rows, group: Layout) -> dict[str, str]:
    """weight -> bias, where both are used together, once, at one position."""
    found: dict[str, str] = {}
    for each in rows.uses:
        weight, bias = each.use.weight, each.use.bias
        if weight is None or bias is None or weight.name not in group or bias.name not in group:
            continue
        alone = len(rows.of(weight.name)) == len(rows.of(bias.name)) == 1
        if alone and weight.name != bias.name and bias.whole and is_outer(each.use):
            found[weight.name] = bias.name
    return found


# -- sums --------------------------------------------------------------------------------------------------------------------


def _accumulate(
    sums: dict[_Key, Tensor],
    key: _Key,
    lefts: tuple[Tensor, Tensor, Tensor],
    sides: tuple[Tensor | None, Tensor | None],
) -> None:
    """Add Σ_n of one pair of units."""
    a, b = key
    bent, left, right = lefts
    x, y = sides
    if isinstance(a, _Plain) and isinstance(b, _Plain):
        first, second = bent.flatten(0, 1), right.flatten(0, 1)
        total = sums.get(key)
        if total is None:
            total = sums[key] = first.new_zeros(first.shape[1], second.shape[1])
        _add_upper(total, first, second)
        return
    for part in _slices(key, left, right):
        p, q = _pair(key, bent[part], right[part], None if x is None else x[part], None if y is None else y[part])
        if key in sums:
            sums[key].addmm_(p.mT, q)
        else:
            sums[key] = p.mT @ q


def _add_upper(total: Tensor, first: Tensor, second: Tensor) -> None:
    """total += firstᵀ second on and above the diagonal (and some below): the sum is symmetric."""
    size = total.shape[0]
    step = _strip(size)
    for start in range(0, size, step):
        stop = min(start + step, size)
        total[start:stop, start:].addmm_(first[:, start:stop].mT, second[:, start:])


def _strip(size: int) -> int:
    """Rows that are computed together: an eighth, which leaves 9/16 of the operations."""
    return max(128, -(-size // 8))


def _slices(key: _Key, left: Tensor, right: Tensor) -> Iterator[slice]:
    """Samples that may be taken together."""
    a, b = key
    n = left.shape[0]
    assert isinstance(a, _Outer)
    each = a.out * b.out + a.columns * b.columns if isinstance(b, _Outer) else a.out * right.shape[-1]
    step = max(64, _ROOM // (each * left.element_size() + 1))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _pair(key: _Key, bent: Tensor, right: Tensor, x: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Matrices (n, r) and (n, s) whose product over n is the block of the two units."""
    assert x is not None
    if y is None:
        return (bent.mT @ right).flatten(1), x
    seeds = bent.mT @ right
    if key[0] == key[1]:
        first, second = _above(x.shape[-1], x.device)
        return _packed(seeds), x.index_select(1, first) * x.index_select(1, second)
    return seeds.flatten(1), (x.unsqueeze(-1) * y.unsqueeze(-2)).flatten(1)


def _above(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries on and above the diagonal."""
    rows, columns = torch.triu_indices(size, size, device=device)
    return rows, columns


def _packed(symmetric: Tensor) -> Tensor:
    size = symmetric.shape[-1]
    rows, columns = _above(size, symmetric.device)
    return symmetric.flatten(1).index_select(1, rows * size + columns)


def _places(size: int, device: torch.device) -> Tensor:
    """Where each entry of a symmetric (size, size) matrix lies among the packed ones."""
    rows, columns = _above(size, device)
    places = torch.empty(size, size, dtype=torch.long, device=device)
    places[rows, columns] = places[columns, rows] = torch.arange(len(rows), device=device)
    return places


# -- assembly ----------------------------------------------------------------------------------------------------------------


def _assembled(group: Layout, sums: dict[_Key, Tensor]) -> Tensor:
    """The matrix of a group; chunks with different structure are added up."""
    once = len(sums) == 1 or _complete(sums)
    (a, b), like = next(iter(sums.items()))
    if once and a == b == _Plain(group.names):
        return _mirrored(sums.pop((a, b)))
    total = like.new_empty(group.dim, group.dim) if once else like.new_zeros(group.dim, group.dim)
    write = Tensor.copy_ if once else Tensor.add_
    places = group.offsets()
    while sums:
        (a, b), value = sums.popitem()
        for rows, columns, target, block in _blocks(total, places, a, b, value):
            write(target, block)
            if a != b:
                write(_view(total, places, columns, rows), block.permute(*range(rows.axes, block.ndim), *range(rows.axes)))
    return total


def _complete(sums: dict[_Key, Tensor]) -> bool:
    """All chunks had the same structure: each block has one unit."""
    units = {unit for pair in sums for unit in pair}
    names = [name for unit in units for name in unit.names]
    return len(names) == len(set(names))


def _mirrored(upper: Tensor) -> Tensor:
    """Write what lies above the diagonal below it."""
    size = upper.shape[0]
    step = _strip(size)
    for start in range(0, size, step):
        stop = min(start + step, size)
        upper[stop:, start:stop] = upper[start:stop, stop:].mT
        square = upper[start:stop, start:stop]
        square.copy_(square.add(square.mT).mul_(0.5))
    return upper


@dataclass(frozen=True)
class _Side:
    """Rows or columns of a matrix that belong to one block, in the shape (out, columns) or flat; `part` of their unit."""

    name: str
    part: slice
    shape: tuple[int, int] | None = None
    flipped: bool = False

    @property
    def axes(self) -> int:
        return 1 if self.shape is None else 2


def _sides(unit: _Unit, places: dict[str, slice]) -> list[_Side]:
    """Where the columns of a unit belong."""
    if isinstance(unit, _Outer):
        weight = _Side(unit.names[0], slice(0, unit.inside), (unit.out, unit.inside), unit.flipped)
        return [weight, *(_Side(name, slice(unit.inside, None), (unit.out, 1)) for name in unit.names[1:])]
    found, start = list[_Side](), 0
    for name in unit.names:
        stop = start + places[name].stop - places[name].start
        found.append(_Side(name, slice(start, stop)))
        start = stop
    return found


def _view(total: Tensor, places: dict[str, slice], rows: _Side, columns: _Side) -> Tensor:
    """The block of `total`, with the axes of both sides."""
    block = total[places[rows.name], places[columns.name]]
    for axis, side in ((1, columns), (0, rows)):
        if side.shape is not None:
            block = block.unflatten(axis, side.shape[::-1] if side.flipped else side.shape)
            block = block.transpose(axis, axis + 1) if side.flipped else block
    return block


def _blocks(
    total: Tensor, places: dict[str, slice], a: _Unit, b: _Unit, value: Tensor
) -> Iterator[tuple[_Side, _Side, Tensor, Tensor]]:
    """(rows, columns, where to write, what to write) of the sum of one pair of units."""
    if isinstance(a, _Outer) and a == b:
        yield from _unpacked(total, places, a, value)
        return
    if isinstance(a, _Plain):
        value = _mirrored(value)
    elif isinstance(b, _Outer):
        value = value.reshape(a.out, b.out, a.columns, b.columns).permute(0, 2, 1, 3)
    else:
        value = value.reshape(a.out, -1, a.columns).mT
    for rows in _sides(a, places):
        for columns in _sides(b, places):
            block = value[:, rows.part] if isinstance(a, _Outer) else value[rows.part]
            yield rows, columns, _view(total, places, rows, columns), block[..., columns.part]


def _unpacked(
    total: Tensor, places: dict[str, slice], a: _Outer, value: Tensor
) -> Iterator[tuple[_Side, _Side, Tensor, Tensor]]:
    """The sum of a layer with itself, one output at a time: without another copy of the whole."""
    outer, inner = _places(a.out, value.device), _places(a.columns, value.device).flatten()
    for row, chosen in enumerate(outer):
        part = value.index_select(0, chosen).index_select(1, inner).reshape(a.out, a.columns, a.columns)
        for rows in _sides(a, places):
            for columns in _sides(a, places):
                target = _view(total, places, rows, columns)[row]
                yield rows, columns, target, part[:, rows.part, columns.part].transpose(0, 1)
