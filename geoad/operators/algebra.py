"""Sums, multiples, products, transposes and the dense form of operators, keeping structure where it is kept."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.operators.base import Dense, Diagonal, LinearOperator, Multiple, Product, Sum, Transpose
from geoad.params import Blocks, Layout, add, map_blocks, scale

__all__ = ["DENSE_LIMIT", "compose", "plus", "times", "to_dense", "transpose"]

DENSE_LIMIT = 8192
"""Above this number of coordinates no d × d matrix is made implicitly (8192² float64 entries are 0.5 GB)."""

_CHUNK = 32


@singledispatch
def to_dense(operator: LinearOperator) -> Tensor:
    """The matrix, shape (d, d), in the raveled order of the layout; columns are made in chunks."""
    layout = operator.layout
    columns = _products_with_identity(operator, layout)
    matrix = columns.mT
    return 0.5 * (matrix + matrix.mT) if operator.symmetric else matrix


def _products_with_identity(operator: LinearOperator, layout: Layout) -> Tensor:
    like = operator.like

    def product(row: Tensor) -> Tensor:
        return layout.ravel(operator.mv(layout.unravel(row)))

    eye = torch.eye(layout.dim, dtype=like.dtype, device=like.device)
    mapped: Any = torch.func.vmap(product)
    rows: list[Tensor] = [mapped(chunk) for chunk in eye.split(_CHUNK)]
    return torch.cat(rows)


@to_dense.register
def _(operator: Dense) -> Tensor:
    return operator.matrix


@to_dense.register
def _(operator: Diagonal) -> Tensor:
    return torch.diag_embed(operator.layout.ravel(operator.entries))


@to_dense.register
def _(operator: Multiple) -> Tensor:
    eye = torch.eye(operator.dim, dtype=operator.factor.dtype, device=operator.factor.device)
    return operator.factor * eye


@to_dense.register
def _(operator: Sum) -> Tensor:
    total: Tensor | None = None
    for factor, term in operator.terms:
        part = factor * to_dense(term)
        total = part if total is None else total + part
    assert total is not None
    return total


@to_dense.register
def _(operator: Product) -> Tensor:
    return to_dense(operator.left) @ to_dense(operator.right)


@to_dense.register
def _(operator: Transpose) -> Tensor:
    return to_dense(operator.operator).mT


def require_small(operator: LinearOperator, what: str) -> None:
    """Raise if the dense matrix would be too large to be made without being asked for."""
    if operator.dim > DENSE_LIMIT and not operator.materialised:
        size = operator.dim**2 * operator.like.element_size() / 2**30
        raise GeometryError(
            f"{what} needs the dense {operator.dim} × {operator.dim} matrix ({size:.1f} GiB) of a matrix-free operator. Above "
            f"{DENSE_LIMIT} coordinates it is not made behind your back: use matrix-free products (.mv, .operator), the first "
            "k eigenvalues, or call .to_dense() if you have the memory."
        )


def times(factor: float | Tensor, operator: LinearOperator, *, positive: bool) -> LinearOperator:
    """factor · A; `positive` says that the factor is known to be > 0."""
    definite = operator.definite and positive
    layout = operator.layout
    match operator:
        case Dense():
            return Dense(layout, factor * operator.matrix, symmetric=operator.symmetric, definite=definite)
        case Diagonal():
            return Diagonal(layout, scale(factor, operator.entries), definite=definite)
        case Multiple():
            return Multiple(layout, factor * operator.factor, definite=definite)
        case Sum():
            return Sum([(factor * c, term) for c, term in operator.terms], definite=definite)
        case _:
            return Sum([(factor, operator)], definite=definite)


def plus(a: LinearOperator, b: LinearOperator, *, definite: bool = False) -> LinearOperator:
    """A + B; `definite` says that the sum is known to be positive definite."""
    layout, symmetric = a.layout, a.symmetric and b.symmetric
    if isinstance(a, Multiple) and isinstance(b, Multiple):
        return Multiple(layout, a.factor + b.factor, definite=definite)
    if isinstance(a, (Multiple, Diagonal)) and isinstance(b, (Multiple, Diagonal)):
        return Diagonal(layout, add(_diagonal(a), _diagonal(b)), definite=definite)
    if a.materialised and b.materialised:
        return Dense(layout, _added(a, b), symmetric=symmetric, definite=definite)
    terms = [*(a.terms if isinstance(a, Sum) else [(1.0, a)]), *(b.terms if isinstance(b, Sum) else [(1.0, b)])]
    return Sum(terms, definite=definite)


def _added(a: LinearOperator, b: LinearOperator) -> Tensor:
    """The sum of two stored matrices; a diagonal is added in place of a copy."""
    if isinstance(a, (Multiple, Diagonal)):
        a, b = b, a
    matrix = to_dense(a)
    if isinstance(b, (Multiple, Diagonal)) and matrix.ndim == 2:
        diagonal = b.layout.ravel(_diagonal(b)).to(matrix.dtype)
        return matrix + torch.diag_embed(diagonal)
    return matrix + to_dense(b)


def _diagonal(operator: Multiple | Diagonal) -> Blocks:
    if isinstance(operator, Diagonal):
        return operator.entries
    factor = operator.factor
    return {name: factor.expand(shape) for name, shape in operator.layout.items()}


def compose(a: LinearOperator, b: LinearOperator) -> LinearOperator:
    """A B."""
    match a, b:
        case Multiple(), Multiple():
            return Multiple(a.layout, a.factor * b.factor)
        case (Multiple() | Diagonal()), (Multiple() | Diagonal()):
            return Diagonal(a.layout, map_blocks(torch.mul, _diagonal(a), _diagonal(b)))
        case Dense(), Dense():
            return Dense(a.layout, a.matrix @ b.matrix)
        case _:
            return Product(a, b)


def transpose(operator: LinearOperator) -> LinearOperator:
    """Aᵀ."""
    if operator.symmetric:
        return operator
    if isinstance(operator, Dense):
        return Dense(operator.layout, operator.matrix.mT)
    return operator.operator if isinstance(operator, Transpose) else Transpose(operator)
