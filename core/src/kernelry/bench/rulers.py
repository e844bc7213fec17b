"""What times are compared with, in the same run and in turn with them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, final

import jax
import jax.numpy as jnp

from kernelry.bench.turns import Program

PRODUCT, COPY, LAUNCH = "matrix_product", "copy", "launch"
_OF_CPU = 1024, 2**24
"""The side of a product's squares, 2 GFLOP, and the bytes of an array that is copied: beyond a core's caches."""
_OF_ACCELERATOR = 8192, 2**29


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Ruler:
    """Something simple that the device does.

    Args:
      program: runs it.
      flops, bytes: what a call takes; bytes read and bytes written both count.
      facts: its sizes.
    """

    program: Program
    flops: float = 0.0
    bytes: float = 0.0
    facts: tuple[tuple[str, Any], ...] = ()

    @property
    def flops_per_second(self) -> float:
        """The rate of the median call."""
        return self.flops / self.program.median * 1e3

    @property
    def bytes_per_second(self) -> float:
        """The rate of the median call."""
        return self.bytes / self.program.median * 1e3


def rulers(dtype: str, platform: str) -> dict[str, Ruler]:
    """A square matrix product and a copy, and a call that does next to nothing; without times yet."""
    side, length = _OF_CPU if platform == "cpu" else _OF_ACCELERATOR
    queued = platform != "cpu"
    product, copy, launch = (Program(name, call, queued) for name, call in _compiled(dtype, side, length).items())
    return {
        PRODUCT: Ruler(product, flops=2.0 * side**3, facts=(("side", side), ("dtype", dtype))),
        COPY: Ruler(copy, bytes=2.0 * length, facts=(("array_bytes", length),)),
        LAUNCH: Ruler(launch),
    }


@functools.cache
def _compiled(dtype: str, side: int, length: int) -> dict[str, functools.partial[Any]]:
    square = jax.random.normal(jax.random.key(1), (side, side), jnp.float32).astype(dtype)
    source, scalar = jnp.ones(length, jnp.uint8), jnp.ones(())
    given: dict[str, tuple[Any, tuple[Any, ...]]] = {
        PRODUCT: (jnp.matmul, (square, square)),
        COPY: (jnp.copy, (source,)),
        LAUNCH: (lambda one: one + 1, (scalar,)),
    }
    return {
        name: functools.partial(jax.jit(function).lower(*arguments).compile(), *arguments)
        for name, (function, arguments) in given.items()
    }
