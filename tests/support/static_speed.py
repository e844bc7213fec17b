"""Schedules of the kernels in a program that a process of its own compiles: nothing runs on a TPU.

libtpu writes its schedules where it is told before it is loaded.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from kernelry.aot.tpu_schedule import read_schedule


def schedule_of(script, *arguments, kernel):
    """The schedule of the only kernel of that name in the program that a script compiles."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_pass_label_regex=final.*"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags}
        command = [sys.executable, str(script), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        names = f"*-{kernel}*-final_bundles.txt", f"*-{kernel}*-final_hlo-static-per-bundle-utilization.txt"
        written = [[path for path in Path(folder).glob(name) if "schedule-analysis" not in path.name] for name in names]
        [bundles], [utilization] = written
        return read_schedule(bundles.read_text(), utilization.read_text())
