"""The one door to PostgreSQL: pool, UTC, transactions, poolers, replicas, and what the driver's errors mean."""

from kitrocket.engine.engine import Engine, choose_conf
from kitrocket.engine.held import HeldConnection
from kitrocket.engine.transaction import Transaction
from kitrocket.engine.translation import Fault, fault_of, translated

__all__ = ["Engine", "Fault", "HeldConnection", "Transaction", "choose_conf", "fault_of", "translated"]
