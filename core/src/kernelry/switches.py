"""The environment variables of kernelry, parsed strictly and once."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Mapping
from typing import final

from kernelry.errors import nearest

_PREFIX = "KERNELRY_"
_KNOWN = ("KERNELRY_KERNEL", "KERNELRY_PLUGINS")


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Switches:
    """What the environment variables say.

    Args:
      kernel: KERNELRY_KERNEL, the kernel to use unless a call or a scope names one; None when
        unset or `auto`.
      plugins: KERNELRY_PLUGINS, the entry-point names to load; None when unset.
    """

    kernel: str | None = None
    plugins: tuple[str, ...] | None = None

    @classmethod
    def parse(cls, environ: Mapping[str, str]) -> Switches:
        """Reads the variables; an unknown `KERNELRY_*` warns with the nearest known one."""
        for name in environ:
            if name.startswith(_PREFIX) and name not in _KNOWN:
                warnings.warn(f"unknown environment variable {name} is ignored{nearest(name, _KNOWN)}", stacklevel=3)
        kernel = environ.get("KERNELRY_KERNEL", "").strip()
        listed = environ.get("KERNELRY_PLUGINS")
        names = None if listed is None else tuple(name.strip() for name in listed.split(",") if name.strip())
        return cls(None if kernel in ("", "auto") else kernel, names)

    @staticmethod
    def of_process() -> Switches:
        """Returns the switches of this process, read once."""
        return _of_process()


@functools.lru_cache(maxsize=1)
def _of_process() -> Switches:
    return Switches.parse(os.environ)
