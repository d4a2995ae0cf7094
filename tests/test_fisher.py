"""The first Fisher metrics against plain torch.func, for many shapes of networks and data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import geoad
from geoad import maps
from geoad.connection import products
from geoad.curvature import Categorical, Fisher, Gaussian
from geoad.errors import GeometryError, SingularMetricError
from geoad.metrics import Euclidean


class Sequences(nn.Module):
    """Outputs of shape (n, T, c)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        return self.head(torch.tanh(h.cumsum(1)))


class Pair(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Keyed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x: Tensor, gain: Tensor, note: str = "") -> Tensor:
        return gain * self.body(x)


def norms() -> nn.Module:
    net = nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)
    )
    net(torch.randn(30, 4))
    return net.eval()


X = torch.linspace(-2.0, 2.0, 28, dtype=torch.float64).reshape(7, 4).cos()
NETS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), X),
    "conv and norm": (norms, X),
    "sequences": (Sequences, torch.arange(21).reshape(7, 3) % 5),
    "mapping": (Keyed, {"x": X, "gain": torch.tensor(0.5), "note": "same for all", "labels": torch.arange(7)}),
}
every_net = pytest.mark.parametrize("name", NETS)


def reference(geo: geoad.GeoModule, inputs: Any, curvature: Callable[[Tensor], Tensor], chart: geoad.Chart) -> Tensor:
    """Σ JᵀA(f)J in `chart` by jacrev of the raveled parameters of the plain network."""
    p = geo.point()
    layout = chart.layout
    theta = p.to(geo.reference)

    def outputs(vector: Tensor) -> Tensor:
        blocks = layout.unravel(vector)
        if chart.parent is not None:
            blocks = chart.parent.map.invert(blocks)
        if isinstance(inputs, dict):
            return functional_call(geo.wrapped, blocks, (inputs["x"], inputs["gain"]))
        return functional_call(geo.wrapped, blocks, (inputs,))

    flat = theta.to(chart).ravel()
    jacobian = torch.func.jacrev(outputs)(flat)
    f = outputs(flat)
    c = f.shape[-1]
    matrices = torch.stack([curvature(each) for each in f.reshape(-1, c)])
    rows = jacobian.reshape(-1, c, layout.dim)
    return torch.einsum("nci,ncd,ndj->ij", rows, matrices, rows)


def categorical(f: Tensor) -> Tensor:
    p = f.softmax(-1)
    return torch.diag(p) - torch.outer(p, p)


CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    # the Hessians of the log-partition functions
    "categorical": categorical,
    "bernoulli": torch.func.hessian(lambda f: (1 + f.exp()).log().sum()),
    "poisson": torch.func.hessian(lambda f: f.exp().sum()),
    "gaussian": lambda f: torch.eye(len(f)),
}


@every_net
@pytest.mark.parametrize("representation", ["dense", "implicit"])
@pytest.mark.parametrize("likelihood", list(CURVES))
def test_against_plain_torch(name: str, representation: str, likelihood: str) -> None:
    make, inputs = NETS[name]
    geo = geoad.GeoModule(make())
    curve = CURVES[likelihood]
    psi = geo.reference.reparametrize(maps.Coupling(generator=torch.Generator().manual_seed(0)), name="psi").target
    wanted = {chart: reference(geo, inputs, curve, chart) for chart in (geo.reference, psi)}
    for home in (geo.reference, psi):  # the exact Fisher is the same object for every choice
        field = Fisher(geo, inputs, likelihood, representation=representation, reduction="sum", chart=home)
        mean = Fisher(geo, inputs, likelihood, representation=representation, chart=home)
        for chart in (geo.reference, psi):
            p = geo.point().to(chart)
            torch.testing.assert_close(field(p).to_dense(), wanted[chart], rtol=1e-10, atol=1e-11)
            torch.testing.assert_close(mean(p).to_dense(), wanted[chart] / 7, rtol=1e-10, atol=1e-11)
            v = chart.vector(torch.ones(chart.dim), at=p)
            torch.testing.assert_close(field(p).mv(v).ravel(), wanted[chart] @ torch.ones(chart.dim), rtol=1e-9, atol=1e-10)


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
    "bernoulli": (F.binary_cross_entropy_with_logits, lambda f: f.sigmoid()),
    "poisson": (F.poisson_nll_loss, lambda f: f.exp()),
}


