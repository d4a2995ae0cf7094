"""Curvature fields of a network over data: what Fisher, Gauss-Newton and gradient covariances share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.charts import Chart
from geoad.curvature.build import build, require_chart
from geoad.curvature.combine import described
from geoad.curvature.compiled import Chunks, require_compilable
from geoad.curvature.likelihoods.roots import Seeds, numbers_of_a_sample
from geoad.curvature.pullback import OutputCurvature, Part
from geoad.curvature.representations import Dense, Implicit, representation_of
from geoad.curvature.resume import Page
from geoad.curvature.sweep import Batch, Plans
from geoad.data import Batches, batch_size, refuse_spoilt, spoilt_by, take
from geoad.errors import GeometryError
from geoad.kernels.conditions import holds
from geoad.kernels.memory import bytes_of, fitting
from geoad.kernels.spread import Exchange
from geoad.params import Blocks, is_traced, is_wrapped

if TYPE_CHECKING:
    from geoad.curvature.likelihoods import Likelihood
    from geoad.module import GeoModule

__all__ = ["NetworkCurvature", "require_as_many"]


class NetworkCurvature(OutputCurvature):
    r"""Σ_n w J_nᵀ A(f_n, y_n) J_n over a data set, in one of the representations.

    A subclass says what A is: `bend`, the product A t of a batch, and `seeds`, a square root of A.

    Args:
        geo: the network.
        data: (x, y), x alone as a tensor, a mapping, a list of batches or a ``DataLoader``.
        likelihood: what the outputs mean.
        outputs: which function of the network's outputs is meant, e.g. a selection of classes.
        chart: the chart in which structure is imposed. Default: the reference chart.
        representation: a name, an object of `geoad.curvature.representations`, or a mapping from patterns to these.
        reduction: "mean" or "sum" over the samples.
        max_memory: bytes that intermediate results may take.
        progress: show a progress bar (needs tqdm).
        compile: the work on a chunk of samples is compiled.
    """

    def __init__(
        self,
        geo: GeoModule,
        data: Any,
        likelihood: Likelihood,
        *,
        outputs: Callable[[Tensor], Tensor] | None,
        chart: Chart | None,
        representation: Any,
        reduction: str,
        max_memory: int,
        progress: bool,
        compile: bool = False,
    ) -> None:
        name = type(self).__name__
        if reduction not in ("mean", "sum"):
            raise GeometryError(
                f"reduction={reduction!r} is not offered for a {name} matrix. Available: 'mean' and 'sum' over the samples."
            )
        if not callable(getattr(geo, "evaluate", None)):
            raise GeometryError(
                f"a {name} matrix belongs to a network, found {type(geo).__name__}. Pass the geoad.GeoModule; bare networks "
                "have no chart."
            )
        self.structure = representation_of(representation)
        super().__init__(chart or geo.reference, "implicit" if isinstance(self.structure, Implicit) else "stored")
        if self.home.reference != geo.reference:
            raise GeometryError(
                f"chart= must be a chart of the network's manifold, found '{self.home.name}'. Use geo.reference or a chart "
                "made from it by reparametrize."
            )
        require_chart(self.structure, self.home)
        self.geo = geo
        self.batches = data if isinstance(data, Batches) else Batches(data)
        self.likelihood = likelihood
        self.select = outputs
        self.reduction = reduction
        self.max_memory, self.progress = bytes_of(max_memory), progress
        if compile:
            require_compilable(self.structure, self.batches.exchange is not None)
        self.chunks = Chunks() if compile else None

    # -- what a subclass says ----------------------------------------------------------------------------------------------

    @abstractmethod
    def seeds(self, outputs: Tensor, labels: Any) -> Seeds:
        """The seeds of A = Σ_k σ_k s_k s_kᵀ."""

    @abstractmethod
    def bend(self, outputs: Tensor, t: Tensor, labels: Any) -> Tensor:
        """A(f, y) t."""

    def labels(self, outputs: Tensor, targets: Any, batch: int) -> Any:
        """What A needs to know of a batch beside its outputs."""
        return None

    def draw(self, outputs: Iterable[Tensor], batch: int) -> Any:
        """What A needs to know of a batch, where that follows from its outputs, which come in portions of samples."""
        raise NotImplementedError

    def note(self, batch: int, inputs: Any) -> None:
        """Hook: a pass over the data comes to this batch."""

    # -- the network over the data -------------------------------------------------------------------------------------------

    def evaluate(self, theta: Blocks, inputs: Any) -> Tensor:
        """The outputs (n, ..., c) of a batch at the reference coordinates."""
        outputs: Any = self.geo.evaluate(theta, inputs)
        if not isinstance(outputs, Tensor):
            raise GeometryError(
                f"the likelihood needs the outputs as one tensor (n, ..., c), the network returned {type(outputs).__name__}. "
                "Say which part parametrises the likelihood: GeoModule(net, forward=lambda net, batch: net(**batch).logits)."
            )
        if outputs.ndim > 1 and not is_traced():
            self.batches.require_meant(outputs, lambda y: self.likelihood.takes(outputs, y))
        if self.select is not None:
            outputs = _selected(self.select, outputs)
        self.likelihood.check(outputs)
        return outputs

    def outputs(self, x: Blocks, inputs: Any) -> Tensor:
        """The outputs of a batch at coordinates of ``home``."""
        return self.evaluate(x if self.way is None else self.way(x), inputs)

    def inspect(self, outputs: Tensor, x: Blocks) -> None:
        """Refuse outputs that are not finite, where values can be read."""
        if not is_wrapped({"outputs": outputs}) and not holds(outputs.isfinite().all()):
            raise GeometryError(_not_finite(type(self).__name__, outputs, spoilt_by(x, self.batches, targets=False)))

    def refuse_spoilt(self, x: Blocks) -> NoReturn:
        """Refuse a matrix that is not finite, though the outputs are."""
        refuse_spoilt(f"a {type(self).__name__} matrix", x, self.batches, targets=self.uses_targets)

    @property
    def weight(self) -> float:
        """w: 1/N for the mean, 1 for the sum."""
        return 1 / self.batches.total if self.reduction == "mean" else 1.0

    def swept(self, x: Blocks, page: Page | None = None, plans: Plans | None = None) -> Iterator[Batch]:
        """The batches with what A needs to know of them at the point `x`; with a `page`, those that are still to be done.

        Where that takes the outputs, they are evaluated a few samples at a time with `plans`, else for a batch at once.
        """
        for i, (size, inputs, targets) in enumerate(self.batches.sized()):
            if page is not None and not page.saw(inputs, targets):
                continue
            self.note(i, inputs)
            require_as_many(targets, size)
            yield Batch(size, inputs, self._fixed(x, inputs, targets, i, plans))

    def _fixed(self, x: Blocks, inputs: Any, targets: Any, batch: int, plans: Plans | None) -> Any:
        if not self.needs_outputs:
            return self.labels(torch.empty(0, device="cpu"), targets, batch)
        with torch.no_grad():
            return self.draw(self._seen(x, inputs, plans), batch)

    def _seen(self, x: Blocks, inputs: Any, plans: Plans | None) -> Iterator[Tensor]:
        """The outputs in portions, which are the same ones however they are evaluated: labels are drawn from one at a time."""
        if plans is None:
            yield from (whole := self._finite(x, inputs)).split(_portion(whole.shape))
            return
        sample, size = plans.trial(inputs), batch_size(inputs)
        step = _portion(sample.outputs.shape)
        each = sample.outline(1).numbers_of_a_sample() * sample.outputs.element_size()
        some = min(step, fitting(self.max_memory, each))
        for start in range(0, size, step):
            stop = min(start + step, size)
            parts = [self._finite(x, take(inputs, slice(i, min(i + some, stop)))) for i in range(start, stop, some)]
            yield parts[0] if len(parts) == 1 else torch.cat(parts)

    def _finite(self, x: Blocks, inputs: Any) -> Tensor:
        """The outputs, 0 where they are not finite: this is looked at after labels have been drawn.

        No kernel of a device is given numbers that end the process.
        """
        outputs = self.outputs(x, inputs)
        self.inspect(outputs, x)
        return outputs.where(outputs.isfinite(), 0.0)

    needs_outputs: bool = False
    """Labels are drawn, see `draw`."""

    uses_targets: bool = True
    """A depends on the targets."""

    signed: bool = False
    """A may be indefinite."""

    def weighted_seeds(self, outputs: Tensor, labels: Any) -> Seeds:
        """The seeds of w A."""
        return self.seeds(outputs, labels).scaled(self.weight**0.5)

    def reference_parts(self) -> Iterable[Part]:
        weight = self.weight
        for i, (size, inputs, targets) in enumerate(self.batches.sized()):
            require_as_many(targets, size)
            self.note(i, inputs)
            labels = self.labels(torch.empty(0, device="cpu"), targets, i)
            yield Part(
                weight,
                lambda theta, inputs=inputs: self.evaluate(theta, inputs),
                lambda f, t, labels=labels: self.bend(f, t, labels),
            )

    # -- values --------------------------------------------------------------------------------------------------------------

    @property
    def exchange(self) -> Exchange | None:
        return self.batches.exchange

    def agree(self, x: Blocks) -> None:
        """Raise in all processes unless all ask for this field at `x`."""
        if self.exchange is not None and not is_wrapped(x):
            self.exchange.agree(described(self, self.structure, x))

    def operator(self, x: Blocks) -> ops.LinearOperator:
        if isinstance(self.structure, Implicit):
            self.agree(x)
            return super().operator(x)
        return build(self, x, self.structure)

    def product(self, x: Blocks, v: Blocks) -> Blocks:
        if not self.structure.imposed:
            return super().product(x, v)
        return self.operator(x).mv(v)

    def dense(self, x: Blocks) -> Tensor:
        return ops.to_dense(build(self, x, Dense()))

    def coverage(self) -> dict[str, str]:
        """For each block of the network how its derivatives are taken: by the rule of a layer, or generically and why.

        Both give the same numbers; the rules are faster.
        """
        x = self.geo.point().to(self.home).blocks
        found = Plans(self.outputs, x).of(self.some_inputs()).coverage()
        return {name: found[name] for name in self.home.layout}

    def some_inputs(self) -> Any:
        """The inputs of the first batch."""
        return next(inputs for _, inputs, _ in self.batches.sized())


def _portion(outputs_shape: Sequence[int]) -> int:
    """Samples whose labels are drawn together: the same number however much memory there is, for the order matters."""
    return max(1, (1 << 20) // max(1, numbers_of_a_sample(outputs_shape)))


def _selected(select: Callable[[Tensor], Any], outputs: Tensor) -> Tensor:
    """What `outputs=` makes of the outputs."""
    found = select(outputs)
    n = outputs.shape[0] if outputs.ndim else 0
    if isinstance(found, Tensor) and (found.ndim == 0 or found.shape[0] == n):
        return found
    what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    raise GeometryError(
        f"outputs= is a function that returned {what} for outputs of shape {tuple(outputs.shape)}. It selects or "
        f"transforms the outputs of every sample by itself: return one tensor ({n}, ..., c)."
    )


def require_as_many(targets: Any, size: int) -> None:
    """Refuse targets of another number of samples: some of them would be paired with the inputs of others."""
    if isinstance(targets, Tensor) and (targets.ndim == 0 or targets.shape[0] != size):
        raise GeometryError(
            f"a batch has {size} samples and targets of shape {tuple(targets.shape)}: each sample needs its own, along the "
            "first axis. Pass inputs and targets of the same length."
        )


def _not_finite(what: str, outputs: Tensor, why: str) -> str:
    cause = why or "the parameters and the data are finite, so the network divides by zero, or runs out of range"
    return (
        f"the network's outputs hold {int((~outputs.isfinite()).sum())} of {outputs.numel()} numbers that are not finite "
        f"({cause}). A {what} matrix there would be nan throughout; mend the data or go back to a finite point. Classes "
        "that are masked by -inf have probability 0 just as well with a large negative number, masked_fill(mask, -1e30)."
    )
