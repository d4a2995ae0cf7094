r"""Operators of low rank, beside a multiple of the identity or a diagonal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geoad.errors import GeometryError, SingularMetricError, StructureNotPreservedError
from geoad.operators.algebra import DENSE_LIMIT, added, plus, scaled, times, to_dense
from geoad.operators.base import Diagonal, LinearOperator, Multiple
from geoad.operators.eigen import eigenpairs, order, spectrum, trace, traced
from geoad.operators.inner import diagonal, inner, inner_product
from geoad.operators.numbers import READERS, batch_shape, from_state
from geoad.operators.power import powered
from geoad.operators.sample import factor_product
from geoad.operators.solve import NOT_POSITIVE, check_diagonal, densify, working
from geoad.operators.spectra import noise_of, powers, symmetric_eigh
from geoad.params import Blocks, Layout, add, first, is_wrapped, map_blocks

__all__ = ["LowRank"]


class LowRank(LinearOperator):
    r""":math:`\sum_k s_k u_k u_k^\top + B` with a base B that is a multiple of the identity, a diagonal, or nothing.

    Args:
        layout: names and shapes of the blocks.
        factors: the u_k as blocks of shape (r, *shape).
        signs: s, shape (r,); any real weights. None: all 1.
        base: B, a `Multiple` or `Diagonal` on the same layout.
        definite: the operator is known to be positive definite.

    Sums with other ones, with multiples of the identity and with diagonals stay in the class. Solves use the Woodbury identity,
    determinants the determinant lemma: r × r matrices, never d × d.

    >>> import torch
    >>> layout = Layout({"x": (2,)})
    >>> A = LowRank(layout, {"x": torch.tensor([[1.0, 1.0]])}, base=Multiple(layout, torch.tensor(1.0)))
    >>> A.mv({"x": torch.tensor([1.0, 0.0])})["x"]
    tensor([2., 1.])
    """

    made_of = ("factors", "signs", "base")
    said = ("definite",)
    materialised = True
    structured = True
    symmetric = True

    def __init__(
        self,
        layout: Layout,
        factors: Blocks,
        signs: Tensor | None = None,
        base: LinearOperator | None = None,
        *,
        definite: bool = False,
    ) -> None:
        self.layout = layout
        self.factors = layout.check(factors, "the factors of a LowRank operator")
        shape = layout.batch_shape(self.factors)
        if not shape or (signs is not None and signs.shape[-1:] != shape[-1:]):
            found = "none" if signs is None else tuple(signs.shape)
            raise GeometryError(
                f"a LowRank operator takes r factors, blocks of shape (r, *shape), and r signs; found factors with leading "
                f"axes {tuple(shape)} and signs of shape {found}. Stack the factors along a first axis."
            )
        if base is not None and not isinstance(base, (Multiple, Diagonal)):
            raise GeometryError(
                f"the base of a LowRank operator is a Multiple, a Diagonal or None, found {type(base).__name__}. Add other "
                "operators as a sum: geoad.operators.plus(A, B)."
            )
        self.signs = signs
        self.base = base
        self.definite = definite

    @property
    def rank(self) -> int:
        """r, the number of factors."""
        return self.layout.batch_shape(self.factors)[-1]

    @property
    def like(self) -> Tensor:
        return first(self.factors)

    @property
    def rows(self) -> Tensor:
        """The factors u_k as rows, (*, r, d)."""
        return self.layout.ravel(self.factors)

    def weights(self) -> Tensor:
        """The s_k."""
        return self.like.new_ones(self.rank) if self.signs is None else self.signs

    def mv(self, v: Blocks) -> Blocks:
        coefficients: Tensor | None = None
        for name, shape in self.layout.items():
            part = _columns(self.factors[name], v[name], len(shape), False)
            coefficients = part if coefficients is None else coefficients + part
        assert coefficients is not None
        coefficients = coefficients if self.signs is None else coefficients * self.signs
        result = {
            name: _columns(self.factors[name], coefficients, len(shape), True).reshape((*coefficients.shape[:-1], *shape))
            for name, shape in self.layout.items()
        }
        return result if self.base is None else add(result, self.base.mv(v))

    def rmv(self, w: Blocks) -> Blocks:
        return self.mv(w)


def _columns(factor: Tensor, x: Tensor, typed: int, back: bool) -> Tensor:
    """U x for a block x, or Uᵀ x for coefficients x; U has shape (*, r, *shape)."""
    matrix = factor.reshape(*factor.shape[: factor.ndim - typed], -1)
    x = x if back else x.reshape(*x.shape[: x.ndim - typed], -1)
    matrix = matrix.mT if back else matrix
    if x.ndim == 1:
        return matrix @ x
    return x @ matrix.mT if matrix.ndim == 2 else (matrix @ x.unsqueeze(-1)).squeeze(-1)


def _with(operator: LowRank, base: LinearOperator | None, definite: bool) -> LowRank:
    return LowRank(operator.layout, operator.factors, operator.signs, base, definite=definite)


@added.register
def _(a: LowRank, b: LinearOperator, definite: bool) -> LinearOperator | None:
    if isinstance(b, (Multiple, Diagonal)):
        return _with(a, b if a.base is None else plus(a.base, b, definite=definite), definite)
    if not isinstance(b, LowRank) or batch_shape(a) != batch_shape(b):
        return None
    split = len(batch_shape(a))
    factors = map_blocks(lambda x, y: torch.cat([x, y], split), a.factors, b.factors)
    signs = None if a.signs is None and b.signs is None else torch.cat([a.weights(), b.weights()], -1)
    bases = [base for base in (a.base, b.base) if base is not None]
    base = None if not bases else bases[0] if len(bases) == 1 else plus(*bases)
    return LowRank(a.layout, factors, signs, base, definite=definite)


@scaled.register
def _(operator: LowRank, factor: float | Tensor, definite: bool) -> LinearOperator:
    weight = factor.unsqueeze(-1) if isinstance(factor, Tensor) and factor.ndim else factor
    base = None if operator.base is None else times(factor, operator.base, positive=definite)
    return LowRank(operator.layout, operator.factors, weight * operator.weights(), base, definite=definite)


# -- the spectrum ----------------------------------------------------------------------------------------------------------


def signed_rows(operator: LowRank) -> tuple[Tensor, Tensor]:
    """The factors scaled by √|s_k|, and the signs ±1."""
    rows, weights = working(operator.rows), working(operator.weights())
    ones = torch.ones_like(weights)
    if operator.signs is None:
        return rows, ones
    return rows * weights.abs().sqrt().unsqueeze(-1), torch.where(weights < 0, -ones, ones)


def _eigen(rows: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues (m,) and orthonormal eigenvectors (m, d) of Wᵀ S W on the span of W, by its thin QR decomposition."""
    q, r = torch.linalg.qr(rows.mT)
    values, vectors = symmetric_eigh((r * signs.unsqueeze(-2)) @ r.mT)
    if not is_wrapped({"": signs}) and bool((signs > 0).all()):
        values = values.clamp_min(0)
    return values, (q @ vectors).mT


