"""Likelihoods against expectations over labels, torch.distributions, torch's own losses and torch.func."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributions as td
from torch import Tensor, nn
from torch.nn import functional as F

from geoad.curvature import (
    Bernoulli,
    Categorical,
    Difference,
    Family,
    Gaussian,
    Likelihood,
    Loss,
    OutputMatrix,
    Poisson,
    Subset,
    likelihood_of,
    selecting,
)
from geoad.errors import GeometryError, SingularMetricError
from geoad.kernels import products

SIGMA = torch.tensor([[2.0, 0.5, -0.3], [0.5, 1.0, 0.2], [-0.3, 0.2, 0.7]], dtype=torch.float64)
SHAPES = {
    "vectors": (4, 3),
    "sequences": (3, 2, 3),
    "images": (2, 2, 2, 3),
    "one sample": (1, 3),
    "a sequence, one sample": (1, 2, 3),
}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def outputs_of(shape: tuple[int, ...], axis: int = -1, scale: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64).movedim(-1, axis).contiguous()


def dense(product: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    """The matrix of every whole sample, (n, C, C), column by column."""
    n, size = len(outputs), outputs[0].numel()
    columns = [product(unit.reshape(outputs.shape[1:]).expand_as(outputs)).reshape(n, size) for unit in torch.eye(size)]
    return torch.stack(columns, -1)


def squared(seeds: Tensor) -> Tensor:
    rows = seeds.reshape(*seeds.shape[:2], -1)
    return torch.einsum("kna,knb->nab", rows, rows)


@dataclass(frozen=True)
class Known:
    """A likelihood with its distribution in torch.distributions, and the loss of torch (reduction="sum")."""

    likelihood: Likelihood
    distribution: Callable[[Tensor], td.Distribution]
    loss: Callable[..., Tensor] | None
    axis: int = -1

    def moved(self, outputs: Tensor) -> td.Distribution:
        return self.distribution(outputs.movedim(self.axis, -1))


def gaussian_like(covariance: Tensor) -> Callable[[Tensor], td.Distribution]:
    def make(f: Tensor) -> td.Distribution:
        matrix = covariance if covariance.ndim == 2 else torch.diag(covariance.expand(f.shape[-1]))
        return td.MultivariateNormal(f, matrix)

    return make


KNOWN = {
    "categorical": Known(Categorical(), lambda f: td.Categorical(logits=f), F.cross_entropy),
    "categorical, axis 1": Known(Categorical(axis=1), lambda f: td.Categorical(logits=f), F.cross_entropy, 1),
    "categorical, axis -2": Known(Categorical(axis=-2), lambda f: td.Categorical(logits=f), F.cross_entropy, -2),
    "bernoulli": Known(Bernoulli(), lambda f: td.Bernoulli(logits=f), F.binary_cross_entropy_with_logits),
    "poisson": Known(Poisson(), lambda f: td.Poisson(f.exp()), F.poisson_nll_loss),
    "gaussian": Known(
        Gaussian(),
        gaussian_like(torch.tensor(1.0, dtype=torch.float64)),
        lambda f, y, reduction: F.mse_loss(f, y, reduction=reduction) / 2,
    ),
    "gaussian, scalar": Known(Gaussian(0.3), gaussian_like(torch.tensor(0.3, dtype=torch.float64)), None),
    "gaussian, diagonal": Known(Gaussian(SIGMA.diagonal()), gaussian_like(SIGMA.diagonal()), None),
    "gaussian, full": Known(Gaussian(SIGMA), gaussian_like(SIGMA), None),
}
CASES = [
    pytest.param(name, shape, id=f"{name}, {kind}")
    for name, known in KNOWN.items()
    for kind, shape in SHAPES.items()
    if -known.axis < len(shape)
]
every_case = pytest.mark.parametrize(("name", "shape"), CASES)
every_shape = pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))


def case(name: str, shape: tuple[int, ...]) -> tuple[Known, Tensor, Any]:
    known = KNOWN[name]
    outputs = outputs_of(shape, known.axis)
    generator = torch.Generator().manual_seed(1)
    return known, outputs, known.likelihood.sample(outputs, generator)


def expectation(known: Known, outputs: Tensor) -> Tensor:
    """E_y[∇ log p ∇ log pᵀ] for each position, (n, ..., c, c): a sum over y, or the Hessian of a divergence."""
    f = outputs.movedim(known.axis, -1)
    c = f.shape[-1]

    def of_position(g: Tensor) -> Tensor:
        d = known.distribution(g)
        if isinstance(d, td.MultivariateNormal):
            return torch.func.hessian(lambda h: td.kl_divergence(d, known.distribution(h)))(g)
        if isinstance(d, td.Categorical):
            slopes = torch.func.jacfwd(lambda h: known.distribution(h).log_prob(torch.arange(c)))(g)
            return (slopes * d.probs.unsqueeze(-1)).mT @ slopes
        # the outputs are independent: log p of each has a derivative by that one only
        y = torch.arange(2.0 if isinstance(d, td.Bernoulli) else 160.0, dtype=torch.float64).unsqueeze(-1).expand(-1, c)
        slope = torch.func.jvp(lambda h: known.distribution(h).log_prob(y), (g,), (torch.ones(c),))[1]
        return torch.diag((d.log_prob(y).exp() * slope**2).sum(0))

    return torch.stack([of_position(g) for g in f.reshape(-1, c)]).reshape(*f.shape, c)


@every_case
def test_the_fisher_is_the_expectation_over_labels(name: str, shape: tuple[int, ...]) -> None:
    known, outputs, _ = case(name, shape)
    blocks = expectation(known, outputs)
    t = outputs_of(tuple(outputs.shape)).cos()
    wanted = (blocks @ t.movedim(known.axis, -1).unsqueeze(-1)).squeeze(-1).movedim(-1, known.axis)
    close(known.likelihood.fisher(outputs, t), wanted)
    close(known.likelihood.matrix(outputs), blocks)


@every_case
def test_the_seeds_of_the_root_make_the_fisher(name: str, shape: tuple[int, ...]) -> None:
    known, outputs, _ = case(name, shape)
    likelihood = known.likelihood
    seeds = likelihood.root(outputs)
    assert seeds.shape == (likelihood.columns(outputs.shape), *outputs.shape)
    assert likelihood.signs(outputs) is None
    close(squared(seeds), dense(lambda t: likelihood.fisher(outputs, t), outputs))
    used = (seeds != 0).any(known.axis if known.axis < 0 else known.axis + 1).reshape(*seeds.shape[:2], -1).sum(-1)
    assert int(used.max()) == 1  # one position each
    if isinstance(likelihood, Categorical):
        assert len(seeds) == outputs.numel() // len(outputs) // 3 * 2


@every_case
def test_log_p_and_its_derivatives(name: str, shape: tuple[int, ...]) -> None:
    known, outputs, y = case(name, shape)
    likelihood = known.likelihood
    likelihood.check_targets(outputs, y)
    close(likelihood.nll(outputs, y), -known.moved(outputs).log_prob(y).reshape(len(outputs), -1).sum(1), 1e-11)
    score = likelihood.score(outputs, y)
    close(score, torch.func.grad(lambda f: known.moved(f).log_prob(y).sum())(outputs))
    close(score, Likelihood.score(likelihood, outputs, y))
    loss_of_torch = known.loss
    if loss_of_torch is not None and known.axis in (1, -1):
        channels = outputs.movedim(known.axis, 1) if isinstance(likelihood, Categorical) else outputs
        loss = torch.func.grad(lambda f: loss_of_torch(f, y, reduction="sum"))(channels)
        close(score, -(loss.movedim(1, known.axis) if isinstance(likelihood, Categorical) else loss))
    n, size = len(outputs), outputs[0].numel()
    whole = torch.func.hessian(lambda f: likelihood.nll(f, y).sum())(outputs).reshape(n, size, n, size)
    hessian = torch.stack([whole[i, :, i] for i in range(n)])
    close(dense(lambda t: likelihood.hessian(outputs, y, t), outputs), hessian)
    close(dense(lambda t: Likelihood.hessian(likelihood, outputs, y, t), outputs), hessian)
    close(squared(likelihood.root(outputs, y)), hessian)


@pytest.mark.parametrize(
    ("likelihood", "loss"),
    [
        (Categorical(axis=1), F.cross_entropy),
        (Bernoulli(), F.binary_cross_entropy_with_logits),
        (Poisson(), F.poisson_nll_loss),
        (Gaussian(), F.mse_loss),
        (Gaussian(0.4), F.mse_loss),
        (Loss(F.huber_loss), F.huber_loss),
    ],
)
@every_shape
def test_the_factor_to_the_loss_of_torch(likelihood: Likelihood, loss: Any, shape: tuple[int, ...]) -> None:
    outputs = outputs_of(shape, 1)
    y = (likelihood if not isinstance(likelihood, Loss) else Gaussian()).sample(outputs)
    factor = likelihood.mean_factor(outputs.shape)
    wanted = torch.func.grad(lambda f: loss(f, y))(outputs)
    close(factor * torch.func.grad(lambda f: likelihood.nll(f, y).mean())(outputs), wanted)


def test_without_a_loss_of_torch_there_is_no_factor() -> None:
    for likelihood in (Gaussian(SIGMA), Family(lambda f: td.Exponential(f.exp())), OutputMatrix(lambda f, y: f)):
        with pytest.raises(GeometryError, match="no loss of its own"):
            likelihood.mean_factor((4, 3))


# Labels, drawn


@pytest.mark.parametrize(("name", "shape"), [case for case in CASES if case.id and case.id.endswith("one sample")])
def test_drawn_labels_have_the_fisher_as_second_moment_of_the_score(name: str, shape: tuple[int, ...]) -> None:
    known = KNOWN[name]
    outputs = outputs_of(shape, known.axis, scale=0.5)
    generator = torch.Generator().manual_seed(5)
    wanted = dense(lambda t: known.likelihood.fisher(outputs, t), outputs)[0]
    errors: list[Tensor] = []
    for count in (500, 8_000):
        many = outputs.expand(16 * count, *outputs.shape[1:])
        score = known.likelihood.score(many, known.likelihood.sample(many, generator)).reshape(16, count, -1)
        # five standard deviations of each mean
        assert bool((score.mean((0, 1)).abs() <= 5 * (wanted.diagonal() / (16 * count)).sqrt()).all())
        second = score.mT @ score / count
        assert bool(((second.mean(0) - wanted).abs() <= 5 * second.std(0) / 4 + 1e-12).all())
        errors.append((second - wanted).square().mean().sqrt())
    assert 2.8 < float(errors[0] / errors[1]) < 5.7  # the error falls as count^-½: 4


MORE = {
    "normal": (Family(lambda f: td.Normal(f[..., 0], f[..., 1].exp())), 2),
    "beta": (Family(lambda f: td.Beta(f[..., 0].exp(), f[..., 1].exp())), 2),
    "dirichlet": (Family(lambda f: td.Dirichlet(f.exp())), 3),
}


@pytest.mark.parametrize("name", [*KNOWN, *MORE])
def test_a_generator_decides_and_the_global_one_is_left_alone(name: str) -> None:
    likelihood = KNOWN[name].likelihood if name in KNOWN else MORE[name][0]
    outputs = outputs_of((50, 2, 3 if name in KNOWN else MORE[name][1])).requires_grad_()
    if name in KNOWN:
        outputs = outputs_of((50, 2, 3), KNOWN[name].axis).requires_grad_()
    before = torch.get_rng_state()
    first, second, other = (likelihood.sample(outputs, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert not first.requires_grad
    generator = torch.Generator().manual_seed(3)
    drawn = likelihood.sample(outputs, generator)
    assert torch.equal(drawn, first)
    assert not torch.equal(likelihood.sample(outputs, generator), first)  # it goes on
    torch.manual_seed(7)
    free = likelihood.sample(outputs)
    torch.manual_seed(7)
    assert torch.equal(likelihood.sample(outputs), free)
    assert not torch.equal(torch.get_rng_state(), before)


# Classes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "logits",
    [
        [1e4, 0.0, -1e4],
        [-1e4, 0.0, 1e4],
        [0.0, 1e4, 1e4],
        [60.0, 0.0, 0.0],
        [0.0, 0.0, 30.0],
        [16.0, 0.0, -100.0],
        [-300.0, -301.0, 0.0],
        [-torch.inf, 1.0, 0.5],
        [0.3, -torch.inf, -torch.inf],
        [0.3, 1.0, -torch.inf],
        [1e30, 0.0, 0.0],
    ],
)
def test_saturated_logits(logits: list[float], dtype: torch.dtype) -> None:
    outputs = torch.tensor([logits], dtype=dtype)
    p = outputs.double().softmax(-1)[0]
    exact = torch.diag(p) - torch.outer(p, p)
    exact = exact - torch.diag(exact.diagonal()) + torch.diag(p * torch.stack([p[1] + p[2], p[0] + p[2], p[0] + p[1]]))
    seeds = Categorical().root(outputs)
    assert seeds.isfinite().all()
    assert float((squared(seeds.double())[0] - exact).abs().max()) < (1e-6 if dtype is torch.float32 else 1e-14)
    finite = outputs.clamp(min=-1e30)
    gradient = torch.func.grad(lambda f: Categorical().root(f).square().sum())(finite)
    assert gradient.isfinite().all()
    # Σ |s_k|² is the trace, 1 - |p|²
    close(gradient.double(), torch.func.grad(lambda f: 1 - f.softmax(-1).square().sum())(finite.double()), 1e-6)
    for y in (torch.tensor([1]), torch.tensor([[0.0, 1.0, 0.0]], dtype=dtype)):
        assert Categorical().score(outputs, y).isfinite().all()
    assert not Categorical().nll(outputs, torch.tensor([2])).isnan().any()


def test_small_probabilities_keep_their_digits() -> None:
    outputs = torch.tensor([[40.0, 0.0, 3.0]], dtype=torch.float32)
    q = outputs.double().softmax(-1)[0]
    trace = q[0] * (q[1] + q[2]) + q[1] * (1 - q[1]) + q[2] * (1 - q[2])
    close(Categorical().root(outputs).double().square().sum(), trace, 1e-18 + 3e-6)
    ratio = Categorical().root(outputs).double().square().sum() / trace
    assert abs(float(ratio) - 1) < 3e-6


@pytest.mark.parametrize("likelihood", [Bernoulli(), Poisson()])
def test_saturated_logits_of_single_numbers(likelihood: Likelihood) -> None:
    outputs = torch.tensor([[-1e4, -100.0, -30.0, 0.0, 30.0, 80.0]], dtype=torch.float32)
    if isinstance(likelihood, Bernoulli):
        outputs = torch.cat([outputs, -outputs], -1)
    seeds = likelihood.root(outputs)
    wanted = likelihood.fisher(outputs.double(), torch.ones_like(outputs).double())
    assert seeds.isfinite().all()
    torch.testing.assert_close(seeds.double().square().sum(0), wanted, rtol=1e-5, atol=1e-40)
    assert torch.func.grad(lambda f: likelihood.root(f).sum())(outputs).isfinite().all()
    y = torch.ones_like(outputs)
    torch.testing.assert_close(likelihood.nll(outputs, y).double(), likelihood.nll(outputs.double(), y.double()))


def test_many_classes() -> None:
    outputs = 3 * torch.randn(2, 300, dtype=torch.float32)
    p = outputs.double().softmax(-1)
    exact = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    assert float((squared(Categorical().root(outputs).double()) - exact).abs().max()) < 1e-7


@pytest.mark.parametrize("axis", [-1, 1])
def test_soft_labels(axis: int) -> None:
    outputs, y = outputs_of((3, 4, 5), axis), outputs_of((3, 4, 5), axis).sin().softmax(axis)
    likelihood = Categorical(axis)
    likelihood.check_targets(outputs, y)
    loss = torch.func.grad(lambda f: F.cross_entropy(f.movedim(axis, 1), y.movedim(axis, 1), reduction="sum"))(outputs)
    close(likelihood.score(outputs, y), -loss)
    hard = F.one_hot(y.argmax(axis), 5).movedim(-1, axis)
    close(likelihood.nll(outputs, hard.double()), likelihood.nll(outputs, y.argmax(axis)))
    close(likelihood.hessian(outputs, y, y), likelihood.fisher(outputs, y))


@pytest.mark.parametrize("ignored", [-100, 0, 2])
@pytest.mark.parametrize("axis", [-1, 1])
def test_ignored_labels_count_for_nothing(ignored: int, axis: int) -> None:
    outputs = outputs_of((3, 4, 5), axis)
    likelihood = Categorical(axis, ignore_index=ignored)
    y = torch.arange(12).reshape(3, 4) % 5
    y[0, 1] = y[2, :] = ignored
    likelihood.check_targets(outputs, y)

    def torch_loss(f: Tensor) -> Tensor:
        return F.cross_entropy(f.movedim(axis, 1), y, reduction="none", ignore_index=ignored).sum(1)

    close(likelihood.nll(outputs, y), torch_loss(outputs))
    close(likelihood.score(outputs, y), -torch.func.grad(lambda f: torch_loss(f).sum())(outputs))
    t = outputs.cos()
    wanted = torch.func.jvp(torch.func.grad(lambda f: torch_loss(f).sum()), (outputs,), (t,))[1]
    close(likelihood.hessian(outputs, y, t), wanted)
    close(squared(likelihood.root(outputs, y)), dense(lambda t: likelihood.hessian(outputs, y, t), outputs))
    close(likelihood.fisher(outputs, t), Categorical(axis).fisher(outputs, t))  # needs no labels
    narrow = torch.zeros(3, 4, dtype=torch.uint8)
    close(likelihood.nll(outputs, narrow), likelihood.nll(outputs, narrow.long()))


# Families of torch.distributions


def grid(support: str) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the tanh-sinh rules."""
    h = 1 / 64
    u = torch.arange(-4.3, 4.3, h, dtype=torch.float64)
    s, ds = (math.pi / 2) * u.sinh(), (math.pi / 2) * u.cosh()
    if support == "real":
        return s.sinh(), h * s.cosh() * ds
    if support == "positive":
        return s.exp(), h * s.exp() * ds
    if support == "kink at 0":
        return torch.cat([s.exp(), -s.exp()]), (h * s.exp() * ds).repeat(2)
    if support == "circle":
        return math.pi * torch.arange(-1, 1, h, dtype=torch.float64), torch.full((128,), math.pi * h, dtype=torch.float64)
    keep = u.abs() < 2.9
    return (0.5 * s.tanh() + 0.5)[keep], (h * 0.5 * ds / s.cosh() ** 2)[keep]


