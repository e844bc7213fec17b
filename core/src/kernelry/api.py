"""The front end: splits a call into its request and its arrays, resolves the request, and runs the plan.

Internal: `kernelry` exports `attention`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable
from numbers import Real
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from kernelry._values import size_of, unwrapped
from kernelry.errors import ArgumentError, PluginError, ShapeError, nearest
from kernelry.execution.guards import in_reverse_mode, naming_forward_mode, noticed_elsewhere, without_gradient
from kernelry.kernel.capabilities import Gradient
from kernelry.kernel.partial import Partial, checking_output
from kernelry.kernel.spec import AUTO, Inputs, KernelSpec, check_kernel_name
from kernelry.masks.arrays import missing_axes
from kernelry.masks.band import Full
from kernelry.masks.base import Extent, Mask
from kernelry.masks.fit import canonical_for
from kernelry.masks.form import MaskForm
from kernelry.policy.scope import Scope, current_scope
from kernelry.registry import installed
from kernelry.request.arguments import CallOptions, as_array, checked_qkv
from kernelry.request.context_parallel import ContextParallel
from kernelry.request.request import Mode, Operand, Request
from kernelry.request.target import current_target
from kernelry.resolution.resolver import resolve_call
from kernelry.storage import PagedArray, QuantizedArray, ValueInKey

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

    from kernelry.mesh.finding import MeshFacts
    from kernelry.resolution.explanation import Resolution

_FULL = Full()


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"] | QuantizedArray | PagedArray,
    value: Float[Array, "B S K D"] | QuantizedArray | PagedArray | ValueInKey,
    *,
    mask: Mask | Bool[Array, ...] | None = _FULL,
    scale: float | None = None,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    mode: str | Mode = Mode.TRAIN,
    kernel: str = AUTO,
    gradients: Iterable[str | Operand] | None = None,
    normalization: str = "softmax",
    logits_dtype: Any = jnp.float32,
    precision: str | jax.lax.Precision | None = None,
    bias_after_cap: bool = False,
    return_partial: bool = False,
    return_max_logits: bool = False,
) -> Any:
    """Attention by the best installed kernel that honours every argument.

    logits = scale · ⟨query, key⟩ + bias, capped to soft_cap · tanh(logits / soft_cap), masked; out = softmax(logits) ·
    value. Query head n reads key/value head n // (N / K). A row that sees no key is 0.

    Args:
      query: [B, T, N, H], floating.
      key: [B, S, K, H] of query's dtype, where K divides N; or a `kernelry.cache.QuantizedArray` or `PagedArray`.
      value: [B, S, K, D] of query's dtype, or held like key; or a `kernelry.cache.ValueInKey(D)`, where the values are
        the first D columns of the keys, or are in its interleaved pages.
      mask: which keys each query sees; see `kernelry.masks`. None means all of them; booleans [T, S], or of rank 4 and
        broadcastable to B N T S, are True where a key is seen.
      scale: a number; None means H ** -0.5.
      bias: floating, broadcastable to B N T S, added before the soft cap, under which −1e9 does not hide a key.
      soft_cap: a positive number; None means no cap.
      sinks: [N], one logit per query head that joins the denominator once, unscaled and unmasked.
      dropout_rate: the rate of dropout on the probabilities, in [0, 1); needs `dropout_rng`.
      dropout_rng: a PRNG key.
      mode: `train`, `prefill` or `decode` (alias `autoregressive`).
      kernel: the name of the kernel to use, with no alternative; or `auto`.
      gradients: names of the operands whose gradient is needed, of `query`, `key`, `value`, `bias` and `sinks`; None
        means all floating arrays in train mode and none otherwise. Differentiating another raises ArgumentError.
      normalization: the name of a Normalization.
      logits_dtype: the dtype of logits, softmax and statistics.
      precision: the precision of the products, as in `jax.lax.Precision`.
      bias_after_cap: add the bias to capped logits, as ONNX Attention does; without a soft cap it makes no difference.
      return_partial: return a Partial with statistics, for `kernelry.merge`.
      return_max_logits: return `(result, max_logits)`, [B, N], the largest visible logits.

    Returns:
      [B, T, N, D] in query's dtype, or a Partial; with `return_max_logits` a pair.

    Raises:
      ShapeError: an array's rank, shape or dtype does not fit.
      ArgumentError: another argument has an invalid value.
      NoKernelError: no installed kernel serves the call; the message says why for each.
      KernelRefusedError: the named kernel cannot serve the call.
    """
    options = CallOptions(
        mode=mode,
        scale=scale,
        soft_cap=soft_cap,
        bias_after_cap=bias_after_cap,
        dropout_rate=dropout_rate,
        gradients=gradients,
        normalization=normalization,
        logits_dtype=logits_dtype,
        precision=precision,
        partial=return_partial,
        max_logits=return_max_logits,
    )
    return attention_with_options(
        query, key, value, mask=mask, bias=bias, sinks=sinks, dropout_rng=dropout_rng, options=options, kernel=kernel
    )


def attention_with_options(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Any,
    options: CallOptions,
    kernel: str = AUTO,
    bias: Any = None,
    sinks: Any = None,
    dropout_rng: Any = None,
    apart: bool = False,
) -> Any:
    """`attention` for caches and layers, which hold its options as one value; `apart` as in `run_on_mesh`."""
    arrays, form = _arrays(query, key, value, mask, bias, sinks)
    check_kernel_name(kernel)
    options = options.checked()
    _check_normalization(options.normalization)
    if bias is not None and options.soft_cap is not None and options.bias_after_cap is not True:
        warnings.warn(
            "the soft cap caps bias too, so keys that a bias hides become visible: pass a mask as mask=, or pass "
            "bias_after_cap=True to add the bias to the capped logits",
            stacklevel=3,
        )
    scope = current_scope()
    target = scope.target or current_target()
    facts = facts_of_mesh(scope, arrays.query, arrays.key)
    request = options.request(
        arrays.query,
        arrays.key,
        arrays.value,
        mask=form,
        target=target,
        sinks=sinks is not None,
        bias=None if arrays.bias is None else tuple(map(size_of, arrays.bias.shape)),
        interpret=scope.interpret and target.platform == "cpu",
        context_parallel=None if scope.context_parallel is None else _native_text(scope.context_parallel),
        sharding=None if facts is None else facts.text,
        partitioned=facts is not None and facts.partitioned,
    )
    if request.context_parallel is not None and facts is not None:
        request, facts = _natively_or_by_core(request, scope, kernel, arrays)
    arrays = dataclasses.replace(arrays, dropout_rng=unwrapped(dropout_rng) if options.dropout_rate else None)
    given = frozenset(operand for operand in Operand if getattr(arrays, operand.value) is not None)
    given = given - {Operand.VALUE} if isinstance(arrays.value, ValueInKey) else given
    _check_given(request, arrays, given)
    resolution = resolve_call(request, kernel)
    assert resolution.plan is not None
    if not given <= request.gradients:
        arrays = without_gradient(arrays, given - request.gradients)
    spec = resolution.plan.kernel
    alternatives = installed.native_kernels
    if resolution.shards is not None:
        from kernelry.mesh.finding import differentiated_as  # imported where there is a mesh

        spec, alternatives = differentiated_as(spec, resolution.shards)
    if spec.capabilities.gradient is Gradient.BACKWARD:
        arrays = in_reverse_mode(arrays, request.gradients, spec, alternatives)
    if facts is not None:
        _warn_of_repeated_work(facts, spec)
    run = _runner(resolution, request, facts, apart)
    return _run(spec, run, arrays, request, alternatives, notice=scope.target is None)


def facts_of_mesh(scope: Scope, query: Any, key: Any) -> MeshFacts | None:
    """What a mesh means for a call; None where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if scope.sharding is None and mesh.empty and jax.typeof(query).sharding.mesh.empty:
        return None
    from kernelry.mesh.finding import mesh_facts  # imported where there is a mesh

    return mesh_facts(scope.sharding, query, key)


