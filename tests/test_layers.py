"""The structure of the package: its floors, its optional dependencies, the size and the documentation of its parts."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import geoad

PACKAGE = Path(geoad.__file__).resolve().parent

# Lowest first. A module imports from the floors below its own, and from itself; neighbours on a floor do not know each other.
FLOORS: list[tuple[str, ...]] = [
    ("errors", "repr"),
    ("params",),
    ("kernels",),
    ("maps",),
    ("charts",),
    ("operators",),
    ("transport",),
    ("tensors",),
    ("data",),
    ("distributed",),
    ("fields",),
    ("metrics",),
    ("atlases",),
    ("connection",),
    ("autodiff",),
    ("module",),
    ("curvature",),
    ("optim", "density", "tangent"),
    ("function_space",),
    ("sharpness", "laplace"),
    ("testing", "plotting"),
    ("plotting_kernels",),
    ("cli", "__main__"),
]
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}

OPTIONAL = {"hypothesis", "matplotlib", "scipy", "sklearn", "torchdiffeq", "tqdm", "zuko"}
MAY_NEED_EXTRAS = {"testing", "plotting", "plotting_kernels"}
LONGEST_FILE = 420

FILES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(file.relative_to(PACKAGE)) for file in FILES]
every_file = pytest.mark.parametrize("file", FILES, ids=IDS)


def parts(file: Path) -> tuple[str, ...]:
    """The dotted name of a file of the package, without the leading geoad: () for geoad/__init__.py."""
    names = file.relative_to(PACKAGE).with_suffix("").parts
    return names[:-1] if names[-1] == "__init__" else names


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(tree: ast.Module, package: tuple[str, ...], at_import: bool = False) -> Iterator[tuple[str, int]]:
    """The absolute names that a module imports, with their lines; with `at_import`, only those not inside a function.

    ``from geoad import operators`` gives geoad.operators. Imports for the type checker do not count.
    """
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ("geoad", *package)[: 1 + len(package) - (node.level - 1)] if node.level else ()
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)
        elif is_type_checking(node):
            assert isinstance(node, ast.If)
            waiting += node.orelse
        elif not (at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def imports_of(file: Path, at_import: bool = False) -> list[tuple[str, int]]:
    names = parts(file)
    package = names if file.name == "__init__.py" else names[:-1]
    return sorted(set(imports(ast.parse(file.read_text(encoding="utf-8")), package, at_import)))


@every_file
def test_imports_go_down(file: Path) -> None:
    name = parts(file)
    if not name:  # geoad/__init__.py stands on the roof
        return
    assert name[0] in HEIGHT, f"geoad.{name[0]} has no floor: add it to FLOORS"
    for imported, line in imports_of(file):
        top, _, rest = imported.partition(".")
        if top != "geoad":
            continue
        target = rest.split(".")[0]
        if target == name[0]:
            continue
        assert target in HEIGHT, f"{file}:{line}: import from the module that defines it, not from geoad itself ({imported})"
        assert HEIGHT[target] < HEIGHT[name[0]], f"{file}:{line}: geoad.{name[0]} lies below, or beside, geoad.{target}"


@every_file
def test_only_params_knows_pytrees(file: Path) -> None:
    if parts(file) == ("params",):
        return
    text = file.read_text(encoding="utf-8")
    assert not [line for name, line in imports_of(file) if name.startswith("torch.utils._pytree")]
    assert "utils._pytree" not in text
    assert not [line for name, line in imports_of(file) if name.split(".")[0] == "optree"]


@every_file
def test_optional_dependencies_are_imported_where_used(file: Path) -> None:
    if parts(file)[:1] and parts(file)[0] in MAY_NEED_EXTRAS:
        return
    eager = [(name, line) for name, line in imports_of(file, at_import=True) if name.split(".")[0] in OPTIONAL]
    assert not eager, f"{file}: import these inside the function that needs them: {eager}"


@every_file
def test_a_file_is_one_concept(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE, "split it by concept"
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)


def modules() -> list[str]:
    """The names of all modules of the package, but the one that runs it."""
    found = [info.name for info in pkgutil.walk_packages([str(PACKAGE)], "geoad.")]
    return ["geoad", *(name for name in found if not name.endswith("__main__"))]


IMPORT_ALL = """
import importlib, sys
for name in {hidden!r}:
    sys.modules[name] = None
import geoad
assert "torch._dynamo" not in sys.modules, "the compiler is imported with geoad, which takes longer than all the rest"
for name in {names!r}:
    importlib.import_module(name)

import warnings
warnings.simplefilter("ignore")
geoad.testing.assert_invariant(lambda p: 1.0, geoad.Chart({{"x": (2,)}}, "x"))
assert "strategies" in dir(geoad.testing)
try:
    geoad.testing.strategies
except ImportError as error:
    assert "pip install geoad[test]" in str(error), error
else:
    raise SystemExit("strategies without hypothesis")
try:
    geoad.testing.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise SystemExit("an attribute that is not there")
"""


def test_every_module_imports_without_the_extras() -> None:
    """And of the testing kit the strategies alone need hypothesis."""
    names = [name for name in modules() if not set(name.split(".")[1:2]) & MAY_NEED_EXTRAS]
    code = IMPORT_ALL.format(hidden=sorted(OPTIONAL), names=names)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def public(module: ModuleType) -> Iterator[tuple[str, object]]:
    """The classes and functions of geoad that a module shows under a name without underscore."""
    for name, value in vars(module).items():
        if name.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        if str(getattr(value, "__module__", "")).split(".")[0] == "geoad":
            yield name, value


def own_doc(value: object) -> str:
    """The docstring of a class or function; neither inherited nor the signature that `dataclass` writes."""
    text = value.__dict__.get("__doc__") if isinstance(value, type) else value.__doc__
    return "" if text is None or text.startswith(f"{getattr(value, '__name__', '')}(") else text.strip()


@pytest.mark.parametrize("name", modules())
def test_public_names_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), f"{name} has no docstring"
    missing = sorted(key for key, value in public(module) if not own_doc(value))
    assert not missing, f"without a docstring in {name}: {missing}"
