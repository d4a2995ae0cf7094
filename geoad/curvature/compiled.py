"""The work on a chunk of samples as one compiled function: evaluate the network, send seeds back, collect.

What the seeds are made of (likelihood, labels, weights) stays outside, with all checks of values. The network is noted down
operation by operation with ``make_fx``, which sees through ``vmap`` and vjp, and what was noted is compiled. Tensors that are
no coordinates (frozen parameters, buffers, masks) are arguments of it, so it follows their values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from geoad.curvature.collect import Collector, Task
from geoad.curvature.collect_kron import collectors
from geoad.curvature.representations import Diagonal, Mixed, Representation
from geoad.data import take
from geoad.errors import GeometryError
from geoad.kernels.ladder import FIXES, Fix, watched
from geoad.kernels.layered import linearize, linearize_together
from geoad.kernels.rows import Plan
from geoad.kernels.stamps import stamp
from geoad.params import Blocks, first, flatten, is_wrapped

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from geoad.curvature.network import NetworkCurvature
    from geoad.curvature.sweep import Batch, Compiled

__all__ = ["Backend", "Chunks", "require_compilable"]

Backend = Callable[["GraphModule", list[Tensor]], Callable[..., Sequence[Tensor]]]
"""(what was noted, arguments) to a faster function of these."""

_States = list[dict[str, Tensor]]

_SAMPLES = 64
"""In a chunk: results stay within reach of the processor, and the portions of `geoad.kernels.layers` are few."""

_OPERATIONS = 2500
"""More of them take minutes to compile."""

_COMPILED = 16
"""How many functions a field compiles before it says that something changes each time."""


class Chunks:
    """The compiled functions of a field, one for each form of its inputs.

    All chunks have one size, so that there is one function; the samples that are left over run uncompiled. A function is used
    as long as the network, its modes and hooks, the chart and the modes of torch are those it was made with.
    """

    def __init__(self, backend: Backend | None = None) -> None:
        self.backend = backend or _inductor
        self.kept: dict[Hashable, _Compiled] = {}
        self.count = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Chunks, ()  # a copy compiles for itself

    def at(self, field: NetworkCurvature, x: Blocks) -> Compiled:
        """What gives chunks of the data at the point x to collectors: it says of how many samples, 0 if fewer are left."""
        _require_values(x)
        states: dict[int, Hashable] = {}  # the network stays the same during a pass

        def add(plan: Plan, batch: Batch, start: int, step: int, found: Sequence[Any]) -> int:
            form = tuple((each.shape[1:], each.dtype, each.device) for each in _taken(batch.inputs)[0])
            known, size = self._size(form, batch.size, step)
            count = min(batch.size - start, step) // size
            if not count:
                return 0
            part = slice(start, start + count * size)
            inputs, labels = take(batch.inputs, part), take(batch.labels, part)
            seeds = _seeds(field, x, inputs, labels)
            for i in range(count):
                part = slice(i * size, (i + 1) * size)
                here, s = take(inputs, part), [each[:, part].contiguous() for each in seeds]
                given = [*x.values(), *_taken(here)[0], *s]
                state = states.get(id(plan)) or _state(field, plan)
                if known is None or not known.holds(size, state, given):
                    known = self.kept[form] = self._made(field, x, plan, here, s)
                    state = known.state
                states[id(plan)] = state
                for each, more in zip(found, known(given), strict=True):
                    _add(each, more)
            return count * size

        return add

    def _size(self, form: Hashable, count: int, step: int) -> tuple[_Compiled | None, int]:
        """What is known for inputs of this form, and how many samples to take together."""
        known, wanted = self.kept.get(form), _even(count, min(step, _SAMPLES))
        return known, wanted if known is None or wanted > 2 * known.size else known.size

    def _made(self, field: NetworkCurvature, x: Blocks, plan: Plan, inputs: Any, seeds: list[Tensor]) -> _Compiled:
        self.count += 1
        if self.count > _COMPILED:
            raise GeometryError(
                f"compile=True: {_COMPILED} functions were compiled for one field, and now another one is needed. Its inputs "
                f"come in many forms ({len(self.kept)} so far), or the network is another one at each evaluation (modes, "
                "hooks, attributes, a chart that is trained). Pad the inputs to one form, or pass compile=False."
            )
        return _Compiled(field, x, plan, inputs, seeds, self.backend)


class _Compiled:
    """(blocks, inputs, seeds, signs) -> the states of empty collectors that took this chunk."""

    def __init__(
        self, field: NetworkCurvature, x: Blocks, plan: Plan, inputs: Any, seeds: list[Tensor], backend: Backend
    ) -> None:
        fixes = _fixes(field, x, plan, inputs)
        self.state = _state(field, plan)  # what was looked at for the first time is part of it
        self.size, self.names = seeds[0].shape[1], list[list[str]]()
        samples, rebuild = _taken(inputs)
        given = [*x.values(), *samples, *seeds]

        def chunk(*tensors: Tensor) -> list[Tensor]:
            rest = iter(tensors)
            blocks = {name: next(rest) for name in x}
            chunk_inputs, s = rebuild([next(rest) for _ in samples]), next(rest)
            signs = next(rest, None)
            task = Task(blocks, plan, signs is None, field.max_memory)
            found = collectors(field.structure, field.home.layout, task)
            rows = linearize_together(field.outputs, field.home.layout, blocks, chunk_inputs, plan).pull(s)
            for each in found:
                each.add(rows, signs)
            states = [each.state() for each in found]
            self.names = [list(state) for state in states]
            return [value for state in states for value in state.values()]

        graph = _noted(chunk, given, fixes)
        self.held = _lifted(graph)
        self.forms = [_form(each) for each in (*given, *self.held)]
        self.run = _compiled(graph, [*given, *self.held], backend)

    def holds(self, size: int, state: Hashable, given: list[Tensor]) -> bool:
        """It is the function of these arguments."""
        tensors = [*given, *self.held]
        return size == self.size and state == self.state and self.forms == [_form(each) for each in tensors]

    def __call__(self, given: list[Tensor]) -> _States:
        with torch.no_grad(), _no_autocast(given[0]):
            values = iter(self.run(*given, *self.held))
        return [{name: next(values) for name in names} for names in self.names]


def require_compilable(structure: Representation, processes: bool) -> None:
    """Raise where compile=True is not offered."""
    if processes:
        raise GeometryError(
            "compile=True is not offered for data that are shared out among processes: each would compile for itself while the "
            "others wait for it. Pass compile=False."
        )
    for each in [inner for _, inner in structure.parts] if isinstance(structure, Mixed) else [structure]:
        if not isinstance(each, Diagonal):
            raise GeometryError(
                f"compile=True is not offered for {each}, only for 'diagonal' (or mixes of diagonals), where it was found to "
                "pay: the KFAC of an MLP, most of it products of large matrices, is computed 1.1 times as fast, and "
                "block-diagonal matrices take minutes to compile. Pass compile=False."
            )


# -- the chunk ---------------------------------------------------------------------------------------------------------------


def _seeds(field: NetworkCurvature, x: Blocks, inputs: Any, labels: Any) -> list[Tensor]:
    """The seeds (K, n, ..., c), and their signs (K, n) where not all are +1; all that is wrong with values shows here."""
    with torch.no_grad():
        outputs = field.outputs(x, inputs)
        field.inspect(outputs, x)
        seeds, signs = field.weighted_seeds(outputs, labels).all()
    return [seeds] if signs is None else [seeds, signs]


def _even(count: int, most: int) -> int:
    """Of the sizes from `most` down to its half, the one that leaves the fewest of `count` samples over."""
    most = min(count, most)
    return min(range(most, most // 2, -1), key=lambda size: count % size)


def _taken(tree: Any) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The tensors of a tree, and what builds it from others."""
    leaves, build = flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuild(tensors: list[Tensor]) -> Any:
        full = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            full[i] = tensor
        return build(full)

    return [leaves[i] for i in places], rebuild


