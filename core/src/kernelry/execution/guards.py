"""What the arrays of a call pass through: errors about derivatives and a notice about platforms, and no operation.

An array that is differentiated goes through a `custom_jvp` that is the identity; its tangent through a primitive that
is the identity, too, and knows in which direction it is used: JAX evaluates or lowers a tangent only in forward mode,
and transposes it only in reverse mode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Set
from typing import Any, NoReturn, final

import jax

from kernelry._compat import Marker, is_forward_mode_of_custom_vjp, platforms_of
from kernelry.errors import ArgumentError
from kernelry.kernel.partial import Partial
from kernelry.kernel.spec import Inputs, KernelSpec
from kernelry.request.request import Operand, Request

_logger = logging.getLogger("kernelry")
_PLATFORMS = {"cuda": "gpu", "rocm": "gpu"}
"""What JAX calls a platform when it lowers, and kernelry's name of it."""


def without_gradient(inputs: Inputs, unwanted: Set[Operand]) -> Inputs:
    """Makes differentiating the operands that are not wanted an error, instead of a silent zero."""
    names = [operand.value for operand in Operand if operand in unwanted]
    guarded: dict[str, Any] = {name: _guard(name, getattr(inputs, name)) for name in names}
    return dataclasses.replace(inputs, **guarded)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _guard(name: str, array: jax.Array) -> jax.Array:
    return array


@_guard.defjvp
def _refuse(name: str, primals: Any, tangents: Any) -> NoReturn:
    raise ArgumentError(
        f"the gradient of {name} was not asked for: pass gradients=({name!r}, …), or mode='train' for all of them, "
        "or stop the gradient before the call."
    )


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _OneWay:
    """A kernel with a backward pass and no other derivative, and who names the kernels that have all of them."""

    name: str
    forward_over_reverse: bool
    alternatives: Callable[[], str]

    @classmethod
    def of(cls, kernel: KernelSpec, alternatives: Callable[[], str]) -> _OneWay:
        return cls(kernel.name, kernel.capabilities.forward_over_reverse, alternatives)


def in_reverse_mode(
    inputs: Inputs, wanted: Set[Operand], kernel: KernelSpec, alternatives: Callable[[], str]
) -> Inputs:
    """Makes forward mode, and second derivatives in reverse mode or that the kernel does not declare, errors.

    Args:
      inputs: the arrays of a call.
      wanted: the operands whose gradient is asked for.
      kernel: what runs, which has a backward pass and no other derivative.
      alternatives: says, for an error, what to pass to get a kernel that JAX differentiates itself.
    """
    guard = functools.partial(_once, _OneWay.of(kernel, alternatives))
    guarded: dict[str, Any] = {
        operand.value: guard(getattr(inputs, operand.value)) for operand in Operand if operand in wanted
    }
    return dataclasses.replace(inputs, **guarded)


@contextlib.contextmanager
def naming_forward_mode(kernel: KernelSpec, alternatives: Callable[[], str]) -> Iterator[None]:
    """Around the run of a kernel: turns JAX's error about forward mode into the one that names other kernels.

    JAX raises its own where it batches the kernel before it computes or lowers a tangent, as in a jitted jax.jacfwd:
    a tangent that is only batched may be transposed later, so its marker cannot refuse there.

    Args:
      kernel, alternatives: as for `in_reverse_mode`.
    """
    try:
        yield
    except TypeError as error:
        if not is_forward_mode_of_custom_vjp(error):
            raise
        _no_forward_mode(_OneWay.of(kernel, alternatives), error)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _once(kernel: _OneWay, array: jax.Array) -> jax.Array:
    return array


@_once.defjvp
def _once_jvp(kernel: _OneWay, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    primal = primals[0] if kernel.forward_over_reverse else _never_again(kernel, primals[0])
    return primal, _reverse_only.bind(tangents[0], kernel=kernel)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _never_again(kernel: _OneWay, array: jax.Array) -> jax.Array:
    return array


@_never_again.defjvp
def _never_again_jvp(kernel: _OneWay, primals: Any, tangents: Any) -> NoReturn:
    raise ArgumentError(
        f"kernel {kernel.name!r} has gradients and no derivatives of its gradients (jax.hessian, jax.grad of jax.grad)"
        f": pass {kernel.alternatives()}, which has them."
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _not_again(kernel: _OneWay, cotangent: jax.Array) -> jax.Array:
    return cotangent


@_not_again.defjvp
def _not_again_jvp(kernel: _OneWay, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return primals[0], _forward_only.bind(tangents[0], kernel=kernel)


def _no_forward_mode(kernel: _OneWay, cause: TypeError | None = None) -> NoReturn:
    raise ArgumentError(
        f"kernel {kernel.name!r} has gradients in reverse mode (jax.grad, jax.vjp) and no derivative in forward mode "
        f"(jax.jvp, jax.linearize, jax.jacfwd): pass {kernel.alternatives()}, which has both."
    ) from cause


def _no_second_reverse(kernel: _OneWay) -> NoReturn:
    raise ArgumentError(
        f"kernel {kernel.name!r} has gradients, and no gradient of its gradients in reverse mode (jax.grad of jax.grad)"
        f": pass {kernel.alternatives()}, which has them, or differentiate jax.grad in forward mode, as jax.hessian "
        "does."
    )


def _lower_tangent(_context: Any, _tangent: Any, *, kernel: _OneWay) -> NoReturn:
    _no_forward_mode(kernel)


def _lowered(_context: Any, array: Any, **_params: Any) -> list[Any]:
    return [array]


def _passed_once(cotangent: Any, _tangent: Any, *, kernel: _OneWay) -> list[Any]:
    return [_not_again(kernel, cotangent)]


def _passed_again(_cotangent: Any, _tangent: Any, *, kernel: _OneWay) -> NoReturn:
    _no_second_reverse(kernel)


_reverse_only = Marker(
    "kernelry_reverse_only", _lower_tangent, _passed_once, lambda _, *, kernel: _no_forward_mode(kernel)
)
_forward_only = Marker("kernelry_forward_only", _lowered, _passed_again)


def noticed_elsewhere(partial: Partial, request: Request, kernel: str) -> Partial:
    """Notices when a program is lowered for another platform than its kernel was chosen for.

    Args:
      partial: the result of a call, in a program that is being traced.
      request: what the kernel was chosen for.
      kernel: its name.
    """
    return dataclasses.replace(partial, out=_placed.bind(partial.out, request=request, kernel=kernel))


def _lower_placed(context: Any, array: Any, *, request: Request, kernel: str) -> list[Any]:
    _warn_of_lowering(request, kernel, platforms_of(context))
    return [array]


def _passed(cotangent: Any, _array: Any, **params: Any) -> list[Any]:
    return [_placed.bind(cotangent, **params)]  # of a gradient alone, the forward pass may not be in the program


_placed = Marker("kernelry_placed", _lower_placed, _passed)


@functools.lru_cache(maxsize=1024)
def _warn_of_lowering(request: Request, kernel: str, platforms: tuple[str, ...]) -> None:
    """Notices a program that is lowered for another platform than its kernel was chosen for, once a request."""
    others = sorted({_PLATFORMS.get(name, name) for name in platforms} - {request.target.platform})
    for platform in others:
        _logger.warning(
            "kernel %s was chosen for platform %s (%s), and the program is lowered for %s: trace it within "
            'kernelry.use(target="%s") to get the kernel for that platform',
            kernel,
            request.target.platform,
            request,
            platform,
            platform,
        )
