"""Square roots of the output-space matrix A as seeds: tensors s (K, n, ..., c) with A(f) = Σ_k s_k s_kᵀ for every sample."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.kernels.conditions import holds
from geoad.params import is_wrapped

__all__ = ["diagonal_root", "numbers_of_a_sample", "positions", "signed_root", "spread", "spread_signs", "wide"]


def wide(outputs: Tensor) -> Tensor:
    """`outputs` in at least float32: half precision has no linear algebra and too few digits for a root."""
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs


def numbers_of_a_sample(outputs_shape: Sequence[int]) -> int:
    """How many numbers one sample of outputs (n, ..., c) has."""
    return prod(outputs_shape[1:])


def positions(outputs_shape: Sequence[int], axis: int = -1) -> int:
    """How many factors of the likelihood one sample has: all axes but the first and the one of the parameters."""
    kept = list(outputs_shape)
    del kept[axis]
    return prod(kept[1:])


def spread(local: Tensor) -> Tensor:
    """Seeds of whole samples from the columns of every position: (m, n, ..., c) -> (P m, n, ..., c).

    The P positions (the axes between n and c) are independent, so A is block diagonal over them. Seed p m + k is column k of
    position p there, and zero elsewhere.
    """
    m, n, *between, c = local.shape
    count = prod(between)
    if count == 1:
        return local
    # zeros are put in, not multiplied: an infinite entry must not make its neighbours nan
    blocks = torch.diag_embed(local.reshape(m, n, count, c).movedim(2, -1))  # (m, n, c, P, P)
    return blocks.permute(3, 0, 1, 4, 2).reshape(count * m, n, *between, c)


def spread_signs(signs: Tensor) -> Tensor:
    """The signs of the seeds that `spread` gives: (m, n, ...) -> (P m, n)."""
    m, n, *between = signs.shape
    count = prod(between)
    return signs.reshape(m, n, count).permute(2, 0, 1).reshape(count * m, n)


def diagonal_root(scale: Tensor) -> Tensor:
    """The seeds of A = diag(scale²), one for every output: (n, ..., c) -> (C, n, ..., c) with C numbers in a sample."""
    n, size = scale.shape[0], numbers_of_a_sample(scale.shape)
    return torch.diag_embed(scale.reshape(n, size)).movedim(1, 0).reshape(size, *scale.shape)


def signed_root(matrix: Tensor, what: str, indefinite: bool = False) -> tuple[Tensor, Tensor]:
    """The columns of symmetric matrices, (..., c, c) -> (c, ..., c), and their signs (c, ...), A = Σ_k σ_k s_k s_kᵀ.

    s_k = |λ_k|^½ v_k by the eigendecomposition. Differentiable where the eigenvalues are simple.

    Raises:
        GeometryError: an eigenvalue is negative beyond rounding and `indefinite` is False.
    """
    values, vectors = torch.linalg.eigh(matrix)
    if not indefinite:
        _require_semidefinite(values, what)
        values = values.clamp(min=0)
    signs = torch.where(values < 0, -1.0, 1.0).to(values.dtype)
    columns = vectors * values.abs().sqrt().unsqueeze(-2)
    return columns.movedim(-1, 0), signs.movedim(-1, 0)


def _require_semidefinite(values: Tensor, what: str) -> None:
    if values.numel() == 0 or is_wrapped({"values": values}):
        return
    size = values.shape[-1]
    largest = values.abs().amax(-1)
    rounding = 16 * size * torch.finfo(values.dtype).eps * largest
    bad = values.amin(-1) < -rounding
    if not holds(~bad.any()):
        raise GeometryError(
            f"{what} is not positive semidefinite: its smallest eigenvalue is {float(values.min()):.3g}, its largest "
            f"{float(values.max()):.3g} ({int(bad.sum())} of {bad.numel()} matrices are indefinite). It has no real square "
            "root, and the curvature built from it would be no metric. Use a convex loss or the Fisher of a likelihood, the "
            "matrix-free product (which needs no root), or OutputMatrix(fn, positive=False) to keep the signs."
        )
