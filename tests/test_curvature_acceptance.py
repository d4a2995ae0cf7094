"""Curvature as a maintainer would try it from outside: models, maps and inputs that no page names, against plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import geoad
from geoad import maps
from geoad.curvature import (
    EKFAC,
    GGN,
    KFAC,
    BlockDiagonal,
    Fisher,
    Hessian,
    LowRank,
    running_average,
)

D64 = torch.float64
LAM = 1e-2


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=D64)


@pytest.fixture(autouse=True)
def _double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(D64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


# -- models ------------------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A grouped convolution, a layer that is used twice, a norm, a 0-dim scale, an empty and an idle parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv1d(2, 2, 2, groups=2)
        self.l = nn.Linear(4, 4)
        self.n = nn.LayerNorm(4)
        self.t = nn.Parameter(torch.tensor(1.3))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.idle = nn.Parameter(torch.ones(2))
        self.o = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.c(x)).flatten(1)
        return self.o(self.n(self.l(torch.tanh(self.l(h)))) * self.t)


class ConvAsLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(2, 3, 2)
        self.o = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        direct = F.linear(x.flatten(1)[:, :8], self.c.weight.flatten(1), self.c.bias)
        return self.o(torch.tanh(self.c(x)).mean((2, 3))) + direct


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True)
        self.o = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        mask = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        return self.o(self.a(x, x, x, attn_mask=mask, need_weights=False)[0].mean(0))


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.l.weight, self.l.bias
        a = F.linear(x, w[:3], b[:3])
        return a * F.linear(a, w[3:, :3], b[3:]).sigmoid() + w[0, 0]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))
        self.down, self.up = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(3, 1))
        self.k = nn.Parameter(torch.randn(3, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.addmm(self.b, x, self.w).tanh()
        return (h @ self.down.T) @ self.up.T + torch.einsum("oij,ni,nj->no", self.k, x[:, :2], x[:, 1:])


def _transposed() -> nn.Module:
    up = nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2)
    return nn.Sequential(up, nn.Tanh(), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(12, 3))


def _circular() -> nn.Module:
    conv = nn.Conv1d(4, 6, 3, groups=2, dilation=2, stride=2, padding=1, padding_mode="circular")
    return nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(12, 3))


def _volume() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, 2, groups=2, stride=(1, 2, 1)), nn.SiLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "odd": (Odd, randn(7, 2, 3)),
    "conv weight as linear": (ConvAsLinear, randn(5, 2, 3, 3)),
    "attention, time first, masked": (TimeFirst, randn(4, 3, 4)),
    "sliced weights": (Sliced, randn(5, 4)),
    "functional, low-rank": (Functional, randn(5, 3)),
    "transposed, grouped": (_transposed, randn(4, 4, 4)),
    "circular, dilated": (_circular, randn(4, 4, 9)),
    "depthwise volume": (_volume, randn(3, 2, 3, 4, 3)),
}


def rows(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(J, f): the Jacobian of every sample by backward passes on batches of one."""
    parameters = [each for each in net.parameters() if each.requires_grad]
    found, outputs = [], []
    for i in range(len(x)):
        f = net(x[i : i + 1])
        outputs.append(f.detach())
        found.append(
            torch.stack(
                [_flat(torch.autograd.grad(e, parameters, retain_graph=True, allow_unused=True), parameters) for e in f[0]]
            )
        )
    return torch.stack(found), torch.cat(outputs)


def _flat(grads: Any, parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, parameters, strict=True)])


def softmax_curvature(f: Tensor) -> Tensor:
    p = f.softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


def plain_fisher(net: nn.Module, x: Tensor) -> Tensor:
    j, f = rows(net, x)
    return torch.einsum("nai,nab,nbj->ij", j, softmax_curvature(f), j) / len(x)


def same(a: Tensor, b: Tensor, tol: float = 1e-9) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tol * float(b.abs().max())