@pytest.mark.parametrize("likelihood", list(LOSSES))
def test_at_targets_that_are_the_mean_the_hessian_of_the_loss_is_the_fisher(likelihood: str) -> None:
    """There the residual vanishes, so that only JᵀAJ is left of the Hessian; the mean over 3 outputs divides by 3."""
    make, inputs = NETS["mlp"]
    geo = geoad.GeoModule(make())
    loss, mean = LOSSES[likelihood]
    field = geo.loss(loss, (inputs, mean(geo(inputs)).detach()))
    fisher = Fisher(geo, inputs, likelihood, representation="dense")(geo.point())
    torch.testing.assert_close(geoad.hessian(field)(geo.point()).to_dense(), fisher.to_dense() / 3, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("likelihood", list(CURVES))
def test_the_connection_is_that_of_the_general_formula(likelihood: str) -> None:
    make, inputs = NETS["mlp"]
    geo = geoad.GeoModule(make())
    field = Fisher(geo, inputs, likelihood)
    assert field.hessian_type
    x = geo.point().blocks
    v, w = ({name: torch.randn_like(block) for name, block in x.items()} for _ in range(2))
    for product in (products.contracted, products.first_kind):
        special, general = product(field, x, v, w), product.dispatch(geoad.MetricField)(field, x, v, w)
        for name in x:
            torch.testing.assert_close(special[name], general[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "covariance", [2.0, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 3.0]])]
)
def test_the_gaussian_fisher_has_the_inverse_covariance(covariance: Any) -> None:
    make, inputs = NETS["mlp"]
    geo = geoad.GeoModule(make())
    given = torch.as_tensor(covariance, dtype=torch.float64)
    sigma = given if given.ndim == 2 else torch.diag(given.expand(3))
    wanted = reference(geo, inputs, lambda f: sigma.inverse(), geo.reference)
    for representation in ("dense", "implicit"):
        field = Fisher(geo, inputs, Gaussian(covariance), representation=representation, reduction="sum")
        torch.testing.assert_close(field(geo.point()).to_dense(), wanted, rtol=1e-9, atol=1e-10)


@every_net
def test_forms_of_data_and_memory(name: str) -> None:
    make, inputs = NETS[name]
    geo = geoad.GeoModule(make())
    whole = Fisher(geo, inputs, representation="dense")(geo.point()).to_dense()
    tight = Fisher(geo, inputs, representation="dense", max_memory=1)(geo.point()).to_dense()
    torch.testing.assert_close(tight, whole, rtol=1e-12, atol=1e-13)
    if isinstance(inputs, Tensor):
        y = torch.zeros(7)
        for data in (
            (inputs, y),
            [(inputs[:3], y[:3]), (inputs[3:], y[3:])],
            DataLoader(TensorDataset(inputs, y), batch_size=3),
        ):
            for representation in ("dense", "implicit"):
                again = Fisher(geo, data, representation=representation)(geo.point()).to_dense()
                torch.testing.assert_close(again, whole, rtol=1e-12, atol=1e-13)


def test_semidefinite_until_damped_by_the_reference_metric() -> None:
    make, inputs = NETS["mlp"]
    geo = geoad.GeoModule(make())
    psi = geo.reference.reparametrize(maps.Asinh(), name="psi").target
    slope = geoad.grad(geo.loss(lambda out: out.square().mean(), inputs))
    for representation in ("dense", "implicit"):
        field = Fisher(geo, inputs, representation=representation)
        damped = field + 1e-2 * Euclidean(geo.reference)
        for chart in (geo.reference, psi):
            p = geo.point().to(chart)
            with pytest.raises(SingularMetricError):
                field(p).sharp(slope(p))
            step = damped(p).sharp(slope(p))
            theta = field(p.to(geo.reference)).to_dense() + 1e-2 * torch.eye(geo.chart.dim)
            wanted = torch.linalg.solve(theta, slope(p.to(geo.reference)).ravel())
            torch.testing.assert_close(step.to(geo.reference).ravel(), wanted, rtol=1e-8, atol=1e-10)


