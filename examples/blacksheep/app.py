"""Sign up, in and out, and webhooks, with BlackSheep: `uvicorn app:app` in this folder.

Over plain http, as on your own machine, set KITROCKET_SESSION_COOKIE_SECURE=0.
"""

from collections.abc import AsyncIterator

from blacksheep import Application, FromJSON, Request, Response, delete, get, json, no_content, post, text
from pydantic import BaseModel

from kitrocket import EmailTakenError, InvalidInputError, KitRocket
from kitrocket.integrations.blacksheep import (
    SessionMiddleware,
    current_session,
    current_user,
    current_visit,
    mount_webhooks,
    optional_user,
    require_fresh,
)

kit = KitRocket()
site = Application()
mount_webhooks(site, kit)
app = SessionMiddleware(site, kit=kit)


@site.lifespan
async def keep_open() -> AsyncIterator[None]:
    async with kit:
        yield


@site.exception_handler(InvalidInputError)
async def refuse(_app: Application, _request: Request, error: InvalidInputError) -> Response:
    return json({"detail": str(error)}, 422)


class Credentials(BaseModel):
    email: str
    password: str
    remember: bool = True


class SignUp(Credentials):
    name: str


@get("/")
async def home(request: Request) -> Response:
    user = await optional_user(request)
    return text(f"Hello, {user.name if user else 'stranger'}")


@post("/sign-up")
async def sign_up(request: Request, data: FromJSON[SignUp]) -> Response:
    form, visit = data.value, await current_visit(request)
    try:
        async with kit.transaction():
            user = await kit.users.create(email=form.email, name=form.name, password=form.password)
            issued = await kit.sessions.create(
                user.id, ip_address=visit.ip_address, user_agent=visit.user_agent, remember=form.remember
            )
    except EmailTakenError:
        return json({"detail": "this address is taken"}, 409)
    visit.signed_in(issued, remember=form.remember)
    return json(user.model_dump(mode="json"), 201)


@post("/sign-in")
async def sign_in(request: Request, data: FromJSON[Credentials]) -> Response:
    form, visit = data.value, await current_visit(request)
    issued = await kit.sign_in(
        email=form.email,
        password=form.password,
        ip_address=visit.ip_address,
        user_agent=visit.user_agent,
        remember=form.remember,
    )
    if issued is None:
        return json({"detail": "wrong address or password"}, 401)
    visit.signed_in(issued, remember=form.remember)
    return no_content()


@get("/me")
async def me(request: Request) -> Response:
    return json((await current_user(request)).model_dump(mode="json"))


@get("/devices")
async def devices(request: Request) -> Response:
    session, visit = await current_session(request), await current_visit(request)
    found = await kit.sessions.list(session.user_id, current=visit.token)
    return json([device.model_dump(mode="json") for device in found])


@post("/sign-out")
async def sign_out(request: Request) -> Response:
    await (await current_visit(request)).sign_out()
    return no_content()


@delete("/me")
async def delete_me(request: Request) -> Response:
    session = await require_fresh(request)
    await (await current_visit(request)).sign_out()
    await kit.users.delete(session.user_id)
    return no_content()
