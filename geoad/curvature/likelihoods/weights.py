"""Cross-entropies of torch with class weights, ignored labels and smoothing: what each position counts for."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from geoad.errors import GeometryError

__all__ = ["CrossEntropy", "cross_entropy_of"]

_OPTIONS = {"weight", "ignore_index", "reduction", "label_smoothing"}


@dataclass(frozen=True)
class CrossEntropy:
    """The options of ``torch.nn.functional.cross_entropy``.

    Its Hessian in the logits of a position is ω (diag(p) - ppᵀ) with p = softmax(f) and ω = Σ_c w_c ỹ_c, for class weights w
    and (smoothed) target probabilities ỹ. The mean divides the sum by Σ w_y over the labels y of the batch that are not
    ignored; with targets that are probabilities, by the number of positions.
    """

    weight: Tensor | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.weight is not None and bool((self.weight < 0).any()):
            raise GeometryError(
                f"class weights must not be negative for a curvature that is positive; found {self.weight.tolist()}. Take the "
                "Hessian of the loss instead, geoad.curvature.Hessian."
            )

    def shares(self, targets: Any) -> Tensor:
        """What each position (n, ...) counts for in the mean over the n · ... positions, or in the sum.

        Args:
            targets: labels (n, ...) or probabilities (n, c, ...) of a whole batch.
        """
        if not isinstance(targets, Tensor):
            raise GeometryError(
                "the loss weighs its samples by their labels, and the data have none. Pass (inputs, targets), or a likelihood "
                "('categorical') for a curvature without weights."
            )
        weight = None if self.weight is None else self.weight.to(targets.device, torch.float64)
        if targets.is_floating_point():
            return _of_probabilities(self._smoothed(targets.double(), 1), weight)
        counted = targets != self.ignore_index
        if weight is None:
            share = total = counted.double()
        else:  # labels out of range are refused where the outputs are known
            total = weight[targets.clamp(0, len(weight) - 1).long()] * counted
            share = (1 - self.label_smoothing) * total + self.label_smoothing * weight.mean() * counted
        return share * (targets.numel() / total.sum().clamp_min(torch.finfo(torch.float64).tiny)) if self.averaged else share

    @property
    def averaged(self) -> bool:
        """The loss is a mean."""
        return self.reduction == "mean"

    def _smoothed(self, probabilities: Tensor, axis: int) -> Tensor:
        return (1 - self.label_smoothing) * probabilities + self.label_smoothing / probabilities.shape[axis]


def _of_probabilities(probabilities: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return torch.ones_like(probabilities.select(1, 0))
    return torch.tensordot(probabilities.movedim(1, -1), weight, 1)


def cross_entropy_of(loss: Any) -> CrossEntropy | None:
    """The options of a cross-entropy (or ``nll_loss``) of torch: the function, the module, or a ``functools.partial``."""
    if _is_function(loss):
        return CrossEntropy()
    if type(loss) in (nn.CrossEntropyLoss, nn.NLLLoss):
        return CrossEntropy(loss.weight, loss.ignore_index, loss.reduction, getattr(loss, "label_smoothing", 0.0))
    given: Any = loss
    partial = isinstance(loss, functools.partial) and _is_function(given.func)
    if partial and not given.args and set(given.keywords) <= _OPTIONS:
        return CrossEntropy(**given.keywords)
    return None


def _is_function(loss: Any) -> bool:
    return loss is functional.cross_entropy or loss is functional.nll_loss
