"""Function space: outputs over data as a space, the Jacobian as a two-point tensor, linearised networks, dual solves."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_cases import case, every_model, quiet

import geoad
from geoad import maps
from geoad.curvature import GGN, Categorical, Difference, Fisher, Gaussian, OutputMatrix
from geoad.errors import (
    BasePointError,
    ChartMismatchError,
    GeometryError,
    SingularMetricError,
    StructureNotPreservedError,
    VarianceError,
)
from geoad.function_space import Jacobian
from geoad.metrics import Euclidean

pytestmark = quiet
Network = tuple[geoad.GeoModule, Tensor, Tensor]


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> Network:
    """A small network with data: 7 samples, 3 classes, 38 parameters."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    return geoad.GeoModule(net), torch.randn(7, 3, dtype=dtype), torch.randint(3, (7,))


def dense(geo: geoad.GeoModule, x: Tensor) -> Tensor:
    """J (n·c, d) in the reference chart by plain ``jacrev`` of the bare network."""
    net = copy.deepcopy(geo.wrapped)
    parameters = {name: w.detach() for name, w in net.named_parameters()}
    found = torch.func.jacrev(lambda w: torch.func.functional_call(net, w, (x,)).flatten())(parameters)
    return torch.cat([found[name].reshape(len(found[name]), -1) for name in geo.reference.layout], 1)


def bent(geo: geoad.GeoModule) -> geoad.Chart:
    return geo.reference.reparametrize(maps.Asinh(), name="psi").target


def near(a: Tensor, b: Tensor, tol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol * max(1.0, float(b.abs().max()) if b.numel() else 1.0))


def random(chart: geoad.Chart, p: geoad.Point, up: bool, *batch: int) -> Any:
    numbers = torch.randn(*batch, chart.dim, dtype=p.dtype, generator=torch.Generator().manual_seed(3))
    make = chart.vector if up else chart.covector
    return make(chart.layout.unravel(numbers), at=p)


# -- every kind of model -----------------------------------------------------------------------------------------------------


@every_model
def test_every_model_in_two_charts(name: str) -> None:
    model, f, j = case(name)
    j = j.flatten(0, -2)
    geo = model.geo()
    space, p = geoad.FunctionSpace(geo, model.data), geo.point()
    assert space.shape == f.shape
    near(space(p).components, f)
    psi = bent(geo)
    for q in (p, p.to(psi)):
        jacobian = space.jacobian(q)
        slope = torch.ones(psi.dim, dtype=f.dtype) if q is p else q.ravel().cosh()  # θ = sinh ψ
        wanted = j * slope
        v, w = random(q.chart, q, True), random(space.chart, space(q), False)
        near((jacobian @ v).ravel(), wanted @ v.ravel())
        near((w @ jacobian).ravel(), w.ravel() @ wanted)
        near(jacobian.to_dense(), wanted)


# -- the space ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: x,
        lambda x, y: (x, y),
        lambda x, y: [(x[:4], y[:4]), (x[4:], y[4:])],
        lambda x, y: [x[:3], x[3:4], x[4:]],
        lambda x, y: {"input": x, "labels": y},
        lambda x, y: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3),
    ],
)
def test_forms_of_data(form: Callable[[Tensor, Tensor], Any]) -> None:
    geo, x, y = network()
    space, p, wanted = geoad.FunctionSpace(geo, form(x, y)), geo.point(), dense(geo, x)
    assert space.shape == (7, 3)
    assert torch.equal(space(p).components, geo(x)) or (space(p).components - geo(x)).abs().max() < 1e-15
    jacobian = space.jacobian(p)
    v, w = random(p.chart, p, True, 2), random(space.chart, space(p), False, 2, 3)
    for _ in range(3):  # the second product is recorded, the third one is the record
        near(jacobian.pushforward(v).ravel(), v.ravel() @ wanted.T)
        near(jacobian.pullback(w).ravel(), w.ravel() @ wanted)
    near(jacobian.to_dense(), wanted)


def test_chart_of_the_outputs() -> None:
    """The same data, the same space; another selection, another one."""
    geo, x, y = network()
    one, two = geoad.FunctionSpace(geo, (x, y)), geoad.FunctionSpace(geo, (x, y))
    assert one.chart == two.chart
    assert geoad.FunctionSpace(geo, x, outputs=Difference(0, 1)).chart != one.chart
    assert geoad.FunctionSpace(geo, x.clone()).chart != one.chart
    p = geo.point()
    u, w = random(one.chart, one(p), True), random(two.chart, two(p), False)
    near(w(u), w.ravel() @ u.ravel())
    near((2 * u - u).ravel(), u.ravel())
    assert pickle.loads(pickle.dumps(one(p))).chart == one.chart


@pytest.mark.parametrize(("outputs", "index"), [([2, 0], [2, 0]), (1, [1]), (Difference(2, 0), None)])
def test_selected_outputs(outputs: Any, index: list[int] | None) -> None:
    geo, x, _ = network()
    rows = dense(geo, x).reshape(7, 3, -1)
    wanted = rows[:, index] if index is not None else rows[:, 2:] - rows[:, :1]
    space = geoad.FunctionSpace(geo, x, outputs=outputs)
    near(space.jacobian(geo.point()).to_dense(), wanted.flatten(0, 1))


