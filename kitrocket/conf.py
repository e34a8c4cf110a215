"""The ``piccolo_conf`` of a process whose application has none: the database of the environment's settings."""

from __future__ import annotations

from piccolo.conf.apps import AppRegistry

from kitrocket.engine import Engine

DB = Engine()

APP_REGISTRY = AppRegistry(apps=["kitrocket.piccolo_app"])
