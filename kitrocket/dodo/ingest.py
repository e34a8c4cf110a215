"""Usage events sent to DodoPayments by its own SDK. The extra is ``dodo``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import anyio
from pydantic import SecretStr

from kitrocket.dodo.client import dodopayments, make_client, retry_after
from kitrocket.errors import ProviderError

if TYPE_CHECKING:
    from dodopayments.types.event_input_param import EventInputParam

#: The most events that one call takes.
MOST_EVENTS = 1_000
#: How long one call may take in all, in seconds.
REQUEST_LIMIT = 20.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a call.

    ``taken``: the provider has every event of it, of which it may have known some before. ``refused``: something in it
    is wrong. ``later``: nobody knows, or not now; ``retry_after`` is what the provider asked for, in seconds.
    """

    kind: Literal["taken", "refused", "later"]
    status_code: int | None = None
    retry_after: float | None = None

    @property
    def reason(self) -> str:
        """Return the status in words, such as ``HTTP 422``."""
        return "no answer" if self.status_code is None else f"HTTP {self.status_code}"


class Ingest:
    """The provider's door for usage events. ``async with`` it."""

    def __init__(self, *, api_key: str | SecretStr, base_url: str | SecretStr | None = None) -> None:
        self._client = make_client(api_key=api_key, base_url=base_url, timeout_seconds=REQUEST_LIMIT)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self._client.close()

    async def send(self, events: Sequence[EventInputParam]) -> Answer:
        """Send at most 1,000 events in one call, once.

        Raises :class:`ProviderError` when the call can never succeed as things are, such as with a wrong key.
        """
        try:
            with anyio.fail_after(REQUEST_LIMIT):
                # As they are: the SDK would look at each value of each event, and block the event loop for 0.2 s.
                await self._client.usage_events.ingest(events=(), extra_body={"events": events})
        except (dodopayments.APIConnectionError, TimeoutError):
            return Answer("later")
        except dodopayments.APIStatusError as error:
            status = error.status_code
            if status in (400, 413, 422):
                return Answer("refused", status)
            if status >= 500 or status in (408, 409, 425, 429):
                return Answer("later", status, retry_after(error.response.headers))
            raise ProviderError(status) from error
        except dodopayments.DodoPaymentsError as error:
            raise ProviderError(None) from error
        return Answer("taken")
