"""Keeps what stands in hidden slots away from a kernel that would let it leak."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, TypeAlias, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from kernelry.execution.adapters.base import Adapter, Cost, itemsize
from kernelry.execution.adapters.masking import visible_of
from kernelry.kernel.capabilities import Capabilities
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import Inputs
from kernelry.masks.arrays import as_array
from kernelry.masks.base import Mask
from kernelry.masks.form import Atom, AtomKind, PositionKind
from kernelry.masks.indexed import Lengths, Segments
from kernelry.request.request import Request

_Seen: TypeAlias = tuple[Bool[Array, "#B #T #N 1"], Bool[Array, "#B #S #K 1"]]
"""Which rows see some key, and which slots some row sees."""

_REFLEXIVE = frozenset({AtomKind.CAUSAL, AtomKind.WINDOW, AtomKind.CHUNKED, AtomKind.BLOCK_CAUSAL, AtomKind.PREFIX_LM})


@final
@dataclasses.dataclass(frozen=True, slots=True)
class CleanHiddenSlots(Adapter):
    """Puts 0 where no row may see a key and its value, and where a query sees no key."""

    name: ClassVar[str] = "clean_hidden_slots"
    cures: ClassVar[frozenset[RefusalCode]] = frozenset({RefusalCode.HIDDEN_SLOTS})
    on_keys: ClassVar[bool] = True
    settles: ClassVar[frozenset[RefusalCode]] = cures

    def rewrite(self, request: Request, capabilities: Capabilities, refusals: tuple[Refusal, ...]) -> Request | None:
        return request

    def prepare(self, inputs: Inputs, before: Request, after: Request) -> Inputs:
        rows, slots = _seen(inputs.mask, before)
        return dataclasses.replace(
            inputs,
            query=jnp.where(rows, inputs.query, 0),  # no product with 0, for 0 · NaN is NaN
            key=jnp.where(slots, inputs.key, 0),
            value=jnp.where(slots, inputs.value, 0),
        )

    def cost(self, before: Request, after: Request) -> Cost:
        rows, slots = before.q_len * before.q_heads, before.kv_len * before.kv_heads
        elements = rows * before.head_dim + slots * (before.head_dim + before.value_dim)
        return Cost(
            extra_bytes=before.batch * elements * itemsize(before.dtype),
            extra_flops=0 if _is_cheap(before) else before.batch * before.q_len * before.kv_len,
        )


def _seen(masks: tuple[Mask, ...], request: Request) -> _Seen:
    if _is_lengths(request):
        return _seen_by_lengths(masks[0], request)
    if _is_packed(request):
        return _seen_by_ids(next(mask for mask in masks if isinstance(mask, Segments)))
    visible = visible_of(masks, request)
    visible = jnp.broadcast_to(visible, (*visible.shape[:2], request.q_len, request.kv_len))
    slots = visible.any(axis=2)
    if slots.shape[1] > 1:
        slots = slots.reshape(slots.shape[0], request.kv_heads, request.groups, request.kv_len).any(axis=2)
    return visible.any(axis=3).swapaxes(1, 2)[..., None], slots.swapaxes(1, 2)[..., None]


def _is_cheap(request: Request) -> bool:
    return _is_lengths(request) or _is_packed(request)


def _is_lengths(request: Request) -> bool:
    return [atom.kind for atom in request.mask.atoms] == [AtomKind.LENGTHS]


def _is_packed(request: Request) -> bool:
    """One array of ids, and masks that always let a slot see itself: it is seen, and sees, where its id is no −1."""
    ids = [atom for atom in request.mask.atoms if atom.kind is AtomKind.SEGMENTS]
    others = (atom for atom in request.mask.atoms if atom.kind is not AtomKind.SEGMENTS)
    return len(ids) == 1 and all(_sees_itself(atom) for atom in others)


def _sees_itself(atom: Atom) -> bool:
    # Traced positions of the two sides are alike in form and may differ.
    if atom.kind not in _REFLEXIVE or atom.query != atom.kv or PositionKind.TRACED in atom.position_kinds:
        return False
    return not atom.is_band or all(bound is None or bound >= 0 for bound in atom.params)


def _seen_by_lengths(mask: Mask, request: Request) -> _Seen:
    assert isinstance(mask, Lengths)
    keys = jnp.asarray(mask.kv_lengths).reshape(-1, 1, 1, 1)
    slot = jnp.arange(request.kv_len).reshape(1, -1, 1, 1)
    row = jnp.arange(request.q_len).reshape(1, -1, 1, 1)
    counted = jnp.full_like(keys, request.q_len) if mask.query_lengths is None else mask.query_lengths
    queries = jnp.asarray(counted).reshape(-1, 1, 1, 1)
    some_key, some_query = (keys > 0) & (request.kv_len > 0), (queries > 0) & (request.q_len > 0)
    return (row < queries) & some_key, (slot < keys) & some_query


def _seen_by_ids(mask: Segments) -> _Seen:
    ids = jnp.atleast_2d(jnp.asarray(as_array(mask.query_ids)))
    real: jax.Array = (ids >= 0)[:, :, None, None]
    return real, real
