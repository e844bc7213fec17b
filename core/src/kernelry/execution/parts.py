"""Runs a plan over one of several parts of the keys, and differentiates it by the output and lse of the whole.

As `attend` does for the parts that one device has; here the parts come one after another, from other devices, so the
custom_vjp that all are inside of is the caller's.
"""

from __future__ import annotations

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp

from kernelry.execution.attend import BoundKernel
from kernelry.execution.normalization import to_lse
from kernelry.execution.plan import Plan
from kernelry.kernel.capabilities import Gradient
from kernelry.kernel.partial import Partial, heads_last
from kernelry.kernel.spec import Gradients, Inputs
from kernelry.request.arguments import narrowed
from kernelry.request.request import Operand

Shares = dict[str, jax.Array]
"""Cotangents of operands, by name."""


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """Attention to all parts, as the backward pass of each part needs it, with its cotangents.

    Args:
      out: [B, T, N, D]. lse: [B, N, T], sinks included.
      d_out, d_lse: their cotangents times exp(−rest), where rest is what rounding took from lse: probabilities that are
        made of lse are too large by exp(rest). `d_lse` is None where no gradient goes through lse.
    """

    out: jax.Array
    lse: jax.Array
    d_out: jax.Array
    d_lse: jax.Array | None

    @classmethod
    def of(cls, out: jax.Array, lse: jax.Array, rest: jax.Array, d_out: jax.Array, d_lse: jax.Array | None) -> Whole:
        """Takes the cotangents as they are."""
        factor = jnp.exp(-rest)
        scaled = (d_out.astype(jnp.float32) * heads_last(factor)).astype(d_out.dtype)
        return cls(out, lse, scaled, None if d_lse is None else d_lse * factor)


def run_part(plan: Plan, inputs: Inputs) -> Partial:
    """Returns the part's Partial, with lse."""
    bound, inputs = _inside(plan, inputs)
    return _restored(plan, to_lse(bound.forward(inputs, statistics=True)))


def pull_part(plan: Plan, inputs: Inputs, empty: jax.Array, whole: Whole) -> Shares:
    """Returns the part's exact share of the gradients that its request names.

    Args:
      plan, inputs: the part.
      empty: booleans [B, N, T]: the rows that see nothing in it.
      whole: attention to all parts.
    """
    names = [operand.value for operand in Operand if operand in plan.request.gradients]
    floats: Shares = {name: getattr(inputs, name) for name in names}
    if plan.kernel.capabilities.gradient is Gradient.BACKWARD:
        return _by_backward(plan, inputs, floats, empty, whole)
    return _by_jax(plan, inputs, floats, empty, whole)


def _inside(plan: Plan, inputs: Inputs) -> tuple[BoundKernel, Inputs]:
    for step in plan.steps:
        inputs = step.adapter.prepare(inputs, step.before, step.after)
    duties = frozenset(step.adapter.duty for step in plan.steps if step.adapter.duty is not None)
    bound = BoundKernel(plan.kernel, plan.inner_request, plan.tiling, duties)
    return bound, narrowed(inputs) if bound.is_narrow else inputs


def _restored(plan: Plan, partial: Partial) -> Partial:
    for step in reversed(plan.steps):
        partial = step.adapter.restore(partial, step.before, step.after)
    return partial


def _by_jax(plan: Plan, inputs: Inputs, floats: Shares, empty: jax.Array, whole: Whole) -> Shares:
    """The part weighs w = exp(lseᵢ − lse) in out = Σ w · outᵢ and in lse = log Σ exp(lseᵢ)."""

    def run(floats: Shares) -> tuple[tuple[jax.Array, Any], Any]:
        partial = run_part(plan, _with(inputs, floats))
        return (partial.out, partial.lse), partial.lse_rest

    (out, lse), pull, rest = jax.vjp(run, floats, has_aux=True)
    exponent = jnp.where(empty, 0.0, lse) - jnp.where(empty, 0.0, whole.lse)
    weight = jnp.where(empty, 0.0, jnp.exp(exponent if rest is None else exponent + rest))
    difference = out.astype(jnp.float32) - whole.out.astype(jnp.float32)
    d_lse = jnp.einsum("BTND,BTND->BNT", whole.d_out.astype(jnp.float32), difference)
    d_lse = d_lse if whole.d_lse is None else d_lse + whole.d_lse
    d_out = whole.d_out.astype(jnp.float32) * heads_last(weight)
    shares: Shares = pull((d_out.astype(out.dtype), jnp.where(empty, 0.0, weight * d_lse).astype(lse.dtype)))[0]
    return shares


def _by_backward(plan: Plan, inputs: Inputs, floats: Shares, empty: jax.Array, whole: Whole) -> Shares:
    d_lse = None if whole.d_lse is None else jnp.where(empty, 0.0, whole.d_lse)
    lse = jnp.where(empty, jnp.inf, whole.lse)

    def prepare(floats: Shares) -> tuple[dict[str, Any], tuple[BoundKernel, Inputs]]:
        bound, inside = _inside(plan, _with(inputs, floats))
        return {name: getattr(inside, name) for name in floats}, (bound, inside)

    if not plan.steps:
        _, (bound, inside) = prepare(floats)
        found = bound.backward(inside, whole.out, lse, whole.d_out, d_lse)
        return {name: getattr(found, name) for name in floats}
    prepared, pull, (bound, inside) = jax.vjp(prepare, floats, has_aux=True)
    found = bound.backward(inside, *_inward(plan, whole.out, lse, whole.d_out, d_lse))
    shares: Shares = pull({name: _share(found, name).astype(array.dtype) for name, array in prepared.items()})[0]
    return shares


def _with(inputs: Inputs, floats: dict[str, Any]) -> Inputs:
    return dataclasses.replace(inputs, **floats)


def _share(found: Gradients, name: str) -> jax.Array:
    share: jax.Array = getattr(found, name)
    return share


def _inward(
    plan: Plan, out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """The same arrays in the shapes inside the adapters: rows put behind are empty, columns 0."""
    inner = plan.inner_request
    shape = (inner.batch, inner.q_len, inner.q_heads, inner.value_dim)
    statistic = (inner.batch, inner.q_heads, inner.q_len)

    def restore(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, Any]:
        partial = _restored(plan, Partial(out, lse=lse, dtype=inner.dtype))
        return partial.out, partial.lse

    dtype = jnp.promote_types(out.dtype, jnp.float32)
    (outer, _), pull = jax.vjp(restore, jnp.zeros(shape, dtype), jnp.zeros(statistic, jnp.float32))
    ones = jnp.ones_like(lse, jnp.float32)
    inner_out, is_row = pull((out.astype(outer.dtype), ones))
    inner_d_out, inner_lse = pull((d_out.astype(outer.dtype), lse.astype(jnp.float32)))
    inner_d_lse = None if d_lse is None else pull((jnp.zeros_like(outer), d_lse.astype(jnp.float32)))[1]
    inner_lse = jnp.where(is_row > 0, inner_lse, jnp.inf)
    return inner_out.astype(out.dtype), inner_lse, inner_d_out.astype(d_out.dtype), inner_d_lse
