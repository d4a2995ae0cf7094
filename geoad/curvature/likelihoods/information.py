"""Fisher matrices of the families of ``torch.distributions`` in their own parameters, and their pull-back to the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributions as families
from torch.distributions import Distribution, transforms

from geoad.errors import GeometryError
from geoad.params import is_wrapped

__all__ = ["Information", "core", "fisher_product", "is_known", "unvalidated"]

Tensors = tuple[Tensor, ...]
Make = Callable[[Tensor], Distribution]


@dataclass(frozen=True)
class Information:
    """The Fisher matrix F of a family in some of its parameters x.

    Attributes:
        names: the attributes of the distribution that are the parameters.
        product: (x, v) -> F(x) v.
        fixed: parameters in which F is not known: they must not depend on the outputs.
    """

    names: tuple[str, ...]
    product: Callable[[Tensors, Tensors], Tensors]
    fixed: tuple[str, ...] = ()


def _small(names: Sequence[str], entries: Callable[..., dict[tuple[int, int], Tensor]]) -> Information:
    """A family of few numbers: `entries` gives the upper triangle of F, what is missing is zero."""

    def product(x: Tensors, v: Tensors) -> Tensors:
        result = [torch.zeros_like(each) for each in v]
        for (i, j), value in entries(*x).items():
            result[i] = result[i] + value * v[j]
            if i != j:
                result[j] = result[j] + value * v[i]
        return tuple(result)

    return Information(tuple(names), product)


def _psi1(x: Tensor) -> Tensor:
    return torch.polygamma(1, x)


def _softmax(x: Tensors, v: Tensors) -> Tensors:
    p = x[0].softmax(-1)
    return (p * (v[0] - (p * v[0]).sum(-1, keepdim=True)),)


def _dirichlet(x: Tensors, v: Tensors) -> Tensors:
    total = _psi1(x[0].sum(-1, keepdim=True))
    return (_psi1(x[0]) * v[0] - total * v[0].sum(-1, keepdim=True),)


def _normal_matrix(x: Tensors, v: Tensors) -> Tensors:
    """N(μ, Σ) in (μ, Σ): Σ⁻¹ dμ and ½ Σ⁻¹ dΣ Σ⁻¹."""
    factor = torch.linalg.cholesky(x[1])
    half = torch.cholesky_solve(v[1], factor)
    return torch.cholesky_solve(v[0].unsqueeze(-1), factor).squeeze(-1), 0.5 * torch.cholesky_solve(half.mT, factor).mT


def _student(df: Tensor, loc: Tensor, scale: Tensor) -> dict[tuple[int, int], Tensor]:
    first = 0.25 * (_psi1(df / 2) - _psi1((df + 1) / 2)) - (df + 5) / (2 * df * (df + 1) * (df + 3))
    return {
        (0, 0): first,
        (0, 2): -2 / (scale * (df + 1) * (df + 3)),
        (1, 1): (df + 1) / ((df + 3) * scale**2),
        (2, 2): 2 * df / ((df + 3) * scale**2),
    }


def _von_mises(loc: Tensor, k: Tensor) -> dict[tuple[int, int], Tensor]:
    ratio = torch.special.i1e(k) / torch.special.i0e(k)
    return {(0, 0): k * ratio, (1, 1): 1 - ratio / k - ratio**2}


_GAMMA = 0.5772156649015329  # Euler's constant
_EXTREME = math.pi**2 / 6 + (1 - _GAMMA) ** 2

_normal = _small(("loc", "scale"), lambda _, s: {(0, 0): s**-2, (1, 1): 2 * s**-2})
_gamma = _small(("concentration", "rate"), lambda a, b: {(0, 0): _psi1(a), (0, 1): -1 / b, (1, 1): a / b**2})
_class = Information(("logits",), _softmax)
_matrix = Information(("loc", "covariance_matrix"), _normal_matrix)

# by exact type: a subclass may have another density
_KNOWN: dict[type[Distribution], Information] = {
    families.Bernoulli: _small(("logits",), lambda f: {(0, 0): f.sigmoid() * (-f).sigmoid()}),
    families.Beta: _small(
        ("concentration1", "concentration0"),
        lambda a, b: {(0, 0): _psi1(a) - _psi1(a + b), (0, 1): -_psi1(a + b), (1, 1): _psi1(b) - _psi1(a + b)},
    ),
    families.Binomial: Information(
        ("logits",), lambda x, v: (x[1] * x[0].sigmoid() * (-x[0]).sigmoid() * v[0],), ("total_count",)
    ),
    families.Categorical: _class,
    families.Cauchy: _small(("loc", "scale"), lambda _, s: {(0, 0): 0.5 * s**-2, (1, 1): 0.5 * s**-2}),
    families.Chi2: _gamma,
    families.Dirichlet: Information(("concentration",), _dirichlet),
    families.Exponential: _small(("rate",), lambda rate: {(0, 0): rate**-2}),
    families.Gamma: _gamma,
    families.Geometric: _small(("logits",), lambda f: {(0, 0): (-f).sigmoid()}),
    families.Gumbel: _small(
        ("loc", "scale"), lambda _, s: {(0, 0): s**-2, (0, 1): (_GAMMA - 1) / s**2, (1, 1): _EXTREME / s**2}
    ),
    families.HalfCauchy: _small(("scale",), lambda s: {(0, 0): 0.5 * s**-2}),
    families.HalfNormal: _small(("scale",), lambda s: {(0, 0): 2 * s**-2}),
    families.InverseGamma: _gamma,
    families.Laplace: _small(("loc", "scale"), lambda _, s: {(0, 0): s**-2, (1, 1): s**-2}),
    families.LogNormal: _normal,
    families.LowRankMultivariateNormal: _matrix,
    families.Multinomial: Information(("logits",), lambda x, v: (x[1] * _softmax(x, v)[0],), ("total_count",)),
    families.MultivariateNormal: _matrix,
    families.NegativeBinomial: Information(("logits",), lambda x, v: (x[1] * x[0].sigmoid() * v[0],), ("total_count",)),
    families.Normal: _normal,
    families.OneHotCategorical: _class,
    families.Poisson: _small(("rate",), lambda rate: {(0, 0): 1 / rate}),
    families.StudentT: _small(("df", "loc", "scale"), _student),
    families.VonMises: _small(("loc", "concentration"), _von_mises),
    families.Weibull: _small(
        ("scale", "concentration"),
        lambda s, k: {(0, 0): (k / s) ** 2, (0, 1): (_GAMMA - 1) / s, (1, 1): _EXTREME / k**2},
    ),
}

_WITHOUT_PARAMETERS = (
    transforms.ExpTransform,
    transforms.SigmoidTransform,
    transforms.SoftplusTransform,
    transforms.StickBreakingTransform,
    transforms.TanhTransform,
)


@contextmanager
def unvalidated() -> Generator[None]:
    """Distributions made here do not look at their values, which ``vmap`` forbids."""
    kind: Any = Distribution
    before = kind._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def core(distribution: Any) -> Distribution:
    """What carries the parameters: without ``Independent``, and without transforms of y that have no parameters."""
    while True:
        if isinstance(distribution, families.Independent):
            distribution = distribution.base_dist
        elif type(distribution) in (families.TransformedDistribution, families.LogisticNormal):
            if not all(type(each) in _WITHOUT_PARAMETERS for each in distribution.transforms):
                return distribution
            distribution = distribution.base_dist
        else:
            return distribution


def is_known(distribution: Distribution) -> bool:
    """True if the exact Fisher matrix of this family can be had."""
    kind = type(core(distribution))
    return kind in _KNOWN or bool(core(distribution).has_enumerate_support) or _is_exponential(kind)


def _is_exponential(kind: type[Distribution]) -> bool:
    base = families.ExponentialFamily
    return issubclass(kind, base) and all(
        getattr(kind, name) is not getattr(base, name) for name in ("_natural_params", "_log_normalizer")
    )


def fisher_product(make: Make, outputs: Tensor, t: Tensor) -> Tensor:
    """JᵀF(x)J t with J the derivative of the family's parameters x by the outputs.

    F is a closed form for the families above, the sum over all y where the support is finite, and the Hessian of the
    log-normalizer for other exponential families.

    Raises:
        GeometryError: the Fisher matrix of this family is none of these.
    """
    distribution = core(make(outputs))
    kind = type(distribution)
    if kind in _KNOWN:
        return _pulled_back(make, _KNOWN[kind], outputs, t)
    if distribution.has_enumerate_support:
        return _enumerated(make, outputs, t)
    if _is_exponential(kind):
        return _of_log_normalizer(make, outputs, t)
    raise GeometryError(
        f"the exact Fisher matrix of {kind.__name__} has no closed form here, and its support is not finite. Draw labels with "
        "kind='mc', or pass it: Family(distribution, fisher=lambda outputs, t: ...), the product A(f) t."
    )


def _jvp(fn: Callable[[Tensor], Any], outputs: Tensor, t: Tensor) -> tuple[Any, Any]:
    """The value and its derivative along t."""
    result = torch.func.jvp(fn, (outputs,), (t,))
    return result[0], result[1]


def _pulled_back(make: Make, information: Information, outputs: Tensor, t: Tensor) -> Tensor:
    count = len(information.names)

    def parameters(f: Tensor) -> Tensors:
        distribution = core(make(f))
        values = [getattr(distribution, name) for name in information.names + information.fixed]
        return tuple(value if isinstance(value, Tensor) else f.new_tensor(value) for value in values)

    x, v = _jvp(parameters, outputs, t)
    pull = torch.func.vjp(parameters, outputs)[1]
    moved = [_require_fixed(name, each) for name, each in zip(information.fixed, v[count:], strict=True)]
    covector = information.product(x, v[:count])
    return pull((*covector, *(torch.zeros_like(each) for each in x[count:])))[0] + sum(moved)


def _require_fixed(name: str, velocity: Tensor) -> Tensor:
    """Zero; an error if the parameter moves with the outputs, and nan where values cannot be read."""
    if not is_wrapped({"velocity": velocity}) and bool((velocity != 0).any()):
        raise GeometryError(
            f"{name} depends on the outputs, and the Fisher matrix has no closed form in it. Keep it fixed, draw labels with "
            "kind='mc', or pass Family(distribution, fisher=...)."
        )
    return torch.where(velocity != 0, torch.nan, 0.0).sum()


def _enumerated(make: Make, outputs: Tensor, t: Tensor) -> Tensor:
    """Σ_y p(y) ∇ log p(y) ∇ log p(y)ᵀ t over a finite support."""
    support = core(make(outputs)).enumerate_support()

    def log_prob(f: Tensor) -> Tensor:
        return core(make(f)).log_prob(support)

    log_p, slope = _jvp(log_prob, outputs, t)
    return torch.func.vjp(log_prob, outputs)[1](torch.where(log_p == -torch.inf, 0.0, log_p.exp() * slope))[0]


def _of_log_normalizer(make: Make, outputs: Tensor, t: Tensor) -> Tensor:
    """JᵀΨ''(η)J t, η the natural parameters and Ψ the log-normalizer."""
    distribution: Any = core(make(outputs))

    def natural(f: Tensor) -> Tensors:
        family: Any = core(make(f))
        return family._natural_params

    gradient = torch.func.grad(lambda eta: distribution._log_normalizer(*eta).sum())
    eta, velocity = _jvp(natural, outputs, t)
    return torch.func.vjp(natural, outputs)[1](torch.func.jvp(gradient, (eta,), (velocity,))[1])[0]
