"""The assembly: settings to services, one transaction for all, background work that starts and ends with the block."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from datetime import timedelta
from pathlib import Path

import anyio
import pytest

from factories import make_mirror, make_session, make_user
from kitrocket import Engine, KitRocket, SchemaNotMigratedError, Settings
from kitrocket.clock import to_db
from kitrocket.errors import DatabaseUnavailableError
from kitrocket.tables import Users
from kitrocket.testing import ManualClock
from servers import Server

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_construction_does_no_input_or_output_and_the_services_exist_at_once() -> None:
    kit = KitRocket(Settings(database_url="postgres://nobody@127.0.0.1:1/nowhere"))
    assert all([kit.users, kit.accounts, kit.sessions, kit.subscriptions, kit.usage])
    with pytest.raises(DatabaseUnavailableError):
        await kit.users.get("someone")


async def test_a_database_named_by_a_url_is_never_migrated_by_itself(empty_database_url: str) -> None:
    kit = KitRocket(Settings(database_url=empty_database_url))
    with pytest.raises(SchemaNotMigratedError, match="kitrocket db migrate"):
        async with kit:
            pass
    assert kit.engine.pool is None


async def test_the_engine_wins_over_a_url(engine: Engine) -> None:
    settings = Settings(database_url="postgres://nobody@127.0.0.1:1/nowhere")
    async with KitRocket(settings, engine=engine, background=False) as kit:
        assert kit.engine is engine
        assert await kit.users.get("nobody") is None
    assert engine.pool is not None, "it was opened by somebody else, who still uses it"


async def test_a_transaction_joins_services_and_piccolo_queries(engine: Engine) -> None:
    async with KitRocket(engine=engine, background=False) as kit:
        with pytest.raises(ZeroDivisionError):
            async with kit.transaction() as nothing:
                assert nothing is None
                user = await kit.users.create(email="ada@example.com", name="Ada")
                await kit.sessions.create(user.id)
                await kit.usage.record(user.id, tokens=5, model="m")
                await engine.run(Users.update({Users.name: "Eve"}).where(Users.id == user.id))
                assert (await kit.users.get(user.id)) is not None
                raise ZeroDivisionError
        assert await engine.fetchval("SELECT count(*)::int FROM users") == 0
        assert await engine.fetchval("SELECT count(*)::int FROM usage") == 0


async def test_two_kits_on_two_databases_live_in_one_process(server: Server, database: str, template: str) -> None:
    other_database = await server.direct.create(template=template)
    try:
        async with (
            KitRocket(engine=server.engine(database), background=False) as one,
            KitRocket(engine=server.engine(other_database), background=False) as other,
        ):
            user = await one.users.create(email="ada@example.com", name="Ada")
            issued = await one.sessions.create(user.id)
            assert await one.sessions.validate(issued.token) is not None
            assert await other.users.get(user.id) is None
            assert await other.sessions.validate(issued.token) is None
            assert await one.engine.run(Users.count()) == 1
            assert await other.engine.run(Users.count()) == 0
    finally:
        await server.direct.drop(other_database)


async def test_expired_sessions_are_swept_in_the_background(engine: Engine, clock: ManualClock) -> None:
    user_id = await make_user(engine)
    for _ in range(3):
        await make_session(engine, user_id, expires_at=clock.now - timedelta(seconds=1))
    await make_session(engine, user_id, expires_at=clock.now + timedelta(seconds=1))
    async with KitRocket(engine=engine, clock=clock):
        with anyio.fail_after(30):
            while await engine.fetchval("SELECT count(*)::int FROM sessions") > 1:
                await anyio.sleep(0.01)


@pytest.mark.parametrize("off", ["argument", "setting", "intervals"])
async def test_background_work_can_be_off(engine: Engine, clock: ManualClock, off: str) -> None:
    user_id = await make_user(engine)
    await make_session(engine, user_id, expires_at=clock.now - timedelta(days=1))
    never = timedelta(0)
    settings = (
        Settings(session_sweep_interval=never, webhook_retry_interval=never, usage_expire_interval=never)
        if off == "intervals"
        else Settings(background=off != "setting")
    )
    before = asyncio.all_tasks()
    async with KitRocket(settings, engine=engine, clock=clock, background=off != "argument"):
        if off == "intervals":
            await asyncio.wait([task for task in asyncio.all_tasks() - before if "Recorder" not in task.get_name()])
        assert [task for task in asyncio.all_tasks() - before if "Recorder" not in task.get_name()] == []
    assert await engine.fetchval("SELECT count(*)::int FROM sessions") == 1


async def test_what_time_alone_changes_is_written_in_the_background(
    engine: Engine, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    user_id = await make_user(engine)
    await make_mirror(engine, "sub_1", user_id=user_id)
    await engine.fetch(
        "UPDATE kitrocket.dodo_subscriptions"
        " SET cancel_at_next_billing_date = true, next_billing_date = $1, reproject_at = $1",
        to_db(clock.now),
    )
    async with KitRocket(engine=engine, clock=clock) as kit:
        with anyio.fail_after(30):
            while (shown := await kit.subscriptions.get(user_id)) is None:
                await anyio.sleep(0.01)
    assert shown.status == "cancelled"
    # Others in this process may have turned on what is only worth knowing.
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_leaving_the_block_leaves_no_task_and_may_be_done_by_another_task(engine: Engine) -> None:
    before = asyncio.all_tasks()
    kit = KitRocket(engine=engine)
    await asyncio.ensure_future(kit.__aenter__())
    assert asyncio.all_tasks() - before
    await asyncio.ensure_future(kit.__aexit__(None, None, None))
    assert asyncio.all_tasks() - before == set()


async def test_a_cancelled_block_is_left_properly(server: Server, database: str) -> None:
    engine = server.engine(database)
    before = asyncio.all_tasks()
    with anyio.move_on_after(0.05):
        async with KitRocket(engine=engine):
            await anyio.sleep_forever()
    assert engine.pool is None
    assert asyncio.all_tasks() - before == set()


async def test_a_failing_tick_never_cancels_the_block(
    engine: Engine, server: Server, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    await engine.fetch("ALTER TABLE sessions RENAME TO hidden")
    async with KitRocket(engine=engine):
        with anyio.fail_after(30):
            while "sweep sessions" not in caplog.text:
                await anyio.sleep(0.01)
        assert await engine.fetchval("SELECT 1") == 1


async def test_a_kit_opened_inside_a_transaction_does_its_work_outside_of_it(
    engine: Engine, clock: ManualClock
) -> None:
    user_id = await make_user(engine)
    await make_session(engine, user_id, expires_at=clock.now - timedelta(days=1))
    async with engine.transaction(), KitRocket(engine=engine, clock=clock):
        with anyio.fail_after(30):
            while await engine.fetchval("SELECT count(*)::int FROM sessions"):
                await anyio.sleep(0.01)


async def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, database_url: str) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("KITROCKET_BACKGROUND", "0")
    monkeypatch.setenv("KITROCKET_SESSION_TTL", "P3D")
    async with KitRocket() as kit:
        assert kit.settings.session_ttl == timedelta(days=3)
        user = await kit.users.create(email="ada@example.com", name="Ada")
        issued = await kit.sessions.create(user.id)
        assert issued.session.expires_at - issued.session.created_at == timedelta(days=3)
        assert "PICCOLO_CONF" in os.environ


WITHOUT_A_CONF = """
import asyncio, os, sys
from kitrocket import Engine, KitRocket, Settings
from kitrocket.tables import Users

async def main():
    one, other = (Settings(database_url=url, background=False) for url in sys.argv[1:])
    for _ in range(2):
        async with KitRocket(one) as kit, KitRocket(other) as second:
            try:
                async with kit.transaction():
                    user = await kit.users.create(email="ada@example.com", name="Ada")
                    await Users.update({Users.name: "Eve"}).where(Users.id == user.id)
                    assert (await kit.users.get(user.id)).name == "Eve"
                    raise ZeroDivisionError
            except ZeroDivisionError:
                pass
            assert await Users.count() == 0
            assert await second.users.get("nobody") is None

asyncio.run(main())
assert not os.path.exists(".kitrocket")
"""


async def test_without_a_piccolo_conf_plain_queries_run_on_the_open_kit(
    database_url: str, second_database: str, server: Server, tmp_path: Path
) -> None:
    ran = await anyio.run_process(
        [sys.executable, "-c", WITHOUT_A_CONF, database_url, server.url(second_database)],
        cwd=tmp_path,
        # Named, because the piccolo_conf of this repository can be imported from everywhere.
        env={name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
        | {"PICCOLO_CONF": "kitrocket.conf"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr.decode()
