"""Cycles by the TPU compiler's own final schedule: nothing is timed, and nothing runs on a TPU.

A bundle of the schedule is a cycle. libtpu writes its schedules where it is told before it is loaded, so each program
is compiled by a process of its own.
"""

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from kernelry.resolution.published import DEVICE_RATES

CLOCKS = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "tpu7x": 2.2e9}
"""Hz. Not published: with the matrix units that libtpu's schedules use, they give the published FLOP/s."""

_CORES = {"v5p": 2}
"""That share the memory of what is published as one device."""

_ADDRESS = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2}\s*)?:")


@dataclasses.dataclass(frozen=True, slots=True)
class Schedule:
    """The cycles of a kernel's grid.

    Args:
      bodies: of each innermost region with a product, in the order of the program.
      overhead: of the rest of a step.
    """

    bodies: tuple[int, ...]
    overhead: int


def schedule_of(script, *arguments, kernel):
    """The schedule of a kernel in the program that a script compiles."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_pass_label_regex=final.*"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags}
        command = [sys.executable, str(script), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found = [path for path in Path(folder).glob(f"*-{kernel}*-final_bundles.txt") if "schedule" not in path.name]
        [bundles] = found
        return read_schedule(bundles.read_text())


def read_schedule(text):
    """The schedule that a file of final bundles shows."""
    address, opened, loop = 0, {}, None
    regions, products = [], []
    for line in text.splitlines():
        if match := _ADDRESS.match(line):
            address = int(match[1], 16)
            loop = address if loop is None and " LB: " in line else loop
        if "vmatmul" in line:
            products.append(address)
        opened |= dict.fromkeys(re.findall(r"Start region (\d+)", line), address)
        regions += [(opened[name], address) for name in re.findall(r"End region (\d+)", line) if name in opened]
    assert loop is not None, "no grid"
    with_products = {span for span in regions if any(span[0] <= place <= span[1] for place in products)}
    bodies = sorted(
        (start, end)
        for start, end in with_products
        if not any(other != (start, end) and start <= other[0] and other[1] <= end for other in with_products)
    )
    end_of_loop = min(end for start, end in regions if start <= loop and end >= bodies[-1][1])
    cycles = tuple(end - start + 1 for start, end in bodies)
    return Schedule(cycles, end_of_loop - loop + 1 - sum(cycles))


def memory_cycles(kind, size):
    """The cycles in which a core's share of memory delivers so many bytes."""
    return size / (DEVICE_RATES[kind].bandwidth / _CORES.get(kind, 1)) * CLOCKS[kind]
