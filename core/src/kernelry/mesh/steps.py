"""Attention to keys of several devices, one shard of keys after another, inside a shard_map.

Every device keeps its queries and meets the shards of keys in steps: step d brings those of the device d places before
it along the axes. What a device does in a step is one of a few classes (`masks.shard_pairs`), chosen by its place; a
class without visible keys does nothing, and where a mask has arrays, a shard that shows nothing is skipped at run time.
One custom_vjp is around all steps: the backward pass meets the same shards again, each with the output and lse of the
whole, so that a kernel's unmodified backward yields its exact share.

Keys are sent on before the kernel runs on those that are here, and gradients of keys are sent one step after they were
added to, so that a compiler can send while it computes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernelry.execution.attend import sink_gradient, whole_of
from kernelry.execution.normalization import LogSumExp
from kernelry.execution.parts import Shares, Whole
from kernelry.kernel.partial import Partial, heads_last, named
from kernelry.mesh.pairs import Keys, Operands, Source, Steps, add_share, pull_pair, run_pair
from kernelry.request.axes import Axes
from kernelry.request.request import Operand

_Body = Callable[[Any, Keys, Any, tuple[int, ...], Any], tuple[Any, Any]]
"""Of a loop over steps: what was carried (None in the first), the keys of the shard, the step, the steps that this may
be, and an input of its own; returns what is carried on, and an output."""


_MOVING = ("key", "value")
"""The operands that are sent from device to device, and whose gradients are."""


def attend_in_steps(steps: Steps, operands: Operands) -> Partial:
    """Attends to the keys of all devices along the axes.

    Args:
      steps: what is static.
      operands: the arrays of this device.
    """
    return _differentiated(steps, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiated(steps: Steps, operands: Operands) -> Partial:
    return _forward(steps, operands)[0]


def _forward(steps: Steps, operands: Operands) -> tuple[Partial, Any]:
    device = lax.axis_index(steps.axes)

    def body(merged: Any, keys: Keys, offset: Any, group: tuple[int, ...], _: Any) -> tuple[Partial, jax.Array]:
        shard = _shard(steps, device, offset)
        run = functools.partial(run_pair, steps, operands, merged, _cut(steps, keys, shard), device, shard)
        found: tuple[Partial, jax.Array] = _switched(steps, group, device, shard, run)
        return found

    merged, empty = _loop(steps, _own_keys(steps, operands), body, None)
    if steps.merges_across:
        merged = merged_across(merged, steps.axes)
    elif merged.max_logits is not None and not steps.apart:
        merged = dataclasses.replace(merged, max_logits=_most(merged.max_logits, steps.axes))
    whole, (lse, rest) = whole_of([merged], operands.sinks)
    out = whole.out if steps.partial else whole.out.astype(steps.request.dtype)
    out, lse, rest, empty = named((out, lse, rest, empty))
    result = Partial(out, max_logits=whole.max_logits, dtype=steps.request.dtype)
    if steps.partial:
        result = dataclasses.replace(result, lse=lse, lse_rest=rest)
    return result, (operands, out, lse, rest, empty)


def _backward(steps: Steps, residuals: Any, d_whole: Partial) -> tuple[Operands]:
    operands, out, lse, rest, empty = residuals
    d_out, d_lse = d_whole.out.astype(out.dtype), d_whole.lse if steps.partial else None
    seen = ~empty.all(axis=0)
    if steps.merges_across:  # each device has its share of the cotangent of one result
        d_out, d_lse = lax.psum((d_out, d_lse), steps.axes)  # type: ignore[no-untyped-call]
        seen = lax.psum(seen.astype(jnp.int32), steps.axes) > 0  # type: ignore[no-untyped-call]
    d_out = jnp.where(heads_last(seen), d_out, 0)  # so that a NaN in an empty row's cotangent stops here
    whole = Whole.of(out, lse, rest, d_out, d_lse)
    shares = _shares(steps, operands, empty, whole)
    found = {name: share.astype(getattr(operands, name).dtype) for name, share in shares.items()}
    by_name = {name: found.get(name) for name in ("query", "key", "value", "bias")}
    sinks = None if operands.sinks is None else _of_sinks(steps, operands.sinks, whole)
    return (Operands(**by_name, sinks=sinks, dropout_rng=None, leaves=None),)  # type: ignore[arg-type]


_differentiated.defvjp(_forward, _backward)


def _shares(steps: Steps, operands: Operands, empty: jax.Array, whole: Whole) -> Shares:
    """The gradients of this device's operands, in float32."""
    device = lax.axis_index(steps.axes)
    names = [operand.value for operand in Operand if operand in steps.request.gradients]

    def body(sums: Any, keys: Keys, offset: Any, group: tuple[int, ...], none: Any) -> tuple[Shares, None]:
        sums = _zeros(steps, operands, names) if sums is None else _sent_sums(steps, sums, 1)
        shard = _shard(steps, device, offset)
        kept = {name: total for name, total in sums.items() if name not in _MOVING}
        met = _cut(steps, keys, shard)
        run = functools.partial(pull_pair, steps, operands, kept, met, device, shard, none, whole)
        kept, shares = _switched(steps, group, device, shard, run)
        added = {name: add_share(steps, sums[name], share, name, shard) for name, share in shares.items()}
        return {**kept, **added}, None

    sums, _ = _loop(steps, _own_keys(steps, operands), body, empty)
    if steps.source is Source.GATHERED:
        for name in _MOVING:
            if name in sums:
                sums[name] = lax.psum_scatter(  # type: ignore[no-untyped-call]
                    sums[name], steps.axes, scatter_dimension=1, tiled=True
                )
    return _sent_sums(steps, sums, -steps.offsets[-1])