def test_many_outputs_and_few_parameters() -> None:
    """Column by column, with axes between samples and outputs, and a 0-dim parameter."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
            self.b = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (self.a * x).sin()[..., None] * self.b

    geo, x = geoad.GeoModule(Net()), torch.randn(4, 5, dtype=torch.float64)
    space, p = geoad.FunctionSpace(geo, x), geo.point()
    assert space.shape == (4, 5, 2)
    near(space.jacobian(p).to_dense(), dense(geo, x))
    near(space.jacobian(p).pullback(space.metric("gaussian")).to_dense(), dense(geo, x).T @ dense(geo, x) / 4)


def test_points_of_the_space() -> None:
    geo, x, _ = network()
    space, p = geoad.FunctionSpace(geo, [x[:2], x[2:]]), geo.point()
    psi = bent(geo)
    assert (space(p.to(psi)).components - space(p).components).abs().max() < 1e-14
    v = random(p.chart, p, True)
    both = p.retract(v, torch.tensor([0.0, 0.1], dtype=torch.float64))
    near(space(both).components[1], space(p.retract(v, 0.1)).components)
    with pytest.raises(GeometryError, match="one point"):
        space.jacobian(both)
    with pytest.raises(ChartMismatchError, match="another manifold"):
        space(network()[0].point())


def test_plain_map_for_the_drop_in_functions() -> None:
    """`FunctionSpace` is a function of plain coordinates as well."""
    geo, x, _ = network()
    space, p, wanted = geoad.FunctionSpace(geo, x), geo.point(), dense(geo, x)
    near(geoad.jacobian(space, space=space.chart)(p).to_dense(), wanted)
    v = random(p.chart, p, True)
    moved = geoad.pushforward(space, v, space=space.chart)
    near((moved - space.jacobian(p) @ v).ravel(), torch.zeros(21, dtype=torch.float64))
    field = geoad.pullback(space, space.metric("categorical"))
    near(field(p).to_dense(), Fisher(geo, x)(p).to_dense())


def test_refused_data() -> None:
    geo, x, y = network()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3, shuffle=True)
    with pytest.raises(GeometryError, match="another order"):
        geoad.FunctionSpace(geo, loader)
    with pytest.raises(GeometryError, match="one-shot"):
        geoad.FunctionSpace(geo, iter([x]))
    with pytest.raises(GeometryError, match="GeoModule"):
        geoad.FunctionSpace(geo.wrapped, x)  # pyright: ignore[reportArgumentType]
    turned = geoad.GeoModule(copy.deepcopy(geo.wrapped), forward=lambda net, x: net(x).T)
    with pytest.raises(GeometryError, match="samples come first"):
        _ = geoad.FunctionSpace(turned, x).chart
    normed = geoad.GeoModule(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double())
    with pytest.raises(GeometryError, match="statistics of the batch"):
        geoad.FunctionSpace(normed, x)(normed.point())
    with pytest.raises(GeometryError, match="not finite"):
        geoad.FunctionSpace(geo, x * torch.nan)(geo.point())


# -- the Jacobian ------------------------------------------------------------------------------------------------------------


def test_type_of_the_jacobian() -> None:
    geo, x, _ = network()
    space, p = geoad.FunctionSpace(geo, x), geo.point()
    J = space.jacobian(p)
    assert isinstance(J, Jacobian)
    assert [str(axis) for axis in J.axes] == ["outputs^", "theta_"]
    assert [str(axis) for axis in J.mT.axes] == ["theta_", "outputs^"]
    v, w = random(p.chart, p, True), random(space.chart, J.image, False)
    assert isinstance(J @ v, geoad.Vector)
    assert (J @ v).chart == space.chart
    assert isinstance(w @ J, geoad.Covector)
    near(w(J @ v), (w @ J)(v))
    near((J.mT @ w).ravel(), (w @ J).ravel())
    near((v @ J.mT).ravel(), (J @ v).ravel())
    near(torch.matmul(J, v).ravel(), (J @ v).ravel())
    near(torch.einsum("a,ai,i->", w, J, v), w(J @ v))
    near((J.mT @ space.metric("gaussian")(J.image) @ J).to_dense(), J.pullback(space.metric("gaussian")).to_dense())
    near(pickle.loads(pickle.dumps(J)).to_dense(), dense(geo, x))
    near((2 * J - J.materialise()).to_dense(), dense(geo, x))
    near(torch.stack([J, J])[1].to_dense(), dense(geo, x))
    near(copy.deepcopy(J).T.to_dense(), dense(geo, x).T)
    assert geoad.to_state(J)["kind"] == "GeoTensor"
    rows = torch.func.vmap(lambda u: J @ u)(random(p.chart, p, True, 2))
    near(rows.ravel(), random(p.chart, p, True, 2).ravel() @ dense(geo, x).T)
    assert "Jacobian([outputs^, theta_], (21, 38)" in repr(J)


def test_wrong_arguments() -> None:
    geo, x, _ = network()
    space, p = geoad.FunctionSpace(geo, x), geo.point()
    J, q = space.jacobian(p), p.to(bent(geo))
    v, w = random(p.chart, p, True), random(space.chart, space(p), False)
    other = p.retract(v)
    for wrong in (lambda: J @ w, lambda: v @ J, lambda: J.mT @ v, lambda: J.pushforward(w), lambda: J.pullback(v)):
        with pytest.raises(VarianceError):
            wrong()
    with pytest.raises(ChartMismatchError, match=r"\.to\(chart\)"):
        _ = J @ v.to(q.chart)
    with pytest.raises(BasePointError):
        _ = J @ random(p.chart, other, True)
    with pytest.raises(BasePointError):
        J.pullback(random(space.chart, space(other), False))
    with pytest.raises(BasePointError):
        J.pushforward(random(p.chart, other, True))
    with pytest.raises(ChartMismatchError):
        J.pushforward(random(space.chart, space(p), True))
    with pytest.raises(ChartMismatchError):
        J.to(network()[0].reference)
    with pytest.raises(GeometryError, match="materialise"):
        J.to(torch.float32)
    near(J.pushforward(v.to(q.chart)).ravel(), (J @ v).ravel())


def test_data_sets_do_not_mix() -> None:
    geo, x, _ = network()
    p, one, two = geo.point(), geoad.FunctionSpace(geo, x), geoad.FunctionSpace(geo, x.clone())
    J, K = one.jacobian(p), two.jacobian(p)
    v = random(p.chart, p, True)
    w = random(two.chart, two(p), False)
    A = one.metric("gaussian")
    wrong: list[Callable[[], Any]] = [lambda: J @ v + K @ v, lambda: w(J @ v), lambda: J + K, lambda: J.pullback(w)]
    for each in (*wrong, lambda: A(J.image) + two.metric("gaussian")(K.image), lambda: A + two.metric(), lambda: A(two(p))):
        with pytest.raises(GeometryError, match="other data, another network or another choice of outputs"):
            each()
    with pytest.raises(ChartMismatchError, match="different manifolds"):
        _ = J @ v + v


def test_batches_of_forms() -> None:
    """Matrix-free contractions take one at a time; the typing table takes all."""
    geo, x, _ = network()
    space, p = geoad.FunctionSpace(geo, x), geo.point()
    J, root = space.jacobian(p), torch.randn(2, 21, 21, dtype=torch.float64)
    forms = space.chart.form(root @ root.mT, at=J.image)
    with pytest.raises(GeometryError, match="Go through them"):
        J.pullback(forms)
    near((J.mT @ forms @ J).to_dense(), dense(geo, x).T @ (root @ root.mT) @ dense(geo, x))
    near(J.pullback(forms[1]).to_dense(), (J.mT @ forms @ J).to_dense()[1])
    cometric = geo.reference.metric(torch.eye(38).double().expand(2, 38, 38), at=p).inverse()
    with pytest.raises(GeometryError, match="Go through them"):
        J.pushforward(cometric)


def test_chain_with_maps_of_the_outputs() -> None:
    """The Jacobian of softmax at f(p) times that of the network, and one copy of it for all."""
    geo, x, _ = network()
    space, p = geoad.FunctionSpace(geo, x), geo.point()
    J, out = space.jacobian(p), geoad.Chart({"q": (7, 3)}, name="probabilities")
    S = geoad.jacobian(lambda f: f.softmax(-1), space=out)(space(p))
    plain = torch.func.jacrev(lambda f: f.softmax(-1))(space(p).components).reshape(21, 21)
    assert [str(axis) for axis in (S @ J).axes] == ["probabilities^", "theta_"]
    near((S @ J).to_dense(), plain @ dense(geo, x))
    near((S @ (J @ random(p.chart, p, True))).ravel(), (S @ J).to_dense() @ random(p.chart, p, True).ravel())
    assert copy.deepcopy(J) is J
    with pytest.raises(GeometryError, match="at a point"):
        space.jacobian(dict(p.components))  # pyright: ignore[reportArgumentType]


def test_another_chart_of_the_parameters_and_of_the_outputs() -> None:
    geo, x, _ = network()
    space, p = geoad.FunctionSpace(geo, x), geo.point()
    J, psi = space.jacobian(p), bent(geo)
    q = p.to(psi)
    near(J.to(psi).to_dense(), space.jacobian(q).to_dense())
    near(J.to(psi).to_dense(), J.materialise().to(psi).to_dense())
    near((J.to(psi) @ random(psi, q, True)).ravel(), J.to(psi).to_dense() @ random(psi, q, True).ravel())
    eta = space.chart.reparametrize(maps.Scale(3.0), name="eta").target
    turned = J.to(eta)
    near(turned.to_dense(), 3.0 * J.to_dense())
    v, w = random(p.chart, p, True), random(eta, turned.image, False)
    near((turned @ v).ravel(), 3.0 * (J @ v).ravel())
    near((w @ turned).ravel(), 3.0 * w.ravel() @ J.to_dense())
    A = space.metric("categorical")(J.image)
    near(turned.pullback(A.to(eta)).to_dense(), J.pullback(A).to_dense())
    G = Euclidean(geo.reference)(p)
    near(turned.pushforward(G.inverse()).to_dense(), 9.0 * J.pushforward(G.inverse()).to_dense())


def test_redundant_coordinates() -> None:
    """Weight norm: vectors are pushed through θ, covectors come back to ψ."""
    geo, x, _ = network()
    psi = geo.reference.reparametrize({"*.weight": maps.WeightNorm()}, name="psi").target
    q = geo.point().to(psi)
    space = geoad.FunctionSpace(geo, x)
    J = space.jacobian(q)
    phi = psi.parent
    assert phi is not None
    there = torch.func.jacrev(lambda b: geo.reference.layout.ravel(phi.map.invert(b)))(q.blocks)
    chain = torch.cat([there[name].flatten(1) for name in psi.layout], 1)
    near(J.to_dense(), dense(geo, x) @ chain)
    v, w = random(psi, q, True), random(space.chart, J.image, False)
    near((J @ v).ravel(), J.to_dense() @ v.ravel())
    near((w @ J).ravel(), w.ravel() @ J.to_dense())


def test_below_an_immersion() -> None:
    geo, x, y = network()
    psi = geo.reference.reparametrize({"0.*": maps.Frozen(geo.point())}, name="psi").target
    q = geo.point().to(psi)
    space = geoad.FunctionSpace(geo, x)
    J = space.jacobian(q)
    columns = torch.cat([torch.arange(38)[geo.reference.layout.offsets()[name]] for name in psi.layout])
    near(J.to_dense(), dense(geo, x)[:, columns])
    w = random(space.chart, J.image, False)
    near((w @ J).ravel(), w.ravel() @ J.to_dense())
    slope = geoad.grad(geo.loss(F.cross_entropy, (x, y)))(q)
    F_ = Fisher(geo, x)
    matrix = J.pullback(space.metric()).to_dense() + 0.1 * torch.eye(psi.dim, dtype=torch.float64)
    near(geoad.dual_solve(F_, q, slope, 0.1).ravel(), torch.linalg.solve(matrix, slope.ravel()))


# -- the two contractions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "likelihood", ["categorical", "gaussian", "bernoulli", "poisson", Gaussian(torch.diag(torch.arange(1.0, 4).double()))]
)
def test_pulled_back_metric_is_the_fisher(likelihood: Any, reduction: str) -> None:
    geo, x, _ = network()
    for data in (x, [x[:4], x[4:]]):
        space, p = geoad.FunctionSpace(geo, data), geo.point()
        for q in (p, p.to(bent(geo))):
            value = space.jacobian(q).pullback(space.metric(likelihood, reduction))
            wanted = Fisher(geo, x, likelihood, reduction=reduction, representation="dense")(q)
            assert isinstance(value, geoad.Metric)
            near(value.to_dense(), wanted.to_dense())
            v = random(q.chart, q, True, 2)
            near((value @ v).ravel(), (wanted @ v).ravel())
            if q is p:
                near(value.solve(wanted @ v[0], damping=1e-3).ravel(), wanted.solve(wanted @ v[0], damping=1e-3).ravel())


def test_pushed_forward_cometric_is_the_kernel() -> None:
    geo, x, _ = network()
    kernel = dense(geo, x) @ dense(geo, x).T
    p, psi = geo.point(), bent(geo)
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(38, 38, dtype=torch.float64, generator=generator)
    constant = geoad.metrics.Constant(psi, root @ root.T + torch.eye(38, dtype=torch.float64))
    for data in (x, [x[:4], x[4:]]):
        space = geoad.FunctionSpace(geo, data)
        for q in (p, p.to(psi)):
            J = space.jacobian(q)
            value = J.pushforward(Euclidean(geo.reference)(q).inverse())
            assert isinstance(value, geoad.Cometric)
            assert value.chart == space.chart
            near(value.to_dense(), kernel)
            w = random(space.chart, J.image, False, 2)
            near((value @ w).ravel(), w.ravel() @ kernel)
            general = J.pushforward(constant(q).inverse())
            jpsi = space.jacobian(p.to(psi)).to_dense()
            wanted = jpsi @ torch.linalg.solve(constant(p.to(psi)).to_dense(), jpsi.T)
            near(general.to_dense(), wanted)
            near((general @ w).ravel(), w.ravel() @ wanted)


@pytest.mark.parametrize("kind", ["diagonal", "kfac", "block_diagonal", "ekfac", "damped", "semidefinite"])
def test_pushed_forward_structure(kind: str) -> None:
    """Cometrics with structure, by the rows in chunks; and one that has no inverse."""
    geo, x, _ = network()
    p, J = geo.point(), geoad.FunctionSpace(geo, [x[:4], x[4:]], max_memory=3000).jacobian(geo.point())
    other = torch.randn(40, 3, dtype=torch.float64)
    if kind == "semidefinite":
        root = torch.randn(38, 5, dtype=torch.float64)
        C: Any = geoad.Cometric(geo.reference, geoad.operators.Dense(geo.reference.layout, root @ root.T, symmetric=True), p)
    elif kind == "damped":
        C = (Fisher(geo, other, representation="implicit") + Euclidean(geo.reference))(p).inverse()
    else:
        C = (Fisher(geo, other, representation=kind) + 0.1 * Euclidean(geo.reference))(p).inverse()
    pushed = J.pushforward(C)
    wanted = dense(geo, x) @ C.to_dense() @ dense(geo, x).T
    near(pushed.to_dense(), wanted)
    w = random(J.space, J.image, False, 2)
    near((pushed @ w).ravel(), w.ravel() @ wanted)


def test_pushed_forward_cometric_is_the_ntk() -> None:
    geo, x, _ = network()
    p, space = geo.point(), geoad.FunctionSpace(geo, x)
    for q in (p, p.to(bent(geo))):
        theirs = geoad.ntk(geo, x)(q)
        mine = space.jacobian(q).pushforward(Euclidean(geo.reference)(q).inverse())
        assert theirs.chart == mine.chart
        near(theirs.to_dense(), mine.to_dense())


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_both_contractions_have_the_same_spectrum(likelihood: str) -> None:
    r"""G⁻¹JᵀAJ and A·JG⁻¹Jᵀ have the same nonzero eigenvalues, in both charts."""
    geo, x, _ = network()
    p, space = geo.point(), geoad.FunctionSpace(geo, x)
    A = space.metric(likelihood)(space(p))
    found = []
    for q in (p, p.to(bent(geo))):
        J, G = space.jacobian(q), Euclidean(geo.reference)(q)
        small = (J.pushforward(G.inverse()) @ A).mT.eigenvalues()
        large = (G.inverse() @ J.pullback(A)).eigenvalues()
        rank = 7 * (2 if likelihood == "categorical" else 3)
        near(large[:rank], small[:rank])
        assert large[:rank].min() > 1e-6 * large[0]
        assert large[rank:].abs().max() < 1e-10
        found.append(large)
    near(found[0], found[1])


def test_gradients_through_the_space() -> None:
    """The pull-back of the gradient in the outputs is the gradient, and pushes to minus the kernel flow."""
    geo, x, y = network()
    space, p = geoad.FunctionSpace(geo, x), geo.point()
    h = space.chart.scalar_field(lambda f: F.cross_entropy(f, y))
    J, slope = space.jacobian(p), geoad.grad(h)(space(p))
    L = geo.loss(F.cross_entropy, (x, y))
    near(J.pullback(slope).ravel(), geoad.grad(L)(p).ravel())
    step = J @ geoad.riemannian_grad(L, Euclidean(geo.reference))(p)
    kernel = J.pushforward(Euclidean(geo.reference)(p).inverse())
    near(step.ravel(), (kernel @ slope).ravel())


# -- metrics of the outputs --------------------------------------------------------------------------------------------------


def blocks_of(likelihood: Any, f: Tensor) -> Tensor:
    """A(f)/n by plain products with the unit vectors."""
    eye = torch.eye(f.numel(), dtype=f.dtype).reshape(-1, *f.shape)
    return torch.stack([likelihood.fisher(f, t) for t in eye]).flatten(1) / len(f)


@pytest.mark.parametrize(
    ("likelihood", "shape"),
    [
        (Categorical(), (4, 3)),
        (Categorical(), (2, 3, 4)),
        (Categorical(axis=1), (2, 3, 2, 2)),
        (Gaussian(torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()), (5, 2)),
        (geoad.curvature.Poisson(), (3, 2, 2)),
    ],
)
def test_output_metric(likelihood: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    chart = geoad.Chart({"f": shape}, name="out")
    field = geoad.function_space.OutputMetric(chart, likelihood, 1 / shape[0])
    f = chart.point(torch.randn(shape, dtype=torch.float64))
    wanted = blocks_of(likelihood, f.components)
    A = field(f)
    near(A.to_dense(), wanted)
    v = random(chart, f, True, 2)
    near((A @ v).ravel(), v.ravel() @ wanted)
    near(field.product(f.blocks, v[0].blocks)["f"].flatten(), wanted @ v[0].ravel())
    near(sum(b.sum() for b in geoad.operators.diagonal(A.op).values()), wanted.trace())
    damped = (field + 0.1 * Euclidean(chart))(f)
    full = wanted + 0.1 * torch.eye(chart.dim, dtype=torch.float64)
    assert type(damped.op).__name__ == "SampleBlocks"
    near(damped.to_dense(), full)
    near(damped.sharp(damped.flat(v)).ravel(), v.ravel())
    near(damped.inverse().to_dense(), torch.linalg.inv(full))
    near(damped.logdet().components, torch.logdet(full))
    near(geoad.operators.trace(damped.op), full.trace())
    near(damped.power(0.5).to_dense() @ damped.power(0.5).to_dense(), full)
    near((2.0 * damped).to_dense(), 2.0 * full)
    assert damped.sample(3, generator=torch.Generator().manual_seed(0)).batch_shape == (3,)
    if isinstance(likelihood, Categorical):
        with pytest.raises(SingularMetricError):
            A.sharp(A.flat(v))
    else:
        near(A.sharp(A.flat(v)).ravel(), v.ravel())
        near(A.logdet().components, torch.logdet(wanted))


def test_samples_of_the_output_metric() -> None:
    """Their covariance is A⁻¹."""
    chart = geoad.Chart({"f": (2, 2)}, name="out")
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    field = geoad.function_space.OutputMetric(chart, Gaussian(covariance), 1.0)
    A = field(chart.point(torch.zeros(2, 2, dtype=torch.float64)))
    drawn = A.sample(20000, generator=torch.Generator().manual_seed(0)).ravel()
    assert (drawn.T @ drawn / 20000 - torch.block_diag(covariance, covariance)).abs().max() < 0.06


# -- linearised networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centred", [False, True])
def test_linearised_network(centred: bool) -> None:
    geo, x, y = network()
    wanted, before = dense(geo, x), {name: w.detach().clone() for name, w in geo.named_parameters()}
    tangent = geoad.linearized(geo, centred=centred)
    assert torch.equal(tangent(x), geo(x))
    offsets = torch.randn(38, dtype=torch.float64)
    with torch.no_grad():
        for name, part in geo.reference.layout.unravel(offsets).items():
            tangent.get_parameter(name).add_(part)
    near(tangent(x).detach().flatten(), geo(x).detach().flatten() + wanted @ offsets)
    assert all(torch.equal(w, before[name]) for name, w in geo.named_parameters())
    trained = [w for w in tangent.parameters() if w.requires_grad]
    F.cross_entropy(tangent(x), y).backward()
    slope = torch.autograd.functional.jacobian(lambda f: F.cross_entropy(f, y), tangent(x).detach())
    near(torch.cat([w.grad.flatten() for w in trained if w.grad is not None]), slope.flatten() @ wanted)
    assert all(w.grad is None for w in tangent.tangency.parameters())


def test_linearised_network_in_its_inputs() -> None:
    geo, x, _ = network()
    tangent = geoad.linearized(geo)
    with torch.no_grad():
        tangent.get_parameter("2.weight").mul_(1.5)
    assert torch.autograd.gradcheck(tangent, (x.clone().requires_grad_(),))
    single = torch.func.vmap(torch.func.jacrev(lambda z: tangent(z[None])[0]))(x).detach()
    alone: Any = [torch.autograd.functional.jacobian(lambda z: tangent(z[None])[0], z) for z in x]
    near(single, torch.stack(alone))


def test_linearised_network_at_another_point_and_chart() -> None:
    geo, x, _ = network()
    p = geo.point()
    q = p.retract(random(p.chart, p, True), 0.3).to(bent(geo))
    tangent = geoad.linearized(geo, q)
    near(tangent(x).detach(), geoad.FunctionSpace(geo, x)(q).components)
    geo.to(bent(geo))
    near(geoad.linearized(geo)(x).detach(), geo(x).detach())
    with pytest.raises(GeometryError, match="one point"):
        geoad.linearized(geo, p.retract(random(p.chart, p, True), torch.ones(2, dtype=torch.float64)))


def test_linearised_network_as_a_manifold() -> None:
    """At any point its Jacobian, Fisher metric (of a Gaussian) and kernel are those of the network at p₀."""
    geo, x, _ = network()
    tangent = geoad.GeoModule(geoad.linearized(geo))
    assert list(tangent.reference.layout) == list(geo.reference.layout)
    p = tangent.point()
    for q in (p, p.retract(random(p.chart, p, True))):
        near(geoad.FunctionSpace(tangent, x).jacobian(q).to_dense(), dense(geo, x))
        near(Fisher(tangent, x, "gaussian", representation="dense")(q).to_dense(), dense(geo, x).T @ dense(geo, x) / 7)
        near(geoad.ntk(tangent, x)(q).to_dense(), dense(geo, x) @ dense(geo, x).T)
    near(Fisher(tangent, x, "categorical")(p).to_dense(), Fisher(geo, x, "categorical")(geo.point()).to_dense())


@every_model
def test_every_model_linearised(name: str) -> None:
    model, f, j = case(name)
    j = j.flatten(0, -2)
    geo = model.geo()
    tangent = geoad.linearized(geo)
    offsets = 0.1 * torch.randn(geo.reference.dim, dtype=f.dtype, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for key, part in geo.reference.layout.unravel(offsets).items():
            tangent.get_parameter(key).add_(part)
    inputs: Any = model.inputs
    if model.forward is not None:
        found = tangent(inputs)
    elif isinstance(inputs, dict):
        found = tangent(**inputs)
    else:
        found = tangent(*inputs) if isinstance(inputs, tuple) else tangent(inputs)
    moved = f + (j @ offsets).reshape(f.shape)
    near(found.detach(), moved)
    found.square().sum().backward()
    slope = torch.cat([tangent.get_parameter(key).grad.flatten() for key in geo.reference.layout])
    near(slope, 2 * moved.flatten() @ j)
    again = geoad.GeoModule(tangent, forward=None if model.forward is None else (lambda net, batch: net(batch)))
    p = again.point()
    J, v = geoad.FunctionSpace(again, model.data).jacobian(p), random(p.chart, p, True)
    near(J.to_dense(), j)
    near((J @ v).ravel(), j @ v.ravel())


def test_training_a_linearised_network() -> None:
    """Least squares in the tangent: gradient descent reaches the kernel solution."""
    geo, x, _ = network()
    y = torch.randn(7, 3, dtype=torch.float64)
    tangent = geoad.linearized(geo, centred=True).train()
    J = dense(geo, x)
    wanted = J.T @ torch.linalg.solve(J @ J.T, (y - geo(x).detach()).flatten())
    optimizer = torch.optim.LBFGS([w for w in tangent.parameters() if w.requires_grad], max_iter=500, tolerance_grad=1e-13)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (tangent(x) - y).square().sum()
        loss.backward()
        return loss

    for _ in range(6):
        optimizer.step(closure)
    found = torch.cat([w.detach().flatten() for w in tangent.offsets().values()])
    near(found, wanted, 1e-4)
    twin = geoad.linearized(network(1)[0], centred=True)
    twin.load_state_dict(tangent.state_dict())
    assert torch.equal(twin(x), tangent(x))
    assert torch.equal(copy.deepcopy(tangent)(x), tangent(x))
    assert tangent.float()(x.float()).dtype == torch.float32


def test_the_tangent_stays_frozen() -> None:
    """requires_grad_() of the whole module leaves θ₀ where it is."""
    geo, x, y = network()
    tangent = geoad.linearized(geo).requires_grad_(False).requires_grad_()
    optimizer = torch.optim.AdamW(tangent.parameters(), lr=0.1, weight_decay=0.5)
    F.cross_entropy(tangent(x), y).backward()
    optimizer.step()
    assert all(not w.requires_grad and w.grad is None for w in tangent.tangency.parameters())
    assert all(torch.equal(w, tangent.tangency.get_parameter(name)) for name, w in geo.named_parameters())
    assert list(geoad.GeoModule(tangent).reference.layout) == list(geo.reference.layout)


def test_outputs_that_are_no_tensors() -> None:
    """They are passed on; tensors without a derivative are refused."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.names = nn.Linear(3, 2).double()

        def forward(self, x: Tensor, also: bool = False) -> Any:
            f = self.names(x)
            return {"logits": f, "cache": None, "label": f.argmax(-1) if also else "none"}

    net, x = Net(), torch.randn(5, 3, dtype=torch.float64)
    tangent = geoad.linearized(geoad.GeoModule(net))
    found = tangent(x)
    assert found["cache"] is None
    assert found["label"] == "none"
    assert torch.equal(found["logits"], net.names(x))
    with pytest.raises(GeometryError, match="int64"):
        tangent(x, also=True)


