"""Paired timings and peak memory.

Every round runs all candidates once, in turn; a ratio is the median of the ratios round by round. A drift of the machine's
speed hits the candidates of a round alike, so ratios can be trusted where seconds cannot.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
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
        """The median of the ratios of the rounds that both ran; of the medians if one of them ran once."""
        if min(len(self.seconds), len(other.seconds)) == 1:
            return self.median / other.median
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=False))


def paired(
    candidates: dict[str, Callable[..., Any]],
    *,
    rounds: int = 21,
    warmup: int = 3,
    inner: int = 1,
    prepare: Callable[[int], tuple[Any, ...]] = lambda _: (),
) -> dict[str, Timing]:
    """Time all candidates interleaved, in another order every round; `inner` calls make one round (divide by it is done here).

    A candidate is called with what ``prepare(round)`` gives; that is not timed.
    """
    timings = {name: Timing(name, []) for name in candidates}
    order = random.Random(0)
    gc.collect()
    gc.freeze()  # what is there now need not be looked at before every call
    for i in range(-warmup, rounds):
        for name in order.sample(list(candidates), len(candidates)):
            fn, arguments = candidates[name], prepare(i)
            elapsed = seconds(lambda fn=fn, arguments=arguments: fn(*arguments), inner)
            if i >= 0:
                timings[name].seconds.append(elapsed)
    gc.unfreeze()
    return timings


def seconds(fn: Callable[[], Any], inner: int = 1) -> float:
    """The time of one call, the device waited for."""
    gc.collect()
    synchronize()
    start = time.perf_counter()
    for _ in range(inner):
        fn()
    synchronize()
    return (time.perf_counter() - start) / inner


def synchronize() -> None:
    """Wait for the device, if it was used."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Peak:
    """The largest memory taken since the beginning of a `peak` block, in MB."""

    megabytes: float = float("nan")


@contextmanager
def peak(device: str) -> Iterator[Peak]:
    """Measure the memory that the block adds at its worst: resident memory, or what torch allocated on a CUDA device.

    Resident memory is exact to some MB, and only in a process that does little else: run one candidate in a process of its own.
    """
    found = Peak()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found.megabytes = (torch.cuda.max_memory_allocated() - before) / 2**20
        return
    _forget_high_water()
    start = _resident("VmRSS")
    yield found
    found.megabytes = max(0.0, _resident("VmHWM") - start)


def _forget_high_water() -> None:
    """Give freed memory back to the system and begin a new high-water mark (Linux)."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _resident(key: str) -> float:
    """An entry of this process's status, in MB; nan where there is none. (``ru_maxrss`` would count the parent too.)"""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":")), float("nan"))


def machine(device: str = "cpu") -> str:
    """One line: processor or CUDA device, threads, versions, date."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    if device.startswith("cuda"):
        model = f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda}), {model}"
    threads = torch.get_num_threads()
    words = f"{threads} thread{'s' if threads > 1 else ''}"
    return f"{model}, {words}, torch {torch.__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"
