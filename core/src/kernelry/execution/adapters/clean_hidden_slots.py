"""Keeps what hidden slots hold away from a kernel that would let it leak."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import TYPE_CHECKING, ClassVar, TypeAlias, final

import jax
import jax.numpy as jnp

from kernelry.execution.adapters.base import Adapter, Cost, itemsize, visible_of
from kernelry.kernel.capabilities import Capabilities
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import Inputs
from kernelry.masks.base import Mask
from kernelry.masks.form import Atom, PositionKind
from kernelry.masks.lengths import Lengths
from kernelry.request.request import Request

if TYPE_CHECKING:
    from jaxtyping import Array, Bool

_Seen: TypeAlias = 'tuple[Bool[Array, "#B #T #N 1"], Bool[Array, "#B #S #K 1"]]'
"""Which rows see some key, and which slots some row sees."""


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
        [lengths] = masks
        assert isinstance(lengths, Lengths)
        rows, slots = lengths.seen(request.q_len, request.kv_len)
        return rows[:, :, None, None], slots[:, :, None, None]
    if _is_on_diagonal(request):
        atoms = zip(request.mask.atoms, masks, strict=True)
        live = [jnp.asarray(mask.live_slots()) for atom, mask in atoms if atom.mask_class.has_live_slots(atom)]
        real: jax.Array = functools.reduce(operator.and_, live)[:, :, None, None]
        return real, real
    visible = visible_of(masks, request)
    visible = jnp.broadcast_to(visible, (*visible.shape[:2], request.q_len, request.kv_len))
    slots = visible.any(axis=2)
    if slots.shape[1] > 1:
        slots = slots.reshape(slots.shape[0], request.kv_heads, request.groups, request.kv_len).any(axis=2)
    return visible.any(axis=3).swapaxes(1, 2)[..., None], slots.swapaxes(1, 2)[..., None]


def _is_cheap(request: Request) -> bool:
    return _is_lengths(request) or _is_on_diagonal(request)


def _is_lengths(request: Request) -> bool:
    return [atom.mask_class for atom in request.mask.atoms] == [Lengths]


def _is_on_diagonal(request: Request) -> bool:
    """Whether a slot sees and is seen just where it sees itself, as some arrays say and the rest of the mask allows."""
    atoms = request.mask.atoms
    by_ids = [atom.mask_class.has_live_slots(atom) for atom in atoms]
    others = (atom for atom, live in zip(atoms, by_ids, strict=True) if not live)
    return any(by_ids) and all(_sees_itself(atom) for atom in others)


def _sees_itself(atom: Atom) -> bool:
    # Traced positions of the two sides are alike in form and may differ.
    return (
        atom.query == atom.kv and PositionKind.TRACED not in atom.position_kinds and atom.mask_class.sees_itself(atom)
    )
