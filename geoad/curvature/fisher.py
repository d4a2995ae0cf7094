"""The Fisher information of a network: exact, by sampled labels, or at the labels of the data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.charts import Chart
from geoad.curvature.build import build, less_mean
from geoad.curvature.likelihoods import Likelihood, likelihood_of
from geoad.curvature.likelihoods.base import seeds_of
from geoad.curvature.likelihoods.roots import Seeds
from geoad.curvature.network import NetworkCurvature, require_as_many
from geoad.curvature.pullback import CurvatureOperator, Part
from geoad.curvature.representations import Implicit
from geoad.curvature.selection import selecting
from geoad.errors import GeometryError
from geoad.kernels import products
from geoad.kernels.conditions import together
from geoad.kernels.spread import fingerprint
from geoad.params import Blocks, axpy, is_wrapped, scale
from geoad.tensors import Form, Metric

if TYPE_CHECKING:
    from geoad.module import GeoModule

__all__ = ["Fisher"]

_KINDS = ("exact", "mc", "empirical", "covariance")


class Fisher(NetworkCurvature):
    r"""The Fisher metric :math:`\frac1N \sum_n J_n^\top A(f_n) J_n` of a network with outputs f, a metric field.

    =============  ================================================================================================
    kind           A
    =============  ================================================================================================
    "exact"        :math:`E_{y \sim p(y|f)} [s\, s^\top]`, with the score :math:`s = \nabla_f \log p(y|f)`, in closed form
    "mc"           the mean of :math:`s\, s^\top` over `samples` labels drawn from p(y|f) (type 1): unbiased
    "empirical"    :math:`s\, s^\top` at the labels of the data: the second moment of the gradients
    "covariance"   the same, less the square of the mean gradient: the covariance of the gradients
    =============  ================================================================================================

    For likelihoods whose outputs are natural parameters (or the mean of a Gaussian) the exact Fisher equals the generalised
    Gauss-Newton matrix of -log p. "empirical" and "covariance" are not approximations of it (Kunstner et al. 2019).

    Args:
        geo: the network.
        data: (x, y), x alone as a tensor, a mapping, a list of batches or a ``DataLoader``; the kinds "exact" and "mc" ignore
            the targets.
        likelihood: "categorical" (logits), "bernoulli" (logits), "poisson" (log-rates), "gaussian" (mean, unit covariance), a
            `Likelihood` such as ``Gaussian(covariance)``, or one of your own.
        kind: see above.
        chart: where structure is imposed. The exact matrix ("dense", "implicit", "low_rank") is the same object for every
            choice; "the KFAC of θ seen in ψ" and "a KFAC built in ψ" differ. Default: the reference chart.
        representation: "implicit" (matrix-free), "dense", "block_diagonal", "diagonal", "quasi_diagonal", "kfac", "ekfac",
            "low_rank", an object with options such as ``KFAC(sharing="reduce")``, or a mapping from patterns of block names to
            these for a mix.
        reduction: "mean" or "sum" over the samples. The mean goes with ``F.cross_entropy`` (factor 1) and with ``F.mse_loss``
            (its Hessian is 2/c times the Gaussian Fisher with unit covariance).
        samples: labels drawn for each sample ("mc").
        generator: where the labels come from ("mc"). It is asked once, for a seed: the field is one function of the point, the
            same at every call and in every chart, until `resample`.
        outputs: which function of the network's outputs parametrises the likelihood: indices of classes, or a callable.
        max_memory: bytes that intermediate results may take beside the result, by a model of what is held. It decides how many
            samples are taken together, and of one sample that is too much how many of its seeds; both are at least one. The
            logger "geoad" tells the numbers (INFO), and where a single one takes more (WARNING). What the allocator keeps of
            freed memory, some tens of MB, comes on top, and "dense" takes its result twice while it is put together. Products
            of "implicit" go batch by batch, however large the batches of the data are.
        progress: show a progress bar over the samples (needs tqdm).
        compile: let torch compile the work on a chunk of samples, at the first evaluation and where the network or the form
            of its inputs has changed since. Offered for "diagonal", where it pays if values are asked for thousands of times
            (see docs/how-to/curvature.md). What cannot be compiled raises.

    Raises:
        GeometryError: data that do not fit the network or the likelihood, labels that do not exist; outputs, products or a
            stored value that are not finite. Nothing is changed by the attempt.

    It is semidefinite: ``sharp`` and ``solve`` raise `SingularMetricError` unless it is damped, e.g.
    ``Fisher(...) + 1e-3 * Euclidean(geo.reference)``, exactly and in the structure of the representation.

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(2, 3))
    >>> F = geoad.curvature.Fisher(geo, torch.randn(5, 2), "categorical")
    >>> F(geo.point())
    Metric('theta', dim=9, curvatureoperator, float32, cpu)
    >>> geoad.curvature.Fisher(geo, torch.randn(5, 2), representation="kfac")(geo.point())
    Metric('theta', dim=9, blockdiagonal, float32, cpu)
    """

    def __init__(
        self,
        geo: GeoModule,
        data: Any,
        likelihood: str | Likelihood | Callable[..., Tensor] = "categorical",
        kind: str = "exact",
        chart: Chart | None = None,
        representation: Any = "implicit",
        reduction: str = "mean",
        *,
        samples: int = 1,
        generator: torch.Generator | None = None,
        outputs: Any = None,
        max_memory: int = 1 << 28,
        progress: bool = False,
        compile: bool = False,
    ) -> None:
        if kind not in _KINDS:
            raise GeometryError(
                f"kind={kind!r} is not offered for the Fisher matrix. Available: {list(_KINDS)}. Choose one of these; nothing "
                "is replaced by an approximation in silence."
            )
        if not isinstance(samples, int) or isinstance(samples, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise GeometryError(f"samples={samples!r} is no number of labels. Pass an integer, 1 or more.")
        if generator is not None and not isinstance(generator, torch.Generator):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise GeometryError(
                f"generator= takes a torch.Generator, found {type(generator).__name__}. Pass torch.Generator().manual_seed(0)."
            )
        if samples < 1:
            raise GeometryError(f"samples={samples}: a mean over no labels is undefined. Draw at least one for each sample.")
        super().__init__(
            geo,
            data,
            likelihood_of(likelihood),
            outputs=None if outputs is None else selecting(outputs),
            chart=chart,
            representation=representation,
            reduction=reduction,
            max_memory=max_memory,
            progress=progress,
            compile=compile,
        )
        self.kind, self.samples, self.generator = kind, samples, generator
        self.hessian_type = kind == "exact" and self.likelihood.hessian_type and not self.structure.imposed
        self.signed = kind == "exact" and not getattr(self.likelihood, "positive", True)
        self.value_class = Form if self.signed else Metric
        self.needs_outputs = kind == "mc"
        self.uses_targets = kind in ("empirical", "covariance")
        self.drawn: list[Tensor] | None = None
        self.resample()

    def resample(self) -> None:
        """Draw other labels from now on ("mc")."""
        self.order: dict[int, str] = {}
        where = "cpu" if self.generator is None else self.generator.device
        self.seed = int(torch.randint(1 << 62, (), generator=self.generator, device=where)) if self.kind == "mc" else 0
        if self.exchange is not None and self.kind == "mc":  # the seed of the first process
            self.seed = self.exchange.gathered(self.seed, "seeds of Fisher(kind='mc')")[0]

    # -- A -------------------------------------------------------------------------------------------------------------------

    def labels(self, outputs: Tensor, targets: Any, batch: int) -> Any:
        """None, the targets, or labels drawn from p(y|f) as (n, samples, ...)."""
        if self.kind == "exact":
            return None
        if self.kind == "mc":
            assert self.drawn is not None
            return self.drawn[batch]
        if targets is None:
            raise GeometryError(
                f"Fisher(kind={self.kind!r}) needs the labels of the data, found none. Pass data=(x, y); kind='exact' and "
                "kind='mc' need none."
            )
        return targets

    def draw(self, outputs: Iterable[Tensor], batch: int) -> Tensor:
        """Labels from p(y|f), (n, samples, ...)."""
        seed, found, source = (self.seed + self.batches.number(batch)) % (1 << 63), list[Tensor](), None
        for f in outputs:
            source = source or torch.Generator(f.device).manual_seed(seed)
            found.append(torch.stack([self.likelihood.sample(f, source) for _ in range(self.samples)], 1))
        return found[0] if len(found) == 1 else torch.cat(found)

    def note(self, batch: int, inputs: Any) -> None:
        """Labels drawn for one sample are not those of another: refuse batches that changed since they were drawn."""
        if self.kind != "mc" or self.batches.lasting:
            return
        found = fingerprint(inputs)
        if self.order.setdefault(batch, found) != found:
            raise GeometryError(
                f"batch {batch} holds other inputs than in the pass in which the labels of this Monte-Carlo Fisher were drawn "
                "(a loader that shuffles or augments): they would be labels of other samples. Pass DataLoader(dataset, "
                "batch_size=..., shuffle=False) or a list of batches, call resample() before each value, or use kind='exact'."
            )

    def _scores(self, outputs: Tensor, labels: Any) -> Tensor:
        """The scores (m, *outputs.shape), one for each label of a sample."""
        if self.kind == "mc":
            return torch.stack([self.likelihood.score(outputs, y) for y in labels.unbind(1)])
        self.likelihood.check_targets(outputs, labels)
        return self.likelihood.score(outputs, labels).unsqueeze(0)

    def seeds(self, outputs: Tensor, labels: Any) -> Seeds:
        if self.kind == "exact":
            return seeds_of(self.likelihood, outputs)
        scores = self._scores(outputs, labels)
        return Seeds.given(scores / len(scores) ** 0.5)

    def bend(self, outputs: Tensor, t: Tensor, labels: Any) -> Tensor:
        if self.kind == "exact":
            return self.likelihood.fisher(outputs, t)
        scores = self._scores(outputs, labels)
        along = (scores * t).unsqueeze(-1).flatten(2).sum(-1)
        along = along.reshape(*along.shape, *[1] * (outputs.ndim - 1))
        return (scores * along).mean(0)

    # -- values --------------------------------------------------------------------------------------------------------------

    def operator(self, x: Blocks) -> ops.LinearOperator:
        if isinstance(self.structure, Implicit):
            self.agree(x)
            field = self._with_labels(x)
            return field._less_mean(x, CurvatureOperator(field, x))
        return self._less_mean(x, build(self, x, self.structure))

    def product(self, x: Blocks, v: Blocks) -> Blocks:
        if self.kind in ("mc", "covariance"):
            if is_wrapped(x):
                raise GeometryError(
                    f"a derivative of the field Fisher(kind={self.kind!r}) was asked for (a connection, a geodesic), which it "
                    "does not offer. Use kind='exact'."
                )
            return self.operator(x).mv(v)
        return super().product(x, v)

    def _with_labels(self, x: Blocks) -> Fisher:
        """The field with the labels that are drawn at `x`."""
        if self.kind != "mc":
            return self
        twin = copy.copy(self)
        twin.drawn = together(lambda: [batch.labels for batch in self.swept(x)])
        return twin

    def _less_mean(self, x: Blocks, op: ops.LinearOperator) -> ops.LinearOperator:
        return op if self.kind != "covariance" else less_mean(op, self._mean_score(x), self.batches.total * self.weight)

    def _mean_score(self, x: Blocks) -> Blocks:
        """The mean over the samples of ∇ log p."""
        return self.shared("mean gradient", self._own_mean_score, x)

    def _own_mean_score(self, x: Blocks) -> Blocks:
        """The share of this process in it."""
        total: Blocks | None = None
        for outputs, score in self._score_parts():
            f, pull = products.vjp(outputs, x)
            term = scale(1 / self.batches.total, pull(score(f)))
            total = term if total is None else axpy(1.0, total, term)
        assert total is not None
        return total

    def _score_parts(self) -> Iterable[tuple[Callable[[Blocks], Tensor], Callable[[Tensor], Tensor]]]:
        for i, (size, inputs, targets) in enumerate(self.batches.sized()):
            require_as_many(targets, size)
            labels = self.labels(torch.empty(0, device="cpu"), targets, i)
            yield (
                lambda x, inputs=inputs: self.outputs(x, inputs),
                lambda f, labels=labels: self._scores(f, labels)[0],
            )

    def reference_parts(self) -> Iterable[Part]:
        if self.kind == "mc" and self.drawn is None:
            raise GeometryError(
                "the labels of a Monte-Carlo Fisher are drawn where it is evaluated; this calculation needs it as a function "
                "of the point. Use kind='exact'."
            )
        return super().reference_parts()
