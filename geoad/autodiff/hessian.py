"""The Riemannian Hessian, matrix-free."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.charts import Point, flat_reference, same_manifold, station
from geoad.connection.products import contracted
from geoad.errors import ChartMismatchError, GeometryError, VarianceError
from geoad.fields.metric import FormField, over_points, require_connection
from geoad.fields.scalar import ScalarField, require_point, spoilt
from geoad.kernels import derivatives
from geoad.kernels.finite import FirstLook
from geoad.kernels.linear import Repeated
from geoad.metrics import Euclidean
from geoad.params import Blocks, scale
from geoad.tensors import Covector, Form, Metric, seen_from

__all__ = ["FieldHessian", "HessianOperator", "RiemannianHessianOperator"]


def _terms(field: ScalarField, x: Blocks) -> Iterator[Callable[[Blocks], Blocks]]:
    """The linear functions v ↦ ∂²L v at a point, one for each part of the function."""
    for part in field.parts():
        yield functools.partial(derivatives.hessian_product, [part], x)


def _refuse_spoilt(field: ScalarField, x: Blocks) -> None:
    """Raise if data or parameters are the reason for a product that is not finite."""
    why = spoilt(field.source, x)
    if why:
        raise GeometryError(
            f"a product with the Hessian of a loss is not finite: {why}. All products there would hold nan. Mend the data, or "
            "go back to a finite point."
        )


class HessianOperator(ops.Implicit):
    """∂²L at a point, in a chart where the connection vanishes.

    What the products share is kept from the second one on, see `geoad.kernels.linear.Repeated`, as far as
    ``products.max_memory`` bytes reach.
    """

    def __init__(self, field: ScalarField, x: Blocks) -> None:
        super().__init__(field.home.layout, x, symmetric=True)
        self.field = field
        self.products = Repeated(functools.partial(_terms, field, x))
        self.look = FirstLook(functools.partial(_refuse_spoilt, field, x))

    def mv(self, v: Blocks) -> Blocks:
        product = self.products.batched(v, len(self.layout.batch_shape(v)))
        self.look(v, product)
        return product


class RiemannianHessianOperator(HessianOperator):
    """∂²L - Γ·dL at a point, with the Levi-Civita connection of a metric field, in the home chart of that field.

    With w = G⁻¹dL held fixed: H v = ∂²L v - w^k Γ_{k;ij} v^i.
    """

    def __init__(self, field: ScalarField, metric: FormField, x: Blocks, w: Blocks) -> None:
        super().__init__(field, x)
        self.metric, self.w = metric, w
        self.products = Repeated(functools.partial(_riemannian_terms, field, metric, x, w))


def _riemannian_terms(field: ScalarField, metric: FormField, x: Blocks, w: Blocks) -> Iterator[Callable[[Blocks], Blocks]]:
    yield from _terms(field, x)
    yield lambda v: scale(-1.0, contracted(metric, x, v, w))


@ops.to_dense.register
def _(operator: HessianOperator) -> Tensor:
    layout, like = operator.layout, operator.like
    eye = torch.eye(layout.dim, dtype=like.dtype, device=like.device)
    matrix = layout.ravel(operator.mv(layout.unravel(eye)))
    return 0.5 * (matrix + matrix.mT)


class FieldHessian:
    """The field of Riemannian Hessians of a function; calling it gives the `Form` at a point."""

    def __init__(self, field: ScalarField, metric: FormField | None) -> None:
        if metric is not None and not isinstance(metric, FormField):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise VarianceError(
                f"metric= must be a metric field, found {type(metric).__name__}. The connection needs derivatives of "
                "the metric, so its "
                "value at one point is not enough; pass for instance geoad.metrics.Euclidean(chart) or a curvature field."
            )
        if metric is not None and not same_manifold(metric.home, field.home):
            raise ChartMismatchError(
                f"the function lives on the manifold of chart '{field.home.reference.name}', the metric on that of "
                f"'{metric.home.reference.name}'. Use a metric on the same manifold."
            )
        self.metric, self.given = metric, field
        self.chart = field.chart
        if metric is None:
            flat_reference(field.home, "a Hessian without a metric", "geoad.hessian(L, metric)")

    def local(self, p: Point) -> tuple[ScalarField, FormField | None]:
        """Function and metric as they are computed at p, in one chart; None for the flat metric of that chart."""
        metric, field = self.metric, self.given.local(p)
        if metric is not None:
            metric = metric.local(p)
        elif station(field.home.reference, p.chart) != field.home.reference:
            metric = Euclidean(field.home.reference).local(p)
        home = field.home.reference if metric is None else metric.home
        if metric is not None:
            require_connection(metric, "a Hessian")
            p.to(field.home)  # raises where the function has no value
        return field.in_home(home), metric

    def __call__(self, p: Point) -> Form:
        field, metric_field = self.local(require_point(p, self.given.home, "a Hessian"))
        home = field.home
        here = p.to(home)
        if here.batch_shape:
            return over_points(self, p)
        if metric_field is None or metric_field.constant:
            op: ops.LinearOperator = HessianOperator(field, here.blocks)
        else:
            slope = Covector(home, derivatives.gradient(field.parts(), here.blocks), here)
            metric = metric_field(here)
            if not isinstance(metric, Metric):
                raise VarianceError("the connection belongs to a metric; this field is a form that may be indefinite.")
            op = RiemannianHessianOperator(field, metric_field, here.blocks, metric.sharp(slope).blocks)
        return seen_from(Form, home, op, p)
