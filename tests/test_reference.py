"""The pages that scripts write say what the docstrings and the library say now."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
SCRIPTS = sorted(script.stem for script in DOCS.glob("make_*.py"))


@pytest.fixture
def default_dtype() -> torch.dtype:
    """The scripts are run as a reader would run them."""
    return torch.float32


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.filterwarnings("ignore")
def test_pages_are_up_to_date(script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``--check`` a script compares only."""
    monkeypatch.syspath_prepend(str(DOCS))
    monkeypatch.setattr("sys.argv", [f"{script}.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(DOCS / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 0, capsys.readouterr().out


def test_no_script_is_missing() -> None:
    assert SCRIPTS == ["make_models", "make_operations", "make_reference"]
