"""Linear functions as programs: one evaluation, recorded below autograd, is run again for other arguments.

A product such as J v, Jᵀu, JᵀAJ v or ∇²f(x) v is linear in one argument; all that does not depend on that argument (the
activations, the masks, the cotangents of a loss) is the same the next time. `record` watches one evaluation at the dispatcher,
below ``torch.func`` and autograd, and keeps the operations that the argument reaches. A `Program` runs these alone, in the same
order and with the same kernels: the numbers are those of a fresh evaluation, bit for bit.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from geoad.params import flatten

__all__ = ["Program", "record"]

_SHAPE_ONLY = frozenset(
    ("zeros_like", "ones_like", "new_zeros", "new_ones", "full_like", "new_full", "is_same_size", "_has_same_storage_numel")
)
"""Operations whose result is the same for all values of the argument."""

_SUMMED: dict[str, tuple[int, ...]] = {
    "add": (0, 1),
    "add_": (0, 1),
    "sub": (0, 1),
    "sub_": (0, 1),
    "cat": (0,),
    "stack": (0,),
    "addmm": (0,),
    "addmv": (0,),
    "baddbmm": (0,),
    "where": (1, 2),
    "index_put": (0, 2),
    "index_add": (0, 3),
    "scatter": (0, 3),
    "scatter_add": (0, 3),
    "slice_scatter": (0, 1),
    "select_scatter": (0, 1),
    "copy": (0, 1),
}
"""Operations that are linear in these arguments together: where one of them is a constant, it is zero."""

Place = tuple[int | str, int | None]
"""Where an argument of an operation stands: its position or name, and the index if it is in a list."""


class _Kind(NamedTuple):
    """What is known of an operation: its name, the arguments it writes into, and whether its result is a view of one."""

    name: str
    mutated: frozenset[int | str]
    view: bool


@functools.cache
def _kind(func: Any) -> _Kind:
    schema = func._schema
    written = [(i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    view = any(result.alias_info is not None for result in schema.returns)
    return _Kind(schema.name.rpartition("::")[2], frozenset(each for pair in written for each in pair), view)


@dataclass
class _Step:
    """One operation: its arguments, the slots that are put among them, the slots of its results, and those done with.

    Attributes:
        same: the result has the form of the one argument that is read, and only zeros are added to it, if anything is.
    """

    func: Any
    args: list[Any]
    kwargs: dict[str, Any]
    reads: list[tuple[Place, int]]
    writes: list[int | None]
    single: bool
    same: bool
    done: tuple[int, ...] = ()

    def put(self, place: Place, value: Any) -> None:
        """Replace one argument."""
        key, index = place
        holder: Any = self.args if isinstance(key, int) else self.kwargs
        if index is None:
            holder[key] = value
        else:
            holder[key][index] = value

    def run(self, slots: dict[int, Any]) -> None:
        """Evaluate on the present values of the slots."""
        args, kwargs, owned = self.args.copy(), self.kwargs, set[int | str]()
        if any(isinstance(key, str) for (key, _), _ in self.reads):
            kwargs = dict(kwargs)
        for (key, index), slot in self.reads:
            holder: Any = args if isinstance(key, int) else kwargs
            if index is None:
                holder[key] = slots[slot]
                continue
            if key not in owned:
                owned.add(key)
                holder[key] = list(holder[key])
            holder[key][index] = slots[slot]
        result = self.func(*args, **kwargs)
        for slot in self.done:
            slots.pop(slot, None)
        if self.single:
            slots[self.writes[0]] = result  # pyright: ignore[reportArgumentType]
        else:
            slots.update((slot, each) for slot, each in zip(self.writes, result, strict=True) if slot is not None)


def _arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[Place, Tensor]]:
    items: Iterable[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()] if kwargs else enumerate(args)
    for key, value in items:
        if isinstance(value, Tensor):
            yield (key, None), value
        elif isinstance(value, (list, tuple)):
            for index, each in enumerate(value):
                if isinstance(each, Tensor):
                    yield (key, index), each


class _Recorder(TorchDispatchMode):
    """Notes the operations that depend on the given leaves.

    Attributes:
        flaw: why the evaluation cannot be run again, if so.
        suspect: something other than zero was added to what depends on the argument. That may cancel; or a dependence was out
            of sight (an ``autograd.Function`` that goes through numpy), and then the program would not be linear.
    """

    def __init__(self, leaves: Sequence[Tensor], limit: int) -> None:
        super().__init__()
        self.limit, self.bytes = limit, 0
        self.flaw: str | None = None
        self.suspect = False
        self.steps: list[_Step] = []
        self.roots: list[int] = []  # of each slot: the slot that owns the memory
        self.known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.made: dict[int, weakref.ref[Tensor]] = {}
        self.outside: dict[int, Tensor] = {}
        self.versions: list[tuple[Tensor, int]] = []
        self.storages: set[int] = set()
        self.twins: dict[Any, list[Tensor]] = {}
        self.written: set[int] = set()  # the slots whose memory some operation writes into
        self.inputs = [self.mark(leaf) for leaf in leaves]

    def mark(self, tensor: Tensor, root: int | None = None) -> int:
        """A new slot for a tensor that depends on the argument."""
        slot = len(self.roots)
        self.roots.append(slot if root is None else root)
        self.known[id(tensor)] = (weakref.ref(tensor), slot)
        return slot

    def slot(self, tensor: Tensor) -> int | None:
        """The slot of a tensor that depends on the argument."""
        found = self.known.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.flaw is None and not _without_values(result):
            given = list(_arguments(args, kwargs))
            reads = [(place, slot) for place, tensor in given if (slot := self.slot(tensor)) is not None]
            if reads and _kind(func).name == "detach":  # the argument of a program may have a graph
                self.known[id(result)] = (weakref.ref(result), reads[0][1])
            elif not reads or _kind(func).name in _SHAPE_ONLY:
                self._constant(given, result)
            else:
                self._step(func, args, kwargs, reads, given, result)
        return result

    def _constant(self, given: Iterable[tuple[Place, Tensor]], result: Any) -> None:
        """An operation that does not depend on the argument: what came from outside, and what was made here."""
        for _, tensor in given:
            if self.slot(tensor) is None:
                self._from_outside(tensor)
        for each in _results(result):
            if isinstance(each, Tensor):
                self.made[id(each)] = weakref.ref(each)

    def _from_outside(self, tensor: Tensor) -> None:
        found = self.made.get(id(tensor))
        if (found is None or found() is not tensor) and id(tensor) not in self.outside:
            self.outside[id(tensor)] = tensor
            self.storages.add(_memory(tensor)[0])

    def _step(
        self, func: Any, args: Any, kwargs: Any, reads: list[tuple[Place, int]], given: list[tuple[Place, Tensor]], result: Any
    ) -> None:
        kind, results, places = _kind(func), _results(result), dict(reads)
        if not all(each is None or isinstance(each, Tensor) for each in results):
            self.flaw = f"{func} reads values"
        step = _Step(
            func, [_own(each) for each in args], {k: _own(each) for k, each in kwargs.items()}, reads, [], False, False
        )
        for place, tensor in given:
            if place in places:
                step.put(place, None)
                if place[0] in kind.mutated and self.roots[places[place]] in self.inputs:
                    self.flaw = f"{func} writes into the argument"
                continue
            if place[0] in kind.mutated:
                self.flaw = f"{func} writes into a constant"
            self._from_outside(tensor)
            step.put(place, self._kept(tensor))
        pure = self._adds_zero(step, kind)
        self.suspect |= not pure
        if self.flaw is not None:
            self.steps, self.versions, self.twins = [], [], {}
            return
        self.written |= {self.roots[slot] for place, slot in reads if place[0] in kind.mutated}
        root = self.roots[reads[0][1]] if kind.view or kind.mutated else None
        step.writes = [self.mark(each, root) if isinstance(each, Tensor) else None for each in results]
        step.single = not isinstance(result, (tuple, list))
        if len(reads) == 1 and step.single:
            read = next(tensor for place, tensor in given if place in places)
            step.same = pure and read.shape == result.shape and read.dtype == result.dtype and read.stride() == result.stride()
        self.steps.append(step)

    def _adds_zero(self, step: _Step, kind: _Kind) -> bool:
        """False if a constant other than zero is added to what depends on the argument: then the evaluation may be hidden."""
        summed = _SUMMED.get(kind.name, ())
        if not any(place[0] in summed for place, _ in step.reads):
            return True
        values = [value for key in summed if key < len(step.args) for value in _results(step.args[key])]
        return not any(bool(each.any()) if isinstance(each, Tensor) else each not in (None, 0) for each in values)

    def _kept(self, constant: Tensor) -> Tensor:
        """The constant as it is kept: once, where a network was evaluated twice."""
        self.versions.append((constant, constant._version))
        constant = constant.detach()
        pointer, size = _memory(constant)
        if pointer and pointer not in self.storages:
            group = self.twins.setdefault((constant.shape, constant.stride(), constant.dtype, constant.device), [])
            twin = next((each for each in group if torch.equal(each, constant)), None)
            if twin is not None:
                return twin
            group.append(constant)
            self.storages.add(pointer)
            self.bytes += size
        if self.bytes > self.limit:
            self.flaw = "more memory than allowed"
        return constant


def _own(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _results(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _without_values(result: Any) -> bool:
    """Shapes are being worked out."""
    return any(isinstance(each, Tensor) and each.device.type == "meta" for each in _results(result))


def _memory(tensor: Tensor) -> tuple[int, int]:
    """(address, bytes) of what a tensor keeps alive."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (NotImplementedError, RuntimeError):  # a symbolic zero has none
        return 0, 0


