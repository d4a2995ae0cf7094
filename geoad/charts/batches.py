"""Batches of points, as plain blocks with axes in front."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from geoad.charts.chart import Chart
from geoad.params import Blocks, Layout

__all__ = ["blend", "first_violation", "over_batch", "singles"]


def over_batch(fn: Any, batch: int, *blocks: Blocks) -> Blocks:
    """Apply `fn`, written for single points, under `batch` leading axes."""
    for _ in range(batch):
        fn = torch.func.vmap(fn)
    return cast(Blocks, fn(*blocks))


def singles(blocks: Blocks, chart: Chart) -> list[Blocks]:
    """The single points of a batch."""
    batch = chart.layout.batch_shape(blocks)
    if not batch:
        return [blocks]
    flat = {name: block.reshape(-1, *chart.layout[name]) for name, block in blocks.items()}
    return [{name: block[i] for name, block in flat.items()} for i in range(batch.numel())]


def first_violation(check: Callable[[Blocks], str | None], blocks: Blocks, chart: Chart) -> str | None:
    """The words of `check` for the first point of a batch that it does not let pass, with their number; None if all pass."""
    found = [(i, words) for i, each in enumerate(singles(blocks, chart)) if (words := check(each)) is not None]
    if not found:
        return None
    i, words = found[0]
    count = chart.layout.batch_shape(blocks).numel()
    return words if count == 1 else f"{len(found)} of {count} points, number {i} for instance: {words}"


def blend(t: float | Tensor, layout: Layout, a: Blocks, fn: Callable[[Tensor, Tensor, Tensor], Tensor], b: Blocks) -> Blocks:
    """``fn(t, block of a, block of b)`` for every block; the axes of `t` are batch axes, never coordinates."""
    blocks: Blocks = {}
    for name, block in a.items():
        times = torch.as_tensor(t, dtype=block.dtype, device=block.device)
        times = times.reshape(*times.shape, *(1,) * len(layout[name])) if times.ndim else times
        blocks[name] = fn(times, block, b[name])
    return blocks
