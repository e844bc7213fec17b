"""Makes differentiating what was not asked for an error instead of a silent zero."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Set
from typing import Any, NoReturn

import jax

from kernelry.errors import ArgumentError
from kernelry.kernel import Inputs
from kernelry.request import Operand


def without_gradient(inputs: Inputs, wanted: Set[Operand]) -> Inputs:
    """Guards the operands that are not wanted; adds no operation to the program."""
    guarded: dict[str, Any] = {
        operand.value: _guard(operand.value, array)
        for operand in Operand
        if operand not in wanted and (array := getattr(inputs, operand.value)) is not None
    }
    return dataclasses.replace(inputs, **guarded) if guarded else inputs


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _guard(name: str, array: jax.Array) -> jax.Array:
    return array


@_guard.defjvp
def _refuse(name: str, primals: Any, tangents: Any) -> NoReturn:
    raise ArgumentError(
        f"the gradient of {name} was not asked for: pass gradients=({name!r}, …), or mode='train' for all of them, "
        "or stop the gradient before the call."
    )
