"""The master test: for every object, change of coordinates and model, compute-then-move equals move-then-compute.

One side is geoad. The other side is plain ``torch.func`` in the ψ coordinates: the loss, the outputs and the metrics are
written as functions of the raveled ψ and differentiated there, Christoffel symbols are built densely from the matrix of the
metric in ψ, Jacobians are ``jacrev`` of the bare maps, equations go through ``torch.linalg``. No point, typed object or law of
geoad is used on that side.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import geoad
from geoad import maps
from geoad.charts import Chart, Point
from geoad.curvature import Fisher, Gaussian
from geoad.maps.base import BlockMap, Diffeomorphism
from geoad.maps.elementwise import Elementwise
from geoad.maps.select import bind
from geoad.metrics import Constant, Diagonal, Euclidean, Pullback
from geoad.params import Blocks
from geoad.testing import SmallNetwork, condition, strategies
from geoad.testing.networks import NETWORKS, build
from geoad.testing.recipes import RECIPES, applicable, inside

TOLERANCE = 1e-10
MAX_CONDITION = 1e3

Matrix = Callable[[Tensor], Tensor]
"""The matrix of a metric in ψ as a function of the raveled ψ."""


def tolerance(kappa: float) -> float:
    """1e-10, times cond(J)/100 where J is conditioned worse than 100 (the worst one that is drawn has cond(J) = 1000)."""
    return TOLERANCE * max(1.0, kappa / 100)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(seed: int, d: int) -> Tensor:
    half = normal(seed, d, d) / d**0.5
    return half @ half.mT + torch.eye(d, dtype=torch.float64)


def derivative(fn: Callable[[Tensor], Tensor], forward: bool = False) -> Callable[[Tensor], Tensor]:
    result: Any = torch.func.jacfwd(fn) if forward else torch.func.jacrev(fn)
    return result


class World:
    """A function h, a map f into a space and a point: as plain functions of the reference blocks, and as geoad sees them."""

    def __init__(
        self,
        p: Point,
        psi: Chart,
        h: Callable[[Blocks], Tensor],
        f: Callable[[Blocks], Tensor],
        loss: geoad.ScalarField,
        net: SmallNetwork | None = None,
    ) -> None:
        self.theta, self.psi, self.net, self.loss, self.h, self.f = p.chart, psi, net, loss, h, f
        self.p, self.there = p, p.to(psi)
        self.d = psi.dim
        steps: list[Diffeomorphism] = []
        chart = psi
        while chart.parent is not None:
            steps.insert(0, chart.parent.map)
            chart = chart.parent.source
        self.steps = steps
        self.x = self.theta.layout.ravel(p.blocks)
        self.z = self.forward(self.x)
        self.kappa = condition(psi, p)

    # -- plain functions of the raveled numbers --------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.theta.layout.unravel(x)
        for step in self.steps:
            blocks = step.forward(blocks)
        return self.psi.layout.ravel(blocks)

    def blocks(self, z: Tensor) -> Blocks:
        blocks = self.psi.layout.unravel(z)
        for step in reversed(self.steps):
            blocks = step.invert(blocks)
        return blocks

    def invert(self, z: Tensor) -> Tensor:
        return self.theta.layout.ravel(self.blocks(z))

    def h_psi(self, z: Tensor) -> Tensor:
        return self.h(self.blocks(z))

    def f_psi(self, z: Tensor) -> Tensor:
        return self.f(self.blocks(z))

    @cached_property
    def J(self) -> Tensor:
        return derivative(self.forward)(self.x)

    @cached_property
    def K(self) -> Tensor:
        return derivative(self.invert)(self.z)

    @cached_property
    def slope(self) -> Tensor:
        return torch.func.grad(self.h_psi)(self.z)

    @cached_property
    def second(self) -> Tensor:
        return derivative(torch.func.grad(self.h_psi), forward=True)(self.z)

    def drawn(self, seed: int) -> Tensor:
        return normal(seed, self.d)

    # -- metrics: geoad's field and the plain matrix in ψ ------------------------------------------------------------------

    def moved(self, matrix: Callable[[Blocks], Tensor]) -> Matrix:
        """Kᵀ G K of a matrix that is given as a function of the reference blocks."""

        def at(z: Tensor) -> Tensor:
            k = derivative(self.invert)(z)
            return k.mT @ matrix(self.blocks(z)) @ k

        return at

    @cached_property
    def metrics(self) -> dict[str, tuple[geoad.FormField, Matrix]]:
        theta, psi, d = self.theta, self.psi, self.d
        eye, dense, diagonal = torch.eye(d, dtype=torch.float64), positive(1, d), 1 + normal(2, d).abs()
        in_psi = positive(3, d)

        def bent(x: Tensor) -> Tensor:
            return dense + torch.outer(torch.sin(x), torch.sin(x)) + torch.diag(0.5 * torch.cos(x))

        flat = self.moved(lambda blocks: eye)

        def gram(z: Tensor) -> Tensor:
            j = derivative(self.f_psi)(z).reshape(-1, d)
            return j.mT @ j + flat(z)

        out = geoad.Chart({"out": self.f(self.p.blocks).shape}, "out")
        pulled = Pullback(lambda c: self.f(theta.pack(c)), Euclidean(out), chart=theta)
        found: dict[str, tuple[geoad.FormField, Matrix]] = {
            "euclidean": (Euclidean(theta), flat),
            "euclidean in psi": (Euclidean(psi), lambda z: eye),
            "constant": (Constant(theta, dense), self.moved(lambda blocks: dense)),
            "constant in psi": (Constant(psi, in_psi), lambda z: in_psi),
            "diagonal": (
                Diagonal(theta, theta.layout.unravel(diagonal)),
                self.moved(lambda blocks: torch.diag(diagonal)),
            ),
            "function": (
                theta.metric_field(lambda c: bent(theta.layout.ravel(theta.pack(c)))),
                self.moved(lambda blocks: bent(theta.layout.ravel(blocks))),
            ),
            "function in psi": (psi.metric_field(lambda c: bent(psi.layout.ravel(psi.pack(c)))), bent),
            "pull-back": (pulled + Euclidean(theta), gram),
            "mixed": (Euclidean(theta) + 0.5 * Constant(psi, in_psi), lambda z: flat(z) + 0.5 * in_psi),
        }
        if self.net is not None:
            for name, (field, matrix) in self.fishers.items():
                damped = field + 0.5 * Euclidean(theta)
                found[name] = (damped, lambda z, matrix=matrix: matrix(z) + 0.5 * flat(z))
        return found

    @cached_property
    def fishers(self) -> dict[str, tuple[geoad.FormField, Matrix]]:
        """Fisher matrices by their definition: the second moment of the score over labels, or of the Gaussian residual."""
        assert self.net is not None
        geo, x = self.net.geo, self.net.inputs
        n = len(x)
        sigma = positive(4, 2)

        def categorical(z: Tensor) -> Tensor:
            logs = torch.log_softmax(self.f_psi(z), -1)
            scores = derivative(lambda y: torch.log_softmax(self.f_psi(y), -1))(z)
            return torch.einsum("nc,nci,ncj->ij", logs.exp(), scores, scores) / n

        def gaussian(z: Tensor) -> Tensor:
            j = derivative(self.f_psi)(z)
            return torch.einsum("nci,cd,ndj->ij", j, torch.linalg.inv(sigma), j) / n

        return {
            "categorical": (Fisher(geo, x, "categorical"), categorical),
            "categorical dense": (Fisher(geo, x, "categorical", representation="dense"), categorical),
            "categorical in psi": (Fisher(geo, x, "categorical", chart=self.psi), categorical),
            "gaussian": (Fisher(geo, x, Gaussian(sigma)), gaussian),
            "gaussian dense in psi": (Fisher(geo, x, Gaussian(sigma), chart=self.psi, representation="dense"), gaussian),
        }

    def basic(self) -> Iterator[tuple[geoad.FormField, Tensor]]:
        """The fields of `METRICS`, with their matrices in ψ."""
        return ((self.metrics[name][0], self.matrix(name)) for name in METRICS if name in self.metrics)

    @functools.cache  # noqa: B019
    def matrix(self, name: str) -> Tensor:
        """The matrix of a metric at the point, in ψ."""
        return self.metrics[name][1](self.z)

    @functools.cache  # noqa: B019
    def symbols(self, name: str) -> Tensor:
        """Γ[k, i, j] of a metric in ψ, from the derivatives of its matrix there."""
        slope = derivative(self.metrics[name][1], forward=True)(self.z)  # [a, b, i] = ∂_i G_ab
        first = 0.5 * (torch.einsum("jli->lij", slope) + torch.einsum("ilj->lij", slope) - torch.einsum("ijl->lij", slope))
        return torch.linalg.solve(self.matrix(name), first.reshape(self.d, -1)).reshape(first.shape)

    def hessian(self, name: str) -> Tensor:
        """∂²h - Γ·∂h in ψ."""
        return self.second - torch.einsum("kij,k->ij", self.symbols(name), self.slope)


Check = tuple[Any, Any] | tuple[Any, Any, float]
OBJECTS: dict[str, Callable[[World], Iterator[Check]]] = {}
METRICS = ["euclidean", "constant", "constant in psi", "diagonal", "function", "pull-back", "mixed", "categorical"]
"""The metrics that every object is tried with; the others differ from them in their connection or representation only."""


def natural(check: Callable[[World], Iterator[Check]]) -> Callable[[World], Iterator[Check]]:
    """Registers a check: it yields (geoad's numbers, plain numbers) and, if not the norm of the latter, the error's scale."""
    OBJECTS[check.__name__] = check
    return check


def verify(name: str, world: World) -> None:
    allowed = tolerance(world.kappa)
    checked = 0
    for i, (found, expected, *scale) in enumerate(OBJECTS[name](world)):
        found, expected = torch.as_tensor(found), torch.as_tensor(expected)
        assert found.shape == expected.shape, f"{name}, check {i}: {tuple(found.shape)} and {tuple(expected.shape)}"
        assert bool(expected.isfinite().all()), f"{name}, check {i}: the plain side is not finite"
        size = max(float(expected.norm()), scale[0] if scale else 0.0, 1e-6)
        error = float((found - expected).norm()) / size
        assert error <= allowed, (
            f"{name}, check {i}: relative error {error:.2g}, allowed {allowed:.2g} (cond J {world.kappa:.3g})"
        )
        checked += 1
    assert checked or name == "fisher"


# -- the objects -----------------------------------------------------------------------------------------------------------


@natural
def point(w: World) -> Iterator[Check]:
    yield w.there.ravel(), w.z
    yield w.psi.point(w.psi.layout.unravel(w.z)).to(w.theta).ravel(), w.x
    yield w.K @ w.J, torch.eye(w.d, dtype=torch.float64)


@natural
def scalar_field(w: World) -> Iterator[Check]:
    yield w.loss(w.there), w.h_psi(w.z)
    yield w.loss.to(w.psi).function()(w.there.components), w.h_psi(w.z)
    both = (w.loss * w.loss + 0.5 * w.loss).map(torch.sin)
    yield both(w.there), torch.sin(w.h_psi(w.z) ** 2 + 0.5 * w.h_psi(w.z))


@natural
def vector(w: World) -> Iterator[Check]:
    v, u = w.drawn(10), w.drawn(11)
    yield w.theta.vector(w.theta.layout.unravel(v), at=w.p).to(w.psi).ravel(), w.J @ v
    yield w.psi.vector(w.psi.layout.unravel(u), at=w.there).to(w.theta).ravel(), torch.linalg.solve(w.J, u)


@natural
def covector(w: World) -> Iterator[Check]:
    a, b = w.drawn(12), w.drawn(13)
    moved = w.theta.covector(w.theta.layout.unravel(a), at=w.p).to(w.psi)
    yield moved.ravel(), torch.linalg.solve(w.J.mT, a)
    yield w.psi.covector(w.psi.layout.unravel(b), at=w.there).to(w.theta).ravel(), w.J.mT @ b
    v = w.psi.vector(w.psi.layout.unravel(b), at=w.there)
    yield moved(v), (w.K.mT @ a) @ b, float((w.K.mT @ a).norm() * b.norm())


@natural
def differential(w: World) -> Iterator[Check]:
    yield geoad.grad(w.loss)(w.p).to(w.psi).ravel(), w.slope
    value, slope = geoad.value_and_grad(w.loss)(w.there)
    yield slope.ravel(), w.slope
    yield value, w.h_psi(w.z)
    dropped = geoad.grad(lambda c: w.h(w.theta.pack(c)))(w.there)
    yield dropped.ravel(), w.slope
    if w.net is not None:
        geo = w.net.geo.to(w.psi)
        try:
            geo.zero_grad()
            functional.cross_entropy(geo(w.net.inputs), w.net.targets).backward()
            yield geo.grad.ravel(), w.slope
            yield w.psi.layout.ravel({name: p.grad for name, p in geo.named_parameters() if p.grad is not None}), w.slope
        finally:
            geo.zero_grad()
            geo.to(w.theta)


@natural
def riemannian_gradient(w: World) -> Iterator[Check]:
    for field, matrix in w.basic():
        expected = torch.linalg.solve(matrix, w.slope)
        yield geoad.riemannian_grad(w.loss, field)(w.p).to(w.psi).ravel(), expected
        yield geoad.riemannian_grad(w.loss, field)(w.there).ravel(), expected
    yield geoad.riemannian_grad(w.loss)(w.there).ravel(), torch.linalg.solve(w.matrix("euclidean"), w.slope)


@natural
def form(w: World) -> Iterator[Check]:
    m, u, v = normal(20, w.d, w.d), w.drawn(21), w.drawn(22)
    moved = w.K.mT @ m @ w.K
    B = w.theta.form(m, at=w.p).to(w.psi)
    a, b = (w.psi.vector(w.psi.layout.unravel(each), at=w.there) for each in (u, v))
    yield B.to_dense(), moved
    yield B.mv(b).ravel(), moved @ v
    yield B.mT.mv(b).ravel(), moved.mT @ v
    yield B.operator.rmv(b.blocks)[w.psi.layout.names[0]].flatten(), (moved.mT @ v)[: w.psi.layout.sizes[0]]
    yield B(a, b), u @ moved @ v, float(u.norm() * (moved @ v).norm())
    yield w.psi.form(m, at=w.there).to(w.theta).to_dense(), w.J.mT @ m @ w.J
    yield (2.0 * B - B.mT).to_dense(), 2 * moved - moved.mT


@natural
def components(w: World) -> Iterator[Check]:
    """`.components` in the blocks of the chart, and what they make again."""
    layout, m = w.psi.layout, positive(48, w.d)
    moved = w.K.mT @ m @ w.K
    for G in (w.theta.metric(m, at=w.p).to(w.psi), w.theta.form(m, at=w.p).to(w.psi)):
        found = blocks = G.components
        if not w.psi.plain:
            found = torch.cat([torch.cat([blocks[r][c].reshape(layout[r].numel(), -1) for c in layout], 1) for r in layout])
            assert all(blocks[r][c].shape == (*layout[r], *layout[c]) for r in layout for c in layout)
        yield found.reshape(w.d, w.d), moved
        yield w.psi.form(blocks, at=w.there).to_dense(), moved
    v = w.theta.vector(layout.unravel(w.drawn(49)), at=w.p).to(w.psi)
    yield layout.ravel(w.psi.pack(v.components)), w.J @ w.drawn(49)
    yield w.psi.point(w.there.components).ravel(), w.z


@natural
def metric(w: World) -> Iterator[Check]:
    u, a = w.drawn(23), w.drawn(24)
    v = w.psi.vector(w.psi.layout.unravel(u), at=w.there)
    c = w.psi.covector(w.psi.layout.unravel(a), at=w.there)
    for field, m in w.basic():
        G = field(w.there)
        yield G.to_dense(), m
        yield field(w.p).to(w.psi).to_dense(), m
        yield (
            field.to(w.psi)(w.there).operator.mv(v.blocks)[w.psi.layout.names[-1]].flatten(),
            (m @ u)[-w.psi.layout.sizes[-1] :],
        )
        yield G.flat(v).ravel(), m @ u
        yield G.norm(v), (u @ m @ u).sqrt()
        yield G.norm(c), (a @ torch.linalg.solve(m, a)).sqrt()
        yield G.sharp(c).ravel(), torch.linalg.solve(m, a)
        damped = m + 0.3 * w.matrix("euclidean")
        yield G.solve(c, damping=0.3).ravel(), torch.linalg.solve(damped, a)


@natural
def cometric(w: World) -> Iterator[Check]:
    a, m = w.drawn(25), positive(26, w.d)
    c = w.psi.covector(w.psi.layout.unravel(a), at=w.there)
    for field, matrix in w.basic():
        inverse = field(w.p).inverse().to(w.psi)
        yield inverse.to_dense(), torch.linalg.inv(matrix)
        yield inverse.mv(c).ravel(), torch.linalg.solve(matrix, a)
        yield inverse.inverse().to_dense(), matrix
    damped = w.metrics["function"][0](w.there).inverse(damping=0.3)
    yield damped.to_dense(), torch.linalg.inv(w.matrix("function") + 0.3 * w.matrix("euclidean"))
    C = w.theta.cometric(m, at=w.p).to(w.psi)
    yield C.to_dense(), w.J @ m @ w.J.mT
    yield C.norm(c), (a @ w.J @ m @ w.J.mT @ a).sqrt()


@natural
def solve(w: World) -> Iterator[Check]:
    """An indefinite form: no Cholesky."""
    m, a = normal(27, w.d, w.d), w.drawn(28)
    m = m + m.mT + 3 * torch.diag(normal(29, w.d).sign()) * w.d**0.5
    c = w.psi.covector(w.psi.layout.unravel(a), at=w.there)
    moved = w.K.mT @ m @ w.K
    scale = float(torch.linalg.cond(m)) / 10
    expected = torch.linalg.solve(moved, a)
    yield w.theta.form(m, at=w.p).to(w.psi).solve(c).ravel(), expected, scale * float(expected.norm())


@natural
def endomorphism(w: World) -> Iterator[Check]:
    u, m = w.drawn(30), normal(31, w.d, w.d)
    v = w.psi.vector(w.psi.layout.unravel(u), at=w.there)
    A = w.theta.endomorphism(m, at=w.p).to(w.psi)
    own = w.J @ m @ w.K
    yield A.to_dense(), own
    yield A.mv(v).ravel(), own @ u
    yield A.mT.to_dense(), own.mT
    yield A.trace(), own.trace(), float(own.norm())
    yield A.compose(A).to_dense(), own @ own
    yield w.psi.endomorphism(m, at=w.there).to(w.theta).to_dense(), w.K @ m @ w.J
    H, eye = geoad.hessian(w.loss)(w.there), torch.eye(w.d, dtype=torch.float64)
    for name in ("euclidean", "function in psi", "categorical" if w.net else "pull-back"):
        G = w.metrics[name][0](w.there)
        matrix = torch.linalg.solve(w.matrix(name), w.hessian("euclidean"))
        shift = 2 * float(torch.linalg.eigvals(matrix).abs().max())  # eigenvalues of one order, det > 0
        shifted, matrix = H + shift * G, matrix + shift * eye
        E = G.inverse() @ shifted
        values = torch.linalg.eigvals(matrix).real.sort(descending=True).values
        yield E.to_dense(), matrix
        yield E.mv(v).ravel(), matrix @ u
        yield E.trace(), matrix.trace()
        yield E.det(), torch.linalg.det(matrix)
        yield E.logdet(), torch.linalg.slogdet(matrix).logabsdet, 1.0
        yield E.eigenvalues(), values
        yield E.eigenvalues(1, which="smallest"), values[-1:]
        yield G.trace(shifted), matrix.trace()
        found, frame = geoad.eigh(shifted, metric=G)
        yield found, values
        basis = frame.to_dense()
        yield basis.mT @ w.matrix(name) @ basis, eye
        yield matrix @ basis, basis * found


@natural
def hessian(w: World) -> Iterator[Check]:
    u = w.drawn(32)
    v = w.psi.vector(w.psi.layout.unravel(u), at=w.there)
    flat = w.hessian("euclidean")
    yield geoad.hessian(w.loss)(w.p).to(w.psi).to_dense(), flat
    yield geoad.hessian(w.loss)(w.there).mv(v).ravel(), flat @ u
    own = geoad.hessian(w.loss, Euclidean(w.psi))
    yield own(w.there).mv(v).ravel(), w.second @ u
    yield own(w.p).to_dense(), w.J.mT @ w.second @ w.J


@natural
def riemannian_hessian(w: World) -> Iterator[Check]:
    u = w.drawn(33)
    v = w.psi.vector(w.psi.layout.unravel(u), at=w.there)
    yield geoad.hessian(w.loss)(w.there).to_dense(), w.hessian("euclidean")
    yield geoad.hessian(lambda c: w.h(w.theta.pack(c)))(w.there).to_dense(), w.hessian("euclidean")
    yield geoad.hessian(w.loss, w.metrics["constant"][0])(w.there).to_dense(), w.hessian("euclidean")
    yield geoad.hessian(w.loss, Euclidean(w.psi))(w.there).to_dense(), w.second
    names = ["function", "function in psi", "mixed", "pull-back"]
    names += ["categorical", "categorical in psi", "gaussian"] if w.net is not None else []
    for name in names:
        H = geoad.hessian(w.loss, w.metrics[name][0])
        plain = w.second - torch.einsum("kij,k->ij", w.symbols(_twin(name)), w.slope)
        yield H(w.there).mv(v).ravel(), plain @ u
        if name not in ("mixed", "categorical in psi"):  # the general path, d products of second derivatives of the map
            yield H(w.p).to(w.psi).to_dense(), plain


def _twin(name: str) -> str:
    """The plain sides of these two are the same, and the costliest."""
    return "categorical" if name == "categorical in psi" else name


@natural
def connection(w: World) -> Iterator[Check]:
    for name in ("euclidean", "function", "categorical" if w.net else "pull-back"):
        field = w.metrics[name][0]
        symbols = w.symbols(name)
        yield geoad.christoffel(field)(w.p).to(w.psi).components, symbols, 1.0
        yield geoad.christoffel(field)(w.there).components, symbols, 1.0
    slope = geoad.covariant_derivative(geoad.grad(w.loss), w.metrics["function"][0])
    yield slope(w.there).to_dense(), w.hessian("function")


@natural
def fisher(w: World) -> Iterator[Check]:
    if w.net is None:
        return
    u = w.drawn(34)
    v = w.psi.vector(w.psi.layout.unravel(u), at=w.there)
    for field, matrix in w.fishers.values():
        m = matrix(w.z)
        yield field(w.there).to_dense(), m
        yield field(w.p).to(w.psi).to_dense(), m
        yield field(w.there).mv(v).ravel(), m @ u


@natural
def densities(w: World) -> Iterator[Check]:
    m, log_volume = positive(35, w.d), torch.linalg.slogdet(w.J).logabsdet
    B = w.theta.metric(m, at=w.p).to(w.psi)
    moved = w.K.mT @ m @ w.K
    sign, logabsdet = torch.linalg.slogdet(moved)
    yield B.det().components * sign, logabsdet.exp()
    yield B.logdet().components, logabsdet, 1.0
    yield B.det().sqrt().components, (logabsdet / 2).exp()
    yield B.inverse().logdet().components, -logabsdet, 1.0
    yield B.inverse().det().components, (-logabsdet).exp()
    yield w.psi.metric(m, at=w.there).to(w.theta).logdet().components, torch.logdet(m) + 2 * log_volume, 1.0
    for field, matrix in w.basic():
        G = field(w.there)
        yield G.logdet().components, torch.linalg.slogdet(matrix).logabsdet, 1.0
        expected = torch.logdet(torch.linalg.solve(matrix, moved))
        yield B.logdet() - G.logdet(), expected, 1.0
        yield B.det() / G.det(), expected.exp()


@natural
def general_tensors(w: World) -> Iterator[Check]:
    """Type (2,1) from an outer product, contractions of it, and the third covariant derivative of h."""
    a, b, c = w.drawn(36), w.drawn(37), w.drawn(38)
    unravel = w.theta.layout.unravel
    u, v = (w.theta.vector(unravel(each), at=w.p) for each in (a, b))
    e = w.theta.covector(unravel(c), at=w.p)
    T = torch.einsum("a,b,c->abc", u, v, e)
    plain = torch.einsum("a,b,c->abc", w.J @ a, w.J @ b, w.K.mT @ c)
    moved = T.to(w.psi)
    assert moved.type == (2, 1)
    yield moved.to_dense(), plain
    yield torch.einsum("abb->a", moved).ravel(), torch.einsum("abb->a", plain), float(plain.norm())
    G = w.metrics["constant"][0](w.there)
    lowered = torch.einsum("abc,ad->dbc", moved, G)
    assert lowered.type == (1, 2)
    yield lowered.to_dense(), torch.einsum("abc,ad->dbc", plain, w.matrix("constant"))
    yield lowered.to(w.theta).to(w.psi).to_dense(), torch.einsum("abc,ad->dbc", plain, w.matrix("constant"))


@natural
def maps_into_a_space(w: World) -> Iterator[Check]:
    """The two-point Jacobian, jvp, vjp, pushforward, pullback."""

    def f(components: Any) -> Tensor:
        return w.f(w.theta.pack(components))

    u = w.drawn(40)
    v = w.psi.vector(w.psi.layout.unravel(u), at=w.there)
    values = w.f_psi(w.z)
    j = derivative(w.f_psi)(w.z).reshape(values.numel(), w.d)
    t = normal(41, *values.shape)
    velocity = (j @ u).reshape(values.shape)
    jacobian = geoad.jacobian(f)(w.there)
    yield jacobian.to_dense(), j
    yield geoad.jacobian(f, mode="forward")(w.p).to(w.psi).to_dense(), j
    yield (jacobian @ v).ravel(), j @ u
    assert w.psi.parent is not None
    if w.psi.parent.source is w.theta:
        yield geoad.jacobian(w.psi.parent)(w.p).to_dense(), w.J
    value, along = geoad.jvp(f, (w.there,), (v,))
    yield value, values
    yield along, velocity
    yield geoad.jvp(w.loss, (w.there,), (v,))[1], w.slope @ u, float(w.slope.norm() * u.norm())
    value, pull = geoad.vjp(f, w.there)
    yield value, values
    yield pull(t).ravel(), j.mT @ t.flatten()
    out = geoad.Chart({"out": values.shape}, "out")
    image = geoad.pushforward(f, v, space=out)
    yield image.ravel(), j @ u
    yield image.at.ravel(), values.flatten()
    m = normal(42, values.numel(), values.numel())
    at = out.point(values)
    yield geoad.pullback(f, out.covector(t, at=at), at=w.there).ravel(), j.mT @ t.flatten()
    yield geoad.pullback(f, out.form(m.reshape(*values.shape, *values.shape), at=at), at=w.there).to_dense(), j.mT @ m @ j
    h = geoad.pullback(f, out.scalar_field(lambda y: torch.sin(y).sum()), at=w.p)
    yield geoad.grad(h)(w.there).ravel(), j.mT @ torch.cos(values).flatten()


@natural
def straight_lines(w: World) -> Iterator[Check]:
    u, y = 1e-2 * w.drawn(43), w.x * (1 + 1e-2 * w.drawn(44).tanh())
    v = w.psi.vector(w.psi.layout.unravel(u), at=w.there)
    end = w.forward(w.x + 0.5 * (w.K @ u))
    yield w.there.retract(v, 0.5).ravel(), end
    yield w.p.retract(v.to(w.theta), 0.5).to(w.psi).ravel(), end
    q = w.theta.point(w.theta.layout.unravel(y))
    yield w.there.log(q.to(w.psi)).ravel(), w.J @ (y - w.x)
    middle = w.forward(w.x + 0.3 * (y - w.x))
    yield geoad.interpolate(w.there, q, 0.3).ravel(), middle
    yield geoad.interpolate(w.p, q, 0.3).to(w.psi).ravel(), middle


@natural
def carry(w: World) -> Iterator[Check]:
    """To another point, with the components of θ or of ψ kept."""
    a, m = w.drawn(45), positive(46, w.d)
    y = w.x * (1 + 1e-2 * w.drawn(47).tanh())
    jq = derivative(w.forward)(y)
    q = w.theta.point(w.theta.layout.unravel(y)).to(w.psi)
    v = w.psi.vector(w.psi.layout.unravel(a), at=w.there)
    c = w.psi.covector(w.psi.layout.unravel(a), at=w.there)
    step = jq @ w.K
    back = torch.linalg.inv(step)
    yield v.carry(to=q, chart=w.theta).ravel(), step @ a
    yield c.carry(to=q, chart=w.theta).ravel(), back.mT @ a
    yield v.carry(to=q, chart=w.psi).to(w.theta).ravel(), torch.linalg.solve(jq, a)
    G = w.psi.metric(m, at=w.there)
    yield G.carry(to=q, chart=w.theta).to_dense(), back.mT @ m @ back
    yield G.carry(to=q, chart=w.psi).to_dense(), m
    density = G.det().carry(to=q, chart=w.theta)
    yield density.components, torch.linalg.det(back) ** 2 * torch.linalg.det(m)
    A = w.psi.endomorphism(m, at=w.there).carry(to=q, chart=w.theta)
    yield A.to_dense(), step @ m @ back


# -- the models ------------------------------------------------------------------------------------------------------------


class SpelledOut(TorchFunctionMode):
    """Layer norm by its formula: torch's own is wrong in silence under jvp of jvp, and under jvp of a vmapped vjp (2.13)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not functional.layer_norm:
            return func(*args, **(kwargs or {}))
        return self.layer_norm(*args, **(kwargs or {}))

    @staticmethod
    def layer_norm(x: Tensor, shape: list[int], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        assert len(shape) == 1
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * weight + bias


def network_world(net: SmallNetwork, psi: Chart) -> World:
    """Cross entropy and outputs of a small network, by ``functional_call`` of the bare ``nn.Module``."""
    module = net.bare

    def f(blocks: Blocks) -> Tensor:
        with SpelledOut():
            return torch.func.functional_call(module, blocks, (net.inputs,))

    def h(blocks: Blocks) -> Tensor:
        return functional.cross_entropy(f(blocks), net.targets)

    return World(net.geo.point(), psi, h, f, net.loss(), net)


def free_world(p: Point, psi: Chart) -> World:
    """A nonlinear function and a map of a free chart."""
    layout = p.chart.layout
    mix = normal(50, 3, layout.dim)

    def f(blocks: Blocks) -> Tensor:
        return torch.tanh(mix @ layout.ravel(blocks))

    def h(blocks: Blocks) -> Tensor:
        x = layout.ravel(blocks)
        return torch.cos(x * x.flip(0)).sum() + (f(blocks) ** 3).sum() + x.sum().exp() / 10

    return World(p, psi, h, f, p.chart.scalar_field(lambda c: h(p.chart.pack(c))))


@functools.cache
def world(model: str, recipe: str) -> World:
    net = build(model, 3)
    theta, p = net.geo.reference, net.geo.point()
    for seed in itertools.count():
        made = bind(RECIPES[recipe](torch.Generator().manual_seed(seed)), theta.layout)
        if inside(made, p.blocks, MAX_CONDITION):
            break
        net = build(model, seed + 4)
        theta, p = net.geo.reference, net.geo.point()
    psi = theta.reparametrize(RECIPES[recipe](torch.Generator().manual_seed(seed)), recipe).target
    return network_world(net, psi)


KNOWN = {model: applicable(build(model).geo.reference.layout) for model in NETWORKS}
PAIRS = [(model, recipe) for model in NETWORKS for recipe in KNOWN[model]]
COSTLY = [
    "riemannian_gradient",
    "components",
    "metric",
    "cometric",
    "endomorphism",
    "riemannian_hessian",
    "connection",
    "fisher",
    "densities",
]
"""Objects that are tried with every map, but only with one model for each (with HYPOTHESIS_PROFILE=thorough with all)."""


THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
ODD = ("conv", "raw")
"""The models with blocks of other shapes than the rest, which have matrices and their biases."""


def once(models: Sequence[str]) -> list[tuple[str, str]]:
    """Each map with one of these models, where one has room for it, the models taking turns."""
    turns = itertools.cycle(models)
    fitting = [recipe for recipe in RECIPES if any(recipe in KNOWN[model] for model in models)]
    return [(next(model for model in turns if recipe in KNOWN[model]), recipe) for recipe in fitting]


SOME = PAIRS if THOROUGH else once(NETWORKS)
LIKE = [model for model in NETWORKS if model not in ODD]
MOST = [pair for pair in PAIRS if THOROUGH or pair[0] in ODD or pair in {*SOME, *once(LIKE), *once(LIKE[2:] + LIKE[:2])}]
"""Each map on every shape of blocks: with both odd models, and with two of those that are alike to a map."""


@pytest.mark.parametrize(("model", "recipe"), MOST, ids=[f"{model}-{recipe}" for model, recipe in MOST])
def test_every_map_and_model(model: str, recipe: str) -> None:
    for name in [name for name in OBJECTS if name not in COSTLY]:
        verify(name, world(model, recipe))


@pytest.mark.parametrize(("model", "recipe"), SOME, ids=[f"{model}-{recipe}" for model, recipe in SOME])
@pytest.mark.parametrize("name", COSTLY)
def test_every_map(name: str, model: str, recipe: str) -> None:
    verify(name, world(model, recipe))


unshrunk = settings(
    max_examples=settings.default.max_examples // 2,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],
)
"""An example takes a second, and to shrink one some minutes. Its seeds are in the report."""


@unshrunk
@given(data=st.data(), net=strategies.small_networks())
def test_networks_in_random_charts(data: st.DataObject, net: SmallNetwork) -> None:
    """Compositions, inverses and maps for each block, and charts of charts."""
    p = net.geo.point()
    psi = data.draw(strategies.reparametrizations(p.chart, at=p)).target
    if data.draw(st.booleans()):
        psi = data.draw(strategies.reparametrizations(psi, at=p, max_maps=1, max_condition=30)).target
    drawn = network_world(net, psi)
    for name in OBJECTS:
        verify(name, drawn)


@unshrunk
@given(data=st.data(), theta=strategies.charts())
def test_free_charts(data: st.DataObject, theta: Chart) -> None:
    """One or several blocks, also without axes and of length 1."""
    p = data.draw(strategies.points(theta))
    psi = data.draw(strategies.reparametrizations(theta, at=p)).target
    if data.draw(st.booleans()):
        psi = data.draw(strategies.reparametrizations(psi, at=p, max_condition=30)).target
    drawn = free_world(p, psi)
    for name in OBJECTS:
        verify(name, drawn)


def test_every_map_takes_part() -> None:
    """A map that is added to geoad.maps has to be added to the catalogue of the testing kit."""
    abstract = {Diffeomorphism, BlockMap, Elementwise}
    public = {value for value in vars(maps).values() if isinstance(value, type) and issubclass(value, Diffeomorphism)}
    used: set[type] = set()
    for model in NETWORKS:
        layout = build(model).geo.reference.layout
        for name in applicable(layout):
            used |= {type(part) for part in bind(RECIPES[name](torch.Generator()), layout).modules()}
    assert public - abstract <= used
