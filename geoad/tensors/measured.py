"""Samples, powers and inner products of bilinear forms: what needs a metric, computed where the form was made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.charts import same_space
from geoad.errors import VarianceError
from geoad.operators import LinearOperator
from geoad.operators.algebra import diagonal_of
from geoad.operators.spectra import noise_of, powers
from geoad.params import map_blocks
from geoad.tensors.base import HANDLERS, describe, require_same_place
from geoad.tensors.forms import Form, InnerProduct, Metric, reference_metric, seen_from
from geoad.tensors.rank1 import Vector
from geoad.tensors.rank2 import common_home

__all__ = ["inner", "power", "sample"]


def sample(form: Form, n: int, generator: torch.Generator | None = None) -> Vector:
    """n vectors from N(0, B⁻¹); see `Form.sample`."""
    blocks = ops.sample(form.op, n, generator=generator)
    at = form.at.to(form.home)
    points = len(at.batch_shape)
    if points and len(ops.batch_shape(form.op)) < points:  # one set of numbers for all points of the batch
        blocks = map_blocks(lambda block: block.expand(*at.batch_shape, *block.shape), blocks)
    elif points:
        blocks = map_blocks(lambda block: block.movedim(0, points), blocks)
    return Vector(form.home, blocks, at).to(form.chart)


def _require_form(what: str, thing: Any, kind: type[Form] = Form) -> None:
    if not isinstance(thing, kind):
        wanted = "a metric" if kind is InnerProduct else "(0,2) forms"
        raise VarianceError(
            f"{what} is for {wanted}, found {describe(thing)}. Lower the indices of other tensors first: G @ E for an "
            "endomorphism, C.inverse() for a cometric; a field is evaluated at a point: field(p)."
        )


def power(form: Form, p: float, metric: Any = None) -> Form:
    """R (R⁻¹B)^p; see `Form.power`."""
    metric = reference_metric(form) if metric is None else metric
    _require_form("a power with respect to a metric", metric, InnerProduct)
    require_same_place(form, metric, "take a power of")
    if not form.op.symmetric:
        raise VarianceError(
            f"the power {p:g} of {describe(form)} was asked for, which is not symmetric. Powers are taken of symmetric forms: "
            "0.5 * (B + B.mT); for others of the endomorphism, (G.inverse() @ B)."
        )
    home, b, g = common_home(form, metric)
    if isinstance(g, ops.Multiple) and g.factor.ndim == 0:
        raised = ops.times(g.factor ** (1 - p), ops.power(b, p), positive=True)
    else:
        raised = _power_between(b, g, float(p))
    return seen_from(Metric if isinstance(form, InnerProduct) else Form, home, raised, form.at)


def _power_between(b: LinearOperator, g: LinearOperator, p: float) -> LinearOperator:
    """G (G⁻¹B)^p = (G U) diag(λ^p) (G U)ᵀ for the G-orthonormal eigenvectors U."""
    ops.require_small(b, f"the power {p:g} with respect to a metric that is no multiple of the reference metric")
    values, vectors = ops.eigh(b, g)
    raised = powers(values, p, "form", noise=noise_of(values, b.dim))
    lowered = ops.densify(g).matrix @ vectors
    return ops.Dense(b.layout, (lowered * raised.unsqueeze(-2)) @ lowered.mT, symmetric=True, definite=b.definite)


def inner(metric: InnerProduct, a: Form, b: Form) -> Tensor:
    """tr G⁻¹A G⁻¹B; see `InnerProduct.inner`."""
    for each in (a, b):
        _require_form("the inner product of a metric", each)
        require_same_place(metric, each, "compare")
    if metric.home == a.home == b.home:
        return inner_between(metric.op, a.op, b.op)
    # under a map that cannot be undone the chart in which all are seen is the only one that is sure to serve them
    alike = same_space(metric.home, a.home) and same_space(metric.home, b.home)
    home = metric.home.space if alike else metric.chart
    g, x, y = (each.operator_in(home) for each in (metric, a, b))
    return inner_between(g, x, y)


def inner_between(g: LinearOperator, a: LinearOperator, b: LinearOperator) -> Tensor:
    """G^ik G^jl A_ij B_kl, without dense matrices where the structure of G allows it."""
    if isinstance(g, ops.Multiple):
        return ops.inner(a, b) / g.factor.square()
    parts = _parts(g, a, b)
    if parts is not None:
        return torch.stack([inner_between(*part) for part in parts]).sum(0)
    if isinstance(g, ops.Diagonal):
        whitened = [_over(each, g) for each in (a, b)]
        if whitened[0] is not None and whitened[1] is not None:
            return ops.inner(whitened[0], whitened[1])
    ops.require_small(a, "the inner product with respect to a metric that is no multiple of the identity where it was made")
    inverse = ops.to_dense(ops.inverse(g, positive=True))
    return ((inverse @ ops.to_dense(a) @ inverse) * ops.to_dense(b)).sum((-2, -1))


def _parts(g: LinearOperator, a: LinearOperator, b: LinearOperator) -> list[Any] | None:
    """The parts of three block-diagonal operators of one partition."""
    blocks = [op for op in (g, a, b) if isinstance(op, ops.BlockDiagonal)]
    if len(blocks) < 3 or not blocks[0].parts.keys() == blocks[1].parts.keys() == blocks[2].parts.keys():
        return None
    return [[op.parts[group] for op in blocks] for group in blocks[0].parts]


def _over(op: LinearOperator, g: ops.Diagonal) -> LinearOperator | None:
    """D^(-1/2) A D^(-1/2) in the structure of A, if that is kept."""
    if isinstance(op, (ops.Multiple, ops.Diagonal)):
        return ops.Diagonal(op.layout, map_blocks(torch.div, diagonal_of(op), g.entries))
    if isinstance(op, ops.LowRank):
        base = None if op.base is None else _over(op.base, g)
        return ops.LowRank(op.layout, map_blocks(lambda u, d: u * d.rsqrt(), op.factors, g.entries), op.signs, base)
    if isinstance(op, ops.Dense):
        root = op.layout.ravel(g.entries).rsqrt()
        return ops.Dense(op.layout, root.unsqueeze(-1) * op.matrix * root.unsqueeze(-2), symmetric=op.symmetric)
    return None


HANDLERS.update(sample=sample, power=power, inner=inner)
