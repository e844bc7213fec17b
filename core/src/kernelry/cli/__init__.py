"""The command `kernelry`.

Internal. Imports everything.
"""

from __future__ import annotations

import os


def main() -> int:
    """Runs the command and returns its exit status."""
    # Listing and explaining compute nothing; JAX need not look for accelerators' plugins noisily.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from kernelry.cli.app import run

    return run()