_COLUMNS = 1 << 16


def _gram(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues of W Wᵀ, which are those of Wᵀ W, and its eigenvectors; summed up in float64."""
    gram = sum(
        (part @ part.mT for part in map(Tensor.double, rows.split(_COLUMNS, -1))), rows.new_zeros((), dtype=torch.float64)
    )
    values, vectors = symmetric_eigh(gram)
    return values.clamp_min(0), vectors


def _spectral(rows: Tensor, signs: Tensor, fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """f(λ) and orthonormal eigenvectors as rows, where f vanishes at 0: by the Gram matrix (cheaper than QR) if S = 1."""
    if is_wrapped({"": rows}) or rows.shape[-2] >= rows.shape[-1] or not bool((signs > 0).all()):
        values, basis = _eigen(rows, signs)
        return fn(values), basis
    values, vectors = _gram(rows)
    known = values > noise_of(values, rows.shape[-2])
    found, ones = fn(values.to(rows.dtype)), torch.ones_like(values)
    length = torch.where(known, values, ones).rsqrt()
    basis = (vectors * length.unsqueeze(-2)).to(rows.dtype).mT @ rows
    return torch.where(known, found, torch.zeros_like(found)), basis


def _within_span(operator: LowRank, fn: Callable[[Tensor], Tensor], c: Tensor, definite: bool) -> LowRank:
    """f(A) for A = c I + Wᵀ S W: f(c) I + Q (f(λ + c) - f(c)) Qᵀ; without a base Q f(λ) Qᵀ."""
    rows, signs = signed_rows(operator)
    dtype, layout = operator.like.dtype, operator.layout
    outside = rows.new_zeros(()) if operator.base is None else fn(c)
    weights, basis = _spectral(rows, signs, lambda values: fn(values + c.unsqueeze(-1)) - outside.unsqueeze(-1))
    base = None if operator.base is None else Multiple(layout, outside, definite=definite)
    return LowRank(layout, layout.unravel(basis.to(dtype)), weights.to(dtype), base, definite=definite)


def _isotropic(operator: LowRank) -> Tensor | None:
    """c of a base c·I, 0 without a base, None for a diagonal."""
    if operator.base is None:
        return operator.like.new_zeros(())
    return operator.base.factor if isinstance(operator.base, Multiple) else None


@powered.register
def _(operator: LowRank, p: float) -> LinearOperator:
    c = _isotropic(operator)
    if c is None:
        if operator.dim > DENSE_LIMIT:
            raise StructureNotPreservedError(
                f"the power {p:g} of a LowRank operator with a diagonal base was asked for, with {operator.dim} coordinates: "
                "it has no low rank. Solves, inverses, samples and determinants work; or damp with a multiple of the identity."
            )
        return powered(densify(operator), p)
    what = "LowRank operator"
    if operator.base is None and p < 0 and operator.rank < operator.dim:
        raise SingularMetricError(
            NOT_POSITIVE.format(what=what, detail=f" (its rank is at most {operator.rank} of {operator.dim})")
        )
    size = operator.dim if operator.base is None else 1

    def raised(values: Tensor) -> Tensor:
        return powers(values, p, what, noise=noise_of(values, size))

    return _within_span(operator, raised, c, operator.definite)


@spectrum.register
def _(operator: LowRank) -> Tensor | None:
    c = _isotropic(operator)
    if c is None:
        return None
    rows, signs = signed_rows(operator)
    if not is_wrapped({"": rows}) and rows.shape[-2] < rows.shape[-1] and bool((signs > 0).all()):
        values = _gram(rows)[0].to(operator.like.dtype)
    else:
        values = _eigen(rows, signs)[0].to(operator.like.dtype)
    rest = values.new_zeros((*values.shape[:-1], operator.dim - values.shape[-1]))
    return torch.cat([values, rest], -1) + c.unsqueeze(-1)


@eigenpairs.register
def _(b: LowRank, g: LinearOperator | None, k: int | None, which: str) -> tuple[Tensor, Tensor] | None:
    c = _isotropic(b)
    if g is not None or c is None or batch_shape(b):
        return None
    values, basis = _eigen(*signed_rows(b))
    every = torch.cat([values, values.new_zeros(b.dim - len(values))]) + c
    index = order(every, which)[: b.dim if k is None else k]
    if bool((index >= len(values)).any()):
        return None  # eigenvectors outside of the span
    dtype = b.like.dtype
    return every[index].to(dtype), basis[index].mT.to(dtype)


@factor_product.register
def _(operator: LowRank, z: Blocks, invert: bool) -> Blocks:
    base, layout = operator.base, operator.layout
    what = "LowRank operator"
    if base is None:
        if invert and operator.rank < operator.dim:
            raise SingularMetricError(NOT_POSITIVE.format(what=what, detail=" (it has no base)"))
        return powered(operator, -0.5 if invert else 0.5).mv(z)
    entries = diagonal(base)
    for block in entries.values():
        check_diagonal(block, True)
    # A = D^½ (I + W̃ᵀ S W̃) D^½
    rows, signs = signed_rows(operator)
    rows = rows / working(layout.ravel(entries)).sqrt().unsqueeze(-2)

    def rooted(values: Tensor) -> Tensor:
        return powers(1 + values, -0.5 if invert else 0.5, what, noise=noise_of(values, 1)) - 1

    weights, basis = _spectral(rows, signs, rooted)
    dtype = operator.like.dtype
    inside = LowRank(
        layout, layout.unravel(basis.to(dtype)), weights.to(dtype), Multiple(layout, weights.new_ones(()).to(dtype))
    )
    return map_blocks(lambda x, d: x * d ** (-0.5 if invert else 0.5), inside.mv(z), entries)


# -- numbers ---------------------------------------------------------------------------------------------------------------


@traced.register
def _(operator: LowRank) -> Tensor:
    total = (operator.weights() * operator.rows.square().sum(-1)).sum(-1)
    return total if operator.base is None else total + trace(operator.base)


@diagonal.register
def _(operator: LowRank) -> Blocks:
    flat = (operator.weights().unsqueeze(-1) * operator.rows.square()).sum(-2)
    blocks = operator.layout.unravel(flat)
    return blocks if operator.base is None else add(blocks, diagonal(operator.base))


@inner_product.register
def _(a: LowRank, b: LinearOperator) -> Tensor | None:
    if batch_shape(a) or batch_shape(b):
        return None
    if isinstance(b, LowRank) and b.rank < a.rank:
        a, b = b, a
    image = b.layout.ravel(b.mv(a.factors)) if b.materialised else None
    if image is None:
        return None
    total = (a.weights() * (a.rows * image).sum(-1)).sum(-1)
    return total if a.base is None else total + inner(a.base, b)


@to_dense.register
def _(operator: LowRank) -> Tensor:
    matrix = operator.rows.mT @ (operator.weights().unsqueeze(-1) * operator.rows)
    matrix = 0.5 * (matrix + matrix.mT)
    return matrix if operator.base is None else matrix + to_dense(operator.base)


@batch_shape.register
def _(operator: LowRank) -> torch.Size:
    own = operator.layout.batch_shape(operator.factors)[:-1]
    return own if operator.base is None else torch.broadcast_shapes(own, batch_shape(operator.base))


def _read(state: dict[str, Any], layout: Layout) -> dict[str, Any]:
    base = None if state["base"] is None else from_state(state["base"], layout)
    return {**state, "factors": {name: state["factors"][name] for name in layout.names}, "base": base}


READERS["lowrank"] = (LowRank, _read)
