"""Sign up, in and out, webhooks and a metered stream, with FastAPI: `uvicorn app:app` in this folder.

Over plain http, as on your own machine, set KITROCKET_SESSION_COOKIE_SECURE=0.
"""

import itertools
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta

import anyio
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from kitrocket import EmailTakenError, InvalidInputError, KitRocket, QuotaExceededError, Session, User
from kitrocket.integrations.fastapi import (
    CurrentSession,
    CurrentUser,
    CurrentVisit,
    FreshSession,
    OptionalUser,
    SessionMiddleware,
    webhook_route,
)

kit = KitRocket()


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with kit:
        yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(SessionMiddleware, kit=kit)
app.router.routes.append(webhook_route(kit))


@app.exception_handler(InvalidInputError)
async def refuse(_request: Request, error: InvalidInputError) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 422)


class Credentials(BaseModel):
    email: str
    password: str
    remember: bool = True


class SignUp(Credentials):
    name: str


@app.get("/")
async def home(user: OptionalUser) -> str:
    return f"Hello, {user.name if user else 'stranger'}"


@app.post("/sign-up", status_code=201)
async def sign_up(form: SignUp, visit: CurrentVisit) -> User:
    try:
        async with kit.transaction():
            user = await kit.users.create(email=form.email, name=form.name, password=form.password)
            issued = await kit.sessions.create(
                user.id, ip_address=visit.ip_address, user_agent=visit.user_agent, remember=form.remember
            )
    except EmailTakenError as error:
        raise HTTPException(409, "this address is taken") from error
    visit.signed_in(issued, remember=form.remember)
    return user


@app.post("/sign-in", status_code=204)
async def sign_in(form: Credentials, visit: CurrentVisit) -> None:
    issued = await kit.sign_in(
        email=form.email,
        password=form.password,
        ip_address=visit.ip_address,
        user_agent=visit.user_agent,
        remember=form.remember,
    )
    if issued is None:
        raise HTTPException(401, "wrong address or password")
    visit.signed_in(issued, remember=form.remember)


@app.get("/me")
async def me(user: CurrentUser) -> User:
    return user


@app.get("/devices")
async def devices(session: CurrentSession, visit: CurrentVisit) -> list[Session]:
    return list(await kit.sessions.list(session.user_id, current=visit.token))


@app.post("/sign-out", status_code=204)
async def sign_out(visit: CurrentVisit) -> None:
    await visit.sign_out()


@app.delete("/me", status_code=204)
async def delete(session: FreshSession, visit: CurrentVisit) -> None:
    await visit.sign_out()
    await kit.users.delete(session.user_id)


# -- an answer that is streamed, and counted while it is ----------------------------------------------------------

#: How long the tokens of an answer stay reserved after this process died.
TTL = timedelta(seconds=float(os.environ.get("CHAT_TTL", "60")))


class Prompt(BaseModel):
    prompt: str


@app.exception_handler(QuotaExceededError)
async def too_many(_request: Request, error: QuotaExceededError) -> JSONResponse:
    wait = error.decision.retry_after
    return JSONResponse({"detail": str(error)}, 429, {} if wait is None else {"Retry-After": str(wait)})


async def echo(prompt: str) -> AsyncIterator[str]:
    """In the place of an AI provider: the prompt again and again, a word at a time."""
    for word in itertools.islice(itertools.cycle(prompt.split()), 1000):
        await anyio.sleep(0.02)
        yield f"{word} "


async def metered(user_id: str, prompt: str) -> AsyncGenerator[str, None]:
    async with kit.usage.meter(user_id, model="echo-1", reserve=1000, limit=1800, ttl=TTL) as meter:
        yield ""
        async for word in meter.stream(echo(prompt), tokens=lambda _word: 1):
            yield word


class Answer(StreamingResponse):
    """Closes its words whatever happens, so that they are counted when the client has gone."""

    def __init__(self, words: AsyncGenerator[str, None]) -> None:
        super().__init__(words, media_type="text/plain")
        self.words = words

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.words):
            await super().__call__(scope, receive, send)


@app.post("/chat")
async def chat(question: Prompt, user: CurrentUser) -> StreamingResponse:
    words = metered(user.id, question.prompt)
    await anext(words)  # the tokens are reserved here, where a refusal can still be a 429
    return Answer(words)
