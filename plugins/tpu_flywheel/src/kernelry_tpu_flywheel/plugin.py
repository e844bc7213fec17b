"""What this plugin registers: `flywheel` and `flywheel_paged`, for TPUs, and its vote."""

from __future__ import annotations

from collections.abc import Sequence

from kernelry.plugin import KernelSpec, Ranking, Request, hookimpl
from kernelry_tpu_flywheel.dense.spec import FLYWHEEL
from kernelry_tpu_flywheel.paged.preference import ranked_paged
from kernelry_tpu_flywheel.paged.spec import FLYWHEEL_PAGED
from kernelry_tpu_flywheel.ranking import ranked

contract = (1, 1)


@hookimpl
def kernelry_kernels() -> list[KernelSpec]:
    """The kernels of this plugin."""
    return [FLYWHEEL, FLYWHEEL_PAGED]


@hookimpl
def kernelry_rank(request: Request, candidates: Sequence[str]) -> Ranking | None:
    """Prefers flywheel where the TPU compiler's schedule does, and flywheel_paged for interleaved pages."""
    return ranked_paged(request, candidates) or ranked(request, candidates)
