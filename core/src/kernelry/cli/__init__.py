"""The command `kernelry`."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Runs the command; without the extra `cli` it says how to install it."""
    # Listing and explaining compute nothing; JAX need not look for accelerators' plugins noisily.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        from kernelry.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.stderr.write(f"The command kernelry needs {error.name}: pip install 'kernelry[cli]'\n")
        return 2
    return run()
