"""Inverse metrics for the rows of a Jacobian: as few operations as their structure allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import singledispatch

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.charts import Chart, Point
from geoad.errors import GeometryError
from geoad.fields import FormField
from geoad.kernels.kernel_gram import Group, LayerRoot, turned_by
from geoad.operators import LinearOperator
from geoad.operators.sample import dense_factor
from geoad.operators.solve import check_diagonal, working
from geoad.params import Blocks, Layout
from geoad.tensors import Covector, Metric, Vector

__all__ = ["Sharp", "groups_of", "sharp_of"]

Sharp = Callable[[Blocks], Blocks]
"""ω ↦ G⁻¹ω on blocks of the reference chart."""


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

    if isinstance(op, ops.Multiple) and not op.factor.ndim and positive:
        _require_regular(op, positive)
        return [Group(reference.layout.names, 1 / op.factor, move)]
    if isinstance(op, ops.Dense) and positive:
        return [replace(group, names=reference.layout.names, move=move) for group in inverse_groups(op, positive)]
    return [Group(reference.layout.names, move=move, solve=_solve(op, positive))]


def _solve(op: LinearOperator, positive: bool) -> Callable[[Blocks], Blocks]:
    if not op.symmetric:
        raise GeometryError(
            f"a tangent kernel was asked for with a form that is not symmetric ({op}): J G⁻¹ Jᵀ would depend on the order of "
            "its data sets. Pass a metric, or the symmetric part of the form."
        )

    def solve(rows: Blocks) -> Blocks:
        like = op.like.dtype
        found = ops.solve(op, {name: row.to(like) for name, row in rows.items()}, positive=positive)
        return {name: found[name].to(row.dtype) for name, row in rows.items()}

    return solve


def sharp_of(metric: FormField, p: Point, reference: Chart) -> Sharp:
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


# -- groups ------------------------------------------------------------------------------------------------------------------


@singledispatch
def inverse_groups(op: LinearOperator, positive: bool) -> list[Group]:
    """The groups of an operator on the reference chart: with roots of the inverse where there are cheap ones."""
    _require_one(op)
    return [Group(op.layout.names, solve=_solve(op, positive))]


def _require_one(op: LinearOperator) -> None:
    if ops.batch_shape(op):
        raise GeometryError(
            f"a tangent kernel takes one metric at one point, found a batch of them, {tuple(ops.batch_shape(op))}. Go through "
            "the points in a loop."
        )


def _require_regular(op: ops.Multiple | ops.Diagonal, positive: bool) -> None:
    """Raise `SingularMetricError` where it has no inverse."""
    ops.solve(op, {name: op.like.new_zeros(()).expand(shape) for name, shape in op.layout.items()}, positive=positive)


@inverse_groups.register
def _(op: ops.Multiple, positive: bool) -> list[Group]:
    _require_one(op)
    _require_regular(op, positive)
    if not positive:
        return [Group(op.layout.names, solve=_solve(op, positive))]
    if bool(op.factor == 1):
        return [Group(op.layout.names)]
    return [Group(op.layout.names, scale=1 / op.factor)]


@inverse_groups.register
def _(op: ops.Diagonal, positive: bool) -> list[Group]:
    _require_one(op)
    _require_regular(op, positive)
    if not positive:
        return [Group(op.layout.names, solve=_solve(op, positive))]
    entries = {name: block.rsqrt() for name, block in op.entries.items()}
    return [Group(op.layout.names, root=lambda rows: _each_times(rows, entries), entries=entries)]


def _each_times(rows: Blocks, entries: Blocks) -> Blocks:
    return {name: row * entries[name].to(row.dtype) for name, row in rows.items()}


@inverse_groups.register
def _(op: ops.BlockDiagonal, positive: bool) -> list[Group]:
    return [group for part in op.parts.values() for group in inverse_groups(part, positive)]


@inverse_groups.register
def _(op: ops.Dense, positive: bool) -> list[Group]:
    _require_one(op)
    if not positive:
        return [Group(op.layout.names, solve=_solve(op, positive))]
    root = _dense_root(op)

    def times(rows: Blocks) -> Blocks:
        flat = op.layout.ravel({name: rows[name] for name in op.layout.names})
        return {"": flat @ root.to(flat.dtype)}

    return [Group(op.layout.names, root=times)]


def _dense_root(op: ops.Dense) -> Tensor:
    """U with U Uᵀ = A⁻¹: S⁻¹ L⁻ᵀ for A = S L Lᵀ S."""
    eye = torch.eye(op.matrix.shape[-1], dtype=op.matrix.dtype, device=op.matrix.device)
    return dense_factor(op, working(eye), True)


@inverse_groups.register
def _(op: ops.Kronecker, positive: bool) -> list[Group]:
    if not positive or ops.batch_shape(op) or not op.symmetric:
        _require_one(op)
        return [Group(op.layout.names, solve=_solve(op, positive))]
    return [_of_layer(op.arrangement, op.layout, _factor_root(op, "left"), _factor_root(op, "right"), None)]


def _factor_root(op: ops.Kronecker, side: str) -> Tensor:
    factor: Tensor = getattr(op, side)
    if factor.shape[-1] == 1:
        check_diagonal(factor, True)
        return factor.rsqrt()
    return _dense_root(ops.Dense(Layout({side: (factor.shape[-1],)}), factor, symmetric=True))


@inverse_groups.register
def _(op: ops.EigenKronecker, positive: bool) -> list[Group]:
    _require_one(op)
    inverse = ops.inverse(op, positive=positive)
    if not positive or not isinstance(inverse, ops.EigenKronecker):
        return [Group(op.layout.names, solve=_solve(op, positive))]
    weights = inverse.values.sqrt()
    return [_of_layer(op.arrangement, op.layout, inverse.left_basis, inverse.right_basis, weights)]


def _of_layer(
    arrangement: ops.Arrangement, layout: Layout, left: Tensor | None, right: Tensor | None, weights: Tensor | None
) -> Group:
    """The group of a layer with a root V ↦ w ∘ (U_Lᵀ V U_R)."""

    def root(rows: Blocks) -> Blocks:
        turned = arrangement.matrix(layout, {name: rows[name] for name in layout.names})
        turned = turned_by(turned_by(turned, right).mT, left).mT
        return {"": turned if weights is None else turned * weights.to(turned.dtype)}

    layer = LayerRoot(left, right, weights, arrangement.transposed, arrangement.groups)
    return Group(arrangement.names, root=root, layer=layer)
