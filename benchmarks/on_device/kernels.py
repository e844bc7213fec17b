"""The installed kernels and `auto`."""

from __future__ import annotations

import functools
from typing import Any

import jax

import kernelry
from kernelry.errors import KernelryError
from on_device.calls import AbsentError, Contender, custom_calls, lowered, one_line
from on_device.shapes import BOTH, Shape

AUTO = "auto"


def installed() -> list[str]:
    return sorted(each.spec.name for each in kernelry.kernels())


def contender(name: str) -> Contender:
    return Contender(name, "kernel", functools.partial(_lower, name))


def _lower(kernel: str, shape: Shape, which: str, arrays: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    """The program of a kernel, after proving that it is in there."""
    gradients = ("query", "key", "value") if which == BOTH else ()

    def attend(query: Any, key: Any, value: Any, ids: Any) -> jax.Array:
        found: jax.Array = kernelry.attention(
            query, key, value, mask=shape.mask(ids), soft_cap=shape.soft_cap, mode=shape.mode, kernel=kernel,
            gradients=gradients,
        )  # fmt: skip
        return found

    try:
        with kernelry.record() as resolutions:
            program = lowered(attend, which, arrays)
        resolution = resolutions[-1]
        resolution.verify(program)
    except KernelryError as error:
        raise AbsentError("refused", _own_words(kernel, str(error))) from error
    steps = [step.adapter.name for step in resolution.plan.steps]
    return program, {"kernel": resolution.kernel, "adapters": steps, "custom_calls": custom_calls(program)}


def _own_words(kernel: str, message: str) -> str:
    """What the kernel itself says in an error that also names the request and the others."""
    own = [line for line in message.splitlines() if line.strip().startswith(f"{kernel}: ")]
    return one_line("\n".join(own) or message)