@dataclass(frozen=True)
class Continuous:
    make: Callable[[Tensor], td.Distribution]
    c: int
    support: str
    tolerance: float = 1e-9


def two(cls: Any, *maps: Callable[[Tensor], Tensor], **fixed: Any) -> Callable[[Tensor], td.Distribution]:
    """cls(maps[0](f_0), maps[1](f_1), ...)."""
    return lambda f: cls(*(each(f[..., i]) for i, each in enumerate(maps)), **fixed)


def same(f: Tensor) -> Tensor:
    return f


CONTINUOUS = {
    "normal": Continuous(two(td.Normal, same, torch.exp), 2, "real"),
    "normal with a mixed chart": Continuous(lambda f: td.Normal(f[..., 0] * f[..., 1], F.softplus(f.sum(-1))), 2, "real"),
    "normal, log transform": Continuous(
        lambda f: td.TransformedDistribution(td.Normal(f[..., 0], f[..., 1].exp()), [td.ExpTransform()]), 2, "positive"
    ),
    "log-normal": Continuous(two(td.LogNormal, same, torch.exp), 2, "positive"),
    "half-normal": Continuous(two(td.HalfNormal, torch.exp), 1, "positive"),
    "laplace": Continuous(lambda f: td.Laplace(f[..., 0] - f[..., 0].detach(), f[..., 1].exp()), 2, "kink at 0"),
    "cauchy": Continuous(two(td.Cauchy, same, torch.exp), 2, "real"),
    "half-cauchy": Continuous(two(td.HalfCauchy, torch.exp), 1, "positive"),
    "student": Continuous(two(td.StudentT, lambda f: 2 + f.exp(), same, torch.exp), 3, "real"),
    "student, fixed df": Continuous(lambda f: td.StudentT(3.5, f[..., 0], f[..., 1].exp()), 2, "real"),
    "gumbel": Continuous(two(td.Gumbel, same, torch.exp), 2, "real"),
    "weibull": Continuous(two(td.Weibull, torch.exp, lambda f: 1 + f.exp()), 2, "positive"),
    "exponential": Continuous(two(td.Exponential, torch.exp), 1, "positive"),
    "gamma": Continuous(two(td.Gamma, lambda f: 1 + f.exp(), torch.exp), 2, "positive"),
    "inverse gamma": Continuous(two(td.InverseGamma, lambda f: 1 + f.exp(), torch.exp), 2, "positive"),
    "chi2": Continuous(two(td.Chi2, lambda f: 2 + f.exp()), 1, "positive"),
    "beta": Continuous(two(td.Beta, lambda f: 1 + f.exp(), lambda f: 1 + f.exp()), 2, "unit"),
    # torch's own log-density has seven digits there
    "von Mises": Continuous(two(td.VonMises, same, torch.exp), 2, "circle", 1e-6),
    "continuous bernoulli": Continuous(lambda f: td.ContinuousBernoulli(logits=f[..., 0]), 1, "unit"),
    "logit-normal": Continuous(
        lambda f: td.TransformedDistribution(td.Normal(f[..., 0], 0.5 * f[..., 1].exp()), [td.SigmoidTransform()]), 2, "unit"
    ),
}


