"""Traces and eigenvalues, of one operator or of a pair (B, G): B u = λ G u."""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.operators.algebra import DENSE_LIMIT, has_matrix, require_small, to_dense
from geoad.operators.base import Dense, Diagonal, LinearOperator, Multiple, Product, Sum, Transpose
from geoad.operators.solve import Inverse, check_diagonal, densify, inverse, scaled_cholesky, solve, working
from geoad.operators.spectra import symmetric_eigh
from geoad.params import Blocks, axpy, dot, is_wrapped, scale

__all__ = ["eigh", "eigvals", "lanczos", "order", "trace"]


def trace(operator: LinearOperator) -> Tensor:
    """Σ_i A_ii."""
    if isinstance(operator, Dense):  # not by dispatch, which torch.compile does not trace
        return operator.matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
    return traced(operator)


@singledispatch
def traced(operator: LinearOperator) -> Tensor:
    """What `trace` does: dispatches on the class."""
    require_small(operator, "the trace")
    return to_dense(operator).diagonal(dim1=-2, dim2=-1).sum(-1)


@traced.register
def _(operator: Diagonal) -> Tensor:
    return operator.layout.ravel(operator.entries).sum(-1)


@traced.register
def _(operator: Multiple) -> Tensor:
    return operator.dim * operator.factor


@traced.register
def _(operator: Sum) -> Tensor:
    parts = [factor * trace(term) for factor, term in operator.terms]
    return torch.stack([torch.as_tensor(part) for part in parts]).sum(0)


@traced.register
def _(operator: Transpose) -> Tensor:
    return trace(operator.operator)


def order(values: Tensor, which: str) -> Tensor:
    """The indices that sort eigenvalues: "largest" first, "smallest" first, or largest "magnitude" first."""
    key = values.real if values.is_complex() else values
    if which == "largest":
        return key.argsort(descending=True, stable=True)
    if which == "smallest":
        return key.argsort(stable=True)
    if which == "magnitude":
        return values.abs().argsort(descending=True, stable=True)
    raise GeometryError(
        f"which='{which}' is not known. Eigenvalues are sorted by which='largest' (default), 'smallest' or 'magnitude'."
    )


def _symmetric_pair(operator: LinearOperator) -> tuple[LinearOperator, LinearOperator] | None:
    """(B, G) if the operator is G⁻¹ B, or similar to it, with B symmetric and G positive definite."""
    if isinstance(operator, Transpose):
        return _symmetric_pair(operator.operator)
    if not isinstance(operator, Product):
        return None
    left, right = operator.left, operator.right
    if isinstance(left, Inverse) and left.definite and right.symmetric:
        return right, left.operator
    if isinstance(right, Inverse) and right.definite and left.symmetric:
        return left, right.operator
    if left.definite and right.symmetric and left.materialised:
        return right, inverse(left, positive=True)
    if right.definite and left.symmetric and right.materialised:
        return left, inverse(right, positive=True)
    return None


def picked(values: Tensor, vectors: Tensor | None, k: int | None, which: str) -> tuple[Tensor, Tensor | None]:
    """The first k eigenvalues in the order of `which`, and their eigenvectors."""
    index = order(values, which)[..., :k]
    picked = values.take_along_dim(index, -1)
    return picked, None if vectors is None else vectors.take_along_dim(index.unsqueeze(-2), -1)


def eigvals(operator: LinearOperator, k: int | None = None, which: str = "largest") -> Tensor:
    """Eigenvalues, sorted; real where the operator is symmetric or G⁻¹B with symmetric B, else complex in general.

    With `k` only the first k, by Lanczos with full reorthogonalisation where the matrix is not at hand.
    """
    _check_count(operator, k)
    if isinstance(operator, Multiple):
        count = operator.dim if k is None else k
        return operator.factor.unsqueeze(-1).expand(*operator.factor.shape, count)
    values = spectrum(operator)
    if values is not None:
        return picked(_real(values), None, k, which)[0]
    pair = (operator, None) if operator.symmetric else _symmetric_pair(operator)
    if pair is not None:
        return eigh(pair[0], pair[1], k, which)[0]
    require_small(operator, "the spectrum of an operator that is not symmetric")
    return picked(_real(torch.linalg.eigvals(to_dense(operator))), None, k, which)[0]


def _real(values: Tensor) -> Tensor:
    """Without imaginary parts that are rounding noise."""
    if values.is_complex() and values.numel() and not is_wrapped({"": values}):
        negligible = 1e4 * torch.finfo(values.dtype).eps * values.abs().max()
        if bool((values.imag.abs() <= negligible).all()):
            return values.real
    return values


