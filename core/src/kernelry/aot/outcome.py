"""What compiling showed, and what is left to a device: cuDNN builds its kernels there, from a description."""

from __future__ import annotations

import enum
from typing import Any, final

from kernelry.errors import ConfigError
from kernelry.kernel.proof import custom_calls


@final
class Outcome(enum.Enum):
    """Whether a program compiles, as far as that can be said without a device."""

    OK = "ok"
    FAILED = "no"
    UNCHECKED = "unchecked"
    NO_COMPILER = "no compiler"

    def __str__(self) -> str:
        return self.value


@final
class NoCompilerError(ConfigError):
    """The compiler of a target is not installed, or cannot be loaded; the message says what to do."""


_CUDNN_CALL = "__cudnn$"
_CUDNN_MISSING = ("cuDNN not found", "cuDNN is not detected")
"""What JAX says when it lowers a call of cuDNN where that is not installed, with its CUDA plugin and without."""


def left_to_device(program: Any) -> str:
    """Returns what of a compiled program no compiler has checked; empty where there is nothing."""
    calls = sorted(target for target in custom_calls(program) if target.startswith(_CUDNN_CALL))
    return f"the program calls {', '.join(calls)}, which cuDNN builds on the device" if calls else ""


def asked_of_device(error: Exception) -> str:
    """Returns what could not be lowered because a device's libraries are missing; empty for other reasons."""
    if any(words in str(error) for words in _CUDNN_MISSING):
        return "the program calls cuDNN, which JAX lowers only where cuDNN is installed"
    return ""
