"""The maps ψ ↦ θ of ``torch.nn.utils.parametrize``: the tensors that are trained, and the weight that is made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geoad.errors import GeometryError
from geoad.kernels.norms import SpelledOut
from geoad.kernels.solves import slogdet, solve
from geoad.kernels.spelled import depth
from geoad.maps.base import Map, need
from geoad.maps.bijection_check import derivative
from geoad.maps.elementwise import Elementwise
from geoad.maps.hosted import Hosted
from geoad.maps.immersion import Immersion
from geoad.maps.smooth import SmoothMap
from geoad.maps.submersion import Submersion
from geoad.params import is_wrapped, sub

__all__ = [
    "Making",
    "ParametrizedBlock",
    "ParametrizedEntries",
    "ParametrizedImmersion",
    "ParametrizedSmooth",
    "ParametrizedSubmersion",
]


@dataclass(frozen=True)
class Part:
    """A trained tensor: its name in the list of parametrizations, and which of its entries count (None: all)."""

    name: str
    shape: torch.Size
    entries: Tensor | None = None

    @property
    def coordinates(self) -> torch.Size:
        """The shape of the block of ψ."""
        return self.shape if self.entries is None else self.entries.shape


class Making(nn.Module):
    """How a weight is made, θ = f(ψ), and the way back where there is one.

    Args:
        modules: a ``ParametrizationList``, of which a copy is kept: all its numbers become constants.
        parts: the trained tensors, by the names that they have as parts of ψ.
        section: whether the ``right_inverse`` of the list gives a ψ over θ.
        differentiable: whether it can be differentiated; those of torch are evaluated without gradients.
    """

    def __init__(self, modules: nn.Module, parts: dict[str, Part], *, section: bool, differentiable: bool = True) -> None:
        super().__init__()
        self.hosted = Hosted(modules)
        self.parts = parts
        self.section = section
        self.differentiable = differentiable

    def values(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The trained tensors, by their names in the list."""
        found: dict[str, Tensor] = {}
        for key, part in self.parts.items():
            given = parts[key]
            if part.entries is not None:
                frame = self.original(part, given).reshape(-1)
                given = frame.scatter(0, part.entries.to(given.device), given).reshape(part.shape)
            found[part.name] = given
        return found

    def original(self, part: Part, like: Tensor) -> Tensor:
        """The stored value of a trained tensor."""
        held: Tensor = self.hosted.module.get_buffer(part.name)
        return held.to(device=like.device, dtype=like.dtype)

    def originals(self, like: Tensor) -> dict[str, Tensor]:
        """The stored values of all of them, as parts of ψ."""
        return {key: self.taken(part, self.original(part, like)) for key, part in self.parts.items()}

    @staticmethod
    def taken(part: Part, full: Tensor) -> Tensor:
        """The entries of a trained tensor that count."""
        return full if part.entries is None else full.reshape(-1)[part.entries.to(full.device)]

    def make(self, parts: dict[str, Tensor]) -> Tensor:
        """θ = f(ψ), where second derivatives are asked for without torch's weight norm, solves and reflections."""
        like = next(iter(parts.values()))
        with SpelledOut() if depth() > 0 else nullcontext():
            return self.hosted.run(lambda modules: modules(), like, self.values(parts))

    def undo(self, x: Tensor) -> dict[str, Tensor]:
        """A ψ over θ, by the right inverses in turn; what these do not give keeps its stored value."""

        def through(modules: Any) -> Any:
            value: Any = x
            for module in reversed(list(modules)):
                value = module.right_inverse(value)
            return value

        found: Any = self.hosted.run(through, x)
        given = {"original": found} if isinstance(found, Tensor) else {f"original{i}": each for i, each in enumerate(found)}
        return {
            key: self.taken(part, given[part.name] if part.name in given else self.original(part, x))
            for key, part in self.parts.items()
        }


class _Weight(SmoothMap):
    """What the kinds of maps have in common."""

    def __init__(self, making: Making) -> None:
        super().__init__()
        self.making = making

    def part_shapes(self, shape: torch.Size) -> dict[str, torch.Size]:
        return {key: part.coordinates for key, part in self.making.parts.items()}

    def _named(self, y: Any) -> dict[str, Tensor]:
        return {"": y} if self._bare else y

    def inverse_value(self, y: Any) -> Tensor:
        return self.making.make(self._named(y))

    def value(self, x: Tensor) -> Any:
        found = self.making.undo(x) if self.making.section else self._found(x)
        return found[""] if self._bare else found

    def _found(self, x: Tensor) -> dict[str, Tensor]:
        """The ψ over θ next to the original one, by Gauss and Newton's method; `bad_domain` tells where there is none."""
        theta, psi = self.bound_layout(), self.image_layout()
        point = self._image_blocks(self._plain(self.making.originals(x)))
        for _ in range(30):
            residual = sub(self._theta_blocks(x), self.invert(point))
            size = theta.ravel(residual).abs().amax() if theta.dim else x.new_zeros(())
            if not is_wrapped(residual) and not bool(size > 4 * torch.finfo(x.dtype).eps * (1 + x.abs().amax())):
                break
            step = torch.linalg.pinv(self.dense_jacobian(point), rtol=1e-7) @ theta.ravel(residual)
            point = psi.unravel(psi.ravel(point) + step)
        return self._named(self.parts_of(point))

    def _plain(self, parts: dict[str, Tensor]) -> Any:
        return parts[""] if self._bare else parts

    def bad_domain(self, x: Tensor) -> str | None:
        """θ has coordinates if the ψ that was found for it makes it again, to rounding."""
        back = self.inverse_value(self.value(x))
        off = (back - x).abs()
        fine = off <= 100 * torch.finfo(x.dtype).eps ** 0.75 * (1 + x.abs())
        return need(fine, "the parametrization must be able to make θ, but it makes another weight; the difference is", off)

    def bad_image(self, y: Any) -> str | None:
        theta = self.inverse_value(y)
        return need(theta.isfinite(), "the weight made of ψ must be finite", theta)

    @property
    def full_domain(self) -> bool:
        return False

    def push_inverse_block(self, x: Any, y: Any, v: Any) -> Any:
        try:
            return super().push_inverse_block(x, y, v)
        except (RuntimeError, NotImplementedError):  # no forward mode: by reverse mode twice
            value, pull = torch.func.vjp(self.inverse_value, y)[:2]
            return torch.func.vjp(lambda w: pull(w)[0], torch.zeros_like(value))[1](v)[0]


