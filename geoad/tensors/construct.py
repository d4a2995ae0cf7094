"""Two-index objects from what a user gives: matrices, nested dicts, operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.charts import Chart, makers
from geoad.errors import GeometryError, VarianceError
from geoad.operators import LinearOperator
from geoad.params import is_wrapped
from geoad.tensors.base import TypedTensor, describe
from geoad.tensors.forms import Cometric, Endomorphism, Form, Metric
from geoad.tensors.rank1 import require_at

__all__ = ["as_operator"]


def as_operator(chart: Chart, components: Any, what: str, *, definite: bool = False, symmetric: bool = True) -> LinearOperator:
    """User components of a two-index object: operator, (d, d) matrix, (*s, *s) tensor or nested dicts [row][column]."""
    layout = chart.layout
    if isinstance(components, TypedTensor):
        raise VarianceError(
            f"the components of {what} must be plain numbers, found {describe(components)}. To reinterpret the numbers "
            "pass T.components."
        )
    if isinstance(components, LinearOperator):
        if components.layout != layout:
            raise GeometryError(
                f"{what} in chart '{chart.name}' was given an operator on other blocks: {components.layout}, the chart "
                f"has {layout}. "
                "Build the operator on chart.layout."
            )
        return components
    if isinstance(components, dict):
        sizes = {name: shape.numel() for name, shape in layout.items()}
        cells = {r: [_cell(components, r, c, sizes[r], sizes[c], what) for c in sizes] for r in sizes}
        rows = [torch.cat(row, -1) for row in cells.values()]
        matrix = torch.cat(rows, -2)
    else:
        matrix = torch.as_tensor(components)
        square = layout[layout.names[0]] if len(layout) == 1 else torch.Size([layout.dim])
        is_matrix = not square and matrix.shape[-2:] == (1, 1)  # of a block without axes: not a batch of numbers
        if (
            not is_matrix
            and matrix.ndim >= 2 * len(square)
            and matrix.shape[matrix.ndim - 2 * len(square) :] == (*square, *square)
        ):
            matrix = matrix.reshape(*matrix.shape[: matrix.ndim - 2 * len(square)], layout.dim, layout.dim)
    if matrix.ndim < 2 or matrix.shape[-2:] != (layout.dim, layout.dim):
        raise GeometryError(
            f"{what} in chart '{chart.name}' needs a ({layout.dim}, {layout.dim}) matrix, found shape "
            f"{tuple(matrix.shape)}. Rows and "
            f"columns run over the blocks {list(layout.names)} in this order; nested dicts [row][column] work as well."
        )
    if not matrix.is_floating_point():
        matrix = matrix.to(torch.get_default_dtype())
    is_symmetric = definite if is_wrapped({"": matrix}) else symmetric and ops.is_symmetric(matrix)
    return ops.Dense(layout, matrix, symmetric=is_symmetric, definite=definite)


def _cell(nested: dict[str, Any], row: str, column: str, height: int, width: int, what: str) -> Tensor:
    try:
        return nested[row][column].reshape(height, width)
    except (KeyError, RuntimeError) as error:
        raise GeometryError(
            f"{what}: the entry [{row!r}][{column!r}] is missing or has the wrong shape (wanted {height} × {width} "
            "numbers). Give "
            "nested dicts [row][column] with an entry for each pair of blocks."
        ) from error


def _make_form(chart: Chart, components: Any, *, at: Any) -> Form:
    return Form(chart, as_operator(chart, components, "a Form"), require_at(chart, at, "a Form"))


def _make_metric(chart: Chart, components: Any, *, at: Any) -> Metric:
    base = require_at(chart, at, "a Metric")
    op = as_operator(chart, components, "a Metric")
    if not op.symmetric and not is_wrapped({"": op.like}):
        raise GeometryError(
            f"a metric in chart '{chart.name}' must be symmetric, found a matrix that is not. An inner product does not "
            "depend on "
            "the order of its arguments; symmetrise it, 0.5 * (M + M.mT), or make a form: chart.form(m, at=p)."
        )
    if not is_wrapped({"": op.like}):
        ops.inverse(op, positive=True)  # raises SingularMetricError if it is not positive definite
    op.symmetric, op.definite = True, True
    return Metric(chart, op, base)


def _make_cometric(chart: Chart, components: Any, *, at: Any) -> Cometric:
    return Cometric(chart, as_operator(chart, components, "a Cometric"), require_at(chart, at, "a Cometric"))


def _make_endomorphism(chart: Chart, components: Any, *, at: Any) -> Endomorphism:
    op = as_operator(chart, components, "an Endomorphism", symmetric=False)
    return Endomorphism(chart, op, require_at(chart, at, "an Endomorphism"))


makers.update(form=_make_form, metric=_make_metric, cometric=_make_cometric, endomorphism=_make_endomorphism)
