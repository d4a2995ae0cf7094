"""Likelihoods and selections inside of curvature fields: what is wrong is refused, and stored and matrix-free values agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import geoad
from geoad.curvature import GGN, Categorical, Fisher, Gaussian, Likelihood, OutputMatrix
from geoad.errors import GeometryError
from geoad.tensors import Form, Metric

REPRESENTATIONS = ["dense", "low_rank", "block_diagonal", "diagonal", "quasi_diagonal", "kfac", "ekfac"]


def network() -> tuple[geoad.GeoModule, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)).double()
    return geoad.GeoModule(net), torch.randn(7, 4, dtype=torch.float64), torch.randint(3, (7,))


def product(geo: geoad.GeoModule, form: Form) -> Tensor:
    """The row sums of the matrix, by a product."""
    ones = torch.ones(geo.reference.layout.dim, dtype=torch.float64)
    return (form @ geo.reference.vector(geo.reference.layout.unravel(ones), at=geo.point())).ravel()


def negative(f: Tensor, y: Any) -> Tensor:
    return -torch.ones_like(f)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("kind", [Fisher, GGN])
def test_an_indefinite_output_matrix_is_a_form_with_its_signs(kind: Any, representation: str) -> None:
    geo, x, _ = network()
    p, matrix = geo.point(), OutputMatrix(negative, positive=False)
    found = kind(geo, x, matrix, representation=representation)(p)
    opposite = Fisher(geo, x, Gaussian(), representation=representation)(p)
    assert type(found) is Form and type(opposite) is Metric
    torch.testing.assert_close(found.to_dense(), -opposite.to_dense())
    implicit = kind(geo, x, matrix)(p)
    assert type(implicit) is Form
    torch.testing.assert_close(product(geo, implicit), -product(geo, Fisher(geo, x, Gaussian())(p)))


@pytest.mark.parametrize("representation", ["implicit", "kfac", "dense"])
@pytest.mark.parametrize("kind", ["ggn", "empirical", "covariance"])
@pytest.mark.parametrize("length", [5, 14, 1])
def test_targets_of_another_length(kind: str, representation: str, length: int) -> None:
    geo, x, y = network()
    data = [(x, y), (x, y.repeat(2)[:length])]
    options: dict[str, Any] = {"representation": representation}
    field = GGN(geo, data, **options) if kind == "ggn" else Fisher(geo, data, kind=kind, **options)
    with pytest.raises(GeometryError, match="7 samples and targets of shape"):
        field(geo.point()).to_dense() if representation != "implicit" else product(geo, field(geo.point()))


@pytest.mark.parametrize(
    ("likelihood", "targets"),
    [
        ("categorical", torch.zeros(7, dtype=torch.long, device="meta")),
        ("gaussian", torch.zeros(7, 3, device="meta")),
        ("bernoulli", torch.zeros(7, 3, device="meta")),
        ("poisson", torch.zeros(7, 3, device="meta")),
        (F.smooth_l1_loss, torch.zeros(7, 3, device="meta")),
        (OutputMatrix(negative, positive=False), torch.zeros(7, 3, device="meta")),
    ],
    ids=["categorical", "gaussian", "bernoulli", "poisson", "loss", "matrix"],
)
def test_targets_on_another_device(likelihood: Any, targets: Tensor) -> None:
    geo, x, _ = network()
    with pytest.raises(GeometryError, match="outputs are on cpu, the targets on meta"):
        GGN(geo, (x, targets), likelihood, representation="kfac")(geo.point())


CLASS = torch.tensor([False, True, False])
WRONG: dict[str, tuple[Callable[[geoad.GeoModule, Tensor], Any], str]] = {
    "axis": (lambda geo, x: Categorical(axis=1.0), "axis=1.0 is no integer"),  # type: ignore[arg-type]
    "axis bool": (lambda geo, x: Categorical(axis=True), "axis=True is no integer"),
    "axis none": (lambda geo, x: Categorical(axis=None), "axis=None is no integer"),  # type: ignore[arg-type]
    "ignore": (lambda geo, x: Categorical(ignore_index=0.5), "ignore_index=0.5 is no integer"),  # type: ignore[arg-type]
    "samples": (lambda geo, x: Fisher(geo, x, kind="mc", samples=1.5), "no number of labels"),  # type: ignore[arg-type]
    "generator": (lambda geo, x: Fisher(geo, x, kind="mc", generator=3), "takes a torch.Generator"),  # type: ignore[arg-type]
    "memory": (lambda geo, x: Fisher(geo, x, max_memory="1 GB"), "no number of bytes"),  # type: ignore[arg-type]
    "a tuple": (lambda geo, x: Fisher(geo, x, outputs=lambda f: (f, f))(geo.point()).to_dense(), "returned a tuple"),
    "no samples": (lambda geo, x: Fisher(geo, x, outputs=lambda f: f.sum(0))(geo.point()).to_dense(), "every sample by itself"),
    "a mask": (lambda geo, x: Fisher(geo, x, outputs=np.array([True, False, True])), "selects no outputs"),
    "masked by -inf": (
        lambda geo, x: Fisher(geo, x, outputs=lambda f: f.masked_fill(CLASS, -torch.inf))(geo.point()).to_dense(),
        "large negative number",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str) -> None:
    geo, x, _ = network()
    make, message = WRONG[name]
    with pytest.raises(GeometryError, match=message):
        make(geo, x)


@pytest.mark.parametrize(
    "outputs", [np.array([0, 2]), (np.int64(0), np.int64(2)), torch.tensor([0, 2]), range(0, 3, 2)], ids=str
)
def test_indices_of_numpy_and_torch(outputs: Any) -> None:
    geo, x, _ = network()
    values = [Fisher(geo, x, outputs=each, representation="dense")(geo.point()).to_dense() for each in (outputs, [0, 2])]
    assert torch.equal(*values)
    one = [Fisher(geo, x, "gaussian", outputs=i, representation="dense")(geo.point()).to_dense() for i in (np.int64(1), 1)]
    assert torch.equal(*one)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("floor", [-1e30, -1e300])
def test_a_class_of_probability_zero_counts_for_nothing(representation: str, floor: float) -> None:
    geo, x, _ = network()

    def masked(f: Tensor) -> Tensor:
        return f.masked_fill(CLASS, floor)

    fields = [Fisher(geo, x, outputs=each, representation=representation) for each in (masked, [0, 2])]
    a, b = (field(geo.point()).to_dense() for field in fields)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    drawn = Fisher(geo, x, kind="mc", samples=50, outputs=masked, representation=representation)(geo.point()).to_dense()
    assert bool(drawn.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_saturated_outputs_give_numbers(representation: str, dtype: torch.dtype) -> None:
    geo, x, y = network()
    with torch.no_grad():
        geo.get_parameter("2.weight").mul_(1e3)
    geo = geo.to(dtype)
    data = (x.to(dtype), y)
    for field in (
        Fisher(geo, data, representation=representation),
        Fisher(geo, data, kind="empirical", representation=representation),
        Fisher(geo, data, "bernoulli", representation=representation),
        GGN(geo, data, F.cross_entropy, representation=representation),
    ):
        assert bool(field(geo.point()).to_dense().isfinite().all())


class Doubled(Categorical):
    """Another matrix, with the root of the old one."""

    def fisher(self, outputs: Tensor, t: Tensor) -> Tensor:
        return 2 * super().fisher(outputs, t)


class DoubledRightly(Doubled):
    root = Likelihood.root
    seeds = Likelihood.seeds
    matrix = Likelihood.matrix


def test_a_family_that_changes_its_matrix_needs_a_root_of_its_own() -> None:
    geo, x, _ = network()
    with pytest.raises(GeometryError, match="Doubled has a fisher of its own and inherits the root of Categorical"):
        Fisher(geo, x, Doubled(), representation="dense")(geo.point())
    twice = Fisher(geo, x, DoubledRightly(), representation="dense")(geo.point()).to_dense()
    torch.testing.assert_close(twice, 2 * Fisher(geo, x, representation="dense")(geo.point()).to_dense())
    torch.testing.assert_close(product(geo, Fisher(geo, x, Doubled())(geo.point())), twice.sum(1))
