"""Operators that act on groups of blocks one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.operators.algebra import (
    DENSE_LIMIT,
    added,
    composed,
    has_matrix,
    plus,
    require_small,
    scaled,
    times,
    to_dense,
    transpose,
    transposed,
)
from geoad.operators.algebra import compose as compose_operators
from geoad.operators.base import Dense, Diagonal, LinearOperator, Multiple
from geoad.operators.determinant import slogdet
from geoad.operators.eigen import eigenpairs, eigh, eigvals, order, spectrum, trace, traced
from geoad.operators.inner import diagonal, inner, inner_product
from geoad.operators.numbers import READERS, from_state
from geoad.operators.power import power, powered
from geoad.operators.sample import factor_product
from geoad.operators.solve import densify, inverse, inverted, solved
from geoad.params import Blocks, Layout

__all__ = ["BlockDiagonal", "restricted"]

Group = tuple[str, ...]


class BlockDiagonal(LinearOperator):
    """An operator of any class on each group of blocks; the groups partition the layout.

    Args:
        layout: names and shapes of the blocks.
        parts: group of names -> operator on ``layout.restrict(group)``. Different classes in different groups are a mix of
            representations in one object.

    All operations distribute over the parts.

    >>> import torch
    >>> layout = Layout({"w": (2,), "b": (1,)})
    >>> parts = {
    ...     ("w",): Dense(layout.restrict(["w"]), torch.ones(2, 2)),
    ...     ("b",): Multiple(layout.restrict(["b"]), torch.tensor(3.0)),
    ... }
    >>> BlockDiagonal(layout, parts).mv({"w": torch.ones(2), "b": torch.ones(1)})
    {'w': tensor([2., 2.]), 'b': tensor([3.])}
    """

    made_of = ("parts",)
    structured = True

    def __init__(self, layout: Layout, parts: Mapping[Group, LinearOperator]) -> None:
        names = [name for group in parts for name in group]
        if sorted(names) != sorted(layout.names):
            missing = [name for name in layout.names if name not in names]
            raise GeometryError(
                f"the groups {list(parts)} of a BlockDiagonal operator do not partition the blocks {list(layout.names)}: "
                f"missing {missing or 'none'}, unknown or twice "
                f"{[name for name in names if name not in layout or names.count(name) > 1] or 'none'}. Name every block once."
            )
        for group, part in parts.items():
            if part.layout != layout.restrict(group):
                raise GeometryError(
                    f"the part of the blocks {list(group)} is an operator on {part.layout}, but these blocks are "
                    f"{layout.restrict(group)}. Make it on layout.restrict(names)."
                )
        self.layout = layout
        self.parts = dict(parts)
        self.symmetric = all(part.symmetric for part in parts.values())
        self.definite = all(part.definite for part in parts.values())

    @property
    def materialised(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All parts are."""
        return all(part.materialised for part in self.parts.values())

    @property
    def like(self) -> Tensor:
        return next(iter(self.parts.values())).like

    def each(self, fn: Callable[[LinearOperator, Blocks], Blocks], v: Blocks) -> Blocks:
        """`fn` of every part and its own blocks."""
        found: Blocks = {}
        for part in self.parts.values():
            found.update(fn(part, {name: v[name] for name in part.layout.names}))
        return {name: found[name] for name in self.layout.names}

    def with_parts(self, fn: Callable[[LinearOperator], LinearOperator]) -> BlockDiagonal:
        """`fn` of every part."""
        return BlockDiagonal(self.layout, {group: fn(part) for group, part in self.parts.items()})

    def mv(self, v: Blocks) -> Blocks:
        return self.each(lambda part, blocks: part.mv(blocks), v)

    def rmv(self, w: Blocks) -> Blocks:
        return self.each(lambda part, blocks: part.rmv(blocks), w)

    def __repr__(self) -> str:
        classes = sorted({type(part).__name__ for part in self.parts.values()})
        return f"{super().__repr__()[:-1]}, {len(self.parts)} parts: {', '.join(classes)})"


