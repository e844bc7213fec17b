"""Compiling for hardware that is not present: the vendor's real compiler, without a device.

It shows that a program compiles, what memory it takes, and that a kernel is in it. It says nothing about numbers or
speed: the times reported with a compilation are computed from the request and published figures of the device.

The names below are public, its modules are internal. Imports everything but the command.
"""

from kernelry.aot.compilation import Compilation, Outcome, compile_for
from kernelry.aot.devices import NoCompilerError, topology_of
from kernelry.aot.layers import LayerReport, check_layers
from kernelry.aot.work import Work

__all__ = [
    "Compilation",
    "LayerReport",
    "NoCompilerError",
    "Outcome",
    "Work",
    "check_layers",
    "compile_for",
    "topology_of",
]
