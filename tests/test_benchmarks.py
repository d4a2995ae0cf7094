"""The benchmarks compute what they say, on small networks; nothing is timed here."""

from __future__ import annotations

import dataclasses
import math
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import candidates
import harness
import plain
import run
import workloads
from run import Outcome, Timing

pytest.importorskip("sklearn")
TOLERANCE = {"f2": 1e-6}
"""Eigenvalues are iterated until they change less; all else is exact up to rounding in float64."""

OTHER = [
    (row, name)
    for row, found in candidates.CANDIDATES.items()
    for name in found
    if candidates.library(name) not in ("geoad", "torch")
]
KNOWN = {
    ("c1", "backpack: KFLR, bias apart"): "another factor for convolutions",
    ("f2", "pyhessian: power iteration"): "the eigenvalue of largest magnitude",
    ("f2", "hessian-eigenthings: lanczos"): "stops early",
    ("f", "nngeometry"): "has no products with a Hessian up to 0.4",
    ("f50", "nngeometry"): "has no products with a Hessian up to 0.4",
    ("g", "nngeometry: loop over probes"): "has no products with a Hessian up to 0.4",
}


def small(name: str, samples: int = 6, **changes: Any) -> workloads.Work:
    """The workload of a row, on a network of its kind with few parameters, with at most 3 products."""
    row = workloads.ROWS[name]
    row = dataclasses.replace(row, repeat=min(row.repeat, 3), steps=3, **changes)
    return workloads.Work(row, samples=samples, scale=1 / 8 if name[0] != "e" else 1 / 32)


def result(w: workloads.Work, name: str) -> Any:
    torch.manual_seed(0)
    return candidates.CANDIDATES[w.row.name][name](w, w.copy())


def reference(w: workloads.Work) -> Any:
    """As for the tables, but a random estimate is compared with that for the same probes."""
    torch.manual_seed(0)
    return plain.REFERENCE[w.row.name](w, w.copy())


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (row, name)
        for row, found in candidates.CANDIDATES.items()
        for name in found
        if candidates.library(name) in ("geoad", "torch")
    ],
)
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch.func.linearize, of its own doing
def test_geoad_and_torch_agree_in_float64(row: str, name: str) -> None:
    w = small(row).double()
    assert run.relative_error(result(w, name), reference(w)) <= TOLERANCE.get(row, 1e-11)


@pytest.mark.parametrize(("row", "name"), OTHER)
@pytest.mark.filterwarnings("ignore")
def test_other_libraries_agree_in_float32(row: str, name: str) -> None:
    if not candidates.version(candidates.library(name)):
        pytest.skip(f"{candidates.library(name)} is not installed")
    if (row, name) in KNOWN:
        pytest.skip(KNOWN[row, name])
    w = small(row)
    torch.set_default_dtype(torch.float32)
    found = result(w, name)
    if row == "g":  # the mean of 50 draws
        draws = plain.quadratic_forms(w.double(), w.double().net, w.double().probes(1000))
        assert abs(found - draws.mean()) <= 4 * draws.std() * (1 / 50 + 1 / 1000) ** 0.5
    else:
        assert run.relative_error(found, plain.reference(w)) <= w.row.tolerance


def test_every_row_has_geoad_torch_and_a_rival() -> None:
    for row, found in candidates.CANDIDATES.items():
        libraries = {candidates.library(name) for name in found}
        assert {"geoad", "torch"} < libraries <= set(candidates.LIBRARIES), row
    assert {name for found in candidates.CANDIDATES.values() for name in found} >= candidates.UNRANKED


# -- plain PyTorch, which everything is compared with --------------------------------------------------------------------------


def test_plain_fisher_matrices_are_of_one_kind() -> None:
    w = small("d").double()
    net = w.copy()
    full = plain.dense(w, net)
    torch.testing.assert_close(plain.diagonal(w, net), full.diagonal())
    torch.testing.assert_close(plain.fisher_products(w, net), full @ w.flat)
    for block, s in zip(plain.block_diagonal(w, net), w.layers, strict=True):
        torch.testing.assert_close(block, full[s, s])


def test_plain_dense_fisher_is_the_hessian_of_the_loss_of_a_linear_model() -> None:
    w = small("a", net=workloads.mlp(64, 10)).double()
    weights, bias = w.net[0].weight.detach(), w.net[0].bias.detach()

    def loss(flat: Tensor) -> Tensor:
        a, b = flat.split([640, 10])
        return torch.nn.functional.cross_entropy(w.x @ a.view(10, 64).T + b, w.y)

    hessian = torch.func.hessian(loss)(torch.cat([weights.flatten(), bias]))
    torch.testing.assert_close(plain.dense(w, w.copy()), hessian)


@pytest.mark.parametrize("of", ["kfac", "ekfac"])
def test_plain_kfac_is_exact_for_one_sample(of: str) -> None:
    w = small("c1", samples=1, net=workloads.mlp(64, 16, 10), image=False).double()
    blocks = plain.block_diagonal(w, w.copy())
    true = torch.cat([block @ w.flat[s] for block, s in zip(blocks, w.layers, strict=True)])
    found = getattr(plain, of)(w, w.copy())
    torch.testing.assert_close(found["joint" if of == "kfac" else "product"], true)
    if of == "ekfac":
        torch.testing.assert_close(found["trace"], sum(block.trace() for block in blocks))


