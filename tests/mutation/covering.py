"""Which tests cover a line, and in which order they are worth running."""

from __future__ import annotations

import collections
import functools
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import coverage
from operators import Mutation, Span

FIRST_TESTS = 60  # of the mirroring files, and of others
FIRST_FILES = 6  # of others; most take 0.2 s to collect
FIRST_SECONDS = 30.0
_END = 10**6


class Suite:
    """What each test covers, and how long it takes: from a coverage file with a context per test, and a JUnit file."""

    def __init__(self, data: Path, junit: Path | None):
        self.data = coverage.CoverageData(str(data))
        self.data.read()
        cases = [] if junit is None else list(ElementTree.parse(junit).iter("testcase"))
        self.seconds = {_name(case): float(case.get("time", 0)) for case in cases}
        self.failing = {_name(case) for case in cases if {child.tag for child in case} & {"failure", "error"}}
        self.contexts = functools.cache(self._contexts)

    def stages(self, mutation: Mutation) -> list[list[str]]:
        """The tests that run a mutation's line, promising ones first; of a line run on import, the whole file's."""
        lines = self.contexts(mutation.path)
        spans = [(mutation.line, mutation.line), mutation.span]
        on_import = not mutation.lazy or any("" in lines.get(line, ()) for line in range(*_ends(mutation.span)))
        if on_import:
            spans += [*mutation.scopes, (0, _END)]
        found = [self._running(lines, span) for span in spans]
        near = next(filter(None, found), set())
        first = self._promising(mutation.path, near)
        rest = (near | found[-1] if on_import else near) - set(first)
        return [stage for stage in (first, self._ordered(rest)) if stage]

    def time_of(self, tests: Iterable[str]) -> float:
        """How long tests took, in seconds."""
        return sum(self.seconds.get(_key(test), 1.0) for test in tests)

    def some(self, count: int) -> list[str]:
        """Quick tests of different functions."""
        files = self.data.measured_files()
        return self._ordered(set().union(*(self._running(self.contexts(file), (0, _END)) for file in files)))[:count]

    def _contexts(self, path: str) -> dict[int, list[str]]:
        return self.data.contexts_by_lineno(path)

    def _running(self, lines: dict[int, list[str]], span: Span) -> set[str]:
        within = (contexts for line, contexts in lines.items() if span[0] <= line <= span[1])
        tests = {context.rpartition("|")[0] for context in itertools.chain.from_iterable(within) if context}
        return {test for test in tests if _key(test) not in self.failing}

    def _promising(self, path: str, tests: set[str]) -> list[str]:
        """Quick tests of the files named like the mutated one, then of those with the most tests of it."""
        mirroring = _mirroring(path, {_file(test) for test in tests})
        named = self._ordered({test for test in tests if _file(test) in mirroring})
        others = self._ordered(tests - set(named))
        files = dict(collections.Counter(map(_file, others)).most_common(FIRST_FILES))
        others = [test for test in others if _file(test) in files]
        return [test for some in (named, others) for test in self._within_reason(some[:FIRST_TESTS])]

    def _ordered(self, tests: Iterable[str]) -> list[str]:
        """The quickest first; the fifth case of a function after four of every other."""
        cases: collections.Counter[str] = collections.Counter()
        ranked = []
        for seconds, test in sorted((self.time_of([test]), test) for test in tests):
            function = test.partition("[")[0]
            ranked.append((cases[function] // 4, seconds, test))
            cases[function] += 1
        return [test for *_, test in sorted(ranked)]

    def _within_reason(self, tests: list[str]) -> list[str]:
        sums = itertools.accumulate(self.time_of([test]) for test in tests)
        return [test for test, total in zip(tests, sums, strict=True) if total < FIRST_SECONDS or test == tests[0]]


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}.{case.get('name')}"


def _key(test: str) -> str:
    """What JUnit calls a test."""
    names, bracket, case = test.partition("[")
    return names.replace(".py::", ".").replace("/", ".").replace("::", ".") + bracket + case


def _file(test: str) -> str:
    return test.partition("::")[0]


def _ends(span: Span) -> Span:
    return span[0], span[1] + 1


def _mirroring(path: str, files: set[str]) -> set[str]:
    """The test files that share the most words with a path: of cache/paged.py, those called test_cache_paged*.py."""
    words = _words(path.partition("/src/")[2].partition("/")[2])
    shared = {file: len(words & _words(Path(file).name)) for file in files}
    return {file for file, count in shared.items() if count == max(shared.values()) > 0}


def _words(path: str) -> set[str]:
    return {word.removesuffix("s") for word in re.findall("[a-z]+", path)} - {"test", "py", "base", "init", "kernel"}
