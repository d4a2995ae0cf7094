"""Bad input, every public call against every defect: a clear error at the call, and nothing is half-updated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import geoad
from geoad.curvature import GGN, Categorical, Fisher, Hessian, LowRank, running_average
from geoad.data import Batches
from geoad.errors import GeometryError, SingularMetricError, UnsupportedModuleError

N = 7
X = torch.linspace(-2.0, 2.0, 4 * N, dtype=torch.float64).reshape(N, 4).cos()
Y = torch.arange(N) % 3
R = torch.linspace(-1.0, 1.5, 3 * N, dtype=torch.float64).reshape(N, 3).sin()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def put(x: Tensor, value: float, sample: int = 2) -> Tensor:
    """With one other number."""
    x = x.clone()
    x.view(N, -1)[sample, 0] = value
    return x


# -- the calls ---------------------------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """The same loss as a function of torch and as a likelihood."""

    fn: Any = F.cross_entropy
    likelihood: Any = "categorical"


Call = Callable[[geoad.GeoModule, Any, Loss], Tensor]


def product(form: Any) -> Tensor:
    chart = form.chart
    return form.mv(chart.vector(chart.layout.unravel(torch.ones(chart.dim, dtype=form.dtype)), at=form.at)).ravel()


def fisher(kind: str, representation: Any) -> Call:
    return lambda geo, data, loss: product(
        Fisher(geo, data, loss.likelihood, kind=kind, representation=representation)(geo.point())
    )


def ggn(representation: Any) -> Call:
    return lambda geo, data, loss: product(GGN(geo, data, loss.fn, representation=representation)(geo.point()))


def pulled(geo: geoad.GeoModule, data: Any, loss: Loss) -> Tensor:
    space = geoad.FunctionSpace(geo, data)
    here = space(geo.point())
    return space.jacobian(geo.point()).pullback(space.chart.covector(torch.ones_like(here.components), at=here)).ravel()


def kernel_product(geo: geoad.GeoModule, data: Any, loss: Loss) -> Tensor:
    kernel = geoad.ntk(geo, data, representation="implicit")(geo.point())
    return kernel.mv(kernel.chart.covector(torch.ones_like(kernel.at.components), at=kernel.at)).ravel()


BY_LOSS: dict[str, Call] = {
    "hessian": lambda geo, data, loss: product(geoad.hessian(geo.loss(loss.fn, data))(geo.point())),
    "hessian, dense": lambda geo, data, loss: geoad.hessian(geo.loss(loss.fn, data))(geo.point()).to_dense(),
    "Hessian": lambda geo, data, loss: product(Hessian(geo, data, loss.fn)(geo.point())),
    "Hessian, diagonal": lambda geo, data, loss: product(Hessian(geo, data, loss.fn, representation="diagonal")(geo.point())),
    "per_sample_grads": lambda geo, data, loss: geoad.per_sample_grads(geo, loss.fn, data)(geo.point()).ravel(),
}
BY_LABELS: dict[str, Call] = {
    **{f"empirical, {r}": fisher("empirical", r) for r in ("implicit", "dense", "kfac", "ekfac", LowRank(3))},
    **{f"covariance, {r}": fisher("covariance", r) for r in ("implicit", "diagonal")},
    **{f"GGN, {r}": ggn(r) for r in ("implicit", "block_diagonal", "kfac")},
}
BY_LIKELIHOOD: dict[str, Call] = {
    **{f"exact, {r}": fisher("exact", r) for r in ("implicit", "dense", "diagonal", "quasi_diagonal", "ekfac", LowRank(3))},
    **{f"mc, {r}": fisher("mc", r) for r in ("implicit", "kfac")},
}
BY_INPUTS: dict[str, Call] = {
    "ntk": lambda geo, data, loss: geoad.ntk(geo, data)(geo.point()).to_dense(),
    "ntk, product": kernel_product,
    "ntk, norms": lambda geo, data, loss: geoad.ntk(geo, data).squared_norms(geo.point()),
    "ntk, blocks": lambda geo, data, loss: torch.cat([rows for _, rows in geoad.ntk(geo, data).blocks(geo.point())]),
    "FunctionSpace": lambda geo, data, loss: geoad.FunctionSpace(geo, data)(geo.point()).components,
    "FunctionSpace, push": lambda geo, data, loss: (
        geoad.FunctionSpace(geo, data)
        .jacobian(geo.point())
        .pushforward(geo.reference.vector(geo.point().components, at=geo.point()))
        .ravel()
    ),
    "FunctionSpace, pull": pulled,
    "FunctionSpace, matrix": lambda geo, data, loss: geoad.FunctionSpace(geo, data).jacobian(geo.point()).data,
}
LABELLED = {**BY_LOSS, **BY_LABELS}
CALLS = {**LABELLED, **BY_LIKELIHOOD, **BY_INPUTS}
SOME_LABELLED = ["hessian", "Hessian, diagonal", "per_sample_grads", "empirical, kfac", "GGN, implicit"]
SOME = [*SOME_LABELLED, "exact, ekfac", "mc, implicit", "ntk", "FunctionSpace, pull"]
OUTPUTS = [name for name in CALLS if name != "FunctionSpace"]  # derivatives


# -- what must stay as it is -------------------------------------------------------------------------------------------------


class State:
    """Everything of a network, and the random numbers to come."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.held = net, copy.deepcopy(net.state_dict())
        self.flags = [(m.training, *m._forward_hooks, *m._forward_pre_hooks) for m in net.modules()]  # pyright: ignore[reportPrivateUsage]
        self.leaves = [(p.requires_grad, p.grad is None, p._version) for p in net.parameters()]
        self.random = torch.get_rng_state()

    def require_same(self) -> None:
        now = State(self.net)
        assert now.held.keys() == self.held.keys()
        assert all(torch.allclose(now.held[k], v, rtol=0, atol=0, equal_nan=True) for k, v in self.held.items())
        assert (now.flags, now.leaves) == (self.flags, self.leaves)
        assert torch.equal(now.random, self.random)


