"""W = U V: a weight matrix as a product of two factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from geoad.errors import ChartDomainError, GeometryError
from geoad.maps.smooth import SmoothMap
from geoad.maps.submersion import Submersion, TotalMetric
from geoad.params import Layout, is_wrapped

__all__ = [
    "Factorization",
    "FullFactorization",
    "balanced_factors",
    "matrix_sizes",
    "require_rank",
    "singular_values",
    "spectral_slack",
]


def require_rank(rank: Any, who: str) -> int:
    """`rank` if it is a positive integer."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise GeometryError(
            f"{who} needs a rank of at least 1, found {rank!r}. It is the number of columns of the first factor; pass a "
            f"positive integer, {who}(2)."
        )
    return rank


def matrix_sizes(shape: torch.Size, who: str) -> tuple[int, int]:
    """The sizes (m, n) of a block as a matrix: its first axis against the rest."""
    if len(shape) < 2:
        raise GeometryError(
            f"{who} was bound to a block of shape {tuple(shape)}, but only blocks with two or more axes are matrices. Choose "
            f"the blocks by name pattern: {{'*.weight': maps.{who}(...)}}."
        )
    return shape[0], shape[1:].numel()


def _single(w: Tensor) -> Tensor:
    """`w` in at least single precision: there is no linear algebra below."""
    return w.float() if w.dtype in (torch.float16, torch.bfloat16) else w


def singular_values(w: Tensor) -> Tensor:
    """The singular values, descending."""
    return torch.linalg.svdvals(_single(w))


def spectral_slack(w: Tensor) -> Tensor:
    """How large a singular value of a matrix may be by rounding alone, if its entries are as large as those of `w`."""
    return max(w.shape) * torch.finfo(w.dtype).eps * _single(w).norm()


