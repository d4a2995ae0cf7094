"""The sum or the mean over all processes of what each computed from its own data: values, differentials, products, matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from geoad import operators as ops
from geoad.charts import Point
from geoad.distributed.exchange import ProcessGroup
from geoad.errors import BasePointError, GeometryError, VarianceError
from geoad.kernels.spread import fingerprint
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
        ProcessError: the processes do not reduce the same thing. Raised in all of them.
        GeometryError: ``torch.distributed`` is not initialised, `op` is not known, or the weights add up to zero.

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
    processes = ProcessGroup(group)
    with processes.guarded("all_reduce"):
        numbers, build = _taken_apart(thing)
    forms = [(tuple(each.shape), str(each.dtype)) for each in numbers]
    call = f"all_reduce '{op}' of {_words(thing)} {forms}"
    processes.agree(call)
    if isinstance(thing, TypedTensor):
        _require_same(thing.at, processes, f"reduce {describe(thing)}")
    if op == "mean":
        share = _share(1.0 if weight is None else float(weight), processes, call)
        numbers = [share * each for each in numbers]
    return build(processes.sum(numbers, call))


def _words(thing: Any) -> str:
    return type(thing).__name__ if isinstance(thing, (Tensor, int, float)) else describe(thing)


def _share(mine: float, processes: ProcessGroup, call: str) -> float:
    """w_r / Σ w_r."""
    total = math.fsum(processes.gathered(mine, f"{call}, weights"))
    if not 0 < total < math.inf:
        raise GeometryError(
            f"the weights of all processes add up to {total:g}, so a mean is undefined. Pass numbers of samples."
        )
    return mine / total


def _taken_apart(thing: T) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], T]]:
    """The numbers that `thing` is made of, and what builds the same of others."""
    if isinstance(thing, TypedTensor):
        _require_numbers(thing)
        numbers: list[Tensor] = []
        thing.map_numbers(lambda each: numbers.append(each) or each)

        def build(others: Sequence[Tensor]) -> T:
            left = iter(others)
            return cast(T, thing.map_numbers(lambda _: next(left)))

        return numbers, build
    if isinstance(thing, Tensor):
        return [thing], lambda others: cast(T, others[0])
    if isinstance(thing, (int, float)) and not isinstance(thing, bool):
        number = torch.tensor(float(thing), dtype=torch.float64, device="cpu")
        return [number], lambda others: cast(T, float(others[0]))
    raise VarianceError(
        f"cannot reduce {describe(thing)} over processes: only typed tensors, plain tensors and numbers add up. Points do not; "
        "processes share one by loading the same state."
    )


def require_same_point(p: Point, group: Any = None, what: str = "combine what they computed") -> None:
    """Raise unless all processes are at the same point of the same chart, bit for bit.

    Raises:
        BasePointError: some process is elsewhere.
    """
    _require_same(p, ProcessGroup(group), what)


def _require_same(p: Point, processes: ProcessGroup, what: str) -> None:
    place = f"chart '{p.chart.name}', {list(p.chart.layout.items())}, point {fingerprint(p.blocks)}"
    if not processes.alike(place, what):
        raise BasePointError(
            f"cannot {what}: the processes are not at the same point of chart '{p.chart.name}' (their components differ). "
            "Tangent spaces at different points are different spaces. Start all processes from the same state_dict and let all "
            "take the same steps."
        )


def _require_numbers(tensor: TypedTensor) -> None:
    if isinstance(tensor, Rank2) and not isinstance(tensor.op, (ops.Dense, ops.Diagonal)):
        raise VarianceError(
            f"{describe(tensor)} is matrix-free: it holds no numbers that could be added up. Reduce its products, "
            "all_reduce(T.mv(v)), or ask for its matrix: representation='dense'."
        )
