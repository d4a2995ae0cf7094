"""What a tensor depends on, read off the graph of plain autograd."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["dependencies", "nodes", "numbers_held", "once_differentiable"]


def nodes(tensors: Iterable[Tensor]) -> list[Any]:
    """The nodes of the graph above `tensors`."""
    waiting: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen: dict[int, Any] = {id(node): node for node in waiting}
    while waiting:
        for parent, _ in waiting.pop().next_functions:
            if parent is not None and id(parent) not in seen:
                seen[id(parent)] = parent
                waiting.append(parent)
    return list(seen.values())


def dependencies(tensors: Iterable[Tensor], above: Iterable[Any] | None = None) -> list[Tensor]:
    """The leaves with ``requires_grad`` that `tensors` depend on; `above` are the `nodes` above them, where they are known.

    >>> import torch
    >>> from geoad.kernels.graph import dependencies
    >>> a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    >>> [leaf is a for leaf in dependencies([(a * b.detach()).sum()])]
    [True]
    """
    given = list(tensors)
    found = {id(each): each for each in given if each.is_leaf and each.requires_grad}
    for node in nodes(given) if above is None else above:
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found[id(variable)] = variable
    return list(found.values())


def numbers_held(found: Iterable[Any]) -> tuple[int, int]:
    """About how many numbers a graph of these nodes holds, and how many the most expensive of them works with going back.

    >>> import torch
    >>> from geoad.kernels.graph import nodes, numbers_held
    >>> x = torch.ones(5, requires_grad=True)
    >>> numbers_held(nodes([x.exp()]))
    (5, 10)
    """
    held, most, seen = 0, 0, set[int]()
    for node in found:
        saved = [each for each in _saved(node) if each.data_ptr() not in seen]
        seen |= {each.data_ptr() for each in saved}
        numbers = sum(each.numel() for each in saved)
        held, most = held + numbers, max(most, _WORKING.get(type(node).__name__, 2) * numbers)
    return held, most


_WORKING = {"LinalgMatrixExpBackward0": 40, "LinalgHouseholderProductBackward0": 8, "LinalgSolveExBackward0": 4}
"""How many times what it holds an operation works with, where that is much: an exponential goes back by a larger one."""


def _saved(node: Any) -> list[Tensor]:
    """The tensors that a node holds."""
    try:
        values = [getattr(node, name) for name in dir(type(node)) if name.startswith("_saved_")]
    except RuntimeError:  # overwritten in place since: whoever goes back this way is told
        return []
    flat = [one for each in values for one in (cast("Any", each) if isinstance(each, (tuple, list)) else (each,))]
    return [each for each in flat if isinstance(each, Tensor) and each.layout is torch.strided]


def once_differentiable(found: Iterable[Any]) -> str | None:
    """The name of an ``autograd.Function`` among the nodes whose backward has no derivative; None if there is none.

    A second derivative through it is zero in silence where ``torch.func`` or ``torch.autograd.grad`` take it: the error that
    ``@once_differentiable`` has ready waits at a place where they do not come by.
    """
    for node in found:
        function = _function(node)
        code = getattr(getattr(function, "backward", None), "__code__", None)
        if code is not None and code.co_qualname.startswith("once_differentiable."):
            return f"the autograd.Function {function.__name__}"
        if type(node).__name__ in ("Error", "DelayedError"):
            return "an autograd.Function"
    return None


def _function(node: Any) -> Any:
    """The ``autograd.Function`` of a node: under a transform of ``torch.func`` the one that its own stands for."""
    function = getattr(type(node), "_forward_cls", None)
    backward = getattr(function, "backward", None)
    if getattr(getattr(backward, "__code__", None), "co_qualname", "").startswith("generate_single_level_function."):
        return inspect.getclosurevars(cast("Any", backward)).nonlocals.get("autograd_function", function)
    return function
