"""Solving with operators of low rank: the Woodbury identity and the determinant lemma."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoad.errors import SingularMetricError
from geoad.operators.base import Diagonal, LinearOperator, Multiple
from geoad.operators.determinant import slogdet
from geoad.operators.inner import diagonal
from geoad.operators.low_rank import LowRank, signed_rows
from geoad.operators.solve import NOT_POSITIVE, check_diagonal, densify, inverse, inverted, solved, working
from geoad.operators.spectra import noise_of, symmetric_eigh, symmetric_eigvals
from geoad.params import Blocks, is_wrapped, sub

__all__: list[str] = []


class _Woodbury:
    """A⁻¹ = B⁻¹ - B⁻¹ Wᵀ (S + W B⁻¹ Wᵀ)⁻¹ W B⁻¹ for A = B + Wᵀ S W, S = diag(±1)."""

    def __init__(self, operator: LowRank, positive: bool) -> None:
        self.operator = operator
        base = operator.base
        if base is None:
            raise SingularMetricError(
                NOT_POSITIVE.format(what="LowRank operator", detail=f" (its rank is at most {operator.rank} of {operator.dim})")
            )
        self.rows, signs = signed_rows(operator)
        self.root = _regular(base, positive)
        middle = torch.diag_embed(signs) + (self.rows / self.root) @ self.rows.mT
        self.middle = 0.5 * (middle + middle.mT)
        self.kind, self.factor = self._factorised(signs, positive)

    def _factorised(self, signs: Tensor, positive: bool) -> tuple[str, Any]:
        """Cholesky if all is positive. Else LU; A is positive iff S + W B⁻¹ Wᵀ has as many negative eigenvalues as S."""
        if is_wrapped({"": self.middle}):
            return "lu", torch.linalg.lu_factor(self.middle)
        if bool((signs > 0).all()) and bool((self.root > 0).all()):
            lower, info = torch.linalg.cholesky_ex(self.middle)
            if not bool(info.any()):
                return "cholesky", lower
        values = symmetric_eigvals(self.middle.detach())
        noise = noise_of(values, self.middle.shape[-1])
        if bool((values.abs() <= noise).any()) or not bool(values.isfinite().all()):
            raise SingularMetricError(NOT_POSITIVE.format(what="LowRank operator", detail=" (it is singular)"))
        if positive and bool(((values < 0).sum(-1) != (signs < 0).sum(-1)).any()):
            raise SingularMetricError(NOT_POSITIVE.format(what="LowRank operator", detail=" (it has a negative eigenvalue)"))
        return "lu", torch.linalg.lu_factor(self.middle)

    def within(self, columns: Tensor) -> Tensor:
        """(S + W B⁻¹ Wᵀ)⁻¹ of columns."""
        if self.kind == "cholesky":
            return torch.cholesky_solve(columns, self.factor)
        lu, pivots = self.factor
        return torch.linalg.lu_solve(lu, pivots, columns)

    def __call__(self, b: Blocks) -> Blocks:
        layout = self.operator.layout
        flat = layout.ravel(b)
        x = self._once(flat.to(self.rows.dtype))
        # one step of iterative refinement: the identity subtracts two large numbers where B is small beside the rest
        residual = sub(b, self.operator.mv(layout.unravel(x.to(flat.dtype))))
        x = x + self._once(layout.ravel(residual).to(x.dtype))
        return layout.unravel(x.to(flat.dtype))

    def _once(self, flat: Tensor) -> Tensor:
        root = self.root.squeeze(-2) if self.root.ndim > 1 else self.root
        over = flat / root
        if self.rows.ndim == 2 and flat.ndim > 1:  # all right-hand sides at once
            inside = self.within(self.rows @ over.reshape(-1, flat.shape[-1]).mT)
            return over - (inside.mT @ self.rows).reshape(flat.shape) / root
        inside = self.within(self.rows @ over.unsqueeze(-1))
        return over - (self.rows.mT @ inside).squeeze(-1) / root


def _regular(base: Multiple | Diagonal, positive: bool) -> Tensor:
    """The base as raveled entries, checked to be nonzero (A may be positive with a base that is not)."""
    flat = base.factor.unsqueeze(-1) if isinstance(base, Multiple) else base.layout.ravel(base.entries)
    check_diagonal(flat, False)
    return working(flat).unsqueeze(-2) if flat.ndim > 1 else working(flat)


def _woodbury(operator: LowRank, positive: bool) -> _Woodbury:
    """Remembered on the operator."""
    known: _Woodbury | None = getattr(operator, "woodbury", None)
    if known is not None and (known.kind == "cholesky" or not positive):
        return known
    found = _Woodbury(operator, positive)
    if not is_wrapped({"": found.middle}) and not found.middle.requires_grad:
        operator.woodbury = found  # pyright: ignore[reportAttributeAccessIssue]
    return found


def _is_thin(operator: LowRank) -> bool:
    """The factors say less than a dense matrix would."""
    return operator.base is not None or operator.rank < operator.dim


@solved.register
def _(operator: LowRank, b: Blocks, positive: bool) -> Blocks:
    return _woodbury(operator, positive)(b) if _is_thin(operator) else solved(densify(operator), b, positive)


@inverted.register
def _(operator: LowRank, positive: bool) -> LinearOperator:
    if not _is_thin(operator):
        return inverse(densify(operator), positive=positive)
    found = _woodbury(operator, positive)
    assert operator.base is not None
    definite = operator.definite or positive
    base = inverse(operator.base)
    if found.kind == "cholesky":
        rows = torch.linalg.solve_triangular(found.factor, found.rows / found.root, upper=False)
        signs = -torch.ones_like(rows[..., 0])
    else:
        values, vectors = symmetric_eigh(found.middle)
        rows, signs = vectors.mT @ (found.rows / found.root), -1 / values
    dtype = operator.like.dtype
    return LowRank(operator.layout, operator.layout.unravel(rows.to(dtype)), signs.to(dtype), base, definite=definite)


@slogdet.register
def _(operator: LowRank) -> tuple[Tensor, Tensor]:
    if not _is_thin(operator):
        return slogdet(densify(operator))
    rows, signs = signed_rows(operator)
    if operator.base is None:
        zero = rows.new_zeros(rows.shape[:-2])
        return zero, zero - torch.inf
    if not is_wrapped({"": rows}) and bool((operator.layout.ravel(diagonal(operator.base)) == 0).any()):
        return slogdet(densify(operator))
    root = _regular(operator.base, False)
    found: Any = torch.linalg.slogdet(torch.diag_embed(signs) + (rows / root) @ rows.mT)
    sign, log = slogdet(operator.base)
    return sign * found.sign * signs.prod(-1), log + found.logabsdet
