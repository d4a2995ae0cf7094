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

    def check(self, outputs: Tensor) -> None:
        """Raise if there is not one weight for each class."""
        if self.weight is not None and outputs.shape[1:2] != self.weight.shape:
            raise GeometryError(
                f"class weights of shape {tuple(self.weight.shape)} were given for outputs of shape {tuple(outputs.shape)}, "
                "with the classes in axis 1. Pass one weight for each class."
            )

    def shares(self, targets: Any) -> Tensor | None:
        """What each position (n, ...) counts for in the mean over the n · ... positions, or in the sum; None: all the same.

        Targets that do not fit the outputs are refused where these are known.

        Args:
            targets: labels (n, ...) or probabilities (n, c, ...) of a whole batch.
        """
        if not isinstance(targets, Tensor):
            if self.weight is None:
                return None
            raise GeometryError(
                "the loss weighs its samples by their labels, and the data have none. Pass (inputs, targets), or a likelihood "
                "('categorical') for a curvature without weights."
            )
        weight = None if self.weight is None else self.weight.to(targets.device, torch.float64)
        if targets.is_floating_point():
            return self._of_probabilities(targets.double(), weight)
        if targets.is_complex() or not targets.ndim:
            return None
        counted = targets != self.ignore_index
        if weight is None:
            share = total = counted.double()
        else:
            total = weight[targets.long().clamp(0, len(weight) - 1)] * counted
            share = (1 - self.label_smoothing) * total + self.label_smoothing * weight.mean() * counted
        if self.reduction != "mean":
            return share
        return share * (targets.numel() / total.sum().clamp_min(torch.finfo(torch.float64).tiny))

    def _of_probabilities(self, targets: Tensor, weight: Tensor | None) -> Tensor | None:
        if weight is None or targets.ndim < 2 or targets.shape[1] != len(weight):
            return None
        smoothed = (1 - self.label_smoothing) * targets + self.label_smoothing / len(weight)
        return torch.tensordot(smoothed.movedim(1, -1), weight, 1)


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
