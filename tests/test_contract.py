"""The forms that the public names are called in: those of torch.func, several times at once, sums of fields, batches."""

import pytest
import torch

import geoad


@pytest.fixture
def plane():
    torch.manual_seed(0)
    theta = geoad.Chart({"w": (3, 2), "b": (3,), "s": ()}, name="theta")
    psi = theta.reparametrize(geoad.maps.Sinh(), name="psi").target
    p = theta.point({"w": torch.randn(3, 2).double(), "b": torch.randn(3).double(), "s": torch.tensor(0.4).double()})
    return theta, psi, p, torch.randn(5, 2).double()


def forward(weights, x, power=1):
    return torch.tanh(x @ weights["w"].mT + weights["b"]) * weights["s"] ** power


@pytest.mark.parametrize("name", ["jacobian", "jacrev", "jacfwd"])
def test_jacobians_take_the_forms_of_torch_func(plane, name):
    theta, psi, p, x = plane
    jacobian, q = getattr(geoad, name), p.to(psi)
    plain = torch.func.jacrev(lambda w: forward(theta.layout.unravel(w), x, power=2).flatten())(p.ravel())
    torch.testing.assert_close(jacobian(forward)(q, x, power=2).to(theta).to_dense(), plain)
    torch.testing.assert_close(jacobian(lambda x, w: forward(w, x, 2), argnums=-1)(x, q).to(theta).to_dense(), plain)
    value, aux = jacobian(lambda w, x: (forward(w, x, 2), w["s"]), has_aux=True)(q, x)
    torch.testing.assert_close(value.to(theta).to_dense(), plain)
    torch.testing.assert_close(aux, p.components["s"])
    first, second = jacobian(forward, argnums=(0, 1))(q, x, power=2)
    torch.testing.assert_close(first.to(theta).to_dense(), plain)
    torch.testing.assert_close(second.to_dense(), torch.func.jacrev(lambda x: forward(p.components, x, 2))(x).reshape(15, 10))
    with pytest.raises(geoad.GeometryError, match="different charts or spaces"):
        torch.einsum("ai,bi->ab", first, second)


def test_riemannian_grad_passes_arguments_on(plane):
    theta, psi, p, x = plane
    metric = geoad.metrics.Diagonal(theta, 2.0)
    step = geoad.riemannian_grad(lambda w, x: forward(w, x).sum(), metric)(p.to(psi), x).to(theta)
    slope = torch.func.grad(lambda w: forward(theta.layout.unravel(w), x).sum())(p.ravel())
    torch.testing.assert_close(step.ravel(), slope / 2)


def test_jvp_with_aux(plane):
    theta, psi, p, x = plane
    v = theta.vector(torch.ones(10).double(), at=p).to(psi)
    value, slope, aux = geoad.jvp(lambda w: (forward(w, x), w["s"]), (p.to(psi),), (v,), has_aux=True)
    expected = geoad.jvp(lambda w: forward(w, x), (p,), (v.to(theta),))
    torch.testing.assert_close((value, slope), expected)
    torch.testing.assert_close(aux, p.components["s"])
    with pytest.raises(geoad.GeometryError, match="tuples of primals"):
        geoad.jvp(forward, p, v)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_times_are_a_batch_of_points(plane, count):
    theta, psi, p, _ = plane
    other = theta.point({name: block + 1 for name, block in p.components.items()})
    times = torch.linspace(0, 1, count, dtype=torch.float64)
    xy = geoad.Chart({"x": (2,)}, name="xy")
    a, b = xy.point(torch.zeros(2)), xy.point(torch.ones(2))
    assert geoad.interpolate(a, b, times).ravel().shape == (count, 2)  # with two times as well, which fit the coordinates
    for line in (lambda t: geoad.interpolate(p.to(psi), other, t), lambda t: p.to(psi).retract(p.log(other).to(psi), t)):
        points = line(times)
        assert points.batch_shape == (count,)
        for i, t in enumerate(times):
            torch.testing.assert_close(points[i].ravel(), line(t).ravel())


