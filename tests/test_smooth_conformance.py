"""The conformance suites: geoad's own submersions, immersions and smooth maps pass, and each kind of mistake is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from map_cases import normal
from torch import Tensor

from geoad import maps
from geoad.testing import ImmersionConformance, SmoothMapConformance, SubmersionConformance
from geoad.testing.bent import BentImmersion, BentSubmersion

W = {"w": (3, 4)}
WB = {"w": (3, 4), "b": (3,)}
BASE = {"w": normal(1, 3, 4), "b": normal(2, 3)}
MASS = (lambda half: half @ half.mT + torch.eye(21))(normal(3, 21, 21).double())


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def mass(y: dict[str, Tensor]) -> Tensor:
    return MASS.to(y["u"])


def suite(kind: type[SmoothMapConformance], shapes: dict[str, tuple[int, ...]], make: Callable[[], Any], **more: Any) -> Any:
    """A suite for one map."""
    return type("Suite", (kind,), {"layout": shapes, "make": lambda self: make(), **more})()


SUITES = {
    "weight norm": suite(
        SubmersionConformance,
        W,
        maps.WeightNorm,
        outside=lambda self: [{"w_g": torch.zeros(3, 1), "w_v": torch.ones(3, 4)}],
        without_section=lambda self: [{"w": torch.zeros(3, 4)}],
    ),
    "weight norm of columns": suite(SubmersionConformance, W, lambda: maps.WeightNorm(1)),
    "factors": suite(
        SubmersionConformance,
        W,
        lambda: maps.Factorization(3),
        outside=lambda self: [{"w_u": torch.ones(3, 3), "w_v": torch.ones(3, 4)}],
    ),
    "many factors, weighted": suite(SubmersionConformance, W, lambda: maps.Factorization(5, metric={"u": 2.0, "v": 0.5})),
    "factors in a metric": suite(SubmersionConformance, W, lambda: maps.Factorization(3, metric=mass)),
    "bent submersion": suite(SubmersionConformance, WB, lambda: BentSubmersion(2, generator=generator())),
    "bent immersion": suite(ImmersionConformance, WB, lambda: BentImmersion(4, generator=generator())),
    "subspace": suite(ImmersionConformance, WB, lambda: maps.Subspace(4, BASE, generator=generator())),
    "tied": suite(ImmersionConformance, {"a": (2, 2), "b": (2, 2), "c": (3,)}, maps.Tied),
    "lora": suite(SmoothMapConformance, W, lambda: maps.LoRA(2, 3.0, base=BASE)),
    "factors of deficient rank": suite(SmoothMapConformance, W, lambda: maps.Factorization(2)),
}


@pytest.mark.parametrize("name", SUITES)
def test_own_maps_pass(name: str) -> None:
    SUITES[name].run()


class WrongLift(maps.WeightNorm):
    """The section's derivative is no horizontal lift."""

    def push_block(self, x: Any, y: Any, v: Tensor) -> Any:
        return {"g": (x * v).sum(1, keepdim=True) / x.norm(dim=1, keepdim=True), "v": v}


class WrongTranspose(maps.WeightNorm):
    def pull_inverse_block(self, x: Any, y: Any, w: Tensor) -> Any:
        found = super().pull_inverse_block(x, y, w)
        return {**found, "v": 2 * found["v"]}


class WrongSection(maps.WeightNorm):
    def value(self, x: Tensor) -> dict[str, Tensor]:
        return {"g": torch.ones(3, 1, dtype=x.dtype), "v": x}


class ForgetfulNear(maps.WeightNorm):
    def near_value(self, x: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.value(x)


class Flat(maps.Submersion):
    """Its Jacobian has rank 2."""

    def part_shapes(self, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        return {"y": (13,)}

    def inverse_value(self, y: dict[str, Tensor]) -> Tensor:
        return (y["y"][:12] * torch.tensor([1.0, 1.0] + [0.0] * 10, dtype=y["y"].dtype)).reshape(3, 4)

    def value(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": torch.nn.functional.pad(x.flatten(), (0, 1))}


class Permissive(maps.Subspace):
    def bad_domain(self, x: Any) -> str | None:
        return None


class WrongLocation(maps.Subspace):
    def value(self, x: Any) -> dict[str, Tensor]:
        return {self.name: 2 * super().value(x)[self.name]}


class WrongLeftInverse(maps.Subspace):
    def push_block(self, x: Any, y: Any, v: Any) -> dict[str, Tensor]:
        return {self.name: 2 * super().push_block(x, y, v)[self.name]}


class DoublePrecision(maps.Factorization):
    def inverse_value(self, y: dict[str, Tensor]) -> Tensor:
        return super().inverse_value(y).double()


@pytest.mark.parametrize(
    ("kind", "make", "words"),
    [
        (SubmersionConformance, WrongLift, "push is not the horizontal lift"),
        (SubmersionConformance, WrongTranspose, "pull_inverse is not Jᵀ w"),
        (SubmersionConformance, WrongSection, r"invert\(forward\(x\)\) is not x"),
        (SubmersionConformance, ForgetfulNear, "near.* is not y"),
        (SubmersionConformance, Flat, "no submersion"),
        (SubmersionConformance, lambda: maps.Factorization(2), "no geoad.maps.Submersion"),
        (ImmersionConformance, lambda: Permissive(3, generator=generator()), "off the image"),
        (ImmersionConformance, lambda: WrongLocation(3, generator=generator()), r"forward\(invert\(y\)\) is not y"),
        (ImmersionConformance, lambda: WrongLeftInverse(3, generator=generator()), "back to v"),
        (ImmersionConformance, maps.WeightNorm, "no geoad.maps.Immersion"),
        (SmoothMapConformance, lambda: DoublePrecision(2), "not float32"),
        (SmoothMapConformance, lambda: maps.Subspace(2), "a copy of the map has other values"),
        (SmoothMapConformance, maps.Exp, "no geoad.maps.SmoothMap"),
    ],
)
def test_mistakes_are_found(kind: type[SmoothMapConformance], make: Callable[[], Any], words: str) -> None:
    broken = suite(kind, W, make)
    messages: list[str] = []
    for name in dir(broken):
        if name.startswith("test_"):
            try:
                getattr(broken, name)()
            except Exception as error:  # a mistake found by one test may end another in any way
                messages.append(str(error))
    assert messages
    with pytest.raises(AssertionError, match=words):
        raise AssertionError("\n".join(messages))


def test_points_outside_must_be_refused() -> None:
    careless = suite(
        SubmersionConformance, W, maps.WeightNorm, outside=lambda self: [{"w_g": torch.ones(3, 1), "w_v": torch.ones(3, 4)}]
    )
    with pytest.raises(AssertionError, match=r"point of outside\(\)"):
        careless.run()
