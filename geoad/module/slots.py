"""Where the coordinates of a network live: the parameter slots of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from geoad.errors import GeometryError, UnsupportedModuleError

__all__ = ["Place", "Selection", "Slots", "matching", "select"]

Selection = str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None


Place = tuple[dict[str, Any], str, Any]
"""(registry, attribute, value): an entry of the parameters or buffers of a module."""


def matching(patterns: str | Iterable[str], aliases: dict[str, list[str]], what: str) -> list[str]:
    """The names of which some alias matches a pattern (fnmatch), in order; a pattern that matches nothing raises."""
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in wanted:
        if not isinstance(pattern, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise GeometryError(
                f"{what}: expected name patterns, found {type(pattern).__name__}. Parameters are chosen by name, for in "
                "another chart other tensors stand under the same names. Use patterns such as '*.weight'; the names are "
                f"{list(aliases)}."
            )
        if not any(fnmatchcase(alias, pattern) for names in aliases.values() for alias in names):
            raise GeometryError(
                f"{what}: the pattern '{pattern}' matches no parameter; it would select nothing. The names are "
                f"{list(aliases)}; note that '*.weight' does not match a bare 'weight'. Mend the pattern."
            )
    return [n for n, names in aliases.items() if any(fnmatchcase(alias, each) for alias in names for each in wanted)]


def select(net: nn.Module, params: Selection) -> dict[str, nn.Parameter]:
    """The parameters that become coordinates, in the order of ``net.named_parameters()``.

    Args:
        net: the network.
        params: None for all with ``requires_grad``; a name pattern or several (fnmatch; a shared parameter answers to each of
            its names); or a predicate (name, parameter).
    """
    available = dict(net.named_parameters())
    if params is None:
        chosen = {name: p for name, p in available.items() if p.requires_grad}
    elif callable(params):
        chosen = {name: p for name, p in available.items() if params(name, p)}
    else:
        known = matching(params, _aliases(net, available), "params")
        chosen = {name: available[name] for name in known}
    if not chosen:
        raise GeometryError(
            f"no parameter is selected, so the network has no coordinates. It has the parameters {list(available)}; by default "
            "those with requires_grad=True are taken. Set requires_grad, or pass params=."
        )
    for name, parameter in chosen.items():
        if isinstance(parameter, nn.UninitializedParameter):
            raise UnsupportedModuleError(
                f"parameter '{name}' has no shape yet: it belongs to a lazy module. Coordinates need a shape; run the network "
                "once on a batch, then wrap it."
            )
        if not parameter.is_floating_point():
            raise GeometryError(
                f"parameter '{name}' is {parameter.dtype}; coordinates must be real floating point numbers. Leave it out with "
                "params=."
            )
    return chosen


def _aliases(net: nn.Module, chosen: dict[str, nn.Parameter]) -> dict[str, list[str]]:
    """All names of each parameter: shared ones, and those in modules that are used twice, have several."""
    names = {id(parameter): name for name, parameter in chosen.items()}
    found: dict[str, list[str]] = {name: [] for name in chosen}
    for path, parameter in net.named_parameters(remove_duplicate=False):
        name = names.get(id(parameter))
        if name is not None:
            found[name].append(path)
    return found


def _registry(module: nn.Module) -> dict[str, Any]:
    """A module's own parameters by attribute; ``functional_call`` puts other tensors there."""
    return module._parameters  # pyright: ignore[reportPrivateUsage]


class Slots:
    """Every place (module, attribute) where each selected parameter sits, shared parameters included."""

    def __init__(self, net: nn.Module, chosen: dict[str, nn.Parameter]) -> None:
        names = {id(parameter): name for name, parameter in chosen.items()}
        self.places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in chosen}
        self.aliases = _aliases(net, chosen)
        for module in net.modules():
            for attribute, parameter in _registry(module).items():
                name = names.get(id(parameter))
                if name is not None:
                    self.places[name].append((module, attribute))

    def read(self) -> dict[str, Any]:
        """What sits in the slots now (in the first one of a shared parameter)."""
        try:
            return {name: _registry(places[0][0])[places[0][1]] for name, places in self.places.items()}
        except KeyError as error:
            raise GeometryError(
                f"the parameter {error} was removed from its module after the network was wrapped (a parametrization does "
                "that). The coordinates of the manifold are fixed when it is made; change the network first, then wrap it anew "
                "in a GeoModule."
            ) from error

    def read_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters in the slots, if they still are parameters of the right shapes, tied as before."""
        found = self.read()
        for name, places in self.places.items():
            if any(_registry(module).get(attribute) is not found[name] for module, attribute in places):
                raise GeometryError(
                    f"the shared parameter '{name}' was replaced under one of its names {self.aliases[name]} only. It is one "
                    "coordinate block; replace it everywhere, or wrap the network anew."
                )
        return found

    def call(
        self, values: Mapping[str, Tensor], fn: Callable[..., Any], *args: Any, buffers: Sequence[Place] = (), **kwargs: Any
    ) -> Any:
        """fn(*args, **kwargs) with other tensors in all slots, and in some buffers.

        In place of ``torch.func.functional_call``, which leaves its tensors behind in modules that are used twice.
        """
        places = [(_registry(m), attribute, values[name]) for name, where in self.places.items() for m, attribute in where]
        taken: list[Place] = []
        try:
            for registry, attribute, value in (*places, *buffers):
                taken.append((registry, attribute, registry[attribute]))
                registry[attribute] = value
            return fn(*args, **kwargs)
        finally:
            for registry, attribute, value in taken:
                registry[attribute] = value

    def write(self, parameters: dict[str, nn.Parameter]) -> None:
        """Put parameters into all their slots."""
        for name, parameter in parameters.items():
            for module, attribute in self.places[name]:
                _registry(module)[attribute] = parameter
