"""Curvature fields JᵀA(f)J of a network over data, and their connection by half a residual."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from geoad import operators as ops
from geoad.charts import Chart
from geoad.connection.products import contracted, first_kind
from geoad.fields import MetricField, Transition
from geoad.kernels import products
from geoad.params import Blocks, axpy, scale

__all__ = ["OutputCurvature", "Part"]

Part = tuple[float, Callable[[Blocks], Tensor]]
"""(weight, outputs of one batch as a function of the blocks of the home chart)."""


class OutputCurvature(MetricField):
    r"""Σ w Jᵀ A(f) J over the parts of a data set. A subclass gives `parts` and `curvature`, the product A(f) t.

    Attributes:
        hessian_type: ∂A is totally symmetric, so that the connection costs one ordinary second-order product.
    """

    hessian_type: bool = False

    def __init__(self, home: Chart, representation: str) -> None:
        super().__init__(home)
        self.representation = representation
        self.way: Transition | None = Transition(home, home.reference) if home != home.reference else None

    def reference_parts(self) -> Iterable[Part]:
        """(weight, outputs of a batch as a function of the reference coordinates)."""
        raise NotImplementedError

    def curvature(self, outputs: Tensor, t: Tensor) -> Tensor:
        """A(f) t."""
        raise NotImplementedError

    def inspect(self, outputs: Tensor, x: Blocks) -> None:
        """Hook: refuse outputs at the point `x` for which the curvature has no value."""

    def parts(self) -> Iterable[Part]:
        """(weight, outputs of a batch as a function of the blocks of ``home``)."""
        for weight, outputs in self.reference_parts():
            way = self.way
            yield weight, outputs if way is None else (lambda x, outputs=outputs, way=way: outputs(way(x)))

    def product(self, x: Blocks, v: Blocks) -> Blocks:
        total: Blocks | None = None
        for weight, outputs in self.parts():
            f, velocity = products.jvp(outputs, x, v)
            self.inspect(f, x)
            term: Blocks = products.vjp(outputs, x)[1](weight * self.curvature(f, velocity))
            total = term if total is None else axpy(1.0, total, term)
        assert total is not None
        return total

    def operator(self, x: Blocks) -> ops.LinearOperator:
        if self.representation == "implicit":
            return CurvatureOperator(self, x)
        return ops.Dense(self.home.layout, self.dense(x), symmetric=True)

    def dense(self, x: Blocks) -> Tensor:
        """The matrix, by ``vmap`` + ``jacrev`` over samples in chunks of bounded size."""
        raise NotImplementedError


class CurvatureOperator(ops.Implicit):
    """The matrix-free value of a curvature field at a point: one jvp and one vjp of the network for a product."""

    def __init__(self, field: OutputCurvature, x: Blocks) -> None:
        super().__init__(field.home.layout, x, symmetric=True)
        self.field = field

    def mv(self, v: Blocks) -> Blocks:
        return self.field.product(self.x, v)


@ops.to_dense.register
def _(operator: CurvatureOperator) -> Tensor:
    return operator.field.dense(operator.x)


def _half_residual(field: OutputCurvature, x: Blocks, v: Blocks, w: Blocks) -> Blocks:
    """D_v [θ ↦ Jᵀ ½(A(f) c + A(f₀) c)] with c = J w frozen: w^k Γ_{k;ij} v^i for A of Hessian type."""
    total: Blocks | None = None
    for weight, outputs in field.parts():
        f0, c = products.jvp(outputs, x, w)
        fixed = field.curvature(f0, c)

        def covector(y: Blocks, outputs: Callable[[Blocks], Tensor] = outputs, fixed: Tensor = fixed, c: Tensor = c) -> Blocks:
            f, pull = products.vjp(outputs, y)
            return pull(0.5 * (field.curvature(f, c) + fixed))

        term: Blocks = products.jvp(covector, x, v)[1]
        term = term if weight == 1 else scale(weight, term)
        total = term if total is None else axpy(1.0, total, term)
    assert total is not None
    return total


_general_contracted = contracted.dispatch(MetricField)


@contracted.register
def _(field: OutputCurvature, x: Blocks, v: Blocks, w: Blocks) -> Blocks:
    if field.hessian_type:
        return _half_residual(field, x, v, w)
    return _general_contracted(field, x, v, w)


_general_first_kind = first_kind.dispatch(MetricField)


@first_kind.register
def _(field: OutputCurvature, x: Blocks, u: Blocks, v: Blocks) -> Blocks:
    if not field.hessian_type:
        return _general_first_kind(field, x, u, v)
    total: Blocks | None = None
    for weight, outputs in field.parts():
        term = _first_kind_part(field, outputs, x, u, v)
        term = scale(weight, term)
        total = term if total is None else axpy(1.0, total, term)
    assert total is not None
    return total


def _first_kind_part(field: OutputCurvature, outputs: Callable[[Blocks], Tensor], x: Blocks, u: Blocks, v: Blocks) -> Blocks:
    """Jᵀ(A D²f(u, v) + ½ T(Ju, Jv)) with T the derivative of A along Ju."""

    def along_v(y: Blocks) -> tuple[Tensor, Tensor]:
        f, jv = products.jvp(outputs, y, v)
        return f, jv

    (f, jv), (ju, acceleration) = products.jvp(along_v, x, u)
    change = products.jvp(lambda g: field.curvature(g, jv), f, ju)[1]
    return products.vjp(outputs, x)[1](field.curvature(f, acceleration) + 0.5 * change)
