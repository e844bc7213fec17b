"""Compiling for hardware that is not here: the vendor's real compiler, without a device.

It proves that a program compiles, what memory it takes, and that a kernel is in it. It proves no numbers and no speed:
times beside a compilation are computed from the request and published figures of the device.
"""

from kernelry.aot.compilation import Compilation, compile_for
from kernelry.aot.layers import LayerReport, check_layers
from kernelry.aot.outcome import NoCompilerError, Outcome
from kernelry.aot.topology import topology_of
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
