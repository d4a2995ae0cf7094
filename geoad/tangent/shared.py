"""Rows of a tangent kernel over data that are shared out among processes."""

from __future__ import annotations

import torch
from torch import Tensor

from geoad.distributed import Shard
from geoad.distributed.exchange import ProcessGroup
from geoad.distributed.rows import Forms, forms_of, in_turn
from geoad.kernels.kernel_gram import gram
from geoad.kernels.memory import require_memory
from geoad.kernels.spread import fingerprint
from geoad.params import Blocks, first
from geoad.tangent.data import Chunk, Data, Form, chunks
from geoad.tangent.dense import Request

__all__ = ["shared_rows"]


def shared_rows(request: Request, theta: Blocks) -> tuple[slice, Tensor]:
    """(samples, their rows of K) for the samples of this process, and the samples of all processes as columns.

    The inputs and backward signals of the layers go round, one chunk at a time, never Jacobians. The columns, and the place of
    the rows, are in the order of the processes.
    """
    columns = request.right.batches
    assert isinstance(columns, Shard)
    processes = columns.processes
    call = f"tangent kernel (contract='{request.contract}') over {columns.described()} at the point {fingerprint(theta)}"
    processes.agree(call)
    sides, forms = _sides(request, theta, processes, call)
    with processes.guarded(call):
        total = _empty(request, theta, sides[0], forms)
    start = 0
    for theirs in in_turn([chunk.plain for chunk in sides[1]], forms, processes, call):
        place, low = slice(start, start + theirs.samples), 0
        with processes.guarded(call):
            for chunk in sides[0]:
                rows = slice(low, low + chunk.dual.samples)
                gram(total[:, rows, place] if total.ndim == 3 else total[rows, :, place], chunk.dual, theirs)
                low = rows.stop
        start = place.stop
    shaped = total if total.ndim == 3 or request.contract == "none" else total[:, 0, :, 0]
    return _place(request.left), shaped.to(first(theta).dtype)


def _place(data: Data) -> slice:
    """Where the samples of this process lie among those of all."""
    batches = data.batches
    start = sum(batches.sizes[: batches.processes.rank]) if isinstance(batches, Shard) else 0
    return slice(start, start + batches.own)


def _sides(request: Request, theta: Blocks, processes: ProcessGroup, call: str) -> tuple[tuple[list[Chunk], ...], Forms]:
    """The chunks of rows and of columns, and what the other processes have for columns."""
    for structured in (True, False):
        form = Form(request.groups, request.contract, structured, request.max_memory // 4)
        with processes.guarded(call):
            right = list(chunks(request.right, theta, form, 0, request.left.batches.total))
            left = right if request.symmetric else list(chunks(request.left, theta, form, 0, request.right.batches.total))
        forms = forms_of([chunk.plain for chunk in right], processes)
        names = {frozenset(term.names for term in chunk.plain.terms) for chunk in left}
        own = all(frozenset(term.names for term in chunk.plain.terms) in names for chunk in right) and len(names) == 1
        if processes.alike(f"structure {own}", call) and own and forms.alike:
            break
    return (left, right), forms


def _empty(request: Request, theta: Blocks, rows: list[Chunk], forms: Forms) -> Tensor:
    n, m, seeds = sum(chunk.dual.samples for chunk in rows), sum(forms.samples), rows[0].dual.seeds
    shape = (seeds, n, m) if request.contract == "diagonal" else (n, seeds, m, seeds)
    like = first(theta)
    dtype = torch.promote_types(like.dtype, torch.float32)
    require_memory(torch.Size(shape).numel() * dtype.itemsize, f"the rows of a kernel matrix with axes {shape}", like)
    return like.new_empty(shape, dtype=dtype)
