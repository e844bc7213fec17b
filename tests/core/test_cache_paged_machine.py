"""PagedCache against lists: rows that begin, grow, fork, shorten and end in any order."""

import collections
import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kernelry.cache.paged import PagedCache

ROWS, PAGES, SIZE, LONGEST, MOST = 4, 7, 3, 8, 5
SLOTS = -(-LONGEST // SIZE)
ROW = st.integers(0, ROWS - 1)


@jax.jit
def append(cache, counts, key):
    """Extends every row and writes into both layers; the values are the keys negated."""
    cache = cache.allocate(counts)
    cache = cache.write(0, key, -key, lengths=counts)
    return cache.write(1, key + 0.5, -key - 0.5, lengths=counts)


free, fork = jax.jit(PagedCache.free), jax.jit(PagedCache.fork)


@jax.jit
def shorten(cache, row, length):
    return cache.fork(row, row, length)


@functools.cache
def empty():
    return PagedCache.create(
        rows=ROWS, pages=PAGES, page_size=SIZE, max_length=LONGEST, kv_heads=1, head_dim=1, layers=2, dtype=jnp.float32
    )


class Model:
    """Rows of (tokens, pages) one after another, a page taken only when there is no other way."""

    def __init__(self):
        self.rows = [([], []) for _ in range(ROWS)]

    def copy(self):
        other = Model()
        other.rows = [(list(tokens), list(pages)) for tokens, pages in self.rows]
        return other

    @property
    def references(self):
        return collections.Counter(page for _, pages in self.rows for page in pages)

    def take(self):
        """The lowest free page; ValueError where there is none."""
        return min(page for page in range(PAGES) if page not in self.references)

    def append(self, counts, new):
        """The model after it, or None where it does not fit."""
        after = self.copy()
        try:
            for row, count in enumerate(counts):
                after.extend(*after.rows[row], new[row, :count].tolist())
        except ValueError:
            return None
        return after

    def extend(self, tokens, pages, more):
        if len(tokens) + len(more) > LONGEST:
            raise ValueError
        if more and len(tokens) % SIZE and self.references[pages[-1]] > 1:
            pages[-1] = self.take()
        for token in more:
            if len(tokens) % SIZE == 0:
                pages.append(self.take())
            tokens.append(token)


class PagedCacheMachine(RuleBasedStateMachine):
    """Tokens are numbers that never come twice, so that a stale one is found out."""

    def __init__(self):
        super().__init__()
        self.cache, self.model, self.next = empty(), Model(), 1

    def new_tokens(self):
        self.next += ROWS * MOST
        return np.arange(self.next - ROWS * MOST, self.next, dtype=np.float32).reshape(ROWS, MOST)

    def append(self, counts):
        new, before = self.new_tokens(), self.cache
        after = append(before, jnp.asarray(counts, jnp.int32), jnp.asarray(new)[..., None, None])
        model = self.model.append(counts, new)
        assert bool(after.overflowed) == (model is None)
        if model is not None:
            self.cache, self.model = after, model
            return
        for old, now in zip(*map(jax.tree.leaves, (before, dataclasses.replace(after, overflowed=False))), strict=True):
            np.testing.assert_array_equal(old, now)

    @rule(row=ROW, count=st.integers(1, MOST))
    def admit(self, row, count):
        self.free(row)
        self.append([count if other == row else 0 for other in range(ROWS)])

    @rule(counts=st.lists(st.integers(0, MOST), min_size=ROWS, max_size=ROWS))
    def append_ragged(self, counts):
        self.append(counts)

    @rule(active=st.lists(st.booleans(), min_size=ROWS, max_size=ROWS))
    def decode(self, active):
        self.append([int(goes_on and bool(row[0])) for goes_on, row in zip(active, self.model.rows, strict=True)])

    @rule(row=ROW)
    def free(self, row):
        self.cache = free(self.cache, row)
        self.model.rows[row] = ([], [])

    @rule(source=ROW, to=ROW, share=st.sampled_from([0.0, 0.3, 0.6, 1.0]))
    def fork(self, source, to, share):
        tokens, pages = self.model.rows[source]
        length = round(share * len(tokens))
        self.cache = fork(self.cache, source, to, length)
        self.model.rows[to] = (tokens[:length], pages[: -(-length // SIZE)])

    @rule(row=ROW, by=st.integers(1, 4))
    def shorten(self, row, by):
        tokens, pages = self.model.rows[row]
        length = max(0, len(tokens) - by)
        self.cache = shorten(self.cache, row, length)
        self.model.rows[row] = (tokens[:length], pages[: -(-length // SIZE)])

    @invariant()
    def table_and_references_equal_the_model(self):
        table = np.full((ROWS, SLOTS), -1)
        for row, (_, pages) in enumerate(self.model.rows):
            table[row, : len(pages)] = pages
        np.testing.assert_array_equal(self.cache.table, table)
        np.testing.assert_array_equal(self.cache.lengths, [len(tokens) for tokens, _ in self.model.rows])
        counted = np.bincount(table[table >= 0], minlength=PAGES)
        np.testing.assert_array_equal(self.cache.references, counted)
        assert self.cache.free_pages == (counted == 0).sum()

    @invariant()
    def contents_equal_the_model(self):
        table = np.asarray(self.cache.table)
        keys, values = (
            [np.asarray(layer)[..., 0, 0] for layer in held] for held in (self.cache.keys, self.cache.values)
        )
        for row, (tokens, _) in enumerate(self.model.rows):
            for layer in range(2):
                found = keys[layer][table[row]].reshape(-1)[: len(tokens)]
                np.testing.assert_array_equal(found, np.asarray(tokens, np.float32) + 0.5 * layer)
                np.testing.assert_array_equal(values[layer][table[row]].reshape(-1)[: len(tokens)], -found)


PagedCacheMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
test_paged_cache_equals_lists = PagedCacheMachine.TestCase
