"""Cross-entropies with class weights, smoothing and ignored labels: their Gauss-Newton matrices against torch's Hessians."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import geoad
from geoad import GeometryError
from geoad.curvature import GGN

N, C, P = 7, 4, 3
WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.25], dtype=torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"weight": WEIGHT},
    "float32 weights": {"weight": WEIGHT.float()},
    "smoothed": {"label_smoothing": 0.2},
    "ignored": {"ignore_index": 1},
    "all": {"weight": WEIGHT, "label_smoothing": 0.3, "ignore_index": 3},
    "sum": {"weight": WEIGHT, "reduction": "sum", "ignore_index": 0},
    "smoothed sum": {"label_smoothing": 0.1, "reduction": "sum"},
}


class Positions(nn.Module):
    """Logits (n, classes, positions)."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).movedim(-1, 1)


def data(positions: bool, soft: bool) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    shape = (N, P) if positions else (N,)
    y = torch.randn(N, C, *shape[1:]).softmax(1) if soft else torch.randint(C, shape)
    return torch.randn(*shape, 2), y


def hessian(net: nn.Module, x: Tensor, y: Tensor, options: dict[str, Any]) -> Tensor:
    """That of torch, of a network that is linear, so that it is the Gauss-Newton matrix."""
    theta = {name: p.detach() for name, p in net.named_parameters()}
    given = {**options, "weight": options["weight"].double()} if "weight" in options else options
    blocks = torch.func.hessian(lambda t: F.cross_entropy(torch.func.functional_call(net, t, (x,)), y, **given))(theta)
    return torch.cat([torch.cat([blocks[a][b].reshape(theta[a].numel(), -1) for b in theta], 1) for a in theta])


def linear(positions: bool) -> nn.Module:
    torch.manual_seed(1)
    return Positions() if positions else nn.Linear(2, C)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("positions", [False, True], ids=["samples", "positions"])
@pytest.mark.parametrize("case", OPTIONS)
def test_the_matrix_is_the_hessian_of_torch(case: str, positions: bool, soft: bool) -> None:
    options, net = OPTIONS[case], linear(positions)
    if soft and "ignore_index" in options:
        options = {key: value for key, value in options.items() if key != "ignore_index"}
    x, y = data(positions, soft)
    geo = geoad.GeoModule(net)
    expected = hessian(net, x, y, options) / (N if options.get("reduction") == "sum" else 1)
    v = torch.randn(geo.reference.dim)
    for loss in (partial(F.cross_entropy, **options), nn.CrossEntropyLoss(**options)):
        dense = GGN(geo, (x, y), loss, representation="dense")(geo.point()).to_dense()
        torch.testing.assert_close(dense, expected, rtol=1e-12, atol=1e-14)
        for memory in (1, 1 << 28):
            field = GGN(geo, (x, y), loss, representation="diagonal", max_memory=memory)
            diagonal = field(geo.point()).to_dense().diagonal()
            torch.testing.assert_close(diagonal, expected.diagonal(), rtol=1e-12, atol=1e-14)
        implicit = GGN(geo, (x, y), loss)(geo.point())
        product = implicit @ geo.reference.vector(v, at=geo.point())
        torch.testing.assert_close(product.ravel(), expected @ v, rtol=1e-12, atol=1e-14)


def test_each_batch_has_its_own_mean() -> None:
    net, (x, y) = linear(False), data(False, False)
    geo = geoad.GeoModule(net)
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    loss = partial(F.cross_entropy, weight=WEIGHT, ignore_index=1)
    found = GGN(geo, batches, loss, representation="dense")(geo.point()).to_dense()
    of_loss = geoad.hessian(geo.loss(loss, batches))(geo.point()).to_dense()
    torch.testing.assert_close(found, of_loss, rtol=1e-12, atol=1e-14)
    parts = [hessian(net, *batch, {"weight": WEIGHT, "ignore_index": 1}) for batch in batches]
    torch.testing.assert_close(found, (2 * parts[0] + 5 * parts[1]) / 7, rtol=1e-12, atol=1e-14)


def test_a_batch_without_labels_that_count() -> None:
    net, (x, y) = linear(False), data(False, False)
    geo = geoad.GeoModule(net)
    none = (x[:2], torch.full((2,), -100))
    found = GGN(geo, [none, (x, y)], F.cross_entropy, representation="dense")(geo.point()).to_dense()
    torch.testing.assert_close(found, hessian(net, x, y, {}) * (N / (N + 2)), rtol=1e-12, atol=1e-14)


def test_log_probabilities() -> None:
    net = nn.Sequential(nn.Linear(2, C), nn.LogSoftmax(1))
    x, y = data(False, False)
    geo, plain = geoad.GeoModule(net), linear(False)
    plain.load_state_dict({"weight": net[0].weight, "bias": net[0].bias})
    found = GGN(geo, (x, y), nn.NLLLoss(WEIGHT), representation="dense")(geo.point()).to_dense()
    torch.testing.assert_close(found, hessian(plain, x, y, {"weight": WEIGHT}), rtol=1e-12, atol=1e-14)


def test_what_is_refused() -> None:
    geo, (x, y) = geoad.GeoModule(linear(False)), data(False, False)
    with pytest.raises(GeometryError, match="class weights must not be negative"):
        GGN(geo, (x, y), nn.CrossEntropyLoss(-WEIGHT))
    with pytest.raises(GeometryError, match="weighs its samples by their labels, and the data have none"):
        GGN(geo, (x, None), nn.CrossEntropyLoss(WEIGHT), representation="dense")(geo.point())
    with pytest.raises(GeometryError, match="labels must lie between 0 and 3"):
        GGN(geo, (x, y + 2), nn.CrossEntropyLoss(WEIGHT), representation="dense")(geo.point())
    for size in (3, 5):
        with pytest.raises(GeometryError, match="one weight for each class"):
            GGN(geo, (x, y), nn.CrossEntropyLoss(torch.ones(size)), representation="dense")(geo.point())
    for wrong in (x[:, 0], y.bool(), torch.rand(N, 3), y[None], torch.tensor(1), y.to(torch.complex64)):
        for loss in (F.cross_entropy, nn.CrossEntropyLoss(WEIGHT)):
            with pytest.raises(GeometryError):
                GGN(geo, (x, wrong), loss, representation="dense")(geo.point())
    assert GGN(geo, (x, None), F.cross_entropy, representation="dense")(geo.point()).to_dense().isfinite().all()
