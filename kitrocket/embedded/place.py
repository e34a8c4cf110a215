"""Where the data, the locks, the log and the socket lie."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from kitrocket.embedded.account import Account, user_name
from kitrocket.errors import EmbeddedServerError

#: What root's servers need and their account cannot reach elsewhere.
SHARED_DIR = Path("/var/lib/kitrocket")
_SOCKET_PARENTS = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - the folder made there is private and checked


@dataclass(frozen=True)
class Place:
    """The paths of one data folder. ``moved`` says why it is not where one would look, for people to read."""

    data_dir: Path
    socket_dir: Path
    moved: str = ""

    @property
    def locks(self) -> Path:
        """The folder of the lock files."""
        return self.data_dir.with_name(f"{self.data_dir.name}.locks")

    @property
    def log(self) -> Path:
        """What the server prints."""
        return self.data_dir.with_name(f"{self.data_dir.name}.log")

    def log_size(self) -> int:
        """The bytes that the server has printed."""
        with contextlib.suppress(FileNotFoundError):
            return self.log.stat().st_size
        return 0


def settle(wanted: Path | None, account: Account) -> Place:
    """Decide where the data lives: as wanted, in the working directory, or for root below ``/var/lib/kitrocket``."""
    project = Path.cwd() if wanted is None else wanted
    data_dir = Path(os.path.realpath(project / ".kitrocket" / "pg" if wanted is None else project))
    if "\n" in str(data_dir) or "\0" in str(data_dir):
        raise EmbeddedServerError(f"PostgreSQL cannot use a path with a line break in it: {str(data_dir)!r}")
    nearest = next(folder for folder in data_dir.parents if folder.is_dir())
    moved = ""
    if os.geteuid() == 0 and not account.can_enter(nearest):
        readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", os.path.realpath(project)).strip("-.")[-60:]
        data_dir = SHARED_DIR / f"{readable}-{_digest(data_dir)[:8]}" / "pg"
        moved = f" ({account.name} cannot enter {nearest}, which stays as it is)"
    elif wanted is None and not data_dir.exists() and not os.access(nearest, os.W_OK):
        raise EmbeddedServerError(f"{nearest} is not writable; say with KITROCKET_DATA_DIR where the data may live")
    parent = next((parent for parent in _SOCKET_PARENTS if os.access(parent, os.W_OK)), _SOCKET_PARENTS[0])
    return Place(data_dir, Path(parent) / f"kitrocket-{account.uid}-{_digest(data_dir)[:12]}", moved)


def make_folders(private: Path) -> None:
    """Make a folder for ourselves alone, and its missing parents such that the server's account can pass."""
    missing = [parent for parent in private.parents if not parent.exists()]
    for parent in reversed(missing):
        with contextlib.suppress(FileExistsError):
            parent.mkdir()
            if os.geteuid() == 0:
                parent.chmod(0o755)
    private.mkdir(mode=0o700, exist_ok=True)


def check_socket_dir(folder: Path, account: Account, *, create: bool = False) -> None:
    """Make sure that nobody but the account (and root) can put a socket into this folder."""
    if create:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(descriptor)
        mode = stat.S_IMODE(found.st_mode)
        if found.st_uid == os.geteuid() != account.uid and not mode & 0o077:
            os.fchown(descriptor, account.uid, account.gid)
        elif found.st_uid != account.uid or mode & 0o077:
            raise EmbeddedServerError(
                f"{folder} belongs to {user_name(found.st_uid)} with mode {mode:o}, and must belong to "
                f"{account.name} with mode 700; remove it and start again"
            )
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()
