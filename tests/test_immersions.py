"""Fewer coordinates, and maps of any rank: every law of immersions and smooth maps against dense linear algebra."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from map_cases import IMMERSIONS, SMOOTH, Case, Setting, close, dense, loss, normal, refused
from torch import Tensor

import geoad
from geoad import maps
from geoad.errors import ChartDomainError

cases = pytest.mark.parametrize("case", IMMERSIONS.values(), ids=IMMERSIONS.keys())
smooth = pytest.mark.parametrize("case", SMOOTH.values(), ids=SMOOTH.keys())
both = pytest.mark.parametrize("case", [*IMMERSIONS.values(), *SMOOTH.values()], ids=[*IMMERSIONS, *SMOOTH])


# -- the map and its products ------------------------------------------------------------------------------------------


@both
def test_the_map_and_its_derivative_are_those_of_the_plain_function(case: Case) -> None:
    s = Setting(case)
    assert s.map.law == case.law
    assert s.psi.dim == case.dim
    assert close(s.p.ravel(), s.x, 1e-14)
    assert close(s.matrix(s.map.push_inverse, s.psi, s.theta), s.jacobian)
    assert close(s.matrix(s.map.pull_inverse, s.theta, s.psi), s.jacobian.mT)


@cases
def test_the_way_back_inverts_on_tangent_vectors(case: Case) -> None:
    s = Setting(case)
    back = s.matrix(s.map.push, s.theta, s.psi)
    assert close(back @ s.jacobian, torch.eye(s.dim))
    assert close(s.matrix(s.map.pull, s.psi, s.theta), back.mT)


@cases
def test_points_of_the_image_have_coordinates_and_others_have_not(case: Case) -> None:
    s = Setting(case)
    found = s.theta.point(s.p.components).to(s.psi)
    assert close(found.ravel(), s.y, 1e-9)
    normals = torch.linalg.svd(s.jacobian).U[:, s.dim :]
    off = s.theta.point(s.theta.layout.unravel(s.x + 0.01 * normals[:, 0]))
    with pytest.raises(ChartDomainError, match="'psi'"):
        off.to(s.psi)


@both
def test_batches_are_loops_and_single_precision_stays_single(case: Case) -> None:
    s = Setting(case)
    ys = torch.stack([case.numbers(seed) for seed in range(3)])
    many = s.psi.point(s.psi.layout.unravel(ys))
    v = s.psi.vector(s.psi.layout.unravel(normal(3, 3, s.dim)), at=many)
    assert close(many.to(s.theta).ravel(), torch.stack([case.plain(y) for y in ys]), 1e-13)
    expected = torch.stack([case.jacobian(y) @ u for y, u in zip(ys, normal(3, 3, s.dim), strict=True)])
    assert close(v.to(s.theta).ravel(), expected, 1e-12)
    single = s.psi.point(s.psi.layout.unravel(s.y.float())).to(s.theta)
    assert {block.dtype for block in single.blocks.values()} == {torch.float32}
    assert close(single.ravel().double(), s.x, 1e-5)
    if case.law == "immersion":
        again = s.theta.point(single.components).to(s.psi)
        assert close(again.ravel().double(), s.y, 1e-4)


# -- the law table: immersions -----------------------------------------------------------------------------------------


@cases
def test_vectors(case: Case) -> None:
    s = Setting(case)
    u = s.psi.vector(s.psi.layout.unravel(normal(1, s.dim)), at=s.q)
    pushed = u.to(s.theta)
    assert close(pushed.ravel(), s.jacobian @ u.ravel())
    tangent = s.theta.vector(s.theta.layout.unravel(s.jacobian @ u.ravel()), at=s.p)
    assert close(tangent.to(s.psi).ravel(), u.ravel())
    with refused(".*tangent"):
        s.vector(2).to(s.psi)


@cases
def test_covectors_forms_and_metrics_are_restricted(case: Case) -> None:
    s = Setting(case)
    w, matrix = s.covector(1), s.spd(2)
    assert close(w.to(s.psi).ravel(), s.jacobian.mT @ w.ravel())
    for bilinear in (normal(3, s.d, s.d), matrix):
        restricted = s.theta.form(bilinear, at=s.p).to(s.psi)
        assert close(restricted.to_dense(), s.jacobian.mT @ bilinear @ s.jacobian)
    cube = torch.einsum("i,j,k->ijk", w, w, s.covector(4)).to(s.psi)
    ours = s.jacobian.mT @ w.ravel()
    assert close(dense(cube), torch.einsum("i,j,k->ijk", ours, ours, s.jacobian.mT @ s.covector(4).ravel()))
    for thing in (
        s.psi.covector(s.psi.layout.unravel(normal(5, s.dim)), at=s.q),
        s.psi.form(normal(6, s.dim, s.dim), at=s.q),
        s.psi.metric(s.spd(7, s.dim), at=s.q),
    ):
        with refused(".*subspace"):
            thing.to(s.theta)


@cases
def test_sharp_and_endomorphisms_are_recomputed_with_the_induced_metric(case: Case) -> None:
    s = Setting(case)
    g, h, w = s.spd(1), normal(2, s.d, s.d), s.covector(3)
    h = h + h.mT
    G, B = s.theta.metric(g, at=s.p).to(s.psi), s.theta.form(h, at=s.p).to(s.psi)
    assert isinstance(G, geoad.Metric)
    induced, restricted = (s.jacobian.mT @ each @ s.jacobian for each in (g, h))
    assert close(G.sharp(w.to(s.psi)).ravel(), torch.linalg.solve(induced, s.jacobian.mT @ w.ravel()))
    E = G.inverse() @ B
    assert close(E.to_dense(), torch.linalg.solve(induced, restricted))
    assert close(E.trace(), torch.trace(torch.linalg.solve(induced, restricted)))
    assert close(G.logdet().to(s.psi).components, torch.linalg.slogdet(induced)[1])
    for thing in (E, G.det(), G.logdet()):
        with refused():
            thing.to(s.theta)
    E_theta = s.theta.metric(g, at=s.p).inverse() @ s.theta.form(h, at=s.p)
    for thing in (E_theta, s.theta.metric(g, at=s.p).det(), s.theta.metric(g, at=s.p).logdet()):
        with refused():
            thing.to(s.psi)


@cases
def test_cometrics(case: Case) -> None:
    s = Setting(case)
    c = s.spd(1, s.dim)
    pushed = s.psi.cometric(c, at=s.q).to(s.theta)
    assert close(pushed.to_dense(), s.jacobian @ c @ s.jacobian.mT)
    tangent = s.theta.cometric(s.jacobian @ c @ s.jacobian.mT, at=s.p)
    assert close(tangent.to(s.psi).to_dense(), c, 1e-8)
    with refused(".*tangent"):
        s.theta.cometric(s.spd(2), at=s.p).to(s.psi)


@cases
def test_functions_gradients_and_metric_fields(case: Case) -> None:
    s = Setting(case)
    L = s.field()
    pulled = lambda y: loss(case.plain(y))  # noqa: E731
    assert close(L(s.q), pulled(s.y)) and close(L.to(s.psi)(s.q), pulled(s.y))
    gradient = torch.func.grad(pulled)(s.y)
    assert close(geoad.grad(L)(s.q).ravel(), gradient)
    induced = s.jacobian.mT @ s.jacobian
    assert close(geoad.metrics.Euclidean(s.theta)(s.q).to_dense(), induced)
    assert close(geoad.riemannian_grad(L)(s.q).ravel(), torch.linalg.solve(induced, gradient))
    g = s.spd(4)
    G = geoad.metrics.Constant(s.theta, g)
    expected = torch.linalg.solve(s.jacobian.mT @ g @ s.jacobian, gradient)
    assert close(geoad.riemannian_grad(L, G)(s.q).ravel(), expected)


@cases
def test_functions_and_forms_of_the_submanifold_are_not_known_elsewhere(case: Case) -> None:
    s = Setting(case)
    own = s.psi.scalar_field(lambda y: loss(s.psi.layout.ravel(s.psi.pack(y))))
    assert close(own(s.q), loss(s.y))
    for ask in (
        lambda: own(s.p),
        lambda: own.to(s.theta)(s.p),
        lambda: geoad.grad(own)(s.p),
        lambda: geoad.metrics.Euclidean(s.psi)(s.p),
    ):
        with refused():
            ask()


# -- the Hessian of the submanifold ------------------------------------------------------------------------------------


def bend(x: Tensor) -> Tensor:
    """A curved metric on θ."""
    d = len(x)
    uneven = torch.linspace(0.1, 0.4, d, dtype=x.dtype)
    return torch.eye(d, dtype=x.dtype) + 0.3 * torch.outer(x.sin(), x.sin()) + torch.diag(uneven * x.cos() ** 2)


def flat(x: Tensor) -> Tensor:
    return torch.eye(len(x), dtype=x.dtype)


def intrinsic(metric: Callable[[Tensor], Tensor], function: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """∂²f - Γ ∂f in ψ, with the Christoffel symbols of `metric` from scratch."""
    slopes = torch.func.jacfwd(metric)(y)  # [i, j, k] = ∂_k G_ij
    lowered = 0.5 * (
        torch.einsum("kji->kij", slopes) + torch.einsum("kij->kij", slopes) - torch.einsum("ijk->kij", slopes)
    )  # Γ_kij
    symbols = torch.linalg.solve(metric(y), lowered.reshape(len(y), -1)).reshape(lowered.shape)
    return torch.func.hessian(function)(y) - torch.einsum("kij,k->ij", symbols, torch.func.grad(function)(y))


CURVED = {"curved", "sphere", "a diffeomorphism below", "two immersions"}
"""The cases whose image is not a flat piece of a flat θ."""


@pytest.mark.parametrize("name", IMMERSIONS)
@pytest.mark.parametrize("ambient", [flat, bend])
def test_the_hessian_is_that_of_the_induced_metric(name: str, ambient: Callable[[Tensor], Tensor]) -> None:
    case = IMMERSIONS[name]
    s = Setting(case)
    L = s.field()

    def induced(y: Tensor) -> Tensor:
        j = case.jacobian(y)
        return j.mT @ ambient(case.plain(y)) @ j

    expected = intrinsic(induced, lambda y: loss(case.plain(y)), s.y)
    G = None if ambient is flat else s.theta.metric_field(lambda x: bend(s.theta.layout.ravel(s.theta.pack(x))))
    H = geoad.hessian(L, G)(s.q)
    assert H.chart == s.psi
    assert close(H.to_dense(), expected, 1e-9)
    restricted = geoad.hessian(L, G)(s.p).to(s.psi).to_dense()
    if ambient is bend or name in CURVED:
        assert float((restricted - expected).norm()) > 1e-3 * float(expected.norm())
    E = (G or geoad.metrics.Euclidean(s.theta))(s.q).inverse() @ H
    assert close(E.trace(), torch.trace(torch.linalg.solve(induced(s.y), expected)), 1e-9)


def test_the_restricted_hessian_is_off_by_half() -> None:
    """As far apart as the facts say: the second fundamental form of a sphere is as large as its Hessians."""
    s = Setting(IMMERSIONS["sphere"])
    L = s.theta.scalar_field(lambda x: (x * torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)).sum() + x[0] * x[1])
    ours = geoad.hessian(L)(s.q).to_dense()
    restricted = geoad.hessian(L)(s.p).to(s.psi).to_dense()
    assert float((ours - restricted).norm()) > 0.3 * float(ours.norm())


def behind(s: Setting, below: Any) -> geoad.Chart:
    """The sphere immersed in a chart of θ that `below` leads to."""
    phi = s.theta.reparametrize(below)

    def embed(y: Tensor) -> Tensor:
        return phi.map.forward({"x": IMMERSIONS["sphere"].plain(y)})["x"]

    return phi.target.reparametrize(maps.Immersion(embed, (2,)), "behind").target


@pytest.mark.parametrize("above", [maps.Softplus(), maps.Affine(generator=torch.Generator().manual_seed(0)), None])
@pytest.mark.parametrize("below", [maps.Sinh(), maps.Affine(generator=torch.Generator().manual_seed(1)), None])
def test_the_hessian_is_one_object_across_charts_on_both_sides(above: Any, below: Any) -> None:
    """In ψ behind a further chart, and of a θ that is seen in another chart first."""
    s = Setting(IMMERSIONS["sphere"])
    L = s.field()
    G = s.theta.metric_field(bend)
    H = geoad.hessian(L, G)(s.q)
    if above is not None:
        far = s.psi.reparametrize(above).target
        assert close(geoad.hessian(L, G)(s.q.to(far)).to(s.psi).to_dense(), H.to_dense(), 1e-9)
        assert close(geoad.riemannian_grad(L, G)(s.q.to(far)).to(s.psi).ravel(), geoad.riemannian_grad(L, G)(s.q).ravel())
    if below is not None:
        q = behind(s, below).point(s.y)
        assert close(geoad.hessian(L, G)(q).to_dense(), H.to_dense(), 1e-9)
        assert close(geoad.riemannian_grad(L, G)(q).ravel(), geoad.riemannian_grad(L, G)(s.q).ravel())


# -- geodesics and Christoffel symbols ---------------------------------------------------------------------------------


def test_geodesics_of_an_immersed_sphere_are_great_circles() -> None:
    s = Setting(IMMERSIONS["sphere"])
    G = geoad.metrics.Euclidean(s.theta)
    u = s.psi.vector(torch.tensor([0.4, 0.7]), at=s.q)
    x, velocity = s.x, s.jacobian @ u.ravel()
    speed = float(velocity.norm())
    circle = math.cos(0.8 * speed) * x + math.sin(0.8 * speed) * velocity / speed
    for chart in (s.psi, s.psi.reparametrize(maps.Softplus()).target):
        end = geoad.geodesic(G, s.q.to(chart), u.to(chart), 0.8, steps=24)
        assert end.chart == chart
        assert close(end.to(s.theta).ravel(), circle, 1e-6)
    other = behind(s, maps.Sinh())
    q = other.point(s.y)
    end = geoad.geodesic(G, q, other.vector(u.components, at=q), 0.8, steps=24)
    assert close(end.to(s.theta).ravel(), circle, 1e-6)


def test_christoffel_symbols_of_the_sphere() -> None:
    s = Setting(IMMERSIONS["sphere"])
    colatitude = float(s.y[0])
    symbols = geoad.christoffel(geoad.metrics.Euclidean(s.theta))(s.q).components
    expected = torch.zeros(2, 2, 2)
    expected[0, 1, 1] = -math.sin(colatitude) * math.cos(colatitude)
    expected[1, 0, 1] = expected[1, 1, 0] = math.cos(colatitude) / math.sin(colatitude)
    assert close(symbols, expected, 1e-10)


def test_a_curve_is_run_at_constant_speed() -> None:
    theta = geoad.Chart({"x": (2,)}, "theta")
    curve = maps.Immersion(lambda t: torch.stack([t, t.cosh()]), (), lambda x: x[0])  # arc length sinh t
    psi = theta.reparametrize(curve, "catenary").target
    q = psi.point(torch.tensor(0.0))
    u = psi.vector(torch.tensor(1.0), at=q)
    end = geoad.geodesic(geoad.metrics.Euclidean(theta), q, u, 1.5, steps=32)
    assert abs(float(end.components) - math.asinh(1.5)) < 1e-6


def test_geodesics_of_redundant_coordinates_lie_over_those_of_theta() -> None:
    theta = geoad.Chart({"w": (2, 2)}, "theta")
    G = theta.metric_field(lambda w: bend(w.flatten()))
    for recipe in (maps.WeightNorm(), maps.Factorization(2)):
        psi = theta.reparametrize(recipe, "psi").target
        q = psi.point({name: normal(5, *shape) for name, shape in psi.layout.items()})
        v = theta.vector(0.3 * normal(6, 2, 2), at=q.to(theta))
        expected = geoad.geodesic(G, theta.point(q.to(theta).components), theta.vector(v.components, at=q.to(theta)), steps=6)
        behind_too = theta.reparametrize(maps.Sinh()).target.reparametrize(recipe).target
        far = psi.reparametrize(maps.Affine(generator=torch.Generator().manual_seed(2))).target
        for start in (q, q.to(far), q.to(theta).to(behind_too)):
            end = geoad.geodesic(G, start, v.to(start.chart), steps=6)
            assert end.chart == start.chart
            assert close(end.to(theta).ravel(), expected.ravel(), 1e-9)
            if start.chart == behind_too:
                continue
            # numbers of ψ alone, not what the point remembers
            assert close(psi.point(end.to(psi).components).to(theta).ravel(), expected.ravel(), 1e-9)


# -- smooth maps of any rank -------------------------------------------------------------------------------------------


@smooth
def test_smooth_maps_push_forward_and_pull_back_and_refuse_the_rest(case: Case) -> None:
    s = Setting(case)
    u, w = s.psi.vector(s.psi.layout.unravel(normal(1, s.dim)), at=s.q), s.covector(2)
    assert close(u.to(s.theta).ravel(), s.jacobian @ u.ravel())
    assert close(w.to(s.psi).ravel(), s.jacobian.mT @ w.ravel())
    b, c = normal(3, s.d, s.d), s.spd(4, s.dim)
    assert close(s.theta.form(b, at=s.p).to(s.psi).to_dense(), s.jacobian.mT @ b @ s.jacobian)
    assert close(s.psi.cometric(c, at=s.q).to(s.theta).to_dense(), s.jacobian @ c @ s.jacobian.mT)
    pulled = torch.func.grad(lambda y: loss(case.plain(y)))(s.y)
    assert close(geoad.grad(s.field())(s.q).ravel(), pulled)
    never = [
        (s.vector(5), s.psi),
        (s.theta.cometric(s.spd(6), at=s.p), s.psi),
        (s.theta.endomorphism(normal(7, s.d, s.d), at=s.p), s.psi),
        (s.theta.metric(s.spd(6), at=s.p).logdet(), s.psi),
        (s.psi.covector(s.psi.layout.unravel(normal(8, s.dim)), at=s.q), s.theta),
        (s.psi.form(normal(9, s.dim, s.dim), at=s.q), s.theta),
        (s.psi.metric(s.spd(10, s.dim), at=s.q), s.theta),
        (s.psi.endomorphism(normal(11, s.dim, s.dim), at=s.q), s.theta),
        (s.psi.metric(s.spd(10, s.dim), at=s.q).det(), s.theta),
    ]
    for thing, chart in never:
        with refused():
            thing.to(chart)