CLASSES, REAL = Loss(), Loss(F.mse_loss, "gaussian")


def refused(name: str, net: nn.Module, data: Any, words: str, loss: Loss = CLASSES, error: Any = GeometryError) -> None:
    """The call raises, and nothing is changed by it."""
    geo = geoad.GeoModule(net)
    torch.manual_seed(0)
    if name.startswith("mc"):  # the seed of the labels is drawn when the field is made
        torch.randint(1 << 62, ())
    state = State(net)
    torch.manual_seed(0)
    with pytest.raises(error, match=words):
        CALLS[name](geo, data, loss)
    if isinstance(data, DataLoader) or (name.startswith("mc") and torch.equal(torch.get_rng_state(), _start())):
        state.random = torch.get_rng_state()  # a loader draws a seed for each pass; a field that was not made draws none
    state.require_same()


def _start() -> Tensor:
    return torch.Generator().manual_seed(0).get_state()


# -- numbers that are not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_nan_in_the_inputs(name: str) -> None:
    refused(name, network(), [(X, Y), (put(X, torch.nan), Y)], "inputs of batch 1 hold 1 of 28 .*sample 2")


@pytest.mark.parametrize("name", OUTPUTS)
def test_infinite_inputs_that_a_layer_saturates(name: str) -> None:
    """The outputs are finite; their derivatives are not."""
    refused(name, network(), (put(X, torch.inf), Y), "inputs of batch 0 hold 1 of 28 .*sample 2")


@pytest.mark.parametrize("name", LABELLED)
def test_nan_in_the_targets(name: str) -> None:
    refused(name, network(), (X, put(R, torch.nan)), "targets of batch 0 hold|1 of 21 targets are not finite", REAL)


@pytest.mark.parametrize("name", [*BY_LIKELIHOOD, *BY_INPUTS])
def test_targets_that_are_left_aside_may_be_nan(name: str) -> None:
    torch.manual_seed(0)
    one, other = (CALLS[name](geoad.GeoModule(network()), (X, y), REAL) for y in (R, put(R, torch.nan)))
    if not name.startswith("mc"):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", SOME)
