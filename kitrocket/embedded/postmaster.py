"""The server's process: which one it is, proven, and how to ask it to stop."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from kitrocket.embedded.locks import patience
from kitrocket.embedded.place import Place

#: No TCP port: only part of the socket's name.
PORT = 5432
_PROC = Path("/proc")
_CLOCK_TOLERANCE = 5  # seconds between the start that the kernel knows and the one that the server wrote down
_DEAD_PID = 2**31 - 1  # above every kernel's limit, so that no process ever has it


@dataclass(frozen=True)
class PidFile:
    """What ``postmaster.pid`` says, which proves nothing."""

    pid: int
    started: int
    socket_dir: Path | None
    ready: bool


def read_pid_file(place: Place) -> PidFile | None:
    """Read ``postmaster.pid``; ``None`` when there is none, or not a whole one."""
    try:
        lines = (place.data_dir / "postmaster.pid").read_text("utf-8", "surrogateescape").split("\n")
        socket_dir = lines[4] if len(lines) > 5 else ""  # a line without its end is still being written
        ready = len(lines) > 8 and lines[7].strip() == "ready"
        return PidFile(int(lines[0]), int(lines[2]), Path(socket_dir) if socket_dir else None, ready)
    except (FileNotFoundError, NotADirectoryError, ValueError, IndexError):
        return None


def address_dir(place: Place) -> Path:
    """The folder that the running server says its socket is in, else the one that the next server will use."""
    written = read_pid_file(place)
    return written.socket_dir if written is not None and written.socket_dir is not None else place.socket_dir


def find(place: Place) -> int | None:
    """The verified postmaster of this data folder, or ``None``."""
    written = read_pid_file(place)
    if written is not None and _is_server(written.pid, place, written.started):
        return written.pid
    # Nothing fits when the data folder was deleted under a running server, or the machine's clock was set since.
    listener = _listener(address_dir(place))
    return listener if listener is not None and _is_server(listener, place, None) else None


def interrupt(pid: int, place: Place) -> None:
    """Ask the verified server for a fast shutdown and wait until it is gone."""
    if sys.platform == "linux":
        handle = os.pidfd_open(pid)  # from here on the number cannot come to mean another process
        try:
            if find(place) == pid:
                signal.pidfd_send_signal(handle, signal.SIGINT)
        finally:
            os.close(handle)
    else:
        os.kill(pid, signal.SIGINT)
    for _ in patience(place, "the server to stop"):
        if not is_alive(pid):
            break
    remove_socket_dir(place)


def remove_socket_dir(place: Place) -> None:
    """Remove the folder of the socket, unless something is in it."""
    with contextlib.suppress(OSError):
        place.socket_dir.rmdir()


def clear_leftovers(place: Place) -> None:
    """Take away what would make ``postgres`` mistake another process for the server that was killed here.

    Only for who holds the server's lock: then no process of that server is left.
    """
    for name in (f".s.PGSQL.{PORT}", f".s.PGSQL.{PORT}.lock"):
        (place.socket_dir / name).unlink(missing_ok=True)
    path = place.data_dir / "postmaster.pid"
    written = read_pid_file(place)
    if written is None:
        path.unlink(missing_ok=True)  # cut short by a crash of the machine; postgres would refuse it
    elif is_alive(written.pid, or_zombie=True):
        # Only the number goes: postgres still checks the shared memory that the file names.
        rest = path.read_bytes().partition(b"\n")[2]
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
        try:
            os.pwrite(descriptor, str(_DEAD_PID).encode() + b"\n" + rest, 0)
        finally:
            os.close(descriptor)


def is_alive(pid: int, *, or_zombie: bool = False) -> bool:
    """Whether a process has this number; a zombie is dead unless asked for."""
    with contextlib.suppress(OSError):
        state = _stat_fields(pid)[0]
        return or_zombie or state not in "ZX"
    if (_PROC / "self" / "stat").exists():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_server(pid: int, place: Place, started: int | None) -> bool:
    """Whether this process is the postmaster of our data folder: executable, owner, ``-D`` and start must fit."""
    if not (_PROC / "self" / "stat").exists():  # macOS: the kernel's word on who listens in our private folder
        return _listener(address_dir(place)) == pid
    process = _PROC / str(pid)
    try:
        fields = _stat_fields(pid)
        executable = os.readlink(process / "exe").removesuffix(" (deleted)")
        arguments = (process / "cmdline").read_bytes().split(b"\0")
        owner = process.stat().st_uid
    except OSError:
        return False
    with contextlib.suppress(FileNotFoundError):
        if place.data_dir.stat().st_uid != owner:
            return False
    folders = [os.path.realpath(os.fsdecode(value)) for name, value in itertools.pairwise(arguments) if name == b"-D"]
    if os.path.basename(executable) != "postgres" or fields[0] in "ZX" or str(place.data_dir) not in folders:
        return False
    return started is None or abs(_started(int(fields[19])) - started) <= _CLOCK_TOLERANCE


def _stat_fields(pid: int) -> list[str]:
    """The fields of ``/proc/<pid>/stat`` that follow the name: the state is 0, the start 19."""
    return (_PROC / str(pid) / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()


def _started(ticks: int) -> float:
    """When a process started, in seconds since 1970, from the kernel's clock ticks since boot."""
    boot = re.search(r"^btime (\d+)", (_PROC / "stat").read_text("ascii"), re.MULTILINE)
    return (int(boot[1]) if boot else 0) + ticks / os.sysconf("SC_CLK_TCK")


def _listener(folder: Path) -> int | None:
    """The process that listens on the socket in this folder, by the kernel's word."""
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.settimeout(1)
        probe.connect(str(folder / f".s.PGSQL.{PORT}"))
        if sys.platform == "darwin":
            told = probe.getsockopt(0, 2, 4)  # SOL_LOCAL, LOCAL_PEERPID
        else:
            told = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)  # process, user, group
        return int.from_bytes(told[:4], sys.byteorder)
    return None
