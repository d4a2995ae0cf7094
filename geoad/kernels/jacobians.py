"""Per-sample Jacobians by ``vmap`` + ``jacrev``, or sample by sample: the generic path that works for any network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from geoad.kernels import products
from geoad.kernels.ladder import climb, one_by_one
from geoad.params import Blocks, Layout

__all__ = ["batched", "rebuilt", "sample_jacobian"]


def sample_jacobian(outputs: Callable[[Blocks, Any], Tensor], layout: Layout, x: Blocks, inputs: Any) -> tuple[Tensor, Tensor]:
    """Outputs (n, ..., c) and Jacobian (n, ..., c, d) of each sample with respect to the raveled blocks.

    Every sample keeps a batch axis of 1 inside, so that layers which expect one (convolutions, flatten, norms) behave. Inputs
    may be tensors, or mappings and sequences of them; what is no tensor, or has no axis, is the same for all samples. Networks
    that ``vmap`` cannot batch (recurrent layers, data-dependent control flow) are gone through sample by sample.
    """
    flat = layout.ravel(x)
    batch = tuple(batched(inputs))

    def single(vector: Tensor, samples: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        value = outputs(layout.unravel(vector), rebuilt(inputs, iter(samples)))[0]
        return value, value

    def by_vmap() -> tuple[Tensor, Tensor]:
        differentiate: Any = torch.func.jacrev(single, has_aux=True)
        jacobian, value = products.quiet_vmap(differentiate, in_dims=(None, 0))(flat, batch)
        return value, jacobian

    def by_loop() -> tuple[Tensor, Tensor]:
        rows = [_one_jacobian(single, flat, tuple(each[i] for each in batch)) for i in range(batch[0].shape[0])]
        values, jacobians = zip(*rows, strict=True)
        return torch.stack(values), torch.stack(jacobians)

    with one_by_one():
        return climb("samples", [("vmap", by_vmap), ("loop", by_loop)])


def _one_jacobian(
    single: Callable[..., tuple[Tensor, Tensor]], flat: Tensor, sample: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    value, pull, _ = products.vjp(lambda vector: single(vector, sample), flat, has_aux=True)
    eye = torch.eye(value.numel(), dtype=value.dtype, device=value.device)
    rows: Tensor = products.mapped(lambda row: pull(row.reshape(value.shape)), eye)
    return value, rows.reshape(*value.shape, flat.numel())


def batched(inputs: Any) -> Iterator[Tensor]:
    """The tensors of `inputs` that have a sample axis, in order."""
    if isinstance(inputs, Tensor):
        if inputs.ndim:
            yield inputs
    elif isinstance(inputs, Mapping):
        for each in cast("Mapping[str, Any]", inputs).values():
            yield from batched(each)
    elif isinstance(inputs, (list, tuple)):
        for each in cast("Sequence[Any]", inputs):
            yield from batched(each)


def rebuilt(inputs: Any, samples: Iterator[Tensor]) -> Any:
    """`inputs` for one sample, with a batch axis of 1."""
    if isinstance(inputs, Tensor):
        return next(samples).unsqueeze(0) if inputs.ndim else inputs
    if isinstance(inputs, Mapping):
        return {name: rebuilt(each, samples) for name, each in cast("Mapping[str, Any]", inputs).items()}
    if isinstance(inputs, (list, tuple)):
        return tuple(rebuilt(each, samples) for each in cast("Sequence[Any]", inputs))
    return inputs
