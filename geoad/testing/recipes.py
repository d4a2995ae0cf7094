"""Changes of coordinates to test with: a catalogue of every map, a standard set of charts, the condition of a Jacobian."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from geoad import maps
from geoad.charts import Chart, Point, Reparametrization
from geoad.charts.reparametrization import between
from geoad.errors import GeometryError
from geoad.maps.base import Map
from geoad.maps.select import Recipe, bind
from geoad.params import Blocks, Layout

__all__ = ["RECIPES", "applicable", "condition", "dense_jacobian", "generic_blocks", "inside", "standard_charts"]

Maker = Callable[[torch.Generator], Recipe]


def _factor(draws: torch.Generator) -> float:
    """A factor between 1/3 and 3, of either sign."""
    size, sign = torch.rand(2, generator=draws, dtype=torch.float64).tolist()
    return math.copysign(3.0 ** (2 * size - 1), sign - 0.5)


def _each(fn: Callable[[Tensor], Tensor], x: Any) -> Any:
    """`fn` of a tensor, or of all tensors of a dict."""
    return fn(x) if isinstance(x, Tensor) else {name: fn(block) for name, block in x.items()}


RECIPES: dict[str, Maker] = {
    "identity": lambda draws: maps.Identity(),
    "scale": lambda draws: maps.Scale(_factor(draws)),
    "exp": lambda draws: maps.Exp(),
    "log": lambda draws: maps.Compose(maps.Softplus(), maps.Log()),
    "softplus": lambda draws: maps.Softplus(),
    "asinh": lambda draws: maps.Asinh(),
    "sinh": lambda draws: maps.Sinh(),
    "tanh": lambda draws: maps.Tanh(),
    "atanh": lambda draws: maps.Compose(maps.Tanh(), maps.Scale(0.75), maps.Atanh()),
    "power": lambda draws: maps.Power(),
    "root": lambda draws: maps.Power(-0.5),
    "affine": lambda draws: maps.Affine(generator=draws),
    "layers": lambda draws: maps.LayerAffine(generator=draws),
    "polar": lambda draws: maps.Polar(),
    "polar columns": lambda draws: maps.Polar(0),
    "polar block": lambda draws: maps.Polar(None),
    "polar plane": lambda draws: {"[23].bias": maps.PolarPlane(2 * math.pi)},
    "stereographic": lambda draws: maps.Polar(kind="stereographic"),
    "householder": lambda draws: maps.Householder(generator=draws),
    "householder right": lambda draws: maps.Householder(2, "right", generator=draws),
    "orthogonal": lambda draws: maps.Orthogonal(generator=draws),
    "orthogonal block": lambda draws: maps.Orthogonal(side="all", generator=draws),
    "permutation": lambda draws: maps.Permutation(generator=draws),
    "signed permutation": lambda draws: maps.Permutation(dim=0, signs="random", generator=draws),
    "rescale": lambda draws: maps.Rescale(generator=draws),
    "coupling": lambda draws: maps.Coupling(generator=draws),
    "additive coupling": lambda draws: maps.Coupling("additive", layers=3, swap=True, generator=draws),
    "inversion": lambda draws: maps.Inversion(2.0),
    "wrap": lambda draws: maps.Wrap(),
    "functions": lambda draws: maps.Functions(functools.partial(_each, torch.asinh), functools.partial(_each, torch.sinh)),
    "inverse": lambda draws: maps.Inverse(maps.Compose(maps.Affine(generator=draws), maps.Asinh())),
}
"""Every map of `geoad.maps`, in forms that are defined at the points of `generic_blocks`."""


@functools.lru_cache(maxsize=256)
def applicable(layout: Layout) -> tuple[str, ...]:
    """The names in `RECIPES` that can be bound to these blocks (`Rescale` needs a pair of layers, `Coupling` two numbers)."""
    found: list[str] = []
    for name, make in RECIPES.items():
        try:
            bind(make(torch.Generator().manual_seed(0)), layout)
        except GeometryError:
            continue
        found.append(name)
    return tuple(found)


def generic_blocks(layout: Layout, seed: int, batch: Sequence[int] = (), dtype: torch.dtype = torch.float64) -> Blocks:
    """Coordinates with 0.1 < |θ_i| < 0.9 and random signs: inside the domain of every map in `RECIPES`, well-conditioned."""
    draws = torch.Generator().manual_seed(seed)
    size = 0.1 + 0.8 * torch.rand(*batch, layout.dim, generator=draws, dtype=torch.float64)
    sign = torch.where(torch.rand(*batch, layout.dim, generator=draws, dtype=torch.float64) < 0.5, -1.0, 1.0)
    return layout.unravel((size * sign).to(dtype))


def dense_jacobian(bound: Map, x: Blocks) -> Tensor:
    """∂φ/∂θ at x, (d, d) in the order of the layout, by autodiff of `forward` alone.

    For a map that cannot be undone ∂θ/∂ψ at the section over x, by autodiff of `invert` alone.
    """
    start, end, fn = bound.bound_layout(), Layout(bound.image_shapes), bound.forward
    if bound.by_section:
        x, start, end, fn = bound.forward(x), end, start, bound.invert

    def raveled(vector: Tensor) -> Tensor:
        return end.ravel(fn(start.unravel(vector)))

    result: Any = torch.func.jacrev(raveled)(start.ravel(x))
    return result


def condition(phi: Reparametrization | Chart | Map, p: Point | Blocks) -> float:
    """The condition number of J = ∂ψ/∂θ at p: how many digits a change of coordinates may cost.

    For a map that cannot be undone that of ∂θ/∂ψ, at its section over p.

    Args:
        phi: a reparametrization, a bound map, or a chart ψ (then θ is its reference chart).
        p: a single point in any chart, or blocks of the map's source.

    >>> import torch, geoad
    >>> x = geoad.Chart({"x": (2,)}, name="x")
    >>> phi = x.reparametrize(geoad.maps.Scale(torch.tensor([2.0, 10.0])))
    >>> geoad.testing.condition(phi, x.point(torch.ones(2)))
    5.0
    """
    if isinstance(phi, Chart):
        phi = between(phi.reference, phi)
    if isinstance(p, Point):
        if not isinstance(phi, Reparametrization):
            raise GeometryError(
                "condition was given a bare map and a Point. A map on plain blocks does not know charts, so it is "
                "not known which coordinates of the point it takes; pass p.blocks of the right chart, or the "
                "Reparametrization."
            )
        p = p.to(phi.source).blocks
    bound = phi.map if isinstance(phi, Reparametrization) else phi
    with torch.no_grad():
        return round(float(torch.linalg.cond(dense_jacobian(bound, p))), 10)


def inside(bound: Map, x: Blocks, max_condition: float) -> bool:
    """True if `x` is in the domain of the map, its value is in the image, and J is conditioned better than `max_condition`."""
    if bound.outside_domain(x) is not None or bound.outside_image(bound.forward(x)) is not None:
        return False
    found = condition(bound, x)
    return math.isfinite(found) and found <= max_condition


def standard_charts(chart: Chart, *, seed: int = 0) -> dict[str, Chart]:
    """The charts in which `assert_invariant` looks: each betrays another mistake.

    * ``orthogonal`` (reflections in each block): nearly everything that uses the chart's own Euclidean metric survives it;
    * ``scale`` (ψ = 3θ): norms, traces, identity matrices and step sizes of the chart's own coordinates do not;
    * ``layers``: a different factor for each block;
    * ``affine``: mixes all blocks; diagonals and blocks built in ψ do not survive;
    * ``asinh``, ``softplus``: curved: plain second derivatives and straight lines of ψ do not survive;
    * ``coupling``: curved, and mixes all blocks.

    Each is a reparametrization of `chart` itself, with full domain. Above 2000 coordinates ``affine`` is per layer.
    """
    draws = torch.Generator().manual_seed(seed)
    names = chart.layout.names
    factors = [0.5, 2.0, -0.25, 1.5, -3.0]
    recipes: dict[str, Recipe] = {
        "orthogonal": maps.Householder(2, generator=draws),
        "scale": maps.Scale(3.0),
        "layers": {name: maps.Scale(factors[i % len(factors)]) for i, name in enumerate(names)},
        "affine": maps.Affine(generator=draws, per_layer=chart.dim > 2000),
        "asinh": maps.Asinh(),
        "softplus": maps.Softplus(),
    }
    if chart.dim > 1:
        recipes["coupling"] = maps.Coupling(generator=draws)
    return {name: chart.reparametrize(recipe, name).target for name, recipe in recipes.items()}
