"""Where the coordinates of a network live: the parameter slots of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from geoad.errors import GeometryError

__all__ = ["Slots", "select"]

Selection = str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None


def select(net: nn.Module, params: Selection) -> dict[str, nn.Parameter]:
    """The parameters that become coordinates, in the order of ``net.named_parameters()``.

    Args:
        params: None for all with ``requires_grad``; a name pattern or several (fnmatch); or a predicate (name, parameter).
    """
    available = dict(net.named_parameters())
    if params is None:
        chosen = {name: p for name, p in available.items() if p.requires_grad}
    elif callable(params):
        chosen = {name: p for name, p in available.items() if params(name, p)}
    else:
        patterns = [params] if isinstance(params, str) else [str(each) for each in params]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in available):
                raise GeometryError(
                    f"params: the pattern '{pattern}' matches no parameter. The network has {list(available)}. Mend the pattern; "
                    "shared parameters appear under their first name only."
                )
        chosen = {name: p for name, p in available.items() if any(fnmatchcase(name, each) for each in patterns)}
    if not chosen:
        raise GeometryError(
            f"no parameter is selected, so the network has no coordinates. It has the parameters {list(available)}; by default those "
            "with requires_grad=True are taken. Set requires_grad, or pass params=."
        )
    for name, parameter in chosen.items():
        if not parameter.is_floating_point():
            raise GeometryError(
                f"parameter '{name}' is {parameter.dtype}; coordinates must be real floating point numbers. Leave it out with params=."
            )
    return chosen


class Slots:
    """Every place (module, attribute) where each selected parameter sits, shared parameters included."""

    def __init__(self, net: nn.Module, chosen: dict[str, nn.Parameter]) -> None:
        names = {id(parameter): name for name, parameter in chosen.items()}
        self.places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in chosen}
        self.aliases: dict[str, list[str]] = {name: [] for name in chosen}
        for path, module in net.named_modules():
            for attribute, parameter in module._parameters.items():
                name = names.get(id(parameter))
                if name is not None:
                    self.places[name].append((module, attribute))
                    self.aliases[name].append(f"{path}.{attribute}" if path else attribute)

    def read(self) -> dict[str, Any]:
        """What sits in the slots now."""
        return {name: places[0][0]._parameters[places[0][1]] for name, places in self.places.items()}

    def write(self, parameters: dict[str, nn.Parameter]) -> None:
        """Put parameters into all their slots."""
        for name, parameter in parameters.items():
            for module, attribute in self.places[name]:
                module._parameters[attribute] = parameter

    def owners(self) -> list[nn.Module]:
        """The modules that own a slot."""
        found = {id(module): module for places in self.places.values() for module, _ in places}
        return list(found.values())

    def holds(self, module: nn.Module, parameters: dict[str, nn.Parameter]) -> bool:
        """True if `module` itself holds one of `parameters` in a slot."""
        return any(
            module._parameters[attribute] is parameters[name]
            for name, places in self.places.items()
            for owner, attribute in places
            if owner is module
        )
