"""Products without waste, in the evaluations and in torch's formulas for second derivatives: the same numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import geoad
from geoad.kernels import lean as lean_kernels
from geoad.kernels import products, small_images
from geoad.kernels.graph import nodes
from geoad.kernels.lean import Lean

CASES: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1d": (functional.conv1d, (2, 3, 7), (4, 3, 3), {"stride": 2, "padding": 1}),
    "2d": (functional.conv2d, (2, 2, 6, 5), (3, 2, 3, 2), {"padding": (1, 0), "dilation": (1, 2)}),
    "2d, groups": (functional.conv2d, (2, 4, 4, 4), (6, 2, 2, 2), {"groups": 2, "stride": (2, 1)}),
    "3d": (functional.conv3d, (1, 2, 4, 3, 4), (2, 2, 2, 2, 2), {"stride": [1, 1, 2]}),
    "1d, one channel": (functional.conv1d, (900, 1, 41), (4, 1, 3), {"stride": 3, "padding": 1}),
    "2d, one channel": (
        functional.conv2d,
        (150, 1, 9, 7),
        (3, 1, 3, 2),
        {"padding": (1, 2), "dilation": (2, 1), "stride": (1, 2)},
    ),
    "3d, one channel": (functional.conv3d, (70, 1, 5, 6, 5), (2, 1, 2, 3, 2), {"stride": (1, 2, 1), "padding": (0, 1, 0)}),
    "no samples": (functional.conv2d, (0, 2, 6, 5), (3, 2, 3, 2), {}),
    "one place": (functional.conv2d, (3, 2, 1, 1), (4, 2, 3, 3), {"padding": 1}),
    "mostly outside": (functional.conv2d, (2, 3, 2, 1), (4, 3, 5, 3), {"padding": (4, 1), "stride": (3, 1)}),
    "past the end": (functional.conv1d, (2, 2, 9), (3, 2, 2), {"stride": 4, "dilation": 3}),
}


def third(f: Any, x: list[Tensor]) -> list[Tensor]:
    """f, and its derivatives of three orders along fixed directions."""
    values, found = [f(*x)], [f(*x)]
    for _ in range(3):
        weighed = [(v.flatten() * torch.linspace(-1, 2, v.numel())).square().sum() for v in values if v.requires_grad]
        if not weighed:
            break
        scalar = torch.stack(weighed).sum()
        values = [g for g in torch.autograd.grad(scalar, x, create_graph=True, allow_unused=True) if g is not None]
        found += values
    return found


def small(monkeypatch: pytest.MonkeyPatch, always: bool) -> None:
    """Take the matrices of convolutions for all images, or for none."""
    monkeypatch.setattr(lean_kernels, "is_small", lambda *_: always)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("matrix", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_convolutions_have_the_derivatives_of_torch(
    case: str, matrix: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch, matrix)
    conv, shape, weight, options = CASES[case]
    x = torch.randn(shape, requires_grad=matrix)
    leaves = [torch.randn(weight, requires_grad=True)]
    leaves += [torch.randn(weight[0], requires_grad=True)] if bias else []
    leaves += [x] if matrix else []

    def f(w: Tensor, *rest: Tensor) -> Tensor:
        return conv(x, w, rest[0] if bias else None, **options).sin()

    with Lean():
        lean, names = third(f, leaves), _names(f(*leaves))
    plain = third(f, leaves)
    if options.get("groups", 1) == 1:
        assert ("IndexSelectBackward0" if matrix else "_ConvolutionBackward") in names
    assert len(lean) >= len(plain) > 1
    for a, b in zip(lean, plain, strict=False):  # zeros of empty data come back as such
        size = float(b.detach().abs().amax()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13 * max(1.0, size))  # sums of other orders


@pytest.mark.parametrize("relu", [functional.relu, torch.relu, Tensor.relu, nn.ReLU()])
def test_relu_has_the_derivatives_of_torch(relu: Any) -> None:
    x = torch.randn(40000)
    x[:4] = torch.tensor([0.0, -0.0, float("inf"), -float("inf")])
    x = x.requires_grad_()

    def f(x: Tensor) -> Tensor:
        return relu(x * torch.ones_like(x).cumsum(0).sin()).sin()[10:]

    with Lean():
        lean = third(f, [x])
    for a, b in zip(lean, third(f, [x]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


POOLS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "1d": (functional.max_pool1d, (50, 8, 101), {"kernel_size": 3, "stride": 2, "padding": 1}),
    "1d, ceil": (functional.max_pool1d, (60, 6, 101), {"kernel_size": (2,), "dilation": 3, "ceil_mode": True}),
    "2d": (functional.max_pool2d, (80, 9, 8, 8), {"kernel_size": 2}),
    "2d, few channels": (functional.max_pool2d, (50, 3, 15, 16), {"kernel_size": (3, 2), "stride": [], "padding": (1, 0)}),
    "2d, overlaps": (torch.max_pool2d, (20, 16, 11, 12), {"kernel_size": 3, "stride": [2, 1], "dilation": (1, 2)}),
    "2d, ceil": (nn.MaxPool2d(3, 2, 1, 2, ceil_mode=True), (20, 16, 11, 12), {}),
    "3d": (functional.max_pool3d, (10, 8, 7, 8, 9), {"kernel_size": (2, 3, 2), "stride": 2, "padding": (0, 1, 1)}),
    "3d, few channels": (nn.MaxPool3d(2, dilation=(1, 2, 1), ceil_mode=True), (40, 2, 7, 8, 9), {}),
}


@pytest.mark.parametrize("layout", ["planes", "channels", "part"])
@pytest.mark.parametrize("case", POOLS)
def test_max_pooling_has_the_derivatives_of_torch(case: str, layout: str) -> None:
    pool, shape, options = POOLS[case]
    x = torch.randn(shape).relu()  # with many ties
    for k, number in enumerate((float("inf"), -float("inf"), -0.0)):
        x.view(-1)[k::173] = number
    x = x.transpose(1, -1).contiguous().transpose(1, -1) if layout == "channels" else x
    x = x.requires_grad_()

    def f(x: Tensor) -> Tensor:
        y = pool(x[..., 1:] if layout == "part" else x + 0.0, **options)
        y = y.masked_fill(y.isinf(), 0.0)
        return y.sin() * y

    with Lean():
        lean, names = third(f, [x]), _names(f(x))
    plain = third(f, [x])
    assert "_MaxPoolBackward" in names and "_MaxPoolBackward" not in _names(f(x))
    assert len(lean) == len(plain) == 4
    assert torch.equal(lean[0], plain[0])
    for a, b in zip(lean, plain, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def _names(y: Tensor) -> set[str]:
    return {type(node).__name__ for node in nodes([y])}


RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "function": functional.relu,
    "method": Tensor.relu,
    "torch": torch.relu,
    "module": nn.ReLU(),
}


@pytest.mark.parametrize("relu", RELUS)
@pytest.mark.parametrize("case", POOLS)
def test_pooling_before_relu(case: str, relu: str) -> None:
    pool, shape, options = POOLS[case]
    x = torch.randn(shape)
    for k, number in enumerate((float("inf"), -float("inf"), -0.0, 0.0, float("nan"))):
        x.view(-1)[k::173] = number
    x.view(-1)[::3] = x.view(-1)[::3].round()  # with many ties
    x.requires_grad_()

    def f(x: Tensor) -> Tensor:
        y = pool(RELUS[relu](x + 0.0), **options)
        y = y.masked_fill(~y.isfinite(), 0.0)
        return y.sin() * y

    with Lean():
        lean, found = third(f, [x]), _sizes(f(x), "_ReLUBackward")
    plain = third(f, [x])
    assert all(size < x.numel() for size in found)
    assert len(lean) == len(plain) == 4
    for a, b in zip(lean, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def _sizes(y: Tensor, name: str) -> list[int]:
    return [node.saved_tensors[0].numel() for node in nodes([y]) if type(node).__name__ == name]


def test_relu_stays_where_somebody_looks_at_it() -> None:
    x = torch.randn(600, 8, 4, 4, requires_grad=True)
    pool, relu = nn.MaxPool2d(2), nn.ReLU()

    def sizes(change: Callable[[Tensor, Tensor], Tensor]) -> list[int]:
        inside = x * 1.0
        with Lean():
            return _sizes(pool(change(relu(inside), inside)), "_ReLUBackward")

    def changed(t: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            t += 1
        return y

    def hooked(y: Tensor) -> Tensor:
        y.register_hook(lambda g: -g)
        return y

    def kept(y: Tensor) -> Tensor:
        y.retain_grad()
        return y

    whole = [x.numel()]
    assert sizes(lambda y, _: y) == []  # a quarter is too small to be worth a function of ours
    assert sizes(lambda y, x: hooked(y)) == sizes(lambda y, x: kept(y)) == whole
    assert sizes(lambda y, x: changed(x, y)) == whole
    assert sizes(lambda y, x: y * 1.0) == whole
    with Lean():
        y = relu(x * 1.0)
        z = relu(x * 2.0)
        assert _sizes(pool(y), "_ReLUBackward") == whole  # not the last one
        assert _sizes(y + z, "_ReLUBackward") == whole * 2
    with Lean():
        assert _sizes(pool(z), "_ReLUBackward") == whole  # of an evaluation that is over
    with Lean():
        y = relu(x * 1.0)
        both = pool(y).sum() + y.square().sum()
    expected = functional.max_pool2d(x.relu(), 2).sum() + x.relu().square().sum()
    assert torch.equal(*(torch.autograd.grad(each, x)[0] for each in (both, expected)))


def test_max_pooling_passes_on_what_is_no_number() -> None:
    x = torch.randn(600, 8, 4, 4)
    x.view(-1)[::7] = float("nan")
    x.requires_grad_()
    with Lean():
        y = functional.max_pool2d(x, 2)
    torch.testing.assert_close(y, functional.max_pool2d(x, 2), rtol=0, atol=0, equal_nan=True)
    slopes = [torch.autograd.grad(each.sum(), x)[0] for each in (y, functional.max_pool2d(x, 2))]
    assert torch.equal(*slopes)


def test_max_pooling_that_is_left_to_torch() -> None:
    x = torch.randn(600, 8, 4, 4, requires_grad=True)
    with Lean():
        y, at = functional.max_pool2d(x, 2, return_indices=True)
        assert type(y.grad_fn).__name__ == "MaxPool2DWithIndicesBackward0" and at.dtype == torch.int64
        assert "_MaxPoolBackward" not in _names(functional.max_pool2d(x[0], 2))  # without samples
        assert "_MaxPoolBackward" not in _names(functional.max_pool2d(x[:2], 2))  # a few numbers only
        assert functional.max_pool2d(x.detach(), 2).grad_fn is None
        v = torch.randn_like(x)
        _, tangent = torch.func.jvp(lambda x: functional.max_pool2d(x, 2), (x.detach(),), (v,))
        assert torch.equal(tangent.flatten(2), v.flatten(2).gather(2, at.flatten(2)))
        functional.max_pool2d(x, 2).relu_()  # into its result one may write
        for wrong in ({"stride": 0}, {"padding": 2}, {"kernel_size": (2, 2, 2)}):
            with pytest.raises(RuntimeError):
                functional.max_pool2d(x, **{"kernel_size": 2, **wrong})


def test_the_matrix_of_a_convolution() -> None:
    window = small_images.Window((5, 4), (2, 3), (2, 1), (1, 0), (1, 1))
    w = torch.randn(3, 2, 2, 3)
    x = torch.randn(7, 2, 5, 4)
    torch.testing.assert_close(
        small_images.convolved(window, x, w), functional.conv2d(x, w, stride=(2, 1), padding=(1, 0)), rtol=1e-13, atol=1e-13
    )
    assert small_images.is_small(window, w)
    assert not small_images.is_small(window, torch.empty(300, 200, 2, 3))
    assert not small_images.is_small(small_images.Window((2, 2), (3, 3), (1, 1), (0, 0), (1, 1)), w)  # it does not fit
    assert small_images.is_small(small_images.Window((1, 1), (3, 3), (1, 1), (1, 1), (1, 1)), torch.empty(512, 512, 3, 3))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_is(number: float) -> None:
    x, w = torch.randn(3, 1, 6), torch.randn(2, 1, 3, requires_grad=True)
    x[1, 0, 0] = number
    with Lean():
        y = functional.conv1d(x, w)
    torch.testing.assert_close(y, functional.conv1d(x, w), equal_nan=True, rtol=0, atol=0)
    assert y[1, :, 1:].isfinite().all()


def test_windows_that_do_not_fit_are_refused_by_torch() -> None:
    with Lean(), pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        functional.conv2d(torch.randn(2, 1, 2, 2), torch.randn(3, 1, 3, 3, requires_grad=True))
    x, w = torch.randn(2, 2, 4), torch.randn(4, 2, 3, requires_grad=True)
    wrong: list[tuple[Tensor, dict[str, Any]]] = [
        (x[:, :1], {}),
        (x, {"stride": 0}),
        (x, {"dilation": 0}),
        (x, {"padding": -1}),
        (x, {"stride": (1, 1)}),
        (x, {"groups": 0}),
        (x, {"groups": 4}),
        (x, {"bias": torch.randn(3)}),
    ]
    for data, options in wrong:
        with pytest.raises((RuntimeError, ValueError)) as plain:
            functional.conv1d(data, w, **options)
        with Lean(), pytest.raises(plain.type, match=re.escape(str(plain.value)[:40])):
            functional.conv1d(data, w, **options)


def test_what_is_not_linear_in_the_weights_alone_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, False)
    x, w = torch.randn(2, 1, 6, requires_grad=True), torch.randn(2, 1, 3, requires_grad=True)

    def name(y: Tensor) -> str:
        return type(y.grad_fn).__name__

    with Lean():
        assert name(functional.conv1d(x.detach(), w)) == "_ConvolutionBackward"
        assert name(functional.conv1d(x, w)) == "ConvolutionBackward0"
        assert name(functional.conv1d(x.detach(), w, padding="same")) == "ConvolutionBackward0"
        assert name(functional.conv1d(x[0].detach(), w)) == "SqueezeBackward1"
        assert name(torch.relu(x)) == "ReluBackward0"  # a few numbers only
        with torch.no_grad():
            assert functional.conv1d(x, w).grad_fn is None
        _, tangent = torch.func.jvp(lambda w: functional.conv1d(x.detach(), w), (w.detach(),), (w.detach(),))
        torch.testing.assert_close(tangent, functional.conv1d(x.detach(), w.detach()))


@pytest.mark.parametrize("matrix", [True, False])
def test_data_that_are_overwritten_are_noticed(matrix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, matrix)
    x, w = torch.randn(2, 1, 6), torch.randn(2, 1, 3, requires_grad=True)
    with Lean():
        y = functional.conv1d(x, w)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), w)


class Convolutions(TorchDispatchMode):
    """Counts convolutions and their derivatives."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "conv" in func._schema.name
        return func(*args, **(kwargs or {}))


