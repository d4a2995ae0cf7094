"""Any family of ``torch.distributions`` as a likelihood."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from geoad.curvature.likelihoods.base import Likelihood, described, readable
from geoad.curvature.likelihoods.information import core, fisher_product, is_known, unvalidated
from geoad.errors import GeometryError

__all__ = ["Family"]


class Family(Likelihood):
    r"""The family ``distribution(f)`` of ``torch.distributions``, with its own exact Fisher matrix.

    Args:
        distribution: the outputs (n, ..., c) to a distribution whose batch shape begins with (n, ...): the last axis holds
            the parameters of one factor, ``lambda f: Normal(f[..., 0], f[..., 1].exp())``, or each output is a factor of its
            own, ``lambda f: Exponential(f.exp())``. What is in one position of the outputs must not enter another's.
        hessian_type: say True if the outputs are natural parameters of an exponential family (up to a linear map).
        fisher: the product A(f) t, for families whose Fisher matrix is not known here.

    A is :math:`J^\top F(x)\, J` with F the Fisher matrix in the family's own parameters x (a closed form, a sum over a finite
    support, or the Hessian of a log-normalizer) and J their derivative by the outputs. `hessian` is that of -log p at the
    targets; it may be indefinite where the outputs are not natural parameters.

    >>> import torch
    >>> from torch.distributions import Normal
    >>> family = Family(lambda f: Normal(f[..., 0], f[..., 1].exp()))
    >>> family.fisher(torch.zeros(1, 2), torch.ones(1, 2))
    tensor([[1., 2.]])
    """

    def __init__(
        self,
        distribution: Callable[[Tensor], Distribution],
        hessian_type: bool = False,
        fisher: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        if not callable(distribution):
            raise GeometryError(
                f"Family needs a function of the outputs that returns a distribution, found {type(distribution).__name__}. For "
                "example Family(lambda f: torch.distributions.Exponential(f.exp()))."
            )
        self.distribution = distribution
        self.hessian_type = hessian_type
        self.own_fisher = fisher

    def is_exact(self, outputs: Tensor) -> bool:
        """True if `fisher` is available for what the outputs parametrise; else there are only draws of labels."""
        with unvalidated():
            return self.own_fisher is not None or is_known(self.distribution(outputs))

    def fisher(self, outputs: Tensor, t: Tensor) -> Tensor:
        if self.own_fisher is not None:
            return self.own_fisher(outputs, t)
        with unvalidated():
            return fisher_product(self.distribution, outputs, t)

    def nll(self, outputs: Tensor, targets: Any) -> Tensor:
        with unvalidated():
            distribution = self.distribution(outputs)
            self._require_shape(distribution, outputs, targets)
            log_p = distribution.log_prob(targets)
        return -(log_p.flatten(1).sum(1) if log_p.ndim > 1 else log_p)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        distribution = self.distribution(outputs.detach())
        if generator is None:
            return distribution.sample().detach()
        # distributions draw from the global generator only: it is seeded from the given one, and put back
        seed = int(torch.randint(1 << 62, (), generator=generator, device=generator.device))
        with _seeded(seed, outputs.device):
            return distribution.sample().detach()

    def check(self, outputs: Tensor) -> None:
        super().check(outputs)
        if readable(outputs):
            distribution = self._validated(lambda: self.distribution(outputs.detach()), "the outputs are no parameters of it")
        else:
            with unvalidated():
                distribution = self.distribution(outputs)
        if not isinstance(distribution, Distribution):
            raise GeometryError(
                f"the function of Family returned {type(distribution).__name__}, not a distribution of torch. Return "
                "the distribution itself, not its mean or a sample."
            )
        factors, shape = outputs.shape[:-1], core(distribution).batch_shape
        if shape[: len(factors)] != factors:
            raise GeometryError(
                f"for outputs of shape {tuple(outputs.shape)} the distribution's batch shape must begin with {tuple(factors)}, "
                f"found {tuple(shape)} ({type(core(distribution)).__name__}): samples and positions are independent, the last "
                "axis holds the parameters of one factor. Index the last axis (f[..., 0]), or flatten the network's outputs."
            )

    def check_targets(self, outputs: Tensor, targets: Any) -> None:
        super().check_targets(outputs, targets)
        with unvalidated():
            self._require_shape(self.distribution(outputs), outputs, targets)
        if readable(targets) and readable(outputs):
            self._validated(lambda: self.distribution(outputs.detach()).log_prob(targets), "a target cannot be a draw of it")

    def _require_shape(self, distribution: Distribution, outputs: Tensor, targets: Any) -> None:
        wanted = distribution.batch_shape + distribution.event_shape
        if not isinstance(targets, Tensor) or targets.shape != wanted:
            raise GeometryError(
                f"a draw of {type(distribution).__name__} for outputs of shape {tuple(outputs.shape)} has shape "
                f"{tuple(wanted)}, the targets are {described(targets)}. Broadcasting would pair samples with each other's "
                "targets; reshape them, e.g. y.squeeze(-1)."
            )

    def _validated(self, make: Callable[[], Any], problem: str) -> Any:
        """`make()` with the checks of torch.distributions, whose errors are told as geoad's."""
        before = torch.distributions.Distribution._validate_args  # pyright: ignore
        Distribution.set_default_validate_args(True)
        try:
            return make()
        except ValueError as error:
            raise GeometryError(
                f"the distribution of Family refuses: {problem} ({error}). Map the outputs into its parameters' domain inside "
                "of the function (exp or softplus for scales, logits= for probabilities), and recode targets outside of the "
                "support."
            ) from error
        finally:
            Distribution.set_default_validate_args(before)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Generator[None]:
    """torch's global generators of the CPU and of `device` start from `seed`; afterwards they are as they were."""
    on_cpu = device.type == "cpu"
    # without devices the kind is not used, and "cuda" exists in every build
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also change devices that are not put back
        if not on_cpu:
            module: Any = torch.get_device_module(device)
            with module.device(device):
                module.manual_seed(seed)
        yield
