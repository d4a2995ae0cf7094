"""Connections: Christoffel symbols, geodesics, parallel transport, covariant derivatives."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import geoad
from geoad import maps
from geoad.connection import Christoffel
from geoad.errors import (
    BasePointError,
    ChartDomainError,
    ChartMismatchError,
    GeometryError,
    SingularMetricError,
    VarianceError,
)
from geoad.maps.select import Recipe

# torch itself warns when its forward mode is used for the first time
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

D = torch.float64


def t(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=D)


def close(a: Tensor, b: Tensor, tol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def rough(x: Tensor) -> Tensor:
    """A metric without symmetries: M Mᵀ + 1 with M depending on x."""
    d = x.shape[0]
    m = torch.outer(x, torch.arange(1.0, d + 1, dtype=x.dtype).cos()) + torch.sin(x)[:, None] * 0.5
    return m @ m.mT + torch.eye(d, dtype=x.dtype)


def sphere_matrix(x: Tensor) -> Tensor:
    return torch.diag(torch.stack([torch.ones_like(x[0]), x[0].sin() ** 2]))


def half_plane(x: Tensor) -> Tensor:
    """The Fisher metric of N(mu, sigma) in (mu, sigma)."""
    return torch.diag(torch.stack([x[1] ** -2, 2 * x[1] ** -2]))


def dense_symbols(matrix: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The textbook formula, [k, i, j]."""
    dg: Any = torch.func.jacfwd(matrix)(x)  # [i, j, l] = ∂_l G_ij
    lowered = 0.5 * (dg.permute(0, 2, 1) + dg - dg.permute(2, 1, 0))  # [k, i, j]
    first = 0.5 * (dg.permute(1, 2, 0) + dg.permute(1, 0, 2).permute(0, 1, 2) * 0)  # placeholder for shape checks
    assert first.shape == lowered.shape
    lowered = torch.empty_like(dg)
    for k in range(len(x)):
        for i in range(len(x)):
            for j in range(len(x)):
                lowered[k, i, j] = 0.5 * (dg[j, k, i] + dg[i, k, j] - dg[i, j, k])
    return torch.einsum("kl,lij->kij", torch.linalg.inv(matrix(x)), lowered)