def test_a_hessian_product_spends_no_convolution_on_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, False)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))
    x, y = torch.randn(4, 1, 6, 6), torch.randint(3, (4,))
    geo = geoad.GeoModule(net)
    H = geoad.hessian(geo.loss(functional.cross_entropy, (x, y)))(geo.point())
    v = geo.reference.vector(torch.randn(geo.reference.dim), at=H.at)
    H.mv(v)
    with Convolutions() as seen:
        geoad.hessian(geo.loss(functional.cross_entropy, (x, y)))(H.at).mv(v)
    assert seen.count == 4  # forward and gradient, and each once more for the derivative along v

    theta = {name: p.detach() for name, p in net.named_parameters()}
    loss = lambda t: functional.cross_entropy(torch.func.functional_call(net, t, (x,)), y)  # noqa: E731
    plain = torch.func.jvp(torch.func.grad(loss), (theta,), (v.blocks,))[1]
    for name, block in H.mv(v).blocks.items():
        torch.testing.assert_close(block, plain[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(6), lambda: nn.GroupNorm(2, 6), lambda: nn.BatchNorm1d(6), nn.Identity])
def test_both_products_of_one_evaluation(norm: Callable[[], nn.Module]) -> None:
    net = nn.Sequential(nn.Linear(3, 6), norm(), nn.Tanh(), nn.Linear(6, 2)).eval()
    x, theta = torch.randn(5, 3), {name: p.detach() for name, p in net.named_parameters()}
    v = {name: torch.randn_like(p) for name, p in theta.items()}
    geo = geoad.GeoModule(net)

    def f(t: Any) -> Tensor:
        return geo.evaluate(t, x)

    value, velocity, pull = products.push_pull(f, theta, v)
    plain = lambda t: torch.func.functional_call(net, t, (x,))  # noqa: E731
    J = torch.func.jacrev(plain)(theta)
    expected = sum(torch.einsum("nc...,...->nc", J[name].reshape(5, 2, -1), v[name].reshape(-1)) for name in theta)
    torch.testing.assert_close(value, plain(theta))
    torch.testing.assert_close(velocity, expected)
    for name, block in pull(velocity).items():
        torch.testing.assert_close(block, torch.einsum("nc,nc...->...", expected, J[name]))
    # and once more, inside of a derivative
    bend = lambda t: products.push_pull(f, t, v)[1]  # noqa: E731
    second = products.jvp(bend, theta, v)[1]
    curve = lambda s: plain({name: t + s * v[name] for name, t in theta.items()})  # noqa: E731
    numeric = (curve(1e-4) - 2 * curve(0.0) + curve(-1e-4)) / 1e-8
    torch.testing.assert_close(second, numeric, rtol=1e-4, atol=1e-5)