def _loop(steps: Steps, own: Keys, body: _Body, inputs: jax.Array | None) -> tuple[Any, Any]:
    """Runs a body for each step. The first is apart, because no other step meets a device's own keys.

    Two steps are written out; more are a loop, in which keys are sent on once more than needed.
    """
    offsets = steps.offsets
    keys = _sent(steps, own, offsets[0])
    following = _sent(steps, keys, 1) if len(offsets) > 1 else keys
    carry, first = body(None, keys, offsets[0], offsets[:1], None if inputs is None else inputs[0])
    if len(offsets) == 1:
        return carry, _stacked([first])
    if len(offsets) == 2:
        carry, second = body(carry, following, offsets[1], offsets[1:], None if inputs is None else inputs[1])
        return carry, _stacked([first, second])

    def step(carried: tuple[Any, Keys], given: tuple[Any, Any]) -> tuple[tuple[Any, Keys], Any]:
        carry, keys = carried
        following = _sent(steps, keys, 1)
        carry, found = body(carry, keys, given[0], offsets[1:], given[1])
        return (carry, following), found

    rest = jnp.asarray(offsets[1:], jnp.int32), None if inputs is None else inputs[1:]
    (carry, _), more = lax.scan(step, (carry, following), rest)
    return carry, None if first is None else jnp.concatenate([first[None], more])


def _stacked(found: list[Any]) -> Any:
    return None if found[0] is None else jnp.stack(found)


def _shard(steps: Steps, device: Any, offset: Any) -> Any:
    """Which shard of keys a device meets in a step."""
    return device if steps.source is Source.OWN else (device - offset) % steps.size


def _own_keys(steps: Steps, operands: Operands) -> Keys:
    """What goes with the keys; an array along T, too, is cut as each shard of keys is met."""
    moving = tuple(
        tuple(
            leaf if "S" in letters and "T" not in letters else None
            for letters, leaf in zip(mask.letters, leaves, strict=True)
        )
        for mask, leaves in zip(steps.traced, operands.leaves, strict=True)
    )
    keys = operands.key, operands.value, moving
    if steps.source is not Source.GATHERED:
        return keys
    return _along_keys(steps, keys, lambda array, axis: lax.all_gather(array, steps.axes, axis=axis, tiled=True))


def _along_keys(steps: Steps, keys: Keys, run: Callable[[jax.Array, int], jax.Array]) -> Keys:
    """Applies a function of an array and its axis S to all keys."""
    *key_and_value, moving = keys
    key, value = (jax.tree.map(lambda array: run(array, 1), stored) for stored in key_and_value)
    leaves = tuple(
        tuple(
            None if leaf is None else run(leaf, letters.index("S"))
            for letters, leaf in zip(mask.letters, leaves, strict=True)
        )
        for mask, leaves in zip(steps.traced, moving, strict=True)
    )
    return key, value, leaves


