"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kitrocket
from kitrocket import errors
from kitrocket.sql import all_files, statements

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kitrocket"
SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if "piccolo_migrations" not in path.parts]


CLOCKS = r"\b(now\s*\(|current_(timestamp|date|time)\b|localtime(stamp)?\b|(clock|statement|transaction)_timestamp)"


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_all_names_are_there_sorted_and_the_only_public_ones() -> None:
    assert list(kitrocket.__all__) == sorted(kitrocket.__all__)
    for name in kitrocket.__all__:
        assert getattr(kitrocket, name) is not None
    public = {name for name in dir(kitrocket) if not name.startswith("_")}
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert public - modules <= set(kitrocket.__all__)


def test_every_error_is_public_and_in_the_drawn_tree() -> None:
    assert errors.__doc__ is not None
    drawn = re.findall(r"^ *[*+-] (\w+)", errors.__doc__, re.MULTILINE)
    defined = [name for name, value in vars(errors).items() if inspect.isclass(value) and name.endswith("Error")]
    assert sorted(drawn) == sorted(defined)
    assert set(defined) <= set(kitrocket.__all__)
    for name in defined:
        assert issubclass(getattr(errors, name), errors.KitRocketError)
        assert getattr(errors, name).__doc__


def test_the_tree_is_drawn_as_it_is() -> None:
    parents: list[str] = []
    for indent, name in re.findall(r"^( *)[*+-] (\w+)", errors.__doc__ or "", re.MULTILINE):
        del parents[len(indent) // 2 :]
        if parents:
            assert getattr(errors, name).__bases__[0].__name__ == parents[-1]
        parents.append(name)


def test_importing_kitrocket_imports_no_framework() -> None:
    loaded = run_python("import sys, kitrocket; print('\\n'.join(sys.modules))").splitlines()
    top = {name.partition(".")[0] for name in loaded}
    assert top.isdisjoint(
        {
            "fastapi",
            "starlette",
            "litestar",
            "blacksheep",
            "piccolo_admin",
            "piccolo_api",
            "dodopayments",
            "typer",
            "rich",
            "uvicorn",
            "uvloop",
        }
    )


def test_importing_kitrocket_needs_no_extra() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    names = {re.split(r"[<>=\[ ]", need)[0].replace("-", "_") for needs in extras.values() for need in needs}
    blocked = sorted(names - {"kitrocket"})
    run_python(
        "import sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "import kitrocket\n"
        "for name in kitrocket.__all__: getattr(kitrocket, name)\n"
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_clock_reads_the_time(path: Path) -> None:
    if path.name == "clock.py":
        return
    reads = re.findall(r"\b(?:datetime\.(?:now|utcnow|today)|date\.today|time\.time)\(", path.read_text())
    assert reads == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_things_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    bare: list[str] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef | ast.Module):
            continue
        if isinstance(node, ast.ClassDef) and (node.name.startswith("_") or _is_obvious(node)):
            continue
        bare += [
            child.name
            for child in node.body
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and not child.name.startswith("_")
            and not _is_obvious(child)
            and ast.get_docstring(child) is None
        ]
    assert bare == []


def _is_obvious(node: ast.AST) -> bool:
    """Tables and their column defaults are their own documentation; overrides have their parent's."""
    if isinstance(node, ast.ClassDef):
        return any(ast.unparse(base) in ("Table", "Default", "TimestampNow", "str") for base in node.bases)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in (
        "begin",
        "rollback",
        "validate_all",
    )


@pytest.mark.parametrize("file", all_files())
def test_sql_takes_the_time_from_the_caller_and_explains_itself(file: str) -> None:
    for name, sql in statements(file).items():
        assert sql.startswith("--"), f"{file}.{name} has no comment"
        code = "\n".join(line.partition("--")[0] for line in sql.splitlines())
        clocks = (
            r"\b(now\s*\(|current_(timestamp|date|time)\b|localtime(stamp)?\b|\w*clock_timestamp|statement_timestamp)"
        )
        assert not re.search(clocks, code, re.IGNORECASE), f"{file}.{name} reads the clock"


def test_every_named_statement_is_used() -> None:
    code = "\n".join(path.read_text() for path in SOURCES)
    unused = [f"{file}.{name}" for file in all_files() for name in statements(file) if f'"{name}"' not in code]
    assert unused == []
