"""Modules of others inside a map: evaluated in the precision of the components, however late they look up their numbers."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Hosted", "cast_state"]


class Hosted(nn.Module):
    """A module that is evaluated inside of functions of it.

    ``hosted.run(fn, like)`` is ``fn(module)`` with all floating numbers of the module in the dtype and on the device of `like`.
    They stay so until `fn` returns: what a module makes may come back to its numbers later than its own ``forward``.

    Args:
        module: the module; it becomes a child, so that its parameters follow devices and dtypes.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, fn: Callable[[Any], Any]) -> Any:
        """``fn(module)``."""
        return fn(self.module)

    def run(self, fn: Callable[[Any], Any], like: Tensor, values: dict[str, Tensor] | None = None) -> Any:
        """``fn(module)`` in the precision of `like`; `values` stand in for numbers of the module by their names."""
        values = values or {}
        state = cast_state(self.module, like, values) | values
        if not state:
            return fn(self.module)
        return torch.func.functional_call(self, {f"module.{name}": value for name, value in state.items()}, (fn,))


def cast_state(module: nn.Module, like: Tensor, given: Container[str] = ()) -> dict[str, Tensor]:
    """The parameters and buffers of `module` that are not as `like` is, cast; not those `given`; indices stay."""
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    cast: dict[str, Tensor] = {}
    for name, number in held.items():
        if name in given:
            continue
        dtype = like.dtype if number.is_floating_point() else number.dtype
        if number.dtype != dtype or number.device != like.device:
            cast[name] = number.to(device=like.device, dtype=dtype)
    return cast
