"""One case: everything that serves it is compiled, compared with the truth, and timed in turns."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import jax

from kernelry.bench.cases import Case
from kernelry.bench.peers import Peer
from kernelry.bench.programs import Lowered, kernels_of, lowered_kernel, lowered_peer, outcome_of, words_of
from kernelry.bench.results import Kind, Outcome, Result, Row
from kernelry.bench.rulers import rulers
from kernelry.bench.truth import Truth
from kernelry.bench.turns import REPEATS, Program, take_turns
from kernelry.bench.work import work_of
from kernelry.kernel.spec import AUTO

_COMPILERS = max(1, min(8, (os.cpu_count() or 2) // 2))
"""Threads; most of a run is compiling, and nothing is timed meanwhile."""
_ROOM = 0.9
"""Share of the free memory that a program may need: what else is loaded takes some."""
_LATE = "the budget was used"


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """Runs cases.

    Args:
      kernels: the names of those to time; none means all that serve a case.
      peers: others' attention to time.
      turns: how often each program is timed.
      ends: the time by `time.perf_counter` after which nothing more is begun.
      tell: told what is being done.
    """

    kernels: Sequence[str] = ()
    peers: Sequence[Peer] = ()
    turns: int = REPEATS
    ends: float = math.inf
    tell: Callable[[str], object] = lambda _: None

    @property
    def is_over(self) -> bool:
        """Whether nothing more is begun."""
        return time.perf_counter() >= self.ends

    def run(self, case: Case) -> Result:
        """Times a case.

        Raises:
          Exception: its arrays do not fit into the memory.
        """
        arguments = case.arguments()
        work = work_of(case.request, case.mask_of(arguments))
        names, rows = kernels_of(case, self.kernels)
        lowered = list(self._lowered(case, names, arguments, rows))
        ready = list(self._ready(case, lowered, arguments, rows))
        measures = rulers(case.request.dtype, case.request.target.platform)
        programs = [*ready, *(ruler.program for ruler in measures.values())]
        if ready:
            self.tell(f"{case}: timing {len(ready)}")
            for ruler in measures.values():
                ruler.program.warm_up()
            take_turns(programs, self.turns, self.ends)
        order = [*names, AUTO, *(peer.name for peer in self.peers)]
        rows.sort(key=lambda row: order.index(row.name) if row.name in order else len(order))
        return Result(case, work, tuple(rows), measures)

    def _lowered(
        self, case: Case, names: Sequence[str], arguments: tuple[Any, ...], rows: list[Row]
    ) -> Iterator[Lowered]:
        makers: list[tuple[str, Kind, Callable[[], Lowered]]] = [
            (name, Kind.AUTO if name == AUTO else Kind.KERNEL, functools.partial(lowered_kernel, case, name, arguments))
            for name in (*names, AUTO)
        ]
        for peer in self.peers:
            why_not = peer.why_not(case.request)
            if why_not is not None:
                rows.append(Row(peer.name, Kind.PEER, Outcome.REFUSED, why_not))
                continue
            makers.append((peer.name, Kind.PEER, functools.partial(lowered_peer, case, peer, arguments)))
        for name, kind, make in makers:
            if self.is_over:
                rows.append(Row(name, kind, Outcome.NOT_REACHED, _LATE))
                continue
            self.tell(f"{case}: {name}")
            try:
                yield make()
            except Exception as error:  # each library has its own way to say no
                outcome = Outcome.REFUSED if kind is Kind.PEER else outcome_of(error)
                rows.append(Row(name, kind, outcome, words_of(error)))

    def _ready(
        self, case: Case, lowered: Sequence[Lowered], arguments: tuple[Any, ...], rows: list[Row]
    ) -> Iterator[Program]:
        """Programs that run; the others leave a row that says why not."""
        if not lowered:
            return
        truth = Truth(case, arguments)
        with concurrent.futures.ThreadPoolExecutor(_COMPILERS) as pool:
            first = {each.text: each for each in reversed(lowered)}
            jobs = {text: pool.submit(self._compiled, each) for text, each in first.items()}
            for each in lowered:
                if first[each.text] is not each:
                    rows.append(each.row(Outcome.SAME, same_as=first[each.text].name))
                    continue
                try:
                    compiled, seconds = jobs[each.text].result()
                    if compiled is None or self.is_over:
                        rows.append(each.row(Outcome.NOT_REACHED, _LATE))
                        continue
                    self.tell(f"{case}: {each.name}")
                    row = self._checked(case, each, compiled, arguments, truth)
                except Exception as error:  # a vendor's compiler, its launch, or the memory
                    rows.append(each.row(Outcome.FAILED, words_of(error)))
                    continue
                row.compile_s = seconds
                rows.append(row)
                if row.program is not None:
                    yield row.program

    def _compiled(self, lowered: Lowered) -> tuple[Any, float]:
        if self.is_over:
            return None, 0.0
        start = time.perf_counter()
        return lowered.program.compile(), time.perf_counter() - start

    def _checked(self, case: Case, lowered: Lowered, compiled: Any, arguments: tuple[Any, ...], truth: Truth) -> Row:
        """Runs a program once, compares its result, and warms it up."""
        temporary, output = _memory_of(compiled)
        free = _free_bytes()
        if temporary + output > _ROOM * free:
            needs = f"needs {(temporary + output) / 2**30:.1f} GiB besides its inputs"
            return lowered.row(Outcome.TOO_LARGE, f"{needs}; {free / 2**30:.1f} are free")
        result = jax.block_until_ready(compiled(*arguments))  # type: ignore[no-untyped-call]
        errors = {} if truth.why_not else truth.errors(result)
        del result
        queued = case.request.target.platform != "cpu"
        program = Program(lowered.name, functools.partial(compiled, *arguments), queued, temporary)
        program.warm_up()
        if truth.is_wrong(errors):
            worst = max(errors, key=lambda name: errors[name])
            reason = f"the relative error of {worst} is {errors[worst]:.2g}"
            return lowered.row(Outcome.WRONG, reason, program=program, errors=errors)
        note = f"not compared: {truth.why_not}" if truth.why_not else ""
        return lowered.row(Outcome.TIMED, note, program=program, errors=errors)


def _memory_of(compiled: Any) -> tuple[int, int]:
    """The bytes of a program's temporaries and of its results; 0 where its compiler does not say."""
    with contextlib.suppress(Exception):
        found = compiled.memory_analysis()
        return int(found.temp_size_in_bytes), int(found.output_size_in_bytes)
    return 0, 0


def _free_bytes() -> float:
    """Of the device; of a CPU what the system says is available, as beyond that it would end the process."""
    found = jax.devices()[0].memory_stats()
    if found and "bytes_limit" in found:
        return float(found["bytes_limit"] - found["bytes_in_use"])
    if jax.default_backend() == "cpu":
        with contextlib.suppress(OSError, StopIteration, ValueError):
            lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
            return next(float(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    return math.inf
