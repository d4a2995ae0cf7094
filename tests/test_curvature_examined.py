"""Curvature of odd combinations of layers, losses and data, against plain autograd."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

import geoad
from geoad import maps
from geoad.curvature import EKFAC, GGN, KFAC, Categorical, Fisher, Gaussian, Hessian
from geoad.errors import GeometryError, StructureNotPreservedError

EXACT = ("implicit", "dense", "low_rank")


def jacobian(geo: geoad.GeoModule, x: Any) -> tuple[Tensor, Tensor]:
    """J (n, c, d) and the outputs (n, c), by reverse mode over the bare network."""
    net, layout, p = geo.wrapped, geo.reference.layout, geo.point()

    def outputs(row: Tensor) -> Tensor:
        f = functional_call(net, layout.unravel(row), (x,))
        return f.reshape(len(f), -1)

    return jacrev(outputs)(p.ravel()), outputs(p.ravel())


def products(form: Any) -> Tensor:
    """The matrix by its products alone."""
    p, layout = form.at, form.chart.layout
    columns = [form.mv(p.chart.vector(layout.unravel(unit), at=p)).ravel() for unit in torch.eye(layout.dim)]
    return torch.stack(columns, 1)


class Words(nn.Module):
    def __init__(self, tied: bool = False, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4, **options)
        self.head = nn.Linear(4, 5, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens).tanh().mean(1))


TOKENS = torch.tensor([[0, 1, 4], [2, 0, 0], [2, 2, 2]])
LABELS = torch.tensor([3, 0, 1])


def _words(padding: int | None, tied: bool) -> geoad.GeoModule:
    torch.manual_seed(0)
    return geoad.GeoModule(Words(tied, padding_idx=padding))


# -- tables ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padding", [0, -1])
def test_padding_has_no_derivative_in_either_mode(padding: int, tied: bool) -> None:
    geo = _words(padding, tied)
    p = geo.point()
    J, f = jacobian(geo, TOKENS)
    s = f.softmax(-1)
    A = torch.diag_embed(s) - s[:, :, None] * s[:, None, :]
    exact = torch.einsum("ncd,nce,nef->df", J, A, J) / 3
    for representation in EXACT:
        assert torch.allclose(products(Fisher(geo, TOKENS, representation=representation)(p)), exact, rtol=0, atol=1e-13)
    L = geo.loss(F.cross_entropy, (TOKENS, LABELS))
    torch.manual_seed(1)
    v = geo.reference.vector(geo.reference.layout.unravel(torch.randn(p.chart.dim)), at=p)
    assert torch.allclose(geoad.jvp(L, (p,), (v,))[1], geoad.grad(L)(p)(v), rtol=0, atol=1e-13)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("representation", ["diagonal", "block_diagonal"])
def test_parts_of_a_hessian_with_padding_are_those_of_the_hessian(representation: str, tied: bool) -> None:
    geo = _words(0, tied)
    p, leaves = geo.point(), list(geo.parameters())
    slopes = torch.autograd.grad(F.cross_entropy(geo(TOKENS), LABELS), leaves, create_graph=True)
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(s, leaves, retain_graph=True)])
        if s.requires_grad
        else torch.zeros(p.chart.dim)
        for slope in slopes
        for s in slope.reshape(-1)
    ]
    H = torch.stack(rows)
    found = Hessian(geo, (TOKENS, LABELS), F.cross_entropy, representation=representation)(p).to_dense()
    kept = found != 0
    assert torch.allclose(found[kept], H[kept], rtol=0, atol=1e-13)
    assert torch.allclose(found.diagonal(), H.diagonal(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("option", ["sparse", "scale_grad_by_freq"])
@pytest.mark.parametrize("representation", [*EXACT, "kfac"])
def test_options_of_tables_for_training_do_not_change_their_derivative(representation: str, option: str) -> None:
    torch.manual_seed(0)
    plain = Words()
    net = Words(**{option: True})
    net.load_state_dict(plain.state_dict())
    values = [
        products(Fisher(geo, (TOKENS, LABELS), kind="empirical", representation=representation)(geo.point()))
        for geo in (geoad.GeoModule(plain), geoad.GeoModule(net))
    ]
    assert torch.allclose(*values, rtol=0, atol=1e-14)
    assert getattr(net.table, option)  # training goes on as before
    slopes = [
        geoad.grad(geo.loss(F.cross_entropy, (TOKENS, LABELS)))(geo.point()).ravel()
        for geo in (geoad.GeoModule(plain), geoad.GeoModule(net))
    ]
    assert torch.allclose(*slopes, rtol=0, atol=1e-14)


# -- data --------------------------------------------------------------------------------------------------------------------


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.table = nn.Linear(3, 2), nn.Embedding(4, 2)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return self.inner(x) if label is None else self.inner(x) * self.table(label)


@pytest.mark.parametrize("form", ["pair", "batches"])
def test_in_a_pair_all_of_the_mapping_is_inputs(form: str) -> None:
    torch.manual_seed(0)
    net, x, label, y = Conditional(), torch.randn(4, 3), torch.tensor([0, 3, 3, 1]), torch.randn(4, 2)
    inputs = {"x": x, "label": label}
    data: Any = (inputs, y)
    if form == "batches":
        data = [({name: each[part] for name, each in inputs.items()}, y[part]) for part in (slice(0, 3), slice(3, 4))]
    named = geoad.GeoModule(net)
    called = geoad.GeoModule(net, forward=lambda net, batch: net(batch["x"], batch["label"]))
    plain = geoad.GeoModule(net)
    wanted = Fisher(plain, ((x, label), y), "gaussian", representation="dense")(plain.point()).to_dense()
    slope = geoad.grad(plain.loss(F.mse_loss, ((x, label), y)))(plain.point()).ravel()
    assert wanted[-8:, -8:].abs().sum() > 0  # the label counts
    for geo in (named, called):
        for representation in EXACT:
            found = products(Fisher(geo, data, "gaussian", representation=representation)(geo.point()))
            assert torch.allclose(found, wanted, rtol=0, atol=1e-14)
        assert torch.allclose(geoad.grad(geo.loss(F.mse_loss, data))(geo.point()).ravel(), slope, rtol=0, atol=1e-14)


def test_a_hessian_with_an_empty_parameter() -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    net.register_parameter("nothing", nn.Parameter(torch.zeros(0, 3)))
    geo, data = geoad.GeoModule(net), (torch.randn(4, 3), torch.randn(4, 2))
    p = geo.point()
    wanted = Hessian(geo, data, F.mse_loss)(p).to_dense()
    assert torch.allclose(Hessian(geo, data, F.mse_loss, representation="diagonal")(p).to_dense(), wanted.diagonal().diag())
    assert torch.allclose(Hessian(geo, data, F.mse_loss, representation="block_diagonal")(p).to_dense(), wanted)


# -- outputs and losses ------------------------------------------------------------------------------------------------------


class Scalar(nn.Module):
    """Outputs (n,)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).squeeze(-1)


