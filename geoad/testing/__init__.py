"""For people who develop methods: assertions of invariance, a conformance suite for maps, hypothesis strategies.

`assert_invariant` and `assert_equivariant` need nothing but torch. ``geoad.testing.strategies`` draws charts, points, maps,
tensors and small networks for property tests and needs hypothesis (``pip install geoad[test]``); it is imported when it is
first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from geoad.testing.conformance import DiffeomorphismConformance as DiffeomorphismConformance
from geoad.testing.invariance import assert_equivariant as assert_equivariant
from geoad.testing.invariance import assert_invariant as assert_invariant
from geoad.testing.networks import SmallNetwork as SmallNetwork
from geoad.testing.recipes import condition as condition
from geoad.testing.recipes import standard_charts as standard_charts
from geoad.testing.smooth_conformance import ImmersionConformance as ImmersionConformance
from geoad.testing.smooth_conformance import SmoothMapConformance as SmoothMapConformance
from geoad.testing.smooth_conformance import SubmersionConformance as SubmersionConformance

if TYPE_CHECKING:
    from geoad.testing import strategies as strategies

__all__ = [
    "DiffeomorphismConformance",
    "ImmersionConformance",
    "SmallNetwork",
    "SmoothMapConformance",
    "SubmersionConformance",
    "assert_equivariant",
    "assert_invariant",
    "condition",
    "standard_charts",
    "strategies",
]


def __getattr__(name: str) -> Any:
    if name == "strategies":
        return importlib.import_module("geoad.testing.strategies")
    raise AttributeError(f"module 'geoad.testing' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
