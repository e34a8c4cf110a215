"""Sign up, in and out, and webhooks, with FastAPI: `uvicorn app:app` in this folder.

Over plain http, as on your own machine, set KITROCKET_SESSION_COOKIE_SECURE=0.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from kitrocket import EmailTakenError, InvalidInputError, KitRocket, Session, User
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
