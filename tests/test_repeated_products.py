"""Products at one point that are asked for again and again: the same numbers as fresh ones, never stale, freed, bounded."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import geoad
from geoad import maps
from geoad.curvature import Fisher
from geoad.kernels import derivatives
from geoad.kernels.linear import Linear, Repeated
from geoad.kernels.program import record
from geoad.params import Blocks
from geoad.testing import zoo

X = torch.linspace(-2.0, 2.0, 36, dtype=torch.float64).reshape(9, 4).cos()
Y = torch.arange(9) % 3


def mlp(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), *extra, nn.Linear(5, 3)).double()


def draws(chart: geoad.Chart, count: int, seed: int = 0) -> list[Blocks]:
    source = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=source, dtype=torch.float64) for name, shape in chart.layout.items()}
        for _ in range(count)
    ]


def fields(geo: geoad.GeoModule, data: Any = (X, Y), home: geoad.Chart | None = None) -> dict[str, Callable[..., Any]]:
    """Three kinds of values with products, made anew at each call."""
    loss, fisher = geo.loss(F.cross_entropy, data), Fisher(geo, data, chart=home)
    damped = fisher + 0.1 * geoad.metrics.Euclidean(geo.reference)
    return {"fisher": fisher, "hessian": geoad.hessian(loss), "riemannian": geoad.hessian(loss, damped)}


KINDS = ("fisher", "hessian", "riemannian")
every_kind = pytest.mark.parametrize("kind", KINDS)


def kept(value: Any) -> Repeated:
    found: Repeated = value.op.products
    return found


def close(found: Any, wanted: Any) -> None:
    size = max(float(block.detach().abs().max()) for block in wanted.values())
    for name, block in wanted.items():
        torch.testing.assert_close(found[name], block, rtol=1e-12, atol=1e-12 * size)


def again(op: Any, v: list[Blocks]) -> None:
    """Two products, so that what they share is kept."""
    op.mv(v[0])
    op.mv(v[1])


# -- the same numbers ----------------------------------------------------------------------------------------------------

SLOW = {"nn.LSTM, two layers, projected", "nn.TransformerEncoder, padded", "nn.GRU, bidirectional"}
# torch writes into a part of a constant: nothing is kept, each product is a fresh one
NOT_KEPT = {("complex numbers (FFT)", "hessian")}


@pytest.mark.parametrize("name", [name for name in zoo.NAMES if name not in SLOW])
def test_of_every_model(name: str) -> None:
    model = zoo.build(name)
    geo = model.geo()
    p, v = geo.point(), draws(geo.reference, 3)
    loss, fisher = model.field(geo), Fisher(geo, model.data, model.likelihood)
    loss(p)  # what the survey of the network finds is known from here on
    for kind, value, fresh in (
        ("hessian", geoad.hessian(loss)(p), lambda u: derivatives.hessian_product(loss.parts(), p.blocks, u)),
        ("fisher", fisher(p), lambda u: fisher.product(p.blocks, u)),
    ):
        wanted = [fresh(u) for u in v]
        for _ in range(2):
            for u, each in zip(v, wanted, strict=True):
                close(value.op.mv(u), each)
        assert (kept(value).bytes > 0) == ((name, kind) not in NOT_KEPT)


@every_kind
@pytest.mark.parametrize("recipe", ["reference", "coupling", "elementwise"])
def test_in_other_charts(kind: str, recipe: str) -> None:
    """Homes and points in another chart, against the dense matrix of a fresh value."""
    geo = geoad.GeoModule(mlp())
    chart = geo.reference
    if recipe != "reference":
        phi: Any = maps.Coupling(generator=torch.Generator().manual_seed(0)) if recipe == "coupling" else maps.Asinh()
        chart = geo.reference.reparametrize(phi, name="psi").target
    p = geo.point().to(chart)
    home = chart if kind == "fisher" else None
    value, matrix = (fields(geo, home=home)[kind](p) for _ in range(2))
    dense = matrix.to_dense()
    for u in draws(chart, 4):
        found = value.mv(chart.vector(u, at=p)).ravel()
        torch.testing.assert_close(found, dense @ chart.layout.ravel(u), rtol=1e-10, atol=1e-11)
    assert kept(value).bytes > 0


def test_batches_of_a_loader_and_of_a_list() -> None:
    geo = geoad.GeoModule(mlp())
    p, v = geo.point(), draws(geo.reference, 4)
    wanted = [Fisher(geo, (X, Y))(p).op.mv(u) for u in v]
    torch.manual_seed(1)
    for data in (
        [(X[:4], Y[:4]), (X[4:], Y[4:])],
        DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True),
    ):
        value = Fisher(geo, data)(p)
        for u, each in zip(v, wanted, strict=True):
            close(value.op.mv(u), each)
        assert kept(value).bytes > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision(dtype: torch.dtype) -> None:
    geo = geoad.GeoModule(mlp().to(dtype))
    value, fresh = (Fisher(geo, (X.to(dtype), Y))(geo.point()) for _ in range(2))
    v = [{name: block.to(dtype) for name, block in u.items()} for u in draws(geo.reference, 3)]
    again(value.op, v)
    found, wanted = value.op.mv(v[2]), fresh.op.mv(v[2])
    assert kept(value).bytes > 0
    for name, block in wanted.items():
        torch.testing.assert_close(found[name], block)


# -- many arguments --------------------------------------------------------------------------------------------------------


@every_kind
def test_leading_axes_of_the_argument(kind: str) -> None:
    geo = geoad.GeoModule(mlp())
    value, fresh = (fields(geo)[kind](geo.point()) for _ in range(2))
    v = draws(geo.reference, 6)
    stacked = {name: torch.stack([u[name] for u in v]).unflatten(0, (2, 3)) for name in geo.reference.layout}
    found = value.op.mv(stacked)
    for i, u in enumerate(v):
        close({name: block[i // 3, i % 3] for name, block in found.items()}, fresh.op.mv(u))
    none = {name: block[:0] for name, block in stacked.items()}
    assert {name: block.shape for name, block in value.op.mv(none).items()} == {n: b.shape for n, b in none.items()}


def test_under_vmap_of_the_argument() -> None:
    geo = geoad.GeoModule(mlp())
    value, fresh = (Fisher(geo, (X, Y))(geo.point()) for _ in range(2))
    v = draws(geo.reference, 4)
    stacked = {name: torch.stack([u[name] for u in v]) for name in geo.reference.layout}
    again(value.op, v)
    found = torch.func.vmap(value.op.mv)(stacked)
    for i, u in enumerate(v):
        close({name: block[i] for name, block in found.items()}, fresh.op.mv(u))


# -- nothing stale ---------------------------------------------------------------------------------------------------------


class Gain(nn.Module):
    """A number that is no parameter, one that is frozen, and a mode that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.register_buffer("mask", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale * self.frozen * self.mask * (2.0 if self.training else 1.0)


def frozen_in_place(net: nn.Sequential, _: list[Any]) -> None:
    with torch.no_grad():
        net[2].frozen.mul_(torch.arange(5))


def frozen_data(net: nn.Sequential, _: list[Any]) -> None:
    net[2].frozen.data = torch.arange(5.0).double()


def frozen_replaced(net: nn.Sequential, _: list[Any]) -> None:
    net[2].frozen = nn.Parameter(torch.arange(5.0).double(), requires_grad=False)


def buffer_replaced(net: nn.Sequential, _: list[Any]) -> None:
    net[2].mask = torch.arange(5.0).double()


def number(net: nn.Sequential, _: list[Any]) -> None:
    net[2].scale = 3.0


def mode(net: nn.Sequential, _: list[Any]) -> None:
    net.train()


def hook(net: nn.Sequential, _: list[Any]) -> None:
    net[1].register_forward_hook(lambda module, args, result: 2 * result)


def data_in_place(_: nn.Sequential, data: list[Any]) -> None:
    data[0][0].mul_(2)


def data_replaced(_: nn.Sequential, data: list[Any]) -> None:
    data[0] = (X[:4] + 1, Y[:4])


CHANGES = (
    frozen_in_place, frozen_data, frozen_replaced, buffer_replaced, number, mode, hook, data_in_place, data_replaced,
)  # fmt: skip


@every_kind
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(kind: str, change: Callable[..., None]) -> None:
    net = mlp(Gain().double()).eval()
    geo = geoad.GeoModule(net)
    p, v = geo.point(), draws(geo.reference, 4)
    data = [(X[:4].clone(), Y[:4]), (X[4:].clone(), Y[4:])]
    value = fields(geo, data)[kind](p)
    again(value.op, v)
    before = value.op.mv(v[2])
    change(net, data)
    fresh = fields(geo, data)[kind](p)
    if kind == "riemannian":  # the gradient belongs to the value
        value.op.w = fresh.op.w
        value.op.products.terms = fresh.op.products.terms
    for u in v:
        close(value.op.mv(u), fresh.op.mv(u))
    assert float((fresh.op.mv(v[2])["0.weight"] - before["0.weight"]).abs().max()) > 1e-6


@every_kind
def test_another_point_is_another_value(kind: str) -> None:
    """The value belongs to its point; what is asked for at the new one is new."""
    geo = geoad.GeoModule(mlp())
    p, v = geo.point(), draws(geo.reference, 3)
    make = fields(geo)[kind]
    value = make(p)
    again(value.op, v)
    wanted = value.op.mv(v[2])
    geo.set_point(p.retract(geo.reference.vector(v[0], at=p)))
    close(value.op.mv(v[2]), wanted)
    with torch.no_grad():
        geo.wrapped[0].weight.mul_(2)
    close(value.op.mv(v[2]), wanted)
    moved, fresh = (fields(geo)[kind](geo.point()) for _ in range(2))
    again(moved.op, v)
    close(moved.op.mv(v[2]), fresh.op.mv(v[2]))
    assert float((moved.op.mv(v[2])["0.weight"] - wanted["0.weight"]).abs().max()) > 1e-6


def test_a_learnable_map_that_changed() -> None:
    geo = geoad.GeoModule(mlp())
    flow = maps.Coupling(generator=torch.Generator().manual_seed(0), learnable=True)
    psi = geo.reference.reparametrize(flow, name="psi").target
    field = Fisher(geo, (X, Y), chart=psi)
    x, v = geo.point().to(psi).blocks, draws(psi, 4)
    with torch.no_grad():
        op = field.operator(x)
        again(op, v)
        before = op.mv(v[2])
        for parameter in psi.parent.map.parameters():  # pyright: ignore[reportOptionalMemberAccess]
            parameter.add_(0.1 * torch.ones_like(parameter))
        close(op.mv(v[2]), field.product(x, v[2]))
        assert float((op.mv(v[2])["0.weight"] - before["0.weight"]).abs().max()) > 1e-6


def test_under_autocast() -> None:
    geo = geoad.GeoModule(mlp().float())
    value, fresh = (Fisher(geo, (X.float(), Y))(geo.point()) for _ in range(2))
    v = [{name: block.float() for name, block in u.items()} for u in draws(geo.reference, 3)]
    again(value.op, v)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = value.op.mv(v[2]), fresh.op.mv(v[2])
    assert all(torch.equal(found[name], wanted[name]) for name in found)


# -- gradients -------------------------------------------------------------------------------------------------------------


@every_kind
def test_derivatives_by_the_argument_and_by_the_point(kind: str) -> None:
    geo = geoad.GeoModule(mlp())
    p, v = geo.point(), draws(geo.reference, 3)
    value = fields(geo)[kind](p)
    again(value.op, v)
    u = {name: block.clone().requires_grad_() for name, block in v[2].items()}
    image = value.op.mv(u)
    slope = torch.autograd.grad(sum((image[n] * v[0][n]).sum() for n in u), list(u.values()))
    close(dict(zip(u, slope, strict=True)), value.op.mv(v[0]))  # the matrix is symmetric
    if kind == "riemannian":
        return
    x = {name: block.clone().requires_grad_() for name, block in p.blocks.items()}
    there = fields(geo)[kind](geo.reference.point(x))
    for _ in range(3):
        size = sum((v[0][n] * each).sum() for n, each in there.op.mv(v[0]).items())
        slope = torch.autograd.grad(size, list(x.values()))

        def at(y: Blocks) -> Tensor:
            return sum((v[0][n] * each).sum() for n, each in fields(geo)[kind](geo.reference.point(y)).op.mv(v[0]).items())

        close(dict(zip(x, slope, strict=True)), torch.func.grad(at)(p.blocks))
    assert kept(there).bytes == 0


def test_derivatives_by_the_numbers_of_a_map() -> None:
    """With gradients on, the products keep the graph of what else asks for one; without, they are kept."""
    geo = geoad.GeoModule(mlp())
    flow = maps.Coupling(generator=torch.Generator().manual_seed(0), learnable=True)
    psi = geo.reference.reparametrize(flow, name="psi").target
    field = Fisher(geo, (X, Y), chart=psi)
    x, v = geo.point().to(psi).blocks, draws(psi, 3)
    op = field.operator(x)
    for u in v:
        assert any(block.requires_grad for block in op.mv(u).values())
    assert op.products.bytes == 0
    with torch.no_grad():
        op = field.operator(x)
        again(op, v)
        assert op.products.bytes > 0
    assert any(block.requires_grad for block in op.mv(v[0]).values())


# -- memory ----------------------------------------------------------------------------------------------------------------


@every_kind
def test_what_is_kept_dies_with_the_value(kind: str) -> None:
    geo = geoad.GeoModule(mlp())
    value = fields(geo)[kind](geo.point())
    again(value.op, draws(geo.reference, 2))
    program = kept(value)._kept.terms[0]  # pyright: ignore[reportPrivateUsage, reportOptionalMemberAccess]
    constant = next(each for step in program.steps for each in step.args if isinstance(each, Tensor))
    seen = [weakref.ref(value.op), weakref.ref(program), weakref.ref(constant)]
    gc.disable()
    try:
        del program, constant, value
        assert [each() for each in seen] == [None, None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("whole", [0, 1, 2])
def test_the_memory_is_bounded(whole: int) -> None:
    """Of three equal batches `whole` fit; the others are computed anew."""
    geo = geoad.GeoModule(mlp())
    data = [(X[i : i + 3], Y[i : i + 3]) for i in (0, 3, 6)]
    p, v = geo.point(), draws(geo.reference, 4)
    field = Fisher(geo, data)
    value = field(p)
    again(value.op, v)
    each = kept(value).bytes // 3
    assert each > 0
    field.products_memory = whole * each + each // 2
    bounded = field(p)
    calls: list[int] = []
    counted = geo.wrapped.register_forward_hook(lambda *_: calls.append(1))
    again(bounded.op, v)
    calls.clear()
    for u in v[2:]:
        close(bounded.op.mv(u), value.op.mv(u))
    assert kept(bounded).bytes == whole * each
    counted.remove()


def test_a_shuffled_loader_is_kept_as_a_whole_or_not_at_all() -> None:
    """With some batches of one pass and the others of the next, samples would be missing and others count twice."""
    geo = geoad.GeoModule(mlp())
    field = Fisher(geo, DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True))
    p, v = geo.point(), draws(geo.reference, 5)
    wanted = [Fisher(geo, (X, Y))(p).op.mv(u) for u in v]
    field.products_memory = 700
    value = field(p)
    for u, each in zip(v, wanted, strict=True):
        close(value.op.mv(u), each)
    assert kept(value).bytes == 0


# -- programs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_what_is_out_of_sight_is_not_kept(shift: float) -> None:
    """A derivative that goes through numpy: the dispatcher does not see where its numbers come from."""

    def fn(u: Tensor) -> Tensor:
        return torch.from_numpy(3 * u.numpy()) + shift * u

    v = torch.tensor([1.0, 2.0, -1.0])
    assert record(fn, v)[1] is None
    repeated = Repeated(lambda: [fn])
    for factor in range(4):
        torch.testing.assert_close(repeated(factor * v), (3 + shift) * factor * v)
    assert repeated.bytes == 0


def _squared(v: Tensor) -> Tensor:
    return v + float(v.sum())


def _in_place(v: Tensor) -> Tensor:
    return v.mul_(2)


def _into_memory(v: Tensor) -> Tensor:
    memory = torch.zeros(6)
    memory[:3] = v
    return memory


@pytest.mark.parametrize("fn", [_squared, _in_place, _into_memory])
def test_what_cannot_be_run_again(fn: Callable[[Tensor], Tensor]) -> None:
    v = torch.arange(3.0)
    value, program = record(fn, v)
    assert program is None
    torch.testing.assert_close(value, fn(v.clone()))


@pytest.mark.parametrize("once", [True, False])
def test_a_constant_that_is_overwritten_later(once: bool) -> None:
    def fn(v: Tensor) -> Tensor:
        a = torch.ones(3) * 2
        first = a * v
        if not once:
            a.mul_(3)
        return first

    program = record(fn, torch.arange(3.0))[1]
    assert (program is None) == (not once)


def test_equal_constants_are_kept_once() -> None:
    x, v = torch.rand(1000), torch.rand(1000)

    def fn(u: Tensor) -> Tensor:
        return (x.sin() * u).sum() * x.sin()

    value, program = record(fn, v)
    assert program is not None and program.bytes == 1000 * v.element_size()
    torch.testing.assert_close(program(v), value)


def test_the_derivative_of_a_function_at_a_point() -> None:
    geo = geoad.GeoModule(mlp())
    p, v = geo.point(), draws(geo.reference, 4)

    def outputs(theta: Blocks) -> Tensor:
        return geo.evaluate(theta, X)

    J = Linear(outputs, p.blocks)
    torch.testing.assert_close(J.outputs, outputs(p.blocks))
    u = torch.randn(4, 9, 3, dtype=torch.float64)
    for i in range(4):
        torch.testing.assert_close(J.push(v[i]), torch.func.jvp(outputs, (p.blocks,), (v[i],))[1], rtol=1e-12, atol=1e-13)
        close(J.pull(u[i]), torch.func.vjp(outputs, p.blocks)[1](u[i])[0])


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def test_the_first_product_is_as_good_as_the_others() -> None:
    """That a network works under no_grad on its coordinates is found out while the first product is under way."""
    model = zoo.build("no_grad inside")
    for _ in range(2):
        geo = model.geo()
        p = geo.point()
        v = geo.reference.vector(torch.linspace(-1, 1, geo.reference.dim, dtype=torch.float64), at=p)
        hessian = geoad.hessian(model.field(geo))(p)
        first = hessian.mv(v).ravel()
        torch.testing.assert_close(hessian.mv(v).ravel(), first, rtol=1e-12, atol=1e-13)
