"""Every kind of model: derivatives against finite differences and double backward of the bare network in plain torch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo_cases import case, every_model, quiet

import geoad
from geoad.curvature import Fisher
from geoad.errors import GeometryError
from geoad.kernels import derivatives, ladder
from geoad.kernels.bags import SpelledOutBags
from geoad.kernels.jacobians import sample_jacobian
from geoad.kernels.norms import SpelledOut
from geoad.params import Blocks
from geoad.testing import zoo
from geoad.testing.zoo import Model

pytestmark = quiet
STEP = 1e-5
STOPPED = ("no_grad inside",)  # what autograd is told to leave out, a difference includes


class Bare:
    """The plain network with parameters set by hand: what geoad is compared with."""

    def __init__(self, model: Model) -> None:
        self.model, self.net = model, copy.deepcopy(model.net)
        self.parameters = dict(self.net.named_parameters())
        self.start = {name: each.detach().clone() for name, each in self.parameters.items()}

    def drawn(self, seed: int) -> Blocks:
        draws = torch.Generator().manual_seed(seed)
        return {name: torch.randn(each.shape, generator=draws).to(each.dtype) for name, each in self.start.items()}

    @contextmanager
    def at(self, v: Blocks, t: float) -> Iterator[None]:
        with torch.no_grad():
            for name, each in self.parameters.items():
                each.copy_(self.start[name] + t * v[name])
        yield
        with torch.no_grad():
            for name, each in self.parameters.items():
                each.copy_(self.start[name])

    def outputs(self) -> Tensor:
        return self.model.outputs(self.net)

    def loss(self) -> Tensor:
        return self.model.loss(self.outputs(), self.model.targets)

    def slope(self, value: Tensor, cotangent: Tensor | None = None, graph: bool = False) -> list[Tensor]:
        found = torch.autograd.grad(
            value, list(self.parameters.values()), cotangent, allow_unused=True, create_graph=graph, retain_graph=True
        )
        return [torch.zeros_like(p) if s is None else s for s, p in zip(found, self.parameters.values(), strict=True)]

    def gradient(self) -> Tensor:
        return flat(self.slope(self.loss()))

    def difference(self, fn: Any, v: Blocks) -> Tensor:
        """D_v fn by central differences."""
        with self.at(v, STEP):
            ahead = fn().detach()
        with self.at(v, -STEP):
            behind = fn().detach()
        return (ahead - behind) / (2 * STEP)

    def hessian_product(self, v: Blocks) -> Tensor:
        """By double backward, where torch can."""
        with sdpa_kernel(SDPBackend.MATH):
            slopes = self.slope(self.loss(), graph=True)
            pairing = sum((s * v[name]).sum() for name, s in zip(self.parameters, slopes, strict=True))
            assert isinstance(pairing, Tensor)
            return flat(self.slope(pairing))

    def curved(self, f: Tensor, t: Tensor) -> Tensor:
        """A(f) t of the likelihood, for the mean over samples."""
        if self.model.likelihood == "gaussian":
            return t / len(f)
        p = f.softmax(-1)
        return (p * t - p * (p * t).sum(-1, keepdim=True)) / len(f)


def flat(tensors: Any) -> Tensor:
    return torch.cat([each.detach().flatten() for each in tensors])


def close(found: Tensor, wanted: Tensor, rtol: float) -> None:
    size = float(wanted.norm()) + 1e-3
    assert float((found - wanted).norm()) <= rtol * size, (found, wanted)


@every_model
def test_derivatives(name: str) -> None:
    model = zoo.build(name)
    bare, geo = Bare(model), model.geo()
    theta, p = geo.reference, geo.point()
    psi = theta.reparametrize(geoad.maps.Asinh(), name="psi").target
    q = p.to(psi)
    stretch = flat([each.square().add(1).sqrt() for each in bare.start.values()])  # ∂θ/∂ψ of θ = sinh ψ
    u = bare.drawn(1)
    v = theta.vector(u, at=p)
    L = model.field(geo)

    slope = bare.gradient()
    assert slope.abs().max() > 1e-6
    close(geoad.grad(L)(p).ravel(), slope, 1e-12)
    close(geoad.grad(L)(q).ravel(), stretch * slope, 1e-11)
    assert torch.allclose(geoad.grad(L)(p)(v), slope @ flat(u.values()))

    H = geoad.hessian(L)
    by_difference = bare.difference(bare.gradient, u) if name not in STOPPED else bare.hessian_product(u)
    if name not in STOPPED:
        close(slope @ flat(u.values()), bare.difference(bare.loss, u), 1e-7)
    close(H(p).mv(v).ravel(), by_difference, 1e-6)
    close(H(q).mv(v.to(psi)).ravel(), stretch * by_difference, 1e-6)
    if name not in ("EmbeddingBag", "parametrizations.weight_norm"):  # torch has none, and a wrong one
        close(H(p).mv(v).ravel(), bare.hessian_product(u), 1e-10)

    def outputs(components: Any) -> Tensor:
        return geo.evaluate(theta.pack(components), model.inputs)

    moved = bare.difference(bare.outputs, u) if name not in STOPPED else _jvp_by_double_vjp(bare, u)
    f = bare.outputs()
    assert torch.allclose(outputs(p.components), f)
    close(geoad.pushforward(outputs, v).components, moved, 1e-7)
    close(geoad.pushforward(outputs, v.to(psi)).components, moved, 1e-7)
    w = torch.randn(f.shape, generator=torch.Generator().manual_seed(2))
    pulled = flat(bare.slope(f, w))
    close(geoad.vjp(outputs, p)[1](w).ravel(), pulled, 1e-12)
    close(geoad.vjp(outputs, q)[1](w).ravel(), stretch * pulled, 1e-11)

    product = flat(bare.slope(f, bare.curved(f, moved).detach()))
    for representation in ("implicit", "dense"):
        field = Fisher(geo, model.data, model.likelihood, representation=representation)
        close(field(p).mv(v).ravel(), product, 1e-6)
        close(field(q).mv(v.to(psi)).ravel(), stretch * product, 1e-6)


@every_model
def test_the_jacobian_of_each_sample(name: str) -> None:
    model, outputs, wanted = case(name)
    geo = model.geo()
    f, found = sample_jacobian(geo.evaluate, geo.reference.layout, geo.point().blocks, model.inputs)
    torch.testing.assert_close(f, outputs)
    close(found.flatten(0, -2), wanted.flatten(0, -2), 1e-10)


THROUGH = ("Linear MLP", "nn.MultiheadAttention", "parametrizations.weight_norm", "EmbeddingBag", "nn.RNN")


@pytest.mark.parametrize("name", THROUGH)
def test_third_derivatives_go_down_the_ladder_too(name: str) -> None:
    """The connection of a Fisher metric, in a product of the Riemannian Hessian, against differences of the dense metric."""
    model = zoo.build(name)
    bare, geo = Bare(model), model.geo()
    L = model.field(geo)
    theta, p = geo.reference, geo.point()
    metric = Fisher(geo, model.data, model.likelihood) + 0.1 * geoad.metrics.Euclidean(theta)
    u = bare.drawn(1)
    found = geoad.hessian(L, metric)(p).mv(theta.vector(u, at=p)).ravel()

    w = metric(p).sharp(geoad.grad(L)(p)).blocks
    dense = Fisher(geo, model.data, model.likelihood, representation="dense")

    def change(direction: Blocks) -> Tensor:
        ahead, behind = (
            dense(theta.point({n: b + t * direction[n] for n, b in p.blocks.items()})).to_dense() for t in (STEP, -STEP)
        )
        return (ahead - behind) / (2 * STEP)

    eye = torch.eye(theta.dim)
    changes = torch.stack([change(theta.layout.unravel(row)) for row in eye])  # ∂_k G_ij
    a, b = flat(w.values()), flat(u.values())
    wanted = 0.5 * (
        torch.einsum("kij,i,j->k", changes, a, b)
        + torch.einsum("kij,k,j->i", changes, b, a)
        - torch.einsum("kij,k,j->i", changes, a, b)
    )
    close(found, bare.difference(bare.gradient, u) - wanted, 1e-5)


@pytest.mark.parametrize(
    "name", ["nn.LSTM", "nn.LSTM, two layers, projected", "causal attention", "nn.TransformerEncoder, padded"]
)
def test_float32_takes_other_kernels(name: str) -> None:
    """Fused kernels differ between the dtypes: the numbers do not."""
    products: dict[torch.dtype, list[Tensor]] = {}
    for dtype in (torch.float64, torch.float32):
        model = zoo.build(name, dtype=dtype)
        geo, u = model.geo(), Bare(model).drawn(1)
        p = geo.point()
        v = geo.reference.vector(u, at=p)
        L = model.field(geo)
        fields = [Fisher(geo, model.data, representation=r) for r in ("implicit", "dense")]
        results = [geoad.grad(L)(p), geoad.hessian(L)(p).mv(v), *(field(p).mv(v) for field in fields)]
        assert all(each.ravel().dtype == dtype for each in results)
        products[dtype] = [each.ravel().double() for each in results]
    for single, double in zip(products[torch.float32], products[torch.float64], strict=True):
        close(single, double, 1e-4)


def test_dense_forms_and_jacobians_of_what_vmap_cannot_batch() -> None:
    model = zoo.build("mixture of experts")
    bare, geo = Bare(model), model.geo()
    p, theta = geo.point(), geo.reference

    def outputs(components: Any) -> Tensor:
        return geo.evaluate(theta.pack(components), model.inputs)

    f = bare.outputs()
    wanted = torch.stack([flat(bare.slope(each)) for each in f.flatten()])
    for jacobian in (geoad.jacrev, geoad.jacfwd):
        close(jacobian(outputs)(p).components.reshape(wanted.shape), wanted, 1e-10)
    H = geoad.hessian(model.field(geo))(p).to_dense()
    rows = [bare.hessian_product(theta.layout.unravel(row)) for row in torch.eye(theta.dim)]
    close(H, torch.stack(rows), 1e-10)


def test_what_was_learnt_is_not_learnt_again() -> None:
    """A product does not begin with a failure if an earlier one has found the way."""
    model = zoo.build("scaled_dot_product_attention")
    geo = model.geo()
    calls: list[int] = []
    geo.wrapped.register_forward_pre_hook(lambda *_: calls.append(1))
    p = geo.point()
    v = geo.reference.vector(Bare(model).drawn(1), at=p)
    L = model.field(geo)
    H, F = geoad.hessian(L)(p), Fisher(geo, model.data)(p)
    first, second = H.mv(v), F.mv(v)
    counts: list[int] = []
    for product in (H, F):
        calls.clear()
        product.mv(v)
        counts.append(len(calls))
    assert counts == [1, 1]
    assert torch.equal(H.mv(v).ravel(), first.ravel()) and torch.equal(F.mv(v).ravel(), second.ravel())


def test_products_of_fallbacks_are_differentiable() -> None:
    """By an outer transform of torch.func, and by plain backward."""
    model = zoo.build("parametrizations.weight_norm")
    bare, geo = Bare(model), model.geo()
    u = bare.drawn(1)
    x = geo.point().blocks

    def derivative(y: Blocks) -> Tensor:
        from geoad.kernels import products

        return products.jvp(lambda z: geo.evaluate(z, model.inputs), y, u)[1].square().sum()

    wanted = torch.func.grad(derivative)(x)
    leaves = {name: block.clone().requires_grad_() for name, block in x.items()}
    slopes = torch.autograd.grad(derivative(leaves), list(leaves.values()), allow_unused=True)
    for (name, block), slope in zip(x.items(), slopes, strict=True):
        torch.testing.assert_close(wanted[name], torch.zeros_like(block) if slope is None else slope)
    direction = bare.drawn(3)
    rate = bare.difference(lambda: _jvp_by_double_vjp(bare, u).square().sum(), direction)
    pairing = sum((wanted[name] * direction[name]).sum() for name in x)
    close(torch.as_tensor(pairing), rate, 1e-6)


def _jvp_by_double_vjp(bare: Bare, v: Blocks) -> Tensor:
    f = bare.outputs()
    u = torch.zeros_like(f, requires_grad=True)
    slopes = bare.slope(f, u, graph=True)
    pairing = sum((s * v[name]).sum() for name, s in zip(bare.parameters, slopes, strict=True))
    return torch.autograd.grad(pairing, u)[0]


def test_the_way_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = zoo.build("parametrizations.weight_norm")
    geo = model.geo()
    p = geo.point()
    v = geo.reference.vector(Bare(model).drawn(1), at=p)
    with caplog.at_level("INFO", "geoad"):
        for _ in range(3):
            Fisher(geo, model.data)(p).mv(v)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "spelled-out weight norm" in message and "_weight_norm_interface" in message


def test_no_kind_is_missing_and_unknown_ones_are_refused() -> None:
    assert len(zoo.NAMES) >= 37
    with pytest.raises(GeometryError, match=r"'GRU'.*nn\.GRU"):
        zoo.build("GRU")
    state = torch.get_rng_state()
    first, second = zoo.build("Conv2d", seed=3), zoo.build("Conv2d", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.net.parameters(), second.net.parameters(), strict=True))
    assert torch.equal(first.inputs, second.inputs) and torch.equal(first.targets, second.targets)


def test_outcomes_are_watched() -> None:
    net = nn.Linear(2, 2)
    geo = geoad.GeoModule(net)
    p = geo.point()
    with ladder.watched() as seen:
        Fisher(geo, torch.randn(3, 2))(p).mv(geo.reference.vector(torch.ones(6), at=p))
    assert [(each.path, each.way, each.fixes) for each in seen] == [(("product",), "forward", ())]


BAGS: dict[str, dict[str, Any]] = {
    "rows": {"input": torch.tensor([[0, 3, 3], [1, 2, 4]])},
    "offsets": {"input": torch.tensor([0, 3, 3, 1, 2, 4]), "offsets": torch.tensor([0, 2, 2, 5])},
    "last offset": {
        "input": torch.tensor([0, 3, 3, 1, 2]),
        "offsets": torch.tensor([0, 2, 5]),
        "include_last_offset": True,
    },
    "padding": {"input": torch.tensor([[0, 3, 3], [3, 3, 3], [1, 3, 2]]), "padding_idx": 3},
    "padding from the end": {"input": torch.tensor([[4, 3], [4, 4]]), "padding_idx": -1},
}


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("name", BAGS)
def test_embedding_bags_by_their_formula(name: str, mode: str) -> None:
    weight = torch.randn(5, 2, requires_grad=True)
    cases = [{}]
    if mode == "sum" and "padding_idx" not in BAGS[name]:
        cases.append({"per_sample_weights": torch.randn(BAGS[name]["input"].shape)})
    for more in cases:
        options = {**BAGS[name], **more, "weight": weight, "mode": mode}
        wanted = functional.embedding_bag(**options)
        with SpelledOutBags():
            found = functional.embedding_bag(**options)
        torch.testing.assert_close(found, wanted)
        cotangent = torch.randn(wanted.shape)
        slopes = [torch.autograd.grad(each, weight, cotangent)[0] for each in (found, wanted)]
        torch.testing.assert_close(*slopes)


@pytest.mark.parametrize(("shape", "dim"), [((3, 4), 0), ((3, 4), 1), ((3, 4), -1), ((2, 3, 4), 1), ((4,), 0)])
def test_weight_norm_by_its_formula(shape: tuple[int, ...], dim: int) -> None:
    v = torch.randn(shape, requires_grad=True)
    g = torch.norm_except_dim(v.detach(), 2, dim).mul(1.5).requires_grad_()
    wanted = torch._weight_norm(v, g, dim)
    with SpelledOut():
        found = torch._weight_norm(v, g, dim)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(each.sin().sum(), (v, g)) for each in (found, wanted)))


def test_the_loss_of_torch_whose_second_derivative_lacks_a_forward_mode() -> None:
    """F.mse_loss: matters inside of other transforms; there it is found out once, then remembered with the loss."""
    geo = zoo.build("Linear MLP").geo()
    p = geo.point()
    v = geo.reference.vector(torch.ones(geo.chart.dim), at=p)
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    fused, plain = (geo.loss(fn, (x, y)) for fn in (functional.mse_loss, lambda f, t: (f - t).square().mean()))
    wanted = geoad.hessian(plain)(p).to_dense() @ torch.ones(geo.chart.dim)
    for field, way in ((fused, "reverse"), (plain, "forward"), (fused, "reverse")):
        with ladder.watched() as seen:
            product = geoad.hessian(field)(p).mv(v).ravel()
        assert [each.way for each in seen] == ["autograd"]
        close(product, wanted, 1e-12)
        with ladder.watched() as seen:
            product = torch.func.vmap(functools.partial(derivatives.hessian_product, field.parts(), v=v.components))(
                {name: block[None] for name, block in p.blocks.items()}
            )
        assert [each.way for each in seen] == [way]
        close(geo.reference.layout.ravel(product)[0], wanted, 1e-12)
