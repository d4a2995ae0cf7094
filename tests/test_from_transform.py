"""`maps.from_transform`: every transform of torch.distributions that is a chart, flows, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, Transform, TransformedDistribution, constraints, transform_to
from torch.distributions import transforms as td

import geoad
from geoad import maps
from geoad.errors import ChartDomainError, GeometryError, NotADiffeomorphismError, UnsupportedModuleError
from geoad.maps.select import bind
from geoad.params import Blocks, Layout

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

T = Callable[[], Transform]
NUMBERS = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

TRANSFORMS: dict[str, tuple[T, tuple[int, ...], str]] = {
    "affine": (lambda: td.AffineTransform(0.3, -2.0), (), "el"),
    "affine rows": (lambda: td.AffineTransform(NUMBERS, NUMBERS.flip(0)), (2, 3), "el"),
    "affine event": (lambda: td.AffineTransform(1.0, torch.tensor(2.0), event_dim=1), (2, 3), "el"),  # its own volume is wrong
    "cat": (lambda: td.CatTransform([td.ExpTransform(), td.SigmoidTransform().inv], 0, [1, 3]), (4, 2), "e"),
    "cat of vectors": (lambda: td.CatTransform([_mixing(), td.ExpTransform()], -1, [3, 2]), (2, 5), ""),
    "compose": (lambda: td.ComposeTransform([td.SigmoidTransform(), td.AffineTransform(-1.0, 2.0)]), (3,), "e"),
    "compose nothing": (lambda: td.identity_transform, (2,), "el"),
    "there and back": (lambda: td.ComposeTransform([td.StickBreakingTransform(), td.StickBreakingTransform().inv]), (3,), ""),
    "cdf": (lambda: td.CumulativeDistributionTransform(Normal(torch.tensor(0.2), torch.tensor(1.5))), (3,), "e"),
    "exp": (lambda: td.ExpTransform(cache_size=1), (2, 2), "e"),
    "independent": (lambda: td.IndependentTransform(td.SigmoidTransform(cache_size=1), 1), (2, 3), "e"),
    "power": (lambda: td.PowerTransform(torch.tensor(2.5)), (3,), "e"),
    "power inverse": (lambda: td.PowerTransform(torch.tensor(-1.5)).inv, (3,), "e"),
    "reshape": (lambda: td.ReshapeTransform((2, 3), (6,)), (4, 2, 3), "l"),
    "reshape inverse": (lambda: td.ReshapeTransform((6,), (2, 3)).inv, (4, 2, 3), "l"),
    "sigmoid": (td.SigmoidTransform, (3,), "e"),
    "softplus": (td.SoftplusTransform, (3,), "e"),
    "stack": (lambda: td.StackTransform([td.ExpTransform(), td.TanhTransform(cache_size=1)], 1), (4, 2), "e"),
    "tanh": (td.TanhTransform, (1,), "e"),
    "mixing": (lambda: _mixing(), (2, 3), ""),
}
FREE: dict[str, tuple[T, int]] = {
    "stick breaking": (td.StickBreakingTransform, 3),
    "correlation": (td.CorrCholeskyTransform, 6),
    "cholesky": (td.LowerCholeskyTransform, 6),
    "covariance": (td.PositiveDefiniteTransform, 6),
}


class Mixing(Transform):
    """y = A sinh(x), a vector at a time."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def _call(self, x: Tensor) -> Tensor:
        return x.sinh() @ self.matrix.mT

    def _inverse(self, y: Tensor) -> Tensor:
        return (y @ torch.linalg.inv(self.matrix).mT).asinh()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.slogdet(self.matrix).logabsdet + x.cosh().log().sum(-1)


def _mixing() -> Mixing:
    return Mixing(torch.eye(3, dtype=torch.float64) + 0.3 * torch.ones(3, 3, dtype=torch.float64).tril())


