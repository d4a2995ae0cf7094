"""Likelihoods by name, and by the loss of torch that belongs to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn import functional

from geoad.curvature.likelihoods.base import Likelihood
from geoad.curvature.likelihoods.categorical import Categorical
from geoad.curvature.likelihoods.elementwise import Bernoulli, Poisson
from geoad.curvature.likelihoods.gaussian import Gaussian
from geoad.curvature.likelihoods.general import Loss
from geoad.errors import GeometryError

__all__ = ["likelihood_of"]

_NAMED: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "categorical": Categorical,
    "gaussian": Gaussian,
    "poisson": Poisson,
}

_FUNCTIONS: dict[Any, Callable[[], Likelihood]] = {
    functional.binary_cross_entropy_with_logits: Bernoulli,
    functional.cross_entropy: lambda: Categorical(axis=1, ignore_index=-100),
    functional.mse_loss: Gaussian,
    # its outputs are log p, and softmax(log p) = p: the same family; as a plain loss it would be linear, without curvature
    functional.nll_loss: lambda: Categorical(axis=1, ignore_index=-100),
    functional.poisson_nll_loss: Poisson,
}


def likelihood_of(likelihood: Any) -> Likelihood:
    """A likelihood by name, as given, or of a loss.

    A name: "bernoulli", "categorical", "gaussian" or "poisson". A loss of torch, as a function or as a module, gives the
    likelihood whose -log p it is, with torch's conventions (``F.cross_entropy`` has its classes in axis 1 and ignores -100);
    its ``reduction`` plays no part, see `Likelihood.mean_factor`. Weighted or smoothed ones and every other callable become a
    `Loss`, which has a Gauss-Newton matrix but no Fisher (`geoad.curvature.GGN` knows the weights of a cross-entropy itself).

    Raises:
        GeometryError: it is none of these.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str) and likelihood in _NAMED:
        return _NAMED[likelihood]()
    if isinstance(likelihood, nn.Module):
        return _of_module(likelihood)
    if isinstance(likelihood, type):
        raise GeometryError(
            f"likelihood= needs an instance, found the class {likelihood.__name__}. Call it: {likelihood.__name__}()."
        )
    if callable(likelihood):
        loss: Any = likelihood
        return _FUNCTIONS[loss]() if loss in _FUNCTIONS else Loss(loss)
    raise GeometryError(
        f"likelihood={likelihood!r} is not known. Use one of {sorted(_NAMED)}, a loss, e.g. torch.nn.functional.cross_entropy, "
        "or an instance such as geoad.curvature.Gaussian(covariance) or your own geoad.curvature.Likelihood."
    )


def _of_module(module: Any) -> Likelihood:
    kind = type(module)
    weight = getattr(module, "weight", None)
    if kind is nn.CrossEntropyLoss and weight is None and module.label_smoothing == 0:
        return Categorical(axis=1, ignore_index=module.ignore_index)
    if kind is nn.NLLLoss and weight is None:
        return Categorical(axis=1, ignore_index=module.ignore_index)
    if kind is nn.MSELoss:
        return Gaussian()
    if kind is nn.BCEWithLogitsLoss and weight is None and module.pos_weight is None:
        return Bernoulli()
    if kind is nn.PoissonNLLLoss and module.log_input:
        return Poisson()
    return Loss(module)
