"""Manifolds whose geometry is known in closed form: plane, sphere, Gaussians, and the worked example of the paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import geoad
from geoad import maps
from geoad.params import Blocks

# torch itself warns when its forward mode is used for the first time
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def close(a: Tensor, b: Any, tol: float = 1e-11) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=tol, atol=tol)


# -- the plane in polar coordinates ----------------------------------------------------------------------------------------


def polar_matrix(x: Tensor) -> Tensor:
    return torch.diag(torch.stack([torch.ones_like(x[0]), x[0] * x[0]]))


def polar_symbols(r: float) -> Tensor:
    symbols = torch.zeros(2, 2, 2)
    symbols[0, 1, 1] = -r
    symbols[1, 0, 1] = symbols[1, 1, 0] = 1 / r
    return symbols


def plane(kind: str) -> tuple[Any, geoad.Chart]:
    """(metric, polar chart): polar coordinates of a Cartesian reference chart, or a metric field in a chart of its own."""
    if kind == "map":
        xy = geoad.Chart({"x": (2,)}, name="xy")
        return geoad.metrics.Euclidean(xy), xy.reparametrize(maps.Polar(), name="polar").target
    chart = geoad.Chart({"x": (2,)}, name="polar")
    return chart.metric_field(polar_matrix), chart


@pytest.mark.parametrize("kind", ["map", "field"])
def test_plane_metric_and_symbols(kind: str) -> None:
    metric, polar = plane(kind)
    for r, phi in ((0.5, 0.3), (2.0, -1.2)):
        p = polar.point(torch.tensor([r, phi]))
        close(metric(p).to_dense(), torch.diag(torch.tensor([1.0, r**2])))
        close(geoad.christoffel(metric)(p).components, polar_symbols(r))
        close(metric(p).det().sqrt().components, r)
    if kind == "map":
        close(geoad.christoffel()(p).components, polar_symbols(2.0))  # the default connection
        assert not geoad.christoffel()(p.to(polar.reference)).components.any()


@pytest.mark.parametrize("kind", ["map", "field"])
def test_plane_laplacians(kind: str) -> None:
    metric, polar = plane(kind)
    p = polar.point(torch.tensor([1.7, 0.4]))
    cases = [
        (4.0, polar.scalar_field(lambda x: x[0] ** 2)),
        (0.0, polar.scalar_field(lambda x: x[0].log())),
        (0.0, polar.scalar_field(lambda x: x[0] ** 2 * x[1].sin() * x[1].cos())),  # x y
    ]
    for laplacian, f in cases:
        close(metric(p).trace(geoad.hessian(f, metric)(p)), laplacian)
        divergence = geoad.covariant_derivative(geoad.riemannian_grad(f, metric), metric)(p)
        close(divergence.trace(), laplacian)
    # r² = x² + y²: its Hessian is twice the metric
    close(geoad.hessian(cases[0][1], metric)(p).to_dense(), 2 * metric(p).to_dense())
    if kind == "map":
        for laplacian, f in cases:
            hessian = geoad.hessian(f)(p)  # the default connection is flat
            close(geoad.metrics.Euclidean(polar.reference)(p).trace(hessian), laplacian)


@pytest.mark.parametrize("kind", ["map", "field"])
def test_plane_straight_lines(kind: str) -> None:
    metric, polar = plane(kind)
    p = polar.point(torch.tensor([1.5, 0.2]))
    v = polar.vector(torch.tensor([-0.3, 0.7]), at=p)

    def cartesian(x: Tensor) -> Tensor:
        return torch.stack([x[0] * x[1].cos(), x[0] * x[1].sin()])

    x, velocity = torch.func.jvp(cartesian, (p.ravel(),), (v.ravel(),))
    times = (0.5, 1.3, -0.8)
    found = geoad.geodesic(metric, p, v, times, steps=24, return_velocity=True)
    for time, (end, speed) in zip(times, found, strict=True):
        close(cartesian(end.ravel()), x + time * velocity, 1e-6)
        close(torch.func.jvp(cartesian, (end.ravel(),), (speed.ravel(),))[1], velocity, 1e-6)
    # a constant vector field is parallel
    q = polar.point(torch.tensor([0.9, 1.1]))
    carried = geoad.parallel_transport(metric, [p, q], v, steps=40)
    close(torch.func.jvp(cartesian, (q.ravel(),), (carried.ravel(),))[1], velocity, 1e-7)
    third = geoad.covariant_derivative(geoad.hessian(polar.scalar_field(lambda y: y[0] ** 2), metric), metric)(p)
    close(third.to_dense(), torch.zeros(2, 2, 2))


# -- the sphere --------------------------------------------------------------------------------------------------------


def sphere_matrix(x: Tensor) -> Tensor:
    return torch.diag(torch.stack([torch.ones_like(x[0]), x[0].sin() ** 2]))


def test_sphere_symbols_and_laplacian() -> None:
    chart = geoad.Chart({"x": (2,)}, name="colatitude, longitude")
    metric, colatitude = chart.metric_field(sphere_matrix), 0.8
    p = chart.point(torch.tensor([colatitude, 0.3]))
    symbols = torch.zeros(2, 2, 2)
    symbols[0, 1, 1] = -math.sin(colatitude) * math.cos(colatitude)
    symbols[1, 0, 1] = symbols[1, 1, 0] = 1 / math.tan(colatitude)
    close(geoad.christoffel(metric)(p).components, symbols)
    # the coordinates of the embedding are spherical harmonics of degree 1: Δ = -2
    for harmonic in (
        lambda x: x[0].cos(),
        lambda x: x[0].sin() * x[1].cos(),
        lambda x: x[0].sin() * x[1].sin(),
    ):
        f = chart.scalar_field(harmonic)
        close(metric(p).trace(geoad.hessian(f, metric)(p)), -2 * f(p))
        close(geoad.hessian(f, metric)(p).to_dense(), -f(p) * metric(p).to_dense())  # even Hess f = -f G
    # degree 2: Δ = -6
    f = chart.scalar_field(lambda x: 3 * x[0].cos() ** 2 - 1)
    close(metric(p).trace(geoad.hessian(f, metric)(p)), -6 * f(p))


def test_sphere_in_two_charts() -> None:
    """Stereographic coordinates as a change of chart of the spherical ones: the metric becomes conformal."""

    class Stereographic(maps.Diffeomorphism):
        """(θ, φ) to tan(θ/2) (cos φ, sin φ)."""

        def forward(self, x: Blocks) -> Blocks:
            colatitude, longitude = x["x"].unbind(-1)
            return {"x": (colatitude / 2).tan().unsqueeze(-1) * torch.stack([longitude.cos(), longitude.sin()], -1)}

        def invert(self, y: Blocks) -> Blocks:
            u, v = y["x"].unbind(-1)
            return {"x": torch.stack([2 * (u**2 + v**2).sqrt().atan(), torch.atan2(v, u)], -1)}

    chart = geoad.Chart({"x": (2,)}, name="spherical")
    flat = chart.reparametrize(Stereographic(), name="stereographic").target
    metric = chart.metric_field(sphere_matrix)
    p = chart.point(torch.tensor([0.8, 0.3]))
    y = p.to(flat).ravel()
    factor = 4 / (1 + (y**2).sum()) ** 2
    close(metric(p.to(flat)).to_dense(), factor * torch.eye(2))
    # Γ of e^{2u} δ: δ^k_i u_j + δ^k_j u_i - δ_ij u_k with u = log 2 - log(1 + y²)
    u = -2 * y / (1 + (y**2).sum())
    eye = torch.eye(2)
    wanted = torch.einsum("ki,j->kij", eye, u) + torch.einsum("kj,i->kij", eye, u) - torch.einsum("ij,k->kij", eye, u)
    close(geoad.christoffel(metric)(p.to(flat)).components, wanted)


# -- Gaussians -----------------------------------------------------------------------------------------------------------


class Natural(maps.Diffeomorphism):
    """(μ, σ) to the natural parameters (μ/σ², -1/(2σ²))."""

    def forward(self, x: Blocks) -> Blocks:
        mean, deviation = x["x"].unbind(-1)
        return {"x": torch.stack([mean / deviation**2, -0.5 / deviation**2], -1)}

    def invert(self, y: Blocks) -> Blocks:
        first, second = y["x"].unbind(-1)
        return {"x": torch.stack([-first / (2 * second), (-2 * second) ** -0.5], -1)}

    def outside_domain(self, x: Blocks) -> str | None:
        return None if bool((x["x"][..., 1] > 0).all()) else "the standard deviation must be positive"

    def outside_image(self, y: Blocks) -> str | None:
        return None if bool((y["x"][..., 1] < 0).all()) else "the second natural parameter must be negative"


class LogScale(maps.Diffeomorphism):
    """(μ, σ) to (μ, log σ)."""

    def forward(self, x: Blocks) -> Blocks:
        return {"x": torch.stack([x["x"][..., 0], x["x"][..., 1].log()], -1)}

    def invert(self, y: Blocks) -> Blocks:
        return {"x": torch.stack([y["x"][..., 0], y["x"][..., 1].exp()], -1)}


MEAN, DEVIATION = 0.7, 1.3


def gaussians() -> tuple[geoad.Chart, geoad.Chart, geoad.Chart, geoad.MetricField]:
    """(μ, σ), (μ, log σ), (η1, η2), and the Fisher metric."""
    chart = geoad.Chart({"x": (2,)}, name="mean, deviation")
    log = chart.reparametrize(LogScale(), name="mean, log deviation").target
    natural = chart.reparametrize(Natural(), name="natural").target
    return chart, log, natural, chart.metric_field(lambda x: torch.diag(torch.stack([x[1] ** -2, 2 * x[1] ** -2])))


def log_partition(eta: Tensor) -> Tensor:
    return -(eta[0] ** 2) / (4 * eta[1]) - 0.5 * (-2 * eta[1]).log()


def test_fisher_metric_of_gaussians() -> None:
    chart, log, natural, fisher = gaussians()
    p = chart.point(torch.tensor([MEAN, DEVIATION]))
    close(fisher(p).to_dense(), torch.diag(torch.tensor([DEVIATION**-2, 2 * DEVIATION**-2])))
    close(fisher(p.to(log)).to_dense(), torch.diag(torch.tensor([DEVIATION**-2, 2.0])))
    eta = p.to(natural).ravel()
    close(eta, [MEAN / DEVIATION**2, -0.5 / DEVIATION**2])
    partition: Any = torch.func.hessian(log_partition)(eta)
    close(fisher(p.to(natural)).to_dense(), partition)  # an exponential family: the Hessian of the log-partition function
    # and it is the variance of the score, E[s sᵀ], by Gauss-Hermite quadrature
    nodes, weights = torch.tensor([-math.sqrt(3), 0.0, math.sqrt(3)]), torch.tensor([1 / 6, 2 / 3, 1 / 6])

    def log_density(x: Tensor, y: Tensor) -> Tensor:
        return -0.5 * ((y - x[0]) / x[1]) ** 2 - x[1].log()

    scores = torch.func.vmap(torch.func.grad(log_density), in_dims=(None, 0))(p.ravel(), MEAN + DEVIATION * nodes)
    second = torch.einsum("n,ni,nj->ij", weights, scores, scores)
    close(second, fisher(p).to_dense())


def test_named_blocks() -> None:
    """The same family with two named blocks, and maps chosen by name."""
    chart = geoad.Chart({"mu": (), "sigma": ()}, name="gaussians")
    log = chart.reparametrize({"sigma": maps.Log()}, name="log").target

    def matrix(x: dict[str, Tensor]) -> Any:
        zero = torch.zeros_like(x["mu"])
        return {"mu": {"mu": x["sigma"] ** -2, "sigma": zero}, "sigma": {"mu": zero, "sigma": 2 * x["sigma"] ** -2}}

    fisher = chart.metric_field(matrix)
    p = chart.point({"mu": torch.tensor(MEAN), "sigma": torch.tensor(DEVIATION)})
    close(fisher(p.to(log)).to_dense(), torch.diag(torch.tensor([DEVIATION**-2, 2.0])))
    one, one_log, _, single = gaussians()
    q = one.point(torch.tensor([MEAN, DEVIATION]))
    close(geoad.christoffel(fisher)(p).components, geoad.christoffel(single)(q).components)
    close(geoad.christoffel(fisher)(p.to(log)).components, geoad.christoffel(single)(q.to(one_log)).components)
    v = chart.vector({"mu": torch.tensor(0.4), "sigma": torch.tensor(-0.2)}, at=p)
    end = geoad.geodesic(fisher, p.to(log), v.to(log), steps=8).to(chart)
    close(end.ravel(), geoad.geodesic(single, q, one.vector(v.ravel(), at=q), steps=8).ravel())


def test_symbols_of_gaussians() -> None:
    chart, log, natural, fisher = gaussians()
    p = chart.point(torch.tensor([MEAN, DEVIATION]))
    wanted = torch.zeros(2, 2, 2)
    wanted[0, 0, 1] = wanted[0, 1, 0] = wanted[1, 1, 1] = -1 / DEVIATION
    wanted[1, 0, 0] = 1 / (2 * DEVIATION)
    close(geoad.christoffel(fisher)(p).components, wanted)
    wanted = torch.zeros(2, 2, 2)
    wanted[0, 0, 1] = wanted[0, 1, 0] = -1
    wanted[1, 0, 0] = 1 / (2 * DEVIATION**2)
    close(geoad.christoffel(fisher)(p.to(log)).components, wanted)
    # in natural parameters Γ_{k;ij} = ½ ∂³A
    third: Any = torch.func.jacfwd(torch.func.hessian(log_partition))(p.to(natural).ravel())
    lowered = torch.einsum("lk,kij->lij", fisher(p.to(natural)).to_dense(), geoad.christoffel(fisher)(p.to(natural)).components)
    close(lowered, 0.5 * third)
    # the exponential connection is flat: Γ - ½ G⁻¹ ∂³A is zero in natural parameters, and is moved as a connection
    cubic = geoad.covariant_derivative(fisher, geoad.metrics.Euclidean(natural))(p.to(natural))  # ∇^(e) G, the cubic tensor
    shift = torch.einsum("kl,lij->kij", fisher(p.to(natural)).inverse(), cubic)
    exponential = geoad.christoffel(fisher)(p.to(natural)) + -0.5 * shift
    close(exponential.components, torch.zeros(2, 2, 2))
    close(exponential.to(chart).components, geoad.christoffel(geoad.metrics.Euclidean(natural))(p).components)


def test_curvature_of_gaussians() -> None:
    """Gaussian curvature -1/2, from the commutator of covariant derivatives, in all charts."""
    chart, log, natural, fisher = gaussians()
    p = chart.point(torch.tensor([MEAN, DEVIATION]))

    def covector(q: geoad.Point) -> geoad.Covector:
        x = q.to(chart).ravel()
        return chart.covector(torch.stack([x[0] * x[1], x[1].sin() + x[0] ** 2]), at=q)

    twice = geoad.covariant_derivative(geoad.covariant_derivative(covector, fisher), fisher)
    for coordinates in (chart, log, natural):
        q = p.to(coordinates)
        second, g, w = twice(q).to_dense(), fisher(q).to_dense(), covector(q).to(coordinates).ravel()
        area = torch.einsum("la,k->akl", g, w) - torch.einsum("ka,l->akl", g, w)
        close(second - second.transpose(1, 2), -0.5 * area, 1e-9)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """The Fisher-Rao distance: √2 times the distance in the hyperbolic half-plane of (μ/√2, σ)."""
    gap = 0.5 * (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2
    return math.sqrt(2) * torch.acosh(1 + gap / (2 * a[1] * b[1]))


def test_geodesics_of_gaussians() -> None:
    chart, log, natural, fisher = gaussians()
    p = chart.point(torch.tensor([MEAN, DEVIATION]))
    v = chart.vector(torch.tensor([0.8, -0.5]), at=p)
    for coordinates in (chart, log, natural):
        end = geoad.geodesic(fisher, p.to(coordinates), v.to(coordinates), steps=12).to(chart)
        close(distance(p.ravel(), end.ravel()), fisher(p).norm(v), 1e-6)  # the length of a shortest path
    # with the mean fixed the deviation grows exponentially
    up = chart.vector(torch.tensor([0.0, 1.0]), at=p)
    end = geoad.geodesic(fisher, p, up, 0.9, steps=24)
    close(end.ravel(), [MEAN, DEVIATION * math.exp(0.9 / DEVIATION)], 1e-7)
    # the equation integrated in another chart gives the same point
    own = log.metric_field(lambda x: torch.diag(torch.stack([(-2 * x[1]).exp(), 2 * torch.ones_like(x[1])])))
    close(geoad.geodesic(own, p, v, steps=16).ravel(), geoad.geodesic(fisher, p, v, steps=16).ravel(), 1e-6)


def test_natural_gradient_and_volume() -> None:
    chart, log, natural, fisher = gaussians()
    p = chart.point(torch.tensor([MEAN, DEVIATION]))
    data = torch.tensor([0.1, 1.9, -0.4])
    loss = chart.scalar_field(lambda x: (0.5 * ((data - x[0]) / x[1]) ** 2 + x[1].log()).mean())
    step = geoad.riemannian_grad(loss, fisher)(p)
    # the natural gradient of a Gaussian: σ² ∂_μ, σ²/2 ∂_σ
    mean, spread = MEAN - data.mean(), DEVIATION - ((data - MEAN) ** 2).mean() / DEVIATION
    close(step.ravel(), torch.stack([mean, 0.5 * spread]))
    for coordinates in (log, natural):
        there = geoad.riemannian_grad(loss, fisher)(p.to(coordinates))
        close(there.to(chart).ravel(), step.ravel())
        close(fisher(p.to(coordinates)).norm(there), fisher(p).norm(step))
    # in natural parameters it is the plain gradient in the mean parameters: η̇ = Eη[T] - mean of T
    moments = torch.stack([MEAN - data.mean(), MEAN**2 + DEVIATION**2 - (data**2).mean()])
    close(geoad.grad(loss)(p.to(natural)).ravel(), moments)
    # the volume form √det G is a density of weight 1
    volume = fisher(p).det().sqrt()
    close(volume.components, math.sqrt(2) / DEVIATION**2)
    close(fisher(p.to(log)).det().sqrt().components, math.sqrt(2) / DEVIATION)
    close(fisher(p.to(natural)).det().sqrt().components, math.sqrt(2) * DEVIATION**3)
    for coordinates in (log, natural):
        close(volume.to(coordinates).components, fisher(p.to(coordinates)).det().sqrt().components)


# -- the worked example of the paper -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 5])
def test_appendix_a(d: int) -> None:
    """L = Σ θ², ψ = 3 θ: the determinant of the autodiff Hessian is 2^d or (2/9)^d, that of E = G⁻¹H is 2^d in both.

    Source: Kristiadi et al. (2023), appendix A.
    """
    theta = geoad.Chart({"x": (d,)}, name="theta")
    psi = theta.reparametrize(maps.Scale(3.0), name="psi").target
    loss = theta.scalar_field(lambda x: (x**2).sum())
    p = theta.point(torch.linspace(-1.0, 2.0, d))
    plain: Any = torch.func.hessian(loss.function(psi))(p.to(psi).components)
    close(torch.linalg.det(plain), (2 / 9) ** d)
    metric = geoad.metrics.Euclidean(theta)
    for q in (p, p.to(psi)):
        hessian, g = geoad.hessian(loss)(q), metric(q)
        operator = g.inverse() @ hessian
        assert operator.type == (1, 1)
        close(operator.det(), 2.0**d)
        close(operator.to_dense(), 2 * torch.eye(d))
        close(operator.trace(), 2.0 * d)
        close(hessian.logdet() - g.logdet(), d * math.log(2))
    close(geoad.hessian(loss)(p.to(psi)).det().components, (2 / 9) ** d)  # a density of weight 2: allowed to differ
    close(geoad.hessian(loss)(p.to(psi)).det().to(theta).components, 2.0**d)
    with pytest.raises(geoad.VarianceError, match="with respect to which metric"):
        geoad.hessian(loss)(p).trace()
