"""The leaves of a `GeoModule` in a chart: parameters that hold its coordinates, and what becomes of their gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geoad.charts import Chart, Point
from geoad.fields import Transition
from geoad.module.node import Group
from geoad.params import Blocks
from geoad.tensors import Covector

__all__ = ["dense", "difference", "leaf_like", "make_leaves", "moved_gradients", "own_memory", "write"]


def make_leaves(
    point: Point, theta: dict[str, nn.Parameter], groups: list[Group], flags: dict[str, bool]
) -> dict[str, nn.Parameter]:
    """Parameters with the coordinates of `point`; those of a group are trained if some block of θ in it is."""
    made: dict[str, nn.Parameter] = {}
    for names, images in groups:
        trained = any(flags[name] for name in names)
        for image in images:
            made[image] = leaf_like(theta[image if image in theta else names[0]], point.blocks[image], trained)
    return {name: made[name] for name in point.chart.layout}


def moved_gradients(
    cotangents: dict[str, Tensor | None], theta: Point, chart: Chart, groups: list[Group], flags: dict[str, bool]
) -> dict[str, Tensor | None]:
    """The ``.grad`` of the leaves in `chart` for cotangents of θ."""
    if chart == theta.chart:
        return cotangents
    if all(each is None for each in cotangents.values()):
        return dict.fromkeys(chart.layout)
    blocks = {
        name: theta.blocks[name].new_zeros(block.shape) if (cot := cotangents[name]) is None else dense(cot)
        for name, block in theta.blocks.items()
    }
    moved = Covector(theta.chart, blocks, theta).to(chart).blocks
    joint = not Transition(theta.chart, chart).blockwise
    found: dict[str, Tensor | None] = {}
    for names, images in groups:
        wanted = any(flags[name] for name in names) and (joint or any(cotangents[name] is not None for name in names))
        found |= {image: moved[image] if wanted else None for image in images}
    return found


def leaf_like(like: nn.Parameter, block: Tensor, requires_grad: bool) -> nn.Parameter:
    """A parameter with the values of `block` and the attributes of `like`."""
    leaf = nn.Parameter(block.detach().clone(), requires_grad=requires_grad)
    vars(leaf).update(vars(like))
    return leaf


def write(parameter: nn.Parameter, block: Tensor) -> None:
    """Give `parameter` the values of `block`, and its dtype and device too if these differ."""
    if parameter.dtype == block.dtype and parameter.device == block.device:
        parameter.copy_(block)
    else:  # the bare network was converted
        parameter.data = block.clone()


def own_memory(block: Tensor, others: Blocks) -> Tensor:
    """`block` with memory of its own (maps may hand back their arguments)."""
    memory = block.untyped_storage().data_ptr()
    return block.clone() if any(memory == each.untyped_storage().data_ptr() for each in others.values()) else block.detach()


def difference(new: Tensor | None, old: Tensor | None, like: Tensor) -> Tensor:
    """new - old, where None is zero."""
    zero = torch.zeros_like(like)
    return (zero if new is None else dense(new.detach())) - (zero if old is None else old)


def dense(tensor: Tensor) -> Tensor:
    """The tensor without sparsity."""
    return tensor.to_dense() if tensor.is_sparse else tensor
