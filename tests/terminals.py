"""Commands on a terminal, as a person sees them."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import anyio

# A run in the background has its children ignore Ctrl-C, which no terminal does.
COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from kitrocket.cli import main
main()
"""


class Terminal:
    """A command that believes it is on a terminal."""

    def __init__(self, *arguments: str, url: str, **environment: str) -> None:
        self._screen, far = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            env=os.environ | {"DATABASE_URL": url, "TERM": "xterm", "COLUMNS": "120"} | environment,
            stdout=far,
            stderr=far,
        )
        os.close(far)

    async def ended(self) -> tuple[int, str]:
        """The exit code, and everything that was on the screen, without colours."""
        return await anyio.to_thread.run_sync(self._read)

    def _read(self) -> tuple[int, str]:
        shown = b""
        try:
            while part := os.read(self._screen, 65_536):
                shown += part
        except OSError:  # how Linux says that nobody writes to it any more
            pass
        os.close(self._screen)
        return self.process.wait(timeout=60), re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", shown.decode())
