"""What one device computes for one pair of shards: the kernel's inputs, its result, its share of the gradients."""

from __future__ import annotations

import dataclasses
import enum
import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, final

import jax
import jax.numpy as jnp
from jax import lax

from kernelry._pytree import pytree
from kernelry.execution.normalization import LogSumExp
from kernelry.execution.parts import Shares, Whole, pull_part, run_part
from kernelry.execution.plan import Plan
from kernelry.kernel.partial import Partial
from kernelry.kernel.spec import Inputs
from kernelry.masks.base import Mask
from kernelry.masks.form import MaskForm
from kernelry.masks.run_time import BlockGrid, decided_at_run_time
from kernelry.masks.shard_pairs import EMPTY, PairClass, PairTable, aligned_masks
from kernelry.masks.shard_pieces import Piece
from kernelry.request.axes import Axes
from kernelry.request.request import Operand, Request
from kernelry.resolution.shards import ring_offsets


@final
class Source(enum.Enum):
    """Where the shards of keys come from."""

    RING = "ring"
    """Passed on from device to device."""
    GATHERED = "gathered"
    """Cut from all keys, which are gathered first."""
    WHOLE = "whole"
    """Cut from all keys, which each device has."""
    OWN = "own"
    """Each device has one shard and all queries; the results are merged across devices."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class TracedMask:
    """A mask whose arrays are operands: which atom it is, its structure, and the dimensions of its leaves.

    A dimension of 1 of the whole call is `.` in `letters`: a shard's length may be 1, too.
    """

    index: int
    structure: Any
    letters: tuple[str, ...]


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Steps:
    """What is known before the program runs: hashable.

    Args:
      plans: by class of pairs of shards.
      table: the classes.
      form: of the mask of the whole call. masks: aligned with it, those without arrays; Full in place of others.
      traced: the masks with arrays.
      axes, size: of the mesh, along which the steps go, and the number of devices along them.
      source: where keys come from.
      partial: whether statistics are returned.
      apart: whether devices that share out keys alone leave their results apart, for `merged_across`.
    """

    plans: tuple[Plan, ...]
    table: PairTable
    form: MaskForm
    masks: tuple[Mask, ...]
    traced: tuple[TracedMask, ...]
    axes: Axes
    size: int
    source: Source
    partial: bool
    apart: bool = False

    @property
    def merges_across(self) -> bool:
        """Whether the results of devices are merged, each of its own keys."""
        return self.source is Source.OWN and not self.apart

    @property
    def request(self) -> Request:
        """The request of any class: but for the mask they are alike."""
        return self.plans[0].request

    @property
    def offsets(self) -> tuple[int, ...]:
        """The steps: how far before a device the keys of each come from; a run that covers all that show something."""
        if self.source is Source.OWN:
            return (0,)
        return ring_offsets(self.table)


@final
@pytree("query", "key", "value", "bias", "sinks", "dropout_rng", "leaves")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """A device's arrays: those of Inputs, and the leaves of the traced masks."""

    query: Any
    key: Any
    value: Any
    bias: Any
    sinks: Any
    dropout_rng: Any
    leaves: tuple[tuple[Any, ...], ...]

    __hash__ = None  # type: ignore[assignment]


Keys: TypeAlias = tuple[Any, Any, tuple[Any, ...]]
"""Key, value, and by traced mask the leaves that run along S; None in place of the others."""


def _inputs(
    steps: Steps, operands: Operands, keys: Keys, device: Any, shard: Any, pieces: PairClass
) -> tuple[Inputs, list[Mask]]:
    """The arrays of a pair of shards, and its masks with arrays."""
    request = steps.request
    lengths = request.q_len, request.kv_len
    starts = (0 if steps.source is Source.OWN else device) * lengths[0], shard * lengths[1]
    masks = [_mask(steps, operands, keys, piece, starts, lengths) for piece in pieces]
    key, value, _ = keys
    bias = operands.bias
    if bias is not None and bias.shape[3] not in (1, lengths[1]):
        bias = lax.dynamic_slice_in_dim(bias, starts[1], lengths[1], axis=3)
    rng = operands.dropout_rng
    if rng is not None:
        rng = jax.random.fold_in(rng, device * steps.size + shard)
    traced = [mask for mask, piece in zip(masks, pieces, strict=True) if piece.traced]
    aligned = aligned_masks(steps.form, pieces, tuple(masks))
    return Inputs(operands.query, key, value, aligned, bias=bias, dropout_rng=rng), traced


def _mask(
    steps: Steps, operands: Operands, keys: Keys, piece: Piece, starts: tuple[Any, Any], lengths: tuple[int, int]
) -> Mask:
    if not piece.traced:
        return piece.mask(steps.masks)
    place = next(place for place, mask in enumerate(steps.traced) if mask.index == piece.index)
    leaves = [
        _local_leaf(letters, own if moved is None else moved, starts[1], lengths[1])
        for letters, own, moved in zip(steps.traced[place].letters, operands.leaves[place], keys[2][place], strict=True)
    ]
    mask: Mask = jax.tree.unflatten(steps.traced[place].structure, leaves)
    return mask.within(*starts, *lengths)


