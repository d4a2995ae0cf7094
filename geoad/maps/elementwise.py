"""Elementwise changes of coordinates: ψ_i = f(θ_i)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from geoad.errors import GeometryError
from geoad.maps.base import BlockMap, need

__all__ = ["Asinh", "Atanh", "Elementwise", "Exp", "Identity", "Log", "Power", "Scale", "Sinh", "Softplus", "Tanh"]


class Elementwise(BlockMap):
    r"""ψ_i = f(θ_i): :math:`J = \operatorname{diag} f'(\theta)`.

    A subclass gives `value` and `inverse_value`, and `derivative` where there is a closed form: f' at x, where y = f(x) is
    known too.
    """

    elementwise = True
    monomial = True

    def derivative(self, x: Tensor, y: Tensor) -> Tensor:
        """f'(x), in terms of whichever end is cheaper. Default: by autodiff."""
        return torch.func.vjp(self.value, x)[1](torch.ones_like(x))[0]

    def log_derivative(self, x: Tensor, y: Tensor) -> Tensor:
        """log |f'(x)|."""
        return self.derivative(x, y).abs().log()

    def push_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self.derivative(x, y) * v

    def pull_block(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return self.derivative(x, y) * w

    def push_inverse_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return v / self.derivative(x, y)

    def pull_inverse_block(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return w / self.derivative(x, y)

    def log_abs_det_block(self, x: Tensor, y: Tensor) -> Tensor:
        return self.log_derivative(x, y).sum()


def _positive(x: Tensor) -> str | None:
    return need((x > 0) & x.isfinite(), "all components must be > 0 and finite", x)


class Identity(Elementwise):
    """ψ = θ."""

    linear = True

    def value(self, x: Tensor) -> Tensor:
        return x

    def inverse_value(self, y: Tensor) -> Tensor:
        return y

    def derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.ones_like(x)

    def push_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return v

    def pull_block(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return w

    def push_inverse_block(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return v

    def pull_inverse_block(self, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return w

    def log_abs_det_block(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(())


class Scale(Elementwise):
    """ψ = c θ, for a number or a tensor c that broadcasts to the block; no entry may be 0.

    Args:
        factor: c. Negative factors are allowed (the orientation of an axis has no meaning here).
        learnable: make log |c| an ``nn.Parameter`` of the bound map (one number for each entry of c).

    >>> import torch, geoad
    >>> chart = geoad.Chart({"x": (2,)}, name="x")
    >>> psi = chart.reparametrize(geoad.maps.Scale(3.0)).target
    >>> chart.point(torch.tensor([1.0, 2.0])).to(psi).components
    tensor([3., 6.])
    """

    linear = True
    log_size: Tensor
    sign: Tensor
    factor: Tensor

    def __init__(self, factor: float | Tensor = 2.0, *, learnable: bool = False) -> None:
        super().__init__()
        given = torch.as_tensor(factor, dtype=torch.float64).detach().clone()
        if not bool(((given != 0) & given.isfinite()).all()):
            raise GeometryError(
                f"Scale needs finite factors other than 0, got {factor}. A factor 0 forgets a coordinate, so the map "
                "has no inverse; use an Immersion to freeze coordinates."
            )
        self._learns = learnable
        if learnable:
            self.log_size = nn.Parameter(given.abs().log())
            self.register_buffer("sign", given.sign())
        else:
            self.register_buffer("factor", given)

    def prepare_block(self, shape: torch.Size) -> None:
        given = self.sign if self._learns else self.factor
        try:
            fits = torch.broadcast_shapes(given.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise GeometryError(
                f"Scale has factors of shape {tuple(given.shape)}, block '{self.name}' has shape {tuple(shape)}. The "
                "factors must broadcast to the block; pass one number or a tensor of that shape."
            )

    def _factor(self, like: Tensor) -> Tensor:
        if self._learns:
            return self.constant("sign", like) * self.constant("log_size", like).exp()
        return self.constant("factor", like)

    def value(self, x: Tensor) -> Tensor:
        return self._factor(x) * x

    def inverse_value(self, y: Tensor) -> Tensor:
        return y / self._factor(y)

    def derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return self._factor(x).expand(x.shape)


class Exp(Elementwise):
    """ψ = exp θ, onto ψ > 0."""

    def value(self, x: Tensor) -> Tensor:
        return x.exp()

    def inverse_value(self, y: Tensor) -> Tensor:
        return y.log()

    def derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def log_derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return x

    def bad_domain(self, x: Tensor) -> str | None:
        return _positive_value(x.exp(), x, "exp(θ) must neither overflow nor underflow")

    def bad_image(self, y: Tensor) -> str | None:
        return _positive(y)


def _positive_value(y: Tensor, x: Tensor, words: str) -> str | None:
    """Subnormal numbers count as an underflow: they have too few digits left to come back from."""
    return need((y >= torch.finfo(y.dtype).tiny) & y.isfinite(), words, x)


def _log_cosh(x: Tensor) -> Tensor:
    """log cosh x without overflow, smooth at 0 (no absolute value)."""
    return x - logsigmoid(2 * x) - math.log(2.0)


class Log(Elementwise):
    """ψ = log θ, for θ > 0."""

    def value(self, x: Tensor) -> Tensor:
        return x.log()

    def inverse_value(self, y: Tensor) -> Tensor:
        return y.exp()

    def derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return x.reciprocal()

    def log_derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return -y

    def bad_domain(self, x: Tensor) -> str | None:
        return _positive(x)

    def bad_image(self, y: Tensor) -> str | None:
        return _positive_value(y.exp(), y, "exp(ψ) must neither overflow nor underflow")


class Softplus(Elementwise):
    """ψ = log(1 + exp θ), onto ψ > 0.

    Written as -log sigmoid(-θ): `torch.nn.functional.softplus` turns linear above 20 and is wrong by 2e-9 there, and
    the second derivative of `torch.logaddexp` overflows to nan below -44 in float32.
    """

    def value(self, x: Tensor) -> Tensor:
        return -logsigmoid(-x)

    def inverse_value(self, y: Tensor) -> Tensor:
        return y + torch.log(-torch.expm1(-y))

    def derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def log_derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return logsigmoid(x)

    def bad_domain(self, x: Tensor) -> str | None:
        return _positive_value(self.value(x), x, "softplus(θ) must neither overflow nor underflow")

    def bad_image(self, y: Tensor) -> str | None:
        return _positive(y)


class Asinh(Elementwise):
    """ψ = asinh θ."""

    def value(self, x: Tensor) -> Tensor:
        return x.asinh()

    def inverse_value(self, y: Tensor) -> Tensor:
        return y.sinh()

    def derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return (1 + x * x).rsqrt()

    def log_derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return -0.5 * torch.log1p(x * x)

    def bad_domain(self, x: Tensor) -> str | None:
        return need((x * x).isfinite(), "θ must be finite and its square must not overflow", x)

    def bad_image(self, y: Tensor) -> str | None:
        return need(y.sinh().square().isfinite(), "sinh(ψ) must be finite and its square must not overflow", y)


class Sinh(Elementwise):
    """ψ = sinh θ."""

    def value(self, x: Tensor) -> Tensor:
        return x.sinh()

    def inverse_value(self, y: Tensor) -> Tensor:
        return y.asinh()

    def derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return (1 + y * y).sqrt()

    def log_derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * torch.log1p(y * y)

    def bad_domain(self, x: Tensor) -> str | None:
        return need(x.sinh().square().isfinite(), "sinh(θ) must be finite and its square must not overflow", x)

    def bad_image(self, y: Tensor) -> str | None:
        return need((y * y).isfinite(), "ψ must be finite and its square must not overflow", y)


class Tanh(Elementwise):
    """ψ = tanh θ, onto -1 < ψ < 1."""

    def value(self, x: Tensor) -> Tensor:
        return x.tanh()

    def inverse_value(self, y: Tensor) -> Tensor:
        return y.atanh()

    def derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return 4 * torch.sigmoid(2 * x) * torch.sigmoid(-2 * x)  # keeps its digits where 1 - ψ² has lost them

    def log_derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return -2 * _log_cosh(x)

    def bad_domain(self, x: Tensor) -> str | None:
        return need(x.tanh().abs() < 1, "tanh(θ) must not round to 1 or -1", x)

    def bad_image(self, y: Tensor) -> str | None:
        return need(y.abs() < 1, "all components must lie strictly between -1 and 1", y)


class Atanh(Elementwise):
    """ψ = atanh θ, for -1 < θ < 1."""

    def value(self, x: Tensor) -> Tensor:
        return x.atanh()

    def inverse_value(self, y: Tensor) -> Tensor:
        return y.tanh()

    def derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return ((1 - x) * (1 + x)).reciprocal()

    def log_derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return -torch.log1p(-x) - torch.log1p(x)

    def bad_domain(self, x: Tensor) -> str | None:
        return need(x.abs() < 1, "all components must lie strictly between -1 and 1", x)

    def bad_image(self, y: Tensor) -> str | None:
        return need(y.tanh().abs() < 1, "tanh(ψ) must not round to 1 or -1", y)


class Power(Elementwise):
    """The signed power ψ = sign(θ) |θ|^p, for θ ≠ 0.

    For p > 1 the derivative vanishes at 0, for p < 1 it is infinite there: 0 is outside the domain, and so is a
    bias that is initialised with zeros.

    Args:
        exponent: p, finite and not 0.
    """

    def __init__(self, exponent: float = 3.0) -> None:
        super().__init__()
        self.exponent = float(exponent)
        if not math.isfinite(self.exponent) or self.exponent == 0:
            raise GeometryError(
                f"Power needs a finite exponent other than 0, got {exponent}. With exponent 0 every number has the "
                "same image and there is no inverse; use maps.Log for the limit p -> 0."
            )
        self.linear = self.exponent == 1.0

    def value(self, x: Tensor) -> Tensor:
        return x.sign() * x.abs().pow(self.exponent)

    def inverse_value(self, y: Tensor) -> Tensor:
        return y.sign() * y.abs().pow(1 / self.exponent)

    def derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return self.exponent * (y / x)

    def log_derivative(self, x: Tensor, y: Tensor) -> Tensor:
        return math.log(abs(self.exponent)) + (self.exponent - 1) * x.abs().log()

    def bad_domain(self, x: Tensor) -> str | None:
        return self._bad(x, self.value(x), x)

    def bad_image(self, y: Tensor) -> str | None:
        return self._bad(self.inverse_value(y), y, y)

    def _bad(self, x: Tensor, y: Tensor, shown: Tensor) -> str | None:
        fine = (x != 0) & (y != 0)
        for number in (x, y, self.derivative(x, y)):
            fine = fine & number.isfinite() & (number != 0)
        return need(
            fine,
            f"no component may be 0 (the signed power {self.exponent:g} has no smooth inverse there), and neither the "
            "power nor its derivative may under- or overflow",
            shown,
        )
