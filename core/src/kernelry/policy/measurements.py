"""Measured times of kernels on a device, as evidence for the resolver."""

from __future__ import annotations

import dataclasses
from typing import final

from kernelry.request.request import Request


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Measurement:
    """One kernel timed on one request (whose target names the device), in seconds."""

    request: Request
    kernel: str
    seconds: float


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Measurements:
    """Measurements of one device; only those of an equal request count."""

    rows: tuple[Measurement, ...] = ()

    def fastest(self, request: Request) -> tuple[str, ...]:
        """Returns the kernels that were timed on this request, fastest first."""
        timed = sorted((row.seconds, row.kernel) for row in self.rows if row.request == request)
        return tuple(dict.fromkeys(kernel for _, kernel in timed))
