"""Solving A x = b, the inverse as an operator, and log-determinants."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Self

import torch
from torch import Tensor

from geoad.errors import GeometryError, SingularMetricError
from geoad.operators.algebra import DENSE_LIMIT, has_matrix, require_small, to_dense, transpose
from geoad.operators.base import Dense, Detached, Diagonal, LinearOperator, Multiple, Product, Transpose
from geoad.params import Blocks, Layout, axpy, detach, dot, is_wrapped, map_blocks, scale

__all__ = ["CG", "Inverse", "densify", "inverse", "scaled_cholesky", "solve"]


NOT_POSITIVE = (
    "the {what} is not positive definite{detail}, so it has no inverse that could turn a differential into a vector. "
    "Fisher and "
    "GGN matrices are semidefinite as a rule. Add damping, which here means a multiple of the reference metric and moves "
    "along: "
    "field + lam * geoad.metrics.Euclidean(theta), or G.solve(w, damping=lam)."
)


@dataclass(frozen=True)
class CG:
    """Conjugate gradients for symmetric positive definite operators, run in the chart where the operator was made.

    Args:
        tol: stop when |A x - b| ≤ tol |b|, in the components of that chart.
        max_iter: an error is raised if this many steps do not suffice; None means 10 d.
    """

    tol: float = 1e-10
    max_iter: int | None = None

    def __call__(self, operator: LinearOperator, b: Blocks) -> Blocks:
        """The solution of A x = b."""
        x = scale(0.0, b)
        residual, direction = b, b
        rho = target = dot(b, b)
        if float(target.detach()) == 0:
            return x
        limit = self.max_iter or 10 * operator.dim
        for _ in range(limit):
            image = operator.mv(direction)
            curvature = dot(direction, image)
            if not float(curvature.detach()) > 0:
                raise SingularMetricError(
                    NOT_POSITIVE.format(what="operator", detail=f" (found vᵀAv = {float(curvature.detach()):.3g})")
                )
            alpha = rho / curvature
            x = axpy(alpha, direction, x)
            residual = axpy(-alpha, image, residual)
            rho, old = dot(residual, residual), rho
            if float(rho.detach()) <= self.tol**2 * float(target.detach()):
                return x
            direction = axpy(rho / old, direction, residual)
        raise SingularMetricError(
            f"conjugate gradients did not reach {self.tol:g} in {limit} steps (relative residual "
            f"{math.sqrt(float(rho.detach()) / float(target.detach())):.2g}). The operator is close to singular; increase "
            "the damping, or pass "
            "method=geoad.operators.CG(tol=..., max_iter=...)."
        )


def solve(operator: LinearOperator, b: Blocks, *, positive: bool = False, method: CG | None = None) -> Blocks:
    """x with A x = b; batch axes of b and of a stored A broadcast.

    With `positive`, A must be symmetric positive definite: `SingularMetricError` otherwise. With a `method` it is iterated
    instead of factorised.
    """
    if method is not None:
        return _each(method, operator, b)
    return solved(operator, b, positive)


def _each(method: CG, operator: LinearOperator, b: Blocks) -> Blocks:
    """The iteration for each right-hand side of a batch."""
    layout = operator.layout
    batch = layout.batch_shape(b)
    if not batch:
        return method(operator, b)
    rows = layout.ravel(b).reshape(-1, layout.dim)
    solved = [layout.ravel(method(operator, layout.unravel(row))) for row in rows]
    return layout.unravel(torch.stack(solved).reshape(*batch, layout.dim))


class Inverse(LinearOperator):
    """A⁻¹, by solving with A. `positive` demands a positive definite A."""

    made_of = ("operator",)
    said = ("positive",)

    def __init__(self, operator: LinearOperator, *, positive: bool = False) -> None:
        self.layout = operator.layout
        self.operator = operator
        self.positive = positive
        self.symmetric = operator.symmetric
        self.definite = operator.definite or positive

    @property
    def like(self) -> Tensor:
        return self.operator.like

    @classmethod
    def remade(cls, layout: Layout, held: Mapping[str, Any], said: Mapping[str, Any]) -> Self:
        return cls(**held, **said)

    @property
    def materialised(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A factorised matrix counts as stored."""
        return self.operator.materialised

    def mv(self, v: Blocks) -> Blocks:
        return solve(self.operator, v, positive=self.positive)

    def rmv(self, w: Blocks) -> Blocks:
        if self.symmetric:
            return self.mv(w)
        return solve(transpose(self.operator), w)


