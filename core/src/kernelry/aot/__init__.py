"""Compiling for hardware that is not present: the vendor's real compiler, without a device.

It shows that a program compiles, what memory it takes, and that a kernel is in it.
Where it is asked to, it also reads what the compilers schedule: of TPU kernels the cycles, from which a time is
predicted, of GPU kernels the registers, spills and products. That is static, not measured, and says nothing about
numbers. Rooflines are computed from the request and published figures of the device.

The names below are public, its modules are internal. Imports everything but the command.
"""

from kernelry.aot.compilation import Compilation, Outcome, compile_for
from kernelry.aot.devices import NoCompilerError, topology_of
from kernelry.aot.layers import LayerReport, check_layers
from kernelry.aot.speed import KernelSpeed
from kernelry.aot.work import Work

__all__ = [
    "Compilation",
    "KernelSpeed",
    "LayerReport",
    "NoCompilerError",
    "Outcome",
    "Work",
    "check_layers",
    "compile_for",
    "topology_of",
]
