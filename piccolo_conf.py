"""Piccolo's configuration for work on kitrocket itself. Applications have their own, or use ``kitrocket.conf``."""

from piccolo.conf.apps import AppRegistry

from kitrocket import Engine

DB = Engine()

APP_REGISTRY = AppRegistry(apps=["kitrocket.piccolo_app"])
