"""A curvature matrix at a point in one of the stored representations, from the rows of all samples."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import singledispatch
from typing import TYPE_CHECKING

from torch import Tensor

from geoad import operators as ops
from geoad.charts import Chart, Point, path
from geoad.curvature.collect import Collector, Task
from geoad.curvature.collect_kron import collectors
from geoad.curvature.combine import combine, described
from geoad.curvature.compiled import Chunks
from geoad.curvature.likelihoods.roots import Seeds
from geoad.curvature.representations import KFAC, BlockDiagonal, LowRank, Mixed, QuasiDiagonal, Representation
from geoad.curvature.resume import Journal, journal, resuming
from geoad.curvature.sweep import Plans, sweep
from geoad.errors import GeometryError, StructureNotPreservedError
from geoad.kernels.conditions import together
from geoad.kernels.finite import all_finite
from geoad.kernels.ladder import at_top_level
from geoad.kernels.spread import digest
from geoad.operators import LinearOperator, numbers
from geoad.params import Blocks, first, is_wrapped
from geoad.tensors.layerwise import moved

if TYPE_CHECKING:
    from geoad.curvature.network import NetworkCurvature

__all__ = ["build", "less_mean", "require_chart"]


def build(field: NetworkCurvature, x: Blocks, structure: Representation) -> LinearOperator:
    """The value of `field` at `x` in a stored representation.

    Raises:
        GeometryError: the result does not fit into the memory of the machine, or the parameters are of several dtypes.
    """
    _require_one_dtype(x)
    if field.way is not None and any(isinstance(each, KFAC) for each in _inside(structure)):
        return _layers_of_another_chart(field, field.way(x), structure)
    layout = field.home.layout
    layered = any(isinstance(each, _LAYERED) for each in _inside(structure))
    plans = Plans(field.outputs, x, tried=layered)  # other representations do not depend on what there are layers of
    exchange = field.exchange
    call = "" if exchange is None and not resuming() else described(field, structure, x)
    rank, size = (0, 1) if exchange is None else (exchange.rank, exchange.size)
    with field.guarded(call):
        plan = plans.of(field.some_inputs())
        log = journal(f"{call}, max_memory={field.max_memory}", first(x).device, rank, size)
        found = collectors(structure, layout, Task(x, plan, not field.signed, field.max_memory, again=log is not None))
    if exchange is not None:
        exchange.agree(f"{call}, layers {digest(str(sorted(plan.coverage().items()))):x}")
    waiting = found
    for stage in range(max(each.stages for each in found)):
        if waiting:
            with field.guarded(call):
                _pass(field, plans, waiting, log, field.chunks if structure is field.structure else None)
        active = [each for each in found if each.stages > stage]
        if exchange is not None:
            combine(active, exchange, call)
        _require_finite(field, x, [told for each in active for told in each.telling()])
        waiting = [each for each in active if not each.finished()]
    if log is not None:
        log.finish()
    parts: dict[tuple[str, ...], LinearOperator] = {}
    for each in found:
        parts |= each.parts()
    single = set(parts) == {layout.names} and not isinstance(structure, (BlockDiagonal, KFAC, Mixed))
    result = parts[layout.names] if single else ops.BlockDiagonal(layout, parts)
    # Σ r rᵀ is finite if its diagonal is; a sum that overflows is looked at once more
    _require_finite(field, x, [ops.trace(result)], numbers.flatten(result)[0])
    return result


def _require_finite(field: NetworkCurvature, x: Blocks, telling: list[Tensor], all_of_it: Sequence[Tensor] = ()) -> None:
    """Refuse what is not finite, as the same numbers in all processes tell."""
    readable = bool(telling) and at_top_level() and not is_wrapped(x)
    if readable and not bool(all_finite(telling)) and not (all_of_it and bool(all_finite(all_of_it))):
        field.refuse_spoilt(x)


def _pass(field: NetworkCurvature, plans: Plans, waiting: list[Collector], log: Journal | None, chunks: Chunks | None) -> None:
    """One pass over the data of this process; what is checked of them is looked at once, at the end."""

    def go(consumers: list[Collector], log: Journal | None, progress: bool) -> None:
        page = None if log is None else log.page(consumers)
        sweep(
            plans,
            field.swept(plans.x, page, plans),
            lambda f, y: _inspected(field, plans.x, f, y),
            consumers,
            max_memory=field.max_memory,
            progress=progress,
            total=field.batches.own if progress else None,
            page=page,
            compiled=chunks.at(field, plans.x) if chunks is not None and consumers else None,
        )
        if log is not None and page is not None:
            log.turn(page)

    together(lambda: go(waiting, log, field.progress), again=lambda: go([], None, False))


def _inspected(field: NetworkCurvature, x: Blocks, outputs: Tensor, labels: object) -> Seeds:
    field.inspect(outputs, x)
    return field.weighted_seeds(outputs, labels)


def _require_one_dtype(x: Blocks) -> None:
    kinds = sorted({str(block.dtype) for block in x.values()})
    if len(kinds) > 1:
        raise GeometryError(
            f"the parameters are {' and '.join(kinds)}; a matrix over all of them has one dtype, and which one geoad cannot "
            "know. Convert the network (geo.to(torch.float64)), or use products alone: representation='implicit'."
        )


_LAYERED = (KFAC, QuasiDiagonal)
"""Representations that are made of the inputs and outputs of layers."""


# -- charts ------------------------------------------------------------------------------------------------------------------


def require_chart(structure: Representation, home: Chart) -> None:
    """Raise where the structure of layers is asked for in coordinates that have no layers."""
    wanted = [each for each in _inside(structure) if isinstance(each, _LAYERED)]
    if not wanted or home == home.reference:
        return
    lengths = (each for each in _inside(structure) if isinstance(each, LowRank) and each.rank is not None)
    linear = all(phi.map.linear and phi.map.law == "diffeomorphism" for phi, _ in path(home.reference, home))
    if not linear or any(isinstance(each, QuasiDiagonal) for each in wanted) or any(lengths):
        raise _no_layers(wanted[0], home)


def _no_layers(structure: Representation, home: Chart) -> StructureNotPreservedError:
    return StructureNotPreservedError(
        f"{structure} was asked for with chart='{home.name}': it is made of the inputs and outputs of layers, which are those "
        "of the reference chart, and of its images under W ↦ QWP with b ↦ Qb (for EKFAC with orthogonal Q and P). Leave chart= "
        f"out and look at the value there (F(p) at a point of '{home.name}'), or build 'diagonal', 'block_diagonal' or "
        f"'low_rank' in '{home.name}'."
    )


def _layers_of_another_chart(field: NetworkCurvature, theta: Blocks, structure: Representation) -> LinearOperator:
    """The value in a chart where layers are layers: their inputs and outputs there give the moved Kronecker factors."""
    twin, reference = copy.copy(field), field.home.reference
    twin.home, twin.way = reference, None
    made = build(twin, theta, structure)
    found = moved(made, (False, False), Point(reference, theta), field.home)
    if not (isinstance(made, ops.BlockDiagonal) and isinstance(found, ops.BlockDiagonal)):
        raise _no_layers(structure, field.home)
    for names, part in made.parts.items():
        there = found.parts.get(names)
        oblique = isinstance(there, ops.EigenKronecker) and not there.orthogonal
        if type(there) is not type(part) or oblique:
            raise _no_layers(structure, field.home)
    return found


def _inside(structure: Representation) -> list[Representation]:
    return [inner for _, inner in structure.parts] if isinstance(structure, Mixed) else [structure]


# -- covariances -------------------------------------------------------------------------------------------------------------


@singledispatch
def less_mean(op: LinearOperator, mean: Blocks, factor: float) -> LinearOperator:
    """op - factor · m mᵀ in the structure of `op`."""
    column = {name: factor**0.5 * block.unsqueeze(0) for name, block in mean.items()}
    one = next(iter(mean.values())).new_ones(1)
    return ops.plus(op, ops.LowRank(op.layout, column, signs=-one))


@less_mean.register
def _dense(op: ops.Dense, mean: Blocks, factor: float) -> LinearOperator:
    m = op.layout.ravel(mean)
    return ops.Dense(op.layout, op.matrix.addr(m, m, alpha=-factor), symmetric=True)


@less_mean.register
def _diagonal(op: ops.Diagonal, mean: Blocks, factor: float) -> LinearOperator:
    return ops.Diagonal(op.layout, {name: e - factor * mean[name].square() for name, e in op.entries.items()})


@less_mean.register
def _blockdiagonal(op: ops.BlockDiagonal, mean: Blocks, factor: float) -> LinearOperator:
    parts = {names: less_mean(part, {name: mean[name] for name in names}, factor) for names, part in op.parts.items()}
    return ops.BlockDiagonal(op.layout, parts)


@less_mean.register
def _quasidiagonal(op: ops.QuasiDiagonal, mean: Blocks, factor: float) -> LinearOperator:
    entries = {name: e - factor * mean[name].square() for name, e in op.entries.items()}
    cross = {key: c - factor * _coupled(op, key, mean) for key, c in op.cross.items()}
    return ops.QuasiDiagonal(op.layout, entries, cross)


def _coupled(op: ops.QuasiDiagonal, key: ops.Arrangement, mean: Blocks) -> Tensor:
    """m_w m_b for each weight."""
    assert key.weight is not None and key.bias is not None
    rows = key.rows(op.layout, mean[key.weight])
    return key.block(op.layout, rows * mean[key.bias].reshape(*rows.shape[:2], 1))


@less_mean.register
def _eigenkronecker(op: ops.EigenKronecker, mean: Blocks, factor: float) -> LinearOperator:
    turned = op.rotated(mean)
    return op.with_values(op.values - factor * turned.square(), False)


@less_mean.register
def _kronecker(op: ops.Kronecker, mean: Blocks, factor: float) -> LinearOperator:
    raise StructureNotPreservedError(
        "the covariance of the gradients has no Kronecker factors: what is taken from the second moment is no product. Use "
        "representation='ekfac', 'block_diagonal' or 'diagonal', or kind='empirical'."
    )
