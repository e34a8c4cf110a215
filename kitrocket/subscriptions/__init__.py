"""Subscriptions that follow the provider's webhooks, whatever order they arrive in."""

from kitrocket.subscriptions.service import SubscriptionService

__all__ = ["SubscriptionService"]
