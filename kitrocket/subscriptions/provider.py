"""Ask the provider, through its own SDK: slowly enough, and again when that makes sense. The extra is ``dodo``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio
from pydantic import SecretStr

from kitrocket.dodo.client import dodopayments, make_client, retry_after
from kitrocket.errors import ProviderError

T = TypeVar("T")

#: The largest page that the provider gives.
PAGE_SIZE = 100
_ATTEMPTS = 6
#: The first pause after a failure, in seconds; each is twice as long as the one before.
_FIRST_PAUSE = 0.5
#: The longest Retry-After that is waited for; a longer one ends the request, for nobody asks earlier.
_LONGEST_WAIT = timedelta(minutes=10)


class Provider:
    """DodoPayments, asked at most ``requests_per_second`` times a second; each may take ``timeout``. ``async with`` it.

    Every method raises :class:`ProviderError` once trying again makes no sense.
    """

    def __init__(
        self,
        *,
        api_key: str | SecretStr,
        base_url: str | SecretStr | None = None,
        requests_per_second: float = 10.0,
        timeout: timedelta = timedelta(seconds=20),
    ) -> None:
        self._client = make_client(api_key=api_key, base_url=base_url, timeout_seconds=timeout.total_seconds())
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
        try:
            page = await self._ask(
                lambda: self._client.subscriptions.list(page_number=number, page_size=PAGE_SIZE, created_at_lte=until)
            )
        except AttributeError as error:
            # What the SDK makes of a page that is not the provider's.
            raise ProviderError(None) from error
        return [_told(item) for item in page.items]

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
        return _told(found)

    async def _ask(self, request: Callable[[], Awaitable[T]]) -> T:
        pause = _FIRST_PAUSE
        for attempt in range(1, _ATTEMPTS + 1):
            await self._wait_for_turn()
            try:
                return await request()
            except dodopayments.APIStatusError as error:
                if attempt == _ATTEMPTS or (error.status_code < 500 and error.status_code not in (408, 409, 429)):
                    raise ProviderError(error.status_code) from error
                wanted = retry_after(error.response.headers)
                if wanted is not None and wanted > _LONGEST_WAIT.total_seconds():
                    raise ProviderError(error.status_code) from error
                await anyio.sleep(pause if wanted is None else wanted)
            except dodopayments.APIConnectionError as error:
                if attempt == _ATTEMPTS:
                    raise ProviderError(None) from error
                await anyio.sleep(pause)
            except dodopayments.DodoPaymentsError as error:
                raise ProviderError(None) from error
            pause *= 2
        raise AssertionError("the last attempt returns or raises")

    async def _wait_for_turn(self) -> None:
        now = anyio.current_time()
        turn = max(self._free_at, now)
        self._free_at = turn + self._interval
        self.requests += 1
        await anyio.sleep(turn - now)


def _told(answer: object) -> dict[str, Any]:
    # From a server that is not the provider the SDK hands over the text of its page.
    if not isinstance(answer, dodopayments.BaseModel):
        raise ProviderError(None)
    return answer.to_dict(mode="json")
