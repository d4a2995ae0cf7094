"""Gradients of single samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geoad.charts import Point
from geoad.curvature.network import require_as_many
from geoad.curvature.sweep import Batch, Plans, sweep
from geoad.data import refuse_spoilt
from geoad.errors import GeometryError
from geoad.fields.scalar import ScalarField, require_point
from geoad.kernels.finite import all_finite
from geoad.kernels.ladder import at_top_level
from geoad.kernels.memory import bytes_of
from geoad.kernels.rows import Plan, Rows
from geoad.module.sources import LossSource
from geoad.params import Blocks, Layout, first, is_wrapped
from geoad.tensors import Covector

if TYPE_CHECKING:
    from geoad.module import GeoModule

__all__ = ["per_sample_grads"]


def per_sample_grads(
    loss: ScalarField | GeoModule,
    loss_fn: Callable[..., Tensor] | None = None,
    data: Any = None,
    *,
    max_memory: int = 1 << 28,
    progress: bool = False,
) -> Callable[[Point], Covector]:
    r"""The differentials dℓ_n of the losses of the single samples: a batch of covectors, one for each sample.

    Args:
        loss: ``geo.loss(loss_fn, data)``, or the network, with the next two.
        loss_fn: as for ``geo.loss``: a function of (outputs, targets).
        data: as for ``geo.loss``.
        max_memory: bytes that intermediate results may take, beside the result.
        progress: show a progress bar over the samples (needs tqdm).

    Returns:
        A function of the point. Its `Covector` has one batch axis, the samples in the order of the data; their mean is
        ``geoad.grad(geo.loss(loss_fn, data))(p)`` for a mean over samples, their second moment the empirical Fisher.

    Raises:
        GeometryError: gradients that are not finite, targets that the loss does not take or of another number of samples, and
            samples that depend on each other.

    Each ℓ_n is the loss on a batch that holds this sample alone. The gradients of layers that the tap covers are outer
    products of what goes in and what comes back; all others come from the same backward pass.

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(3, 2))
    >>> L = geo.loss(torch.nn.functional.mse_loss, (torch.randn(5, 3), torch.zeros(5, 2)))
    >>> geoad.per_sample_grads(L)(geo.point())
    Covector('theta', dim=8, batch=(5,), float32, cpu)
    """
    field = loss if isinstance(loss, ScalarField) else _made(loss, loss_fn, data)
    source = field.source
    if not isinstance(source, LossSource):
        raise GeometryError(
            "per_sample_grads needs the loss of a network over data, found a field of another kind (a sum of fields, a prior, "
            "a function of the network). Pass geo.loss(loss_fn, data) alone, and add the rest afterwards."
        )
    per_sample = _PerSample(source, bytes_of(max_memory), progress)

    def at(p: Point) -> Covector:
        here = require_point(p, field.home, "a gradient").to(field.home)
        if here.batch_shape:
            raise GeometryError("per_sample_grads takes one point, found a batch of them. Go through them in a loop.")
        return Covector(field.home, per_sample.gradients(here.blocks), here).to(p.chart)

    return at


def _made(geo: GeoModule, loss_fn: Callable[..., Tensor] | None, data: Any) -> ScalarField:
    if loss_fn is None or not callable(getattr(geo, "loss", None)):
        raise GeometryError(
            f"per_sample_grads takes a loss field, or a GeoModule, a loss function and data; found {type(geo).__name__} and "
            f"{type(loss_fn).__name__}. Pass geo.loss(loss_fn, data)."
        )
    return geo.loss(loss_fn, data)


class _PerSample:
    """The losses of single samples as outputs (n, 1) of the network."""

    def __init__(self, source: LossSource, max_memory: int, progress: bool) -> None:
        self.source, self.max_memory, self.progress = source, max_memory, progress

    def outputs(self, x: Blocks, sample: tuple[Any, Any]) -> Tensor:
        """The loss of a batch that holds one sample, shape (1, 1)."""
        inputs, targets = sample
        return self.source.single(x, inputs, targets).reshape(1, 1)

    def batches(self) -> Iterator[Batch]:
        """Inputs and targets of a sample belong together."""
        for size, inputs, targets in self.source.batches.sized():
            require_as_many(targets, size)
            yield Batch(size, (inputs, targets), None)

    def gradients(self, x: Blocks) -> Blocks:
        """(N, *shape) for each block."""
        total = self.source.batches.own
        result = Layout({name: block.shape for name, block in x.items()}).rows(total, first(x))
        written = _Written(result, at_top_level() and not is_wrapped(x))
        sweep(
            Plans(self.outputs, x, tried=False),
            self.batches(),
            lambda outputs, _: (torch.ones_like(outputs).unsqueeze(0), None),
            [written],
            max_memory=self.max_memory,
            most=2048,
            progress=self.progress,
            total=total,
        )
        if not written.finite() and not bool(all_finite(result.values())):
            refuse_spoilt("a gradient of a single sample", x, self.source.batches)
        return result


class _Written:
    """The rows of single seeds, written down one after another.

    Args:
        result: where they are written.
        looks: what they are products of is summed up, to see whether it is finite.
    """

    def __init__(self, result: Blocks, looks: bool) -> None:
        self.result, self.place = result, 0
        self.sums: list[Tensor] | None = [] if looks else None

    def add(self, rows: Rows, signs: Tensor | None) -> None:
        """Write the rows to the next places."""
        stop = self.place + rows.samples
        rows.write(self.result, slice(self.place, stop))
        self.place = stop
        if self.sums is not None:
            parts = [part for each in rows.uses for part in (each.a, *each.back)] + list(rows.others.values())
            self.sums += [part.detach().sum() for part in parts if part.is_floating_point()]

    def finite(self) -> bool:
        """All is finite, for the sums are; False also where these overflow. The device is waited for once."""
        return not self.sums or bool(torch.stack([each.float() for each in self.sums]).isfinite().all())

    def numbers_of_a_sample(self, rows: Rows) -> int:
        """The rows, once more."""
        return rows.layout.dim

    def squared(self, plan: Plan) -> frozenset[int]:
        """None: the rows themselves are written."""
        return frozenset()