def _local_leaf(letters: str, leaf: Any, start: Any, length: int) -> Any:
    """Of a leaf that has all keys, the part over one shard."""
    axis = letters.find("S")
    if axis >= 0 and leaf.shape[axis] != length:
        return lax.dynamic_slice_in_dim(leaf, start, length, axis=axis)
    return leaf


def run_pair(
    steps: Steps, operands: Operands, merged: Partial | None, keys: Keys, device: Any, shard: Any, kind: int
) -> tuple[Partial, jax.Array]:
    """Attends to one shard of keys, and merges that with what was found before, so that an empty pair costs nothing.

    Args:
      steps, operands: the device's.
      merged: attention to earlier shards; None in the first step.
      keys, device, shard: which queries meet which keys.
      kind: the class of the pair.

    Returns:
      The merged Partial, and booleans [B, N, T]: the rows that see nothing of this shard.
    """

    def nothing() -> tuple[Partial, jax.Array]:
        found = _nothing(steps)
        assert found.lse is not None
        return found if merged is None else merged, jnp.ones_like(found.lse, bool)

    def run() -> tuple[Partial, jax.Array]:
        part = _uniform_part(steps.plans[kind], inputs)
        assert part.lse is not None
        return part if merged is None else LogSumExp().merge([merged, part]), jnp.isneginf(part.lse)

    if kind == EMPTY:
        return nothing()
    inputs, traced = _inputs(steps, operands, keys, device, shard, steps.table.classes[kind])
    found: tuple[Partial, jax.Array] = _unless_hidden(steps, traced, run, nothing)
    return found


def _uniform_part(plan: Plan, inputs: Inputs) -> Partial:
    """The Partials of all kernels as one structure, in float32."""
    partial = run_part(plan, inputs)
    wide = {name: jnp.asarray(getattr(partial, name), jnp.float32) for name in ("out", "lse")}
    rest = jnp.zeros_like(wide["lse"]) if partial.lse_rest is None else partial.lse_rest.astype(jnp.float32)
    most = None if partial.max_logits is None else lax.stop_gradient(partial.max_logits.astype(jnp.float32))
    return Partial(**wide, lse_rest=rest, max_logits=most, dtype=partial.dtype)


def _nothing(steps: Steps) -> Partial:
    asked = steps.request
    statistic = (asked.batch, asked.q_heads, asked.q_len)
    return Partial(
        jnp.zeros((asked.batch, asked.q_len, asked.q_heads, asked.value_dim), jnp.float32),
        lse=jnp.full(statistic, -jnp.inf, jnp.float32),
        lse_rest=jnp.zeros(statistic, jnp.float32),
        max_logits=jnp.full(statistic[:2], -jnp.inf, jnp.float32) if asked.max_logits else None,
        dtype=asked.dtype,
    )


def pull_pair(
    steps: Steps,
    operands: Operands,
    kept: Shares,
    keys: Keys,
    device: Any,
    shard: Any,
    none: jax.Array,
    whole: Whole,
    kind: int,
) -> tuple[Shares, Shares]:
    """Differentiates attention to one shard of keys.

    Args:
      steps, operands: the device's.
      kept: the sums of gradients, in float32, of what stays on the device: query and bias.
      keys, device, shard: which queries meet which keys.
      none: the rows that see nothing of this shard.
      whole: attention to all keys.
      kind: the class of the pair.

    Returns:
      `kept` with what this shard adds, and the gradients of its key and value, in float32.
    """
    names = [operand.value for operand in Operand if operand in steps.request.gradients]
    moving = {name: array for name, array in zip(("key", "value"), keys[:2], strict=True) if name in names}

    def nothing() -> tuple[Shares, Shares]:
        return kept, {name: jnp.zeros(array.shape, jnp.float32) for name, array in moving.items()}

    def pulled() -> tuple[Shares, Shares]:
        found = {
            name: share.astype(jnp.float32) for name, share in pull_part(steps.plans[kind], inputs, none, whole).items()
        }
        added = {name: add_share(steps, total, found[name], name, shard) for name, total in kept.items()}
        return added, {name: found[name] for name in moving}

    if kind == EMPTY:
        return nothing()
    inputs, traced = _inputs(steps, operands, keys, device, shard, steps.table.classes[kind])
    shares: tuple[Shares, Shares] = _unless_hidden(steps, traced, pulled, nothing)
    return shares


def add_share(steps: Steps, total: jax.Array, share: jax.Array, name: str, shard: Any) -> jax.Array:
    """Adds a gradient to a sum, which may cover all keys."""
    if total.shape == share.shape:
        return total + share
    axis = 3 if name == "bias" else 1
    start = shard * steps.request.kv_len
    before = lax.dynamic_slice_in_dim(total, start, steps.request.kv_len, axis=axis)
    return lax.dynamic_update_slice_in_dim(total, before + share, start, axis=axis)


def _unless_hidden(steps: Steps, masks: Iterable[Mask], run: Callable[[], Any], nothing: Callable[[], Any]) -> Any:
    """Skips a pair of shards in which masks with arrays certainly hide everything."""
    lengths = steps.request.q_len, steps.request.kv_len
    grid = BlockGrid(q_len=lengths[0], kv_len=lengths[1], block_q=lengths[0], block_kv=lengths[1])
    decided = [decided_at_run_time(mask, grid).some for mask in masks]
    if not decided:
        return run()
    return lax.cond(functools.reduce(operator.and_, decided).any(), run, nothing)
