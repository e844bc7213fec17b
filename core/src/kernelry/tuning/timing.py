"""Timing a kernel on this device, next to another one.

The speed of a machine drifts, so no two kernels are timed one after the other. Each is timed in turns with the call's
reference, and its time is the reference's times the median ratio of the turns. So a result is final as soon as its own
turns are over, whatever the machine does later, and also after the process was killed and resumed.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, final

import jax

from kernelry.aot.layers import program_of
from kernelry.policy.scope import record, use
from kernelry.tuning.choices import Choice

_WARM_UPS = 2
_LEAST, _MOST = 5, 31
"""Turns; after the least, turns end when the seconds are used."""
_SECONDS = 1.0
_LONGEST = 0.01
"""Seconds that one turn takes at least on an accelerator: short calls are repeated, so that starting them is hidden."""
_MOST_CALLS = 100

Clock = Callable[[], float]


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Runner:
    """A compiled call, ready to be timed.

    Args:
      run: runs it once, and returns its arrays, which may not be there yet.
      calls: how many make a turn.
    """

    run: Callable[[], Any]
    calls: int = 1

    @classmethod
    def of(cls, choice: Choice, arguments: tuple[Any, ...], clock: Clock = time.perf_counter) -> Runner:
        """Compiles and warms up.

        Raises:
          Exception: what the compiler or the device raises.
        """
        call = choice.job.call
        with use(choice.kernel, policy=choice.job.policy, tiling=dict(choice.tiling.values)), record() as found:
            lowered = jax.jit(program_of(call)).lower(*arguments)
        tried = [(resolution.kernel, resolution.plan and resolution.plan.tiling) for resolution in found]
        assert tried == [(choice.kernel, choice.tiling)], tried
        program = lowered.compile()
        ready = cls(lambda: program(*arguments))
        for _ in range(_WARM_UPS):
            once = ready.turn(clock)
        if call.request.target.platform == "cpu":
            return ready  # a CPU may run several calls at a time
        return dataclasses.replace(ready, calls=max(1, min(_MOST_CALLS, round(_LONGEST / max(once, 1e-6)))))

    def turn(self, clock: Clock = time.perf_counter) -> float:
        """Seconds of one call, in a row of `calls`."""
        begun = clock()
        for _ in range(self.calls):
            result = self.run()
        jax.block_until_ready(result)  # type: ignore[no-untyped-call]
        return (clock() - begun) / self.calls


def alone(runner: Runner, clock: Clock = time.perf_counter) -> float:
    """The median time of a call, in seconds."""
    return statistics.median(_turns(lambda _: runner.turn(clock), clock))


def compared(runner: Runner, reference: Runner, clock: Clock = time.perf_counter) -> float:
    """The median of how much longer one call takes than another, timed in turns, of which either is first as often."""

    def ratio(number: int) -> float:
        if number % 2:
            mine = runner.turn(clock)
            return mine / reference.turn(clock)
        others = reference.turn(clock)
        return runner.turn(clock) / others

    return statistics.median(_turns(ratio, clock))


def _turns(take: Callable[[int], float], clock: Clock) -> list[float]:
    begun, found = clock(), list[float]()
    while len(found) < _LEAST or (len(found) < _MOST and clock() - begun < _SECONDS):
        found.append(take(len(found)))
    return found
