"""Pages with a table that a script makes, and text around it that is written by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


def refresh(script: str, table: Callable[[], str]) -> int:
    """Write the table of docs/<name>.md for docs/make_<name>.py; with ``--check`` only say whether it is up to date."""
    name = Path(script).stem.removeprefix("make_")
    page = Path(script).with_name(f"{name}.md")
    begin, end = f"<!-- table: made by docs/make_{name}.py -->", "<!-- end of table -->"
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    made = f"{before}{begin}\n\n{table()}\n\n{end}{after}"
    if "--check" in sys.argv:
        if made != text:
            print(f"docs/{name}.md is out of date: run python docs/make_{name}.py")
        return int(made != text)
    page.write_text(made, encoding="utf-8")
    return 0
