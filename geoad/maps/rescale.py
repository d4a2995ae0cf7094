"""The rescaling of hidden units: what goes into a unit is multiplied by a, what comes out of it is divided by a."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from geoad.errors import GeometryError
from geoad.maps.base import Diffeomorphism
from geoad.maps.numbers import draw, given_numbers
from geoad.params import Blocks, Layout

__all__ = ["Rescale"]


class Rescale(Diffeomorphism):
    r"""W₁ ↦ diag(a) W₁, b₁ ↦ a b₁, W₂ ↦ W₂ diag(1/a) for pairs of consecutive layers, a > 0.

    A linear, diagonal change of coordinates. If a ReLU (or anything positively homogeneous) sits between the two
    layers, the network whose parameters *are* the new numbers computes the same function; the change of coordinates is
    as good for any other network.

    Layers are the blocks ``<layer>.weight`` with two axes or more, with their ``<layer>.bias`` (or bare names).
    Convolutions are scaled along their channels; behind a flattened convolution each channel owns a run of inputs.

    Args:
        factors: a: one number for all, or one number or one tensor (a number for each unit) for each pair. Drawn from
            exp(spread · N(0, 1)) if None.
        pairs: names of the layers, for instance ``[("0", "2"), ("2", "4")]``. None: each layer with the next one in
            block order whose inputs fit its outputs, if that is its direct successor.
        per: ``"unit"`` or ``"layer"``, one factor for each unit or for each layer, when drawn.

    What belongs to no pair keeps its coordinates. A pair that does not fit, or no pair at all, is refused.
    """

    elementwise = True
    monomial = True
    blockwise = True
    linear = True

    def __init__(
        self,
        factors: float | Sequence[float | Tensor] | None = None,
        *,
        pairs: Sequence[tuple[str, str]] | None = None,
        per: Literal["unit", "layer"] = "unit",
        spread: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if per not in ("unit", "layer"):
            raise GeometryError(
                f"Rescale was asked for factors per {per!r}; they are drawn per 'unit' or per 'layer'. Pass one of "
                "both, or the factors themselves."
            )
        self.pairs = None if pairs is None else [(str(first), str(second)) for first, second in pairs]
        self.per = per
        self.spread = float(spread)
        self.generator = generator
        self._factors = factors

    def extra_repr(self) -> str:
        return f"pairs={self.pairs}, per='{self.per}'"

    def prepare(self, layout: Layout) -> None:
        layers = _layers(layout)
        self.pairs = _find_pairs(layout, layers) if self.pairs is None else self.pairs
        factors = self._one_each()
        scales: dict[str, Tensor] = {}

        def multiply(name: str, factor: Tensor) -> None:
            scales[name] = scales[name] * factor if name in scales else factor

        for (first, second), given in zip(self.pairs, factors, strict=True):
            repeats = _repeats(layout, layers, first, second)
            source, target = layout[_block(first, "weight")], layout[_block(second, "weight")]
            a = self._factor(given, source[0], first, second)
            multiply(_block(first, "weight"), a.reshape(-1, *[1] * (len(source) - 1)))
            if _has_bias(layout, first):
                multiply(_block(first, "bias"), a)
            inverse = a.reciprocal().repeat_interleave(repeats)
            multiply(_block(second, "weight"), inverse.reshape(1, -1, *[1] * (len(target) - 2)))
        self._factors = None
        self._scaled = {name: f"scale_{i}" for i, name in enumerate(scales)}
        for name, key in self._scaled.items():
            self.register_buffer(key, scales[name])

    def _one_each(self) -> Sequence[float | Tensor | None]:
        assert self.pairs is not None
        if self._factors is None or isinstance(self._factors, (int, float)):
            return [self._factors] * len(self.pairs)
        if len(self._factors) != len(self.pairs):
            raise GeometryError(
                f"Rescale has {len(self._factors)} factors for {len(self.pairs)} pairs {self.pairs}. Each pair has its "
                "own; pass one number for all, or one number or tensor for each pair."
            )
        return self._factors

    def _factor(self, given: float | Tensor | None, units: int, first: str, second: str) -> Tensor:
        if given is None:
            return (self.spread * draw(self.generator, units if self.per == "unit" else 1)).exp().expand(units)
        a = given_numbers(given, f"the factor of the pair ('{first}', '{second}')")
        if a.shape not in ((), (1,), (units,)) or not bool((a > 0).all()):
            raise GeometryError(
                f"Rescale has factors of shape {tuple(a.shape)} with least entry {a.min().item():.3g} for the pair "
                f"('{first}', '{second}'), which has {units} units. A ReLU commutes with positive factors only; pass "
                f"one positive number or {units} of them, or use maps.Scale for signs."
            )
        return a.expand(units)

    def _times(self, blocks: Blocks) -> Blocks:
        return {
            name: block * self.constant(self._scaled[name], block) if name in self._scaled else block
            for name, block in blocks.items()
        }

    def _over(self, blocks: Blocks) -> Blocks:
        return {
            name: block / self.constant(self._scaled[name], block) if name in self._scaled else block
            for name, block in blocks.items()
        }

    def forward(self, x: Blocks) -> Blocks:
        return self._times(x)

    def invert(self, y: Blocks) -> Blocks:
        return self._over(y)

    def push(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        return self._times(v)

    def pull(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        return self._times(w)

    def push_inverse(self, x: Blocks, y: Blocks, v: Blocks) -> Blocks:
        return self._over(v)

    def pull_inverse(self, x: Blocks, y: Blocks, w: Blocks) -> Blocks:
        return self._over(w)

    def log_abs_det(self, x: Blocks, y: Blocks) -> Tensor:
        total = next(iter(x.values())).new_zeros(())
        for name, key in self._scaled.items():
            total = total + self.constant(key, x[name]).log().expand(x[name].shape).sum()
        return total


def _block(layer: str, kind: str) -> str:
    return f"{layer}.{kind}" if layer else kind


def _layers(layout: Layout) -> list[str]:
    """The layers with a weight of two axes or more, in block order."""
    found: list[str] = []
    for name, shape in layout.items():
        layer, _, last = name.rpartition(".")
        if last == "weight" and len(shape) >= 2:
            found.append(layer)
    return found


def _has_bias(layout: Layout, layer: str) -> bool:
    name = _block(layer, "bias")
    return name in layout and layout[name] == layout[_block(layer, "weight")][:1]


def _fit(layout: Layout, first: str, second: str) -> int:
    """How many inputs of `second` each output of `first` feeds; 0 if they do not fit."""
    source, target = layout[_block(first, "weight")], layout[_block(second, "weight")]
    if target[1] == source[0]:
        return 1
    flattened = len(source) > 2 and len(target) == 2
    return target[1] // source[0] if flattened and target[1] % source[0] == 0 else 0


def _repeats(layout: Layout, layers: list[str], first: str, second: str) -> int:
    if first == second or first not in layers or second not in layers:
        raise GeometryError(
            f"Rescale was asked for the pair ('{first}', '{second}'), but the matched blocks {list(layout.names)} have "
            f"the layers {layers} (weights with two axes or more). A pair names two of them; mend pairs=."
        )
    repeats = _fit(layout, first, second)
    if repeats == 0:
        source, target = layout[_block(first, "weight")], layout[_block(second, "weight")]
        raise GeometryError(
            f"Rescale cannot pair '{first}' with '{second}': {source[0]} outputs (weight {tuple(source)}) do not feed "
            f"{target[1]} inputs (weight {tuple(target)}). What multiplies the one must divide the other; mend pairs=."
        )
    return repeats


def _find_pairs(layout: Layout, layers: list[str]) -> list[tuple[str, str]]:
    pairs = [pair for pair in itertools.pairwise(layers) if _fit(layout, *pair)]
    if not pairs:
        raise GeometryError(
            f"Rescale found no consecutive layers to pair in the blocks {list(layout.names)}: it has the layers "
            f"{layers} (weights with two axes or more), and no one's outputs fit the inputs of the next. Nothing would "
            "be rescaled and the coordinates would stay as they are; give pairs=[('0', '2')], match the weights of two "
            "layers, or use maps.Scale."
        )
    return pairs
