"""Scalar fields that come from a network: losses over data, and functions of the network itself."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from geoad.data import Batches, require_match, spoilt_by
from geoad.errors import GeometryError
from geoad.fields.scalar import spoilt
from geoad.kernels import derivatives
from geoad.kernels.derivatives import Part, Shared
from geoad.kernels.finite import all_finite
from geoad.kernels.ladder import visit
from geoad.module.misfit import MISFITS, refuse_targets
from geoad.params import Blocks

if TYPE_CHECKING:
    from geoad.module.module import GeoModule

__all__ = ["LossSource", "NetworkSource"]


class LossSource:
    """A loss over a data set, one part a batch, weighted by the batch's size."""

    def __init__(self, geo: GeoModule, loss: Callable[..., Tensor], data: Any, reduction: str) -> None:
        if reduction not in ("mean", "sum"):
            found = repr(reduction) if isinstance(reduction, str) else type(reduction).__name__  # pyright: ignore
            raise GeometryError(
                f"reduction={found} is not known: a loss is a scalar, the 'mean' or the 'sum' over the samples. If "
                "these are the "
                "targets, pass the data as one argument: geo.loss(loss_fn, (x, y))."
            )
        if not callable(loss):
            raise GeometryError(
                f"the loss must be a function of (outputs, targets), found {type(loss).__name__}. Pass for instance "
                "F.cross_entropy or torch.nn.MSELoss(); for a function of the network itself use geo.scalar_field."
            )
        own = getattr(loss, "reduction", None)
        if own not in (None, "mean", "batchmean", "sum"):
            raise GeometryError(f"the loss has reduction='{own}', so it is no scalar. Build it with reduction='mean' or 'sum'.")
        self.geo, self.loss, self.reduction = geo, loss, reduction
        self.batches = data if isinstance(data, Batches) else Batches(data)
        self._takes_reduction = own is None and _accepts_reduction(loss)
        self._takes_labels = _accepts_labels(loss)
        self._summed = own == "sum" or (self._takes_reduction and reduction == "sum")

    def _batch(self, x: Blocks, inputs: Any, targets: Any) -> Tensor:
        visit(self)
        outputs = self.geo.evaluate(x, inputs)
        targets = _long(targets) if self._takes_labels else targets
        arguments = (outputs,) if targets is None else (outputs, targets)
        options = {"reduction": self.reduction} if self._takes_reduction else {}
        try:
            return self.loss(*arguments, **options)
        except MISFITS as error:
            refuse_targets(self.loss, outputs, targets, error)
            require_match(targets, {"outputs": outputs}, "the targets", error, like="the outputs")
            raise

    def single(self, x: Blocks, inputs: Any, targets: Any) -> Tensor:
        """The loss on a batch that holds one sample."""
        return self._batch(x, inputs, targets)

    def parts(self) -> Iterable[Part]:
        """One part a batch; their sum is the mean (or the sum) over all samples. One part in all where processes share them."""
        if self.batches.exchange is None:
            return self.own_parts()
        name = getattr(self.loss, "__name__", type(self.loss).__name__)
        call = f"the {self.reduction} of the loss {name} over {self.batches.described()}"
        return [(1.0, Shared(self.own_parts, self.batches.exchange, call))]

    def own_parts(self) -> Iterable[Part]:
        """Those of this process."""
        total = self.batches.total if self.reduction == "mean" else 1
        for size, inputs, targets in self.batches.sized():
            coefficient = (1 if self._summed else size) / total
            yield coefficient, lambda x, inputs=inputs, targets=targets: self._batch(x, inputs, targets)


@spoilt.register
def _(source: LossSource, x: Blocks) -> str:
    why = spoilt_by(x, source.batches)
    if why:
        return why
    with torch.no_grad():
        for i, (_, fn) in enumerate(source.own_parts()):
            value = fn(x)
            if not bool(value.isfinite().all()):
                return f"the loss of batch {i} is {float(value):g}, though the parameters and the data are finite"
    product = derivatives.hessian_product(source.own_parts(), x, {name: torch.ones_like(block) for name, block in x.items()})
    if not bool(all_finite(product.values())):
        return (
            "the parameters, the data and the loss are finite, but a derivative of the network or of the loss is not (a root "
            "or a norm at 0, or numbers too large for their precision)"
        )
    return "" if source.batches.exchange is None else "the reason is in another process"


def _accepts_labels(loss: Any) -> bool:
    """It is a loss of torch that takes integers for labels of classes only."""
    loss = loss.func if isinstance(loss, functools.partial) else loss
    return loss in (functional.cross_entropy, functional.nll_loss) or type(loss) in (nn.CrossEntropyLoss, nn.NLLLoss)


def _long(targets: Any) -> Any:
    """Labels of any integer type in the one that torch has all kernels for."""
    whole = isinstance(targets, Tensor) and not (targets.is_floating_point() or targets.is_complex())
    return targets.long() if whole and targets.dtype not in (torch.int64, torch.bool) else targets


def _accepts_reduction(loss: Callable[..., Any]) -> bool:
    if isinstance(loss, nn.Module):
        return False
    if loss is getattr(functional, getattr(loss, "__name__", ""), None):  # those of torch are asked once
        return _names_reduction(loss)
    return _names_reduction.__wrapped__(loss)


@functools.cache
def _names_reduction(loss: Callable[..., Any]) -> bool:
    try:
        return "reduction" in inspect.signature(loss).parameters
    except (TypeError, ValueError):
        return False


class NetworkSource:
    """A function of the network, as a function of its coordinates: a prior, a penalty, anything."""

    def __init__(self, geo: GeoModule, fn: Callable[[Any], Tensor]) -> None:
        self.geo, self.fn = geo, fn

    def _evaluate(self, x: Blocks) -> Tensor:
        return self.geo.apply_network(x, self.fn)

    def parts(self) -> Iterable[Part]:
        """The one part."""
        return [(1.0, self._evaluate)]