def test_refused_linearisations() -> None:
    geo, _, _ = network()
    with pytest.raises(GeometryError, match=r"Wrap it: geoad\.linearized"):
        geoad.linearized(geo.wrapped)  # pyright: ignore[reportArgumentType]
    with pytest.raises(GeometryError, match="at a point"):
        geoad.linearized(geo, dict(geo.point().components))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ChartMismatchError):
        geoad.linearized(geo, network(1)[0].point())


def test_names_that_are_taken() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tangency = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.tangency(x)

    with pytest.raises(GeometryError, match="Rename"):
        geoad.linearized(geoad.GeoModule(Net()))


# -- dual solves -------------------------------------------------------------------------------------------------------------

SPD = torch.randn(38, 38, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def metrics(geo: geoad.GeoModule, x: Tensor) -> dict[str, Any]:
    layout = geo.reference.layout
    entries = {name: torch.linspace(0.5, 2, max(1, shape.numel())).reshape(shape) for name, shape in layout.items()}
    return {
        "reference": None,
        "multiple": 3.0 * Euclidean(geo.reference),
        "diagonal": geoad.metrics.Diagonal(geo.reference, entries),
        "dense": geoad.metrics.Constant(bent(geo), SPD @ SPD.T + torch.eye(38, dtype=torch.float64)),
        "kfac": Fisher(geo, x, representation="kfac") + 0.1 * Euclidean(geo.reference),
    }


SYSTEMS = [
    *(
        (kind, metric, 1e-2)
        for kind in ("exact", "empirical")
        for metric in ("reference", "multiple", "diagonal", "dense", "kfac")
    ),
    *((kind, "reference", damping) for kind in ("exact", "mc", "ggn") for damping in (1.0, 1e-4)),
]


@pytest.mark.parametrize(("kind", "metric", "damping"), SYSTEMS)
def test_dual_solve(kind: str, metric: str, damping: float) -> None:
    geo, x, y = network()
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    p, loss = geo.point(), geo.loss(F.cross_entropy, data)
    if kind == "ggn":
        field: Any = GGN(geo, data, F.cross_entropy)
    else:
        field = Fisher(geo, data, kind=kind, samples=2 if kind == "mc" else 1, generator=torch.Generator().manual_seed(0))
    chosen = metrics(geo, x)[metric]
    G = (Euclidean(geo.reference) if chosen is None else chosen)(p).to_dense()
    slope = geoad.grad(loss)(p)
    wanted = torch.linalg.solve(field(p).to_dense() + damping * G, slope.ravel())
    solver = geoad.DualSolver(field, p, damping, chosen)
    assert solver.size == 7 * {"exact": 2, "ggn": 2, "mc": 2, "empirical": 1}[kind]
    near(solver.solve(slope).ravel(), wanted)
    q = p.to(bent(geo))
    moved = geoad.dual_solve(field, q, geoad.grad(loss)(q), damping, chosen)
    near(moved.to(p.chart).ravel(), wanted)
    logdet = torch.logdet(field(p).to_dense() + damping * G) - torch.logdet(damping * G)
    near(solver.logdet(), logdet, 1e-7)


def test_little_memory() -> None:
    """Samples one by one, nothing kept: the same numbers."""
    geo, x, y = network()
    p, J = geo.point(), geoad.FunctionSpace(geo, x, max_memory=1).jacobian(geo.point())
    near(J.to_dense(), dense(geo, x))
    near(J.pushforward(Euclidean(geo.reference)(p).inverse()).to_dense(), dense(geo, x) @ dense(geo, x).T)
    near(J.pullback(geoad.FunctionSpace(geo, x).metric()).to_dense(), Fisher(geo, x)(p).to_dense())
    slope = geoad.grad(geo.loss(F.cross_entropy, (x, y)))(p)
    metric = 0.5 * Euclidean(geo.reference)
    found = geoad.dual_solve(Fisher(geo, x, kind="mc"), p, slope, 0.1, metric, max_memory=1)
    assert found.type == (1, 0)
    solver = geoad.DualSolver(Fisher(geo, x), p, 0.1, max_memory=1)
    for _ in range(3):
        near(solver.solve(slope).ravel(), Fisher(geo, x)(p).solve(slope, damping=0.1).ravel())


def test_derivatives_of_the_jacobian() -> None:
    """J v is differentiable in the point: a second derivative of the network."""
    geo, x, _ = network()
    space, theta = geoad.FunctionSpace(geo, x), geo.reference
    t, v = geo.point().ravel(), random(theta, geo.point(), True).ravel()
    assert space.shape == (7, 3)

    def squared(t: Tensor) -> Tensor:
        q = theta.point(theta.layout.unravel(t))
        return (space.jacobian(q) @ theta.vector(theta.layout.unravel(v), at=q)).ravel().square().sum()

    def plain(t: Tensor) -> Tensor:
        f: Any = lambda t: torch.func.functional_call(geo.wrapped, theta.layout.unravel(t), (x,)).flatten()  # noqa: E731
        return torch.func.jvp(f, (t,), (v,))[1].square().sum()

    near(torch.func.grad(squared)(t), torch.func.grad(plain)(t))


def test_dual_solve_of_a_batch() -> None:
    geo, x, _ = network()
    p, field = geo.point(), Fisher(geo, x, representation="low_rank")
    w = random(p.chart, p, False, 2, 3)
    solver = geoad.DualSolver(field, p, 0.1)
    near(solver.solve(w).ravel(), field(p).solve(w, damping=0.1).ravel())
    near(solver.solve(w[1, 2]).ravel(), solver.solve(w).ravel()[1, 2])


def test_dual_solve_of_an_indefinite_matrix() -> None:
    geo, x, y = network()
    turn = torch.tensor([[1.0, 0.2, 0.0], [0.2, -0.5, 0.1], [0.0, 0.1, 0.3]]).double()
    field = GGN(geo, (x, y), OutputMatrix(lambda f, y: turn.expand(len(f), 3, 3), positive=False))
    p = geo.point()
    w = random(p.chart, p, False)
    wanted = torch.linalg.solve(field(p).to_dense() + 5.0 * torch.eye(38, dtype=torch.float64), w.ravel())
    solver = geoad.DualSolver(field, p, 5.0)
    near(solver.solve(w).ravel(), wanted)
    near(solver.logdet(), torch.logdet(field(p).to_dense() / 5.0 + torch.eye(38, dtype=torch.float64)))


@every_model
def test_dual_solve_of_every_model(name: str) -> None:
    model = case(name)[0]
    geo = model.geo()
    p, field = geo.point(), Fisher(geo, model.data, model.likelihood)
    w = random(p.chart, p, False)
    matrix = field(p).to_dense()
    wanted = torch.linalg.solve(matrix + 0.1 * torch.eye(p.chart.dim, dtype=torch.float64), w.ravel())
    near(geoad.dual_solve(field, p, w, 0.1).ravel(), wanted)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 2e-4), (torch.bfloat16, 0.2)])
