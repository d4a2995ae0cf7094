"""The scripts in examples/ run, and print what they promise."""

from __future__ import annotations

import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a script prints."""
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def numbers(line: str) -> list[float]:
    """The numbers in a line."""
    return [float(found) for found in re.findall(r"-?\d+\.?\d*(?:e[+-]?\d+)?", line)]


@pytest.fixture
def default_dtype() -> torch.dtype:
    """The scripts are run as a reader would run them."""
    return torch.float32


def test_every_example_is_tested_and_has_a_docstring() -> None:
    tested = set(re.findall(r'run\("(\w+)"', Path(__file__).read_text(encoding="utf-8"))) | {"demo"}
    for file in EXAMPLES.glob("*.py"):
        assert file.stem in tested, f"{file} is not run by any test"
        assert file.read_text(encoding="utf-8").startswith('"""'), f"{file} has no docstring"


def test_sharpness_two_charts(capsys: pytest.CaptureFixture[str]) -> None:
    first, _, *lines = run("sharpness_two_charts", capsys).splitlines()
    assert numbers(first)[1] < 1e-6  # a minimum
    theta, rescaled, curved = map(numbers, lines)
    assert theta[2:] == rescaled[2:] == curved[2:]
    assert theta[:2] == theta[2:]
    assert rescaled[0] > 2 * theta[0] and abs(curved[0] / theta[0] - 1) > 0.1


