"""Whom the server runs as, and how to run its programs as that account."""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kitrocket.errors import EmbeddedServerError

# Nothing is inherited: locale, PG* variables and HOME of the caller have no say in how the server runs.
_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}


@dataclass(frozen=True)
class Account:
    """The account that owns the data and the server's processes: ourselves, unless we are root."""

    name: str
    uid: int
    gid: int

    def run(
        self, command: Sequence[str | Path], text: str = "", *, seconds: float | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, with ``text`` as its standard input, for at most so many seconds."""
        user, group, extra_groups = self._switch
        return subprocess.run(
            command,
            input=text,
            timeout=seconds,
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

    def launch(self, command: Sequence[str | Path], *, log: int, inherited: int) -> int:
        """Start a program as nobody's child, printing to ``log`` and keeping one more descriptor; return its id."""
        user, group, extra_groups = self._switch
        started = subprocess.run(
            ["/bin/sh", "-c", '"$@" >&2 & echo $!', "sh", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd="/",
            env=_ENVIRONMENT,
            umask=0o077,
            start_new_session=True,  # Ctrl-C is for the application, not for the server
            pass_fds=(inherited,),
            check=True,
            user=user,
            group=group,
            extra_groups=extra_groups,
        )
        return int(started.stdout)

    def can_enter(self, folder: Path) -> bool:
        """Whether every folder down to this one lets the account pass."""
        return self.run(["/bin/sh", "-c", 'cd -- "$1"', "sh", folder]).returncode == 0

    @property
    def _switch(self) -> tuple[int, int, list[int]] | tuple[None, None, None]:
        return (self.uid, self.gid, []) if os.geteuid() == 0 else (None, None, None)


def server_account(wanted: str | None) -> Account:
    """Choose the account: ourselves, or for root the wanted one, else ``postgres``, else ``nobody``."""
    uid, gid = os.geteuid(), os.getegid()
    if uid != 0:
        try:
            return Account(pwd.getpwuid(uid).pw_name, uid, gid)
        except KeyError:
            raise EmbeddedServerError(
                f"the user id {uid} has no name on this machine, and PostgreSQL's initdb refuses to run without; "
                f"run as a user that /etc/passwd lists, or add a line to it when the image is built: "
                f"echo 'app:x:{uid}:{gid}::/:/usr/sbin/nologin' >> /etc/passwd"
            ) from None
    for name in (wanted,) if wanted else ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            if entry.pw_uid == 0:
                raise EmbeddedServerError(f"PostgreSQL refuses to run as root, which {name} is; {_CURE}")
            return Account(name, entry.pw_uid, entry.pw_gid)
    raise EmbeddedServerError(
        f"PostgreSQL refuses to run as root, and there is no account {wanted or 'postgres or nobody'}; {_CURE}"
    )


def user_name(uid: int) -> str:
    """What to call a user in a message."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"the user id {uid}"


_CURE = "name an existing unprivileged one with KITROCKET_PG_ACCOUNT"
