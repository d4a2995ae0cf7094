"""Per-sample Jacobians by ``vmap`` + ``jacrev``: the generic path that works for any network that vmap can batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from geoad.params import Blocks, Layout

__all__ = ["sample_jacobian"]


def sample_jacobian(outputs: Callable[[Blocks, Any], Tensor], layout: Layout, x: Blocks, inputs: Any) -> tuple[Tensor, Tensor]:
    """Outputs (n, ..., c) and Jacobian (n, ..., c, d) of each sample with respect to the raveled blocks.

    Every sample keeps a batch axis of 1 inside, so that layers which expect one (convolutions, flatten, norms) behave. Inputs
    may be tensors, or mappings and sequences of them; what is no tensor, or has no axis, is the same for all samples.
    """
    flat = layout.ravel(x)

    def single(vector: Tensor, samples: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        value = outputs(layout.unravel(vector), _rebuild(inputs, iter(samples)))[0]
        return value, value

    differentiate: Any = torch.func.jacrev(single, has_aux=True)
    mapped: Any = torch.func.vmap(differentiate, in_dims=(None, 0))
    jacobian, value = mapped(flat, tuple(_batched(inputs)))
    return value, jacobian


def _batched(inputs: Any) -> Iterator[Tensor]:
    """The tensors with a sample axis, in order."""
    if isinstance(inputs, Tensor):
        if inputs.ndim:
            yield inputs
    elif isinstance(inputs, Mapping):
        for each in cast("Mapping[str, Any]", inputs).values():
            yield from _batched(each)
    elif isinstance(inputs, (list, tuple)):
        for each in cast("Sequence[Any]", inputs):
            yield from _batched(each)


def _rebuild(inputs: Any, samples: Iterator[Tensor]) -> Any:
    """`inputs` for one sample, with a batch axis of 1."""
    if isinstance(inputs, Tensor):
        return next(samples).unsqueeze(0) if inputs.ndim else inputs
    if isinstance(inputs, Mapping):
        return {name: _rebuild(each, samples) for name, each in cast("Mapping[str, Any]", inputs).items()}
    if isinstance(inputs, (list, tuple)):
        return tuple(_rebuild(each, samples) for each in cast("Sequence[Any]", inputs))
    return inputs