def second_moment(make: Callable[[Tensor], td.Distribution], f: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Σ w p(y) ∇ log p ∇ log pᵀ for one position."""

    def log_prob(g: Tensor) -> Tensor:
        return make(g.unsqueeze(0)).log_prob(y)

    p, slope = log_prob(f).exp() * weights, torch.func.jacfwd(log_prob)(f)
    kept = p > 0
    assert abs(float(p[kept].sum()) - 1) < 1e-7
    return (slope[kept] * p[kept, None]).mT @ slope[kept]


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_families_against_quadrature(name: str) -> None:
    known = CONTINUOUS[name]
    family = Family(known.make)
    outputs = outputs_of((3, 2, known.c), scale=0.4)
    family.check(outputs)
    assert family.is_exact(outputs)
    y, weights = grid(known.support)
    wanted = torch.stack([second_moment(known.make, f, y, weights) for f in outputs.reshape(-1, known.c)])
    close(family.matrix(outputs).reshape(-1, known.c, known.c), wanted, known.tolerance)
    close(squared(family.root(outputs)), dense(lambda t: family.fisher(outputs, t), outputs))


class Dice(td.Distribution):
    """A die with three sides of one's own making, in the mean parameters."""

    has_enumerate_support = True

    def __init__(self, a: Tensor) -> None:
        self.p = torch.stack([1 / (1 + a.exp()), a.exp() / (1 + a.exp()) / 3, 2 * a.exp() / (1 + a.exp()) / 3], -1)
        super().__init__(a.shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.p.log().expand(*value.shape, 3).gather(-1, value.long().unsqueeze(-1)).squeeze(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        return torch.arange(3).reshape(3, *(1,) * len(self.batch_shape)).expand(3, *self.batch_shape)


DISCRETE: dict[str, tuple[Callable[[Tensor], td.Distribution], int, Tensor]] = {
    "bernoulli by probability": (lambda f: td.Bernoulli(f[..., 0].sigmoid()), 1, torch.arange(2)),
    "bernoulli by logit": (lambda f: td.Bernoulli(logits=f[..., 0] * 2), 1, torch.arange(2)),
    "binomial": (lambda f: td.Binomial(7, logits=f[..., 0]), 1, torch.arange(8)),
    "categorical": (lambda f: td.Categorical(logits=f), 3, torch.arange(3)),
    "categorical by probability": (lambda f: td.Categorical(f.square() + 0.1), 3, torch.arange(3)),
    "geometric": (lambda f: td.Geometric(logits=f[..., 0]), 1, torch.arange(400)),
    "negative binomial": (lambda f: td.NegativeBinomial(4.5, logits=f[..., 0]), 1, torch.arange(600)),
    "poisson": (lambda f: td.Poisson(F.softplus(f[..., 0])), 1, torch.arange(160)),
    "one's own": (lambda f: Dice(f[..., 0]), 1, torch.arange(3)),
}


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_families_against_sums(name: str) -> None:
    make, c, support = DISCRETE[name]
    family = Family(make)
    outputs = outputs_of((3, 2, c), scale=0.4)
    family.check(outputs)
    y = support.double() if name != "categorical" else support
    wanted = torch.stack([second_moment(make, f, y, torch.ones(len(y))) for f in outputs.reshape(-1, c)])
    close(family.matrix(outputs).reshape(-1, c, c), wanted, 1e-8)


def normal_of_matrix(f: Tensor) -> td.Distribution:
    lower = torch.stack([torch.stack([f[..., 2].exp(), 0 * f[..., 3]], -1), torch.stack([f[..., 3], f[..., 4].exp()], -1)], -2)
    return td.MultivariateNormal(f[..., :2], scale_tril=lower)


MULTIVARIATE: dict[str, tuple[Callable[[Tensor], td.Distribution], int]] = {
    "dirichlet": (lambda f: td.Dirichlet(f.exp()), 3),
    "normal": (normal_of_matrix, 5),
    "independent normals": (lambda f: td.Independent(td.Normal(f[..., :2], f[..., 2:].exp()), 1), 4),
    "one-hot": (lambda f: td.OneHotCategorical(logits=f), 3),
}


@pytest.mark.parametrize("name", MULTIVARIATE)
def test_multivariate_families_against_the_divergence(name: str) -> None:
    make, c = MULTIVARIATE[name]
    family, outputs = Family(make), outputs_of((3, 2, c), scale=0.4)
    family.check(outputs)
    wanted = [torch.func.hessian(lambda g, f=f: td.kl_divergence(make(f), make(g)))(f) for f in outputs.reshape(-1, c)]
    close(family.matrix(outputs).reshape(-1, c, c), torch.stack(wanted), 1e-10)


def test_families_without_a_divergence_in_torch() -> None:
    outputs = outputs_of((3, 2, 3), scale=0.4)
    single = Categorical().matrix(outputs)
    close(Family(lambda f: td.Multinomial(5, logits=f)).matrix(outputs), 5 * single)
    low = Family(
        lambda f: td.LowRankMultivariateNormal(f[..., :2], f[..., 2:, None].expand(*f.shape[:-1], 2, 1), f[..., :2].exp())
    )
    whole = Family(lambda f: td.MultivariateNormal(f[..., :2], f[..., 2:, None] ** 2 + torch.diag_embed(f[..., :2].exp())))
    close(low.matrix(outputs), whole.matrix(outputs))
    logistic = Family(lambda f: td.LogisticNormal(f[..., :1], f[..., 1:2].exp()))
    plain = Family(lambda f: td.Normal(f[..., 0], f[..., 1].exp()))
    close(logistic.matrix(outputs), plain.matrix(outputs))
    # one output, one factor: A is diagonal
    close(Family(lambda f: td.Laplace(f, 2.0)).matrix(outputs), torch.eye(3).expand(3, 2, 3, 3) / 4)


@pytest.mark.parametrize("pair", ["bernoulli", "poisson", "categorical", "gaussian"])
def test_families_that_are_likelihoods_of_their_own(pair: str) -> None:
    known = KNOWN[pair]
    family, outputs = Family(known.distribution, hessian_type=True), outputs_of((3, 2, 3))
    y = known.likelihood.sample(outputs)
    family.check_targets(outputs, y)
    for method in ("nll", "score"):
        close(getattr(family, method)(outputs, y), getattr(known.likelihood, method)(outputs, y))
    t = outputs.cos()
    close(family.fisher(outputs, t), known.likelihood.fisher(outputs, t))
    close(family.hessian(outputs, y, t), known.likelihood.fisher(outputs, t))


def test_the_fisher_of_ones_own() -> None:
    outputs = outputs_of((4, 2))
    own = Family(lambda f: td.Kumaraswamy(f[..., 0].exp(), f[..., 1].exp()), fisher=lambda f, t: f.exp() * t)
    assert own.is_exact(outputs)
    close(squared(own.root(outputs)), torch.diag_embed(outputs.exp()))
    unknown = Family(own.distribution)
    assert not unknown.is_exact(outputs)
    with pytest.raises(GeometryError, match=r"Kumaraswamy has no closed form.*kind='mc'.*fisher="):
        unknown.fisher(outputs, outputs)


def test_drawn_labels_of_families() -> None:
    for family, c in MORE.values():
        outputs = outputs_of((1, c), scale=0.3)
        many = outputs.expand(40_000, c)
        score = family.score(many, family.sample(many, torch.Generator().manual_seed(0)))
        second = score.mT @ score / len(score)
        spread = ((score.unsqueeze(-1) * score.unsqueeze(-2)).var(0) / len(score)).sqrt()
        assert bool(((second - family.matrix(outputs)[0]).abs() <= 5 * spread).all())


# One's own matrix, and any loss


@every_shape
@pytest.mark.parametrize("positive", [True, False])
def test_a_matrix_of_ones_own(shape: tuple[int, ...], positive: bool) -> None:
    outputs = outputs_of(shape)
    y = outputs_of(shape).flip(0)
    half = torch.einsum("...i,...j->...ij", outputs, outputs.cos())
    a = half @ half.mT if positive else half + half.mT
    likelihood = OutputMatrix(lambda f, y: a if y is None else a * y.square().sum((-1, -2), keepdim=True), positive)
    for targets in (None, y.unsqueeze(-1)):
        seeds, signs = likelihood.root(outputs, targets), likelihood.signs(outputs, targets)
        assert len(seeds) == likelihood.columns(shape)
        assert (signs is None) == positive
        rows = seeds.flatten(2)
        product = torch.einsum("kn,kna,knb->nab", torch.ones(rows.shape[:2]) if signs is None else signs, rows, rows)
        close(product, dense(lambda t, y=targets: likelihood.hessian(outputs, y, t), outputs), 1e-11)
    diagonal = OutputMatrix(lambda f, y: f if not positive else f.square(), positive)
    close(diagonal.fisher(outputs, y), (outputs if not positive else outputs.square()) * y)


def test_a_matrix_that_does_not_fit() -> None:
    outputs = outputs_of((4, 3))
    with pytest.raises(GeometryError, match=r"\(4, 3, 3\).*found \(3, 3\)"):
        OutputMatrix(lambda f, y: torch.eye(3)).fisher(outputs, outputs)
    with pytest.raises(GeometryError, match=r"must be symmetric"):
        OutputMatrix(lambda f, y: torch.ones(3, 3).triu().expand(4, 3, 3)).root(outputs)
    with pytest.raises(GeometryError, match=r"not positive semidefinite.*positive=False"):
        OutputMatrix(lambda f, y: -torch.ones_like(f)).root(outputs)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "huber": F.huber_loss,
    "huber, no reduction": lambda f, y: F.huber_loss(f, y, reduction="none"),
    "log cosh": lambda f, y: (f - y).cosh().log().sum(),
    "module": nn.SmoothL1Loss(beta=0.5),
    "coupled positions": lambda f, y: (f - y).flatten(1).logsumexp(1),
}


@pytest.mark.parametrize("name", LOSSES)
@every_shape
def test_any_convex_loss(name: str, shape: tuple[int, ...]) -> None:
    outputs, y = outputs_of(shape), outputs_of(shape).sin()
    loss = Loss(LOSSES[name])
    loss.check_targets(outputs, y)
    values = torch.stack([LOSSES[name](outputs[i : i + 1], y[i : i + 1]).sum() for i in range(len(outputs))])
    close(loss.nll(outputs, y), values)
    n, size = len(outputs), outputs[0].numel()
    wanted = torch.stack(
        [
            torch.func.hessian(lambda f, i=i: LOSSES[name](f, y[i : i + 1]).sum())(outputs[i : i + 1]).reshape(size, size)
            for i in range(n)
        ]
    )
    close(dense(lambda t: loss.hessian(outputs, y, t), outputs), wanted)
    seeds = loss.root(outputs, y)
    assert len(seeds) == loss.columns(shape)
    close(squared(seeds), wanted)
    with pytest.raises(GeometryError, match="no exact and no Monte-Carlo Fisher"):
        loss.fisher(outputs, outputs)


def test_a_loss_that_is_not_convex_has_no_root() -> None:
    outputs, y = torch.tensor([[0.1, 3.0]]), torch.zeros(1, 2)
    loss = Loss(lambda f, y: ((f - y) ** 2 / (1 + (f - y) ** 2)).sum())
    with pytest.raises(GeometryError, match=r"not positive semidefinite: its smallest eigenvalue is -0\..*convex"):
        loss.root(outputs, y)
    loss.hessian(outputs, y, y)  # the product exists


def test_class_weights() -> None:
    outputs, y = outputs_of((4, 3)), torch.tensor([0, 2, 1, 2])
    weight = torch.tensor([1.0, 2.0, 0.5])
    loss = likelihood_of(nn.CrossEntropyLoss(weight, reduction="none"))
    loss.check_targets(outputs, y)
    close(loss.hessian(outputs, y, outputs), weight[y].unsqueeze(-1) * Categorical().fisher(outputs, outputs))
    close(loss.score(outputs, y), weight[y].unsqueeze(-1) * Categorical().score(outputs, y))
    with pytest.raises(GeometryError, match="reduction='none'"):
        likelihood_of(nn.CrossEntropyLoss(weight))
    smoothed = likelihood_of(nn.CrossEntropyLoss(label_smoothing=0.1))
    close(smoothed.score(outputs, y), Categorical().score(outputs, 0.9 * F.one_hot(y, 3) + 0.1 / 3))
    close(squared(smoothed.root(outputs, y)), Categorical().matrix(outputs))


def test_losses_take_several_targets() -> None:
    outputs = outputs_of((4, 3))
    loss = Loss(lambda f, y: (y["weight"].unsqueeze(-1) * (f - y["mean"]) ** 2).sum())
    y = {"weight": torch.arange(1.0, 5.0), "mean": outputs.cos()}
    loss.check_targets(outputs, y)
    close(loss.score(outputs, y), -2 * y["weight"].unsqueeze(-1) * (outputs - y["mean"]))
    close(squared(loss.root(outputs, y)), 2 * y["weight"].reshape(4, 1, 1) * torch.eye(3))


# By name, and by loss


def test_likelihoods_by_name_and_by_loss() -> None:
    assert type(likelihood_of("poisson")) is Poisson
    mine = Gaussian(2.0)
    assert likelihood_of(mine) is mine
    for loss in (F.cross_entropy, nn.CrossEntropyLoss(), F.nll_loss, nn.NLLLoss(reduction="sum")):
        found = likelihood_of(loss)
        assert isinstance(found, Categorical)
        assert (found.axis, found.ignore_index) == (1, -100)
    found = likelihood_of(nn.CrossEntropyLoss(ignore_index=0))
    assert isinstance(found, Categorical) and found.ignore_index == 0
    pairs: list[tuple[Any, type]] = [
        (F.mse_loss, Gaussian),
        (nn.MSELoss(), Gaussian),
        (F.binary_cross_entropy_with_logits, Bernoulli),
        (nn.BCEWithLogitsLoss(), Bernoulli),
        (F.poisson_nll_loss, Poisson),
        (nn.PoissonNLLLoss(), Poisson),
        (nn.PoissonNLLLoss(log_input=False), Loss),
        (nn.CrossEntropyLoss(torch.ones(3), reduction="none"), Loss),
        (nn.CrossEntropyLoss(label_smoothing=0.1), Loss),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), Loss),
        (nn.HuberLoss(), Loss),
        (lambda f, y: (f - y).sum(), Loss),
    ]
    for given, kind in pairs:
        assert type(likelihood_of(given)) is kind
    for wrong in ("cauchy", 3, ["categorical"], None):
        with pytest.raises(GeometryError, match="is not known"):
            likelihood_of(wrong)
    with pytest.raises(GeometryError, match=r"Call it: Gaussian\(\)"):
        likelihood_of(Gaussian)


