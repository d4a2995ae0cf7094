"""The sum or the mean over all processes of what each computed from its own data: values, differentials, products, matrices."""

from __future__ import annotations

import zlib
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from geoad import operators as ops
from geoad.charts import Point
from geoad.distributed.exchange import require_group
from geoad.errors import BasePointError, GeometryError, VarianceError
from geoad.params import first
from geoad.tensors import TypedTensor, describe
from geoad.tensors.rank2 import Rank2

__all__ = ["all_reduce", "require_same_point"]

T = TypeVar("T")


def all_reduce(thing: T, op: str = "mean", *, weight: float | None = None, group: Any = None) -> T:
    r"""The sum or the mean of `thing` over all processes, on every process.

    .. math:: \sum_r T_r, \qquad \frac{\sum_r w_r T_r}{\sum_r w_r}

    Typed tensors must live at the same point, in the same chart, on all processes; that is checked.

    Args:
        thing: a typed tensor with stored numbers (a `Covector`, a `Vector`, a dense or diagonal `Form` or `Metric`, ...), a
            plain tensor or a number. Of matrix-free objects the products are reduced: ``all_reduce(F(p).mv(v))``.
        op: "mean" or "sum".
        weight: the weight :math:`w_r` of this process in a mean, e.g. its number of samples. Default: the same for all.
        group: the process group. Default: all processes.

    Raises:
        BasePointError: the processes are at different points.
        VarianceError: `thing` is a point, or a matrix-free object.
        GeometryError: ``torch.distributed`` is not initialised, or `op` is not known.

    ``w = all_reduce(geoad.grad(L)(p), weight=len(x))`` is the differential of the loss over the data of all processes.
    """
    if op not in ("mean", "sum"):
        raise GeometryError(
            f"op={op!r} is not known: pass 'mean' or 'sum'. Other reductions of components depend on the chart."
        )
    if weight is not None and (op == "sum" or not weight >= 0):
        raise GeometryError(
            f"weight={weight} belongs to op='mean' and must not be negative, found op={op!r}. Scale the summands instead."
        )
    require_group()
    share = 1.0
    if op == "mean":
        mine = 1.0 if weight is None else float(weight)
        share = mine / float(_summed(torch.tensor(mine, dtype=torch.float64, device=_device_of(thing)), group))
    if isinstance(thing, TypedTensor):
        _require_numbers(thing)
        require_same_point(thing.at, group, f"reduce {describe(thing)}")
        return cast(T, thing.map_numbers(lambda numbers: _summed(numbers * share, group)))
    if isinstance(thing, Tensor):
        return cast(T, _summed(thing.detach() * share, group))
    if isinstance(thing, (int, float)) and not isinstance(thing, bool):
        return cast(T, float(_summed(torch.tensor(thing * share, dtype=torch.float64), group)))
    raise VarianceError(
        f"cannot reduce {describe(thing)} over processes: only typed tensors, plain tensors and numbers add up. Points do not; "
        "processes share one by loading the same state."
    )


def require_same_point(p: Point, group: Any = None, what: str = "combine what they computed") -> None:
    """Raise unless all processes are at the same point of the same chart, bit for bit.

    Raises:
        BasePointError: some process is elsewhere.
    """
    require_group()
    mine = _fingerprint(p)
    both = torch.stack([mine, -mine])
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    if not torch.equal(both[0], -both[1]):
        raise BasePointError(
            f"cannot {what}: the processes are not at the same point of chart '{p.chart.name}' (their components differ). "
            "Tangent spaces at different points are different spaces. Start all processes from the same state_dict and let all "
            "take the same steps."
        )


def _fingerprint(p: Point) -> Tensor:
    """Numbers that agree if the charts look alike and the components are the same bit for bit."""
    layout = p.chart.layout
    form = zlib.crc32(repr((p.chart.name, layout, first(p.blocks).dtype)).encode())
    bits = layout.ravel(p.blocks).detach().contiguous().view(torch.uint8).to(torch.int64)
    places = torch.arange(1, bits.numel() + 1, device=bits.device)
    return torch.stack([torch.tensor(form, device=bits.device), (bits.flatten() * (places % 1_000_003)).sum()])


def _require_numbers(tensor: TypedTensor) -> None:
    if isinstance(tensor, Rank2) and not isinstance(tensor.op, (ops.Dense, ops.Diagonal)):
        raise VarianceError(
            f"{describe(tensor)} is matrix-free: it holds no numbers that could be added up. Reduce its products, "
            "all_reduce(T.mv(v)), or ask for its matrix: representation='dense'."
        )


def _device_of(thing: Any) -> Any:
    return thing.device if isinstance(thing, (Tensor, TypedTensor)) else None


def _summed(numbers: Tensor, group: Any) -> Tensor:
    total = numbers.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
