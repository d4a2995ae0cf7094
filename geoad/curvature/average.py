"""Running averages of curvature matrices along a path of points, in the structure of the matrices."""

from __future__ import annotations

from functools import singledispatch

from torch import Tensor

from geoad import operators as ops
from geoad.charts import Chart
from geoad.errors import GeometryError, StructureNotPreservedError, VarianceError
from geoad.operators import LinearOperator
from geoad.tensors import Form

__all__ = ["running_average"]


def running_average(old: Form, new: Form, decay: float, *, chart: Chart | None = None) -> Form:
    r"""β B_old + (1 - β) B_new at the point of `new`, where B_old moves by identity in a chart.

    Curvature matrices live at their points; an average over the steps of a training needs a way from one to the next. Here
    the components *in* `chart` are kept (`Form.carry`), and `chart` is the same one whatever chart the network trains in, so
    that the average is the same object in all of them.

    Kronecker products of one layer are averaged factor by factor, β A + (1 - β) A' and β G + (1 - β) G', as KFAC does it
    (Martens & Grosse 2015, section 5): the mean of two products is no product. All other structures are averaged exactly.

    Args:
        old: the average so far, a form or metric.
        new: the value at the present point, of the same representation.
        decay: β, between 0 and 1.
        chart: in which the old one is carried. Default: the chart in which the numbers of `new` are stored.

    Raises:
        StructureNotPreservedError: matrices in eigenbases that differ (EKFAC), whose mean is in neither.

    >>> import torch, geoad
    >>> geo = geoad.GeoModule(torch.nn.Linear(2, 3))
    >>> F = geoad.curvature.Fisher(geo, torch.randn(5, 2), representation="kfac")
    >>> geoad.curvature.running_average(F(geo.point()), F(geo.point()), 0.9)
    Metric('theta', dim=9, blockdiagonal, float32, cpu)
    """
    if not isinstance(old, Form) or not isinstance(new, Form):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise VarianceError(
            f"a running average of curvature takes two forms, found {type(old).__name__} and {type(new).__name__}. Vectors and "
            "covectors have .carry(to=p, chart=...) and ordinary sums."
        )
    if not 0 <= decay <= 1:
        raise GeometryError(f"decay={decay} is no weight between 0 and 1. The average is decay * old + (1 - decay) * new.")
    home = chart or new.home
    here = new.at.to(home)
    carried = old.carry(to=here, chart=home)
    op = averaged(carried.operator_in(home), new.operator_in(home), decay)
    kind = type(new) if type(old) is type(new) else Form
    return kind(home, op, here).to(new.chart)


@singledispatch
def averaged(a: LinearOperator, b: LinearOperator, decay: float) -> LinearOperator:
    """β a + (1 - β) b in the structure of a."""
    if isinstance(b, (ops.Kronecker, ops.BlockDiagonal)):
        raise _different(a, b)
    return _exact(a, b, decay)


def _exact(a: LinearOperator, b: LinearOperator, decay: float) -> LinearOperator:
    inside = 0 < decay < 1
    return ops.plus(
        ops.times(decay, a, positive=inside), ops.times(1 - decay, b, positive=inside), definite=a.definite and b.definite
    )


def _different(a: LinearOperator, b: LinearOperator) -> StructureNotPreservedError:
    return StructureNotPreservedError(
        f"a running average of {a!r} and {b!r} was asked for. Their structures differ, so that the mean has neither. Use one "
        "representation all along, or ordinary sums, which are exact and lazy."
    )


@averaged.register
def _(a: ops.BlockDiagonal, b: LinearOperator, decay: float) -> LinearOperator:
    if not isinstance(b, ops.BlockDiagonal) or set(a.parts) != set(b.parts):
        raise _different(a, b)
    return ops.BlockDiagonal(a.layout, {names: averaged(part, b.parts[names], decay) for names, part in a.parts.items()})


@averaged.register
def _(a: ops.Kronecker, b: LinearOperator, decay: float) -> LinearOperator:
    if not isinstance(b, ops.Kronecker) or a.arrangement != b.arrangement:
        raise _different(a, b)

    def mean(x: Tensor, y: Tensor) -> Tensor:
        return decay * x + (1 - decay) * y

    definite = a.definite and b.definite
    return ops.Kronecker(a.layout, a.arrangement, mean(a.left, b.left), mean(a.right, b.right), definite=definite)


@averaged.register
def _(a: ops.EigenKronecker, b: LinearOperator, decay: float) -> LinearOperator:
    if isinstance(b, ops.EigenKronecker) and a.left_basis is b.left_basis and a.right_basis is b.right_basis:
        return _exact(a, b, decay)
    raise StructureNotPreservedError(
        "a running average of two EKFAC matrices was asked for: their eigenbases differ, and the mean is diagonal in neither. "
        "Average KFAC matrices (representation='kfac') or block-diagonal ones, or add fields: both lazy sums are exact."
    )
