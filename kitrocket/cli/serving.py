"""``kitrocket serve``, ``kitrocket studio`` and ``kitrocket demo``."""

from __future__ import annotations

import logging
import sys
import warnings
from functools import partial
from typing import Annotated

import typer

from kitrocket.cli.running import opened, out, remarks, run
from kitrocket.errors import MissingExtraError
from kitrocket.kit import KitRocket

_LOOPBACK = ("127.0.0.1", "::1", "localhost")

Host = Annotated[str, typer.Option(help="The address to listen on.")]


def serve(
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    studio: Annotated[
        bool | None, typer.Option(help="With the Studio at /admin/; by default when it is installed.")
    ] = None,
    background: Annotated[bool, typer.Option(help="Run the background work.")] = True,
) -> None:
    """Serve webhooks, health and the Studio, with the background work, until SIGTERM."""
    from kitrocket import server

    _log()
    with_studio = _has_studio() if studio is None else studio
    kit = KitRocket(background=background)
    app = server.create_app(kit, studio=with_studio)
    listener = server.listen(host, port)
    address = _address(host, listener.getsockname()[1])

    def say() -> None:
        out.print(f"webhooks  {address}/webhooks/dodo")
        out.print(f"health    {address}/healthz  {address}/readyz")
        if with_studio:
            out.print(f"Studio    {address}/admin/  (kitrocket studio makes the first login)")

    if with_studio:
        _quiet(host)
    run(partial(server.serve, app, listener, on_started=say), loop_factory=server.loop_factory())


def studio(
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 0,
    login: Annotated[str | None, typer.Option(help="Make this login, or give it a new password.")] = None,
) -> None:
    """Open the Studio: make the first login, say how to get in, and serve until Ctrl-C."""
    from kitrocket import server
    from kitrocket.admin import create_staff, has_staff, migrate_studio

    _log(logging.ERROR)
    _quiet(host)

    async def work() -> None:
        listener = server.listen(host, port)
        address = _address(host, listener.getsockname()[1])
        async with opened() as kit:
            await migrate_studio(kit.engine)
            name = login or (None if await has_staff(kit.engine) else "admin")
            password = await create_staff(kit.engine, name) if name is not None else None

            def say() -> None:
                out.print(f"Studio    {address}/admin/")
                if password is None:
                    out.print("          log in as before; --login NAME makes a login, or a new password for one")
                else:
                    out.print(f"          log in as {name} with the password {password} (shown this once)")
                out.print("          Ctrl-C stops it.")

            app = server.create_app(kit, studio=True)
            await server.serve(app, listener, on_started=say, log_level="warning")

    run(work, loop_factory=server.loop_factory())


def demo(
    serve: Annotated[bool, typer.Option(help="Keep serving afterwards, with the Studio open to look at.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 0,
) -> None:
    """Run the main job on real input, on an embedded PostgreSQL, and print a summary."""
    if serve:
        _quiet("127.0.0.1")
    from kitrocket.demo import run_demo
    from kitrocket.server import loop_factory

    sys.exit(run(partial(run_demo, serve=serve, port=port), loop_factory=loop_factory()))


def _has_studio() -> bool:
    try:
        import kitrocket.admin  # noqa: F401
    except MissingExtraError as error:
        remarks.print(f"without the Studio: {error}")
        return False
    return True


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log(level: int = logging.INFO) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("kitrocket").setLevel(level)


def _quiet(host: str) -> None:
    if host in _LOOPBACK:
        # Piccolo asks for https at each login, which nobody needs on the loopback interface.
        warnings.filterwarnings("ignore", message="If running sessions in production")