def recipe(name: str) -> tuple[maps.Map, tuple[int, ...], Any]:
    """The recipe, the shape of the block, and the constraint of its domain."""
    if name in FREE:
        make, size = FREE[name]
        return maps.from_transform(make(), free=True), (size,), constraints.real_vector
    make, shape, _ = TRANSFORMS[name]
    return maps.from_transform(make()), shape, make().domain


def sample(domain: Any, shape: tuple[int, ...], seed: int = 0) -> Blocks:
    raw = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"x": transform_to(domain)(0.6 * raw)}


def flat(blocks: Blocks) -> Tensor:
    return blocks["x"].reshape(-1)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    gap = (actual.detach() - expected.detach()).norm()
    assert float(gap) <= tolerance * max(float(expected.detach().norm()), 1e-3)


def check_laws(m: maps.Map, x: Blocks, tolerance: float = 1e-10) -> Tensor:
    """Round trips, the four products and the volume against the dense Jacobian of `forward` by reverse mode."""
    assert m.outside_domain(x) is None
    y = m.forward(x)
    assert m.outside_image(y) is None
    close(flat(m.invert(y)), flat(x), tolerance)
    close(flat(m.forward(m.invert(y))), flat(y), tolerance)
    dim, y = x["x"].numel(), {"x": y["x"].detach()}
    jacobian: Any = torch.func.jacrev(lambda v: m.forward({"x": v})["x"])(x["x"])
    jacobian = jacobian.detach().reshape(dim, dim)
    draws = torch.Generator().manual_seed(3)
    v = {"x": torch.randn(x["x"].shape, generator=draws, dtype=torch.float64)}
    w = {"x": torch.randn(y["x"].shape, generator=draws, dtype=torch.float64)}
    close(flat(m.push(x, y, v)), jacobian @ flat(v), tolerance)
    close(flat(m.pull(x, y, w)), jacobian.mT @ flat(w), tolerance)
    close(flat(m.push_inverse(x, y, w)), torch.linalg.solve(jacobian, flat(w)), tolerance)
    close(flat(m.pull_inverse(x, y, v)), torch.linalg.solve(jacobian.mT, flat(v)), tolerance)
    volume = m.log_abs_det(x, y).detach()
    assert volume.shape == ()
    assert abs(float(volume - torch.linalg.slogdet(jacobian).logabsdet)) <= tolerance * max(1.0, abs(float(volume)))
    return jacobian


@pytest.mark.parametrize("name", [*TRANSFORMS, *FREE])
def test_laws(name: str) -> None:
    made, shape, domain = recipe(name)
    m, x = bind(made, Layout({"x": shape})), sample(domain, shape)
    jacobian = check_laws(m, x)
    letters = "" if name in FREE else TRANSFORMS[name][2]
    assert (m.elementwise, m.linear) == ("e" in letters, "l" in letters)
    if m.elementwise:
        assert torch.equal(jacobian, jacobian.diagonal().diag())
    if name in TRANSFORMS and name != "softplus":
        close(flat(m.forward(x)), TRANSFORMS[name][0]()(x["x"]).reshape(-1), 1e-14)
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(flat(twin.forward(x)), flat(m.forward(x)))
        close(flat(twin.invert(twin.forward(x))), flat(x))


@pytest.mark.parametrize("name", [*TRANSFORMS, *FREE])
def test_inverse(name: str) -> None:
    """inverse=True is the map the other way round."""
    if name in FREE:
        back = maps.from_transform(FREE[name][0](), free=True, inverse=True)
    else:
        back = maps.from_transform(TRANSFORMS[name][0](), inverse=True)
    made, shape, domain = recipe(name)
    m, x = bind(made, Layout({"x": shape})), sample(domain, shape)
    y = m.forward(x)
    inverse = bind(back, Layout({"x": y["x"].shape}))
    close(flat(inverse.forward(y)), flat(x), 1e-9)
    check_laws(inverse, y, 1e-8)


