"""Tangent kernels whose rows live in several processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geoad.distributed.exchange import ProcessGroup
from geoad.kernels.kernel_gram import Features, Group, features, gram
from geoad.kernels.kernel_terms import Term
from geoad.kernels.rows import Rows

__all__ = ["Forms", "forms_of", "in_turn", "kernel_rows"]


def kernel_rows(rows: Rows, groups: Sequence[Group] | None = None, *, contract: str = "none", group: Any = None) -> Tensor:
    r"""The rows of K = R G⁻¹ Rᵀ that belong to the samples of this process, R being the rows of the samples of all.

    With n_r samples in process r and N in all, each holds an (n_r, K, N, K) block of the (N, K, N, K) kernel: a kernel as large
    as the memory of all processes together. What is sent are the inputs and the backward signals of the layers (a, g), those of
    one process at a time, never Jacobians: n_r (Σ in + K Σ out) numbers instead of n_r K d.

    Args:
        rows: of the samples of this process, see `geoad.kernels.layered`; at the same point in all processes.
        groups: the inverse metric, see `geoad.kernels.kernel_gram.Group`. Default: the identity.
        contract: "none", "trace" (summed over equal seeds) or "diagonal" (equal seeds only).
        group: the process group. Default: all processes.

    Returns:
        (n_r, K, N, K); (n_r, 1, N, 1) for "trace"; (K, n_r, N) for "diagonal". The columns are in the order of the processes.

    Raises:
        ProcessError: the processes have rows of different networks or seeds.

    For a network and data, ``geoad.ntk(geo, shard(x)).blocks(p)`` does all of this.
    """
    processes = ProcessGroup(group)
    call = f"kernel rows ({contract}) of {list(rows.layout.items())} with {rows.seeds} seeds in {rows.dtype}"
    processes.agree(call)
    metric = [Group(tuple(rows.layout))] if groups is None else list(groups)
    counts: list[int] = processes.gathered(rows.samples, call)
    options: Any = {"contract": contract, "partners": sum(counts)}
    with processes.guarded(call):
        mine = features(rows, metric, **options)
    forms = forms_of([mine], processes)
    if not forms.alike:  # the network took another path elsewhere: explicit rows fit together
        options["structured"] = False
        mine = features(rows, metric, **options)
        forms = forms_of([mine], processes)
    with processes.guarded(call):
        dual = mine if groups is None else features(rows, metric, dual=True, **options)
        total = _empty(dual, sum(counts), contract)
    start = 0
    for theirs in in_turn([mine], forms, processes, call):
        stop = start + theirs.samples
        with processes.guarded(call):
            gram(total[:, :, start:stop], dual, theirs)
        start = stop
    return total


def _empty(dual: Features, columns: int, contract: str) -> Tensor:
    like, n, k = dual.terms[0].left, dual.samples, dual.seeds
    return like.new_empty(k, n, columns) if contract == "diagonal" else like.new_empty(n, k, columns, k)


# -- features over the wire -------------------------------------------------------------------------------------------------


class _TermForm(NamedTuple):
    """A term without its numbers: its tensors by name (shape, type), and what else it holds."""

    cls: type[Term]
    tensors: dict[str, tuple[torch.Size, torch.dtype]]
    rest: dict[str, Any]


_Form = tuple[int, int, list[_TermForm]]
"""(samples, seeds, terms)."""


class Forms:
    """The forms of the features of all processes.

    Attributes:
        of: for each process, one for each of its chunks.
    """

    def __init__(self, of: list[list[_Form]]) -> None:
        self.of = of

    @property
    def alike(self) -> bool:
        """All have terms of the same blocks, so that they can be multiplied."""
        return len({frozenset(term.rest["names"] for term in terms) for chunks in self.of for _, _, terms in chunks}) == 1

    @property
    def samples(self) -> list[int]:
        """How many samples each process has."""
        return [sum(n for n, _, _ in chunks) for chunks in self.of]


def forms_of(own: Sequence[Features], processes: ProcessGroup) -> Forms:
    """What all processes need to know of each other's features before these are sent."""
    return Forms(processes.gathered([_form(each) for each in own]))


def _form(own: Features) -> _Form:
    found: list[_TermForm] = []
    for term in own.terms:
        tensors = {name: (each.shape, each.dtype) for name, each in _tensors(term).items()}
        rest = {name: value for name, value in vars(term).items() if name not in tensors}
        found.append(_TermForm(type(term), tensors, rest))
    return own.samples, own.seeds, found


def _tensors(term: Term) -> dict[str, Tensor]:
    return {name: value for name, value in vars(term).items() if isinstance(value, Tensor)}


def in_turn(own: Sequence[Features], forms: Forms, processes: ProcessGroup, call: str) -> Iterator[Features]:
    """The features of all processes, one chunk after another: no more than one of another process is held.

    What is done with them belongs into ``processes.guarded``, for before the next chunk, and after the last, all say that they
    are there.
    """
    device = own[0].terms[0].left.device
    for source, chunks in enumerate(forms.of):
        for i, form in enumerate(chunks):
            if processes.size == 1:
                yield own[i]
                continue
            processes.agree(f"{call}, chunk {i} of process {source}")
            numbers = _numbers(own[i]) if source == processes.rank else None
            sent = _sent(form, numbers, source, processes, call, device)
            yield own[i] if source == processes.rank else sent
    processes.agree(f"{call}, all chunks")


def _numbers(own: Features) -> list[Tensor]:
    return [each.detach() for term in own.terms for each in _tensors(term).values()]


def _sent(
    form: _Form, own: list[Tensor] | None, source: int, processes: ProcessGroup, call: str, device: torch.device
) -> Features:
    """The features of process `source`: one message for each type of numbers."""
    samples, seeds, terms = form
    wanted = [each for term in terms for each in term.tensors.values()]
    kept: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(dtype for _, dtype in wanted):
        places = [i for i, (_, each) in enumerate(wanted) if each == dtype]
        sizes = [wanted[i][0].numel() for i in places]
        if own is None:
            flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        else:
            flat = torch.cat([own[i].reshape(-1) for i in places])
        parts = processes.sent(flat, source, call).split(sizes)
        kept |= {i: part.view(wanted[i][0]) for i, part in zip(places, parts, strict=True)}
    numbers = iter(kept[i] for i in range(len(wanted)))
    return Features(_filled(terms, numbers), samples, seeds)


def _filled(terms: Iterable[_TermForm], numbers: Iterator[Tensor]) -> list[Term]:
    return [_term(term, {name: next(numbers) for name in term.tensors}) for term in terms]


def _term(form: _TermForm, tensors: dict[str, Any]) -> Term:
    return form.cls(**form.rest, **tensors)
