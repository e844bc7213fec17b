"""Whether flywheel-tpu can be used: what is installed, and on which Python."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from kernelry.plugin import Environment, Refusal, RefusalCode

INSTALL = "pip install 'kernelry-tpu-flywheel[flywheel]'"

_FIRST, _BEHIND = (0, 3), (0, 4)
"""The releases whose functions are known here; what is called is not in the vendor's documentation."""

_PYTHON = (3, 12)


def not_installed(environment: Environment) -> Iterator[Refusal]:
    """Refuses every request where flywheel-tpu is missing, or is a release that is not known.

    An older Python cannot have it, so there nothing is assumed of the machine of another target: the program could not
    be made.
    """
    vendor = environment.vendor("flywheel-tpu")
    if vendor.version is None and sys.version_info < _PYTHON:
        running = ".".join(map(str, sys.version_info[:2]))
        detail = f"flywheel-tpu needs Python {_text(_PYTHON)}, and this is Python {running}"
        yield Refusal(RefusalCode.VENDOR_MISSING, detail, f"with Python {_text(_PYTHON)} or later, {INSTALL}")
        return
    yield from vendor.refusals(INSTALL)
    if vendor.version is not None and not _FIRST <= vendor.release < _BEHIND:
        detail = f"flywheel-tpu {vendor.version} is not one of {_text(_FIRST)} … {_text(_BEHIND)}, the latter excluded"
        yield Refusal(RefusalCode.VENDOR_VERSION, detail, INSTALL)


def _text(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
