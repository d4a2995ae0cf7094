"""The typing table for contractions: einsum, matmul and what they stand for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.charts import Point, same_manifold, same_point
from geoad.errors import BasePointError, ChartMismatchError, GeometryError, VarianceError
from geoad.params import insert_axes
from geoad.tensors.base import HANDLERS, Axis, TypedTensor, describe
from geoad.tensors.general import GeoTensor, build, dense_of
from geoad.tensors.pairing import pair
from geoad.tensors.rank1 import Rank1
from geoad.tensors.rank2 import Rank2

__all__ = ["contract", "einsum", "matmul", "require_typed"]


def require_typed(*operands: Any) -> None:
    """Raise if one of the operands is made of plain numbers."""
    for each in operands:
        if not isinstance(each, TypedTensor):
            others = " and ".join(describe(other) for other in operands)
            raise VarianceError(
                f"cannot contract {others}: plain numbers have no variance. Give them a type first: "
                "chart.vector(x, at=p), chart.covector(x, at=p), chart.form(m, at=p); or use .components."
            )


def matmul(a: Any, b: Any) -> Any:
    """Contract the last index of a with the first of b."""
    if isinstance(b, Rank1):
        if isinstance(a, Rank2):
            return a.mv(b)
        if isinstance(a, Rank1):
            if a.up == b.up:
                a(b)  # raises, with the remedy
            return pair(a, b)
        if isinstance(a, GeoTensor) and type(a) is not GeoTensor and (found := a.applied(b)) is not None:
            return found
        if isinstance(a, GeoTensor) and a.at is b.at and a.axes and a.axes[-1].pairs_with(b.axes[0]):
            flat = b.ravel()
            if flat.ndim == 1:
                return build(a.data @ flat, a.axes[:-1], a.at)
    elif isinstance(b, Rank2):
        if isinstance(a, Rank1):
            return b.mT.mv(a)
        if isinstance(a, Rank2) and same_manifold(a.chart, b.chart):
            return a.compose(b)
    elif isinstance(a, Rank1) and isinstance(b, GeoTensor) and type(b) is not GeoTensor:
        found = b.mT.applied(a)
        if found is not None:
            return found
    require_typed(a, b)
    x, y = len(a.axes), len(b.axes)
    if not x or not y:
        raise VarianceError(f"cannot contract {describe(a)} with {describe(b)}: a density has no index. Use *.")
    letters = [chr(ord("a") + i) for i in range(x + y - 1)]
    left, right = letters[:x], letters[x - 1 :]
    return contract([a, b], [left, right], [c for c in letters if c != letters[x - 1]])


_Parsed = tuple[list[list[str]], list[str]]
_parsed: dict[str, _Parsed] = {}


def _parse(equation: str) -> _Parsed:
    """(the letters of each operand, the letters of the output); remembered."""
    known = _parsed.get(equation)
    if known is not None:
        return known
    inputs, arrow, output = equation.replace(" ", "").replace("...", "").partition("->")
    terms = [list(term) for term in inputs.split(",")]
    if not arrow:
        counts = Counter(letter for term in terms for letter in term)
        output = "".join(sorted(letter for letter, count in counts.items() if count == 1))
    if len(_parsed) < 1024:
        _parsed[equation] = terms, list(output)
    return terms, list(output)


def einsum(equation: Any, *operands: Any) -> Any:
    """torch.einsum on typed operands: one letter for each typed axis, batch axes in front written or left out."""
    if not isinstance(equation, str):
        raise VarianceError("geoad's einsum takes the equation as a string, torch.einsum('ij,j->i', G, v).")
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    terms, output = _parse(equation)
    if len(terms) != len(operands):
        raise GeometryError(
            f"einsum '{equation}' names {len(terms)} operands, got {len(operands)}. Write one group of letters for each "
            "operand."
        )
    return contract(list(operands), terms, output)


def contract(operands: list[Any], indices: list[list[str]], output: list[str]) -> Any:
    """Sum over the letters that are not in `output`, under the typing rule for every index.

    A summed index must occur in exactly two typed axes, of opposite variance, in the same chart and at the same point. Matrix
    times vector is done without forming the matrix. Batch axes without a letter broadcast: those of the base point come first,
    further ones behind them.
    """
    operands, indices = _matrix_vector(operands, indices, output)
    if len(operands) == 1 and isinstance(operands[0], TypedTensor) and indices[0] == output:
        return operands[0]
    if len(operands) == 2 and not output and len(indices[0]) == 1 and indices[0] == indices[1]:
        a, b = operands
        if isinstance(a, Rank1) and isinstance(b, Rank1) and a.up != b.up:
            return pair(a, b)
    points = _base_points(operands)
    arrays, uses = _arrays(operands, indices)
    for letter, axes in uses.items():
        _check_index(letter, axes, letter in output, operands, indices)
    kept = [next((axis for axis in uses.get(letter, ()) if axis is not None), None) for letter in output]
    _require_small([axis for axis in kept if axis is not None])
    data = _broadcast_einsum(arrays, indices, output, max([0] + [len(at.batch_shape) for at in points]))
    leading = [axis is None for axis in kept]
    if leading != sorted(leading, reverse=True):
        raise VarianceError("einsum: batch axes must come before typed axes in the output. Reorder the letters behind '->'.")
    axes = [axis for axis in kept if axis is not None]
    if not points:
        return data
    own = (at for at in points if any(axis.chart == at.chart for axis in axes))
    return build(data, axes, next(own, points[0]))


def _arrays(operands: list[Any], indices: list[list[str]]) -> tuple[list[Tensor], dict[str, list[Axis | None]]]:
    """The dense numbers, and for every letter the axes that it names (None for batch and plain axes)."""
    arrays: list[Tensor] = []
    uses: dict[str, list[Axis | None]] = {}
    for operand, letters in zip(operands, indices, strict=True):
        axes = operand.axes if isinstance(operand, TypedTensor) else ()
        array = dense_of(operand) if isinstance(operand, TypedTensor) else torch.as_tensor(operand)
        if len(letters) not in (array.ndim, len(axes)) or len(letters) < len(axes):
            raise VarianceError(
                f"einsum: '{''.join(letters)}' names {len(letters)} axes of {describe(operand)}, which has {array.ndim} "
                f"({len(axes)} typed). Write one letter for each typed axis, and for all batch axes or none."
            )
        slots: list[Axis | None] = [None] * (len(letters) - len(axes)) + list(axes)
        for letter, axis in zip(letters, slots, strict=True):
            uses.setdefault(letter, []).append(axis)
        arrays.append(array)
    return arrays, uses


def _broadcast_einsum(arrays: list[Tensor], indices: list[list[str]], output: list[str], points: int) -> Tensor:
    """torch.einsum with the batch axes that have no letter: those of the base point in front, further ones as in torch."""
    batch = [array.ndim - len(letters) for array, letters in zip(arrays, indices, strict=True)]
    most = max(batch)
    if points and most:
        arrays = [insert_axes(a, points, most - n) if n else a for a, n in zip(arrays, batch, strict=True)]
    terms = [("..." if n else "") + "".join(letters) for n, letters in zip(batch, indices, strict=True)]
    front = "..." if most else ""
    # torch contracts from left to right: what leaves no index first, or u_i w_j v^j would pass through a d × d matrix
    if len(arrays) > 2:
        order = sorted(range(len(arrays)), key=lambda i: (sum(letter in output for letter in indices[i]), sorted(indices[i])))
        terms, arrays = [terms[i] for i in order], [arrays[i] for i in order]
    return torch.einsum(f"{','.join(terms)}->{front}{''.join(output)}", *arrays)


def _require_small(axes: list[Axis]) -> None:
    """Refuse a dense result that nobody could have meant."""
    entries = 1
    for axis in axes:
        entries *= axis.size
    if len(axes) > 1 and entries > ops.DENSE_LIMIT**2:
        raise GeometryError(
            f"the contraction leaves {entries} components ({' × '.join(str(axis.size) for axis in axes)}). Above "
            f"{ops.DENSE_LIMIT}² they are not made behind your back: contract with further vectors in the same call, "
            "einsum('i,j,j->i', u, w, v), or take the outer product of .ravel() if you have the memory."
        )


def _matrix_vector(operands: list[Any], indices: list[list[str]], output: list[str]) -> tuple[list[Any], list[list[str]]]:
    """Do the products G v and w G among the operands, without dense matrices."""
    for m, matrix in enumerate(operands):
        if not isinstance(matrix, Rank2) or len(indices[m]) != 2 or indices[m][0] == indices[m][1]:
            continue
        for n, vector in enumerate(operands):
            if not isinstance(vector, Rank1) or len(indices[n]) != 1:
                continue
            letter = indices[n][0]
            if letter not in indices[m] or letter in output or sum(letter in each for each in indices) != 2:
                continue
            axis = indices[m].index(letter)
            if vector.up == matrix.ups[axis]:
                continue  # the general check raises
            product = matrix.mv(vector) if axis else matrix.mT.mv(vector)
            rest = [i for i in range(len(operands)) if i not in (m, n)]
            remaining = [[indices[m][1 - axis]], *(indices[i] for i in rest)]
            return _matrix_vector([product, *(operands[i] for i in rest)], remaining, output)
    return operands, indices


def _base_points(operands: list[Any]) -> list[Point]:
    """The base points of the typed operands; those of one manifold must be the same."""
    points: list[Point] = []
    for operand in operands:
        if not isinstance(operand, TypedTensor):
            continue
        at = operand.at
        for other in points:
            if at is other or at.token is other.token:
                break
            if same_manifold(at.chart, other.chart):
                if not same_point(at.to(other.chart), other):
                    raise BasePointError(
                        f"cannot contract: {describe(operand)} lives at another point than the other operands. Tangent "
                        "spaces at different "
                        "points are different spaces. Say how to identify them: T.carry(to=p, chart=reference), or "
                        "geoad.parallel_transport."
                    )
                break
        if all(at.chart != other.chart for other in points):
            points.append(at)
    return points


def _check_index(letter: str, axes: list[Axis | None], kept: bool, operands: list[Any], indices: list[list[str]]) -> None:
    if not kept and len(axes) == 2 and axes[0] is not None and axes[1] is not None and axes[0].pairs_with(axes[1]):
        return
    typed = [axis for axis in axes if axis is not None]
    if not typed or (kept and len(axes) == 1):
        return
    owners = [describe(each) for each, letters in zip(operands, indices, strict=True) if letter in letters]
    where = f"index '{letter}' of {' and '.join(owners)}"
    if len(typed) != len(axes):
        raise VarianceError(
            f"{where} joins a typed axis with a plain or batch axis. Plain numbers have no variance; give them a type with "
            "chart.vector(x, at=p) or chart.covector(x, at=p)."
        )
    if kept:
        if len(typed) != 1:
            raise VarianceError(
                f"{where} is kept but occurs {len(typed)} times: an elementwise product or a diagonal depends on the "
                "chart. Sum "
                "over it, give the axes different letters, or use .components."
            )
        return
    if len(typed) != 2:
        raise VarianceError(
            f"{where} is summed but occurs {len(typed)} times: summing a single typed axis depends on the chart. Contract "
            "it with "
            "an axis of the opposite variance, or use .components."
        )
    if typed[0].chart != typed[1].chart:
        raise ChartMismatchError(
            f"{where} joins the axes {typed[0]} and {typed[1]} of different charts or spaces. A sum over both has no "
            "meaning; move one "
            "operand with .to(chart)."
        )
    raise VarianceError(
        f"{where} joins two {'upper' if typed[0].up else 'lower'} axes, {typed[0]} and {typed[1]}: their sum depends on "
        "the chart. "
        "Insert a metric? For vectors einsum('i,ij,j->', u, G, v); for covectors use G.inverse()."
    )


HANDLERS["matmul"] = matmul
