"""Locks that the kernel drops when their process dies, and the patience to wait for them."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

from kitrocket.embedded.place import Place
from kitrocket.errors import EmbeddedServerError

_STALLED_SECONDS = 60.0
_serial = itertools.count(1)


def open_lock(path: Path) -> int:
    """Open a lock file, making it when it is missing."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def try_lock(lock: int) -> bool:
    """Take the lock if nobody has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def patience(place: Place, awaited: str) -> Iterator[None]:
    """Yield again and again with growing pauses, for as long as the server's log moves."""
    pause, size, since = 0.005, -1, time.monotonic()
    while True:
        yield
        time.sleep(pause)
        pause = min(pause * 1.5, 0.25)
        grown = place.log_size()
        if grown != size:
            size, since = grown, time.monotonic()
        elif time.monotonic() - since > _STALLED_SECONDS:
            raise EmbeddedServerError(f"waited {_STALLED_SECONDS:.0f} s in vain for {awaited}; see {place.log}")


@contextlib.contextmanager
def turn(place: Place) -> Iterator[None]:
    """Hold the lock that makes starts and stops follow one another, in this process and in others."""
    lock = open_lock(place.locks / "start")
    try:
        for _ in patience(place, "another process that is starting or stopping the server"):
            if try_lock(lock):
                break
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def server_lock(place: Place) -> Iterator[int]:
    """Hold the lock that every process of a running server has inherited."""
    lock = open_lock(place.locks / "server")
    try:
        for _ in patience(place, "the last processes of a killed server, or a server in another container,"):
            if try_lock(lock):
                break
        yield lock
    finally:
        os.close(lock)


def take_hold(place: Place) -> int:
    """Say that this process uses the server, until the returned descriptor is closed everywhere."""
    lock = open_lock(place.locks / f"holder-{os.getpid()}-{next(_serial)}")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def holders(place: Place) -> dict[int, Path]:
    """The processes that use the server and their lock files, without changing anything."""
    return {int(path.name.split("-")[1]): path for path in _holder_files(place) if _is_held(path)}


def sweep_holders(place: Place) -> None:
    """Remove what dead holders left behind. Only in one's turn: a file is made before it is locked."""
    for path in _holder_files(place):
        if not _is_held(path):
            path.unlink(missing_ok=True)


def _holder_files(place: Place) -> list[Path]:
    return sorted(place.locks.glob("holder-*"))


def _is_held(path: Path) -> bool:
    """Whether somebody holds this file. Asks for a shared lock, so that two who ask don't see each other."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
