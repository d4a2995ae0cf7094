"""Geometry-blind linear algebra: structure, solves, determinants, eigenvalues, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import geoad
from geoad import operators as ops
from geoad.errors import GeometryError, SingularMetricError
from geoad.operators import spectra
from geoad.operators.eigen import lanczos
from geoad.params import Blocks, Layout

torch.manual_seed(0)
LAYOUT = Layout({"w": (2, 3), "b": (2,)})
D = LAYOUT.dim


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Hidden(ops.Implicit):
    """A matrix that is known by its products only."""

    def __init__(self, layout: Layout, matrix: Tensor, *, symmetric: bool = True, definite: bool = False) -> None:
        super().__init__(layout, {"": matrix}, symmetric=symmetric, definite=definite)
        self.matrix = matrix
        self.products = 0

    def mv(self, v: Blocks) -> Blocks:
        self.products += 1
        return self.layout.unravel(self.layout.ravel(v) @ self.matrix.mT)


A, S = rand(D, D), rand(D, D)
SPD = S @ S.mT + torch.eye(D, dtype=torch.float64)
entries = LAYOUT.unravel(torch.linspace(0.5, 4.0, D, dtype=torch.float64))
two = torch.tensor(2.0, dtype=torch.float64)
OPERATORS: dict[str, ops.LinearOperator] = {
    "dense": ops.Dense(LAYOUT, A),
    "spd": ops.Dense(LAYOUT, SPD, definite=True),
    "symmetric": ops.Dense(LAYOUT, A + A.mT, symmetric=True),
    "diagonal": ops.Diagonal(LAYOUT, entries, definite=True),
    "multiple": ops.Multiple(LAYOUT, two, definite=True),
    "hidden": Hidden(LAYOUT, SPD),
    "hidden general": Hidden(LAYOUT, A, symmetric=False),
    "sum": ops.plus(Hidden(LAYOUT, SPD), ops.Diagonal(LAYOUT, entries)),
    "product": ops.Product(ops.Dense(LAYOUT, A), ops.Dense(LAYOUT, SPD)),
    "transpose": ops.Transpose(Hidden(LAYOUT, A, symmetric=False)),
    "inverse": ops.inverse(ops.Dense(LAYOUT, SPD, symmetric=True), positive=True),
    "general inverse": ops.inverse(ops.Dense(LAYOUT, A)),
    "detached": ops.Detached(ops.Dense(LAYOUT, A)),
}


def close(got: Tensor, want: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


@pytest.mark.parametrize("name", OPERATORS)
def test_products_solves_and_invariants_agree_with_the_matrix(name: str) -> None:
    op = OPERATORS[name]
    matrix, v = ops.to_dense(op), rand(D)
    close(LAYOUT.ravel(op.mv(LAYOUT.unravel(v))), matrix @ v)
    close(LAYOUT.ravel(op.rmv(LAYOUT.unravel(v))), matrix.mT @ v)
    close(LAYOUT.ravel(ops.solve(op, LAYOUT.unravel(v))), torch.linalg.solve(matrix, v), 1e-8)
    close(ops.to_dense(ops.inverse(op)), torch.linalg.inv(matrix), 1e-8)
    close(ops.to_dense(ops.transpose(op)), matrix.mT)
    close(ops.trace(op), matrix.trace())
    sign, value = ops.slogdet(op)
    want = torch.linalg.slogdet(matrix)
    close(sign, want.sign)
    close(value, want.logabsdet, 1e-9)
    values = ops.eigvals(op)
    close(values.abs().sort().values, torch.linalg.eigvals(matrix).abs().sort().values, 1e-8)
    assert repr(op).startswith(type(op).__name__)


@pytest.mark.parametrize("a", OPERATORS)
@pytest.mark.parametrize("b", OPERATORS)
def test_sums_and_products_of_all_pairs(a: str, b: str) -> None:
    x, y = OPERATORS[a], OPERATORS[b]
    p, q = ops.to_dense(x), ops.to_dense(y)
    close(ops.to_dense(ops.plus(x, y)), p + q)
    close(ops.to_dense(ops.compose(x, y)), p @ q)
    close(ops.to_dense(ops.times(-3.0, x, positive=False)), -3 * p)
    if ops.plus(x, y).symmetric:
        close(p + q, (p + q).mT)


def test_structure_survives() -> None:
    multiple, diagonal = OPERATORS["multiple"], OPERATORS["diagonal"]
    assert type(ops.plus(multiple, multiple)) is ops.Multiple and type(ops.inverse(multiple)) is ops.Multiple
    assert type(ops.plus(multiple, diagonal)) is ops.Diagonal and type(ops.inverse(diagonal)) is ops.Diagonal
    assert type(ops.compose(multiple, diagonal)) is ops.Diagonal
    assert type(ops.compose(multiple, OPERATORS["spd"])) is ops.Dense and ops.compose(multiple, OPERATORS["spd"]).symmetric
    general = OPERATORS["hidden general"]
    assert ops.plus(general, ops.transpose(general)).symmetric and not ops.plus(general, general).symmetric
    flipped = ops.transpose(general)
    assert not ops.plus(flipped, flipped).symmetric
    assert ops.plus(OPERATORS["dense"], ops.transpose(OPERATORS["dense"])).symmetric


def test_batches_broadcast() -> None:
    stacked = torch.stack([SPD, 2 * SPD, 3 * SPD])
    op = ops.Dense(LAYOUT, stacked, definite=True)
    rhs = rand(3, D)
    solution = LAYOUT.ravel(ops.solve(op, LAYOUT.unravel(rhs), positive=True))
    close(solution, torch.linalg.solve(stacked, rhs.unsqueeze(-1)).squeeze(-1))
    close(LAYOUT.ravel(ops.solve(op, LAYOUT.unravel(rhs[0]))), torch.stack([torch.linalg.solve(m, rhs[0]) for m in stacked]))
    general = ops.Dense(LAYOUT, torch.stack([A, A + SPD]))
    close(
        LAYOUT.ravel(ops.solve(general, LAYOUT.unravel(rhs[0]))),
        torch.stack([torch.linalg.solve(m, rhs[0]) for m in general.matrix]),
    )
    close(ops.eigvals(op, 2), torch.linalg.eigvalsh(stacked).flip(-1)[:, :2])
    values, vectors = ops.eigh(op, ops.Dense(LAYOUT, SPD, definite=True), 3)
    close(values, torch.tensor([1.0, 2.0, 3.0]).double()[:, None].expand(3, 3))
    assert vectors.shape == (3, D, 3)
    close(ops.slogdet(op)[1], torch.linalg.slogdet(stacked).logabsdet)
    many = ops.Multiple(LAYOUT, torch.tensor([1.0, 2.0]).double())
    close(ops.to_dense(many)[1], 2 * torch.eye(D).double())
    close(LAYOUT.ravel(many.mv(LAYOUT.unravel(rhs[0]))), torch.stack([rhs[0], 2 * rhs[0]]))
    close(LAYOUT.ravel(ops.solve(many, LAYOUT.unravel(rhs[0]))), torch.stack([rhs[0], rhs[0] / 2]))
    close(ops.eigvals(many, 3), torch.tensor([[1.0] * 3, [2.0] * 3]).double())
    close(ops.slogdet(many)[1], torch.tensor([0.0, D * math.log(2.0)]).double())


# -- singular and badly scaled -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 5, 19])
def test_semidefinite_matrices_are_told_apart(dtype: torch.dtype, rank: int) -> None:
    layout = Layout({"x": (20,)})
    factor = rand(20, rank).to(dtype)
    b = layout.unravel(torch.ones(20, dtype=dtype))
    for matrix in (factor @ factor.mT, 1e-12 * factor @ factor.mT, 1e12 * factor @ factor.mT):
        matrix = 0.5 * (matrix + matrix.mT)
        with pytest.raises(SingularMetricError, match="Euclidean"):
            ops.solve(ops.Dense(layout, matrix, symmetric=True), b, positive=True)
        with pytest.raises(SingularMetricError, match=r"lam \* G"):
            ops.solve(ops.Dense(layout, matrix), b)
        sign, value = ops.slogdet(ops.Dense(layout, matrix, symmetric=True))
        assert float(sign) == 0 and float(value) == -math.inf
        assert float(ops.slogdet(ops.Dense(layout, matrix))[1]) == -math.inf
        size = float(matrix.abs().max())
        damped = ops.Dense(layout, matrix + 0.1 * size * torch.eye(20, dtype=dtype), symmetric=True)
        x = layout.ravel(ops.solve(damped, b, positive=True))
        assert torch.allclose(damped.matrix @ x, b["x"], atol=1e-3 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("structure", ["definite", "symmetric", "general", "diagonal"])
def test_badly_scaled_but_definite(structure: str) -> None:
    scales = torch.logspace(-12, 12, 9, dtype=torch.float64)
    layout = Layout({"x": (9,)})
    core = torch.eye(9, dtype=torch.float64) + 0.3
    matrix = torch.diag(scales) if structure == "diagonal" else scales.sqrt()[:, None] * core * scales.sqrt()
    flags: dict[str, bool] = {"definite": {"definite": True}, "symmetric": {"symmetric": True}}.get(structure, {})
    op: Any = ops.Diagonal(layout, {"x": scales}) if structure == "diagonal" else ops.Dense(layout, matrix, **flags)
    want = rand(9)
    got = layout.ravel(ops.solve(op, layout.unravel(matrix @ want), positive=structure == "definite"))
    torch.testing.assert_close(got * scales.sqrt(), want * scales.sqrt(), rtol=1e-8, atol=1e-8 * float(scales.sqrt().max()))
    sign, value = ops.slogdet(op)
    expected = scales.log().sum() + (0 if structure == "diagonal" else torch.linalg.slogdet(core).logabsdet)
    assert float(sign) == 1
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-8)


def test_scaled_rows_and_columns_are_not_singular() -> None:
    layout = Layout({"x": (2,)})
    for matrix in ([[1.0, 1e16], [1.0, -1e16]], [[1.0, 1.0], [1e16, -1e16]]):
        op = ops.Dense(layout, torch.tensor(matrix, dtype=torch.float64))
        want = torch.tensor([1.0, 2 / matrix[0][1]], dtype=torch.float64)
        x = layout.ravel(ops.solve(op, {"x": op.matrix @ want}))
        torch.testing.assert_close(x, want, rtol=1e-9, atol=0)
        assert math.isfinite(float(ops.slogdet(op)[1]))


def test_indefinite_and_not_finite() -> None:
    layout = Layout({"x": (2,)})
    saddle = ops.Dense(layout, torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double(), symmetric=True)
    with pytest.raises(SingularMetricError):
        ops.solve(saddle, {"x": rand(2)}, positive=True)
    assert float(ops.slogdet(saddle)[0]) == -1
    close(layout.ravel(ops.solve(saddle, {"x": torch.ones(2).double()})), torch.full((2,), 1 / 3).double(), 1e-6)
    broken = ops.Dense(layout, torch.tensor([[1.0, math.nan], [math.nan, 1.0]]), symmetric=True)
    for call in (lambda: ops.solve(broken, {"x": torch.ones(2)}), lambda: ops.slogdet(broken)):
        with pytest.raises(GeometryError, match="NaN"):
            call()
    zero = ops.Multiple(layout, torch.zeros(()))
    with pytest.raises(SingularMetricError):
        ops.inverse(zero)


def test_gradients_of_invariants() -> None:
    matrix = SPD.clone().requires_grad_()
    for flags in ({"definite": True}, {"symmetric": True}, {}):
        (slope,) = torch.autograd.grad(ops.slogdet(ops.Dense(LAYOUT, matrix, **flags))[1], matrix)
        close(0.5 * (slope + slope.mT), torch.linalg.inv(SPD), 1e-8)
    b = rand(D)
    for flags in ({"definite": True}, {"symmetric": True}):
        x = LAYOUT.ravel(ops.solve(ops.Dense(LAYOUT, matrix, **flags), LAYOUT.unravel(b)))
        (slope,) = torch.autograd.grad(x.sum(), matrix)
        (want,) = torch.autograd.grad(torch.linalg.solve(matrix, b).sum(), matrix)
        close(slope + slope.mT, want + want.mT, 1e-8)


# -- conjugate gradients and Lanczos -------------------------------------------------------------------------------------


def test_conjugate_gradients() -> None:
    b = LAYOUT.unravel(rand(D))
    close(LAYOUT.ravel(ops.CG()(Hidden(LAYOUT, SPD), b)), torch.linalg.solve(SPD, LAYOUT.ravel(b)), 1e-8)
    assert float(LAYOUT.ravel(ops.CG()(Hidden(LAYOUT, SPD), LAYOUT.unravel(torch.zeros(D).double()))).abs().max()) == 0
    with pytest.raises(SingularMetricError, match="damping"):
        ops.CG()(Hidden(LAYOUT, -SPD), b)
    with pytest.raises(SingularMetricError, match="max_iter"):
        ops.CG(max_iter=1)(Hidden(LAYOUT, SPD), b)
    rows = LAYOUT.unravel(rand(4, D))
    got = ops.solve(Hidden(LAYOUT, SPD), rows, method=ops.CG())
    close(LAYOUT.ravel(got), torch.linalg.solve(SPD, LAYOUT.ravel(rows).mT).mT, 1e-8)


def spectrum(values: list[float], seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.mT


SPECTRA: dict[str, list[float]] = {
    "simple": [float(i) for i in range(-10, 30)],
    "double": [5.0, 5.0, 1.0, *([0.5] * 7)],
    "triple inside": [9.0, 4.0, 4.0, 4.0, *(0.1 * i for i in range(26))],
    "identity": [1.0] * 12,
    "zero": [0.0] * 9,
    "rank two": [3.0, 2.0, *([0.0] * 18)],
    "symmetric about zero": [*range(-8, 9)],
    "tiny": [1e-9, 2e-9, 3e-9, 4e-9],
    "one": [2.5],
    "two": [1.0, -4.0],
}


@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
@pytest.mark.parametrize("name", SPECTRA)
def test_lanczos_finds_every_copy(name: str, which: str, with_metric: bool) -> None:
    matrix = spectrum([float(value) for value in SPECTRA[name]])
    d = matrix.shape[0]
    layout = Layout({"x": (d,)})
    root = torch.eye(d, dtype=torch.float64)
    g = None
    if with_metric:
        root = root + 0.3 * rand(d, d) / math.sqrt(d)
        matrix = root.mT @ matrix @ root
        g = Hidden(layout, root.mT @ root, definite=True)
    for k in sorted({1, min(3, d), d}):
        values, vectors = lanczos(Hidden(layout, matrix), g, k, which)
        want, _ = ops.eigh(ops.Dense(layout, matrix, symmetric=True), g, k, which)
        size = float(matrix.abs().max()) + 1e-300
        close(values.abs().sort().values / size, want.abs().sort().values / size, 1e-8)
        metric = torch.eye(d, dtype=torch.float64) if g is None else g.matrix
        close(vectors.mT @ metric @ vectors, torch.eye(k, dtype=torch.float64), 1e-7)
        close(matrix @ vectors / size, metric @ vectors * values / size, 1e-6)


def test_lanczos_is_used_for_large_matrix_free_operators_and_stops_early() -> None:
    layout = Layout({"x": (300,)})
    hidden = Hidden(layout, spectrum([100.0, 90.0, 80.0, *(i / 300 for i in range(297))]))
    values = ops.eigvals(hidden, 3)
    close(values, torch.tensor([100.0, 90.0, 80.0]).double(), 1e-8)
    assert hidden.products < 150


def test_lanczos_in_single_precision() -> None:
    layout = Layout({"x": (200,)})
    hidden = Hidden(layout, spectrum([10.0, 9.0, 9.0, *(i / 200 for i in range(197))]).float())
    values = ops.eigvals(hidden, 3)
    assert values.dtype == torch.float32 and hidden.products < 150
    close(values, torch.tensor([10.0, 9.0, 9.0], dtype=torch.float32), 1e-4)


def test_eigenvalue_arguments() -> None:
    for k in (0, D + 1, -1):
        with pytest.raises(GeometryError, match="1 <= k"):
            ops.eigvals(OPERATORS["spd"], k)
    with pytest.raises(GeometryError, match="magnitude"):
        ops.eigvals(OPERATORS["spd"], which="middle")
    singular = ops.Dense(LAYOUT, torch.zeros(D, D).double(), symmetric=True)
    with pytest.raises(SingularMetricError):
        ops.eigh(OPERATORS["symmetric"], singular)
    product = ops.compose(ops.inverse(OPERATORS["spd"], positive=True), OPERATORS["symmetric"])
    assert not ops.eigvals(product).is_complex() and not ops.eigvals(ops.transpose(product)).is_complex()


def test_single_precision_operators() -> None:
    op = ops.Dense(LAYOUT, SPD.float(), definite=True)
    x = LAYOUT.ravel(ops.solve(op, LAYOUT.unravel(torch.ones(D, dtype=torch.float32)), positive=True))
    assert x.dtype == torch.float32
    close(x.double(), torch.linalg.solve(SPD, torch.ones(D).double()), 1e-4)


# -- what is not made behind one's back ----------------------------------------------------------------------------------


def test_large_operators_refuse_without_allocating() -> None:
    d = 1_000_000  # the dense matrix would have 4 TB
    chart = geoad.Chart({"x": (d,)}, name="big")
    p = chart.point(torch.ones(d))
    w = chart.covector(torch.ones(d), at=p)
    identity, diagonal = geoad.metrics.Euclidean(chart)(p), geoad.metrics.Diagonal(chart, 2.0)(p)
    hessian = geoad.hessian(chart.scalar_field(lambda c: (c**4).sum()))(p)
    endomorphism = identity.inverse() @ hessian
    for thing in (identity, diagonal, hessian, hessian + identity, endomorphism):
        for call in (lambda t=thing: t.components, lambda t=thing: torch.einsum("ij,k->ijk", t, w)):
            with pytest.raises(GeometryError, match=r"\.to_dense\(\) if you have the memory"):
                call()
    for call in (
        endomorphism.trace,
        hessian.logdet,
        hessian.cholesky,
        lambda: hessian.to(torch.float32),
        endomorphism.eigenvalues,
    ):
        with pytest.raises(GeometryError, match=r"\.to_dense\(\) if you have the memory"):
            call()
    with pytest.raises(SingularMetricError, match="Euclidean"):
        geoad.Metric(chart, hessian.op, p).sharp(w)
    assert float(identity.logdet().components) == 0 and float(identity.inverse()(w, w)) == pytest.approx(d)
    assert float((identity.inverse() @ diagonal).trace()) == pytest.approx(2 * d)
    assert bool(torch.isfinite(identity)) and float(torch.zeros_like(hessian).op.factor) == 0
    assert (hessian + identity).solve(w).chart == chart


# -- where LAPACK fails in float32 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["raises", "nan"])
def test_eigenvalues_where_the_algorithm_fails(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eigh, eigvalsh = torch.linalg.eigh, torch.linalg.eigvalsh

    def failing(matrix: torch.Tensor) -> Any:
        if matrix.dtype == torch.float64:
            return eigh(matrix)
        if how == "raises":
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        values, vectors = eigh(matrix)
        return values, vectors * float("nan")

    def failing_values(matrix: torch.Tensor) -> torch.Tensor:
        if matrix.dtype == torch.float64:
            return eigvalsh(matrix)
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    monkeypatch.setattr(torch.linalg, "eigvalsh", failing_values)
    root = torch.randn(3, 6, dtype=torch.float32)
    matrix = root.mT @ root
    values, vectors = spectra.symmetric_eigh(matrix)
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close(vectors @ values.diag() @ vectors.mT, matrix, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(spectra.symmetric_eigvals(matrix), eigvalsh(matrix.double()).float())
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (matrix[0], matrix * float("nan")))
    with pytest.raises(GeometryError, match="LAPACK did not find the eigenvalues"):
        spectra.symmetric_eigh(matrix)


@pytest.mark.parametrize("seed", range(4))
def test_large_matrices_of_low_rank_with_rows_of_zeros(seed: int) -> None:
    torch.manual_seed(seed)
    rows = (torch.randn(9, 600) * (torch.rand(600) > 0.5)).float()  # signals of a layer, with units that are off
    matrix = rows.mT @ rows
    values, vectors = spectra.symmetric_eigh(matrix)
    size = float(values.max())
    torch.testing.assert_close(vectors @ (values.unsqueeze(-1) * vectors.mT), matrix, rtol=0, atol=1e-5 * size)
    torch.testing.assert_close(spectra.symmetric_eigvals(matrix), values, rtol=0, atol=1e-5 * size)