def test_plain_derivatives_of_the_loss() -> None:
    w = small("f").double()
    net = w.copy()
    torch.nn.functional.cross_entropy(net(w.x), w.y).backward()
    gradient = torch.cat([p.grad.flatten() for p in net.parameters()])  # pyright: ignore
    torch.testing.assert_close(plain.per_sample(w, w.copy()).mean(0), gradient)
    hessian = torch.func.hessian(lambda flat: plain.loss(w, w.net)(w.blocks(flat)))(plain.ravel(plain.parameters(w.net)))
    torch.testing.assert_close(plain.hessian_products(w, w.copy()), hessian @ w.flat)
    torch.testing.assert_close(plain.top_eigenvalue(w, w.copy()), torch.linalg.eigvalsh(hessian)[-1], rtol=1e-7, atol=0)
    torch.manual_seed(0)
    probes = w.probes()
    torch.manual_seed(0)
    torch.testing.assert_close(plain.hutchinson(w, w.copy()), ((probes @ hessian) * probes).sum(1).mean())


def test_products_in_turn_are_powers_of_the_matrix() -> None:
    w = small("f50").double()
    matrix = torch.randn(w.dim, w.dim)
    v = matrix @ matrix @ matrix @ w.flat
    found = w.products(lambda v: matrix @ v)
    torch.testing.assert_close(found / found.norm(), v / v.norm())


# -- the runner ----------------------------------------------------------------------------------------------------------------


def outcome(error: float, *seconds: float, **rest: Any) -> Outcome:
    return Outcome(error, Timing("", list(seconds)), **rest)


def test_what_is_wrong_or_written_by_hand_is_not_ranked() -> None:
    row = workloads.ROWS["c1"]
    found = {
        "geoad": outcome(1e-7, 1.0, 2.0, 3.0),
        "asdl: bias apart": outcome(1e-7, 1.5, 3.0, 4.5),
        "curvlinops": outcome(1e-3, 0.1, 0.1, 0.1),
        "nngeometry": outcome(math.nan, 0.1, 0.1, 0.1),
        "torch: hooks": outcome(1e-7, 0.1, 0.1, 0.1),
        "laplace": Outcome(failure="ValueError: no | such\nthing"),
    }
    assert run.fastest(row, found) == "asdl: bias apart" and run.ratio(found, "asdl: bias apart") == 1.5
    assert run.level(row, found)
    table = run.details("c1", found, "cpu")
    assert table.count("**WRONG**") == 2 and table.count("not ranked") == 1 and "fails: ValueError: no / such thing" in table
    line = run.summary({"c1": found}, None).splitlines()[-1]
    assert "asdl: bias apart | 3 | 1.50 | 1.3 | yes" in line
    assert not run.level(row, {**found, "curvlinops": outcome(1e-7, 0.9, 1.8, 2.7)})
    assert not run.level(row, {**found, "geoad": outcome(1e-2, 0.1, 0.1, 0.1)})
    assert not run.level(row, {**found, "geoad": Outcome(failure="ValueError")})


def test_memory_is_held_against_the_rival_of_the_same_run() -> None:
    row = workloads.ROWS["d"]
    found = {"geoad": outcome(1e-7, 1.0, memory=100.0), "nngeometry": outcome(1e-7, 2.0, memory=60.0)}
    assert run.bound(row, found) == 90
    assert run.summary({"d": found}, None).splitlines()[-1].endswith("| 100 | 90 | **no** | 1e-07 |")
    assert math.isnan(run.bound(row, {"geoad": found["geoad"]}))


def test_a_slow_candidate_is_compared_by_its_one_run() -> None:
    found = {"geoad": outcome(0.0, 1.0, 3.0, 2.0), "laplace": outcome(0.0, 40.0, once=True)}
    assert run.ratio(found, "laplace") == 20 and "40 (once)" in run.details("d", found, "cpu")


def test_timings_are_paired_and_interleaved() -> None:
    calls: list[str] = []
    jobs = {name: lambda w, name=name: calls.append(name) for name in "abc"}
    timings = harness.paired(jobs, rounds=20, warmup=1, prepare=lambda _: (0,))
    turns = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(turns) == 21 and all(sorted(turn) == ["a", "b", "c"] for turn in turns) and len(set(turns)) > 3
    assert all(len(timing.seconds) == 20 for timing in timings.values())
    assert Timing("", [1.0, 4.0, 9.0]).ratio(Timing("", [1.0, 2.0, 3.0])) == 2


@pytest.mark.skipif(platform.system() != "Linux", reason="resident memory is read from /proc")
def test_peak_memory() -> None:
    with harness.peak("cpu") as found:
        block = torch.ones(16 * 2**20, dtype=torch.float32)
        del block
    assert 60 <= found.megabytes <= 80


def test_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rows", "d2,i", "--only", "torch", "--samples", "4", "--scale", "0.02", "--rounds", "1", "--no-memory", "--out"]
    assert run.main([*words, str(tmp_path / "tables.md")]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "tables.md").read_text(encoding="utf-8").strip()
    assert "| geoad |" in printed and "| torch: ExpandedWeights |" in printed and "WRONG**" not in printed
    with pytest.raises(SystemExit):
        run.main(["--rows", "nothing"])


@pytest.mark.skipif(platform.system() != "Linux", reason="resident memory is read from /proc")
def test_memory_in_a_process_of_its_own() -> None:
    found = run.memory(workloads.ROWS["i"], "torch: vmap(grad)", "cpu", ["--samples", "64"])
    assert 64 * 4858 * 4 / 2**20 <= found < 200
