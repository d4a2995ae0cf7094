"""Signs and logarithms of determinants."""

from __future__ import annotations

import math
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from geoad.errors import SingularMetricError
from geoad.operators.algebra import require_small
from geoad.operators.base import Dense, Detached, Diagonal, LinearOperator, Multiple, Product, Transpose
from geoad.operators.solve import (
    Inverse,
    densify,
    equilibrated_lu,
    factorise,
    noise,
    nonzero,
    require_finite,
    singular,
    working,
)
from geoad.operators.spectra import symmetric_eigvals
from geoad.params import is_wrapped

__all__ = ["slogdet"]


@singledispatch
def slogdet(operator: LinearOperator) -> tuple[Tensor, Tensor]:
    """(sign, log |det A|)."""
    require_small(operator, "the determinant")
    return slogdet(densify(operator))


@slogdet.register
def _(operator: Dense) -> tuple[Tensor, Tensor]:
    matrix = working(operator.matrix)
    if is_wrapped({"": matrix}):
        result: Any = torch.linalg.slogdet(matrix)
        return result.sign, result.logabsdet
    if operator.definite:
        try:
            size, lower = factorise(operator, True)[1]
        except SingularMetricError:  # known to be definite, but not to working precision
            return _symmetric_slogdet(matrix)
        logdet = 2 * (lower.diagonal(dim1=-2, dim2=-1).log().sum(-1) + size.log().sum(-1))
        return torch.ones_like(logdet), logdet
    return _symmetric_slogdet(matrix) if operator.symmetric else _general_slogdet(matrix)


def _symmetric_slogdet(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """By the eigenvalues of S⁻¹ A S⁻¹, which tell a singular matrix from a tiny determinant and from bad scaling."""
    require_finite(matrix)
    given = matrix.detach()
    size = nonzero(given.diagonal(dim1=-2, dim2=-1).abs().sqrt())
    for _ in range(3):
        scaled = given / size.unsqueeze(-1) / size.unsqueeze(-2)
        size = size * nonzero(scaled.abs().amax(-1)).sqrt()
    values = symmetric_eigvals(matrix / size.unsqueeze(-1) / size.unsqueeze(-2))
    zero = values.abs() <= noise(matrix) * math.sqrt(matrix.shape[-1]) * values.abs().amax(-1, keepdim=True)
    values = torch.where(zero, torch.zeros_like(values), values)
    return values.sign().prod(-1), values.abs().log().sum(-1) + 2 * size.log().sum(-1)


def _general_slogdet(matrix: Tensor) -> tuple[Tensor, Tensor]:
    require_finite(matrix)
    rows, columns, lu, pivots = equilibrated_lu(matrix.detach())
    result: Any = torch.linalg.slogdet(matrix / rows.unsqueeze(-1) / columns.unsqueeze(-2))
    flat = singular(lu, pivots)
    sign = torch.where(flat, torch.zeros_like(result.sign), result.sign)
    logabsdet = result.logabsdet + rows.log().sum(-1) + columns.log().sum(-1)
    return sign, torch.where(flat, torch.full_like(logabsdet, -torch.inf), logabsdet)


@slogdet.register
def _(operator: Diagonal) -> tuple[Tensor, Tensor]:
    flat = operator.layout.ravel(operator.entries)
    return flat.sign().prod(-1), flat.abs().log().sum(-1)


@slogdet.register
def _(operator: Multiple) -> tuple[Tensor, Tensor]:
    sign = operator.factor.sign()
    return (sign if operator.dim % 2 else sign * sign), operator.dim * operator.factor.abs().log()


@slogdet.register
def _(operator: Product) -> tuple[Tensor, Tensor]:
    left, right = slogdet(operator.left), slogdet(operator.right)
    return left[0] * right[0], left[1] + right[1]


@slogdet.register
def _(operator: Inverse) -> tuple[Tensor, Tensor]:
    sign, logabsdet = slogdet(operator.operator)
    return sign, -logabsdet


@slogdet.register
def _(operator: Detached) -> tuple[Tensor, Tensor]:
    sign, logabsdet = slogdet(operator.operator)
    return sign.detach(), logabsdet.detach()


@slogdet.register
def _(operator: Transpose) -> tuple[Tensor, Tensor]:
    return slogdet(operator.operator)