def balanced_factors(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (m × k) and V (k × n) with equal Gram matrices, UᵀU = VVᵀ, whose product is the best approximation of W of rank k."""
    left, spectrum, right = torch.linalg.svd(_single(w), full_matrices=False)
    kept = min(rank, spectrum.shape[0])
    root = spectrum[:kept].sqrt()
    missing = rank - kept
    u = torch.nn.functional.pad(left[:, :kept] * root, (0, missing))
    v = torch.nn.functional.pad(root[:, None] * right[:kept], (0, 0, 0, missing))
    return u.to(w.dtype), v.to(w.dtype)


class Factorization(SmoothMap):
    r"""W = U V for every matched block of shape (m, n), with U (m × k) and V (k × n), k the rank.

    Blocks with more axes, like the weights of a convolution, are matrices of their first axis against the rest. The blocks
    of ψ are ``<name>_u`` and ``<name>_v``. What the map is depends on the block to which it is bound:

    * k ≥ min(m, n): a `Submersion`, on the open set where U has rank m or V has rank n. Every W has a smooth section: with
      k ≥ n, U = W and V = I, else U = I and V = W (padded by zeros). With A = UUᵀ and B = VᵀV the horizontal
      lift of Z is :math:`\dot U = X V^\top,\ \dot V = U^\top X`, where X solves :math:`X B + A X = Z`.
    * k < min(m, n): a `SmoothMap`, since only matrices of rank ≤ k are products: vectors go from (U, V) to W,
      differentials and forms from W to (U, V). The section of a W of rank ≤ k has balanced factors, UᵀU = VVᵀ.

    In both cases :math:`J(\dot U, \dot V) = \dot U V + U \dot V` and :math:`J^\top Z = (Z V^\top, U^\top Z)`.

    Args:
        rank: k, the number of columns of U.
        metric: the metric on (U, V) that says which directions are horizontal where the rank is full, see `Submersion`;
            without lifts, below full rank, it has no meaning.

    Raises:
        GeometryError: the block has fewer than two axes, or the rank is not a positive integer.
        ChartDomainError: W has a rank above k, or the factors are outside of the domain.

    >>> import torch, geoad
    >>> chart = geoad.Chart({"w": (2, 3)}, name="w")
    >>> full = chart.reparametrize(geoad.maps.Factorization(2), name="uv").target
    >>> full, full.layout
    (Chart('uv', dim=10, from 'w'), Layout(w_u: (2, 2), w_v: (2, 3)))
    >>> chart.reparametrize(geoad.maps.Factorization(1)).map.law
    'smooth'

    Source: the lift is the solution of least norm of a linear matrix equation (Sylvester).
    """

    def __init__(self, rank: int, *, metric: TotalMetric = None) -> None:
        super().__init__()
        self.rank = require_rank(rank, "Factorization")
        self.metric = metric

    def extra_repr(self) -> str:
        return f"rank={self.rank}"

    def _get_name(self) -> str:
        return "Factorization"

    def bind(self, layout: Layout) -> Any:
        if not isinstance(self, Submersion) and self.layout is None and len(layout) == 1:
            sizes = matrix_sizes(layout[layout.names[0]], "Factorization")
            if self.rank >= min(sizes):
                return FullFactorization(self.rank, metric=self.metric).bind(layout)
        return super().bind(layout)

    def part_shapes(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        self._shape, (m, n) = shape, matrix_sizes(shape, "Factorization")
        self._sizes = m, n
        return {"u": (m, self.rank), "v": (self.rank, n)}

    def matrix(self, w: Tensor) -> Tensor:
        """A block, or a velocity of it, as a matrix (m × n)."""
        return w.reshape(self._sizes)

    # -- the map -------------------------------------------------------------------------------------------------------

    def inverse_value(self, y: dict[str, Tensor]) -> Tensor:
        return (y["u"] @ y["v"]).reshape(self._shape)

    def value(self, x: Tensor) -> dict[str, Tensor]:
        u, v = balanced_factors(self.matrix(x), self.rank)
        return {"u": u, "v": v}

    def bad_domain(self, x: Tensor) -> str | None:
        w = self.matrix(x)
        beyond = singular_values(w)[self.rank]  # there is one: the rank is below both sizes
        if bool(beyond <= spectral_slack(w)):
            return None
        return (
            f"a product of factors of rank {self.rank} has no larger rank, but the singular value number {self.rank + 1} of "
            f"this matrix is {float(beyond):.6g}"
        )

    # -- products ------------------------------------------------------------------------------------------------------

    def push_inverse_block(self, x: Tensor, y: dict[str, Tensor], v: dict[str, Tensor]) -> Tensor:
        return (v["u"] @ y["v"] + y["u"] @ v["v"]).reshape(self._shape)

    def pull_inverse_block(self, x: Tensor, y: dict[str, Tensor], w: Tensor) -> dict[str, Tensor]:
        z = self.matrix(w)
        return {"u": z @ y["v"].mT, "v": y["u"].mT @ z}


class FullFactorization(Factorization, Submersion):
    """W = U V of full rank, a submersion: what `Factorization` is bound as where its rank is at least min(m, n)."""

    def value(self, x: Tensor) -> dict[str, Tensor]:
        w, (m, n) = self.matrix(x), self._sizes
        pad = torch.nn.functional.pad
        if self.rank >= n:
            return {"u": pad(w, (0, self.rank - n)), "v": torch.eye(self.rank, n, dtype=w.dtype, device=w.device)}
        return {"u": torch.eye(m, self.rank, dtype=w.dtype, device=w.device), "v": pad(w, (0, 0, 0, self.rank - m))}

    def bad_domain(self, x: Tensor) -> str | None:
        return None

    def bad_image(self, y: dict[str, Tensor]) -> str | None:
        m, n = self._sizes
        if _has_rank(y["u"], m) or _has_rank(y["v"], n):
            return None
        return (
            f"a factorization of full rank needs U of rank {m} or V of rank {n}, for elsewhere some directions of W cannot be "
            f"reached (U has shape {tuple(y['u'].shape)}, V has {tuple(y['v'].shape)})"
        )

    # -- the horizontal lift -------------------------------------------------------------------------------------------

    def _weights(self) -> tuple[Any, Any] | None:
        """The weights of |dU|² and |dV|² in the metric, or None if it is not of this form."""
        if self.metric is None:
            return 1.0, 1.0
        if not isinstance(self.metric, Mapping):
            return None
        u, v = (torch.as_tensor(self.metric[part]) for part in ("u", "v"))
        return (u.item(), v.item()) if u.numel() == v.numel() == 1 else None

    def _solved(self, y: dict[str, Tensor], z: Tensor, weights: tuple[Any, Any]) -> Tensor:
        """X with X VᵀV / a + UUᵀ X / b = Z, where a and b are the weights of |dU|² and |dV|²."""
        a, b = weights
        u, v, goal = _single(y["u"]), _single(y["v"]), _single(z)
        left, rows = _spectrum(u.detach())
        right, columns = _spectrum(v.detach().mT)
        below = rows[:, None] / b + columns / a

        def inverted(residual: Tensor) -> Tensor:
            return left @ ((left.mT @ residual @ right) / below) @ right.mT

        x = inverted(goal)
        gram_u, gram_v = u @ u.mT / b, v.mT @ v / a
        for _ in range(2):  # each makes one more derivative right: those of a spectrum with equal values do not exist
            x = x + inverted(goal - x @ gram_v - gram_u @ x)
        return x.to(z.dtype)

    def push_block(self, x: Any, y: dict[str, Tensor], v: Tensor) -> Any:
        weights = self._weights()
        if weights is None:
            return super().push_block(x, y, v)
        solution = self._solved(y, self.matrix(v), weights)
        return {"u": solution @ y["v"].mT / weights[0], "v": y["u"].mT @ solution / weights[1]}

    def pull_block(self, x: Any, y: dict[str, Tensor], w: dict[str, Tensor]) -> Any:
        weights = self._weights()
        if weights is None:
            return super().pull_block(x, y, w)
        z = w["u"] @ y["v"] / weights[0] + y["u"] @ w["v"] / weights[1]
        return self._solved(y, z, weights).reshape(self._shape)

    # -- following a step ----------------------------------------------------------------------------------------------

    def near_value(self, x: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        """One horizontal step, and what is then missing of W by one factor alone, the other being kept."""
        goal = self.matrix(x)
        step = self.push_block(x, y, x - self.inverse_value(y))
        u, v = y["u"] + step["u"], y["v"] + step["v"]
        for _ in range(2):  # the equation is linear in either factor; the second time rounding goes
            u, v = self._corrected(goal, u, v)
        if not is_wrapped({"u": u, "v": v}):
            size = u.norm() * v.norm()
            if bool((goal - u @ v).abs().amax() > self.rank * torch.finfo(u.dtype).eps * size):
                raise ChartDomainError(
                    "the step leads to factors U and V without full rank, so that no product of nearby ones is the W that was "
                    "asked for. Take a shorter step."
                )
        return {"u": u, "v": v}

    def _corrected(self, goal: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        m, n = self._sizes
        missing = goal - u @ v
        if self.rank < n:
            return u, v + _pinv(u) @ missing
        if self.rank < m:
            return u + missing @ _pinv(v), v
        by_u = singular_values(v)[-1] >= singular_values(u)[-1]
        new_u, new_v = u + missing @ _pinv(v), v + _pinv(u) @ missing
        return torch.where(by_u, new_u, u), torch.where(by_u, v, new_v)


def _has_rank(a: Tensor, rank: int) -> bool:
    if rank > min(a.shape):
        return False
    spectrum = singular_values(a)
    return rank == 0 or bool(spectrum[rank - 1] > spectral_slack(a))


def _pinv(a: Tensor) -> Tensor:
    return torch.linalg.pinv(_single(a)).to(a.dtype)


def _spectrum(a: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvectors and eigenvalues of AAᵀ, from the singular values of A, which keep twice the digits."""
    m, k = a.shape
    left, values, _ = torch.linalg.svd(a, full_matrices=m > k)
    return left, torch.nn.functional.pad(values, (0, m - values.shape[0])) ** 2
