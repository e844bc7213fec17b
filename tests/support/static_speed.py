"""Schedules of the kernels in a program that a process of its own compiles: nothing runs on a TPU.

libtpu writes its schedules where it is told before it is loaded.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from kernelry.aot.tpu_schedule import read_schedule


def schedule_of(script, *arguments, kernel):
    """The schedule of the only kernel of that name in the program that a script compiles."""
    return compiled_by(script, *arguments, kernel=kernel)[0]


def compiled_by(script, *arguments, kernel):
    """The same, and what the script wrote."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_pass_label_regex=final.*"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags}
        command = [sys.executable, str(script), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        names = f"*-{kernel}*-final_bundles.txt", f"*-{kernel}*-final_hlo-static-per-bundle-utilization.txt"
        written = [[path for path in Path(folder).glob(name) if "schedule-analysis" not in path.name] for name in names]
        [bundles], [utilization] = written
        return read_schedule(bundles.read_text(), utilization.read_text()), done.stdout


_ITEM_BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "s8": 1, "pred": 1}
_ARRAY = re.compile(r"\b(bf16|f32|s32|u32|s8|pred)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z-]+)\(([^)]*)\)", re.MULTILINE)
_MOVING = {"fusion", "copy", "reduce", "transpose", "convert", "broadcast", "multiply", "concatenate", "pad", "slice"}
_STARTED = {"copy-start", "call-start", "async-start"}
"""Their result holds both what is read and what is written."""


def bytes_besides_kernels(program):
    """Bytes of main memory that XLA's own instructions of a compiled program read and write, each by itself."""
    results, moved = {}, 0
    for name, result, operation, operands in _INSTRUCTION.findall(program[program.index("\nENTRY") :]):
        results[name] = _bytes(result)
        if operation in _MOVING | _STARTED:
            moved += results[name]
        if operation in _MOVING:
            moved += sum(results[operand] for operand in re.findall(r"%([\w.-]+)", operands))
    return moved


def _bytes(result):
    """Of main memory: S(1) is memory of a core."""
    total = 0
    for item, dimensions, layout in _ARRAY.findall(result):
        size = _ITEM_BYTES[item] if "S(" not in layout else 0
        for dimension in filter(None, dimensions.split(",")):
            size *= int(dimension)
        total += size
    return total
