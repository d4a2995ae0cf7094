"""Gaussian samples whose precision is an operator."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from geoad.errors import GeometryError, SingularMetricError
from geoad.operators.algebra import is_symmetric, require_small
from geoad.operators.base import Dense, Detached, Diagonal, LinearOperator, Multiple
from geoad.operators.numbers import batch_shape
from geoad.operators.solve import Inverse, check_diagonal, densify, factorise
from geoad.operators.spectra import powers
from geoad.params import Blocks, detach, map_blocks

__all__ = ["sample"]


def sample(operator: LinearOperator, n: int, *, generator: torch.Generator | None = None) -> Blocks:
    """n draws from N(0, A⁻¹) for a symmetric positive definite A, as blocks of shape (n, *shape).

    Each draw is C z with C Cᵀ = A⁻¹ and standard normal z, one number for each coordinate in the order of the layout, drawn in
    float64: the same state of the generator gives the same draws, in every precision.

    Raises:
        SingularMetricError: A is not positive definite.

    >>> import torch
    >>> from geoad import operators as ops
    >>> from geoad.params import Layout
    >>> A = ops.Multiple(Layout({"w": (2, 3)}), torch.tensor(4.0), definite=True)
    >>> ops.sample(A, 5, generator=torch.Generator().manual_seed(0))["w"].shape
    torch.Size([5, 2, 3])
    """
    if n < 0:
        raise GeometryError(f"{n} samples were asked for. Their number is a count; pass n >= 0.")
    like, device = operator.like, "cpu" if generator is None else generator.device
    shape = (n, *batch_shape(operator), operator.dim)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=device).to(like.device, like.dtype)
    return factor_product(operator, operator.layout.unravel(noise), True)


@singledispatch
def factor_product(operator: LinearOperator, z: Blocks, invert: bool) -> Blocks:
    """C z with C Cᵀ = A, or C Cᵀ = A⁻¹ with `invert`, for a positive definite A."""
    require_small(operator, "a random sample")
    return factor_product(densify(operator), z, invert)


@factor_product.register
def _(operator: Dense, z: Blocks, invert: bool) -> Blocks:
    if not operator.symmetric and not is_symmetric(operator.matrix):
        raise SingularMetricError(
            "samples of N(0, A⁻¹) were asked for with an A that is not symmetric, which is no precision. Symmetrise it: "
            "0.5 * (B + B.mT)."
        )
    flat = operator.layout.ravel(z)
    if operator.matrix.ndim > 2:
        drawn = dense_factor(operator, flat.unsqueeze(-1), invert).squeeze(-1)
    else:
        drawn = dense_factor(operator, flat.reshape(-1, operator.dim).mT, invert).mT.reshape(flat.shape)
    return operator.layout.unravel(drawn)


def dense_factor(operator: Dense, columns: Tensor, invert: bool) -> Tensor:
    """S L z or S⁻¹ L⁻ᵀ z for A = S L Lᵀ S and vectors in columns."""
    size, lower = factorise(operator, True)[1]
    dtype, columns, size = columns.dtype, columns.to(lower.dtype), size.unsqueeze(-1)
    if not invert:
        return (size * (lower @ columns)).to(dtype)
    batch = torch.broadcast_shapes(lower.shape[:-2], columns.shape[:-2])
    upper, columns = lower.mT.expand(*batch, *lower.shape[-2:]), columns.expand(*batch, *columns.shape[-2:])
    return (torch.linalg.solve_triangular(upper, columns, upper=True) / size).to(dtype)


@factor_product.register
def _(operator: Multiple, z: Blocks, invert: bool) -> Blocks:
    check_diagonal(operator.factor, True)
    return Multiple(operator.layout, powers(operator.factor, -0.5 if invert else 0.5, "multiple of the identity")).mv(z)


@factor_product.register
def _(operator: Diagonal, z: Blocks, invert: bool) -> Blocks:
    for entries in operator.entries.values():
        check_diagonal(entries, True)
    return map_blocks(lambda block, entries: block * entries ** (-0.5 if invert else 0.5), z, operator.entries)


@factor_product.register
def _(operator: Inverse, z: Blocks, invert: bool) -> Blocks:
    return factor_product(operator.operator, z, not invert)


@factor_product.register
def _(operator: Detached, z: Blocks, invert: bool) -> Blocks:
    return detach(factor_product(operator.operator, z, invert))
