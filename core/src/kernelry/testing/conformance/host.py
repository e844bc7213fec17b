"""Where a kernel can be tested: compiled for this machine, interpreted, or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import final

from kernelry.execution.adapters.order import ADAPTERS
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import Environment, KernelSpec, Knowledge
from kernelry.policy.policy import Policy
from kernelry.policy.scope import interpret, use
from kernelry.request.request import Request
from kernelry.request.target import Target, current_target, oldest

_BARE = Policy(forbidden_adapters=frozenset(adapter.name for adapter in ADAPTERS))
"""Without adapters: the kit tests what the kernel itself claims."""

_ANY = Policy()

_OF_VENDORS = (RefusalCode.VENDOR_MISSING, RefusalCode.VENDOR_VERSION)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class KernelHost:
    """Where the calls of the kit resolve.

    Args:
      target: this machine where the kernel runs on it, else the oldest device that it names.
      interpreted: whether it runs in interpret mode.
      why_not: why nothing can run here; None where it can.
    """

    target: Target
    interpreted: bool = False
    why_not: str | None = None

    @classmethod
    def of(cls, spec: KernelSpec) -> KernelHost:
        """Finds out how a kernel can be tested on this machine."""
        here, can = current_target(), spec.capabilities
        interpreted = here.platform == "cpu" and can.interpret
        platforms = sorted(can.platforms)
        if here.platform in platforms or interpreted:
            absent = _absent(spec, here)
            if absent is None:
                return cls(here, interpreted=interpreted and here.platform not in platforms)
            target = oldest(platforms[0], dict(can.minimum_generation).get(platforms[0])) if platforms else here
            return cls(target, why_not=absent)
        if not platforms:
            return cls(here, why_not="it declares no platform and no interpret mode")
        needs = " or ".join(platforms)
        mode = " on CPU only" if can.interpret else ""
        target = oldest(platforms[0], dict(can.minimum_generation).get(platforms[0]))
        return cls(target, why_not=f"needs {needs}; this is {here}; interpret mode:{mode or ' none'}")

    @property
    def environment(self) -> Environment:
        """Probed where the kernel runs, assumed elsewhere."""
        return Environment(Knowledge.PROBED if self.why_not is None else Knowledge.ASSUMED)

    @contextlib.contextmanager
    def entered(self, spec: KernelSpec, *, adapters: bool = False) -> Iterator[None]:
        """A scope in which the kernel replaces an installed one of its name."""
        target = None if self.why_not is None else self.target
        with contextlib.ExitStack() as scopes:
            scopes.enter_context(_without_warnings())
            scopes.enter_context(use(kernels=(spec,), policy=_ANY if adapters else _BARE, target=target))
            if self.interpreted:
                scopes.enter_context(interpret())
            yield

    def refusals(self, spec: KernelSpec, request: Request) -> tuple[Refusal, ...]:
        """Why the kernel itself refuses a request, without adapters; libraries count only where it runs."""
        declared = spec.capabilities.refusals(request)
        found = declared or spec.refusals(request, self.environment)
        return tuple(each for each in found if self.why_not is None or each.code not in _OF_VENDORS)


def _absent(spec: KernelSpec, here: Target) -> str | None:
    """What the kernel says of a library that is not here, or is another release than it needs; None where all is."""
    try:
        request = Request(
            target=here, q_len=128, dtype=min(spec.capabilities.dtypes, default="float32"), interpret=True
        )
        found = [refusal for refusal in spec.refusals(request, Environment()) if refusal.code in _OF_VENDORS]
    except Exception:  # the cases of the kit tell of it
        return None
    return next(map(str, found), None)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Mutes warnings, e.g. that an adapter is expensive, as calls of 16 tokens are no measure of cost."""
    logger = logging.getLogger("kernelry")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
