"""Real powers of symmetric operators."""

from __future__ import annotations

from functools import singledispatch

import torch

from geoad.errors import GeometryError
from geoad.operators.algebra import require_small, transpose
from geoad.operators.base import Dense, Detached, Diagonal, LinearOperator, Multiple, Product, Transpose
from geoad.operators.solve import Inverse, densify, inverse
from geoad.operators.spectra import matrix_power, powers
from geoad.params import map_blocks

__all__ = ["inverse_sqrt", "power"]


def power(operator: LinearOperator, p: float) -> LinearOperator:
    """A^p of a symmetric A, in its structure where that is closed.

    Any integer p; a real p if A is positive definite, or semidefinite and p > 0. Roots are the symmetric ones.

    Raises:
        SingularMetricError: A is singular with p < 0, or has a negative eigenvalue and p is not an integer.
        StructureNotPreservedError: the power has no efficient form.

    >>> import torch
    >>> from geoad import operators as ops
    >>> from geoad.params import Layout
    >>> A = ops.Diagonal(Layout({"x": (2,)}), {"x": torch.tensor([4.0, 9.0])})
    >>> ops.power(A, 0.5).entries["x"]
    tensor([2., 3.])
    """
    p = float(p)
    if p == 1:
        return operator
    if p == 0:
        return Multiple(operator.layout, operator.like.new_ones(()), definite=True)
    if p == -1:
        return inverse(operator, positive=operator.definite)
    return powered(operator, p)


def inverse_sqrt(operator: LinearOperator) -> LinearOperator:
    """A^(-1/2), the symmetric root of A⁻¹ for a positive definite A; see `power`."""
    return power(operator, -0.5)


@singledispatch
def powered(operator: LinearOperator, p: float) -> LinearOperator:
    """What `power` does beside the powers 1, 0 and -1: dispatches on the class."""
    require_small(operator, f"the power {p:g}")
    return powered(densify(operator), p)


@powered.register
def _(operator: Dense, p: float) -> LinearOperator:
    if not operator.symmetric:
        if p.is_integer():
            matrix = torch.linalg.matrix_power(operator.matrix, int(p))
            return Dense(operator.layout, matrix)
        raise GeometryError(
            f"the power {p:g} of an operator that is not symmetric was asked for. Roots of such matrices are not unique; take "
            "an integer power, or compute with the matrix: geoad.operators.to_dense(A)."
        )
    matrix = matrix_power(operator.matrix, p)
    return Dense(operator.layout, 0.5 * (matrix + matrix.mT), symmetric=True, definite=operator.definite)


@powered.register
def _(operator: Multiple, p: float) -> LinearOperator:
    return Multiple(operator.layout, powers(operator.factor, p, "multiple of the identity"), definite=operator.definite)


@powered.register
def _(operator: Diagonal, p: float) -> LinearOperator:
    entries = map_blocks(lambda block: powers(block, p, "diagonal operator"), operator.entries)
    return Diagonal(operator.layout, entries, definite=operator.definite)


@powered.register
def _(operator: Inverse, p: float) -> LinearOperator:
    return power(operator.operator, -p)


@powered.register
def _(operator: Transpose, p: float) -> LinearOperator:
    return transpose(power(operator.operator, p))


@powered.register
def _(operator: Detached, p: float) -> LinearOperator:
    return Detached(power(operator.operator, p))


@powered.register
def _(operator: Product, p: float) -> LinearOperator:
    if p == 2:
        return Product(operator, operator)
    require_small(operator, f"the power {p:g}")
    return powered(densify(operator), p)