@singledispatch
def solved(operator: LinearOperator, b: Blocks, positive: bool) -> Blocks:
    """What `solve` does without a method: dispatches on the class."""
    if operator.dim > DENSE_LIMIT and not has_matrix(operator):
        if not operator.symmetric:
            require_small(operator, "solving with a non-symmetric operator")
        if positive and not operator.definite:
            detail = " as far as is known (it is too large to be factorised)"
            raise SingularMetricError(NOT_POSITIVE.format(what="matrix-free metric", detail=detail))
        return _each(CG(), operator, b)
    return solved(densify(operator), b, positive)


def densify(operator: LinearOperator) -> Dense:
    """The operator with its matrix stored; remembered on the operator, so that factorisations are reused."""
    if isinstance(operator, Dense):
        return operator
    known: Dense | None = getattr(operator, "dense", None)
    if known is None:
        matrix = to_dense(operator)
        known = Dense(operator.layout, matrix, symmetric=operator.symmetric, definite=operator.definite)
        if not is_wrapped({"": matrix}):
            operator.dense = known  # pyright: ignore[reportAttributeAccessIssue]
    return known


@solved.register
def _(operator: Multiple, b: Blocks, positive: bool) -> Blocks:
    check_diagonal(operator.factor, positive)
    return Multiple(operator.layout, 1 / operator.factor).mv(b)


@solved.register
def _(operator: Diagonal, b: Blocks, positive: bool) -> Blocks:
    for entries in operator.entries.values():
        check_diagonal(entries, positive)
    return map_blocks(torch.div, b, operator.entries)


def check_diagonal(entries: Tensor, positive: bool) -> None:
    """Raise `SingularMetricError` if an entry is zero, or not positive where that is asked for."""
    if is_wrapped({"": entries}):
        return
    good = entries > 0 if positive else entries != 0
    if not bool(good.all()):
        worst = float(entries.detach().min()) if positive else 0.0
        detail = f" (an entry of its diagonal is {worst:.3g})"
        raise SingularMetricError(NOT_POSITIVE.format(what="diagonal operator", detail=detail))


@solved.register
def _(operator: Product, b: Blocks, positive: bool) -> Blocks:
    return solved(operator.right, solved(operator.left, b, False), False)


@solved.register
def _(operator: Inverse, b: Blocks, positive: bool) -> Blocks:
    if positive and not operator.definite:
        require_small(operator, "checking that an inverse is positive definite")
        return solved(densify(operator), b, True)
    return operator.operator.mv(b)


@solved.register
def _(operator: Detached, b: Blocks, positive: bool) -> Blocks:
    return detach(solved(operator.operator, b, positive))


@solved.register
def _(operator: Transpose, b: Blocks, positive: bool) -> Blocks:
    require_small(operator, "solving with a transposed operator")
    return solved(Dense(operator.layout, to_dense(operator)), b, positive)


@solved.register
def _(operator: Dense, b: Blocks, positive: bool) -> Blocks:
    flat = operator.layout.ravel(b)
    if operator.matrix.ndim == 2:  # all right-hand sides at once
        x = solve_columns(operator, flat.reshape(-1, operator.dim).mT, positive).mT.reshape(flat.shape)
    else:
        x = solve_columns(operator, flat.unsqueeze(-1), positive).squeeze(-1)
    return operator.layout.unravel(x)


