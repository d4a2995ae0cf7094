"""The code blocks of README.md and docs/ run, and print what the text says.

The ```python blocks of a file share one namespace and run in order; ```python no-run is skipped. A ```text block that follows a
python block, with nothing but blank lines between, is the output of that block (``...`` stands for anything, as in a doctest).
A ```text block anywhere else is a mistake: what is no output has another language, or none.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))] if page.is_file()]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^`]*)$")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its other words, the number of its first line, and its text."""

    language: str
    words: tuple[str, ...]
    line: int
    text: str
    follows: bool
    """Whether only blank lines stand between this block and the one before."""


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a Markdown page."""
    found: list[Block] = []
    lines = iter(enumerate(page.splitlines(), start=1))
    follows = False
    for number, line in lines:
        opening = FENCE.match(line)
        if opening is None:
            follows = follows and not line.strip()
            continue
        body: list[str] = []
        for _, inner in lines:
            if inner.strip() == opening["ticks"]:
                break
            body.append(inner.removeprefix(opening["indent"]))
        else:
            raise ValueError(f"the block that opens in line {number} is never closed")
        language, *words = opening["info"].split() or [""]
        found.append(Block(language, tuple(words), number + 1, "\n".join(body) + "\n", follows))
        follows = True
    return found


def run_page(page: str, name: str) -> None:
    """Run the blocks of a page and compare what they print."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed: str | None = None  # by the python block just before; None: nothing to compare with
    may_follow = False
    for block in blocks(page):
        if block.language == "python":
            printed = None if "no-run" in block.words else run_block(block, name, namespace)
            may_follow = True
            continue
        if block.language == "text":
            if not (may_follow and block.follows):
                raise AssertionError(f"{name}:{block.line}: this ```text block follows no ```python block")
            if printed is not None and not doctest.OutputChecker().check_output(block.text, printed, FLAGS):
                raise AssertionError(f"{name}:{block.line}: expected\n{block.text}\nprinted\n{printed}")
        may_follow = False


def run_block(block: Block, name: str, namespace: dict[str, object]) -> str:
    """What a block prints."""
    out = io.StringIO()
    source = "\n" * (block.line - 1) + block.text  # tracebacks show the line of the page
    with contextlib.redirect_stdout(out):
        exec(compile(source, name, "exec", dont_inherit=True), namespace)
    return out.getvalue()


@pytest.fixture
def default_dtype() -> torch.dtype:
    """The pages are run as a reader would run them."""
    return torch.float32


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page.read_text(encoding="utf-8"), str(page))


def test_blocks_share_a_namespace_and_outputs_are_compared() -> None:
    run_page("```python\nx = 2\n```\n\nwords\n\n```python\nprint(x)\n```\n\n```text\n2\n```\n", "page.md")
    with pytest.raises(AssertionError, match=r"page.md:5: expected\n3"):
        run_page("```python\nprint(2)\n```\n```text\n3\n```\n", "page.md")


def test_no_run_is_skipped() -> None:
    run_page("```python no-run\nraise RuntimeError\n```\n\n```text\nanything\n```\n", "page.md")
    with pytest.raises(RuntimeError):
        run_page("```python\nraise RuntimeError\n```\n", "page.md")


def test_an_output_without_code_is_a_mistake() -> None:
    for between in ("words\n", "```console\n$ ls\n```\n"):
        with pytest.raises(AssertionError, match="follows no"):
            run_page(f"```python\nprint(2)\n```\n{between}```text\n2\n```\n", "page.md")


def test_an_open_block_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="never closed"):
        run_page("```python\nprint(2)\n", "page.md")
