"""Where the coordinates of a network live: the parameter slots of its modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
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


Seats = dict[str, list[tuple[nn.Module, str]]]
"""Name of a block -> every (module, attribute) where its tensor sits."""


class Slots:
    """Every place (module, attribute) where each selected parameter sits, shared parameters included.

    Attributes:
        places: the slots of θ, where the network looks for its weights.
        seats: where the leaves of the present chart sit: in the same slots, except in charts with other blocks than θ.
    """

    def __init__(self, net: nn.Module, chosen: dict[str, nn.Parameter]) -> None:
        names = {id(parameter): name for name, parameter in chosen.items()}
        self.net = net
        self.places: Seats = {name: [] for name in chosen}
        self.seats = self.places
        self.aliases = _aliases(net, chosen)
        self._keys = {module: tuple(_registry(module)) for module in net.modules()}
        for module in net.modules():
            for attribute, parameter in _registry(module).items():
                name = names.get(id(parameter))
                if name is not None:
                    self.places[name].append((module, attribute))

    def read(self) -> dict[str, Any]:
        """What sits in the slots now (in the first one of a shared parameter)."""
        try:
            return {name: _registry(places[0][0])[places[0][1]] for name, places in self.seats.items()}
        except KeyError as error:
            raise GeometryError(
                f"the parameter {error} was removed from its module after the network was wrapped (a parametrization does "
                "that). The coordinates of the manifold are fixed when it is made; change the network first, then wrap it anew "
                "in a GeoModule."
            ) from error

    def read_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters in the slots, if they still are parameters of the right shapes, tied as before."""
        found = self.read()
        for name, places in self.seats.items():
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
        with self._filled(values), _replaced(buffers):
            return fn(*args, **kwargs)

    @contextlib.contextmanager
    def _filled(self, values: Mapping[str, Tensor]) -> Generator[None]:
        """`values` in the slots of θ meanwhile, and no other coordinates in the modules."""
        if self.seats is self.places:
            with _replaced([(_registry(m), key, values[name]) for name, where in self.places.items() for m, key in where]):
                yield
            return
        saved = {module: dict(_registry(module)) for module in self._touched(self.seats)}
        try:
            self._arrange(self.places, values)
            yield
        finally:
            for module, entries in saved.items():
                _registry(module).clear()
                _registry(module).update(entries)

    def write(self, parameters: dict[str, nn.Parameter]) -> None:
        """Put the leaves of a chart into their seats, in place of those that sit there."""
        seats = self.seats_of(parameters)
        if seats is not self.places or self.seats is not self.places:
            self._arrange(seats, parameters)
            self.seats = seats
            return
        for name, parameter in parameters.items():
            for module, attribute in self.places[name]:
                _registry(module)[attribute] = parameter

    def seats_of(self, names: Iterable[str]) -> Seats:
        """Where the blocks of a chart sit: those of θ in their slots, ``0.weight_g`` as attribute ``weight_g`` of module ``0``.

        Raises:
            GeometryError: something else has that name.
        """
        wanted = list(names)
        if wanted == list(self.places):
            return self.places
        return {name: self.places[name] if name in self.places else [self._seat(name)] for name in wanted}

    def _seat(self, name: str) -> tuple[nn.Module, str]:
        path, _, attribute = name.rpartition(".")
        module = dict(self.net.named_modules(remove_duplicate=False)).get(path)
        if module is None:
            raise GeometryError(
                f"the chart has a block '{name}', but the network has no module '{path}' that could hold it. The part of a "
                "name before its last dot is the path of a module; give the map names without dots for its blocks."
            )
        if attribute in self._keys[module] or (hasattr(module, attribute) and attribute not in _registry(module)):
            raise GeometryError(
                f"the chart has a block '{name}', but a {type(module).__name__} of the network has something else under "
                f"'{attribute}'. Parameters are told apart by name; rename the attribute, or give the map other names for its "
                "parts."
            )
        return module, attribute

    def _touched(self, seats: Seats) -> set[nn.Module]:
        return {module for each in (self.places, self.seats, seats) for where in each.values() for module, _ in where}

    def _arrange(self, seats: Seats, values: Mapping[str, Any]) -> None:
        """Fill the registries: what is no coordinate stays, the blocks take the place of the slots, in their order."""
        slots = {place for where in self.places.values() for place in where}
        coordinates = slots | {place for where in self.seats.values() for place in where}
        for module in self._touched(seats):
            registry = _registry(module)
            mine = {key: values[name] for name, where in seats.items() for each, key in where if each is module}
            others = {key: value for key, value in registry.items() if (module, key) not in coordinates}
            ordered: dict[str, Any] = {}
            for key in self._keys[module]:
                if key in others:
                    ordered[key] = others[key]
                elif seats is self.places:
                    ordered[key] = mine[key]
                elif (module, key) in slots:
                    ordered |= mine
            registry.clear()
            registry.update(ordered | mine | others)


@contextlib.contextmanager
def _replaced(places: Sequence[Place]) -> Generator[None]:
    """Other values in some registries meanwhile."""
    taken: list[Place] = []
    try:
        for registry, attribute, value in places:
            taken.append((registry, attribute, registry[attribute]))
            registry[attribute] = value
        yield
    finally:
        for registry, attribute, value in taken:
            registry[attribute] = value
