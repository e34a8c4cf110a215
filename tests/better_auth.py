"""The TypeScript application of ``examples/better-auth``: the real packages, on a database of the run."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import httpx
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "better-auth"
GUIDE = FOLDER.parents[1] / "docs" / "how-to" / "better-auth.md"
SECRET = "a secret of both sides with thirty-two bytes and an ü"


def exported() -> dict[str, str]:
    """kitrocket's environment as the guide exports it, with this run's secret; over plain http."""
    pairs = re.findall(r'^export (KITROCKET_\w+)="?(.+?)"?$', GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    secret = {"$BETTER_AUTH_SECRET": SECRET}
    return {name: secret.get(value, value) for name, value in pairs} | {"KITROCKET_SESSION_COOKIE_SECURE": "0"}


def require_node() -> None:
    """Skip where the packages are not, and say so; in CI that is a failure."""
    missing = (
        "node is not installed"
        if shutil.which("node") is None
        else f"run `make test-better-auth`, which installs the packages into {FOLDER.name}"
        if not (FOLDER / "node_modules" / "better-auth").is_dir()
        else None
    )
    if missing is None:
        return
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


def environment(url: str, **more: str) -> dict[str, str]:
    """What the programs of the folder read, and nothing that would make them call home."""
    quiet = {"BETTER_AUTH_TELEMETRY": "0", "NO_COLOR": "1", "NODE_ENV": "development"}
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return kept | quiet | {"DATABASE_URL": url, "BETTER_AUTH_SECRET": SECRET} | more


def program(name: str) -> str:
    return str(FOLDER / "node_modules" / ".bin" / name)


@contextmanager
def changed_schema(change: Callable[[str], str]) -> Iterator[Path]:
    """A folder with another ``schema.ts``, where the packages are found."""
    with tempfile.TemporaryDirectory(dir=FOLDER / "node_modules", prefix=".kitrocket-") as name:
        for file in ("schema.ts", "drizzle.config.ts"):
            shutil.copy(FOLDER / file, name)
        schema = Path(name) / "schema.ts"
        schema.write_text(change(schema.read_text(encoding="utf-8")), encoding="utf-8")
        yield Path(name)


def push(url: str, *arguments: str, folder: Path = FOLDER) -> str:
    """Run ``drizzle-kit push`` and return what it said."""
    done = subprocess.run(
        [program("drizzle-kit"), "push", *arguments],
        cwd=folder,
        env=environment(url),
        capture_output=True,
        text=True,
        timeout=90,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def _running(url: str, address: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        ["node", "--import", "tsx", "server.ts"],
        cwd=FOLDER,
        env=environment(url, BETTER_AUTH_URL=address),
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            yield running
        finally:
            running.terminate()
            try:
                running.wait(timeout=30)
            except subprocess.TimeoutExpired:
                running.kill()


@asynccontextmanager
async def better_auth(url: str) -> AsyncIterator[str]:
    """Serve the application on a loopback port until the block is left; the value is its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with _running(url, address) as running:
        assert running.stdout is not None
        with anyio.fail_after(60):
            line = await anyio.to_thread.run_sync(running.stdout.readline, abandon_on_cancel=True)
        assert line == f"listening on {address}\n", "Better Auth did not start"
        yield address


class Browser:
    """A browser at the TypeScript application."""

    def __init__(self, address: str, cookies: Mapping[str, str] | None = None) -> None:
        self.client = httpx.AsyncClient(
            base_url=f"{address}/api/auth",
            headers={"origin": address, "user-agent": "Browser/1.0"},
            cookies=dict(cookies or {}),
            trust_env=False,
            timeout=30,
        )

    async def __aenter__(self) -> Browser:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()

    async def post(self, path: str, **body: object) -> httpx.Response:
        return await self.client.post(path, json=body)

    async def session(self) -> dict[str, dict[str, object]] | None:
        """What Better Auth says of the browser's cookie."""
        answer = await self.client.get("/get-session")
        answer.raise_for_status()
        return answer.json()
