r"""The law tables in code: how plain components move between two charts of a manifold.

==================  =============================  ===========================
object              law under φ, J = ∂ψ/∂θ         here
==================  =============================  ===========================
vector (1,0)        :math:`J v`                    `vector`
covector (0,1)      :math:`J^{-\top} \omega`       `covector`
(k,l) tensor        one of the above on each axis  `dense`
density, weight w   times :math:`|\det J|^{-w}`    `log_abs_det`
==================  =============================  ===========================

(0,2), (2,0) and (1,1) objects move lazily (`geoad.tensors`): their numbers stay in the chart where they were made.

Maps that cannot be undone (`geoad.maps.SmoothMap`, from ψ to θ) move only what has a law. `rule` is their table: some
objects move always, some *if* they come back unchanged on the way back (a vector that is tangent to the image of an
immersion, a form that is basic), the rest never.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from geoad.charts import Chart, Point, Reparametrization, over_batch, path
from geoad.errors import NotADiffeomorphismError
from geoad.maps.base import Law
from geoad.params import Blocks, first, is_wrapped, map_blocks

__all__ = [
    "Rule",
    "agree",
    "covector",
    "dense",
    "is_elementwise",
    "keeps_definite",
    "log_abs_det",
    "refusal",
    "require_law",
    "rule",
    "vector",
]

_Product = Callable[[Blocks, Blocks, Blocks], Blocks]

Rule = Literal["always", "if", "never"]


def rule(law: Law, along: bool, up: int, down: int) -> Rule:
    """Whether a (up, down) tensor moves from θ to ψ (`along`), or back, under a map of this kind.

    >>> from geoad.transport import rule
    >>> rule("submersion", True, 1, 0), rule("submersion", False, 0, 1), rule("immersion", False, 0, 2)
    ('always', 'if', 'never')
    """
    match law, along:
        case "diffeomorphism", _:
            return "always"
        case "submersion", True:
            return "always"
        case "submersion", False:
            return "if" if down else "always"
        case "immersion", True:
            return ("never" if down else "if") if up else "always"
        case "smooth", True:
            return "never" if up else "always"
        case _:
            return "never" if down else "always"


_REASONS: dict[tuple[Law, bool], tuple[str, str]] = {
    ("submersion", True): ("it would say nothing about the vertical directions of '{there}'", "Keep it in '{here}'"),
    ("submersion", False): (
        "it is not basic: it sees the vertical directions, along which the network does not change",
        "Keep it in '{here}', or compute the object at the point p.to({there})",
    ),
    ("immersion", True): (
        "what is not tangent to its image has no place there",
        "Compute it at a point of chart '{there}': geoad.grad, geoad.hessian and metric fields use the induced metric there",
    ),
    ("immersion", False): (
        "the chart covers only a subspace of '{there}', and knows nothing of the directions that leave it",
        "Compute it at the point p.to({there})",
    ),
    ("smooth", True): (
        "the map from '{there}' to '{here}' need not reach it",
        "Compute it at a point of chart '{there}'",
    ),
    ("smooth", False): (
        "many directions of '{here}', or none, stand for one of '{there}'",
        "Compute it at the point p.to({there})",
    ),
}


def refusal(what: str, phi: Reparametrization, along: bool) -> NotADiffeomorphismError:
    """The error for an object that has no law under `phi`."""
    here, there = (phi.source.name, phi.target.name) if along else (phi.target.name, phi.source.name)
    reason, remedy = _REASONS[phi.map.law, along]
    return NotADiffeomorphismError(
        f"{what} cannot be moved from chart '{here}' to chart '{there}': the map between them is no change of coordinates but "
        f"{_NAMES[phi.map.law]}, and {reason.format(here=here, there=there)}. {remedy.format(here=here, there=there)}."
    )


_NAMES: dict[Law, str] = {
    "submersion": "a submersion",
    "immersion": "an immersion",
    "smooth": "a smooth map that may have any rank",
}


def require_law(start: Chart, end: Chart, up: int, down: int, what: str) -> None:
    """Raise `NotADiffeomorphismError` if a (up, down) tensor has no law on the way, whatever its numbers."""
    for phi, along in path(start, end):
        if rule(phi.map.law, along, up, down) == "never":
            raise refusal(what, phi, along)


def agree(a: Tensor, b: Tensor) -> Tensor:
    """Whether a and b are equal up to the rounding of a least squares problem, relative to the larger of them."""
    slack = torch.finfo(a.dtype).eps ** 0.5 * torch.maximum(a.abs().amax(), b.abs().amax())
    return ((a - b).abs() <= slack).all()


# -- one step --------------------------------------------------------------------------------------------------------------


def _apply(product: _Product, x: Point, y: Point, v: Blocks, extra: int) -> Blocks:
    """The product under the batch axes of the point (in front) and `extra` further ones of the vector (behind them)."""
    points = len(x.batch_shape)
    if points == 0 and extra == 0:
        return product(x.blocks, y.blocks, v)
    fn: Callable[..., Blocks] = product
    for _ in range(extra):
        fn = torch.func.vmap(fn, in_dims=(None, None, 0))
    return over_batch(fn, points, x.blocks, y.blocks, v)


def _product(phi: Reparametrization, along: bool, contravariant: bool) -> _Product:
    bound = phi.map
    if contravariant:
        return bound.push if along else bound.push_inverse
    return bound.pull_inverse if along else bound.pull


def _step(v: Blocks, here: Point, there: Point, phi: Reparametrization, along: bool, up: bool) -> Blocks:
    theta, psi = (here, there) if along else (there, here)
    extra = len(here.chart.layout.batch_shape(v)) - len(here.batch_shape)
    return _apply(_product(phi, along, up), theta, psi, v, extra)


def _checked(v: Blocks, moved: Blocks, here: Point, there: Point, phi: Reparametrization, along: bool, up: bool) -> Blocks:
    """`moved`, if it comes back as `v`; under a transform, where values cannot be read, NaN if it does not."""
    back = _step(moved, there, here, phi, not along, up)
    layout = here.chart.layout
    same = agree(layout.ravel(v), layout.ravel(back))
    if is_wrapped({"": same}):
        return map_blocks(lambda block: torch.where(same, block, torch.nan), moved)
    if not bool(same):
        raise refusal("the vector" if up else "the covector", phi, along)
    return moved


# -- all steps -------------------------------------------------------------------------------------------------------------


def _move(v: Blocks, at: Point, end: Chart, up: bool, checked: bool) -> Blocks:
    here = at
    for phi, along in path(at.chart, end, at):
        there = here.to(phi.target if along else phi.source)
        if checked and rule(phi.map.law, along, int(up), int(not up)) == "never":
            raise refusal("the vector" if up else "the covector", phi, along)
        moved = _step(v, here, there, phi, along, up)
        if checked and rule(phi.map.law, along, int(up), int(not up)) == "if":
            moved = _checked(v, moved, here, there, phi, along, up)
        v, here = moved, there
    return v


def vector(v: Blocks, at: Point, end: Chart, *, checked: bool = False) -> Blocks:
    """J v: components of a vector at `at` in chart `end`, given those in the chart of `at`.

    With ``checked`` a vector without a law is refused; without, the products of the maps are used as they are, which
    is what the factors of a congruence need.
    """
    return _move(v, at, end, True, checked)


def covector(w: Blocks, at: Point, end: Chart, *, checked: bool = False) -> Blocks:
    """J⁻ᵀ w: components of a covector at `at` in chart `end`, given those in the chart of `at`; see `vector`."""
    return _move(w, at, end, False, checked)


def log_abs_det(at: Point, end: Chart) -> Tensor:
    """log |det ∂(end)/∂(chart of at)| at the point, a scalar (or one for each point of a batch)."""
    total = first(at.blocks).new_zeros(at.batch_shape)
    here = at
    for phi, along in path(at.chart, end, at):
        if phi.map.law != "diffeomorphism":
            raise NotADiffeomorphismError(
                f"a density cannot be moved between the charts '{phi.source.name}' and '{phi.target.name}': the map between "
                f"them is {_NAMES[phi.map.law]}, whose Jacobian has no determinant. Determinants of forms exist as quotients: "
                "geoad.quotient_logdet(B, G)."
            )
        there = here.to(phi.target if along else phi.source)
        theta, psi = (here, there) if along else (there, here)
        fn: Callable[..., Tensor] = phi.map.log_abs_det
        for _ in at.batch_shape:
            fn = torch.func.vmap(fn)
        step = fn(theta.blocks, psi.blocks)
        total = total + step if along else total - step
        here = there
    return total


def dense(data: Tensor, ups: Sequence[bool | None], at: Point, end: Chart, *, checked: bool = False) -> Tensor:
    """Move raveled components (n_1, ..., n_k): each axis by its own law; None marks an axis that does not move."""
    points = at.batch_shape
    if data.ndim - len(ups) < len(points):
        data = data.expand(*points, *data.shape)
    here = at
    # upper axes first: whether lower ones are basic is asked of what remains
    order = sorted((axis for axis, up in enumerate(ups) if up is not None), key=lambda axis: not ups[axis])
    for phi, along in path(at.chart, end, at):
        there = here.to(phi.target if along else phi.source)
        near, far = here.chart.layout, there.chart.layout
        conditional = checked and rule(phi.map.law, along, ups.count(True), ups.count(False)) == "if"
        for axis in order:
            up = bool(ups[axis])
            v = near.unravel(data.movedim(axis - len(ups), -1))
            moved = _step(v, here, there, phi, along, up)
            if conditional and up == along:
                moved = _checked(v, moved, here, there, phi, along, up)
            data = far.ravel(moved).movedim(-1, axis - len(ups))
        here = there
    return data


def keeps_definite(start: Chart, end: Chart) -> bool:
    """True if a definite form or cometric in `start` is definite in `end`: no direction is lost or added on the way."""
    if start.space == end.space:
        return True
    kept = {("diffeomorphism", True), ("diffeomorphism", False), ("immersion", True), ("submersion", False)}
    return all((phi.map.law, along) in kept for phi, along in path(start, end))


def is_elementwise(start: Chart, end: Chart) -> bool:
    """True if the Jacobian between the charts is diagonal by construction."""
    return all(phi.map.elementwise for phi, _ in path(start, end))
