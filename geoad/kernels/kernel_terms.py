"""Rows of samples as sums of terms whose inner products are cheap: K = J Jᵀ without J.

A term belongs to some blocks. Its inner products with the term of m other samples, (n, K, m, K') for n samples and K seeds, are

=============  ========================================  ==================================================================
term           rows                                      inner products
=============  ========================================  ==================================================================
`Outer`        l ⊗ a                                     (l lᵀ)[nK, mK'] · (a aᵀ)[n, m]
`Positions`    Σ_t l_t ⊗ a_t                             Σ_ts (l_t l_sᵀ)[nK, mK'] (a_t a_sᵀ)[n, m]
`Weighted`     w ∘ (l ⊗ a)                               Σ_o (l_o l_oᵀ)[nK, mK'] (a w_o² aᵀ)[n, m]
`Explicit`     r                                         (r rᵀ)[nK, mK']
=============  ========================================  ==================================================================

(structured derivatives; Novak, Sohl-Dickstein & Schoenholz 2022). The tokens of an embedding are positions with one-hot inputs;
weights are what a metric that is diagonal in some bases of inputs and outputs brings in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

__all__ = ["Explicit", "Outer", "Positions", "Term", "Weighted", "add_equal_products", "add_products", "agreed"]

_ROOM = 1 << 25
"""Bytes of intermediate products that are worth having at once."""


@dataclass(frozen=True)
class Term:
    """A share of the rows of n samples and K seeds.

    Attributes:
        names: the blocks.
        left: what came back (n, K, ...).
    """

    names: tuple[str, ...]
    left: Tensor

    @property
    def numbers(self) -> int:
        """How many numbers are held."""
        return self.left.numel()

    def part(self, samples: slice) -> Self:
        """That of some samples."""
        return replace(self, left=self.left[samples])

    def scaled(self, factor: Tensor) -> Self:
        """The rows times a number."""
        return replace(self, left=self.left * factor)

    def split(self, places: int) -> Self:
        """Seeds (places, c) as c seeds of n · places samples."""
        return replace(self, left=self.left.unflatten(1, (places, -1)).flatten(0, 1))

    def merged(self) -> Self:
        """All seeds as one, so that inner products are summed over equal seeds."""
        raise NotImplementedError

    def seed(self, k: int) -> Self:
        """The rows of one seed."""
        return replace(self, left=self.left[:, k : k + 1])

    def explicit(self) -> Explicit:
        """The rows multiplied out."""
        raise NotImplementedError


@dataclass(frozen=True)
class Explicit(Term):
    """Rows (n, K, size)."""

    def merged(self) -> Explicit:
        return replace(self, left=self.left.flatten(1).unsqueeze(1))

    def explicit(self) -> Explicit:
        return self


@dataclass(frozen=True)
class Outer(Term):
    """left (n, K, o) ⊗ right (n, i)."""

    right: Tensor

    @property
    def numbers(self) -> int:
        return self.left.numel() + self.right.numel()

    def part(self, samples: slice) -> Outer:
        return replace(self, left=self.left[samples], right=self.right[samples])

    def split(self, places: int) -> Outer:
        return replace(super().split(places), right=self.right.repeat_interleave(places, 0))

    def merged(self) -> Outer:
        return replace(self, left=self.left.flatten(1).unsqueeze(1))

    def positions(self) -> Positions:
        """The same with an axis for the only position."""
        return Positions(self.names, self.left.unsqueeze(2), self.right.unsqueeze(1))

    def explicit(self) -> Explicit:
        rows = self.left.unsqueeze(-1) * self.right[:, None, None, :]
        return Explicit(self.names, rows.flatten(2))


@dataclass(frozen=True)
class Weighted(Term):
    """Σ_s weights (o, i) ∘ (left (n, K, s, o) ⊗ right (n, i)); with s > 1 the inner products are summed over equal s."""

    right: Tensor
    weights: Tensor

    @property
    def numbers(self) -> int:
        return self.left.numel() + self.right.numel()

    def part(self, samples: slice) -> Weighted:
        return replace(self, left=self.left[samples], right=self.right[samples])

    def split(self, places: int) -> Weighted:
        return replace(super().split(places), right=self.right.repeat_interleave(places, 0))

    def merged(self) -> Weighted:
        return replace(self, left=self.left.flatten(1, 2).unsqueeze(1))

    def explicit(self) -> Explicit:
        rows = (self.left.unsqueeze(-1) * self.right[:, None, None, None, :]).mul_(self.weights)
        return Explicit(self.names, rows.flatten(2))

    def prefers_explicit(self) -> bool:
        """Multiplying out costs less than a matrix of inner products for each output does."""
        k, s, inside = self.left.shape[1], self.left.shape[2], self.right.shape[-1]
        return k * k * s * inside <= inside + _SLOWER * (k + s) + k * k * s


@dataclass(frozen=True)
class Positions(Term):
    """Σ_t left (n, K, t, o) ⊗ right (n, t, i), or tokens right (n, t) out of `count`, negative where there is no gradient."""

    right: Tensor
    count: int = 0

    @property
    def numbers(self) -> int:
        return self.left.numel() + self.right.numel()

    def part(self, samples: slice) -> Positions:
        return replace(self, left=self.left[samples], right=self.right[samples])

    def split(self, places: int) -> Positions:
        return replace(super().split(places), right=self.right.repeat_interleave(places, 0))

    def merged(self) -> Positions:
        return replace(self, left=self.left.transpose(1, 2).flatten(2).unsqueeze(1))

    def explicit(self) -> Explicit:
        if self.count:
            return self.of_tokens(torch.arange(self.count, device=self.right.device))
        n, k, t, o = self.left.shape
        joined = self.left.mT.reshape(n, k * o, t) @ self.right
        return Explicit(self.names, joined.reshape(n, k, -1))

    def of_tokens(self, kept: Tensor) -> Explicit:
        """Rows for a sorted selection of the tokens, (n, K, kept · o)."""
        n, k, t, o = self.left.shape
        place = torch.searchsorted(kept, self.right.clamp_min(0).contiguous()).clamp_max(max(0, len(kept) - 1))
        hit = (self.right >= 0) & (kept[place] == self.right) if len(kept) else torch.zeros_like(self.right, dtype=torch.bool)
        table = self.left.new_zeros(n, k, len(kept), o)
        if len(kept):
            back = self.left * hit.to(self.left.dtype)[:, None, :, None]
            table.scatter_add_(2, place[:, None, :, None].expand(n, k, t, o), back)
        return Explicit(self.names, table.flatten(2))

    def squared_norms(self, other: Positions) -> Tensor:
        """The inner products with the rows of the same samples of another term, (n, K)."""
        mixed = _own_similarity(self, other).unsqueeze(1) @ other.left
        return (self.left * mixed).sum((-2, -1))

    def prefers_explicit(self, partners: int) -> bool:
        """Multiplying out costs less than pairs of positions do, against this many other samples."""
        _, k, t, o = self.left.shape
        inside = self.right.shape[-1]
        pairs = t * t * (inside + k * o) + t * k * k * o
        rows = k * k * o * inside + k * t * o * inside / max(1, partners)
        return rows <= _SLOWER * pairs


_SLOWER = 8
"""Pairs of positions are many small products and one copy: this much more time for each operation."""


def agreed(a: Term, b: Term) -> tuple[Term, Term]:
    """Both in one form."""
    if type(a) is type(b) and not (isinstance(a, Positions) and isinstance(b, Positions) and a.count != b.count):
        return a, b
    if isinstance(a, Outer) and isinstance(b, Positions) and not b.count:
        return a.positions(), b
    if isinstance(a, Positions) and isinstance(b, Outer) and not a.count:
        return a, b.positions()
    return a.explicit(), b.explicit()


# -- inner products ----------------------------------------------------------------------------------------------------------


def add_products(total: Tensor, a: Term, b: Term, fresh: bool) -> None:
    """Write the inner products of two terms of one form to `total` (n, K, m, K'), or add them to what is there.

    The last two axes of `total`, and the first two, are as good as one.
    """
    if isinstance(a, Explicit) and isinstance(b, Explicit):
        _multiply(_flat(total), a.left.flatten(0, 1), b.left.flatten(0, 1), fresh)
    elif isinstance(a, Outer) and isinstance(b, Outer):
        product = a.left.flatten(0, 1) @ b.left.flatten(0, 1).mT
        similarity = (a.right @ b.right.mT).repeat_interleave(total.shape[3], 1).unsqueeze(1)
        target, product = total.view(*total.shape[:2], -1), product.view(*total.shape[:2], -1)
        if fresh:
            torch.mul(product, similarity, out=target)
        else:
            target.addcmul_(product, similarity)
    elif isinstance(a, Positions) and isinstance(b, Positions):
        if fresh:
            total.zero_()
        add = _add_tokens if a.count and _few_tokens(a, b) else _add_pairs
        add(total, a, b)
    elif isinstance(a, Weighted) and isinstance(b, Weighted):
        if fresh:
            total.zero_()
        add_weighted = _add_weighted_sums if a.left.shape[1] == 1 else _add_weighted
        add_weighted(total, a, b)
    else:
        raise TypeError(f"inner products of {type(a).__name__} and {type(b).__name__}")


def add_equal_products(total: Tensor, a: Term, b: Term, fresh: bool) -> None:
    """The same for equal seeds alone, (K, n, m)."""
    if isinstance(a, Weighted) and isinstance(b, Weighted):
        _add_weighted_equal(total.zero_() if fresh else total, a, b)
        return
    if isinstance(a, Positions) or isinstance(b, Positions):
        for k, part in enumerate(total):
            add_products(part[:, None, :, None], a.seed(k), b.seed(k), fresh)
        return
    found = torch.bmm(a.left.transpose(0, 1), b.left.permute(1, 2, 0))
    if isinstance(a, Outer) and isinstance(b, Outer):
        found *= a.right @ b.right.mT
    if fresh:
        total.copy_(found)
    else:
        total += found


def _flat(total: Tensor) -> Tensor:
    """(n, K, m, K') -> (nK, mK'), a view."""
    n, k, m, other = total.shape
    return total.view(n * k, m * other)


def _multiply(target: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
    if fresh:
        torch.mm(left, right.mT, out=target)
    else:
        target.addmm_(left, right.mT)


def _few_tokens(a: Positions, b: Positions) -> bool:
    """Rows of the tokens of the one side cost less than pairs of positions do; how many differ is not looked at."""
    _, k, s, o = a.left.shape
    t = b.left.shape[2]
    return k * k * o * min(a.count, a.right.numel()) <= _SLOWER * (s * t * k * o + min(s, t) * k * k * o)


def _add_tokens(total: Tensor, a: Positions, b: Positions) -> None:
    """By rows of the tokens that `a` has; what is there twice stays empty."""
    few = a.right.numel() < a.count
    kept = a.right.flatten().sort().values if few else torch.arange(a.count, device=a.right.device)
    left = a.of_tokens(kept).left.flatten(0, 1)
    for columns in _portions(len(b.left), b.left.shape[1] * left.shape[1], b.left):
        right = b.part(columns).of_tokens(kept).left
        found = left @ right.flatten(0, 1).mT
        total[:, :, columns] += found.view(*a.left.shape[:2], *right.shape[:2])


def _similarity(a: Positions, b: Positions) -> Tensor:
    """(m, n, t, s): inner products of the inputs."""
    if a.count:
        equal = a.right[None, :, :, None] == b.right[:, None, None, :]
        return (equal & (a.right >= 0)[None, :, :, None]).to(a.left.dtype)
    n, m = len(a.right), len(b.right)
    products = a.right.flatten(0, 1) @ b.right.flatten(0, 1).mT
    return products.reshape(n, a.right.shape[1], m, b.right.shape[1]).permute(2, 0, 1, 3)


def _own_similarity(a: Positions, b: Positions) -> Tensor:
    """(n, t, s): inner products of the inputs of the same samples."""
    if not a.count:
        return a.right @ b.right.mT
    equal = (a.right.unsqueeze(2) == b.right.unsqueeze(1)) & (a.right >= 0).unsqueeze(2)
    return equal.to(a.left.dtype)


def _add_pairs(total: Tensor, a: Positions, b: Positions) -> None:
    """Σ_t l_nt (Σ_s A[nt, ms] l_ms): two products of matrices for each pair of chunks."""
    _, k, t, o = a.left.shape
    m, other, s, _ = b.left.shape
    for columns in _portions(m, other * o * (s + t) + t * s, a.left):
        right = b.part(columns)
        held = len(right.left)
        bent = right.left.permute(0, 2, 3, 1).reshape(held, s, o * other)  # (m, s, o K')
        for rows in _portions(len(a.left), held * t * (2 * o * other + s), a.left):
            left = a.part(rows)
            count = len(left.left)
            similarity = _similarity(left, right).reshape(held, count * t, s)
            mixed = torch.bmm(similarity, bent).reshape(held, count, t, o, other)
            mixed = mixed.permute(1, 2, 3, 0, 4).reshape(count, t * o, held * other)
            found = torch.bmm(left.left.reshape(count, k, t * o), mixed)
            total[rows, :, columns] += found.reshape(count, k, held, other)


def _similarities(a: Weighted, b: Weighted) -> Tensor:
    """(n, o, m): inner products of the inputs, for each output with its weights."""
    bent = a.right.unsqueeze(1) * a.weights.square()
    return (bent.flatten(0, 1) @ b.right.mT).view(*bent.shape[:2], len(b.right))


def _add_weighted(total: Tensor, a: Weighted, b: Weighted) -> None:
    """Σ_o l_no (S_o[n, m] l_mo): a product of matrices for each sample."""
    n, _, _, o = a.left.shape
    m, other, inside = len(b.left), b.left.shape[1], a.right.shape[-1]
    right = b.left[:, :, 0].permute(2, 0, 1).contiguous()  # (o, m, K')
    for rows in _portions(n, o * (inside + m + m * other), a.left):
        left = a.part(rows)
        mixed = _similarities(left, b).unsqueeze(-1) * right
        found = torch.bmm(left.left[:, :, 0], mixed.flatten(2))
        total[rows] += found.view(*found.shape[:2], m, other)


def _add_weighted_sums(total: Tensor, a: Weighted, b: Weighted) -> None:
    """Σ_o S_o[n, m] (l_o l_oᵀ)[n, m], the seeds summed already."""
    o, inside = a.left.shape[-1], a.right.shape[-1]
    right = b.left[:, 0].permute(2, 1, 0)  # (o, s, m)
    for rows in _portions(len(a.left), o * (inside + 2 * len(b.left)), a.left):
        left = a.part(rows)
        found = torch.bmm(left.left[:, 0].permute(2, 0, 1), right)
        total[rows, 0, :, 0] += found.mul_(_similarities(left, b).transpose(0, 1)).sum(0)


def _add_weighted_equal(total: Tensor, a: Weighted, b: Weighted) -> None:
    """The same for each of the seeds by itself, (K, n, m)."""
    o, inside = a.left.shape[-1], a.right.shape[-1]
    for rows in _portions(len(a.left), o * (inside + 2 * len(b.left)), a.left):
        left = a.part(rows)
        similarity = _similarities(left, b)
        for k, part in enumerate(total):
            mixed = similarity * b.left[:, k, 0].mT
            part[rows] += torch.bmm(left.left[:, k], mixed).squeeze(1)


def _portions(count: int, numbers: int, like: Tensor) -> Iterator[slice]:
    step = max(1, _ROOM // max(1, numbers * like.element_size()))
    step = math.ceil(count / math.ceil(count / step)) if count else 1
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
