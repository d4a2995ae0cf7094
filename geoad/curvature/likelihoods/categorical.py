"""Classes: the softmax family, with labels or class probabilities as targets, along any axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from geoad.curvature.likelihoods.base import Likelihood, described, readable
from geoad.curvature.likelihoods.roots import Seeds, positions, wide
from geoad.errors import GeometryError
from geoad.kernels.conditions import holds

__all__ = ["Categorical"]


class Categorical(Likelihood):
    r"""Class probabilities p = softmax(f), f the logits: :math:`A = \mathrm{diag}(p) - p p^\top`.

    Args:
        axis: where the classes are: -1 for outputs (n, ..., c), 1 for outputs (n, c, ...) as ``F.cross_entropy`` has them, e.g.
            (n, c, H, W) of a segmentation.
        ignore_index: positions with this label do not count: they are left out of `nll`, `score` and `hessian`, hence of
            empirical Fishers and of the GGN. The exact and the Monte-Carlo Fisher look at no labels, so there every position
            counts.

    Targets are integer labels, in the shape of the outputs without the class axis, or class probabilities in the shape of the
    outputs (floating point; the rows sum to 1). ``F.cross_entropy`` with reduction="mean" also averages over
    the P positions of a sample: it is 1/P times the mean of `nll` over the samples (`mean_factor`). Where labels are ignored it
    divides by the number of the others in the batch instead.

    `root` is the factor L of A = L Lᵀ in closed form, c - 1 columns a position; with the tails s_k of the probabilities from
    class k on,

    .. math:: L_{kk} = \sqrt{p_k s_{k+1} / s_k}, \qquad L_{ik} = -p_i \sqrt{p_k / (s_k s_{k+1})} \quad (i > k),

    computed from logarithms, so that saturated logits neither overflow nor lose p_k (1 - p_k).

    >>> import torch
    >>> f, t = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    >>> seeds = Categorical().root(f)
    >>> seeds.shape
    torch.Size([2, 1, 3])
    >>> torch.allclose(torch.einsum("kni,knj,nj->ni", seeds, seeds, t), Categorical().fisher(f, t))
    True
    """

    hessian_type = True

    def __init__(self, axis: int = -1, ignore_index: int | None = None) -> None:
        for name, value in (("axis", axis), ("ignore_index", ignore_index)):
            wanted: Any = int if name == "axis" else (int, NoneType)
            if isinstance(value, bool) or not isinstance(value, wanted):
                raise GeometryError(f"{name}={value!r} is no integer. Pass e.g. Categorical(axis=1, ignore_index=-100).")
        if axis == 0:
            raise GeometryError("axis=0 holds the samples and cannot hold the classes. Use axis=-1, or axis=1 for (n, c, ...).")
        self.axis = axis
        self.ignore_index = ignore_index

    def fisher(self, outputs: Tensor, t: Tensor) -> Tensor:
        p = outputs.softmax(self.axis)
        return p * (t - (p * t).sum(self.axis, keepdim=True))

    def nll(self, outputs: Tensor, targets: Any) -> Tensor:
        y = self._probabilities(outputs, targets)
        # a class of probability 0 has log p = -inf, and counts for nothing where the target gives it no mass
        terms = torch.where(y == 0, 0.0, y * outputs.log_softmax(self.axis))
        return -terms.flatten(1).sum(1)

    def score(self, outputs: Tensor, targets: Any) -> Tensor:
        y = self._probabilities(outputs, targets)
        return y - y.sum(self.axis, keepdim=True) * outputs.softmax(self.axis)

    def hessian(self, outputs: Tensor, targets: Any, t: Tensor) -> Tensor:
        return self._mass(outputs, targets) * self.fisher(outputs, t)

    def sample(self, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        p = wide(outputs.detach()).movedim(self.axis, -1).softmax(-1)
        if p.numel() == 0:
            return p.new_empty(p.shape[:-1], dtype=torch.int64)
        # as torch.multinomial draws one label, which waits for the device to look at p: the first of exponential clocks
        return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)

    def matrix(self, outputs: Tensor, targets: Any = None) -> Tensor:
        """The blocks of A, (n, ..., c, c), with the class axis moved to the end."""
        p = outputs.softmax(self.axis).movedim(self.axis, -1)
        blocks = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
        if targets is None:
            return blocks
        return self._mass(outputs, targets).movedim(self.axis, -1).unsqueeze(-1) * blocks

    def seeds(self, outputs: Tensor, targets: Any = None) -> Seeds:
        logits = wide(outputs).movedim(self.axis, -1)
        mass = None if targets is None else self._mass(outputs, targets).movedim(self.axis, -1).sqrt()
        if math.prod(logits.shape[1:]) * (logits.shape[-1] - 1) > _MANY:
            return Seeds(_Columns.of(logits, mass, outputs.dtype), tuple(logits.shape[1:]), self.axis)
        local = _softmax_root(logits).to(outputs.dtype)
        return Seeds.at_positions(local if mass is None else mass * local, axis=self.axis)

    def columns(self, outputs_shape: Sequence[int]) -> int:
        return positions(outputs_shape, self.axis) * max(outputs_shape[self.axis] - 1, 0)

    def mean_factor(self, outputs_shape: Sequence[int]) -> float:
        return 1 / positions(outputs_shape, self.axis)

    def check(self, outputs: Tensor) -> None:
        super().check(outputs)
        if not -outputs.ndim < self.axis < outputs.ndim:
            raise GeometryError(
                f"the classes are said to be in axis {self.axis}, but the outputs have shape {tuple(outputs.shape)}. Pass the "
                "axis of the logits, Categorical(axis=-1) for the last."
            )
        if outputs.shape[self.axis] < 2:
            raise GeometryError(
                f"a categorical likelihood needs at least two logits, found outputs of shape {tuple(outputs.shape)}: the "
                "softmax of one logit is 1 and its Fisher is zero. Use two outputs, or 'bernoulli' for one."
            )

    def takes(self, outputs: Tensor, targets: Tensor) -> bool | None:
        if targets.is_floating_point():
            return targets.shape == outputs.shape
        if not -outputs.ndim < self.axis < outputs.ndim:
            return None
        return targets.shape == outputs.movedim(self.axis, -1).shape[:-1]

    def check_targets(self, outputs: Tensor, targets: Any) -> None:
        super().check_targets(outputs, targets)
        self._require_kind(outputs, targets)
        if not readable(targets) or targets.numel() == 0:
            return
        if targets.is_floating_point():
            self._check_probabilities(targets)
            return
        classes = outputs.shape[self.axis]
        fit = (targets >= 0) & (targets < classes)
        if not holds((fit if self.ignore_index is None else fit | (targets == self.ignore_index)).all()):
            counted = targets if self.ignore_index is None else targets[targets != self.ignore_index]
            ignored = "no label is ignored" if self.ignore_index is None else f"ignored: {self.ignore_index}"
            raise GeometryError(
                f"labels must lie between 0 and {classes - 1}: outputs of shape {tuple(outputs.shape)} have {classes} "
                f"classes; found labels from {int(counted.min())} to {int(counted.max())} ({ignored}). Let them start at 0, "
                "give the network more outputs, or pass Categorical(ignore_index=...) for padding."
            )

    def _check_probabilities(self, targets: Tensor) -> None:
        total = wide(targets).sum(self.axis)
        near = torch.finfo(targets.dtype).eps * 8 * targets.shape[self.axis]
        if not holds(((targets >= 0).all()) & ((total - 1).abs() <= max(near, 1e-5)).all()):
            raise GeometryError(
                "targets in the shape of the outputs are class probabilities: not negative, with sum 1 everywhere; found "
                f"values from {float(targets.min()):.4g} to {float(targets.max()):.4g}, sums from {float(total.min()):.4g} "
                f"to {float(total.max()):.4g}. Normalise them (logits: y.softmax), or pass integer labels."
            )

    def _require_kind(self, outputs: Tensor, targets: Any) -> None:
        """Integer labels without the class axis, or floating-point probabilities with it."""
        shape = list(outputs.shape)
        del shape[self.axis]
        if isinstance(targets, Tensor):
            if targets.is_floating_point() and targets.shape == outputs.shape:
                return
            integer = not targets.is_floating_point() and not targets.is_complex() and targets.dtype != torch.bool
            if integer and list(targets.shape) == shape:
                return
        raise GeometryError(
            f"for outputs of shape {tuple(outputs.shape)} with classes in axis {self.axis} targets are integer labels of shape "
            f"{tuple(shape)} or class probabilities (floating point) of shape {tuple(outputs.shape)}; found "
            f"{described(targets)}. Use y.long() and reshape, or Categorical(axis=...) if the classes are elsewhere."
        )

    def _probabilities(self, outputs: Tensor, targets: Any) -> Tensor:
        """The targets as class probabilities in the shape of the outputs; zeros where a label is ignored."""
        self._require_kind(outputs, targets)
        if targets.is_floating_point():
            return targets.to(outputs.dtype)
        labels = targets.unsqueeze(self.axis)
        shape = [1] * outputs.ndim
        shape[self.axis] = -1
        hot = labels == torch.arange(outputs.shape[self.axis], device=outputs.device).reshape(shape)
        if self.ignore_index is not None:
            hot = hot & (labels != self.ignore_index)
        return hot.to(outputs.dtype)

    def _mass(self, outputs: Tensor, targets: Any) -> Tensor:
        """How much each position counts, with a class axis of length 1: 0 where the label is ignored, else 1."""
        return self._probabilities(outputs, targets).sum(self.axis, keepdim=True)


_MANY = 1 << 20
"""Above so many numbers of a sample, columns are made when they are asked for."""


@dataclass(frozen=True)
class _Columns:
    """The columns of the Cholesky factors of diag(p) - ppᵀ at P positions, times some number for each position.

    Attributes:
        log_p, log_tail: log p and log s, (n, P, c).
        mass: the number, (n, P, 1).
        dtype: that of the columns.
    """

    log_p: Tensor
    log_tail: Tensor
    mass: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, logits: Tensor, mass: Tensor | None, dtype: torch.dtype) -> _Columns:
        """From logits (n, ..., c)."""
        log_p, log_tail = (each.flatten(1, -2) if each.ndim > 2 else each.unsqueeze(1) for each in _logarithms(logits))
        mass = torch.ones_like(log_p[..., :1]) if mass is None else mass.to(log_p.dtype).reshape(*log_p.shape[:2], 1)
        return cls(log_p, log_tail, mass, dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """(c - 1, n, P, c)."""
        return (self.log_p.shape[-1] - 1, *self.log_p.shape)

    @property
    def device(self) -> torch.device:
        """That of the logits."""
        return self.log_p.device

    def scaled(self, factor: float | Tensor) -> _Columns:
        """Times a number, or one for each sample, (n, 1, 1)."""
        return replace(self, mass=factor * self.mass)

    def at(self, column: Tensor, position: Tensor) -> Tensor:
        """(k, n, c)."""
        log_p, log_tail = self.log_p, self.log_tail
        parts = log_p[:, position, column], log_tail[:, position, column], log_tail[:, position, column + 1]
        diagonal, factor = (each.mT.unsqueeze(-1) for each in _entries(*parts))
        place = column[:, None, None]
        below = torch.arange(log_p.shape[-1], device=column.device) > place
        found = torch.where(below, -factor * log_p.transpose(0, 1)[position].exp(), 0.0)
        found = found.scatter(-1, place.expand_as(diagonal), diagonal)
        return (found * self.mass.transpose(0, 1)[position]).to(self.dtype)


def _logarithms(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log p, and those of the tails of p."""
    # a floor for classes of probability zero (logit -inf): differences of logarithms stay finite, their exponentials vanish
    log_p = logits.log_softmax(-1).clamp(min=torch.finfo(logits.dtype).min / 8)
    return log_p, log_p.flip(-1).logcumsumexp(-1).flip(-1)


def _entries(here: Tensor, tail: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """The entry of a column on the diagonal, and the factor of those below, from log p_k, log s_k and log s_{k+1}."""
    # p_i is at most the rest: where it does not underflow, this factor is below tiny^-½
    most = -0.5 * math.log(torch.finfo(here.dtype).tiny)
    return (0.5 * (here + rest - tail)).exp(), (0.5 * (here - tail - rest)).clamp(max=most).exp()


def _softmax_root(logits: Tensor) -> Tensor:
    """The columns of the Cholesky factor of diag(p) - ppᵀ: (..., c) -> (c - 1, ..., c)."""
    c, (log_p, log_tail) = logits.shape[-1], _logarithms(logits)
    diagonal, factor = _entries(log_p[..., :-1], log_tail[..., :-1], log_tail[..., 1:])
    columns = -factor.movedim(-1, 0).unsqueeze(-1) * log_p.exp()  # (c - 1, ..., c)
    below = torch.ones(c - 1, c, dtype=torch.bool, device=logits.device).triu(1)  # i > k
    columns.mul_(below.reshape(c - 1, *(1,) * (logits.ndim - 1), c))
    columns.diagonal(dim1=0, dim2=-1).copy_(diagonal)
    return columns
