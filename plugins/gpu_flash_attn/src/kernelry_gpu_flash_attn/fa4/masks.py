"""A call's mask in the vendor's words: a window that its kernels skip blocks by, and a rule for everything else.

The vendor's window is aligned at the last query and the last key, and has signs of its own: with v = q + (S − T) − k of
slots q and k, it shows −right ≤ v ≤ left; None is unbounded. Three inputs of it mean something else than they say: a
window with left + right < 0 is full attention, so that (−1, 0), by which other libraries spell causal, hides nothing,
and (4, −1) hides the query's own key. So only windows whose bounds are None or ≥ 0 are handed on; any other band
becomes a rule.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, TypeAlias, final

import jax
import jax.numpy as jnp

from kernelry.masks import BidirectionalSpans, BlockSelection, Dense, Lengths, PrefixLM, Segments
from kernelry.plugin import Atom, AtomKind, Conjunct, Inputs, Request, Side
from kernelry_gpu_flash_attn.fa4.rules import All, Axes, Compare, Entry, Key, Number, Query, Rule, Some, moved

Window: TypeAlias = tuple[int | None, int | None]
"""The vendor's (left, right)."""

_BEYOND = 256
"""Entries behind the last slot of a side: the last tiles go on behind it, at most by two of 128 slots, and the vendor's
kernels do not bring every such slot back into range."""

_FAR = 2**30
"""Positions; a bound of as many hides nothing, and sums with positions are still int32."""


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class VendorMask:
    """What the vendor is told of a mask.

    Args:
      window: (None, None) is none.
      rule: what else must be true; None is nothing.
      axes: of the arrays that the rule reads.
      arrays: rank 4: [B, N, T + 256, S + 256], or 1 along axes on which it does not depend.
    """

    window: Window
    rule: Rule | None
    axes: tuple[Axes, ...]
    arrays: tuple[jax.Array, ...]

    @classmethod
    def of(cls, inputs: Inputs, request: Request) -> VendorMask:
        """That of a call."""
        tables, window, rules = _Tables(request), None, []
        for mask in inputs.mask:
            conjunct = mask.conjuncts()[0]
            native = native_window(conjunct.atom, request.q_len, request.kv_len) if window is None else None
            if native is None:
                rules.append(tables.rule(conjunct))
            else:
                window = native
        rule = All(tuple(rules)) if rules else None
        return cls(window or (None, None), rule, tuple(tables.axes), tuple(tables.arrays))


def native_window(atom: Atom, q_len: int, kv_len: int) -> Window | None:
    """The vendor's window for a band; None where it has none that means the same."""
    first_query, first_key = atom.query.start, atom.kv.start
    if not atom.is_band or first_query is None or first_key is None:
        return None
    ahead = first_query - first_key - (kv_len - q_len)
    left, right = atom.params
    left = None if left is None or left - ahead >= kv_len - 1 else left - ahead
    right = None if right is None or right + ahead >= q_len - 1 else right + ahead
    return None if any(bound is not None and bound < 0 for bound in (left, right)) else (left, right)


