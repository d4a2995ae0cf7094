"""The tangent kernel as a matrix-free operator: K u = J G⁻¹ Jᵀ u by one vjp, one solve and one jvp."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.charts import Point
from geoad.data import refuse_spoilt
from geoad.kernels import products
from geoad.kernels.finite import FirstLook
from geoad.kernels.linear import Repeated
from geoad.params import Blocks, Layout, add
from geoad.tangent.inverse import sharp_of

if TYPE_CHECKING:
    from geoad.tangent.kernel import TangentKernel

__all__ = ["KernelOperator"]


class KernelOperator(ops.Implicit):
    """J G⁻¹ Jᵀ on the outputs of a network over a data set; symmetric and positive semidefinite.

    What products share is kept from the second one on, as far as a share of the field's `max_memory` reaches.
    """

    def __init__(self, field: TangentKernel, p: Point, layout: Layout, outputs: Tensor) -> None:
        super().__init__(layout, {"f": outputs}, symmetric=True)
        self.field, self.p = field, p
        theta = p.to(field.geo.reference).blocks
        self.sharp = sharp_of(field.metric, p, field.geo.reference)
        self._batches = _batches(field, theta)
        self._look = FirstLook(functools.partial(refuse_spoilt, "the tangent kernel", theta, field.left.batches, targets=False))

    def mv(self, v: Blocks) -> Blocks:
        u = v["f"]
        axes = u.ndim - len(self.layout["f"])
        if self.field.contract == "trace" and self.x["f"].ndim > 1:
            found = _summed(self._product, u, self.x["f"].shape[-1], axes)
        else:
            found = self._product(u, axes)
        self._look(v, {"f": found})
        return {"f": found}

    def _product(self, u: Tensor, axes: int) -> Tensor:
        total: Blocks | None = None
        for place, pull, _ in self._batches:
            term = pull.batched(u[(slice(None),) * axes + (place,)].contiguous(), axes)
            total = term if total is None else add(total, term)
        assert total is not None
        v = self.sharp(total)
        return torch.cat([push.batched(v, axes) for _, _, push in self._batches], axes)


def _batches(field: TangentKernel, theta: Blocks) -> list[tuple[slice, Repeated, Repeated]]:
    """For each batch its place among the samples, Jᵀ and J."""
    found: list[tuple[slice, Repeated, Repeated]] = []
    sized = list(field.left.batches.sized())
    room, start = field.max_memory // (2 * len(sized)), 0
    for size, inputs, _ in sized:
        fn = functools.partial(_evaluate, field, inputs)
        pull = Repeated(lambda fn=fn: [lambda u: products.vjp(fn, theta)[1](u)], room)
        push = Repeated(lambda fn=fn: [lambda v: products.jvp(fn, theta, v)[1]], room)
        found.append((slice(start, start + size), pull, push))
        start += size
    return found


def _evaluate(field: TangentKernel, inputs: Any, theta: Blocks) -> Tensor:
    return field.left.evaluate(theta, inputs)


def _summed(product: Callable[[Tensor, int], Tensor], u: Tensor, count: int, axes: int) -> Tensor:
    """Σ_c K_{nc,mc} u_m: u at each output in turn."""
    eye = torch.eye(count, dtype=u.dtype, device=u.device)
    spread = u.unsqueeze(0).unsqueeze(-1) * eye.reshape(count, *[1] * u.ndim, count)
    found = product(spread, axes + 1)
    return torch.stack([found[k, ..., k] for k in range(count)]).sum(0)


@ops.to_dense.register
def _(operator: KernelOperator) -> Tensor:
    dense = operator.field.with_data(operator.field.left.source, representation="dense")
    return dense(operator.p).to_dense()
