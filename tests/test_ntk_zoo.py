"""Every kind of model: tangent kernels against Jacobians of the bare network by plain double-precision autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import geoad
from geoad.data import take
from geoad.testing import zoo
from geoad.testing.zoo import Model

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:LSTM with projections")
every_model = pytest.mark.parametrize("name", zoo.NAMES)


def plain_jacobian(model: Model, names: list[str]) -> Tensor:
    """The Jacobian (n, ..., c, d) in the raveled parameters, one row of plain ``torch.autograd.grad`` after another."""
    net = copy.deepcopy(model.net)
    parameters = [dict(net.named_parameters())[name] for name in names]
    f = model.outputs(net)
    rows = []
    for output in f.flatten():
        found = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
    return torch.stack(rows).reshape(*f.shape, -1)


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * max(1.0, float(b.abs().max())))


@every_model
def test_kernels_of_every_model(name: str) -> None:
    """The kernel, the one between two data sets, both contractions, and the one with a metric."""
    model = zoo.build(name)
    geo = model.geo()
    p, theta = geo.point(), geo.reference
    j = plain_jacobian(model, list(theta.layout))
    flat = j.reshape(-1, j.shape[-1])
    kernel = flat @ flat.T
    data = model.data
    value = geoad.ntk(geo, data)(p)
    assert value.components.shape == (*j.shape[:-1], *j.shape[:-1])
    near(value.to_dense(), kernel)
    fewer = take(data[0] if isinstance(data, tuple) else data, slice(0, 2))
    first = flat[: 2 * j[0, ..., 0].numel()]
    near(geoad.ntk(geo, (fewer, None) if isinstance(data, tuple) else fewer, data)(p).to_dense(), first @ flat.T)

    by_class = j if j.ndim > 2 else j.unsqueeze(1)
    each = by_class.movedim(-2, 0).reshape(by_class.shape[-2], -1, j.shape[-1])
    wanted = each @ each.mT
    near(geoad.ntk(geo, data, contract="trace")(p).to_dense(), wanted.sum(0))
    near(geoad.ntk(geo, data, contract="diagonal")(p).to_dense(), wanted)

    damped = geoad.curvature.Fisher(geo, data, model.likelihood, representation="kfac") + 0.3 * geoad.metrics.Euclidean(theta)
    inverse = torch.linalg.inv(damped(p).to_dense())
    near(geoad.ntk(geo, data, metric=damped)(p).to_dense(), flat @ inverse @ flat.T)
    assert set(geoad.ntk(geo, data).coverage()) == set(theta.layout)
