"""The generalised Gauss-Newton matrix of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from geoad.charts import Chart
from geoad.curvature.likelihoods import Likelihood, likelihood_of
from geoad.curvature.likelihoods.base import seeds_of
from geoad.curvature.likelihoods.roots import Seeds
from geoad.curvature.network import NetworkCurvature
from geoad.curvature.selection import selecting
from geoad.tensors import Form, Metric

if TYPE_CHECKING:
    from geoad.module import GeoModule

__all__ = ["GGN"]


class GGN(NetworkCurvature):
    r"""The generalised Gauss-Newton matrix :math:`\frac1N \sum_n J_n^\top \nabla^2_f \ell(f_n, y_n)\, J_n`, a metric field.

    It is the Hessian of the loss with the network linearised, positive semidefinite for losses that are convex in the outputs
    (Schraudolph 2002). For the likelihoods of exponential families in natural parameters it is the exact Fisher matrix.

    Args:
        geo: the network.
        data: (x, y), a mapping, a list of batches or a ``DataLoader``.
        likelihood: the loss: a likelihood by name or as an object, a torch loss such as ``F.cross_entropy``, any function of
            (outputs, targets), or `geoad.curvature.OutputMatrix` for a general pull-back JᵀA(f, y)J.
        loss: the same; says what is meant where it is no likelihood.
        chart, representation, reduction, outputs, max_memory, progress, compile: as for `geoad.curvature.Fisher`.

    Raises:
        GeometryError: as for `geoad.curvature.Fisher`.

    Averaged over the samples, as the Fisher matrix. A loss of torch is taken as it is: the mean of ``F.mse_loss`` also runs
    over the c outputs, so that its matrix is 2/c times that of "gaussian"; ``torch.nn.MSELoss(reduction="sum")`` adds them up,
    and its matrix is twice that of "gaussian".

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(2, 3))
    >>> data = torch.randn(5, 2), torch.randint(3, (5,))
    >>> geoad.curvature.GGN(geo, data, torch.nn.functional.cross_entropy)(geo.point())
    Metric('theta', dim=9, curvatureoperator, float32, cpu)
    """

    def __init__(
        self,
        geo: GeoModule,
        data: Any,
        likelihood: str | Likelihood | Callable[..., Tensor] = "categorical",
        chart: Chart | None = None,
        representation: Any = "implicit",
        reduction: str = "mean",
        *,
        loss: str | Likelihood | Callable[..., Tensor] | None = None,
        outputs: Any = None,
        max_memory: int = 1 << 28,
        progress: bool = False,
        compile: bool = False,
    ) -> None:
        given: Any = likelihood if loss is None else loss
        super().__init__(
            geo,
            data,
            likelihood_of(given),
            outputs=None if outputs is None else selecting(outputs),
            chart=chart,
            representation=representation,
            reduction=reduction,
            max_memory=max_memory,
            progress=progress,
            compile=compile,
        )
        self.of_loss = not isinstance(given, (str, Likelihood))
        self.averaged = getattr(given, "reduction", "mean") == "mean"
        self.hessian_type = self.likelihood.hessian_type and not self.structure.imposed
        self.signed = not getattr(self.likelihood, "positive", True)
        self.value_class = Form if self.signed else Metric

    def labels(self, outputs: Tensor, targets: Any, batch: int) -> Any:
        return targets

    def _factor(self, outputs: Tensor) -> float:
        """What a loss of torch is of the likelihood: its mean also runs over outputs and positions, its sum does not."""
        return self.likelihood.mean_factor(outputs.shape if self.averaged else (1, 1)) if self.of_loss else 1.0

    def _needs_labels(self, outputs: Tensor, labels: Any) -> bool:
        if labels is None and self.likelihood.hessian_type:
            return False
        self.likelihood.check_targets(outputs, labels)
        return True

    def seeds(self, outputs: Tensor, labels: Any) -> Seeds:
        targets = labels if self._needs_labels(outputs, labels) else None
        return seeds_of(self.likelihood, outputs, targets).scaled(self._factor(outputs) ** 0.5)

    def bend(self, outputs: Tensor, t: Tensor, labels: Any) -> Tensor:
        likelihood, factor = self.likelihood, self._factor(outputs)
        if not self._needs_labels(outputs, labels):
            return factor * likelihood.fisher(outputs, t)
        return factor * likelihood.hessian(outputs, labels, t)
