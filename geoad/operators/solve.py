"""Solving A x = b, the inverse as an operator, and log-determinants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from geoad.errors import GeometryError, SingularMetricError
from geoad.operators.algebra import DENSE_LIMIT, require_small, to_dense
from geoad.operators.base import Dense, Diagonal, LinearOperator, Multiple, Product, Transpose
from geoad.params import Blocks, axpy, dot, is_wrapped, map_blocks, scale

__all__ = ["CG", "Inverse", "densify", "inverse", "scaled_cholesky", "slogdet", "solve"]


_NOT_POSITIVE = (
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
                    _NOT_POSITIVE.format(what="operator", detail=f" (found vᵀAv = {float(curvature.detach()):.3g})")
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
    return _solve(operator, b, positive)


def _each(method: CG, operator: LinearOperator, b: Blocks) -> Blocks:
    """The iteration for each right-hand side of a batch."""
    layout = operator.layout
    batch = layout.batch_shape(b)
    if not batch:
        return method(operator, b)
    rows = layout.ravel(b).reshape(-1, layout.dim)
    solved = [layout.ravel(method(operator, layout.unravel(row))) for row in rows]
    return layout.unravel(torch.stack(solved).reshape(*batch, layout.dim))


@singledispatch
def _solve(operator: LinearOperator, b: Blocks, positive: bool) -> Blocks:
    if operator.dim > DENSE_LIMIT:
        if not operator.symmetric:
            require_small(operator, "solving with a non-symmetric operator")
        if positive and not operator.definite:
            detail = " as far as is known (it is too large to be factorised)"
            raise SingularMetricError(_NOT_POSITIVE.format(what="matrix-free metric", detail=detail))
        return _each(CG(), operator, b)
    return _solve(densify(operator), b, positive)


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


@_solve.register
def _(operator: Multiple, b: Blocks, positive: bool) -> Blocks:
    _check_diagonal(operator.factor, positive)
    return Multiple(operator.layout, 1 / operator.factor).mv(b)


@_solve.register
def _(operator: Diagonal, b: Blocks, positive: bool) -> Blocks:
    for entries in operator.entries.values():
        _check_diagonal(entries, positive)
    return map_blocks(torch.div, b, operator.entries)


def _check_diagonal(entries: Tensor, positive: bool) -> None:
    if is_wrapped({"": entries}):
        return
    good = entries > 0 if positive else entries != 0
    if not bool(good.all()):
        worst = float(entries.detach().min()) if positive else 0.0
        detail = f" (an entry of its diagonal is {worst:.3g})"
        raise SingularMetricError(_NOT_POSITIVE.format(what="diagonal operator", detail=detail))


@_solve.register
def _(operator: Product, b: Blocks, positive: bool) -> Blocks:
    return _solve(operator.right, _solve(operator.left, b, False), False)


@_solve.register
def _(operator: Transpose, b: Blocks, positive: bool) -> Blocks:
    return _solve(Dense(operator.layout, to_dense(operator)), b, positive)


@_solve.register
def _(operator: Dense, b: Blocks, positive: bool) -> Blocks:
    flat = operator.layout.ravel(b)
    if operator.matrix.ndim == 2:  # all right-hand sides at once
        x = _solve_columns(operator, flat.reshape(-1, operator.dim).mT, positive).mT.reshape(flat.shape)
    else:
        x = _solve_columns(operator, flat.unsqueeze(-1), positive).squeeze(-1)
    return operator.layout.unravel(x)


def _solve_columns(operator: Dense, b: Tensor, positive: bool) -> Tensor:
    """A⁻¹ b for right-hand sides in columns."""
    kind, factor = _factorise(operator, positive)
    if kind == "cholesky":
        size, lower = factor
        return torch.cholesky_solve(b / size.unsqueeze(-1), lower) / size.unsqueeze(-1)
    rows, columns, lu, pivots = factor
    batch = torch.broadcast_shapes(lu.shape[:-2], b.shape[:-2])
    lu, pivots = lu.expand(*batch, *lu.shape[-2:]), pivots.expand(*batch, pivots.shape[-1])
    return torch.linalg.lu_solve(lu, pivots, (b / rows.unsqueeze(-1)).expand(*batch, *b.shape[-2:])) / columns.unsqueeze(-1)


def _factorise(operator: Dense, positive: bool) -> tuple[str, Any]:
    """A factorisation of the equilibrated matrix, kept on the operator."""
    known: Any = operator.factor
    if known is not None and (known[0] == "cholesky" or not positive):
        return known
    matrix = operator.matrix
    wrapped = is_wrapped({"": matrix})
    definite = positive or operator.definite
    found = ("cholesky", scaled_cholesky(matrix)) if definite else ("lu", _lu(matrix, wrapped))
    if not wrapped and not matrix.requires_grad:
        operator.factor = found
    return found


def _noise(matrix: Tensor) -> float:
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
        _require_finite(matrix)
        smallest = float(diagonal.detach().min())
        if not smallest > 0:
            raise SingularMetricError(
                _NOT_POSITIVE.format(what="metric", detail=f" (an entry of its diagonal is {smallest:.3g})")
            )
    size = diagonal.sqrt()
    lower, info = torch.linalg.cholesky_ex(matrix / size.unsqueeze(-1) / size.unsqueeze(-2))
    if not wrapped:
        if bool((info != 0).any()):
            raise SingularMetricError(_NOT_POSITIVE.format(what="metric", detail=" (its Cholesky factorisation fails)"))
        factor = lower.detach()
        twice: Callable[[Tensor], Tensor] = lambda b: torch.cholesky_solve(torch.cholesky_solve(b, factor), factor)  # noqa: E731
        least = float(_smallest_singular_value(twice, factor.diagonal(dim1=-2, dim2=-1)).min())
        if not least > _noise(matrix):
            detail = f" to working precision (smallest relative eigenvalue {least:.2g})"
            raise SingularMetricError(_NOT_POSITIVE.format(what="metric", detail=detail))
    return size, lower


def _equilibrated_lu(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(r, c, LU, pivots) of R⁻¹ A C⁻¹, rows and columns scaled to a largest entry of 1."""
    rows = _nonzero(matrix.detach().abs().amax(-1))
    columns = _nonzero((matrix.detach() / rows.unsqueeze(-1)).abs().amax(-2))
    lu, pivots, _ = torch.linalg.lu_factor_ex(matrix / rows.unsqueeze(-1) / columns.unsqueeze(-2))
    return rows, columns, lu, pivots


