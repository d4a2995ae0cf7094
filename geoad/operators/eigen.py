"""Traces and eigenvalues, of one operator or of a pair (B, G): B u = λ G u."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.operators.algebra import require_small, to_dense
from geoad.operators.base import Diagonal, LinearOperator, Multiple, Product, Sum, Transpose
from geoad.operators.solve import Inverse, densify, solve
from geoad.params import Blocks, axpy, dot, first, scale

__all__ = ["eigh", "eigvals", "lanczos", "order", "trace"]


@singledispatch
def trace(operator: LinearOperator) -> Tensor:
    """Σ_i A_ii."""
    require_small(operator, "the trace")
    return to_dense(operator).diagonal(dim1=-2, dim2=-1).sum(-1)


@trace.register
def _(operator: Diagonal) -> Tensor:
    return operator.layout.ravel(operator.entries).sum(-1)


@trace.register
def _(operator: Multiple) -> Tensor:
    return operator.dim * operator.factor


@trace.register
def _(operator: Sum) -> Tensor:
    parts = [factor * trace(term) for factor, term in operator.terms]
    return torch.stack([torch.as_tensor(part) for part in parts]).sum(0)


@trace.register
def _(operator: Transpose) -> Tensor:
    return trace(operator.operator)


def order(values: Tensor, which: str) -> Tensor:
    """The indices that sort eigenvalues: "largest" first, "smallest" first, or largest "magnitude" first."""
    key = values.real if values.is_complex() else values
    if which == "largest":
        return key.argsort(descending=True, stable=True)
    if which == "smallest":
        return key.argsort(stable=True)
    if which == "magnitude":
        return values.abs().argsort(descending=True, stable=True)
    raise GeometryError(
        f"which='{which}' is not known. Eigenvalues are sorted by which='largest' (default), 'smallest' or 'magnitude'."
    )


def _symmetric_pair(operator: LinearOperator) -> tuple[LinearOperator, LinearOperator] | None:
    """(B, G) if the operator is G⁻¹ B, or similar to it, with B symmetric and G positive definite."""
    if isinstance(operator, Transpose):
        return _symmetric_pair(operator.operator)
    if not isinstance(operator, Product):
        return None
    left, right = operator.left, operator.right
    if isinstance(left, Inverse) and left.definite and right.symmetric:
        return right, left.operator
    if isinstance(right, Inverse) and right.definite and left.symmetric:
        return left, right.operator
    if left.definite and right.symmetric and isinstance(left, (Diagonal, Multiple)):
        return right, Inverse(left, positive=True)
    if right.definite and left.symmetric and isinstance(right, (Diagonal, Multiple)):
        return left, Inverse(right, positive=True)
    return None


def eigvals(operator: LinearOperator, k: int | None = None, which: str = "largest") -> Tensor:
    """Eigenvalues, sorted; real where the operator is symmetric or G⁻¹B with symmetric B, else complex in general.

    With `k` only the first k, by Lanczos with full reorthogonalisation where the matrix is not at hand.
    """
    if isinstance(operator, Multiple):
        return operator.factor.expand(operator.dim)[:k]
    if isinstance(operator, Diagonal):
        values = operator.layout.ravel(operator.entries)
        return values[order(values, which)][:k]
    pair = (operator, None) if operator.symmetric else _symmetric_pair(operator)
    if pair is not None:
        return eigh(pair[0], pair[1], k, which)[0]
    require_small(operator, "the spectrum of an operator that is not symmetric")
    values = torch.linalg.eigvals(to_dense(operator))
    if bool((values.imag.abs() <= 1e-12 * values.abs().max()).all()):
        values = values.real
    return values[order(values, which)][:k]


def eigh(
    b: LinearOperator, g: LinearOperator | None = None, k: int | None = None, which: str = "largest"
) -> tuple[Tensor, Tensor]:
    """Eigenvalues and G-orthonormal eigenvectors (as columns, shape (d, k)) of B u = λ G u for symmetric B.

    Small or stored operators go through LAPACK; large matrix-free ones with `k` through Lanczos in the G inner product.
    """
    if k is not None and not b.materialised and 8 * k + 64 < b.dim:
        return lanczos(b, g, k, which)
    require_small(b, "the full spectrum")
    matrix = densify(b).matrix
    if not isinstance(g, LinearOperator):
        values, vectors = torch.linalg.eigh(matrix)
    else:
        lower = torch.linalg.cholesky(to_dense(g))
        half = torch.linalg.solve_triangular(lower, matrix, upper=False)
        whitened = torch.linalg.solve_triangular(lower, half.mT, upper=False)
        values, basis = torch.linalg.eigh(0.5 * (whitened + whitened.mT))
        vectors = torch.linalg.solve_triangular(lower.mT, basis, upper=True)
    index = order(values, which)[:k]
    return values[index], vectors[:, index]


def lanczos(
    b: LinearOperator, g: LinearOperator | None, k: int, which: str = "largest", *, tol: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """The first k eigenpairs of B u = λ G u: Lanczos for G⁻¹B in the G inner product, fully reorthogonalised.

    The start vector is fixed (all components equal and a fixed phase), so that the result is reproducible. It stops when the
    k residuals are below tol · max|λ|; if the Krylov space is exhausted without them it goes on to the whole space.
    """
    layout, like = b.layout, b.like
    steps = torch.arange(b.dim, dtype=like.dtype, device=like.device)
    q = layout.unravel(torch.cos(steps * 0.7 + 0.3) + 1.5)
    basis: list[Blocks] = []
    duals: list[Blocks] = []
    alphas: list[Tensor] = []
    betas: list[Tensor] = []

    def dual(v: Blocks) -> Blocks:
        return v if g is None else g.mv(v)

    w = dual(q)
    beta = dot(q, w).sqrt()
    while True:
        q, w = scale(1 / beta, q), scale(1 / beta, w)
        basis.append(q)
        duals.append(w)
        image = b.mv(q)
        r = image if g is None else solve(g, image, positive=True)
        alphas.append(dot(q, image))
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            for u, du in zip(basis, duals, strict=True):
                r = axpy(-dot(du, r), u, r)
        w = dual(r)
        beta = dot(r, w).clamp_min(0).sqrt()
        values, coefficients = _ritz(alphas, betas, first(r))
        index = order(values, which)[:k]
        residuals = beta * coefficients[-1, index].abs()
        size = values.abs().max()
        exhausted = len(basis) == b.dim or bool(beta <= 1e-14 * size)
        if exhausted or (len(basis) > k and bool((residuals <= tol * size).all())):
            break
        betas.append(beta)
    if len(index) < k:
        raise GeometryError(
            f"the Krylov space of the start vector is exhausted after {len(basis)} steps, fewer than the k={k} eigenvalues "
            "asked for (the operator has few distinct eigenvalues). Ask for all of them with k=None, or for fewer."
        )
    stacked = torch.stack([layout.ravel(u) for u in basis], dim=-1)
    return values[index], stacked @ coefficients[:, index]


def _ritz(alphas: list[Tensor], betas: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    diagonal = torch.stack(alphas).to(like.dtype)
    matrix = torch.diag(diagonal)
    if betas:
        off = torch.stack(betas).to(like.dtype)
        matrix = matrix + torch.diag(off, 1) + torch.diag(off, -1)
    return torch.linalg.eigh(matrix)