class Program:
    """A linear function of a tree of tensors, as the operations that its argument reaches.

    It is differentiable in its argument, and may be called inside of transforms.

    Attributes:
        bytes: the memory of the constants that it keeps, beyond that of tensors from elsewhere.
    """

    def __init__(self, recorder: _Recorder, outputs: list[int | Tensor], build: Callable[[Any], Any]) -> None:
        self.inputs, self.build = recorder.inputs, build
        steps, names = _simplified(recorder)
        self.outputs = [torch.empty_like(each) if isinstance(each, Tensor) else names.get(each, each) for each in outputs]
        self.steps = _alive(steps, self.outputs)
        self.bytes = recorder.bytes
        self.outside = [(weakref.ref(each), each._version, each.data_ptr()) for each in recorder.outside.values()]

    def __call__(self, v: Any) -> Any:
        slots: dict[int, Any] = dict(zip(self.inputs, flatten(v)[0], strict=True))
        for step in self.steps:
            step.run(slots)
        return self.build([torch.zeros_like(each) if isinstance(each, Tensor) else slots[each] for each in self.outputs])

    def holds(self) -> bool:
        """The tensors from elsewhere that it was made of (data, frozen parameters) are what they were."""
        return all(
            (tensor := ref()) is None or (tensor._version == version and tensor.data_ptr() == pointer)
            for ref, version, pointer in self.outside
        )


