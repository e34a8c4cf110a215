"""What a form of the Studio may do to a row: hooks that keep what the form cannot show, and checks that refuse.

Piccolo Admin sends the whole form on SAVE, with secret columns empty and times cut to whole seconds. Only what the
person changed is written here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

from piccolo.columns import Column
from piccolo.table import Table
from piccolo_api.crud.hooks import Hook, HookType
from piccolo_api.crud.validators import Validators
from starlette.exceptions import HTTPException
from starlette.requests import Request

from kitrocket.admin.door import refusal
from kitrocket.clock import Clock, to_db
from kitrocket.errors import InvalidInputError
from kitrocket.inputs import email

Values = dict[Column, Any]
#: What takes the place of Piccolo's DELETE: the service's own.
Deletion = Callable[[str], Awaitable[object]]


def hooks(table: type[Table], clock: Clock, delete: Deletion | None = None) -> list[Hook]:
    """Return the hooks of a table: before a row is added, before it is changed and, with ``delete``, before it goes."""

    def before_adding(row: Table) -> Table:
        for column in table._meta.columns:
            name = column._meta.name
            setattr(row, name, _cleaned(column, getattr(row, name)))
            if name in ("created_at", "updated_at") and getattr(row, name) is None:
                setattr(row, name, to_db(clock()))
        return row

    async def before_changing(row_id: object, values: Values) -> Values:
        sent = {
            column: _cleaned(column, value)
            for column, value in values.items()
            if not column._meta.primary_key and column._meta.name != "created_at"
        }
        sent = {column: value for column, value in sent.items() if not (column._meta.secret and value is None)}
        primary_key = table._meta.primary_key
        stored = await table.select(*sent, primary_key).where(primary_key == row_id).first().run() or {}
        changed = {
            column: value for column, value in sent.items() if not _is_shown(stored.get(column._meta.name), value)
        }
        if not changed:
            # Piccolo's UPDATE wants a column.
            return {primary_key: row_id}
        for column in table._meta.columns:
            if column._meta.name == "updated_at":
                changed.setdefault(column, to_db(clock()))
        return changed

    found = [Hook(HookType.pre_save, before_adding), Hook(HookType.pre_patch, before_changing)]
    if delete is not None:

        async def before_deleting(row_id: str) -> None:
            await delete(row_id)

        found.append(Hook(HookType.pre_delete, before_deleting))
    return found


def _cleaned(column: Column, value: Any) -> Any:
    """Return a form's value as the column stores it. Raises a 422 for a secret, which only the services may write."""
    if column._meta.secret:
        if value not in (None, ""):
            raise refusal(column._meta.name, "it is a secret, which the Studio does not write; leave it empty")
        return None
    if isinstance(value, datetime) and value.tzinfo is not None:
        try:
            return to_db(value)
        except OverflowError:
            raise refusal(column._meta.name, "expected a time from year 1 to 9999, in UTC") from None
    if column._meta.name == "email" and value is not None:
        try:
            return email("email", value)
        except InvalidInputError as error:
            raise refusal("email", f"{error.problem}; expected {error.expected}") from None
    return value


def _is_shown(stored: object, sent: object) -> bool:
    """Whether a form's value is how the form shows the stored one: a time without its fraction, NULL as empty text."""
    if isinstance(stored, datetime) and isinstance(sent, datetime):
        return sent in (
            stored,
            stored.replace(microsecond=stored.microsecond // 1000 * 1000),
            stored.replace(microsecond=0),
        )
    return stored == sent or (stored is None and sent == "")


def validators(*, read_only: bool) -> Validators:
    """Return the checks of a table: no PUT, no ordering or selecting by secrets and, read-only, nothing but GET."""
    refusals = [_refuse_put, _refuse_secret_columns]
    if read_only:
        refusals.append(_refuse_writing)
    return Validators(every=[*refusals])


def _refuse_put(piccolo_crud: Any, request: Request) -> None:
    if request.method == "PUT":
        raise HTTPException(405, "PUT would write every column, secrets included; use PATCH.")


def _refuse_writing(piccolo_crud: Any, request: Request) -> None:
    if request.method not in ("GET", "HEAD"):
        raise HTTPException(405, "This table is read-only here; KITROCKET_STUDIO_ALLOW_WRITES=1 allows writing.")


def _refuse_secret_columns(piccolo_crud: Any, request: Request) -> None:
    open_columns = {column._meta.name for column in piccolo_crud.table._meta.columns if not column._meta.secret}
    for name, value in request.query_params.multi_items():
        if name.removesuffix("[]") in ("__order", "__visible_fields"):
            for column in value.split(","):
                if column.removeprefix("-") not in open_columns:
                    raise HTTPException(400, f"{name.removesuffix('[]')} takes columns that are shown.")
        if name == "__range_header_name" and not value.isidentifier():
            raise HTTPException(400, "__range_header_name becomes a header: expected a word.")
