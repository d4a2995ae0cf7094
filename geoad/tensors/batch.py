"""The gate for batch axes: stacking, indexing, means, copies, comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.errors import BasePointError, VarianceError
from geoad.operators import numbers
from geoad.tensors import contraction
from geoad.tensors.base import HANDLERS, TypedTensor, describe, require_same_place
from geoad.tensors.densities import Density, LogDensity
from geoad.tensors.forms import Form
from geoad.tensors.general import dense_of
from geoad.tensors.rank1 import Rank1
from geoad.tensors.rank2 import Rank2
from geoad.tensors.refusals import on, refuse

__all__: list[str] = []


@on(torch.stack)
def _stack(tensors: Any, dim: int = 0) -> Any:
    first = tensors[0]
    contraction.require_typed(*tensors)
    for other in tensors[1:]:
        if type(other) is not type(first) or other.weight != first.weight or other.axes != first.axes:
            if other.type == first.type:
                require_same_place(first, other, "stack")
            raise VarianceError(
                f"cannot stack {describe(first)} and {describe(other)}: one batch holds one type. Stack like with like."
            )
        require_same_place(first, other, "stack")
    points, batch = len(first.at.batch_shape), len(first.batch_shape)
    if not points <= dim <= batch:
        raise VarianceError(
            f"typed objects stack along batch axes, behind those of the base point: dim={points} to {batch}, got "
            f"dim={dim}. Pass dim={points}."
        )
    if isinstance(first, Rank1):
        blocks = {name: torch.stack([each.blocks[name] for each in tensors], dim) for name in first.blocks}
        return type(first)(first.chart, blocks, first.at)
    if isinstance(first, Rank2):
        return _stack_rank2(tensors, dim)
    data = torch.stack([dense_of(each) for each in tensors], dim)
    return first.map_numbers(lambda _: data)


def _stack_rank2(tensors: Any, dim: int) -> Any:
    first = tensors[0]
    home = first.home if all(each.home == first.home for each in tensors) else first.chart
    operators = [each.op if each.home == home else each.operator_in(home) for each in tensors]
    for op in operators:
        ops.require_small(op, "stacking matrix-free objects")
    data = torch.stack([ops.to_dense(op) for op in operators], dim)
    symmetric, definite = (all(getattr(op, flag) for op in operators) for flag in ("symmetric", "definite"))
    op = ops.Dense(home.layout, data, symmetric=symmetric, definite=definite)
    return type(first)(first.chart, op, first.at, home=home, ups=first.ups)


def _over_batch(name: str, function: Callable[..., Tensor]) -> Callable[..., Any]:
    def reduce(tensor: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        if isinstance(tensor, (Density, LogDensity)) and tensor.batch_shape:
            return getattr(tensor, name)(dim)
        batch, points = len(tensor.batch_shape), len(tensor.at.batch_shape)
        dims = list(range(batch)) if dim is None else [dim] if isinstance(dim, int) else list(dim)
        if not batch or any(not 0 <= d < batch for d in dims):
            raise VarianceError(
                f"torch.{name} of a {describe(tensor)} over typed axes depends on the chart: components are not comparable. It "
                f"runs over batch axes only, dim=0 to {batch - 1}"
                + (" (this one has none)" if not batch else "")
                + ". For a size use G.norm(v); for numbers .components."
            )
        if any(d < points for d in dims):
            raise BasePointError(
                f"torch.{name} of a {describe(tensor)} over axis {min(dims)}, along which the base point varies: tangent "
                "spaces at different "
                "points are different spaces. Carry the elements to one point first: T.carry(to=p, chart=reference)."
            )
        return _batchwise(tensor, lambda block: function(block, dim=dims, keepdim=keepdim))

    return reduce


def _batchwise(tensor: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function of the batch axes to the numbers."""
    if isinstance(tensor, Rank2) and not isinstance(tensor.op, (ops.Dense, ops.Diagonal)):
        tensor = tensor.materialise()
    return tensor.map_numbers(fn)


