"""Everything this plugin takes from fa4-jax, in one place.

Written against fa4-jax 0.1.0 (0.1 … 0.2), cutejax 0.1.5 and nvidia-cutlass-dsl 4.8.1. Private are

- `fa4_vjp_p`, the backward pass as a primitive: it alone takes the output and the logsumexp of the whole attention;
- `register_backend`, and `kernels._device_arch`, which asks JAX's first device: the kernels are compiled while a
  program is lowered, for whatever `_device_arch` says then. A backend for each compute capability says what the request
  said, so that a program for another GPU can be compiled, without one too;
- two caches of kernels that are not told apart by compute capability;
- the scheduler's question after the device's multiprocessors, which full attention on Blackwell asks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any, final

import jax
from fa4_jax import MaskMod, attention, static

from kernelry_gpu_flash_attn.fa4.masks import Window
from kernelry_gpu_flash_attn.fa4.rules import Axes, Place, Rule

REFERENCE = "reference"
"""The vendor's backend in plain JAX. Its derivative ignores the output and the logsumexp that it is given."""

_ARCHITECTURES = {80: "sm_80", 86: "sm_86", 89: "sm_89", 90: "sm_90a", 100: "sm_100a"}
"""By compute capability, what the CUTLASS DSL calls the instruction set that the vendor's kernels need."""

_MULTIPROCESSORS = 148
"""Of a B200, where no such device can be asked; kernelry.aot compiles for as many."""


@final
@dataclasses.dataclass(frozen=True)
class _Visible(MaskMod):  # type: ignore[misc]
    """A rule and its arrays as the vendor's mask: the rule is code of the kernel, the arrays are operands."""

    arrays: tuple[Any, ...]
    rule: Rule = static()  # noqa: RUF009
    axes: tuple[Axes, ...] = static()

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return self.rule.at(Place(b, h, q_idx, kv_idx, self.arrays, self.axes))


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What is static in a call.

    Args:
      scale: the factor on the products.
      window: the vendor's (left, right).
      rule: what else must be true of a visible key; None is nothing.
      axes: of the arrays that the rule reads.
      backend: `REFERENCE`, or that of `backend_for`.
    """

    scale: float
    window: Window
    rule: Rule | None
    axes: tuple[Axes, ...]
    backend: str


def attend(
    settings: Settings, query: jax.Array, key: jax.Array, value: jax.Array, arrays: tuple[jax.Array, ...]
) -> jax.Array:
    """Returns the output [B, T, N, D]."""
    found: jax.Array = attention.flash_attn(query, key, value, return_lse=False, **_options(settings, arrays))
    return found


def attend_with_statistics(
    settings: Settings, query: jax.Array, key: jax.Array, value: jax.Array, arrays: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    """Returns the output, and its logsumexp, natural and float32 [B, N, T]."""
    found: tuple[jax.Array, jax.Array] = attention.flash_attn(
        query, key, value, return_lse=True, **_options(settings, arrays)
    )
    return found


def differentiate(
    settings: Settings,
    operands: tuple[jax.Array, jax.Array, jax.Array],
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    arrays: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of query, key and value, of the output and logsumexp of the whole attention."""
    options = _options(settings, arrays)
    leaves, mask = attention._flatten_mask(options["mask_mod"])
    config = attention._make_config(
        operands[0], False, settings.window, settings.scale, mask, settings.backend, varlen=False
    )
    query, key, value = attention.fa4_vjp_p.bind(*operands, out, lse, d_out, *leaves, cfg=config, has_d_lse=False)
    return query, key, value


def _options(settings: Settings, arrays: tuple[jax.Array, ...]) -> dict[str, Any]:
    mask = None if settings.rule is None else _Visible(arrays, settings.rule, settings.axes)
    return {
        "window_size": settings.window,
        "scale": settings.scale,
        "mask_mod": mask,
        "backend": settings.backend,
    }


def why_no_compiler() -> str | None:
    """Says why the vendor's kernels cannot be imported; its compiler is built for one CUDA major and one Python."""
    try:
        importlib.import_module("fa4_jax.kernels")
    except Exception as error:  # cutejax has an error of its own, in a module that then cannot be imported either
        return f"fa4_jax.kernels cannot be imported: {error}"
    return None


@functools.cache
def backend_for(generation: int) -> str:
    """Registers the vendor's kernels for a compute capability, times ten, and returns the name of that backend."""
    name = f"kernelry_sm_{generation}"
    attention.register_backend(name, _Backend(generation))
    return name


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Backend:
    """The vendor's kernels, built for one compute capability whatever device this process has."""

    generation: int

    def fwd(self, *operands: Any) -> Any:
        with _built_for(self.generation) as kernels:
            return kernels.fwd(*operands)

    def fwd_lse(self, *operands: Any) -> Any:
        with _built_for(self.generation) as kernels:
            return kernels.fwd_lse(*operands)

    def vjp(self, *operands: Any) -> Any:
        with _built_for(self.generation) as kernels:
            return kernels.vjp(*operands)


_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def _built_for(generation: int) -> Iterator[Any]:
    """Inside, the vendor and its compiler see a device of that compute capability."""
    import cutlass.utils
    from cutlass.base_dsl.dsl import BaseDSL
    from fa4_jax import kernels
    from fa4_jax.cute import tile_scheduler

    with _ONE_AT_A_TIME, warnings.catch_warnings(), contextlib.ExitStack() as stack:
        # Read under the lock: another thread may have replaced the same names.
        replaced = [
            (kernels, "_device_arch", lambda: generation),
            (kernels, "_cute_mask_mod", functools.partial(_masks, generation, kernels._cute_mask_mod)),
            (kernels, "_get_bwd_pre", functools.partial(_prepares, generation)),
            (kernels, "_get_bwd_post", functools.partial(_finishes, generation)),
            (BaseDSL._get_dsl().envar, "_arch", _ARCHITECTURES[generation]),
        ]
        if jax.default_backend() != "gpu" or kernels._device_arch() != generation:
            replaced += [(owner, "HardwareInfo", _AbsentDevice) for owner in (cutlass.utils, tile_scheduler)]
        # fa4-jax 0.1.0 calls what nvidia-cutlass-dsl 4.8 has moved; where warnings are errors, compiling some masks for
        # compute capability 10.0 fails without naming one.
        warnings.simplefilter("ignore")
        for owner, name, value in replaced:
            stack.enter_context(_replaced(owner, name, value))
        yield kernels.CuteBackend()


@final
class _AbsentDevice:
    """What the vendor's scheduler asks of a device, where the program is for another machine's."""

    def get_device_multiprocessor_count(self) -> int:
        return _MULTIPROCESSORS


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@functools.cache
def _masks(generation: int, make: Any, mask: Any) -> Any:
    return make.__wrapped__(mask)


@functools.cache
def _prepares(generation: int, *sizes: Any) -> Any:
    from fa4_jax.cute.flash_bwd_preprocess import FlashAttentionBackwardPreprocess

    return FlashAttentionBackwardPreprocess(*sizes)


@functools.cache
def _finishes(generation: int, *sizes: Any) -> Any:
    from fa4_jax.cute.flash_bwd_postprocess import FlashAttentionBackwardPostprocess

    return FlashAttentionBackwardPostprocess(*sizes)
