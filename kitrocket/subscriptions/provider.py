"""Ask the provider, through its own SDK: slowly enough, and again when that makes sense. The extra is ``dodo``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio
from pydantic import SecretStr

from kitrocket.errors import MissingExtraError, ProviderError

try:
    import dodopayments
except ImportError as error:
    raise MissingExtraError("asking DodoPayments", "dodo") from error

T = TypeVar("T")

#: The largest page that the provider gives.
PAGE_SIZE = 100
_ATTEMPTS = 6
#: The first pause after a failure and the longest, in seconds; a Retry-After counts up to the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0
#: How long one request may take, in seconds.
_REQUEST_LIMIT = 20.0


class Provider:
    """DodoPayments, asked at most ``requests_per_second`` times a second. ``async with`` it.

    Every method raises :class:`ProviderError` once trying again makes no sense.
    """

    def __init__(
        self, *, api_key: str | SecretStr, base_url: str | None = None, requests_per_second: float = 10.0
    ) -> None:
        token = api_key.get_secret_value() if isinstance(api_key, SecretStr) else api_key
        self._client = dodopayments.AsyncDodoPayments(
            bearer_token=token, base_url=base_url, max_retries=0, timeout=_REQUEST_LIMIT
        )
        self._interval = 1 / requests_per_second
        self._free_at = 0.0
        #: How many requests were sent.
        self.requests = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self._client.close()

    async def page(self, number: int, until: datetime) -> list[dict[str, Any]]:
        """Return the page of subscriptions made before an instant; the first page is 0, and only the last is short.

        Not the SDK's own iterator, which goes from page 0 to page 2.
        """
        page = await self._ask(
            lambda: self._client.subscriptions.list(page_number=number, page_size=PAGE_SIZE, created_at_lte=until)
        )
        return [item.to_dict(mode="json") for item in page.items]

    async def subscription(self, subscription_id: str) -> dict[str, Any] | None:
        """Return a subscription, or ``None`` when the provider has none with this id."""
        return await self._one(lambda: self._client.subscriptions.retrieve(subscription_id))

    async def payment(self, payment_id: str) -> dict[str, Any] | None:
        """Return a payment, or ``None`` when the provider has none with this id."""
        return await self._one(lambda: self._client.payments.retrieve(payment_id))

    async def _one(self, request: Callable[[], Awaitable[Any]]) -> dict[str, Any] | None:
        try:
            found = await self._ask(request)
        except ProviderError as error:
            if isinstance(error.__cause__, dodopayments.NotFoundError):
                return None
            raise
        answer: dict[str, Any] = found.to_dict(mode="json")
        return answer

    async def _ask(self, request: Callable[[], Awaitable[T]]) -> T:
        pause = _FIRST_PAUSE
        for attempt in range(1, _ATTEMPTS + 1):
            await self._wait_for_turn()
            try:
                return await request()
            except dodopayments.APIStatusError as error:
                if attempt == _ATTEMPTS or (error.status_code < 500 and error.status_code not in (408, 409, 429)):
                    raise ProviderError(error.status_code) from error
                wanted = error.response.headers.get("retry-after", "")
                await anyio.sleep(min(float(wanted), _LONGEST_PAUSE) if wanted.isdecimal() else pause)
            except dodopayments.APIConnectionError as error:
                if attempt == _ATTEMPTS:
                    raise ProviderError(None) from error
                await anyio.sleep(pause)
            except dodopayments.DodoPaymentsError as error:
                raise ProviderError(None) from error
            pause = min(pause * 2, _LONGEST_PAUSE)
        raise AssertionError("the last attempt returns or raises")

    async def _wait_for_turn(self) -> None:
        now = anyio.current_time()
        turn = max(self._free_at, now)
        self._free_at = turn + self._interval
        self.requests += 1
        await anyio.sleep(turn - now)
