"""A run ends in time, also inside something that never returns."""

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from on_device.clock import Clock, elapsed

pytestmark = pytest.mark.sweep

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
_STUCK = """
import threading
from on_device.clock import Clock
def end():
    print("written", flush=True)
    threading.Event().wait({ending})
Clock(0.2).guard(end, lambda: 3)
threading.Event().wait(60)
"""


def test_without_minutes_there_is_no_end():
    assert Clock().left == math.inf
    assert not Clock().is_over


def test_nothing_is_begun_in_the_last_tenth():
    minutes = elapsed() / 60 + 10
    assert Clock(minutes).left < 600 - 2 * 0.05 * 600 + 1
    assert not Clock(minutes).is_over
    assert Clock(elapsed() / 60 + 0.3).is_over


def _ended(ending):
    command = [sys.executable, "-c", _STUCK.format(ending=ending)]
    return subprocess.run(
        command, check=False, cwd=_BENCHMARKS, env={"PYTHONPATH": "."}, capture_output=True, text=True
    )


def test_a_run_that_is_stuck_is_ended_in_time_and_writes_first():
    start, ended = time.monotonic(), _ended(ending=0)
    assert (ended.returncode, ended.stdout) == (3, "written\n")
    assert time.monotonic() - start < 50


def test_an_ending_that_is_stuck_is_ended_too():
    start, ended = time.monotonic(), _ended(ending=60)
    assert (ended.returncode, ended.stdout) == (3, "written\n")
    assert time.monotonic() - start < 50
