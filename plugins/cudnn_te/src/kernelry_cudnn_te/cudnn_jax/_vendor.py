"""Everything this plugin takes from JAX's cuDNN attention, in one place.

Written against jax 0.10.0 … 0.12.0. The module is private, and three things are in no public one:

- the logsumexp in float32: `jax.nn.dot_product_attention(return_residual=True)` rounds it to the query's dtype;
- the backward pass with our own output and logsumexp, for sinks and merges;
- the questions after cuDNN and the device, which JAX asks only while it traces.

`attend` is the innermost function to which `jax.nn.dot_product_attention(implementation="cudnn")` leads; programs are
equal. There, names for `jax.checkpoint` policies can be given to what its derivative keeps.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, final

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo

from kernelry.plugin import named

MaskType = fused_attention_stablehlo.MaskType

_fused: Any = fused_attention_stablehlo
_BTNH: int = _fused.AttentionLayout.BTNH.value
_SEED = 42
"""JAX's default; without dropout nothing reads it."""

# Until jax 0.10 goes, whose primitive has no `score_mod`.
_HAS_SCORE_MOD = "score_mod" in inspect.signature(_fused._dot_product_attention).parameters
_NO_SCORE_MOD: dict[str, Any] = {"score_mod": None} if _HAS_SCORE_MOD else {}
_NO_SCORE_MOD_ARGS: dict[str, Any] = {"score_mod_args": ()} if _HAS_SCORE_MOD else {}


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Attributes:
    """What is static in a call.

    Args:
      mask_type: none, causal, by lengths, or both; causal is aligned at the first query and the first key.
      window: how many keys a query sees at most, itself included; None where all before it.
      scale: the factor on the products.
    """

    mask_type: Any
    window: int | None
    scale: float


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """The arrays of a call; lengths are int32 [B], both or none."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None
    query_lengths: jax.Array | None
    kv_lengths: jax.Array | None


def attend(operands: Operands, attributes: Attributes) -> jax.Array:
    """Returns the output [B, T, N, D], with JAX's derivative of it."""
    has_bias = operands.bias is not None
    found: jax.Array = _attention_with_names(
        **_arrays(operands),
        **_NO_SCORE_MOD_ARGS,
        **_NO_SCORE_MOD,
        scale=attributes.scale,
        seed=_SEED,
        dropout_rate=0.0,
        variadic_args=(has_bias, has_bias),  # the second: whether it has a gradient
        mask_type=attributes.mask_type,
        layout=_BTNH,
        sliding_window_length=attributes.window,
        cudnn_version=_fused.check_cudnn_version(),
        return_residual=False,
    )
    return found


def _arrays(operands: Operands) -> dict[str, jax.Array]:
    """What the vendor's function reads; an empty array where there is nothing."""
    absent = jnp.zeros(0, operands.query.dtype)
    given = {
        "query": operands.query,
        "key": operands.key,
        "value": operands.value,
        "bias": operands.bias,
        "q_seqlen": operands.query_lengths,
        "kv_seqlen": operands.kv_lengths,
        **dict.fromkeys(("q_offsets", "kv_offsets", "page_table_k", "page_table_v")),
    }
    return {name: absent if array is None else array for name, array in given.items()}


def _with_names(vendor: Any) -> Any:
    """JAX's function and derivative, but for names: JAX gives none to the output and logsumexp that it keeps."""

    def forward(*arguments: Any) -> tuple[jax.Array, Any]:
        _, (*kept, lse, out) = vendor.fwd(*arguments)
        lse, out = named((lse, out))
        return out, (*kept, lse, out)

    function: Any = jax.custom_vjp(vendor.fun, nondiff_argnums=vendor.nondiff_argnums)
    function.defvjp(forward, vendor.bwd)
    return function


_attention_with_names: Any = _with_names(_fused._dot_product_attention)


def attend_with_statistics(operands: Operands, attributes: Attributes) -> tuple[jax.Array, jax.Array]:
    """Returns the output, and its logsumexp, natural and float32 [B, N, T]; they have no derivative here."""
    found: tuple[jax.Array, jax.Array] = _fused.dot_product_attention(
        operands.query,
        operands.key,
        operands.value,
        bias=operands.bias,
        q_seqlen=operands.query_lengths,
        kv_seqlen=operands.kv_lengths,
        scale=attributes.scale,
        mask_type=attributes.mask_type,
        sliding_window_length=attributes.window,
        return_residual=True,
    )
    return found


def differentiate(
    operands: Operands,
    attributes: Attributes,
    lse: jax.Array,
    out: jax.Array,
    d_out: jax.Array,
    *,
    bias_gradient: bool,
) -> list[jax.Array]:
    """Returns the gradients of query, key and value, and of the bias where it is wanted."""
    found: list[jax.Array] = _fused._dot_product_attention_bwd_p_wrapper.bind(
        *_arrays(operands).values(),
        lse,
        out,
        d_out,
        scale=attributes.scale,
        seed=_SEED,
        dropout_rate=0.0,
        variadic_args=(operands.bias is not None, bias_gradient),
        mask_type=attributes.mask_type,
        layout=_BTNH,
        sliding_window_length=attributes.window,
        **_NO_SCORE_MOD,
    )
    return found


def sees_device() -> bool:
    """Whether JAX has a CUDA device."""
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


def cudnn_version() -> int | None:
    """The installed cuDNN, e.g. 91002 for 9.10.2; None where JAX finds none."""
    try:
        return int(_fused.check_cudnn_version())
    except RuntimeError:
        return None


def is_capability(capability: str) -> bool:
    """Whether this machine's device is of exactly this compute capability, e.g. `10.3`."""
    return bool(_fused.is_cuda_compute_capability_equal(capability))
