"""Dual solves: sums of fields, structured metrics, covariances, precision, memory, several processes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import distributed_cases
import dual_cases
from torch import multiprocessing


def test_two_processes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            multiprocessing.spawn(distributed_cases.run, (folder, dual_cases.CHECKS), nprocs=2)
        except Exception:
            raise AssertionError("\n".join(file.read_text() for file in Path(folder).glob("failed-*"))) from None
