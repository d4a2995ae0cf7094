"""Eigendecompositions of symmetric matrices that do not fail, and powers of their eigenvalues."""

from __future__ import annotations

import torch
from torch import Tensor

from geoad.errors import GeometryError, SingularMetricError
from geoad.operators.solve import NOT_POSITIVE, require_finite, working
from geoad.params import is_wrapped

__all__ = ["matrix_power", "powers", "symmetric_eigh", "symmetric_eigvals"]


def symmetric_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix (*, n, n), in its dtype.

    Half precision is decomposed in float32. Where LAPACK does not converge in float32, or returns nan (it does both for large
    matrices of low rank with rows of zeros), the matrix is decomposed in float64.
    """
    numbers = working(matrix)
    if is_wrapped({"": matrix}):
        values, vectors = torch.linalg.eigh(numbers)
        return values.to(matrix.dtype), vectors.to(matrix.dtype)
    require_finite(numbers)
    found = _decomposed(numbers)
    if found is None and numbers.dtype != torch.float64:
        found = _decomposed(numbers.double())
    if found is None:
        raise GeometryError(
            f"LAPACK did not find the eigenvalues of a symmetric matrix of shape {tuple(matrix.shape)} in float64. Its "
            "entries are finite; check their scale, and add a multiple of a metric: B + lam * G."
        )
    values, vectors = found
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def _decomposed(numbers: Tensor) -> tuple[Tensor, Tensor] | None:
    """None where the algorithm fails."""
    try:
        values, vectors = torch.linalg.eigh(numbers)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return None
    return (values, vectors) if bool(vectors.isfinite().all()) else None


def symmetric_eigvals(matrix: Tensor) -> Tensor:
    """Eigenvalues, ascending, of a symmetric matrix (*, n, n), in its dtype; where LAPACK fails in float32, by float64."""
    numbers = working(matrix)
    try:
        return torch.linalg.eigvalsh(numbers).to(matrix.dtype)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        if numbers.dtype == torch.float64 or is_wrapped({"": matrix}):
            raise
    return torch.linalg.eigvalsh(numbers.double()).to(matrix.dtype)


def powers(values: Tensor, p: float, what: str, *, noise: float | Tensor = 0.0) -> Tensor:
    """λ^p of the eigenvalues of a symmetric matrix; those within `noise` of zero count as zero.

    Raises:
        SingularMetricError: a zero eigenvalue with p < 0, or a negative one with a p that is not an integer.
    """
    if is_wrapped({"": values}):
        return values**p
    given = values.detach()
    if not float(p).is_integer():
        if bool((given < -noise).any()):
            raise SingularMetricError(
                f"the power {p:g} of a {what} was asked for, but it has a negative eigenvalue ({float(given.min()):.3g}): real "
                "powers need a positive matrix. Use an integer power, or add a multiple of a metric: B + lam * G."
            )
        values = values.clamp_min(0)
    if p < 0 and bool((given.abs() <= noise).any()):
        detail = f" (its smallest eigenvalue is {float(given.abs().min()):.3g}, the largest {float(given.abs().max()):.3g})"
        raise SingularMetricError(NOT_POSITIVE.format(what=what, detail=detail))
    return values**p


def noise_of(values: Tensor, size: int) -> Tensor:
    """Computed eigenvalues of a matrix of this size are not known better than this."""
    top = values.detach().abs().amax() if values.numel() else values.new_zeros(())
    return size * torch.finfo(values.dtype).eps * top


def matrix_power(matrix: Tensor, p: float, what: str = "symmetric operator") -> Tensor:
    """A^p of a symmetric matrix (*, n, n): any integer p, real p for a positive one; see `powers`."""
    if p >= 0 and float(p).is_integer():
        return torch.linalg.matrix_power(matrix, int(p))
    values, vectors = symmetric_eigh(matrix)
    raised = powers(values, p, what, noise=noise_of(values, matrix.shape[-1]))
    return (vectors * raised.unsqueeze(-2)) @ vectors.mT
