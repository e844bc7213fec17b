"""How long the run may take. It counts from the import of this module, so import it first."""

from __future__ import annotations

import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable
from typing import final

_BEGAN = time.monotonic()
_ENDING = 0.05
"""Share of the time that is kept for the summary and the picture, at least …"""
_SHORTEST_ENDING = 10.0
"""… seconds: importing matplotlib and drawing took 3 on two CPU cores. As much again is kept for finishing what has
begun, before the process is ended inside it."""

_LAST_SECONDS = 3.0
"""What is not written by then is left out; the start of the interpreter, before this import, takes some of them."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Clock:
    """The minutes of the whole run; None: as many as it takes."""

    minutes: float | None = None

    @property
    def left(self) -> float:
        """Seconds until nothing more is begun, so that what has begun is finished and written in time."""
        return self._until_the_end - self._ending

    @property
    def _ending(self) -> float:
        return 0.0 if self.minutes is None else max(_ENDING * self.minutes * 60, _SHORTEST_ENDING)

    @property
    def _until_the_end(self) -> float:
        """Seconds until the report has to be written."""
        if self.minutes is None:
            return math.inf
        return _BEGAN + self.minutes * 60 - self._ending - time.monotonic()

    @property
    def is_over(self) -> bool:
        return self.left <= 0

    def guard(self, end: Callable[[], None], status: Callable[[], int]) -> None:
        """Ends the process in time, even inside a compilation: `end` writes what there is."""
        if self.minutes is None:
            return

        def stop() -> None:
            try:
                end()
            finally:
                os._exit(status())

        _after(self._until_the_end, stop)
        last = self._until_the_end + self._ending - _LAST_SECONDS
        _after(last, lambda: os._exit(status()))  # a picture is not worth waiting for


def _after(seconds: float, act: Callable[[], None]) -> None:
    timer = threading.Timer(max(seconds, 0), act)
    timer.daemon = True
    timer.start()


def elapsed() -> float:
    """Seconds since the run began."""
    return time.monotonic() - _BEGAN
