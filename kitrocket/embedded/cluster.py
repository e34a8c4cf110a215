"""The data folder: made whole or not at all, and refused when it is somebody else's or of another version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kitrocket.embedded.account import Account, user_name
from kitrocket.embedded.binaries import Binaries
from kitrocket.embedded.place import Place
from kitrocket.errors import EmbeddedServerError

#: The name of the superuser and of the database.
NAME = "kitrocket"
_LOCALE = "C" if sys.platform == "darwin" else "C.UTF-8"  # macOS has no C.UTF-8; the builtin provider collates anyway


def data_version(place: Place) -> str | None:
    """The major version of PostgreSQL that made the data; ``None`` where there is none yet."""
    try:
        return (place.data_dir / "PG_VERSION").read_text("ascii").strip()
    except FileNotFoundError:
        return None


def check_owner(place: Place, account: Account) -> None:
    """Refuse the data of another account."""
    try:
        owner = place.data_dir.stat().st_uid
    except FileNotFoundError:
        return
    if owner != account.uid and (os.geteuid() != 0 or data_version(place) is not None):
        raise EmbeddedServerError(
            f"{place.data_dir} belongs to {user_name(owner)}, and the server would run as {account.name}; use it as "
            f"{user_name(owner)}, give it to {account.name}, or choose another folder with KITROCKET_DATA_DIR"
        )


def check_version(place: Place, binaries: Binaries) -> None:
    """Refuse data that another major version made, and say how to move it."""
    version, (folder, major) = data_version(place), (binaries.folder, binaries.major)
    if version == str(major):
        return
    at = f"-h {place.socket_dir} -U {NAME}"
    raise EmbeddedServerError(
        f"{place.data_dir} was made by PostgreSQL {version}, and {folder} is PostgreSQL {major}. To move: start it "
        f"once more with KITROCKET_PG_BIN naming the bin folder of PostgreSQL {version}, and meanwhile run "
        f"`{folder}/pg_dump {at} -Fc -f kitrocket.dump {NAME}`; then move the folder away, start with "
        f"PostgreSQL {major}, and run `{folder}/pg_restore {at} -d {NAME} kitrocket.dump`"
    )


def initialise(place: Place, account: Account, binaries: Binaries, *, fsync: bool) -> None:
    """Make the data, with our database in it, in a folder of another name, and rename it when it is whole."""
    if place.data_dir.exists() and (os.path.ismount(place.data_dir) or any(place.data_dir.iterdir())):
        raise EmbeddedServerError(f"{place.data_dir} is neither a data folder nor an empty one; try a folder in it")
    parent, prefix = place.data_dir.parent, f"{place.data_dir.name}.new-"
    for left in [path for path in parent.iterdir() if path.name.startswith(prefix)]:
        shutil.rmtree(left, ignore_errors=True)  # of an initdb that was killed
    fresh = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        os.chown(fresh, account.uid, account.gid)
        options = ["--username", NAME, "--auth=trust", "--encoding=UTF8", f"--locale={_LOCALE}"]
        if binaries.major >= 17:  # older ones refuse it
            options += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        if not fsync:
            options.append("--no-sync")
        _check(account.run([binaries.folder / "initdb", "-D", fresh, *options]))
        single = ["--single", "-D", str(fresh), "-c", f"fsync={'on' if fsync else 'off'}", "postgres"]
        _check(account.run([binaries.folder / "postgres", *single], f"CREATE DATABASE {NAME}\n"))
        fresh.rename(place.data_dir)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    _sync(parent)


def _check(done: subprocess.CompletedProcess[str]) -> None:
    complaints = [line for line in done.stderr.splitlines() if re.search("error:|ERROR:|FATAL:|PANIC:", line)]
    if done.returncode or complaints:
        raise EmbeddedServerError(f"the data could not be made: {'; '.join(complaints) or done.stderr.strip()}")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
