"""Asking the provider: no faster than it wants, again when that makes sense, and never for ever."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import anyio
import pytest
from starlette.responses import HTMLResponse, JSONResponse, Response

from delivering import PAYLOADS, SUBSCRIPTION
from dodo_server import DodoServer
from kitrocket.dodo.client import retry_after
from kitrocket.errors import ConfigurationError, ProviderError
from kitrocket.subscriptions import provider as module
from kitrocket.subscriptions.provider import Provider

NOW = datetime(2026, 3, 17, tzinfo=UTC)
Trouble = Callable[[str, int], Awaitable[Response | None]]


def answers(*responses: Response | None) -> Trouble:
    """The first requests get these answers, the last of them all that follow."""

    async def trouble(_path: str, number: int) -> Response | None:
        return responses[min(number, len(responses)) - 1]

    return trouble


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pause is short."""
    monkeypatch.setattr(module, "_FIRST_PAUSE", 0.01)


@pytest.mark.asyncio
async def test_at_most_ten_requests_a_second(dodo: DodoServer) -> None:
    # Counted from before the first is sent: how long that one takes to arrive is the machine's affair.
    async with Provider(api_key="key", base_url=dodo.url) as provider:
        began = anyio.current_time()
        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(provider.subscription, "sub_1")
        assert dodo.instants[-1] - began >= 0.4
    async with Provider(api_key="key", base_url=dodo.url, requests_per_second=100) as provider:
        began = anyio.current_time()
        for _ in range(21):
            await provider.page(0, NOW)
    assert dodo.instants[-1] - began >= 0.2


@pytest.mark.usefixtures("impatient")
@pytest.mark.asyncio
async def test_a_429_is_waited_out_as_long_as_it_says(dodo: DodoServer) -> None:
    dodo.trouble = answers(JSONResponse({}, 429, {"retry-after": "0.25"}), None)
    async with Provider(api_key="key", base_url=dodo.url, requests_per_second=1000) as provider:
        assert await provider.page(0, NOW) == []
    first, second = dodo.instants
    assert second - first >= 0.25


@pytest.mark.parametrize(
    ("told", "wait"),
    [
        ("0", 0),
        ("120", 120),
        ("1.5", 1.5),
        ("Tue, 17 Mar 2026 00:02:00 GMT", 120),
        ("Mon, 16 Mar 2026 00:00:00 GMT", 0),
        *((junk, None) for junk in ("", "soon", "-1", "1e9", "Tue, 17 Mar 2026 00:02:00", "٣")),
    ],
)
def test_how_long_to_wait_is_told_in_seconds_or_as_an_instant(told: str, wait: float | None) -> None:
    assert retry_after({"retry-after": told, "date": "Tue, 17 Mar 2026 00:00:00 GMT"}) == wait
    assert retry_after({}) is None


@pytest.mark.usefixtures("impatient")
@pytest.mark.asyncio
async def test_a_429_that_wants_an_hour_is_told_at_once(dodo: DodoServer) -> None:
    dodo.trouble = answers(JSONResponse({}, 429, {"retry-after": "3600"}))
    async with Provider(api_key="key", base_url=dodo.url) as provider:
        with pytest.raises(ProviderError, match="patience"):
            await provider.page(0, NOW)
    assert len(dodo.requests) == 1


@pytest.mark.usefixtures("impatient")
@pytest.mark.asyncio
async def test_bad_answers_are_asked_again_after_longer_pauses_and_then_told(dodo: DodoServer) -> None:
    dodo.trouble = answers(JSONResponse({}, 500), JSONResponse({}, 503, {"retry-after": "soon"}), None)
    dodo.subscriptions[SUBSCRIPTION] = PAYLOADS["02"]["data"]
    async with Provider(api_key="key", base_url=dodo.url, requests_per_second=1000) as provider:
        assert (await provider.subscription(SUBSCRIPTION) or {})["status"] == "active"
        dodo.trouble = answers(JSONResponse({}, 500))
        dodo.instants.clear()
        with pytest.raises(ProviderError, match="answered 500"):
            await provider.payment("pay_1")
    pauses = [after - before for before, after in pairwise(dodo.instants)]
    assert all(pause >= 0.01 * 2**number for number, pause in enumerate(pauses))
    assert len(pauses) == 5


@pytest.mark.usefixtures("impatient")
@pytest.mark.asyncio
async def test_a_slow_answer_is_not_waited_for(dodo: DodoServer) -> None:
    released = anyio.Event()

    async def slowly(_path: str, number: int) -> None:
        if number != 2:
            await released.wait()

    dodo.trouble = slowly
    for seconds, requests in ((1.0, 2), (0.05, 6)):
        timeout = timedelta(seconds=seconds)
        async with Provider(api_key="key", base_url=dodo.url, requests_per_second=1000, timeout=timeout) as provider:
            if requests == 2:
                assert await provider.page(0, NOW) == []
            else:
                with pytest.raises(ProviderError, match="cannot be reached: check DODO_PAYMENTS_BASE_URL"):
                    await provider.page(0, NOW)
            assert provider.requests == requests
    released.set()


@pytest.mark.asyncio
async def test_who_is_not_the_provider_and_what_is_no_key(dodo: DodoServer) -> None:
    dodo.trouble = answers(HTMLResponse("<p>Welcome"))
    async with Provider(api_key="key", base_url=dodo.url, requests_per_second=1000) as provider:
        with pytest.raises(ProviderError):
            await provider.page(0, NOW)
        with pytest.raises(ProviderError):
            await provider.subscription(SUBSCRIPTION)
    for key in ("", "k y", "kéy", "key\n"):
        with pytest.raises(ConfigurationError, match="DODO_PAYMENTS_API_KEY"):
            Provider(api_key=key)
