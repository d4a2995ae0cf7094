"""Likelihoods: what the outputs of a network parametrise, and the curvature A(f) of -log p in output space."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from geoad.errors import GeometryError, SingularMetricError

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood", "Poisson", "likelihood_of"]


class Likelihood(ABC):
    """A family p(y | f) with parameters f, the network's outputs of shape (n, ..., c): the last axis belongs together.

    Attributes:
        hessian_type: A is the Hessian in f of a potential, so ∂A is symmetric in all three indices (natural parameters).
    """

    hessian_type: bool = True

    @abstractmethod
    def fisher(self, outputs: Tensor, t: Tensor) -> Tensor:
        """A(f) t with A = E_y[∇ log p ∇ log pᵀ], the Fisher matrix of the family; t has the shape of the outputs."""

    def check(self, outputs: Tensor) -> None:
        """Raise if the outputs cannot be parameters of this family."""
        if outputs.ndim < 2:
            raise GeometryError(
                "the likelihood needs outputs of shape (n, ..., c), samples in front and parameters last, found "
                f"{tuple(outputs.shape)}. Give the network a batch axis and an output axis (.unsqueeze(-1) for one output)."
            )


class Categorical(Likelihood):
    """Class probabilities softmax(f), f the logits: A = diag(p) - p pᵀ."""

    def fisher(self, outputs: Tensor, t: Tensor) -> Tensor:
        p = outputs.softmax(-1)
        return p * (t - (p * t).sum(-1, keepdim=True))

    def check(self, outputs: Tensor) -> None:
        super().check(outputs)
        if outputs.shape[-1] < 2:
            raise GeometryError(
                f"a categorical likelihood needs at least two logits, found outputs of shape {tuple(outputs.shape)}: the "
                "softmax of one logit is 1 and its Fisher is zero. Use two outputs."
            )


class Bernoulli(Likelihood):
    """Independent yes-no answers with the logits f, p = σ(f): A = diag(p (1 - p)).

    The mean of ``F.binary_cross_entropy_with_logits`` runs over samples and outputs: with c outputs its Gauss-Newton matrix is
    1/c times the mean of this Fisher over the samples.
    """

    def fisher(self, outputs: Tensor, t: Tensor) -> Tensor:
        return outputs.sigmoid() * (-outputs).sigmoid() * t


class Poisson(Likelihood):
    """Independent counts with the logarithm f of their rates: A = diag(exp f).

    As ``F.poisson_nll_loss`` with ``log_input=True``; its mean runs over samples and outputs, see `Bernoulli`.
    """

    def fisher(self, outputs: Tensor, t: Tensor) -> Tensor:
        return outputs.exp() * t


class Gaussian(Likelihood):
    """N(f, Σ) with fixed covariance: A = Σ⁻¹, so that the Fisher of the parameters is JᵀΣ⁻¹J.

    Args:
        covariance: a positive number (σ², the same for all outputs), the diagonal (c,), or the whole matrix (c, c). Default 1.

    With σ² = 1 the negative log-likelihood of a sample is ½|y - f|² + const; ``F.mse_loss`` with reduction="mean" is 2/c times
    that.
    """

    def __init__(self, covariance: float | Tensor = 1.0) -> None:
        self.covariance = torch.as_tensor(covariance)
        if self.covariance.ndim < 2:
            if not bool((self.covariance > 0).all()):
                raise SingularMetricError(f"variances must be positive, found {covariance}. Pass σ² > 0.")
            return
        _, info = torch.linalg.cholesky_ex(self.covariance)
        symmetric = torch.allclose(self.covariance, self.covariance.mT)
        if int(info) or not symmetric:
            raise SingularMetricError(
                "the covariance matrix must be symmetric and positive definite. Check it, or add a multiple of I."
            )

    def fisher(self, outputs: Tensor, t: Tensor) -> Tensor:
        covariance = self.covariance.to(device=t.device, dtype=t.dtype)
        if covariance.ndim < 2:
            return t / covariance
        return t @ torch.cholesky_inverse(torch.linalg.cholesky(covariance))

    def check(self, outputs: Tensor) -> None:
        super().check(outputs)
        if self.covariance.ndim and self.covariance.shape[-1] not in (1, outputs.shape[-1]):
            raise GeometryError(
                f"the covariance is for {self.covariance.shape[-1]} outputs, the network has {outputs.shape[-1]} (shape "
                f"{tuple(outputs.shape)}). Pass a number, {outputs.shape[-1]} variances or a matrix of that size."
            )


_NAMED: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "categorical": Categorical,
    "gaussian": Gaussian,
    "poisson": Poisson,
}


def likelihood_of(likelihood: Any) -> Likelihood:
    """A likelihood by name, or as given."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    if likelihood in _NAMED:
        return _NAMED[likelihood]()
    raise GeometryError(
        f"likelihood={likelihood!r} is not known. Use one of {sorted(_NAMED)}, or an instance such as "
        "geoad.curvature.Gaussian(covariance) or your own geoad.curvature.Likelihood."
    )
