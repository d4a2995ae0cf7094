"""Which kind of map a parametrization is, found out by numbers: dimensions, rank at several points, the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from geoad.errors import GeometryError, NotADiffeomorphismError, UnsupportedModuleError
from geoad.maps.bijection_check import derivative, matrix, push
from geoad.maps.numbers import draw
from geoad.maps.parametrized_maps import Making, Part
from geoad.params import Layout

__all__ = ["Kind", "classify"]

Kind = Literal["elementwise", "diffeomorphism", "submersion", "immersion", "smooth"]

DENSE = 4_000_000
"""The largest Jacobian (number of entries) that is built to find its rank."""


@dataclass(frozen=True)
class Facts:
    """What was found of the parametrization of the tensor `name`.

    Attributes:
        theta: the number of entries of θ.
        psi: the number of entries of ψ; `counting` of them have an effect.
        ranks: the rank of ∂θ/∂ψ at the present ψ and at others; empty if it is too large to be built.
        on_image: right_inverse gives a ψ over each θ that the parametrization makes.
        over_all: over each θ nearby.
        two_sided: it gives the ψ that θ was made of.
        diagonal: every entry of θ is made of the same entry of ψ alone.
        differentiable: right_inverse has the derivative that it should have.
        smooth: small changes of ψ change θ as its Jacobian says; `smooth_counting` if only entries that count are changed.
    """

    name: str
    theta: int
    psi: int
    counting: int
    ranks: tuple[int, ...]
    on_image: bool
    over_all: bool
    two_sided: bool
    diagonal: bool
    differentiable: bool
    smooth: bool
    smooth_counting: bool

    @property
    def rank(self) -> int | None:
        """The rank, if it is known and the same everywhere."""
        return self.ranks[0] if len(set(self.ranks)) == 1 else None

    @property
    def invertible(self) -> bool:
        """As far as is known, it is one to one and onto an open set."""
        return self.theta == self.psi and self.over_all and self.two_sided and self.ranks in ((), (self.theta,) * 3)

    def __str__(self) -> str:
        rank = "not computed, it is too large" if not self.ranks else " or ".join(map(str, dict.fromkeys(self.ranks)))
        way = "over every θ nearby" if self.over_all else "over the θ it makes" if self.on_image else "over no θ"
        return (
            f"the parametrization of '{self.name}' makes {self.theta} numbers of {self.psi}, of which {self.counting} have an "
            f"effect; the rank of its Jacobian is {rank}; right_inverse finds a ψ {way}"
        )


def classify(name: str, modules: nn.Module, parts: dict[str, Part], kind: str | None) -> tuple[Kind, Making]:
    """The kind of map, and the making of it with the entries that count.

    Args:
        name: of the parametrized tensor, for messages.
        modules: a ``ParametrizationList`` whose numbers are constants.
        parts: its trained tensors.
        kind: what is asked for; None for what is found.

    Raises:
        GeometryError: what is asked for is not what was found, or right_inverse is missing.
        UnsupportedModuleError: it is no function of ψ, or not a smooth one.
    """
    making = Making(modules, parts, section=False)
    with torch.no_grad():
        _require_function(name, making)
        facts, used = _examine(name, making)
    if not facts.smooth_counting:
        raise _jump(facts)
    found = _found(facts) if kind is None else _checked(facts, kind)
    if found == "immersion" and facts.counting < facts.psi:
        parts = {
            key: part if bool(used[key].all()) else replace(part, entries=used[key].nonzero().reshape(-1))
            for key, part in parts.items()
            if bool(used[key].any())
        }
    elif not facts.smooth:
        raise _jump(facts)
    section = facts.over_all or (facts.on_image and found in ("immersion", "smooth"))
    return found, Making(modules, parts, section=section, differentiable=facts.differentiable)


def _jump(facts: Facts) -> UnsupportedModuleError:
    return UnsupportedModuleError(
        f"{facts}, but small changes of ψ do not change θ as its Jacobian says: it jumps, or cuts off gradients (the "
        "householder map of torch.nn.utils.parametrizations.orthogonal truncates the diagonal to integers). Use another map, "
        "for instance orthogonal(..., orthogonal_map='matrix_exp'), or, where other entries of ψ count, kind='immersion'."
    )


# -- decisions -----------------------------------------------------------------------------------------------------------------


def _found(facts: Facts) -> Kind:
    if facts.invertible and facts.diagonal:
        return "elementwise"
    if not facts.ranks:
        raise GeometryError(
            f"{facts}. Which kind of map it is cannot be found out at this size; say what it is: kind='diffeomorphism', "
            "'submersion' or 'smooth'."
        )
    if facts.invertible:
        return "diffeomorphism"
    if facts.rank == facts.theta and facts.over_all:
        return "submersion"
    if facts.rank == facts.theta:
        raise GeometryError(
            f"{facts}. It reaches every weight nearby, so points of θ have coordinates ψ, but how to find them is not known. "
            "Give the module a right_inverse with module(right_inverse(θ)) = θ, or pass kind='smooth', which moves less."
        )
    if facts.rank == facts.counting and facts.counting < facts.theta:
        return "immersion"
    return "smooth"


def _checked(facts: Facts, kind: str) -> Kind:
    if kind == "smooth":
        return "smooth"
    if kind == "diffeomorphism" and facts.invertible:
        return "elementwise" if facts.diagonal else "diffeomorphism"
    if kind == "submersion" and facts.over_all and facts.ranks in ((), (facts.theta,) * 3):
        return "submersion"
    if kind == "immersion" and facts.ranks and facts.rank == facts.counting:
        return "immersion"
    wanted = {
        "diffeomorphism": "as many numbers as it makes, full rank, and a right_inverse that leads back both ways",
        "submersion": "the rank of the numbers that it makes, and a right_inverse over all of them",
        "immersion": "the rank of the numbers that have an effect",
    }
    if kind not in wanted:
        raise GeometryError(f"there is no kind '{kind}' of maps; the kinds are {', '.join(wanted)} and smooth.")
    raise NotADiffeomorphismError(
        f"kind='{kind}' was asked for '{facts.name}', which needs {wanted[kind]}. But {facts}. The laws of a {kind} would be "
        "wrong; leave kind= out to get what it is, or pass kind='smooth'."
    )


# -- experiments ---------------------------------------------------------------------------------------------------------------


def _require_function(name: str, making: Making) -> None:
    """Refuse what has two values for one ψ: what draws at random, or changes its buffers."""
    twin = copy.deepcopy(making)
    start = twin.originals(torch.zeros((), dtype=torch.float64, device="cpu"))
    first, second = twin.make(start), twin.make(start)
    held = dict(making.hosted.module.named_buffers())
    changed = any(not torch.equal(value, held[key]) for key, value in twin.hosted.module.named_buffers())
    iterates = any(each.training and type(each).__name__ == "_SpectralNorm" for each in making.hosted.module.modules())
    if changed or iterates or not torch.equal(first, second):
        raise UnsupportedModuleError(
            f"the parametrization of '{name}' is no function of its parameters in this mode: each evaluation "
            f"{'changes its buffers' if changed or iterates else 'gives another weight'}. A map between charts has one value; "
            "call net.eval() first."
        )


def _examine(name: str, making: Making) -> tuple[Facts, dict[str, Tensor]]:
    start = making.originals(torch.zeros((), dtype=torch.float64, device="cpu"))
    layout = Layout({f"_{key}": value.shape for key, value in start.items()})
    flat = layout.ravel({f"_{key}": value for key, value in start.items()})

    def parts(vector: Tensor) -> dict[str, Tensor]:
        return {key[1:]: value for key, value in layout.unravel(vector).items()}

    def make(vector: Tensor) -> Tensor:
        return making.make(parts(vector)).reshape(-1)

    theta = make(flat)
    everything = torch.ones(flat.numel(), dtype=torch.bool, device=flat.device)
    jacobians: list[Tensor] = []
    used = everything
    if flat.numel() * theta.numel() <= DENSE:
        used = (_jacobian(name, make, flat) != 0).any(0)
        jacobians = [_jacobian(name, make, point) for point in _points(flat, used)]
        used = torch.stack([(each != 0).any(0) for each in jacobians]).any(0)
    points = _points(flat, used)
    on_image, over_all, two_sided, differentiable = _ways_back(making, points, make, parts)
    facts = Facts(
        name,
        theta.numel(),
        flat.numel(),
        int(used.sum()),
        tuple(int(torch.linalg.matrix_rank(each)) for each in jacobians),
        on_image,
        over_all,
        two_sided,
        list(start) == [""] and theta.numel() == flat.numel() and all(_diagonal(make, each) for each in points),
        differentiable,
        _smooth(make, flat, everything),
        _smooth(make, flat, used),
    )
    return facts, {key: value.reshape(-1) for key, value in parts(used).items()}


def _points(flat: Tensor, used: Tensor) -> list[Tensor]:
    """The present ψ and two others around it; entries without effect stay (they may be flags)."""
    size = float(flat[used].square().mean().sqrt()) if bool(used.any()) else 0.0
    scale = 0.3 * (size or 1.0)
    moves = [draw(torch.Generator().manual_seed(seed), flat.numel()) for seed in (1, 2)]
    return [flat, *(flat + scale * move * used for move in moves)]


def _jacobian(name: str, make: Callable[[Tensor], Tensor], flat: Tensor) -> Tensor:
    try:
        return matrix(make, flat)
    except RuntimeError as error:
        raise UnsupportedModuleError(
            f"the parametrization of '{name}' cannot be differentiated by torch.func: {str(error).splitlines()[0]} Objects are "
            "moved by its Jacobian; write the module with ordinary operations on tensors."
        ) from error


def _smooth(make: Callable[[Tensor], Tensor], flat: Tensor, moving: Tensor) -> bool:
    """A small step changes the value as the Jacobian says."""
    step = 1e-5 * float(1 + flat.abs().max()) * draw(torch.Generator().manual_seed(3), flat.numel()) * moving
    expected = 2 * push(make, flat, step)
    found = make(flat + step) - make(flat - step)
    return bool((found - expected).norm() <= 1e-3 * expected.norm() + 1e-12)


def _diagonal(make: Callable[[Tensor], Tensor], flat: Tensor) -> bool:
    slopes = derivative(make, flat)
    v = draw(torch.Generator().manual_seed(4), flat.numel())
    product = torch.func.vjp(make, flat)[1](v)[0]
    return bool((slopes != 0).all()) and torch.allclose(product, slopes * v, rtol=1e-9, atol=1e-12)


def _ways_back(
    making: Making, points: list[Tensor], make: Callable[[Tensor], Tensor], parts: Callable[[Tensor], dict[str, Tensor]]
) -> tuple[bool, bool, bool, bool]:
    """Whether right_inverse leads from the θ that are made back to them; from all θ nearby; back to their ψ; smoothly."""
    if not all(callable(getattr(module, "right_inverse", None)) for module in making.hosted.module.children()):
        return False, False, False, False
    shape = making.make(parts(points[0])).shape
    on_image = over_all = two_sided = True
    for seed, point in enumerate(points):
        theta = make(point)
        wiggle = 1 + 0.1 * draw(torch.Generator().manual_seed(5 + seed), theta.numel())
        again = _undone(making, theta.reshape(shape))
        on_image = on_image and again is not None and _close(making.make(again), theta)
        beside = _undone(making, (theta * wiggle).reshape(shape))
        over_all = over_all and on_image and beside is not None and _close(making.make(beside), theta * wiggle)
        given = parts(point)
        two_sided = two_sided and again is not None and all(_close(again[key], given[key]) for key in given)
    smoothly = over_all and _section_slope(making, make, make(points[0]).reshape(shape))
    return on_image, over_all, two_sided, smoothly


def _section_slope(making: Making, make: Callable[[Tensor], Tensor], theta: Tensor) -> bool:
    """J Jₛ = 1 for the derivative Jₛ of right_inverse, along one direction, in both modes (no_grad stops reverse mode only)."""
    v = draw(torch.Generator().manual_seed(9), *theta.shape)
    layout = Layout({f"_{key}": value.shape for key, value in making.undo(theta).items()})

    def undo(x: Tensor) -> Tensor:
        return layout.ravel({f"_{key}": value for key, value in making.undo(x).items()})

    try:
        lifted = push(undo, theta, v)
        pulled = torch.func.vjp(undo, theta)[1](torch.func.vjp(make, undo(theta))[1](v.reshape(-1))[0])[0]
    except (RuntimeError, NotImplementedError):
        return False
    return _close(push(make, undo(theta), lifted), v) and _close(pulled, v)


def _undone(making: Making, theta: Tensor) -> dict[str, Tensor] | None:
    """ψ by right_inverse; None if it refuses, or changes what the parametrization is (the base of trivialisations)."""
    twin = copy.deepcopy(making)
    held = dict(making.hosted.module.named_buffers())
    try:
        found = twin.undo(theta)
    except (RuntimeError, ValueError, NotImplementedError, KeyError, TypeError):
        return None
    changed = any(not torch.equal(value, held[key]) for key, value in twin.hosted.module.named_buffers())
    return None if changed else found


def _close(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.allclose(a.reshape(-1), b.reshape(-1), rtol=1e-8, atol=1e-10)
