"""What a login costs those beside it, and whether it tells who exists.

    python benchmarks/passwords.py

Prints how late the event loop wakes up while 8 logins run at once (median and worst), beside the same 8 hashes computed
on the loop itself; then the medians of interleaved logins of an unknown user and of a known one with a wrong password,
and their ratio, which should be 1.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import anyio
import anyio.lowlevel

from kitrocket.embedded import EmbeddedServer
from kitrocket.engine import Engine
from kitrocket.migrations import migrate
from kitrocket.passwords import PasswordScheme, hash_password
from kitrocket.users import UserService

LOGINS = 8
ROUNDS = 30
TICK = 0.001


async def lateness(work: Callable[[], Awaitable[object]]) -> list[float]:
    """Return by how many seconds each tick of the loop was late while ``work`` ran."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            due = perf_counter() + TICK
            await asyncio.sleep(TICK)
            late.append(perf_counter() - due)

    async with anyio.create_task_group() as group:
        group.start_soon(tick)
        await anyio.sleep(10 * TICK)
        await work()
        await anyio.sleep(10 * TICK)
        group.cancel_scope.cancel()
    return late


async def measure(users: UserService, scheme: PasswordScheme) -> None:
    """Print the figures."""
    await users.create(email="ada@example.com", name="Ada", password="correct horse")

    async def login(email: str = "ada@example.com", password: str = "correct horse") -> float:
        began = perf_counter()
        await users.authenticate(email=email, password=password)
        return perf_counter() - began

    async def logins() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(LOGINS):
                group.start_soon(login)

    async def on_the_loop() -> None:
        for _ in range(LOGINS):
            hash_password("correct horse", scheme)
            await anyio.lowlevel.checkpoint()

    await login()
    for name, work in (("in worker threads", logins), ("on the loop itself", on_the_loop)):
        late = await lateness(work)
        worst, middle = max(late) * 1e3, median(late) * 1e3
        print(f"{LOGINS} logins {name}: loop late by {middle:.2f} ms (median), {worst:.1f} ms (worst)")

    unknown, wrong = [], []
    for _ in range(ROUNDS):
        unknown.append(await login(email="nobody@example.com"))
        wrong.append(await login(password="wrong horse"))
    print(
        f"unknown user {median(unknown) * 1e3:.1f} ms, wrong password {median(wrong) * 1e3:.1f} ms: "
        f"ratio {median(unknown) / median(wrong):.2f}"
    )


async def main(folder: Path) -> None:
    async with Engine(embedded=EmbeddedServer(folder / "pg")) as engine:
        await migrate(engine)
        schemes: tuple[PasswordScheme, ...] = ("argon2id", "better-auth")
        for scheme in schemes:
            print(f"-- {scheme}")
            await engine.fetch("DELETE FROM users")
            await measure(UserService(engine, password_scheme=scheme), scheme)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        # The embedded server may run under another account, which has to get here.
        Path(name).chmod(0o755)
        asyncio.run(main(Path(name)))
