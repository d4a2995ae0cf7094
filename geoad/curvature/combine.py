"""What the collectors of several processes have, put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from geoad.curvature.collect import Collector
from geoad.curvature.representations import Representation
from geoad.kernels.memory import require_memory
from geoad.kernels.spread import Exchange, fingerprint
from geoad.params import Blocks

if TYPE_CHECKING:
    from geoad.curvature.network import NetworkCurvature

__all__ = ["combine", "described"]

_State = dict[str, Tensor]
_Form = dict[str, tuple[tuple[int, ...], torch.dtype]]


def combine(collectors: Sequence[Collector], exchange: Exchange, call: str) -> None:
    """Give each collector what those of all processes have: sums over samples added up, rows of samples side by side.

    All of it goes by a handful of messages. The result is the same in all processes, bit for bit.
    """
    with exchange.guarded(call):
        states = [each.state() for each in collectors]
        forms = [_form(each, state) for each, state in zip(collectors, states, strict=True)]
    if not exchange.alike(f"{[sorted(form) for form in forms]}", call):  # the network took another path elsewhere
        _fill(states, exchange.gathered(forms, call), collectors[0])
    summed = [(i, name) for i, each in enumerate(collectors) if not each.stacked for name in sorted(states[i])]
    stacked = [(i, name) for i, each in enumerate(collectors) if each.stacked for name in sorted(states[i])]
    if stacked:
        _require_room([states[i][name] for i, name in stacked], exchange, call)
    found: list[_State] = [{} for _ in collectors]
    for (i, name), value in zip(summed, exchange.sum([states[i][name] for i, name in summed], call), strict=True):
        found[i][name] = value
    if stacked:
        for (i, name), value in zip(stacked, exchange.joined([states[i][name] for i, name in stacked], call), strict=True):
            found[i][name] = value
    for each, state in zip(collectors, found, strict=True):
        each.load(state)


def _form(collector: Collector, state: _State) -> _Form:
    """Names, shapes (of one sample, if they are stacked) and types."""
    return {name: (tuple(each.shape[1:] if collector.stacked else each.shape), each.dtype) for name, each in state.items()}


def _fill(states: list[_State], forms: list[list[_Form]], like: Collector) -> None:
    """Zeros for sums that only other processes have."""
    device = next((each.device for state in states for each in state.values()), None)
    for theirs in forms:
        for state, form in zip(states, theirs, strict=True):
            for name, (shape, dtype) in form.items():
                if name not in state:
                    state[name] = torch.zeros(shape, dtype=dtype, device=device)


def _require_room(stacks: list[Tensor], exchange: Exchange, call: str) -> None:
    own = sum(each.numel() * each.element_size() for each in stacks)
    whole = sum(exchange.gathered(own, call))
    with exchange.guarded(call):  # the machines need not be alike
        require_memory(2 * whole, f"the columns of {exchange.size} processes", stacks[0])


# -- words -------------------------------------------------------------------------------------------------------------------


def described(field: NetworkCurvature, structure: Representation, x: Blocks) -> str:
    """What a field is and where it is asked for: the same words for the same matrix."""
    simple = _simple(field, ("progress", "max_memory", "products_memory", "representation", "structure"))
    parts = [f"likelihood={_words(field.likelihood)}", f"outputs={_words(field.select)}", f"data={field.batches.described()}"]
    where = f"chart '{field.home.name}', point {fingerprint(x)}, network {_state_of(field.geo.wrapped)}"
    return f"{type(field).__name__}({structure}, {', '.join([*simple, *parts])}) at {where}"


def _simple(thing: Any, without: Sequence[str] = ()) -> list[str]:
    """The attributes that are numbers, words, tensors or options."""
    found: list[str] = []
    for name, value in sorted(vars(thing).items()):
        if name in without or name.startswith("_"):
            continue
        if isinstance(value, Tensor):
            found.append(f"{name}={fingerprint(value)}")
        elif isinstance(value, (bool, int, float, str, Representation)):
            found.append(f"{name}={value!r}")
    return found


def _words(thing: Any) -> str:
    if thing is None:
        return "None"
    if hasattr(thing, "__qualname__"):
        return thing.__qualname__
    return f"{type(thing).__name__}({', '.join(_simple(thing)) if hasattr(thing, '__dict__') else ''})"


def _state_of(net: nn.Module) -> str:
    """A word for what the network holds beside its coordinates: buffers, frozen parameters, modes."""
    held = [*net.buffers(), *(each for each in net.parameters() if not each.requires_grad)]
    return fingerprint([each.detach() for each in held]) + "".join("t" if each.training else "e" for each in net.modules())
