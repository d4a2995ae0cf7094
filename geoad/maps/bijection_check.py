"""Whether a pair of functions that claims to be a bijection is a change of coordinates, found out by numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributions.constraint_registry import transform_to

from geoad.errors import GeometryError, NotADiffeomorphismError, UnsupportedModuleError
from geoad.maps.numbers import draw

__all__ = ["DENSE", "Findings", "Pair", "derivative", "examine", "matrix", "push", "satisfies"]

DENSE = 1024
"""The number of coordinates up to which dense Jacobians are built for a check."""


@dataclass(frozen=True)
class Pair:
    """What is claimed: ψ = forward(θ), θ = backward(ψ), log |det ∂ψ/∂θ| = volume(θ, ψ), on a block of one shape.

    Attributes:
        title: what the map is called in messages.
        domain: the constraint of torch that θ satisfies.
        elementwise: whether the Jacobian is claimed to be diagonal.
    """

    title: str
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Tensor]
    volume: Callable[[Tensor, Tensor], Tensor]
    domain: Any
    elementwise: bool


@dataclass(frozen=True)
class Findings:
    """What holds of a `Pair`.

    Attributes:
        image: the shape of ψ.
        numeric: the way back is only approximate, or cannot be differentiated.
        volume: the claimed volume is right.
    """

    image: torch.Size
    numeric: bool
    volume: bool


def examine(pair: Pair, shape: torch.Size) -> Findings:
    """Check dimension, rank, round trip and volume at two points of the domain.

    Raises:
        NotADiffeomorphismError: it is no change of coordinates; the message says what was found.
        UnsupportedModuleError: `torch.func` cannot differentiate it.
        GeometryError: it does not act on blocks of this shape.
    """
    found: list[Findings] = []
    with torch.no_grad():
        for seed in (0, 1):
            x = _sample(pair, shape, seed)
            y = _value(pair, x)
            if not x.numel():
                return Findings(y.shape, numeric=False, volume=False)
            jacobian = _jacobian(pair, x)
            numeric = not _returns(pair, x, y, jacobian)
            found.append(Findings(y.shape, numeric, _volume_holds(pair, x, y, jacobian)))
    return Findings(found[0].image, any(f.numeric for f in found), all(f.volume for f in found))


def satisfies(constraint: Any, x: Tensor) -> bool:
    """True if `x` satisfies a constraint of torch strictly: bounds count as outside."""
    inner = getattr(constraint, "base_constraint", constraint)
    parts = getattr(inner, "cseq", None)
    if parts is not None:  # torch puts the answers of the parts together, which fails if they have axes of their own
        pieces = x.split(list(inner.lengths), inner.dim) if hasattr(inner, "lengths") else x.unbind(inner.dim)
        return all(satisfies(each, piece) for each, piece in zip(parts, pieces, strict=True))
    low, high = getattr(inner, "lower_bound", -torch.inf), getattr(inner, "upper_bound", torch.inf)
    return bool(torch.as_tensor(inner.check(x)).all()) and bool(((x > low) & (x < high)).all())


def matrix(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The dense Jacobian of `fn` at `x`, (number of values, number of arguments)."""
    jacobian = cast(Tensor, torch.func.jacrev(fn)(x))
    return jacobian.reshape(jacobian.shape[: jacobian.ndim - x.ndim].numel(), x.numel())


