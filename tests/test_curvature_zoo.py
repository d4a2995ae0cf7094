"""Every kind of model: all representations against the Jacobian of the bare network by plain double-precision autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from zoo_cases import case, every_model, quiet

import geoad
from geoad.curvature import EKFAC, KFAC, BlockDiagonal, Fisher
from geoad.curvature.representations import layers_of

pytestmark = quiet


def plain_fisher(name: str) -> Tensor:
    model, f, j = case(name)
    if model.likelihood == "categorical":
        p = f.softmax(-1)
        j = (torch.diag_embed(p) - p[..., None] * p[..., None, :]).matmul(j), j
    else:
        j = j, j
    d = j[0].shape[-1]
    return j[1].reshape(-1, d).T @ j[0].reshape(-1, d) / len(f)


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * max(1.0, float(b.abs().max())))


@every_model
def test_every_representation(name: str) -> None:
    model = case(name)[0]
    geo = model.geo()
    layout, p = geo.reference.layout, geo.point()
    wanted = plain_fisher(name)
    offsets = layout.offsets()

    def value(representation: object) -> Tensor:
        return Fisher(geo, model.data, model.likelihood, representation=representation)(p).to_dense()

    near(value("dense"), wanted)
    near(value("low_rank"), wanted)
    near(value("diagonal"), wanted.diagonal().diag())
    masked, alone = torch.zeros_like(wanted), torch.zeros_like(wanted)
    for names in layers_of(layout).values():
        place = torch.cat([torch.arange(layout.dim)[offsets[each]] for each in names])
        masked[place[:, None], place] = wanted[place[:, None], place]
    for place in offsets.values():
        alone[place, place] = wanted[place, place]
    near(value("block_diagonal"), masked)
    near(value(BlockDiagonal("parameter")), alone)
    near(value("quasi_diagonal").diagonal(), wanted.diagonal())
    quasi = value("quasi_diagonal")
    kept = quasi != 0
    near(quasi[kept], wanted[kept])
    for representation in (EKFAC(), EKFAC("reduce", "separate")):
        near(value(representation).trace(), wanted.trace())
        errors = [
            float((value(r) - masked).norm()) for r in (representation, KFAC(representation.sharing, representation.bias))
        ]
        if representation.bias == "separate":
            continue  # what couples bias and weight is left out
        assert errors[0] <= errors[1] * (1 + 1e-9) + 1e-9 * float(masked.norm())
    assert set(Fisher(geo, model.data, model.likelihood).coverage()) == set(layout)


@every_model
def test_gradients_of_single_samples(name: str) -> None:
    """Their mean is the gradient, each is the gradient of the loss on one sample."""
    model = case(name)[0]
    geo = model.geo()
    p = geo.point()
    loss = model.field(geo)
    rows = geoad.per_sample_grads(loss)(p).ravel()
    near(rows.mean(0), geoad.grad(loss)(p).ravel())
    second = Fisher(geo, model.data, model.likelihood, kind="empirical", representation="dense")(p).to_dense()
    if model.likelihood == "categorical" and rows.shape[0] == len(model.targets.flatten()):
        near(second, rows.T @ rows / len(rows))
