"""Square roots of the output-space matrix A as seeds: tensors s (K, n, ..., c) with A(f) = Σ_k s_k s_kᵀ for every sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.kernels.conditions import holds
from geoad.operators.spectra import symmetric_eigh
from geoad.params import is_wrapped

__all__ = ["Columns", "Portion", "Seeds", "numbers_of_a_sample", "of_samples", "positions", "signed_root", "wide"]


def wide(outputs: Tensor) -> Tensor:
    """`outputs` in at least float32: half precision has no linear algebra and too few digits for a root."""
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs


def numbers_of_a_sample(outputs_shape: Sequence[int]) -> int:
    """How many numbers one sample of outputs (n, ..., c) has."""
    return prod(outputs_shape[1:])


def of_samples(terms: Tensor) -> Tensor:
    """Numbers (n, ...) added up for each sample, (n,)."""
    return terms.unsqueeze(-1).flatten(1).sum(1)


def positions(outputs_shape: Sequence[int], axis: int = -1) -> int:
    """How many factors of the likelihood one sample has: all axes but the first and the one of the parameters."""
    kept = list(outputs_shape)
    del kept[axis]
    return prod(kept[1:])


Portion = tuple[Tensor, Tensor | None]
"""(s, signs): seeds s (k, n, ..., c), and their signs (k, n) where not all are +1."""


class Columns(Protocol):
    """Columns of a root that are made when they are asked for: with many classes all of them are too many."""

    @property
    def shape(self) -> Sequence[int]:
        """(m, n, P, c), as of the tensor that they stand for."""
        ...

    @property
    def device(self) -> torch.device:
        """Where they are made."""
        ...

    def at(self, column: Tensor, position: Tensor) -> Tensor:
        """Some of them, (k, n, c): the one with this number at this position, for k pairs."""
        ...

    def scaled(self, factor: float | Tensor) -> Columns:
        """Times a number, or one for each sample, (n, 1, 1)."""
        ...


@dataclass(frozen=True)
class Seeds:
    """The seeds of A = Σ_k σ_k s_k s_kᵀ for every sample, made when they are asked for.

    A sample has P independent positions, so A is block diagonal over them: seed p m + k is column k of position p there, and
    zero elsewhere. All seeds are P² m c numbers a sample, what they are made of is P m c.

    Attributes:
        columns: (m, n, P, c), m columns for every position; a tensor, or what makes them.
        shape: the axes of a sample, with the one that the columns run along at the end.
        axis: where that axis is in the outputs (n, ...).
        column_signs: σ as (m, n, P), or None where all are +1.

    >>> import torch
    >>> seeds = Seeds.at_positions(torch.ones(1, 5, 2, 3))
    >>> len(seeds), seeds.part(slice(1, 2))[0][0, 0]
    (2, tensor([[0., 0., 0.],
            [1., 1., 1.]]))
    """

    columns: Tensor | Columns
    shape: tuple[int, ...]
    axis: int = -1
    column_signs: Tensor | None = None

    @classmethod
    def at_positions(cls, local: Tensor, signs: Tensor | None = None, axis: int = -1) -> Seeds:
        """From the columns of all positions, (m, n, ..., c), and their signs (m, n, ...)."""
        m, n, *shape = local.shape
        count = prod(shape[:-1])
        signs = None if signs is None else signs.reshape(m, n, count)
        return cls(local.reshape(m, n, count, shape[-1]), tuple(shape), axis, signs)

    @classmethod
    def of_diagonal(cls, scale: Tensor) -> Seeds:
        """Those of A = diag(scale²), one for every output: each is a position of its own."""
        n, *shape = scale.shape
        return cls(scale.reshape(1, n, prod(shape), 1), tuple(shape))

    @classmethod
    def given(cls, s: Tensor, signs: Tensor | None = None) -> Seeds:
        """From all seeds (K, n, ..., c) and their signs (K, n)."""
        flat = s.reshape(*s.shape[:2], 1, prod(s.shape[2:]))
        return cls(flat, tuple(s.shape[2:]), column_signs=None if signs is None else signs.unsqueeze(-1))

    def __len__(self) -> int:
        return self.columns.shape[0] * self.columns.shape[2]

    @property
    def numbers_of_a_sample(self) -> int:
        """How many numbers are held for each sample: all columns, if they are a tensor."""
        m, _, count, c = self.columns.shape
        return m * count * c if isinstance(self.columns, Tensor) else 4 * count * c

    def scaled(self, factor: float | Tensor) -> Seeds:
        """Those of factor² A; the factor may differ between samples, (n, 1, 1)."""
        columns = self.columns
        return replace(self, columns=factor * columns if isinstance(columns, Tensor) else columns.scaled(factor))

    def all(self) -> Portion:
        """All of them."""
        return self.part(slice(None))

    def part(self, which: slice) -> Portion:
        """Some of them, with their signs."""
        m, n, count, c = self.columns.shape
        index = torch.arange(m * count, device=self.columns.device)[which]
        if count == 1:
            s = self.columns[which] if isinstance(self.columns, Tensor) else self.columns.at(index, torch.zeros_like(index))
        else:
            values = _at(self.columns, index % m, index // m)
            # zeros are put in, not multiplied: an infinite entry must not make its neighbours nan
            s = values.new_zeros(len(index), count, n, c)
            s = s.index_put_((torch.arange(len(index), device=s.device), index // m), values).transpose(1, 2)
        # the axis counts from the front of the outputs or from their end; the seeds have one axis more in front
        s = s.reshape(len(index), n, *self.shape).movedim(-1, self.axis + 1 if self.axis >= 0 else self.axis)
        return s, None if self.column_signs is None else self.column_signs.permute(0, 2, 1)[index % m, index // m]


def _at(columns: Tensor | Columns, column: Tensor, position: Tensor) -> Tensor:
    return columns.permute(0, 2, 1, 3)[column, position] if isinstance(columns, Tensor) else columns.at(column, position)


def signed_root(matrix: Tensor, what: str, indefinite: bool = False) -> tuple[Tensor, Tensor]:
    """The columns of symmetric matrices, (..., c, c) -> (c, ..., c), and their signs (c, ...), A = Σ_k σ_k s_k s_kᵀ.

    s_k = |λ_k|^½ v_k by the eigendecomposition. Differentiable where the eigenvalues are simple.

    Raises:
        GeometryError: an eigenvalue is negative beyond rounding and `indefinite` is False.
    """
    values, vectors = (symmetric_eigh if matrix.shape[-1] > _SAFE else torch.linalg.eigh)(matrix)
    if not indefinite:
        _require_semidefinite(values, what)
        values = values.clamp(min=0)
    signs = torch.where(values < 0, -1.0, 1.0).to(values.dtype)
    columns = vectors * values.abs().sqrt().unsqueeze(-2)
    return columns.movedim(-1, 0), signs.movedim(-1, 0)


_SAFE = 128
"""Small matrices are decomposed without a look at the result, for which a device would be waited for in every batch."""


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
