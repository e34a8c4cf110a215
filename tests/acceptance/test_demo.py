"""`kitrocket demo` and `kitrocket demo --serve`, as a stranger runs them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kitrocket.embedded import EmbeddedServer

pytestmark = [pytest.mark.embedded, pytest.mark.timeout(600)]

_KITROCKET = Path(sys.executable).with_name("kitrocket")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A project folder that the server's account can enter."""
    made = Path(tempfile.mkdtemp(prefix="kitrocket demo "))
    made.chmod(0o755)
    try:
        yield made
    finally:
        EmbeddedServer(made / ".kitrocket" / "demo").stop()
        shutil.rmtree(made)


def _environment() -> dict[str, str]:
    """Nobody's settings; a database that the demo must not touch."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KITROCKET_", "DODO_"))}
    return kept | {"DATABASE_URL": "postgres://nobody@127.0.0.1:1/none", "PYTHONUNBUFFERED": "1"}


def _run(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [_KITROCKET, "demo"],
        cwd=folder,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@contextmanager
def _serving(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The demo that goes on serving, once it does, and what it printed until then."""
    with subprocess.Popen(
        [_KITROCKET, "demo", "--serve"],
        cwd=folder,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said += line
                if "Ctrl-C" in line:
                    break
            assert "Ctrl-C" in said, said
            yield process, said
        finally:
            process.kill()


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def _is_running(folder: Path) -> bool:
    return EmbeddedServer(folder / ".kitrocket" / "demo").status().running


def test_the_demo_shows_the_main_job_and_leaves_nothing_running(folder: Path) -> None:
    done = _run(folder)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert str(folder) in done.stdout.splitlines()[0]
    assert "10,000 expired swept" in done.stdout
    assert "20,000 calls from 64 callers" in done.stdout
    assert re.search(r"^\d+ figures checked .* all right", done.stdout, re.MULTILINE)
    for word in ("trialing", "active", "past_due", "cancelled", "renewal_unconfirmed", "not_started", "refunded"):
        assert word in done.stdout
    assert "whsec_" not in done.stdout
    assert not _is_running(folder)


def test_the_demo_serves_again_after_it_was_killed_and_ends_when_told(folder: Path) -> None:
    with _serving(folder) as (process, _):
        process.kill()

    with _serving(folder) as (process, said):
        studio = re.search(r"http://127\.0\.0\.1:\d+/admin/", said)
        assert studio is not None
        assert _status(studio[0]) == 200
        assert _status(studio[0].replace("/admin/", "/readyz")) == 200
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)

    assert process.returncode == 0, said + rest
    assert not _is_running(folder)