def test_parameters_that_are_not_finite(name: str) -> None:
    net = network()
    with torch.no_grad():
        net.get_parameter("2.weight")[0, 0] = torch.nan
    refused(name, net, (X, Y), r"the parameters \['2\.weight'\] hold such numbers")


class Root(nn.Module):
    """Finite outputs with an infinite derivative at x = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).abs().sqrt()


@pytest.mark.parametrize("name", SOME)
def test_infinite_derivatives_of_a_network_are_told_from_bad_data(name: str) -> None:
    x = X.clone()
    x[2] = 0.0
    refused(name, Root(), (x, Y), "finite, (so|but) a derivative of the network")


@pytest.mark.parametrize("place", ["value", "slope"])
def test_the_loss_is_to_blame(place: str) -> None:
    def loss(f: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(f, y) + ((f * 0).log().sum() if place == "value" else (f * 0).abs().sqrt().sum())

    refused(
        "hessian", network(), (X, Y), "loss of batch 0 is -inf" if place == "value" else "or of the loss is not", Loss(loss)
    )


def test_only_the_loss_of_a_sum_is_blamed() -> None:
    geo = geoad.GeoModule(network())
    p = geo.point()
    infinite = geo.scalar_field(lambda net: torch.stack([(w * 0).abs().sqrt().sum() for w in net.parameters()]).sum())
    good, bad = geo.loss(F.cross_entropy, (X, Y)), geo.loss(F.cross_entropy, (put(X, torch.nan), Y))
    for field in (infinite, good + infinite, good * infinite, -infinite):
        assert not bool(product(geoad.hessian(field)(p)).isfinite().all())
    for field in (bad + infinite, 2.0 * bad, bad.map(torch.exp), bad * infinite):
        with pytest.raises(GeometryError, match="inputs of batch 0"):
            product(geoad.hessian(field)(p))


@pytest.mark.parametrize("chart", ["asinh", "weight norm"])
@pytest.mark.parametrize("name", ["hessian", "exact, implicit", "exact, diagonal", "per_sample_grads", "ntk"])
def test_in_other_charts(name: str, chart: str) -> None:
    geo = geoad.GeoModule(network())
    recipe = geoad.maps.Asinh() if chart == "asinh" else {"*.weight": geoad.maps.WeightNorm()}
    geo.to(geo.reference.reparametrize(recipe, name="psi").target)
    assert bool(CALLS[name](geo, (X, Y), CLASSES).isfinite().all())
    with pytest.raises(GeometryError, match="inputs of batch 0 hold 1 of 28"):
        CALLS[name](geo, (put(X, torch.nan), Y), CLASSES)


@pytest.mark.parametrize("make", [geoad.hessian, Hessian, lambda L: Fisher(L.source.geo, (X, Y))])
def test_vectors_that_are_not_finite_are_the_callers_own(make: Any) -> None:
    geo = geoad.GeoModule(network())
    p, form = geo.point(), make(geo.loss(F.cross_entropy, (X, Y)))(geo.point())
    for value in (torch.nan, 1.0, torch.inf):
        v = geo.reference.vector({name: torch.full_like(b, value) for name, b in p.blocks.items()}, at=p)
        assert bool(form.mv(v).ravel().isfinite().all()) is (value == 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_numbers_are_finite(dtype: torch.dtype) -> None:
    """Their sums overflow."""
    big = 0.9 * torch.finfo(dtype).max
    chart = geoad.GeoModule(nn.Linear(2, 2, bias=False).to(dtype))
    p = chart.point()
    L = chart.loss(lambda f, y: (f * 0).sum() + 0.5 * big * (f * f).sum(), (torch.eye(2, dtype=dtype)[:1], torch.zeros(1, 2)))
    found = product(geoad.hessian(L)(chart.reference.point({"weight": torch.zeros(2, 2, dtype=dtype)})))
    assert bool(found.isfinite().all()) and found.max() == big
    assert p.blocks["weight"].dtype == dtype
    assert not bool(found.sum().isfinite())


# -- labels and targets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize(("label", "place"), [(3, 4), (-1, 0)])
def test_labels_out_of_range(name: str, label: int, place: int) -> None:
    y = Y.clone()
    y[place] = label
    words = rf"[Ll]abels must lie between 0 and 2.* (to {label}|{label} to 2|{label} to {label})\b"
    refused(name, network(), (X, y), words)


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(), partial(F.cross_entropy, label_smoothing=0.1)], ids=["module", "partial"]
)
@pytest.mark.parametrize("name", ["hessian", "per_sample_grads", "GGN, implicit", "GGN, kfac"])
def test_labels_out_of_range_in_other_forms_of_the_loss(name: str, loss: Any) -> None:
    refused(name, network(), (X, Y + 2), "[Ll]abels must lie between 0 and 2", Loss(loss))


@pytest.mark.parametrize("name", SOME_LABELLED)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_type(name: str, dtype: torch.dtype) -> None:
    one, other = (CALLS[name](geoad.GeoModule(network()), (X, y), CLASSES) for y in (Y, Y.to(dtype)))
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", SOME_LABELLED)
def test_one_hot_targets(name: str) -> None:
    one, other = (CALLS[name](geoad.GeoModule(network()), (X, y), CLASSES) for y in (Y, F.one_hot(Y, 3).double()))
    torch.testing.assert_close(one, other)


TARGETS: dict[str, tuple[Tensor, str]] = {
    "truth values": (Y > 0, r"y\.long\(\)"),
    "one-hot integers": (F.one_hot(Y, 3), r"y\.to\(outputs\.dtype\)|found int64 of shape \(\d, 3\)"),
    "with an axis too many": (Y[:, None], r"y\.squeeze\(1\)|found int64 of shape \(\d, 1\)"),
    "real labels": (Y.double(), r"y\.long\(\)"),
}


@pytest.mark.parametrize("name", SOME_LABELLED)
@pytest.mark.parametrize("form", TARGETS)
def test_targets_of_another_form(name: str, form: str) -> None:
    targets, words = TARGETS[form]
    refused(name, network(), (X, targets), words)


@pytest.mark.parametrize("name", SOME_LABELLED)
@pytest.mark.parametrize("length", [5, 14])
def test_targets_of_another_length(name: str, length: int) -> None:
    words = rf"7 samples and targets of shape \({length},\)|targets int64 of shape \({length},\)"
    refused(name, network(), (X, Y.repeat(2)[:length]), words)


@pytest.mark.parametrize("name", LABELLED)
def test_no_targets(name: str) -> None:
    if name.startswith("GGN"):  # for labels that A does not depend on none are needed
        assert bool(CALLS[name](geoad.GeoModule(network()), X, CLASSES).isfinite().all())
    else:
        refused(name, network(), X, "no targets|needs the labels")


WRONG: dict[str, tuple[nn.Module, Any, Loss, str]] = {
    "one logit": (nn.Linear(4, 1).double(), (X, Y * 0), CLASSES, "at least two logits"),
    "labels as real numbers": (network(), (X, Y), REAL, "Gaussian needs one real target for every output"),
    "classes that are no probabilities": (network(), (X, 3.0 * Y), Loss(likelihood="bernoulli"), "one real target"),
    "negative counts": (network(), (X, -R.abs()), Loss(likelihood="poisson"), "are counts"),
    "no samples in front": (nn.Sequential(network(), nn.Flatten(0)), (X, Y), CLASSES, r"shape \(n, \.\.\., c\)"),
    "logits that are labels": (network(), (X, Y), Loss(likelihood=Categorical(axis=4)), "in axis 4"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["empirical, implicit", "covariance, diagonal"])
def test_a_likelihood_of_other_outputs(name: str, wrong: str) -> None:
    net, data, loss, words = WRONG[wrong]
    refused(name, copy.deepcopy(net), data, words, loss)


# -- data --------------------------------------------------------------------------------------------------------------------

EVALUATED = ["single precision", "integers", "another device", "too few features", "too few features, later"]
"""What only an evaluation of the network shows; the rest is refused before."""
ENTRIES = ["Hessian", "per_sample_grads", "exact, ekfac", "ntk"]

DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: None, "found NoneType|data NoneType"),
    "an empty list": (list[Any], "data set is empty"),
    "an empty batch": (lambda: (X[:0], Y[:0]), "data set is empty"),
    "an empty loader": (lambda: DataLoader(TensorDataset(X[:0], Y[:0])), "data set is empty"),
    "an iterator": (lambda: iter([(X, Y)]), "one-shot iterator"),
    "a generator": (lambda: (each for each in [(X, Y)]), "one-shot iterator"),
    "a data set": (lambda: TensorDataset(X, Y), r"DataLoader\(dataset"),
    "arrays": (lambda: (X.numpy(), Y), r"inputs are a ndarray.*torch\.as_tensor"),
    "arrays of labels": (lambda: (X, Y.numpy()), r"targets are a ndarray.*torch\.as_tensor"),
    "lists of labels": (lambda: (X, Y.tolist()), r"targets are a list.*torch\.as_tensor"),
    "three tensors": (lambda: (X, X, Y), r"3 tensors of several kinds.*\(\(x1, x2\), y\)"),
    "a list of unequal lengths": (lambda: [X, Y[:5]], "2 tensors of several kinds"),
    "a number": (lambda: 3, "found int"),
    "single precision": (lambda: (X.float(), Y), r"inputs are torch\.float32.*x\.to\(torch\.float64\)"),
    "half precision": (lambda: (X.bfloat16(), Y), r"inputs are torch\.bfloat16.*x\.to\(torch\.float64\)"),
    "integers": (lambda: ((10 * X).long(), Y), r"inputs are torch\.int64.*x\.to\(torch\.float64\)"),
    "images of bytes": (lambda: ((10 * X.abs()).to(torch.uint8), Y), r"inputs are torch\.uint8.*x\.to\(torch\.float64\)"),
    "another device": (lambda: (X.to("meta"), Y), r"inputs are on meta.*x\.to\('cpu'\)"),
    "too few features": (
        lambda: (X[:, :3], Y),
        r"inputs float64 of shape \(\d, 3\): in module '0', Linear.*shapes cannot be multiplied",
    ),
    "too few features, later": (lambda: [(X, Y), (X[:, :3], Y)], r"inputs float64 of shape \(\d, 3\): in module '0'"),
}


@pytest.mark.parametrize(("name", "kind"), [(n, k) for k in DATA for n in (SOME if k in EVALUATED else ENTRIES)])
def test_data_of_another_kind(name: str, kind: str) -> None:
    data, words = DATA[kind]
    refused(name, network(), data(), words)


@pytest.mark.parametrize("name", SOME)
def test_a_network_of_another_precision(name: str) -> None:
    refused(name, network().bfloat16(), (X.float(), Y), r"inputs are torch\.float32, the parameters torch\.bfloat16")


@pytest.mark.parametrize("name", SOME_LABELLED)
def test_targets_on_another_device(name: str) -> None:
    refused(name, network(), (X, Y.to("meta")), "targets (are )?on meta")


@pytest.mark.parametrize("name", [*(name for name in SOME if "essian" not in name), *BY_INPUTS])
def test_a_sample_without_a_batch_axis(name: str) -> None:
    words = r"x\.unsqueeze\(0\)|4 samples and targets of shape \(\)|batch of 4 samples|needs outputs of shape \(n, \.\.\., c\)"
    refused(name, network(), (X[0], Y[0]), words)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).flatten(1))


@pytest.mark.parametrize("name", SOME)
def test_tokens_out_of_range(name: str) -> None:
    x = torch.arange(2 * N).reshape(N, 2) % 5
    x[3, 1] = 7
    refused(name, Tokens().double(), (x, Y), "module 'table', Embedding.*Indices must lie between 0 and 4, found 0 to 7")


MODES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 3)), r"'1', a Dropout, .*geo\.eval\(\)"),
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), r"'1'.*BatchNorm1d"),
}


@pytest.mark.parametrize(
    ("name", "mode"), [*((n, "batch norm") for n in (*SOME, "exact, implicit", "ntk, norms")), *((n, "dropout") for n in SOME)]
)
def test_training_mode_where_it_matters(name: str, mode: str) -> None:
    make, words = MODES[mode]
    net = make().double()
    whole = name.endswith("implicit") or name in ("hessian", "hessian, dense", "Hessian", "Hessian, diagonal")
    if mode == "batch norm" and whole:  # objects of whole batches
        before = copy.deepcopy(net.state_dict())
        assert bool(CALLS[name](geoad.GeoModule(net), (X, Y), CLASSES).isfinite().all())
        assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    else:
        refused(name, net, (X, Y), words, error=(UnsupportedModuleError, GeometryError))


# -- what is a batch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ["implicit", "kfac"])
@pytest.mark.parametrize("pair", [tuple, list])
def test_two_batches_of_inputs_are_no_inputs_and_targets(representation: str, pair: Any) -> None:
    """A list is two batches; of a tuple the second half would be left aside."""
    geo, halves = geoad.GeoModule(network()), X[:6].chunk(2)
    options: dict[str, Any] = {"representation": representation}
    whole = product(Fisher(geo, X[:6], **options)(geo.point()))
    if pair is list:
        torch.testing.assert_close(product(Fisher(geo, list(halves), **options)(geo.point())), whole)
    else:
        with pytest.raises(GeometryError, match=r"form of inputs, not of targets.*\(x2, None\)"):
            Fisher(geo, halves, **options)(geo.point()).mv(geo.reference.vector(geo.point().blocks, at=geo.point()))
    torch.testing.assert_close(product(Fisher(geo, [(x, None) for x in halves], **options)(geo.point())), whole)


def test_padded_tokens_are_no_inputs_and_targets() -> None:
    class Lengths(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x).sum(1).repeat(1, 2))

    geo = geoad.GeoModule(Lengths().double())
    x = [torch.arange(4 * k).reshape(4, k) % 5 for k in (2, 3)]
    with pytest.raises(GeometryError, match="form of inputs, not of targets"):
        product(Fisher(geo, x)(geo.point()))
    product(Fisher(geo, [(each, None) for each in x])(geo.point()))


def test_inputs_and_targets_of_one_shape_in_a_list() -> None:
    geo = geoad.GeoModule(nn.Linear(4, 4).double())
    with pytest.raises(GeometryError, match=r"Pass a tuple \(x, y\) for the one"):
        product(GGN(geo, [X, X.cos()], "gaussian")(geo.point()))
    for data in ((X, X.cos()), [(X, None), (X.cos(), None)]):
        product(GGN(geo, data, "gaussian")(geo.point()))
    with pytest.raises(GeometryError, match=r"no targets.*Pass the data as \(x, y\)"):
        product(geoad.hessian(geo.loss(F.mse_loss, [X, X.cos()]))(geo.point()))


def test_tokens_and_their_successors_are_inputs_and_targets() -> None:
    geo = geoad.GeoModule(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)).double())
    x = torch.arange(12).reshape(4, 3) % 5
    y = (x + 1) % 5
    for data in ((x, y), DataLoader(TensorDataset(x, y), batch_size=4)):
        for field in (Fisher(geo, data), Fisher(geo, data, kind="empirical"), GGN(geo, data, representation="diagonal")):
            product(field(geo.point()))
    with pytest.raises(GeometryError, match=r"Pass a tuple \(x, y\)"):
        product(Fisher(geo, [x, y])(geo.point()))


def test_several_targets_belong_to_one_batch() -> None:
    geo = geoad.GeoModule(network())

    def loss(f: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(f, y[0]) + F.mse_loss(f, y[1])

    for data in ((X, (Y, R)), [X, [Y, R]], [(X[:3], (Y[:3], R[:3])), (X[3:], (Y[3:], R[3:]))]):
        L = geo.loss(loss, data)
        torch.testing.assert_close(L(geo.point()), loss(geo(X), (Y, R)))
        rows = geoad.per_sample_grads(L)(geo.point())
        torch.testing.assert_close(rows.ravel().mean(0), geoad.grad(L)(geo.point()).ravel())
    assert Batches((X, (Y, R))).total == N


# -- odd, but legal ----------------------------------------------------------------------------------------------------------


class Sparse(nn.Module):
    """With parameters of no and of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.empty, self.scale = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.tensor(1.2))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("make", "size"), [(network, 1), (lambda: Sparse().double(), N)], ids=["one", "empty"])