def _runner(
    resolution: Resolution, request: Request, facts: MeshFacts | None, apart: bool
) -> Callable[[Inputs], Partial]:
    if facts is None or facts.sharding is None:
        assert resolution.plan is not None
        return resolution.plan.run
    from kernelry.mesh.call import run_on_mesh  # imported where there is a mesh

    return functools.partial(run_on_mesh, resolution, request, facts=facts, apart=apart)


def _native_text(context: ContextParallel) -> str | None:
    from kernelry.mesh.finding import native_text  # imported where there is a mesh

    return native_text(context)


def _natively_or_by_core(
    request: Request, scope: Scope, kernel: str, arrays: Inputs
) -> tuple[Request, MeshFacts | None]:
    from kernelry.mesh.finding import natively_or_by_core  # imported where there is a mesh

    assert scope.context_parallel is not None
    return natively_or_by_core(request, scope.context_parallel, kernel, arrays.query, arrays.key)


def _warn_of_repeated_work(facts: MeshFacts, kernel: KernelSpec) -> None:
    said = facts.repeated_work(kernel.name, by_xla=kernel.capabilities.partitioned_by_xla)
    if said is not None:
        warnings.warn(said, stacklevel=4)


def _is_key(value: Any) -> bool:
    if not isinstance(value, jax.Array | np.ndarray):
        return False
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return value.ndim == 0
    return value.dtype == np.uint32 and value.ndim == 1  # what jax.random.PRNGKey makes


