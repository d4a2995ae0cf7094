"""The typing table for sums and multiples."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from geoad import operators as ops
from geoad.charts import Point, same_manifold, why_apart
from geoad.errors import VarianceError
from geoad.params import add as add_blocks
from geoad.params import insert_axes, is_wrapped, map_blocks, scale
from geoad.params import sub as sub_blocks
from geoad.tensors.base import HANDLERS, TypedTensor, describe, is_scalar, plain_scalar, require_same_place
from geoad.tensors.densities import Density, LogDensity
from geoad.tensors.forms import Form, HorizontalMetric, InnerProduct, Metric
from geoad.tensors.general import GeoTensor, as_general, build
from geoad.tensors.rank1 import Rank1, align
from geoad.tensors.rank2 import Rank2, common_home

__all__ = ["add", "divide", "multiply", "number_of", "subtract"]


# -- sums ------------------------------------------------------------------------------------------------------------


def add(a: Any, b: Any) -> Any:
    """a + b: the same axes, chart, base point and weight (log-densities: weights add)."""
    if isinstance(a, Rank1) and type(a) is type(b):
        if a.at is not b.at:
            require_same_place(a, b, "add")
        return type(a)(a.chart, add_blocks(*align(a, b)), a.at)
    return _sum(a, b, 1.0)


def subtract(a: Any, b: Any) -> Any:
    """a - b, typed as a sum; the difference of two metrics is a `Form`."""
    if isinstance(a, Rank1) and type(a) is type(b):
        if a.at is not b.at:
            require_same_place(a, b, "subtract")
        return type(a)(a.chart, sub_blocks(*align(a, b)), a.at)
    return _sum(a, b, -1.0)


def _sum(a: Any, b: Any, sign: float) -> Any:
    if isinstance(a, Rank2) and type(a) is type(b) and a.at is b.at and a.ups == b.ups:
        return _sum_rank2(a, b, sign)
    if isinstance(a, (Density, LogDensity)) or isinstance(b, (Density, LogDensity)):
        return _sum_densities(a, b, sign)
    if not isinstance(a, TypedTensor) or not isinstance(b, TypedTensor):
        raise VarianceError(_not_addable(a, b))
    if not _same_axes(a, b):
        if a.type == b.type and a.chart != b.chart:
            require_same_place(a, b, "add")
        raise VarianceError(_not_addable(a, b))
    require_same_place(a, b, "add")
    if isinstance(a, Rank2) and isinstance(b, Rank2):
        return _sum_rank2(a, b, sign)
    general, other = as_general(a), as_general(b)
    points = len(a.at.batch_shape)
    missing = general.data.ndim - other.data.ndim
    x = insert_axes(general.data, points, -missing) if points else general.data
    y = insert_axes(other.data, points, missing) if points else other.data
    return build(x + sign * y, general.axes, a.at)


def _sum_densities(a: Any, b: Any, sign: float) -> Any:
    a, b = number_of(a), number_of(b)
    if isinstance(a, (Density, LogDensity)):
        return a.plus(b, sign)
    if isinstance(b, LogDensity):
        return b.times(sign).plus(a)  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(b, Density):
        return b.plus(a, sign)  # raises: a is no density
    return a + b if sign > 0 else a - b


def number_of(thing: Any) -> Any:
    """The plain number of a density without weight; anything else as it is."""
    return thing.value if isinstance(thing, (Density, LogDensity)) and thing.is_plain else thing


def _same_axes(a: TypedTensor, b: TypedTensor) -> bool:
    return len(a.axes) == len(b.axes) and all(
        x.up == y.up and x.size == y.size and (x.chart is None) == (y.chart is None) and (x.chart is None or x.chart == y.chart)
        for x, y in zip(a.axes, b.axes, strict=True)
    )


def _sum_rank2(a: Rank2, b: Rank2, sign: float) -> Any:
    home, x, y = common_home(a, b)
    if a.at.batch_shape and len(a.batch_shape) != len(b.batch_shape):
        return _sum_batches(a, b, sign)
    positive = isinstance(a, InnerProduct) and isinstance(b, InnerProduct) and sign > 0
    definite = positive and (x.definite or y.definite)
    if sign < 0:
        y = ops.times(-1.0, y, positive=False)
    cls = type(a) if type(a) is type(b) else Rank2
    if isinstance(a, Form) and isinstance(b, Form):
        both_horizontal = isinstance(a, HorizontalMetric) and isinstance(b, HorizontalMetric)
        cls = Form if not positive else HorizontalMetric if both_horizontal else Metric
    return cls(a.chart, ops.plus(x, y, definite=definite), a.at, home=home, ups=a.ups)


def _sum_batches(a: Rank2, b: Rank2, sign: float) -> Any:
    """Further batch axes on one side only: they go behind those of the base point."""
    points, missing = len(a.at.batch_shape), len(a.batch_shape) - len(b.batch_shape)
    x, y = insert_axes(a.to_dense(), points, -missing), insert_axes(b.to_dense(), points, missing)
    return build(x + sign * y, a.axes, a.at)


def _not_addable(a: Any, b: Any) -> str:
    first = (
        f"cannot add {describe(a)} and {describe(b)}. They live in different spaces and move by different laws, so the sum of "
        "their components would mean something else in each chart. "
    )
    kinds = {type(a).__name__, type(b).__name__}
    if kinds == {"Vector", "Covector"}:
        return first + "Convert one: metric.sharp(covector) is a vector, metric.flat(vector) a covector."
    if isinstance(a, Point) or isinstance(b, Point):
        return first + "Move a point with p.retract(v, t), along a vector: metric.sharp(covector) makes one of a differential."
    plain = [each for each in (a, b) if not isinstance(each, TypedTensor)]
    if plain:
        return first + (
            "Give the plain numbers a type, chart.vector(x, at=p) or chart.covector(x, at=p); for damping add a metric: "
            "G + lam * geoad.metrics.Euclidean(chart)(p); or leave the types with .components."
        )
    if [x.up for x in a.axes] == [x.up for x in b.axes]:
        for x, y in zip(a.axes, b.axes, strict=True):
            if x.chart is not None and y.chart is not None and not same_manifold(x.chart, y.chart):
                return first + why_apart(x.chart, y.chart)
    return first + "Only tensors of the same type add; contract or convert with a metric, or use .components."


# -- multiples -------------------------------------------------------------------------------------------------------


def multiply(a: Any, b: Any) -> Any:
    """Scalar times tensor. The product of two typed objects is refused, except for densities."""
    if not isinstance(a, TypedTensor):
        a, b = b, a
    if not is_scalar(b):
        return _multiply_further(a, b)
    if isinstance(a, Rank1):
        return type(a)(a.chart, scale(plain_scalar(b), a.blocks), a.at)
    if isinstance(a, Rank2):
        b = plain_scalar(b)
        positive = _is_positive(b)
        cls = type(a) if positive or not isinstance(a, InnerProduct) else Form
        return cls(a.chart, ops.times(b, a.op, positive=positive), a.at, home=a.home, ups=a.ups)
    if isinstance(a, (Density, LogDensity)):
        return a.times(plain_scalar(b))
    assert isinstance(a, GeoTensor)
    return GeoTensor(plain_scalar(b) * a.data, a.axes, a.at)


def _multiply_further(a: Any, b: Any) -> Any:
    x, y = number_of(a), number_of(b)
    if isinstance(x, (Density, LogDensity)):
        if isinstance(x, LogDensity) and isinstance(y, Density):
            raise VarianceError(_not_multipliable(a, b))
        return x.times(y)
    if isinstance(y, (Density, LogDensity)) and not isinstance(x, TypedTensor):
        return y.times(x)
    if is_scalar(y) and (x is not a or y is not b):
        return multiply(x, y) if isinstance(x, TypedTensor) else x * y
    raise VarianceError(_not_multipliable(a, b))


def _not_multipliable(a: Any, b: Any) -> str:
    return (
        f"cannot multiply {describe(a)} elementwise with {describe(b)}: the product of components has no law under a change "
        "of chart. Use a number, a contraction (w(v), G @ v, torch.einsum), torch.outer, or .components."
    )


def _is_positive(factor: Any) -> bool:
    if isinstance(factor, Tensor):
        return not is_wrapped({"": factor}) and bool(factor > 0)
    return factor > 0


def divide(a: Any, b: Any) -> Any:
    """Tensor / scalar; densities divide one another."""
    x, y = number_of(a), number_of(b)
    if isinstance(y, Density) and (is_scalar(x) or isinstance(x, Density)):
        return x.over(y) if isinstance(x, Density) else y.power(-1.0) * x
    if isinstance(x, Density):
        return x.over(y)
    if not isinstance(x, TypedTensor) and not isinstance(y, TypedTensor):
        return x / y
    if not isinstance(x, TypedTensor) or not is_scalar(y):
        raise VarianceError(
            f"cannot divide {describe(a)} by {describe(b)}: only division by a number has a law. For G⁻¹ω use G.sharp(w) or "
            "G.solve(w); elementwise division needs .components."
        )
    y = plain_scalar(y)
    if isinstance(x, Rank1):
        return type(x)(x.chart, map_blocks(lambda block: block / y, x.blocks), x.at)
    if isinstance(x, GeoTensor):
        return GeoTensor(x.data / y, x.axes, x.at)
    return multiply(x, 1 / y)


HANDLERS.update(add=add, sub=subtract, mul=multiply, div=divide)
