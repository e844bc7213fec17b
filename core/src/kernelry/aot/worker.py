"""Jobs done by another process, which a compiler may end, and which reads its own environment variables.

`python -m kernelry.aot.worker` answers predictions; see `kernelry.aot.prediction`. Messages are pickles with their
length before them, from one version of kernelry to the same one.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import IO, Any, final

from kernelry.errors import ConfigError, KernelryError

COMMAND = (sys.executable, "-m", "kernelry.aot.worker")

_LENGTH = 8
"""Bytes of the length of a message."""

_READY = b"ready"
"""The first message of a process, once it has imported what it needs."""

_START = 300.0
"""Seconds for that: an import takes a few, and minutes where many processes share a machine."""


@final
class WorkerEndedError(KernelryError):
    """The process ended, or was ended for taking too long, before it answered; the message says how."""


def answers(
    shared: Any, jobs: Sequence[Any], *, limit: float, command: Sequence[str] = COMMAND
) -> Iterator[Any | WorkerEndedError]:
    """Yields the answer to each job, in order and as soon as it is known.

    All jobs are done by one process, one after the other. Where a job ends it or takes too long, its answer is a
    WorkerEndedError, and another process does the rest. The process ends with this iterator, also where that is left
    early. What it writes into the temporary folder is deleted.

    Args:
      shared: what every job needs; pickled, like each job and answer.
      jobs: what to do.
      limit: seconds for a job.
      command: what starts the process, which calls `serve`.

    Raises:
      ConfigError: what is shared, or a job, cannot be pickled here or unpickled there.
      WorkerEndedError: no process can be started.
      Exception: what a job raised.
    """
    rest = [_pickled(shared), *map(_pickled, jobs)]
    while len(rest) > 1:
        with contextlib.closing(_answers_of_one(rest, limit, command)) as found:
            for answer in found:
                del rest[1]
                yield answer


def _answers_of_one(messages: Sequence[bytes], limit: float, command: Sequence[str]) -> Generator[Any, None, None]:
    with tempfile.TemporaryDirectory(prefix="kernelry-") as folder, tempfile.TemporaryFile() as log:
        process = _started(command, folder, log)
        assert process.stdin is not None
        assert process.stdout is not None
        received: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        reader = threading.Thread(target=_receive, args=(process.stdout, received), daemon=True)
        try:
            reader.start()
            shared, *jobs = messages
            _send(process.stdin, shared)
            if _next(received, _START) != _READY:  # the limit is that of a job alone
                process.kill()
                raise WorkerEndedError(f"no process that compiles can be started: {_ending(process.wait(), log)}")
            for job in jobs:
                _send(process.stdin, job)
                message = _next(received, limit)
                if isinstance(message, WorkerEndedError):
                    yield message
                    return
                if message is None:
                    yield WorkerEndedError(f"the compiler ended its process: {_ending(process.wait(), log)}")
                    return
                outcome = pickle.loads(message)  # of our own process
                if outcome[0] == "raised":
                    raise outcome[1]
                yield outcome[1]
        finally:
            process.kill()
            process.wait()
            reader.join()
            process.stdin.close()
            process.stdout.close()


def _next(received: queue.SimpleQueue[bytes | None], limit: float) -> bytes | WorkerEndedError | None:
    """The next message; None where the process has ended."""
    try:
        return received.get(timeout=limit)
    except queue.Empty:
        return WorkerEndedError(f"it took more than {limit:g} s, and was ended")


def _started(command: Sequence[str], folder: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """The process can import what this one can, uses no accelerator, and is told of no KERNELRY_KERNEL or lock."""
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
    environment |= {"JAX_PLATFORMS": "cpu", "TMPDIR": folder, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment["KERNELRY_MEASUREMENTS"] = ""  # what a candidate leaves open is the kernel's default
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, bufsize=0
    )


_NOT_PASSED_ON = ("KERNELRY_KERNEL", "KERNELRY_STRICT", "KERNELRY_LOCK")


def _pickled(value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:  # pickle raises errors of many classes
        raise _cannot_be_sent(error) from error


def _cannot_be_sent(error: Exception) -> ConfigError:
    return ConfigError(
        f"what another process shall compile cannot be sent to it ({type(error).__name__}: {error}); define kernels "
        "given by use(kernels=…), and functions of masks, at the top level of a module that can be imported."
    )


def _send(stream: IO[bytes], message: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # the process has ended, which the reader learns, too
        stream.write(len(message).to_bytes(_LENGTH, "big") + message)
        stream.flush()


def _received(stream: IO[bytes]) -> bytes | None:
    """The next message; None where there is none."""
    length = _exactly(stream, _LENGTH)
    return None if length is None else _exactly(stream, int.from_bytes(length, "big"))


def _exactly(stream: IO[bytes], count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        part = stream.read(count - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def _receive(stream: IO[bytes], received: queue.SimpleQueue[bytes | None]) -> None:
    while (message := _received(stream)) is not None:
        received.put(message)
    received.put(None)


def _ending(status: int, log: IO[bytes]) -> str:
    """How a process ended, with what it said last."""
    how = f"status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    fatal = [line for line in lines if "Check failed" in line or line.startswith("F0") or "Fatal" in line]
    said = next(iter([*fatal, *reversed(lines)]), "")
    return how + (f": {said[:_LONGEST]}" if said else "")


_LONGEST = 240
"""Characters of what a process said."""


def serve(answer: Callable[[Any, Any], Any]) -> None:
    """Answers jobs until there are no more; what a process that `answers` starts calls.

    Args:
      answer: computes the answer from what is shared and the job.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends this one
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # compilers write to standard output
    stream = sys.stdin.buffer
    _send(out, _READY)
    message, shared = _received(stream), None
    while message is not None:
        try:
            found = pickle.loads(message)
        except Exception as error:  # a module that cannot be imported raises anything
            _send(out, pickle.dumps(("raised", _cannot_be_sent(error))))
            return
        if shared is None:
            shared = (found,)
        else:
            _send(out, _outcome(answer, shared[0], found))
        message = _received(stream)


def _outcome(answer: Callable[[Any, Any], Any], shared: Any, job: Any) -> bytes:
    try:
        return pickle.dumps(("answer", answer(shared, job)))
    except Exception as error:  # raised again by the process that asks
        try:
            return pickle.dumps(("raised", error))
        except Exception:  # an error that cannot be pickled
            return pickle.dumps(("raised", KernelryError(f"{type(error).__name__}: {error}")))


if __name__ == "__main__":
    from kernelry.aot.prediction import answered

    serve(answered)