@pytest.mark.parametrize("name", [*TRANSFORMS, *FREE])
def test_transforms(name: str) -> None:
    """vmap over points, float32 in and out, second derivatives."""
    made, shape, domain = recipe(name)
    m = bind(made, Layout({"x": shape}))
    many = [sample(domain, shape, seed) for seed in range(3)]
    stacked = {"x": torch.stack([x["x"] for x in many])}
    images = torch.func.vmap(m.forward)(stacked)
    back = torch.func.vmap(m.invert)(images)
    volumes = torch.func.vmap(m.log_abs_det)(stacked, images)
    pushed = torch.func.vmap(m.push)(stacked, images, stacked)
    for i, x in enumerate(many):
        y = m.forward(x)
        close(images["x"][i], y["x"], 1e-13)
        close(back["x"][i], x["x"], 1e-9)
        close(pushed["x"][i], m.push(x, y, x)["x"], 1e-12)
        assert float(volumes[i]) == pytest.approx(float(m.log_abs_det(x, y)), rel=1e-11, abs=1e-11)
    second: Any = torch.func.jacfwd(torch.func.jacrev(lambda v: m.forward({"x": v})["x"].square().sum()))(many[0]["x"])
    assert bool(second.isfinite().all())
    single = {"x": many[0]["x"].float()}
    y = m.forward(single)
    assert y["x"].dtype == torch.float32
    assert m.push(single, y, single)["x"].dtype == m.log_abs_det(single, y).dtype == torch.float32
    close(m.invert(y)["x"].double(), many[0]["x"], 1e-4)


@pytest.mark.parametrize("name", ["affine rows", "cat", "cdf", "independent", "power", "stack", "mixing", *FREE])
def test_conformance(name: str) -> None:
    """The suite for maps that others write."""
    _, shape, domain = recipe(name)

    class Suite(geoad.testing.DiffeomorphismConformance):
        layout = {"x": shape}  # noqa: RUF012

        def make(self) -> Any:
            return recipe(name)[0]

        def point(self, seed: int) -> Blocks:
            return sample(domain, shape, seed)

    Suite().run()


def test_a_chart_refuses_what_is_outside() -> None:
    chart = geoad.Chart({"x": (2,)}, name="x")
    unit = chart.reparametrize(maps.from_transform(td.SigmoidTransform()), name="unit").target
    for bad in ([0.0, 0.5], [0.5, 1.0], [1.5, 0.5], [float("nan"), 0.5]):
        with pytest.raises(ChartDomainError, match=r"SigmoidTransform|finite"):
            unit.point(torch.tensor(bad, dtype=torch.float64))
    with pytest.raises(ChartDomainError, match="derivative of SigmoidTransform"):
        chart.point(torch.tensor([0.0, 50.0], dtype=torch.float64)).to(unit)
    root = chart.reparametrize(maps.from_transform(td.PowerTransform(torch.tensor(0.5))), name="root").target
    with pytest.raises(ChartDomainError, match="lower_bound"):
        chart.point(torch.tensor([1.0, -1.0], dtype=torch.float64)).to(root)
    simplex = chart.reparametrize(maps.from_transform(td.StickBreakingTransform(), free=True), name="p").target
    assert simplex.point(torch.tensor([0.2, 0.3], dtype=torch.float64)).to(chart).ravel().isfinite().all()
    with pytest.raises(ChartDomainError):
        simplex.point(torch.tensor([0.8, 0.3], dtype=torch.float64))


