"""The ``kitrocket`` command. The extra is ``pip install "kitrocket[cli]"``."""

from __future__ import annotations

import sys

from pydantic import ValidationError
from pydantic_settings import SettingsError

from kitrocket.errors import KitRocketError, MissingExtraError


def main() -> None:
    """Run the command line. What went wrong is one readable line on stderr and exit code 1, never a traceback."""
    try:
        try:
            from kitrocket.cli.app import app
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("typer", "rich"):
                raise
            raise MissingExtraError("the command line", "cli") from error
        app(prog_name="kitrocket")
    except (KitRocketError, SettingsError) as error:
        sys.exit(f"kitrocket: {error}")
    except ValidationError as error:
        # The settings are what pydantic reads here. An error's input is left out: it may be a secret.
        problems = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'settings'}: {one['msg']}" for one in error.errors())
        sys.exit(f"kitrocket: {error.title}: {problems}")
