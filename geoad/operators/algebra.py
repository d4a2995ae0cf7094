"""Sums, multiples, products, transposes and the dense form of operators, keeping structure where it is kept."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.kernels.products import mapped
from geoad.operators.base import Dense, Detached, Diagonal, LinearOperator, Multiple, Product, Sum, Transpose
from geoad.params import Blocks, Layout, add, insert_axes, is_wrapped, map_blocks, scale

__all__ = [
    "DENSE_LIMIT",
    "compose",
    "has_matrix",
    "is_symmetric",
    "mv",
    "plus",
    "require_small",
    "rmv",
    "times",
    "to_dense",
    "transpose",
]

DENSE_LIMIT = 8192
"""Above this number of coordinates no d × d matrix is made implicitly (8192² float64 entries are 0.5 GB)."""

_CHUNK = 32


def mv(operator: LinearOperator, v: Blocks) -> Blocks:
    """A v; batch axes lead."""
    return operator.mv(v)


def rmv(operator: LinearOperator, w: Blocks) -> Blocks:
    """Aᵀ w; batch axes lead."""
    return operator.rmv(w)


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
    return mapped(product, eye, _CHUNK)


@to_dense.register
def _(operator: Dense) -> Tensor:
    return operator.matrix


@to_dense.register
def _(operator: Diagonal) -> Tensor:
    return torch.diag_embed(operator.layout.ravel(operator.entries))


@to_dense.register
def _(operator: Multiple) -> Tensor:
    eye = torch.eye(operator.dim, dtype=operator.factor.dtype, device=operator.factor.device)
    return operator.factor[..., None, None] * eye


@to_dense.register
def _(operator: Sum) -> Tensor:
    total: Tensor | None = None
    for factor, term in operator.terms:
        factor = insert_axes(factor, factor.ndim, 2) if isinstance(factor, Tensor) and factor.ndim else factor
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


@to_dense.register
def _(operator: Detached) -> Tensor:
    return to_dense(operator.operator).detach()


@singledispatch
def has_matrix(operator: LinearOperator) -> bool:
    """True if a d × d matrix is stored already, so that making it dense allocates nothing of a new order."""
    match operator:
        case Dense():
            return True
        case Transpose() | Detached():
            return has_matrix(operator.operator)
        case Sum():
            return any(has_matrix(term) for _, term in operator.terms)
        case Product():
            return has_matrix(operator.left) or has_matrix(operator.right)
        case _:
            return False


def is_symmetric(matrix: Tensor) -> bool:
    """True if the matrix is symmetric up to rounding; False where its values cannot be read (inside transforms)."""
    if is_wrapped({"": matrix}):
        return False
    matrix = matrix.detach()
    if matrix.numel() == 0 or matrix.device.type == "meta":
        return False
    tolerance = 1e3 * torch.finfo(matrix.dtype).eps * matrix.abs().amax((-2, -1), keepdim=True)
    return bool(((matrix - matrix.mT).abs() <= tolerance).all())


def require_small(operator: LinearOperator, what: str) -> None:
    """Raise if the dense matrix would be too large to be made without being asked for."""
    if operator.dim > DENSE_LIMIT and not has_matrix(operator):
        size = operator.dim**2 * operator.like.element_size() / 2**30
        raise GeometryError(
            f"{what} needs the dense {operator.dim} × {operator.dim} matrix ({size:.1f} GiB), which is not stored. Above "
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
            return Sum([(factor * c, t) for c, t in operator.terms], definite=definite, symmetric=operator.symmetric)
        case _ if operator.structured:
            return scaled(operator, factor, definite)
        case _:
            return Sum([(factor, operator)], definite=definite)


@singledispatch
def scaled(operator: LinearOperator, factor: float | Tensor, definite: bool) -> LinearOperator:
    """factor · A of a structured operator, in its class where that is closed."""
    return Sum([(factor, operator)], definite=definite)


def plus(a: LinearOperator, b: LinearOperator, *, definite: bool = False) -> LinearOperator:
    """A + B; `definite` says that the sum is known to be positive definite."""
    layout, symmetric = a.layout, (a.symmetric and b.symmetric) or _are_transposes(a, b)
    if isinstance(a, Multiple) and isinstance(b, Multiple):
        return Multiple(layout, a.factor + b.factor, definite=definite)
    if isinstance(a, (Multiple, Diagonal)) and isinstance(b, (Multiple, Diagonal)):
        return Diagonal(layout, add(diagonal_of(a), diagonal_of(b)), definite=definite)
    simple = (Dense, Multiple, Diagonal)
    if isinstance(a, simple) and isinstance(b, simple):
        return Dense(layout, _added(a, b), symmetric=symmetric, definite=definite)
    closed = added(a, b, definite) if a.structured else None
    closed = added(b, a, definite) if closed is None and b.structured else closed
    if closed is not None:
        return closed
    if a.materialised and b.materialised and (has_matrix(a) or has_matrix(b)):
        return Dense(layout, _added(a, b), symmetric=symmetric, definite=definite)
    terms: _Terms = a.terms if isinstance(a, Sum) else [(1.0, a)]
    for factor, term in b.terms if isinstance(b, Sum) else [(1.0, b)]:
        terms = _appended(terms, factor, term)
    return Sum(terms, definite=definite, symmetric=symmetric)


@singledispatch
def added(a: LinearOperator, b: LinearOperator, definite: bool) -> LinearOperator | None:
    """A + B of a structured A in closed form, None if it has none."""
    return None


_Terms = list[tuple[float | Tensor, LinearOperator]]


def _appended(terms: _Terms, factor: float | Tensor, term: LinearOperator) -> _Terms:
    """One more term; diagonals are added up."""
    if isinstance(term, (Multiple, Diagonal)):
        for i, (other, known) in enumerate(terms):
            if isinstance(known, (Multiple, Diagonal)):
                both = plus(times(other, known, positive=False), times(factor, term, positive=False))
                return [*terms[:i], (1.0, both), *terms[i + 1 :]]
    return [*terms, (factor, term)]


def _are_transposes(a: LinearOperator, b: LinearOperator) -> bool:
    """True if b is known to be aᵀ, so that a + b is symmetric."""
    if isinstance(a, Transpose) != isinstance(b, Transpose):
        return (a.operator is b) if isinstance(a, Transpose) else (b.operator is a)  # pyright: ignore[reportAttributeAccessIssue]
    if not (isinstance(a, Dense) and isinstance(b, Dense)) or a.matrix.shape != b.matrix.shape:
        return False
    x, y = a.matrix, b.matrix.mT
    if is_wrapped({"": x, " ": y}):
        return False
    return x.data_ptr() == y.data_ptr() and x.stride() == y.stride()


def _added(a: LinearOperator, b: LinearOperator) -> Tensor:
    """The sum of two stored matrices; a diagonal is added in place of a copy."""
    if isinstance(a, (Multiple, Diagonal)):
        a, b = b, a
    matrix = a.matrix if isinstance(a, Dense) else to_dense(a)
    if isinstance(b, (Multiple, Diagonal)) and matrix.ndim == 2:
        diagonal = b.layout.ravel(diagonal_of(b)).to(matrix.dtype)
        return matrix + torch.diag_embed(diagonal)
    return matrix + (b.matrix if isinstance(b, Dense) else to_dense(b))


def diagonal_of(operator: Multiple | Diagonal) -> Blocks:
    """The entries of a diagonal matrix."""
    return operator.entries if isinstance(operator, Diagonal) else operator.entries()


def compose(a: LinearOperator, b: LinearOperator) -> LinearOperator:
    """A B."""
    match a, b:
        case Multiple(), Multiple():
            return Multiple(a.layout, a.factor * b.factor)
        case ((Multiple() | Diagonal()), (Multiple() | Diagonal())):
            return Diagonal(a.layout, map_blocks(torch.mul, diagonal_of(a), diagonal_of(b)))
        case Multiple(), _:
            return times(a.factor, b, positive=a.definite) if a.factor.ndim == 0 else Product(a, b)
        case _, Multiple():
            return times(b.factor, a, positive=b.definite) if b.factor.ndim == 0 else Product(a, b)
        case Dense(), Dense():
            return Dense(a.layout, a.matrix @ b.matrix)
        case _:
            closed = composed(a, b) if a.structured else None
            return Product(a, b) if closed is None else closed


@singledispatch
def composed(a: LinearOperator, b: LinearOperator) -> LinearOperator | None:
    """A B of a structured A in closed form, None if it has none."""
    return None


def transpose(operator: LinearOperator) -> LinearOperator:
    """Aᵀ."""
    if operator.symmetric:
        return operator
    match operator:
        case Dense():
            return Dense(operator.layout, operator.matrix.mT)
        case Transpose():
            return operator.operator
        case _:
            return transposed(operator) if operator.structured else Transpose(operator)


@singledispatch
def transposed(operator: LinearOperator) -> LinearOperator:
    """Aᵀ of an operator that is not symmetric, in its class where that is closed."""
    return Transpose(operator)
