"""Every kind of model: tangent kernels against Jacobians of the bare network by plain double-precision autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from zoo_cases import case, every_model, quiet

import geoad
from geoad.data import take

pytestmark = quiet


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * max(1.0, float(b.abs().max())))


@every_model
def test_kernels_of_every_model(name: str) -> None:
    """The kernel, the one between two data sets, both contractions, and the one with a metric."""
    model, _, j = case(name)
    geo = model.geo()
    p, theta = geo.point(), geo.reference
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
