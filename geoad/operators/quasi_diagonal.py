"""Diagonals with the cross terms between each unit's bias and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from geoad.errors import GeometryError, SingularMetricError, StructureNotPreservedError
from geoad.operators.algebra import added, diagonal_of, scaled, to_dense
from geoad.operators.arrangement import Arrangement
from geoad.operators.base import Diagonal, LinearOperator, Multiple
from geoad.operators.determinant import slogdet
from geoad.operators.eigen import traced
from geoad.operators.inner import diagonal, inner_product
from geoad.operators.numbers import READERS, batch_shape
from geoad.operators.power import powered
from geoad.operators.sample import factor_product
from geoad.operators.solve import NOT_POSITIVE, solved
from geoad.params import Blocks, Layout, add, first, insert_axes, is_wrapped, map_blocks, scale

__all__ = ["QuasiDiagonal"]


class QuasiDiagonal(LinearOperator):
    r"""A diagonal, and for each unit the entries that couple its bias to its weights (Ollivier 2015, section 2.3).

    For a unit with weights w and bias b the matrix is an arrow, :math:`\begin{pmatrix} \operatorname{diag}(d_w) & c \\
    c^\top & d_b \end{pmatrix}`, regular iff :math:`d_w` and the Schur complement :math:`d_b - \sum c^2 / d_w` are nonzero,
    positive definite iff they are positive.

    Args:
        layout: names and shapes of the blocks.
        entries: the diagonal.
        cross: c, in the shape of the weight, by the `Arrangement` that joins a weight and its bias, or by the pair of their
            names.
        definite: the operator is known to be positive definite.

    >>> import torch
    >>> layout = Layout({"w": (1, 2), "b": (1,)})
    >>> entries = {"w": torch.full((1, 2), 2.0), "b": torch.tensor([3.0])}
    >>> A = QuasiDiagonal(layout, entries, {("w", "b"): torch.ones(1, 2)})
    >>> A.mv({"w": torch.zeros(1, 2), "b": torch.ones(1)})
    {'w': tensor([[1., 1.]]), 'b': tensor([3.])}
    """

    made_of = ("entries", "terms")
    said = ("arrangements", "definite")
    materialised = True
    structured = True
    symmetric = True

    def __init__(
        self,
        layout: Layout,
        entries: Blocks,
        cross: Mapping[Arrangement, Tensor] | Mapping[tuple[str, str], Tensor],
        *,
        definite: bool = False,
    ) -> None:
        pairs = {Arrangement(*key) if isinstance(key, tuple) else key: block for key, block in cross.items()}
        taken: list[str] = []
        for arrangement, block in pairs.items():
            arrangement.check(layout)
            if len(arrangement.names) < 2 or set(arrangement.names) & set(taken):
                raise GeometryError(
                    f"the cross terms {arrangement} were given to a QuasiDiagonal operator that has those of {taken} "
                    "already. A pair is one weight and its bias, and each block is in one pair at most."
                )
            taken.extend(arrangement.names)
            shape = layout[cast(str, arrangement.weight)]
            if block.shape[block.ndim - len(shape) :] != shape:
                raise GeometryError(
                    f"the cross terms of the weight '{arrangement.weight}' have shape {tuple(block.shape)}, but there is one "
                    f"for each weight. Pass a tensor of shape {tuple(shape)}."
                )
        self.layout = layout
        self.entries = layout.check(entries, "the diagonal of a QuasiDiagonal operator")
        self.cross = pairs
        self.definite = definite

    @property
    def arrangements(self) -> tuple[Arrangement, ...]:
        """The pairs of weight and bias."""
        return tuple(self.cross)

    @property
    def terms(self) -> list[Tensor]:
        """The cross terms, one tensor for each pair."""
        return list(self.cross.values())

    @classmethod
    def remade(cls, layout: Layout, held: Mapping[str, Any], said: Mapping[str, Any]) -> QuasiDiagonal:
        cross = dict(zip(said["arrangements"], held["terms"], strict=True))
        return cls(layout, held["entries"], cross, definite=said["definite"])

    @property
    def like(self) -> Tensor:
        return first(self.entries)

    def mv(self, v: Blocks) -> Blocks:
        result = map_blocks(torch.mul, self.entries, v)
        for arrangement, cross in self.cross.items():
            weight, bias = cast(str, arrangement.weight), cast(str, arrangement.bias)
            result[weight] = result[weight] + _spread(self.layout, arrangement, cross, v[bias])
            result[bias] = result[bias] + _gathered(self.layout, arrangement, cross * v[weight])
        return result

    def rmv(self, w: Blocks) -> Blocks:
        return self.mv(w)


def _spread(layout: Layout, arrangement: Arrangement, cross: Tensor, bias: Tensor) -> Tensor:
    """c · b, a weight, for numbers b of the units."""
    rows = arrangement.rows(layout, cross)
    units = bias.reshape(*bias.shape[:-1], *rows.shape[-3:-1], 1)
    return arrangement.block(layout, rows * units)


def _gathered(layout: Layout, arrangement: Arrangement, weight: Tensor) -> Tensor:
    """The sums over each unit's weights, in the shape of the bias."""
    return arrangement.rows(layout, weight).sum(-1).flatten(-2)


