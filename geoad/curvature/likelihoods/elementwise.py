"""One number each: yes-no answers and counts, with one natural parameter an output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from geoad.curvature.likelihoods.base import RealTargets, readable
from geoad.curvature.likelihoods.roots import Seeds, of_samples, wide
from geoad.errors import GeometryError
from geoad.kernels.conditions import holds

__all__ = ["Bernoulli", "Poisson"]


class Bernoulli(RealTargets):
    """Independent yes-no answers with the logits f, p = σ(f): A = diag(p (1 - p)).

    Targets have the shape of the outputs: 0 and 1, bool, or probabilities. The mean of ``F.binary_cross_entropy_with_logits``
    runs over samples and outputs: with C outputs a sample its Gauss-Newton matrix is 1/C times the mean of this Fisher over the
    samples.
    """

    def fisher(self, outputs: Tensor, t: Tensor) -> Tensor:
        return outputs.sigmoid() * (-outputs).sigmoid() * t

    def nll(self, outputs: Tensor, targets: Any) -> Tensor:
        y = self.real(outputs, targets)
        return of_samples((1 - y) * outputs - functional.logsigmoid(outputs))

    def score(self, outputs: Tensor, targets: Any) -> Tensor:
        y = self.real(outputs, targets)
        return y * (-outputs).sigmoid() - (1 - y) * outputs.sigmoid()  # y - p, with all digits where p is near y

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(wide(outputs.detach()).sigmoid(), generator=generator).to(outputs.dtype)

    def seeds(self, outputs: Tensor, targets: Any = None) -> Seeds:
        # from logarithms: the square root of an underflown product would be 0, with an infinite derivative
        return Seeds.of_diagonal((0.5 * (functional.logsigmoid(outputs) + functional.logsigmoid(-outputs))).exp())

    def check_targets(self, outputs: Tensor, targets: Any) -> None:
        super().check_targets(outputs, targets)
        y = self.real(outputs, targets)
        if readable(y) and not holds(((y >= 0) & (y <= 1)).all()):
            raise GeometryError(
                f"targets of a Bernoulli likelihood lie between 0 and 1, found {float(y.min()):.4g} to {float(y.max()):.4g}. "
                "Recode them (-1 and 1: (y + 1) / 2), or use 'categorical' for more classes."
            )


class Poisson(RealTargets):
    """Independent counts with the logarithm f of their rates: A = diag(exp f).

    Targets have the shape of the outputs and are not negative. As ``F.poisson_nll_loss`` with ``log_input=True``, plus log y!;
    its mean runs over samples and outputs, see `Bernoulli`.
    """

    def fisher(self, outputs: Tensor, t: Tensor) -> Tensor:
        return outputs.exp() * t

    def nll(self, outputs: Tensor, targets: Any) -> Tensor:
        y = self.real(outputs, targets)
        return of_samples(outputs.exp() - y * outputs + (y + 1).lgamma())

    def score(self, outputs: Tensor, targets: Any) -> Tensor:
        return self.real(outputs, targets) - outputs.exp()

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        # stays in float32 for half precision, which has no 257
        return torch.poisson(wide(outputs.detach()).exp(), generator=generator)

    def seeds(self, outputs: Tensor, targets: Any = None) -> Seeds:
        return Seeds.of_diagonal((0.5 * outputs).exp())

    def check_targets(self, outputs: Tensor, targets: Any) -> None:
        super().check_targets(outputs, targets)
        y = self.real(outputs, targets)
        if readable(y) and not holds((y >= 0).all()):
            raise GeometryError(
                f"the targets of a Poisson likelihood are counts, found {float(y.min()):.4g} as the smallest. Real numbers of "
                "either sign go with 'gaussian'."
            )
