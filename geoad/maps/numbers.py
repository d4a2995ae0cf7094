"""The numbers that a map owns: float64 at rest, cast to the precision of the components at use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from geoad.errors import GeometryError
from geoad.params import is_wrapped

__all__ = ["Numbers", "draw", "given_numbers"]


class Numbers(nn.Module):
    """A module whose float64 buffers mean the same in every precision.

    ``.to(float32)`` leaves the buffers as they are (parameters follow, as everywhere in torch); `constant` casts at use
    and remembers the cast, so that a float32 network does not pay for it in every product.
    """

    def __init__(self) -> None:
        super().__init__()
        self._casts: dict[str, tuple[Tensor, int, Tensor]] = {}

    def constant(self, name: str, like: Tensor) -> Tensor:
        """The buffer or parameter `name` in the dtype and on the device of `like`."""
        held: Tensor = getattr(self, name)
        if held.dtype == like.dtype and held.device == like.device:
            return held
        if isinstance(held, nn.Parameter) or held.requires_grad or torch.compiler.is_compiling() or held.is_inference():
            return held.to(device=like.device, dtype=like.dtype)
        known = self._casts.get(name)
        if known is not None:
            source, version, cast = known
            if source is held and version == held._version and cast.dtype == like.dtype and cast.device == like.device:
                return cast
        cast = held.to(device=like.device, dtype=like.dtype)
        if not cast.is_inference() and not is_wrapped({"held": held, "cast": cast}):
            self._casts[name] = (held, held._version, cast)
        return cast

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_casts": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Parameters follow `fn`; float64 buffers move to the device only, for `constant` casts them at use."""
        kept = {
            (module, name): buffer
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.dtype == torch.float64
        }
        super()._apply(fn, recurse)
        for (module, name), buffer in kept.items():
            moved = getattr(module, name)
            if moved.dtype != buffer.dtype:
                setattr(module, name, buffer.to(moved.device))
        return self


def draw(generator: torch.Generator | None, *shape: int) -> Tensor:
    """Standard normal numbers, drawn in float64 on the generator's device and kept on the CPU."""
    device = torch.device("cpu") if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=device).cpu()


def given_numbers(value: Any, what: str) -> Tensor:
    """Numbers that a user gives, as a float64 tensor of its own; refused unless finite."""
    numbers = torch.as_tensor(value).detach().to(dtype=torch.float64, copy=True)
    if not bool(numbers.isfinite().all()):
        raise GeometryError(
            f"{what} holds {int((~numbers.isfinite()).sum())} entries that are not finite. A change of coordinates "
            "built from them has no values; pass finite numbers."
        )
    return numbers
