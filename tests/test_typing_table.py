"""The typing table: every row, accepted with the type of the result, and refused, for all classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import geoad
from geoad import operators as ops
from geoad.errors import BasePointError, ChartMismatchError, SingularMetricError, VarianceError
from geoad.tensors import DualEndomorphism

torch.manual_seed(0)
x = geoad.Chart({"x": (3,)}, name="x")
psi = x.reparametrize(geoad.maps.Asinh(), name="psi").target
out = geoad.Chart({"y": (2,)}, name="y")
XP = torch.tensor([0.4, -0.7, 1.1], dtype=torch.float64)
p = x.point(XP)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


A = rand(3, 3)
SPD = A @ A.mT + 2 * torch.eye(3, dtype=torch.float64)
v, u = x.vector(rand(3), at=p), x.vector(rand(3), at=p)
w, a = x.covector(rand(3), at=p), x.covector(rand(3), at=p)
G = x.metric(SPD, at=p)
H = x.form(A + A.mT, at=p)
B = x.form(A, at=p)
C = x.cometric(SPD, at=p)
E = x.endomorphism(A, at=p)
D = E.mT
J = geoad.jacobian(lambda t: torch.stack([t.sum(), t.prod()]), space=out)(p)
phi = psi.parent
assert phi is not None
K = geoad.jacobian(phi)(p)  # [psi^, x_]
frame = G.inverse_sqrt()
rho = G.det().sqrt()
log_rho = G.logdet()
ONE_INDEX: list[Any] = [v, w]
ALL: list[Any] = [v, w, G, H, B, C, E, D, J, K, frame]
MOVED: list[Any] = [each.to(psi) for each in (v, w, G, H, B, C, E, D, J, frame)]
DENSITIES: list[Any] = [rho, log_rho, G.det()]
IDS = ["v", "w", "G", "H", "B", "C", "E", "D", "J", "K", "frame"]


def numbers(thing: Any) -> Tensor:
    return thing.to_dense() if hasattr(thing, "to_dense") else thing


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(numbers(got), numbers(want), rtol=1e-10, atol=1e-12)


def axes(thing: Any) -> str:
    return "".join("F" if axis.chart is None else "^" if axis.up else "_" for axis in thing.axes)


# -- sums and multiples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [*ALL, *MOVED])
def test_sums_keep_type_and_add_numbers(t: Any) -> None:
    for total in (t + t, torch.add(t, t), t.add(t), torch.add(t, t, alpha=1)):
        assert axes(total) == axes(t) and total.chart == t.chart
        close(total, 2 * numbers(t))
    for zero in (t - t, torch.sub(t, t), t.sub(t)):
        close(zero, 0 * numbers(t))
    close(torch.add(t, t, alpha=2.0), 3 * numbers(t))
    close(t.sub(t, alpha=3), -2 * numbers(t))


SCALARS: list[Any] = [
    2,
    2.0,
    np.float64(2),
    np.float32(2),
    np.int64(2),
    torch.tensor(2.0),
    torch.tensor(2),
    torch.tensor(2.0).double(),
]


@pytest.mark.parametrize("c", SCALARS, ids=lambda c: f"{type(c).__name__}-{getattr(c, 'dtype', '')}")
@pytest.mark.parametrize("t", [*ALL, *MOVED, rho, G.det()])
def test_multiples_by_every_kind_of_number(t: Any, c: Any) -> None:
    for twice in (c * t, t * c, torch.mul(t, torch.tensor(2.0)), torch.multiply(torch.tensor(2.0), t), t.mul(c)):
        assert type(twice) is type(t) and twice.dtype == torch.float64
        close(twice, 2 * numbers(t))
    for half in (t / c, torch.div(t, torch.tensor(2.0)), t.div(c)):
        close(half, numbers(t) / 2)


@pytest.mark.parametrize("t", [*ALL, rho])
def test_unary(t: Any) -> None:
    for negative in (-t, torch.neg(t), t.neg()):
        close(negative, -numbers(t))
    assert +t is t
    for same in (t.clone(), torch.clone(t), t.detach(), torch.detach(t)):
        assert type(same) is type(t)
        close(same, t)
    close(torch.zeros_like(t), 0 * numbers(t))
    assert bool(torch.isfinite(t)) and bool(t.isfinite())
    assert torch.allclose(t, t.clone()) and torch.equal(t, t.clone())


@pytest.mark.parametrize("s", [v, w])
def test_division_is_bitwise_that_of_torch(s: Any) -> None:
    assert torch.equal((s / 3).components, s.components / 3)


def test_positivity_is_tracked() -> None:
    metric, form = geoad.Metric, geoad.Form
    assert type(2 * G) is metric and type(G / 2) is metric and type(G + G) is metric
    assert type(torch.tensor(0.5) * G) is metric
    for signed in (-G, G - G, 0.0 * G, torch.tensor(-1.0) * G, G + H, torch.zeros_like(G), G * np.float64(-1)):
        assert type(signed) is form and not signed.op.definite
    assert type(G.mT) is metric and type(G.inverse()) is geoad.Cometric and type(G.inverse().inverse()) is metric


def test_transposes_and_sums_with_them() -> None:
    assert axes(E.mT) == "_^" and isinstance(E.mT, DualEndomorphism) and isinstance(E.mT.mT, geoad.Endomorphism)
    with pytest.raises(VarianceError):
        E + E.mT
    symmetric = 0.5 * (B + B.mT)
    assert symmetric.op.symmetric
    close(symmetric, 0.5 * (A + A.mT))
    values, _ = geoad.eigh(symmetric, metric=G)
    assert values.shape == (3,)
    for t in (
        J.mT,
        J.T,
        torch.transpose(J, 0, 1),
        torch.transpose(J, -1, -2),
        J.transpose(),
        torch.permute(J, (1, 0)),
        torch.t(J),
    ):
        assert axes(t) == "_^"
        close(t, numbers(J).mT)
    close(torch.transpose(E, 0, 1), A.mT)
    close(B.to(psi).mT, B.mT.to(psi))
    close(E.to(psi).mT, E.mT.to(psi))


# -- contractions ----------------------------------------------------------------------------------------------------------

ROWS: list[tuple[Callable[[], Any], str, Callable[[], Tensor]]] = [
    (lambda: w(v), "", lambda: w.components @ v.components),
    (lambda: v(w), "", lambda: w.components @ v.components),
    (lambda: w @ v, "", lambda: w.components @ v.components),
    (lambda: torch.dot(w, v), "", lambda: w.components @ v.components),
    (lambda: w.dot(v), "", lambda: w.components @ v.components),
    (lambda: torch.einsum("i,i->", w, v), "", lambda: w.components @ v.components),
    (lambda: torch.tensordot(w, v, dims=1), "", lambda: w.components @ v.components),
    (lambda: G(u, v), "", lambda: u.components @ SPD @ v.components),
    (lambda: C(w, a), "", lambda: w.components @ SPD @ a.components),
    (lambda: torch.einsum("i,ij,j->", u, G, v), "", lambda: u.components @ SPD @ v.components),
    (lambda: torch.einsum("i,ij,j", u, B, v), "", lambda: u.components @ A @ v.components),
    (lambda: torch.linalg.multi_dot([u, B, v]), "", lambda: u.components @ A @ v.components),
    (lambda: G @ v, "_", lambda: SPD @ v.components),
    (lambda: B.mv(v), "_", lambda: A @ v.components),
    (lambda: torch.mv(B, v), "_", lambda: A @ v.components),
    (lambda: torch.matmul(B, v), "_", lambda: A @ v.components),
    (lambda: B.matmul(v), "_", lambda: A @ v.components),
    (lambda: torch.einsum("ij,j->i", B, v), "_", lambda: A @ v.components),
    (lambda: torch.einsum("j,ij->i", v, B), "_", lambda: A @ v.components),
    (lambda: torch.einsum("ij,i->j", B, v), "_", lambda: A.mT @ v.components),
    (lambda: v @ B, "_", lambda: A.mT @ v.components),
    (lambda: torch.tensordot(B, v, dims=([0], [0])), "_", lambda: A.mT @ v.components),
    (lambda: C.mv(w), "^", lambda: SPD @ w.components),
    (lambda: E(v), "^", lambda: A @ v.components),
    (lambda: E @ v, "^", lambda: A @ v.components),
    (lambda: w @ E, "_", lambda: A.mT @ w.components),
    (lambda: D(w), "_", lambda: A.mT @ w.components),
    (lambda: J @ v, "^", lambda: numbers(J) @ v.components),
    (lambda: J.mv(v), "^", lambda: numbers(J) @ v.components),
    (lambda: E @ E, "^_", lambda: A @ A),
    (lambda: E.compose(E), "^_", lambda: A @ A),
    (lambda: torch.mm(C, B), "^_", lambda: SPD @ A),
    (lambda: B @ C, "_^", lambda: A @ SPD),
    (lambda: B @ E, "__", lambda: A @ A),
    (lambda: E @ C, "^^", lambda: A @ SPD),
    (lambda: torch.einsum("ij,jk->ik", B, C), "_^", lambda: A @ SPD),
    (lambda: torch.einsum("ij,jk->ki", B, E), "__", lambda: (A @ A).mT),
    (lambda: torch.einsum("ij->ji", B), "__", lambda: A.mT),
    (lambda: torch.einsum("ij,kj->ik", B, C), "_^", lambda: A @ SPD.mT),
    (lambda: torch.einsum("ij,jk,kl,l->i", B, C, B, v), "_", lambda: A @ SPD @ A @ v.components),
    (lambda: torch.einsum("ii->", E), "", lambda: A.trace()),
    (lambda: torch.einsum("ij,ji->", B, C), "", lambda: (A @ SPD).trace()),
    (lambda: torch.outer(v, w), "^_", lambda: torch.outer(v.components, w.components)),
    (lambda: v.outer(u), "^^", lambda: torch.outer(v.components, u.components)),
    (lambda: torch.einsum("i,j->ij", w, a), "__", lambda: torch.outer(w.components, a.components)),
    (
        lambda: torch.einsum("i,j,k->ijk", v, w, u),
        "^_^",
        lambda: torch.einsum("i,j,k->ijk", v.components, w.components, u.components),
    ),
    (lambda: J @ C @ J.mT, "^^", lambda: numbers(J) @ SPD @ numbers(J).mT),
    (lambda: torch.einsum("ia,ja->ij", frame, frame), "^^", lambda: torch.linalg.inv(SPD)),
    (lambda: torch.einsum("ia,jb,ij->ab", frame, frame, G), "", lambda: torch.eye(3).double()),
    (lambda: torch.inverse(B), "^^", lambda: torch.linalg.inv(A)),
    (lambda: torch.linalg.inv(C), "__", lambda: torch.linalg.inv(SPD)),
    (lambda: E.inverse(), "^_", lambda: torch.linalg.inv(A)),
    (lambda: D.inverse(), "_^", lambda: torch.linalg.inv(A).mT),
    (lambda: K.inverse(), "^_", lambda: torch.linalg.inv(numbers(K))),
    (lambda: torch.linalg.solve(G, w), "^", lambda: torch.linalg.solve(SPD, w.components)),
    (lambda: torch.linalg.solve(B, w), "^", lambda: torch.linalg.solve(A, w.components)),
    (lambda: torch.linalg.solve(E, v), "^", lambda: torch.linalg.solve(A, v.components)),
    (lambda: torch.linalg.solve(D, w), "_", lambda: torch.linalg.solve(A.mT, w.components)),
    (lambda: torch.linalg.solve(C, v), "_", lambda: torch.linalg.solve(SPD, v.components)),
    (lambda: torch.linalg.solve(G, B), "^_", lambda: torch.linalg.solve(SPD, A)),
    (lambda: torch.trace(E), "", lambda: A.trace()),
    (lambda: D.trace(), "", lambda: A.trace()),
    (lambda: G.trace(H), "", lambda: torch.linalg.solve(SPD, A + A.mT).trace()),
    (lambda: torch.det(E), "", lambda: torch.det(A)),
    (lambda: torch.linalg.slogdet(E)[1], "", lambda: torch.linalg.slogdet(A)[1]),
    (lambda: D.det(), "", lambda: torch.det(A)),
    (lambda: G.cholesky() @ G.cholesky().mT, "__", lambda: SPD),
    (lambda: G.inverse_sqrt() @ G.inverse_sqrt().mT, "^^", lambda: torch.linalg.inv(SPD)),
    (lambda: C.cholesky() @ C.cholesky().mT, "^^", lambda: SPD),
    (lambda: C.inverse_sqrt() @ C.inverse_sqrt().mT, "__", lambda: torch.linalg.inv(SPD)),
    (lambda: torch.linalg.cholesky(G), "_F", lambda: torch.linalg.cholesky(SPD)),
    (lambda: torch.linalg.cholesky(G, upper=True), "F_", lambda: torch.linalg.cholesky(SPD).mT),
]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_contractions(row: tuple[Callable[[], Any], str, Callable[[], Tensor]]) -> None:
    call, kind, want = row
    got = call()
    assert (axes(got) if kind else "") == kind
    assert bool(kind) == (not isinstance(got, Tensor))
    close(got, want())


@pytest.mark.parametrize("row", ROWS[:15] + ROWS[24:31], ids=lambda _: "")
def test_contractions_commute_with_moving(row: tuple[Callable[[], Any], str, Callable[[], Tensor]], monkeypatch: Any) -> None:
    want = row[0]()
    for name in ("v", "u", "w", "a", "G", "H", "B", "C", "E", "D", "J"):
        monkeypatch.setitem(globals(), name, globals()[name].to(psi))
    got = row[0]()
    close(got, want if isinstance(want, Tensor) else want.to(psi))


def test_applying_a_chart_is_a_checked_contraction() -> None:
    moved = K @ v
    assert isinstance(moved, geoad.Vector) and moved.chart == psi
    close(moved, v.to(psi))
    back = torch.einsum("ai,a->i", K, w.to(psi))
    assert isinstance(back, geoad.Covector) and back.chart == x
    close(back, w)
    close(K @ K.inverse() @ v.to(psi), v.to(psi))
    for wrong in (lambda: K @ v.to(psi), J.trace, K.trace):
        with pytest.raises(ChartMismatchError, match=r"\.to\(chart\)"):
            wrong()


def test_eigenvalues_and_frames() -> None:
    values, vectors = geoad.eigh(H, metric=G)
    assert axes(vectors) == "^F"
    close((G.inverse() @ H).eigenvalues(), values)
    close(torch.linalg.eigvals(G.inverse() @ H), values)
    complex_values, right = torch.linalg.eig(E)
    torch.testing.assert_close(A.to(complex_values.dtype) @ right.data, right.data * complex_values)
    close((G.inverse() @ H).to(psi).eigenvalues(2), values[:2])


def test_determinants_are_densities() -> None:
    assert G.det().weight == 2 and C.det().weight == -2 and B.logdet().weight == 2 if torch.det(A) > 0 else True
    assert isinstance(torch.det(G), geoad.Density) and isinstance(torch.logdet(G), geoad.LogDensity)
    close(torch.det(G), torch.det(SPD))
    close(G.to(psi).det(), G.det().to(psi))
    close(C.to(psi).logdet(), C.logdet().to(psi))
    close(G.det() * G.inverse().det(), torch.ones((), dtype=torch.float64))
    close(G.cholesky().det(), G.det().sqrt())
    assert G.cholesky().det().weight == 1 and frame.det().weight == -1


def test_determinant_of_a_jacobian_is_a_density_in_both_spaces() -> None:
    jac = K.det()
    assert jac.weight == 1 and jac.foreign == ((psi, -1.0),)
    close(jac, torch.linalg.det(numbers(K)).abs())
    sigma = G.to(psi).det().sqrt()
    pulled = jac * sigma
    assert isinstance(pulled, geoad.Density) and pulled.weight == 1 and not pulled.foreign and pulled.chart == x
    close(pulled, sigma.to(x))
    close(sigma * jac, pulled)
    close((K.logdet() + sigma.log()).exp(), pulled)
    assert isinstance(jac / jac, Tensor)
    with pytest.raises(VarianceError):
        float(jac)
    with pytest.raises(VarianceError, match=r"J\.mT @ G @ J"):
        torch.det(J)


# -- densities ---------------------------------------------------------------------------------------------------------------


def test_density_algebra() -> None:
    assert (rho * rho).weight == 2 and (rho**3).weight == 3 and (1 / rho).weight == -1 and rho.sqrt().weight == 0.5
    assert torch.sqrt(rho).weight == 0.5 and torch.abs(-rho).weight == 1 and torch.pow(rho, 2).weight == 2
    assert torch.pow(rho, torch.tensor(2.0)).weight == 2 and torch.square(rho).weight == 2
    assert isinstance(rho / rho, Tensor) and isinstance(rho**0, Tensor) and isinstance(rho * rho**-1, Tensor)
    close(rho / rho, torch.ones((), dtype=torch.float64))
    assert abs(-rho).weight == 1 and (rho + rho).weight == 1 and (2 * rho - rho).weight == 1
    assert torch.log(rho).weight == 1 and torch.exp(torch.log(rho)).weight == 1
    assert float(geoad.Density(x, torch.tensor(2.0), 0, p)) == 2.0
    stacked = torch.stack([rho, 2 * rho])
    assert stacked.batch_shape == (2,) and torch.prod(stacked).weight == 2 and stacked.sum().weight == 1
    assert torch.mean(stacked).weight == 1 and stacked[1].weight == 1
    close(stacked[1], 2 * rho)
    for moved in (rho, log_rho, rho**-2):
        close(moved.to(psi).to(x), moved)
    close((rho * rho).to(psi), rho.to(psi) * rho.to(psi))


def test_log_density_algebra() -> None:
    half = 0.5 * log_rho
    assert half.weight == 1 and (log_rho + half).weight == 3 and (-log_rho).weight == -2 and (log_rho / 2).weight == 1
    assert isinstance(log_rho - log_rho, Tensor) and (log_rho + 1.0).weight == 2 and (1.0 - log_rho).weight == -2
    assert (torch.tensor(1.0) + log_rho).weight == 2 and (torch.tensor(1.0) - log_rho).weight == -2
    assert (np.float64(1) + log_rho).weight == 2 and isinstance(0 * log_rho, Tensor)
    close(half.exp(), rho)
    many = torch.stack([log_rho, log_rho])
    assert many.sum().weight == 4 and many.mean().weight == 2
    close(many + torch.tensor([1.0, 2.0]).double(), many.components + torch.tensor([1.0, 2.0]).double())


def test_densities_of_equal_weight_compare() -> None:
    assert bool(rho < 2 * rho) and bool(2 * rho > rho) and bool(rho <= rho) and bool(rho >= rho) and bool(rho > 0)
    assert bool(torch.lt(rho, 2 * rho)) and bool(torch.tensor(0.0) < rho) and bool(log_rho < log_rho + 1)
    assert bool((rho.to(psi) < 2 * rho.to(psi)) == (rho < 2 * rho)) and bool(rho == 1 * rho)
    for wrong in (lambda: rho < rho**2, lambda: rho > 1.0, lambda: log_rho < 0, lambda: rho < log_rho):
        with pytest.raises(VarianceError, match="even"):
            wrong()


def test_singular_and_indefinite_determinants() -> None:
    singular = x.form(torch.diag(torch.tensor([1.0, 2.0, 0.0])).double(), at=p)
    assert float(singular.logdet().components) == -math.inf and float(singular.slogdet()[0]) == 0
    saddle = x.form(torch.diag(torch.tensor([1.0, 2.0, -1.0])).double(), at=p)
    with pytest.raises(SingularMetricError, match="slogdet"):
        saddle.logdet()
    sign, value = saddle.slogdet()
    assert sign == -1 and value.weight == 2
    with pytest.raises(SingularMetricError, match="slogdet"):
        x.endomorphism(torch.diag(torch.tensor([1.0, 1.0, -1.0])).double(), at=p).logdet()


# -- batches -----------------------------------------------------------------------------------------------------------------


def test_batches_of_objects_at_one_point() -> None:
    vs = x.vector(rand(5, 3), at=p)
    assert len(vs) == 5 and vs.batch_shape == (5,)
    close(w(vs), vs.components @ w.components)
    close(vs(w), vs.components @ w.components)
    close(G.mv(vs), vs.components @ SPD)
    close(G(vs, v), vs.components @ SPD @ v.components)
    ws = x.covector(rand(5, 3), at=p)
    close(G.solve(ws), torch.linalg.solve(SPD, ws.components.mT).mT)
    close(G.sharp(ws, damping=0.5), torch.linalg.solve(SPD + 0.5 * torch.eye(3), ws.components.mT).mT)
    close(B.solve(ws), torch.linalg.solve(A, ws.components.mT).mT)
    close(G.to(psi).solve(ws.to(psi)), G.solve(ws).to(psi))
    close(G.solve(ws, method=ops.CG()), G.solve(ws))
    close(vs + v, vs.components + v.components)
    close(torch.einsum("bi,bi->b", ws, vs), (ws.components * vs.components).sum(-1))
    close(torch.einsum("i,i->", ws, vs), (ws.components * vs.components).sum(-1))
    close(torch.einsum("bi,ij->bj", vs, G), vs.components @ SPD)
    close(torch.einsum("bi,bj->bij", ws, ws), torch.einsum("bi,bj->bij", ws.components, ws.components))
    fisher = torch.einsum("bi,bj->bij", ws, ws).mean(0)
    assert isinstance(fisher, geoad.Form) and fisher.batch_shape == ()
    close(torch.mean(vs, 0), vs.components.mean(0))
    close(vs.sum(), vs.components.sum(0))
    close(torch.stack([v, u])[1], u)
    close(torch.stack([G, 2 * G], 0)[1], 2 * SPD)
    close(torch.stack([G.to(psi), G.to(psi)])[0], G.to(psi))
    close(vs[1:3], vs.components[1:3])
    assert [close(each, vs.components[i]) for i, each in enumerate(vs)] == [None] * 5
    gs = torch.stack([G, 2 * G])
    close(gs.mv(v), torch.stack([SPD @ v.components, 2 * SPD @ v.components]))
    close(gs.det(), torch.stack([torch.det(SPD), 8 * torch.det(SPD)]))
    close(torch.einsum("bij,bj->bi", gs, vs[:2]), torch.einsum("bij,bj->bi", gs.to_dense(), vs.components[:2]))


def test_batches_of_points_come_first() -> None:
    ps = x.point(rand(4, 3))
    vs, many = x.vector(rand(4, 3), at=ps), x.vector(rand(4, 4, 3), at=ps)  # equal sizes: a wrong alignment would not raise
    ws = x.covector(rand(4, 3), at=ps)
    close(ws(many), torch.einsum("bi,bmi->bm", ws.components, many.components))
    close(vs + many, vs.components[:, None] + many.components)
    gs = x.metric(torch.stack([SPD * (i + 1) for i in range(4)]), at=ps)
    close(gs.mv(many), torch.einsum("bij,bmj->bmi", gs.components, many.components))
    close(torch.einsum("ij,j->i", gs, many), gs.mv(many))
    close(torch.einsum("i,ij,j->", vs, gs, many), torch.einsum("bi,bij,bmj->bm", vs.components, gs.components, many.components))
    close(gs.solve(gs.flat(many)), many)
    close(gs.to(psi).mv(many.to(psi)), gs.mv(many).to(psi))
    close(gs.to(psi).solve(gs.flat(many).to(psi)), many.to(psi))
    close(gs.to(psi)[2], gs[2].to(psi))
    close(vs.to(psi)[1], vs[1].to(psi))
    close(gs.logdet().to(psi), gs.to(psi).logdet())
    one = x.vector(torch.ones(3, dtype=torch.float64), at=ps)
    assert one.batch_shape == (4,)
    close(one.to(psi)[3], one[3].to(psi))
    euclid = geoad.metrics.Euclidean(x)(ps)
    close(euclid.to(psi).to_dense()[1], geoad.metrics.Euclidean(x)(ps[1]).to(psi))
    for bad in (vs.mean, lambda: torch.sum(vs, 0), lambda: gs.mean(0), lambda: gs.det().sum()):
        with pytest.raises(BasePointError, match="carry"):
            bad()
    with pytest.raises(VarianceError, match="dim=1"):
        torch.stack([vs, vs])
    assert torch.stack([vs, vs], 1).batch_shape == (4, 2)


# -- what is refused -----------------------------------------------------------------------------------------------------------

REFUSED: list[Callable[[], Any]] = [
    lambda: v + w,
    lambda: w - v,
    lambda: v + 1.0,
    lambda: v + v.components,
    lambda: v.components + v,
    lambda: G + C,
    lambda: G + E,
    lambda: G + 1e-3,
    lambda: G + torch.eye(3),
    lambda: G + v,
    lambda: rho + rho**2,
    lambda: rho + 1.0,
    lambda: rho - log_rho,
    lambda: v * v,
    lambda: G * H,
    lambda: v * v.components,
    lambda: v.components * v,
    lambda: v / v,
    lambda: 1 / v,
    lambda: v / G,
    lambda: rho * log_rho,
    lambda: log_rho * log_rho,
    lambda: log_rho * rho,
    lambda: v * 2j,
    lambda: v * True,
    lambda: v * torch.tensor([2.0]),
    lambda: np.array([1.0, 2.0, 3.0]) * v,
    lambda: v * np.array(2.0),
    lambda: v + np.ones(3),
    lambda: w(a),
    lambda: v @ u,
    lambda: G @ w,
    lambda: C @ v,
    lambda: E @ w,
    lambda: G @ G,
    lambda: B @ D,
    lambda: G @ v.components,
    lambda: v.components @ G,
    lambda: G(w, v),
    lambda: torch.einsum("i,i->", v, u),
    lambda: torch.einsum("i,i->i", w, v),
    lambda: torch.einsum("i->", v),
    lambda: torch.einsum("ii->", G),
    lambda: torch.einsum("ii->i", E),
    lambda: torch.outer(v, G),
    lambda: torch.outer(v, v.components),
    lambda: torch.tensordot(v, u, 1),
    lambda: torch.tensordot(v, v.components, 1),
    lambda: torch.trace(G),
    lambda: H.trace(),
    lambda: C.trace(),
    lambda: H.eigenvalues(),
    lambda: torch.linalg.eigvals(H),
    lambda: torch.linalg.eigvalsh(H),
    lambda: torch.linalg.eigh(H),
    lambda: torch.linalg.norm(v),
    lambda: torch.norm(v),
    lambda: v.norm(),
    lambda: abs(v),
    lambda: v**2,
    lambda: torch.sqrt(v),
    lambda: torch.exp(G),
    lambda: torch.abs(v),
    lambda: torch.log(v),
    lambda: torch.prod(v),
    lambda: v.sum(),
    lambda: torch.sum(v),
    lambda: torch.mean(G),
    lambda: torch.sum(G, -1),
    lambda: v.mean(-1),
    lambda: torch.max(v),
    lambda: torch.cat([v, v]),
    lambda: torch.flatten(G),
    lambda: v[0],
    lambda: G[0],
    lambda: G[0, 0],
    lambda: v[...],
    lambda: torch.diagonal(G),
    lambda: torch.diag(v),
    lambda: torch.linalg.qr(G),
    lambda: torch.linalg.svd(G),
    lambda: torch.linalg.solve(G, v),
    lambda: torch.linalg.solve(E, w),
    lambda: torch.linalg.solve(G, w.components),
    lambda: torch.linalg.cholesky(E),
    lambda: torch.inverse(v),
    lambda: torch.det(v),
    lambda: torch.sigmoid(v),
    lambda: torch.nn.functional.linear(v, torch.eye(3).double()),
    lambda: v < u,
    lambda: v == u,
    lambda: torch.eq(v, u),
    lambda: v != u,
    lambda: torch.allclose(v, w),
    lambda: torch.stack([v, w]),
    lambda: torch.stack([v, v.components]),
    lambda: v.item(),
    lambda: v.numpy(),
    lambda: v.shape,
    lambda: torch.transpose(v, 0, 1),
    lambda: torch.permute(J, (0, 0)),
    lambda: J.inverse(),
    lambda: rho ** torch.ones(2),
    lambda: log_rho.sqrt(),
    lambda: torch.cosine_similarity(v, u, 0),
    lambda: torch.dist(v, u),
    lambda: torch.where(torch.tensor(True), v, u),
    lambda: torch.trace(rho),
    lambda: rho @ v,
]


@pytest.mark.parametrize("call", REFUSED, ids=range(len(REFUSED)))
def test_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(VarianceError) as caught:
        call()
    assert len(str(caught.value)) > 60


@pytest.mark.parametrize("t", [v, w, G, C, E, J])
def test_other_charts_and_points_are_refused(t: Any) -> None:
    with pytest.raises(ChartMismatchError, match=r"\.to\("):
        t + t.to(psi)
    elsewhere = t.carry(to=x.point(XP + 1), chart=x)
    with pytest.raises(BasePointError, match="carry"):
        t + elsewhere
    with pytest.raises(BasePointError, match="carry"):
        torch.stack([t, elsewhere])
