"""Accounts: the ways in that a user has."""

from kitrocket.accounts.service import AccountService

__all__ = ["AccountService"]
