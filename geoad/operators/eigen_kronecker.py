"""Operators that are diagonal in a Kronecker product of two bases (EKFAC)."""

from __future__ import annotations

import torch
from torch import Tensor

from geoad.errors import GeometryError, SingularMetricError, StructureNotPreservedError
from geoad.operators.algebra import DENSE_LIMIT, added, composed, require_small, scaled, to_dense
from geoad.operators.arrangement import Arrangement, outer, over_groups
from geoad.operators.base import LinearOperator, Multiple
from geoad.operators.determinant import slogdet
from geoad.operators.eigen import eigenpairs, order, spectrum, traced
from geoad.operators.inner import diagonal, inner_product
from geoad.operators.kronecker import Kronecker, full, is_diagonal, placed, product, read_arrangement, require_blocks
from geoad.operators.numbers import READERS, batch_shape
from geoad.operators.power import powered
from geoad.operators.sample import factor_product
from geoad.operators.solve import NOT_POSITIVE, densify, inverted, solved, working
from geoad.operators.spectra import noise_of, powers, symmetric_eigh
from geoad.params import Blocks, Layout, is_wrapped

__all__ = ["EigenKronecker", "eigen_kronecker"]


class EigenKronecker(LinearOperator):
    r""":math:`(U_L \otimes U_R)\, \operatorname{diag}(\lambda)\, (U_L \otimes U_R)^\top` for each group of a layer.

    Args:
        layout: the blocks of the layer.
        arrangement: how they form a (groups, o, i) tensor.
        left_basis: U_L, shape (groups, o, o), or None for the identity.
        right_basis: U_R, shape (groups, i, i), or None for the identity.
        values: λ, shape (groups, o, i).
        orthogonal: the bases are orthogonal, so that λ are the eigenvalues. After a change of coordinates W ↦ QWP they need not
            be.
        definite: all λ are positive.

    With orthogonal bases closed under multiples, c·I, inverses and powers (George et al. 2018, EKFAC).

    >>> import torch
    >>> layout = Layout({"w": (2, 1)})
    >>> A = EigenKronecker(layout, Arrangement("w"), None, None, torch.tensor([[[1.0], [3.0]]]))
    >>> A.mv({"w": torch.ones(2, 1)})["w"].ravel()
    tensor([1., 3.])
    """

    made_of = ("left_basis", "right_basis", "values")
    said = ("arrangement", "orthogonal", "definite")
    materialised = True
    structured = True
    symmetric = True

    def __init__(
        self,
        layout: Layout,
        arrangement: Arrangement,
        left_basis: Tensor | None,
        right_basis: Tensor | None,
        values: Tensor,
        *,
        orthogonal: bool = True,
        definite: bool = False,
    ) -> None:
        arrangement.check(layout)
        require_blocks(layout, arrangement)
        groups, units, inputs = arrangement.sizes(layout)
        given = [("values", values, (groups, units, inputs))]
        if left_basis is not None:
            given.append(("left basis", left_basis, (groups, units, units)))
        if right_basis is not None:
            given.append(("right basis", right_basis, (groups, inputs, inputs)))
        for what, tensor, shape in given:
            if tensor.shape[-3:] != shape:
                raise GeometryError(
                    f"the {what} of an EigenKronecker operator has shape {tuple(tensor.shape)}, but the layer, as (groups, "
                    f"outputs, inputs), is {(groups, units, inputs)}. Pass a tensor of shape {shape}."
                )
        self.layout = layout
        self.arrangement = arrangement
        self.left_basis = left_basis
        self.right_basis = right_basis
        self.values = values
        self.orthogonal = orthogonal
        self.definite = definite

    @property
    def like(self) -> Tensor:
        return self.values

    def rotated(self, v: Blocks) -> Tensor:
        """(U_L ⊗ U_R)ᵀ v, the coefficients in the basis."""
        return product(_mT(self.left_basis), _mT(self.right_basis), self.arrangement.matrix(self.layout, v))

    def back(self, coefficients: Tensor) -> Blocks:
        """(U_L ⊗ U_R) of coefficients."""
        return self.arrangement.blocks(self.layout, product(self.left_basis, self.right_basis, coefficients))

    def mv(self, v: Blocks) -> Blocks:
        return self.back(self.values * self.rotated(v))

    def rmv(self, w: Blocks) -> Blocks:
        return self.mv(w)

    def with_values(self, values: Tensor, definite: bool) -> EigenKronecker:
        """The same bases with other λ."""
        return EigenKronecker(
            self.layout,
            self.arrangement,
            self.left_basis,
            self.right_basis,
            values,
            orthogonal=self.orthogonal,
            definite=definite,
        )

    def dual(self, values: Tensor, definite: bool) -> EigenKronecker:
        """The dual bases (U_L⁻ᵀ, U_R⁻ᵀ), which are the same ones if they are orthogonal, with other λ."""
        if self.orthogonal:
            return self.with_values(values, definite)
        left, right = (
            None if u is None else torch.linalg.inv(working(u)).mT.to(u.dtype) for u in (self.left_basis, self.right_basis)
        )
        return EigenKronecker(self.layout, self.arrangement, left, right, values, orthogonal=False, definite=definite)