def _nonzero(size: Tensor) -> Tensor:
    return torch.where(size > 0, size, torch.ones_like(size))


def _singular(lu: Tensor, pivots: Tensor) -> Tensor:
    """Which LU factors (of an equilibrated matrix) are singular to working precision."""
    lu = lu.detach()
    diagonal = lu.diagonal(dim1=-2, dim2=-1).abs()

    def twice(b: Tensor) -> Tensor:
        return torch.linalg.lu_solve(lu, pivots, torch.linalg.lu_solve(lu, pivots, b, adjoint=True))

    least = _smallest_singular_value(twice, diagonal)
    return (diagonal.amin(-1) == 0) | ~(least > _noise(lu))


def _lu(matrix: Tensor, wrapped: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row- and column-scaled LU factors."""
    if not wrapped:
        _require_finite(matrix)
    rows, columns, lu, pivots = _equilibrated_lu(matrix)
    if not wrapped and bool(_singular(lu, pivots).any()):
        raise SingularMetricError(
            "the operator is singular to working precision (some direction is mapped to rounding noise), so the "
            "equation has no unique solution. Add a multiple of a metric: B + lam * G, or damping=lam."
        )
    return rows, columns, lu, pivots


def _require_finite(matrix: Tensor) -> None:
    if not bool(matrix.isfinite().all()):
        raise GeometryError(
            "the matrix has entries that are not finite (NaN or infinity), so it cannot be factorised. Check data and "
            "parameters for NaN, and the point for overflow."
        )


class Inverse(LinearOperator):
    """A⁻¹, by solving with A. `positive` demands a positive definite A."""

    def __init__(self, operator: LinearOperator, *, positive: bool = False) -> None:
        self.layout = operator.layout
        self.operator = operator
        self.positive = positive
        self.symmetric = operator.symmetric
        self.definite = operator.definite or positive

    @property
    def like(self) -> Tensor:
        return self.operator.like

    @property
    def materialised(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A factorised matrix counts as stored."""
        return self.operator.materialised

    def mv(self, v: Blocks) -> Blocks:
        return solve(self.operator, v, positive=self.positive)

    def rmv(self, w: Blocks) -> Blocks:
        if self.symmetric:
            return self.mv(w)
        return solve(Transpose(self.operator), w)


@to_dense.register
def _(operator: Inverse) -> Tensor:
    inner = densify(operator.operator)
    eye = torch.eye(inner.dim, dtype=inner.like.dtype, device=inner.like.device)
    result = _solve_columns(inner, eye, operator.positive)
    return 0.5 * (result + result.mT) if inner.symmetric else result


def inverse(operator: LinearOperator, *, positive: bool = False) -> LinearOperator:
    """A⁻¹ in the structure of A. Factorises at once where that is cheap to check: a singular A is refused here."""
    layout = operator.layout
    match operator:
        case Inverse():
            return operator.operator
        case Multiple():
            _check_diagonal(operator.factor, positive)
            return Multiple(layout, 1 / operator.factor, definite=operator.definite or positive)
        case Diagonal():
            for entries in operator.entries.values():
                _check_diagonal(entries, positive)
            return Diagonal(layout, map_blocks(torch.reciprocal, operator.entries), definite=operator.definite or positive)
        case Dense():
            _factorise(operator, positive)
            return Inverse(operator, positive=positive)
        case _:
            return Inverse(operator, positive=positive)


@singledispatch
def slogdet(operator: LinearOperator) -> tuple[Tensor, Tensor]:
    """(sign, log |det A|)."""
    require_small(operator, "the determinant")
    return slogdet(densify(operator))


@slogdet.register
def _(operator: Dense) -> tuple[Tensor, Tensor]:
    matrix = operator.matrix
    if is_wrapped({"": matrix}):
        result: Any = torch.linalg.slogdet(matrix)
        return result.sign, result.logabsdet
    if operator.definite:
        try:
            size, lower = _factorise(operator, True)[1]
        except SingularMetricError:  # known to be definite, but not to working precision
            return _symmetric_slogdet(matrix)
        logdet = 2 * (lower.diagonal(dim1=-2, dim2=-1).log().sum(-1) + size.log().sum(-1))
        return torch.ones_like(logdet), logdet
    return _symmetric_slogdet(matrix) if operator.symmetric else _general_slogdet(matrix)


def _symmetric_slogdet(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """By the eigenvalues of S⁻¹ A S⁻¹, which tell a singular matrix from a tiny determinant and from bad scaling."""
    _require_finite(matrix)
    given = matrix.detach()
    size = _nonzero(given.diagonal(dim1=-2, dim2=-1).abs().sqrt())
    for _ in range(3):
        scaled = given / size.unsqueeze(-1) / size.unsqueeze(-2)
        size = size * _nonzero(scaled.abs().amax(-1)).sqrt()
    values = torch.linalg.eigvalsh(matrix / size.unsqueeze(-1) / size.unsqueeze(-2))
    zero = values.abs() <= _noise(matrix) * math.sqrt(matrix.shape[-1]) * values.abs().amax(-1, keepdim=True)
    values = torch.where(zero, torch.zeros_like(values), values)
    return values.sign().prod(-1), values.abs().log().sum(-1) + 2 * size.log().sum(-1)


def _general_slogdet(matrix: Tensor) -> tuple[Tensor, Tensor]:
    _require_finite(matrix)
    rows, columns, lu, pivots = _equilibrated_lu(matrix.detach())
    result: Any = torch.linalg.slogdet(matrix / rows.unsqueeze(-1) / columns.unsqueeze(-2))
    singular = _singular(lu, pivots)
    sign = torch.where(singular, torch.zeros_like(result.sign), result.sign)
    logabsdet = result.logabsdet + rows.log().sum(-1) + columns.log().sum(-1)
    return sign, torch.where(singular, torch.full_like(logabsdet, -torch.inf), logabsdet)


@slogdet.register
def _(operator: Diagonal) -> tuple[Tensor, Tensor]:
    flat = operator.layout.ravel(operator.entries)
    return flat.sign().prod(-1), flat.abs().log().sum(-1)


@slogdet.register
def _(operator: Multiple) -> tuple[Tensor, Tensor]:
    sign = operator.factor.sign()
    return (sign if operator.dim % 2 else sign * sign), operator.dim * operator.factor.abs().log()


@slogdet.register
def _(operator: Product) -> tuple[Tensor, Tensor]:
    left, right = slogdet(operator.left), slogdet(operator.right)
    return left[0] * right[0], left[1] + right[1]


@slogdet.register
def _(operator: Inverse) -> tuple[Tensor, Tensor]:
    sign, logabsdet = slogdet(operator.operator)
    return sign, -logabsdet


@slogdet.register
def _(operator: Transpose) -> tuple[Tensor, Tensor]:
    return slogdet(operator.operator)
