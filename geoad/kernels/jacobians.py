"""Per-sample Jacobians by ``vmap`` + ``jacrev``: the generic path that works for any network that vmap can batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from geoad.params import Blocks, Layout

__all__ = ["sample_jacobian"]


def sample_jacobian(
    outputs: Callable[[Blocks, Any], Tensor], layout: Layout, x: Blocks, inputs: Any
) -> tuple[Tensor, Tensor]:
    """Outputs (n, ..., c) and Jacobian (n, ..., c, d) of each sample with respect to the raveled blocks.

    Every sample keeps a batch axis of 1 inside, so that layers which expect one (convolutions, flatten, norms) behave.
    """
    flat = layout.ravel(x)

    def single(vector: Tensor, sample: Any) -> tuple[Tensor, Tensor]:
        value = outputs(layout.unravel(vector), _unsqueeze(sample))[0]
        return value, value

    differentiate: Any = torch.func.jacrev(single, has_aux=True)
    mapped: Any = torch.func.vmap(differentiate, in_dims=(None, 0))
    jacobian, value = mapped(flat, inputs)
    return value, jacobian


def _unsqueeze(sample: Any) -> Any:
    if isinstance(sample, Tensor):
        return sample.unsqueeze(0)
    if isinstance(sample, Mapping):
        return {name: _unsqueeze(each) for name, each in sample.items()}
    if isinstance(sample, (list, tuple)):
        return type(sample)(_unsqueeze(each) for each in sample)
    return sample
