"""Differentiates a kernel that is not traced as the program around it is: `BoundKernel.traced` says how.

Its forward and the derivative that JAX finds of it are traced alike, without 64-bit types or where JAX does not check
manual axes; around the two is a custom_vjp. Imported where there may be such a kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

import jax

from kernelry.errors import ArgumentError
from kernelry.execution.attend import BoundKernel
from kernelry.execution.manual_axes import are_checked, unchecked
from kernelry.kernel.capabilities import Gradient
from kernelry.kernel.partial import Partial
from kernelry.kernel.spec import Inputs

_Pull: TypeAlias = Callable[[Partial], tuple[Inputs]]


def forward(part: BoundKernel, inputs: Inputs, *, statistics: bool) -> Partial:
    """Runs a kernel's forward, with its own derivative where it has one: with statistics, core has it otherwise."""
    gradient = part.kernel.capabilities.gradient
    is_derived = gradient is Gradient.NATIVE or (gradient is Gradient.BACKWARD and not statistics)
    if is_derived and (part.is_narrow or are_checked()):
        return _derived(part, statistics, inputs)
    return part.run(inputs, statistics=statistics)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _derived(part: BoundKernel, statistics: bool, inputs: Inputs) -> Partial:
    return part.run(inputs, statistics=statistics)


def _derived_forward(part: BoundKernel, statistics: bool, inputs: Inputs) -> tuple[Partial, _Pull]:
    return part.traced(functools.partial(jax.vjp, functools.partial(part.run, statistics=statistics)), inputs)


def _derived_backward(part: BoundKernel, statistics: bool, pull: _Pull, d_partial: Partial) -> tuple[Inputs]:
    def pulled(pull: _Pull, d_partial: Partial) -> tuple[Inputs]:
        found: tuple[Inputs] = jax.tree.map(_unless_of_integers, pull(d_partial))
        return found

    return part.traced(pulled, pull, d_partial)


_derived.defvjp(_derived_forward, _derived_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_checked_map(run: Callable[[Any], Any], arrays: Any) -> Any:
    """Calls a function that JAX cannot differentiate where it checks manual axes, for it has a shard_map inside."""
    return unchecked(run, arrays)


def _checked_forward(run: Callable[[Any], Any], arrays: Any) -> tuple[Any, Callable[[Any], Any]]:
    return unchecked(functools.partial(jax.vjp, run), arrays)


def _checked_backward(run: Callable[[Any], Any], pull: Callable[[Any], Any], cotangent: Any) -> Any:
    return unchecked(lambda pull, cotangent: jax.tree.map(_unless_of_integers, pull(cotangent)), pull, cotangent)


in_checked_map.defvjp(_checked_forward, _checked_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def without_gradient(run: Callable[[Any], Any], arrays: Any) -> Any:
    """Calls a function that has a shard_map over automatic axes inside, and makes differentiating it an error."""
    return run(arrays)


def _no_gradient(run: Callable[[Any], Any], arrays: Any) -> NoReturn:
    raise ArgumentError(
        "JAX has no gradient of attention that is cut over automatic mesh axes inside a shard_map over other axes that "
        "checks them: pass check_vma=False to that shard_map, or let it be over all axes of the sharding."
    )


without_gradient.defvjp(_no_gradient, _no_gradient)


def _unless_of_integers(cotangent: jax.Array) -> jax.Array | None:
    """Integers have cotangents of a dtype that no array has."""
    return None if cotangent.dtype == jax.dtypes.float0 else cotangent