def test_invariant_adamw(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("invariant_adamw", capsys).splitlines()
    plain, invariant = (numbers(line)[-1] for line in lines if "largest difference" in line)
    assert plain > 1e-2
    assert invariant == 0


def test_natural_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("natural_gradient", capsys).splitlines()
    losses = [line.split()[-1] for line in lines if "loss" in line]
    assert losses[0] == losses[1] and losses[2] == losses[3]
    assert float(losses[2]) < float(losses[0])
    assert all(numbers(line)[0] < 1e-10 for line in lines if "distance" in line)


def test_plane_in_polar_coordinates(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("plane_in_polar_coordinates", capsys)
    assert "Γ^r_φφ = -1.414214, Γ^φ_rφ = 0.707107" in printed
    assert "Laplacian: 8.000000 (exact: 8)" in printed
    assert "instead: 5.000000" in printed


def test_sphere_two_charts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("sys.argv", ["sphere_two_charts.py", "--picture", str(tmp_path / "sphere.png")])
    lines = run("sphere_two_charts", capsys).splitlines()
    assert lines[1].endswith("True")
    *eigenvalues, there = numbers(lines[2])
    assert max(abs(value + there) for value in eigenvalues) < 1e-5
    assert "south" in lines[3] and lines[3].endswith("north")
    assert numbers(lines[5])[1] == numbers(lines[5])[2]
    turned, area = numbers(lines[6])[0], numbers(lines[6])[-1]
    assert abs((turned - area) % (2 * math.pi)) < 1e-5 or abs((turned - area) % (2 * math.pi) - 2 * math.pi) < 1e-5
    assert "needs a reference chart" in lines[7]
    assert (tmp_path / "sphere.png").stat().st_size > 10_000


def test_own_map(capsys: pytest.CaptureFixture[str]) -> None:
    *laws, norms = run("own_map", capsys).splitlines()
    assert len(laws) == 5
    assert all(float(law.split()[-1]) < 1e-12 for law in laws)
    in_theta, in_wave = numbers(norms)
    assert in_theta == in_wave


def test_drop_in_torch_func(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("drop_in_torch_func", capsys)
    assert printed.count("the numbers of torch.func: True") == 2
    assert "H.trace() raises: the trace of a Form" in printed


def test_lora(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("lora", capsys)
    # r m + 2·2 at B = 0, where the rows of A count only; elsewhere r (m + n - r) for each layer
    assert "coordinates: 98 in theta, 62 in lora; rank 28 at the start, 54 elsewhere" in printed
    assert "Jᵀ dL is the gradient in (A, B): True" in printed
    assert printed.count("(NotADiffeomorphismError)") == 3 and printed.count("(SingularMetricError)") == 1
    before, after, _ = numbers(next(line for line in printed.splitlines() if line.startswith("loss")))
    assert after < 0.2 < 2 < before
    assert "rank of the update of the first layer: 2" in printed


def test_transformer_digits(capsys: pytest.CaptureFixture[str]) -> None:
    _, *runs, gap, in_theta, in_psi = run("transformer_digits", capsys).splitlines()
    losses = [numbers(line)[0] for line in runs]
    assert len(runs) == 2 and losses[0] == losses[1] < 1.0
    assert all(numbers(line)[1] > 0.6 for line in runs)
    assert numbers(gap)[0] < 1e-10
    assert numbers(in_theta) == numbers(in_psi)


def test_weight_norm(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("weight_norm", capsys).splitlines()
    assert "16 weights, 22 numbers" in lines[0]
    rows = [numbers(line)[-4:] for line in lines[2:6]]
    assert all(row[2:] == rows[-1][2:] for row in rows) and rows[-1][:2] == rows[-1][2:]
    assert rows[0][0] > 3 * rows[2][0] and rows[2][1] > rows[1][1] + 3 > rows[0][1] + 6  # naive: six numbers too many
    slow, fast = numbers(lines[7])[1:], numbers(lines[6])[1:]
    assert fast[0] > 5 * slow[0] and fast[1] == slow[1]


def test_orthogonal_weights(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("orthogonal_weights", capsys).splitlines()
    exponential, cayley = (numbers(line) for line in lines[1:3])
    assert exponential[:2] == cayley[:2] == [16, 6]
    assert exponential[2:4] != cayley[2:4] and exponential[4:] == cayley[4:]
    before, after, off = numbers(lines[3])
    assert after < before and off < 1e-12
    assert lines[4].startswith("refused: ")


@pytest.mark.parametrize("hidden", [False, True])
def test_flow_as_chart(hidden: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if hidden:
        monkeypatch.setitem(sys.modules, "zuko", None)
    else:
        pytest.importorskip("zuko")
    lines = run("flow_as_chart", capsys).splitlines()
    start, *_, end = (numbers(line)[-1] for line in lines if line.startswith("step"))
    assert end < start - (0.05 if hidden else 0.5)
    assert sum("True" in line for line in lines) == 3 and "False" not in "".join(lines)
    straight, bent = (numbers(line)[-1] for line in lines[-2:])
    assert bent > straight + 1 or hidden


def test_curvature_digits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["curvature_digits.py"])
    lines = run("curvature_digits", capsys).splitlines()
    rows = {
        line.split()[0]: numbers(line.split(maxsplit=1)[1])
        for line in lines
        if line[:1].isalpha() and ("e-" in line or "e+" in line)
    }
    for exact in ("dense", "low_rank", "implicit"):
        assert max(rows[exact][:3]) < 1e-9
    for name in ("block_diagonal", "ekfac", "quasi_diagonal", "diagonal"):
        assert rows[name][0] < 1e-12
        assert rows[name][1] > 1e-3
    assert rows["kfac"][0] > 1e-4
    assert all(row[3] < 1e-9 for row in rows.values())
    assert rows["kfac"][4] < rows["block_diagonal"][4] < rows["dense"][4]


def test_ntk_digits(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    lines = run("ntk_digits", capsys).splitlines()
    assert "conv: convolution, linear: affine" in lines
    moved, naive = numbers(next(line for line in lines if line.startswith("from psi")))
    assert moved < 1e-4 and naive > 0.5
    exact, estimate, error = numbers(next(line for line in lines if line.startswith("effective rank")))
    assert abs(exact - estimate) < 6 * error
    assert all(numbers(line)[0] > 0.8 for line in lines if line.startswith("kernel classification"))
    steps = [numbers(line) for line in lines if line.startswith("step")]
    assert len(steps) == 4 and steps[-1][1] > 2 * steps[0][1] and steps[-1][2] < steps[0][2] == 1


def test_linearized_network(capsys: pytest.CaptureFixture[str]) -> None:
    *widths, last = run("linearized_network", capsys).splitlines()
    apart = [numbers(line)[-2] for line in widths]
    assert apart == sorted(apart, reverse=True) and apart[0] > 5 * apart[-1]  # wide networks stay in their tangent
    assert all(numbers(line)[-1] < 1e-10 for line in widths)
    assert numbers(last)[-1] < 1e-10


def test_distributed_fisher(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a group of one process; with two, see test_distributed.py."""
    monkeypatch.delenv("RANK", raising=False)
    first, *lines = run("distributed_fisher", capsys).splitlines()
    assert first == "1 processes, 101 samples"
    assert sum("difference to one process 0.0e+00, same bits in all: True" in line for line in lines) == 7