class Own(Likelihood):
    """The least that a likelihood of one's own defines."""

    def fisher(self, outputs: Tensor, t: Tensor) -> Tensor:
        return (outputs * t).sum(-1, keepdim=True) * outputs + t


@every_shape
def test_a_likelihood_of_ones_own(shape: tuple[int, ...]) -> None:
    outputs = outputs_of(shape)
    close(squared(Own().root(outputs)), dense(lambda t: Own().fisher(outputs, t), outputs))
    assert not Own().hessian_type
    with pytest.raises(GeometryError, match=r"nll\(outputs, targets\)"):
        Own().score(outputs, outputs)
    with pytest.raises(GeometryError, match=r"sample\(outputs, generator\)"):
        Own().sample(outputs)


# Under torch.func, in other precisions, without samples

ALL: dict[str, Likelihood] = {
    **{name: known.likelihood for name, known in KNOWN.items() if known.axis == -1},
    "normal": Family(lambda f: td.Normal(f[..., 0], f[..., 1].exp() + f[..., 2] ** 2)),
    "huber": Loss(lambda f, y: F.huber_loss(f, y, reduction="none")),
    "matrix": OutputMatrix(lambda f, y: f.square()),
}


def drawn(likelihood: Likelihood, outputs: Tensor) -> Tensor:
    return outputs.sin() if isinstance(likelihood, Loss | OutputMatrix) else likelihood.sample(outputs)


