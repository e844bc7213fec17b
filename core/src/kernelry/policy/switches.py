"""The environment variables of kernelry, parsed strictly and once."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Mapping
from typing import final

from kernelry.errors import ConfigError, nearest

_PREFIX = "KERNELRY_"
KNOWN_SWITCHES = ("KERNELRY_KERNEL", "KERNELRY_LOCK", "KERNELRY_PLUGINS", "KERNELRY_STRICT")
_YES_NO = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
LOCK_FILE = "kernelry.lock.json"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Switches:
    """What the environment variables say.

    Args:
      kernel: KERNELRY_KERNEL, the kernel to use unless a call or a scope names one; None when
        unset or `auto`.
      plugins: KERNELRY_PLUGINS, the entry-point names to load; None when unset.
      strict: KERNELRY_STRICT, whether resolutions must be those of the lock file.
      lock: KERNELRY_LOCK, the path of the lock file; looked at only when strict.
      unknown: the variables named `KERNELRY_*` that mean nothing.
      wrong: of KERNELRY_STRICT, where it is neither yes nor no: what to write.
    """

    kernel: str | None = None
    plugins: tuple[str, ...] | None = None
    strict: bool = False
    lock: str = LOCK_FILE
    unknown: tuple[str, ...] = ()
    wrong: str | None = None

    @classmethod
    def parse(cls, environ: Mapping[str, str]) -> Switches:
        """Reads the variables; an unknown `KERNELRY_*` warns with the nearest known one.

        Raises:
          ConfigError: KERNELRY_STRICT is neither yes nor no.
        """
        return cls._read(environ)._checked()

    @staticmethod
    def of_process() -> Switches:
        """Returns the switches of this process, read once.

        Raises:
          ConfigError: KERNELRY_STRICT is neither yes nor no.
        """
        return _of_process()._checked()

    @staticmethod
    def unchecked() -> Switches:
        """Returns the switches of this process for those who list things, and say what is wrong."""
        return _of_process()

    def _checked(self) -> Switches:
        if self.wrong is not None:
            raise ConfigError(f"{self.wrong}.")
        return self

    @classmethod
    def _read(cls, environ: Mapping[str, str]) -> Switches:
        unknown = tuple(sorted(name for name in environ if name.startswith(_PREFIX) and name not in KNOWN_SWITCHES))
        for name in unknown:
            hint = nearest(name, KNOWN_SWITCHES)
            warnings.warn(f"unknown environment variable {name} is ignored{hint}", stacklevel=3)
        kernel = environ.get("KERNELRY_KERNEL", "").strip()
        listed = environ.get("KERNELRY_PLUGINS")
        names = None if listed is None else tuple(name.strip() for name in listed.split(",") if name.strip())
        lock = environ.get("KERNELRY_LOCK", "").strip() or LOCK_FILE
        text = environ.get("KERNELRY_STRICT", "").strip()
        strict = _YES_NO.get(text.lower(), False)
        wrong = None
        if text and text.lower() not in _YES_NO:
            wrong = f"KERNELRY_STRICT={text!r} is neither yes nor no; write one of {', '.join(_YES_NO)}"
        return cls(None if kernel in ("", "auto") else kernel, names, strict, lock, unknown, wrong)


@functools.lru_cache(maxsize=1)
def _of_process() -> Switches:
    return Switches._read(os.environ)
