"""Kernel ridge regression and classification: what a network becomes when it is trained in its tangent space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from geoad import operators as ops
from geoad.charts import Point
from geoad.errors import GeometryError
from geoad.kernels import products
from geoad.tangent.data import Data
from geoad.tangent.inverse import sharp_of
from geoad.tangent.kernel import TangentKernel
from geoad.tensors import Vector

__all__ = ["KernelMachine", "kernel_ridge", "one_hot"]


def one_hot(labels: Tensor, classes: int, *, centred: bool = True, dtype: torch.dtype | None = None) -> Tensor:
    """Targets (n, c) for classification, one against all: 1 for the class and 0 for the others, less 1/c if `centred`.

    >>> import torch
    >>> one_hot(torch.tensor([1, 0]), 2)
    tensor([[-0.5000,  0.5000],
            [ 0.5000, -0.5000]])
    """
    if labels.is_floating_point() or not bool(((labels >= 0) & (labels < classes)).all()):
        raise GeometryError(
            f"labels must be integers from 0 to {classes - 1}, found {labels.dtype} from {labels.min()} to {labels.max()}."
        )
    targets = functional.one_hot(labels, classes).to(dtype or torch.get_default_dtype())
    return targets - 1 / classes if centred else targets


@dataclass(frozen=True)
class KernelMachine:
    """A function f₀(x) + K(x, X) α; made by `kernel_ridge`.

    Attributes:
        field: the kernel, over the training data X.
        point: where it was taken.
        coefficients: α, in the shape of the targets.
        offset: whether the network's own outputs f₀ at the point are added.
        displacement: v = G⁻¹Jᵀα, if the kernel is not contracted: the function is then the linearised network f₀ + J v.
    """

    field: TangentKernel
    point: Point
    coefficients: Tensor
    offset: bool
    displacement: Vector | None

    def predict(self, x: Any) -> Tensor:
        """The values (m, ..., c) for inputs `x`."""
        data = Data(self.field.geo, x, self.field.select)
        theta = self.point.to(self.field.geo.reference).blocks
        if self.displacement is not None:
            v = self.displacement.to(self.field.geo.reference).blocks
            parts = [
                products.jvp(lambda y, inputs=inputs: data.evaluate(y, inputs), theta, v)
                for _, inputs, _ in data.batches.sized()
            ]
            return torch.cat([f + jv if self.offset else jv for f, jv in parts]).detach()
        cross = self.field.with_data(x, self.field.left.source)
        found = torch.cat([self._times(block) for _, block in cross.blocks(self.point)])
        return found + data.values(theta) if self.offset else found

    def _times(self, block: Tensor) -> Tensor:
        """K(x, X) α for some rows."""
        alpha = self.coefficients
        if self.field.contract == "diagonal":
            return torch.einsum("kab,bk->ak", block.flatten(2).flatten(1, -2), alpha.reshape(-1, alpha.shape[-1]))
        axes = alpha.ndim - 1
        return torch.tensordot(block, alpha, axes) / alpha.shape[-1]

    def classify(self, x: Any) -> Tensor:
        """The class with the largest value, (m, ...)."""
        return self.predict(x).argmax(-1)


def kernel_ridge(
    field: TangentKernel,
    p: Point,
    targets: Tensor,
    ridge: float = 1e-3,
    *,
    offset: bool = True,
    method: ops.CG | None = None,
) -> KernelMachine:
    r"""The function f in the tangent space of the network that minimises :math:`|f(X) - y|^2 + \lambda |v|_G^2`.

    Args:
        field: the kernel over the training data X. contract="none": f = f₀ + J v is the linearised network, exactly.
            contract="trace": the mean of the kernels of the outputs serves each of them. contract="diagonal": each output has
            its own kernel.
        p: the point.
        targets: y, in the shape of the outputs; `one_hot` makes them of classes.
        ridge: λ, in the units of the kernel.
        offset: start from the network's outputs f₀ at p (else from 0).
        method: conjugate gradients, for a matrix-free kernel or a large one.

    Raises:
        SingularMetricError: K + λ is not positive definite.

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(2, 1, bias=False))  # linear ridge regression
    >>> x, y = torch.eye(2), torch.tensor([[2.0], [4.0]])
    >>> machine = geoad.tangent.kernel_ridge(geoad.ntk(geo, x), geo.point(), y, ridge=1.0, offset=False)
    >>> machine.predict(x).squeeze()  # y / (1 + λ)
    tensor([1., 2.])
    """
    if not field.symmetric:
        raise GeometryError(
            f"kernel regression needs the kernel of the training data alone, found {field!r}. Pass ntk(geo, x)."
        )
    if not ridge >= 0:
        raise GeometryError(f"ridge must be at least 0, got {ridge}: with less there is no minimum.")
    f = field.outputs(p)
    if targets.shape != f.shape:
        raise GeometryError(
            f"targets of shape {tuple(targets.shape)} were given for outputs of shape {tuple(f.shape)}. They must be the same; "
            "for classes use geoad.tangent.one_hot(labels, c)."
        )
    right = targets.to(f) - f if offset else targets.to(f)
    alpha = _solved(field, p, right, ridge, method)
    return KernelMachine(field, p, alpha, offset, _displacement(field, p, alpha) if field.contract == "none" else None)


def _solved(field: TangentKernel, p: Point, right: Tensor, ridge: float, method: ops.CG | None) -> Tensor:
    op = field(p).op
    layout = op.layout
    if field.contract == "trace" and right.ndim > 1:
        op, right = ops.times(1 / right.shape[-1], op, positive=True), right.movedim(-1, 0)
    elif field.contract == "diagonal" and right.ndim > 1:
        right = right.movedim(-1, 0)
    shifted = ops.plus(op, ops.Multiple(layout, right.new_tensor(ridge)), definite=ridge > 0) if ridge else op
    if not isinstance(op, ops.Dense) and method is None:
        method = ops.CG()
    found = ops.solve(shifted, {"f": right.contiguous()}, positive=True, method=method)["f"]
    return found if field.contract == "none" or found.ndim == 1 else found.movedim(0, -1)


def _displacement(field: TangentKernel, p: Point, alpha: Tensor) -> Vector:
    """G⁻¹Jᵀα."""
    reference = field.geo.reference
    here = p.to(reference)
    total: dict[str, Tensor] | None = None
    start = 0
    for size, inputs, _ in field.left.batches.sized():
        pull = products.vjp(lambda y, inputs=inputs: field.left.evaluate(y, inputs), here.blocks)[1]
        term = pull(alpha[start : start + size])
        total = term if total is None else {name: total[name] + term[name] for name in term}
        start += size
    assert total is not None
    v = sharp_of(field.metric, p, reference)({name: block.detach() for name, block in total.items()})
    return Vector(reference, v, here).to(p.chart)