@pytest.mark.parametrize("name", ALL)
def test_under_transforms(name: str) -> None:
    likelihood = ALL[name]
    outputs = outputs_of((5, 2, 3))
    y, t = drawn(likelihood, outputs), outputs.cos()

    def product(f: Tensor, t: Tensor) -> Tensor:
        return likelihood.hessian(f, y, t) if isinstance(likelihood, Loss) else likelihood.fisher(f, t)

    many = torch.stack([outputs, outputs.sin()])
    directions = torch.stack([t, 2 * t.sin()])
    batched = torch.func.vmap(product)(many, directions)
    close(batched, torch.stack([product(f, t) for f, t in zip(many, directions, strict=True)]))
    step = 1e-5
    slope = products.jvp(lambda f: product(f, t), outputs, directions[1])[1]
    difference = (product(outputs + step * directions[1], t) - product(outputs - step * directions[1], t)) / (2 * step)
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-6)
    back = torch.func.vjp(lambda f: product(f, t), outputs)[1](t)[0]
    close((back * directions[1]).sum(), (slope * t).sum())
    if isinstance(likelihood, OutputMatrix):
        return
    score = torch.func.vmap(lambda f: likelihood.score(f, y))(many)
    close(score[1], likelihood.score(many[1], y))
    close(products.jvp(lambda f: likelihood.score(f, y), outputs, t)[1], -likelihood.hessian(outputs, y, t))
    single = torch.func.vmap(lambda f, y: likelihood.score(f.unsqueeze(0), y.unsqueeze(0)).squeeze(0))(outputs, y)
    close(single, likelihood.score(outputs, y))
    close(torch.func.vmap(lambda f: likelihood.root(f, y if isinstance(likelihood, Loss) else None))(many)[0].square().sum(0),
          likelihood.root(outputs, y if isinstance(likelihood, Loss) else None).square().sum(0))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in ALL
        for dtype in (torch.float32, torch.bfloat16)
        if not (name == "normal" and dtype is torch.bfloat16)  # torch.distributions has its own digits there
    ],
)
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    likelihood = ALL[name]
    tolerance = 1e-5 if dtype is torch.float32 else 4e-2
    outputs = outputs_of((4, 3)).to(dtype)
    exact = outputs.double()
    y = drawn(likelihood, exact)
    y = y.to(dtype) if y.is_floating_point() else y
    wide = y.double() if y.is_floating_point() else y
    labels = (None, None) if isinstance(likelihood, Family) else (y, wide)

    def near(value: Tensor, wanted: Tensor) -> None:
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=tolerance)

    seeds = likelihood.root(outputs, labels[0])
    near(squared(seeds.double()).to(dtype), squared(likelihood.root(exact, labels[1])))
    assert seeds.dtype == dtype
    near(likelihood.hessian(outputs, y, torch.ones_like(outputs)), likelihood.hessian(exact, wide, torch.ones_like(exact)))
    if not isinstance(likelihood, OutputMatrix):
        near(likelihood.score(outputs, y), likelihood.score(exact, wide))
        near(likelihood.nll(outputs, y), likelihood.nll(exact, wide))
    if not isinstance(likelihood, Loss | OutputMatrix):
        assert likelihood.sample(outputs).isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_without_samples(name: str) -> None:
    likelihood = ALL[name]
    outputs = torch.zeros(0, 2, 3)
    y = drawn(likelihood, outputs)
    assert likelihood.root(outputs, y if isinstance(likelihood, Loss) else None).shape == (
        likelihood.columns(outputs.shape), 0, 2, 3
    )  # fmt: skip
    if isinstance(likelihood, OutputMatrix):
        return
    likelihood.check_targets(outputs, y)
    assert likelihood.nll(outputs, y).shape == (0,)
    assert likelihood.score(outputs, y).shape == outputs.shape