def differential(geo: Any, seed: int = 1) -> Any:
    p = geo.point()
    blocks = {name: torch.randn(b.shape, generator=seeded(seed)) for name, b in p.components.items()}
    return geoad.Covector(geo.reference, blocks, p)


# -- every representation on every model -------------------------------------------------------------------------------------

STORED = [
    "dense",
    "block_diagonal",
    "diagonal",
    "kfac",
    "ekfac",
    "low_rank",
    "implicit",
    KFAC("reduce", bias="separate"),
    EKFAC("reduce"),
    LowRank(4),
    BlockDiagonal("parameter"),
]


@pytest.mark.parametrize("name", MODELS)
def test_exact_representations_are_those_of_plain_autograd(name: str) -> None:
    make, x = MODELS[name]
    net = make()
    full = plain_fisher(net, x)
    geo = geoad.GeoModule(net)
    p = geo.point()
    for representation in ("dense", "low_rank", "implicit"):
        for bound in (1 << 28, 20_000):
            same(Fisher(geo, x, representation=representation, max_memory=bound)(p).to_dense(), full)
    same(Fisher(geo, x, representation="diagonal")(p).to_dense(), torch.diag(full.diagonal()))
    ekfac = Fisher(geo, x, representation="ekfac")(p)
    assert float(geoad.metrics.Euclidean(geo.reference)(p).trace(ekfac)) == pytest.approx(float(full.trace()), rel=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_damped_steps_solve_the_matrix_in_two_charts(name: str) -> None:
    make, x = MODELS[name]
    geo = geoad.GeoModule(make())
    p, w = geo.point(), differential(geo)
    psi = geo.reference.reparametrize(maps.Coupling(generator=seeded(1)), name="psi").target
    R = geoad.metrics.Euclidean(geo.reference)
    steps: dict[str, Tensor] = {}
    for representation in STORED:
        G = Fisher(geo, x, representation=representation)(p)
        damped = G.to_dense() + LAM * torch.eye(geo.reference.dim)
        steps[str(representation)] = torch.linalg.solve(damped, w.ravel())
        same(G.solve(w, damping=LAM).ravel(), steps[str(representation)], 1e-8)
        same((G + LAM * R(p)).inverse().mv(w).ravel(), steps[str(representation)], 1e-8)
        logdet = float((G + LAM * R(p)).logdet() - R(p).logdet())
        assert logdet == pytest.approx(float(torch.linalg.slogdet(damped)[1]), rel=1e-8)
        assert bool((G + LAM * R(p)).sample(2, generator=seeded()).ravel().isfinite().all())
    moved = w.to(psi).components
    geo.to(psi)
    q = geo.point()
    for representation in STORED:
        there = Fisher(geo, x, representation=representation)(q).solve(geoad.Covector(psi, moved, q), damping=LAM)
        same(there.to(geo.reference).ravel(), steps[str(representation)], 1e-7)


# -- maps that cannot be undone ----------------------------------------------------------------------------------------------

REDUNDANT: dict[str, Callable[[Any], Any]] = {
    "weight norm of rows": lambda theta: theta.reparametrize({"*.weight": maps.WeightNorm()}, name="gv").target,
    "weight norm of columns": lambda theta: theta.reparametrize({"l.weight": maps.WeightNorm(dim=1)}, name="gv").target,
    "factors": lambda theta: theta.reparametrize({"o.weight": maps.Factorization(5)}, name="uv").target,
    "after asinh": lambda theta: (
        theta.reparametrize(maps.Asinh(), name="a").target.reparametrize({"l.weight": maps.WeightNorm()}, name="b").target
    ),
}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.l, self.o = nn.Conv1d(2, 4, 2, groups=2), nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.l(torch.tanh(self.c(x)).flatten(1))))


X, Y = randn(20, 2, 3), torch.randint(0, 3, (20,), generator=seeded())


