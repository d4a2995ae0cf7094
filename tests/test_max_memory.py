"""``max_memory=``: how much is taken together, that no more is held at a time, and that the results do not depend on it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import geoad
from geoad.curvature import GGN, Categorical, Fisher, network
from geoad.curvature.likelihoods import Loss, categorical
from geoad.curvature.sweep import Plans, sweep
from geoad.errors import GeometryError
from geoad.kernels.graph import nodes, numbers_held
from geoad.kernels.memory import even, fitting

SIZES = st.integers(0, 1 << 40)


@given(SIZES, SIZES, SIZES, st.integers(1, 2000))
def test_as_many_as_fit(bound: int, each: int, fixed: int, most: int) -> None:
    count = fitting(bound, each, fixed, most)
    assert 1 <= count <= most
    assert count == 1 or fixed + count * each <= bound
    assert count == most or fixed + (count + 1) * max(1, each) > bound


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_portions_are_few_and_even(count: int, most: int) -> None:
    size = even(count, most)
    assert 1 <= size <= most
    portions = -(-count // size)
    assert portions == -(-count // most)
    assert size == 1 or -(-count // (size - 1)) > portions


class Sequences(nn.Module):
    """Five classes at each of four positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 3, dtype=torch.double), nn.Linear(3, 5, dtype=torch.double)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens)))


def sequences() -> tuple[geoad.GeoModule, Tensor]:
    torch.manual_seed(0)
    return geoad.GeoModule(Sequences()), torch.randint(6, (7, 4))


# -- the same numbers ----------------------------------------------------------------------------------------------------------


def test_jacobians_in_portions_of_outputs() -> None:
    geo, x = sequences()
    p = geo.point()

    def outputs(theta: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(geo.wrapped, theta, (x,))

    blocks = torch.func.jacrev(outputs)({name: each.detach() for name, each in p.blocks.items()})
    expected = torch.cat([each.reshape(7 * 4 * 5, -1) for each in blocks.values()], -1)
    for max_memory in (1, 1 << 14, 1 << 28):
        found = geoad.FunctionSpace(geo, [x[:3], x[3:]], max_memory=max_memory).jacobian(p).to_dense()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("shape", "axis"), [((3, 7), -1), ((2, 4, 5), -1), ((2, 5, 3, 4), 1)])
