"""The change of chart as a function of plain blocks, for code that is differentiated as a whole."""

from __future__ import annotations

from torch import nn

from geoad.charts import Chart, path
from geoad.params import Blocks

__all__ = ["Transition"]


class Transition:
    """ψ = φ(θ) from chart `start` to chart `end` on plain blocks, with the two products that need no inverse map."""

    def __init__(self, start: Chart, end: Chart) -> None:
        self.start, self.end = start, end
        self.steps = [(phi.map, along) for phi, along in path(start, end)]
        if start.atlas is not None:
            start.atlas.require_one_way(start.reference, end.reference)

    @property
    def blockwise(self) -> bool:
        """Every block is mapped by itself."""
        return all(bound.blockwise for bound, _ in self.steps)

    def numbers(self) -> list[nn.Parameter]:
        """The parameters of learnable maps on the way."""
        return [parameter for bound, _ in self.steps for parameter in bound.parameters()]

    def __call__(self, x: Blocks) -> Blocks:
        """The coordinates in `end`."""
        for bound, along in self.steps:
            x = bound.forward(x) if along else bound.invert(x)
        return x

    def push(self, x: Blocks, v: Blocks) -> Blocks:
        """J v."""
        for bound, along in self.steps:
            y = bound.forward(x) if along else bound.invert(x)
            v = bound.push(x, y, v) if along else bound.push_inverse(y, x, v)
            x = y
        return v

    def pull(self, x: Blocks, w: Blocks) -> Blocks:
        """Jᵀ w."""
        stations = [x]
        for bound, along in self.steps:
            stations.append(bound.forward(stations[-1]) if along else bound.invert(stations[-1]))
        for i in range(len(self.steps) - 1, -1, -1):
            bound, along = self.steps[i]
            near, far = stations[i], stations[i + 1]
            w = bound.pull(near, far, w) if along else bound.pull_inverse(far, near, w)
        return w

    def pull_between(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        """Jᵀ w where both ends are known; saves the map in the usual case of a single step."""
        if len(self.steps) != 1:
            return self.pull(x, w)
        bound, along = self.steps[0]
        return bound.pull(x, y, w) if along else bound.pull_inverse(y, x, w)
