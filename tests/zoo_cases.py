"""The models of the zoo, with what plain double-precision autograd of the bare network says of them."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor

from geoad.testing import zoo
from geoad.testing.zoo import Model

quiet = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:LSTM with projections")
every_model = pytest.mark.parametrize("name", zoo.NAMES)


@functools.cache
def case(name: str) -> tuple[Model, Tensor, Tensor]:
    """(model, outputs, Jacobian (n, ..., c, d) in the raveled parameters): made once for all tests, which only read them."""
    model = zoo.build(name)
    return model, *plain_jacobian(model, list(model.geo().reference.layout))


def plain_jacobian(model: Model, names: list[str]) -> tuple[Tensor, Tensor]:
    """Outputs and their Jacobian in the raveled parameters, one row of plain ``torch.autograd.grad`` after another."""
    net = copy.deepcopy(model.net)
    parameters = [dict(net.named_parameters())[name] for name in names]
    f = model.outputs(net)
    rows = []
    for output in f.flatten():
        found = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
    return f.detach(), torch.stack(rows).reshape(*f.shape, -1)
