"""A process for kernelry.aot.worker whose answers are given by its jobs, and which some of them end.

A job is a word and what goes with it. Run as `python tests/support/careless_worker.py`.
"""

import os
import sys
import time

from kernelry.aot.worker import serve
from kernelry.errors import ConfigError


def answer(shared, job):
    word, argument = job
    if word == "abort":
        os.write(2, f"F0000 00:00:00 compiler.cc:1] Check failed: {argument}\n".encode())
        os.abort()
    if word == "exit":
        os._exit(argument)
    if word == "raise":
        raise ConfigError(argument)
    if word == "unpicklable":
        raise OSError(sys.stdin)
    if word == "sleep":
        time.sleep(argument)
    if word == "print":
        os.write(1, b"a compiler writes to standard output\n")
    return shared, argument, os.getpid()


if __name__ == "__main__":
    serve(answer)
