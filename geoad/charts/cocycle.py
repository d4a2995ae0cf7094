"""The cocycle property of an atlas, checked at sample points on plain numbers (points remember where they came from)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from geoad.charts.batches import singles
from geoad.charts.chart import Chart
from geoad.charts.point import Point
from geoad.errors import GeometryError
from geoad.params import Blocks

if TYPE_CHECKING:
    from geoad.charts.atlas import Atlas
    from geoad.charts.reparametrization import Reparametrization

__all__ = ["check"]


def check(atlas: Atlas, points: Sequence[Point], tolerance: float | None) -> float:
    """The largest relative error of the laws; raises `GeometryError` above the tolerance. See `Atlas.check_cocycle`."""
    worst = 0.0
    for point in points:
        here = point.to(atlas.chart(point.chart.reference))
        limit = 1e4 * torch.finfo(here.dtype).eps if tolerance is None else tolerance
        for x in singles(here.blocks, here.chart):
            for a, blocks in _around(atlas, here.chart, x).items():
                worst = max(worst, _check_from(atlas, a, blocks, limit))
    return worst


def _around(atlas: Atlas, a: Chart, x: Blocks) -> dict[Chart, Blocks]:
    """The coordinates in a, and in all charts that are joined to it directly and contain the point."""
    found = {a: x}
    for b in atlas.charts:
        y = None if b == a else _moved(atlas, a, b, x)
        if y is not None:
            found[b] = y
    return found


def _moved(atlas: Atlas, a: Chart, b: Chart, x: Blocks) -> Blocks | None:
    """The coordinates in b of the point x of a, by the direct transition; None if there is none."""
    step = atlas.direct(a, b)
    if step is None:
        return None
    bound = step[0].map
    if (bound.outside_domain(x) if step[1] else bound.outside_image(x)) is not None:
        return None
    y = bound.forward(x) if step[1] else bound.invert(x)
    return None if b.domain is not None and b.domain.violated(b.unpack(y)) is not None else y


def _check_from(atlas: Atlas, a: Chart, x: Blocks, limit: float) -> float:
    worst = 0.0
    flat = a.layout.ravel(x)
    seen = _around(atlas, a, x)

    def law(words: str, charts: tuple[Chart, ...], found: Tensor, wanted: Tensor) -> None:
        nonlocal worst
        error = float((found - wanted).abs().max() / (1 + wanted.abs().max()))
        if not error <= limit:  # also for nan
            raise GeometryError(_words(words, charts, flat, f"the relative error is {error:.3g}, allowed is {limit:.3g}"))
        worst = max(worst, error)

    for b, y in seen.items():
        if b == a:
            continue
        move = _jacobian(atlas, a, b, x)
        law("the Jacobian products are not the derivative", (a, b), _products(atlas, a, b, x, y), torch.stack([move, move]))
        again = _moved(atlas, b, a, y)
        if again is None:
            raise GeometryError(
                _words("the way back is refused", (a, b, a), flat, "there the point lies outside of the overlap")
            )
        law("the way there and back is not the identity", (a, b, a), a.layout.ravel(again), flat)
        eye = torch.eye(a.dim, dtype=move.dtype, device=move.device)
        law("the Jacobians there and back do not cancel", (a, b, a), _jacobian(atlas, b, a, y) @ move, eye)
        for c, z in seen.items():
            around = None if c in (a, b) else _moved(atlas, b, c, y)
            if around is not None:
                law("two transitions do not make the third", (a, b, c), c.layout.ravel(around), c.layout.ravel(z))
                both, direct = _jacobian(atlas, b, c, y) @ move, _jacobian(atlas, a, c, x)
                law("two Jacobians do not make the third", (a, b, c), both, direct)
    return worst


def _jacobian(atlas: Atlas, a: Chart, b: Chart, x: Blocks) -> Tensor:
    """∂(b)/∂(a) at x, by forward mode through the map itself."""
    phi, along = _step(atlas, a, b)
    move = phi.map.forward if along else phi.map.invert

    def raveled(flat: Tensor) -> Tensor:
        return b.layout.ravel(move(a.layout.unravel(flat)))

    jacobian: Any = torch.func.jacfwd(raveled)(a.layout.ravel(x))
    return jacobian


def _products(atlas: Atlas, a: Chart, b: Chart, x: Blocks, y: Blocks) -> Tensor:
    """The Jacobian twice, by the products that move vectors and covectors."""
    phi, along = _step(atlas, a, b)
    layout, bound = a.layout, phi.map
    theta, psi = (x, y) if along else (y, x)
    push, pull = (bound.push, bound.pull) if along else (bound.push_inverse, bound.pull_inverse)
    flat = layout.ravel(x)
    eye = torch.eye(a.dim, dtype=flat.dtype, device=flat.device)

    def rows(product: Any) -> Tensor:
        return torch.func.vmap(lambda e: layout.ravel(product(theta, psi, layout.unravel(e))))(eye)

    return torch.stack([rows(push).mT, rows(pull)])


def _step(atlas: Atlas, a: Chart, b: Chart) -> tuple[Reparametrization, bool]:
    step = atlas.direct(a, b)
    assert step is not None
    return step


def _words(law: str, charts: tuple[Chart, ...], x: Tensor, found: str) -> str:
    way = " -> ".join(f"'{chart.name}'" for chart in charts)
    return (
        f"the transitions of the atlas do not fit: {law}, {way}, at {x.tolist()} in chart '{charts[0].name}'; {found}. Then an "
        "object depends on the way it was moved; mend the transition (and its inverse and Jacobian products) between these "
        "charts."
    )
