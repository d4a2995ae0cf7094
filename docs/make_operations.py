"""Writes the table of docs/operations.md, representation by operation, from the table that the tests go through.

Run ``python docs/make_operations.py``; with ``--check`` it only says whether the page is up to date. The text around the table
is written by hand.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from tables import refresh

HERE = Path(__file__).parent
REPRESENTATIONS = {
    "dense": "Dense",
    "block_diagonal": "BlockDiagonal",
    "diagonal": "Diagonal",
    "quasi_diagonal": "QuasiDiagonal",
    "kfac": "Kronecker",
    "ekfac": "EigenKronecker",
    "low_rank": "LowRank",
    "implicit": "Implicit",
}
SHORT = {"closed form": "✓"}


def table() -> str:
    """One row an operation, one column a representation."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    tested = importlib.import_module("test_structured_operators")
    lines = ["| operation | " + " | ".join(REPRESENTATIONS) + " |", "|---|" + "---|" * len(REPRESENTATIONS)]
    for operation in tested.OPERATIONS:
        cells = [tested.TABLE[cls, operation] for cls in REPRESENTATIONS.values()]
        lines.append(f"| `{operation}` | " + " | ".join(SHORT.get(cell, cell) for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(refresh(__file__, table))
