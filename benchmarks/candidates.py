"""Who takes part: geoad and plain PyTorch here, other libraries in `rivals`.

A candidate is called with the workload and a fresh copy of its network; everything it does from there on is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import plain
import torch
import torch.nn.functional as F
from plain import Candidate, Result
from torch import Tensor, nn
from workloads import ROWS, Work

LIBRARIES = {
    "geoad": "geoad",
    "torch": "torch",
    "nngeometry": "nngeometry",
    "curvlinops": "curvlinops-for-pytorch",
    "backpack": "backpack-for-pytorch",
    "asdl": "asdfghjkl",  # "asdl" in the package index is something else
    "laplace": "laplace-torch",
    "pyhessian": "PyHessian",
    "hessian-eigenthings": "hessian-eigenthings",
}
"""Name in the tables -> name of the distribution."""

CANDIDATES: dict[str, dict[str, Candidate]] = {name: {} for name in ROWS}
"""Row -> "library" or "library: variant" -> candidate."""

UNRANKED = {"torch: hooks"}
"""Written by hand here, so nobody's rival; shown all the same."""


def library(name: str) -> str:
    return name.partition(":")[0]


def version(name: str) -> str | None:
    """The installed version of a library; None if there is none."""
    try:
        return metadata.version(LIBRARIES[name])
    except metadata.PackageNotFoundError:
        return None


def candidate(rows: str, name: str) -> Callable[[Candidate], Candidate]:
    """Register a function for some rows."""

    def register(fn: Candidate) -> Candidate:
        for row in rows.split():
            CANDIDATES[row][name] = fn
        return fn

    return register


# -- geoad ---------------------------------------------------------------------------------------------------------------------


def _fisher(w: Work, net: nn.Module, representation: str) -> Any:
    import geoad

    geo = geoad.GeoModule(net)
    return geoad.curvature.Fisher(geo, w.x, "categorical", representation=representation)(geo.point())


def _typed_product(tensor: Any) -> Callable[[Tensor], Tensor]:
    return lambda v: tensor.mv(tensor.chart.vector(v, at=tensor.at)).ravel()


@candidate("a", "geoad")
def _(w: Work, net: nn.Module) -> Result:
    return _fisher(w, net, "dense").to_dense()


@candidate("b b2 b3", "geoad")
def _(w: Work, net: nn.Module) -> Result:
    import geoad

    geo = geoad.GeoModule(net)
    return geoad.ntk(geo, w.x)(geo.point()).components


@candidate("c1", "geoad")
def _(w: Work, net: nn.Module) -> Result:
    return {"joint": _typed_product(_fisher(w, net, "kfac"))(w.flat)}


@candidate("c2", "geoad")
def _(w: Work, net: nn.Module) -> Result:
    import geoad

    metric = _fisher(w, net, "ekfac")
    return {"trace": geoad.operators.trace(metric.operator), "product": _typed_product(metric)(w.flat)}


@candidate("d d2", "geoad")
def _(w: Work, net: nn.Module) -> Result:
    import geoad

    op = _fisher(w, net, "diagonal").operator
    return op.layout.ravel(geoad.operators.diagonal(op))


@candidate("e e20", "geoad")
def _(w: Work, net: nn.Module) -> Result:
    return w.products(_typed_product(_fisher(w, net, "implicit")))


def _hessian(w: Work, net: nn.Module) -> Any:
    import geoad

    geo = geoad.GeoModule(net)
    return geoad.hessian(geo.loss(F.cross_entropy, (w.x, w.y)))(geo.point())


@candidate("f f50", "geoad")
def _(w: Work, net: nn.Module) -> Result:
    return w.products(_typed_product(_hessian(w, net)))


@candidate("f2", "geoad")
def _(w: Work, net: nn.Module) -> Result:
    import geoad

    return geoad.operators.eigvals(_hessian(w, net).operator, k=1)[0]


@candidate("g", "geoad")
def _(w: Work, net: nn.Module) -> Result:
    form = _hessian(w, net)
    vectors = [form.chart.vector(z, at=form.at) for z in w.probes()]
    return torch.stack([form(z, z) for z in vectors]).mean()


@candidate("h", "geoad")
def _(w: Work, net: nn.Module) -> Result:
    return [block.matrix for block in _fisher(w, net, "block_diagonal").operator.parts.values()]


@candidate("i", "geoad")
def _(w: Work, net: nn.Module) -> Result:
    import geoad

    geo = geoad.GeoModule(net)
    return geoad.per_sample_grads(geo.loss(F.cross_entropy, (w.x, w.y)))(geo.point()).ravel()


# -- plain PyTorch -------------------------------------------------------------------------------------------------------------

candidate("a b b2 b3 d d2 h", "torch: vmap(jacrev)")(lambda w, net: plain.REFERENCE[w.row.name](w, net))
candidate("b b2 b3", "torch: vmap(jacrev), by parameter")(plain.tangent_kernel_by_parameter)
candidate("c1", "torch: hooks")(plain.kfac)
candidate("c2", "torch: hooks")(plain.ekfac)
candidate("e e20", "torch: jvp, vjp")(plain.fisher_products)
candidate("e20", "torch: linearize, vjp")(plain.fisher_products_linearized)
candidate("f f50", "torch: jvp of grad")(plain.hessian_products)
candidate("f50", "torch: vjp of grad, kept")(plain.hessian_products_kept)
candidate("f2", "torch: with scipy")(plain.top_eigenvalue)
candidate("g", "torch")(plain.hutchinson)
candidate("g", "torch: vmap over probes")(plain.hutchinson_batched)
candidate("i", "torch: vmap(grad)")(plain.per_sample)
candidate("i", "torch: ExpandedWeights")(plain.per_sample_expanded)