def test_fields_start_a_sum_and_stand_below_a_fraction():
    xy = geoad.Chart({"x": (2,)}, name="xy")
    p, h, G = xy.point(torch.tensor([1.0, 2.0])), xy.scalar_field(lambda x: (x**2).sum()), geoad.metrics.Euclidean(xy)
    assert sum([h, h])(p) == 10
    assert (2 / h)(p) == 0.4
    torch.testing.assert_close(sum([G, 2 * G])(p).to_dense(), 3 * torch.eye(2))
    assert (h.type, G.type, G(p).type) == ((0, 0), (0, 2), (0, 2))
    with pytest.raises(geoad.VarianceError, match="Euclidean"):
        1e-3 + G


def test_no_matrix_of_a_large_chart_is_made_on_the_way():
    chart = geoad.Chart({"x": (300_000,)}, name="large")
    p = chart.point(torch.zeros(300_000))
    v, w = chart.vector(torch.ones(300_000), at=p), chart.covector(torch.ones(300_000), at=p)
    with pytest.raises(geoad.GeometryError, match="not made behind your back"):
        torch.outer(v, v)
    torch.testing.assert_close(torch.einsum("i,j,j->i", v, w, v).ravel(), torch.full((300_000,), 300_000.0))


def test_a_recipe_that_is_no_map_says_what_to_pass():
    xy = geoad.Chart({"x": (2,)}, name="xy")
    for wrong in (geoad.maps.Softplus, torch.tanh, [geoad.maps.Softplus()]):
        with pytest.raises(geoad.GeometryError, match=r"geoad\.maps\.Softplus\(\)"):
            xy.reparametrize(wrong)


def test_a_pullback_learns_its_chart_from_what_it_is_added_to(plane):
    theta, psi, p, x = plane
    out = geoad.Chart((5, 3), name="out")
    pulled = geoad.metrics.Pullback(lambda w: forward(w, x), geoad.metrics.Euclidean(out))
    jacobian = geoad.jacobian(forward)(p, x).to_dense()
    expected = 0.5 * jacobian.mT @ jacobian + 1e-3 * torch.eye(10).double()
    ridge = 1e-3 * geoad.metrics.Euclidean(psi)
    for field in (0.5 * pulled + 1e-3 * geoad.metrics.Euclidean(theta), 1e-3 * geoad.metrics.Euclidean(theta) + pulled / 2):
        torch.testing.assert_close(field(p.to(psi)).to(theta).to_dense(), expected)
        assert field.definite
    torch.testing.assert_close((pulled - ridge)(p).to_dense(), pulled(p).to_dense() - ridge(p).to_dense())
    with pytest.raises(geoad.GeometryError, match=r"chart=geo\.reference"):
        pulled + pulled


@pytest.mark.parametrize("curved", [False, True])
def test_hessians_at_a_batch_of_points(plane, curved):
    theta, psi, p, x = plane
    L = theta.scalar_field(lambda w: (forward(w, x) ** 2).sum())
    metric = theta.metric_field(lambda w: torch.diag(1 + theta.layout.ravel(w) ** 2)) if curved else None
    other = theta.point({name: block + 0.3 for name, block in p.components.items()})
    batch = geoad.interpolate(p, other, torch.tensor([0.0, 0.4, 1.0])).to(psi)
    H, G = geoad.hessian(L, metric)(batch), geoad.metrics.Euclidean(theta)(batch)
    trace, values = (G.inverse() @ H).trace(), (G.inverse() @ H).eigenvalues()
    for i in range(3):
        one = geoad.hessian(L, metric)(batch[i])
        torch.testing.assert_close(H.to_dense()[i], one.to_dense())
        torch.testing.assert_close(trace[i], G[i].trace(one))
        torch.testing.assert_close(values[i], (G[i].inverse() @ one).eigenvalues())


@pytest.mark.parametrize("shapes", [{"x": 2}, {"x": (-1,)}, {"x": ("a",)}])
def test_shapes_that_are_none(shapes):
    with pytest.raises(geoad.GeometryError, match="shape"):
        geoad.Chart(shapes)
