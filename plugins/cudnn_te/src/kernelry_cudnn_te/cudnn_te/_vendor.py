"""Everything this kernel takes from transformer-engine, in one place.

Written against transformer_engine 2.11 and 2.14 … 2.20. `cpp_extensions` is not among its documented modules: without
it there are no statistics and no backward pass from an output and lse of the whole attention. What differs between
releases is found in their signatures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import transformer_engine
from jax.interpreters import pxla
from transformer_engine.jax import cpp_extensions
from transformer_engine.jax.attention import (
    AttnBiasType,
    AttnMaskType,
    AttnSoftmaxType,
    CPStrategy,
    QKVLayout,
    SequenceDescriptor,
    fused_attn,
    is_fused_attn_kernel_available,
)
from transformer_engine.jax.sharding import MeshResource, global_mesh_resource, global_shard_guard, num_of_devices

from kernelry.errors import ConfigError
from kernelry.plugin import REMAT_NAME, Knowledge, Request, Vendor
from kernelry_cudnn_te.cudnn_te.settings import FIRST_WITH_ALL, TeSettings

__all__ = [
    "VERSION",
    "MeshResource",
    "backward",
    "described",
    "entered_mesh",
    "forward",
    "forward_with_statistics",
    "num_of_devices",
    "static_arguments",
    "why_declined",
]

VERSION: str = transformer_engine.__version__
_RELEASE = Vendor("transformer_engine", VERSION, Knowledge.PROBED).release


def static_arguments(settings: TeSettings, request: Request, segments: int) -> dict[str, Any]:
    """The arguments of a call other than arrays, by transformer-engine's names.

    Args:
      segments: the most that a row may hold.
    """
    biased = request.bias is not None
    told = {
        "attn_bias_type": AttnBiasType.POST_SCALE_BIAS if biased else AttnBiasType.NO_BIAS,
        "attn_mask_type": AttnMaskType[f"{settings.mask_type}_mask".replace("no_mask_mask", "no_mask").upper()],
        "qkv_layout": QKVLayout.THD_THD_THD if settings.packed else QKVLayout.BSHD_BSHD_BSHD,
        "softmax_type": AttnSoftmaxType.LEARNABLE_SOFTMAX if request.sinks else AttnSoftmaxType.VANILLA_SOFTMAX,
        "scaling_factor": request.scale,
        "dropout_probability": request.dropout_rate,
        # Without it there are no statistics, and probabilities are not dropped.
        "is_training": bool(request.gradients or request.partial or request.dropout_rate),
        "max_segments_per_seq": segments,
        "window_size": settings.window,
    }
    if request.max_logits:
        told["return_max_logit"] = True
    if settings.shared is not None:
        _check_ring(settings)
        told["context_parallel_strategy"] = CPStrategy[settings.shared.strategy.upper()]
        told["context_parallel_causal_load_balanced"] = settings.shared.order is not None
        told["context_parallel_axis"] = settings.shared.axis
    return told


def described(packed: bool, first: Any, second: Any) -> Any:
    """The SequenceDescriptor of lengths of queries and keys, or of the segments of packed tokens and places in them."""
    if packed:
        return SequenceDescriptor.from_segment_ids_and_pos((first, first), (second, second))
    return SequenceDescriptor.from_seqlens((first, second))


def why_declined(**settings: Any) -> str | None:
    """Returns transformer-engine's reason for having no kernel, empty where it gives none; None where it has one."""
    if is_fused_attn_kernel_available(**_known(is_fused_attn_kernel_available, settings)):
        return None
    helper = cpp_extensions.FusedAttnHelper
    window = settings["window_size"] or (-1, -1)
    answer = helper(**_known(helper, {**settings, "window_size": window})).get_fused_attn_backend()
    return str(answer[1]) if isinstance(answer, tuple) else ""


