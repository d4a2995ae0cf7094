"""The autograd node ψ ↦ θ inside a `GeoModule`, and the ledger of what flowed back through it.

The node returns the stored θ bit for bit and notes the cotangent of θ on the way back. An optimizer that runs on θ thus sees
the same numbers in every chart. Recovering them as Jᵀ(ψ.grad) would turn exact zeros into 1e-17, which sign-like update rules
(Rprop, Adagrad, Adam with a tiny eps) blow up to whole steps; it is only the fallback for a ``.grad`` that was edited.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geoad.fields.transition import Transition
from geoad.params import Blocks

__all__ = ["Ledger", "to_reference"]


@dataclass
class _Entry:
    """Cotangents of one block: settled by earlier backward passes, and gathered in the present one."""

    task: int
    theta: Tensor
    psi: Tensor
    theta_before: Tensor | None = None
    psi_before: Tensor | None = None
    broken: bool = False

    def total(self) -> tuple[Tensor, Tensor]:
        """(θ cotangent, the ψ gradient that autograd must have accumulated), summed in the order autograd sums."""
        if self.theta_before is None or self.psi_before is None:
            return self.theta, self.psi
        return self.theta_before + self.theta, self.psi_before + self.psi


class Ledger:
    """θ cotangents by block, and the ψ gradients that go with them, to notice when ``.grad`` was edited."""

    def __init__(self) -> None:
        self.entries: dict[str, _Entry] = {}

    def note(self, name: str, present: Tensor | None, theta: Tensor, psi: Tensor) -> None:
        """A node handed back (θ cotangent, ψ cotangent) for a block whose gradient is `present` before this backward pass."""
        task: int = torch._C._current_graph_task_id()  # pyright: ignore
        entry = self.entries.get(name)
        if entry is not None and entry.task == task:
            entry.theta, entry.psi = entry.theta + theta, entry.psi + psi
        elif present is None or not bool(present.any()):
            self.entries[name] = _Entry(task, theta, psi)
        elif entry is not None and not entry.broken and torch.equal(present, entry.total()[1]):
            before = entry.total()
            self.entries[name] = _Entry(task, theta, psi, *before)
        else:
            self.entries[name] = _Entry(task, theta, psi, broken=True)

    def recall(self, name: str, present: Tensor) -> Tensor | None:
        """The θ cotangent of a block if its ψ gradient `present` is exactly what flowed through the node, else None."""
        entry = self.entries.get(name)
        if entry is None or entry.broken:
            return None
        theta, psi = entry.total()
        same = psi.shape == present.shape and psi.dtype == present.dtype and psi.device == present.device
        return theta if same and torch.equal(psi, present) else None

    def clear(self) -> None:
        """Forget everything."""
        self.entries.clear()


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, setting: Any, *psi: Tensor) -> tuple[Tensor, ...]:
        names, theta, way, ledger, leaves = setting
        ctx.setting = (names, way, ledger, leaves)
        ctx.stored = theta
        ctx.save_for_backward(*psi)
        return tuple(theta[name].detach() for name in names)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        names, way, ledger, leaves = ctx.setting
        psi: tuple[Tensor, ...] = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the result must be differentiable in ψ and in the cotangents
            outputs: Blocks = way(dict(zip(names, psi, strict=True)))
            graph = [outputs[name] for name in names]
            slopes = torch.autograd.grad(graph, psi, cotangents, create_graph=True, allow_unused=True, materialize_grads=True)
            back = dict(zip(names, slopes, strict=True))
        else:
            blocks = dict(zip(names, psi, strict=True))
            back = way.pull_between(blocks, ctx.stored, dict(zip(names, cotangents, strict=True)))
        for name, cotangent in zip(names, cotangents, strict=True):
            if ledger is not None and leaves[name].requires_grad:
                ledger.note(name, leaves[name].grad, cotangent.detach(), back[name].detach())
        return (None, *(back[name] for name in names))


def to_reference(
    psi: dict[str, torch.nn.Parameter], theta: Blocks, way: Transition, ledger: Ledger
) -> Blocks:
    """θ as a differentiable function of the leaves ψ, with the stored values."""
    names = tuple(psi)
    outputs: Any = _Node.apply((names, theta, way, ledger, psi), *psi.values())
    return dict(zip(names, outputs, strict=True))
