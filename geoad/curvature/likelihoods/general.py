"""Curvature in output space that comes from no family: a matrix of one's own, and any loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from geoad.curvature.likelihoods.base import Likelihood, readable, require_same_device
from geoad.curvature.likelihoods.roots import Seeds, numbers_of_a_sample, signed_root, wide
from geoad.errors import GeometryError
from geoad.kernels import products
from geoad.kernels.conditions import holds
from geoad.kernels.memory import fitting, require_memory
from geoad.module.misfit import MISFITS, refuse_targets
from geoad.params import flatten

__all__ = ["Loss", "OutputMatrix"]


class OutputMatrix(Likelihood):
    """The general pull-back JᵀAJ with an output-space matrix A(f, y) of one's own.

    Args:
        fn: fn(outputs, targets) -> A, symmetric, (n, ..., c, c) for outputs (n, ..., c), or its diagonal in the shape of the
            outputs. Where the curvature asks for no labels, targets is None.
        positive: A is positive semidefinite, and this is checked where a root is needed. With False the root is that of |A|,
            and `signs` tells the sign of each seed.

    >>> import torch
    >>> first = OutputMatrix(lambda f, y: torch.diag(torch.tensor([1.0, 0.0])).expand(len(f), 2, 2))
    >>> first.fisher(torch.zeros(1, 2), torch.ones(1, 2))
    tensor([[1., 0.]])
    """

    def __init__(self, fn: Callable[[Tensor, Any], Tensor], positive: bool = True) -> None:
        self.fn = fn
        self.positive = positive

    def fisher(self, outputs: Tensor, t: Tensor) -> Tensor:
        return self.hessian(outputs, None, t)

    def hessian(self, outputs: Tensor, targets: Any, t: Tensor) -> Tensor:
        a = self._value(outputs, targets)
        return a * t if a.ndim == outputs.ndim else (a @ t.unsqueeze(-1)).squeeze(-1)

    def matrix(self, outputs: Tensor, targets: Any = None) -> Tensor:
        a = self._value(outputs, targets)
        return torch.diag_embed(a) if a.ndim == outputs.ndim else a

    def check_targets(self, outputs: Tensor, targets: Any) -> None:
        """A need not depend on targets: without any, `fn` is given None."""
        self.check(outputs)
        require_same_device(outputs, targets)

    def seeds(self, outputs: Tensor, targets: Any = None) -> Seeds:
        a = wide(self.matrix(outputs, targets))
        if readable(a) and a.numel():
            off, size = (a - a.mT).abs().max(), a.abs().max()
            if not holds(off <= 1e3 * torch.finfo(a.dtype).eps * size):
                raise GeometryError(
                    f"the matrix of OutputMatrix must be symmetric and finite: its entries reach {size:.3g} and differ from "
                    f"the transposed ones by up to {off:.3g}. Only the symmetric part is a curvature: return (A + A.mT) / 2."
                )
        local, signs = signed_root(a, "the matrix of OutputMatrix", indefinite=not self.positive)
        return Seeds.at_positions(local.to(outputs.dtype), None if self.positive else signs.to(outputs.dtype))

    def _value(self, outputs: Tensor, targets: Any) -> Tensor:
        a: Any = self.fn(outputs, targets)
        c = outputs.shape[-1]
        if isinstance(a, Tensor) and a.shape in (outputs.shape, (*outputs.shape, c)):
            return a
        found = tuple(a.shape) if isinstance(a, Tensor) else f"a {type(a).__name__}"
        raise GeometryError(
            f"the function of OutputMatrix must return symmetric matrices of shape {(*outputs.shape, c)} or diagonals of shape "
            f"{tuple(outputs.shape)} for outputs of that shape, found {found}. Use A.expand for one that is the same for all."
        )


class Loss(Likelihood):
    """Any loss as -log p up to a constant, for Gauss-Newton matrices and empirical Fishers.

    Args:
        loss_fn: loss_fn(outputs, targets) -> Tensor, a function or a module. It is given one sample at a time, as a batch of
            one, and what it returns is summed up: with reduction="mean" (torch's default) the value of a sample is the mean
            over its outputs, with reduction="none" or "sum" their sum. Samples cannot mix; so losses with class weights need
            reduction="none", for their mean is divided by the weights of the whole batch.

    A sample is one factor, whatever its axes: the Hessian of the loss is not taken to be block diagonal over the positions. Its
    root is made of all C² numbers, with C outputs, and refused where these do not fit into the machine; where there are many
    positions, a `Likelihood` takes far less.
    A loss has no distribution over labels, so it has no exact and no Monte-Carlo Fisher. Where values can be read, a loss of
    several samples that is neither the mean nor the sum of theirs is refused.

    >>> import torch
    >>> loss = Loss(torch.nn.functional.smooth_l1_loss)
    >>> loss.nll(torch.tensor([[0.5, 3.0]]), torch.zeros(1, 2))
    tensor([1.3125])
    """

    numberwise = True

    def __init__(self, loss_fn: Callable[[Tensor, Any], Tensor]) -> None:
        if not callable(loss_fn):
            raise GeometryError(
                f"Loss needs a function loss_fn(outputs, targets), found {type(loss_fn).__name__}. For example "
                "Loss(torch.nn.functional.huber_loss)."
            )
        given: Any = loss_fn
        if isinstance(given, nn.CrossEntropyLoss | nn.NLLLoss) and _is_weighted_mean(given):
            raise GeometryError(
                f"the mean of {type(given).__name__} with class weights is divided by the weights of the whole batch, so it is "
                "no mean of values of the samples: taken one by one they would lose their weights. Use reduction='none'; the "
                "curvature is then that of the weighted losses, averaged over the samples."
            )
        self.loss_fn = loss_fn

    def fisher(self, outputs: Tensor, t: Tensor) -> Tensor:
        name = getattr(self.loss_fn, "__name__", type(self.loss_fn).__name__)
        raise GeometryError(
            f"the loss '{name}' is no distribution over labels, so it has no exact and no Monte-Carlo Fisher. Use the GGN or "
            "kind='empirical' with it, or say what the outputs parametrise: 'categorical', 'gaussian', ... or "
            "Family(lambda f: torch.distributions...)."
        )

    def nll(self, outputs: Tensor, targets: Any) -> Tensor:
        leaves, rebuild = flatten(targets)

        def one(sample: list[Tensor]) -> Tensor:
            f, *parts = (each.unsqueeze(0) for each in sample)
            targets_of_f = rebuild([parts.pop(0) if isinstance(leaf, Tensor) else leaf for leaf in leaves])
            return self.loss_fn(f, targets_of_f).sum()

        try:
            return products.mapped(one, [outputs, *(leaf for leaf in leaves if isinstance(leaf, Tensor))])
        except MISFITS as error:
            refuse_targets(self.loss_fn, outputs, targets, error)
            raise

    def matrix(self, outputs: Tensor, targets: Any = None) -> Tensor:
        """The Hessian of every sample, (n, C, C) with all C numbers of its outputs."""
        n, size = outputs.shape[0], numbers_of_a_sample(outputs.shape)
        if targets is None:
            self.fisher(outputs, outputs)

        def column(unit: Tensor) -> Tensor:
            t = unit.reshape(outputs.shape[1:]).expand_as(outputs)
            return self.hessian(outputs, targets, t).reshape(n, size)

        remedy = "Use representation='implicit', which takes no root, or a likelihood such as Categorical(axis=...)."
        what = f"the Hessians of a loss in the {size} outputs of {n} samples, and their roots,"
        require_memory(4 * n * size**2 * outputs.element_size(), what, outputs, remedy)
        units = torch.eye(size, dtype=outputs.dtype, device=outputs.device)
        return products.mapped(column, units, fitting(_TOGETHER, n * size)).movedim(0, -1)

    def seeds(self, outputs: Tensor, targets: Any = None) -> Seeds:
        local, _ = signed_root(wide(self.matrix(outputs, targets)), "the Hessian of the loss in the outputs")
        return Seeds.given(local.reshape(len(local), *outputs.shape).to(outputs.dtype))

    def mean_factor(self, outputs_shape: Any) -> float:
        """1: `nll` is the loss itself."""
        return 1.0

    def check_targets(self, outputs: Tensor, targets: Any) -> None:
        self.check(outputs)
        for leaf in flatten(targets)[0]:
            if not isinstance(leaf, Tensor):
                continue
            if leaf.ndim == 0 or len(leaf) != len(outputs):
                raise GeometryError(
                    f"the loss is taken sample by sample: outputs have shape {tuple(outputs.shape)}, but a target has shape "
                    f"{tuple(leaf.shape)}. Give every target a sample axis of length {len(outputs)} in front."
                )
            require_same_device(outputs, leaf)
            if leaf.is_floating_point() and readable(leaf) and not holds(~leaf.isnan().any()):
                raise GeometryError(
                    f"{int(leaf.isnan().sum())} of {leaf.numel()} targets are nan. The curvature would be nan throughout; drop "
                    "these samples."
                )
        if len(outputs) > 1 and readable(outputs):
            self._require_apart(outputs, targets)

    def _require_apart(self, outputs: Tensor, targets: Any) -> None:
        """Refuse a loss of several samples that is neither the mean nor the sum of theirs, where it takes several."""
        with torch.no_grad():
            try:
                whole = self.loss_fn(outputs, targets).sum()
            except Exception:  # it takes one at a time
                return
            each = self.nll(outputs, targets)
        near = torch.finfo(each.dtype).eps ** 0.5 * each.abs().mean()
        fits = ((whole - each.mean()).abs() <= near) | ((whole - each.sum()).abs() <= near * len(each))
        if not holds(fits | ~whole.isfinite()):
            raise GeometryError(
                f"the loss is taken sample by sample, and on {len(each)} together it is {float(whole):.6g}: neither the "
                f"mean nor the sum of its values on each, {float(each.mean()):.6g} and {float(each.sum()):.6g}. A mean over "
                "labels that are not ignored, or over class weights, is divided by a number of the whole batch. Use "
                "reduction='sum' or 'none' in it, F.cross_entropy as it is, or Categorical(ignore_index=...)."
            )


_TOGETHER = 1 << 20
"""Numbers of columns that are made together."""


def _is_weighted_mean(loss: Any) -> bool:
    return loss.weight is not None and loss.reduction == "mean"
