"""Writes the table of docs/operations.md, representation by operation, from the table that the tests go through.

Run ``python docs/make_operations.py``; with ``--check`` it only says whether the page is up to date. The text around the table
is written by hand.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE / "operations.md"
BEGIN, END = "<!-- table: made by docs/make_operations.py -->", "<!-- end of table -->"
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


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    made = f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"
    if "--check" in sys.argv:
        if made != text:
            print("docs/operations.md is out of date: run python docs/make_operations.py")
        return int(made != text)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
