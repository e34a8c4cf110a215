"""The Piccolo app of what Better Auth wants: ``"kitrocket.better_auth.piccolo_app"``.

It stands beside ``"kitrocket.piccolo_app"`` and has no table classes: the columns are for Better Auth alone.
"""

from __future__ import annotations

from pathlib import Path

from piccolo.conf.apps import AppConfig

from kitrocket.better_auth import APP

APP_CONFIG = AppConfig(
    app_name=APP,
    migrations_folder_path=str(Path(__file__).resolve().parent / "piccolo_migrations"),
    table_classes=[],
    migration_dependencies=["kitrocket.piccolo_app"],
)
