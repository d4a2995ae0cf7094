"""Σ_n J_nᵀ A_n J_n as a dense matrix: classes are contracted before samples are.

For two affine layers, J = left ⊗ right: with S_n[o, p] = Σ_c (A left)[n, c, o] left'[n, c, p] the block is
Σ_n S_n ⊗ (right_n right'_nᵀ), one product of matrices (o p × N)(N × i j). That costs 2·N·d² operations; to form J and multiply
costs C times as many, and N·C·d numbers of memory. Where both layers are the same, both factors are symmetric, and a quarter of
that is left.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from geoad.kernels.layered import BlockJacobian, Factored
from geoad.params import Layout

__all__ = ["GramSum", "memory_of_a_sample"]

_Sizes = tuple[int, ...]
"""(o, p, i, j) of a product (o p, i j); (o, i) of one that is packed, (o ≤ p, i ≤ j); () where nothing is mixed up."""


def memory_of_a_sample(jacobians: dict[str, BlockJacobian]) -> int:
    """How many numbers a sample takes: its Jacobian, and the largest pair of factors that `GramSum` makes of it."""
    kept = largest = 0
    for a in jacobians.values():
        rows = a.left[0].numel() + a.right[0].numel() if isinstance(a, Factored) else a[0].numel()
        kept += 2 * rows
        for b in jacobians.values():
            if isinstance(a, Factored) and isinstance(b, Factored):
                largest = max(largest, a.left.shape[-1] * b.left.shape[-1] + a.right.shape[-1] * b.right.shape[-1])
            elif isinstance(a, Factored) and isinstance(b, Tensor):
                largest = max(largest, a.left.shape[-1] * b.shape[-1])
    return kept + largest


class GramSum:
    """Σ Jᵀ A J over batches, kept as one sum for each pair of blocks; `matrix` puts them together."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._pairs: dict[tuple[str, str], tuple[Tensor, _Sizes]] = {}

    def add(self, jacobians: dict[str, BlockJacobian], curved: Callable[[Tensor], Tensor]) -> None:
        """Add Σ_n Jᵀ A J of some samples; `curved` applies the symmetric A to (n, C, k)."""
        names = list(self.layout)
        for i, row in enumerate(names):
            a = jacobians[row]
            bent = curved(a.left if isinstance(a, Factored) else a)
            for column in names[i:]:
                left, right, sizes = _pair(bent, a, jacobians[column])
                known = self._pairs.get((row, column))
                if known is None:
                    self._pairs[row, column] = (left.mT @ right, sizes)
                else:
                    known[0].addmm_(left.mT, right)

    def matrix(self) -> Tensor:
        """The (d, d) matrix in the order of the layout; the sums are used up."""
        places = self.layout.offsets()
        total: Tensor | None = None
        while self._pairs:
            (row, column), (value, sizes) = self._pairs.popitem()
            if total is None:
                total = value.new_empty(self.layout.dim, self.layout.dim)
            block = total[places[row], places[column]]
            _unmix(value, sizes, block)
            del value
            if row != column:
                total[places[column], places[row]].copy_(block.mT)
            elif len(sizes) != 2:  # packed ones are symmetric as they are
                block.add_(block.mT.clone()).mul_(0.5)
        assert total is not None
        return total


def _pair(bent: Tensor, a: BlockJacobian, b: BlockJacobian) -> tuple[Tensor, Tensor, _Sizes]:
    """Matrices (n, r) and (n, s) whose product over n is the block of a and b, and the sizes to unmix it by."""
    if isinstance(a, Factored) and isinstance(b, Factored):
        classes = torch.einsum("nco,ncp->nop", bent, b.left)
        if a is b:
            above, right = _packed(classes), a.right
            first, second = _above(right.shape[-1], right.device)
            return above, right.index_select(1, first) * right.index_select(1, second), (classes.shape[-1], right.shape[-1])
        samples = a.right.unsqueeze(-1) * b.right.unsqueeze(-2)
        sizes = (bent.shape[-1], b.left.shape[-1], a.right.shape[-1], b.right.shape[-1])
        return classes.flatten(1), samples.flatten(1), sizes
    if isinstance(a, Factored):
        assert isinstance(b, Tensor)
        mixed = torch.einsum("nco,ncj->noj", bent, b)
        return mixed.flatten(1), a.right, (bent.shape[-1], b.shape[-1], a.right.shape[-1], 1)
    if isinstance(b, Factored):
        mixed = torch.einsum("nci,nco->nio", bent, b.left)
        return mixed.flatten(1), b.right, (bent.shape[-1], b.left.shape[-1], 1, b.right.shape[-1])
    return bent.flatten(0, 1), b.flatten(0, 1), ()


def _above(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries on and above the diagonal."""
    rows, columns = torch.triu_indices(size, size, device=device)
    return rows, columns


def _packed(symmetric: Tensor) -> Tensor:
    size = symmetric.shape[-1]
    rows, columns = _above(size, symmetric.device)
    return symmetric.flatten(1).index_select(1, rows * size + columns)


def _places(size: int, device: torch.device) -> Tensor:
    """Where each entry of a symmetric (size, size) matrix lies among the packed ones."""
    rows, columns = _above(size, device)
    places = torch.empty(size, size, dtype=torch.long, device=device)
    places[rows, columns] = places[columns, rows] = torch.arange(len(rows), device=device)
    return places


def _unmix(value: Tensor, sizes: _Sizes, block: Tensor) -> None:
    """Write the product into its block (o i, p j), without another copy of the whole."""
    match sizes:
        case (o, i):
            outer, inner = _places(o, value.device), _places(i, value.device).flatten()
            for row, rows in enumerate(outer):
                part = value.index_select(0, rows).index_select(1, inner).reshape(o, i, i)
                block[row * i : (row + 1) * i].unflatten(1, (o, i)).copy_(part.transpose(0, 1))
        case (o, p, i, j):
            block.unflatten(0, (o, i)).unflatten(2, (p, j)).copy_(value.reshape(o, p, i, j).permute(0, 2, 1, 3))
        case _:
            block.copy_(value)