def _mT(basis: Tensor | None) -> Tensor | None:
    return None if basis is None else basis.mT


def eigen_kronecker(operator: Kronecker) -> EigenKronecker:
    """The same operator in the eigenbases of its factors; it must be symmetric. Remembered, for damping may change often."""
    known: EigenKronecker | None = getattr(operator, "eigen", None)
    if known is not None:
        return known

    def of(factor: Tensor) -> tuple[Tensor, Tensor | None]:
        return (factor.squeeze(-1), None) if is_diagonal(factor) else symmetric_eigh(factor)

    (left, left_basis), (right, right_basis) = of(operator.left), of(operator.right)
    found = EigenKronecker(
        operator.layout, operator.arrangement, left_basis, right_basis, outer(left, right), definite=operator.definite
    )
    if not is_wrapped({"": found.values}) and not found.values.requires_grad:
        operator.eigen = found  # pyright: ignore[reportAttributeAccessIssue]
    return found


def _shifted(operator: EigenKronecker, c: Multiple, definite: bool) -> EigenKronecker:
    return operator.with_values(operator.values + over_groups(c.factor), definite)


@added.register
def _(a: Kronecker, b: LinearOperator, definite: bool) -> LinearOperator | None:
    if isinstance(b, Multiple) and a.symmetric:
        return _shifted(eigen_kronecker(a), b, definite)
    if isinstance(b, Kronecker) and a.arrangement == b.arrangement and a.symmetric and b.symmetric:
        if a.left is b.left and not is_diagonal(a.right) and not is_diagonal(b.right):
            return Kronecker(a.layout, a.arrangement, a.left, a.right + b.right, definite=definite)
        if a.right is b.right and not is_diagonal(a.left) and not is_diagonal(b.left):
            return Kronecker(a.layout, a.arrangement, a.left + b.left, a.right, definite=definite)
    return None


def _same_bases(a: EigenKronecker, b: EigenKronecker) -> bool:
    return a.arrangement == b.arrangement and a.left_basis is b.left_basis and a.right_basis is b.right_basis


@added.register
def _(a: EigenKronecker, b: LinearOperator, definite: bool) -> LinearOperator | None:
    if isinstance(b, Multiple) and a.orthogonal:
        return _shifted(a, b, definite)
    if isinstance(b, EigenKronecker) and _same_bases(a, b):
        return a.with_values(a.values + b.values, definite)
    return None


@composed.register
def _(a: EigenKronecker, b: LinearOperator) -> LinearOperator | None:
    if isinstance(b, EigenKronecker) and _same_bases(a, b) and a.orthogonal and b.orthogonal:
        return a.with_values(a.values * b.values, a.definite and b.definite)
    return None


@scaled.register
def _(operator: EigenKronecker, factor: float | Tensor, definite: bool) -> LinearOperator:
    factor = over_groups(factor) if isinstance(factor, Tensor) else factor
    return operator.with_values(factor * operator.values, definite)


def _require_regular(operator: EigenKronecker, positive: bool) -> None:
    values = operator.values.detach()
    if is_wrapped({"": values}) or not values.numel():
        return
    noise = noise_of(values, 1)
    if not bool((values > noise if positive else values.abs() > noise).all()):
        worst = float(values.min() if positive else values.abs().min())
        detail = f" (an eigenvalue is {worst:.3g}, the largest {float(values.abs().max()):.3g})"
        raise SingularMetricError(NOT_POSITIVE.format(what="EigenKronecker operator", detail=detail))


@solved.register
def _(operator: EigenKronecker, b: Blocks, positive: bool) -> Blocks:
    return inverted(operator, positive).mv(b)


@inverted.register
def _(operator: EigenKronecker, positive: bool) -> LinearOperator:
    _require_regular(operator, positive)
    return operator.dual(1 / operator.values, operator.definite or positive)


@powered.register
def _(operator: EigenKronecker, p: float) -> LinearOperator:
    if operator.orthogonal:
        noise = noise_of(operator.values, 1)
        return operator.with_values(powers(operator.values, p, "EigenKronecker operator", noise=noise), operator.definite)
    if operator.dim > DENSE_LIMIT:
        raise StructureNotPreservedError(
            f"the power {p:g} of an EigenKronecker operator whose bases are not orthogonal was asked for, with {operator.dim} "
            "coordinates. Powers are not natural: they are taken where the operator was made (its home chart), where the bases "
            "are orthogonal. Solves, inverses, samples and determinants work in every chart."
        )
    return powered(densify(operator), p)