def test_covariances_are_coordinates() -> None:
    """The pairing and the matrix itself, for the triangle of a positive definite matrix."""
    chart = geoad.Chart({"x": (3,)}, name="x")
    psi = chart.reparametrize(maps.from_transform(td.PositiveDefiniteTransform(), free=True), name="covariance").target
    p = chart.point(torch.tensor([0.1, -0.4, 0.3], dtype=torch.float64))
    a, b, c = p.to(psi).ravel().tolist()
    whole = td.PositiveDefiniteTransform()(torch.tensor([[0.1, 0.0], [-0.4, 0.3]], dtype=torch.float64))
    assert torch.allclose(whole, torch.tensor([[a, b], [b, c]], dtype=torch.float64))
    with pytest.raises(ChartDomainError):
        psi.point(torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64))


def test_blocks_of_another_shape_in_a_network() -> None:
    """A network in a chart whose blocks are reshaped, and a gradient that comes back."""
    torch.manual_seed(0)
    geo = geoad.GeoModule(nn.Linear(3, 2).double())
    psi = geo.reference.reparametrize({"weight": maps.from_transform(td.ReshapeTransform((2, 3), (6,)))}, name="row").target
    inputs = torch.randn(4, 3).double()
    before, p = geo(inputs), geo.point()
    loss = geo.loss(nn.functional.mse_loss, (inputs, torch.zeros(4, 2).double()))
    slope = geoad.grad(loss)(p.to(psi))
    assert slope.components["weight"].shape == (6,)
    close(slope.to(geo.reference).ravel(), geoad.grad(loss)(p).ravel(), 1e-14)
    geo.to(psi)
    assert torch.equal(geo(inputs), before) and geo.wrapped.weight.shape == (6,)
    geo(inputs).square().mean().backward()
    close(geo.grad.ravel(), slope.ravel(), 1e-12)


def test_distributions_and_batches() -> None:
    base = Normal(torch.zeros(2).double(), torch.ones(2).double())
    target = TransformedDistribution(base, [td.ExpTransform(), td.AffineTransform(1.0, 2.0)])
    chart = geoad.Chart({"x": (2,)}, name="z")
    psi = chart.reparametrize(maps.from_transform(target), name="x").target
    points = chart.point(torch.randn(5, 2).double()).to(psi)
    z = points.to(chart).ravel()
    m = bind(maps.from_transform(target), Layout({"x": (2,)}))
    volumes = torch.func.vmap(m.log_abs_det)({"x": z}, {"x": points.ravel()})
    close(base.log_prob(z).sum(-1) - volumes, target.log_prob(points.ravel()).sum(-1))
    empty = chart.point(torch.zeros(0, 2).double()).to(psi)
    assert empty.ravel().shape == (0, 2)