def _add(collector: Collector, state: dict[str, Tensor]) -> None:
    old = collector.state()
    collector.load(old | {name: each + old[name] if name in old else each for name, each in state.items()})


def _form(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _state(field: NetworkCurvature, plan: Plan) -> Hashable:
    """What is noted beside tensors: the network, the chart, and the modes of torch."""
    device = first(field.geo.coordinates.theta).device.type  # pyright: ignore[reportArgumentType]
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    modes = cast, torch.get_default_dtype(), torch.get_num_threads()
    return modes, str(plan), stamp(field.geo), stamp(field.select), field.home.stamp(), field.max_memory


def _require_values(x: Blocks) -> None:
    if is_wrapped(x) or (torch.is_grad_enabled() and any(block.requires_grad for block in x.values())):
        raise GeometryError(
            "a field with compile=True was asked for a derivative (or evaluated under vmap, or by a compiler): what is "
            "compiled has values only. Make the field with compile=False for that, or evaluate it under torch.no_grad()."
        )


# -- noting and compiling ----------------------------------------------------------------------------------------------------


def _fixes(field: NetworkCurvature, x: Blocks, plan: Plan, inputs: Any) -> list[Fix]:
    """What torch has to do differently for these rows; the network is looked at here, for it is not while it is noted."""
    with watched() as seen:
        linearize(field.outputs, field.home.layout, x, take(inputs, slice(0, 2)), plan)
    outcome = seen[-1]
    if outcome.way == "loop":
        raise GeometryError(_refusal("samples of this network have to be gone through one by one", *plan.coverage().values()))
    return [fix for fix in FIXES if fix.name in outcome.fixes]


class _NoReading(TorchDispatchMode):
    """Refuses to read the values of tensors: they would be noted as they are now."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError(f"the values of a tensor decide what is computed ({func})")
        return func(*args, **(kwargs or {}))


def _noted(chunk: Callable[..., Any], given: list[Tensor], fixes: list[Fix]) -> GraphModule:
    from contextlib import ExitStack

    from torch.fx.experimental.proxy_tensor import make_fx

    with ExitStack() as stack:
        for each in (torch.inference_mode(False), torch.no_grad(), *(fix.context() for fix in fixes), _NoReading()):
            stack.enter_context(each)
        try:
            graph: Any = make_fx(chunk, tracing_mode="fake", _allow_non_fake_inputs=True)(*(each.clone() for each in given))
        except Exception as error:
            raise GeometryError(_refusal("the work on a chunk cannot be traced", error)) from error
    graph.graph.eliminate_dead_code()
    count = len(graph.graph.nodes)
    if count > _OPERATIONS:
        raise GeometryError(_refusal(f"the work on a chunk is {count} operations, over {_OPERATIONS}: minutes to compile"))
    return graph


def _lifted(graph: GraphModule) -> list[Tensor]:
    """The tensors that `graph` holds, from now on its last arguments."""
    nodes, held = graph.graph, list[Tensor]()
    last = [node for node in nodes.nodes if node.op == "placeholder"][-1]
    for node in [node for node in nodes.nodes if node.op == "get_attr"]:
        tensor = getattr(graph, str(node.target))
        if not isinstance(tensor, Tensor):
            continue
        with nodes.inserting_after(last):
            last = nodes.placeholder(f"held_{len(held)}")
        last.meta = dict(node.meta)
        held.append(tensor)
        node.replace_all_uses_with(last)
        nodes.erase_node(node)
    graph.recompile()
    return held


def _compiled(graph: GraphModule, given: list[Tensor], backend: Backend) -> Callable[..., Sequence[Tensor]]:
    with torch.no_grad(), _no_autocast(given[0]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return backend(graph, given)
        except Exception as error:
            raise GeometryError(_refusal("what was traced cannot be compiled (is there a C++ compiler?)", error)) from error


def _inductor(graph: GraphModule, given: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
    import torch._inductor as inductor  # the compiler of torch is loaded when it is needed

    arguments: list[Any] = list(given)
    function: Any = inductor.compile(graph, arguments)
    return function


def _no_autocast(like: Tensor) -> torch.autocast:
    """Casts are noted already."""
    return torch.autocast(like.device.type, enabled=False)


def _refusal(what: str, *why: object) -> str:
    reasons = dict.fromkeys((str(each).strip().splitlines() or [type(each).__name__])[0][:300] for each in why)
    cause = f" ({'; '.join(reasons)})" if reasons else ""
    return f"compile=True was asked for, but {what}{cause}. It would be slower in silence; pass compile=False."
