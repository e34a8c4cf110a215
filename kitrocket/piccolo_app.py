"""The Piccolo app: ``"kitrocket.piccolo_app"`` in an application's ``APP_REGISTRY``."""

from __future__ import annotations

from pathlib import Path

from piccolo.conf.apps import AppConfig

from kitrocket.tables import OWN_TABLES, SEED_TABLES

APP_CONFIG = AppConfig(
    app_name="kitrocket",
    migrations_folder_path=str(Path(__file__).resolve().parent / "piccolo_migrations"),
    table_classes=[*SEED_TABLES, *OWN_TABLES],
    migration_dependencies=[],
)
