"""What geoad refuses to differentiate, what it makes deterministic, and what it takes on a slower way."""

from __future__ import annotations

import copy
import functools
import pickle
import types
import warnings
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import geoad
from geoad import UnsupportedModuleError
from geoad.curvature import Fisher
from geoad.kernels import derivatives as derivatives_of
from geoad.kernels import ladder, products
from geoad.kernels.lean import Lean
from geoad.kernels.norms import SpelledOut

X = torch.linspace(-2.0, 2.0, 15, dtype=torch.float64).reshape(5, 3).cos()
Y = torch.tensor([0, 1, 1, 0, 1])


class Custom(nn.Module):
    """A network whose forward is a function of the network and the input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **children: Any) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        self.fn = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self, x)


def loss(geo: geoad.GeoModule) -> geoad.ScalarField:
    return geo.loss(functional.cross_entropy, (X, Y))


def derivatives(geo: geoad.GeoModule) -> list[Tensor]:
    """The gradient, a Hessian product and a Fisher product."""
    p = geo.point()
    v = geo.reference.vector(geo.reference.layout.unravel(torch.arange(geo.chart.dim).double().sin()), at=p)
    return [geoad.grad(loss(geo))(p).ravel(), geoad.hessian(loss(geo))(p).mv(v).ravel(), Fisher(geo, X)(p).mv(v).ravel()]


def refused(net: nn.Module, *words: str) -> None:
    geo = geoad.GeoModule(net)
    for ask in (lambda: geoad.grad(loss(geo))(geo.point()), lambda: loss(geo)(geo.point()), lambda: derivatives(geo)):
        with pytest.raises(UnsupportedModuleError) as caught:
            ask()
        assert all(word in str(caught.value) for word in words), str(caught.value)


def same(net: nn.Module, other: nn.Module) -> None:
    """Both have the same derivatives."""
    for found, wanted in zip(derivatives(geoad.GeoModule(net)), derivatives(geoad.GeoModule(other)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def plain(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.tanh(net.body(x)))


# -- parameters that are read past their places ----------------------------------------------------------------------------


def test_a_list_of_parameters() -> None:
    net = Custom(lambda net, x: net.head(x @ net.kept[0].T))
    net.kept = [net.body.weight]  # type: ignore[assignment]
    refused(net, "'body.weight'", "Linear", "self.weight", "ParameterList")


def test_a_closure() -> None:
    net = Custom(plain)
    bias = net.head.bias
    net.fn = lambda net, x: plain(net, x) + bias
    refused(net, "'head.bias'")


def test_a_frozen_parameter_that_is_a_coordinate() -> None:
    net = Custom(lambda net, x: plain(net, x) + net.kept[0])
    net.kept = [net.head.bias]  # type: ignore[assignment]
    net.head.bias.requires_grad_(False)
    derivatives(geoad.GeoModule(net))  # it is no coordinate, so it is a constant
    geo = geoad.GeoModule(net, params="*")
    with pytest.raises(UnsupportedModuleError, match=r"'head\.bias'"):
        loss(geo)(geo.point())
    assert not net.head.bias.requires_grad


def test_a_value_that_was_computed_earlier() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        if not hasattr(net, "memo"):
            net.memo = net.body.weight.exp()
        return net.head(torch.tanh(x @ net.memo))

    refused(Custom(forward), "'body.weight'", "computed from it earlier")


def test_values_that_are_kept_for_each_size_of_a_batch() -> None:
    """The few samples of a look have a size of their own: what is kept of them is not met again by the evaluation."""
    kept: dict[int, Tensor] = {}

    def forward(net: Any, x: Tensor) -> Tensor:
        if len(x) not in kept:
            kept[len(x)] = net.body.weight.exp()
        return net.head(torch.tanh(x @ kept[len(x)]))

    geo = geoad.GeoModule(Custom(forward))
    field, p = geo.loss(functional.cross_entropy, (X.repeat(8, 1), Y.repeat(8))), geo.point()
    with pytest.raises(UnsupportedModuleError, match="computed from it earlier"):
        geoad.hessian(field)(p).mv(geo.reference.vector(torch.ones(geo.chart.dim), at=p))


def test_a_parameter_that_is_not_used_stays_allowed() -> None:
    net = Custom(plain, unused=nn.Linear(2, 2))
    slope = geoad.grad(loss(geo := geoad.GeoModule(net)))(geo.point())
    assert slope.components["unused.weight"].abs().sum() == 0
    assert slope.components["body.weight"].abs().sum() > 0


def test_scripted_and_traced_modules() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted, traced = torch.jit.script(nn.Linear(3, 3)), torch.jit.trace(nn.Linear(3, 3), X)
    for part in (scripted, traced):
        with pytest.raises(UnsupportedModuleError, match=r"module 'body' is a .*TorchScript.*Wrap the Python module"):
            geoad.GeoModule(Custom(plain, body=part))


def test_old_weight_norm_hooks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hooked = Custom(plain)
        modern = copy.deepcopy(hooked)
        nn.utils.weight_norm(hooked.body)
        parametrizations.weight_norm(modern.body)
    found, wanted = derivatives(geoad.GeoModule(hooked)), derivatives(geoad.GeoModule(modern))
    names = [list(dict(net.named_parameters())) for net in (hooked, modern)]
    assert len(names[0]) == len(names[1]) == 5
    for each in found:
        assert each.abs().sum() > 0
    torch.testing.assert_close(found[0].sort().values, wanted[0].sort().values)  # the order of the blocks differs
    stale = Custom(lambda net, x: net.head(x @ net.body.weight.T))  # past the hook, which recomputes the weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(stale.body)
    refused(stale, "'body.weight_")


def test_cached_parametrizations_are_recomputed() -> None:
    net = Custom(plain)
    parametrizations.orthogonal(net.body)
    wanted = derivatives(geoad.GeoModule(net))
    with parametrize.cached():
        net(X)
        found = derivatives(geoad.GeoModule(net))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_recurrent_layers_read_their_weights_from_a_list() -> None:
    """pytorch issue 90500: nn.LSTM keeps its weights in a list of its own."""
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        net = nn.Sequential(kind(3, 4, num_layers=2, bidirectional=True, batch_first=True), _First(), nn.Linear(8, 2))
        geo = geoad.GeoModule(net)
        x = X[:, None] * torch.arange(1.0, 4.0)[:, None]
        field = geo.loss(functional.cross_entropy, (x, Y))
        functional.cross_entropy(net(x), Y).backward()
        slope = geoad.grad(field)(geo.point()).components
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None and slope[name].abs().sum() > 0, name
            torch.testing.assert_close(slope[name], parameter.grad)
        torch.testing.assert_close(copy.deepcopy(net)(x), net(x))
        assert all(w is p for w, p in zip(net[0]._flat_weights, net[0].parameters(), strict=True))


class _First(nn.Module):
    def forward(self, result: Any) -> Tensor:
        return result[0].sum(1)


def test_compiled_parts() -> None:
    net = Custom(plain)
    twin = copy.deepcopy(net)
    twin.body = torch.compile(twin.body, backend="eager")
    same(twin, net)


# -- outputs that are no function of the parameters ----------------------------------------------------------------------------


def test_active_dropout_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.Linear(4, 2))
    refused(net, "module '1', a Dropout", "geo.eval()")
    geo = geoad.GeoModule(net)
    torch.manual_seed(0)
    first, second = geo(X), geo(X)  # training itself stays torch's
    assert not torch.equal(first, second)
    derivatives(geo.eval())
    derivatives(geoad.GeoModule(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.Linear(4, 2))))
    geo.train()
    with pytest.raises(UnsupportedModuleError):
        loss(geo)(geo.point())
    refused(nn.Sequential(nn.LSTM(3, 2, 2, dropout=0.1), _Only()), "a LSTM", "its rate")
    derivatives(geoad.GeoModule(nn.Sequential(nn.LSTM(3, 2, 2, dropout=0.1), _Only()).eval()))
    refused(nn.Sequential(nn.Linear(3, 2), nn.RReLU()), "RReLU")
    refused(Custom(lambda net, x: net.head(net.attend(x, x, x)[0]), attend=nn.MultiheadAttention(3, 1, dropout=0.2)), "attend")


class _Only(nn.Module):
    def forward(self, result: Any) -> Tensor:
        return result[0]


def test_functional_dropout_and_other_noise_is_found_out() -> None:
    refused(
        Custom(lambda net, x: plain(net, functional.dropout(x, 0.5))).eval(), "(a Custom)", "draws random numbers", "fork_rng"
    )
    refused(Custom(lambda net, x: plain(net, x + 0.1 * torch.randn_like(x))), "draws random numbers")

    def counting(net: Any, x: Tensor) -> Tensor:
        net.calls = getattr(net, "calls", 0) + 1
        return plain(net, x) * net.calls

    refused(Custom(counting), "depends on earlier calls")
    kept = X.clone()
    refused(Custom(lambda net, x: plain(net, x.mul_(1.1))), "writes into its inputs")
    assert torch.equal(X, kept)

    def seeded(net: Any, x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return plain(net, functional.dropout(x, 0.5))

    geo = geoad.GeoModule(Custom(plain), forward=seeded)
    state = torch.get_rng_state()
    first, again = derivatives(geo), derivatives(geo)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_batch_norm_in_training_mode() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    geo = geoad.GeoModule(net)
    kept = net[1].running_mean.clone()
    found = derivatives(geo)  # objects of whole batches
    twin = copy.deepcopy(net)
    functional.cross_entropy(twin(X), Y).backward()
    torch.testing.assert_close(found[0], torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None]))
    assert torch.equal(net[1].running_mean, kept)
    with pytest.raises(UnsupportedModuleError, match=r"module '1', a BatchNorm1d, .*statistics of the batch.*geo\.eval\(\)"):
        Fisher(geo, X, representation="dense")(geo.point()).to_dense()
    Fisher(geo.eval(), X, representation="dense")(geo.point()).to_dense()
    without = geoad.GeoModule(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)).eval())
    with pytest.raises(UnsupportedModuleError, match="BatchNorm1d"):
        Fisher(without, X, representation="dense")(without.point()).to_dense()


def test_samples_that_depend_on_each_other_by_hand() -> None:
    geo = geoad.GeoModule(Custom(lambda net, x: plain(net, x - x.mean(0))))
    derivatives(geo)
    with pytest.raises(UnsupportedModuleError, match="depend on the other samples"):
        Fisher(geo, X, representation="dense")(geo.point()).to_dense()


def test_spectral_norm() -> None:
    net = Custom(plain)
    parametrizations.spectral_norm(net.body)
    refused(net, "power iteration", "geo.eval()")
    derivatives(geoad.GeoModule(net.eval()))


def test_parameters_that_are_changed_in_place() -> None:
    net = nn.Sequential(nn.Embedding(4, 3, max_norm=0.5), nn.Flatten(), nn.Linear(3, 2))
    geo = geoad.GeoModule(net)
    p = geo.point()
    kept = p.blocks["0.weight"].clone()
    with pytest.raises(UnsupportedModuleError, match=r"'0\.weight' in place.*max_norm=None"):
        geo.loss(functional.cross_entropy, (torch.arange(4)[:, None], Y[:4]))(p)
    assert torch.equal(p.blocks["0.weight"], kept)


def test_no_grad_is_a_constant_in_every_mode() -> None:
    """torch's forward mode differentiates what is computed under no_grad; its reverse mode does not."""

    def stopped(net: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = net.body(x)
        return net.head(torch.tanh(h) * net.body(x))

    net = Custom(stopped)
    same(net, Custom(lambda net, x: net.head(torch.tanh(net.body(x).detach()) * net.body(x)), body=net.body, head=net.head))
    refused(Custom(torch.no_grad()(plain)), "no_grad", "zero in silence")
    with ladder.watched() as seen:
        derivatives(geoad.GeoModule(net))
    assert {each.way for each in seen} == {"autograd", "reverse", "apart"}
    with ladder.watched() as seen:  # what is stopped is no coordinate, or not a function of one
        derivatives(geoad.GeoModule(net, params="head.*"))
        derivatives(geoad.GeoModule(Custom(lambda net, x: plain(net, torch.no_grad()(torch.tanh)(x)))))
    assert {each.way for each in seen} == {"autograd", "forward", "reverse"}


def test_inputs_are_given_as_they_are() -> None:
    net = Custom(lambda net, x: plain(net, torch.as_tensor(x.numpy() * 2.0)))
    same(net, Custom(lambda net, x: plain(net, 2 * x), body=net.body, head=net.head))


# -- the ladder below forward mode ------------------------------------------------------------------------------------------


def test_checkpoints() -> None:
    net = Custom(lambda net, x: net.head(checkpoint(lambda h: torch.tanh(net.body(h)), x, use_reentrant=False)))
    with ladder.watched() as seen:
        same(net, Custom(plain, body=net.body, head=net.head))
    assert "autograd" in {each.way for each in seen}
    refused(
        Custom(lambda net, x: net.head(checkpoint(lambda h: torch.tanh(net.body(h)), x, use_reentrant=True))),
        "use_reentrant=False",
    )


class _OldTanh(torch.autograd.Function):
    """In the style from before torch.func; twice differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return slope * (1 - y * y)


def test_autograd_functions_in_the_old_style() -> None:
    net = Custom(lambda net, x: net.head(_OldTanh.apply(net.body(x))))
    same(net, Custom(plain, body=net.body, head=net.head))
    geo, twin = geoad.GeoModule(net), geoad.GeoModule(Custom(plain, body=net.body, head=net.head))
    for field in (lambda geo: Fisher(geo, X, representation="dense"), lambda geo: geoad.hessian(loss(geo))):
        torch.testing.assert_close(field(geo)(geo.point()).to_dense(), field(twin)(twin.point()).to_dense())
    psi = geo.reference.reparametrize(geoad.maps.Asinh()).target
    torch.testing.assert_close(
        geoad.hessian(loss(geo))(geo.point().to(psi)).to_dense(),
        geoad.hessian(loss(geo))(geo.point()).to(psi).to_dense(),
    )


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * slope * ctx.saved_tensors[0]


def test_where_no_way_leads_there_the_module_is_named() -> None:
    geo = geoad.GeoModule(Custom(lambda net, x: net.head(net.square(net.body(x))), square=_Square()))
    p = geo.point()
    geoad.grad(loss(geo))(p)
    v = geo.reference.vector(torch.ones(geo.chart.dim), at=p)
    with pytest.raises(UnsupportedModuleError) as caught:
        geoad.hessian(loss(geo))(p).mv(v)
    message = str(caught.value)
    assert (
        "Hessian products" in message
        and "module 'square' (_Square)" in message
        and "autograd, forward, reverse" in message
        and "zero in silence" in message
    )
    assert "once_differentiable" in message or "setup_context" in message


class _New(torch.autograd.Function):
    """In the new style, with one derivative only: torch.func gives zeros for the second one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    backward = _Once.backward


def test_second_derivatives_that_torch_func_makes_zero() -> None:
    assert torch.func.vjp(torch.func.grad(lambda x: _New.apply(x).sum()), X[0])[1](X[0])[0].abs().sum() == 0  # should be 2x
    geo = geoad.GeoModule(Custom(lambda net, x: net.head(_New.apply(net.body(x)))))
    p = geo.point()
    v = geo.reference.vector(torch.ones(geo.chart.dim), at=p)
    twin = geoad.GeoModule(Custom(lambda net, x: net.head(net.body(x).square()), body=geo.wrapped.body, head=geo.wrapped.head))
    torch.testing.assert_close(geoad.grad(loss(geo))(p).ravel(), geoad.grad(loss(twin))(twin.point()).ravel())
    dense = [Fisher(each, X, representation="dense")(each.point()).to_dense() for each in (geo, twin)]
    torch.testing.assert_close(*dense)
    for _ in range(2):
        for product in (geoad.hessian(loss(geo))(p).mv, Fisher(geo, X)(p).mv):
            with pytest.raises(UnsupportedModuleError, match=r"an operation in|once_differentiable"):
                product(v)
    plain_geo = geoad.GeoModule(nn.Linear(3, 2))
    field = plain_geo.loss(lambda f, y: _New.apply(f).mean(), (X, Y))  # in the loss, where no module is to blame
    with pytest.raises(UnsupportedModuleError, match="or its loss"):
        geoad.hessian(field)(plain_geo.point()).mv(plain_geo.reference.vector(torch.ones(8), at=plain_geo.point()))


class _WithForward(torch.autograd.Function):
    generate_vmap_rule = True
    forward, backward = _New.forward, _Once.backward

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx: Any, v: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * v * ctx.saved_tensors[0]


def test_functions_with_a_forward_derivative_keep_it() -> None:
    geo = geoad.GeoModule(Custom(lambda net, x: net.head(_WithForward.apply(net.body(x)))))
    twin = geoad.GeoModule(Custom(lambda net, x: net.head(net.body(x).square()), body=geo.wrapped.body, head=geo.wrapped.head))
    v = torch.ones(geo.chart.dim)
    with ladder.watched() as seen:
        found = Fisher(geo, X)(geo.point()).mv(geo.reference.vector(v, at=geo.point())).ravel()
    torch.testing.assert_close(found, Fisher(twin, X)(twin.point()).mv(twin.reference.vector(v, at=twin.point())).ravel())
    assert [each.way for each in seen] == ["forward"]


@pytest.mark.parametrize("function", [_Once, _New, _WithForward])
@pytest.mark.parametrize("place", ["network", "loss", "function"])
@pytest.mark.parametrize("nested", [False, True])
def test_hessian_products_through_them_are_no_zeros(function: Any, place: str, nested: bool) -> None:
    """Forward over reverse and double backward both leave out what such a function bends, in silence."""
    body = nn.Linear(3, 2)
    geo = geoad.GeoModule(Custom(lambda net, x: function.apply(net.body(x)), body=body) if place == "network" else body)
    last = torch.sin if place == "network" else lambda f: function.apply(f).sin()
    parts = list(geo.loss(lambda f, y: last(f).sum(), (X, Y)).parts())
    if place == "function":
        parts = [(1.0, lambda x: function.apply(functional.linear(X, x["weight"], x["bias"])).sin().sum())]
    x = geo.point().blocks
    v = {name: torch.ones_like(block) for name, block in x.items()}
    product = functools.partial(derivatives_of.hessian_product, parts, x)
    for _ in range(2):
        with pytest.raises((RuntimeError, UnsupportedModuleError), match=r"once_diff|setup_context|the jvp function"):
            torch.func.vmap(product)({name: block[None] for name, block in v.items()}) if nested else product(v)


def test_hessian_products_in_inference_mode() -> None:
    """Plain autograd would record nothing there, and find zeros."""
    x, v = torch.tensor([1.0, 2.0]), torch.ones(2)
    with torch.inference_mode():
        assert products.hessian_product(lambda x: (x**3).sum(), x, v).tolist() == [6.0, 12.0]
        with pytest.raises(UnsupportedModuleError, match="Jacobian products"):  # zeros would come of the last way
            products.vjp(_OldTanh.apply, x)


def test_hessian_products_in_the_compiler() -> None:
    product = functools.partial(products.hessian_product, lambda x: (x**3).sum())
    compiled = torch.compile(product, backend="eager", fullgraph=True)
    assert compiled(torch.tensor([1.0, 2.0]), torch.ones(2)).tolist() == [6.0, 12.0]


def test_hessian_products_of_what_is_no_number() -> None:
    x = torch.tensor([1.0, 2.0])
    with pytest.raises(RuntimeError, match=r"one number for its value, found a tensor of shape \(2,\)"):
        products.hessian_product(torch.square, x, x)


def test_hessian_products_with_what_does_not_bend() -> None:
    x = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0]), "c": torch.tensor(2.0), "none": torch.zeros(0)}
    v = {name: torch.ones_like(block) for name, block in x.items()}
    linear = products.hessian_product(lambda x: x["a"].sum() + x["b"].sum(), x, v)
    bent = products.hessian_product(lambda x: x["a"].sum() * x["c"], x, v)
    constant = products.hessian_product(lambda x: torch.tensor(1.0), x, v)
    assert all(not each.any() for found in (linear, constant) for each in found.values())
    assert {name: block.tolist() for name, block in bent.items()} == {"a": [1.0, 1.0], "b": [0.0], "c": 2.0, "none": []}
    assert not any(block.requires_grad for found in (linear, bent, constant) for block in found.values())


