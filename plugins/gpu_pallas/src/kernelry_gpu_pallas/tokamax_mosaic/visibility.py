"""What a mask hides, as the vendor's kernels take it: a flag, a range of slots for each query, an array of booleans."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, final

import jax
import jax.numpy as jnp

from kernelry.masks import Lengths, PrefixLM
from kernelry.plugin import (
    Atom,
    AtomKind,
    Inputs,
    Mask,
    PositionForm,
    PositionKind,
    Refusal,
    RefusalCode,
    Request,
    Side,
    pytree,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int

RANGES = frozenset(
    {
        AtomKind.CAUSAL,
        AtomKind.WINDOW,
        AtomKind.CHUNKED,
        AtomKind.BLOCK_CAUSAL,
        AtomKind.PREFIX_LM,
        AtomKind.LENGTHS,
    }
)
"""Atoms under which a query sees consecutive positions."""

_FAR = 2**30
"""Slots; a window as wide as this hides nothing, and its ends are still numbers of 32 bits."""


def mask_refusals(request: Request) -> Iterator[Refusal]:
    """Keys whose slots are not at consecutive positions that are known: what a query sees is then no range."""
    for atom in request.mask.atoms:
        if atom.kind in RANGES and _first_positions(atom.kv) is None:
            detail = f"mask atom {atom} has keys at positions that are not consecutive, or not known beforehand"
            yield Refusal(RefusalCode.POSITIONS, detail)


def is_plainly_causal(request: Request) -> bool:
    """Whether query slot t sees the key slots up to t and nothing else is hidden."""
    if request.q_len != request.kv_len or len(request.mask.atoms) != 1:
        return False
    atom = request.mask.atoms[0]
    return atom.kind is AtomKind.CAUSAL and atom.query.start is not None and atom.query.start == atom.kv.start


@final
@pytree("start", "end", "dense")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Visible:
    """The arrays that say which slots a query sees; None where they hide nothing.

    Args:
      start, end: [#B, 1, T], the first slot seen and the first one behind those seen.
      dense: [#B, #N, T, S].
    """

    start: Int[Array, "#B 1 T"] | None = None
    end: Int[Array, "#B 1 T"] | None = None
    dense: Bool[Array, "#B #N T S"] | None = None

    @classmethod
    def of(cls, inputs: Inputs, request: Request) -> Visible:
        """That of a call."""
        if is_plainly_causal(request):
            return cls()
        starts, ends, dense = [], [], None
        for atom, mask in zip(request.mask.atoms, inputs.mask, strict=True):
            if atom.kind is AtomKind.DENSE:
                seen = _evaluated(mask, request)
                dense = seen if dense is None else dense & seen
                continue
            start, end = _range(atom, mask, request)
            starts += [] if start is None else [start]
            ends += [] if end is None else [end]
        return cls(_tightest(jnp.maximum, starts, request), _tightest(jnp.minimum, ends, request), dense)


def _tightest(choose: Callable[..., jax.Array], bounds: list[jax.Array], request: Request) -> jax.Array | None:
    if not bounds:
        return None
    rows = max(bound.shape[0] for bound in bounds)
    tightest = functools.reduce(choose, (jnp.broadcast_to(bound, (rows, request.q_len)) for bound in bounds))
    return jnp.clip(tightest, 0, request.kv_len).astype(jnp.int32)[:, None, :]


def _range(atom: Atom, mask: Mask, request: Request) -> tuple[jax.Array | None, jax.Array | None]:
    """The slots from … to before … that each query sees, [#B, T]."""
    conjunct = mask.conjuncts()[0]
    if atom.kind is AtomKind.LENGTHS:
        return None, _end_of_lengths(conjunct.mask, request)
    query = Side.query(request.q_len).at(conjunct.query).positions.reshape(-1, request.q_len)
    first = _first_positions(atom.kv)
    assert first is not None, "refused"
    here = jnp.asarray(query) - jnp.asarray(first, jnp.int32)[:, None]  # the slot at the query's position
    match atom.kind:
        case AtomKind.CAUSAL | AtomKind.WINDOW:
            left, right = (None if bound is None else min(bound, _FAR) for bound in atom.params)
            return None if left is None else here - left, None if right is None else here + (right + 1)
        case AtomKind.CHUNKED:
            return here - query % atom.params[0], here + 1
        case AtomKind.BLOCK_CAUSAL:
            return None, here - query % atom.params[0] + atom.params[0]
    prefix = conjunct.mask
    assert isinstance(prefix, PrefixLM)
    before = jnp.asarray(prefix.prefix_lengths, jnp.int32).reshape(-1, 1) - jnp.asarray(first, jnp.int32)[:, None]
    return None, jnp.maximum(before, here + 1)


def _end_of_lengths(mask: Mask, request: Request) -> jax.Array:
    assert isinstance(mask, Lengths)
    end = jnp.asarray(mask.kv_lengths, jnp.int32).reshape(-1, 1)
    if mask.query_lengths is None:
        return end
    queries = jnp.asarray(mask.query_lengths, jnp.int32).reshape(-1, 1)
    return jnp.where(jnp.arange(request.q_len)[None] < queries, end, 0)


def _evaluated(mask: Mask, request: Request) -> jax.Array:
    seen = mask.evaluate(Side.query(request.q_len, q_heads=request.q_heads), Side.kv(request.kv_len))
    # Not by one row or one column: the vendor's backward pass takes those of another head where heads are grouped.
    return jnp.broadcast_to(seen, (*seen.shape[:2], request.q_len, request.kv_len))


def _first_positions(keys: PositionForm) -> list[int] | None:
    """The position of slot 0 of the keys, for all batch rows or for each; None where the slots do not follow on it."""
    if keys.start is not None:
        return [keys.start]
    if keys.kind is not PositionKind.STATIC or not isinstance(keys.value, tuple):
        return None
    return [row[0][0] for row in keys.value] if all(len(row) == 1 for row in keys.value) else None