def test_few_samples_and_few_numbers(name: str, make: Any, size: int) -> None:
    found = CALLS[name](geoad.GeoModule(make()), (X[:size], Y[:size]), CLASSES)
    assert bool(found.isfinite().all()) and found.numel()


@pytest.mark.parametrize("name", [name for name in SOME if not name.startswith("mc")])
def test_a_ragged_last_batch_of_one(name: str) -> None:
    ragged = list(zip(X.split(3), Y.split(3), strict=True))
    one, other = (CALLS[name](geoad.GeoModule(network()), data, CLASSES) for data in ((X, Y), ragged))
    if "kfac" not in name.split(", ")[-1]:  # the mean of batches is no product
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# -- products of several dtypes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ["implicit", "dense", "diagonal", "kfac", "ekfac", "low_rank"])
def test_arguments_of_another_precision(representation: str) -> None:
    """They are taken where torch takes them, and refused by name elsewhere."""
    geo = geoad.GeoModule(network())
    p = geo.point()
    G = Fisher(geo, X, representation=representation)(p)
    v = geo.reference.vector({name: b.float() for name, b in p.blocks.items()}, at=p)
    w = geo.reference.covector({name: b.float() for name, b in p.blocks.items()}, at=p)
    for call in (lambda: G.mv(v), lambda: G(v, v), lambda: G.solve(w, damping=0.1)):
        try:
            found = call()
        except GeometryError as error:
            assert "torch.float64 and torch.float32" in str(error) and ".to(torch.float64)" in str(error)
        else:
            assert bool(found.isfinite().all())


