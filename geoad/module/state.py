"""State dicts of a `GeoModule`: parameter names hold the coordinates of the present chart, and a note says which chart that is.

In the reference chart a state dict is that of the bare network. In another chart it also has the entry `KEY` with the chart and
the reference coordinates, so it can be loaded in any chart and in another process. Loading takes place in the reference chart.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from geoad.charts import Point
from geoad.errors import GeometryError
from geoad.module.coordinates import Coordinates
from geoad.params import Blocks, equal, map_blocks

__all__ = ["KEY", "Loading", "note"]

KEY = "_geoad"


def note(coordinates: Coordinates) -> dict[str, Any] | None:
    """What a state dict says about its chart, in plain values (``weights_only=True``); None in the reference chart."""
    if coordinates.psi is None:
        return None
    theta = map_blocks(torch.clone, coordinates.stored())
    blocks = list(coordinates.chart.layout)
    return {"chart": coordinates.chart.uid, "name": coordinates.chart.name, "theta": theta, "blocks": blocks}


class Loading:
    """One load of a state dict: `begin` before the modules load their entries, `finish` after."""

    def __init__(self, coordinates: Coordinates) -> None:
        self.coordinates = coordinates
        self.saved: tuple[Blocks, Blocks] | None = None
        self.backup: Blocks = {}

    def begin(self, state: Any, prefix: str) -> None:
        """Rewrite the entries into reference coordinates and put the network there.

        Raises:
            ChartDomainError: the loaded point lies outside the domain of the module's chart; nothing was changed.
        """
        coordinates, aliases = self.coordinates, self.coordinates.slots.aliases
        told: dict[str, Any] | None = state.pop(prefix + KEY, None)
        present = coordinates.stored()
        if told is not None:
            theta = self._theta(told)
            same = told["chart"] == coordinates.chart.uid and not coordinates.chart.learnable
            blocks = tuple(told.get("blocks") or present)
            psi = {name: state.get(prefix + aliases.get(name, [name])[0]) for name in blocks}
            if same and all(isinstance(block, Tensor) for block in psi.values()):
                self.saved = (cast(Blocks, psi), theta)
            differs = set(blocks) != set(aliases)  # a chart with other blocks than θ
            for name in blocks:
                if name not in aliases:
                    state.pop(prefix + name, None)
            for name, block in theta.items():
                for alias in aliases.get(name, ()):
                    if prefix + alias in state or differs:
                        state[prefix + alias] = block
        if coordinates.psi is None:
            return
        given = {name: next((state[prefix + a] for a in aliases[name] if prefix + a in state), None) for name in present}
        fits = {
            name: value.detach().to(block) if isinstance(value, Tensor) and value.shape == block.shape else block
            for (name, block), value in zip(present.items(), given.values(), strict=True)
        }
        Point(coordinates.reference, fits).to(coordinates.chart)
        self.backup = map_blocks(torch.clone, present)
        coordinates.suspend()

    def finish(self) -> None:
        """Back to the module's chart."""
        coordinates = self.coordinates
        if coordinates.psi is None:
            coordinates.live()  # takes over parameters that were assigned
            return
        theta = {name: parameter.detach() for name, parameter in coordinates.slots.read_parameters().items()}
        saved = None
        if self.saved is not None and equal(self.saved[1], theta):
            saved = {name: block.detach() for name, block in self.saved[0].items()}
        try:
            coordinates.resume(saved)
        except GeometryError:
            with torch.no_grad():
                for name, block in theta.items():
                    block.copy_(self.backup[name])
            coordinates.resume()
            raise

    def _theta(self, told: Any) -> Blocks:
        try:
            theta: Blocks = dict(told["theta"])
            str(told["chart"])
        except (TypeError, KeyError) as error:
            raise GeometryError(
                f"the state dict has an entry '{KEY}' that geoad did not write (found {type(told).__name__}). It should say in "
                "which chart the parameters are; without it their meaning is unknown. Save again with geo.state_dict()."
            ) from error
        return theta