@pytest.mark.parametrize("labelled", [False, True])
def test_columns_that_are_made_when_asked_for(
    shape: tuple[int, ...], axis: int, labelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    f = 3 * torch.randn(shape, dtype=torch.double)
    f.view(-1)[0] = -torch.inf  # a class of probability zero
    y = f.argmax(axis)
    y.view(-1)[-1] = -100
    likelihood = Categorical(axis=axis, ignore_index=-100)
    whole = likelihood.seeds(f, y if labelled else None).scaled(2.0)
    monkeypatch.setattr(categorical, "_MANY", 0)
    made = likelihood.seeds(f, y if labelled else None).scaled(2.0)
    assert not isinstance(made.columns, Tensor)
    assert len(made) == len(whole)
    for which in (slice(None), slice(2, 5), slice(1, 2)):
        torch.testing.assert_close(made.part(which)[0], whole.part(which)[0], rtol=1e-14, atol=0)


@pytest.mark.parametrize("representation", ["dense", "diagonal", "kfac", "ekfac"])
def test_many_classes(representation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    geo, x = sequences()
    p = geo.point()
    expected = Fisher(geo, x, representation=representation)(p).to_dense()
    monkeypatch.setattr(categorical, "_MANY", 0)
    for max_memory in (1 << 14, 1 << 28):
        found = Fisher(geo, x, representation=representation, max_memory=max_memory)(p).to_dense()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("labels", [1, 3])
def test_labels_are_the_same_ones(labels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    geo, x = sequences()
    p = geo.point()
    monkeypatch.setattr(network, "_portion", lambda shape: 3)

    def value(representation: str, max_memory: int) -> Tensor:
        source = torch.Generator().manual_seed(1)
        options: dict[str, Any] = {"kind": "mc", "samples": labels, "generator": source, "max_memory": max_memory}
        return geoad.operators.to_dense(Fisher(geo, x, representation=representation, **options)(p).operator)

    expected = value("dense", 1 << 28)
    for representation, max_memory in (("dense", 1), ("implicit", 1), ("low_rank", 1 << 12), ("implicit", 1 << 28)):
        torch.testing.assert_close(value(representation, max_memory), expected, rtol=0, atol=1e-13)


# -- no more at a time ---------------------------------------------------------------------------------------------------------


def test_a_chunk_is_gone_before_the_next_one_is_made() -> None:
    geo, x = sequences()
    theta = {name: each.detach() for name, each in geo.point().blocks.items()}
    alive: list[Any] = []

    class Watching:
        def add(self, rows: Any, signs: Any) -> None:
            assert not any(ref() is not None for ref in alive)
            alive.append(weakref.ref(rows))

        def numbers_of_a_sample(self, rows: Any) -> int:
            return 0

        def squared(self, plan: Any) -> frozenset[int]:
            return frozenset()

    field = Fisher(geo, x)
    sweep(Plans(field.outputs, theta), field.swept(theta), field.weighted_seeds, [Watching()], max_memory=1)
    assert len(alive) == 7 * 4 * 4


def test_what_a_graph_holds() -> None:
    a = torch.ones(3, 3, requires_grad=True)
    assert numbers_held(nodes([a.exp()])) == (9, 18)
    assert numbers_held(nodes([torch.linalg.matrix_exp(a)])) == (9, 40 * 9)
    assert numbers_held(nodes([a.exp() + a.exp().sum()])) == (18, 18)
    b = a.exp()
    c = b.sin()
    b.mul_(2)  # what both have kept is gone
    assert numbers_held(nodes([c])) == (0, 0)


def test_decisions_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    geo, x = sequences()
    p = geo.point()
    with caplog.at_level(logging.INFO, "geoad"):
        Fisher(geo, x, representation="diagonal")(p)
    assert "1024 samples at a time" in caplog.text
    assert "taken one by one" not in caplog.text
    for call in (
        lambda: Fisher(geo, x, representation="diagonal", max_memory=1)(p),
        lambda: geoad.ntk(geo, x, max_memory=1)(p),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, "geoad"):
            call()
        assert "1 samples at a time" in caplog.text
        assert "taken one by one" in caplog.text


def test_roots_that_fit_nowhere() -> None:
    f, y = torch.zeros(1, 1000, 1000), torch.zeros(1, 1000, dtype=torch.long)
    loss = Loss(lambda f, y: F.cross_entropy(f.flatten(0, 1), y.flatten(), reduction="none"))
    with pytest.raises(GeometryError, match=r"1000000 outputs of 1 samples.*implicit"):
        loss.seeds(f, y)
    geo, x = sequences()
    GGN(geo, (x, x % 5), loss, representation="diagonal")(geo.point())


# -- resident memory -----------------------------------------------------------------------------------------------------------

_BOUND, _SLACK = 32, 14
"""MB: ``max_memory=``, and what threads, kernels and the allocator keep."""

_SCRIPT = """
import ctypes, gc, json, sys
from pathlib import Path
import torch, geoad
from torch import nn
from geoad.curvature import Fisher

torch.set_num_threads(1)
ctypes.CDLL(None).mallopt(-3, 1 << 16)  # what is freed goes back to the system, so that resident memory is what is held
bound = int(sys.argv[1]) << 20

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

def added(call, x):
    call(x[:1])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    start = resident("VmRSS")
    result = call(x)
    return resident("VmHWM") - start - (result.nbytes / 2**20 if isinstance(result, torch.Tensor) else 0)

class Positions(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.table, self.head = nn.Embedding(50, width), nn.Linear(width, classes)

    def forward(self, tokens):
        return self.head(torch.tanh(self.table(tokens)))

orthogonal = nn.utils.parametrizations.orthogonal
nets = {
    "outputs": (nn.Sequential(nn.Linear(20, 512), nn.ReLU(), nn.Linear(512, 50)), torch.randn(600, 20)),
    "turned": (nn.Sequential(orthogonal(nn.Linear(40, 40)), nn.Linear(40, 5)), torch.randn(100, 40)),
    "tokens": (Positions(8, 300), torch.randint(50, (1, 8))),
    "classes": (Positions(16, 1000), torch.randint(50, (512, 16))),
}
def fisher(geo, **options):
    return lambda x: Fisher(geo, x, max_memory=bound, **options)(geo.point())

found = {}
for name, (net, x) in nets.items():
    geo = geoad.GeoModule(net)
    calls = {
        "outputs": {"ekfac": fisher(geo, representation="ekfac")},
        "turned": {"diagonal": fisher(geo, representation="diagonal")},
        "tokens": {"jacobian": lambda x: geoad.FunctionSpace(geo, x, max_memory=bound).jacobian(geo.point()).to_dense()},
        "classes": {"drawn": fisher(geo, representation="diagonal", kind="mc")},
    }[name]
    for what, call in calls.items():
        found[name + " " + what] = added(call, x)
print(json.dumps(found))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="resident memory is read off /proc")
def test_resident_memory() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(geoad.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(_BOUND)], check=True, capture_output=True, text=True, timeout=240, env=environment
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    over = {name: size for name, size in found.items() if size > 1.3 * _BOUND + _SLACK}
    assert not over, found
