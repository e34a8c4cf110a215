"""The Studio: Piccolo Admin over the five tables and kitrocket's own, with logins of its own.

The extra is ``pip install "kitrocket[admin]"``.
"""

from __future__ import annotations

from kitrocket.errors import MissingExtraError

try:
    import piccolo_admin  # noqa: F401
except ImportError as error:
    raise MissingExtraError("the Studio", "admin") from error

from kitrocket.admin.migrations import migrate_studio
from kitrocket.admin.studio import create_staff, create_studio, has_staff

__all__ = ["create_staff", "create_studio", "has_staff", "migrate_studio"]
