"""Misuse: every row is a mistake that people make. It must raise the right class, and the message must name the remedy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import geoad
from geoad import maps
from geoad import operators as ops
from geoad.errors import (
    BasePointError,
    ChartDomainError,
    ChartMismatchError,
    GeometryError,
    SingularMetricError,
    VarianceError,
)
from geoad.metrics import Constant, Diagonal, Euclidean

torch.manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


x = geoad.Chart({"x": (3,)}, name="x")
psi = x.reparametrize(maps.Asinh(), name="psi").target
y = geoad.Chart({"x": (3,)}, name="y")
p, q = x.point(rand(3)), x.point(rand(3))
A = rand(3, 3)
SPD = A @ A.mT + torch.eye(3, dtype=torch.float64)
v, u, w = x.vector(rand(3), at=p), x.vector(rand(3), at=p), x.covector(rand(3), at=p)
G, H, E = x.metric(SPD, at=p), x.form(A + A.mT, at=p), x.endomorphism(A, at=p)
rank_one = geoad.Metric(x, ops.Dense(x.layout, torch.outer(A[0], A[0]), symmetric=True), p)
field = x.scalar_field(lambda c: (c**2).sum())
rho = G.det().sqrt()
data = (rand(8, 4), torch.randint(3, (8,)))


def double(module: nn.Module) -> nn.Module:
    return module.to(torch.float64)


geo = geoad.GeoModule(double(nn.Linear(4, 3)))
theta = geo.reference
loss = geo.loss(F.cross_entropy, data)
fisher = geoad.curvature.Fisher(geo, data, "categorical")


net_in_psi = double(nn.Sequential(nn.Linear(4, 3)))
geo_in_psi = geoad.GeoModule(net_in_psi)
geo_in_psi.to(geo_in_psi.reference.reparametrize(maps.Sinh(), name="psi").target)
narrow = geoad.GeoModule(double(nn.Linear(4, 1)))
bound = maps.Exp().bind(x.layout)


def stale() -> Any:
    phi = x.reparametrize(maps.Scale(2.0, learnable=True), name="learnt")
    old = phi.target.vector(rand(3), at=p.to(phi.target))
    with torch.no_grad():
        next(phi.parameters()).add_(1.0)
    return old.to(x)


def outside(recipe: Any, numbers: list[float], backward: bool = False) -> Any:
    chart = geoad.Chart({"x": (len(numbers),)}, name="x").reparametrize(recipe, name="psi").target
    components = torch.tensor(numbers, dtype=torch.float64)
    return chart.point(components) if backward else chart.reference.point(components).to(chart)


def step_sgd() -> None:
    parameter = rand(3).requires_grad_()
    with torch.no_grad():
        parameter -= 0.1 * w  # pyright: ignore


def set_attribute(thing: Any, name: str) -> None:
    setattr(thing, name, 0)


def delete_attribute(thing: Any, name: str) -> None:
    delattr(thing, name)


class Case(NamedTuple):
    name: str
    call: Callable[[], Any]
    error: type[BaseException]
    remedy: str


CASES = [
    # sums
    Case("vector + covector", lambda: v + w, VarianceError, "metric.sharp(covector)"),
    Case("different charts", lambda: v + v.to(psi), ChartMismatchError, ".to(first.chart)"),
    Case("different points", lambda: v + x.vector(rand(3), at=q), BasePointError, "T.carry(to=p, chart=reference)"),
    Case("different manifolds", lambda: v + y.vector(rand(3), at=y.point(rand(3))), ChartMismatchError, "same reference chart"),
    Case("damping with a number", lambda: G + 1e-3, VarianceError, "geoad.metrics.Euclidean(chart)(p)"),
    Case("damping with eye", lambda: G + 1e-3 * torch.eye(3).double(), VarianceError, "geoad.metrics.Euclidean(chart)(p)"),
    Case("damping a field with a number", lambda: fisher + 1e-3, VarianceError, "geoad.metrics.Euclidean(chart)"),
    Case("endomorphism plus transpose", lambda: E + E.mT, VarianceError, ".components"),
    Case("plain numbers into a sum", lambda: v + v.components, VarianceError, "chart.vector(x, at=p)"),
    Case("numpy array into a sum", lambda: np.ones(3) + v, VarianceError, "chart.vector(x, at=p)"),
    Case("densities of unequal weight", lambda: rho + rho * rho, VarianceError, "evens out the weights"),
    Case("sum over a batch of points", lambda: x.vector(rand(2, 3), at=x.point(rand(2, 3))).mean(), BasePointError, "T.carry("),
    # multiples
    Case("elementwise product", lambda: v * v, VarianceError, "torch.outer"),
    Case("product of log-densities", lambda: G.logdet() * G.logdet(), VarianceError, "Pass a float"),
    Case("divide by a vector", lambda: w / v, VarianceError, "G.solve(w)"),
    Case("power of a vector", lambda: v**2, VarianceError, ".components"),
    Case("comparing densities", lambda: rho < rho * rho, VarianceError, "evens out the weights"),
    Case("comparing vectors", lambda: v == u, VarianceError, "torch.allclose(v, w)"),
    # contractions
    Case("pairing of two vectors", lambda: v(u), VarianceError, "G(u, v)"),
    Case("metric on a covector", lambda: G.mv(w), VarianceError, "metric.sharp"),
    Case("form on plain numbers", lambda: G @ v.components, VarianceError, "chart.vector(x, at=p)"),
    Case("einsum over equal variances", lambda: torch.einsum("i,i->", v, u), VarianceError, "Insert a metric?"),
    Case("einsum with plain numbers", lambda: torch.einsum("i,i->", v, rand(3)), VarianceError, "chart.covector(x, at=p)"),
    Case("einsum over one axis", lambda: torch.einsum("i->", v), VarianceError, "opposite variance"),
    Case("einsum diagonal", lambda: torch.einsum("ii->i", E), VarianceError, ".components"),
    Case("einsum across charts", lambda: torch.einsum("ij,jk->ik", E, G.inverse().to(psi)), ChartMismatchError, ".to(chart)"),
    Case("einsum across points", lambda: torch.einsum("i,j->ij", v, x.vector(rand(3), at=q)), BasePointError, "T.carry("),
    Case("solve with a vector on the right", lambda: G.solve(v), VarianceError, "B.mv(v)"),  # pyright: ignore
    # invariants that need a metric
    Case("trace of a Hessian", lambda: H.trace(), VarianceError, "G.trace(B)"),
    Case("eigenvalues of a Hessian", lambda: H.eigenvalues(), VarianceError, "geoad.eigh(B, metric=G)"),
    Case("torch.linalg.eigh of a Hessian", lambda: torch.linalg.eigh(H), VarianceError, "geoad.eigh(B, metric=G)"),
    Case("norm without a metric", lambda: v.norm(), VarianceError, "G.norm(v)"),
    Case("torch.linalg.norm", lambda: torch.linalg.norm(w), VarianceError, "G.norm(v)"),
    Case("float of a determinant", lambda: float(G.det()), VarianceError, "divide by a density of the same weight"),
    Case("float of a vector", lambda: float(v), VarianceError, "w(v)"),
    Case("truth value", lambda: bool(v), VarianceError, "norms, pairings"),
    Case("np.asarray", lambda: np.asarray(v), VarianceError, ".components"),
    Case("one component", lambda: v[0], VarianceError, ".components"),
    Case("length of a vector", lambda: len(v), VarianceError, ".chart.dim"),
    Case("item", lambda: v.item(), VarianceError, "G(u, v)"),
    Case("backward on a typed object", lambda: v.backward(), VarianceError, "geoad.grad(L)(p)"),
    Case("unknown torch function", lambda: torch.fft.fft(v), VarianceError, ".components"),
    Case("concatenation", lambda: torch.cat([v, v]), VarianceError, "torch.stack"),
    Case("eigh without a metric", lambda: geoad.eigh(H, metric=H), VarianceError, "geoad.metrics.Euclidean(theta)(p)"),  # pyright: ignore
    Case("eigh of an endomorphism", lambda: geoad.eigh(E, metric=G), VarianceError, "E.eigenvalues()"),  # pyright: ignore
    Case("too many eigenvalues", lambda: E.eigenvalues(7), GeometryError, "k=None"),
    Case("unknown order", lambda: E.eigenvalues(which="best"), GeometryError, "which='largest'"),
    # points
    Case("point plus point", lambda: p + q, VarianceError, "p.retract(v, t)"),
    Case("p - lr * grad", lambda: p - 0.1 * w, VarianceError, "p.retract(v, t)"),
    Case("grad step from the right", lambda: (0.1 * v) + p, VarianceError, "p.retract(v, t)"),
    Case("torch function of a point", lambda: torch.sin(p), VarianceError, "p.retract(v, t)"),
    Case("retract along a covector", lambda: p.retract(w), VarianceError, "metric.sharp(covector)"),  # pyright: ignore
    Case(
        "retract along a vector elsewhere",
        lambda: p.retract(x.vector(rand(3), at=q)),
        BasePointError,
        "v.carry(to=p, chart=...)",
    ),
    Case("integer point", lambda: x.point(torch.arange(3)), GeometryError, "x.to(torch.float64)"),
    Case("index of a point", lambda: p[0], VarianceError, "p.components"),
    Case("wrong shape", lambda: x.point(rand(4)), GeometryError, "Reshape"),
    Case("wrong names", lambda: theta.point({"weights": rand(3, 4), "bias": rand(3)}), GeometryError, "exactly these names"),
    Case("raveled length", lambda: theta.point(rand(7)), GeometryError, "dict name -> tensor"),
    Case("no base point", lambda: x.vector(rand(3), at=None), BasePointError, "at=chart.point(x)"),  # pyright: ignore
    Case("base point of another manifold", lambda: x.vector(rand(3), at=y.point(rand(3))), ChartMismatchError, "reparametrize"),
    Case("vector out of a covector", lambda: x.vector(w, at=p), VarianceError, "metric.sharp(covector)"),
    Case("form out of a form", lambda: x.metric(H, at=p), VarianceError, "T.components"),
    Case("batch of vectors at other points", lambda: x.vector(rand(2, 3), at=x.point(rand(5, 3))), BasePointError, "single"),
    Case("foreign manifold", lambda: v.to(y), ChartMismatchError, "chart.reparametrize"),
    Case("stale point", stale, BasePointError, "geo.point()"),
    Case(
        "interpolate across manifolds", lambda: geoad.interpolate(p, y.point(rand(3)), 0.5), ChartMismatchError, "one manifold"
    ),
    # domains of charts
    Case("outside log", lambda: outside(maps.Log(), [1.0, -1.0]), ChartDomainError, "name pattern"),
    Case("outside exp", lambda: outside(maps.Exp(), [-1.0], True), ChartDomainError, ".to(chart)"),
    Case("outside softplus", lambda: outside(maps.Softplus(), [-0.5], True), ChartDomainError, ".to(chart)"),
    Case("outside tanh", lambda: outside(maps.Tanh(), [1.5], True), ChartDomainError, ".to(chart)"),
    Case("outside atanh", lambda: outside(maps.Atanh(), [2.0]), ChartDomainError, "name pattern"),
    Case("signed power at zero", lambda: outside(maps.Power(3.0), [0.0, 1.0]), ChartDomainError, "name pattern"),
    Case("unknown pattern", lambda: theta.reparametrize({"*.wieght": maps.Exp()}), GeometryError, "Mend the pattern"),
    Case("not a map", lambda: x.reparametrize({"x": torch.exp}), GeometryError, "geoad.maps.Softplus()"),  # pyright: ignore
    Case("scale by zero", lambda: maps.Scale(0.0), GeometryError, "Immersion"),
    Case("power zero", lambda: maps.Power(0.0), GeometryError, "Power"),
    Case("map that is not bound", lambda: maps.Exp().bound_layout(), GeometryError, "chart.reparametrize(recipe)"),
    Case("bound twice", lambda: bound.bind(x.layout), GeometryError, "fresh recipe"),
    Case("map from the wrong chart", lambda: psi.parent(v.to(psi)), ChartMismatchError, ".to(target)"),  # pyright: ignore
    Case("map of plain numbers", lambda: psi.parent(rand(3)), ChartMismatchError, "chart.point(x)"),  # pyright: ignore
    # metrics
    Case("metric not symmetric", lambda: x.metric(A, at=p), GeometryError, "0.5 * (M + M.mT)"),
    Case("metric not positive", lambda: x.metric(-SPD, at=p), SingularMetricError, "Euclidean(theta)"),
    Case("metric of wrong size", lambda: x.metric(torch.eye(2).double(), at=p), GeometryError, "(3, 3)"),
    Case(
        "semidefinite Fisher",
        lambda: fisher(geo.point()).sharp(geoad.grad(loss)(geo.point())),
        SingularMetricError,
        "damping=lam",
    ),
    Case("semidefinite inverse", lambda: torch.linalg.solve(rank_one, w), SingularMetricError, "Euclidean(theta)"),
    Case("root of a semidefinite form", lambda: rank_one.cholesky(), SingularMetricError, "Euclidean(theta)"),
    Case(
        "logdet at a saddle",
        lambda: x.form(torch.diag(torch.tensor([1.0, 1.0, -1.0])).double(), at=p).logdet(),
        SingularMetricError,
        ".slogdet()",
    ),
    Case("negative damping", lambda: G.solve(w, damping=-1.0), GeometryError, "B - lam * G"),
    Case("diagonal metric with a zero", lambda: Diagonal(x, torch.tensor([1.0, 0.0, 1.0])), SingularMetricError, "positive"),
    Case("constant metric not symmetric", lambda: Constant(x, A), GeometryError, "0.5 * (M + M.mT)"),
    Case("metric field times a vector", lambda: Euclidean(x) * v, VarianceError, "scaled by numbers"),
    Case("metric of another manifold", lambda: Euclidean(y)(p), ChartMismatchError, "same manifold"),
    Case("sharp at another point", lambda: Euclidean(x)(q).sharp(w), BasePointError, "T.carry("),
    # derivatives
    Case("field at plain numbers", lambda: field(rand(3)), ChartMismatchError, "chart.point(components)"),  # pyright: ignore
    Case("differential of a vector output", lambda: geoad.grad(lambda c: c * 2)(p), GeometryError, "geoad.jacobian"),
    Case("gradient with respect to a typed object", lambda: geoad.grad(lambda c: c.sum())(v), VarianceError, "T.components"),
    Case("jacobian of a scalar field", lambda: geoad.jacobian(field), VarianceError, "geoad.grad(L)(p)"),
    Case("pull back a vector", lambda: geoad.pullback(psi.parent, v.to(psi)), VarianceError, "geoad.pushforward(f, v)"),
    Case("push a covector forward", lambda: geoad.pushforward(psi.parent, w), VarianceError, "geoad.pullback(f, T)"),  # pyright: ignore
    Case("pull back without a point", lambda: geoad.pullback(lambda c: c, w), BasePointError, "at=p"),
    Case(
        "directional derivative along a covector", lambda: geoad.jvp(field, (p,), (w,)), VarianceError, "metric.sharp(covector)"
    ),
    Case("hessian with a metric at one point", lambda: geoad.hessian(field, metric=G), VarianceError, "Euclidean(chart)"),  # pyright: ignore
    Case("fields of two manifolds", lambda: field + y.scalar_field(lambda c: c.sum()), ChartMismatchError, "reparametrize"),
    Case("field plus vector", lambda: field + v, VarianceError, "chart.scalar_field(fn)"),
    # frozen objects
    Case("attribute of a vector", lambda: set_attribute(v, "chart"), GeometryError, "chart.vector(components, at=p)"),
    Case("attribute of a point", lambda: set_attribute(p, "blocks"), GeometryError, "p.retract(v)"),
    Case("delete an attribute", lambda: delete_attribute(v, "chart"), GeometryError, "chart.vector(components, at=p)"),
    Case("pickle of a function", lambda: pickle.dumps(geoad.hessian(field)(p)), GeometryError, "T.materialise()"),
    Case("save a plain tensor", lambda: geoad.to_state(rand(3)), GeometryError, "torch.save"),  # pyright: ignore
    Case(
        "load into another chart",
        lambda: geoad.from_state(geoad.to_state(v), theta),
        ChartMismatchError,
        "geoad.from_state(state, chart)",
    ),
    # modules, data, optimizers
    Case("one-shot iterator", lambda: geo.loss(F.cross_entropy, iter([data])), GeometryError, "list(iterator)"),
    Case("empty data", lambda: geo.loss(F.cross_entropy, [])(geo.point()), GeometryError, "at least one batch"),
    Case(
        "loss without reduction",
        lambda: geo.loss(nn.CrossEntropyLoss(reduction="none"), data),
        GeometryError,
        "reduction='mean'",
    ),
    Case(
        "unknown reduction",
        lambda: geo.loss(F.cross_entropy, data, reduction="median"),
        GeometryError,
        "geo.loss(loss_fn, (x, y))",
    ),
    Case("unknown likelihood", lambda: geoad.curvature.Fisher(geo, data, "poison"), GeometryError, "categorical"),
    Case(
        "one logit",
        lambda: geoad.curvature.Fisher(narrow, data[0], "categorical")(narrow.point()).to_dense(),
        GeometryError,
        "two outputs",
    ),
    Case("grad before backward", lambda: geo.grad, GeometryError, "loss.backward()"),
    Case("module of a module", lambda: geoad.GeoModule(geo), GeometryError, "plain network"),
    Case("no parameters", lambda: geoad.GeoModule(nn.ReLU()), GeometryError, "params="),
    Case("pattern of parameters", lambda: geoad.GeoModule(nn.Linear(2, 2), params="wait"), GeometryError, "Mend the pattern"),
    Case("direct call of the network in psi", lambda: net_in_psi(data[0]), GeometryError, "geo(x)"),
    Case("state dict of the network in psi", lambda: net_in_psi.state_dict(), GeometryError, "geo.state_dict()"),
    Case("gradient of plain parameters", lambda: loss(geo.state_dict()), ChartMismatchError, "geo.point()"),  # pyright: ignore
    Case(
        "invariant optimizer of a plain network",
        lambda: geoad.optim.Invariant(nn.Linear(2, 2), torch.optim.SGD, lr=0.1),
        GeometryError,
        "geoad.GeoModule(net)",
    ),  # pyright: ignore
    Case("parameter -= lr * covector", step_sgd, VarianceError, "geoad.optim"),
    Case("torch.optim on typed objects", lambda: torch.optim.SGD([v], lr=0.1), TypeError, "optimize Tensors"),  # pyright: ignore
    Case("copy of numbers into a parameter", lambda: rand(3).copy_(w), VarianceError, "geoad.optim"),  # pyright: ignore
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_misuse_is_loud_and_names_the_remedy(case: Case) -> None:
    with pytest.raises(case.error) as caught:
        case.call()
    assert case.remedy in str(caught.value), f"the message lacks {case.remedy!r}: {caught.value}"
    assert not isinstance(caught.value, TypeError) or case.error is TypeError


def test_errors_are_no_type_errors() -> None:
    """PyTorch turns a TypeError in an operator into NotImplemented, and the message would be lost."""
    for name in geoad.errors.__all__:
        assert issubclass(getattr(geoad.errors, name), GeometryError) and not issubclass(getattr(geoad.errors, name), TypeError)


def test_attributes_are_missing_for_hasattr() -> None:
    for name in ("norm", "item", "numpy", "data", "grad", "no_such_name"):
        assert not hasattr(v, name)
    assert getattr(v, "numpy", None) is None
    assert copy.copy(v) is v
    with pytest.raises(AttributeError, match="no_such_name"):
        v.no_such_name  # noqa: B018  # pyright: ignore
