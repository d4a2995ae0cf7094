"""A transform in the manner of ``torch.distributions`` as a change of coordinates of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from geoad.errors import GeometryError, NotADiffeomorphismError
from geoad.kernels.solves import exact_solves, slogdet, solve
from geoad.maps.base import BlockMap, need
from geoad.maps.bijection_check import DENSE, Pair, derivative, examine, matrix, push, satisfies
from geoad.maps.elementwise import Elementwise
from geoad.maps.hosted import Hosted
from geoad.maps.transform_tree import FRESH, Slot, has_fixed_axes, is_elementwise, is_linear, rebuild

__all__ = ["Transformed", "TransformedEntries", "transformed"]


class Transformed(BlockMap):
    r"""ψ = T(θ) for a transform T in the manner of ``torch.distributions``, acting on the last axes of a block.

    Its dimension, rank, round trip and volume are checked in float64 when it is bound. Where the inverse of T is only
    approximate (bisection) or cannot be differentiated, it is sharpened by Newton's method with the Jacobian J of T, and the
    products with :math:`J^{-1}` are solved; `numeric` says so.

    Made by `geoad.maps.from_transform`.

    Args:
        source: a transform, or a module that returns one when it is called.
        context: what the module is called with; None for nothing.
        title: what the map is called in messages.
    """

    def __init__(self, source: Transform | nn.Module, context: Tensor | None = None, title: str = "") -> None:
        super().__init__()
        self.title = title or type(source).__name__
        self.numeric = False
        self._volume = False
        self._count = 0
        self.hosted: Hosted | None = None
        if isinstance(source, nn.Module):
            self.hosted = Hosted(source)
        else:
            self._template: Any = rebuild(source, self._own)
        self.context: Tensor | None
        self.register_buffer("context", None if context is None else context.detach().to(torch.float64))
        made = self.made()
        self._fixed_axes = has_fixed_axes(made)
        self.linear = is_linear(made)

    def extra_repr(self) -> str:
        return self.title

    # -- the transform with its numbers in the precision of the components ---------------------------------------------

    def _own(self, number: Tensor) -> Slot:
        """Register a number of the transform as one of the map: leaves that ask for a gradient are learnable."""
        if number.requires_grad and not number.is_leaf:
            raise GeometryError(
                f"a number of {self.title} (shape {tuple(number.shape)}) was computed from other tensors that ask for a "
                "gradient. A map owns its numbers, and the way back to those tensors would be lost when it is copied; give it "
                "an nn.Parameter, .detach() the number, or pass the module that computes the transform."
            )
        name = f"number{self._count}"
        self._count += 1
        if number.requires_grad:
            self.register_parameter(name, number if isinstance(number, nn.Parameter) else nn.Parameter(number.detach()))
        else:
            floating = number.is_floating_point()
            self.register_buffer(name, number.detach().to(torch.float64 if floating else number.dtype, copy=True))
        return Slot(name)

    def _number(self, slot: Slot, like: Tensor) -> Tensor:
        held: Tensor = getattr(self, slot.name)
        return self.constant(slot.name, like) if held.is_floating_point() else held.to(like.device)

    def _apply_transform(self, like: Tensor, fn: Callable[[Transform], Any]) -> Any:
        """``fn(T)`` with T in the precision of `like`."""
        with exact_solves():
            if self.hosted is None:
                return fn(rebuild(self._template, lambda slot: self._number(slot, like)))
            context = () if self.context is None else (self.constant("context", like),)
            return self.hosted.run(lambda module: fn(module if isinstance(module, Transform) else module(*context)), like)

    def made(self) -> Transform:
        """The transform, for a look at its structure."""
        try:
            made = self._apply_transform(torch.zeros((), device="cpu"), lambda each: each)
        except (TypeError, AttributeError, RuntimeError) as error:
            raise GeometryError(
                f"{self.title} failed to make a transform when it was called with "
                f"{'nothing' if self.context is None else 'the context'}: {error}. A conditional flow is a "
                "chart for each context; pass from_transform(flow, context=c)."
            ) from error
        if not isinstance(made, Transform):
            raise GeometryError(
                f"{self.title} made a {type(made).__name__}, not a transform in the manner of torch.distributions. Pass a "
                "module whose call returns one (of zuko: flow.transform), or an object with forward and inverse."
            )
        return made

    # -- binding -------------------------------------------------------------------------------------------------------

    def prepare_block(self, shape: torch.Size) -> None:
        self._image = shape
        for module in self.modules():  # a copy of the recipe's: caches would keep tensors of torch.func beyond their time
            if isinstance(module, Transform):
                module.__dict__.update(FRESH)
        like = torch.zeros((), dtype=torch.float64, device="cpu")
        domain = self._apply_transform(like, lambda made: made.domain)
        pair = Pair(self.title, self._raw, self._raw_inverse, self._raw_volume, domain, self.elementwise)
        found = examine(pair, shape)
        self._image, self._volume = found.image, found.volume
        if found.numeric:
            self._use_newton(shape)

    def _use_newton(self, shape: torch.Size) -> None:
        if shape.numel() > DENSE and not self.elementwise:
            raise NotADiffeomorphismError(
                f"the inverse of {self.title} is only approximate, and to sharpen it on a block of {shape.numel()} numbers "
                f"takes a dense Jacobian of that size (limit {DENSE}). Use a transform whose inverse is exact, or smaller "
                "blocks."
            )
        self.numeric = True

    @property
    def image_shapes(self) -> dict[str, torch.Size]:
        self.bound_layout()
        return {self.name: self._image}

    # -- the map -------------------------------------------------------------------------------------------------------

    def _raw(self, x: Tensor) -> Tensor:
        if self._fixed_axes and x.ndim > len(self.shape):
            return torch.func.vmap(self._raw)(x)
        return self._apply_transform(x, lambda made: made(x))

    def _raw_inverse(self, y: Tensor) -> Tensor:
        if self._fixed_axes and y.ndim > len(self._image):
            return torch.func.vmap(self._raw_inverse)(y)
        return self._apply_transform(y, lambda made: made.inv(y))

    def _raw_volume(self, x: Tensor, y: Tensor) -> Tensor:
        return self._apply_transform(x, lambda made: made.log_abs_det_jacobian(x, y).sum())

    def value(self, x: Tensor) -> Tensor:
        return self._raw(x)

    def inverse_value(self, y: Tensor) -> Tensor:
        return self._newton(y) if self.numeric else self._raw_inverse(y)

    def _newton(self, y: Tensor) -> Tensor:
        """Two steps of Newton's method from the approximate inverse: with them two derivatives are right as well."""
        if y.ndim > len(self._image):
            return torch.func.vmap(self._newton)(y)
        x = cast(Tensor, _Start.apply(self._raw_inverse, y))
        for _ in range(2):
            x = x - self._solve(x, self._raw(x) - y)
        return x

    def _solve(self, x: Tensor, v: Tensor, *, transpose: bool = False) -> Tensor:
        """J⁻¹ v, or J⁻ᵀ v."""
        jacobian = matrix(self._raw, x)
        solved = solve(jacobian.mT if transpose else jacobian, v.reshape(-1))
        return solved.reshape(self._image if transpose else self.shape)

    # -- domain --------------------------------------------------------------------------------------------------------

    def bad_domain(self, x: Tensor) -> str | None:
        words = self._outside(x, "θ", lambda made: made.domain)
        if words is not None:
            return words
        y = self.value(x)
        return self._irregular(x, y) or self._outside(y, "ψ", lambda made: made.codomain) or self._lost(x, y)

    def bad_image(self, y: Tensor) -> str | None:
        words = self._outside(y, "ψ", lambda made: made.codomain)
        if words is not None:
            return words
        x = self.inverse_value(y)
        return self._outside(x, "θ", lambda made: made.domain) or self._irregular(x, y) or self._lost(x, y)

    def _outside(self, x: Tensor, letter: str, side: Callable[[Transform], Any]) -> str | None:
        if not bool(x.isfinite().all()):
            return f"{letter} is not finite under {self.title}"
        constraint = self._apply_transform(x, side)
        return None if satisfies(constraint, x) else f"{letter} must lie inside of the domain {constraint} of {self.title}"

    def _irregular(self, x: Tensor, y: Tensor) -> str | None:
        if not bool(y.isfinite().all()):
            return f"{self.title} has no finite value there"
        if not bool(self.log_abs_det_block(x, y).isfinite()):
            return f"the Jacobian of {self.title} is singular or infinite there"
        return None

    def _lost(self, x: Tensor, y: Tensor) -> str | None:
        """Where the way back does not lead to the point: beyond the bounds of a search, around a circle."""
        slack = torch.finfo(x.dtype).eps ** 0.5 if self.numeric else 1e-2  # where a map is flat, rounding costs digits
        here = ((self.inverse_value(y) - x).abs() <= slack * (1 + x.abs())).all()
        there = ((self.value(x) - y).abs() <= slack * (1 + y.abs())).all()
        return None if bool(here & there) else f"the inverse of {self.title} does not lead back to the point"

    @property
    def full_domain(self) -> bool:
        return False

    # -- products ------------------------------------------------------------------------------------------------------

    def push_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return push(self._raw, x, v)

    def push_inverse_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self._solve(x, v) if self.numeric else push(self._raw_inverse, y, v)

    def pull_inverse_block(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return self._solve(x, w, transpose=True) if self.numeric else super().pull_inverse_block(x, y, w)

    def log_abs_det_block(self, x: Tensor, y: Tensor) -> Tensor:
        if self._volume:
            return self._raw_volume(x, y)
        return slogdet(matrix(self._raw, x))[1]


class TransformedEntries(Elementwise, Transformed):
    r"""A `Transformed` that acts on every entry by itself: :math:`J = \operatorname{diag} T'(θ)`."""

    elementwise = True
    monomial = True

    def _solve(self, x: Tensor, v: Tensor, *, transpose: bool = False) -> Tensor:
        return v / derivative(self._raw, x)

    def _irregular(self, x: Tensor, y: Tensor) -> str | None:
        slopes = self.derivative(x, y)
        return need(slopes.isfinite() & (slopes != 0), f"the derivative of {self.title} must be finite and not 0", x)

    def log_abs_det_block(self, x: Tensor, y: Tensor) -> Tensor:
        return self._raw_volume(x, y) if self._volume else self.derivative(x, y).abs().log().sum()


class _Start(torch.autograd.Function):
    """An approximate inverse as a plain number, for `torch.func` cannot look into bisections."""

    @staticmethod
    def forward(fn: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        with torch.no_grad():
            return fn(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        fn, y = args
        return _Start.apply(fn, y.movedim(in_dims[1], 0)), 0


def transformed(source: Transform | nn.Module, context: Tensor | None = None, title: str = "") -> Transformed:
    """The recipe for `source`, with the flags that its structure allows.

    Raises:
        GeometryError: the module does not return a transform.
    """
    found = Transformed(source, context, title)
    return TransformedEntries(source, context, title) if is_elementwise(found.made()) else found