def _not_a_key(value: Any) -> str:
    if isinstance(value, jax.Array | np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    if callable(value):
        return f"{type(value).__name__}; draw a key from it, e.g. rngs.dropout()"
    return repr(value)


def _check_given(request: Request, inputs: Inputs, given: frozenset[Operand]) -> None:
    if request.dropout_rate and inputs.dropout_rng is None:
        raise ArgumentError(f"dropout_rate={request.dropout_rate} needs dropout_rng=, a PRNG key.")
    if inputs.dropout_rng is not None and not _is_key(inputs.dropout_rng):
        raise ArgumentError(
            f"dropout_rng must be one PRNG key, e.g. jax.random.key(0), got {_not_a_key(inputs.dropout_rng)}."
        )
    absent = sorted(operand.value for operand in request.gradients - given)
    if absent:
        raise ArgumentError(f"gradients names {', '.join(absent)}, which this call does not pass; leave it out.")


@checking_output
def _run(
    kernel: KernelSpec,
    run: Callable[[Inputs], Partial],
    arrays: Inputs,
    request: Request,
    alternatives: Callable[[], str],
    *,
    notice: bool,
) -> Any:
    one_way = kernel.capabilities.gradient is Gradient.BACKWARD
    with naming_forward_mode(kernel, alternatives) if one_way else contextlib.nullcontext():
        partial = run(arrays)
    if notice and isinstance(partial.out, jax.core.Tracer):
        partial = noticed_elsewhere(partial, request, kernel.name)
    result = partial if request.partial else _finalized(partial, request)
    return (result, partial.max_logits) if request.max_logits else result


def _finalized(partial: Partial, request: Request) -> jax.Array:
    normalization = installed.registry().normalizations[request.normalization]
    out = normalization.finalize(partial)
    if isinstance(out, jax.Array) and out.shape == partial.out.shape and str(out.dtype) == request.dtype:
        return out
    found = f"{out.dtype} {list(out.shape)}" if isinstance(out, jax.Array) else f"a {type(out).__name__}"
    kind = type(normalization)
    raise PluginError(
        f"normalization {request.normalization!r} ({kind.__module__}.{kind.__qualname__}) finalized {request} to "
        f"{found}, expected {request.dtype} {list(partial.out.shape)} (B T N D). This is a bug in the normalization: "
        f"report it to its authors."
    )


def _arrays(query: Any, key: Any, value: Any, mask: Any, bias: Any, sinks: Any) -> tuple[Inputs, MaskForm]:
    q, k, v = checked_qkv(query, key, value)
    extent = Extent(batch=q.shape[0], q_heads=q.shape[2], kv_heads=k.shape[2], q_len=q.shape[1], kv_len=k.shape[1])
    form, conjunction = canonical_for(mask, extent)
    if bias is not None:
        bias = _bias(bias, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    if sinks is not None:
        sinks = as_array("sinks", sinks, 1)
        if sinks.shape != (q.shape[2],):
            raise ShapeError(f"sinks must be [N] = [{q.shape[2]}], one logit per query head, got shape {sinks.shape}.")
    return Inputs(q, k, v, conjunction, bias, sinks), form


def _bias(bias: Any, full: tuple[int, ...]) -> jax.Array:
    bias = unwrapped(bias)
    if not isinstance(bias, jax.Array | np.ndarray):
        hint = "; write jnp.asarray(bias)" if isinstance(bias, list | tuple | Real) else ""
        raise ShapeError(f"bias must be an array that broadcasts to B N T S = {full}, got {type(bias).__name__}{hint}.")
    if bias.ndim > 4:
        raise ShapeError(f"bias must be an array that broadcasts to B N T S = {full}, got {bias.shape}.")
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ShapeError(f"bias must be floating, got {bias.dtype}; a boolean mask belongs in mask=masks.Dense(…).")
    array = jnp.asarray(bias).reshape((1,) * (4 - bias.ndim) + bias.shape)
    if any(have not in (1, want) for have, want in zip(array.shape, full, strict=True)):
        hint = missing_axes("bias", bias.shape, full)
        raise ShapeError(f"bias must broadcast to B N T S = {full}, got shape {bias.shape}{hint}.")
    return array


def _check_normalization(name: Any) -> None:
    known = installed.registry().normalizations
    if not isinstance(name, str) or name not in known:
        raise ArgumentError(f"unknown normalization {name!r}{nearest(str(name), known)}")