class _Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Once.apply(x)


def test_a_loss_without_second_derivatives_is_named_too() -> None:
    geo = geoad.GeoModule(nn.Linear(3, 4))
    lengths = torch.full((1,), 5), torch.full((1,), 2)
    ctc = geo.loss(lambda f, t: functional.ctc_loss(f.log_softmax(-1)[:, None], t[None], *lengths), (X, torch.tensor([1, 2])))
    p = geo.point()
    geoad.grad(ctc)(p)
    with pytest.raises(UnsupportedModuleError, match="ctc_loss"):
        geoad.hessian(ctc)(p).mv(geo.reference.vector(torch.ones(16), at=p))


def test_errors_of_the_user_are_not_hidden() -> None:
    def refuse(net: Any, x: Tensor) -> Tensor:
        raise ValueError("no such thing")

    for net, error, words in (
        (Custom(refuse), ValueError, "no such thing"),
        (Custom(lambda net, x: net.head(net.body(x @ X))), RuntimeError, "shapes cannot be multiplied"),
    ):
        geo = geoad.GeoModule(net)
        with pytest.raises(error, match=words) as found:
            geoad.grad(loss(geo))(geo.point())
        assert any("the first axis counts the samples" in note for note in found.value.__notes__)
    geo = geoad.GeoModule(nn.Linear(3, 2))
    with pytest.raises(geoad.GeometryError, match=r"shapes cannot be multiplied.*A single sample is a batch of one") as found:
        geoad.grad(geo.loss(functional.cross_entropy, (X[:, :2], Y)))(geo.point())
    assert type(found.value.__cause__) is RuntimeError


