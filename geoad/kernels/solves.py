"""Solves and determinants whose second derivatives are right.

The forward-mode formulas of torch 2.13 for ``linalg.solve`` (with respect to the matrix), ``solve_ex``, ``det``, ``slogdet``,
``logdet`` and ``householder_product`` treat saved factors as constants: any derivative of their jvp is wrong in silence, by
order one (``jacfwd(jacfwd(f))``, ``jacrev(jacfwd(f))``, ``backward`` through a jvp; jvp of vjp is right). LU factors,
triangular solves and inverses are right, so these are written with them here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from geoad.kernels.spelled import FormulaMode, depth

__all__ = ["FORMULAS", "SpelledOutSolves", "exact_solves", "slogdet", "solve"]


def exact_solves() -> AbstractContextManager[Any]:
    """`SpelledOutSolves` under a ``torch.func`` transform (or the compiler, where they are not seen), else nothing."""
    return SpelledOutSolves() if depth() > 0 else nullcontext()


class SpelledOutSolves(FormulaMode):
    """Functions of torch's that hold a solve or a determinant, by LU factors.

    >>> import torch
    >>> from geoad.kernels.solves import SpelledOutSolves
    >>> def half(x):
    ...     return torch.linalg.solve(torch.eye(2) * x, torch.ones(2)).sum()
    >>> with SpelledOutSolves():
    ...     torch.func.jacfwd(torch.func.jacfwd(half))(torch.tensor(2.0))
    tensor(0.5000)
    """


def solve(A: Tensor, B: Tensor, *, left: bool = True, out: Tensor | None = None) -> Tensor:
    """A⁻¹ B (``left=False``: B A⁻¹), as ``torch.linalg.solve``; where A is singular the result is not finite."""
    vector = B.ndim == 1 or (A.ndim - 1 == B.ndim and B.shape == A.shape[:-1])
    factors, pivots, _ = torch.linalg.lu_factor_ex(A)
    found = torch.linalg.lu_solve(factors, pivots, B.unsqueeze(-1) if vector else B, left=left)
    found = found.squeeze(-1) if vector else found
    return found if out is None else out.copy_(found)


def slogdet(A: Tensor) -> tuple[Tensor, Tensor]:
    """The sign and the logarithm of the absolute value of det A."""
    diagonal, parity = _diagonal(A)
    return parity * diagonal.sign().prod(-1), diagonal.abs().log().sum(-1)


def _diagonal(A: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal of U in PA = LU, and the sign of P."""
    factors, pivots, _ = torch.linalg.lu_factor_ex(A)
    swaps = (pivots != torch.arange(1, A.shape[-1] + 1, device=A.device)).sum(-1)
    return factors.diagonal(dim1=-2, dim2=-1), (1 - 2 * (swaps % 2)).to(A.dtype)


def _det(A: Tensor) -> Tensor:
    diagonal, parity = _diagonal(A)
    return parity * diagonal.prod(-1)


def _slogdet(A: Tensor) -> Any:
    return torch.return_types.linalg_slogdet(slogdet(A))  # pyright: ignore


def _logdet(A: Tensor) -> Tensor:
    sign, size = slogdet(A)
    return torch.where(sign > 0, size, torch.where(sign < 0, torch.nan, -torch.inf))


def _solve_ex(A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False) -> Any:
    info = torch.linalg.lu_factor_ex(A, check_errors=check_errors).info
    return torch.return_types.linalg_solve_ex((solve(A, B, left=left), info))  # pyright: ignore


def _householder(A: Tensor, tau: Tensor) -> Tensor:
    """The first columns of the product of the reflections I - τ v vᵀ, v the columns of A below a unit diagonal."""
    n, k = A.shape[-2:]
    unit = torch.eye(n, k, dtype=A.dtype, device=A.device)
    vectors, found = A.tril(-1) + unit, unit
    for i in reversed(range(tau.shape[-1])):
        v = vectors[..., i : i + 1]
        found = found - tau[..., i : i + 1, None] * v @ (v.mH @ found)
    return found


FORMULAS: dict[Any, Callable[..., Any]] = {
    torch.linalg.solve: solve,
    torch.linalg.solve_ex: _solve_ex,
    torch.linalg.slogdet: _slogdet,
    torch.slogdet: _slogdet,
    torch.Tensor.slogdet: _slogdet,
    torch.linalg.det: _det,
    torch.det: _det,
    torch.Tensor.det: _det,
    torch.logdet: _logdet,
    torch.Tensor.logdet: _logdet,
    torch.linalg.householder_product: _householder,
}
SpelledOutSolves.formulas = FORMULAS