class _Arrow(NamedTuple):
    """An arrow matrix for each unit: c / d_w in the shape of the weight, and the Schur complement of the bias."""

    arrangement: Arrangement
    ratio: Tensor
    schur: Tensor

    @property
    def names(self) -> tuple[str, str]:
        return cast(str, self.arrangement.weight), cast(str, self.arrangement.bias)


def _arrows(operator: QuasiDiagonal, positive: bool, check: bool = True) -> list[_Arrow]:
    layout, arrows = operator.layout, list[_Arrow]()
    if check:
        biases = {arrangement.bias for arrangement in operator.cross}
        for name, block in operator.entries.items():
            if name not in biases:
                _require_regular(block, positive, f"an entry of its diagonal, of block '{name}',")
    for arrangement, cross in operator.cross.items():
        weight, bias = cast(str, arrangement.weight), cast(str, arrangement.bias)
        ratio = cross / operator.entries[weight]
        schur = operator.entries[bias] - _gathered(layout, arrangement, ratio * cross)
        if check:
            size = operator.entries[bias].detach().abs()
            floor = 4 * torch.finfo(schur.dtype).eps * size
            _require_regular(schur, positive, f"the Schur complement of a unit of '{bias}'", floor)
        arrows.append(_Arrow(arrangement, ratio, schur))
    return arrows


def _require_regular(numbers: Tensor, positive: bool, what: str, floor: float | Tensor = 0.0) -> None:
    if is_wrapped({"": numbers}):
        return
    given = numbers.detach()
    good = given > floor if positive else given.abs() > floor
    if not bool(good.all()):
        worst = float(given.min() if positive else given.abs().min())
        raise SingularMetricError(NOT_POSITIVE.format(what="quasi-diagonal operator", detail=f" ({what} is {worst:.3g})"))


@solved.register
def _(operator: QuasiDiagonal, b: Blocks, positive: bool) -> Blocks:
    arrows, layout = _arrows(operator, positive), operator.layout
    paired = {name for arrow in arrows for name in arrow.names}
    x = {name: block if name in paired else block / operator.entries[name] for name, block in b.items()}
    for arrow in arrows:
        weight, bias = arrow.names
        x[bias] = (b[bias] - _gathered(layout, arrow.arrangement, arrow.ratio * b[weight])) / arrow.schur
        x[weight] = b[weight] / operator.entries[weight] - _spread(layout, arrow.arrangement, arrow.ratio, x[bias])
    return x


@factor_product.register
def _(operator: QuasiDiagonal, z: Blocks, invert: bool) -> Blocks:
    """By the Cholesky factor of each arrow, with the bias as the last row."""
    arrows, layout = _arrows(operator, True), operator.layout
    biases = {arrow.names[1] for arrow in arrows}
    p = -0.5 if invert else 0.5
    x = {name: block if name in biases else block * operator.entries[name] ** p for name, block in z.items()}
    for arrow in arrows:
        weight, bias = arrow.names
        own = z[bias] * arrow.schur**p
        if invert:
            x[bias] = own
            x[weight] = x[weight] - _spread(layout, arrow.arrangement, arrow.ratio, own)
        else:
            x[bias] = own + _gathered(layout, arrow.arrangement, arrow.ratio * x[weight])
    return x


@slogdet.register
def _(operator: QuasiDiagonal) -> tuple[Tensor, Tensor]:
    zero = any(bool((operator.entries[cast(str, a.weight)] == 0).any()) for a in operator.cross) if _seen(operator) else False
    if zero:
        return _slogdet_with_zeros(operator)
    arrows = {arrow.names[1]: arrow.schur for arrow in _arrows(operator, False, check=False)}
    flat = operator.layout.ravel({name: arrows.get(name, block) for name, block in operator.entries.items()})
    return flat.sign().prod(-1), flat.abs().log().sum(-1)


def _seen(operator: QuasiDiagonal) -> bool:
    return not is_wrapped(operator.entries)