def test_inside_other_transforms_nothing_is_cut() -> None:
    """Plain autograd would hand out constants there, so it is no way; the error is torch's own."""
    net = Custom(lambda net, x: net.head(_OldTanh.apply(net.body(x))))
    geo = geoad.GeoModule(net)
    field, x = loss(geo), geo.point().blocks
    geoad.grad(field)(geo.point())
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda y: geoad.grad(field)(geo.reference.point(y)).ravel().square().sum())(x)


# -- ways of being called ------------------------------------------------------------------------------------------------------


def test_the_fast_path_of_transformers_is_not_taken() -> None:
    """In eval mode without gradients torch works on nested tensors and gives zeros at padded places."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
    net = nn.Sequential(nn.Identity(), layer).eval()
    geo = geoad.GeoModule(net, forward=lambda net, x: net[1](x, src_key_padding_mask=mask))
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[1, 2] = True
    x = torch.randn(2, 3, 4)
    p = geo.point()
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        without = geo.evaluate(p.blocks, x)
    tracked = geo.evaluate({name: b.clone().requires_grad_() for name, b in p.blocks.items()}, x)
    assert torch.allclose(without, tracked) and without[1, 2].abs().sum() > 0
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_mappings_that_are_no_dicts_and_objects_as_outputs() -> None:
    body = nn.Linear(3, 2)

    def forward(net: nn.Module, batch: Any) -> Any:
        return types.SimpleNamespace(logits=net(batch.data["x"]))

    geo = geoad.GeoModule(body, forward=forward)
    field = geo.loss(lambda out, y: functional.cross_entropy(out.logits, y), [(UserDict(x=X), Y)])
    assert torch.allclose(field(geo.point()), functional.cross_entropy(body(X), Y))
    assert geoad.grad(field)(geo.point()).ravel().abs().sum() > 0


def test_quantized_lazy_and_complex_networks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.nn.quantized.Linear(3, 3)
    with pytest.raises(UnsupportedModuleError, match=r"module 'body' .* integers"):
        geoad.GeoModule(Custom(plain, body=quantized))
    with pytest.raises(UnsupportedModuleError, match="lazy"):
        geoad.GeoModule(nn.Sequential(nn.LazyLinear(2)))
    with pytest.raises(geoad.GeometryError, match="real floating point"):
        geoad.GeoModule(nn.Linear(3, 2, dtype=torch.complex128))


def test_copies_look_for_themselves() -> None:
    geo = geoad.GeoModule(nn.Linear(3, 2))
    derivatives(geo)
    for twin in (copy.deepcopy(geo), pickle.loads(pickle.dumps(geo))):
        for a, b in zip(derivatives(twin), derivatives(geo), strict=True):
            assert torch.equal(a, b)


def test_batches_of_points_of_what_vmap_cannot_batch() -> None:
    net = nn.Sequential(nn.GRU(3, 4, batch_first=True), _First(), nn.Linear(4, 2))
    geo = geoad.GeoModule(net)
    field = geo.loss(functional.cross_entropy, (X[:, None], Y))
    p = geo.point()
    q = geo.reference.point({name: torch.stack([b, b + 0.1, b - 0.2]) for name, b in p.blocks.items()})
    for i, single in enumerate(q.blocks["2.bias"]):
        one = geo.reference.point({name: block[i] for name, block in q.blocks.items()})
        assert torch.equal(one.blocks["2.bias"], single)
        torch.testing.assert_close(field(q)[i], field(one))
        torch.testing.assert_close(geoad.grad(field)(q)[i].ravel(), geoad.grad(field)(one).ravel())


def test_inference_mode() -> None:
    net = nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(3, 2))
    geo = geoad.GeoModule(net)
    with torch.inference_mode():
        tokens = torch.arange(4)[:, None]
        value = geo.loss(functional.cross_entropy, (tokens, Y[:4]))(geo.point())
    torch.testing.assert_close(value, functional.cross_entropy(net(torch.arange(4)[:, None]), Y[:4]))


class _Counting(TorchFunctionMode):
    """Counts the linear layers that it sees."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is functional.linear
        return func(*args, **(kwargs or {}))


