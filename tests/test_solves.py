"""Second derivatives of solves and determinants, in every order of modes, against finite differences of reverse mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from geoad.kernels.solves import SpelledOutSolves, exact_solves

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

EYE = torch.eye(3, dtype=torch.float64)


def _matrix(v: Tensor) -> Tensor:
    return v.reshape(3, 3) + 2 * EYE


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "solve": lambda v: torch.linalg.solve(_matrix(v), v.reshape(3, 3)),
    "solve from the right": lambda v: torch.linalg.solve(_matrix(v), v.reshape(3, 3), left=False),
    "solve for a vector": lambda v: torch.linalg.solve(_matrix(v), v[:3]),
    "solve for many": lambda v: torch.linalg.solve(_matrix(v).expand(3, 3, 3), v.reshape(3, 3, 1).expand(3, 3, 2)),
    "solve_ex": lambda v: torch.linalg.solve_ex(_matrix(v), v.reshape(3, 3)).result,
    "det": lambda v: torch.det(_matrix(v)),
    "determinant": lambda v: torch.linalg.det(_matrix(v)),
    "method": lambda v: _matrix(v).det() + _matrix(v).logdet(),
    "slogdet": lambda v: torch.linalg.slogdet(-_matrix(v)).logabsdet,
    "logdet": lambda v: torch.logdet(_matrix(v)),
    "householder": lambda v: torch.linalg.householder_product(v.reshape(3, 3).tril(-1), 2 / (1 + v[:3].square())),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives(name: str) -> None:
    fn = FUNCTIONS[name]
    x = 0.4 * torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first: Any = torch.func.jacrev(fn)
    step = 1e-5
    rows = [(first(x + step * d) - first(x - step * d)) / (2 * step) for d in torch.eye(9, dtype=torch.float64)]
    expected = torch.stack(rows, -1)
    with SpelledOutSolves():
        assert torch.allclose(fn(x), _plain(fn, x), rtol=1e-12)
        for outer in (torch.func.jacfwd, torch.func.jacrev):
            for inner in (torch.func.jacfwd, torch.func.jacrev):
                found: Any = outer(inner(fn))(x)
                assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6), (outer.__name__, inner.__name__)


def _plain(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():  # pyright: ignore
        return fn(x)


def test_only_under_transforms() -> None:
    assert not isinstance(exact_solves(), SpelledOutSolves)
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(isinstance(exact_solves(), SpelledOutSolves))
        return x

    torch.func.jvp(look, (torch.ones(()),), (torch.ones(()),))
    assert seen == [True]