def restricted(operator: Multiple | Diagonal, layout: Layout) -> Multiple | Diagonal:
    """A diagonal matrix on some of its blocks."""
    if isinstance(operator, Multiple):
        return Multiple(layout, operator.factor, definite=operator.definite)
    return Diagonal(layout, {name: operator.entries[name] for name in layout.names}, definite=operator.definite)


def _groups(operator: BlockDiagonal) -> dict[frozenset[str], Group]:
    return {frozenset(group): group for group in operator.parts}


def _paired(
    a: BlockDiagonal, b: LinearOperator, fn: Callable[[LinearOperator, LinearOperator], LinearOperator]
) -> BlockDiagonal | None:
    """`fn` of the parts of a and those of b on the same groups, None if b is not of that partition."""
    if isinstance(b, (Multiple, Diagonal)):
        diagonal = b
        return a.with_parts(lambda part: fn(part, restricted(diagonal, part.layout)))
    if isinstance(b, BlockDiagonal) and _groups(a).keys() == _groups(b).keys():
        others = _groups(b)
        return BlockDiagonal(a.layout, {group: fn(part, b.parts[others[frozenset(group)]]) for group, part in a.parts.items()})
    return None


@added.register
def _(a: BlockDiagonal, b: LinearOperator, definite: bool) -> LinearOperator | None:
    paired = _paired(a, b, lambda x, y: plus(x, y, definite=definite))
    if paired is not None or not isinstance(b, BlockDiagonal):
        return paired
    parts: dict[Group, LinearOperator] = {}
    for group in _joined(a, b):
        x, y = (_within(operator, group) for operator in (a, b))
        layout = a.layout.restrict(group)
        if isinstance(x, BlockDiagonal) or isinstance(y, BlockDiagonal):
            if layout.dim > DENSE_LIMIT and not (has_matrix(x) or has_matrix(y)):
                return None
            matrix, symmetric = to_dense(x) + to_dense(y), x.symmetric and y.symmetric
            parts[group] = Dense(layout, matrix, symmetric=symmetric, definite=definite)
        else:
            parts[group] = plus(x, y, definite=definite)
    return BlockDiagonal(a.layout, parts)


def _joined(a: BlockDiagonal, b: BlockDiagonal) -> list[Group]:
    """The finest partition that both respect."""
    groups: list[set[str]] = []
    for each in (*a.parts, *b.parts):
        new = set(each)
        apart = [group for group in groups if not group & new]
        groups = [*apart, new.union(*(group for group in groups if group & new))]
    joined = [tuple(name for name in a.layout.names if name in group) for group in groups]
    return sorted(joined, key=lambda group: a.layout.names.index(group[0]))


def _within(operator: BlockDiagonal, group: Group) -> LinearOperator:
    """The operator on the union of some of its groups."""
    parts = {names: part for names, part in operator.parts.items() if set(names) <= set(group)}
    return next(iter(parts.values())) if len(parts) == 1 else BlockDiagonal(operator.layout.restrict(group), parts)


@scaled.register
def _(operator: BlockDiagonal, factor: float | Tensor, definite: bool) -> LinearOperator:
    return operator.with_parts(lambda part: times(factor, part, positive=definite))


@transposed.register
def _(operator: BlockDiagonal) -> LinearOperator:
    return operator.with_parts(transpose)


@composed.register
def _(a: BlockDiagonal, b: LinearOperator) -> LinearOperator | None:
    return _paired(a, b, compose_operators)


@solved.register
def _(operator: BlockDiagonal, b: Blocks, positive: bool) -> Blocks:
    return operator.each(lambda part, blocks: solved(part, blocks, positive), b)


@inverted.register
def _(operator: BlockDiagonal, positive: bool) -> LinearOperator:
    return operator.with_parts(lambda part: inverse(part, positive=positive))


@powered.register
def _(operator: BlockDiagonal, p: float) -> LinearOperator:
    return operator.with_parts(lambda part: power(part, p))


