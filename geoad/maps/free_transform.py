"""Transforms into constrained spaces, as charts: the coordinates that are free, without those that follow from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions import transforms as td
from torch.distributions.utils import tril_matrix_to_vec, vec_to_tril_matrix

__all__ = ["FREE", "FreeTransform"]

Move = Callable[[Any], Any]


@dataclass(frozen=True)
class _Free:
    """How the free coordinates lie in the values of a transform, and in its arguments."""

    keep: Move
    complete: Move
    enter: Move
    leave: Move


def _same(x: Tensor) -> Tensor:
    return x


def _triangle(diagonal: int) -> Move:
    return lambda matrix: tril_matrix_to_vec(matrix, diagonal)


def _matrix(vector: Tensor) -> Tensor:
    return vec_to_tril_matrix(vector)


def _symmetric(vector: Tensor) -> Tensor:
    lower = vec_to_tril_matrix(vector)
    return lower + lower.tril(-1).mT


def _last_probability(y: Tensor) -> Tensor:
    return torch.cat([y, 1 - y.sum(-1, keepdim=True)], -1)


def _unit_rows(vector: Tensor) -> Tensor:
    """The rows of unit length whose entries below the diagonal are given, with positive diagonal."""
    below = vec_to_tril_matrix(vector, -1)
    return below + (1 - below.square().sum(-1)).sqrt().diag_embed()


FREE: dict[type[Transform], _Free] = {
    td.StickBreakingTransform: _Free(lambda y: y[..., :-1], _last_probability, _same, _same),
    td.CorrCholeskyTransform: _Free(_triangle(-1), _unit_rows, _same, _same),
    td.LowerCholeskyTransform: _Free(_triangle(0), _matrix, _matrix, _triangle(0)),
    td.PositiveDefiniteTransform: _Free(_triangle(0), _symmetric, _matrix, _triangle(0)),
}
"""The transforms of torch whose values satisfy equations, with the coordinates that remain."""


class _Completed(constraints.Constraint):
    """Vectors whose completion satisfies a constraint."""

    event_dim = 1

    def __init__(self, base: constraints.Constraint, complete: Move) -> None:
        self._base, self._complete = base, complete
        super().__init__()

    def check(self, value: Tensor) -> Any:
        return self._base.check(self._complete(value))

    def __repr__(self) -> str:
        return f"free coordinates of {self._base}"


class FreeTransform(Transform):
    """The free coordinates of ``base(x)``, from vectors to vectors of the same length.

    ========================== ============================== =======================================
    base                       takes                          gives
    ========================== ============================== =======================================
    StickBreakingTransform     n numbers                      all probabilities but the last
    CorrCholeskyTransform      n(n-1)/2 numbers               the factor below the diagonal, by rows
    LowerCholeskyTransform     the triangle of x, by rows     the triangle of the factor, by rows
    PositiveDefiniteTransform  the triangle of x, by rows     the triangle of the matrix, by rows
    ========================== ============================== =======================================

    Args:
        base: one of these transforms.
    """

    bijective = True
    domain = constraints.real_vector

    def __init__(self, base: Transform) -> None:
        super().__init__()
        self.base = base

    @property
    def _how(self) -> _Free:
        return FREE[type(self.base)]

    @property
    def codomain(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _Completed(self.base.codomain, self._how.complete)

    def _call(self, x: Tensor) -> Tensor:
        return self._how.keep(self.base(self._how.enter(x)))

    def _inverse(self, y: Tensor) -> Tensor:
        return self._how.leave(self.base.inv(self._how.complete(y)))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.base.log_abs_det_jacobian(self._how.enter(x), self._how.complete(y))
