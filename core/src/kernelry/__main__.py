"""`python -m kernelry` is the command."""

import sys

from kernelry.cli import main

sys.exit(main("python -m kernelry"))
