r"""Coupling layers: a nonlinear change of coordinates that mixes all blocks, with everything in closed form.

In one layer half of the coordinates stays and conditions the other half:

.. math:: y_a = x_a, \qquad y_b = x_b\, e^{s(x_a)} + t(x_a),

so the inverse needs no inverse of s and t, and :math:`\log |\det J| = \sum s`. The halves change roles from layer to
layer. s and t are a small smooth network that squeezes :math:`x_a` through a few hidden units: O(d · hidden).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal, cast

import torch
from torch import Tensor, nn

from geoad.errors import GeometryError
from geoad.maps.base import Diffeomorphism
from geoad.maps.numbers import Numbers, draw
from geoad.params import Blocks, Layout

__all__ = ["Coupling"]

Halves = tuple[Tensor, Tensor]


class _Conditioner(Numbers):
    r"""s, t = strength · (tanh(g S), unit_b · g T) with g = tanh(h M + m), h = tanh((a / unit_a) A + c).

    Row vectors, batch axes in front. `linearize` gives the values and what the two products need.
    """

    down: Tensor
    offset_1: Tensor
    middle: Tensor
    offset_2: Tensor
    up_shift: Tensor
    up_scale: Tensor

    def __init__(
        self, units: Halves, hidden: int, strength: float, affine: bool, learnable: bool, draws: torch.Generator | None
    ) -> None:
        super().__init__()
        unit_a, unit_b = units
        n_a, n_b = len(unit_a), len(unit_b)
        self.strength = strength
        self.affine = affine
        # the units of the components are part of the matrices: down acts on a itself, up_shift gives b itself
        numbers = {
            "down": draw(draws, n_a, hidden) / (math.sqrt(n_a) * unit_a[:, None]),
            "offset_1": draw(draws, hidden),
            "middle": draw(draws, hidden, hidden) / math.sqrt(hidden),
            "offset_2": draw(draws, hidden),
            "up_shift": strength * draw(draws, hidden, n_b) / math.sqrt(hidden) * unit_b,
        }
        if affine:
            numbers["up_scale"] = draw(draws, hidden, n_b) / math.sqrt(hidden)
        for name, value in numbers.items():
            if learnable:
                setattr(self, name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def features(self, a: Tensor) -> Halves:
        """h and g."""
        h = torch.tanh(a @ self.constant("down", a) + self.constant("offset_1", a))
        return h, torch.tanh(h @ self.constant("middle", a) + self.constant("offset_2", a))

    def values(self, g: Tensor) -> tuple[Tensor | None, Tensor]:
        """tanh(g S) (None for an additive coupling) and t."""
        ratio = torch.tanh(g @ self.constant("up_scale", g)) if self.affine else None
        return ratio, g @ self.constant("up_shift", g)

    def push(self, features: Halves, ratio: Tensor | None, da: Tensor) -> tuple[Tensor | None, Tensor]:
        """The derivatives of s and t along da."""
        h, g = features
        dh = (1 - h * h) * (da @ self.constant("down", da))
        dg = (1 - g * g) * (dh @ self.constant("middle", da))
        ds = None
        if ratio is not None:
            ds = self.strength * (1 - ratio * ratio) * (dg @ self.constant("up_scale", da))
        return ds, dg @ self.constant("up_shift", da)

    def pull(self, features: Halves, ratio: Tensor | None, ws: Tensor | None, wt: Tensor) -> Tensor:
        """The covector on a that (ws, wt) on (s, t) pulls back to."""
        h, g = features
        wg = wt @ self.constant("up_shift", wt).mT
        if ratio is not None and ws is not None:
            wg = wg + (self.strength * (1 - ratio * ratio) * ws) @ self.constant("up_scale", wt).mT
        wh = ((1 - g * g) * wg) @ self.constant("middle", wt).mT
        return ((1 - h * h) * wh) @ self.constant("down", wt).mT


class _Layer:
    """One coupling layer at one place: the conditioner evaluated at a, x_b and the factor e^s."""

    def __init__(self, conditioner: _Conditioner, a: Tensor, b: Tensor | None = None, image: Tensor | None = None) -> None:
        self.conditioner = conditioner
        self.features = conditioner.features(a)
        self.ratio, self.t = conditioner.values(self.features[1])
        self.growth = None if self.ratio is None else (conditioner.strength * self.ratio).exp()
        if b is None and image is not None:
            b = image - self.t if self.growth is None else (image - self.t) / self.growth
        assert b is not None
        self.b = b

    def image(self) -> Tensor:
        return self._grown(self.b) + self.t

    def log_abs_det(self) -> Tensor:
        return self.b.new_zeros(()) if self.ratio is None else self.conditioner.strength * self.ratio.sum()

    def _grown(self, b: Tensor) -> Tensor:
        return b if self.growth is None else self.growth * b

    def _shrunk(self, b: Tensor) -> Tensor:
        return b if self.growth is None else b / self.growth

    def _moved(self, da: Tensor) -> Tensor:
        """The derivative of the image along da alone."""
        ds, dt = self.conditioner.push(self.features, self.ratio, da)
        return dt if ds is None else dt + self._grown(self.b) * ds

    def _felt(self, wb: Tensor) -> Tensor:
        """The transpose of `_moved`."""
        ws = None if self.ratio is None else self._grown(self.b) * wb
        return self.conditioner.pull(self.features, self.ratio, ws, wb)

    def push(self, da: Tensor, db: Tensor) -> Halves:
        return da, self._grown(db) + self._moved(da)

    def pull(self, wa: Tensor, wb: Tensor) -> Halves:
        return wa + self._felt(wb), self._grown(wb)

    def push_inverse(self, da: Tensor, db: Tensor) -> Halves:
        return da, self._shrunk(db - self._moved(da))

    def pull_inverse(self, wa: Tensor, wb: Tensor) -> Halves:
        shrunk = self._shrunk(wb)
        return wa - self._felt(shrunk), shrunk


class Coupling(Diffeomorphism):
    """A RealNVP-style coupling of all matched blocks: nonlinear, across layers, its inverse and log det in closed form.

    Args:
        kind: ``"affine"`` (y_b = x_b e^s + t) or ``"additive"`` (s = 0, volume preserving).
        hidden: hidden units of the conditioner.
        layers: number of coupling layers; two are needed before every coordinate has moved.
        split: names or patterns of the blocks that form the first half; None: every other entry of the raveled blocks,
            so that both halves run across all blocks.
        swap: let the second half condition the first one in the first layer.
        strength: size of s, and of t in units of `scale`; well below 1 is a mild, above 1 a wild map.
        scale: the typical size of the components. None: 1/√fan-in for weights with two axes or more and for their
        biases
            (torch's initialisation), 1 for other blocks.
        learnable: make the numbers of the conditioner parameters of the bound map.

    >>> import torch, geoad
    >>> chart = geoad.Chart({"x": (2,), "y": ()}, name="x")
    >>> phi = chart.reparametrize(geoad.maps.Coupling(generator=torch.Generator().manual_seed(0)))
    >>> p = chart.point({"x": torch.ones(2), "y": torch.tensor(2.0)})
    >>> torch.allclose(p.to(phi.target).to(chart).components["x"], torch.ones(2))
    True
    """

    order: Tensor
    back: Tensor

    def __init__(
        self,
        kind: Literal["affine", "additive"] = "affine",
        hidden: int = 16,
        *,
        layers: int = 2,
        split: str | Sequence[str] | None = None,
        swap: bool = False,
        strength: float = 0.3,
        scale: float | None = None,
        generator: torch.Generator | None = None,
        learnable: bool = False,
    ) -> None:
        super().__init__()
        if kind not in ("affine", "additive"):
            raise GeometryError(
                f"Coupling has no kind {kind!r}; the kinds are 'affine' (scale and shift) and 'additive' (shift only). "
                "They are different maps; pass kind= one of them."
            )
        if hidden < 1 or layers < 1 or not (math.isfinite(strength) and (scale is None or 0 < scale < math.inf)):
            raise GeometryError(
                "Coupling needs hidden >= 1, layers >= 1, a finite strength and a positive scale, got "
                f"hidden={hidden}, layers={layers}, strength={strength}, scale={scale}. Without them there is no "
                "conditioner; mend them."
            )
        self.kind = kind
        self.hidden = hidden
        self.layers = layers
        self.split = [split] if isinstance(split, str) else None if split is None else list(split)
        self.swap = swap
        self.strength = float(strength)
        self.scale = scale
        self.generator = generator
        self._learns = learnable
        self.conditioners = nn.ModuleList()

    def extra_repr(self) -> str:
        return f"kind='{self.kind}', hidden={self.hidden}, layers={self.layers}, strength={self.strength:g}"

    def prepare(self, layout: Layout) -> None:
        chosen = self._first_half(layout)
        order = torch.cat([chosen.nonzero().reshape(-1), (~chosen).nonzero().reshape(-1)])
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())
        self._sizes = (int(chosen.sum()), int((~chosen).sum()))
        if 0 in self._sizes:
            raise GeometryError(
                f"Coupling splits the {layout.dim} coordinates of the blocks {list(layout.names)} into "
                f"{self._sizes[0]} and {self._sizes[1]}. One half conditions the other, so neither may be empty; match "
                "more blocks, change split=, or use an elementwise map such as maps.Sinh()."
            )
        first, second = _units(layout, self.scale)[order].split(self._sizes)
        for i in range(self.layers):
            units = (first, second) if self._first_conditions(i) else (second, first)
            self.conditioners.append(
                _Conditioner(units, self.hidden, self.strength, self.kind == "affine", self._learns, self.generator)
            )

    def _first_half(self, layout: Layout) -> Tensor:
        if self.split is None:
            return torch.arange(layout.dim, device="cpu") % 2 == 0
        unused = [each for each in self.split if not any(fnmatchcase(name, each) for name in layout.names)]
        if unused:
            raise GeometryError(
                f"Coupling was asked to split off {unused}, which matches none of the blocks {list(layout.names)}. The "
                "halves would not be the ones you mean; mend split=."
            )
        parts = [
            torch.full((size,), any(fnmatchcase(name, each) for each in self.split), device="cpu")
            for name, size in zip(layout.names, layout.sizes, strict=True)
        ]
        return torch.cat(parts)

    def _first_conditions(self, i: int) -> bool:
        return (i % 2 == 0) != self.swap

    # -- halves ------------------------------------------------------------------------------------------------------

    def _halve(self, blocks: Blocks) -> Halves:
        vector = self.bound_layout().ravel(blocks)
        first, second = vector.index_select(-1, self.order.to(vector.device)).split(self._sizes, dim=-1)
        return first, second

    def _join(self, halves: Halves) -> Blocks:
        vector = torch.cat(halves, dim=-1)
        return self.bound_layout().unravel(vector.index_select(-1, self.back.to(vector.device)))

    def _turn(self, i: int, halves: Halves) -> Halves:
        """(conditioning, conditioned) from (first, second), or back."""
        return halves if self._first_conditions(i) else (halves[1], halves[0])

    def _conditioner(self, i: int) -> _Conditioner:
        return cast(_Conditioner, self.conditioners[i])

    def _pass(self, halves: Halves) -> tuple[Halves, list[_Layer]]:
        """The image of `halves`, and every layer at its place on the way."""
        stations: list[_Layer] = []
        for i in range(self.layers):
            a, b = self._turn(i, halves)
            stations.append(_Layer(self._conditioner(i), a, b))
            halves = self._turn(i, (a, stations[-1].image()))
        return halves, stations

    def _along(self, x: Blocks, given: Blocks, method: str, backwards: bool) -> Blocks:
        _, stations = self._pass(self._halve(x))
        halves = self._halve(given)
        steps = list(enumerate(stations))
        for i, station in reversed(steps) if backwards else steps:
            halves = self._turn(i, getattr(station, method)(*self._turn(i, halves)))
        return self._join(halves)

    # -- the map -----------------------------------------------------------------------------------------------------

    def forward(self, x: Blocks) -> Blocks:
        return self._join(self._pass(self._halve(x))[0])

    def invert(self, y: Blocks) -> Blocks:
        halves = self._halve(y)
        for i in reversed(range(self.layers)):
            a, image = self._turn(i, halves)
            halves = self._turn(i, (a, _Layer(self._conditioner(i), a, image=image).b))
        return self._join(halves)

    def push(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        return self._along(x, v, "push", False)

    def pull(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        return self._along(x, w, "pull", True)

    def push_inverse(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        return self._along(x, v, "push_inverse", True)

    def pull_inverse(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        return self._along(x, w, "pull_inverse", False)

    def log_abs_det(self, x: Blocks, y: Blocks) -> Tensor:
        total = next(iter(x.values())).new_zeros(())
        for station in self._pass(self._halve(x))[1]:
            total = total + station.log_abs_det()
        return total


def _units(layout: Layout, scale: float | None) -> Tensor:
    """The typical size of every component, raveled."""
    parts: list[Tensor] = []
    for name, shape in layout.items():
        layer, dot, last = name.rpartition(".")
        weight = f"{layer}{dot}weight"
        sized = layout[weight] if last == "bias" and weight in layout else shape
        unit = scale or (1 / math.sqrt(max(1, sized[1:].numel())) if len(sized) >= 2 else 1.0)
        parts.append(torch.full((shape.numel(),), unit, dtype=torch.float64, device="cpu"))
    return torch.cat(parts)
