"""Rows of single samples in the structure of layers: what went in and what came back, never multiplied out."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from geoad.kernels.ladder import at_top_level
from geoad.kernels.positions import Factored, rows_of_bias, rows_of_weight, write_row
from geoad.kernels.uses import Use
from geoad.params import Blocks, Layout

__all__ = ["BlockRows", "Plan", "Rows", "UseRows", "joined"]

T = TypeVar("T")

BlockRows = Factored | Tensor
"""The rows of one block for n samples and K seeds: factored, or a tensor (n, K, size)."""


@dataclass(frozen=True)
class Plan:
    """Which blocks have the structure of layers at all their uses.

    Attributes:
        uses: the tapped operations of these blocks, in the order in which they run.
        covered: these blocks.
        others: the blocks that are not covered -> the functions that see them otherwise (none if they are not used).
        graph: how many numbers the graph of those holds for a sample.
        working: how many are needed for a sample and a seed to go back through it.
    """

    uses: list[Use]
    covered: frozenset[str]
    others: dict[str, list[str]]
    graph: int = field(default=0, repr=False, compare=False)
    working: int = field(default=0, repr=False, compare=False)

    @cached_property
    def _known(self) -> dict[Hashable, Any]:
        return {}

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """`compute` (), worked out once: it follows from the plan and from `key`, and is asked for again with each chunk."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def coverage(self) -> dict[str, str]:
        """For each block the rules that cover it, or the functions that prevent it."""
        found: dict[str, list[str]] = {name: [] for name in self.covered}
        for use in self.uses:
            for name in use.names:
                found[name].append(_RULE_NAMES.get(type(use).__name__, type(use).__name__))
        covered = {name: ", ".join(dict.fromkeys(kinds)) for name, kinds in found.items()}
        generic = {name: f"generic: {', '.join(dict.fromkeys(why)) or 'not used'}" for name, why in self.others.items()}
        return covered | generic

    def without_structure(self, why: str = "") -> Plan:
        """The plan that covers nothing: every block is differentiated generically, which is always right."""
        reason = [why] if why else []
        return Plan([], frozenset(), dict.fromkeys(self.covered, reason) | self.others, self.graph, self.working)


_RULE_NAMES = {
    "AffineUse": "affine",
    "ConvUse": "convolution",
    "EmbeddingUse": "embedding",
    "ScaleUse": "scale",
    "ShiftUse": "shift",
}


# -- rows --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UseRows:
    """What went into one use, and what came back.

    Attributes:
        use: the use.
        a: what was recorded (n, ...).
        back: for each seed, what came back to the output (n, *use.shape); none if only their squares are there.
        squares: Σ_k σ_k g_k² (n, *use.shape) instead.
    """

    use: Use
    a: Tensor
    back: Sequence[Tensor]
    squares: Tensor | None = None

    def part(self, samples: slice) -> UseRows:
        """That of some samples."""
        squares = None if self.squares is None else self.squares[samples]
        return UseRows(self.use, self.a[samples], [each[samples] for each in self.back], squares)

    @property
    def like(self) -> Tensor:
        """A tensor (n, *use.shape) of the numbers that came back."""
        return self.back[0] if self.squares is None else self.squares

    @cached_property
    def g(self) -> Tensor:
        """What came back, (n, K, *use.shape)."""
        return self.back[0].unsqueeze(1) if len(self.back) == 1 else torch.stack(tuple(self.back), 1)

    def rows(self, name: str) -> BlockRows:
        """The part of the rows of a block that is due to this use."""
        use, parts = self.use, list[BlockRows]()
        if use.weight is not None and use.weight.name == name:
            parts.append(rows_of_weight(use, self.a, self.g))
        if use.bias is not None and use.bias.name == name:
            parts.append(rows_of_bias(use, self.g))
        return _joined(parts)


