"""Compiling for hardware that is not present, with the vendor's real compiler and without a device.

A compilation proves that a program compiles, how much memory it takes, and that it contains a kernel. It proves
nothing about numbers or speed: the times that are reported with it are computed from the request and the published
rates of the device. May import every package but the command and `testing`.
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