def working(numbers: Tensor) -> Tensor:
    """The numbers in a precision that LAPACK knows: float32 for half precision."""
    return numbers.float() if numbers.dtype in (torch.bfloat16, torch.float16) else numbers


def solve_columns(operator: Dense, b: Tensor, positive: bool) -> Tensor:
    """A⁻¹ b for right-hand sides in columns."""
    kind, factor = factorise(operator, positive)
    dtype, b = b.dtype, b.to(factor[0].dtype)
    if kind == "cholesky":
        size, lower = factor
        return (torch.cholesky_solve(b / size.unsqueeze(-1), lower) / size.unsqueeze(-1)).to(dtype)
    rows, columns, lu, pivots = factor
    batch = torch.broadcast_shapes(lu.shape[:-2], b.shape[:-2])
    lu, pivots = lu.expand(*batch, *lu.shape[-2:]), pivots.expand(*batch, pivots.shape[-1])
    return (
        torch.linalg.lu_solve(lu, pivots, (b / rows.unsqueeze(-1)).expand(*batch, *b.shape[-2:]))
        .div(columns.unsqueeze(-1))
        .to(dtype)
    )


def factorise(operator: Dense, positive: bool) -> tuple[str, Any]:
    """A factorisation of the equilibrated matrix, kept on the operator."""
    known: Any = operator.factor
    if known is not None and (known[0] == "cholesky" or not positive):
        return known
    matrix = working(operator.matrix)
    wrapped = is_wrapped({"": matrix})
    definite = positive or operator.definite
    found = ("cholesky", scaled_cholesky(matrix)) if definite else ("lu", _lu(matrix, wrapped))
    if not wrapped and not matrix.requires_grad:
        operator.factor = found
    return found


def noise(matrix: Tensor) -> float:
    """Singular values of an equilibrated matrix below this are rounding noise: entries off by eps give a norm of 2 √d eps."""
    return 4 * math.sqrt(matrix.shape[-1]) * torch.finfo(matrix.dtype).eps


def _smallest_singular_value(solve_twice: Callable[[Tensor], Tensor], pivots: Tensor) -> Tensor:
    """By inverse iteration, from above; `solve_twice` applies (AᵀA)⁻¹ to columns, `pivots` tell where to start.

    The smallest pivot alone is no measure: it may be far larger than the smallest singular value.
    """
    steps = torch.arange(pivots.shape[-1], dtype=pivots.dtype, device=pivots.device)
    x = torch.nn.functional.one_hot(pivots.argmin(-1), pivots.shape[-1]) + 0.1 * torch.cos(steps)
    x = (x / x.norm(dim=-1, keepdim=True)).unsqueeze(-1)
    growth = x.new_ones(())
    for _ in range(4):
        x = solve_twice(x)
        growth = x.norm(dim=-2, keepdim=True)
        x = x / growth
    return growth.squeeze(-1).squeeze(-1).rsqrt()


def scaled_cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(s, L) with A = S L Lᵀ S, S = diag(s), and a unit diagonal of L Lᵀ; raises if A is not positive definite."""
    wrapped = is_wrapped({"": matrix})
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    if not wrapped:
        require_finite(matrix)
        smallest = float(diagonal.detach().min())
        if not smallest > 0:
            raise SingularMetricError(
                NOT_POSITIVE.format(what="metric", detail=f" (an entry of its diagonal is {smallest:.3g})")
            )
    size = diagonal.sqrt()
    lower, info = torch.linalg.cholesky_ex(matrix / size.unsqueeze(-1) / size.unsqueeze(-2))
    if not wrapped:
        if bool((info != 0).any()):
            raise SingularMetricError(NOT_POSITIVE.format(what="metric", detail=" (its Cholesky factorisation fails)"))
        factor = lower.detach()
        twice: Callable[[Tensor], Tensor] = lambda b: torch.cholesky_solve(torch.cholesky_solve(b, factor), factor)  # noqa: E731
        least = float(_smallest_singular_value(twice, factor.diagonal(dim1=-2, dim2=-1)).min())
        if not least > noise(matrix):
            detail = f" to working precision (smallest relative eigenvalue {least:.2g})"
            raise SingularMetricError(NOT_POSITIVE.format(what="metric", detail=detail))
    return size, lower


def equilibrated_lu(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(r, c, LU, pivots) of R⁻¹ A C⁻¹, rows and columns scaled to a largest entry of 1."""
    rows = nonzero(matrix.detach().abs().amax(-1))
    columns = nonzero((matrix.detach() / rows.unsqueeze(-1)).abs().amax(-2))
    lu, pivots, _ = torch.linalg.lu_factor_ex(matrix / rows.unsqueeze(-1) / columns.unsqueeze(-2))
    return rows, columns, lu, pivots


