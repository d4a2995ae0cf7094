"""The Fisher metric of a likelihood as a metric on the space of outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from geoad import operators as ops
from geoad.charts import Chart
from geoad.curvature.likelihoods import Likelihood
from geoad.fields import MetricField
from geoad.kernels import products
from geoad.operators import LinearOperator
from geoad.operators.algebra import added, scaled
from geoad.operators.determinant import slogdet
from geoad.operators.eigen import traced
from geoad.operators.inner import diagonal
from geoad.operators.power import powered
from geoad.operators.sample import factor_product
from geoad.operators.solve import inverted, solved
from geoad.params import Blocks, Layout, first, map_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Likely", "OutputMetric", "SampleBlocks"]


class OutputMetric(MetricField):
    r"""The field f ↦ w ⊕_n A(f_n) on the outputs over a data set, with A the Fisher matrix of a likelihood.

    Block diagonal over samples (and positions); what solves with it costs c³ for each. For logits A is singular (a constant may
    be added to them), so that ``sharp`` needs damping: ``A + 1e-3 * Euclidean(space.chart)``.

    Args:
        chart: the chart of the outputs.
        likelihood: what the outputs mean.
        weight: w, 1/N for means over the samples.

    Raises:
        GeometryError: outputs that the likelihood cannot have (one logit, a covariance of another size), at a point.

    >>> import torch, geoad
    >>> chart = geoad.Chart({"f": (4, 3)}, name="outputs")
    >>> A = geoad.function_space.OutputMetric(chart, geoad.curvature.Categorical(), weight=0.25)
    >>> f = chart.point(torch.randn(4, 3).double())
    >>> shift = chart.vector(torch.ones(4, 3).double(), at=f)  # a constant may be added to logits
    >>> bool(A(f)(shift, shift).abs() < 1e-12)
    True
    """

    def __init__(self, chart: Chart, likelihood: Likelihood, weight: float) -> None:
        super().__init__(chart)
        self.likelihood, self.weight = likelihood, weight

    def operator(self, x: Blocks) -> LinearOperator:
        f = first(x)
        self.likelihood.check(f)
        return Likely(self.home.layout, self.likelihood, f, self.weight)

    def product(self, x: Blocks, v: Blocks) -> Blocks:
        return map_blocks(lambda f, t: self.weight * self.likelihood.fisher(f, t), x, v)


class Likely(ops.Implicit):
    """w A(f), by products; in blocks where more is asked of it."""

    structured = True

    def __init__(self, layout: Layout, likelihood: Likelihood, f: Tensor, weight: float | Tensor) -> None:
        super().__init__(layout, {layout.names[0]: f})
        self.likelihood, self.f, self.weight = likelihood, f, weight
        self._blocks: SampleBlocks | None = None

    def mv(self, v: Blocks) -> Blocks:
        def product(t: Tensor) -> Tensor:
            return self.weight * self.likelihood.fisher(self.f, t)

        return map_blocks(products.batched(product, len(self.layout.batch_shape(v))), v)

    def blocks(self) -> SampleBlocks:
        """The matrices, made once."""
        if self._blocks is None:
            matrix = self.weight * self.likelihood.matrix(self.f)
            self._blocks = SampleBlocks(self.layout, matrix, getattr(self.likelihood, "axis", -1))
        return self._blocks


class SampleBlocks(LinearOperator):
    """A symmetric matrix (n, ..., c, c) for each sample and position of a block (n, ..., c).

    Args:
        layout: one block.
        matrices: the matrices.
        axis: where the block has the axis c; the others are in order in front of those of the matrices.
    """

    made_of = ("matrices",)
    said = ("axis", "definite")
    symmetric = True
    materialised = True
    structured = True

    def __init__(self, layout: Layout, matrices: Tensor, axis: int = -1, *, definite: bool = False) -> None:
        self.layout, self.matrices, self.axis, self.definite = layout, matrices, axis, definite
        (self.name,) = layout.names
        self.inner = ops.Dense(Layout({"": matrices.shape[-1:]}), matrices, symmetric=True, definite=definite)

    @property
    def like(self) -> Tensor:
        return self.matrices

    def mv(self, v: Blocks) -> Blocks:
        return self.each(self.inner.mv, v)

    def rmv(self, w: Blocks) -> Blocks:
        return self.mv(w)

    def rows(self, v: Blocks) -> Tensor:
        """The block with its axis c at the end."""
        return v[self.name].movedim(self._place(), -1)

    def block(self, rows: Tensor) -> Blocks:
        """The inverse of `rows`."""
        return {self.name: rows.movedim(-1, self._place())}

    def _place(self) -> int:
        return self.axis if self.axis < 0 else self.axis - len(self.layout[self.name])  # batch axes lead

    def each(self, fn: Callable[[Blocks], Blocks], v: Blocks) -> Blocks:
        """`fn` of every row of c numbers."""
        return self.block(fn({"": self.rows(v)})[""])

    def with_matrices(self, matrices: Tensor, definite: bool = False) -> SampleBlocks:
        """Other matrices in the same place."""
        return SampleBlocks(self.layout, matrices, self.axis, definite=definite)


# -- the algebra of operators ------------------------------------------------------------------------------------------------


@solved.register
def _(operator: SampleBlocks, b: Blocks, positive: bool) -> Blocks:
    return operator.each(lambda rows: solved(operator.inner, rows, positive), b)


@inverted.register
def _(operator: SampleBlocks, positive: bool) -> LinearOperator:
    matrices = ops.to_dense(ops.inverse(operator.inner, positive=positive))
    return operator.with_matrices(matrices, operator.definite or positive)


@slogdet.register
def _(operator: SampleBlocks) -> tuple[Tensor, Tensor]:
    sign, value = slogdet(operator.inner)
    return sign.prod(), value.sum()


@traced.register
def _(operator: SampleBlocks) -> Tensor:
    return operator.matrices.diagonal(dim1=-2, dim2=-1).sum()


@diagonal.register
def _(operator: SampleBlocks) -> Blocks:
    return operator.block(operator.matrices.diagonal(dim1=-2, dim2=-1))


@powered.register
def _(operator: SampleBlocks, p: float) -> LinearOperator:
    found = ops.power(operator.inner, p)
    return operator.with_matrices(ops.to_dense(found), found.definite)


@factor_product.register
def _(operator: SampleBlocks, z: Blocks, invert: bool) -> Blocks:
    return operator.each(lambda rows: factor_product(operator.inner, rows, invert), z)


@scaled.register
def _(operator: SampleBlocks, factor: float | Tensor, definite: bool) -> LinearOperator:
    return operator.with_matrices(factor * operator.matrices, definite)


@added.register
def _(a: SampleBlocks, b: LinearOperator, definite: bool) -> LinearOperator | None:
    match b:
        case Likely():
            return added(a, b.blocks(), definite)
        case SampleBlocks() if b.axis == a.axis and b.matrices.shape == a.matrices.shape:
            return a.with_matrices(a.matrices + b.matrices, definite)
        case ops.Multiple() | ops.Diagonal():
            entries = a.rows(diagonal(b)).to(a.matrices.dtype)
            return a.with_matrices(a.matrices + entries.diag_embed(), definite)
        case _:
            return None


@solved.register
def _(operator: Likely, b: Blocks, positive: bool) -> Blocks:
    return solved(operator.blocks(), b, positive)


@inverted.register
def _(operator: Likely, positive: bool) -> LinearOperator:
    return inverted(operator.blocks(), positive)


@slogdet.register
def _(operator: Likely) -> tuple[Tensor, Tensor]:
    return slogdet(operator.blocks())


@traced.register
def _(operator: Likely) -> Tensor:
    return traced(operator.blocks())


@diagonal.register
def _(operator: Likely) -> Blocks:
    return diagonal(operator.blocks())


@powered.register
def _(operator: Likely, p: float) -> LinearOperator:
    return powered(operator.blocks(), p)


@factor_product.register
def _(operator: Likely, z: Blocks, invert: bool) -> Blocks:
    return factor_product(operator.blocks(), z, invert)


@scaled.register
def _(operator: Likely, factor: float | Tensor, definite: bool) -> LinearOperator:
    return Likely(operator.layout, operator.likelihood, operator.f, factor * operator.weight)


@added.register
def _(a: Likely, b: LinearOperator, definite: bool) -> LinearOperator | None:
    return added(a.blocks(), b, definite) if isinstance(b, (Likely, SampleBlocks, ops.Multiple, ops.Diagonal)) else None
