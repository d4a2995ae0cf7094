"""The typing table for sums, multiples and contractions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.charts import Point
from geoad.errors import ChartMismatchError, GeometryError, VarianceError
from geoad.params import add as add_blocks
from geoad.params import is_wrapped, scale
from geoad.params import sub as sub_blocks
from geoad.tensors.base import HANDLERS, Axis, TypedTensor, describe, is_scalar, require_same_place
from geoad.tensors.densities import Density, LogDensity
from geoad.tensors.forms import Form, Metric
from geoad.tensors.general import GeoTensor, as_general, build, dense_of
from geoad.tensors.pairing import pair
from geoad.tensors.rank1 import Rank1
from geoad.tensors.rank2 import Rank2, common_home

__all__ = ["add", "contract", "divide", "einsum", "matmul", "multiply", "subtract"]


# -- sums ------------------------------------------------------------------------------------------------------------


def add(a: Any, b: Any) -> Any:
    """a + b: the same axes, chart, base point and weight (log-densities: weights add)."""
    if isinstance(a, Rank1) and type(a) is type(b):
        if a.at is not b.at:
            require_same_place(a, b, "add")
        return type(a)(a.chart, add_blocks(a.blocks, b.blocks), a.at)
    return _sum(a, b, 1.0)


def subtract(a: Any, b: Any) -> Any:
    """a - b, typed as a sum; the difference of two metrics is a `Form`."""
    if isinstance(a, Rank1) and type(a) is type(b):
        if a.at is not b.at:
            require_same_place(a, b, "subtract")
        return type(a)(a.chart, sub_blocks(a.blocks, b.blocks), a.at)
    return _sum(a, b, -1.0)


def _sum(a: Any, b: Any, sign: float) -> Any:
    for density in (Density, LogDensity):
        if isinstance(a, density):
            return a.plus(b, sign)
        if isinstance(b, density) and isinstance(b, LogDensity):
            return (b if sign > 0 else b.times(-1.0)).plus(a)  # pyright: ignore
        if isinstance(b, density):
            return b.plus(a, sign)  # raises: a is no density
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
    return build(general.data + sign * other.data, general.axes, a.at)


def _same_axes(a: TypedTensor, b: TypedTensor) -> bool:
    return len(a.axes) == len(b.axes) and all(
        x.up == y.up and x.size == y.size and (x.chart is None) == (y.chart is None) and (x.chart is None or x.chart == y.chart)
        for x, y in zip(a.axes, b.axes, strict=True)
    )


def _sum_rank2(a: Rank2, b: Rank2, sign: float) -> Any:
    home, x, y = common_home(a, b)
    positive = isinstance(a, Metric) and isinstance(b, Metric) and sign > 0
    definite = positive and (x.definite or y.definite)
    if sign < 0:
        y = ops.times(-1.0, y, positive=False)
    cls = type(a) if type(a) is type(b) else Rank2
    if isinstance(a, Form) and isinstance(b, Form):
        cls = Metric if positive else Form
    return cls(a.chart, ops.plus(x, y, definite=definite), a.at, home=home, ups=a.ups)


def _not_addable(a: Any, b: Any) -> str:
    first = (
        f"cannot add {describe(a)} and {describe(b)}. They live in different spaces and move by different laws, so the sum of "
        "their components would mean something else in each chart. "
    )
    kinds = {type(a).__name__, type(b).__name__}
    if kinds == {"Vector", "Covector"}:
        return first + "Convert one: metric.sharp(covector) is a vector, metric.flat(vector) a covector."
    plain = [each for each in (a, b) if not isinstance(each, TypedTensor)]
    if plain:
        return first + (
            "Give the plain numbers a type, chart.vector(x, at=p) or chart.covector(x, at=p); for damping add a metric: "
            "G + lam * geoad.metrics.Euclidean(chart)(p); or leave the types with .components."
        )
    return first + "Only tensors of the same type add; contract or convert with a metric, or use .components."


# -- multiples -------------------------------------------------------------------------------------------------------


def multiply(a: Any, b: Any) -> Any:
    """Scalar times tensor. The product of two typed objects is refused, except for densities."""
    if not isinstance(a, TypedTensor):
        a, b = b, a
    if isinstance(a, (Density, LogDensity)):
        return a.times(b)
    if isinstance(b, Density) and b.weight == 0:
        b = b.value
    if not is_scalar(b):
        raise VarianceError(
            f"cannot multiply {describe(a)} elementwise with {describe(b)}: the product of components has no law under a change "
            "of chart. Use a number, a contraction (w(v), G @ v, torch.einsum), torch.outer, or .components."
        )
    if isinstance(a, Rank1):
        return type(a)(a.chart, scale(b, a.blocks), a.at)
    if isinstance(a, Rank2):
        positive = _is_positive(b)
        cls = type(a) if positive or not isinstance(a, Metric) else Form
        op = ops.times(b, a.op, positive=positive)
        return cls(a.chart, op, a.at, home=a.home, ups=a.ups)
    assert isinstance(a, GeoTensor)
    return GeoTensor(b * a.data, a.axes, a.at)


def _is_positive(factor: Any) -> bool:
    if isinstance(factor, Tensor):
        return not is_wrapped({"": factor}) and bool(factor > 0)
    return factor > 0


def divide(a: Any, b: Any) -> Any:
    """Tensor / scalar; densities divide one another."""
    if isinstance(a, (Density, LogDensity)):
        return a.over(b) if isinstance(a, Density) else a.times(1 / b)
    if not isinstance(a, TypedTensor) or not is_scalar(b):
        raise VarianceError(
            f"cannot divide {describe(a)} by {describe(b)}: only division by a number has a law. For G⁻¹ω use G.sharp(w) or "
            "G.solve(w); elementwise division needs .components."
        )
    return multiply(a, 1 / b)


# -- contractions ------------------------------------------------------------------------------------------------------


def matmul(a: Any, b: Any) -> Any:
    """Contract the last index of a with the first of b."""
    if isinstance(a, Rank2) and isinstance(b, Rank1):
        return a.mv(b)
    if isinstance(a, Rank2) and isinstance(b, Rank2) and a.chart.reference == b.chart.reference:
        return a.compose(b)
    if isinstance(a, Rank1) and isinstance(b, Rank1):
        if a.up == b.up:
            a(b)  # raises, with the remedy
        return pair(a, b)
    if isinstance(a, Rank1) and isinstance(b, Rank2):
        return b.mT.mv(a)
    for each in (a, b):
        if not isinstance(each, TypedTensor):
            raise VarianceError(
                f"cannot contract {describe(a)} with {describe(b)}: plain numbers have no variance. Give them a type first: "
                "chart.vector(x, at=p), chart.covector(x, at=p), chart.form(m, at=p); or use .components."
            )
    x, y = len(a.axes), len(b.axes)
    if not x or not y:
        raise VarianceError(f"cannot contract {describe(a)} with {describe(b)}: a density has no index. Use *.")
    letters = [chr(ord("a") + i) for i in range(x + y - 1)]
    left, right = letters[:x], letters[x - 1 :]
    return contract([a, b], [left, right], [c for c in letters if c != letters[x - 1]])


def einsum(equation: Any, *operands: Any) -> Any:
    """torch.einsum on typed operands: one letter for each typed axis, batch axes in front written or left out."""
    if not isinstance(equation, str):
        raise VarianceError("geoad's einsum takes the equation as a string, torch.einsum('ij,j->i', G, v).")
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    equation = equation.replace(" ", "").replace("...", "")
    inputs, arrow, output = equation.partition("->")
    terms = [list(term) for term in inputs.split(",")]
    if len(terms) != len(operands):
        raise GeometryError(f"einsum '{equation}' names {len(terms)} operands, got {len(operands)}.")
    if not arrow:
        counts = Counter(letter for term in terms for letter in term)
        output = "".join(sorted(letter for letter, count in counts.items() if count == 1))
    return contract(list(operands), terms, list(output))


def contract(operands: list[Any], indices: list[list[str]], output: list[str]) -> Any:
    """Sum over the letters that are not in `output`, under the typing rule for every index.

    A summed index must occur in exactly two typed axes, of opposite variance, in the same chart and at the same point. Matrix
    times vector is done without forming the matrix.
    """
    typed = [each for each in operands if isinstance(each, TypedTensor)]
    at = _common_point(typed)
    simple = _matrix_vector(operands, indices, output)
    if simple is not None:
        return simple
    arrays: list[Tensor] = []
    uses: dict[str, list[Axis | None]] = {}
    for operand, letters in zip(operands, indices, strict=True):
        axes = operand.axes if isinstance(operand, TypedTensor) else ()
        array = dense_of(operand) if isinstance(operand, TypedTensor) else torch.as_tensor(operand)
        if len(letters) not in (array.ndim, len(axes)) or len(letters) < len(axes):
            raise VarianceError(
                f"einsum: '{''.join(letters)}' names {len(letters)} axes of {describe(operand)}, which has {array.ndim} "
                f"({len(axes)} typed). Write one letter for each typed axis, and for all batch axes or none."
            )
        slots: list[Axis | None] = [None] * (len(letters) - len(axes)) + list(axes)
        for letter, axis in zip(letters, slots, strict=True):
            uses.setdefault(letter, []).append(axis)
        arrays.append(array)
    for letter, axes in uses.items():
        _check_index(letter, axes, letter in output, operands, indices)
    terms = ["".join(letters) for letters in indices]
    shape = ["..." + term if array.ndim > len(term) else term for term, array in zip(terms, arrays, strict=True)]
    front = "..." if any(each.startswith("...") for each in shape) else ""
    data = torch.einsum(f"{','.join(shape)}->{front}{''.join(output)}", *arrays)
    kept = [next((axis for axis in uses[letter] if axis is not None), None) for letter in output]
    leading = [axis is None for axis in kept]
    if leading != sorted(leading, reverse=True):
        raise VarianceError("einsum: batch axes must come before typed axes in the output. Reorder the letters behind '->'.")
    return build(data, [axis for axis in kept if axis is not None], at) if at is not None else data


def _matrix_vector(operands: Sequence[Any], indices: list[list[str]], output: list[str]) -> Any:
    """G v, w G and w(v) without dense matrices; None if the contraction is not of that form."""
    if len(operands) != 2:
        return None
    for (a, b), (i, j) in (((operands[0], operands[1]), indices), ((operands[1], operands[0]), indices[::-1])):
        if isinstance(a, Rank2) and isinstance(b, Rank1) and len(i) == 2 and len(j) == 1 and i[0] != i[1]:
            if j[0] == i[1] and output == [i[0]] and b.up != a.ups[1]:
                return a.mv(b)
            if j[0] == i[0] and output == [i[1]] and b.up != a.ups[0]:
                return a.mT.mv(b)
    return None


def _common_point(typed: list[TypedTensor]) -> Point | None:
    """The base point; all operands of one manifold must share it."""
    for i, a in enumerate(typed):
        for b in typed[i + 1 :]:
            if a.chart.reference == b.chart.reference:
                require_same_place(a, b, "contract")
    return typed[0].at if typed else None


def _check_index(letter: str, axes: list[Axis | None], kept: bool, operands: list[Any], indices: list[list[str]]) -> None:
    typed = [axis for axis in axes if axis is not None]
    if not typed:
        return
    owners = [describe(each) for each, letters in zip(operands, indices, strict=True) if letter in letters]
    where = f"index '{letter}' of {' and '.join(owners)}"
    if len(typed) != len(axes):
        raise VarianceError(
            f"{where} joins a typed axis with a plain or batch axis. Plain numbers have no variance; give them a type with "
            "chart.vector(x, at=p) or chart.covector(x, at=p)."
        )
    if kept:
        if len(typed) != 1:
            raise VarianceError(
                f"{where} is kept but occurs {len(typed)} times: an elementwise product or a diagonal depends on the chart. Sum "
                "over it, give the axes different letters, or use .components."
            )
        return
    if len(typed) != 2:
        raise VarianceError(
            f"{where} is summed but occurs {len(typed)} times: summing a single typed axis depends on the chart. Contract it with "
            "an axis of the opposite variance, or use .components."
        )
    if typed[0].pairs_with(typed[1]):
        return
    if typed[0].chart != typed[1].chart:
        raise ChartMismatchError(
            f"{where} joins the axes {typed[0]} and {typed[1]} of different charts or spaces. Move one operand with .to(chart)."
        )
    raise VarianceError(
        f"{where} joins two {'upper' if typed[0].up else 'lower'} axes, {typed[0]} and {typed[1]}: their sum depends on the chart. "
        "Insert a metric? For vectors einsum('i,ij,j->', u, G, v); for covectors use G.inverse()."
    )


HANDLERS.update(add=add, sub=subtract, mul=multiply, div=divide, matmul=matmul)
