"""One-line representations: type, chart, point, size, dtype, device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["blocks_summary", "value_summary"]


def value_summary(tensor: Tensor) -> str:
    """The value of a scalar, or the shape of anything larger or hidden behind a transform."""
    hidden = torch.compiler.is_compiling() or bool(
        torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore
    )
    if tensor.numel() == 1 and not hidden and tensor.device.type != "meta":
        return f"{tensor.item():.6g}"
    return f"shape {tuple(tensor.shape)}"


def blocks_summary(blocks: Mapping[str, Tensor], dim: int, batch: tuple[int, ...] = ()) -> str:
    """Size, dtype and device of a dict of blocks."""
    tensor = next(iter(blocks.values()))
    dtype = str(tensor.dtype).removeprefix("torch.")
    batched = f", batch={tuple(batch)}" if batch else ""
    return f"dim={dim}{batched}, {dtype}, {tensor.device}"
