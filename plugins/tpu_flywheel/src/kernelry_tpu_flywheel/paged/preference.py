"""The vote for `flywheel_paged`."""

from __future__ import annotations

from collections.abc import Sequence

from kernelry.plugin import INTERLEAVED, Environment, Ranking, Request
from kernelry_tpu_flywheel.installed import not_installed

_NAME = "flywheel_paged"


def ranked_paged(request: Request, candidates: Sequence[str]) -> Ranking | None:
    """Votes for it where pages are interleaved.

    Next to kernels that read separate pages as they are, nothing says that it is faster on a device. But of interleaved
    pages these need a copy, of every page of every row, for each call. It abstains where flywheel-tpu is not installed,
    as `ranked` does.
    """
    wanted = _NAME in candidates and request.kv_layout == INTERLEAVED and request.target.platform == "tpu"
    if not wanted or any(not_installed(Environment())):
        return None
    return Ranking((_NAME,), "it reads interleaved pages where they are, which other kernels copy")