# -- solving, averages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ["implicit", "dense", "kfac", "low_rank"])
def test_singular_solves(representation: str) -> None:
    net = Sparse().double()
    geo = geoad.GeoModule(net)
    state, G = State(net), Fisher(geo, X, representation=representation)(geo.point())
    w = geoad.grad(geo.loss(F.cross_entropy, (X, Y)))(geo.point())
    with pytest.raises(SingularMetricError, match="damping"):
        G.solve(w)
    assert bool(G.solve(w, damping=1e-2).isfinite())
    state.require_same()


def test_an_average_is_not_changed_by_what_is_refused() -> None:
    geo = geoad.GeoModule(network())
    good, bad = (Fisher(geo, x, representation="kfac") for x in (X, put(X, torch.nan)))
    average = good(geo.point())
    before = average.to_dense().clone()
    with pytest.raises(GeometryError, match="inputs of batch 0"):
        running_average(average, bad(geo.point()), 0.9)
    assert torch.equal(average.to_dense(), before)
    torch.testing.assert_close(running_average(average, good(geo.point()), 0.9).to_dense(), before)


def test_a_field_is_as_before_after_a_refusal() -> None:
    """The data are mended in place; nothing that was kept is of the bad ones."""
    geo, x = geoad.GeoModule(network()), put(X, torch.nan)
    L = geo.loss(F.cross_entropy, (x, Y))
    fields = [Fisher(geo, x), Fisher(geo, x, representation="ekfac"), GGN(geo, (x, Y)), geoad.hessian(L), Hessian(L)]
    rows = geoad.per_sample_grads(L)
    for field in fields:
        with pytest.raises(GeometryError, match="not finite"):
            product(field(geo.point()))
    with pytest.raises(GeometryError, match="not finite"):
        rows(geo.point())
    x.copy_(X)
    clean = geo.loss(F.cross_entropy, (X, Y))
    wanted = [Fisher(geo, X), Fisher(geo, X, representation="ekfac"), GGN(geo, (X, Y)), geoad.hessian(clean), Hessian(clean)]
    for field, other in zip(fields, wanted, strict=True):
        assert torch.equal(product(field(geo.point())), product(other(geo.point())))
    assert torch.equal(rows(geo.point()).ravel(), geoad.per_sample_grads(clean)(geo.point()).ravel())


def test_arrays_of_numpy_are_named() -> None:
    with pytest.raises(GeometryError, match=r"inputs are a ndarray.*torch\.as_tensor"):
        Batches(np.zeros((3, 2)))
