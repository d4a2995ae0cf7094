"""The generalised Gauss-Newton matrix of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from geoad.charts import Chart
from geoad.curvature.likelihoods import Categorical, Likelihood, likelihood_of
from geoad.curvature.likelihoods.base import seeds_of
from geoad.curvature.likelihoods.roots import Seeds
from geoad.curvature.likelihoods.weights import cross_entropy_of
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
    and its matrix is twice that of "gaussian". The mean of ``F.cross_entropy`` is weighted by the class weights of the labels
    of a batch that are not ignored. ``reduction="sum"`` is N times the mean, whatever the loss; ``geo.loss(F.mse_loss, data,
    reduction="sum")`` hands it to torch instead: its matrix is that of the module with a sum of its own.

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
        self.weighing = cross_entropy_of(given)
        super().__init__(
            geo,
            data,
            likelihood_of(given) if self.weighing is None else Categorical(axis=1, ignore_index=self.weighing.ignore_index),
            outputs=None if outputs is None else selecting(outputs),
            chart=chart,
            representation=representation,
            reduction=reduction,
            max_memory=max_memory,
            progress=progress,
            compile=compile,
        )
        self.of_loss = not isinstance(given, (str, Likelihood))
        self.averaged = getattr(self.weighing or given, "reduction", "mean") == "mean"
        self.hessian_type = self.likelihood.hessian_type and not self.structure.imposed
        self.signed = not getattr(self.likelihood, "positive", True)
        self.value_class = Form if self.signed else Metric

    def labels(self, outputs: Tensor, targets: Any, batch: int) -> Any:
        # a mean of torch is divided by a number of the whole batch, which a chunk of it cannot count
        share = None if self.weighing is None else self.weighing.shares(targets)
        return targets if share is None else (targets, share)

    def _split(self, labels: Any) -> tuple[Any, Tensor | None]:
        """The targets, and what each position counts for."""
        weighed = self.weighing is not None and isinstance(labels, tuple)
        return cast("tuple[Any, Tensor]", labels) if weighed else (labels, None)

    def _factor(self, outputs: Tensor) -> float:
        """What a loss of torch is of the likelihood: its mean also runs over outputs and positions, its sum does not."""
        return self.likelihood.mean_factor(outputs.shape if self.averaged else (1, 1)) if self.of_loss else 1.0

    def _needs_labels(self, outputs: Tensor, labels: Any) -> bool:
        if self.weighing is not None:
            self.weighing.check(outputs)
        if labels is None and self.likelihood.hessian_type:
            return False
        self.likelihood.check_targets(outputs, labels)
        return True

    def seeds(self, outputs: Tensor, labels: Any) -> Seeds:
        targets, share = self._split(labels)
        targets = targets if self._needs_labels(outputs, targets) else None
        found = seeds_of(self.likelihood, outputs, targets).scaled(self._factor(outputs) ** 0.5)
        return found if share is None else found.scaled(share.to(outputs.dtype).sqrt().reshape(len(share), -1, 1))

    def bend(self, outputs: Tensor, t: Tensor, labels: Any) -> Tensor:
        likelihood, factor = self.likelihood, self._factor(outputs)
        targets, share = self._split(labels)
        if not self._needs_labels(outputs, targets):
            return factor * likelihood.fisher(outputs, t)
        bent = factor * likelihood.hessian(outputs, targets, t)
        return bent if share is None else share.to(outputs.dtype).unsqueeze(1) * bent
