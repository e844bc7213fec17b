"""Policies for tests."""

from kernelry.execution.adapters.order import ADAPTERS
from kernelry.plugin import Policy

NO_ADAPTERS = Policy(forbidden_adapters=frozenset(adapter.name for adapter in ADAPTERS))
"""Leaves a kernel alone with what it declares."""