def test_learnable_numbers() -> None:
    """Leaves that ask for a gradient become parameters of the bound map; the rest are float64 buffers."""
    scale = nn.Parameter(torch.tensor([2.0, 3.0]))
    shift = torch.tensor([0.5, 0.25], requires_grad=True)
    m = bind(maps.from_transform(td.AffineTransform(shift, scale)), Layout({"x": (2,)}))
    assert m.learnable and len(list(m.parameters())) == 2
    x = {"x": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    y = m.forward(x)
    total = flat(m.push_inverse(x, y, x)).sum() + flat(m.invert({"x": y["x"].detach()})).sum() + m.log_abs_det(x, y)
    grads = torch.autograd.grad(total, list(m.parameters()))
    assert all(bool((each != 0).all()) for each in grads)
    assert torch.equal(scale, torch.tensor([2.0, 3.0])) and m.double() is m
    assert all(p.dtype == torch.float64 for p in m.parameters())
    fixed = bind(maps.from_transform(td.AffineTransform(NUMBERS[:2], NUMBERS[:2])), Layout({"x": (2,)}))
    assert not fixed.learnable
    fixed.half()
    assert torch.equal(flat(fixed.forward(x)), NUMBERS[:2] + NUMBERS[:2] * x["x"])


def test_caches_do_not_leak() -> None:
    """A transform with a cache is not touched, and holds nothing of torch.func afterwards."""
    cached = td.IndependentTransform(td.SigmoidTransform(cache_size=1), 1, cache_size=1)
    m = bind(maps.from_transform(cached), Layout({"x": (3,)}))
    x = {"x": torch.zeros(3, dtype=torch.float64)}
    torch.func.jacrev(lambda v: m.forward({"x": v})["x"])(x["x"])
    torch.func.vmap(m.forward)({"x": torch.zeros(2, 3, dtype=torch.float64)})
    assert cached.base_transform._cached_x_y == (None, None)  # pyright: ignore
    x["x"].add_(1.0)
    assert float(m.forward(x)["x"][0]) == pytest.approx(float(torch.sigmoid(torch.tensor(1.0, dtype=torch.float64))))


# -- what is refused -----------------------------------------------------------------------------------------------------------


class Liar(Transform):
    """Says that it acts on entries, and does not."""

    domain = codomain = constraints.real
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        return x + x.flip(-1) ** 3

    def _inverse(self, y: Tensor) -> Tensor:
        return y


class WrongWay(Mixing):
    """Its inverse is that of another map."""

    def _inverse(self, y: Tensor) -> Tensor:
        return y


class WrongVolume(Mixing):
    """Its volume is that of another map."""

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x.sum(-1)


REFUSED: list[tuple[Callable[[], Any], tuple[int, ...], type[GeometryError], str]] = [
    (lambda: maps.from_transform(td.AbsTransform()), (3,), NotADiffeomorphismError, "two to one"),
    (lambda: maps.from_transform(td.SoftmaxTransform()), (3,), NotADiffeomorphismError, "n - 1 degrees"),
    (lambda: maps.from_transform(td.StickBreakingTransform()), (3,), NotADiffeomorphismError, "free=True"),
    (lambda: maps.from_transform(td.StickBreakingTransform().inv), (3,), NotADiffeomorphismError, "free=True"),
    (lambda: maps.from_transform(td.CorrCholeskyTransform()), (3,), NotADiffeomorphismError, "below the diagonal"),
    (lambda: maps.from_transform(td.LowerCholeskyTransform()), (3, 3), NotADiffeomorphismError, "above the diagonal"),
    (lambda: maps.from_transform(td.PositiveDefiniteTransform()), (3, 3), NotADiffeomorphismError, "symmetric"),
    (lambda: maps.from_transform(td.CatTransform([td.AbsTransform()], 0, [3])), (3,), NotADiffeomorphismError, "one to one"),
    (
        lambda: maps.from_transform(td.ComposeTransform([td.SoftmaxTransform(), td.ExpTransform()])),
        (3,),
        NotADiffeomorphismError,
        "of rank 2",
    ),
    (
        lambda: maps.from_transform(td.ComposeTransform([td.ExpTransform(), td.StickBreakingTransform()])),
        (3,),
        NotADiffeomorphismError,
        "3 numbers to 4",
    ),
    (
        lambda: maps.from_transform(td.AffineTransform(0.0, torch.tensor([0.0, 1.0]))),
        (2,),
        NotADiffeomorphismError,
        "derivative 0",
    ),
    (lambda: maps.from_transform(td.PowerTransform(torch.tensor(0.0))), (2,), NotADiffeomorphismError, "derivative 0"),
    (lambda: maps.from_transform(td.AffineTransform(0.0, torch.ones(4, 3))), (3,), NotADiffeomorphismError, "3 numbers to 12"),
    (lambda: maps.from_transform(td.AffineTransform(0.0, torch.ones(4))), (3,), GeometryError, "block of shape"),
    (lambda: maps.from_transform(td.ReshapeTransform((2, 2), (4,))), (3,), GeometryError, "block of shape"),
    (lambda: maps.from_transform(Liar()), (4,), GeometryError, "entries depend on each other"),
    (lambda: maps.from_transform(WrongWay(_mixing().matrix)), (3,), NotADiffeomorphismError, "not one to one"),
    (
        lambda: maps.from_transform(td.CumulativeDistributionTransform(torch.distributions.StudentT(3.0))),
        (3,),
        NotADiffeomorphismError,
        "without cdf",
    ),
    (
        lambda: maps.from_transform(td.CumulativeDistributionTransform(torch.distributions.Gamma(2.0, 1.0))),
        (3,),
        NotADiffeomorphismError,
        "no inverse",
    ),
    (lambda: maps.from_transform(td.ExpTransform), (3,), GeometryError, "an instance"),
    (lambda: maps.from_transform(3), (3,), GeometryError, "found int"),
    (lambda: maps.from_transform(nn.Linear(2, 2)), (2,), GeometryError, "failed to make a transform"),
    (lambda: maps.from_transform(nn.Identity(), context=torch.ones(2)), (2,), GeometryError, "made a Tensor"),
    (lambda: maps.from_transform(td.ExpTransform(), free=True), (2,), GeometryError, "StickBreakingTransform"),
    (lambda: maps.from_transform(td.ExpTransform(), context=torch.ones(1)), (2,), GeometryError, "takes none"),
    (lambda: maps.from_transform(td.AffineTransform(NUMBERS.requires_grad_() * 2, 1.0)), (3,), GeometryError, "computed from"),
]


@pytest.mark.parametrize(("make", "shape", "error", "words"), REFUSED)
def test_refused(make: Callable[[], Any], shape: tuple[int, ...], error: type[GeometryError], words: str) -> None:
    try:
        with pytest.raises(error, match=words):
            bind(make(), Layout({"x": shape}))
    finally:
        NUMBERS.requires_grad_(False)


def test_a_wrong_volume_is_found_out() -> None:
    """What log_abs_det_jacobian says is checked; where it is wrong the Jacobian itself is used."""
    m = bind(maps.from_transform(WrongVolume(_mixing().matrix)), Layout({"x": (3,)}))
    check_laws(m, sample(constraints.real_vector, (3,)))


class Pair(nn.Module):
    """A bijection in the manner of other libraries: (value, log det) of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([0.1, -0.2, 0.3]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.ndim == 2
        return x * self.log_scale.exp(), self.log_scale.sum().expand(len(x))

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y * (-self.log_scale).exp(), -self.log_scale.sum().expand(len(y))


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_bijections_of_others(shape: tuple[int, ...]) -> None:
    m = bind(maps.from_transform(Pair()), Layout({"x": shape}))
    check_laws(m, sample(constraints.real_vector, shape))
    assert m.learnable
    check_laws(bind(maps.from_transform(Pair(), inverse=True), Layout({"x": shape})), sample(constraints.real_vector, shape))


# -- flows of zuko -------------------------------------------------------------------------------------------------------------


def flow(name: str, **options: Any) -> nn.Module:
    zuko = pytest.importorskip("zuko")
    torch.manual_seed(0)
    return getattr(zuko.flows, name)(3, hidden_features=(8,), **options)


@pytest.mark.parametrize("name", ["NICE", "MAF", "NSF", "NCSF", "BPF", "NAF", "GF"])
def test_flows(name: str) -> None:
    """Forward, volume and parameters are those of zuko; inverses are exact even where zuko bisects to 1e-6."""
    made = flow(name, transforms=2).double()
    m = bind(maps.from_transform(made), Layout({"x": (3,)}))
    x = sample(constraints.real_vector, (3,))
    check_laws(m, x, 1e-9)
    theirs: Any = made().transform
    close(m.forward(x)["x"], theirs(x["x"]), 1e-14)
    close(m.log_abs_det(x, m.forward(x)), theirs.log_abs_det_jacobian(x["x"], theirs(x["x"])), 1e-12)
    assert (name in ("BPF", "NAF", "GF")) == any(getattr(part, "numeric", False) for part in m.modules())
    y = m.forward(x)
    total = flat(m.push_inverse(x, y, x)).sin().sum() + flat(m.invert({"x": y["x"].detach()})).sum() + m.log_abs_det(x, y)
    grads = torch.autograd.grad(total, list(m.parameters()))
    assert all(bool((each != 0).any()) for each in grads)
    second: Any = torch.func.jacfwd(torch.func.jacrev(lambda v: m.invert({"x": v})["x"].square().sum()))(y["x"])
    step = 1e-5
    slope = torch.func.grad(lambda v: m.invert({"x": v})["x"].square().sum())
    v = flat(x)
    close(second @ v, (slope(y["x"] + step * v) - slope(y["x"] - step * v)) / (2 * step), 1e-6)


@pytest.mark.parametrize("name", ["SOSPF", "UNAF", "CNF"])
def test_flows_that_torch_func_cannot_differentiate(name: str) -> None:
    with pytest.raises(UnsupportedModuleError, match=f"{name} cannot be differentiated"):
        bind(maps.from_transform(flow(name)), Layout({"x": (3,)}))


def test_flow_in_single_precision_and_with_a_context() -> None:
    context = torch.tensor([0.5, -1.0])
    made = flow("NSF", context=2)
    m = bind(maps.from_transform(made.transform, context=context), Layout({"x": (4, 3)}))
    x = {"x": torch.randn(4, 3)}
    close(m.forward(x)["x"], made(context).transform(x["x"]), 1e-6)
    close(m.forward({"x": x["x"].double()})["x"].float(), m.forward(x)["x"], 1e-5)
    with pytest.raises(GeometryError, match="context"):
        bind(maps.from_transform(made), Layout({"x": (3,)}))
    for late in (made(context), made(context).transform):
        with pytest.raises(GeometryError, match=r"flow\.transform"):
            maps.from_transform(late)


def test_flow_as_chart_of_a_latent_space() -> None:
    """The pull-back of the flow's Euclidean metric, from typed objects and from zuko's own Jacobian."""
    made = flow("NSF", transforms=1).double()
    data = geoad.Chart({"x": (3,)}, name="data")
    latent = data.reparametrize(maps.from_transform(made), name="latent").target
    p = data.point(torch.tensor([0.1, -0.4, 0.3], dtype=torch.float64))
    metric = geoad.metrics.Euclidean(latent)(p.to(latent)).to(data).to_dense()
    jacobian: Any = torch.func.jacrev(made().transform)(p.ravel())
    close(metric, jacobian.mT @ jacobian, 1e-12)
    turned = data.reparametrize(maps.from_transform(made, inverse=True), name="back").target
    close(p.to(turned).ravel(), made().transform.inv(p.ravel()), 1e-12)


def test_lazy_inverse_of_a_flow_that_is_inverted_numerically() -> None:
    made: Any = flow("NAF", transforms=1)
    made = made.double()
    x = sample(constraints.real_vector, (3,))
    turned = bind(maps.from_transform(made.transform.inv), Layout({"x": (3,)}))
    straight = bind(maps.from_transform(made), Layout({"x": (3,)}))
    y = straight.forward(x)
    close(turned.forward(y)["x"], x["x"], 1e-12)
    check_laws(turned, {"x": y["x"].detach()}, 1e-9)
    again = bind(maps.from_transform(made.transform.inv, inverse=True), Layout({"x": (3,)}))
    close(again.forward(x)["x"], y["x"], 1e-14)


def test_trained_flow_makes_points_stale() -> None:
    made = flow("NICE")
    chart = geoad.Chart({"x": (3,)}, name="x")
    phi = chart.reparametrize(maps.from_transform(made), name="psi")
    assert phi.target.learnable and len(list(phi.parameters())) == len(list(made.transform.parameters()))
    q = chart.point(torch.zeros(3)).to(phi.target)
    with torch.no_grad():
        for parameter in phi.parameters():
            parameter.add_(0.1)
    with pytest.raises(geoad.BasePointError):
        q.to(chart)