@singledispatch
def spectrum(operator: LinearOperator) -> Tensor | None:
    """All eigenvalues, in any order, in closed form; None if there is none."""
    return None


@spectrum.register
def _(operator: Diagonal) -> Tensor | None:
    return operator.layout.ravel(operator.entries)


@spectrum.register
def _(operator: Multiple) -> Tensor | None:
    return operator.factor.unsqueeze(-1).expand(*operator.factor.shape, operator.dim)


@spectrum.register
def _(operator: Inverse) -> Tensor | None:
    values = spectrum(operator.operator)
    return None if values is None else 1 / values


@spectrum.register
def _(operator: Transpose) -> Tensor | None:
    return spectrum(operator.operator)


@spectrum.register
def _(operator: Sum) -> Tensor | None:
    """Of one operator, and multiples of the identity."""
    shift: Tensor | float = 0.0
    values: Tensor | None = None
    for factor, term in operator.terms:
        factor = factor.unsqueeze(-1) if isinstance(factor, Tensor) else factor
        if isinstance(term, Multiple):
            shift = shift + factor * term.factor.unsqueeze(-1)
            continue
        found = spectrum(term)
        if values is not None or found is None:
            return None
        values = factor * found
    return None if values is None else values + shift


def _check_count(operator: LinearOperator, k: int | None) -> None:
    if k is not None and not 1 <= k <= operator.dim:
        raise GeometryError(
            f"k={k} eigenvalues were asked for, but there are {operator.dim}. Pass 1 <= k <= {operator.dim}, or k=None for all."
        )


def eigh(
    b: LinearOperator, g: LinearOperator | None = None, k: int | None = None, which: str = "largest"
) -> tuple[Tensor, Tensor]:
    """Eigenvalues and G-orthonormal eigenvectors (as columns, shape (d, k)) of B u = λ G u for symmetric B.

    Structured operators keep their structure; small or stored ones go through LAPACK; large matrix-free ones with `k` through
    Lanczos in the G inner product.
    """
    _check_count(b, k)
    if isinstance(g, Multiple) and g.factor.ndim == 0:
        check_diagonal(g.factor, True)
        values, vectors = eigh(b, None, k, which)
        return values / g.factor, vectors / g.factor.sqrt()
    found = eigenpairs(b, g, k, which)
    if found is not None:
        return found
    stored = b.materialised and (b.dim <= DENSE_LIMIT or has_matrix(b))
    if k is not None and not stored and 8 * k + 64 < b.dim:
        return lanczos(b, g, k, which)
    require_small(b, "the full spectrum")
    matrix = densify(b).matrix
    if not isinstance(g, LinearOperator):
        values, vectors = symmetric_eigh(matrix)
    else:
        size, lower = scaled_cholesky(working(densify(g).matrix))
        lower = size.unsqueeze(-1) * lower
        half = torch.linalg.solve_triangular(lower, working(matrix), upper=False)
        whitened = torch.linalg.solve_triangular(lower, half.mT, upper=False)
        values, basis = symmetric_eigh(0.5 * (whitened + whitened.mT))
        vectors = torch.linalg.solve_triangular(lower.mT, basis, upper=True)
        values, vectors = values.to(matrix.dtype), vectors.to(matrix.dtype)
    values, frame = picked(values, vectors, k, which)
    assert frame is not None
    return values, frame


@singledispatch
def eigenpairs(b: LinearOperator, g: LinearOperator | None, k: int | None, which: str) -> tuple[Tensor, Tensor] | None:
    """What `eigh` returns, in closed form; None if there is none."""
    return None


@eigenpairs.register
def _(b: Diagonal, g: LinearOperator | None, k: int | None, which: str) -> tuple[Tensor, Tensor] | None:
    values = b.layout.ravel(b.entries)
    if isinstance(g, Diagonal):
        for entries in g.entries.values():
            check_diagonal(entries, True)
        size = g.layout.ravel(g.entries)
    elif g is None:
        size = torch.ones_like(values)
    else:
        return None
    if values.ndim > 1 or size.ndim > 1:
        return None
    if k is None:
        require_small(b, "all eigenvectors")
    values = values / size
    index = order(values, which)[:k]
    vectors = torch.zeros(b.dim, len(index), dtype=values.dtype, device=values.device)
    vectors[index, torch.arange(len(index), device=index.device)] = size[index].rsqrt()
    return values[index], vectors


