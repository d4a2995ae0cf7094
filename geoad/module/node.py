"""The autograd node ψ ↦ θ inside a `GeoModule`, and the ledger of what flowed back through it.

The node returns the stored θ bit for bit and notes the cotangent of θ on the way back. An optimizer that runs on θ thus sees
the same numbers in every chart. Recovering them as Jᵀ(ψ.grad) would turn exact zeros into 1e-17, which sign-like update rules
(Rprop, Adagrad, Adam with a tiny eps) blow up to whole steps; it is only used for the edits of a ``.grad``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geoad.errors import BasePointError
from geoad.fields.transition import Transition
from geoad.params import Blocks, equal

__all__ = ["Bundle", "Graph", "Group", "Ledger", "groups_of", "to_reference"]

Bundle = tuple[Tensor | None, ...]
"""One tensor, or none, for each block of a group."""

Group = tuple[tuple[str, ...], tuple[str, ...]]
"""Blocks of θ and the blocks of ψ that stand for them: one each, but for maps that make other blocks."""

Account = tuple[Bundle, Bundle, bool]
"""(θ cotangents, the ψ gradients that go with them), and whether these are all of the present gradients."""


def groups_of(way: Transition) -> list[Group]:
    """The groups of a way from ψ to θ: single blocks for changes of coordinates, else the blocks that each map mixes."""
    layout = way.start.layout.names
    if all(bound.law == "diffeomorphism" for bound, _ in way.steps):
        return [((name,), (name,)) for name in layout]
    groups = [({name}, {name}) for name in layout]  # (blocks of the present station, of ψ)
    for bound, along in way.steps:
        for theta, psi in bound.groups:
            near, far = (theta, psi) if along else (psi, theta)
            joined = [group for group in groups if group[0] & set(near)]
            groups = [group for group in groups if not group[0] & set(near)]
            groups.append((set(far), {name for _, images in joined for name in images}))
    names = way.end.layout.names
    return [(tuple(n for n in names if n in theta), tuple(n for n in layout if n in psi)) for theta, psi in groups]


def _plus(a: Bundle, b: Bundle) -> Bundle:
    return tuple(y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True))


def _agree(a: Bundle, b: Bundle) -> bool:
    pairs = zip(a, b, strict=True)
    return all(x is y if x is None or y is None else equal({"": x}, {"": y}) for x, y in pairs)


@dataclass
class _Entry:
    """Cotangents of one group: settled by earlier backward passes, and gathered in the present one."""

    theta: Bundle
    psi: Bundle
    task: int | None = None
    pending: tuple[Bundle, Bundle] | None = None

    def total(self) -> tuple[Bundle, Bundle]:
        """Both sums, in the order in which autograd sums."""
        if self.pending is None:
            return self.theta, self.psi
        return _plus(self.theta, self.pending[0]), _plus(self.psi, self.pending[1])

    def accounted(self, present: Bundle, likes: Sequence[Tensor]) -> Account:
        """What of the gradients `present` is known: all of it, unless it was edited; `likes` are the blocks of θ.

        The last backward pass need not have been accumulated (``torch.autograd.grad``), and the gradient may have been zeroed.
        """
        if all(each is None for each in present):
            return (None,) * len(self.theta), present, True
        total = self.total()
        if _agree(total[1], present):
            return *total, True
        if _agree(self.psi, present):
            return self.theta, self.psi, True
        if not any(each is not None and bool(each.any()) for each in present):
            # zeroed; what never had a cotangent stays without
            unknown = all(each is None for each in total[1])
            zeros = [torch.zeros_like(each) for each in likes]
            theta = tuple(zero if unknown or known is not None else None for known, zero in zip(total[0], zeros, strict=True))
            return theta, tuple(None if each is None else torch.zeros_like(each) for each in present), True
        return *total, False


class Ledger:
    """θ cotangents by group, and the ψ gradients that go with them, to notice when ``.grad`` was edited."""

    def __init__(self, groups: Sequence[Group] = ()) -> None:
        self.groups = list(groups)
        self.entries: dict[int, _Entry] = {}

    def _entry(self, index: int) -> _Entry:
        known = self.entries.get(index)
        if known is None:
            theta, psi = self.groups[index]
            known = self.entries[index] = _Entry((None,) * len(theta), (None,) * len(psi))
        return known

    def note(self, index: int, present: Bundle, likes: Sequence[Tensor], theta: Bundle, psi: Bundle) -> None:
        """A node handed back (θ cotangents, ψ cotangents) for a group whose gradients were `present` before this pass."""
        task: int = torch._C._current_graph_task_id()  # pyright: ignore
        entry = self._entry(index)
        if entry.task == task and entry.pending is not None:
            entry.pending = _plus(entry.pending[0], theta), _plus(entry.pending[1], psi)
            return
        before = entry.accounted(present, likes)
        self.entries[index] = _Entry(before[0], before[1], task, (theta, psi))

    def set(self, index: int, theta: Bundle, psi: Bundle) -> None:
        """Say that the gradients `psi` stand for the cotangents `theta`."""
        self.entries[index] = _Entry(theta, psi)

    def accounted(self, index: int, present: Bundle, likes: Sequence[Tensor]) -> Account:
        """See `_Entry.accounted`."""
        return self._entry(index).accounted(present, likes)

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
        given = dict(zip(self.theta, cotangents, strict=True))
        dense = {
            name: torch.zeros_like(self.theta[name]) if cot is None else (cot.to_dense() if cot.is_sparse else cot)
            for name, cot in given.items()
        }
        moved = self.way.pull_between(self.written, theta, dense)
        unused = self._unused(given)
        return [None if name in unused else moved[name] for name in names]

    def _unused(self, cotangents: dict[str, Tensor | None]) -> set[str]:
        """A block has no gradient if nothing that depends on it was used."""
        if not self.way.blockwise:
            return set()
        return {name for theta, psi in self.ledger.groups if all(cotangents[each] is None for each in theta) for name in psi}

    def _by_autograd(
        self, psi: Blocks, cotangents: list[Tensor | None], wanted: list[nn.Parameter], *, create_graph: bool
    ) -> list[Tensor | None]:
        theta = self.way(psi)
        used = [
            (theta[name], cot.to_dense() if cot.is_sparse else cot)
            for name, cot in zip(self.theta, cotangents, strict=True)
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
        # the very tensors, not copies: autograd then leaves them alone and makes its own
        back = {name: _kept(cotangent) for name, cotangent in zip(graph.theta, cotangents, strict=True)}
        forth = {name: _kept(slope) for name, slope in zip(graph.leaves, slopes, strict=False)}
        for index, (theta, psi) in enumerate(graph.ledger.groups):
            present = tuple(graph.leaves[name].grad for name in psi)
            likes = [graph.theta[name] for name in theta]
            graph.ledger.note(index, present, likes, tuple(back[n] for n in theta), tuple(forth[n] for n in psi))
        slopes += [None] * (len(graph.leaves) + len(graph.numbers) - len(slopes))
        return (None, *slopes)


def _kept(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach() if tensor.requires_grad else tensor


def to_reference(graph: Graph) -> Blocks:
    """θ as a differentiable function of the leaves ψ, with the stored values."""
    outputs: Any = _Node.apply(graph, *graph.leaves.values(), *graph.numbers)
    return dict(zip(graph.theta, outputs, strict=True))  # not kept by `graph`, which they keep alive
