"""The scripts in examples/ run, and print what they promise."""

from __future__ import annotations

import re
import runpy
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
