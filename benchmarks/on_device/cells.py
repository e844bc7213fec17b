"""One pass over one shape: everybody who can is compiled, compared with the truth, and timed in turn."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Iterator
from typing import Any, final

import jax
import numpy as np

from on_device import truth
from on_device.calls import AbsentError, Contender, one_line
from on_device.clock import Clock
from on_device.rulers import COPY, PRODUCT, rulers
from on_device.shapes import FORWARD, Shape
from on_device.timing import Program, check_room, take_turns

_COMPILERS = max(1, min(8, (os.cpu_count() or 2) // 2))
"""Threads; most of a run is compiling, and nothing is timed meanwhile."""
_FOREVER = 1e6
"""Seconds; a lock cannot wait infinitely long."""


@final
@dataclasses.dataclass(slots=True)
class Cell:
    """A shape and a pass; `programs` holds what came out, by contender."""

    shape: Shape
    which: str
    arrays: tuple[Any, ...]
    truth: dict[str, np.ndarray]
    clock: Clock
    programs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def run(self, contenders: list[Contender], repeats: int) -> dict[str, Any]:
        ready = list(self._ready(contenders))
        measures = rulers(self.shape.dtype)
        for each in measures:
            each.warm_up()
        take_turns([*ready, *measures], repeats, self.clock)
        found = {each.name: each.to_json() for each in measures}
        order = {each.name: self.programs.get(each.name) for each in contenders}
        order |= {each.name: self._fractions(each.to_json(), found) for each in ready}
        return {"programs": order, "rulers": found}

    def _ready(self, contenders: list[Contender]) -> Iterator[Program]:
        """Programs that run; the others leave the reason why not."""
        for contender, compiled, facts in self._compiled(list(self._lowered(contenders))):
            try:
                self._in_time()
                check_room(compiled)
                program = self._program(contender, compiled, facts)
                self._compare(program)
                program.warm_up()
            except Exception as error:  # the memory, or a vendor's launch: the others still count
                self._absent(contender, error)
            else:
                yield program

    def _lowered(self, contenders: list[Contender]) -> Iterator[tuple[Contender, Any, dict[str, Any]]]:
        for contender in contenders:
            try:
                self._in_time()
                yield contender, *contender.lower(self.shape, self.which, self.arrays)
            except Exception as error:  # whatever a vendor raises on a shape
                self._absent(contender, error)

    def _compiled(self, lowered: list[tuple[Contender, Any, dict[str, Any]]]) -> Iterator[tuple[Any, ...]]:
        """Compiles side by side; `auto` shares the program of the kernel that it chose, if it is the same."""
        pool = concurrent.futures.ThreadPoolExecutor(_COMPILERS)
        texts = [program.as_text() for _, program, _ in lowered]
        first = {text: place for place, text in reversed(list(enumerate(texts)))}
        jobs = {text: pool.submit(_compile, lowered[place][1]) for text, place in first.items()}
        for place, ((contender, _, facts), text) in enumerate(zip(lowered, texts, strict=True)):
            try:
                compiled, seconds = jobs[text].result(min(max(self.clock.left, 0), _FOREVER))
                same = {} if first[text] == place else {"same_program_as": lowered[first[text]][0].name}
                yield contender, compiled, facts | {"compile_s": seconds} | same
            except Exception as error:  # a vendor's compiler
                self._absent(contender, error)
        pool.shutdown(wait=False, cancel_futures=True)

    def _program(self, contender: Contender, compiled: Any, facts: dict[str, Any]) -> Program:
        traffic = self.shape.bytes if self.which == FORWARD else 0
        facts = {"kind": contender.kind} | facts
        flops = self.shape.flops(self.which)
        return Program(contender.name, compiled, self.arrays, flops=flops, bytes=traffic, facts=facts)

    def _compare(self, program: Program) -> None:
        result = jax.block_until_ready(program.run(*program.arguments))
        found = truth.errors(self.shape, self.which, result, self.truth)
        program.facts["relative_error"] = {name: float(f"{error:.3g}") for name, error in found.items()}
        program.facts["wrong"] = truth.is_wrong(self.shape, found)

    def _fractions(self, found: dict[str, Any], measures: dict[str, Any]) -> dict[str, Any]:
        found["of_matrix_product"] = round(found["tflop_per_s"] / measures[PRODUCT]["tflop_per_s"], 4)
        if "gb_per_s" in found:
            found["of_copy"] = round(found["gb_per_s"] / measures[COPY]["gb_per_s"], 4)
        return found

    def _in_time(self) -> None:
        if self.clock.is_over:
            raise AbsentError("not reached", "the minutes were over")

    def _absent(self, contender: Contender, error: Exception) -> None:
        late = isinstance(error, concurrent.futures.TimeoutError) and self.clock.is_over
        how = error.how if isinstance(error, AbsentError) else "not reached" if late else "failed"
        why = str(error) if isinstance(error, AbsentError) else "the minutes were over" if late else one_line(error)
        self.programs[contender.name] = {"kind": contender.kind, "absent": how, "reason": why}


def _compile(program: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    return program.compile(), round(time.perf_counter() - start, 2)
