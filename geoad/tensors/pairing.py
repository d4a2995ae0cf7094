"""Full contractions to scalars: ω(v) and B(u, v)."""

from __future__ import annotations

import torch
from torch import Tensor

from geoad.errors import VarianceError
from geoad.tensors.base import HANDLERS, describe, require_same_place
from geoad.tensors.rank1 import Rank1, align
from geoad.tensors.rank2 import Rank2

__all__ = ["evaluate", "pair"]


def pair(a: Rank1, b: Rank1) -> Tensor:
    """a_i b^i for two objects of opposite variance; one scalar for each element of the batch."""
    if a.at is not b.at:
        require_same_place(a, b, "pair")
    layout = a.chart.layout
    if layout.row is not None:
        x, y = a.blocks[layout.row], b.blocks[layout.row]
        if x.ndim == 1 and y.ndim == 1 and x.dtype == y.dtype:
            return torch.dot(x, y)
    left, right = align(a, b)
    total: Tensor | None = None
    for name, shape in layout.items():
        product = left[name] * right[name]
        part = product.sum(tuple(range(-len(shape), 0))) if len(shape) else product
        total = part if total is None else total + part
    assert total is not None
    return total


def evaluate(form: Rank2, u: Rank1, v: Rank1) -> Tensor:
    """B(u, v)."""
    wanted = not form.ups[0]
    for argument in (u, v):
        if not isinstance(argument, Rank1) or argument.up != wanted:  # pyright: ignore[reportUnnecessaryIsInstance]
            kind = "Vectors" if wanted else "Covectors"
            raise VarianceError(
                f"a {describe(form)} takes two {kind}, found {describe(argument)}. Its indices contract with the opposite "
                "variance "
                "only; convert the argument with metric.sharp(covector) or metric.flat(vector)."
            )
    return pair(form.mv(v), u)


HANDLERS["pair"] = pair
