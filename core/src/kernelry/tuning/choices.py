"""What can be tried for a call: every kernel that serves it, with every tiling that it offers for it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import final

from kernelry.kernel.spec import AUTO, Tiling
from kernelry.phases.calls import PhaseCall
from kernelry.policy.measurements import Entry, Kind, Measurements, Pairs, device_of
from kernelry.policy.policy import Policy
from kernelry.policy.store import versions_of
from kernelry.resolution.explanation import Resolution
from kernelry.resolution.resolver import explain

_TPU_CALL = "tpu_custom_call"
"""The target of calls of Pallas kernels in programs for TPUs."""

_UNTIMED = Measurements()
"""So that what is tried first does not depend on what was tried before."""


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A call to be tuned.

    Args:
      name: which call of the model it is.
      call: the call.
      policy: of its config: only kernels that it allows are tried.
    """

    name: str
    call: PhaseCall
    policy: Policy

    def resolved(self, measurements: Measurements = _UNTIMED, kernel: str = AUTO) -> Resolution:
        """What the call gets with these times."""
        return explain(self.call.request, kernel=kernel, policy=self.policy, measurements=measurements, changes=False)


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """A kernel with a tiling, to be tried for a call.

    Args:
      job: the call.
      kernel: the kernel's name.
      tiling: its tunables.
      versions: what the time will depend on.
      signature: what its program contains, as its KernelSpec says.
    """

    job: Job
    kernel: str
    tiling: Tiling
    versions: Pairs
    signature: tuple[str, ...] = ()

    @property
    def is_predictable(self) -> bool:
        """Whether its program calls a kernel that a TPU's compiler schedules apart: XLA's own work has no model."""
        return _TPU_CALL in self.signature

    def entry(self, seconds: float | None, kind: Kind, *, time: str = "", failure: str = "") -> Entry:
        """The entry of a result."""
        return Entry.of(
            self.job.call.request,
            self.kernel,
            seconds,
            kind=kind,
            tiling=tuple(sorted(self.tiling.values)),
            versions=self.versions,
            time=time,
            failure=failure,
        )


def choices_of(job: Job, kernels: Sequence[str] = (), most: int | None = None) -> tuple[Choice, ...]:
    """Returns what can be tried: the default tiling of every kernel, in order of preference, then the second ones, ….

    Args:
      job: the call.
      kernels: the names of those to try; none means all that its policy allows.
      most: how many tilings of each kernel are tried; None means all.
    """
    names = kernels or [candidate.name for candidate in job.resolved().candidates if not candidate.refusals]
    of_kernels = [tuple(itertools.islice(_tilings(job, name), most)) for name in names]
    return tuple(choice for row in itertools.zip_longest(*of_kernels) for choice in row if choice is not None)


def refusals_of(job: Job, kernels: Sequence[str] = ()) -> tuple[str, ...]:
    """Why kernels that were named do not serve the call."""
    found = [job.resolved(kernel=name) for name in kernels]
    return tuple(f"{job.name}: {resolution.unserved}" for resolution in found if resolution.plan is None)


def _tilings(job: Job, kernel: str) -> Iterator[Choice]:
    plan = job.resolved(kernel=kernel)
    if plan.plan is None or plan.winner is None:
        return
    request = job.call.request
    versions = versions_of(device_of(request.target), plan.winner.distribution)
    for tiling in dict.fromkeys(plan.plan.kernel.tilings(plan.plan.inner_request)):
        yield Choice(job, kernel, tiling, versions, plan.plan.kernel.signature(plan.plan.inner_request))
