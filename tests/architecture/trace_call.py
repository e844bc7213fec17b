"""Shows the modules that one attention call goes through: their lines and calls, and the crossings between files.

Run: python tests/architecture/trace_call.py [--kernel NAME] [--pairs] [--json]

The call is the first of a fresh process, made after the plugins are listed: training, on CPU, under a causal mask. It
is traced with `sys.setprofile`. A module is traced if one of its functions runs; what runs when a module is imported
does not count. A crossing is a call of a function whose nearest caller within kernelry is in another file. Files of
plugins are listed, but only those of the core are counted. What a reader follows is less than these files: the
functions that ran, and their lines. The import closure is what `kernelry.attention` and `kernelry.masks` import from
the core; `import kernelry` alone imports next to nothing of it.
"""

import argparse
import collections
import dataclasses
import json
import os
import sys
from pathlib import Path

_TOKENS, _HEADS, _HEAD_DIM = 16, 2, 8


@dataclasses.dataclass(frozen=True)
class Trace:
    """What one call went through; files are named as they are imported, `kernelry/masks/band.py`."""

    calls: dict[str, int]
    """How often functions of a file were called."""
    crossings: dict[tuple[str, str], int]
    """How often a function of one file called into another."""
    functions: dict[tuple[str, int], range]
    """The functions that ran, by file and first line, and their lines."""
    closure: dict[str, int]
    """The files that `kernelry.attention` and `kernelry.masks` import, and their lines."""
    bare: int
    """How many files `import kernelry` imports."""

    @property
    def core(self):
        """The files of the core that the call went through."""
        return [file for file in sorted(self.calls) if file.startswith("kernelry/")]

    def summary(self):
        """Returns the numbers that `test_trace_call.py` bounds."""
        return {
            "modules": len(self.core),
            "lines": sum(map(_lines, self.core)),
            "crossings": sum(self.crossings.values()),
            "functions": len(self.functions),
            "function_lines": len({(file, line) for (file, _), lines in self.functions.items() for line in lines}),
            "closure_modules": len(self.closure),
            "closure_lines": sum(self.closure.values()),
            "bare_modules": self.bare,
        }


def trace(kernel="auto"):
    """Traces one call. Only the first call of a process shows everything, since later ones find caches filled."""
    import kernelry

    bare = len(_imported())
    attention, mask = kernelry.attention, kernelry.masks.Causal()
    closure = {file: _lines(file) for file in sorted(_imported())}

    import jax.numpy as jnp

    kernelry.kernels()
    array = jnp.zeros((1, _TOKENS, _HEADS, _HEAD_DIM))
    calls, crossings, functions = collections.Counter(), collections.Counter(), {}

    def observe(frame, event, _):
        file = _file_of(frame)
        if event != "call" or file is None or frame.f_code.co_name == "<module>":
            return
        calls[file] += 1
        if _is_written(frame.f_code) and file.startswith("kernelry/"):
            functions[file, frame.f_code.co_firstlineno] = _lines_of(frame.f_code)
        caller = _caller_of(frame)
        if caller not in (None, file):
            crossings[caller, file] += 1

    sys.setprofile(observe)
    try:
        attention(array, array, array, mask=mask, kernel=kernel)
    finally:
        sys.setprofile(None)
    return Trace(dict(calls), dict(crossings), functions, closure, bare)


def _imported():
    files = (getattr(module, "__file__", None) for name, module in sys.modules.items() if _is_core(name))
    return [_named(file) for file in files if file]


def _is_core(module):
    return module == "kernelry" or module.startswith("kernelry.")


def _file_of(frame):
    return _named(frame.f_code.co_filename)


def _is_written(code):
    """Whether it is a function, and not an expression inside one, such as a generator."""
    return not code.co_name.startswith("<")


def _lines_of(code):
    """From the first decorator to the last line."""
    ends = (end for _, end, _, _ in code.co_positions() if end is not None)
    return range(code.co_firstlineno, max(ends) + 1)


def _caller_of(frame):
    """The file of the nearest caller within kernelry and its plugins."""
    caller = frame.f_back
    while caller is not None and _file_of(caller) is None:
        caller = caller.f_back
    return None if caller is None else _file_of(caller)


def _named(file):
    """`kernelry/…` or `kernelry_<plugin>/…` of a source file; None for others'."""
    parts = Path(file).parts
    at = next((i for i, part in enumerate(parts) if i and parts[i - 1] in ("src", "site-packages")), len(parts))
    named = "/".join(parts[at:])
    return named if named.startswith(("kernelry/", "kernelry_")) else None


def _lines(file):
    import kernelry

    return len((Path(kernelry.__file__).parents[1] / file).read_text(encoding="utf-8").splitlines())


def _report(found, *, pairs):
    for file in found.core:
        yield f"{file:52} {found.calls[file]:5} calls {_lines(file):5} lines"
    for file in sorted(set(found.calls) - set(found.core)):
        yield f"{file:52} {found.calls[file]:5} calls"
    if pairs:
        yield ""
        for (caller, called), count in sorted(found.crossings.items(), key=lambda item: (-item[1], item[0])):
            yield f"{count:5}  {caller} → {called}"
    numbers = found.summary()
    yield ""
    yield "the call: {modules} modules of the core, {lines} lines, {crossings} crossings".format(**numbers)
    yield "what ran: {functions} functions of {function_lines} lines".format(**numbers)
    yield "before it: {closure_modules} modules of the core, {closure_lines} lines".format(**numbers)
    yield "import kernelry: {bare_modules} modules of the core".format(**numbers)


def main():
    """Traces a call and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="auto", help="a kernel's name, or auto")
    parser.add_argument("--pairs", action="store_true", help="list the crossings, most frequent first")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    found = trace(options.kernel)
    text = json.dumps(found.summary()) if options.json else "\n".join(_report(found, pairs=options.pairs))
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    main()
