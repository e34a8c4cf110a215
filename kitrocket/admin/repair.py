"""The Studio's forms for whoever is on call: send a stored webhook again, retry what waits, ask the provider."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine
from functools import wraps
from typing import TypeVar

from piccolo_admin.endpoints import FormConfig
from pydantic import BaseModel, Field
from starlette.requests import Request

from kitrocket.errors import KitRocketError
from kitrocket.kit import KitRocket

logger = logging.getLogger("kitrocket")

GROUP = "Webhooks"
#: How many differences an answer names.
_NAMED = 20

M = TypeVar("M", bound=BaseModel)


class Replay(BaseModel):
    """Which webhook to replay."""

    webhook_id: str = Field(title="Webhook id")
    tell_hooks: bool = Field(default=False, title="Tell the hooks once more")


class Retry(BaseModel):
    """Nothing to choose."""


class Reconcile(BaseModel):
    """Whether to write."""

    dry_run: bool = Field(default=True, title="Only say what differs")


def forms(kit: KitRocket) -> list[FormConfig]:
    """Return the forms. Each does what the command of its name does; the log says who asked for it."""

    async def replay(data: Replay) -> str:
        receipt = await kit.subscriptions.replay(data.webhook_id.strip(), hooks=data.tell_hooks)
        stored = await kit.subscriptions.get_webhook(receipt.webhook_id)
        waits = f" ({stored.reason})" if stored is not None and stored.reason else ""
        return f"{receipt.webhook_id}: {receipt.outcome}{waits}."

    async def retry(_data: Retry) -> str:
        result = await kit.subscriptions.retry_parked()
        return (
            f"Tried {result.tried}: {result.finished} finished, {result.dead} given up. "
            f"{result.reprojected} brought up to date."
        )

    async def reconcile(data: Reconcile) -> str:
        result = await kit.subscriptions.reconcile(dry_run=data.dry_run)
        named = [
            f"{one.subscription_id} {one.field}: {one.ours or 'none'} here, {one.theirs or 'none'} there."
            for one in result.differences[:_NAMED]
        ]
        more = len(result.differences) - len(named)
        return " ".join(
            [
                f"Compared {result.checked}: {len(result.differences)} differences, {result.changed} changed, "
                f"{result.raced} outrun by a webhook, {result.gone} unknown there, {result.failed} failed.",
                *named,
                *([f"And {more} more."] if more else []),
            ]
        )

    return [
        FormConfig(
            "Replay a webhook",
            Replay,
            _answering("a replay", replay),
            "Sends one stored webhook down the same path again, parked, dead or finished.",
            GROUP,
        ),
        FormConfig(
            "Retry parked webhooks",
            Retry,
            _answering("a retry", retry),
            "Tries what is due and what has got what it waited for, dead or not.",
            GROUP,
        ),
        FormConfig(
            "Reconcile with DodoPayments",
            Reconcile,
            _answering("a reconciliation", reconcile),
            "Compares every subscription with what DodoPayments says now.",
            GROUP,
        ),
    ]


def _answering(name: str, work: Callable[[M], Awaitable[str]]) -> Callable[[Request, M], Coroutine[None, None, str]]:
    """Return a form's handler. What is wrong is shown in words, which Piccolo Admin does with a ``ValueError``."""

    @wraps(work)
    async def handle(request: Request, data: M) -> str:
        try:
            answer = await work(data)
        except KitRocketError as error:
            raise ValueError(str(error)) from None
        logger.info("%s was asked for in the Studio by %s", name, request.user.user.username)
        return answer

    return handle
