"""What holds for the tests only: float64."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def default_dtype() -> torch.dtype:
    """Tests compare with closed forms and with each other, so they run in float64."""
    return torch.float64
