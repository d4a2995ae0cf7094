"""Losses over data in all its forms: the same number as over the full batch, and clear refusals."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import geoad
from geoad.data import Batches, batch_size, split_batch, take, without_targets
from geoad.errors import GeometryError

N = 11
X = torch.linspace(-1, 1, 4 * N, dtype=torch.float64).reshape(N, 4).sin()
Y = torch.arange(N) % 3


@pytest.fixture
def geo() -> geoad.GeoModule:
    torch.manual_seed(0)
    module = geoad.GeoModule(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    return module.to(module.reference.reparametrize(geoad.maps.Asinh(), name="psi"))


class Again:
    """An iterable that can be started again."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(X.split(4), Y.split(4), strict=True)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


FORMS: dict[str, Any] = {
    "tuple": (X, Y),
    "list of two": [X, Y],
    "list of tuples": list(zip(X.split(4), Y.split(4), strict=True)),
    "tuple of tuples": ((X[:4], Y[:4]), (X[4:], Y[4:])),
    "list of lists": [[X[:4], Y[:4]], [X[4:], Y[4:]]],
    "loader": DataLoader(TensorDataset(X, Y), batch_size=4),
    "shuffled": DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True),
    "stream": DataLoader(Stream(), batch_size=4),
    "own iterable": Again(),
    "with empty batches": [(X[:4], Y[:4]), (X[:0], Y[:0]), (X[4:], Y[4:])],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["function", "module", "module sum", "own", "partial"])
def test_every_form_gives_the_full_batch(geo: geoad.GeoModule, form: str, reduction: str, loss: str) -> None:
    fn: Any = {
        "function": F.cross_entropy,
        "module": nn.CrossEntropyLoss(),
        "module sum": nn.CrossEntropyLoss(reduction="sum"),
        "own": lambda out, y: F.cross_entropy(out, y),
        "partial": partial(F.cross_entropy, label_smoothing=0.0),
    }[loss]
    L = geo.loss(fn, FORMS[form], reduction=reduction)
    out = geo(X)
    torch.testing.assert_close(L(geo.point()), F.cross_entropy(out, Y, reduction=reduction), rtol=1e-14, atol=1e-14)
    F.cross_entropy(out, Y, reduction=reduction).backward()
    slope = geoad.grad(L)(geo.point())
    torch.testing.assert_close(slope.ravel(), geo.grad.ravel(), rtol=1e-12, atol=1e-14)
    value, again = geoad.value_and_grad(L)(geo.point())
    torch.testing.assert_close(value, L(geo.point()))
    torch.testing.assert_close(again.ravel(), slope.ravel(), rtol=1e-12, atol=1e-14)


def test_regression_and_no_targets(geo: geoad.GeoModule) -> None:
    target = X[:, :3]
    p = geo.point()
    for loss in (F.mse_loss, nn.MSELoss(), F.l1_loss, nn.HuberLoss()):
        L = geo.loss(loss, list(zip(X.split(4), target.split(4), strict=True)))
        torch.testing.assert_close(L(p), loss(geo(X), target), rtol=1e-13, atol=1e-14)
    for data in (X, (X, None), [X[:6], X[6:]], DataLoader(TensorDataset(X), batch_size=4)):
        L = geo.loss(lambda out: out.square().mean(), data)
        torch.testing.assert_close(L(p), geo(X).square().mean(), rtol=1e-13, atol=1e-14)
    kl = geo.loss(nn.KLDivLoss(reduction="batchmean"), [(X[:4], target[:4].abs()), (X[4:], target[4:].abs())])
    torch.testing.assert_close(kl(p), F.kl_div(geo(X), target.abs(), reduction="batchmean"), rtol=1e-13, atol=1e-14)


def test_class_weights_need_a_sum(geo: geoad.GeoModule) -> None:
    weight = torch.tensor([1.0, 2.0, 5.0])
    L = geo.loss(partial(F.cross_entropy, weight=weight), FORMS["loader"], reduction="sum")
    torch.testing.assert_close(L(geo.point()), F.cross_entropy(geo(X), Y, weight=weight, reduction="sum"))


@pytest.mark.parametrize("wrapper", [dict, UserDict])
def test_mappings(wrapper: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 3)

        def forward(self, x: Tensor, mask: Tensor, flag: str = "") -> Tensor:
            assert flag == "on"
            return self.body(x * mask)

    geo = geoad.GeoModule(Model())
    mask = (X > 0).double()
    parts = [wrapper({"x": X[i], "mask": mask[i], "flag": "on", "labels": Y[i]}) for i in (slice(0, 4), slice(4, N))]
    wanted = F.cross_entropy(geo.wrapped.body(X * mask), Y)
    torch.testing.assert_close(geo.loss(F.cross_entropy, parts)(geo.point()), wanted)
    whole = wrapper({"flag": "on", "x": X, "mask": mask, "y": Y})
    torch.testing.assert_close(geo.loss(F.cross_entropy, whole)(geo.point()), wanted)