NUMBERS: list[tuple[str, Any, Callable[[Tensor, Tensor], Tensor], Tensor]] = [
    ("bernoulli", "bernoulli", F.binary_cross_entropy_with_logits, torch.tensor([0.0, 1.0, 1.0, 0.0])),
    ("poisson", "poisson", F.poisson_nll_loss, torch.tensor([0.0, 2.0, 1.0, 5.0])),
    ("gaussian", Gaussian(0.5), lambda f, y: (f - y).square().mean(), torch.tensor([0.3, -1.0, 2.0, 0.1])),
    ("variances", Gaussian(torch.tensor([0.5])), lambda f, y: (f - y).square().mean(), torch.tensor([0.3, -1.0, 2.0, 0.1])),
]


@pytest.mark.parametrize(("likelihood", "loss", "y"), [each[1:] for each in NUMBERS], ids=[each[0] for each in NUMBERS])
@pytest.mark.parametrize("kind", ["exact", "empirical", "covariance", "mc", "ggn", "loss"])
def test_one_number_a_sample_needs_no_axis_of_its_own(kind: str, likelihood: Any, loss: Any, y: Tensor) -> None:
    torch.manual_seed(0)
    net, x = Scalar(), torch.randn(4, 3)
    flat, deep = geoad.GeoModule(net), geoad.GeoModule(net, forward=lambda net, x: net(x).unsqueeze(-1))

    def field(geo: geoad.GeoModule, y: Tensor, representation: str) -> Any:
        if kind == "ggn":
            return GGN(geo, (x, y), likelihood, representation=representation)
        if kind == "loss":
            return GGN(geo, (x, y), loss, representation=representation)
        draws = torch.Generator().manual_seed(0)
        return Fisher(geo, (x, y), likelihood, kind, representation=representation, samples=3, generator=draws)

    for representation in (*EXACT, "diagonal", *(("kfac", "ekfac") if kind != "covariance" else ())):
        here = products(field(flat, y, representation)(flat.point()))
        there = products(field(deep, y.unsqueeze(-1), representation)(deep.point()))
        assert torch.allclose(here, there, rtol=0, atol=1e-13), representation
    if kind == "exact":
        J, f = jacobian(flat, x)
        curvature = {"bernoulli": f.sigmoid() * (-f).sigmoid(), "poisson": f.exp()}
        A = curvature[likelihood] if isinstance(likelihood, str) else torch.full_like(f, 2.0)
        wanted = torch.einsum("ncd,nc,nce->de", J, A, J) / 4
        assert torch.allclose(products(field(flat, y, "implicit")(flat.point())), wanted, rtol=0, atol=1e-13)


