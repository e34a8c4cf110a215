"""What ``kitrocket demo`` runs: the main job on real input, with every figure checked.

A real PostgreSQL in a data folder of the demo's own, the real HTTP server on the loopback interface, signed webhooks,
sessions, usage. Every run begins on a new database and drops those of earlier runs that nobody uses any more.
"""

from __future__ import annotations

from kitrocket.demo.run import run_demo

__all__ = ["run_demo"]
