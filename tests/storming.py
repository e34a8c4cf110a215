"""Deliver a file of webhooks with many workers in a process of its own: ``python storming.py URL FILE WORKERS``.

Prints one line of JSON: how often each outcome and each error came, and how long each delivery took, in seconds.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import anyio

from kitrocket.dodo.signature import sign
from kitrocket.engine import Engine
from kitrocket.subscriptions import SubscriptionService
from simulating import NOW, PRODUCTS

KEY = "whsec_" + base64.b64encode(b"s" * 32).decode()


def service_of(engine: Engine) -> SubscriptionService:
    return SubscriptionService(engine, clock=lambda: NOW, webhook_keys=[KEY], products=PRODUCTS)


async def deliver_all(
    service: SubscriptionService, deliveries: Sequence[tuple[str, bytes]], *, workers: int
) -> tuple[Counter[str], list[float]]:
    """Deliver everything with so many workers; count outcomes and errors, and time each delivery."""
    counts: Counter[str] = Counter()
    durations: list[float] = []
    waiting = iter(deliveries)

    async def work() -> None:
        for webhook_id, body in waiting:
            headers = sign(body, key=KEY, webhook_id=webhook_id, at=NOW)
            started = time.perf_counter()
            try:
                counts[(await service.receive(body, headers)).outcome] += 1
            except Exception as error:  # noqa: BLE001 - the test counts every one of them
                counts[f"error {type(error).__name__}: {error}"] += 1
            durations.append(time.perf_counter() - started)

    async with anyio.create_task_group() as group:
        for _ in range(workers):
            group.start_soon(work)
    return counts, durations


def storm(
    url: str, folder: Path, deliveries: Sequence[tuple[str, bytes]], *, processes: int = 2, workers: int = 8
) -> tuple[Counter[str], list[float]]:
    """Deliver everything from several processes at once, and return what :func:`deliver_all` does, put together."""
    running = []
    for number in range(processes):
        file = folder / f"deliveries_{number}.jsonl"
        lines = [json.dumps([id, body.decode()]) for id, body in deliveries[number::processes]]
        file.write_text("\n".join(lines), encoding="utf-8")
        command = [sys.executable, __file__, url, str(file), str(workers)]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    counts: Counter[str] = Counter()
    durations: list[float] = []
    for process in running:
        answer, _ = process.communicate()
        assert process.returncode == 0
        found = json.loads(answer)
        counts.update(found["counts"])
        durations += found["durations"]
    return counts, durations


async def _main(url: str, file: str, workers: int) -> None:
    lines = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    deliveries = [(webhook_id, body.encode()) for webhook_id, body in lines]
    async with Engine(url, pool_size=workers) as engine:
        counts, durations = await deliver_all(service_of(engine), deliveries, workers=workers)
    print(json.dumps({"counts": counts, "durations": durations}))


if __name__ == "__main__":
    anyio.run(_main, sys.argv[1], sys.argv[2], int(sys.argv[3]))