def record(fn: Callable[[Any], Any], v: Any, limit: int = 2 << 30) -> tuple[Any, Program | None]:
    """(f(v), f as a program) of a linear function; None where it cannot be run again, or keeps more than `limit` bytes.

    >>> import torch
    >>> from geoad.kernels import products
    >>> from geoad.kernels.program import record
    >>> x = torch.tensor([1.0, 2.0])
    >>> value, program = record(lambda v: products.jvp(torch.square, x, v)[1], torch.ones(2))
    >>> value, program(torch.tensor([1.0, 0.0]))
    (tensor([2., 4.]), tensor([2., 0.]))
    """
    leaves, build = flatten(v)
    own = [leaf.detach().clone() for leaf in leaves]
    recorder = _Recorder(own, limit)
    with recorder:
        result = fn(build(own))
    values, build_value = flatten(result)
    if recorder.flaw is None and any(constant._version != version for constant, version in recorder.versions):
        recorder.flaw = "a constant was overwritten"
    outputs: list[int | Tensor] = [value if (slot := recorder.slot(value)) is None else slot for value in values]
    if any(value.requires_grad for value in values):
        recorder.flaw = "the result depends on something else that requires grad"
    if any(isinstance(each, Tensor) and bool(each.any()) for each in outputs):
        recorder.flaw = recorder.flaw or "part of the result does not come from the argument"
    if recorder.flaw is not None:
        return result, None
    program = Program(recorder, outputs, build_value)
    if recorder.suspect and not _is_linear(program, build([torch.zeros_like(leaf) for leaf in own]), values):
        return result, None
    return result, program


def _is_linear(program: Program, zero: Any, values: list[Tensor]) -> bool:
    """The program gives 0 for 0, up to rounding."""
    origin = flatten(program(zero))[0]
    size = max((float(value.abs().max()) for value in values if value.numel()), default=0.0)
    rest = max((float(each.abs().max()) for each in origin if each.numel()), default=0.0)
    return rest <= 1e3 * max(torch.finfo(value.dtype).eps for value in values) * size


def _simplified(recorder: _Recorder) -> tuple[list[_Step], dict[int, int]]:
    """The steps without sums with a zero, and the new names of the results of those."""
    kept: list[_Step] = []
    names: dict[int, int] = {}
    for step in recorder.steps:
        step.reads = [(place, names.get(slot, slot)) for place, slot in step.reads]
        slot, first = step.writes[0], step.reads[0]
        kind = _kind(step.func).name
        plain = kind == "add" or (kind == "sub" and first[0][0] == 0)
        alone = slot is not None and not {recorder.roots[slot], recorder.roots[first[1]]} & recorder.written
        if plain and alone and step.same and not step.kwargs:
            names[slot] = first[1]  # pyright: ignore[reportArgumentType]
        else:
            kept.append(step)
    return kept, names


def _alive(steps: list[_Step], outputs: list[int | Tensor]) -> list[_Step]:
    """The steps that the outputs need, each with the slots that nobody reads after it."""
    needed = {each for each in outputs if isinstance(each, int)}
    kept: list[_Step] = []
    for step in reversed(steps):
        if _kind(step.func).mutated or any(slot in needed for slot in step.writes):
            reads = {slot for _, slot in step.reads}
            step.done = tuple(reads - needed)
            needed |= reads
            kept.append(step)
    return kept[::-1]