def test_the_module_may_be_in_any_chart() -> None:
    make, inputs = NETS["mlp"]
    geo = geoad.GeoModule(make())
    field = Fisher(geo, inputs)
    p = geo.point()
    wanted = field(p).to_dense()
    geo.to(geo.reference.reparametrize(maps.Asinh()))
    assert torch.equal(field(p).to_dense(), wanted)
    torch.testing.assert_close(field(geo.point()).to(geo.reference).to_dense(), wanted, rtol=1e-13, atol=1e-14)


def test_refusals() -> None:
    make, inputs = NETS["mlp"]
    geo = geoad.GeoModule(make())
    p = geo.point()
    with pytest.raises(GeometryError, match="likelihood='cauchy'"):
        Fisher(geo, inputs, "cauchy")
    with pytest.raises(GeometryError, match="representation='magic'"):
        Fisher(geo, inputs, representation="magic")
    with pytest.raises(GeometryError, match="kind='other'"):
        Fisher(geo, inputs, kind="other")
    with pytest.raises(GeometryError, match="reduction='max'"):
        Fisher(geo, inputs, reduction="max")
    with pytest.raises(GeometryError, match="manifold"):
        Fisher(geo, inputs, chart=geoad.GeoModule(make()).reference)
    with pytest.raises(GeometryError, match="belongs to a network"):
        Fisher(geo.wrapped, inputs)  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match="empty"):
        Fisher(geo, [])
    with pytest.raises(GeometryError, match="empty"):
        Fisher(geo, DataLoader(TensorDataset(X[:0])))(p).to_dense()
    with pytest.raises(SingularMetricError, match="positive"):
        Gaussian(0.0)
    with pytest.raises(SingularMetricError, match="positive definite"):
        Gaussian(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    bad = X.clone()
    bad[2, 1] = float("nan")
    for representation in ("dense", "implicit"):

        def value(data: Any, likelihood: Any = "categorical", module: geoad.GeoModule = geo, r: str = representation) -> Tensor:
            p = module.point()
            return (
                Fisher(module, data, likelihood, representation=r)(p).mv(p.chart.vector(torch.ones(p.chart.dim), at=p)).ravel()
            )

        with pytest.raises(GeometryError, match="covariance is for 2 outputs, the network has 3"):
            value(inputs, Gaussian(torch.ones(2)))
        with pytest.raises(GeometryError, match=r"the inputs of batch 0 hold 1 of .* the first in sample 2"):
            value(bad)
        with pytest.raises(GeometryError, match=r"inputs are torch\.float32"):
            value(X.float())
        with pytest.raises(GeometryError, match="at least two logits"):
            value(X, Categorical(), geoad.GeoModule(nn.Linear(4, 1)))
        with pytest.raises(GeometryError, match="as one tensor"):
            value(X, Categorical(), geoad.GeoModule(Pair()))
        broken = geoad.GeoModule(make())
        broken.wrapped[0].weight.data[0, 0] = float("nan")
        with pytest.raises(GeometryError, match=r"parameters \['0\.weight'\]"):
            value(X, Categorical(), broken)
    with pytest.raises(GeometryError, match=r"shape \(n, \.\.\., c\)"):
        flat = geoad.GeoModule(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)))
        Fisher(flat, X)(flat.point()).to_dense()


def test_per_sample_gradients_lie_side_by_side() -> None:
    geo = geoad.GeoModule(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    batch = geoad.per_sample_grads(geo.loss(F.mse_loss, (torch.randn(5, 3), torch.randn(5, 2))))(geo.point())
    whole, blocks = batch.ravel(), batch.blocks
    assert whole.data_ptr() == blocks["0.weight"].data_ptr()
    copied = geo.reference.layout.ravel({name: block.clone() for name, block in blocks.items()})
    assert torch.equal(whole, copied) and copied.data_ptr() != whole.data_ptr()
    swapped = dict(blocks, **{"0.bias": blocks["0.bias"].flip(0)})  # no longer the columns of one matrix
    assert torch.equal(geo.reference.layout.ravel(swapped)[:, 12:16], blocks["0.bias"].flip(0))
    part = {name: block[1:3] for name, block in blocks.items()}
    assert torch.equal(geo.reference.layout.ravel(part), whole[1:3])
    graph = {name: block.requires_grad_() for name, block in blocks.items()}
    assert geo.reference.layout.ravel(graph).requires_grad
