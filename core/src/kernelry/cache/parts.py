"""The disjoint parts of cached keys: what the queries see of each, and attention to all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, final

import jax
import jax.numpy as jnp

from kernelry.api import attention_with_options, facts_of_mesh
from kernelry.errors import ArgumentError
from kernelry.execution.normalization import finalize, merge
from kernelry.kernel.partial import Partial
from kernelry.kernel.spec import AUTO
from kernelry.masks import Causal, Full, Lengths, Mask
from kernelry.masks.composition import At, children, walk
from kernelry.policy.scope import current_scope
from kernelry.request.arguments import CallOptions, Keys, Values
from kernelry.request.request import Operand, operands_of

if TYPE_CHECKING:
    from kernelry.mesh.finding import MeshFacts


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CachePart:
    """Disjoint keys of a cache, and where they are.

    Args:
      key, value: [B, S, K, H] and [B, S, K, D], however they are stored, together or apart.
      lengths: [B], the slots of each row that hold tokens; None where all do.
      offset: the position of slot 0 of each row, a number or [B].
      positions: [B, S], the position of each slot, in place of `offset`.
      seen: whether the mask of the call certainly shows all its tokens to every query.
    """

    key: Keys
    value: Values
    lengths: jax.Array | None = None
    offset: int | jax.Array = 0
    positions: jax.Array | None = None
    seen: bool = False

    def masked(self, base: Mask, start: int, query_offset: jax.Array, query_lengths: jax.Array | None) -> MaskedPart:
        """This part, `start` positions further on, with what the queries see of it."""
        if self.seen:
            mask: Mask = Full()
        elif self.positions is None:
            mask = base.at(query_offset=query_offset, kv_offset=jnp.asarray(self.offset + start, jnp.int32))
        else:
            mask = base.at(query_offset=query_offset, kv_positions=self.positions + start)
        if self.lengths is not None:
            mask = mask & Lengths(self.lengths, query_lengths)
        elif query_lengths is not None:
            mask = mask & Lengths(self.key.shape[1], query_lengths)
        return MaskedPart(self.key, self.value, mask)


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class MaskedPart:
    """Disjoint keys with their values, what the queries see of them, and the bias on their logits."""

    key: Keys
    value: Values
    mask: Mask
    bias: jax.Array | None = None


def over_earlier_keys(mask: Mask) -> Mask:
    """The mask for keys that all come before the queries: a causal mask hides none of them."""
    return Full() if isinstance(mask, Causal) else mask


def partials_of(
    query: jax.Array,
    parts: Iterable[MaskedPart],
    options: CallOptions,
    *,
    kernel: str = AUTO,
    dropout_rng: jax.Array | None = None,
) -> list[Partial]:
    """Attends to each part; `finished` makes the result of the call.

    Parts whose keys are cut alike over the axes of a mesh come back as one Partial: each device merges its own shards
    of them, and one collective the devices'.
    """
    parts = tuple(parts)
    cut = [_with_keys_alone_cut(query, part.key) for part in parts] if len(parts) > 1 else []
    together = next((facts for facts in cut if facts is not None and cut.count(facts) > 1), None)
    gradients = None if options.gradients is None else operands_of(options.gradients) - {Operand.SINKS}
    asked = dataclasses.replace(options, partial=True, gradients=gradients)
    found: tuple[list[Partial], list[Partial]] = [], []
    for number, part in enumerate(parts):
        apart = together is not None and cut[number] == together
        result = attention_with_options(
            query,
            part.key,
            part.value,
            mask=part.mask,
            bias=part.bias,
            # The parts hold different keys, so they must not drop the same slots.
            dropout_rng=None if dropout_rng is None else jax.random.fold_in(dropout_rng, number),
            options=asked,
            kernel=kernel,
            apart=apart,
        )
        found[apart].append(result[0] if asked.max_logits else result)
    if together is None:
        return found[False]
    from kernelry.mesh.call import finished_across  # imported where there is a mesh

    return [*found[False], finished_across(merge(found[True]), together)]


def _with_keys_alone_cut(query: Any, key: Any) -> MeshFacts | None:
    """What a mesh means for a call whose keys alone are cut; None where that is not so."""
    facts = facts_of_mesh(current_scope(), query, key)
    cut = None if facts is None else facts.sharding
    return facts if cut is not None and cut.kv_axes and not cut.sequence else None


def finished(partials: Sequence[Partial], sinks: jax.Array | None, options: CallOptions) -> Any:
    """Merges attention to all parts and lets the sinks join; returns what `kernelry.attention` would."""
    merged = merge(partials)
    result = merged if options.partial else finalize(merged, sinks)
    return (result, merged.max_logits) if options.max_logits else result


def check_positional(mask: Mask, *, placed: str, slots: str) -> None:
    """Refuses a mask that gives the keys' positions, or that is about the slots of one array of keys.

    Args:
      mask: the mask of a call that attends to parts.
      placed, slots: the end of each error, with what to do instead.

    Raises:
      ArgumentError: it is one.
    """
    for part in walk(mask):
        if isinstance(part, At) and part.kv is not None:
            raise ArgumentError(f"mask={part!r} gives the keys' positions, {placed}.")
        if not children(part) and not part.positional and not isinstance(part, Full):
            raise ArgumentError(f"mask={part!r} is about the slots of one array of keys, {slots}.")
