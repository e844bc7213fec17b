"""How long kernels take with other tilings, predicted by the compiler of a device that is not present.

libtpu reads once in a process where to write its schedules, and some programs end the process that compiles them. So
all candidates of a batch are compiled by another process.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, final

from kernelry.aot.devices import NoCompilerError
from kernelry.aot.dumps import dumps_for
from kernelry.aot.kernel_speeds import speeds_of, total_seconds
from kernelry.aot.layers import compile_call
from kernelry.aot.speed import KernelSpeed
from kernelry.aot.worker import COMMAND, WorkerEndedError, answers
from kernelry.errors import KernelryError
from kernelry.kernel.spec import KernelSpec
from kernelry.phases.calls import PhaseCall
from kernelry.policy.policy import Policy
from kernelry.policy.scope import current_scope, record, use
from kernelry.request.target import Target

LIMIT = 600.0
"""Seconds for one candidate: splash with blocks of 2048 takes up to 108 on two cores, backward more."""


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A call with the kernel and the tunables that are to be compiled.

    Args:
      call: of a phase, as `kernelry.phases.calls.calls` makes them.
      kernel: its name.
      tiling: tunables by name, as of `Tiling.values`; the others keep the kernel's defaults.
    """

    call: PhaseCall
    kernel: str
    tiling: tuple[tuple[str, int], ...] = ()


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
    """What the compiler says of a candidate: static, not measured.

    Args:
      seconds: of the whole call, in training with its gradients: the sum over its kernels. None where one of them
        cannot be predicted, or there is none.
      kernels: of each kernel that the program calls.
      failure: why it does not compile; else empty.
    """

    seconds: float | None
    kernels: tuple[KernelSpeed, ...] = ()
    failure: str = ""


def predict(
    candidates: Sequence[Candidate],
    target: Target | str,
    *,
    policy: Policy | None = None,
    limit: float = LIMIT,
    command: Sequence[str] = COMMAND,
) -> Iterator[Prediction]:
    """Yields a prediction for each candidate, in order, each as soon as it is known.

    Kernels that a surrounding `kernelry.use(kernels=…)` adds are known to the process that compiles, if it can import
    them. A candidate that does not compile, takes too long or ends that process is a `failure`; the others go on.

    Args:
      candidates: what to compile.
      target: e.g. `tpu:v5e`. Where no model exists, as for GPUs, there are no seconds.
      policy: of the calls.
      limit: seconds for one candidate.
      command: starts the process, `python -m kernelry.aot.worker`; another one serves tests.

    Raises:
      NoCompilerError: the target's compiler is not installed.
      ConfigError: there is no such target, or a kernel cannot be imported by another process.
    """
    where = Target.parse(target)
    shared = _Shared(where, policy, current_scope().kernels)
    for answer in answers(shared, candidates, limit=limit, command=command):
        if isinstance(answer, WorkerEndedError):
            yield Prediction(None, (), str(answer))
        else:
            yield answer


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Shared:
    """What is the same for all candidates of a batch."""

    target: Target
    policy: Policy | None
    kernels: tuple[KernelSpec, ...]


def answered(shared: Any, candidate: Any) -> Prediction:
    """Compiles one candidate; what the other process does.

    Args:
      shared: what is the same for all candidates.
      candidate: a Candidate.
    """
    request = dataclasses.replace(candidate.call.request, target=shared.target)
    call = dataclasses.replace(candidate.call, request=request)
    scope = {"policy": shared.policy, "kernels": shared.kernels, "tiling": dict(candidate.tiling)}
    with contextlib.ExitStack() as stack:
        dumps = stack.enter_context(dumps_for(shared.target))
        stack.enter_context(use(candidate.kernel, **scope))
        resolutions = stack.enter_context(record())
        try:
            compilation = compile_call(call, dumps)
        except NoCompilerError:
            raise
        except KernelryError as error:
            return Prediction(None, (), str(error))
        plan = next((resolution.plan for resolution in resolutions if resolution.plan is not None), None)
        tiling = dict(candidate.tiling if plan is None else plan.tiling.values)
        if compilation.reason is not None:
            return Prediction(None, (), str(compilation.reason.about(candidate.kernel, tiling)))
        kernels = speeds_of(call, tiling, compilation)
    return Prediction(total_seconds(kernels), kernels)