def test_a_look_takes_the_functions_of_torch_and_the_modes_of_others() -> None:
    geo = geoad.GeoModule(net := nn.Linear(3, 2))
    theta = geo.point().blocks
    stacks: list[list[type]] = []
    net.register_forward_pre_hook(lambda *_: stacks.append([type(each) for each in _get_current_function_mode_stack()]))
    with _Counting() as seen, SpelledOut(), Lean():
        geo.evaluate(theta, X)
        assert [type(each) for each in _get_current_function_mode_stack()[-3:]] == [_Counting, SpelledOut, Lean]
    assert seen.count == 3 and [Lean in stack for stack in stacks] == [False, False, True]
    noisy = geoad.GeoModule(Custom(lambda net, x: plain(net, torch.randn_like(x))))
    with SpelledOut() as mode:  # it is there again after a refusal too
        with pytest.raises(UnsupportedModuleError):
            noisy.evaluate(noisy.point().blocks, X)
        assert _get_current_function_mode_stack()[-1] is mode


def test_compiled_derivatives() -> None:
    geo = geoad.GeoModule(Custom(plain))
    field, p = loss(geo), geo.point()
    compiled = torch.compile(lambda blocks: geoad.grad(field)(geo.reference.point(blocks)).ravel(), backend="eager")
    torch.testing.assert_close(compiled(p.blocks), geoad.grad(field)(p).ravel())


def test_the_look_costs_two_evaluations_once() -> None:
    net = nn.Linear(3, 2)
    calls: list[int] = []
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    geo = geoad.GeoModule(net)
    field, p = loss(geo), geo.point()
    field(p)
    assert len(calls) == 3
    field(p), geoad.grad(field)(p), loss(geo)(p)
    assert len(calls) == 6
    geo.eval()
    field(p)
    assert len(calls) == 9
