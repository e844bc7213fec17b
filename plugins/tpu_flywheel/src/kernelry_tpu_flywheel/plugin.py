"""What this plugin registers: `flywheel`, for TPUs, and its vote."""

from __future__ import annotations

from collections.abc import Sequence

from kernelry.plugin import KernelSpec, Ranking, Request, hookimpl
from kernelry_tpu_flywheel.dense.spec import FLYWHEEL
from kernelry_tpu_flywheel.ranking import ranked

contract = (1, 1)


@hookimpl
def kernelry_kernels() -> list[KernelSpec]:
    """The kernels of this plugin."""
    return [FLYWHEEL]


@hookimpl
def kernelry_rank(request: Request, candidates: Sequence[str]) -> Ranking | None:
    """Prefers flywheel where the TPU compiler's schedule does."""
    return ranked(request, candidates)