def _sent(steps: Steps, tree: Any, by: int) -> Any:
    """What the device `by` places before this one has."""
    if steps.source is not Source.RING or by % steps.size == 0:
        return tree
    axes, places = _in_mesh_order(steps.axes)
    pairs = [(places[device], places[(device + by) % steps.size]) for device in range(steps.size)]
    return jax.tree.map(lambda array: lax.ppermute(array, axes, pairs), tree)  # type: ignore[no-untyped-call]


def _in_mesh_order(axes: Axes) -> tuple[Axes, list[int]]:
    """Axes as the mesh orders them, and the place in that order of each device along `axes`.

    `ppermute` alone of all collectives numbers devices in the order of the mesh, whatever the order of its axes.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    ordered = tuple(axis for axis in shape if axis in axes)
    places = np.arange(math.prod(shape[axis] for axis in axes)).reshape([shape[axis] for axis in ordered])
    return ordered, places.transpose([ordered.index(axis) for axis in axes]).ravel().tolist()


def _cut(steps: Steps, keys: Keys, shard: Any) -> Keys:
    """The keys of one shard."""
    if steps.source in (Source.RING, Source.OWN):
        return keys
    length = steps.request.kv_len
    return _along_keys(
        steps, keys, lambda array, axis: lax.dynamic_slice_in_dim(array, shard * length, length, axis=axis)
    )


def _switched(steps: Steps, group: tuple[int, ...], device: Any, shard: Any, run: Callable[[int], Any]) -> Any:
    """Runs what the class of a pair of shards asks for; `group` is the steps that this may be."""
    table = np.asarray(steps.table.table, np.int32)
    devices = np.arange(steps.size)
    if steps.source is Source.OWN:
        table, used = table[0], sorted(set(table[0].tolist()))
        place: Any = (shard,)
    else:
        used = sorted({int(kind) for offset in group for kind in table[devices, (devices - offset) % steps.size]})
        place = (device, shard)
    if len(used) == 1:
        return run(used[0])
    branch = jnp.asarray(np.searchsorted(used, table).astype(np.int32))[place]
    return lax.switch(branch, [functools.partial(run, kind) for kind in used])


def _zeros(steps: Steps, operands: Operands, names: list[str]) -> Shares:
    """Sums of gradients; those of keys that each device has cover all keys."""
    found = {}
    whole = steps.size if steps.source is Source.GATHERED else 1
    for name in names:
        shape = list(getattr(operands, name).shape)
        if name in _MOVING:
            shape[1] *= whole
        found[name] = jnp.zeros(shape, jnp.float32)
    return found


def _sent_sums(steps: Steps, sums: Shares, by: int) -> Shares:
    """The gradients of keys go where the keys go, in the end home."""
    moving = {name: sums[name] for name in _MOVING if name in sums}
    return {**sums, **_sent(steps, moving, by)}


def _of_sinks(steps: Steps, sinks: jax.Array, whole: Whole) -> jax.Array:
    share = sink_gradient(sinks, whole.out, whole.lse, None, whole.d_out)
    # Where results are merged across devices, each has all of it, and they are summed.
    return (share / steps.size).astype(sinks.dtype) if steps.merges_across else share


def merged_across(partial: Partial, axes: Axes) -> Partial:
    """Merges the results of devices, in one collective; the largest logits are another."""
    assert partial.lse is not None
    assert partial.lse_rest is not None
    packed = jnp.concatenate([partial.out, heads_last(partial.lse), heads_last(partial.lse_rest)], axis=-1)
    parts = []
    for found in lax.all_gather(packed, axes):
        lse, rest = (found[..., place].swapaxes(1, 2) for place in (-2, -1))
        parts.append(Partial(found[..., :-2], lse=lse, lse_rest=rest, dtype=partial.dtype))
    merged = LogSumExp().merge(parts)
    most = None if partial.max_logits is None else _most(partial.max_logits, axes)
    return dataclasses.replace(merged, max_logits=most)


def _most(largest: jax.Array, axes: Axes) -> jax.Array:
    most: jax.Array = lax.pmax(largest, axes)  # type: ignore[no-untyped-call]
    return most