@pytest.mark.parametrize("through", ["chart", "module"])
@pytest.mark.parametrize("name", REDUNDANT)
def test_damped_steps_in_redundant_coordinates_are_those_of_the_network(name: str, through: str) -> None:
    geo = geoad.GeoModule(Plain())
    theta, p = geo.reference, geo.point()
    L = geo.loss(F.cross_entropy, (X, Y))
    w, R = geoad.grad(L)(p), geoad.metrics.Euclidean(theta)
    chart = REDUNDANT[name](theta)
    if through == "module":
        geo.to(chart)
    q = geo.point().to(chart)
    for representation in ("dense", "block_diagonal", "diagonal", "kfac", "ekfac", "low_rank", "implicit"):
        field = Fisher(geo, X, representation=representation)
        step = field(q).solve(geoad.grad(L)(q), damping=LAM)
        same(step.to(theta).ravel(), field(p).solve(w, damping=LAM).ravel(), 1e-8)
        same(R(q).trace(field(q)), R(p).trace(field(p)))
    field = Fisher(geo, X, representation="dense") + R
    assert type(field(q).power(0.5)) is type(field(q))
    same(field(q).power(0.5).sharp(geoad.grad(L)(q)).to(theta).ravel(), field(p).power(0.5).sharp(w).ravel())


def test_a_matrix_built_in_redundant_coordinates_names_a_metric_that_is_definite_there() -> None:
    geo = geoad.GeoModule(Plain())
    gv = geo.reference.reparametrize({"*.weight": maps.WeightNorm()}, name="gv").target
    q, L = geo.point().to(gv), geo.loss(F.cross_entropy, (X, Y))
    G = Fisher(geo, X, representation="block_diagonal", chart=gv)(q)
    with pytest.raises(geoad.SingularMetricError, match=r"Euclidean\(gv\)"):
        G.solve(geoad.grad(L)(q), damping=0.1)
    assert bool((G + geoad.metrics.Euclidean(gv)(q)).sharp(geoad.grad(L)(q)).isfinite())


@pytest.mark.parametrize("name", ["frozen", "subspace"])
def test_damped_steps_on_a_submanifold_use_the_restricted_matrices(name: str) -> None:
    geo = geoad.GeoModule(Plain())
    theta, p = geo.reference, geo.point()
    recipe = {"c.*": maps.Frozen(p)} if name == "frozen" else maps.Subspace(6, offset=p, generator=seeded())
    chart = theta.reparametrize(recipe, name="sub").target
    L, q = geo.loss(F.cross_entropy, (X, Y)), p.to(chart)
    eye = torch.eye(chart.dim)
    J = torch.stack([geoad.Vector(chart, chart.layout.unravel(e), q).to(theta).ravel() for e in eye], 1)
    R = geoad.metrics.Euclidean(theta)
    for representation in ("dense", "kfac", "ekfac", "diagonal", "low_rank", "implicit"):
        field = Fisher(geo, X, representation=representation)
        matrix = field(p).to_dense()
        same(field(q).to_dense(), J.T @ matrix @ J, 1e-8)
        damped = J.T @ (matrix + LAM * torch.eye(theta.dim)) @ J
        w = geoad.grad(L)(q)
        same(field(q).solve(w, damping=LAM).ravel(), torch.linalg.solve(damped, w.ravel()), 1e-7)
        same((field + LAM * R)(q).inverse().to_dense(), torch.linalg.inv(damped), 1e-6)


# -- data --------------------------------------------------------------------------------------------------------------------


def _shuffled() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=6, shuffle=True)