@dataclass(frozen=True)
class Rows:
    """The rows r = sᵀ J_n of n samples and K seeds, for all blocks.

    Attributes:
        layout: the blocks with their shapes.
        plan: which of them have structure.
        uses: the rows of the covered blocks, in structure.
        others: the rows of the other blocks (n, K, size).
        samples, seeds: n and K.
        further: these are more seeds of the samples that came last.
    """

    layout: Layout = field(repr=False)
    plan: Plan = field(repr=False)
    uses: list[UseRows]
    others: dict[str, Tensor]
    samples: int
    seeds: int
    further: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers."""
        return self.uses[0].like.dtype if self.uses else next(iter(self.others.values())).dtype

    def part(self, samples: slice) -> Rows:
        """The rows of some samples."""
        uses = [each.part(samples) for each in self.uses]
        others = {name: each[samples] for name, each in self.others.items()}
        count = len(range(*samples.indices(self.samples)))
        return Rows(self.layout, self.plan, uses, others, count, self.seeds, self.further)

    def numbers_of_a_sample(self) -> int:
        """How many numbers are held for each sample: what went in, what came back, and rows that are explicit."""
        # back twice, for kernels stack it; and about four numbers of the graph for each output
        graph = max(4 * sum(math.prod(each.use.shape) for each in self.uses), self.plan.graph)
        kept = [each.a[0].numel() + 2 * self.seeds * math.prod(each.use.shape) for each in self.uses]
        generic = 3 * sum(each[0].numel() for each in self.others.values())  # pulled, stacked, and in the graph
        return graph + sum(kept) + generic + self.seeds * self.plan.working

    @property
    def nbytes(self) -> int:
        """What is held."""
        held = [each.a.nbytes + sum(back.nbytes for back in each.back) for each in self.uses]
        return sum(held) + sum(each.nbytes for each in self.others.values())

    def of(self, name: str) -> list[UseRows]:
        """The uses of a block; none if it is not covered."""
        return [each for each in self.uses if name in each.use.names]

    def block(self, name: str) -> BlockRows:
        """The rows of a block: an outer product if it is used once at one position, or (n, K, size)."""
        if name in self.others:
            return self.others[name]
        return _joined([each.rows(name) for each in self.of(name)])

    def explicit(self, name: str) -> Tensor:
        """(n, K, size)."""
        rows = self.block(name)
        return rows.dense() if isinstance(rows, Factored) else rows

    def write(self, result: Blocks, place: slice) -> None:
        """Write the rows of the only seed to `place` of the leading axis of `result` (N, *shape)."""
        if self.seeds != 1:
            raise ValueError(f"rows of a single seed were asked for, there are {self.seeds}")
        for name, target in result.items():
            self._write(name, target[place])

    def _write(self, name: str, target: Tensor) -> None:
        """The rows of a block, without another copy where they are outer products."""
        uses = self.of(name)
        written = False
        if len(uses) == 1 and not _recorded(uses[0].a, uses[0].back[0]):
            written = write_row(uses[0].use, uses[0].a, uses[0].back[0], name, target)
        if not written:
            target.copy_(self.explicit(name).reshape(target.shape))


def _recorded(*parts: Tensor) -> bool:
    """Derivatives of what is made of these may be asked for: it cannot be written to memory that is there."""
    return not at_top_level() or (torch.is_grad_enabled() and any(each.requires_grad for each in parts))


def joined(name: str, uses: Sequence[UseRows]) -> Tensor:
    """The rows (n, K, size) of a block from its uses."""
    rows = _joined([each.rows(name) for each in uses])
    return rows.dense() if isinstance(rows, Factored) else rows


def _joined(parts: list[BlockRows]) -> BlockRows:
    """The sum over the uses of a block."""
    if len(parts) == 1:
        return parts[0]
    dense = [part.dense() if isinstance(part, Factored) else part for part in parts]
    total = dense[0].clone()
    for part in dense[1:]:
        total += part
    return total
