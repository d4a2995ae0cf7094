"""Kronecker products of two factors for each group of a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.operators.algebra import composed, scaled, to_dense, transposed
from geoad.operators.arrangement import Arrangement, outer, over_groups
from geoad.operators.base import Dense, LinearOperator
from geoad.operators.determinant import slogdet
from geoad.operators.eigen import spectrum, traced
from geoad.operators.inner import diagonal, inner_product
from geoad.operators.numbers import READERS, batch_shape
from geoad.operators.power import powered
from geoad.operators.sample import dense_factor, factor_product
from geoad.operators.solve import check_diagonal, inverted, solve_columns, solved
from geoad.operators.spectra import matrix_power, powers, symmetric_eigvals
from geoad.params import Blocks, Layout

__all__ = ["Kronecker"]


class Kronecker(LinearOperator):
    r"""V ↦ L V Rᵀ on the blocks of a layer as a (groups, o, i) tensor; the matrix of each group is :math:`L \otimes R`.

    Args:
        layout: the blocks of the layer, those of the arrangement.
        arrangement: how they form the tensor V.
        left: L, shape (groups, o, o), or (groups, o) if it is diagonal.
        right: R, shape (groups, i, i), or (groups, i) if it is diagonal (the counts of an embedding).
        symmetric: both factors are symmetric.
        definite: both factors are positive definite.

    Closed under multiples, products, inverses and powers. With c·I added it becomes an `EigenKronecker`, exactly; with anything
    else a lazy sum: L₁ ⊗ R₁ + L₂ ⊗ R₂ is no Kronecker product.

    >>> import torch
    >>> layout = Layout({"w": (2, 3)})
    >>> A = Kronecker(layout, Arrangement("w"), 2 * torch.eye(2)[None], torch.ones(1, 3))
    >>> A.mv({"w": torch.ones(2, 3)})["w"]
    tensor([[2., 2., 2.],
            [2., 2., 2.]])
    """

    made_of = ("left", "right")
    said = ("arrangement", "symmetric", "definite")
    materialised = True
    structured = True

    def __init__(
        self,
        layout: Layout,
        arrangement: Arrangement,
        left: Tensor,
        right: Tensor,
        *,
        symmetric: bool = True,
        definite: bool = False,
    ) -> None:
        arrangement.check(layout)
        groups, units, inputs = arrangement.sizes(layout)
        require_blocks(layout, arrangement)
        self.layout = layout
        self.arrangement = arrangement
        self.left = _as_factor(left, groups, units, "left")
        self.right = _as_factor(right, groups, inputs, "right")
        self.symmetric = symmetric or definite
        self.definite = definite
        self.kept: dict[str, Dense] = {}  # the factors as matrices, which keep their factorisations

    @property
    def like(self) -> Tensor:
        return self.left

    def arranged(self, blocks: Blocks) -> Tensor:
        """The tensor V of the blocks."""
        return self.arrangement.matrix(self.layout, blocks)

    def mv(self, v: Blocks) -> Blocks:
        return self.arrangement.blocks(self.layout, product(self.left, self.right, self.arranged(v)))

    def rmv(self, w: Blocks) -> Blocks:
        if self.symmetric:
            return self.mv(w)
        return self.arrangement.blocks(self.layout, product(_transposed(self.left), _transposed(self.right), self.arranged(w)))


def require_blocks(layout: Layout, arrangement: Arrangement) -> None:
    """Raise if the layout has other blocks than the arrangement."""
    if set(layout.names) != set(arrangement.names):
        raise GeometryError(
            f"a Kronecker product on the blocks {list(layout.names)} was given an arrangement of {list(arrangement.names)}. It "
            "acts on one layer; put those of several layers into a BlockDiagonal: BlockDiagonal(layout, {names: part})."
        )


def _as_factor(factor: Tensor, groups: int, size: int, what: str) -> Tensor:
    """(*, groups, size, size), or (*, groups, size, 1) of a diagonal one."""
    if factor.shape == (groups, size):
        return factor.unsqueeze(-1)
    if factor.ndim < 3 or factor.shape[-3:] not in ((groups, size, size), (groups, size, 1)):
        raise GeometryError(
            f"the {what} factor of a Kronecker product has shape {tuple(factor.shape)}, but the layer has {groups} groups with "
            f"{size} {'outputs' if what == 'left' else 'inputs'} each. Pass a tensor ({groups}, {size}, {size}), or "
            f"({groups}, {size}) for a diagonal factor."
        )
    return factor


def is_diagonal(factor: Tensor) -> bool:
    """A factor that is stored as its diagonal."""
    return factor.shape[-1] == 1


def _transposed(factor: Tensor) -> Tensor:
    return factor if is_diagonal(factor) else factor.mT


def entries(factor: Tensor) -> Tensor:
    """The diagonal of a factor, (*, g, n)."""
    return factor.squeeze(-1) if is_diagonal(factor) else factor.diagonal(dim1=-2, dim2=-1)


def full(factor: Tensor) -> Tensor:
    """A factor as a matrix, (*, g, n, n)."""
    return torch.diag_embed(factor.squeeze(-1)) if is_diagonal(factor) else factor


def product(left: Tensor | None, right: Tensor | None, matrix: Tensor) -> Tensor:
    """L V Rᵀ for V of shape (*, g, o, i); None is the identity."""
    if left is not None:
        if is_diagonal(left):
            matrix = left * matrix
        elif left.ndim == 3 and left.shape[0] == 1 and matrix.ndim > 3:
            matrix = (matrix.mT @ left.squeeze(0).mT).mT  # a batch times one matrix, which is not copied
        else:
            matrix = left @ matrix
    if right is not None:
        one = right.ndim == 3 and right.shape[0] == 1
        matrix = matrix * right.mT if is_diagonal(right) else matrix @ (right.squeeze(0) if one else right).mT
    return matrix


def _dense(operator: Kronecker, side: str) -> Dense:
    known = operator.kept.get(side)
    if known is None:
        factor: Tensor = getattr(operator, side)
        layout = Layout({side: (factor.shape[-1],)})
        known = Dense(layout, factor, symmetric=operator.symmetric, definite=operator.definite)
        operator.kept[side] = known
    return known


def _over_columns(apply: Any, factor: Tensor, matrix: Tensor) -> Tensor:
    """`apply` to columns (*, g, n, m); the batch axes in front of a factor (g, n, n) become columns."""
    batch = matrix.shape[:-3]
    if factor.ndim > 3 or not batch:
        return apply(matrix)
    flat = matrix.reshape(-1, *matrix.shape[-3:]).movedim(0, -1)
    return apply(flat.flatten(-2)).reshape(flat.shape).movedim(-1, 0).reshape(matrix.shape)


def _each_side(operator: Kronecker, matrix: Tensor, on_diagonal: Any, on_full: Any) -> Tensor:
    """A function of the left factor applied to V, that of the right one to Vᵀ."""
    for side in ("left", "right"):
        factor: Tensor = getattr(operator, side)
        matrix = matrix if side == "left" else matrix.mT
        if is_diagonal(factor):
            matrix = on_diagonal(factor, matrix)
        else:
            known = _dense(operator, side)
            matrix = _over_columns(lambda columns, known=known: on_full(known, columns), factor, matrix)
        matrix = matrix if side == "left" else matrix.mT
    return matrix


@solved.register
def _(operator: Kronecker, b: Blocks, positive: bool) -> Blocks:
    def divided(factor: Tensor, matrix: Tensor) -> Tensor:
        check_diagonal(factor, positive)
        return matrix / factor

    if operator.dim == 0:
        return b
    x = _each_side(operator, operator.arranged(b), divided, lambda dense, columns: solve_columns(dense, columns, positive))
    return operator.arrangement.blocks(operator.layout, x)


@factor_product.register
def _(operator: Kronecker, z: Blocks, invert: bool) -> Blocks:
    def scaled_by(factor: Tensor, matrix: Tensor) -> Tensor:
        check_diagonal(factor, True)
        return matrix * factor ** (-0.5 if invert else 0.5)

    if operator.dim == 0:
        return z
    drawn = _each_side(operator, operator.arranged(z), scaled_by, lambda dense, columns: dense_factor(dense, columns, invert))
    return operator.arrangement.blocks(operator.layout, drawn)


def _remade(operator: Kronecker, left: Tensor, right: Tensor, definite: bool | None = None) -> Kronecker:
    definite = operator.definite if definite is None else definite
    return Kronecker(operator.layout, operator.arrangement, left, right, symmetric=operator.symmetric, definite=definite)


@inverted.register
def _(operator: Kronecker, positive: bool) -> LinearOperator:
    def of(side: str) -> Tensor:
        factor: Tensor = getattr(operator, side)
        if operator.dim == 0:
            return factor
        if is_diagonal(factor):
            check_diagonal(factor, positive)
            return 1 / factor
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand(factor.shape)
        found = solve_columns(_dense(operator, side), eye, positive)
        return 0.5 * (found + found.mT) if operator.symmetric else found

    return _remade(operator, of("left"), of("right"), operator.definite or positive)


@powered.register
def _(operator: Kronecker, p: float) -> LinearOperator:
    def of(factor: Tensor) -> Tensor:
        if is_diagonal(factor):
            return powers(factor, p, "diagonal factor")
        if not operator.symmetric:
            return torch.linalg.matrix_power(factor, int(p))
        raised = matrix_power(factor, p, "Kronecker factor")
        return 0.5 * (raised + raised.mT)

    if not operator.symmetric and not p.is_integer():
        raise GeometryError(
            f"the power {p:g} of a Kronecker product that is not symmetric was asked for. Roots of such matrices are not "
            "unique; take an integer power, or compute with the matrix: geoad.operators.to_dense(A)."
        )
    return _remade(operator, of(operator.left), of(operator.right))


@scaled.register
def _(operator: Kronecker, factor: float | Tensor, definite: bool) -> LinearOperator:
    factor = over_groups(factor) if isinstance(factor, Tensor) else factor
    return _remade(operator, factor * operator.left, operator.right, definite)


@transposed.register
def _(operator: Kronecker) -> LinearOperator:
    return _remade(operator, _transposed(operator.left), _transposed(operator.right))


@composed.register
def _(a: Kronecker, b: LinearOperator) -> LinearOperator | None:
    if not isinstance(b, Kronecker) or a.arrangement != b.arrangement:
        return None
    left, right = (x * y if is_diagonal(x) else x @ full(y) for x, y in ((a.left, b.left), (a.right, b.right)))
    return Kronecker(a.layout, a.arrangement, left, right, symmetric=False)


@slogdet.register
def _(operator: Kronecker) -> tuple[Tensor, Tensor]:
    _, units, inputs = operator.arrangement.sizes(operator.layout)
    sign = log = operator.like.new_zeros(())
    sign = sign + 1
    if operator.dim == 0:
        return sign, log
    for side, times in (("left", inputs), ("right", units)):
        factor: Tensor = getattr(operator, side)
        if is_diagonal(factor):
            numbers = factor.squeeze(-1)
            signs, logs = numbers.sign().prod(-1), numbers.abs().log().sum(-1)
        else:
            signs, logs = slogdet(_dense(operator, side))
        sign, log = sign * (signs**times).prod(-1), log + times * logs.sum(-1)
    return sign, log


@traced.register
def _(operator: Kronecker) -> Tensor:
    return (entries(operator.left).sum(-1) * entries(operator.right).sum(-1)).sum(-1)


@diagonal.register
def _(operator: Kronecker) -> Blocks:
    return operator.arrangement.blocks(operator.layout, outer(entries(operator.left), entries(operator.right)))


@spectrum.register
def _(operator: Kronecker) -> Tensor | None:
    def of(factor: Tensor) -> Tensor:
        if is_diagonal(factor):
            return factor.squeeze(-1)
        return symmetric_eigvals(factor) if operator.symmetric else torch.linalg.eigvals(factor)

    return outer(of(operator.left), of(operator.right)).flatten(-3)


@inner_product.register
def _(a: Kronecker, b: LinearOperator) -> Tensor | None:
    if not isinstance(b, Kronecker) or a.arrangement != b.arrangement:
        return None

    def of(x: Tensor, y: Tensor) -> Tensor:
        if is_diagonal(x) or is_diagonal(y):
            return (entries(x) * entries(y)).sum(-1)
        return (x * y).sum((-2, -1))

    return (of(a.left, b.left) * of(a.right, b.right)).sum(-1)


@to_dense.register
def _(operator: Kronecker) -> Tensor:
    blocks = torch.einsum("...ab,...cd->...acbd", full(operator.left), full(operator.right))
    return placed(blocks.flatten(-4, -3).flatten(-2), operator.arrangement, operator.layout)


def placed(blocks: Tensor, arrangement: Arrangement, layout: Layout) -> Tensor:
    """The (d, d) matrix with a block (*, g, o·i, o·i) for each group, in the raveled order of the layout."""
    matrix = blocks.new_zeros((*blocks.shape[:-3], layout.dim, layout.dim))
    for group, where in enumerate(arrangement.places(layout).flatten(1).to(blocks.device)):
        matrix[..., where.unsqueeze(-1), where] = blocks[..., group, :, :]
    return matrix


@batch_shape.register
def _(operator: Kronecker) -> torch.Size:
    return torch.broadcast_shapes(operator.left.shape[:-3], operator.right.shape[:-3])


def read_arrangement(state: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The entries of a saved state, with their arrangement."""
    return {**state, "arrangement": Arrangement(**state["arrangement"])}


READERS["kronecker"] = (Kronecker, read_arrangement)
