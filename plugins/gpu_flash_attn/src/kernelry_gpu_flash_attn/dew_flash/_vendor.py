"""Everything this kernel takes from dew-flash-attn, in one place.

Written against dew_flash_attn 0.3.6. What it takes is private there and has no public name:

- `_forward`: the public functions return no logsumexp;
- `_backward`: theirs is differentiated with their own output and logsumexp only, and sinks and merged parts need those
  of the whole attention;
- `_hopper` and `_multiprocessors`, which read a GPU of this process: without one nothing could be lowered, and for
  another device than its own the program would be the wrong one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, TypeAlias

import dew_flash_attn
import jax

from kernelry.errors import ConfigError
from kernelry.plugin import Target
from kernelry_gpu_flash_attn.dew_flash.devices import HOPPER, MULTIPROCESSORS
from kernelry_gpu_flash_attn.dew_flash.settings import Settings

_dew: Any = dew_flash_attn
_lock = threading.RLock()

Starts: TypeAlias = tuple[jax.Array, jax.Array]
"""Where packed sequences start among the queries and among the keys, and where the last ends: int32 [sequences + 1]."""


def forward(
    query: jax.Array, key: jax.Array, value: jax.Array, starts: Starts | None, settings: Settings
) -> tuple[jax.Array, jax.Array]:
    """Returns the output, shaped as the query, and its logsumexp, natural and float32.

    Args:
      query, key, value: [B, T or S, heads, H]; with `starts` [tokens, heads, H].
      starts: of packed sequences; None where each row of the batch is one.

    Returns:
      The output, and the logsumexp [B, N, T]; of packed sequences [N, tokens] by FlashAttention-3, and by
      FlashAttention-2 [sequences, N, T].
    """
    with _answering(settings.target):
        found: tuple[jax.Array, jax.Array] = _dew._forward(query, key, value, starts, *_told(settings))
    return found


def backward(
    d_out: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    starts: Starts | None,
    settings: Settings,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of query, key and value; arrays are laid out as in `forward`."""
    with _answering(settings.target):
        found: tuple[jax.Array, jax.Array, jax.Array] = _dew._backward(
            d_out, query, key, value, out, lse, starts, *_told(settings)
        )
    return found


def is_hopper(target: Target) -> bool:
    """Whether FlashAttention-3 serves a target: the vendor answers for a GPU of this process whose kind has no name."""
    with _answering(target):
        return bool(_dew._hopper())


def _told(settings: Settings) -> tuple[Any, ...]:
    return settings.longest, settings.scale, settings.causal, settings.window


@contextlib.contextmanager
def _answering(target: Target) -> Iterator[None]:
    """Lets the vendor see the device of a target instead of a GPU of this process.

    A GPU of this process that is of the target's kind is asked itself: it may have fewer multiprocessors than others
    of its name, as a part of one has.
    """

    def multiprocessors() -> int:
        if target.kind not in MULTIPROCESSORS:
            raise ConfigError(f"dew_flash: how many multiprocessors {target} has is not known; name e.g. gpu:a100.")
        return MULTIPROCESSORS[target.kind]

    with _lock:  # of a target that is here, too: another thread may have replaced what the vendor answers
        if _is_here(target):
            yield
            return
        hopper = target.generation == HOPPER
        own = _dew._hopper, _dew._multiprocessors
        _dew._hopper, _dew._multiprocessors = (lambda: hopper), multiprocessors
        try:
            yield
        finally:
            _dew._hopper, _dew._multiprocessors = own


def _is_here(target: Target) -> bool:
    try:
        first = jax.devices("gpu")[0]
    except RuntimeError:
        return False
    return Target.of_device(first.platform, first.device_kind).kind == target.kind