@pytest.mark.parametrize("representation", ["implicit", "kfac", "dense"])
def test_labels_that_were_drawn_stay_with_their_samples(representation: str) -> None:
    """A loader that shuffles gives other samples under the same number."""
    geo = geoad.GeoModule(Plain())
    p = geo.point()
    v = geoad.riemannian_grad(geo.loss(F.cross_entropy, (X, Y)))(p)
    fixed = DataLoader(TensorDataset(X, Y), batch_size=6)
    listed = Fisher(geo, list(fixed), kind="mc", representation=representation, generator=seeded())(p)
    loaded = Fisher(geo, fixed, kind="mc", representation=representation, generator=seeded())
    same((loaded(p) @ v).ravel(), (listed @ v).ravel())
    field = Fisher(geo, _shuffled(), kind="mc", representation=representation, generator=seeded())
    with pytest.raises(geoad.GeometryError, match="shuffle=False"):
        for _ in range(3):
            _ = field(p) @ v
    exact = Fisher(geo, _shuffled(), representation=representation)
    same((exact(p) @ v).ravel(), (Fisher(geo, X, representation=representation)(p) @ v).ravel(), 1e-10)


def test_a_stored_sampled_matrix_over_a_shuffled_loader_can_be_drawn_anew() -> None:
    geo = geoad.GeoModule(Plain())
    field = Fisher(geo, _shuffled(), kind="mc", representation="kfac", generator=seeded())
    for _ in range(3):
        field(geo.point())
        field.resample()


@pytest.mark.parametrize("bound", [0, -3, "1GB", float("inf"), float("nan"), None])
def test_bounds_that_are_no_number_of_bytes_are_refused(bound: Any) -> None:
    geo = geoad.GeoModule(Plain())
    with pytest.raises(geoad.GeometryError, match="number of bytes"):
        Fisher(geo, X, max_memory=bound)
    with pytest.raises(geoad.GeometryError, match="number of bytes"):
        geoad.per_sample_grads(geo, F.cross_entropy, (X, Y), max_memory=bound)


def test_a_bound_may_be_written_as_a_float() -> None:
    geo = geoad.GeoModule(Plain())
    p, x = geo.point(), randn(200, 2, 3)
    tight = Fisher(geo, x, representation="dense", max_memory=1e4)  # pyright: ignore[reportArgumentType]
    same(tight(p).to_dense(), Fisher(geo, x, representation="dense")(p).to_dense(), 1e-12)
    L = geo.loss(F.cross_entropy, (X, Y))
    same(geoad.per_sample_grads(L, max_memory=1e4)(p).ravel(), geoad.per_sample_grads(L)(p).ravel(), 1e-12)  # pyright: ignore[reportArgumentType]


def test_samples_are_whole_numbers() -> None:
    with pytest.raises(geoad.GeometryError, match="Pass an integer"):
        Fisher(geoad.GeoModule(Plain()), X, kind="mc", samples=1.5)  # pyright: ignore[reportArgumentType]


def test_integer_inputs_of_a_layer_of_floats_are_named() -> None:
    geo = geoad.GeoModule(nn.Linear(3, 3))
    with pytest.raises(geoad.GeometryError, match=r"torch\.int64.*x\.to\(torch\.float64\)"):
        Fisher(geo, torch.ones(4, 3, dtype=torch.long), representation="dense")(geo.point())


@pytest.mark.parametrize("representation", ["dense", "diagonal", "block_diagonal", LowRank(2)])
def test_a_hessian_that_is_not_finite_is_refused(representation: Any) -> None:
    geo = geoad.GeoModule(Plain())
    data = X.clone(), Y
    data[0][3] = torch.nan
    with pytest.raises(geoad.GeometryError, match="not finite"):
        Hessian(geo, data, F.cross_entropy, representation=representation)(geo.point())