def test_the_noise_level_of_a_gaussian_can_be_learnt() -> None:
    outputs, y = outputs_of((4, 3)), outputs_of((4, 3)).sin()
    variance = torch.tensor(0.7, requires_grad=True)
    (slope,) = torch.autograd.grad(Gaussian(variance).nll(outputs, y).sum(), variance)
    residual = (y - outputs).square().sum()
    close(slope, -residual / (2 * 0.7**2) + 6 / 0.7)
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.3, 0.8, 0.0], [-0.2, 0.1, 1.1]], requires_grad=True)
    nll = Gaussian(factor @ factor.mT).nll(outputs, y).sum()
    wanted = -td.MultivariateNormal(outputs, scale_tril=factor).log_prob(y).sum()
    close(torch.autograd.grad(nll, factor)[0].tril(), torch.autograd.grad(wanted, factor)[0].tril())


# Wrong labels and outputs

WRONG: dict[str, tuple[Likelihood, Tensor, Any, str]] = {
    "labels out of range": (Categorical(), torch.zeros(4, 3), torch.tensor([0, 5, 1, -1]), r"between 0 and 2.*from -1 to 5"),
    "padding not said": (Categorical(), torch.zeros(2, 2, 3), torch.tensor([[0, -100], [1, 2]]), r"-100 to 2.*ignore_index"),
    "real labels": (Categorical(), torch.zeros(4, 3), torch.zeros(4), r"integer labels.*found float32 of shape \(4,\)"),
    "bool labels": (Categorical(), torch.zeros(4, 3), torch.zeros(4, dtype=torch.bool), r"found bool"),
    "labels with an axis": (Categorical(), torch.zeros(4, 3), torch.zeros(4, 1).long(), r"\(4,\).*of shape \(4, 1\)"),
    "classes elsewhere": (Categorical(), torch.zeros(2, 3, 4), torch.zeros(2, 4).long(), r"shape \(2, 3\).*axis="),
    "one-hot integers": (Categorical(), torch.zeros(4, 3), torch.zeros(4, 3).long(), r"class probabilities \(floating point\)"),
    "no probabilities": (Categorical(), torch.zeros(4, 3), torch.ones(4, 3), r"sums from 3 to 3"),
    "nan probabilities": (Categorical(), torch.zeros(4, 3), torch.full((4, 3), torch.nan), r"class probabilities"),
    "no labels": (Categorical(), torch.zeros(4, 3), None, r"the data have none"),
    "one logit": (Categorical(), torch.zeros(4, 1), torch.zeros(4).long(), r"'bernoulli'"),
    "no such axis": (Categorical(axis=2), torch.zeros(4, 3), torch.zeros(4).long(), r"axis 2.*\(4, 3\)"),
    "a broadcast": (Gaussian(), torch.zeros(4, 1), torch.zeros(4), r"\(4, 1\).*\(4,\).*unsqueeze"),
    "nan targets": (Gaussian(), torch.zeros(2, 1), torch.tensor([[1.0], [torch.nan]]), r"1 of 2 targets"),
    "no tensor": (Gaussian(), torch.zeros(2, 1), [1.0, 2.0], r"a list"),
    "signs": (Bernoulli(), torch.zeros(2, 1), torch.tensor([[1.0], [-1.0]]), r"found -1 to 1"),
    "classes for bernoulli": (Bernoulli(), torch.zeros(2, 1), torch.tensor([[1], [3]]), r"found 1 to 3"),
    "negative counts": (Poisson(), torch.zeros(2, 1), torch.tensor([[1.0], [-2.0]]), r"-2 as the smallest"),
    "integer outputs": (Poisson(), torch.zeros(2, 1).long(), torch.zeros(2, 1), r"real outputs, found torch.int64"),
    "a vector of outputs": (Categorical(), torch.zeros(4), torch.zeros(4).long(), r"\(n, ..., c\).*found \(4,\)"),
    "another size": (Gaussian(SIGMA), torch.zeros(4, 2), torch.zeros(4, 2), r"for 3 outputs, the network has 2"),
    "a 1 x 1 matrix": (Gaussian(torch.ones(1, 1)), torch.zeros(4, 2), torch.zeros(4, 2), r"for 1 outputs, the network has 2"),
    "a target outside of the support": (
        Family(lambda f: td.Exponential(f[..., 0].exp())), torch.zeros(2, 1), torch.tensor([1.0, -1.0]), r"cannot be a draw"
    ),
    "a broadcast of a family": (
        Family(lambda f: td.Exponential(f[..., 0].exp())), torch.zeros(2, 1), torch.ones(2, 1), r"shape \(2,\).*\(2, 1\)"
    ),
    "parameters outside of their domain": (
        Family(lambda f: td.Exponential(f)), -torch.ones(2, 1), torch.ones(2, 1), r"no parameters of it.*softplus"
    ),
    "a family of the batch": (
        Family(lambda f: td.Normal(f.mean(0), 1.0)), torch.zeros(2, 3), torch.ones(3), r"must begin with \(2,\), found \(3,\)"
    ),
    "no distribution": (Family(lambda f: f), torch.zeros(2, 3), torch.ones(2, 3), r"returned Tensor"),  # type: ignore[arg-type]
    "a loss without sample axis": (Loss(F.mse_loss), torch.zeros(2, 3), torch.ones(3, 3), r"\(2, 3\).*\(3, 3\)"),
    "a loss with nan": (Loss(F.mse_loss), torch.zeros(1, 1), torch.full((1, 1), torch.nan), r"1 of 1 targets are nan"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_labels_are_refused(name: str) -> None:
    likelihood, outputs, targets, message = WRONG[name]
    with pytest.raises(GeometryError, match=f"(?s){message}"):
        likelihood.check_targets(outputs, targets)


def test_shapes_are_looked_at_by_every_method() -> None:
    for likelihood in (Gaussian(), Bernoulli(), Poisson(), Family(lambda f: td.Laplace(f, 1.0))):
        for method in (likelihood.nll, likelihood.score):
            with pytest.raises(GeometryError, match="pair samples with each other"):
                method(torch.zeros(4, 1), torch.zeros(4))
    with pytest.raises(GeometryError, match="integer labels"):
        Categorical().score(torch.zeros(4, 3), torch.zeros(4, 1).long())


def test_checks_do_not_stand_in_the_way_of_transforms() -> None:
    outputs, y = outputs_of((4, 3)), torch.tensor([0, 1, 2, 0])

    def checked(f: Tensor, y: Tensor) -> Tensor:
        Categorical().check_targets(f, y)
        Family(lambda f: td.Normal(f[..., 0], f[..., 1].exp())).check_targets(f, f[..., 0])
        return Categorical().score(f, y)

    twice = torch.func.vmap(checked)(torch.stack([outputs, outputs]), torch.stack([y, y]))
    close(twice[1], Categorical().score(outputs, y))


@pytest.mark.parametrize(
    ("covariance", "kind"),
    [
        (0.0, SingularMetricError),
        (torch.tensor([1.0, -1.0]), SingularMetricError),
        (torch.tensor(float("nan")), SingularMetricError),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), SingularMetricError),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), SingularMetricError),
        (torch.ones(2, 3), GeometryError),
        (torch.ones(4, 2, 2), GeometryError),
    ],
)
def test_wrong_covariances(covariance: Any, kind: type[GeometryError]) -> None:
    with pytest.raises(kind):
        Gaussian(covariance)


