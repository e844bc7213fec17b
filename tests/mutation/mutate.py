"""Measures what the test suite catches: changes one place of the product at a time and runs the tests that cover it.

A mutant is killed if a test fails, takes far too long or can no longer be imported. `equivalent.toml` names the mutants
that no test can tell from the product, and says why.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

from covering import Suite
from operators import Mutation, mutations

HERE = Path(__file__).parent
TARGETS = (
    *(f"core/src/kernelry/{name}/**/*.py" for name in ("masks", "adapters", "cache", "storage")),
    *(f"core/src/kernelry/{name}.py" for name in ("normalization", "attend", "resolver", "preference")),
    *(f"core/src/kernelry/{name}.py" for name in ("conditions", "capabilities", "request")),
    "plugins/dot_product/src/**/*.py",
    "plugins/gpu_pallas/src/kernelry_gpu_pallas/tile_masks.py",
)
OUTCOMES = ("killed", "survived", "not covered", "equivalent", "error")


@dataclasses.dataclass
class Result:
    """What became of a mutant; `by` is the test that killed it, or why it is equivalent."""

    id: str
    place: str
    operator: str
    outcome: str
    by: str
    tests: int
    seconds: float
    diff: list[str]

    def __str__(self) -> str:
        return f"{self.id} {self.place} {self.outcome}, {self.seconds} s, {self.tests} tests; {self.by}"


@dataclasses.dataclass
class Run:
    """What pytest did; `code` is None if it ran out of time."""

    code: int | None
    output: str
    chosen: int = 0
    passed: int = 0
    failed: list[str] = dataclasses.field(default_factory=list)
    not_collected: list[str] = dataclasses.field(default_factory=list)


class Copy:
    """A copy of the tree, in which one mutant at a time is tried."""

    def __init__(self, tree: Path, folder: Path, suite: Suite):
        self.folder, self.suite, self.count = folder, suite, 0
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=tree, capture_output=True, check=True, text=True).stdout
        for source in (tree / name for name in listed.split("\0") if name and (tree / name).is_file()):
            target = folder / source.relative_to(tree)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
        if (tree / ".jax_cache").exists():  # what the suite compiled need not be compiled again
            shutil.copytree(tree / ".jax_cache", folder / ".jax_cache")

    @contextlib.contextmanager
    def changed(self, mutation: Mutation) -> Iterator[None]:
        """Puts a mutation in place. A time of change of its own keeps Python from taking another's bytecode for it."""
        path = self.folder / mutation.path
        original, before = path.read_bytes(), path.stat()
        self.count += 1
        try:
            path.write_text(mutation.mutated)
            os.utime(path, (before.st_atime, int(before.st_mtime) + 1000 + self.count))
            yield
        finally:
            path.write_bytes(original)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def python(self, *command: str, limit: float = 120) -> tuple[int | None, str]:
        """Runs Python on the copy; returns its exit code, None after `limit` seconds, and what it printed."""
        sources = [self.folder / "core/src", *sorted(self.folder.glob("plugins/*/src")), HERE]
        settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0", "CI": "true"}
        environment = settings | os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sources))}
        process = subprocess.Popen(
            [sys.executable, *command], cwd=self.folder, env=environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it and what it started
            process.wait()
        return process.returncode, output

    def pytest(self, tests: list[str], *options: str) -> Run:
        """Runs tests in this order."""
        chosen, verdict = self.folder / ".chosen", self.folder / ".verdict"
        chosen.write_text("\n".join(tests))
        verdict.unlink(missing_ok=True)
        given = [
            "--chosen",
            str(chosen),
            "--verdict",
            str(verdict),
            *dict.fromkeys(t.partition("::")[0] for t in tests),
        ]
        plugins = ["-p", "no:cacheprovider", "-p", "no:randomly", "-p", "chosen_tests"]
        limit = 120 + 3 * self.suite.time_of(tests)
        code, output = self.python("-m", "pytest", "-q", "--tb=short", *plugins, *options, *given, limit=limit)
        return Run(code, output, **json.loads(verdict.read_text() if verdict.exists() else "{}"))

    def try_mutation(self, mutation: Mutation) -> Result:
        """Runs the tests that cover a mutation until one fails."""
        start, stages = time.monotonic(), self.suite.stages(mutation)
        outcome, by = ("survived", "") if stages else ("not covered", "")
        ran = 0
        with self.changed(mutation):
            for tests in stages:
                run = self.pytest(tests, "-x")
                ran += run.passed + len(run.failed)
                outcome, by = self.judged(run)
                if outcome != "survived":
                    break
        place = f"{mutation.path}:{mutation.line}"
        seconds = round(time.monotonic() - start, 1)
        return Result(mutation.id, place, mutation.operator, outcome, by, ran, seconds, mutation.diff())

    def judged(self, run: Run) -> tuple[str, str]:
        """The outcome, and what killed the mutant; only for what the mutation itself does can it be killed."""
        if run.code is None:
            return "killed", "time limit"
        if run.failed:
            return "killed", run.failed[0]
        if run.code == 0 and run.chosen:
            return "survived", ""
        if run.code < 0:
            return "killed", f"signal {-run.code}"
        if run.not_collected:
            return "killed", f"cannot import {run.not_collected[0]}"
        code, output = self.python(
            "-c", "import kernelry, kernelry.cache, kernelry_dot_product, kernelry_gpu_pallas.plugin"
        )
        if code:
            return "killed", f"cannot import: {output.strip().splitlines()[-1]}"
        return "error", f"pytest ended with {run.code}, {run.chosen} tests chosen:\n{run.output[-2000:]}"


def every_mutation(tree: Path) -> list[Mutation]:
    """All mutations of the target files."""
    paths = sorted({path.relative_to(tree).as_posix() for target in TARGETS for path in tree.glob(target)})
    found = [mutation for path in paths for mutation in mutations(tree, path)]
    print(f"{len(found)} mutations of {len(paths)} files")
    return found


def sample(every: list[Mutation], count: int, seed: int) -> list[Mutation]:
    """Draws mutations, of each line at most one. Each draws its own lot, so most stay drawn when others come and go."""
    lots = sorted(every, key=lambda mutation: (random.Random(f"{seed} {mutation.id}").random(), mutation.id))
    drawn: dict[tuple[str, int], Mutation] = {}
    for mutation in lots:
        if len(drawn) < count and (mutation.path, mutation.line) not in drawn and mutation.is_valid():
            drawn[mutation.path, mutation.line] = mutation
    print(f"{len(drawn)} drawn with seed {seed}")
    return list(drawn.values())


def check(copy: Copy, tests: list[str]) -> list[str]:
    """Runs tests without a mutation; returns those that fail all the same."""
    _, where = copy.python("-c", "import kernelry, kernelry_dot_product as d; print(kernelry.__file__, d.__file__)")
    if where.count(str(copy.folder)) != 2:
        sys.exit(f"The tests would not run on the copy {copy.folder} but on\n{where}")
    run = copy.pytest(tests)
    if run.code not in (0, 1) or run.chosen < len(tests):
        sys.exit(f"pytest ended with {run.code}: {run.chosen} of {len(tests)} tests were found.\n{run.output[-3000:]}")
    print(f"without a mutation {run.passed} of {len(tests)} tests pass on {copy.folder}", *run.failed, sep="\n  ")
    return run.failed


def run_all(drawn: list[Mutation], copies: list[Copy], results: dict[str, Result], write: Path) -> None:
    """Tries the mutations that have no result yet, and writes each result down at once."""
    free: queue.Queue[Copy] = queue.Queue()
    for copy in copies:
        free.put(copy)

    def trial(mutation: Mutation) -> Result:
        copy = free.get()
        try:
            return copy.try_mutation(mutation)
        finally:
            free.put(copy)

    with concurrent.futures.ThreadPoolExecutor(len(copies)) as pool:
        todo = [pool.submit(trial, mutation) for mutation in drawn if mutation.id not in results]
        try:
            for future in concurrent.futures.as_completed(todo):
                result = future.result()
                results[result.id] = result
                save(results, write)
                print(f"[{len(results)}] {result}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)


def save(results: dict[str, Result], path: Path) -> None:
    """Writes results as JSON."""
    path.write_text(json.dumps([dataclasses.asdict(each) for each in results.values()], indent=1))


def distrust(copy: Copy, results: dict[str, Result]) -> None:
    """A test that also fails without a mutation has killed nothing."""
    killers = sorted({result.by for result in results.values() if result.outcome == "killed" and "::" in result.by})
    failing = set(check(copy, killers)) if killers else set()
    for result in results.values():
        if result.by in failing:
            result.outcome, result.by = "error", f"{result.by} fails without the mutation, too"


def report(results: list[Result], heading: str) -> str:
    """The summary, in Markdown."""
    counts = collections.Counter(result.outcome for result in results)
    judged = len(results) - counts["equivalent"] - counts["error"]
    lines = [f"# {heading}", "", "| outcome | mutants |", "|---|---|"]
    lines += [f"| {outcome} | {counts[outcome]} |" for outcome in OUTCOMES]
    lines += [
        "",
        f"Score: {counts['killed']} of {judged} that are not equivalent, {counts['killed'] / max(judged, 1):.1%}.",
    ]
    by_place = sorted(results, key=lambda each: each.place)
    for outcome in ("survived", "not covered", "error", "equivalent"):
        for result in (each for each in by_place if each.outcome == outcome):
            lines += ["", f"## {outcome}: {result.id}, {result.place}", ""]
            lines += ["```diff", *result.diff, "```"]
            lines += ["", result.by] if result.by else []
    lines += ["", "## killed", ""]
    lines += [f"- {each.id}, {each.place}: {each.by}" for each in by_place if each.outcome == "killed"]
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=HERE.parents[1], help="the repository; default: this one")
    parser.add_argument("--coverage", type=Path, help="from `pytest --cov --cov-context=test`, with relative_files")
    parser.add_argument("--junit", type=Path, help="from the same run's --junitxml: how long each test takes")
    parser.add_argument("--sample", type=int, default=150, help="how many mutants")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", help="these ids, whether drawn or not, separated by commas")
    parser.add_argument("--json", type=Path, default=Path(".mutation.json"), help="the results, written as they come")
    parser.add_argument("--markdown", type=Path, help="the summary")
    parser.add_argument("--equivalent", type=Path, default=HERE / "equivalent.toml")
    parser.add_argument("--resume", action="store_true", help="keep the results in --json, but for errors")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--check", action="store_true", help="run a few tests without a mutation, and nothing else")
    asked = parser.parse_args()
    if not asked.list and asked.coverage is None:
        parser.error("--coverage is needed")
    return asked


def equivalent(path: Path, every: list[Mutation]) -> dict[str, str]:
    """Why mutants are equivalent, by id. The ids change with the lines: one that names no mutant has to go."""
    reasons = tomllib.loads(path.read_text()) if path.exists() else {}
    if unknown := reasons.keys() - {mutation.id for mutation in every}:
        sys.exit(f"{path} names mutants that there are not: {', '.join(sorted(unknown))}")
    return reasons


def known_results(asked: argparse.Namespace, drawn: list[Mutation], reasons: dict[str, str]) -> dict[str, Result]:
    """The results that need no run: earlier ones if they are to be kept, and the equivalent mutants."""
    results = {}
    if asked.resume and asked.json.exists():
        wanted = None if asked.only else {mutation.id for mutation in drawn}
        earlier = [Result(**each) for each in json.loads(asked.json.read_text())]
        kept = [each for each in earlier if wanted is None or each.id in wanted]
        results = {each.id: each for each in kept if each.outcome not in ("error", "equivalent")}
    for mutation in drawn:
        if asked.only:
            results.pop(mutation.id, None)
        elif mutation.id in reasons:
            place = f"{mutation.path}:{mutation.line}"
            results[mutation.id] = Result(
                mutation.id, place, mutation.operator, "equivalent", reasons[mutation.id], 0, 0.0, mutation.diff()
            )
    return results


def main() -> None:
    """Does what was asked for."""
    asked = arguments()
    tree = asked.tree.resolve()
    every = every_mutation(tree)
    if asked.only:
        drawn = [mutation for mutation in every if mutation.id in asked.only.split(",")]
    else:
        drawn = sample(every, asked.sample, asked.seed)
    if asked.list:
        for mutation in drawn:
            print(mutation.id, f"{mutation.path}:{mutation.line}", mutation.operator)
            print(*(f"    {line}" for line in mutation.diff() if line[0] in "+-"), sep="\n")
        return
    reasons = equivalent(asked.equivalent, every)
    suite = Suite(asked.coverage, asked.junit)
    with tempfile.TemporaryDirectory(prefix="kernelry-mutation-") as scratch:
        copies = [Copy(tree, Path(scratch) / str(number), suite) for number in range(asked.workers)]
        failing = check(copies[0], suite.some(20))
        if failing or asked.check:
            sys.exit(len(failing))
        results = known_results(asked, drawn, reasons)
        run_all(drawn, copies, results, asked.json)
        distrust(copies[0], results)
    save(results, asked.json)
    summary = report(list(results.values()), f"{len(results)} mutants, seed {asked.seed}")
    print(summary)
    if asked.markdown:
        asked.markdown.write_text(summary)
    sys.exit(any(result.outcome == "error" for result in results.values()))


if __name__ == "__main__":
    main()
