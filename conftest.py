"""The environment of every test and doctest: one thread, fixed seeds, a derandomised hypothesis."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

# HYPOTHESIS_PROFILE=thorough draws more examples, and new ones on every run.
hypothesis.settings.register_profile("geoad", max_examples=10, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("thorough", max_examples=200, deadline=None, derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "geoad"))


@pytest.fixture
def default_dtype() -> torch.dtype:
    """torch's default floating point type during the test. Doctests print float32; tests/conftest.py says float64."""
    return torch.float32


@pytest.fixture(autouse=True)
def fixed_environment(default_dtype: torch.dtype) -> Iterator[None]:
    """Seed torch, set its default dtype, and undo what a test may leave behind."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_default_dtype(default_dtype)
    torch.manual_seed(0)
    with torch.enable_grad():
        yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_default_dtype(torch.float32)
    torch.set_printoptions(profile="default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