def test_dual_solve_in_lower_precision(dtype: torch.dtype, tol: float) -> None:
    geo, x, y = network()
    p = geo.point()
    wanted = Fisher(geo, x)(p).solve(geoad.grad(geo.loss(F.cross_entropy, (x, y)))(p), damping=0.1).ravel()
    low, x = geoad.GeoModule(copy.deepcopy(geo.wrapped).to(dtype)), x.to(dtype)
    q = low.point()
    found = geoad.dual_solve(Fisher(low, x), q, geoad.grad(low.loss(F.cross_entropy, (x, y)))(q), 0.1)
    assert found.dtype == dtype
    assert (found.ravel().double() - wanted).norm() < tol * wanted.norm()


def test_refused_dual_solves() -> None:
    geo, x, y = network()
    p, field = geo.point(), Fisher(geo, (x, y))
    w = geoad.grad(geo.loss(F.cross_entropy, (x, y)))(p)
    with pytest.raises(GeometryError, match="damping"):
        geoad.dual_solve(field, p, w, 0.0)
    with pytest.raises(VarianceError):
        geoad.dual_solve(field, p, random(p.chart, p, True), 0.1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(BasePointError):
        geoad.dual_solve(field, p.retract(random(p.chart, p, True)), w, 0.1)
    with pytest.raises(ChartMismatchError):
        geoad.dual_solve(field, network()[0].point(), w, 0.1)
    for approximate in (Fisher(geo, x, representation="kfac"), Fisher(geo, x, representation=geoad.curvature.LowRank(3))):
        with pytest.raises(StructureNotPreservedError, match="exact"):
            geoad.dual_solve(approximate, p, w, 0.1)
    with pytest.raises(StructureNotPreservedError, match="rows"):
        geoad.dual_solve(Euclidean(geo.reference), p, w, 0.1)  # pyright: ignore[reportArgumentType]
    low = geoad.GeoModule(copy.deepcopy(geo.wrapped).float())
    many = x.float().repeat(9, 1)
    with pytest.raises(SingularMetricError, match="too small"):
        geoad.DualSolver(Fisher(low, many, "gaussian", reduction="sum"), low.point(), 1e-9)


def test_dual_solve_keeps_no_rows() -> None:
    """What is kept grows with N·K and with the layers, not with N·K·d."""
    torch.manual_seed(0)
    geo = geoad.GeoModule(nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 3)).double())
    x, p = torch.randn(6, 200, dtype=torch.float64), geo.point()
    solver = geoad.DualSolver(Fisher(geo, x), p, 0.1)
    held = [each for each in vars(solver).values() if isinstance(each, Tensor)]
    assert sum(each.numel() for each in held) <= 12 * 12 + 2 * 6 * 3  # the inner products and the seeds
    w = random(p.chart, p, False)
    v = solver.solve(w)
    residual = Fisher(geo, x)(p) @ v + 0.1 * Euclidean(geo.reference)(p).flat(v) - w
    assert float(residual.ravel().norm()) < 1e-12 * float(w.ravel().norm())
