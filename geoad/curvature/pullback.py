"""Curvature fields JᵀA(f)J of a network over data, and their connection by half a residual."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from torch import Tensor

from geoad import operators as ops
from geoad.charts import Chart
from geoad.connection.products import contracted, first_kind
from geoad.errors import UnsupportedModuleError
from geoad.fields import MetricField, Transition
from geoad.kernels import products
from geoad.kernels.conditions import together
from geoad.kernels.finite import FirstLook
from geoad.kernels.linear import MAX_MEMORY, Repeated
from geoad.kernels.spread import Exchange, fingerprint, spread, total
from geoad.params import Blocks, axpy, scale

__all__ = ["OutputCurvature", "Part"]


class Part(NamedTuple):
    """The share of one batch in Σ w JᵀAJ.

    Attributes:
        weight: w.
        outputs: f, as a function of blocks.
        bend: bend(f, t) = A(f) t for this batch; where A depends on labels, they are those of the batch.
    """

    weight: float
    outputs: Callable[[Blocks], Tensor]
    bend: Callable[[Tensor, Tensor], Tensor]


class OutputCurvature(MetricField):
    r"""Σ w Jᵀ A(f) J over the parts of a data set. A subclass gives `reference_parts`, and `curvature` if A needs no labels.

    Attributes:
        hessian_type: ∂A is totally symmetric, so that the connection costs one ordinary second-order product.
        products_memory: how many bytes the matrix-free value at a point may keep for further products there.
    """

    hessian_type: bool = False
    products_memory: int = MAX_MEMORY

    def __init__(self, home: Chart, representation: str) -> None:
        super().__init__(home)
        self.representation = representation
        self.way: Transition | None = Transition(home, home.reference) if home != home.reference else None

    def reference_parts(self) -> Iterable[Part]:
        """The parts, with outputs as functions of the reference coordinates."""
        raise NotImplementedError

    def curvature(self, outputs: Tensor, t: Tensor) -> Tensor:
        """A(f) t, for fields whose A depends on the outputs alone: the `bend` of their parts."""
        raise NotImplementedError

    def inspect(self, outputs: Tensor, x: Blocks) -> None:
        """Hook: refuse outputs at the point `x` for which the curvature has no value."""

    def refuse_spoilt(self, x: Blocks) -> None:
        """Hook: refuse a product at the point `x` that is not finite."""

    def parts(self) -> Iterable[Part]:
        """The parts, with outputs as functions of the blocks of ``home``."""
        way = self.way
        for part in self.reference_parts():
            yield part if way is None else part._replace(outputs=lambda x, f=part.outputs: f(way(x)))

    def terms(self, x: Blocks) -> Iterator[Callable[[Blocks], Blocks]]:
        """The linear functions v ↦ w JᵀAJ v at a point, one for each part."""
        for part in self.parts():
            yield functools.partial(self._product, part, x)

    def _product(self, part: Part, x: Blocks, v: Blocks) -> Blocks:
        f, velocity, pull = products.push_pull(part.outputs, x, v)
        self.inspect(f, x)
        return pull(part.weight * part.bend(f, velocity))

    @property
    def exchange(self) -> Exchange | None:
        """Where sums over the parts are completed, if other processes have parts too."""
        return None

    def guarded(self, call: str) -> AbstractContextManager[None]:
        """Own work before an exchange."""
        return nullcontext() if self.exchange is None else self.exchange.guarded(call)

    def shared(self, what: str, compute: Callable[..., Blocks], *arguments: Blocks) -> Blocks:
        """`compute` (arguments), a sum over parts, completed by the other processes."""
        exchange = self.exchange
        if exchange is None:
            return together(lambda: compute(*arguments))
        call = f"{what} of {type(self).__name__} with {fingerprint(arguments)}"
        with self.guarded(call):
            own = together(lambda: compute(*spread(arguments, exchange, call)))
        return total(own, exchange, call)

    def product(self, x: Blocks, v: Blocks) -> Blocks:
        return self.shared("product", self._own_product, x, v)

    def _own_product(self, x: Blocks, v: Blocks) -> Blocks:
        total: Blocks | None = None
        for term in self.terms(x):
            total = term(v) if total is None else axpy(1.0, total, term(v))
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
    """The matrix-free value of a curvature field at a point: one jvp and one vjp of the network for a product.

    What the products share is kept from the second one on, as far as the `products_memory` of the field reaches (in bytes; see
    `geoad.kernels.linear.Repeated`).
    """

    def __init__(self, field: OutputCurvature, x: Blocks) -> None:
        super().__init__(field.home.layout, x, symmetric=True)
        self.field = field
        self.products = Repeated(functools.partial(field.terms, x), field.products_memory)
        self.look = FirstLook(functools.partial(field.refuse_spoilt, x))

    def mv(self, v: Blocks) -> Blocks:
        return self.field.shared("product", self._own_product, v)

    def _own_product(self, v: Blocks) -> Blocks:
        product = self.products.batched(v, len(self.layout.batch_shape(v)))
        self.look(v, product)
        return product


_by_products = ops.to_dense.dispatch(ops.Implicit)


@ops.to_dense.register
def _(operator: CurvatureOperator) -> Tensor:
    try:
        return operator.field.dense(operator.x)
    except UnsupportedModuleError:  # samples that depend on each other (batch norm in training mode) have products only
        return _by_products(operator)


def _half_residual(field: OutputCurvature, x: Blocks, v: Blocks, w: Blocks) -> Blocks:
    """D_v [θ ↦ Jᵀ ½(A(f) c + A(f₀) c)] with c = J w frozen: w^k Γ_{k;ij} v^i for A of Hessian type."""
    total: Blocks | None = None
    for part in field.parts():
        f0, c = products.jvp(part.outputs, x, w)
        fixed = part.bend(f0, c)

        def covector(y: Blocks, part: Part = part, fixed: Tensor = fixed, c: Tensor = c) -> Blocks:
            f, pull = products.vjp(part.outputs, y)
            return pull(0.5 * (part.bend(f, c) + fixed))

        term: Blocks = products.jvp(covector, x, v)[1]
        term = term if part.weight == 1 else scale(part.weight, term)
        total = term if total is None else axpy(1.0, total, term)
    assert total is not None
    return total


_general_contracted = contracted.dispatch(MetricField)


@contracted.register
def _(field: OutputCurvature, x: Blocks, v: Blocks, w: Blocks) -> Blocks:
    if field.hessian_type:
        return field.shared("connection", functools.partial(_half_residual, field), x, v, w)
    return _general_contracted(field, x, v, w)


_general_first_kind = first_kind.dispatch(MetricField)


@first_kind.register
def _(field: OutputCurvature, x: Blocks, u: Blocks, v: Blocks) -> Blocks:
    if not field.hessian_type:
        return _general_first_kind(field, x, u, v)
    return field.shared("connection", functools.partial(_own_first_kind, field), x, u, v)


def _own_first_kind(field: OutputCurvature, x: Blocks, u: Blocks, v: Blocks) -> Blocks:
    total: Blocks | None = None
    for part in field.parts():
        term = scale(part.weight, _first_kind_part(part, x, u, v))
        total = term if total is None else axpy(1.0, total, term)
    assert total is not None
    return total


def _first_kind_part(part: Part, x: Blocks, u: Blocks, v: Blocks) -> Blocks:
    """Jᵀ(A D²f(u, v) + ½ T(Ju, Jv)) with T the derivative of A along Ju."""

    def along_v(y: Blocks) -> tuple[Tensor, Tensor]:
        f, jv = products.jvp(part.outputs, y, v)
        return f, jv

    (f, jv), (ju, acceleration) = products.jvp(along_v, x, u)
    change = products.jvp(lambda g: part.bend(g, jv), f, ju)[1]
    return products.vjp(part.outputs, x)[1](part.bend(f, acceleration) + 0.5 * change)
