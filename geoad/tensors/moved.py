"""An operator seen in another chart: the exact lazy congruence."""

from __future__ import annotations

from torch import Tensor

from geoad import operators as ops
from geoad import transport
from geoad.charts import Chart, Point
from geoad.operators import LinearOperator
from geoad.params import Blocks
from geoad.tensors import layerwise

__all__ = ["Moved"]


class Moved(LinearOperator):
    """The two-index tensor `op`, whose numbers belong to the chart of `at`, as an operator in `chart`.

    Each product moves the argument home, applies `op`, and moves the result back: for a (0,2) tensor J⁻ᵀ (B (J⁻¹ v)).
    """

    def __init__(self, op: LinearOperator, ups: tuple[bool, bool], at: Point, chart: Chart) -> None:
        self.layout = chart.layout
        self.op = op
        self.ups = ups
        self.at = at
        self.there = at.to(chart)
        congruence = ups[0] == ups[1]
        self.symmetric = op.symmetric and congruence
        self.definite = op.definite and congruence and transport.keeps_definite(at.chart, chart)

    @staticmethod
    def of(op: LinearOperator, ups: tuple[bool, bool], at: Point, chart: Chart) -> LinearOperator:
        """The moved operator, in the structure of `op` where the map between the charts keeps it."""
        if isinstance(op, ops.Multiple) and ups[0] != ups[1]:
            return op
        kept = layerwise.moved(op, ups, at, chart)
        return Moved(op, ups, at, chart) if kept is None else kept

    @property
    def like(self) -> Tensor:
        return self.op.like

    def mv(self, v: Blocks) -> Blocks:
        """op applied to the argument; the second axis takes the dual variance."""
        inward = transport.covector if self.ups[1] else transport.vector
        outward = transport.vector if self.ups[0] else transport.covector
        return outward(self.op.mv(inward(v, self.there, self.at.chart)), self.at, self.there.chart)

    def rmv(self, w: Blocks) -> Blocks:
        inward = transport.covector if self.ups[0] else transport.vector
        outward = transport.vector if self.ups[1] else transport.covector
        return outward(self.op.rmv(inward(w, self.there, self.at.chart)), self.at, self.there.chart)


@ops.to_dense.register
def _(operator: Moved) -> Tensor:
    home = ops.to_dense(operator.op)
    return transport.dense(home, operator.ups, operator.at, operator.there.chart)
