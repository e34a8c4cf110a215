"""The Piccolo app of the Studio's login tables: ``"kitrocket.admin.piccolo_app"``.

``kitrocket studio`` and ``kitrocket serve`` migrate it by themselves; an application that mounts the Studio may add it
to its ``APP_REGISTRY`` instead.
"""

from __future__ import annotations

from pathlib import Path

from piccolo.conf.apps import AppConfig

from kitrocket.admin.tables import StudioSessions, StudioStaff

APP_CONFIG = AppConfig(
    app_name="kitrocket_admin",
    migrations_folder_path=str(Path(__file__).resolve().parent / "piccolo_migrations"),
    table_classes=[StudioStaff, StudioSessions],
    migration_dependencies=[],
)
