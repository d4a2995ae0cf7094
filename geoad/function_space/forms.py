"""The two contractions of a Jacobian: forms pulled back, cometrics pushed forward."""

from __future__ import annotations

from torch import Tensor

from geoad import operators as ops
from geoad.function_space.derivative import Derivative
from geoad.function_space.gram import gram, numbers_beside
from geoad.kernels import products
from geoad.kernels.kernel_gram import Group
from geoad.operators import LinearOperator
from geoad.params import Blocks, Layout, first
from geoad.tangent.inverse import inverse_groups

__all__ = ["Pulled", "Pushed", "many"]


def many(op: LinearOperator, v: Blocks) -> Blocks:
    """A v under the leading axes of v."""
    axes = len(op.layout.batch_shape(v))
    alone = isinstance(op, (Pulled, Pushed, ops.Inverse)) or op.materialised  # these know batches
    return op.mv(v) if alone or not axes else products.batched(op.mv, axes)(v)


class Pulled(ops.Implicit):
    """Jᵀ A J on blocks of the parameters."""

    def __init__(self, derivative: Derivative, inner: LinearOperator) -> None:
        super().__init__(derivative.layout, derivative.x, symmetric=inner.symmetric)
        self.derivative, self.inner = derivative, inner

    def mv(self, v: Blocks) -> Blocks:
        return self._of(self.inner, v)

    def rmv(self, w: Blocks) -> Blocks:
        return self._of(ops.transpose(self.inner), w)

    def _of(self, inner: LinearOperator, v: Blocks) -> Blocks:
        (name,) = inner.layout.names
        return self.derivative.pull(many(inner, {name: self.derivative.push(v)})[name])


@ops.to_dense.register
def _(operator: Pulled) -> Tensor:
    derivative, layout = operator.derivative, operator.inner.layout
    size = layout.dim * operator.dim * first(derivative.x).element_size()
    if size > derivative.max_memory:
        return _by_products(operator)
    jacobian = derivative.dense()
    bent = layout.ravel(many(operator.inner, layout.unravel(jacobian.mT.contiguous()))).mT
    return _symmetrised(operator, jacobian.mT @ bent)


_by_products = ops.to_dense.dispatch(ops.Implicit)


class Pushed(ops.Implicit):
    """J C Jᵀ on the block of the outputs."""

    def __init__(self, derivative: Derivative, inner: LinearOperator, layout: Layout, f: Blocks) -> None:
        super().__init__(layout, f, symmetric=inner.symmetric)
        self.derivative, self.inner = derivative, inner

    def mv(self, v: Blocks) -> Blocks:
        return self._of(self.inner, v)

    def rmv(self, w: Blocks) -> Blocks:
        return self._of(ops.transpose(self.inner), w)

    def _of(self, inner: LinearOperator, w: Blocks) -> Blocks:
        (name,) = self.layout.names
        return {name: self.derivative.push(many(inner, self.derivative.pull(w[name])))}


@ops.to_dense.register
def _(operator: Pushed) -> Tensor:
    derivative, inner = operator.derivative, operator.inner
    if isinstance(inner, ops.Multiple) and inner.factor.ndim == 0:  # rows need not be multiplied out
        kernel = gram(list(derivative.rows()), [Group(derivative.layout.names)])
        return (inner.factor * kernel).to(operator.like.dtype)
    if inner.symmetric and inner.definite:  # nor here, where C has structure; else a few at a time
        groups = inverse_groups(ops.inverse(inner), True)
        rows = derivative.rows(beside=lambda rows: numbers_beside(groups, rows))
        return gram(list(rows), groups, derivative.max_memory // 2).to(operator.like.dtype)
    jacobian = derivative.dense()
    sharp = derivative.layout.ravel(many(inner, derivative.layout.unravel(jacobian)))
    return _symmetrised(operator, sharp @ jacobian.mT)


def _symmetrised(operator: LinearOperator, matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT) if operator.symmetric else matrix
