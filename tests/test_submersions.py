"""Redundant coordinates: every law of a submersion against dense linear algebra on plain functions."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from map_cases import SUBMERSIONS, Case, Setting, close, dense, loss, normal, null_space, refused
from torch import Tensor, nn

import geoad
from geoad import maps
from geoad.errors import ChartDomainError, GeometryError, NotADiffeomorphismError, SingularMetricError

cases = pytest.mark.parametrize("case", SUBMERSIONS.values(), ids=SUBMERSIONS.keys())


# -- the map and its four products -----------------------------------------------------------------------------------------


@cases
def test_the_map_is_the_plain_function(case: Case) -> None:
    s = Setting(case)
    assert s.map.law == "submersion" == s.phi.map.law
    assert s.psi.dim == case.dim > s.theta.dim
    assert close(s.p.ravel(), s.x, 1e-14)


@cases
def test_products_are_those_of_the_dense_jacobian_and_its_horizontal_inverse(case: Case) -> None:
    s = Setting(case)
    assert close(s.matrix(s.map.push_inverse, s.psi, s.theta), s.jacobian)
    assert close(s.matrix(s.map.pull_inverse, s.theta, s.psi), s.jacobian.mT)
    lift = s.matrix(s.map.push, s.theta, s.psi)
    assert close(lift, s.lift)
    assert close(s.matrix(s.map.pull, s.psi, s.theta), lift.mT)


@cases
def test_lifts_are_horizontal(case: Case) -> None:
    s = Setting(case)
    lift = s.matrix(s.map.push, s.theta, s.psi)
    vertical = null_space(s.jacobian)
    assert vertical.shape[1] == s.dim - s.d
    assert close(s.jacobian @ lift, torch.eye(s.d))
    assert float((vertical.mT @ s.mass @ lift).abs().max()) < 1e-9 * float(lift.abs().max())


@cases
def test_sections_lie_over_their_points(case: Case) -> None:
    s = Setting(case)
    section = s.theta.point(s.p.components).to(s.psi)
    assert close(case.plain(section.ravel()), s.x, 1e-13)
    assert close(s.psi.point(section.components).to(s.theta).ravel(), s.x, 1e-13)


@cases
def test_the_derivative_of_the_lift(case: Case) -> None:
    """Second derivatives go through the lift: of its closed forms as of least squares."""
    s = Setting(case)
    u, direction = s.theta.layout.unravel(normal(5, s.d)), normal(6, s.dim)

    def lifted(y: Tensor) -> Tensor:
        blocks = s.psi.layout.unravel(y)
        return s.psi.layout.ravel(s.map.push(s.map.invert(blocks), blocks, u))

    found = torch.func.jvp(lifted, (s.y,), (direction,))[1]
    expected = torch.func.jvp(lambda y: case.lift(y) @ normal(5, s.d), (s.y,), (direction,))[1]
    assert close(found, expected, 1e-8)


@cases
def test_batches_are_loops(case: Case) -> None:
    s = Setting(case)
    ys = torch.stack([case.numbers(seed) for seed in range(3)])
    many = s.psi.point(s.psi.layout.unravel(ys))
    xs = many.to(s.theta)
    v = s.theta.vector(s.theta.layout.unravel(normal(3, 3, s.d)), at=xs)
    lifted = v.to(s.psi).ravel()
    assert close(xs.ravel(), torch.stack([case.plain(y) for y in ys]), 1e-13)
    assert close(lifted, torch.stack([case.lift(y) @ u for y, u in zip(ys, normal(3, 3, s.d), strict=True)]), 1e-9)


@cases
def test_single_precision(case: Case) -> None:
    s = Setting(case)
    q = s.psi.point(s.psi.layout.unravel(s.y.float()))
    p = q.to(s.theta)
    assert p.dtype == torch.float32 and all(block.dtype == torch.float32 for block in p.blocks.values())
    assert close(p.ravel().double(), s.x, 1e-5)


@cases
def test_copies_are_the_same_map(case: Case) -> None:
    s = Setting(case)
    assert torch.equal(copy.deepcopy(s.map).invert(s.q.blocks)[s.theta.layout.names[0]], s.p.blocks[s.theta.layout.names[0]])


def test_maps_of_module_functions_are_pickled() -> None:
    for recipe in (maps.WeightNorm(1), maps.Factorization(2), maps.Factorization(1)):
        theta = geoad.Chart({"w": (2, 3)}, "theta")
        bound = theta.reparametrize(recipe).map
        y = {name: normal(1, *shape) for name, shape in bound.image_shapes.items()}
        assert torch.equal(pickle.loads(pickle.dumps(bound)).invert(y)["w"], bound.invert(y)["w"])


# -- points ----------------------------------------------------------------------------------------------------------------


@cases
def test_retraction_is_exact_and_stays_in_the_fibre(case: Case) -> None:
    s = Setting(case)
    v = 0.1 * s.vector(1)
    assert s.q.retract(v.to(s.psi), 0) is s.q
    end = s.q.retract(v.to(s.psi))
    assert end.chart == s.psi
    assert close(case.plain(end.ravel()), s.x + v.ravel() if s.theta is s.psi.ground else s.x, 1e-13)
    assert close(end.to(s.theta).ravel(), s.x + v.ravel(), 1e-13)
    still = s.psi.point(s.q.components)
    standing = still.retract(0.0 * v.to(s.psi)).ravel()
    assert close(standing, s.y, 1e-13)


@cases
def test_retraction_follows_the_horizontal_lift(case: Case) -> None:
    """To first order: the tangent of the curve in ψ is the lift of the tangent in θ."""
    s = Setting(case)
    v, h = s.vector(2), 1e-4
    lifted = s.lift @ v.ravel()
    forth, back = (s.q.retract(v.to(s.psi), sign * h).ravel() for sign in (1, -1))
    assert close((forth - back) / (2 * h), lifted, 1e-4)


def test_weight_norm_keeps_the_norm_of_v_and_the_sign_of_g() -> None:
    theta = geoad.Chart({"w": (3, 4)}, "theta")
    psi = theta.reparametrize(maps.WeightNorm()).target
    q = psi.point({"w_g": torch.tensor([[1.0], [-2.0], [0.5]]), "w_v": normal(1, 3, 4)})
    v = theta.vector(0.3 * normal(2, 3, 4), at=q.to(theta)).to(psi)
    for t in (0.5, 1.0, 2.0):
        end = q.retract(v, t)
        assert close(end.components["w_v"].norm(dim=1), q.components["w_v"].norm(dim=1), 1e-14)
        assert torch.equal(end.components["w_g"].sign(), q.components["w_g"].sign())
        assert close(end.to(theta).components, q.to(theta).components + t * v.to(theta).components, 1e-14)


def test_weight_norm_is_that_of_torch() -> None:
    for dim in (0, 1, None):
        layer = nn.Linear(4, 3)
        theta = geoad.Chart({"weight": (3, 4)}, "theta")
        q = theta.point(layer.weight.detach()).to(theta.reparametrize(maps.WeightNorm(dim)).target)
        nn.utils.parametrizations.weight_norm(layer, dim=dim)
        g, v = (each.detach() for each in layer.parametrizations.weight.parameters())
        assert close(q.components["weight_g"], g, 1e-14) and torch.equal(q.components["weight_v"], v)
        assert q.components["weight_g"].shape == g.shape


def test_long_steps_of_factors_are_exact() -> None:
    theta = geoad.Chart({"w": (6, 5)}, "theta")
    for rank in (5, 6, 8):
        psi = theta.reparametrize(maps.Factorization(rank)).target
        q = psi.point({"w_u": normal(1, 6, rank), "w_v": normal(2, rank, 5)})
        v = theta.vector(10 * normal(3, 6, 5), at=q.to(theta)).to(psi)
        end = q.retract(v)
        u, w = end.components["w_u"], end.components["w_v"]
        assert close(u @ w, q.to(theta).components + v.to(theta).components, 1e-12)


@pytest.mark.parametrize("turned", [False, True])
def test_factors_of_which_one_is_singular_are_followed_by_the_other(turned: bool) -> None:
    """With U = e eᵀ and V = 1 this step leads to a singular U, in whose range the rest of W does not lie."""
    theta = geoad.Chart({"w": (2, 2)}, "theta")
    psi = theta.reparametrize(maps.Factorization(2)).target
    singular, step = torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    factors = {"w_u": torch.eye(2), "w_v": singular} if turned else {"w_u": singular, "w_v": torch.eye(2)}
    q = psi.point(factors)
    v = theta.vector(step.mT if turned else step, at=q.to(theta)).to(psi)
    moved = v.components["w_v" if turned else "w_u"] + singular
    assert abs(float(torch.linalg.det(moved))) < 1e-12
    end = q.retract(v).components
    assert close(end["w_u"] @ end["w_v"], singular + (step.mT if turned else step), 1e-14)


def test_factorization_follows_in_batches_and_compiled_transforms() -> None:
    theta = geoad.Chart({"w": (3, 3)}, "theta")
    psi = theta.reparametrize(maps.Factorization(3)).target
    q = psi.point({"w_u": normal(1, 3, 3), "w_v": normal(2, 3, 3)})
    v = theta.vector(0.2 * normal(3, 3, 3), at=q.to(theta)).to(psi)
    times = torch.tensor([0.5, 1.0])
    ends = q.retract(v, times)
    for i, t in enumerate(times):
        assert close(ends[i].ravel(), q.retract(v, float(t)).ravel(), 1e-12)


@pytest.mark.parametrize(("rank", "u", "v"), [(3, (6, 3), (3, 3)), (3, (3, 3), (3, 6)), (4, (3, 4), (4, 2))])
def test_sections_of_factorizations_are_linear(rank: int, u: tuple[int, int], v: tuple[int, int]) -> None:
    theta = geoad.Chart({"w": (u[0], v[1])}, "theta")
    psi = theta.reparametrize(maps.Factorization(rank), "uv").target
    zero = theta.point(torch.zeros(u[0], v[1])).to(psi)
    assert zero.components["w_u"].shape == u and zero.components["w_v"].shape == v
    w = normal(1, u[0], v[1])
    section = theta.point(w).to(psi).components
    assert torch.equal(section["w_u"] @ section["w_v"], w)


def test_zero_rows_and_deficient_factors_are_outside_of_the_domain() -> None:
    theta = geoad.Chart({"w": (2, 3)}, "theta")
    gv = theta.reparametrize(maps.WeightNorm(), "gv").target
    with pytest.raises(ChartDomainError, match=r"'gv'.*block 'w'.*zero row"):
        theta.point(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])).to(gv)
    with pytest.raises(ChartDomainError, match="v ≠ 0"):
        gv.point({"w_g": torch.ones(2, 1), "w_v": torch.zeros(2, 3)})
    with pytest.raises(ChartDomainError, match="g ≠ 0"):
        gv.point({"w_g": torch.zeros(2, 1), "w_v": torch.ones(2, 3)})
    uv = theta.reparametrize(maps.Factorization(2), "uv").target
    with pytest.raises(ChartDomainError, match=r"'uv'.*block 'w'.*U of rank 2 or V of rank 3"):
        uv.point({"w_u": torch.ones(2, 2), "w_v": torch.ones(2, 3)})
    with pytest.raises(ChartDomainError):
        uv.point({"w_u": torch.zeros(2, 2), "w_v": torch.zeros(2, 3)})
    assert uv.point({"w_u": torch.eye(2), "w_v": torch.zeros(2, 3)}).to(theta).components.abs().max() == 0


def test_a_map_that_is_no_submersion_at_the_point_says_so() -> None:
    theta = geoad.Chart({"x": (1,)}, "theta")
    psi = theta.reparametrize(maps.Submersion(lambda y: (y * y).sum().reshape(1), lambda x: x.sqrt().expand(2), (2,))).target
    q = psi.point(torch.zeros(2))
    with pytest.raises(ChartDomainError, match="no submersion at this point"):
        theta.vector(torch.ones(1), at=q.to(theta)).to(psi)


def test_bad_recipes_are_refused() -> None:
    theta = geoad.Chart({"w": (2, 3), "b": (2,)}, "theta")
    for rank in (0, -1, 2.0, True, None):
        with pytest.raises(GeometryError, match="rank of at least 1"):
            maps.Factorization(rank)  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match=r"shape \(2,\).*name pattern"):
        theta.reparametrize(maps.Factorization(2))
    with pytest.raises(GeometryError, match=r"names the parts \['u'\]"):
        theta.reparametrize({"w": maps.Factorization(2, metric={"u": 1.0})})
    with pytest.raises(GeometryError, match="positive"):
        theta.reparametrize({"w": maps.Factorization(2, metric={"u": 1.0, "v": 0.0})})
    with pytest.raises(GeometryError, match="bound to the blocks"):
        theta.reparametrize({"w": theta.reparametrize({"w": maps.Factorization(2)}).map})
    with pytest.raises(GeometryError, match="maps one block at a time"):
        from geoad.params import Layout

        maps.Factorization(2).bind(Layout({"a": (2, 2), "b": (2, 2)}))


# -- the law table -----------------------------------------------------------------------------------------------------------


@cases
def test_vectors(case: Case) -> None:
    s = Setting(case)
    v = s.vector(1)
    assert close(v.to(s.psi).ravel(), s.lift @ v.ravel())
    assert close(v.to(s.psi).to(s.theta).ravel(), v.ravel())
    u = s.psi.vector(s.psi.layout.unravel(normal(2, s.dim)), at=s.q)
    assert close(u.to(s.theta).ravel(), s.jacobian @ u.ravel())


@cases
def test_covectors(case: Case) -> None:
    s = Setting(case)
    w = s.covector(1)
    assert close(w.to(s.psi).ravel(), s.jacobian.mT @ w.ravel())
    basic = s.psi.covector(s.psi.layout.unravel(s.jacobian.mT @ w.ravel()), at=s.q)
    assert close(basic.to(s.theta).ravel(), w.ravel())
    other = s.psi.covector(s.psi.layout.unravel(normal(2, s.dim)), at=s.q)
    with refused(".*not basic"):
        other.to(s.theta)
    assert close(w.to(s.psi)(s.vector(2).to(s.psi)), w(s.vector(2)))


@cases
def test_forms(case: Case) -> None:
    s = Setting(case)
    for matrix in (normal(1, s.d, s.d), s.spd(2)):
        form = s.theta.form(matrix, at=s.p)
        moved = form.to(s.psi)
        assert close(moved.to_dense(), s.jacobian.mT @ matrix @ s.jacobian)
        assert close(moved.to(s.theta).to_dense(), matrix)
        u = s.psi.vector(s.psi.layout.unravel(normal(3, s.dim)), at=s.q)
        assert close(moved.mv(u).ravel(), s.jacobian.mT @ matrix @ s.jacobian @ u.ravel())
        basic = s.psi.form(s.jacobian.mT @ matrix @ s.jacobian, at=s.q)
        assert close(basic.to(s.theta).to_dense(), matrix, 1e-8)
    with refused(".*not basic"):
        s.psi.form(s.spd(4, s.dim), at=s.q).to(s.theta)


@cases
def test_metrics_are_semidefinite_and_used_through_the_horizontal_space(case: Case) -> None:
    s = Setting(case)
    matrix = s.spd(1)
    G, w = s.theta.metric(matrix, at=s.p), s.covector(2)
    moved = G.to(s.psi)
    assert isinstance(moved, geoad.HorizontalMetric)
    dense = moved.to_dense()
    spectrum = torch.linalg.eigvalsh(0.5 * (dense + dense.mT))
    assert int((spectrum.abs() < 1e-10 * spectrum[-1]).sum()) == s.dim - s.d and bool((spectrum > -1e-10 * spectrum[-1]).all())
    sharp = moved.sharp(w.to(s.psi))
    assert close(sharp.ravel(), s.lift @ torch.linalg.solve(matrix, w.ravel()), 1e-9)
    if case.total is None:
        pinv = torch.linalg.pinv(dense, rtol=1e-10, hermitian=True)
        assert close(sharp.ravel(), pinv @ s.jacobian.mT @ w.ravel(), 1e-7)
    assert close(moved.norm(w.to(s.psi)), G.norm(w)) and close(moved.norm(s.vector(3).to(s.psi)), G.norm(s.vector(3)))
    assert isinstance(moved.to(s.theta), geoad.Metric)
    damped = moved.sharp(w.to(s.psi), damping=0.3)
    expected = torch.linalg.solve(matrix + 0.3 * torch.eye(s.d), w.ravel())
    assert close(damped.to(s.theta).ravel(), expected)


@cases
def test_cometrics(case: Case) -> None:
    s = Setting(case)
    C = s.theta.cometric(s.spd(1), at=s.p)
    assert close(C.to(s.psi).to_dense(), s.lift @ s.spd(1) @ s.lift.mT, 1e-9)
    total = s.psi.cometric(s.spd(2, s.dim), at=s.q)
    assert close(total.to(s.theta).to_dense(), s.jacobian @ s.spd(2, s.dim) @ s.jacobian.mT)


@cases
def test_endomorphisms(case: Case) -> None:
    s = Setting(case)
    matrix = normal(1, s.d, s.d)
    E = s.theta.endomorphism(matrix, at=s.p)
    moved = E.to(s.psi)
    assert close(moved.to_dense(), s.lift @ matrix @ s.jacobian)
    assert close(moved.trace(), torch.trace(matrix))
    found = moved.eigenvalues()
    assert int((found.abs() < 1e-9).sum()) == s.dim - s.d
    kept = found[found.abs() >= 1e-9]
    expected = torch.linalg.eigvals(matrix)
    apart = (kept[:, None] - expected[None, :]).abs().amin(0)
    assert float(apart.max()) < 1e-9
    for what in ("det", "logdet", "slogdet", "inverse"):
        with pytest.raises(NotADiffeomorphismError, match="redundant"):
            getattr(moved, what)()
    basic = s.psi.endomorphism(s.lift @ matrix @ s.jacobian, at=s.q)
    assert close(basic.to(s.theta).to_dense(), matrix, 1e-9)


@cases
def test_an_endomorphism_of_psi_goes_to_theta_if_it_keeps_the_vertical_space(case: Case) -> None:
    s = Setting(case)
    vertical = null_space(s.jacobian)
    into = vertical @ normal(1, s.dim - s.d, s.dim)  # anything that ends in the vertical space
    matrix = normal(2, s.d, s.d)
    keeps = s.psi.endomorphism(s.lift @ matrix @ s.jacobian + into, at=s.q)
    assert close(keeps.to(s.theta).to_dense(), matrix, 1e-8)
    with refused():
        s.psi.endomorphism(normal(3, s.dim, s.dim), at=s.q).to(s.theta)


@cases
def test_tensors_of_more_indices(case: Case) -> None:
    s = Setting(case)
    u, v, w = s.vector(1), s.covector(2), s.covector(3)
    cube = torch.einsum("i,j,k->ijk", u, v, w)
    moved = cube.to(s.psi)
    expected = torch.einsum("i,j,k->ijk", s.lift @ u.ravel(), s.jacobian.mT @ v.ravel(), s.jacobian.mT @ w.ravel())
    assert close(dense(moved), expected, 1e-9)


@cases
def test_densities_have_no_law(case: Case) -> None:
    s = Setting(case)
    here = s.theta.metric(s.spd(1), at=s.p)
    there = s.psi.metric(s.spd(2, s.dim), at=s.q)
    for density in (here.det(), here.logdet(), here.det() ** 0.5):
        with refused(".*determinant"):
            density.to(s.psi)
    for density in (there.det(), there.logdet()):
        with refused(".*determinant"):
            density.to(s.theta)
    with pytest.raises(NotADiffeomorphismError, match="quotient_logdet"):
        here.to(s.psi).logdet()


@cases
def test_quotient_logdet(case: Case) -> None:
    s = Setting(case)
    b, g = s.spd(1), s.spd(2)
    B, G = s.theta.form(b, at=s.p), s.theta.metric(g, at=s.p)
    q = torch.linalg.qr(s.lift).Q @ normal(3, s.d, s.d)  # any basis of the horizontal space
    pulled = [q.mT @ s.jacobian.mT @ each @ s.jacobian @ q for each in (b, g)]
    expected = torch.linalg.slogdet(pulled[0])[1] - torch.linalg.slogdet(pulled[1])[1]
    assert close(geoad.quotient_logdet(B.to(s.psi), G.to(s.psi)), expected, 1e-8)
    assert close(geoad.quotient_logdet(G.inverse().to(s.psi) @ B.to(s.psi)), expected, 1e-8)
    assert close(geoad.quotient_logdet(B, G), expected, 1e-8)
    with pytest.raises(NotADiffeomorphismError):
        geoad.quotient_logdet(s.psi.form(s.spd(4, s.dim), at=s.q), G.to(s.psi))


# -- fields --------------------------------------------------------------------------------------------------------------------


@cases
def test_functions_and_their_derivatives(case: Case) -> None:
    s = Setting(case)
    L = s.field()
    pulled = lambda y: loss(case.plain(y))  # noqa: E731
    assert close(L(s.q), pulled(s.y)) and close(L.to(s.psi)(s.q), pulled(s.y))
    assert close(geoad.grad(L)(s.q).ravel(), torch.func.grad(pulled)(s.y))
    gradient = torch.func.grad(loss)(s.x)
    assert close(geoad.riemannian_grad(L)(s.q).ravel(), s.lift @ gradient, 1e-9)
    hessian = torch.func.hessian(loss)(s.x)
    assert close(geoad.hessian(L)(s.q).to_dense(), s.jacobian.mT @ hessian @ s.jacobian, 1e-9)


@cases
def test_functions_of_psi_are_functions_of_theta_only_if_basic(case: Case) -> None:
    s = Setting(case)
    total = s.psi.scalar_field(lambda y: loss(s.psi.layout.ravel(s.psi.pack(y))))
    assert close(total(s.q), loss(s.y))
    for ask in (lambda: total(s.p), lambda: total.to(s.theta)(s.p), lambda: geoad.grad(total)(s.p)):
        with refused(".*not basic"):
            ask()
    basic = s.psi.scalar_field(lambda y: loss(case.plain(s.psi.layout.ravel(s.psi.pack(y)))))
    assert close(basic(s.p), loss(s.x))
    assert close(geoad.grad(basic)(s.p).ravel(), torch.func.grad(loss)(s.x), 1e-8)
    with refused(".*not basic"):
        geoad.metrics.Euclidean(s.psi)(s.p)


@cases
def test_metric_fields(case: Case) -> None:
    s = Setting(case)
    field = geoad.metrics.Euclidean(s.theta)
    assert close(field(s.q).to_dense(), s.jacobian.mT @ s.jacobian)
    assert close(field.to(s.psi)(s.q).sharp(s.covector(1).to(s.psi)).ravel(), s.lift @ s.covector(1).ravel(), 1e-9)
    own = geoad.metrics.Euclidean(s.psi)
    assert close(own(s.q).to_dense(), torch.eye(s.dim))


def test_gradient_flow_in_redundant_coordinates_is_that_of_theta() -> None:
    for case in (SUBMERSIONS["weight norm"], SUBMERSIONS["factors, square"], SUBMERSIONS["a diffeomorphism above"]):
        s = Setting(case)
        L = s.field()
        ours, reference = s.q, s.theta.point(s.p.components)
        for _ in range(10):
            ours = ours.retract(geoad.riemannian_grad(L)(ours), -0.02)
            reference = reference.retract(geoad.riemannian_grad(L)(reference), -0.02)
        assert close(ours.to(s.theta).ravel(), reference.ravel(), 1e-12)
        assert close(case.plain(ours.ravel()), reference.ravel(), 1e-12)


def test_semidefinite_metrics_of_psi_are_not_inverted() -> None:
    s = Setting(SUBMERSIONS["weight norm"])
    with pytest.raises(SingularMetricError):
        s.psi.metric(s.jacobian.mT @ s.jacobian, at=s.q)
