"""Tries what can be tried, and stores each result as soon as it is known."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, final

from kernelry.aot.compilation import CompileFailure
from kernelry.errors import ConfigError
from kernelry.policy.measurements import Entry, Kind
from kernelry.policy.store import Store, now
from kernelry.request.target import Target
from kernelry.tuning.choices import Choice
from kernelry.tuning.operands import operands
from kernelry.tuning.timing import Clock, Runner, alone, compared

if TYPE_CHECKING:
    from kernelry.aot.prediction import Candidate, Prediction

    Predict = Callable[..., Iterator[Prediction]]

_NO_MODEL = "no model predicts its time"


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Result:
    """What is known of a choice.

    Args:
      choice: what was tried.
      entry: its time, or why there is none.
      is_new: whether it was tried now; else it was stored before.
    """

    choice: Choice
    entry: Entry
    is_new: bool


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Tuner:
    """Tries choices in order, until the time is used.

    Args:
      store: where results are kept; what is there already is not tried again.
      again: whether it is tried all the same.
      ends: the clock's time after which nothing more is begun.
      tell: told the choice that is tried next.
      clock: seconds since any moment.
    """

    store: Store
    again: bool = False
    ends: float = math.inf
    tell: Callable[[Choice], object] = lambda _: None
    clock: Clock = time.perf_counter

    def measure(self, choices: Sequence[Choice]) -> Iterator[Result]:
        """Times choices on this device, job by job; those whose time ran out are left out.

        Raises:
          ConfigError: the results cannot be stored.
        """
        known = self._known(choices, {Kind.MEASURED})
        for job in dict.fromkeys(choice.job for choice in choices):
            mine = [choice for choice in choices if choice.job is job]
            yield from (Result(choice, known[choice], False) for choice in mine if choice in known)
            if not self.is_over and not known.keys() >= {*mine}:
                yield from self._measured(mine, known)

    @property
    def is_over(self) -> bool:
        """Whether nothing more is begun."""
        return self.clock() >= self.ends

    def _measured(self, mine: Sequence[Choice], known: dict[Choice, Entry]) -> Iterator[Result]:
        """Times what is left of a job, next to the first choice of the job that runs."""
        arguments = operands(mine[0].job.call)
        reference: Runner | None = None
        seconds = 0.0
        for choice in mine:
            before = known.get(choice)
            if before is not None and before.seconds is None:
                continue
            if reference is None:
                if before is None and self.is_over:
                    continue
                self.tell(choice)
                try:
                    reference = Runner.of(choice, arguments, self.clock)
                except ConfigError:
                    raise
                except Exception as error:  # compilers and devices raise various types
                    if before is None:
                        yield self._stored(choice, choice.entry(None, Kind.MEASURED, time=now(), failure=_why(error)))
                    continue
                seconds = alone(reference, self.clock) if before is None else before.seconds or 0.0
                if before is None:
                    yield self._stored(choice, choice.entry(seconds, Kind.MEASURED, time=now()))
            elif before is None and not self.is_over:
                self.tell(choice)
                yield self._stored(choice, self._timed(choice, arguments, reference, seconds))

    def _timed(self, choice: Choice, arguments: tuple[Any, ...], reference: Runner, seconds: float) -> Entry:
        try:
            found = seconds * compared(Runner.of(choice, arguments, self.clock), reference, self.clock)
        except ConfigError:
            raise
        except Exception as error:  # as above
            return choice.entry(None, Kind.MEASURED, time=now(), failure=_why(error))
        return choice.entry(found, Kind.MEASURED, time=now())

    def predict(self, choices: Sequence[Choice], target: Target, predict: Predict | None = None) -> Iterator[Result]:
        """Predicts the times of choices for a device that need not be present.

        Args:
          choices: what to predict, for calls on the target.
          target: the device.
          predict: None is `kernelry.aot.prediction.predict`.

        Raises:
          ConfigError: the results cannot be stored.
          NoCompilerError: the target's compiler is not installed.
        """
        known = self._known(choices, set(Kind))
        yield from (Result(choice, known[choice], False) for choice in choices if choice in known)
        left = [choice for choice in choices if choice.is_predictable and choice not in known]
        for policy in dict.fromkeys(choice.job.policy for choice in left):
            mine = [choice for choice in left if choice.job.policy == policy]
            yield from self._predicted(mine, (predict or _predict())(_asked(mine), target, policy=policy))
        for choice in choices:
            if not choice.is_predictable and choice not in known:  # which costs nothing to find out again
                yield Result(choice, choice.entry(None, Kind.PREDICTED, time=now(), failure=_NO_MODEL), False)

    def _predicted(self, choices: Sequence[Choice], predictions: Iterator[Prediction]) -> Iterator[Result]:
        for choice in choices:
            if self.is_over:
                return
            self.tell(choice)
            found = next(predictions)  # they are in order
            failure = found.failure or ("" if found.seconds else _NO_MODEL)
            seconds = None if failure else found.seconds
            yield self._stored(choice, choice.entry(seconds, Kind.PREDICTED, time=now(), failure=failure))

    def _known(self, choices: Iterable[Choice], kinds: set[Kind]) -> dict[Choice, Entry]:
        """What is stored of the choices; a file that is damaged is set aside here, before anything is tried."""
        stored = {entry.key: entry for entry in self.store.add(()) if entry.kind in kinds}
        if self.again:
            return {}
        keys = {choice: choice.entry(None, Kind.MEASURED).key for choice in choices}
        return {choice: stored[key] for choice, key in keys.items() if key in stored}

    def _stored(self, choice: Choice, entry: Entry) -> Result:
        self.store.add((entry,))
        return Result(choice, entry, True)


def _why(error: Exception) -> str:
    return CompileFailure.of(error).text


def _asked(choices: Iterable[Choice]) -> list[Candidate]:
    from kernelry.aot.prediction import Candidate

    return [Candidate(choice.job.call, choice.kernel, choice.tiling.values) for choice in choices]


def _predict() -> Predict:
    from kernelry.aot.prediction import predict

    found: Predict = predict
    return found
