"""Which structure of an operator survives a change of coordinates, and what it becomes.

A step between two charts is taken apart into the maps of its groups of blocks. Under it, for B ↦ J⁻ᵀ B J⁻¹ (and the laws of the
other variances):

=========================  ===================================================  =====================
structure                  maps                                                 becomes
=========================  ===================================================  =====================
low rank, without a base   any                                                  low rank
diagonal                   elementwise maps, signed permutations                diagonal
quasi-diagonal             elementwise maps                                     quasi-diagonal
block-diagonal             those that act within its groups                     block-diagonal
Kronecker                  W ↦ Q W P with b ↦ Q b for a joint bias              Kronecker
EKFAC                      the same                                             EKFAC, oblique bases
=========================  ===================================================  =====================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.charts import Chart, Point, path
from geoad.maps.affine import LayerAffine
from geoad.maps.base import Map
from geoad.maps.compose import Compose, Inverse
from geoad.maps.elementwise import Identity
from geoad.maps.orthogonal import Householder, Orthogonal
from geoad.maps.permutation import Permutation
from geoad.maps.rescale import Rescale
from geoad.maps.select import Blockwise
from geoad.operators import LinearOperator
from geoad.params import Blocks, Layout, map_blocks

__all__ = ["moved"]

Ups = tuple[bool, bool]


@dataclass(frozen=True)
class _Piece:
    """A map between some blocks of θ and some of ψ."""

    map: Map
    theta: tuple[str, ...]
    psi: tuple[str, ...]

    def restricted(self, names: set[str], along: bool) -> _Piece | None:
        """The part of the map on these blocks; None if it joins them with others."""
        here = self.theta if along else self.psi
        if set(here) <= names:
            return self
        if isinstance(self.map, (LayerAffine, Rescale)):  # they take every block by itself, under its own name
            kept = tuple(name for name in here if name in names)
            return _Piece(self.map, kept, kept)
        return None


@dataclass(frozen=True)
class _Step:
    """A step between two charts, or the part of it between some blocks: x and y are the coordinates θ and ψ of the point."""

    pieces: tuple[_Piece, ...]
    still: tuple[str, ...]
    x: Blocks
    y: Blocks
    here: Layout
    there: Layout
    along: bool

    def _each(self, method: str, v: Blocks) -> Blocks:
        result = {name: v[name] for name in self.still}
        for piece in self.pieces:
            own = piece.theta if self.along else piece.psi
            x, y = {name: self.x[name] for name in piece.theta}, {name: self.y[name] for name in piece.psi}
            result.update(getattr(piece.map, method)(x, y, {name: v[name] for name in own}))
        return {name: result[name] for name in self.there}

    def vector(self, v: Blocks) -> Blocks:
        """J v."""
        return self._each("push" if self.along else "push_inverse", v)

    def covector(self, w: Blocks) -> Blocks:
        """J⁻ᵀ w."""
        return self._each("pull_inverse" if self.along else "pull", w)

    def mover(self, up: bool) -> Callable[[Blocks], Blocks]:
        """How an index of this variance moves."""
        return self.vector if up else self.covector

    def part(self, names: Sequence[str]) -> _Step | None:
        """The step between these blocks and their images; None if it joins them with others."""
        wanted, pieces = set(names), list[_Piece]()
        for piece in self.pieces:
            if not wanted & set(piece.theta if self.along else piece.psi):
                continue
            found = piece.restricted(wanted, self.along)
            if found is None:
                return None
            pieces.append(found)
        still = tuple(name for name in self.still if name in wanted)
        there = [name for piece in pieces for name in (piece.psi if self.along else piece.theta)] + list(still)
        if not there:
            return None
        return replace(
            self, pieces=tuple(pieces), still=still, here=self.here.restrict(names), there=self.there.restrict(there)
        )

    @property
    def elementwise(self) -> bool:
        """The Jacobian is diagonal."""
        return all(piece.map.elementwise for piece in self.pieces)

    @property
    def monomial(self) -> bool:
        """The Jacobian has one entry in each row and column."""
        return all(piece.map.elementwise or piece.map.monomial for piece in self.pieces)


def _steps(bound: Map, x: Blocks, y: Blocks, along: bool) -> list[_Step]:
    """The steps of a bound map from θ = x to ψ = y, or back."""
    pieces = _pieces(bound)
    only = pieces[0].map if len(pieces) == 1 and set(pieces[0].theta) == set(bound.bound_layout()) else None
    if isinstance(only, Inverse):
        return _steps(only.original, y, x, not along)
    if isinstance(only, Compose):
        stations, found = [x], list[_Step]()
        maps = [cast(Map, step) for step in only.steps]
        for each in maps:
            stations.append(each.forward(stations[-1]))
        order = range(len(maps)) if along else reversed(range(len(maps)))
        for i in order:
            found += _steps(maps[i], stations[i], stations[i + 1], along)
        return found
    theta, psi = bound.bound_layout(), Layout(bound.image_shapes)
    touched = {name for piece in pieces for name in piece.theta}
    still = tuple(name for name in theta if name not in touched)
    here, there = (theta, psi) if along else (psi, theta)
    return [_Step(tuple(pieces), still, x, y, here, there, along)]


def _pieces(bound: Map) -> list[_Piece]:
    parts = [cast(Map, part) for part in bound.parts] if isinstance(bound, Blockwise) else [bound]
    return [_Piece(part, part.bound_layout().names, tuple(part.image_shapes)) for part in parts]


_STRUCTURED = (ops.Diagonal, ops.Multiple, ops.LowRank, ops.BlockDiagonal, ops.Kronecker, ops.EigenKronecker, ops.QuasiDiagonal)


def moved(op: LinearOperator, ups: Ups, at: Point, chart: Chart) -> LinearOperator | None:
    """The operator of the chart of `at` as one of `chart`, in closed form; None if its structure does not survive the way."""
    inside = op.operator if isinstance(op, ops.Inverse) else op
    if not isinstance(inside, (*_STRUCTURED, ops.Sum)) or at.batch_shape or ops.batch_shape(op):
        return None
    here = at
    result: LinearOperator | None = op
    for phi, along in path(at.chart, chart, at):
        if phi.map.law != "diffeomorphism":
            return None
        there = here.to(phi.target if along else phi.source)
        x, y = (here.blocks, there.blocks) if along else (there.blocks, here.blocks)
        for step in _steps(phi.map, x, y, along):
            result = None if result is None else _under(result, ups, step)
        here = there
    return result


def _under(op: LinearOperator, ups: Ups, step: _Step) -> LinearOperator | None:
    match op:
        case ops.Multiple() if ups[0] != ups[1] and op.layout == step.there:
            return op
        case ops.Multiple() | ops.Diagonal():
            return _diagonal(op, ups, step)
        case ops.LowRank():
            return _low_rank(op, ups, step)
        case ops.QuasiDiagonal():
            return _quasi_diagonal(op, ups, step)
        case ops.BlockDiagonal():
            return _block_diagonal(op, ups, step)
        case ops.Kronecker() | ops.EigenKronecker():
            return _kronecker(op, ups, step)
        case ops.Inverse():
            inside = _under(op.operator, (not ups[0], not ups[1]), step)
            return None if inside is None else ops.Inverse(inside, positive=op.positive)
        case ops.Sum():
            terms = [(factor, _under(term, ups, step)) for factor, term in op.terms]
            if any(term is None for _, term in terms):
                return None
            kept = [(factor, term) for factor, term in terms if term is not None]
            return ops.Sum(kept, definite=op.definite, symmetric=op.symmetric and ups[0] == ups[1])
        case _:
            return None


def _diagonal(op: ops.Multiple | ops.Diagonal, ups: Ups, step: _Step) -> LinearOperator | None:
    """Row i of a monomial J has one entry, so the diagonal of J D Jᵀ is (J d) ⊙ (J 1)."""
    if not step.monomial:
        return None
    if step.elementwise and ups[0] != ups[1]:
        return op
    entries = {name: block.clone() for name, block in ops.diagonal(op).items()}
    ones = map_blocks(torch.ones_like, entries)
    left, right = step.mover(ups[0])(entries), step.mover(ups[1])(ones)
    return ops.Diagonal(step.there, map_blocks(torch.mul, left, right), definite=op.definite)


def _low_rank(op: ops.LowRank, ups: Ups, step: _Step) -> LinearOperator | None:
    if ups[0] != ups[1]:
        return None
    base = None if op.base is None else _under(op.base, ups, step)
    if op.base is not None and base is None:
        return None
    factors = torch.func.vmap(step.mover(ups[0]))(op.factors)
    return ops.LowRank(step.there, factors, op.signs, base, definite=op.definite)


def _quasi_diagonal(op: ops.QuasiDiagonal, ups: Ups, step: _Step) -> LinearOperator | None:
    if ups[0] != ups[1] or not step.elementwise or step.here != step.there:
        return None
    ones = map_blocks(torch.ones_like, op.entries)
    scales = step.mover(ups[0])(ones)
    diagonal = ops.Diagonal(op.layout, scales)
    cross: dict[ops.Arrangement, Tensor] = {}
    for arrangement, terms in op.cross.items():
        weight, bias = cast(str, arrangement.weight), cast(str, arrangement.bias)
        unit = ops.QuasiDiagonal(op.layout, map_blocks(torch.zeros_like, ones), {arrangement: terms})
        only_bias = {name: block if name == bias else torch.zeros_like(block) for name, block in ones.items()}
        cross[arrangement] = diagonal.mv(unit.mv(diagonal.mv(only_bias)))[weight]
    entries = map_blocks(lambda entry, scale: entry * scale.square(), op.entries, scales)
    return ops.QuasiDiagonal(op.layout, entries, cross, definite=op.definite)


def _block_diagonal(op: ops.BlockDiagonal, ups: Ups, step: _Step) -> LinearOperator | None:
    parts: dict[tuple[str, ...], LinearOperator] = {}
    for group, part in op.parts.items():
        inside = step.part(group)
        if inside is None:
            return None
        found = _under(part, ups, inside)
        if found is None and part.dim > ops.DENSE_LIMIT and not ops.has_matrix(part):
            return None
        parts[inside.there.names] = _dense(part, ups, inside) if found is None else found
    if sorted(name for names in parts for name in names) != sorted(step.there.names):
        return None
    return ops.BlockDiagonal(step.there, parts)


def _dense(op: LinearOperator, ups: Ups, step: _Step) -> LinearOperator:
    """A part as a matrix, each index moved by its law."""
    matrix = ops.to_dense(op)
    for up in (ups[1], ups[0]):  # rows are vectors of the last index; then turned over for the first
        rows = torch.func.vmap(step.mover(up))(step.here.unravel(matrix))
        matrix = step.there.ravel(rows).mT
    congruence = ups[0] == ups[1]
    if congruence and op.symmetric:
        matrix = 0.5 * (matrix + matrix.mT)
    return ops.Dense(step.there, matrix, symmetric=op.symmetric and congruence, definite=op.definite and congruence)


# -- Kronecker products ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sides:
    """W ↦ A W B; None is the identity."""

    left: Tensor | None = None
    right: Tensor | None = None
    orthogonal: bool = True


def _kronecker(op: ops.Kronecker | ops.EigenKronecker, ups: Ups, step: _Step) -> LinearOperator | None:
    arrangement = op.arrangement
    if arrangement.groups > 1 or arrangement.transposed or step.here != step.there:
        return None
    sides = _sides(arrangement, step, op.like)
    if sides is None:
        return None
    # J = A ⊗ Bᵀ, and what it does to an index of each variance
    right = None if sides.right is None else sides.right.mT
    movers = {
        True: (sides.left, right),
        False: tuple(None if a is None else torch.linalg.inv(a).mT for a in (sides.left, right)),
    }
    if isinstance(op, ops.EigenKronecker):
        if ups[0] != ups[1]:
            return None
        bases = [_times(m, u) for m, u in zip(movers[ups[0]], (op.left_basis, op.right_basis), strict=True)]
        orthogonal = op.orthogonal and sides.orthogonal
        return ops.EigenKronecker(
            op.layout, arrangement, bases[0], bases[1], op.values, orthogonal=orthogonal, definite=op.definite
        )
    congruence = ups[0] == ups[1]
    factors = [
        _congruent(factor, m, n) for factor, m, n in zip((op.left, op.right), movers[ups[0]], movers[ups[1]], strict=True)
    ]
    return ops.Kronecker(
        op.layout,
        arrangement,
        factors[0],
        factors[1],
        symmetric=op.symmetric and congruence,
        definite=op.definite and congruence,
    )


def _times(mover: Tensor | None, basis: Tensor | None) -> Tensor | None:
    if mover is None:
        return basis
    return mover.unsqueeze(0) if basis is None else mover @ basis


def _congruent(factor: Tensor, first_index: Tensor | None, second: Tensor | None) -> Tensor:
    if first_index is None or second is None:
        return factor
    full = torch.diag_embed(factor.squeeze(-1)) if factor.shape[-1] == 1 else factor
    return first_index @ full @ second.mT


def _sides(arrangement: ops.Arrangement, step: _Step, like: Tensor) -> _Sides | None:
    """The step as W ↦ A W B on the arranged tensor; None if it is not of this kind, or not known to be."""
    if arrangement.weight is None:
        return _acting(step, cast(str, arrangement.bias), like)
    weight = _acting(step, arrangement.weight, like)
    if weight is None or arrangement.bias is None:
        return weight
    bias = _acting(step, arrangement.bias, like)
    if bias is None or not _alike(weight.left, bias.left) or bias.right is not None:
        return None
    right = None if weight.right is None else torch.block_diag(weight.right, torch.ones_like(weight.right[:1, :1]))
    return _Sides(weight.left, right, weight.orthogonal)


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a, b)


def _acting(step: _Step, name: str, like: Tensor) -> _Sides | None:
    """What the step does to one block, as (A, B)."""
    if name in step.still:
        return _Sides()
    piece = next(each for each in step.pieces if name in each.theta)
    shape = step.here[name]
    sides = _of_map(piece.map, name, shape, like)
    if sides is None or step.along:
        return sides
    left, right = (None if side is None else torch.linalg.inv(side) for side in (sides.left, sides.right))
    return _Sides(left, right, sides.orthogonal)


def _of_map(bound: Map, name: str, shape: torch.Size, like: Tensor) -> _Sides | None:
    """A and B of the maps that are of this kind."""
    rows = shape[0] if len(shape) else 1
    match bound:
        case Identity():
            return _Sides()
        case LayerAffine():
            left, right = (None if side is None else side.to(like) for side in bound.factors(name))
            return _Sides(left, right, False)
        case Orthogonal() | Householder() if bound.side != "all" or len(shape) <= 1:
            on_rows = bound.side == "right" and len(shape) > 1
            size = shape[1:].numel() if on_rows else max(1, shape.numel()) if len(shape) <= 1 else rows
            mixing = bound.mix(torch.eye(size, dtype=like.dtype, device=like.device), False)
            return _Sides(None, mixing.mT) if on_rows else _Sides(mixing, None)
        case Permutation() if len(shape) <= 1 or (bound.dim is not None and bound.dim % len(shape) == 0):
            eye = torch.eye(rows, dtype=like.dtype, device=like.device)
            order = bound.order.to(eye.device)
            signs: Any = getattr(bound, "signs", None)
            matrix = eye[order] if signs is None else eye[order] * signs.to(eye).unsqueeze(-1)
            return _Sides(matrix, None)
        case _:
            return None
