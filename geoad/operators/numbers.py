"""The numbers that operators are made of: mapping them, taking them out and putting them back, as tensors or as plain state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import singledispatch
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.operators.base import Dense, Detached, Diagonal, Implicit, LinearOperator, Multiple, Product, Sum, Transpose
from geoad.operators.solve import Inverse
from geoad.params import Blocks, Layout

__all__ = ["Spec", "batch_shape", "flatten", "is_plain", "map_numbers", "unflatten"]


def map_numbers(operator: LinearOperator, fn: Callable[[Tensor], Tensor]) -> LinearOperator:
    """The same operator with `fn` applied to every tensor that it is made of; see `LinearOperator.made_of`.

    A matrix-free operator holds no numbers: it stays as it is, or has its products cut from the graph if `fn` is
    ``torch.detach``.
    """
    if isinstance(operator, (Implicit, Detached)) or not operator.made_of:
        return Detached(operator) if fn is torch.detach else operator
    held = {name: _mapped(value, fn) for name, value in operator.held().items()}
    return type(operator).remade(operator.layout, held, _said(operator))


def _said(operator: LinearOperator) -> dict[str, Any]:
    return {name: getattr(operator, name) for name in operator.said}


def _mapped(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, LinearOperator):
        return map_numbers(value, fn)
    if isinstance(value, Mapping):
        return {key: _mapped(each, fn) for key, each in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(each, fn) for each in cast("Sequence[Any]", value)]
    return value


def is_plain(operator: LinearOperator) -> bool:
    """True if its numbers may enter a transform: all of them are stored, and none waits for a factorisation."""
    if isinstance(operator, (Inverse, Product, Transpose, Detached)):
        return False
    return operator.materialised and all(is_plain(each) for each in _inner(operator.held()))


def _inner(value: Any) -> Iterator[LinearOperator]:
    """The operators inside a container."""
    if isinstance(value, LinearOperator):
        yield value
    elif isinstance(value, Mapping):
        for each in cast("Mapping[Any, Any]", value).values():
            yield from _inner(each)
    elif isinstance(value, (list, tuple)):
        for each in cast("Sequence[Any]", value):
            yield from _inner(each)


# -- leaves ------------------------------------------------------------------------------------------------------------


class Spec(NamedTuple):
    """What is left of an operator without its tensors; hashable, compared by value."""

    cls: type[LinearOperator]
    layout: Layout
    held: tuple[tuple[str, Any], ...]
    said: tuple[tuple[str, Any], ...]


_LEAF = "a tensor"


class _Placeholder(LinearOperator):
    """Stands for an operator whose leaves are no tensors: pytree utilities put axis numbers and specs in their places."""

    materialised = True

    def __init__(self, spec: Spec, leaves: list[Any]) -> None:
        self.layout = spec.layout
        self.spec = spec
        self.leaves = leaves

    def mv(self, v: Blocks) -> Blocks:
        raise GeometryError("a placeholder of a pytree has no products. Use the operator that it was made of.")

    def rmv(self, w: Blocks) -> Blocks:
        return self.mv(w)

    @property
    def like(self) -> Tensor:
        return self.leaves[0]


def flatten(operator: LinearOperator) -> tuple[list[Tensor], Spec]:
    """The tensors of the operator, and what `unflatten` needs to build it of others."""
    if isinstance(operator, _Placeholder):
        return list(operator.leaves), operator.spec
    leaves: list[Tensor] = []
    return leaves, _spec(operator, leaves)


def _spec(operator: LinearOperator, leaves: list[Tensor]) -> Spec:
    held = tuple((name, _taken(value, leaves)) for name, value in operator.held().items())
    return Spec(type(operator), operator.layout, held, tuple(_said(operator).items()))


def _taken(value: Any, leaves: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        leaves.append(value)
        return _LEAF
    if isinstance(value, LinearOperator):
        return _spec(value, leaves)
    if isinstance(value, Mapping):
        mapping = cast("Mapping[Any, Any]", value)
        return ("dict", tuple((key, _taken(each, leaves)) for key, each in mapping.items()))
    if isinstance(value, (list, tuple)):
        return ("list", tuple(_taken(each, leaves) for each in cast("Sequence[Any]", value)))
    return ("value", value)


def unflatten(spec: Spec, leaves: Sequence[Any]) -> LinearOperator:
    """The operator of a `Spec` with these tensors."""
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        return _Placeholder(spec, list(leaves))
    return _built(spec, iter(leaves))


def _built(spec: Any, leaves: Iterator[Any]) -> Any:
    if isinstance(spec, Spec):
        held = {name: _built(each, leaves) for name, each in spec.held}
        return spec.cls.remade(spec.layout, held, dict(spec.said))
    if spec == _LEAF:
        return next(leaves)
    kind, inside = cast("tuple[str, Any]", spec)
    if kind == "dict":
        return {key: _built(each, leaves) for key, each in inside}
    return [_built(each, leaves) for each in inside] if kind == "list" else inside


# -- plain state -------------------------------------------------------------------------------------------------------


def state_of(value: Any) -> Any:
    """A stored operator (or a part of one) as dicts, lists, tensors and primitives."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, LinearOperator):
        entries = {**value.held(), **_said(value)}
        return {"structure": type(value).__name__.lower(), **{name: state_of(each) for name, each in entries.items()}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        mapping = cast("Mapping[Any, Any]", value)
        if all(isinstance(key, str) for key in mapping):
            return {key: state_of(each) for key, each in mapping.items()}
        return [[state_of(key), state_of(each)] for key, each in mapping.items()]
    if isinstance(value, (list, tuple)):
        return [state_of(each) for each in cast("Sequence[Any]", value)]
    return value


READERS: dict[str, tuple[type[LinearOperator], Callable[[dict[str, Any], Layout], dict[str, Any]]]] = {}
"""For each structure its class, and what turns the entries of a state into the arguments of the class."""


def from_state(state: Mapping[str, Any], layout: Layout) -> LinearOperator:
    """The operator of `state_of`."""
    entries = {name: value for name, value in state.items() if name != "structure"}
    cls, read = READERS[state["structure"]]
    arguments = read(entries, layout)
    said = {name: arguments.pop(name) for name in cls.said if name in arguments}
    return cls.remade(layout, arguments, said)


def _as_it_is(entries: dict[str, Any], layout: Layout) -> dict[str, Any]:
    return entries


def _ordered(entries: dict[str, Any], layout: Layout) -> dict[str, Any]:
    return {**entries, "entries": {name: entries["entries"][name] for name in layout.names}}


def _of_operators(entries: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """States of operators on the same layout, read in their turn."""

    def read(value: Any) -> Any:
        if isinstance(value, Mapping) and "structure" in value:
            return from_state(cast("Mapping[str, Any]", value), layout)
        return [read(each) for each in cast("list[Any]", value)] if isinstance(value, list) else value

    return {name: read(value) for name, value in entries.items()}


READERS.update(
    dense=(Dense, _as_it_is),
    multiple=(Multiple, _as_it_is),
    diagonal=(Diagonal, _ordered),
    inverse=(Inverse, _of_operators),
    sum=(Sum, _of_operators),
)


# -- batches -----------------------------------------------------------------------------------------------------------


@singledispatch
def batch_shape(operator: LinearOperator) -> torch.Size:
    """The batch axes of the stored numbers."""
    shapes = [batch_shape(each) for each in _inner(operator.held())]
    return torch.broadcast_shapes(*shapes) if shapes else torch.Size()


@batch_shape.register
def _(operator: Dense) -> torch.Size:
    return operator.matrix.shape[:-2]


@batch_shape.register
def _(operator: Diagonal) -> torch.Size:
    return operator.layout.batch_shape(operator.entries)


@batch_shape.register
def _(operator: Multiple) -> torch.Size:
    return operator.factor.shape


@batch_shape.register
def _(operator: Sum) -> torch.Size:
    shapes = [factor.shape for factor in operator.factors if isinstance(factor, Tensor)]
    return torch.broadcast_shapes(*shapes, *(batch_shape(term) for term in operator.operators))
