"""The command `kernelry`.

Internal. Imports everything.
"""

from __future__ import annotations

import os


def main(name: str = "kernelry") -> int:
    """Runs the command and returns its exit status.

    Args:
      name: the command's, for messages about its usage.
    """
    # Listing and explaining compute nothing; JAX need not look for accelerators' plugins noisily.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from kernelry.cli.app import run

    return run(name)