def test_one_number_a_sample_is_no_class_and_takes_no_matrix() -> None:
    geo = geoad.GeoModule(Scalar())
    x, p = torch.randn(4, 3), geo.point()
    for likelihood in ("categorical", Gaussian(torch.eye(1)), Gaussian(torch.tensor([1.0, 2.0]))):
        with pytest.raises(GeometryError):
            Fisher(geo, x, likelihood, representation="dense")(p)
    with pytest.raises(GeometryError, match="one real target for every output"):
        GGN(geo, (x, torch.randn(4, 1)), "gaussian", representation="dense")(p)


IGNORING = (slice(0, 2), slice(2, 5))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("positions", [0, 3])
@pytest.mark.parametrize("form", ["one", "batches"])
def test_labels_that_cross_entropy_ignores_are_not_counted(form: str, positions: int, reduction: str) -> None:
    """A linear network: the Gauss-Newton matrix of a loss is its Hessian."""
    torch.manual_seed(0)
    axes = (positions,) if positions else ()
    net = nn.Linear(2, 3)
    geo = geoad.GeoModule(net, forward=lambda net, x: net(x).movedim(-1, 1))
    x, y = torch.randn(5, *axes, 2), torch.randint(3, (5, *axes))
    y[1] = -100
    y.view(-1)[-1] = -100
    data: Any = (x, y) if form == "one" else [(x[part], y[part]) for part in IGNORING]
    p = geo.point()
    for loss in (F.cross_entropy, nn.CrossEntropyLoss()):
        wanted = Hessian(geo, data, loss)(p).to_dense() * (1 if reduction == "mean" else 5)
        for representation in EXACT:
            field = GGN(geo, data, loss, representation=representation, reduction=reduction, max_memory=1000)
            assert torch.allclose(products(field(p)), wanted, rtol=0, atol=1e-13)


def test_a_mean_over_something_of_the_whole_batch_is_refused() -> None:
    torch.manual_seed(0)
    geo, x, y = geoad.GeoModule(nn.Linear(2, 3)), torch.randn(4, 3, 2), torch.randint(3, (4, 3))
    y[0, :2] = -100
    p, weight = geo.point(), torch.tensor([1.0, 2.0, 5.0])

    def language(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f.flatten(0, 1), y.flatten())

    def weighted(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f, y, weight=weight)

    for representation in ("dense", "implicit"):
        with pytest.raises(GeometryError, match="neither the mean"):
            products(GGN(geo, (x, y), language, representation=representation)(p))
        with pytest.raises(GeometryError, match="neither the mean"):
            products(GGN(geo, (x[:, 0], y[:, 2]), weighted, representation=representation)(p))
    with pytest.raises(GeometryError, match="neither the mean"):
        Fisher(geo, (x, y), language, kind="empirical", representation="diagonal")(p)
    y[0] = 1  # each sample counts the same
    wanted = GGN(geo, (x, y), Categorical())(p).to_dense() / 3
    assert torch.allclose(GGN(geo, (x, y), language, representation="dense")(p).to_dense(), wanted, rtol=0, atol=1e-13)


# -- what is kept ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "mc", "covariance", "hessian"])
def test_a_matrix_free_value_that_was_used_is_copied_like_a_new_one(kind: str) -> None:
    torch.manual_seed(0)
    geo = geoad.GeoModule(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    data, p, layout = (torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])), geo.point(), geo.reference.layout
    form = (Hessian(geo, data, F.cross_entropy) if kind == "hessian" else Fisher(geo, data, kind=kind))(p)
    v = geo.reference.vector(layout.unravel(torch.randn(layout.dim)), at=p)
    wanted = [form.mv(v).ravel() for _ in range(4)][-1]
    for other in (pickle.loads(pickle.dumps(form)), copy.deepcopy(form)):
        for _ in range(4):
            assert torch.allclose(other.mv(v).ravel(), wanted, rtol=0, atol=1e-15)


# -- charts of layers --------------------------------------------------------------------------------------------------------


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LAYERED = {
    "affine": lambda: maps.LayerAffine(generator=_seeded()),
    "twice": lambda: maps.Compose(maps.LayerAffine(generator=_seeded()), maps.LayerAffine(generator=_seeded(1))),
    "per layer": lambda: maps.Affine(per_layer=True, generator=_seeded()),
}