on(torch.mean)(_over_batch("mean", torch.mean))
on(torch.sum)(_over_batch("sum", torch.sum))


@on(torch.prod)
def _prod(tensor: Any, dim: int | None = None) -> Any:
    return tensor.prod(dim) if isinstance(tensor, Density) else refuse(torch.prod, (tensor,))


def _getitem(tensor: Any, index: Any) -> Any:
    parts: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    batch, points = len(tensor.batch_shape), len(tensor.at.batch_shape)
    plain = [part for part in parts if not isinstance(part, Tensor)]
    used = sum(1 for part in parts if part is not None and part is not Ellipsis)
    masks = any(isinstance(part, Tensor) and part.ndim > 1 for part in parts)
    if used > batch or any(part is Ellipsis for part in plain) or masks:
        raise VarianceError(
            f"cannot index the typed axes of a {describe(tensor)} (it has {batch} batch axes): single components depend on the "
            "chart. Use .components."
        )
    if not points:
        return _batchwise(tensor, lambda block: block[index])
    if any(part is None for part in plain):
        raise BasePointError(
            f"a new axis in front of the batch of base points of a {describe(tensor)} would tear objects and points "
            "apart. Stack further "
            f"batch axes behind them: torch.stack([...], dim={points})."
        )
    if isinstance(tensor, Rank2) and not isinstance(tensor.op, (ops.Dense, ops.Diagonal)):
        tensor = tensor.materialise()
    return tensor.map_numbers(lambda block: block[index]).at_point(tensor.at[tuple(parts[:points])])


HANDLERS["getitem"] = _getitem
on(torch.clone)(lambda tensor, **_: tensor.clone())
on(torch.detach)(lambda tensor: tensor.detach())


@on(torch.zeros_like)
def _zeros_like(tensor: Any, **_: Any) -> Any:
    """Zero of the same type; of a `Metric` a `Form`, for zero is not positive."""
    if not isinstance(tensor, Rank2):
        return tensor.map_numbers(torch.zeros_like)
    zero = torch.zeros(tensor.batch_shape, dtype=tensor.dtype, device=tensor.device)
    cls = Form if isinstance(tensor, Form) else type(tensor)
    return cls(tensor.chart, ops.Multiple(tensor.home.layout, zero), tensor.at, home=tensor.home)


@on(torch.isfinite)
def _isfinite(tensor: Any, **_: Any) -> Tensor:
    """One flag for each element of the batch: are all numbers finite."""
    if isinstance(tensor, Rank2) and isinstance(tensor.op, ops.Multiple):
        return tensor.op.factor.isfinite().expand(tensor.batch_shape)
    if isinstance(tensor, Rank2) and isinstance(tensor.op, ops.Diagonal):
        return tensor.home.layout.ravel(tensor.op.entries).isfinite().all(-1).expand(tensor.batch_shape)
    if isinstance(tensor, Rank2) and numbers.is_plain(tensor.op) and not ops.batch_shape(tensor.op):
        flags = [leaf.isfinite().all() for leaf in numbers.flatten(tensor.op)[0]]
        return torch.stack(flags).all().expand(tensor.batch_shape)
    data = dense_of(tensor).isfinite()
    typed = len(tensor.axes)
    return data.flatten(-typed).all(-1) if typed else data


def _comparable(a: Any, b: Any) -> None:
    if not isinstance(a, TypedTensor) or not isinstance(b, TypedTensor) or a.type != b.type or a.weight != b.weight:
        raise VarianceError(f"cannot compare {describe(a)} with {describe(b)}: different types. Compare like with like.")
    require_same_place(a, b, "compare")


@on(torch.allclose)
def _allclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False) -> bool:
    """True if the components agree in the chart of both."""
    _comparable(a, b)
    return torch.allclose(dense_of(a), dense_of(b), rtol, atol, equal_nan)


@on(torch.equal)
def _equal(a: Any, b: Any) -> bool:
    """True if the components agree bit for bit in the chart of both."""
    _comparable(a, b)
    return torch.equal(dense_of(a), dense_of(b))
