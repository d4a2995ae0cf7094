"""The rows U of curvature fields over data, Σ c JᵀAJ = Uᵀ D U with D = ±1: products with them, and their inner products."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from geoad.charts import Point
from geoad.curvature.network import NetworkCurvature
from geoad.curvature.sweep import Plans, Portion, progress_bar
from geoad.distributed import Shard
from geoad.distributed.exchange import ProcessGroup
from geoad.errors import GeometryError
from geoad.function_space.derivative import Derivative, rows_of
from geoad.function_space.gram import gram, numbers_beside
from geoad.function_space.space import at_home
from geoad.kernels.conditions import together
from geoad.kernels.kernel_gram import Group
from geoad.kernels.memory import require_memory
from geoad.kernels.rows import Rows
from geoad.params import Blocks, add
from geoad.tangent.data import Data

__all__ = ["CurvatureRows", "RowsOfField"]


class RowsOfField:
    """The rows √|c|·SᵀJ of one field c·JᵀAJ with A = S D Sᵀ, for the samples of this process, which are stored nowhere.

    Attributes:
        chunks: the rows in the structure of layers, until whoever needs them takes them away.
        root: S, (K, N, ..., c).
        signs: D, (N·K,), or None where all are +1.
    """

    def __init__(self, factor: float, field: NetworkCurvature, at: Point, groups: Sequence[Group], max_memory: int) -> None:
        Data(field.geo, field.batches, None, shared=True).require_separate_samples()
        home, outputs = at_home(field.evaluate, at, field.geo.reference)
        self.field, self.factor = field, factor
        self.chunks: list[Rows] = []
        self._seeds: list[Portion] = []
        together(lambda: self._collect(Plans(outputs, home.blocks), at, groups, max_memory))
        self.root = torch.cat([s for s, _ in self._seeds], 1)
        self.signs = self._joined_signs()
        self._seeds = []
        self.derivative = Derivative(outputs, field.batches, home.blocks, self.root.shape[1:], max_memory)

    def _collect(self, plans: Plans, at: Point, groups: Sequence[Group], max_memory: int) -> None:
        field, count = self.field, self.field.batches.own

        def seeds(outputs: Tensor, labels: Any) -> Portion:
            field.inspect(outputs, plans.x)
            return field.weighted_seeds(outputs, labels).scaled(abs(self.factor) ** 0.5).all()

        batches = field.swept(at.to(field.home).blocks)
        found = rows_of(plans, batches, seeds, max_memory, lambda rows: numbers_beside(groups, rows))
        with progress_bar(field.progress, count) as bar:
            for rows, used in found:
                if not self.chunks:
                    _require_room(rows, count)
                self.chunks.append(rows)
                self._seeds.append(used)
                if bar is not None:
                    bar.update(rows.samples)

    def _joined_signs(self) -> Tensor | None:
        turned = [(s, None if signs is None else signs.mT.flatten()) for s, signs in self._seeds]
        if self.factor > 0 and all(signs is None for _, signs in turned):
            return None
        sign = 1.0 if self.factor > 0 else -1.0
        return torch.cat([sign * (s.new_ones(s.shape[0] * s.shape[1]) if d is None else d) for s, d in turned])

    @property
    def size(self) -> int:
        """N·K, the number of rows."""
        return self.root.shape[0] * self.root.shape[1]

    @property
    def centred(self) -> bool:
        """The mean of all rows is to be subtracted from each: a covariance."""
        return getattr(self.field, "kind", "") == "covariance"

    def push(self, v: Blocks) -> Tensor:
        """U v, (*batch, N·K), K fastest."""
        pushed = self.derivative.push(v)
        batch = pushed.ndim - (self.root.ndim - 1)
        flat = pushed.reshape(*pushed.shape[: batch + 1], -1)
        return torch.einsum("kno,...no->...nk", self.root.flatten(2), flat).flatten(-2)

    def pull(self, z: Tensor) -> Blocks:
        """Uᵀ z."""
        root = self.root
        u = torch.einsum("kno,...nk->...no", root.flatten(2), z.unflatten(-1, (-1, len(root))))
        return self.derivative.pull(u.reshape(*z.shape[:-1], *root.shape[1:]))


def _require_room(rows: Rows, count: int) -> None:
    numbers = count * sum(each.numel() // rows.samples for each in rows.others.values())
    if numbers:
        like = next(iter(rows.others.values()))
        what = f"the rows of {sorted(rows.others)}, which are in no layer with structure,"
        remedy = "Solve by conjugate gradients, field(p).solve(w, damping=..., method=CG()), or take fewer samples."
        require_memory(numbers * like.element_size(), what, like, remedy)


class CurvatureRows:
    """The rows of several fields together. With data of several processes: those of all of them, in their order.

    Args:
        terms: the fields with their factors.
        at: the point.
        groups: the inverse of the metric, for the inner products.
        max_memory: bytes for intermediate results and what products share.

    Attributes:
        gram: U G⁻¹ Uᵀ (R, R).
        signs: D, (R,), or None where all are +1.
    """

    def __init__(
        self, terms: Sequence[tuple[float, NetworkCurvature]], at: Point, groups: Sequence[Group], max_memory: int
    ) -> None:
        self.processes = _processes([field for _, field in terms])
        self._agree(terms, at)
        with self._guarded():
            self.fields = [RowsOfField(factor, field, at, groups, max_memory) for factor, field in terms]
        self._slices = _slices([each.size for each in self.fields])
        if self.processes is not None:
            self.processes.agree(_CALL)
        own = self._slices[-1].stop
        counts: list[int] = [own] if self.processes is None else self.processes.gathered(own)
        start = 0 if self.processes is None else sum(counts[: self.processes.rank])
        self.size, self._mine = sum(counts), slice(start, start + own)
        self.signs, self._means = self._all_signs(), self._all_means()
        self.gram = self._gram(groups, max_memory)

    def _agree(self, terms: Sequence[tuple[float, NetworkCurvature]], at: Point) -> None:
        if self.processes is not None:
            self.processes.agree(f"{_CALL}: {len(terms)} fields with the factors {[factor for factor, _ in terms]}")
        for _, field in terms:
            field.agree(at.to(field.home).blocks)

    def _guarded(self) -> AbstractContextManager[None]:
        """Own work before an exchange."""
        return nullcontext() if self.processes is None else self.processes.guarded(_CALL)

    def _joined(self, z: Tensor) -> Tensor:
        """Numbers (*batch, own rows) side by side with those of the other processes."""
        if self.processes is None:
            return z
        self.processes.agree(_CALL)
        return self.processes.joined([z.movedim(-1, 0).contiguous()], _CALL)[0].movedim(0, -1)

    def _all_signs(self) -> Tensor | None:
        some = any(each.signs is not None for each in self.fields)
        if not (some if self.processes is None else any(self.processes.gathered(some))):
            return None
        signs = [each.root.new_ones(each.size) if each.signs is None else each.signs for each in self.fields]
        return self._joined(torch.cat(signs))

    def _all_means(self) -> Tensor | None:
        """An orthonormal column for each covariance: what is to be projected away."""
        if not any(each.centred for each in self.fields):
            return None
        like, columns = self.fields[0].root, list[Tensor]()
        for each, place in zip(self.fields, self._slices, strict=True):
            if each.centred:
                one = like.new_zeros(self._slices[-1].stop)
                one[place] = 1
                columns.append(one)
        found = self._joined(torch.stack(columns)).mT
        return found / found.norm(dim=0)

    def _centred(self, z: Tensor) -> Tensor:
        """(1 - C Cᵀ) z."""
        return z if self._means is None else z - (z @ self._means) @ self._means.mT

    def _gram(self, groups: Sequence[Group], max_memory: int) -> Tensor:
        chunks = [rows for each in self.fields for rows in each.chunks]
        for each in self.fields:
            each.chunks = []
        found = gram(chunks, groups, max_memory // 2, self.processes)
        return found if self._means is None else _symmetric(self._centred(self._centred(found).mT))

    # -- products ------------------------------------------------------------------------------------------------------------

    def push(self, v: Blocks) -> Tensor:
        """U v, (*batch, R)."""
        with self._guarded():
            own = torch.cat([each.push(v) for each in self.fields], -1)
        return self._centred(self._joined(own))

    def pull(self, z: Tensor) -> Blocks:
        """Uᵀ z."""
        mine, total = self._centred(z)[..., self._mine], None
        with self._guarded():
            for each, place in zip(self.fields, self._slices, strict=True):
                term = each.pull(mine[..., place])
                total = term if total is None else add(total, term)
        assert total is not None
        if self.processes is None:
            return total
        return dict(zip(total, self.processes.sum(list(total.values()), _CALL), strict=True))

    def product(self, v: Blocks) -> Blocks:
        """Uᵀ D U v."""
        z = self.push(v)
        return self.pull(z if self.signs is None else self.signs * z)


_CALL = "rows of a dual solve"


def _processes(fields: Sequence[NetworkCurvature]) -> ProcessGroup | None:
    """Those that hold the data of all fields."""
    shards = [field.batches for field in fields if isinstance(field.batches, Shard)]
    if not shards:
        return None
    if len(shards) < len(fields) or any(each.processes.group is not shards[0].processes.group for each in shards):
        raise GeometryError(
            "a dual solve was asked for a sum of fields of which some have data that are shared out among processes and others "
            "have not, or of other groups. The rows of all of them stand in one matrix; pass geoad.distributed.shard(data) of "
            "one group to all fields."
        )
    return shards[0].processes


def _slices(sizes: Sequence[int]) -> list[slice]:
    return [slice(stop - size, stop) for stop, size in zip(accumulate(sizes), sizes, strict=True)]


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)
