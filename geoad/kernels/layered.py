"""Per-sample Jacobians in the structure of affine layers: outer products that are never multiplied out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geoad.kernels import products
from geoad.kernels.jacobians import batched, rebuilt, sample_jacobian
from geoad.kernels.ladder import climb, one_by_one
from geoad.kernels.tap import AffineUse, Tap
from geoad.params import Blocks, Layout

__all__ = ["BlockJacobian", "Factored", "Plan", "block_jacobians", "layered_jacobian", "plan_of"]

Outputs = Callable[[Blocks, Any], Tensor]


@dataclass(frozen=True)
class Factored:
    """J[n, c, (o, i)] = left[n, c, o] · right[n, i], for an affine layer that is used once at one position."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """(n, C, o · i)."""
        return (self.left.unsqueeze(-1) * self.right[:, None, None, :]).flatten(2)


BlockJacobian = Factored | Tensor
"""The Jacobian of one block for n samples and C outputs: factored, or a tensor (n, C, size)."""


@dataclass(frozen=True)
class Plan:
    """Which blocks have the structure of affine layers at all their uses.

    Attributes:
        uses: the tapped operations, in the order in which they run.
        covered: these blocks.
        others: the blocks that are not covered -> the functions that see them otherwise (none if they are not used).
    """

    uses: list[AffineUse]
    covered: frozenset[str]
    others: dict[str, list[str]]


def plan_of(outputs: Outputs, x: Blocks, sample: Any) -> Plan:
    """What one evaluation on `sample` (a single sample with its batch axis of 1) shows."""
    with torch.no_grad(), one_by_one(), Tap(_names(x)) as tap:
        outputs(x, sample)
    used = {name for use in tap.uses for name in (use.weight, use.bias) if name is not None}
    covered = frozenset(used - set(tap.others))
    return Plan(tap.uses, covered, {name: tap.others.get(name, []) for name in x if name not in covered})


def _names(x: Blocks) -> dict[int, str]:
    return {id(block): name for name, block in x.items()}


def layered_jacobian(outputs: Outputs, x: Blocks, inputs: Any, plan: Plan) -> tuple[Tensor, dict[str, BlockJacobian]]:
    """Outputs (n, ..., c) and the Jacobian of every block, with all output axes of a sample in one axis of length C.

    One evaluation and C backward passes through the network, for all samples at once. Each sample runs by itself under
    ``vmap``, with a batch axis of 1: whatever axes the layers see belong to that sample. Blocks that are not covered are
    differentiated in the same passes, exactly.
    """
    others = {name: block for name, block in x.items() if name not in plan.covered}
    like = next(iter(x.values()))

    def single(samples: tuple[Tensor, ...]) -> Any:
        def perturbed(zeros: list[Tensor], rest: Blocks) -> Any:
            with Tap(_names(x | rest), zeros) as tap:
                f = outputs(x | rest, rebuilt(inputs, iter(samples)))[0]
            return f, (f, tap.inputs)

        zeros = [like.new_zeros(use.shape) for use in plan.uses]
        linearized: Any = torch.func.vjp(perturbed, zeros, others, has_aux=True)
        f, pull, aux = linearized
        eye = torch.eye(f.numel(), dtype=f.dtype, device=f.device).reshape(f.numel(), *f.shape)
        return aux, torch.func.vmap(pull)(eye)

    (f, seen), (back, generic) = products.quiet_vmap(single)(tuple(batched(inputs)))
    found: dict[str, BlockJacobian] = {}
    for name in x:
        if name not in plan.covered:
            found[name] = generic[name].flatten(2) if generic[name].ndim > 2 else generic[name].unsqueeze(-1)
            continue
        uses = zip(plan.uses, seen, back, strict=True)
        found[name] = _joined([_of_use(name, use, a, g) for use, a, g in uses if name in (use.weight, use.bias)])
    return f, found


def _of_use(name: str, use: AffineUse, a: Tensor, g: Tensor) -> BlockJacobian:
    """The Jacobian of one use from its inputs a (n, ..., in) and what came back, g (n, C, ..., out)."""
    left, right = g.reshape(*g.shape[:2], -1, g.shape[-1]), a.to(g.dtype).reshape(a.shape[0], -1, a.shape[-1])
    if name == use.bias:
        right = torch.ones_like(right[..., :1])
    if right.shape[1] == 1:
        return Factored(left[:, :, 0], right[:, 0])
    return torch.einsum("ncto,nti->ncoi", left, right).flatten(2)


def _joined(parts: list[BlockJacobian]) -> BlockJacobian:
    """The sum over the uses of a block."""
    if len(parts) == 1:
        return parts[0]
    return torch.stack([part.dense() if isinstance(part, Factored) else part for part in parts]).sum(0)


def block_jacobians(
    outputs: Outputs, layout: Layout, x: Blocks, inputs: Any, plan: Plan
) -> tuple[Tensor, dict[str, BlockJacobian]]:
    """`layered_jacobian`, or, for networks that ``vmap`` cannot batch, the same numbers without structure."""

    def unstructured() -> tuple[Tensor, dict[str, BlockJacobian]]:
        f, jacobian = sample_jacobian(outputs, layout, x, inputs)
        flat = jacobian.reshape(f.shape[0], -1, layout.dim)
        return f, {name: flat[..., place] for name, place in layout.offsets().items()}

    if not plan.covered:
        return unstructured()
    return climb("samples", [("vmap", lambda: layered_jacobian(outputs, x, inputs, plan)), ("loop", unstructured)])