def nonzero(size: Tensor) -> Tensor:
    """The sizes, with 1 in the place of 0."""
    return torch.where(size > 0, size, torch.ones_like(size))


def singular(lu: Tensor, pivots: Tensor) -> Tensor:
    """Which LU factors (of an equilibrated matrix) are singular to working precision."""
    lu = lu.detach()
    diagonal = lu.diagonal(dim1=-2, dim2=-1).abs()

    def twice(b: Tensor) -> Tensor:
        return torch.linalg.lu_solve(lu, pivots, torch.linalg.lu_solve(lu, pivots, b, adjoint=True))

    least = _smallest_singular_value(twice, diagonal)
    return (diagonal.amin(-1) == 0) | ~(least > noise(lu))


def _lu(matrix: Tensor, wrapped: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row- and column-scaled LU factors."""
    if not wrapped:
        require_finite(matrix)
    rows, columns, lu, pivots = equilibrated_lu(matrix)
    if not wrapped and bool(singular(lu, pivots).any()):
        raise SingularMetricError(
            "the operator is singular to working precision (some direction is mapped to rounding noise), so the "
            "equation has no unique solution. Add a multiple of a metric: B + lam * G, or damping=lam."
        )
    return rows, columns, lu, pivots


def require_finite(matrix: Tensor) -> None:
    """Raise `GeometryError` if an entry is NaN or infinite."""
    if not bool(matrix.isfinite().all()):
        raise GeometryError(
            "the matrix has entries that are not finite (NaN or infinity), so it cannot be factorised. Check data and "
            "parameters for NaN, and the point for overflow."
        )


@has_matrix.register
def _(operator: Inverse) -> bool:
    return has_matrix(operator.operator)


@to_dense.register
def _(operator: Inverse) -> Tensor:
    inner = densify(operator.operator)
    eye = torch.eye(inner.dim, dtype=inner.like.dtype, device=inner.like.device)
    result = solve_columns(inner, eye, operator.positive)
    return 0.5 * (result + result.mT) if inner.symmetric else result


def inverse(operator: LinearOperator, *, positive: bool = False) -> LinearOperator:
    """A⁻¹ in the structure of A. Factorises at once where that is cheap to check: a singular A is refused here."""
    layout = operator.layout
    match operator:
        case Inverse():
            return operator.operator
        case Multiple():
            check_diagonal(operator.factor, positive)
            return Multiple(layout, 1 / operator.factor, definite=operator.definite or positive)
        case Diagonal():
            for entries in operator.entries.values():
                check_diagonal(entries, positive)
            return Diagonal(layout, map_blocks(torch.reciprocal, operator.entries), definite=operator.definite or positive)
        case Dense():
            factorise(operator, positive)
            return Inverse(operator, positive=positive)
        case _:
            return inverted(operator, positive) if operator.structured else Inverse(operator, positive=positive)


@singledispatch
def inverted(operator: LinearOperator, positive: bool) -> LinearOperator:
    """A⁻¹ of a structured operator, in its class where that is closed."""
    return Inverse(operator, positive=positive)