class _Krylov:
    """Lanczos for G⁻¹B in the G inner product, started in the G-orthogonal complement of the vectors in ``locked``."""

    def __init__(self, b: LinearOperator, g: LinearOperator | None, locked: list[tuple[Blocks, Blocks]], run: int) -> None:
        self.b, self.g, self.locked = b, g, locked
        steps = torch.arange(b.dim, dtype=b.like.dtype, device=b.like.device)
        # fixed, so that the result is reproducible; another one for each run
        self.start = b.layout.unravel(torch.cos(steps * (0.7 + 0.13 * run) + 0.3 + run) + 1.5 / (1 + run))
        self.basis: list[tuple[Blocks, Blocks]] = []

    def _dual(self, v: Blocks) -> Blocks:
        return v if self.g is None else self.g.mv(v)

    def _remainder(self, r: Blocks) -> tuple[Blocks, Blocks, Tensor]:
        """r without its parts in the known vectors, its dual, and its length."""
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            for u, du in (*self.locked, *self.basis):
                r = axpy(-dot(du, r), u, r)
        w = self._dual(r)
        return r, w, dot(r, w).clamp_min(0).sqrt()

    def run(self, k: int, which: str, tol: float) -> tuple[Tensor, Tensor]:
        """The first k eigenpairs in the complement, or fewer if the Krylov space is exhausted before."""
        layout, alphas, betas = self.b.layout, [], []
        eps = torch.finfo(self.b.like.dtype).eps
        q, w, beta = self._remainder(self.start)
        while True:
            q, w = scale(1 / beta, q), scale(1 / beta, w)
            self.basis.append((q, w))
            image = self.b.mv(q)
            alphas.append(dot(q, image))
            q, w, beta = self._remainder(image if self.g is None else solve(self.g, image, positive=True))
            values, coefficients = _ritz(alphas, betas, beta)
            index = order(values, which)[:k]
            residuals = beta * coefficients[-1, index].abs()
            size = values.abs().max()
            full = len(self.basis) + len(self.locked) == self.b.dim
            if full or bool(beta <= 16 * eps * size):
                break
            if len(self.basis) > k and bool((residuals <= tol * size).all()):
                break
            betas.append(beta)
        stacked = torch.stack([layout.ravel(u) for u, _ in self.basis], dim=-1)
        return values[index], stacked @ coefficients[:, index]


def lanczos(
    b: LinearOperator, g: LinearOperator | None, k: int, which: str = "largest", *, tol: float | None = None
) -> tuple[Tensor, Tensor]:
    """The first k eigenpairs of B u = λ G u: Lanczos for G⁻¹B in the G inner product, fully reorthogonalised.

    One Krylov space holds a single vector of each eigenspace. So after convergence the iteration is started again in the
    complement of what was found, until nothing there belongs to the first k: multiple eigenvalues come out as often as they
    occur. A pair counts as converged when its residual is below `tol` times the largest |λ| (1e-12, more in lower precision).
    """
    layout = b.layout
    tol = max(1e-12, 10 * torch.finfo(b.like.dtype).eps) if tol is None else tol
    values, vectors = _Krylov(b, g, [], 0).run(k, which, tol)
    for run in range(1, b.dim):
        if len(values) == b.dim:
            break
        found = [layout.unravel(column) for column in vectors.unbind(-1)]
        locked = [(u, u if g is None else g.mv(u)) for u in found]
        more, columns = _Krylov(b, g, locked, run).run(max(1, k - len(values)), which, tol)
        before = len(values)
        values, vectors = torch.cat([values, more]), torch.cat([vectors, columns], -1)
        slack = 10 * tol * values.abs().max()
        if before >= k and not bool(_beats(more[0], values[order(values[:before], which)[k - 1]], which, slack)):
            break
    index = order(values, which)[:k]
    return values[index], vectors[:, index]


def _beats(new: Tensor, old: Tensor, which: str, slack: Tensor) -> Tensor:
    """True if the eigenvalue `new` comes before `old` in the order, by more than rounding."""
    if which == "largest":
        return new > old + slack
    if which == "smallest":
        return new < old - slack
    return new.abs() > old.abs() + slack


def _ritz(alphas: list[Tensor], betas: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    diagonal = torch.stack(alphas).to(like.dtype)
    matrix = torch.diag(diagonal)
    if betas:
        off = torch.stack(betas).to(like.dtype)
        matrix = matrix + torch.diag(off, 1) + torch.diag(off, -1)
    return symmetric_eigh(matrix)
