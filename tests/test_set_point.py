"""Moving a module to a point, and metric fields with factors that are tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import geoad


def _module() -> geoad.GeoModule:
    return geoad.GeoModule(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


@pytest.mark.parametrize("recipe", [None, geoad.maps.Asinh(), geoad.maps.Coupling()])
def test_set_point_makes_a_point_the_parameters(recipe: geoad.maps.Diffeomorphism | None) -> None:
    geo, x = _module(), torch.randn(5, 3)
    start = geo.point()
    step = geo.reference.vector(torch.randn(geo.reference.dim), at=start)
    target = start.retract(step, 0.1)
    net = geo.wrapped
    expected = torch.func.functional_call(net, target.components, (x,))
    if recipe is not None:
        geo.to(geo.reference.reparametrize(recipe).target)
    assert geo.set_point(target) is geo
    assert torch.equal(geo(x), expected)
    assert torch.equal(geo.point().to(geo.reference).ravel(), target.ravel())


def test_set_point_outside_the_domain_changes_nothing() -> None:
    geo = geoad.GeoModule(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        geo.wrapped.weight.fill_(1.0)
    p = geo.point()
    psi = geo.reference.reparametrize(geoad.maps.Log(), name="psi").target
    geo.to(psi)
    outside = p.retract(geo.reference.vector({"weight": torch.tensor([[-2.0, 0.0]])}, at=p))
    with pytest.raises(geoad.ChartDomainError):
        geo.set_point(outside)
    assert torch.equal(geo.point().to(geo.reference).ravel(), p.ravel())


def test_damping_may_be_a_tensor_that_requires_grad() -> None:
    geo, x = _module(), torch.randn(5, 3)
    fisher = geoad.curvature.Fisher(geo, x, "gaussian")
    loss = geo.loss(torch.nn.functional.mse_loss, (x, torch.randn(5, 2)))
    p = geo.point()

    def squared(damping: torch.Tensor) -> torch.Tensor:
        metric = fisher + damping * geoad.metrics.Euclidean(geo.reference)
        w = geoad.grad(loss)(p)
        return w(geoad.riemannian_grad(loss, metric)(p))

    damping = torch.tensor(0.3, requires_grad=True)
    (slope,) = torch.autograd.grad(squared(damping), damping)
    step = 1e-5
    finite = (squared(torch.tensor(0.3 + step)) - squared(torch.tensor(0.3 - step))) / (2 * step)
    assert torch.allclose(slope, finite, rtol=1e-7)


def test_a_metric_field_that_is_not_finite_says_so() -> None:
    x = geoad.Chart({"x": (2,)}, name="x")
    field = x.metric_field(lambda t: torch.diag(t.log()))
    with pytest.raises(geoad.GeometryError, match="not finite"):
        field(x.point(torch.tensor([-1.0, 2.0])))


def test_gradient_of_a_pullback_that_learns_its_chart_from_the_point() -> None:
    x = geoad.Chart({"x": (2,)}, name="x")
    psi = x.reparametrize(geoad.maps.Asinh(), name="psi").target
    field = geoad.metrics.Pullback(lambda t: torch.stack([t[0] ** 3, t.sum()]), geoad.metrics.Euclidean(geoad.Chart((2,))))
    height = x.scalar_field(lambda t: t[0] * t[1])
    p = x.point(torch.tensor([1.0, 2.0]))
    jacobian = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    expected = torch.linalg.solve(jacobian.mT @ jacobian, torch.tensor([2.0, 1.0]))
    found = geoad.riemannian_grad(height, field)(p.to(psi)).to(x)
    assert torch.allclose(found.components, expected, rtol=1e-12)