class _Tables:
    """Collects the arrays that the rules of a call read."""

    def __init__(self, request: Request) -> None:
        self.axes: list[Axes] = []
        self.arrays: list[jax.Array] = []
        self._request = request

    def rule(self, conjunct: Conjunct) -> Rule:
        """What a conjunct shows."""
        kind = conjunct.atom.kind
        if kind is AtomKind.ANY_OF:
            return Some(tuple(All(tuple(map(self.rule, branch))) for branch in conjunct.branches))
        if kind is AtomKind.NOT:
            return All(tuple(map(self.rule, (~conjunct.mask).conjuncts()))).negated()
        return _RULES[kind](self, conjunct)

    def add(self, array: Any, axes: Axes) -> Entry:
        """Keeps an array, with entries for slots beyond its last."""
        more = [(0, 0), (0, 0), (0, _BEYOND * axes.query), (0, _BEYOND * axes.key)]
        self.axes.append(axes)
        self.arrays.append(jnp.pad(jnp.asarray(array), more))
        return Entry(len(self.axes) - 1)

    def _of_queries(self, values: Any) -> Entry:
        """Values of query slots, [#B, T] or [T]."""
        values = jnp.asarray(values, jnp.int32).reshape(-1, 1, self._request.q_len, 1)
        return self.add(values, Axes(row=len(values) > 1, query=True))

    def _of_keys(self, values: Any) -> Entry:
        """Values of key slots, [#B, S] or [S]."""
        values = jnp.asarray(values, jnp.int32).reshape(-1, 1, 1, self._request.kv_len)
        return self.add(values, Axes(row=len(values) > 1, key=True))

    def _of_rows(self, values: Any) -> Entry:
        """Values of batch rows, scalar or [B]."""
        values = jnp.asarray(values, jnp.int32).reshape(-1, 1, 1, 1)
        return self.add(values, Axes(row=len(values) > 1))

    def _query_positions(self, conjunct: Conjunct) -> jax.Array:
        return jnp.asarray(Side.query(self._request.q_len).at(conjunct.query).positions)

    def _key_positions(self, conjunct: Conjunct) -> jax.Array:
        return jnp.asarray(Side.kv(self._request.kv_len).at(conjunct.kv).positions)

    def _query(self, conjunct: Conjunct) -> Query | Entry:
        start = conjunct.atom.query.start
        return self._of_queries(self._query_positions(conjunct)) if start is None else Query(start)

    def _key(self, conjunct: Conjunct) -> Key | Entry:
        start = conjunct.atom.kv.start
        return self._of_keys(self._key_positions(conjunct)) if start is None else Key(start)

    def band(self, conjunct: Conjunct) -> Rule:
        """p_q − left ≤ p_k ≤ p_q + right."""
        left, right = conjunct.atom.params
        query, key = self._query(conjunct), self._key(conjunct)
        parts = []
        if right is not None:
            parts.append(Compare(operator.le, key, moved(query, min(right, _FAR))))
        if left is not None:
            parts.append(Compare(operator.ge, key, moved(query, -min(left, _FAR))))
        return All(tuple(parts))

    def _blocks(self, conjunct: Conjunct) -> tuple[Entry, Entry]:
        """The numbers of the blocks in which queries and keys stand."""
        size = conjunct.atom.params[0]
        queries, keys = self._query_positions(conjunct) // size, self._key_positions(conjunct) // size
        return self._of_queries(queries), self._of_keys(keys)

    def chunked(self, conjunct: Conjunct) -> Rule:
        """The same chunk, and causal."""
        query, key = self._blocks(conjunct)
        later = Compare(operator.le, self._key(conjunct), self._query(conjunct))
        return All((Compare(operator.eq, key, query), later))

    def block_causal(self, conjunct: Conjunct) -> Rule:
        """Blocks up to the query's."""
        query, key = self._blocks(conjunct)
        return Compare(operator.le, key, query)

    def prefix(self, conjunct: Conjunct) -> Rule:
        """The prefix, and what is before."""
        mask, key = conjunct.mask, self._key(conjunct)
        assert isinstance(mask, PrefixLM)
        inside = Compare(operator.lt, key, self._of_rows(mask.prefix_lengths))
        return Some((inside, Compare(operator.le, key, self._query(conjunct))))

    def lengths(self, conjunct: Conjunct) -> Rule:
        """Slots below the lengths."""
        mask = conjunct.mask
        assert isinstance(mask, Lengths)
        parts = [Compare(operator.lt, Key(), self._of_rows(mask.kv_lengths))]
        if mask.query_lengths is not None:
            parts.append(Compare(operator.lt, Query(), self._of_rows(mask.query_lengths)))
        return All(tuple(parts))

    def ids(self, conjunct: Conjunct) -> Rule:
        """Ids that are equal and not negative: negative ones of queries never equal those of keys."""
        mask = conjunct.mask
        if isinstance(mask, Segments):
            query, key = mask.query_ids, mask.kv_ids
        else:
            assert isinstance(mask, BidirectionalSpans)
            query, key = mask.query_spans, mask.kv_spans
        query = jnp.asarray(query)
        key = query if key is None else jnp.asarray(key)
        queries = self._of_queries(jnp.where(query < 0, -1, query.astype(jnp.int32)))
        return Compare(operator.eq, self._of_keys(jnp.where(key < 0, -2, key.astype(jnp.int32))), queries)

    def dense(self, conjunct: Conjunct) -> Rule:
        """An array of booleans, as bytes."""
        assert isinstance(conjunct.mask, Dense)
        visible = jnp.asarray(conjunct.mask.visible)
        axes = Axes(*(size > 1 for size in visible.shape))
        return Compare(operator.ne, self.add(visible.astype(jnp.int8), axes), Number(0))

    def selection(self, conjunct: Conjunct) -> Rule:
        """Blocks of keys that are kept; a block of the selection behind its last one keeps nothing."""
        mask = conjunct.mask
        assert isinstance(mask, BlockSelection)
        keep = jnp.asarray(mask.keep)
        count, heads = keep.shape[3], self._request.q_heads
        if keep.shape[1] not in (1, heads):
            keep = jnp.repeat(keep, heads // keep.shape[1], axis=1)
        blocks = self._key_positions(conjunct) // mask.block_size
        numbers = self._of_keys(jnp.where((blocks >= 0) & (blocks < count), blocks, count))
        row, head, query = (size > 1 for size in keep.shape[:3])
        axes = Axes(row, head, query, through=numbers.number)
        kept = jnp.pad(keep.astype(jnp.int8), ((0, 0), (0, 0), (0, 0), (0, 1)))
        return Compare(operator.ne, self.add(kept, axes), Number(0))


_RULES: dict[AtomKind, Callable[[_Tables, Conjunct], Rule]] = {
    AtomKind.CAUSAL: _Tables.band,
    AtomKind.WINDOW: _Tables.band,
    AtomKind.CHUNKED: _Tables.chunked,
    AtomKind.BLOCK_CAUSAL: _Tables.block_causal,
    AtomKind.PREFIX_LM: _Tables.prefix,
    AtomKind.LENGTHS: _Tables.lengths,
    AtomKind.SEGMENTS: _Tables.ids,
    AtomKind.SEGMENTS_SEPARATE: _Tables.ids,
    AtomKind.SPANS: _Tables.ids,
    AtomKind.SPANS_SEPARATE: _Tables.ids,
    AtomKind.DENSE: _Tables.dense,
    AtomKind.BLOCK_SELECTION: _Tables.selection,
}

ATOMS = frozenset({*_RULES, AtomKind.ANY_OF, AtomKind.NOT})
"""The atoms that become a window or a rule; predicates of users become dense masks beforehand, by core's adapter."""
