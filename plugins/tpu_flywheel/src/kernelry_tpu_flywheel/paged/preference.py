"""Why `flywheel_paged` goes first where it does."""

from __future__ import annotations

from kernelry.plugin import Request


def prefers(request: Request) -> str | None:
    """The reason to prefer it; None where there is none.

    Next to kernels that read separate pages as they are, nothing says that it is faster on a device. But of interleaved
    pages these need a copy, of every page of every row, for each call.
    """
    if request.kv_layout != "interleaved" or request.target.platform != "tpu":
        return None
    return "it reads interleaved pages where they are, which the other kernels copy"