@pytest.mark.parametrize("chart", LAYERED)
def test_kfac_is_built_where_layers_are_layers(chart: str) -> None:
    """It is exact for one linear layer with a Gaussian likelihood, and the moved one for all networks."""
    torch.manual_seed(0)
    x = torch.randn(7, 3)
    for net in (nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))):
        geo = geoad.GeoModule(net)
        psi = geo.reference.reparametrize(LAYERED[chart](), name="psi").target
        q = geo.point().to(psi)
        for structure in ("kfac", KFAC("reduce", "separate")):
            built = Fisher(geo, x, "gaussian", chart=psi, representation=structure)
            assert {type(part).__name__ for part in built(q).operator.parts.values()} == {"Kronecker"}  # type: ignore[attr-defined]
            there = Fisher(geo, x, "gaussian", representation=structure)(q)
            assert torch.allclose(built(q).to_dense(), there.to_dense(), rtol=0, atol=1e-12)
            assert torch.allclose(built(geo.point()).to_dense(), there.to(geo.reference).to_dense(), rtol=0, atol=1e-12)
        if isinstance(net, nn.Linear):
            exact = Fisher(geo, x, "gaussian", representation="dense")(q).to_dense()
            built = Fisher(geo, x, "gaussian", chart=psi, representation="kfac")
            assert torch.allclose(built(q).to_dense(), exact, rtol=0, atol=1e-12)


def test_ekfac_is_built_where_its_bases_stay_orthogonal() -> None:
    torch.manual_seed(0)
    geo, x = geoad.GeoModule(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), torch.randn(7, 3)
    turned = geo.reference.reparametrize(maps.Orthogonal(generator=_seeded()), name="turned").target
    q, structure = geo.point().to(turned), EKFAC(bias="separate")
    built = Fisher(geo, x, "gaussian", chart=turned, representation=structure)(q)
    assert torch.allclose(
        built.to_dense(), Fisher(geo, x, "gaussian", representation=structure)(q).to_dense(), rtol=0, atol=1e-12
    )
    psi = geo.reference.reparametrize(maps.LayerAffine(generator=_seeded()), name="psi").target
    with pytest.raises(StructureNotPreservedError, match="orthogonal"):
        Fisher(geo, x, "gaussian", chart=psi, representation="ekfac")(geo.point().to(psi))


@pytest.mark.parametrize("recipe", [maps.Asinh(), maps.Affine(generator=_seeded()), maps.Coupling(generator=_seeded())])
def test_kfac_is_refused_where_there_are_no_layers(recipe: Any) -> None:
    geo = geoad.GeoModule(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    psi = geo.reference.reparametrize(recipe, name="psi").target
    for structure in ("kfac", {"0.*": "kfac", "*": "dense"}, "quasi_diagonal"):
        with pytest.raises(StructureNotPreservedError, match="chart='psi'"):
            Fisher(geo, torch.randn(7, 3), chart=psi, representation=structure)(geo.point().to(psi))
    layered = geo.reference.reparametrize(maps.LayerAffine(generator=_seeded()), name="psi").target
    with pytest.raises(StructureNotPreservedError, match="chart='psi'"):
        mixed = {"0.*": "kfac", "*": "diagonal"}  # the moved diagonal is not the diagonal there
        Fisher(geo, torch.randn(7, 3), chart=layered, representation=mixed)(geo.point().to(layered))


# -- half precision ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("representation", ["dense", "implicit", "kfac"])
def test_factors_and_spectra_in_half_precision(representation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(20, 3)
    wide = geoad.GeoModule(net)
    wanted = Fisher(wide, x, representation=representation)(wide.point()).to_dense()
    damped = wanted + 0.5 * torch.eye(len(wanted))
    geo, x = geoad.GeoModule(copy.deepcopy(net).to(dtype)), x.to(dtype)
    field, p = Fisher(geo, x, representation=representation), geo.point()
    R = geoad.metrics.Euclidean(geo.reference)
    G = (field + 0.5 * R)(p)

    def near(found: Tensor, exact: Tensor) -> None:
        assert found.dtype == dtype
        assert float((found.double() - exact).norm()) < 0.05 * float(exact.norm())

    near(geoad.eigh(field(p), metric=R(p), k=2)[0], torch.linalg.eigvalsh(wanted).flip(0)[:2])
    spectrum = torch.linalg.eigvals(torch.linalg.solve(damped, wanted)).real.sort(descending=True)[0]
    near(geoad.eigh(field(p), metric=G, k=2)[0], spectrum[:2])
    near((G.inverse() @ field(p)).eigenvalues(k=1), spectrum[:1])
    factor, frame = G.cholesky().components, G.inverse_sqrt().components
    near(factor @ factor.mT, damped)
    near(frame @ frame.mT, torch.linalg.inv(damped))
