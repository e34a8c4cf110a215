"""Sign up, in and out, and webhooks, with Starlette: `uvicorn app:app` in this folder.

Over plain http, as on your own machine, set KITROCKET_SESSION_COOKIE_SECURE=0.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from kitrocket import EmailTakenError, InvalidInputError, KitRocket
from kitrocket.integrations.starlette import (
    SessionMiddleware,
    current_session,
    current_user,
    current_visit,
    optional_user,
    require_fresh,
    webhook_route,
)

kit = KitRocket()


class Credentials(BaseModel):
    email: str
    password: str
    remember: bool = True


class SignUp(Credentials):
    name: str


async def home(request: Request) -> Response:
    user = await optional_user(request)
    return PlainTextResponse(f"Hello, {user.name if user else 'stranger'}")


async def sign_up(request: Request) -> Response:
    form, visit = SignUp.model_validate_json(await request.body()), await current_visit(request)
    try:
        async with kit.transaction():
            user = await kit.users.create(email=form.email, name=form.name, password=form.password)
            issued = await kit.sessions.create(
                user.id, ip_address=visit.ip_address, user_agent=visit.user_agent, remember=form.remember
            )
    except EmailTakenError as error:
        raise HTTPException(409, "this address is taken") from error
    visit.signed_in(issued, remember=form.remember)
    return JSONResponse(user.model_dump(mode="json"), 201)


async def sign_in(request: Request) -> Response:
    form, visit = Credentials.model_validate_json(await request.body()), await current_visit(request)
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
    return Response(status_code=204)


async def me(request: Request) -> Response:
    return JSONResponse((await current_user(request)).model_dump(mode="json"))


async def devices(request: Request) -> Response:
    session, visit = await current_session(request), await current_visit(request)
    found = await kit.sessions.list(session.user_id, current=visit.token)
    return JSONResponse([device.model_dump(mode="json") for device in found])


async def sign_out(request: Request) -> Response:
    await (await current_visit(request)).sign_out()
    return Response(status_code=204)


async def delete(request: Request) -> Response:
    session = await require_fresh(request)
    await (await current_visit(request)).sign_out()
    await kit.users.delete(session.user_id)
    return Response(status_code=204)


async def refuse(_request: Request, error: Exception) -> Response:
    text = "the body is not what is expected" if isinstance(error, ValidationError) else str(error)
    return JSONResponse({"detail": text}, 422)


@asynccontextmanager
async def lifespan(_app: Starlette) -> AsyncIterator[None]:
    async with kit:
        yield


app = Starlette(
    routes=[
        Route("/", home),
        Route("/sign-up", sign_up, methods=["POST"]),
        Route("/sign-in", sign_in, methods=["POST"]),
        Route("/sign-out", sign_out, methods=["POST"]),
        Route("/me", me, methods=["GET"]),
        Route("/me", delete, methods=["DELETE"]),
        Route("/devices", devices),
        webhook_route(kit),
    ],
    middleware=[Middleware(SessionMiddleware, kit=kit)],
    exception_handlers={InvalidInputError: refuse, ValidationError: refuse},
    lifespan=lifespan,
)