@factor_product.register
def _(operator: EigenKronecker, z: Blocks, invert: bool) -> Blocks:
    _require_regular(operator, True)
    root = operator.values ** (-0.5 if invert else 0.5)
    turned = operator.dual(root, True) if invert else operator.with_values(root, True)
    if operator.orthogonal:
        return turned.mv(z)  # the symmetric root: it does not depend on the choice of an eigenbasis
    return turned.back(root * operator.arrangement.matrix(operator.layout, z))


@slogdet.register
def _(operator: EigenKronecker) -> tuple[Tensor, Tensor]:
    values = operator.values.flatten(-3)
    sign, log = values.sign().prod(-1), values.abs().log().sum(-1)
    if not operator.orthogonal:
        _, units, inputs = operator.arrangement.sizes(operator.layout)
        for basis, times in ((operator.left_basis, inputs), (operator.right_basis, units)):
            if basis is not None:
                log = log + 2 * times * torch.linalg.slogdet(working(basis)).logabsdet.sum(-1)
    return sign, log


def _squares(basis: Tensor | None) -> Tensor | None:
    return None if basis is None else basis.square()


@traced.register
def _(operator: EigenKronecker) -> Tensor:
    if operator.orthogonal:
        return operator.values.sum((-3, -2, -1))
    return product(_squares(operator.left_basis), _squares(operator.right_basis), operator.values).sum((-3, -2, -1))


@diagonal.register
def _(operator: EigenKronecker) -> Blocks:
    squares = product(_squares(operator.left_basis), _squares(operator.right_basis), operator.values)
    return operator.arrangement.blocks(operator.layout, squares)


@spectrum.register
def _(operator: EigenKronecker) -> Tensor | None:
    return operator.values.flatten(-3) if operator.orthogonal else None


@eigenpairs.register
def _(b: EigenKronecker, g: LinearOperator | None, k: int | None, which: str) -> tuple[Tensor, Tensor] | None:
    if g is not None or not b.orthogonal or batch_shape(b):
        return None
    if k is None:
        require_small(b, "all eigenvectors")
    values = b.values.flatten()
    index = order(values, which)[:k]
    units = torch.zeros(len(index), b.dim, dtype=values.dtype, device=values.device)
    units[torch.arange(len(index), device=index.device), index] = 1
    return values[index], b.layout.ravel(b.back(units.unflatten(-1, b.values.shape))).mT


@eigenpairs.register
def _(b: Kronecker, g: LinearOperator | None, k: int | None, which: str) -> tuple[Tensor, Tensor] | None:
    return eigenpairs(eigen_kronecker(b), g, k, which) if b.symmetric else None


@inner_product.register
def _(a: EigenKronecker, b: LinearOperator) -> Tensor | None:
    if isinstance(b, Kronecker) and a.arrangement == b.arrangement:
        left, right = (_quadratic(u, x) for u, x in ((a.left_basis, b.left), (a.right_basis, b.right)))
        return (a.values * outer(left, right)).sum((-3, -2, -1))
    if isinstance(b, EigenKronecker) and a.arrangement == b.arrangement:
        left, right = (_overlap(u, w) for u, w in ((a.left_basis, b.left_basis), (a.right_basis, b.right_basis)))
        return (a.values * product(left, right, b.values)).sum((-3, -2, -1))
    return None


def _quadratic(basis: Tensor | None, factor: Tensor) -> Tensor:
    """The numbers u_kᵀ X u_k for the columns of a basis."""
    if basis is None:
        return factor.squeeze(-1) if is_diagonal(factor) else factor.diagonal(dim1=-2, dim2=-1)
    return (basis * (factor * basis if is_diagonal(factor) else factor @ basis)).sum(-2)


def _overlap(u: Tensor | None, w: Tensor | None) -> Tensor | None:
    """The squares of the inner products of the columns of two bases."""
    if u is None or w is None:
        return _squares(w) if u is None else u.mT.square()
    return (u.mT @ w).square()


@to_dense.register
def _(operator: EigenKronecker) -> Tensor:
    _, units, inputs = operator.arrangement.sizes(operator.layout)
    one = operator.values.new_ones(1, 1)
    left = full(one.expand(1, units, 1)) if operator.left_basis is None else operator.left_basis
    right = full(one.expand(1, inputs, 1)) if operator.right_basis is None else operator.right_basis
    basis = torch.einsum("...ab,...cd->...acbd", left, right).flatten(-4, -3).flatten(-2)
    return placed((basis * operator.values.flatten(-2).unsqueeze(-2)) @ basis.mT, operator.arrangement, operator.layout)


@batch_shape.register
def _(operator: EigenKronecker) -> torch.Size:
    tensors = (operator.left_basis, operator.right_basis, operator.values)
    return torch.broadcast_shapes(*(each.shape[:-3] for each in tensors if each is not None))


READERS["eigenkronecker"] = (EigenKronecker, read_arrangement)
