"""Collectors of Kronecker factors: KFAC, and EKFAC with the exact diagonal in their eigenbases."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from torch import Tensor

from geoad import operators as ops
from geoad.curvature.collect import Collector, Parts, Task, accumulation_dtype, arrangement, collectors, exact_blocks
from geoad.curvature.representations import EKFAC, KFAC, layers_of
from geoad.errors import GeometryError
from geoad.kernels.factors import EigenSum, KroneckerSum
from geoad.kernels.rows import Rows, UseRows
from geoad.kernels.uses import ConvUse
from geoad.params import Layout

__all__ = ["collectors"]


class _Factors(Collector):
    """A Kronecker product for each layer."""

    def __init__(self, sums: KroneckerSum, layout: Layout, task: Task) -> None:
        self.sums, self.layout, self.task = sums, layout, task

    def add(self, rows: Rows, signs: Tensor | None) -> None:
        self.sums.add(rows, signs)

    def state(self) -> dict[str, Tensor]:
        return self.sums.state()

    def load(self, state: dict[str, Tensor]) -> None:
        self.sums.load(state)

    def numbers_of_a_sample(self, rows: Rows) -> int:
        return max((_patches(each) for each in rows.uses), default=0)

    def parts(self) -> Parts:
        dtype = self.task.like.dtype
        return {op.layout.names: ops.map_numbers(op, lambda t: t.to(dtype)) for op in self.products()}

    def products(self) -> list[ops.Kronecker]:
        """The products, in the precision of the sums."""
        return [
            ops.Kronecker(self.layout.restrict(each.layer.names), arrangement(each.layer), each.left, each.right)
            for each in self.sums.factors()
        ]


def _patches(each: UseRows) -> int:
    """The numbers of the inputs of all positions of one sample."""
    if not isinstance(each.use, ConvUse):
        return 0
    channels, *places = each.use.shape[-len(each.use.kernel) - 1 :]
    return each.use.weight.size // max(1, channels) * prod(places) if each.use.weight is not None else 0


class _EigenFactors(_Factors):
    """The eigenbases of the factors, then the diagonal in them: by a second sweep, unless all rows could be kept."""

    stages = 2

    def __init__(self, sums: KroneckerSum, layout: Layout, task: Task) -> None:
        super().__init__(sums, layout, task)
        self.bases: list[ops.EigenKronecker] | None = None
        self.kept: list[tuple[Rows, Tensor | None]] | None = None if task.again else []
        self.held = 0

    def add(self, rows: Rows, signs: Tensor | None) -> None:
        if self.bases is not None:
            self.diagonal.add(rows, signs)
            return
        super().add(rows, signs)
        if self.kept is None:
            return
        self.held += rows.nbytes
        self.kept.append((rows, signs))
        if self.held > self.task.max_memory // 2:
            self.kept = None

    def numbers_of_a_sample(self, rows: Rows) -> int:
        """With as much for the rows that are kept as for those that come."""
        return super().numbers_of_a_sample(rows) + (0 if self.kept is None else rows.numbers_of_a_sample())

    def state(self) -> dict[str, Tensor]:
        return super().state() if self.bases is None else self.diagonal.state()

    def load(self, state: dict[str, Tensor]) -> None:
        if self.bases is None:
            super().load(state)
        else:
            self.diagonal.load(state)

    def telling(self) -> Iterable[Tensor]:
        return self.state().values() if self.bases is None else ()

    def finished(self) -> bool:
        if self.bases is not None:
            return True
        self.bases = [ops.eigen_kronecker(op) for op in self.products()]
        layers = self.sums.layers
        self.diagonal = EigenSum([(layer, b.left_basis, b.right_basis) for layer, b in zip(layers, self.bases, strict=True)])
        if self.kept is None:
            return False
        for rows, signs in self.kept:
            self.diagonal.add(rows, signs)
        self.kept = None
        return True

    def parts(self) -> Parts:
        assert self.bases is not None
        dtype = self.task.like.dtype
        found = [b.with_values(v, False) for b, v in zip(self.bases, self.diagonal.values(), strict=True)]
        return {op.layout.names: ops.map_numbers(op, lambda t: t.to(dtype)) for op in found}


@collectors.register
def _(representation: KFAC, layout: Layout, task: Task) -> list[Collector]:
    sums = KroneckerSum(task.plan, list(layout), representation.sharing, representation.bias == "joint")
    cls = _EigenFactors if isinstance(representation, EKFAC) else _Factors
    found: list[Collector] = [cls(sums, layout, task)] if sums.layers else []
    return [*found, *_rest(layout, sums.rest, task, representation)]


def _rest(layout: Layout, rest: tuple[str, ...], task: Task, representation: KFAC) -> list[Collector]:
    """The exact blocks of the modules without Kronecker structure, if they are small enough."""
    if not rest:
        return []
    rest_layout = layout.restrict(rest)
    groups = layers_of(rest_layout)
    for module, names in groups.items():
        size = rest_layout.restrict(names).dim ** 2 * accumulation_dtype(task.like.dtype).itemsize
        if size > task.max_memory:
            why = {name: task.plan.coverage()[name] for name in names}
            limit = f"max_memory={task.max_memory} bytes"
            raise GeometryError(
                f"{representation} was asked for, but the parameters {list(names)} of module '{module}' form no Kronecker "
                f"product ({why}), and their exact block takes {size} bytes, over {limit}. Raise "
                "max_memory=, use representation='diagonal' for them ({'" + names[0] + "': 'diagonal', ..., '*': "
                "'kfac'}), or 'implicit' for the whole network."
            )
    return exact_blocks(rest_layout, list(groups.values()), task)