# -- losses ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("module", "function"),
    [
        (nn.MSELoss, F.mse_loss),
        (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits),
        (nn.PoissonNLLLoss, F.poisson_nll_loss),
        (nn.CrossEntropyLoss, F.cross_entropy),
    ],
)
def test_a_loss_module_means_its_reduction(module: Any, function: Any, reduction: str) -> None:
    """The network is linear in its parameters, so that the Gauss-Newton matrix is the Hessian of the mean of the samples."""
    geo = geoad.GeoModule(nn.Linear(4, 3))
    x, y = randn(9, 4), Y[:9] if module is nn.CrossEntropyLoss else torch.rand(9, 3, generator=seeded())
    G = GGN(geo, (x, y), module(reduction=reduction), representation="dense")(geo.point())

    def mean_of_samples(f: Tensor, t: Tensor) -> Tensor:
        return torch.stack([function(a[None], b[None], reduction=reduction).sum() for a, b in zip(f, t, strict=True)]).mean()

    same(G.to_dense(), geoad.hessian(geo.loss(mean_of_samples, (x, y)))(geo.point()).to_dense())


# -- samples that depend on each other ---------------------------------------------------------------------------------------


def test_the_matrix_free_value_of_batch_norm_in_training_is_a_matrix_too() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    batches = [randn(9, 3), randn(6, 3, seed=1)]
    geo = geoad.GeoModule(net)
    p = geo.point()
    G = Fisher(geo, batches)(p)
    running = net[1].running_mean.clone()  # pyright: ignore
    full = torch.zeros(geo.reference.dim, geo.reference.dim)
    for x in batches:

        def outputs(flat: Tensor, x: Tensor = x) -> Tensor:
            theta = geo.reference.layout.unravel(flat)
            h = F.linear(x, theta["0.weight"], theta["0.bias"])
            h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt() * theta["1.weight"] + theta["1.bias"]
            return F.linear(h, theta["2.weight"], theta["2.bias"])

        j = torch.func.jacrev(outputs)(p.ravel())
        full += torch.einsum("nai,nab,nbj->ij", j, softmax_curvature(outputs(p.ravel())), j) / 15
    same(G.to_dense(), full)
    assert torch.equal(net[1].running_mean, running)  # pyright: ignore
    w = differential(geo)
    same(G.solve(w, damping=LAM).ravel(), torch.linalg.solve(full + LAM * torch.eye(len(full)), w.ravel()), 1e-8)
    with pytest.raises(geoad.UnsupportedModuleError, match="eval"):
        Fisher(geo, batches, representation="dense")(p)


# -- one object through everything -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", STORED, ids=str)
def test_a_value_survives_a_life(representation: Any, tmp_path: Any) -> None:
    """Built, summed, averaged, carried, saved, and taken to other coordinates."""
    geo = geoad.GeoModule(Plain())
    theta, p, L = geo.reference, geo.point(), geo.loss(F.cross_entropy, (X, Y))
    psi = theta.reparametrize({"*.weight": maps.Asinh()}, name="psi").target
    field, R = Fisher(geo, X, representation=representation), geoad.metrics.Euclidean(theta)
    G, w = field(p), geoad.grad(L)(p)
    D, eye = G.to_dense(), torch.eye(theta.dim)
    q = p.retract(-0.3 * G.solve(w, damping=LAM))
    same(G.carry(to=q, chart=theta).to_dense(), D)
    same(field(p.to(psi)).carry(to=q.to(psi), chart=theta).to(theta).to_dense(), D, 1e-8)
    if "KFAC" not in str(representation).upper():
        same(running_average(G, field(q), 0.9).to_dense(), 0.9 * D + 0.1 * field(q).to_dense())
    E = (3 * field + 0.5 * Fisher(geo, X, representation="diagonal"))(p).to_dense()
    same(E, 3 * D + 0.5 * torch.diag(plain_fisher(bare(geo), X).diagonal()))
    geoad.save(field(p.to(psi)), tmp_path / "G.pt")
    found = geoad.load(tmp_path / "G.pt", chart=psi)
    same(found.to(theta).to_dense(), D, 1e-8)
    metric = field + LAM * R
    assert float(metric(p.to(psi)).norm(geoad.grad(L)(p.to(psi)))) == pytest.approx(
        float((w.ravel() @ torch.linalg.solve(D + LAM * eye, w.ravel())).sqrt()), rel=1e-8
    )


