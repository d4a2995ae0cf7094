"""Diagonals, and the Frobenius inner product of operators."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from geoad.operators.algebra import diagonal_of, has_matrix, require_small, to_dense, transpose
from geoad.operators.base import Dense, Detached, Diagonal, LinearOperator, Multiple, Product, Sum, Transpose
from geoad.operators.eigen import trace, traced
from geoad.params import Blocks, Layout, add, detach, insert_axes, map_blocks, scale

__all__ = ["diagonal", "frobenius", "inner"]


@singledispatch
def diagonal(operator: LinearOperator) -> Blocks:
    """The diagonal A_ii as blocks.

    >>> import torch
    >>> from geoad import operators as ops
    >>> from geoad.params import Layout
    >>> ops.diagonal(ops.Dense(Layout({"x": (2,)}), torch.tensor([[1.0, 2.0], [3.0, 4.0]])))["x"]
    tensor([1., 4.])
    """
    require_small(operator, "the diagonal")
    return operator.layout.unravel(to_dense(operator).diagonal(dim1=-2, dim2=-1))


@diagonal.register
def _(operator: Diagonal) -> Blocks:
    return operator.entries


@diagonal.register
def _(operator: Multiple) -> Blocks:
    return operator.entries()


@diagonal.register
def _(operator: Sum) -> Blocks:
    total: Blocks | None = None
    for factor, term in operator.terms:
        part = _scaled(operator.layout, factor, diagonal(term))
        total = part if total is None else add(total, part)
    assert total is not None
    return total


def _scaled(layout: Layout, factor: float | Tensor, blocks: Blocks) -> Blocks:
    if not isinstance(factor, Tensor) or factor.ndim == 0:
        return scale(factor, blocks)
    return {name: insert_axes(factor, factor.ndim, len(layout[name])) * block for name, block in blocks.items()}


@diagonal.register
def _(operator: Transpose) -> Blocks:
    return diagonal(operator.operator)


@diagonal.register
def _(operator: Detached) -> Blocks:
    return detach(diagonal(operator.operator))


@diagonal.register
def _(operator: Product) -> Blocks:
    for factor, other in ((operator.left, operator.right), (operator.right, operator.left)):
        if isinstance(factor, (Diagonal, Multiple)):
            return map_blocks(torch.mul, diagonal_of(factor), diagonal(other))
    require_small(operator, "the diagonal")
    return operator.layout.unravel((to_dense(operator.left) * to_dense(operator.right).mT).sum(-1))


def inner(a: LinearOperator, b: LinearOperator) -> Tensor:
    """tr AᵀB, the Frobenius inner product: from the factors where both have structure, else from the matrices.

    Above `geoad.operators.DENSE_LIMIT` coordinates a pair without a closed form is refused.

    >>> import torch
    >>> from geoad import operators as ops
    >>> from geoad.params import Layout
    >>> eye = ops.Multiple(Layout({"w": (2, 3)}), torch.tensor(1.0))
    >>> float(ops.inner(eye, eye))
    6.0
    """
    closed = inner_product(a, b)
    closed = inner_product(b, a) if closed is None else closed
    if closed is not None:
        return closed
    for operator in (a, b):
        if not (has_matrix(a) or has_matrix(b)):
            require_small(operator, "the inner product of two operators without a common structure")
    return (to_dense(a) * to_dense(b)).sum((-2, -1))


@traced.register
def _(operator: Product) -> Tensor:
    """tr AB is the inner product of Aᵀ and B."""
    left, right = operator.left, operator.right
    return inner(left, right) if left.symmetric or right.symmetric else inner(transpose(left), right)


def frobenius(operator: LinearOperator) -> Tensor:
    """|A|_F = √tr AᵀA."""
    return inner(operator, operator).clamp_min(0).sqrt()


@singledispatch
def inner_product(a: LinearOperator, b: LinearOperator) -> Tensor | None:
    """tr AᵀB in closed form for this class of A, None if it has none."""
    return None


@inner_product.register
def _(a: Dense, b: LinearOperator) -> Tensor | None:
    return (a.matrix * b.matrix).sum((-2, -1)) if isinstance(b, Dense) else None


@inner_product.register
def _(a: Multiple, b: LinearOperator) -> Tensor | None:
    return a.factor * trace(b)


@inner_product.register
def _(a: Diagonal, b: LinearOperator) -> Tensor | None:
    return a.layout.ravel(map_blocks(torch.mul, a.entries, diagonal(b))).sum(-1)


@inner_product.register
def _(a: Sum, b: LinearOperator) -> Tensor | None:
    total: Tensor | None = None
    for factor, term in a.terms:
        part = factor * inner(term, b)
        total = part if total is None else total + part
    return total


@inner_product.register
def _(a: Transpose, b: LinearOperator) -> Tensor | None:
    if isinstance(b, Transpose):
        return inner(a.operator, b.operator)
    return inner(a.operator, b) if b.symmetric else None
