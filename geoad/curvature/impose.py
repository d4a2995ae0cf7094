"""Structure imposed on a matrix that is known by its products."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.curvature.representations import (
    KFAC,
    BlockDiagonal,
    Dense,
    Diagonal,
    Implicit,
    LowRank,
    Mixed,
    QuasiDiagonal,
    Representation,
    chosen,
    grouped,
    numbered,
)
from geoad.errors import GeometryError, StructureNotPreservedError
from geoad.kernels.products import mapped
from geoad.operators import LinearOperator
from geoad.params import Blocks, Layout

__all__ = ["impose"]

_COLUMNS = 16


@singledispatch
def impose(representation: Representation, op: LinearOperator) -> LinearOperator:
    """The operator `op` (symmetric) in a representation; blocks and diagonals come from its products with unit vectors."""
    raise StructureNotPreservedError(
        f"{representation} was asked of a matrix that is known by its products only: such a structure is made from the layers "
        "of a network. Available here: dense, implicit, diagonal, block_diagonal, low_rank with a rank; for the others use "
        "geoad.curvature.Fisher or GGN."
    )


@impose.register
def _(representation: Implicit, op: LinearOperator) -> LinearOperator:
    return op


@impose.register
def _(representation: Dense, op: LinearOperator) -> LinearOperator:
    return ops.densify(op)


@impose.register
def _(representation: Diagonal, op: LinearOperator) -> LinearOperator:
    entries: Blocks = {}
    for name, shape in op.layout.items():
        entries[name] = _block(op, (name,)).diagonal().reshape(shape)
    return ops.Diagonal(op.layout, entries)


@impose.register
def _(representation: BlockDiagonal, op: LinearOperator) -> LinearOperator:
    return _in_groups([(names, Dense()) for names in grouped(representation, op.layout)], op)


@impose.register
def _(representation: Mixed, op: LinearOperator) -> LinearOperator:
    groups = [(names, thing[1]) for names, thing in chosen(numbered(representation), op.layout)]
    return _in_groups(groups, op)


@impose.register
def _(representation: LowRank, op: LinearOperator) -> LinearOperator:
    if representation.rank is None:
        raise GeometryError(
            "a low-rank representation of a matrix that is known by its products needs the rank, found none: "
            "representation=geoad.curvature.LowRank(rank=k) keeps the k eigenvalues of largest magnitude."
        )
    values, vectors = ops.eigh(op, None, min(representation.rank, op.dim), "magnitude")
    factors = op.layout.unravel((vectors * values.abs().sqrt()).mT.contiguous())
    return ops.LowRank(op.layout, factors, signs=values.sign())


@impose.register
def _(representation: QuasiDiagonal, op: LinearOperator) -> LinearOperator:
    return impose.dispatch(Representation)(representation, op)


@impose.register
def _(representation: KFAC, op: LinearOperator) -> LinearOperator:
    return impose.dispatch(Representation)(representation, op)


def _in_groups(groups: list[tuple[tuple[str, ...], Representation]], op: LinearOperator) -> LinearOperator:
    parts: dict[tuple[str, ...], LinearOperator] = {}
    for names, representation in groups:
        layout = Layout({name: op.layout[name] for name in names})
        if not layout.dim:  # LAPACK takes no matrices without numbers
            parts[names] = ops.Diagonal(layout, {name: op.like.new_zeros(shape) for name, shape in layout.items()})
            continue
        part = ops.Dense(layout, _block(op, names), symmetric=True)
        parts[names] = part if isinstance(representation, Dense) else impose(representation, part)
    return ops.BlockDiagonal(op.layout, parts)


def _block(op: LinearOperator, names: tuple[str, ...]) -> Tensor:
    """The diagonal block of some parameter blocks, by products with its unit vectors."""
    layout = Layout({name: op.layout[name] for name in names})
    ops.require_small(ops.Multiple(layout, op.like.new_ones(())), f"the block {names}")
    like = op.like
    if not layout.dim:
        return like.new_zeros(0, 0)
    zeros = {name: like.new_zeros(shape) for name, shape in op.layout.items()}

    def column(row: Tensor) -> Tensor:
        image = op.mv(zeros | layout.unravel(row))
        return layout.ravel({name: image[name] for name in names})

    if layout.dim == 0:  # an empty parameter
        return like.new_zeros(0, 0)
    matrix = mapped(column, torch.eye(layout.dim, dtype=like.dtype, device=like.device), _COLUMNS)
    return 0.5 * (matrix + matrix.mT)
