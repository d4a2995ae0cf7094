r"""The law tables in code: how plain components move between two charts of a manifold.

==================  =============================  ===========================
object              law under φ, J = ∂ψ/∂θ         here
==================  =============================  ===========================
vector (1,0)        :math:`J v`                    `vector`
covector (0,1)      :math:`J^{-\top} \omega`       `covector`
(k,l) tensor        one of the above on each axis  `dense`
density, weight w   times :math:`|\det J|^{-w}`    `log_abs_det`
==================  =============================  ===========================

(0,2), (2,0) and (1,1) objects move lazily (`geoad.tensors`): their numbers stay in the chart where they were made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from geoad.charts import Chart, Point, Reparametrization, over_batch, path
from geoad.params import Blocks, first

__all__ = ["covector", "dense", "is_elementwise", "log_abs_det", "vector"]

_Product = Callable[[Blocks, Blocks, Blocks], Blocks]


def _apply(product: _Product, x: Point, y: Point, v: Blocks) -> Blocks:
    """The product under the batch axes of the point (in front) and further ones of the vector (behind them)."""
    points = len(x.batch_shape)
    extra = len(x.chart.layout.batch_shape(v)) - points
    if points == 0 and extra == 0:
        return product(x.blocks, y.blocks, v)
    fn: Callable[..., Blocks] = product
    for _ in range(extra):
        fn = torch.func.vmap(fn, in_dims=(None, None, 0))
    return over_batch(fn, points, x.blocks, y.blocks, v)


def _move(v: Blocks, at: Point, end: Chart, contravariant: bool) -> Blocks:
    here = at
    for phi, along in path(at.chart, end):
        there = here.to(phi.target if along else phi.source)
        theta, psi = (here, there) if along else (there, here)
        v = _apply(_product(phi, along, contravariant), theta, psi, v)
        here = there
    return v


def _product(phi: Reparametrization, along: bool, contravariant: bool) -> _Product:
    bound = phi.map
    if contravariant:
        return bound.push if along else bound.push_inverse
    return bound.pull_inverse if along else bound.pull


def vector(v: Blocks, at: Point, end: Chart) -> Blocks:
    """J v: components of a vector at `at` in chart `end`, given those in the chart of `at`."""
    return _move(v, at, end, contravariant=True)


def covector(w: Blocks, at: Point, end: Chart) -> Blocks:
    """J⁻ᵀ w: components of a covector at `at` in chart `end`, given those in the chart of `at`."""
    return _move(w, at, end, contravariant=False)


def log_abs_det(at: Point, end: Chart) -> Tensor:
    """log |det ∂(end)/∂(chart of at)| at the point, a scalar (or one for each point of a batch)."""
    total = first(at.blocks).new_zeros(at.batch_shape)
    here = at
    for phi, along in path(at.chart, end):
        there = here.to(phi.target if along else phi.source)
        theta, psi = (here, there) if along else (there, here)
        fn: Callable[..., Tensor] = phi.map.log_abs_det
        for _ in at.batch_shape:
            fn = torch.func.vmap(fn)
        step = fn(theta.blocks, psi.blocks)
        total = total + step if along else total - step
        here = there
    return total


def dense(data: Tensor, ups: Sequence[bool | None], at: Point, end: Chart) -> Tensor:
    """Move raveled components (n_1, ..., n_k): each axis by its own law; None marks an axis that does not move."""
    layout, points = at.chart.layout, at.batch_shape
    if data.ndim - len(ups) < len(points):
        data = data.expand(*points, *data.shape)
    for axis, up in enumerate(ups):
        if up is None:
            continue
        trailing = data.movedim(axis - len(ups), -1)
        moved = (vector if up else covector)(layout.unravel(trailing), at, end)
        data = layout.ravel(moved).movedim(-1, axis - len(ups))
    return data


def is_elementwise(start: Chart, end: Chart) -> bool:
    """True if the Jacobian between the charts is diagonal by construction."""
    return all(phi.map.elementwise for phi, _ in path(start, end))
