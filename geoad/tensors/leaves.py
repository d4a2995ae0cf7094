"""Two-index objects as pytrees: their stored numbers are the leaves that cross the border of a transform."""

from __future__ import annotations

from typing import Any

from geoad import operators as ops
from geoad.operators import numbers
from geoad.params import is_wrapped, register_pytree
from geoad.tensors.forms import Cometric, DualEndomorphism, Endomorphism, Form, HorizontalMetric, Metric
from geoad.tensors.rank2 import Rank2

__all__: list[str] = []


def _flatten(tensor: Rank2) -> tuple[list[Any], Any]:
    """Structured objects keep their structure; matrix-free ones are made dense, and refuse above a size."""
    op = tensor.op
    if not numbers.is_plain(op):
        ops.require_small(op, "crossing the border of a transform with a matrix-free object")
        op = ops.densify(op)
    leaves, spec = numbers.flatten(op)
    moving = is_wrapped(tensor.at.blocks) or bool(tensor.at.batch_shape)
    context = (tensor.chart, tensor.home, tensor.ups, spec, None if moving else tensor.at)
    return ([leaves, tensor.at] if moving else [leaves]), context


def _unflatten(cls: type[Rank2]) -> Any:
    def build(children: list[Any], context: Any) -> Rank2:
        chart, home, ups, spec, at = context
        op = numbers.unflatten(spec, list(children[0]))
        return cls(chart, op, at if at is not None else children[1], home=home, ups=ups)

    return build


for _cls in (Rank2, Form, Metric, HorizontalMetric, Cometric, Endomorphism, DualEndomorphism):
    register_pytree(_cls, _flatten, _unflatten(_cls))