def bare(geo: Any) -> nn.Module:
    """The bare network with the numbers of `geo`."""
    net = Plain()
    net.load_state_dict(geo.state_dict())
    return net


@pytest.mark.parametrize("representation", STORED, ids=str)
def test_scipy_sees_the_components_of_the_chart(representation: Any) -> None:
    pytest.importorskip("scipy")
    geo = geoad.GeoModule(Plain())
    psi = geo.reference.reparametrize(maps.Coupling(generator=seeded()), name="psi").target
    G, w = Fisher(geo, X, representation=representation)(geo.point().to(psi)), torch.randn(psi.dim)
    same(torch.as_tensor(G.to_scipy() @ w.numpy()), G.to_dense() @ w, 1e-8)


# -- precision ---------------------------------------------------------------------------------------------------------------


class Casting(nn.Module):
    """A norm in single precision inside of a network in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).float()
        return self.b((h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype))


class TwoTypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4).float(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x.float())).double())


@pytest.mark.parametrize("representation", ["dense", "diagonal", "implicit"])
def test_a_network_that_rounds_inside_does_not_mix_its_samples(representation: str) -> None:
    net, x = Casting(), randn(6, 3)
    full = plain_fisher(net, x)
    geo = geoad.GeoModule(net)
    wanted = torch.diag(full.diagonal()) if representation == "diagonal" else full
    same(Fisher(geo, x, representation=representation)(geo.point()).to_dense(), wanted, 1e-5)


def test_parameters_of_two_types_have_products_and_no_matrix() -> None:
    geo, x = geoad.GeoModule(TwoTypes()), randn(6, 3)
    p = geo.point()
    w = geoad.grad(geo.loss(F.cross_entropy, (x, Y[:6])))(p)
    v = geoad.Vector(geo.reference, w.components, p)
    product = Fisher(geo, x)(p) @ v
    assert {block.dtype for block in product.components.values()} == {torch.float32, torch.float64}
    for representation in ("dense", "kfac", "diagonal"):
        with pytest.raises(geoad.GeometryError, match=r"float32 and torch\.float64.*implicit"):
            Fisher(geo, x, representation=representation)(p)


def test_samples_that_do_depend_on_each_other_are_still_found() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.l(x)
            return h - h.mean(0)

    geo = geoad.GeoModule(Centred())
    with pytest.raises(geoad.UnsupportedModuleError, match="depend on the other samples"):
        Fisher(geo, randn(6, 3), representation="dense")(geo.point())


# -- training ----------------------------------------------------------------------------------------------------------------

TRAINING: dict[str, Any] = {
    "asinh": lambda: maps.Asinh(),
    "coupling": lambda: maps.Coupling(generator=seeded(1)),
    "layers": lambda: {"[lo].*": maps.LayerAffine(generator=seeded(1))},
    "weight norm": lambda: {"*.weight": maps.WeightNorm()},
}


def _trained(recipe: Any) -> Tensor:
    """Some steps with a running average of KFAC matrices, at the coordinates that `recipe` makes."""
    torch.manual_seed(0)
    geo = geoad.GeoModule(Plain())
    theta, L, field = geo.reference, geo.loss(F.cross_entropy, (X, Y)), Fisher(geo, X, representation="kfac")
    if recipe is not None:
        geo.to(theta.reparametrize(recipe, name="psi").target)
    average = None
    for _ in range(4):
        p = geo.point()
        average = field(p) if average is None else running_average(average, field(p), 0.9, chart=theta)
        geo.set_point(p.retract(average.solve(geoad.grad(L)(p), damping=LAM), -0.5))
    return geo.point().to(theta).ravel()


@pytest.mark.parametrize("name", TRAINING)
def test_training_with_averaged_factors_takes_one_path_in_all_coordinates(name: str) -> None:
    same(_trained(TRAINING[name]()), _trained(None), 1e-9)
