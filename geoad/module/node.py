"""The autograd node ψ ↦ θ inside a `GeoModule`, and the ledger of what flowed back through it.

The node returns the stored θ bit for bit and notes the cotangent of θ on the way back. An optimizer that runs on θ thus sees
the same numbers in every chart. Recovering them as Jᵀ(ψ.grad) would turn exact zeros into 1e-17, which sign-like update rules
(Rprop, Adagrad, Adam with a tiny eps) blow up to whole steps; it is only used for the edits of a ``.grad``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geoad.errors import BasePointError
from geoad.fields.transition import Transition
from geoad.params import Blocks, equal

__all__ = ["Graph", "Ledger", "to_reference"]

Pair = tuple[Tensor | None, Tensor | None]
"""(θ cotangent, the ψ gradient that goes with it)."""

Account = tuple[Tensor | None, Tensor | None, bool]
"""A `Pair`, and whether it is all of the present gradient."""


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _agree(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return equal({"": a}, {"": b})


@dataclass
class _Entry:
    """Cotangents of one block: settled by earlier backward passes, and gathered in the present one."""

    theta: Tensor | None = None
    psi: Tensor | None = None
    task: int | None = None
    pending: Pair = (None, None)

    def total(self) -> Pair:
        """Both sums, in the order in which autograd sums."""
        return _plus(self.theta, self.pending[0]), _plus(self.psi, self.pending[1])

    def accounted(self, present: Tensor | None) -> Account:
        """What of the gradient `present` is known: all of it, unless it was edited.

        The last backward pass need not have been accumulated (``torch.autograd.grad``), and the gradient may have been zeroed.
        """
        if present is None:
            return None, None, True
        total = self.total()
        if _agree(total[1], present):
            return *total, True
        if _agree(self.psi, present):
            return self.theta, self.psi, True
        if not bool(present.any()):  # zeroed; what never had a cotangent stays without
            unused = total[0] is None and total[1] is not None
            return None if unused else torch.zeros_like(present), torch.zeros_like(present), True
        return *total, False


class Ledger:
    """θ cotangents by block, and the ψ gradients that go with them, to notice when ``.grad`` was edited."""

    def __init__(self) -> None:
        self.entries: dict[str, _Entry] = {}

    def note(self, name: str, present: Tensor | None, theta: Tensor | None, psi: Tensor | None) -> None:
        """A node handed back (θ cotangent, ψ cotangent) for a block whose gradient is `present` before this backward pass."""
        task: int = torch._C._current_graph_task_id()  # pyright: ignore
        entry = self.entries.setdefault(name, _Entry())
        if entry.task == task:
            entry.pending = _plus(entry.pending[0], theta), _plus(entry.pending[1], psi)
            return
        before = entry.accounted(present)
        self.entries[name] = _Entry(before[0], before[1], task, (theta, psi))

    def set(self, name: str, theta: Tensor | None, psi: Tensor | None) -> None:
        """Say that the gradient `psi` stands for the cotangent `theta`."""
        self.entries[name] = _Entry(theta, psi)

    def accounted(self, name: str, present: Tensor | None) -> Account:
        """See `_Entry.accounted`."""
        return self.entries.get(name, _Entry()).accounted(present)

    def clear(self) -> None:
        """Forget everything."""
        self.entries.clear()


@dataclass
class Graph:
    """The node for one pair (ψ, θ): all forward passes at these numbers share it, so that cotangents add up as they do in θ.

    Attributes:
        way: ψ ↦ θ.
        leaves: the parameters ψ.
        written: their values, never changed in place.
        theta: the stored θ (shares its memory).
        numbers: the parameters of learnable maps on the way.
        stamp: the version of these.
        ledger: where cotangents are noted.
    """

    way: Transition
    leaves: dict[str, nn.Parameter]
    written: Blocks
    theta: Blocks
    numbers: list[nn.Parameter]
    stamp: int
    ledger: Ledger
    flags: tuple[bool, ...] = ()
    versions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.flags = self.current_flags()
        self.versions = self.current_versions()

    def current_flags(self) -> tuple[bool, ...]:
        """Which leaves and numbers require a gradient."""
        return tuple(p.requires_grad for p in (*self.leaves.values(), *self.numbers))

    def current_versions(self) -> tuple[int, ...]:
        """The versions of the stored θ: other numbers may stand there by the time of the backward pass."""
        return tuple(block._version for block in self.theta.values())

    def pull(self, cotangents: list[Tensor | None]) -> list[Tensor | None]:
        """The gradients in ψ and in the numbers of the maps."""
        names = tuple(self.leaves)
        wanted = [p for p in self.numbers if p.requires_grad]
        if wanted and self.way.start.stamp() != self.stamp:
            raise BasePointError(
                f"backward through chart '{self.way.start.name}' after the parameters of its learnable map changed: the "
                "Jacobian at the forward pass is gone. Call backward before the optimizer of the map steps, or run the forward "
                "pass again."
            )
        if torch.is_grad_enabled():  # create_graph: the result must be differentiable in ψ and in the cotangents
            if not equal({name: leaf.detach() for name, leaf in self.leaves.items()}, self.written):
                raise BasePointError(
                    f"backward with create_graph=True after the coordinates in chart '{self.way.start.name}' changed: "
                    "derivatives at the forward pass's point are gone. Call backward before changing parameters, or run the "
                    "forward pass again."
                )
            return self._by_autograd(dict(self.leaves), cotangents, wanted, create_graph=True)
        if wanted:
            with torch.enable_grad():
                fresh = {name: self.written[name].clone().requires_grad_() for name in names}
                return self._by_autograd(fresh, cotangents, wanted, create_graph=False)
        theta = self.theta if self.versions == self.current_versions() else self.way(self.written)
        dense = {
            name: torch.zeros_like(self.written[name]) if cot is None else (cot.to_dense() if cot.is_sparse else cot)
            for name, cot in zip(names, cotangents, strict=True)
        }
        moved = self.way.pull_between(self.written, theta, dense)
        return [self._or_none(moved[name], cot) for name, cot in zip(names, cotangents, strict=True)]

    def _or_none(self, slope: Tensor, cotangent: Tensor | None) -> Tensor | None:
        """A block that was not used has no gradient, if no other block depends on it."""
        return None if cotangent is None and self.way.blockwise else slope

    def _by_autograd(
        self, psi: Blocks, cotangents: list[Tensor | None], wanted: list[nn.Parameter], *, create_graph: bool
    ) -> list[Tensor | None]:
        theta = self.way(psi)
        used = [
            (theta[name], cot.to_dense() if cot.is_sparse else cot)
            for name, cot in zip(psi, cotangents, strict=True)
            if cot is not None and theta[name].requires_grad
        ]
        sources = [block for block in psi.values() if block.requires_grad] + wanted
        found = torch.autograd.grad(
            [output for output, _ in used], sources, [cot for _, cot in used], create_graph=create_graph, allow_unused=True
        )
        slopes = {id(source): slope for source, slope in zip(sources, found, strict=True)}
        return [slopes.get(id(each)) for each in (*psi.values(), *self.numbers)]


class _Node(torch.autograd.Function):
    """θ with the stored values; saves nothing with autograd, so that it outlives a backward pass."""

    @staticmethod
    def forward(ctx: Any, graph: Graph, *_: Tensor) -> tuple[Tensor, ...]:
        ctx.graph = graph
        ctx.set_materialize_grads(False)
        return tuple(block.detach() for block in graph.theta.values())

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        graph: Graph = ctx.graph
        slopes = graph.pull(list(cotangents))
        for (name, leaf), cotangent, slope in zip(graph.leaves.items(), cotangents, slopes, strict=False):
            # the very tensors, not copies: autograd then leaves them alone and makes its own
            kept = [None if t is None else (t.detach() if t.requires_grad else t) for t in (cotangent, slope)]
            graph.ledger.note(name, leaf.grad, *kept)
        slopes += [None] * (len(graph.leaves) + len(graph.numbers) - len(slopes))
        return (None, *slopes)


def to_reference(graph: Graph) -> Blocks:
    """θ as a differentiable function of the leaves ψ, with the stored values."""
    outputs: Any = _Node.apply(graph, *graph.leaves.values(), *graph.numbers)
    return dict(zip(graph.leaves, outputs, strict=True))  # not kept by `graph`, which they keep alive