def test_a_count_that_is_an_output_has_no_closed_form() -> None:
    outputs = outputs_of((3, 2))
    family = Family(lambda f: td.NegativeBinomial(f[..., 0].exp(), logits=f[..., 1]))
    with pytest.raises(GeometryError, match="total_count depends on the outputs"):
        family.fisher(outputs, torch.ones_like(outputs))
    products = torch.func.vmap(family.fisher, in_dims=(None, 0))(outputs, torch.ones(1, 3, 2))
    assert products.isnan().all()  # where nothing can be read
    moved = torch.tensor([0.0, 1.0]).expand(3, 2)
    close(family.fisher(outputs, moved)[:, 1], outputs[:, 0].exp() * outputs[:, 1].sigmoid())


# Some of the outputs


def test_selecting_outputs() -> None:
    outputs = outputs_of((4, 2, 5))
    close(selecting(None)(outputs), outputs)
    close(selecting([0, 3])(outputs), outputs[..., [0, 3]])
    close(selecting(-1)(outputs), outputs[..., 4:])
    close(selecting(range(1, 4))(outputs), outputs[..., 1:4])
    close(selecting(torch.tensor([2, 1]))(outputs), outputs[..., [2, 1]])
    close(selecting([1], axis=1)(outputs), outputs[:, 1:])
    close(selecting(Difference(3, 0))(outputs), outputs[..., 3:4] - outputs[..., :1])
    close(Difference(-1, 0, axis=1)(outputs), outputs[:, 1:] - outputs[:, :1])
    close(selecting(torch.sin)(outputs), outputs.sin())
    assert selecting((0, 3)) == Subset((0, 3))
    close(pickle.loads(pickle.dumps(selecting([0, 3])))(outputs), outputs[..., [0, 3]])
    t = outputs.cos()
    close(torch.func.jvp(selecting([0, 3]), (outputs,), (t,))[1], t[..., [0, 3]])
    close(torch.func.vmap(Difference(1, 2))(outputs), outputs[..., 1:2] - outputs[..., 2:3])


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([0, 5], r"5 outputs.*no output \[5\]"),
        (-6, r"no output \[-6\]"),
        (Difference(0, 7), r"no output \[7\]"),
        (Difference(1, 1), "zero everywhere"),
        (Difference(1, -4), "zero everywhere"),
        ([], "at least one index"),
        ([1, 1], "none twice"),
        ("margin", "selects no outputs"),
        (1.5, "selects no outputs"),
        ([True, False], "selects no outputs"),
    ],
)
def test_outputs_that_cannot_be_selected(outputs: Any, message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        selecting(outputs)(torch.zeros(4, 5))
    with pytest.raises(GeometryError, match="batch axis"):
        selecting([0])(torch.zeros(4))