def test_several_inputs() -> None:
    geo = geoad.GeoModule(nn.Bilinear(4, 4, 3))
    wanted = F.cross_entropy(geo(X, X.cos()), Y)
    torch.testing.assert_close(geo.loss(F.cross_entropy, ((X, X.cos()), Y))(geo.point()), wanted)
    torch.testing.assert_close(geo.loss(F.cross_entropy, [[[X, X.cos()], Y]])(geo.point()), wanted)


class Single(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return X[index], Y[index]


def test_refusals(geo: geoad.GeoModule) -> None:
    p = geo.point()

    def refused(words: str, data: Any = (X, Y), loss: Any = F.cross_entropy, **options: Any) -> None:
        with pytest.raises(GeometryError, match=words):
            geo.loss(loss, data, **options)(p)

    refused("one-shot", iter([(X, Y)]))
    refused("one-shot", (batch for batch in [(X, Y)]))
    refused("empty", [])
    refused("empty", [(X[:0], Y[:0])])
    refused("empty", DataLoader(TensorDataset(X[:0], Y[:0])))
    refused("empty", [(X[:0], Y[:0])], reduction="sum")
    refused("single samples.*DataLoader", Single())
    refused("found int", 3)
    refused("found str", ["one", "two"])
    refused(r"of length 3.*\(\(x1, x2\), y\)", [(X, X, Y)])
    refused("sample axis", torch.tensor(1.0))
    refused("0-dimensional tensor, found a tensor of shape", loss=lambda out, y: out)
    refused("0-dimensional tensor, found float", loss=lambda out, y: 1.0)
    refused("reduction='none'", loss=nn.CrossEntropyLoss(reduction="none"))
    refused("reduction='median'", reduction="median")
    refused("function of", loss="cross_entropy")


def test_data_that_change_between_passes_are_noticed(geo: geoad.GeoModule) -> None:
    left = [(X[:4], Y[:4]), (X[4:], Y[4:])]

    class Exhausted:
        def __iter__(self) -> Iterator[Any]:
            while left:
                yield left.pop()

    with pytest.raises(GeometryError, match="empty"):
        geo.loss(F.cross_entropy, Exhausted())(geo.point())
    growing = [(X[:4], Y[:4])]
    L = geo.loss(F.cross_entropy, growing)
    L(geo.point())
    growing.append((X[4:], Y[4:]))
    with pytest.raises(GeometryError, match="11 samples in this pass and 4"):
        L(geo.point())


def test_mismatch_of_dtype_or_device(geo: geoad.GeoModule) -> None:
    p = geo.point()
    with pytest.raises(
        GeometryError, match=r"inputs are torch\.float32, the parameters torch\.float64.*x\.to\(torch\.float64\)"
    ):
        geo.loss(F.cross_entropy, (X.float(), Y))(p)
    with pytest.raises(GeometryError, match=r"inputs are on meta, the parameters on cpu"):
        geo.loss(F.cross_entropy, (X.to("meta"), Y))(p)
    with pytest.raises(GeometryError, match=r"inputs are torch\.float32"):
        geoad.grad(geo.loss(F.cross_entropy, (X.float(), Y)))(p)
    with pytest.raises(GeometryError, match=r"targets are on meta, the outputs on cpu"):
        geo.loss(F.cross_entropy, (X, Y.to("meta")))(p)
    with pytest.raises(GeometryError, match=r"inputs float64 of shape \(11, 2\): in module '0'.*shapes cannot be multiplied"):
        geo.loss(F.cross_entropy, (X[:, :2], Y))(p)


def test_nan_is_a_value(geo: geoad.GeoModule) -> None:
    x = X.clone()
    x[0, 0] = float("nan")
    assert geo.loss(F.cross_entropy, (x, Y))(geo.point()).isnan()


def test_batches_by_themselves() -> None:
    batches = Batches([(X[:4], Y[:4]), (X[4:], Y[4:])])
    assert batches.total == N
    assert [size for size, _, _ in batches.sized()] == [4, 7]
    assert len(list(Batches([X[:5], X[5:10]]))) == 2  # two batches of inputs
    assert batch_size({"flag": "on", "k": torch.tensor(3), "x": X}) == N
    assert split_batch({"x": X})[1] == {"x": X}
    assert without_targets({"x": X, "label": Y, "y": Y}).keys() == {"x", "y"}
    assert torch.equal(take({"x": (X, 1)}, slice(2, 4))["x"][0], X[2:4])
    with pytest.raises(GeometryError, match="without such a tensor"):
        batch_size({"a": "b"})
