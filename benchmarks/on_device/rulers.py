"""What times are measured against, in the same run and in turn with them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from on_device.timing import Program

PRODUCT, COPY, LAUNCH = "matrix_product", "copy", "launch"


def rulers(dtype: str) -> list[Program]:
    """A square product and a copy (bytes read and written both count), and a call that does next to nothing."""
    return [Program(*each.given, **each.work) for each in _compiled(dtype)]


class _Ruler:
    def __init__(self, name: str, function: Any, arguments: tuple[Any, ...], **work: Any) -> None:
        self.given = (name, jax.jit(function).lower(*arguments).compile(), arguments)
        self.work = work


@functools.cache
def _compiled(dtype: str) -> tuple[_Ruler, ...]:
    side, length = (1024, 2**24) if jax.default_backend() == "cpu" else (8192, 2**29)
    square = jax.random.normal(jax.random.key(1), (side, side), jnp.dtype(dtype))
    source, scalar = jnp.ones(length, jnp.uint8), jnp.ones(())
    return (
        _Ruler(PRODUCT, jnp.matmul, (square, square), flops=2 * side**3, facts={"side": side, "dtype": dtype}),
        _Ruler(COPY, jnp.copy, (source,), bytes=2 * length, facts={"array_bytes": length}),
        _Ruler(LAUNCH, lambda one: one + 1, (scalar,)),
    )
