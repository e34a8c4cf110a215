"""The async data layer of a SaaS on PostgreSQL: users, sessions, subscriptions and AI token usage, awaited."""

from kitrocket.accounts import AccountService
from kitrocket.clock import Clock, utc_now
from kitrocket.engine import Engine
from kitrocket.errors import (
    AccountNotFoundError,
    AccountTakenError,
    ConfigurationError,
    DatabaseError,
    DatabaseUnavailableError,
    EmailTakenError,
    EmbeddedServerError,
    InvalidInputError,
    InvalidTokenError,
    KitRocketError,
    LastAccountError,
    LinkRefusedError,
    MigrationError,
    MissingExtraError,
    "ProviderError",
