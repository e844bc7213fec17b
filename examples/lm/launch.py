"""Several processes of one program on this machine, which find each other over loopback."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

_PORTS = range(20_000, 30_000)
"""Below those from which Linux takes the ports of outgoing connections, so that none of these takes the one chosen."""

_TOLD = 2_000
"""Characters of a failed process's output that an error shows."""


class LaunchError(Exception):
    """A process failed, or did not end in time."""


def launch(program: Path, arguments: Sequence[str], processes: int, *, seconds: float) -> None:
    """Runs processes to their end; the output of the first is shown.

    Args:
      program: a script with the options --coordinator, --processes and --process.
      arguments: its other arguments.
      processes: how many.
      seconds: after which they are ended.

    Raises:
      LaunchError: one failed, or they took longer; with the end of its output. The others are ended.
    """
    together = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(place) for place in range(processes)]
        running = [
            _started([sys.executable, str(program), *arguments, *together, "--process", str(place)], log, place)
            for place, log in enumerate(logs)
        ]
        try:
            _wait(running, logs, seconds)
        finally:
            for process in running:
                process.kill()
                process.wait()


def free_port() -> int:
    """Returns a port of loopback that is free."""
    for port in random.sample(_PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise LaunchError(f"none of 100 ports between {_PORTS.start} and {_PORTS.stop} is free")


def _started(command: list[str], log: Path, place: int) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file if place else None, stderr=file)


def _wait(running: list[subprocess.Popen[bytes]], logs: list[Path], seconds: float) -> None:
    until = time.monotonic() + seconds
    while any(process.poll() is None for process in running):
        _check(running, logs)
        if time.monotonic() > until:
            late = [place for place, process in enumerate(running) if process.poll() is None]
            raise LaunchError(f"processes {late} have not ended after {seconds:g} s{_end(logs[late[0]])}")
        time.sleep(0.05)
    _check(running, logs)


def _check(running: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
    for place, process in enumerate(running):
        if process.poll():
            raise LaunchError(f"process {place} ended with status {process.returncode}{_end(logs[place])}")


def _end(log: Path) -> str:
    told = log.read_text(errors="replace")[-_TOLD:].strip()
    return f":\n{told}" if told else "."