@factor_product.register
def _(operator: BlockDiagonal, z: Blocks, invert: bool) -> Blocks:
    return operator.each(lambda part, blocks: factor_product(part, blocks, invert), z)


@slogdet.register
def _(operator: BlockDiagonal) -> tuple[Tensor, Tensor]:
    sign = log = None
    for part in operator.parts.values():
        own, size = slogdet(part)
        sign, log = (own, size) if sign is None or log is None else (sign * own, log + size)
    assert sign is not None and log is not None
    return sign, log


@traced.register
def _(operator: BlockDiagonal) -> Tensor:
    return sum((trace(part) for part in operator.parts.values()), operator.like.new_zeros(()))


@diagonal.register
def _(operator: BlockDiagonal) -> Blocks:
    found: Blocks = {}
    for part in operator.parts.values():
        found.update(diagonal(part))
    return {name: found[name] for name in operator.layout.names}


@inner_product.register
def _(a: BlockDiagonal, b: LinearOperator) -> Tensor | None:
    if not isinstance(b, BlockDiagonal):
        return None
    total = a.like.new_zeros(())
    for group in _joined(a, b):
        x, y = (_within(operator, group) for operator in (a, b))
        if isinstance(x, BlockDiagonal) or isinstance(y, BlockDiagonal):
            require_small(x, "the inner product of two operators of different partitions")
            x, y = densify(x), densify(y)
        total = total + inner(x, y)
    return total


@spectrum.register
def _(operator: BlockDiagonal) -> Tensor | None:
    found: list[Tensor] = []
    for part in operator.parts.values():
        if spectrum(part) is None and part.dim > DENSE_LIMIT and not has_matrix(part):
            return None
        values = eigvals(part)
        found.append(values)
    batch = torch.broadcast_shapes(*(values.shape[:-1] for values in found))
    return torch.cat([values.expand(*batch, values.shape[-1]) for values in found], -1)


@eigenpairs.register
def _(b: BlockDiagonal, g: LinearOperator | None, k: int | None, which: str) -> tuple[Tensor, Tensor] | None:
    metric = None if g is None else _paired(b, g, lambda _, each: each)
    if g is not None and metric is None:
        return None
    if k is None:
        require_small(b, "all eigenvectors")
    values: list[Tensor] = []
    columns: list[Tensor] = []
    for group, part in b.parts.items():
        if part.dim == 0:
            continue
        own = None if metric is None else metric.parts[group]
        found, vectors = eigh(part, own, None if k is None else min(k, part.dim), which)
        if found.ndim > 1:
            return None
        blocks = part.layout.unravel(vectors.mT)
        empty = {name: vectors.new_zeros((len(found), *shape)) for name, shape in b.layout.items()}
        columns.append(b.layout.ravel({**empty, **blocks}))
        values.append(found)
    every = torch.cat(values)
    index = order(every, which)[: b.dim if k is None else k]
    return every[index], torch.cat(columns)[index].mT


@has_matrix.register
def _(operator: BlockDiagonal) -> bool:
    return len(operator.parts) == 1 and all(has_matrix(part) for part in operator.parts.values())


@to_dense.register
def _(operator: BlockDiagonal) -> Tensor:
    layout, slices = operator.layout, operator.layout.offsets()
    found = {group: to_dense(part) for group, part in operator.parts.items()}
    batch = torch.broadcast_shapes(*(matrix.shape[:-2] for matrix in found.values()))
    matrix = operator.like.new_zeros((*batch, layout.dim, layout.dim))
    for group, part in operator.parts.items():
        places = [torch.arange(slices[name].start, slices[name].stop, device=matrix.device) for name in part.layout.names]
        where = torch.cat(places)
        matrix[..., where.unsqueeze(-1), where] = found[group].to(matrix.dtype)  # autocast gives some of them its own
    return matrix


def _read(state: dict[str, Any], layout: Layout) -> dict[str, Any]:
    return {"parts": {tuple(names): from_state(part, layout.restrict(names)) for names, part in state["parts"]}}


READERS["blockdiagonal"] = (BlockDiagonal, _read)
