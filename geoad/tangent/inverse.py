"""Inverse metrics for the rows of a Jacobian: as few operations as their structure allows."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch

import torch

from geoad import operators as ops
from geoad.charts import Chart, Point
from geoad.errors import GeometryError
from geoad.fields import FormField
from geoad.kernels.kernel_gram import Group
from geoad.operators import LinearOperator
from geoad.params import Blocks
from geoad.tensors import Covector, Metric, Vector

__all__ = ["groups_of", "sharp_of"]


def groups_of(metric: FormField, p: Point, reference: Chart) -> list[Group]:
    """The blocks of the reference chart with the inverse of a metric at a point.

    In the reference chart structure is used. A metric with another home takes the rows there by the law of covectors; below an
    immersion that is their restriction, and the metric is the induced one.
    """
    local = metric.local(p)
    positive = issubclass(local.value_class, Metric)
    home, here = local.home, p.to(local.home)
    op = local.operator(here.blocks)
    if home == reference:
        return inverse_groups(op, positive)
    there = p.to(reference)

    def move(rows: Blocks) -> Blocks:
        return Covector(reference, rows, there).to(home).blocks

    return [Group(reference.layout.names, move=move, solve=_solve(op, positive))]


def _solve(op: LinearOperator, positive: bool) -> Callable[[Blocks], Blocks]:
    return lambda rows: ops.solve(op, rows, positive=positive)


def sharp_of(metric: FormField, p: Point, reference: Chart) -> Callable[[Blocks], Blocks]:
    """ω ↦ G⁻¹ω on blocks of the reference chart, which may have batch axes."""
    local = metric.local(p)
    positive = issubclass(local.value_class, Metric)
    here, there = p.to(local.home), p.to(reference)
    op = local.operator(here.blocks)

    def sharp(w: Blocks) -> Blocks:
        if local.home == reference:
            return ops.solve(op, w, positive=positive)
        solved = ops.solve(op, Covector(reference, w, there).to(local.home).blocks, positive=positive)
        return Vector(local.home, solved, here).to(reference).blocks

    return sharp


@singledispatch
def inverse_groups(op: LinearOperator, positive: bool) -> list[Group]:
    """The groups of an operator on the reference chart."""
    if ops.batch_shape(op):
        raise GeometryError(
            f"a tangent kernel takes one metric at one point, found a batch of them, {tuple(ops.batch_shape(op))}. Go through "
            "the points in a loop."
        )
    return [Group(op.layout.names, solve=_solve(op, positive))]


@inverse_groups.register
def _(op: ops.Multiple, positive: bool) -> list[Group]:
    ops.solve(op, {name: torch.zeros_like(op.factor).expand(shape) for name, shape in op.layout.items()}, positive=positive)
    if bool(op.factor == 1):
        return [Group(op.layout.names)]
    return [Group(op.layout.names, scale=1 / op.factor)]


@inverse_groups.register
def _(op: ops.BlockDiagonal, positive: bool) -> list[Group]:
    return [group for part in op.parts.values() for group in inverse_groups(part, positive)]


@inverse_groups.register
def _(op: ops.Kronecker, positive: bool) -> list[Group]:
    inverse, solve = ops.inverse(op, positive=positive), _solve(op, positive)
    arrangement = op.arrangement
    if not isinstance(inverse, ops.Kronecker) or not op.symmetric or arrangement.groups > 1 or inverse.left.ndim > 3:
        return [Group(op.layout.names, solve=solve)]
    layer = (_times(inverse.left[0]), _times(inverse.right[0]))
    return [Group(arrangement.names, solve=solve, layer=layer, transposed=arrangement.transposed)]


def _times(factor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Products with a symmetric factor from the right; a diagonal one is a column."""
    if factor.shape[-1] == 1 != factor.shape[0]:
        return lambda rows: rows * factor[:, 0].to(rows.dtype)
    return lambda rows: rows @ factor.to(rows.dtype)
