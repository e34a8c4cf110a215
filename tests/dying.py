"""Deliver webhooks in a process that dies, or loses its connection, at a chosen step: ``python dying.py URL < plans``.

A step is one message to PostgreSQL. A plan is a line of JSON: ``mode`` (kill or cut), ``step`` (counted from 1),
``when`` (before the message is sent, or after it was carried out but before the answer counts) and ``deliveries``. For
each plan a process is forked, and a line says which ids were acknowledged, what was refused and how the process ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import asyncpg

from kitrocket.dodo.signature import sign
from kitrocket.engine import Engine
from kitrocket.errors import DatabaseError
from simulating import NOW
from storming import KEY, service_of


class Fate:
    """Counts the messages of this process to PostgreSQL, and strikes at one of them."""

    def __init__(self, mode: str, step: int, when: str) -> None:
        self.mode, self.step, self.when = mode, step, when
        self.count = 0

    def watch(self) -> None:
        """Stand between asyncpg and its callers from now on."""
        for name in ("fetch", "execute"):
            setattr(asyncpg.Connection, name, self._watched(getattr(asyncpg.Connection, name)))

    def _watched(self, method: Any) -> Any:
        async def watched(connection: Any, *arguments: Any, **options: Any) -> Any:
            self.count += 1
            struck = self.count == self.step
            if struck and self.when == "before":
                self._strike(connection)
            answer = await method(connection, *arguments, **options)
            if struck and self.when == "after":
                self._strike(connection)
                raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")
            return answer

        return watched

    def _strike(self, connection: Any) -> None:
        if self.mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        connection.terminate()


async def _deliver(url: str, plan: dict[str, Any], tell: int) -> None:
    async with Engine(url, pool_size=2) as engine:
        service = service_of(engine)
        Fate(plan["mode"], plan["step"], plan["when"]).watch()
        for webhook_id, text in plan["deliveries"]:
            body = text.encode()
            try:
                receipt = await service.receive(body, sign(body, key=KEY, webhook_id=webhook_id, at=NOW))
            except DatabaseError as error:
                line = f"refused {type(error).__name__}"
            else:
                line = f"acknowledged {receipt.webhook_id}"
            os.write(tell, f"{line}\n".encode())


def _run(url: str, plan: dict[str, Any]) -> dict[str, Any]:
    hear, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(hear)
        try:
            anyio.run(_deliver, url, plan, tell)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            os.write(tell, f"failed {error!r}\n".encode())
        os._exit(0)
    os.close(tell)
    with os.fdopen(hear) as lines:
        heard = [line.split(maxsplit=1) for line in lines]
    _, status = os.waitpid(child, 0)
    told: dict[str, Any] = {"acknowledged": [], "refused": [], "failed": []}
    for kind, what in heard:
        told[kind].append(what.strip())
    return told | {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None}


def carry_out(url: str, plans: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Carry out plans, each in a process of its own, and return what each told."""
    lines = "\n".join(json.dumps(plan) for plan in plans)
    command = [sys.executable, str(Path(__file__)), url]
    done = subprocess.run(command, input=lines, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(_run(sys.argv[1], json.loads(line))), flush=True)
