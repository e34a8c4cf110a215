"""Run a command with KITROCKET_TEST_DSN naming a throw-away PostgreSQL of Debian's, and stop that afterwards.

python scripts/with_postgres.py -- pytest             Debian's PostgreSQL 15
python scripts/with_postgres.py --pooler -- pytest    the embedded one behind PgBouncer, transaction mode, 3 connections
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import anyio

from kitrocket.embedded import Address, EmbeddedServer

DEBIAN = Path("/usr/lib/postgresql/15/bin")
PGBOUNCER = Path("/usr/sbin/pgbouncer")

CONFIGURATION = """
[databases]
* = host={host} port={port} user={user}

[pgbouncer]
pool_mode = transaction
default_pool_size = 3
max_client_conn = 1000
auth_type = any
listen_addr =
unix_socket_dir = {folder}
listen_port = 6543
logfile = {folder}/log
pidfile = {folder}/pid
"""


def main(arguments: list[str]) -> int:
    separator = arguments.index("--")
    pooled = "--pooler" in arguments[:separator]
    needed = PGBOUNCER if pooled else DEBIAN / "postgres"
    if not needed.exists():
        package = "pgbouncer" if pooled else "postgresql-15"
        print(f"{needed} is not here. Type:\n\n    sudo apt-get install {package}\n", file=sys.stderr)
        return 1
    folder = Path(tempfile.mkdtemp(prefix="kitrocket-with-"))
    folder.chmod(0o755)
    server = EmbeddedServer(
        folder / "pg", bin_dir=None if pooled else DEBIAN, fsync=False, options={"max_connections": "300"}
    )
    try:
        address = server.start()
        environment = os.environ | {"KITROCKET_TEST_DSN": dsn(address.user, address.host, address.port)}
        if not pooled:
            return subprocess.run(arguments[separator + 1 :], env=environment).returncode
        with pgbouncer(address, folder / "bouncer") as pooler:
            environment["KITROCKET_TEST_POOLER_DSN"] = pooler
            return subprocess.run(arguments[separator + 1 :], env=environment).returncode
    finally:
        server.release()
        shutil.rmtree(folder)


def dsn(user: str, host: str, port: int) -> str:
    return f"postgres:///?host={quote(host, safe='')}&port={port}&user={user}"


@contextmanager
def pgbouncer(address: Address, folder: Path) -> Iterator[str]:
    """PgBouncer before a server; it refuses to run as root, so root starts it as ``postgres``."""
    folder.mkdir()
    configuration = folder / "pgbouncer.ini"
    configuration.write_text(
        CONFIGURATION.format(host=address.host, port=address.port, user=address.user, folder=folder)
    )
    command = [str(PGBOUNCER), str(configuration)]
    account = None
    if os.geteuid() == 0:
        account = "postgres"
        shutil.chown(folder, account)
    process = subprocess.Popen(command, user=account, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        anyio.run(wait_until_there, folder / ".s.PGSQL.6543", process)
        yield dsn(address.user, str(folder), 6543)
    finally:
        process.terminate()
        process.wait()


async def wait_until_there(socket: Path, process: subprocess.Popen[bytes]) -> None:
    with anyio.fail_after(10):
        while not socket.exists():
            if process.poll() is not None:
                raise SystemExit("pgbouncer did not start; its log says why")
            await anyio.sleep(0.05)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