def _slogdet_with_zeros(operator: QuasiDiagonal) -> tuple[Tensor, Tensor]:
    """det of an arrow = Π d_w · d_b - Σ_j c_j² Π_{k≠j} d_k, which needs no division."""
    biases = {cast(str, arrangement.bias) for arrangement in operator.cross}
    plain = [name for name in operator.layout.names if name not in biases]
    weights = {cast(str, arrangement.weight) for arrangement in operator.cross}
    sign, log = operator.like.new_ones(()), operator.like.new_zeros(())
    for name in plain:
        if name not in weights:
            sign = sign * operator.entries[name].sign().prod()
            log = log + operator.entries[name].abs().log().sum()
    for arrangement, cross in operator.cross.items():
        weight, bias = cast(str, arrangement.weight), cast(str, arrangement.bias)
        d, c = (arrangement.rows(operator.layout, x).flatten(0, 1) for x in (operator.entries[weight], cross))
        zeros = (d == 0).sum(-1)
        rest = torch.where(d == 0, torch.ones_like(d), d)
        schur = operator.entries[bias].flatten() - (c.square() / rest).sum(-1)
        lone = -torch.where(d == 0, c.square(), torch.zeros_like(c)).sum(-1)  # with one zero only its own term is left
        head = torch.where(zeros == 0, schur, torch.where(zeros == 1, lone, torch.zeros_like(lone)))
        sign = sign * (rest.sign().prod(-1) * head.sign()).prod()
        log = log + rest.abs().log().sum() + head.abs().log().sum()
    return sign, log


@added.register
def _(a: QuasiDiagonal, b: LinearOperator, definite: bool) -> LinearOperator | None:
    if isinstance(b, (Multiple, Diagonal)):
        return QuasiDiagonal(a.layout, add(a.entries, diagonal_of(b)), a.cross, definite=definite)
    if not isinstance(b, QuasiDiagonal):
        return None
    cross = dict(a.cross)
    taken = {name: arrangement for arrangement in cross for name in arrangement.names}
    for arrangement, terms in b.cross.items():
        if any(taken.get(name, arrangement) != arrangement for name in arrangement.names):
            return None
        cross[arrangement] = cross[arrangement] + terms if arrangement in cross else terms
    return QuasiDiagonal(a.layout, add(a.entries, b.entries), cross, definite=definite)


@scaled.register
def _(operator: QuasiDiagonal, factor: float | Tensor, definite: bool) -> LinearOperator:
    layout = operator.layout
    if isinstance(factor, Tensor) and factor.ndim:
        given = factor
        entries = {n: insert_axes(given, given.ndim, len(layout[n])) * block for n, block in operator.entries.items()}
        cross = {a: insert_axes(given, given.ndim, len(layout[cast(str, a.weight)])) * c for a, c in operator.cross.items()}
    else:
        entries, cross = scale(factor, operator.entries), {a: factor * c for a, c in operator.cross.items()}
    return QuasiDiagonal(layout, entries, cross, definite=definite)


@powered.register
def _(operator: QuasiDiagonal, p: float) -> LinearOperator:
    raise StructureNotPreservedError(
        f"the power {p:g} of a quasi-diagonal operator was asked for: powers of arrow matrices are full for each unit, so "
        "it has no efficient form. Solves, inverses, samples and determinants have; for powers use "
        "representation='block_diagonal', or the matrix, geoad.operators.power(geoad.operators.densify(A), p)."
    )


@traced.register
def _(operator: QuasiDiagonal) -> Tensor:
    return operator.layout.ravel(operator.entries).sum(-1)


@diagonal.register
def _(operator: QuasiDiagonal) -> Blocks:
    return operator.entries


@inner_product.register
def _(a: QuasiDiagonal, b: LinearOperator) -> Tensor | None:
    if not isinstance(b, QuasiDiagonal):
        return None
    ravel = a.layout.ravel
    total = (ravel(a.entries) * ravel(b.entries)).sum(-1)
    for arrangement, terms in a.cross.items():
        if arrangement in b.cross:
            total = total + 2 * arrangement.rows(a.layout, terms * b.cross[arrangement]).sum((-3, -2, -1))
        elif any(set(arrangement.names) & set(other.names) for other in b.cross):
            return None
    return total


@to_dense.register
def _(operator: QuasiDiagonal) -> Tensor:
    layout = operator.layout
    matrix = torch.diag_embed(layout.ravel(operator.entries))
    numbers = layout.unravel(torch.arange(layout.dim, device=matrix.device))
    for arrangement, cross in operator.cross.items():
        weight, bias = cast(str, arrangement.weight), cast(str, arrangement.bias)
        rows = arrangement.rows(layout, numbers[weight]).flatten()
        ones = torch.ones_like(numbers[weight])
        columns = arrangement.rows(layout, _spread(layout, arrangement, ones, numbers[bias])).flatten()
        terms = arrangement.rows(layout, cross).flatten(-3)
        matrix[..., rows, columns] = terms
        matrix[..., columns, rows] = terms
    return matrix


@batch_shape.register
def _(operator: QuasiDiagonal) -> torch.Size:
    return operator.layout.batch_shape(operator.entries)


def _read(state: dict[str, Any], layout: Layout) -> dict[str, Any]:
    arrangements = tuple(Arrangement(**each) for each in state["arrangements"])
    return {**state, "entries": {name: state["entries"][name] for name in layout.names}, "arrangements": arrangements}


READERS["quasidiagonal"] = (QuasiDiagonal, _read)
