"""What the documentation shows is true: its code runs, its links lead somewhere, nothing public is left out."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kitrocket
from kitrocket.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for number, code in enumerate(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S), 1):
            found.append((f"{page.relative_to(ROOT)}:{number}", code))
    return found


@pytest.mark.parametrize(("place", "code"), blocks("python"), ids=lambda value: value if len(value) < 60 else "")
def test_a_program_in_the_documentation_runs(place: str, code: str, database_url: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PICCOLO_CONF"}
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment | {"DATABASE_URL": database_url},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, f"{place}\n{ran.stderr}"


@pytest.mark.parametrize(
    ("place", "code"), blocks("python fragment"), ids=lambda value: value if len(value) < 60 else ""
)
def test_a_fragment_in_the_documentation_is_python_and_names_what_exists(place: str, code: str) -> None:
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kitrocket"):
            module = __import__(node.module or "", fromlist=["*"])
            for name in node.names:
                assert hasattr(module, name.name), f"{place}: {node.module} has no {name.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs" / "reference" / "settings.md").read_text()
    assert [name for name in Settings.model_fields if f"`{name}`" not in text] == []


def test_every_error_is_documented() -> None:
    text = (ROOT / "docs" / "reference" / "errors.md").read_text()
    errors = [name for name in kitrocket.__all__ if name.endswith("Error")]
    assert [name for name in errors if f"`{name}`" not in text] == []


def test_every_command_is_documented() -> None:
    helped = subprocess.run(
        [sys.executable, "-c", "from kitrocket.cli import main; main()", "--help"],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "120", "NO_COLOR": "1"},
        check=True,
    ).stdout
    text = (ROOT / "docs" / "reference" / "commands.md").read_text()
    commands = re.findall(r"^\W*([a-z]+)\s{2,}\S", helped.partition("Commands")[2], re.M)
    assert commands
    assert [name for name in commands if f"`kitrocket {name}" not in text] == []
