"""Writes docs/reference.md from the docstrings: every public name with its signature and the first sentence.

Run ``python docs/make_reference.py``; with ``--check`` it only says whether the page is up to date.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType

PAGE = Path(__file__).with_name("reference.md")
MODULES = (
    "geoad",
    "geoad.maps",
    "geoad.atlases",
    "geoad.metrics",
    "geoad.curvature",
    "geoad.tangent",
    "geoad.function_space",
    "geoad.optim",
    "geoad.operators",
    "geoad.distributed",
    "geoad.testing",
    "geoad.testing.zoo",
    "geoad.plotting",
    "geoad.plotting_kernels",
    "geoad.errors",
)


def public_names(module: ModuleType) -> list[str]:
    """Classes and functions that a module offers."""
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    kept = [name for name in names if inspect.isclass(getattr(module, name)) or inspect.isfunction(getattr(module, name))]
    return sorted((name for name in kept if getattr(module, name).__module__.startswith("geoad")), key=str.lower)


def summary(thing: object) -> str:
    """The first paragraph of the docstring, on one line."""
    doc = inspect.getdoc(thing) or ""
    return " ".join(doc.split("\n\n", 1)[0].split()).replace("|", "\\|")


def signature(thing: object) -> str:
    """The parameters by name, without annotations."""
    try:
        parameters = inspect.signature(thing).parameters.values()  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return ""
    shown: list[str] = []
    star = False
    for p in parameters:
        if p.name == "self":
            continue
        if p.kind is p.VAR_POSITIONAL:
            shown.append(f"*{p.name}")
            star = True
        elif p.kind is p.VAR_KEYWORD:
            shown.append(f"**{p.name}")
        else:
            if p.kind is p.KEYWORD_ONLY and not star:
                shown.append("*")
                star = True
            default = "" if p.default is p.empty else f"={default_text(p.default)}"
            shown.append(f"{p.name}{default}")
    return f"({', '.join(shown)})"


def default_text(value: object) -> str:
    """A default value, shortened where its representation would not be stable."""
    return repr(value) if isinstance(value, (int, float, str, bool, tuple, type(None))) else "..."


def page() -> str:
    """The whole reference page."""
    lines = ["# Reference", "", "Made from the docstrings by `docs/make_reference.py`; `help(name)` shows them in full.", ""]
    for path in MODULES:
        module = importlib.import_module(path)
        names = public_names(module)
        if not names:
            continue
        lines += [f"## `{path}`", "", summary(module), "", "| name | |", "|---|---|"]
        lines += [f"| `{name}{signature(getattr(module, name))}` | {summary(getattr(module, name))} |" for name in names]
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    text = page()
    if "--check" in sys.argv:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        if not same:
            print("docs/reference.md is out of date: run python docs/make_reference.py")
        return 0 if same else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