def forward(
    arrays: Mapping[str, Any],
    told: Mapping[str, Any],
    resource: Any,
    receive: Callable[[Any, Any, Any], tuple[Any, Any]],
) -> Any:
    """The output, and the largest logits where they are asked for; differentiated by transformer-engine's own rule.

    That rule, too, needs to know what the axes of the mesh mean, and runs when JAX calls it, so it is called from a
    rule of ours, which says it again.

    Args:
      receive: makes (result, pull, cotangent) into the pull and the cotangent that are used.
    """
    _check_known(fused_attn, told)

    def direct(arrays: Mapping[str, Any]) -> Any:
        with _told_of(resource):
            return fused_attn(**arrays, **told, context_checkpoint_name=REMAT_NAME)

    def with_pull(arrays: Mapping[str, Any]) -> tuple[Any, Any]:
        result, pull = jax.vjp(direct, arrays)
        return result, (result, pull)

    def backward(residuals: Any, cotangent: Any) -> Any:
        result, pull = residuals
        pull, cotangent = receive(result, pull, cotangent)
        with _told_of(resource):
            return pull(cotangent)

    attend: Any = jax.custom_vjp(direct)
    attend.defvjp(with_pull, backward)
    return attend(arrays)


def forward_with_statistics(arrays: Mapping[str, Any], told: Mapping[str, Any], resource: Any) -> tuple[Any, Any, Any]:
    """Output, lse and largest logits; they have no derivative."""
    _check_known(cpp_extensions.fused_attn_fwd, told)
    with _told_of(resource):
        out, lse, _, *largest = cpp_extensions.fused_attn_fwd(**arrays, **told)
    return out, lse, largest[0] if largest else None


def backward(arrays: Mapping[str, Any], told: Mapping[str, Any], resource: Any) -> tuple[tuple[Any, ...], Any]:
    """The gradients of query, key and value, and of the bias."""
    given = {name: value for name, value in arrays.items() if name != "seed"}
    told = {name: value for name, value in told.items() if name != "return_max_logit"}
    with _told_of(resource):
        gradients, d_bias, *_ = cpp_extensions.fused_attn_bwd(**given, **told)
    return gradients, d_bias


def entered_mesh() -> Any:
    """The mesh of `with mesh:`, empty where there is none; found where transformer-engine finds it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return pxla.thread_resources.env.physical_mesh.abstract_mesh


def _check_ring(settings: TeSettings) -> None:
    if settings.packed and _RELEASE < FIRST_WITH_ALL:
        wanted = ".".join(map(str, FIRST_WITH_ALL))
        raise ConfigError(f"cudnn_te: packed rows in a ring need transformer-engine {wanted}, found {VERSION}")


def _check_known(function: Callable[..., Any], told: Mapping[str, Any]) -> None:
    """A target elsewhere is assumed to have the latest release; the program is made with the installed one."""
    unknown = sorted(told.keys() - _names(function))
    if unknown:
        raise ConfigError(
            f"cudnn_te: transformer-engine {VERSION} does not have {', '.join(unknown)}; install a later release"
        )


_lasting = contextlib.ExitStack()
_ours: Any = None
"""What the mesh means, as last told for the rest of the process."""


@contextlib.contextmanager
def _told_of(resource: Any) -> Iterator[None]:
    """Tells transformer-engine what the axes of the mesh mean.

    It asks while a program is traced, and, where gradients are summed over devices, once more while it is compiled,
    when no scope is open, so what was told last remains in force. What a caller says by a `global_shard_guard` of its
    own is kept, except for an axis of sequences, which transformer-engine would apply to every call that names none.
    """
    global _ours
    theirs = _told_already()
    if theirs is not None and theirs is not _ours:
        resource = dataclasses.replace(theirs, cp_resource=None)
    elif resource != _ours:
        _lasting.enter_context(global_shard_guard(resource))
        _ours = resource
    with global_shard_guard(resource):
        yield


def _told_already() -> Any:
    try:
        return global_mesh_resource()
    except AssertionError:
        return None


def _known(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    names = _names(function)
    return {name: value for name, value in arguments.items() if name in names}


@functools.cache
def _names(function: Callable[..., Any]) -> frozenset[str]:
    if dataclasses.is_dataclass(function):
        return frozenset(field.name for field in dataclasses.fields(function))
    return frozenset(inspect.signature(function).parameters)
