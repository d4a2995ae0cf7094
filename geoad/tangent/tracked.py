"""Tangent kernels inside of a derivative: rows multiplied out, by operations that autograd and ``torch.func`` follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from geoad.errors import GeometryError
from geoad.kernels.jacobians import batched, sample_jacobian
from geoad.kernels.memory import require_memory
from geoad.params import Blocks, Layout, first, is_wrapped
from geoad.tangent.data import Data
from geoad.tangent.inverse import Sharp

__all__ = ["is_tracked", "tracked_matrix", "tracked_norms"]


def is_tracked(theta: Blocks, *sides: Data) -> bool:
    """Someone may ask for the derivative of what is computed from these parameters or data."""
    return any(_watched(each) for each in _tensors(theta, sides))


def _tensors(theta: Blocks, sides: tuple[Data, ...]) -> Iterator[Tensor]:
    yield from theta.values()
    for data in dict.fromkeys(sides):
        if data.batches.lasting:
            for inputs, _ in data.batches:
                yield from batched(inputs)


def _watched(tensor: Tensor) -> bool:
    if is_wrapped({"": tensor}) or forward_ad.unpack_dual(tensor).tangent is not None:
        return True
    return tensor.requires_grad and torch.is_grad_enabled()


def tracked_matrix(left: Data, right: Data, sharp: Sharp, theta: Blocks, contract: str) -> tuple[Tensor, Tensor, Tensor]:
    """K with the axes of `geoad.tangent.dense.kernel_matrix`, and the outputs of both data sets."""
    f, rows = _rows(left, theta)
    g, others = (f, rows) if left is right else _rows(right, theta)
    dual = _dual(others, sharp, theta)
    if contract == "none":
        return torch.einsum("nkd,mld->nkml", rows, dual), f, g
    rows, dual = _by_outputs(rows, f), _by_outputs(dual, g)
    if contract == "trace":
        return torch.einsum("knd,kmd->nm", rows, dual), f, g
    return torch.einsum("knd,kmd->knm", rows, dual), f, g


def tracked_norms(data: Data, sharp: Sharp, theta: Blocks) -> Tensor:
    """The diagonal of K, in the shape of the outputs."""
    f, rows = _rows(data, theta)
    return (rows * _dual(rows, sharp, theta)).sum(-1).reshape(f.shape)


def _rows(data: Data, theta: Blocks) -> tuple[Tensor, Tensor]:
    """Outputs (N, ..., c), and their derivatives (N, K, d)."""
    layout, found = Layout({name: block.shape for name, block in theta.items()}), list[tuple[Tensor, Tensor]]()
    for size, inputs, _ in data.batches.sized():
        shape = data.shape_of_sample(theta, inputs)
        _require_room(data.batches.total * shape.numel() * layout.dim, theta)
        found.append(sample_jacobian(data.evaluate, layout, theta, inputs))
        if len(found[-1][0]) != size:
            raise GeometryError(f"a batch of {size} samples gave {len(found[-1][0])} outputs. Put the samples first.")
    outputs = torch.cat([f for f, _ in found])
    rows = torch.cat([rows.reshape(len(f), -1, layout.dim) for f, rows in found])
    return outputs, rows


def _require_room(numbers: int, theta: Blocks) -> None:
    like = first(theta)
    remedy = "Differentiate through fewer samples at a time, or take outputs= for a few of the outputs."
    require_memory(numbers * like.element_size(), "the rows of a tangent kernel inside of a derivative", like, remedy)


def _dual(rows: Tensor, sharp: Sharp, theta: Blocks) -> Tensor:
    """The rows times G⁻¹."""
    layout = Layout({name: block.shape for name, block in theta.items()})
    blocks: Any = sharp(layout.unravel(rows))
    return layout.ravel({name: blocks[name] for name in layout.names})


def _by_outputs(rows: Tensor, f: Tensor) -> Tensor:
    """(K, n · places, d): each output by itself."""
    count = f.shape[-1] if f.ndim > 1 else 1
    return rows.reshape(-1, count, rows.shape[-1]).transpose(0, 1)
