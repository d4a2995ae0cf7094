"""Inner products of the rows of all samples, a pair of chunks at a time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from geoad.curvature.collect import require_memory
from geoad.kernels import kernel_gram
from geoad.kernels.kernel_gram import DifferentStructure, Features, Group, features, mirror
from geoad.kernels.layered import Rows

__all__ = ["gram"]


def gram(chunks: Sequence[Rows], groups: Sequence[Group]) -> Tensor:
    """R G⁻¹ Rᵀ (N·K, N·K) for the rows R of N samples with K seeds, K fastest, symmetric to the last bit.

    Made of what went in and what came back of every layer; rows are multiplied out only where the metric or the network says
    so. The upper triangle of chunks is computed.

    Args:
        chunks: the rows.
        groups: the blocks with the inverses of their metrics.
    """
    try:
        return _gram(chunks, groups, structured=True)
    except DifferentStructure:  # chunks of inputs of different forms
        return _gram(chunks, groups, structured=False)


def _gram(chunks: Sequence[Rows], groups: Sequence[Group], structured: bool) -> Tensor:
    count = sum(rows.samples for rows in chunks)
    trivial = all(group.solve is None for group in groups)

    def made(rows: Rows, dual: bool) -> Features:
        return features(rows, groups, dual=dual, partners=count, structured=structured)

    plain = [made(rows, False) for rows in chunks]
    duals = plain if trivial else [made(rows, True) for rows in chunks]
    like, size = plain[0].terms[0].left, count * chunks[0].seeds
    require_memory(size**2 * like.element_size(), f"the inner products of {size} rows", like)
    total = like.new_empty(size, size)
    starts = [0]
    for each in plain:
        starts.append(starts[-1] + each.samples * each.seeds)
    for i, a in enumerate(plain):
        for j in range(i, len(duals)):
            b = duals[j]
            block = like.new_empty(a.samples, a.seeds, b.samples, b.seeds)
            kernel_gram.gram(block, a, b, upper=i == j)
            total[starts[i] : starts[i + 1], starts[j] : starts[j + 1]] = block.flatten(2).flatten(0, 1)
    mirror(total)
    return total
