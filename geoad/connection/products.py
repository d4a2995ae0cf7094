r"""The Levi-Civita connection in products: :math:`\Gamma` contracted with two vectors, without Christoffel symbols.

Everything here is plain: blocks of the home chart of a metric field in, blocks out. With
:math:`\Gamma_{k;ij} = \tfrac12(\partial_i G_{jk} + \partial_j G_{ik} - \partial_k G_{ij})`,

* `contracted` gives :math:`w^k\,\Gamma_{k;ij}\,v^i` (a covector in j), which is what a Riemannian Hessian subtracts;
* `first_kind` gives :math:`\Gamma_{k;ij}\,u^i v^j` (a covector in k), which geodesics and parallel transport need.

Both are linear in G, so a sum of fields is the sum of its terms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch

from torch import Tensor

from geoad.fields.metric import FormField, SumField
from geoad.kernels import products
from geoad.params import Blocks, add, axpy, dot, scale, sub, zeros_like

__all__ = ["contracted", "first_kind"]


def _derivative(fn: Callable[[Blocks], Blocks], x: Blocks, v: Blocks) -> Blocks:
    """D_v fn."""
    return products.jvp(fn, x, v)[1]


def _slope(fn: Callable[[Blocks], Tensor], x: Blocks) -> Blocks:
    return products.gradient(lambda y: (fn(y), ()), x)[0]


def _over_terms(field: SumField, like: Blocks, product: Callable[[FormField], Blocks]) -> Blocks:
    """Σ c · product(term): the connection is linear in the metric, and constant terms have none."""
    total = zeros_like(like)
    for factor, term in field.parts_at_home():
        if not term.constant:
            total = axpy(factor, product(term), total)
    return total


@singledispatch
def contracted(field: FormField, x: Blocks, v: Blocks, w: Blocks) -> Blocks:
    """w^k Γ_{k;ij} v^i = ½ [grad(wᵀG v) + D_v(G w) - D_w(G v)]_j, with w and v held constant."""
    if field.constant:
        return zeros_like(v)
    slope = _slope(lambda y: dot(w, field.product(y, v)), x)
    along_v = _derivative(lambda y: field.product(y, w), x, v)
    along_w = _derivative(lambda y: field.product(y, v), x, w)
    return scale(0.5, sub(add(slope, along_v), along_w))


@contracted.register
def _(field: SumField, x: Blocks, v: Blocks, w: Blocks) -> Blocks:
    return _over_terms(field, v, lambda term: contracted(term, x, v, w))


@singledispatch
def first_kind(field: FormField, x: Blocks, u: Blocks, v: Blocks) -> Blocks:
    """Γ_{k;ij} u^i v^j = ½ [D_u(G v) + D_v(G u) - grad(uᵀG v)]_k."""
    if field.constant:
        return zeros_like(v)
    along_u = _derivative(lambda y: field.product(y, v), x, u)
    along_v = along_u if u is v else _derivative(lambda y: field.product(y, u), x, v)
    slope = _slope(lambda y: dot(u, field.product(y, v)), x)
    return scale(0.5, sub(add(along_u, along_v), slope))


@first_kind.register
def _(field: SumField, x: Blocks, u: Blocks, v: Blocks) -> Blocks:
    return _over_terms(field, v, lambda term: first_kind(term, x, u, v))
