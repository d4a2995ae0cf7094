"""Embedding bags by their formula: torch 2.13 has neither forward-mode nor second derivatives of the fused one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from geoad.kernels.spelled import FormulaMode

__all__ = ["SpelledOutBags", "SpelledOutPadding"]


class SpelledOutBags(FormulaMode):
    """``functional.embedding_bag`` by ``embedding`` and a sum, a mean or a maximum.

    >>> import torch
    >>> from geoad.kernels.bags import SpelledOutBags
    >>> tokens, weight = torch.tensor([[0, 2], [1, 1]]), torch.arange(6.0).reshape(3, 2)
    >>> with SpelledOutBags():
    ...     torch.nn.functional.embedding_bag(tokens, weight)
    tensor([[2., 3.],
            [2., 3.]])
    """


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """As torch's, but that gradients are exact: not scaled by frequency, and not sparse."""
    if input.ndim == 2:
        bags = torch.arange(len(input), device=input.device).repeat_interleave(input.shape[1])
        count = len(input)
    else:
        assert offsets is not None
        count = len(offsets) - 1 if include_last_offset else len(offsets)
        places = torch.arange(len(input), device=input.device)
        bags = torch.searchsorted(offsets[:count].contiguous(), places.to(offsets.dtype), right=True) - 1
    tokens = input.flatten()
    rows = functional.embedding(tokens, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.flatten()[:, None]
    kept = torch.ones_like(tokens, dtype=torch.bool)
    if padding_idx is not None:
        kept = tokens != padding_idx % len(weight)
    if mode == "max":
        lowest = torch.where(kept[:, None], rows, -torch.inf)
        index = bags[:, None].expand_as(rows)
        found = rows.new_full((count, rows.shape[1]), -torch.inf).scatter_reduce(0, index, lowest, "amax")
        return torch.where(found.isfinite(), found, 0.0)  # an empty bag is zero
    share = kept.to(rows.dtype)[:, None]
    total = rows.new_zeros(count, rows.shape[1]).index_add(0, bags, rows * share)
    if mode == "sum":
        return total
    return total / rows.new_zeros(count, 1).index_add(0, bags, share).clamp_min(1)


class SpelledOutPadding(FormulaMode):
    """``functional.embedding`` with no derivative at `padding_idx`.

    In a derivative of ``vmap`` over tables and tokens, torch 2.13 has that for the first table only. In forward mode it has it
    nowhere: there J v would belong to another function than w J.

    >>> import torch
    >>> from geoad.kernels.bags import SpelledOutPadding
    >>> tokens, tables = torch.tensor([[0, 1], [1, 2]]), torch.zeros(2, 3, 1)
    >>> def f(table, tokens):
    ...     return torch.nn.functional.embedding(tokens, table, padding_idx=1).sum()
    >>> with SpelledOutPadding():
    ...     torch.func.grad(lambda w: torch.func.vmap(f)(w, tokens).sum())(tables).squeeze(-1)
    tensor([[1., 0., 0.],
            [0., 0., 1.]])
    """


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    if padding_idx is None or max_norm is not None:
        return None
    rows = functional.embedding(input, weight, None, None, norm_type, scale_grad_by_freq, sparse)
    return torch.where((input == padding_idx % len(weight)).unsqueeze(-1), rows.detach(), rows)


SpelledOutPadding.formulas = {functional.embedding: _embedding}
SpelledOutBags.formulas = {functional.embedding_bag: _embedding_bag}
