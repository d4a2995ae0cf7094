"""Typed objects under torch.func, torch.compile, no_grad and inference mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import geoad

torch.manual_seed(0)
x = geoad.Chart({"x": (3,)}, name="x")
psi = x.reparametrize(geoad.maps.Asinh(), name="psi").target
pair = geoad.Chart({"w": (2, 1), "b": (1,)}, name="pair")
XP = torch.tensor([0.4, -0.7, 1.1], dtype=torch.float64)
p = x.point(XP)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


A = rand(3, 3)
SPD = A @ A.mT + 2 * torch.eye(3, dtype=torch.float64)
v, u, w = x.vector(rand(3), at=p), x.vector(rand(3), at=p), x.covector(rand(3), at=p)
G, H, E = x.metric(SPD, at=p), x.form(A + A.mT, at=p), x.endomorphism(A, at=p)
C = G.inverse()


def energy(components: Tensor) -> Tensor:
    """Typed objects made inside from plain numbers, a scalar out."""
    at = x.point(components)
    metric = x.metric(SPD + torch.diag(components**2), at=at)
    velocity = x.vector(components.sin(), at=at)
    slope = x.covector(components.cos(), at=at)
    moved = metric.to(psi)(velocity.to(psi), velocity.to(psi))
    return moved + slope(metric.sharp(slope)) + (metric.logdet() - (2 * metric).logdet())


def plain_energy(components: Tensor) -> Tensor:
    m = SPD + torch.diag(components**2)
    s, c = components.sin(), components.cos()
    return s @ m @ s + c @ torch.linalg.solve(m, c) - 3 * torch.log(torch.tensor(2.0))


def test_grad_jvp_and_hessian_through_typed_code() -> None:
    torch.testing.assert_close(torch.func.grad(energy)(XP), torch.func.grad(plain_energy)(XP))
    tangent = rand(3)
    for got, want in zip(
        torch.func.jvp(energy, (XP,), (tangent,)), torch.func.jvp(plain_energy, (XP,), (tangent,)), strict=True
    ):
        torch.testing.assert_close(got, want, check_dtype=False)
    torch.testing.assert_close(torch.func.hessian(energy)(XP), torch.func.hessian(plain_energy)(XP))
    torch.testing.assert_close(torch.func.jacrev(energy)(XP), torch.func.jacfwd(energy)(XP))


def test_vmap_and_nested_vmap_of_typed_code() -> None:
    many = rand(2, 4, 3)
    want = torch.func.vmap(torch.func.vmap(torch.func.grad(plain_energy)))(many)
    torch.testing.assert_close(torch.func.vmap(torch.func.vmap(torch.func.grad(energy)))(many), want)


def test_autograd_through_typed_code() -> None:
    leaf = XP.clone().requires_grad_()
    energy(leaf).backward()
    torch.testing.assert_close(leaf.grad, torch.func.grad(plain_energy)(XP))


def test_typed_objects_cross_the_border_of_vmap() -> None:
    vs, ws = x.vector(rand(5, 3), at=p), x.covector(rand(5, 3), at=p)
    torch.testing.assert_close(torch.func.vmap(lambda a, b: b(a))(vs, ws), ws(vs))
    moved: Any = torch.func.vmap(lambda a: G.mv(a) + w)(vs)
    assert isinstance(moved, geoad.Covector) and moved.batch_shape == (5,)
    torch.testing.assert_close(moved.components, G.mv(vs).components + w.components)
    outer: Any = torch.func.vmap(lambda a: torch.outer(a, a))(vs)
    assert isinstance(outer, geoad.Cometric) and outer.batch_shape == (5,)
    scaled: Any = torch.func.vmap(lambda c: c * geoad.metrics.Euclidean(x)(p))(torch.arange(1.0, 4.0, dtype=torch.float64))
    assert scaled.batch_shape == (3,)
    torch.testing.assert_close(scaled.mv(v).components, torch.arange(1.0, 4.0).double()[:, None] * v.components)
    torch.testing.assert_close(scaled.to_dense()[2], 3 * torch.eye(3).double())


def test_batches_of_points_under_vmap() -> None:
    ps = x.point(rand(4, 3))
    vs, ws = x.vector(rand(4, 3), at=ps), x.covector(rand(4, 3), at=ps)
    torch.testing.assert_close(torch.func.vmap(lambda a, b: b(a))(vs, ws), ws(vs))
    moved: Any = torch.func.vmap(lambda a: a.to(psi))(vs)
    torch.testing.assert_close(moved.ravel(), vs.to(psi).ravel())
    field = x.metric_field(lambda c: SPD + torch.diag(c**2))
    values: Any = torch.func.vmap(lambda q: field(q).logdet())(ps)
    torch.testing.assert_close(values.to(psi).components, field(ps).logdet().to(psi).components)
    nested: Any = torch.func.vmap(torch.func.vmap(lambda q: field(q).to(psi).det()))(x.point(rand(2, 4, 3)))
    assert nested.batch_shape == (2, 4)


def test_pytrees_rebuild_every_class() -> None:
    for thing in (v, w, G, H, C, E, E.mT, G.det(), G.logdet(), G.cholesky(), geoad.metrics.Euclidean(x)(p), p):
        again = torch.utils._pytree.tree_map(lambda t: t.clone(), thing)
        assert type(again) is type(thing) and again.chart == thing.chart
        torch.testing.assert_close(again.ravel(), thing.ravel())
    dict_chart = pair.vector(rand(3), at=pair.point(rand(3)))
    assert torch.utils._pytree.tree_map(lambda t: 2 * t, dict_chart).blocks.keys() == dict_chart.blocks.keys()


COMPILED: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "sum": (lambda a, b: a + b - 2.0 * a, (v, u)),
    "scale": (lambda a: a / 2 * 3 - a, (w,)),
    "pairing": (lambda a, b: a(b), (w, v)),
    "mv": (lambda g, a: g.mv(a), (G, v)),
    "evaluate": (lambda g, a, b: g(a, b), (G, u, v)),
    "matmul": (lambda g, a: torch.matmul(g, a), (G, v)),
    "einsum": (lambda g, a: torch.einsum("ij,j->i", g, a), (G, v)),
    "einsum three": (lambda a, g, b: torch.einsum("i,ij,j->", a, g, b), (u, G, v)),
    "compose": (lambda c, h: c.compose(h), (C, H)),
    "metrics": (lambda g, h: g + 0.5 * h, (G, H)),
    "transpose": (lambda e: e.mT, (E,)),
    "trace": (lambda e: e.trace(), (E,)),
    "outer": (lambda a, b: torch.outer(a, b), (v, w)),
    "move": (lambda a: a.to(psi), (v,)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", COMPILED)
def test_compile_in_one_graph(name: str, backend: str) -> None:
    fn, arguments = COMPILED[name]
    torch._dynamo.reset()
    want, got = fn(*arguments), torch.compile(fn, fullgraph=True, backend=backend)(*arguments)
    assert type(got) is type(want)
    if not isinstance(want, Tensor):
        assert got.chart == want.chart and got.type == want.type
        got, want = got.ravel(), want.ravel()
    torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore")
def test_compiled_code_still_refuses() -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"metric\.sharp|VarianceError"):
        torch.compile(lambda a, b: a + b, backend="eager")(v, w)


def test_no_grad_and_inference_mode() -> None:
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            q = x.point(XP.clone())
            a = x.vector(rand(3), at=q)
            assert float(G.to(psi)(v.to(psi), v.to(psi))) == pytest.approx(float(G(v, v)))
            assert a.to(psi).to(x).chart == x and x.metric(SPD, at=q).norm(a) > 0
        assert bool(torch.isfinite((a + a).to(psi)))


def test_points_seen_first_without_gradients_still_have_them() -> None:
    field = x.scalar_field(lambda c: (c**3).sum())
    for context in (torch.no_grad, torch.inference_mode):
        leaf = XP.clone().requires_grad_()
        q = x.point(leaf)
        with context():
            q.to(psi)
        (q.to(psi).components ** 2).sum().backward()
        assert leaf.grad is not None
        r = x.point(XP.clone())
        with context():
            r.to(psi)
        slope = geoad.grad(field)(r.to(psi))
        torch.testing.assert_close(slope.to(x).components, 3 * XP**2)
        r.to(psi).components.clone().requires_grad_()
        weight = torch.ones((), dtype=torch.float64, requires_grad=True)
        (weight * r.to(psi).components).sum().backward()
        assert weight.grad is not None