class ParametrizedSmooth(_Weight):
    """θ = f(ψ) of any rank, see `geoad.maps.SmoothMap`."""


class ParametrizedImmersion(_Weight, Immersion):
    """θ = f(ψ) with independent coordinates ψ of a smaller set of weights, see `geoad.maps.Immersion`."""

    value = _Weight.value
    bad_domain = _Weight.bad_domain


class ParametrizedSubmersion(_Weight, Submersion):
    """θ = f(ψ) onto all weights, with redundant coordinates, see `geoad.maps.Submersion`."""

    value = _Weight.value
    metric = None


class ParametrizedBlock(_Weight):
    """θ = f(ψ), one to one and onto an open set of weights: a change of coordinates."""

    law = "diffeomorphism"

    def value(self, x: Tensor) -> Any:
        found = super().value(x)
        for _ in range(0 if self.making.differentiable else 2):  # of Newton: with them two derivatives are right
            step = self.push_block(x, found, self.inverse_value(found) - x)
            moved = sub(self._named(found), self._named(step))
            found = self._plain(moved)
        return found

    def bad_image(self, y: Any) -> str | None:
        words = super().bad_image(y)
        if words is not None:
            return words
        again = self._named(self.value(self.inverse_value(y)))
        slack = torch.finfo(self.inverse_value(y).dtype).eps ** 0.5
        for key, part in self._named(y).items():
            off = (again[key] - part).abs()
            words = words or need(
                off <= slack * (1 + part.abs()), "ψ must be the one that right_inverse finds for its weight", off
            )
        return words

    def _matrix(self, y: Any) -> Tensor:
        return self.dense_jacobian(self._image_blocks(y))

    def push_block(self, x: Any, y: Any, v: Any) -> Any:
        flat = solve(self._matrix(y), self.bound_layout().ravel(self._theta_blocks(v)))
        return self.parts_of(self.image_layout().unravel(flat))

    def pull_block(self, x: Any, y: Any, w: Any) -> Any:
        flat = solve(self._matrix(y).mT, self.image_layout().ravel(self._image_blocks(w)))
        return self.theta_of(self.bound_layout().unravel(flat))

    def log_abs_det(self, x: Any, y: Any) -> Tensor:
        return -slogdet(self.dense_jacobian(y))[1]


class ParametrizedEntries(Elementwise):
    """θ_i = f(ψ_i): a change of coordinates of every entry by itself."""

    def __init__(self, making: Making) -> None:
        super().__init__()
        self.making = making

    def value(self, x: Tensor) -> Tensor:
        y = self.making.undo(x)[""]
        for _ in range(0 if self.making.differentiable else 2):
            y = y - (self.making.make({"": y}) - x) / derivative(self.inverse_value, y)
        return y

    def inverse_value(self, y: Tensor) -> Tensor:
        return self.making.make({"": y})

    def derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return derivative(self.inverse_value, y).reciprocal()

    def bad_domain(self, x: Tensor) -> str | None:
        y = self.value(x)
        slack = torch.finfo(x.dtype).eps ** 0.75 * 100
        fine = y.isfinite() & ((self.inverse_value(y) - x).abs() <= slack * (1 + x.abs()))
        return need(fine, "the parametrization must be able to make θ", x) or self._regular(y)

    def bad_image(self, y: Tensor) -> str | None:
        x = self.inverse_value(y)
        slack = torch.finfo(y.dtype).eps ** 0.5
        fine = x.isfinite() & ((self.value(x) - y).abs() <= slack * (1 + y.abs()))
        return need(fine, "ψ must be the one that right_inverse finds for its weight", y) or self._regular(y)

    def _regular(self, y: Tensor) -> str | None:
        slope = derivative(self.inverse_value, y)
        return need(slope.isfinite() & (slope != 0), "the derivative of the parametrization must be finite and not 0", y)


Kind = Callable[[Making], Map]


def frozen(modules: nn.Module) -> nn.Module:
    """`modules` (a copy that nobody else holds) with its parameters as float64 buffers: constants of a map."""
    for module in modules.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach().clone())
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point():
                setattr(module, name, buffer.detach().to(torch.float64, copy=True))
    return modules


def require_real(tensors: Sequence[Tensor], name: str) -> None:
    """Refuse complex parts: they have twice as many real coordinates as entries."""
    if any(not tensor.is_floating_point() for tensor in tensors):
        raise GeometryError(
            f"the parametrization of '{name}' is made of tensors that are not real. Coordinates are real numbers; parametrize "
            "the real and the imaginary part."
        )
