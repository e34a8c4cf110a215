"""Sign up, in and out, and webhooks, with Litestar: `uvicorn app:app` in this folder.

Over plain http, as on your own machine, set KITROCKET_SESSION_COOKIE_SECURE=0.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from litestar import Litestar, MediaType, Request, Response, delete, get, post
from litestar.exceptions import HTTPException, NotAuthorizedException
from litestar.middleware import DefineMiddleware
from pydantic import BaseModel

from kitrocket import EmailTakenError, InvalidInputError, KitRocket, Session, User
from kitrocket.integrations.asgi import Visit
from kitrocket.integrations.litestar import SessionMiddleware, session_dependencies, webhook_handler

kit = KitRocket()


class Credentials(BaseModel):
    email: str
    password: str
    remember: bool = True


class SignUp(Credentials):
    name: str


@get("/", media_type=MediaType.TEXT)
async def home(optional_user: User | None) -> str:
    return f"Hello, {optional_user.name if optional_user else 'stranger'}"


@post("/sign-up")
async def sign_up(data: SignUp, current_visit: Visit) -> User:
    try:
        async with kit.transaction():
            user = await kit.users.create(email=data.email, name=data.name, password=data.password)
            issued = await kit.sessions.create(
                user.id,
                ip_address=current_visit.ip_address,
                user_agent=current_visit.user_agent,
                remember=data.remember,
            )
    except EmailTakenError as error:
        raise HTTPException("this address is taken", status_code=409) from error
    current_visit.signed_in(issued, remember=data.remember)
    return user


@post("/sign-in", status_code=204)
async def sign_in(data: Credentials, current_visit: Visit) -> None:
    issued = await kit.sign_in(
        email=data.email,
        password=data.password,
        ip_address=current_visit.ip_address,
        user_agent=current_visit.user_agent,
        remember=data.remember,
    )
    if issued is None:
        raise NotAuthorizedException("wrong address or password")
    current_visit.signed_in(issued, remember=data.remember)


@get("/me")
async def me(current_user: User) -> User:
    return current_user


@get("/devices")
async def devices(current_session: Session, current_visit: Visit) -> list[Session]:
    return list(await kit.sessions.list(current_session.user_id, current=current_visit.token))


@post("/sign-out", status_code=204)
async def sign_out(current_visit: Visit) -> None:
    await current_visit.sign_out()


@delete("/me")
async def delete_me(fresh_session: Session, current_visit: Visit) -> None:
    await current_visit.sign_out()
    await kit.users.delete(fresh_session.user_id)


def refuse(_request: Request, error: InvalidInputError) -> Response:
    return Response({"detail": str(error)}, status_code=422)


@asynccontextmanager
async def lifespan(_app: Litestar) -> AsyncIterator[None]:
    async with kit:
        yield


app = Litestar(
    route_handlers=[home, sign_up, sign_in, me, devices, sign_out, delete_me, webhook_handler(kit)],
    middleware=[DefineMiddleware(SessionMiddleware, kit=kit)],
    dependencies=session_dependencies,
    exception_handlers={InvalidInputError: refuse},
    lifespan=[lifespan],
)
