"""Paired timings: every round runs all candidates once, in turn; a ratio is the median of the ratios round by round.

A drift of the machine's speed hits the candidates of a round alike, so ratios can be trusted where seconds cannot.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Timing:
    """The rounds of one candidate, in seconds."""

    name: str
    seconds: list[float]

    @property
    def median(self) -> float:
        """The median round."""
        return statistics.median(self.seconds)

    def ratio(self, other: Timing) -> float:
        """The median of the ratios of paired rounds."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def paired(candidates: dict[str, Callable[[], Any]], *, rounds: int = 21, warmup: int = 3, inner: int = 1) -> dict[str, Timing]:
    """Time all candidates interleaved; `inner` calls make one round (divide by it is done here)."""
    timings = {name: Timing(name, []) for name in candidates}
    for i in range(rounds + warmup):
        for name, fn in candidates.items():
            start = time.perf_counter()
            for _ in range(inner):
                fn()
            elapsed = (time.perf_counter() - start) / inner
            if i >= warmup:
                timings[name].seconds.append(elapsed)
    return timings


def machine() -> str:
    """One line: processor, threads, versions, date."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    date = time.strftime("%Y-%m-%d")
    return f"{model}, {torch.get_num_threads()} thread, torch {torch.__version__}, Python {platform.python_version()}, {date}"