def derivative(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f'(x) of a function of single entries."""
    value, pull = torch.func.vjp(fn, x)[:2]
    return pull(torch.ones_like(value))[0]


def push(fn: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """The derivative of `fn` at x along v; by reverse mode twice where forward mode is not implemented."""
    try:
        return cast(Tensor, torch.func.jvp(fn, (x,), (v,))[1])
    except (RuntimeError, NotImplementedError):
        value, pull = torch.func.vjp(fn, x)[:2]
        return torch.func.vjp(lambda w: pull(w)[0], torch.zeros_like(value))[1](v)[0]


def _sample(pair: Pair, shape: torch.Size, seed: int) -> Tensor:
    """A point of the domain."""
    raw = 0.7 * draw(torch.Generator().manual_seed(seed), *shape)
    for constrained in (True, False):
        try:
            x = _constrained(pair.domain, raw) if constrained else raw
            if x.shape == shape and satisfies(pair.domain, x):
                return x.to(torch.float64)
        except (NotImplementedError, ValueError, RuntimeError, AssertionError, IndexError):
            continue
    raise GeometryError(
        f"{pair.title} was bound to a block of shape {tuple(shape)}, but no point of its domain, {pair.domain}, was found. "
        "A change of coordinates is checked at a point of its domain when it is bound; choose blocks of another shape, or give "
        "the domain a constraint for which torch.distributions.transform_to is known."
    )


def _constrained(domain: Any, raw: Tensor) -> Tensor:
    """A point of the domain in the place of `raw`."""
    into = cast(Any, transform_to(domain))
    return into(raw.flatten()[: into.inverse_shape(raw.shape).numel()].reshape(into.inverse_shape(raw.shape)))


def _value(pair: Pair, x: Tensor) -> Tensor:
    try:
        y = pair.forward(x)
    except NotImplementedError as error:
        raise NotADiffeomorphismError(
            f"{pair.title} has no values that are implemented (a distribution without cdf, for instance). Pass one that can be "
            "evaluated, or write the map as maps.Functions(forward, inverse)."
        ) from error
    except (ValueError, RuntimeError, AssertionError, IndexError) as error:
        raise GeometryError(
            f"{pair.title} cannot be applied to a block of shape {tuple(x.shape)}: {error}. It has to act on each block it is "
            "bound to; choose the blocks by name pattern, give it numbers of that shape, or (for a conditional flow) context=."
        ) from error
    if y.numel() != x.numel():
        raise NotADiffeomorphismError(
            f"{pair.title} maps a block of shape {tuple(x.shape)} to one of shape {tuple(y.shape)}, {x.numel()} numbers to "
            f"{y.numel()}. A change of coordinates keeps the dimension, for its Jacobian must be invertible; use "
            "maps.Immersion for fewer coordinates than numbers, or maps.Submersion for more."
        )
    if not bool(y.isfinite().all()):
        raise NotADiffeomorphismError(
            f"{pair.title} has no finite value at a point of its own domain ({pair.domain}). Nothing can be moved there; mend "
            "its parameters, or its domain."
        )
    return y


def _jacobian(pair: Pair, x: Tensor) -> Tensor | None:
    """∂ψ/∂θ, its diagonal for an elementwise map, or None where it would be too large; refused unless invertible."""
    try:
        return _slopes(pair, x) if pair.elementwise else _dense(pair, x)
    except RuntimeError as error:
        raise UnsupportedModuleError(
            f"{pair.title} cannot be differentiated by torch.func: {str(error).splitlines()[0]} Vectors and differentials are "
            "moved by its Jacobian; use a transform that is made of ordinary operations (of zuko's flows: NICE, MAF, NSF, "
            "NCSF, NAF, BPF, GF, but not SOSPF, UNAF or CNF)."
        ) from error


def _slopes(pair: Pair, x: Tensor) -> Tensor:
    slopes = derivative(pair.forward, x)
    bad = (slopes == 0) | ~slopes.isfinite()
    if bool(bad.any()):
        raise NotADiffeomorphismError(
            f"{pair.title} has the derivative {float(slopes[bad][0]):g} at θ = {float(x[bad][0]):.5g}, in {int(bad.sum())} of "
            f"{bad.numel()} entries. There it forgets a coordinate and has no smooth inverse; change its parameters, or use "
            "maps.SmoothMap, which moves less."
        )
    v = draw(torch.Generator().manual_seed(2), *x.shape)
    if not torch.allclose(torch.func.vjp(pair.forward, x)[1](v)[0], slopes * v, rtol=1e-6, atol=1e-9):
        raise GeometryError(
            f"{pair.title} says that it acts on single entries (event_dim = 0), but its entries depend on each other. Diagonal "
            "structure would be kept that is not there; give its domain and codomain the number of axes that it mixes."
        )
    return slopes


def _dense(pair: Pair, x: Tensor) -> Tensor | None:
    if x.numel() > DENSE:
        return None
    jacobian = matrix(pair.forward, x)
    rank = int(torch.linalg.matrix_rank(jacobian)) if bool(jacobian.isfinite().all()) else 0
    if rank < x.numel():
        raise NotADiffeomorphismError(
            f"the Jacobian of {pair.title} on a block of shape {tuple(x.shape)} is {x.numel()} × {x.numel()}, but of rank "
            f"{rank}: {x.numel() - rank} directions of θ have no effect on ψ, so there is no way back. Use maps.SmoothMap, "
            "which needs no rank (and moves less), or coordinates that all count: from_transform(..., free=True) where it "
            "knows them."
        )
    return jacobian


def _returns(pair: Pair, x: Tensor, y: Tensor, jacobian: Tensor | None) -> bool:
    """True if the way back is exact and differentiable, False if it is approximate; refused if it leads elsewhere."""
    try:
        back = pair.backward(y)
    except NotImplementedError as error:
        raise NotADiffeomorphismError(
            f"{pair.title} has no inverse that is implemented. Objects move both ways; give the transform "
            "_inverse, or write the map as maps.Functions(forward, inverse)."
        ) from error
    size = 1 + float(x.abs().max())
    gap = float((back - x).abs().max()) / size
    if not gap <= 1e-3:
        i = int((back - x).abs().argmax())
        raise NotADiffeomorphismError(
            f"{pair.title} is not one to one: its inverse leads from ψ = {float(y.flatten()[i]):.5g} back to "
            f"θ = {float(back.flatten()[i]):.5g}, the value of the map at θ = {float(x.flatten()[i]):.5g}. Points of a chart "
            "have one set of coordinates; restrict the map to a domain on which it is invertible (maps.Functions with domain=)."
        )
    condition = _condition(jacobian, pair.elementwise)
    if gap > 1e4 * torch.finfo(x.dtype).eps * condition:
        return False
    try:
        return _inverse_jacobians(pair, x, y, jacobian, 1e-9 * condition)
    except RuntimeError:
        return False


def _inverse_jacobians(pair: Pair, x: Tensor, y: Tensor, jacobian: Tensor | None, tolerance: float) -> bool:
    """True if the Jacobian of the way back is the inverse of the Jacobian; for large blocks along one direction."""
    if pair.elementwise and jacobian is not None:
        product = derivative(pair.backward, y) * jacobian
        return bool(((product - 1).abs() <= tolerance).all())
    if jacobian is not None:
        product = matrix(pair.backward, y) @ jacobian
        return bool(((product - torch.eye(x.numel(), dtype=x.dtype, device=x.device)).abs() <= tolerance).all())
    v = draw(torch.Generator().manual_seed(3), *x.shape)
    back = push(pair.backward, y, push(pair.forward, x, v))
    return bool((back - v).abs().max() <= 1e-6 * v.abs().max())


def _condition(jacobian: Tensor | None, diagonal: bool) -> float:
    if jacobian is None:
        return 1.0
    if diagonal:
        return float(jacobian.abs().max() / jacobian.abs().min())
    return float(torch.linalg.cond(jacobian))


def _volume_holds(pair: Pair, x: Tensor, y: Tensor, jacobian: Tensor | None) -> bool:
    try:
        claimed = float(pair.volume(x, y))
        torch.func.grad(pair.volume)(x, y)
    except (NotImplementedError, RuntimeError, ValueError, AttributeError):
        return False
    if jacobian is None:
        return True
    true = jacobian.abs().log().sum() if pair.elementwise else torch.linalg.slogdet(jacobian).logabsdet
    return abs(claimed - float(true)) <= 1e-9 * max(1.0, abs(float(true)))
