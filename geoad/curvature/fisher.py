"""The Fisher information of a network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geoad.charts import Chart
from geoad.curvature.likelihoods import Likelihood, likelihood_of
from geoad.curvature.pullback import OutputCurvature, Part
from geoad.data import Batches, take
from geoad.errors import GeometryError
from geoad.kernels.gram import GramSum, memory_of_a_sample
from geoad.kernels.layered import block_jacobians, plan_of
from geoad.params import Blocks, is_wrapped

if TYPE_CHECKING:
    from geoad.module import GeoModule

__all__ = ["Fisher"]


class Fisher(OutputCurvature):
    r"""The exact (type-2) Fisher metric :math:`\frac1N \sum_n J_n^\top A(f_n) J_n`, a metric field.

    A(f) is the Fisher matrix of the likelihood in its output parameters, so no labels are used. For the likelihoods here, whose
    outputs are natural parameters (or the mean of a Gaussian), it equals the generalised Gauss-Newton matrix of -log p.

    Args:
        geo: the network.
        data: (x, y), x alone as a tensor, a mapping, a list of batches or a ``DataLoader``; targets are ignored.
        likelihood: "categorical" (logits), "bernoulli" (logits), "poisson" (log-rates), "gaussian" (mean, unit covariance), or
            a `Likelihood` such as ``Gaussian(covariance)``, also one of your own.
        kind: "exact".
        chart: where the numbers are computed; the exact Fisher is the same object for every choice. Default: the reference
            chart.
        representation: "implicit" (matrix-free: one jvp and one vjp a product) or "dense".
        reduction: "mean" or "sum" over the samples. The mean goes with ``F.cross_entropy`` (factor 1) and with ``F.mse_loss``
            (its Hessian is 2/c times the Gaussian Fisher with unit covariance).

    It is semidefinite: ``sharp`` and ``solve`` raise `SingularMetricError` unless it is damped, e.g.
    ``Fisher(...) + 1e-3 * Euclidean(geo.reference)``.

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(2, 3))
    >>> F = geoad.curvature.Fisher(geo, torch.randn(5, 2), "categorical")
    >>> F(geo.point())
    Metric('theta', dim=9, curvatureoperator, float32, cpu)
    """

    def __init__(
        self,
        geo: GeoModule,
        data: Any,
        likelihood: str | Likelihood = "categorical",
        kind: str = "exact",
        chart: Chart | None = None,
        representation: str = "implicit",
        reduction: str = "mean",
        max_memory: int = 1 << 28,
    ) -> None:
        _require("kind", kind, ("exact",))
        _require("representation", representation, ("implicit", "dense"))
        _require("reduction", reduction, ("mean", "sum"))
        if not callable(getattr(geo, "evaluate", None)):
            raise GeometryError(
                f"a Fisher matrix belongs to a network, found {type(geo).__name__}. Pass the geoad.GeoModule; bare networks "
                "have no chart."
            )
        super().__init__(chart or geo.reference, representation)
        if self.home.reference != geo.reference:
            raise GeometryError(
                f"chart= must be a chart of the network's manifold, found '{self.home.name}'. Use geo.reference or a chart "
                "made from it by reparametrize."
            )
        self.geo = geo
        self.batches = Batches(data)
        self.likelihood = likelihood_of(likelihood)
        self.hessian_type = self.likelihood.hessian_type
        self.reduction = reduction
        self.max_memory = max_memory

    def curvature(self, outputs: Tensor, t: Tensor) -> Tensor:
        return self.likelihood.fisher(outputs, t)

    def _outputs(self, theta: Blocks, inputs: Any) -> Tensor:
        outputs: Any = self.geo.evaluate(theta, inputs)
        if not isinstance(outputs, Tensor):
            raise GeometryError(
                f"the likelihood needs the outputs as one tensor (n, ..., c), the network returned {type(outputs).__name__}. "
                "Say which part parametrises the likelihood: GeoModule(net, forward=lambda net, batch: net(**batch).logits)."
            )
        self.likelihood.check(outputs)
        return outputs

    def inspect(self, outputs: Tensor, x: Blocks) -> None:
        """Refuse outputs that are not finite, where values can be read."""
        if not is_wrapped({"outputs": outputs}) and not bool(outputs.isfinite().all()):
            raise GeometryError(_not_finite(outputs, x))

    def _weight(self) -> float:
        return 1 / self.batches.total if self.reduction == "mean" else 1.0

    def reference_parts(self) -> Iterable[Part]:
        weight = self._weight()
        for _, inputs, _ in self.batches.sized():
            yield weight, lambda theta, inputs=inputs: self._outputs(theta, inputs)

    def dense(self, x: Blocks) -> Tensor:
        layout, way = self.home.layout, self.way
        weight = self._weight()

        def outputs(y: Blocks, inputs: Any) -> Tensor:
            return self._outputs(y if way is None else way(y), inputs)

        total = GramSum(layout)
        for size, inputs, _ in self.batches.sized():
            plan = plan_of(outputs, x, take(inputs, slice(0, 1)))
            start, step = 0, 1
            while start < size:
                f, jacobians = block_jacobians(outputs, layout, x, take(inputs, slice(start, start + step)), plan)
                self.inspect(f, x)
                total.add(jacobians, lambda t, f=f: weight * self._curved(f, t))
                start += step
                each = memory_of_a_sample(jacobians) * f.element_size()
                step = max(1, min(512, self.max_memory // (2 * each)))
        return total.matrix()

    def _curved(self, outputs: Tensor, t: Tensor) -> Tensor:
        """A(f) on the output axis of t (n, C, k), where the outputs (n, ..., c) have C numbers a sample."""
        columns = t.reshape(*outputs.shape, t.shape[-1])
        return torch.func.vmap(self.curvature, in_dims=(None, -1), out_dims=-1)(outputs, columns).reshape(t.shape)


def _not_finite(outputs: Tensor, x: Blocks) -> str:
    bad = [name for name, block in x.items() if not bool(block.isfinite().all())]
    cause = f"the parameters {bad} hold such numbers" if bad else "the parameters are finite, so look at the data"
    return (
        f"the network's outputs hold {int((~outputs.isfinite()).sum())} of {outputs.numel()} numbers that are not finite "
        f"({cause}). A Fisher matrix there would be nan throughout; mend the data or go back to a finite point."
    )


def _require(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise GeometryError(
            f"{name}={value!r} is not offered for the Fisher matrix. Available: {list(known)}. Choose one of these; nothing is "
            "replaced by an approximation in silence."
        )
