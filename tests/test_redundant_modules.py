"""Networks in redundant, fewer and low-rank coordinates: the parameters of a `GeoModule` are other blocks than θ."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import geoad
from geoad import maps

X, Y = torch.randn(24, 4, generator=torch.Generator().manual_seed(5)), torch.arange(24) % 3


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def wrapped(recipe: Any = None, name: str = "psi") -> tuple[geoad.GeoModule, geoad.Chart]:
    geo = geoad.GeoModule(network())
    if recipe is None:
        recipe = {"*.weight": maps.WeightNorm()}
    if callable(recipe) and not isinstance(recipe, nn.Module):
        recipe = recipe(geo)
    return geo, geo.reference.reparametrize(recipe, name=name).target


def x() -> Tensor:
    return X.to(torch.get_default_dtype())


REDUNDANT: dict[str, Any] = {
    "weight norm": {"*.weight": maps.WeightNorm()},
    "one norm": {"0.weight": maps.WeightNorm(dim=None)},
    "factors": {"2.weight": maps.Factorization(7)},
    "mixture": {"0.weight": maps.WeightNorm(), "2.weight": maps.Asinh(), "4.*": maps.Coupling()},
    "after a chart": maps.Compose(maps.Scale(2.0), {"*.weight": maps.WeightNorm()}),
}

FEWER: dict[str, Any] = {
    "subspace": lambda geo: maps.Subspace(5, offset=geo.point(), generator=torch.Generator().manual_seed(1)),
    "frozen": lambda geo: {"0.*": maps.Frozen(geo.point())},
    "lora": lambda geo: {"*.weight": maps.LoRA(2, base=geo.point()), "*.bias": maps.Frozen(geo.point())},
}


@pytest.mark.parametrize("kind", [*REDUNDANT, *FEWER])
def test_the_network_is_the_same_function(kind: str) -> None:
    geo, psi = wrapped((REDUNDANT | FEWER)[kind])
    before = geo(x())
    theta = geo.point()
    geo.to(psi)
    assert [name for name, _ in geo.named_parameters()] == list(psi.layout)
    torch.testing.assert_close(geo(x()), before, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(geo.point().to(geo.reference).ravel(), theta.ravel(), rtol=1e-12, atol=1e-13)
    with pytest.raises(geoad.GeometryError, match="called directly"):
        geo.wrapped(x())
    with pytest.raises(geoad.GeometryError, match="bare network"):
        geo.wrapped.state_dict()
    geo.to(geo.reference)
    assert [name for name, _ in geo.named_parameters()] == [name for name, _ in network().named_parameters()]
    torch.testing.assert_close(geo.wrapped(x()), before, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", [*REDUNDANT, *FEWER])
def test_gradients_are_those_of_the_plain_function_of_the_leaves(kind: str) -> None:
    geo, psi = wrapped((REDUNDANT | FEWER)[kind])
    geo.to(psi)
    F.cross_entropy(geo(x()), Y).backward()
    bound, net = psi.parent.map, network()  # pyright: ignore[reportOptionalMemberAccess]

    def plain(leaves: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, bound.invert(leaves), (x(),)), Y)

    expected = torch.func.grad(plain)({name: p.detach() for name, p in geo.named_parameters()})
    for name, parameter in geo.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-11, atol=1e-13)
    loss = geo.loss(F.cross_entropy, (x(), Y))
    torch.testing.assert_close(geoad.grad(loss)(geo.point()).ravel(), psi.layout.ravel(expected), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(geo.grad.ravel(), psi.layout.ravel(expected), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", list(REDUNDANT))
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Rprop, torch.optim.Adagrad])
def test_an_invariant_step_is_that_of_the_plain_network_bit_for_bit(kind: str, optimizer: Any) -> None:
    plain = network()
    geo, psi = wrapped(REDUNDANT[kind])
    geo.to(psi)
    theirs, ours = optimizer(plain.parameters(), lr=0.02), geoad.optim.Invariant(geo, optimizer, lr=0.02)
    for _ in range(5):
        for model, each in ((plain, theirs), (geo, ours)):
            each.zero_grad()
            F.cross_entropy(model(x()), Y).backward()
            each.step()
    for mine, other in zip(geo.stored_parameters().values(), plain.parameters(), strict=True):
        assert torch.equal(mine, other)
    torch.testing.assert_close(geo.point().to(geo.reference).ravel(), nn.utils.parameters_to_vector(plain.parameters()))


def test_plain_training_in_g_and_v_is_that_of_torch_weight_norm() -> None:
    theirs = network()
    for layer in theirs:
        if isinstance(layer, nn.Linear):
            parametrizations.weight_norm(layer)
    geo, psi = wrapped()
    geo.to(psi)
    pairs = ((theirs, torch.optim.Adam(theirs.parameters(), lr=0.05)), (geo, torch.optim.Adam(geo.parameters(), lr=0.05)))
    for _ in range(10):
        for model, optimizer in pairs:
            optimizer.zero_grad()
            F.cross_entropy(model(x()), Y).backward()
            optimizer.step()
    torch.testing.assert_close(geo(x()), theirs(x()), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(
        dict(geo.named_parameters())["2.weight_v"],
        theirs[2].parametrizations.weight.original1,  # pyright: ignore
        rtol=1e-8,
        atol=1e-9,
    )


def test_invariant_steps_keep_the_norm_of_v_and_the_sign_of_g() -> None:
    geo, psi = wrapped()
    geo.to(psi)
    with torch.no_grad():
        for name, parameter in geo.named_parameters():
            parameter.mul_(-1.7 if name.endswith("_g") else 1.0).mul_(-3.0 if name.endswith("_v") else 1.0)
    before = {name: p.detach().clone() for name, p in geo.named_parameters()}
    optimizer = geoad.optim.Invariant(geo, torch.optim.SGD, lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(geo(x()), Y).backward()
        optimizer.step()
    for name, parameter in geo.named_parameters():
        if name.endswith("_v"):
            torch.testing.assert_close(parameter.norm(dim=1), before[name].norm(dim=1), rtol=1e-13, atol=0)
            assert not torch.equal(parameter, before[name])
        if name.endswith("_g"):
            assert torch.equal(parameter.sign(), before[name].sign())


@pytest.mark.parametrize("kind", list(FEWER))
def test_steps_of_the_reference_coordinates_are_refused_where_they_leave_the_chart(kind: str) -> None:
    geo, psi = wrapped(FEWER[kind])
    optimizer = geoad.optim.Invariant(geo, torch.optim.SGD, lr=0.1)
    geo.to(psi)
    F.cross_entropy(geo(x()), Y).backward()
    before = geo.point()
    with pytest.raises(geoad.NotADiffeomorphismError, match="covers only a part"):
        optimizer.step()
    assert geo.point() is before


@pytest.mark.parametrize("kind", list(FEWER))
def test_training_of_the_leaves_stays_in_the_subspace(kind: str) -> None:
    geo, psi = wrapped(FEWER[kind])
    start = geo.point()
    geo.to(psi)
    optimizer = torch.optim.SGD(geo.parameters(), lr=0.2)
    loss = geo.loss(F.cross_entropy, (x(), Y))
    values = [float(loss(geo.point()))]
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(geo(x()), Y).backward()
        optimizer.step()
        values.append(float(loss(geo.point())))
    assert values[-1] < values[0] - 1e-3
    geo.to(geo.reference)
    end = dict(geo.point().blocks)
    if kind == "frozen":
        assert torch.equal(end["0.weight"], start.blocks["0.weight"])
    if kind == "lora":
        assert int(torch.linalg.matrix_rank(end["2.weight"] - start.blocks["2.weight"])) == 2
    torch.testing.assert_close(float(loss(geo.point())), values[-1], rtol=1e-12, atol=0)


def test_edited_gradients_without_a_law_are_refused_by_the_optimizer() -> None:
    geo, psi = wrapped()
    geo.to(psi)
    optimizer = geoad.optim.Invariant(geo, torch.optim.SGD, lr=0.1)
    F.cross_entropy(geo(x()), Y).backward()
    theta = geo.point().to(geo.reference).ravel()
    slope = geoad.grad(geo.loss(F.cross_entropy, (x(), Y)))(geo.point()).to(geo.reference).ravel()
    for parameter in geo.parameters():  # a multiple of a differential is a differential
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)
    optimizer.step()
    torch.testing.assert_close(geo.point().to(geo.reference).ravel(), theta - 0.05 * slope, rtol=1e-12, atol=1e-14)
    F.cross_entropy(geo(x()), Y).backward()
    for parameter in geo.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = geo.point()
    with pytest.raises(geoad.NotADiffeomorphismError, match="those of no function of the network"):
        optimizer.step()
    assert torch.equal(geo.point().ravel(), before.ravel())


@pytest.mark.parametrize("kind", [*REDUNDANT, *FEWER])
def test_state_dicts_copies_and_functional_calls(kind: str) -> None:
    geo, psi = wrapped((REDUNDANT | FEWER)[kind])
    geo.to(psi)
    with torch.no_grad():
        for parameter in geo.parameters():
            parameter.add_(0.01)
    expected = geo(x())
    state = geo.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    fresh = geoad.GeoModule(network(3))
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh(x()), expected, rtol=1e-12, atol=1e-13)
    twin = copy.deepcopy(geo)
    assert twin.chart == geo.chart
    assert torch.equal(twin(x()), expected)
    with torch.no_grad():
        next(iter(twin.parameters())).mul_(1.5)
    assert not torch.equal(twin(x()), expected)
    assert torch.equal(geo(x()), expected)
    twin.load_state_dict(state)
    assert torch.equal(twin.point().ravel(), geo.point().ravel())
    called = torch.func.functional_call(geo, {n: p.detach().clone() for n, p in geo.named_parameters()}, (x(),))
    torch.testing.assert_close(called, expected, rtol=1e-12, atol=1e-13)


def test_a_loaded_state_of_the_plain_network_is_seen_through_the_section() -> None:
    geo, psi = wrapped()
    geo.to(psi)
    other = network(7)
    geo.load_state_dict(other.state_dict())
    assert torch.equal(geo(x()), other(x()))
    torch.testing.assert_close(dict(geo.named_parameters())["0.weight_v"].detach(), other[0].weight.detach())  # pyright: ignore


@pytest.mark.parametrize("kind", [*REDUNDANT, *FEWER])
def test_a_float32_module_follows(kind: str) -> None:
    geo, psi = wrapped((REDUNDANT | FEWER)[kind])
    expected = geo(x())
    geo.to(torch.float32)
    geo.to(psi)
    out = geo(x().float())
    assert out.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in geo.parameters())
    assert all(p.dtype == torch.float32 for p in geo.stored_parameters().values())
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    F.cross_entropy(out, Y).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in geo.parameters())
    geo.double()
    assert geo(x()).dtype == torch.float64


def test_a_prior_on_the_network_sees_the_weights_only() -> None:
    geo, psi = wrapped()
    prior = geo.scalar_field(lambda net: sum((w**2).sum() for w in net.parameters()))
    expected = sum(float((w.detach() ** 2).sum()) for w in geo.parameters())
    geo.to(psi)
    assert float(prior(geo.point())) == pytest.approx(expected, rel=1e-13)


def test_set_point_and_retract_go_along_the_fibres() -> None:
    geo, psi = wrapped()
    geo.to(psi)
    with torch.no_grad():
        for name, parameter in geo.named_parameters():
            if name.endswith("_v"):
                parameter.mul_(2.5)
    p = geo.point()
    loss = geo.loss(F.cross_entropy, (x(), Y))
    step = geoad.riemannian_grad(loss)(p)
    q = p.retract(step, -0.1)
    geo.set_point(q)
    assert torch.equal(geo.point().ravel(), q.ravel())
    theta = p.to(geo.reference).ravel() - 0.1 * geoad.grad(loss)(p.to(geo.reference)).ravel()
    torch.testing.assert_close(q.to(geo.reference).ravel(), theta, rtol=1e-13, atol=1e-14)
    norms = {n: b.norm(dim=1) for n, b in p.blocks.items() if n.endswith("_v")}
    for name, norm in norms.items():
        torch.testing.assert_close(q.blocks[name].norm(dim=1), norm, rtol=1e-13, atol=0)
    assert p.retract(step, 0) is p


def test_a_name_that_is_taken_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3))
            self.register_buffer("weight_g", torch.ones(2))

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs @ self.weight.T

    geo = geoad.GeoModule(Odd())
    psi = geo.reference.reparametrize(maps.WeightNorm(), name="gv").target
    with pytest.raises(geoad.GeometryError, match="something else under 'weight_g'"):
        geo.to(psi)
    assert geo.chart is geo.reference
    geo(torch.randn(4, 3))


def test_shared_weights_have_one_pair_of_coordinates() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, inputs: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(inputs)))

    geo = geoad.GeoModule(Shared())
    before = geo(x())
    geo.to(geo.reference.reparametrize({"a.weight": maps.WeightNorm()}, name="gv").target)
    assert [name for name, _ in geo.named_parameters()] == ["a.weight_g", "a.weight_v", "a.bias", "b.bias"]
    torch.testing.assert_close(geo(x()), before, rtol=1e-13, atol=1e-14)
    with pytest.raises(geoad.GeometryError, match="called directly"):
        geo.wrapped.b(x())
    geo.to(geo.reference)
    assert geo.wrapped.a.weight is geo.wrapped.b.weight
