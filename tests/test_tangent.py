"""What is made of tangent kernels: estimates, spectra, principal components, regression, evolution, pictures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional

import geoad
from geoad import operators as ops
from geoad import tangent
from geoad.curvature import Fisher
from geoad.metrics import Constant, Euclidean

N, C = 14, 3


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, C))


@pytest.fixture
def geo(net: nn.Module) -> geoad.GeoModule:
    return geoad.GeoModule(net)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, 4, generator=seeded(1))


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(0, C, (N,), generator=seeded(2))


def jacobian(net: nn.Module, x: Tensor) -> Tensor:
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    j = jacrev(lambda q: functional_call(net, q, (x,)))(parameters)
    return torch.cat([block.flatten(2) for block in j.values()], 2)


def near(a: Tensor, b: Tensor, rtol: float = 1e-9) -> None:
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


# -- estimates ---------------------------------------------------------------------------------------------------------------


def exact_numbers(k: Tensor, y: Tensor) -> dict[str, float]:
    t, f = k.trace(), k.norm()
    return {
        "trace": float(t),
        "frobenius": float(f),
        "effective_rank": float(t**2 / f**2),
        "alignment": float((y.flatten() @ k @ y.flatten()) / (f * y.norm() ** 2)),
    }


def estimates(kernel: geoad.Cometric, y: Tensor, *args: int, **options: object) -> dict[str, tangent.Estimate]:
    found = {name: getattr(tangent, name)(kernel, *args, **options) for name in ("trace", "frobenius", "effective_rank")}
    return found | {"alignment": tangent.alignment(kernel, y, *args, **options)}


def test_numbers_of_stored_kernels_are_exact(geo: geoad.GeoModule, x: Tensor, labels: Tensor) -> None:
    kernel, y = geoad.ntk(geo, x)(geo.point()), tangent.one_hot(labels, C)
    for name, wanted in exact_numbers(kernel.to_dense(), y).items():
        found = estimates(kernel, y)[name]
        assert float(found) == pytest.approx(wanted, rel=1e-12) and float(found.error) == 0 and found.products == 0


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_estimates_converge_and_know_their_error(geo: geoad.GeoModule, x: Tensor, labels: Tensor, method: str) -> None:
    """Over 30 seeds: the errors fall, and the standard errors say by how much the estimates are off."""
    kernel, y = geoad.ntk(geo, x, representation="implicit")(geo.point()), tangent.one_hot(labels, C)
    matrix = geoad.ntk(geo, x)(geo.point())
    wanted = exact_numbers(matrix.to_dense(), y)
    stored = geoad.Cometric(kernel.home, _Hidden(matrix.op), kernel.at)  # the same products, faster
    rms: dict[int, dict[str, float]] = {}
    for products in (12, 48):
        off: dict[str, list[float]] = {name: [] for name in wanted}
        said: dict[str, list[float]] = {name: [] for name in wanted}
        for seed in range(30):
            for name, found in estimates(stored, y, products, method=method, generator=seeded(seed)).items():
                off[name].append(float(found) - wanted[name])
                said[name].append(float(found.error))
        rms[products] = {name: math.sqrt(sum(e * e for e in each) / 30) for name, each in off.items()}
        if method == "hutchinson":
            for name in wanted:
                assert 0.4 < rms[products][name] / (sum(said[name]) / 30) < 2.5
            assert abs(sum(off["trace"])) / 30 < 4 * rms[products]["trace"] / 30**0.5
    for name in wanted:
        assert rms[48][name] < 0.75 * rms[12][name]
    first = tangent.trace(kernel, 12, method=method, generator=seeded(0))
    again = tangent.trace(stored, 12, method=method, generator=seeded(0))
    near(first.value, again.value)  # a seed gives the same number, and the matrix-free products are those of the matrix


class _Hidden(ops.Implicit):
    """A matrix that is known by its products."""

    def __init__(self, op: ops.LinearOperator) -> None:
        super().__init__(op.layout, {"f": op.like}, symmetric=True)
        self.op = op

    def mv(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.op.mv(v)


def test_hutch_beats_hutchinson_on_decaying_spectra(geo: geoad.GeoModule, x: Tensor) -> None:
    matrix = geoad.ntk(geo, x, contract="trace")(geo.point())
    hidden = geoad.Cometric(matrix.home, _Hidden(matrix.op), matrix.at)
    wanted = float(matrix.to_dense().trace())

    def rms(method: str) -> float:
        return sum((float(tangent.trace(hidden, 24, method=method, generator=seeded(s))) - wanted) ** 2 for s in range(20))

    assert rms("hutch++") < 0.1 * rms("hutchinson")


def test_alignment_of_kernels(geo: geoad.GeoModule, x: Tensor, labels: Tensor) -> None:
    p = geo.point()
    fisher = Fisher(geo, x, "categorical") + 0.1 * Euclidean(geo.reference)
    a, b = geoad.ntk(geo, x)(p), geoad.ntk(geo, x, metric=fisher)(p)
    k, m = a.to_dense(), b.to_dense()
    wanted = float((k * m).sum() / (k.norm() * m.norm()))
    assert float(tangent.alignment(a, b)) == pytest.approx(wanted, rel=1e-12)
    lazy = geoad.ntk(geo, x, representation="implicit")(p)
    found = tangent.alignment(lazy, b, 30, generator=seeded(0))
    assert abs(float(found) - wanted) < 5 * float(found.error) + 1e-3
    trace = geoad.ntk(geo, x, contract="trace")(p)
    y = tangent.one_hot(labels, C)
    target = y @ y.T
    wanted = float((trace.to_dense() * target).sum() / (trace.to_dense().norm() * target.norm()))
    assert float(tangent.alignment(trace, y)) == pytest.approx(wanted, rel=1e-12)
    with pytest.raises(geoad.GeometryError, match="one_hot"):
        tangent.alignment(trace, labels)
    with pytest.raises(geoad.GeometryError, match="same data"):
        tangent.alignment(trace, a)


def test_centring(geo: geoad.GeoModule, x: Tensor) -> None:
    p = geo.point()
    k = geoad.ntk(geo, x)(p).to_dense()
    h = torch.kron(torch.eye(N) - 1 / N, torch.eye(C))
    near(tangent.centred(geoad.ntk(geo, x)(p)).to_dense(), h @ k @ h)
    near(tangent.centred(geoad.ntk(geo, x, representation="implicit")(p)).to_dense(), h @ k @ h)


def test_estimates_refuse_what_is_no_kernel(geo: geoad.GeoModule, x: Tensor) -> None:
    p = geo.point()
    with pytest.raises(geoad.GeometryError, match="one data set"):
        tangent.trace(geoad.ntk(geo, x, x)(p))
    with pytest.raises(geoad.GeometryError, match="single outputs"):
        tangent.trace(geoad.ntk(geo, x, contract="diagonal")(p))
    lazy = geoad.ntk(geo, x, representation="implicit")(p)
    with pytest.raises(geoad.GeometryError, match="too few"):
        tangent.trace(lazy, 3)
    with pytest.raises(geoad.GeometryError, match="'hutchinson'"):
        tangent.trace(lazy, method="hutch")


# -- spectra -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ["dense", "implicit"])
def test_spectrum(geo: geoad.GeoModule, x: Tensor, representation: str) -> None:
    p = geo.point()
    matrix = geoad.ntk(geo, x)(p).to_dense()
    values, vectors = tangent.spectrum(geoad.ntk(geo, x, representation=representation)(p), 4)
    near(values, torch.linalg.eigvalsh(matrix).flip(0)[:4], 1e-8)
    flat = vectors.reshape(4, -1)
    near(flat @ flat.T, torch.eye(4), 1e-8)
    near(flat @ matrix, values[:, None] * flat, 1e-6)
    each, rows = tangent.spectrum(geoad.ntk(geo, x, contract="diagonal")(p), 2)
    assert each.shape == (C, 2) and rows.shape == (C, 2, N)
    near(each[1], torch.linalg.eigvalsh(matrix[1::C, 1::C]).flip(0)[:2])


@pytest.mark.parametrize("representation", ["dense", "implicit"])
@pytest.mark.parametrize("contract", ["none", "trace"])
def test_principal_components_are_those_of_the_features(
    geo: geoad.GeoModule, net: nn.Module, x: Tensor, representation: str, contract: str
) -> None:
    """The features are the rows of the Jacobian, in an orthonormal frame of the metric."""
    p = geo.point()
    new = torch.randn(5, 4)
    root = torch.randn(geo.reference.dim, geo.reference.dim) / 8
    g = root @ root.T + torch.eye(len(root))
    frame = torch.linalg.inv(torch.linalg.cholesky(g)).T
    field = geoad.ntk(geo, x, metric=Constant(geo.reference, g), contract=contract, representation=representation)
    pca = tangent.kernel_pca(field, p, 3)
    phi, other = jacobian(net, x) @ frame, jacobian(net, new) @ frame
    if contract == "trace":
        phi, other = phi.flatten(1), other.flatten(1)
    mean = phi.mean(0)
    flat, there = (phi - mean).reshape(-1, phi.shape[-1]), (other - mean).reshape(-1, phi.shape[-1])
    _, s, v = torch.linalg.svd(flat, full_matrices=False)
    near(pca.values, s[:3] ** 2, 1e-7)
    near(pca.explained, s[:3] ** 2 / (s**2).sum(), 1e-7)
    for i in range(3):
        mine = pca.scores.reshape(-1, 3)[:, i]
        axis = v[i] if mine @ (flat @ v[i]) > 0 else -v[i]
        near(mine, flat @ axis, 1e-5)
        near(pca.project(new).reshape(-1, 3)[:, i], there @ axis, 1e-5)
    near(pca.project(x), pca.scores, 1e-6)


def test_principal_components_refuse(geo: geoad.GeoModule, x: Tensor) -> None:
    with pytest.raises(geoad.GeometryError, match="positive variance"):
        tangent.kernel_pca(geoad.ntk(geo, x[:3], contract="trace"), geo.point(), 3)
    with pytest.raises(geoad.GeometryError, match="one data set"):
        tangent.kernel_pca(geoad.ntk(geo, x, x), geo.point())


# -- regression --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ["dense", "implicit"])
@pytest.mark.parametrize("offset", [True, False])
def test_ridge_regression_is_the_linearised_network(
    geo: geoad.GeoModule, net: nn.Module, x: Tensor, labels: Tensor, representation: str, offset: bool
) -> None:
    """The minimum of |f₀ + Jv - y|² + λ vᵀGv over v, by a dense solve in the parameters; in every chart."""
    y, new, ridge = tangent.one_hot(labels, C), torch.randn(5, 4), 0.1
    g = torch.diag(torch.rand(geo.reference.dim) + 0.5)
    j, there = jacobian(net, x).flatten(0, 1), jacobian(net, new)
    base = net(x).detach() if offset else torch.zeros(N, C)
    v = torch.linalg.solve(j.T @ j + ridge * g, j.T @ (y - base).flatten())
    wanted = there @ v + (net(new).detach() if offset else 0)
    psi = geo.reference.reparametrize(geoad.maps.Softplus(), name="psi").target
    field = geoad.ntk(geo, x, metric=Constant(geo.reference, g), representation=representation)
    for p in (geo.point(), geo.point().to(psi)):
        machine = tangent.kernel_ridge(field, p, y, ridge, offset=offset)
        near(machine.predict(new), wanted, 1e-7)
        assert machine.displacement is not None and machine.displacement.chart == p.chart
        near(machine.displacement.to(geo.reference).ravel(), v, 1e-7)
        assert torch.equal(machine.classify(new), wanted.argmax(-1))


@pytest.mark.parametrize("contract", ["trace", "diagonal"])
def test_ridge_regression_with_contracted_kernels(
    geo: geoad.GeoModule, net: nn.Module, x: Tensor, labels: Tensor, contract: str
) -> None:
    y, new, ridge = tangent.one_hot(labels, C), torch.randn(5, 4), 0.1
    j, there = jacobian(net, x), jacobian(net, new)
    k, cross = torch.einsum("ncp,mcp->cnm", j, j), torch.einsum("ncp,mcp->cnm", there, j)
    if contract == "trace":
        k, cross = k.mean(0).expand(C, N, N), cross.mean(0).expand(C, 5, N)
    residual = (y - net(x).detach()).T.unsqueeze(-1)
    wanted = (cross @ torch.linalg.solve(k + ridge * torch.eye(N), residual)).squeeze(-1).T + net(new).detach()
    field = geoad.ntk(geo, x, contract=contract, max_memory=1 << 12)
    near(tangent.kernel_ridge(field, geo.point(), y, ridge).predict(new), wanted, 1e-8)


def test_a_linear_model_interpolates() -> None:
    torch.manual_seed(0)
    geo = geoad.GeoModule(nn.Linear(6, 2))
    x, y = torch.randn(4, 6), torch.randn(4, 2)
    near(tangent.kernel_ridge(geoad.ntk(geo, x), geo.point(), y, 0.0).predict(x), y)
    with pytest.raises(geoad.SingularMetricError):
        tangent.kernel_ridge(geoad.ntk(geo, torch.cat([x, x])), geo.point(), torch.cat([y, y]), 0.0)


def test_regression_refuses(geo: geoad.GeoModule, x: Tensor, labels: Tensor) -> None:
    p, y = geo.point(), tangent.one_hot(labels, C)
    with pytest.raises(geoad.GeometryError, match="one_hot"):
        tangent.kernel_ridge(geoad.ntk(geo, x), p, labels)
    with pytest.raises(geoad.GeometryError, match="at least 0"):
        tangent.kernel_ridge(geoad.ntk(geo, x), p, y, -1.0)
    with pytest.raises(geoad.GeometryError, match="training data"):
        tangent.kernel_ridge(geoad.ntk(geo, x, x), p, y)
    with pytest.raises(geoad.GeometryError, match="from 0 to 1"):
        tangent.one_hot(labels, 2)


# -- evolution ---------------------------------------------------------------------------------------------------------------


def test_evolution(geo: geoad.GeoModule, x: Tensor, labels: Tensor) -> None:
    y = tangent.one_hot(labels, C)
    field = geoad.ntk(geo, x, contract="trace")
    record = tangent.Evolution(field, y, k=3)
    with pytest.raises(geoad.GeometryError, match="recorded"):
        record.table()
    optimizer = torch.optim.SGD(geo.parameters(), lr=0.5)
    points = []
    for _ in range(3):
        points.append(geo.point())
        record()
        optimizer.zero_grad()
        functional.cross_entropy(geo(x), labels).backward()
        optimizer.step()
    kernels = [field(p).to_dense() for p in points]
    table = record.table()
    assert table["step"].tolist() == [0, 1, 2]
    near(table["trace"], torch.stack([k.trace() for k in kernels]))
    near(table["eigenvalues"], torch.stack([torch.linalg.eigvalsh(k).flip(0)[:3] for k in kernels]))

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum() / (a.norm() * b.norm())

    near(table["target_alignment"], torch.stack([cosine(k, y @ y.T) for k in kernels]))
    near(table["initial_alignment"], torch.stack([cosine(k, kernels[0]) for k in kernels]))
    near(table["velocity"][1:], torch.stack([1 - cosine(kernels[i + 1], kernels[i]) for i in range(2)]), 1e-7)
    assert record(step=10).step == 10
    with pytest.raises(geoad.GeometryError, match="stored kernel"):
        tangent.Evolution(geoad.ntk(geo, x, representation="implicit"))


# -- pictures ----------------------------------------------------------------------------------------------------------------


def test_pictures(geo: geoad.GeoModule, x: Tensor, labels: Tensor) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from geoad import plotting_kernels

    p, axes = geo.point(), Figure().subplots(2, 2).flatten()
    value = geoad.ntk(geo, x)(p)
    assert plotting_kernels.kernel(value, axes[0], order=labels) is axes[0]
    shown = torch.as_tensor(axes[0].images[0].get_array().data)
    order = labels.argsort(stable=True)
    near(shown.double(), value.components[order][:, :, order].reshape(N * C, N * C))
    pca = tangent.kernel_pca(geoad.ntk(geo, x, contract="trace"), p, 2)
    plotting_kernels.components(pca, labels, axes[1], new=pca.project(x[:3]))
    drawn = sum(len(each.get_offsets()) for each in axes[1].collections)
    assert drawn == N + 3 and "%" in axes[1].get_xlabel()
    record = tangent.Evolution(geoad.ntk(geo, x, contract="trace"), k=3)
    record()
    record()
    plotting_kernels.eigenvalues(record, axes[2])
    assert len(axes[2].lines) == 3
    plotting_kernels.evolution(record, axes[3], quantities=["trace"])
    assert axes[3].lines[0].get_ydata().tolist() == [float(record.snapshots[0].trace)] * 2
    with pytest.raises(geoad.GeometryError, match="no quantities"):
        plotting_kernels.evolution(record, axes[3], quantities=["speed"])
    with pytest.raises(geoad.GeometryError, match="one score"):
        plotting_kernels.components(tangent.kernel_pca(geoad.ntk(geo, x), p, 2), labels, axes[1])
    with pytest.raises(geoad.GeometryError, match="one matrix"):
        plotting_kernels.kernel(geoad.ntk(geo, x, contract="diagonal")(p), axes[0])
