"""Serves any lengths with a kernel that wants certain ones, or equal ones."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import ClassVar, final

import jax
import numpy as np
from jax import lax

from kernelry.execution.adapters.base import Adapter, Cost, itemsize
from kernelry.execution.adapters.masking import Growth, aligned, form_of, grown_atom, grown_mask, padded, signed
from kernelry.kernel.capabilities import Capabilities
from kernelry.kernel.partial import Partial
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import Inputs
from kernelry.masks.arrays import module_of, with_rank_4
from kernelry.masks.base import Mask
from kernelry.masks.form import Atom, AtomKind, MaskForm
from kernelry.masks.indexed import Dense, Lengths, Segments
from kernelry.masks.side import ArrayLike
from kernelry.request.request import Request

_IDS = frozenset({AtomKind.SEGMENTS, AtomKind.SEGMENTS_SEPARATE, AtomKind.SPANS, AtomKind.SPANS_SEPARATE})
_HIDE_ROWS = _IDS | {AtomKind.DENSE}
"""Atoms whose arrays have an entry for the slots put behind, and hide them."""

_HIDE_KEYS = _HIDE_ROWS | {AtomKind.LENGTHS}


@final
@dataclasses.dataclass(frozen=True, slots=True)
class PadSequence(Adapter):
    """Puts slots of zeros behind the queries and the keys, and cuts the result back.

    No row may see a key put behind: the mask hides it already, its arrays are lengthened so that
    they do, or an atom is added. A query put behind may see what it will, for its row is cut off,
    unless a largest logit is wanted or it could see a slot that holds nonsense because no other
    row sees it.
    """

    name: ClassVar[str] = "pad_sequence"
    cures: ClassVar[frozenset[RefusalCode]] = frozenset(
        {RefusalCode.SEQUENCE_LENGTH, RefusalCode.UNEQUAL_LENGTHS, RefusalCode.EMPTY_ARRAY}
    )
    on_keys: ClassVar[bool] = True

    def rewrite(self, request: Request, capabilities: Capabilities, refusals: tuple[Refusal, ...]) -> Request | None:
        q_len, kv_len = _lengths(request, capabilities, refusals)
        if (q_len, kv_len) == (request.q_len, request.kv_len):
            return None
        bias = _grown_bias(request, q_len, kv_len)
        # The mask's static positions belong to the old lengths; it grows below.
        longer = dataclasses.replace(request, q_len=q_len, kv_len=kv_len, bias=bias, mask=MaskForm())
        growth = Growth.between(request, longer)
        atoms = _grown_atoms(request, growth)
        if atoms is None:
            return None
        if _keys_in_sight(request, growth) or _rows_in_sight(request, growth):
            atoms = (*atoms, _hiding_atom(request, growth, capabilities))
        return dataclasses.replace(longer, mask=form_of(atoms))

    def prepare(self, inputs: Inputs, before: Request, after: Request) -> Inputs:
        growth = Growth.between(before, after)
        atoms = _grown_atoms(before, growth)
        assert atoms is not None, "rewrite returned None"
        given = zip(atoms, before.mask.atoms, inputs.mask, strict=True)
        pairs = [(atom, _grown(mask, old, before, growth)) for atom, old, mask in given]
        added = Counter(after.mask.atoms) - Counter(atoms)
        pairs += [(atom, _hiding_mask(atom, before, growth)) for atom in added]
        bias = inputs.bias
        if bias is not None:
            bias = padded(padded(bias, 2, growth.more_queries), 3, growth.more_keys)
        return dataclasses.replace(
            inputs,
            query=_longer(inputs.query, growth.more_queries),
            key=_longer(inputs.key, growth.more_keys),
            value=_longer(inputs.value, growth.more_keys),
            mask=aligned(pairs),
            bias=bias,
        )

    def restore(self, partial: Partial, before: Request, after: Request) -> Partial:
        def cut(array: jax.Array | None, axis: int) -> jax.Array | None:
            return None if array is None else lax.slice_in_dim(array, 0, before.q_len, axis=axis)

        return dataclasses.replace(
            partial,
            out=lax.slice_in_dim(partial.out, 0, before.q_len, axis=1),
            lse=cut(partial.lse, 2),
            lse_rest=cut(partial.lse_rest, 2),
            max=cut(partial.max, 2),
            sum=cut(partial.sum, 2),
        )

    def cost(self, before: Request, after: Request) -> Cost:
        dims = before.head_dim + before.value_dim
        rows = after.q_heads * after.q_len * (after.q_len != before.q_len)
        slots = after.kv_heads * after.kv_len * (after.kv_len != before.kv_len)
        pairs = after.q_len * after.kv_len - before.q_len * before.kv_len
        return Cost(
            extra_bytes=before.batch * (rows + slots) * dims * itemsize(before.dtype),
            extra_flops=2 * before.batch * before.q_heads * pairs * dims,
        )


def _lengths(request: Request, capabilities: Capabilities, refusals: tuple[Refusal, ...]) -> tuple[int, int]:
    """T and S as the kernel wants them."""
    asked = [size for refusal in refusals if refusal.code in PadSequence.cures for size in refusal.pad_to]
    least = 0 if capabilities.empty_arrays else 1
    q_len = max([request.q_len, least, *(size for name, size in asked if name == "q_len")])
    kv_len = max([request.kv_len, least, *(size for name, size in asked if name == "kv_len")])
    if capabilities.unequal_lengths:
        return q_len, kv_len
    return max(q_len, kv_len), max(q_len, kv_len)


def _grown_bias(request: Request, q_len: int, kv_len: int) -> tuple[int, ...] | None:
    if request.bias is None:
        return None
    batch, heads, rows, slots = request.bias
    return batch, heads, 1 if rows == 1 else q_len, 1 if slots == 1 else kv_len


def _grown_atoms(request: Request, growth: Growth) -> tuple[Atom, ...] | None:
    """The atoms at the new lengths, in the order of the old ones; None where some cannot be lengthened."""
    atoms = [grown_atom(atom, growth) for atom in request.mask.atoms]
    counted = _rows_must_hide(request, growth) and not _any_of(request.mask, _HIDE_ROWS)
    known = [_counting_rows(atom) if counted else atom for atom in atoms if atom is not None]
    return tuple(known) if len(known) == len(atoms) else None


def _counting_rows(atom: Atom) -> Atom:
    return Atom(AtomKind.LENGTHS, ("query",)) if atom.kind is AtomKind.LENGTHS else atom


def _any_of(form: MaskForm, kinds: frozenset[AtomKind]) -> bool:
    return any(atom.kind in kinds for atom in form.atoms)


def _rows_must_hide(request: Request, growth: Growth) -> bool:
    if not growth.more_queries:
        return False
    # Lengths of keys hide the same slots from every row, so what they hide is hidden from the new rows, too.
    others = tuple(atom for atom in request.mask.atoms if atom != Atom(AtomKind.LENGTHS))
    return request.max_logits or MaskForm(others).may_hide_slots(request.q_len, request.kv_len)


def _rows_in_sight(request: Request, growth: Growth) -> bool:
    return _rows_must_hide(request, growth) and not _any_of(request.mask, _HIDE_KEYS)


def _keys_in_sight(request: Request, growth: Growth) -> bool:
    """Whether the mask as it is may show keys put behind to rows that count."""
    if not growth.more_keys or _any_of(request.mask, _HIDE_KEYS):
        return False
    return not any(_hides_behind(atom, request) for atom in request.mask.atoms)


def _hides_behind(atom: Atom, request: Request) -> bool:
    """Says whether a static atom hides positions behind the last key from the last query."""
    if atom.query.start is None or atom.kv.start is None:
        return False
    last, behind = atom.query.start + request.q_len - 1, atom.kv.start + request.kv_len
    if atom.kind is AtomKind.BLOCK_CAUSAL:
        return bool(behind // atom.params[0] > last // atom.params[0])
    if atom.kind is AtomKind.CHUNKED:
        return behind > last
    return atom.is_band and atom.params[1] is not None and bool(behind > last + atom.params[1])


def _hiding_atom(request: Request, growth: Growth, capabilities: Capabilities) -> Atom:
    takes = capabilities.atoms
    if AtomKind.SEGMENTS in takes and request.q_len == request.kv_len and not growth.parts_ids:
        return Atom(AtomKind.SEGMENTS)
    if AtomKind.SEGMENTS_SEPARATE in takes:
        return Atom(AtomKind.SEGMENTS_SEPARATE)
    return Atom(AtomKind.LENGTHS, ("query",) if _rows_in_sight(request, growth) else ())


def _hiding_mask(atom: Atom, request: Request, growth: Growth) -> Mask:
    query, kv = _ids(growth.q_len, growth.more_queries), _ids(growth.kv_len, growth.more_keys)
    if atom.kind is AtomKind.SEGMENTS:
        return Segments(query)
    hides_rows = _rows_in_sight(request, growth)
    if atom.kind is AtomKind.SEGMENTS_SEPARATE:
        return Segments(query if hides_rows else np.zeros_like(query), kv)
    return Lengths(growth.kv_len, growth.q_len if hides_rows else None)


def _ids(length: int, more: int) -> np.ndarray:
    return np.concatenate([np.zeros(length, np.int32), np.full(more, -1, np.int32)])


def _grown(mask: Mask, atom: Atom, request: Request, growth: Growth) -> Mask:
    """Lengthens a mask of the conjunction itself, which must hide what it can."""
    match mask:
        case Lengths(kv_lengths=kv_lengths, query_lengths=query_lengths):
            if query_lengths is not None:
                query_lengths = _at_most(query_lengths, growth.q_len)
            elif _rows_must_hide(request, growth) and not _any_of(request.mask, _HIDE_ROWS):
                query_lengths = growth.q_len
            return Lengths(_at_most(kv_lengths, growth.kv_len), query_lengths)
        case Dense(visible=visible):
            rows_hide = _rows_must_hide(request, growth)
            visible = _hidden_behind(with_rank_4(visible), 2, growth.q_len, growth.more_queries, spread=rows_hide)
            return Dense(_hidden_behind(visible, 3, growth.kv_len, growth.more_keys, spread=True))
    return grown_mask(mask, growth)


def _at_most(lengths: ArrayLike, length: int) -> ArrayLike:
    return module_of(lengths).minimum(signed(lengths), np.int32(length))


def _hidden_behind(visible: ArrayLike, axis: int, length: int, more: int, *, spread: bool) -> ArrayLike:
    """Puts False behind an axis; where it is 1, only if each slot is to have its own entry."""
    if not more or (visible.shape[axis] == 1 and not spread):
        return visible
    xp = module_of(visible)
    whole = xp.broadcast_to(visible, [length if place == axis else have for place, have in enumerate(visible.shape)])
    return xp.pad(whole, [(0, more if place == axis else 0) for place in range(4)], constant_values=False)


def _longer(array: jax.Array, more: int) -> jax.Array:
    padded_to: jax.Array = lax.pad(array, np.zeros((), array.dtype), [(0, more if a == 1 else 0, 0) for a in range(4)])
    return padded_to
