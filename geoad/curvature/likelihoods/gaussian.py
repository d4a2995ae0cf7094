"""Regression: a Gaussian with fixed covariance around the outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geoad.curvature.likelihoods.base import RealTargets
from geoad.curvature.likelihoods.roots import Seeds, numbers_of_a_sample, of_samples, wide
from geoad.errors import GeometryError, SingularMetricError

__all__ = ["Gaussian"]


class Gaussian(RealTargets):
    """N(f, Σ) with fixed covariance: A = Σ⁻¹, so that the Fisher of the parameters is JᵀΣ⁻¹J.

    Args:
        covariance: a positive number (σ², the same for all outputs), the diagonal (c,), or the whole matrix (c, c). Default 1.

    With σ² = 1 the negative log-likelihood of a sample is ½|y - f|² + const; ``F.mse_loss`` with reduction="mean" is 2/C times
    that, C the number of outputs of a sample. `nll` includes ½ log det 2πΣ, so that noise levels can be compared. The root is
    made of the rows of L⁻¹, Σ = L Lᵀ. For a variance that is itself an output, see `Family`.
    """

    def __init__(self, covariance: float | Tensor = 1.0) -> None:
        # numbers keep all their digits, whatever the default dtype is
        self.number = None if isinstance(covariance, Tensor) else float(covariance)
        given = covariance if isinstance(covariance, Tensor) else torch.tensor(covariance, dtype=torch.float64, device="cpu")
        self.covariance = given if given.is_floating_point() else given.to(torch.float64)
        if self.covariance.ndim < 2:
            if not bool(((self.covariance > 0) & self.covariance.isfinite()).all()):
                raise SingularMetricError(f"variances must be positive, found {covariance}. Pass σ² > 0.")
            return
        square = self.covariance.ndim == 2 and self.covariance.shape[0] == self.covariance.shape[1]
        if not square:
            raise GeometryError(
                f"a covariance is a number, c variances or a (c, c) matrix, found shape {tuple(self.covariance.shape)}. One "
                "that differs between samples is an output of the network: use Family."
            )
        _, info = torch.linalg.cholesky_ex(wide(self.covariance))
        if int(info) or not torch.allclose(self.covariance, self.covariance.mT):
            raise SingularMetricError(
                "the covariance matrix must be symmetric and positive definite. Check it, or add a multiple of I."
            )

    def fisher(self, outputs: Tensor, t: Tensor) -> Tensor:
        if self.covariance.ndim < 2:
            return t / self._covariance(t)
        whitening = self._whitening(t)
        return t @ (whitening.mT @ whitening)

    def nll(self, outputs: Tensor, targets: Any) -> Tensor:
        residual = self.real(outputs, targets) - outputs
        return 0.5 * of_samples(residual * self.fisher(outputs, residual)) + self._log_normalizer(outputs)

    def score(self, outputs: Tensor, targets: Any) -> Tensor:
        return self.fisher(outputs, self.real(outputs, targets) - outputs)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean = outputs.detach()
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        if self.covariance.ndim < 2:
            return mean + self._covariance(mean).detach().sqrt() * noise
        factor = _cholesky(self._wide_covariance(mean).detach()).to(mean.dtype)
        return mean + noise @ factor.mT

    def seeds(self, outputs: Tensor, targets: Any = None) -> Seeds:
        if self.covariance.ndim < 2:
            return Seeds.of_diagonal(self._covariance(outputs).rsqrt().expand(outputs.shape))
        rows = self._whitening(outputs)
        c = rows.shape[0]
        return Seeds.at_positions(rows.reshape(c, *(1,) * (outputs.ndim - 1), c).expand(c, *outputs.shape))

    def mean_factor(self, outputs_shape: Sequence[int]) -> float:
        """The factor to ``F.mse_loss``: 2σ²/C, for one σ² only."""
        if self.covariance.numel() > 1:
            return super(RealTargets, self).mean_factor(outputs_shape)
        return 2 * (float(self.covariance) if self.number is None else self.number) / numbers_of_a_sample(outputs_shape)

    def check(self, outputs: Tensor) -> None:
        super().check(outputs)
        size, c = self.covariance.shape[-1:].numel(), _last(outputs)
        unfit = self.covariance.ndim and size != c and not (self.covariance.ndim == 1 and size == 1)
        if unfit or (self.covariance.ndim == 2 and outputs.ndim == 1):
            raise GeometryError(
                f"the covariance is for {size} outputs, the network has {c} (shape {tuple(outputs.shape)}). Pass a number, {c} "
                "variances or a matrix of that size."
            )

    def _covariance(self, like: Tensor) -> Tensor:
        if self.number is not None:  # made there: nothing is sent to a device
            return like.new_full((), self.number)
        return self.covariance.to(device=like.device, dtype=like.dtype)

    def _wide_covariance(self, like: Tensor) -> Tensor:
        return wide(self.covariance.to(like.device, torch.promote_types(self.covariance.dtype, like.dtype)))

    def _whitening(self, like: Tensor) -> Tensor:
        """L⁻¹ with Σ = L Lᵀ, computed in the wider precision of Σ and `like`."""
        factor = _cholesky(self._wide_covariance(like))
        eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, eye, upper=False).to(like.dtype)

    def _log_normalizer(self, outputs: Tensor) -> Tensor:
        """½ log det 2πΣ of a sample."""
        count = numbers_of_a_sample(outputs.shape)
        if self.covariance.ndim == 2:
            factor = _cholesky(self._wide_covariance(outputs))
            logdet = 2 * factor.diagonal().log().sum() * (count // len(factor))
        else:
            variances = self._covariance(wide(outputs)).expand(_last(outputs))
            logdet = variances.log().sum() * (count // max(_last(outputs), 1))
        return (0.5 * (logdet + count * math.log(2 * math.pi))).to(outputs.dtype)


def _last(outputs: Tensor) -> int:
    """c; outputs (n,) are one number for each sample."""
    return outputs.shape[-1] if outputs.ndim > 1 else 1


def _cholesky(covariance: Tensor) -> Tensor:
    """The factor of a matrix that is known to be positive definite: torch.linalg.cholesky waits for the device to check it."""
    return torch.linalg.cholesky_ex(covariance)[0]
