"""Serves any lengths with a kernel that needs certain ones, or equal ones."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import ClassVar, final

import jax
import numpy as np
from jax import lax

from kernelry.execution.adapters.base import Adapter, Cost, aligned, itemsize
from kernelry.kernel.capabilities import Capabilities
from kernelry.kernel.partial import Partial
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.kernel.spec import Inputs
from kernelry.masks.arrays import padded
from kernelry.masks.base import Mask
from kernelry.masks.form import Atom, AtomKind, MaskForm
from kernelry.masks.ids import Segments
from kernelry.masks.lengths import Lengths
from kernelry.masks.padding import Padding, form_of, padded_atom, padded_mask
from kernelry.request.request import Request


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
        bias = _padded_bias(request, q_len, kv_len)
        # The mask's static positions belong to the old lengths; it is padded below.
        longer = request.rewritten(q_len=q_len, kv_len=kv_len, bias=bias, mask=MaskForm())
        atoms = tuple(padded_atom(atom, padding) for atom, padding in _paddings(request, longer))
        if _keys_in_sight(request, longer, atoms) or _rows_in_sight(request, longer, atoms):
            atoms = (*atoms, _hiding_atom(request, longer, atoms, capabilities))
        return longer.rewritten(mask=form_of(atoms))

    def prepare(self, inputs: Inputs, before: Request, after: Request) -> Inputs:
        more_queries, more_keys = after.q_len - before.q_len, after.kv_len - before.kv_len
        paddings = tuple(_paddings(before, after))
        atoms = tuple(padded_atom(atom, padding) for atom, padding in paddings)
        masks = [padded_mask(mask, padding) for mask, (_, padding) in zip(inputs.mask, paddings, strict=True)]
        added = Counter(after.mask.atoms) - Counter(atoms)
        hiding = [_hiding_mask(atom, before, after, atoms) for atom in added]
        bias = inputs.bias
        if bias is not None:
            bias = padded(padded(bias, 2, more_queries), 3, more_keys)
        return dataclasses.replace(
            inputs,
            query=_longer(inputs.query, more_queries),
            key=_longer(inputs.key, more_keys),
            value=_longer(inputs.value, more_keys),
            mask=aligned(zip((*atoms, *added), (*masks, *hiding), strict=True)),
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
    """T and S as the kernel needs them."""
    asked = [size for refusal in refusals if refusal.code in PadSequence.cures for size in refusal.pad_to]
    least = 0 if capabilities.empty_arrays else 1
    q_len = max([request.q_len, least, *(size for name, size in asked if name == "q_len")])
    kv_len = max([request.kv_len, least, *(size for name, size in asked if name == "kv_len")])
    if capabilities.unequal_lengths:
        return q_len, kv_len
    return max(q_len, kv_len), max(q_len, kv_len)


def _padded_bias(request: Request, q_len: int, kv_len: int) -> tuple[int, ...] | None:
    if request.bias is None:
        return None
    batch, heads, rows, slots = request.bias
    return batch, heads, 1 if rows == 1 else q_len, 1 if slots == 1 else kv_len


def _paddings(before: Request, after: Request) -> Iterator[tuple[Atom, Padding]]:
    """For each atom of the mask how it is to be padded."""
    more_queries, more_keys = after.q_len - before.q_len, after.kv_len - before.kv_len
    padding = Padding(before.q_len, before.kv_len, more_queries, more_keys)
    # One mask that hides the new rows is enough. Where none does that anyhow, each that can is asked to.
    must, enough = _rows_must_hide(before, after), _any_hides_rows(before.mask.atoms)
    for atom in before.mask.atoms:
        hides = must and (not enough or atom.mask_class.hides_rows_behind(atom))
        yield atom, dataclasses.replace(padding, hide_rows=hides)


def _any_hides_rows(atoms: tuple[Atom, ...]) -> bool:
    return any(atom.mask_class.hides_rows_behind(atom) for atom in atoms)


def _rows_must_hide(before: Request, after: Request) -> bool:
    if before.q_len == after.q_len:
        return False
    # What a mask hides from every row alike, it hides from the new rows, too.
    others = tuple(atom for atom in before.mask.atoms if not atom.mask_class.hides_by_key_alone(atom))
    return before.max_logits or MaskForm(others).may_hide_slots(before.q_len, before.kv_len)


def _rows_in_sight(before: Request, after: Request, atoms: tuple[Atom, ...]) -> bool:
    return _rows_must_hide(before, after) and not _any_hides_rows(atoms)


def _keys_in_sight(before: Request, after: Request, atoms: tuple[Atom, ...]) -> bool:
    """Whether the padded atoms may show keys put behind to rows that count."""
    lengths = before.q_len, before.kv_len
    return before.kv_len != after.kv_len and not any(
        atom.mask_class.hides_keys_behind(atom, *lengths) for atom in atoms
    )


def _hiding_atom(before: Request, after: Request, atoms: tuple[Atom, ...], capabilities: Capabilities) -> Atom:
    takes = capabilities.atoms
    if AtomKind.SEGMENTS in takes and before.q_len == before.kv_len and after.q_len == after.kv_len:
        return Atom(AtomKind.SEGMENTS)
    if AtomKind.SEGMENTS_SEPARATE in takes:
        return Atom(AtomKind.SEGMENTS_SEPARATE)
    return Atom(AtomKind.LENGTHS, ("query",) if _rows_in_sight(before, after, atoms) else ())


def _hiding_mask(atom: Atom, before: Request, after: Request, atoms: tuple[Atom, ...]) -> Mask:
    query, kv = _ids(before.q_len, after.q_len), _ids(before.kv_len, after.kv_len)
    if atom.kind is AtomKind.SEGMENTS:
        return Segments(query)
    hides_rows = _rows_in_sight(before, after, atoms)
    if atom.kind is AtomKind.SEGMENTS_SEPARATE:
        return Segments(query if hides_rows else np.zeros_like(query), kv)
    return Lengths(before.kv_len, before.q_len if hides_rows else None)


def _ids(length: int, padded_to: int) -> np.ndarray:
    return np.where(np.arange(padded_to) < length, 0, -1).astype(np.int32)


def _longer(array: jax.Array, more: int) -> jax.Array:
    padded_to: jax.Array = lax.pad(array, np.zeros((), array.dtype), [(0, more if a == 1 else 0, 0) for a in range(4)])
    return padded_to
