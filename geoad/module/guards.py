"""Hooks that refuse to use ψ numbers as weights: direct calls of the network or its parts, and their bare state dicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from geoad.errors import GeometryError

if TYPE_CHECKING:
    from geoad.module.coordinates import Coordinates

__all__ = ["Guards"]


class Guards:
    """The hooks on the modules of a network while its slots hold the coordinates of a chart other than the reference.

    A call is refused if some parameter at or below the called module still is a coordinate; ``functional_call`` has put weights
    there. A state dict is refused if it starts at a module of the network; ``geo.state_dict()`` passes by.
    """

    def __init__(self, net: nn.Module, coordinates: Coordinates) -> None:
        self.net = net
        self.coordinates = coordinates
        self.handles: list[Any] = []
        self.below: dict[nn.Module, list[tuple[nn.Module, str, str]]] = {}

    def set(self) -> None:
        """Put the hooks in place."""
        places = self.coordinates.slots.places
        owned: dict[nn.Module, list[tuple[nn.Module, str, str]]] = {}
        for name, where in places.items():
            for owner, attribute in where:
                owned.setdefault(owner, []).append((owner, attribute, name))
        for module in self.net.modules():
            below = [place for part in module.modules() for place in owned.get(part, [])]
            if not below:
                continue
            self.below[module] = below
            self.handles.append(module.register_forward_pre_hook(self.refuse_call))
            self.handles.append(module.register_state_dict_pre_hook(self.refuse_saving))
            self.handles.append(module.register_load_state_dict_pre_hook(self.refuse_loading))

    def release(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.below = [], {}

    def refuse_call(self, module: nn.Module, _: Any) -> None:
        """Forward pre-hook."""
        psi = self.coordinates.psi
        if psi is None:
            return
        for owner, attribute, name in self.below.get(module, ()):
            held = vars(owner)["_parameters"].get(attribute)
            if held is None or held is psi.get(name):  # no weights there, for the chart has other blocks; or coordinates
                what = "the network" if module is self.net else f"a {type(module).__name__} of the network"
                raise GeometryError(
                    f"{what} was called directly while its parameters are the coordinates of chart "
                    f"'{self.coordinates.chart.name}'. Those numbers are not weights. Call geo(x), which gives the same "
                    "function in every chart, or go back first with geo.to(geo.reference)."
                )

    def refuse_saving(self, module: nn.Module, prefix: str, _: Any) -> None:
        """State dict pre-hook; a module below a wrapper is asked with a prefix."""
        if module is self.net or (module in self.below and not prefix):
            self._refuse("asked for")

    def refuse_loading(self, module: nn.Module, _: Any, prefix: str, *__: Any) -> None:
        """Load pre-hook."""
        if module is self.net or (module in self.below and not prefix):
            self._refuse("loaded")

    def _refuse(self, what: str) -> None:
        raise GeometryError(
            f"the state dict of the bare network was {what} while its parameters are the coordinates of chart "
            f"'{self.coordinates.chart.name}'. Those numbers are not weights. Use geo.state_dict() and geo.load_state_dict(), "
            "or go back first with geo.to(geo.reference)."
        )
