"""Caches whose arrays are cut over a mesh, next to the same caches on one device."""

import contextlib
import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from pairs import sweep_but

import kernelry
from kernelry import masks, testing
from kernelry.cache import PagedCache, RollingCache, SharedPrefix, TwoPartCache
from kernelry.errors import ArgumentError, NoKernelError, ShapeError
from kernelry.flax import AttentionOp, CachedPart, Tokens
from kernelry.parallel import Sharding

B, N, K, H = 4, 8, 4, 8
LENGTHS = np.array([13, 3, 10, 0])
CHUNK = np.array([3, 2, 0, 0])
CLOSE = 4e-7

MESH = {"rows": 2, "cut": 2}
CUTS = {
    "batch": {"batch": "rows"},
    "heads": {"heads": "cut"},
    "batch and heads": {"batch": "rows", "heads": "cut"},
    "slots": {"slots": "cut"},
    "batch and slots": {"batch": "rows", "slots": "cut"},
}
KINDS = (AxisType.Auto, AxisType.Explicit)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Which axis cuts what, over axes of which kind."""

    kind: AxisType = AxisType.Auto
    batch: str | None = None
    heads: str | None = None
    slots: str | None = None

    @property
    def mesh(self):
        devices = np.array(jax.devices()[:4]).reshape(tuple(MESH.values()))
        return jax.sharding.Mesh(devices, tuple(MESH), axis_types=(self.kind,) * 2)

    @contextlib.contextmanager
    def active(self):
        """The mesh; what automatic axes mean must be said, and explicit ones say it themselves."""
        said = None
        if self.kind is AxisType.Auto:
            said = Sharding(batch=self.batch or (), heads=self.heads or (), kv_sequence=self.slots)
        with jax.set_mesh(self.mesh), kernelry.use(sharding=said):
            yield

    def spec(self, cache, array):
        """How an array of a cache is cut."""
        if array.ndim < 4:
            return P() if isinstance(cache, PagedCache) else P(*[self.batch][: array.ndim])
        heads = self.heads if array.shape[2] % 2 == 0 else None
        return P(None, None, heads, None) if isinstance(cache, PagedCache) else P(self.batch, self.slots, heads, None)

    def placed(self, cache):
        return jax.tree.map(lambda array: self.put(array, *self.spec(cache, array)), cache)

    def put(self, array, *spec):
        return jax.device_put(array, NamedSharding(self.mesh, P(*spec)))

    def tokens(self, cache, *arrays):
        batch = None if isinstance(cache, PagedCache) else self.batch
        return [self.put(array, batch, None, self.heads if array.shape[2] % 2 == 0 else None, None) for array in arrays]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def new_cache(kind, storage=None, heads=K, rows=B):
    sizes = {"kv_heads": heads, "head_dim": H, "dtype": jnp.float32, "storage": storage}
    if kind == "two_part":
        return TwoPartCache.create(batch=rows, prefill=16, decode=4, **sizes)
    if kind == "rolling":
        return RollingCache.create(batch=rows, window=9, max_append=4, **sizes)
    return PagedCache.create(rows=rows, pages=6 * rows, page_size=4, max_length=24, **sizes)


def mask_of(cache):
    return masks.SlidingWindow(8) if isinstance(cache, RollingCache) else masks.Causal()


def tokens_of(count, heads=K, seed=1):
    return normal(B, count, heads, H, seed=seed), normal(B, count, heads, H, seed=seed + 1)


def filled(cache, prompt, chunk, step):
    """A prompt, one more chunk of it, and the first token after it."""
    cache = cache.prefill(*prompt, lengths=LENGTHS)
    further = cache.prefill_chunk if isinstance(cache, TwoPartCache) else cache.append
    return further(*chunk, lengths=CHUNK).append(*step)


def full_cache(kind, storage=None, heads=K):
    return jax.jit(filled)(new_cache(kind, storage, heads), *(tokens_of(count, heads) for count in (13, 3, 1)))


def run(cut, function, *arguments):
    """Runs a function on the mesh; returns what it returned, and its collectives."""
    with cut.active():
        program = jax.jit(function).lower(*arguments).compile()
        return program(*arguments), collectives(program.as_text())


_COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def collectives(text):
    """What a program sends, e.g. `all-gather f32[2,4,1,8,10]`; whether all rows fit is one bit, and left out."""
    found = [_COLLECTIVE.search(line) for line in text.splitlines()]
    named = [f"{match[2]} {re.sub(r'{[^}]*}', '', match[1])}" for match in found if match]
    return [name for name in named if re.sub(r"pred\[\]|[(), ]", "", name) != "all-reduce"]


def assert_same(found, expected, *, within=0.0):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for pair in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = (np.asarray(array).astype(np.float32) for array in pair)
        np.testing.assert_allclose(one, other, rtol=0, atol=within)


def merged(cut, q_len=1, width=H + 2):
    """The one collective of attention to slots of several devices."""
    rows = B // (MESH[cut.batch] if cut.batch else 1)
    return [f"all-gather f32[{MESH[cut.slots]},{rows},{q_len},{N},{width}]"] if cut.slots else []


def cuts(*kinds, names=CUTS, each=(KINDS,), kept=()):
    """Caches, ways to cut them, and one of each of the other lists; those not kept are left to the sweep."""
    caches = [(kind, name) for kind in kinds for name in names if kind != "paged" or name == "heads"]
    cases = [(kind, name, *others) for kind, name in caches for others in itertools.product(*each)]
    return sweep_but(cases, *kept)


AUTO, EXPLICIT = KINDS


@pytest.mark.parametrize(
    ("kind", "name", "storage", "axes"),
    cuts(
        *("two_part", "rolling", "paged"),
        each=((None, "int8"), KINDS),
        kept=[
            ("two_part", "batch and heads", None, EXPLICIT),
            ("two_part", "batch and slots", "int8", AUTO),
            ("two_part", "batch and slots", "int8", EXPLICIT),
            ("rolling", "batch and slots", None, AUTO),
            ("rolling", "batch and heads", "int8", AUTO),
            ("paged", "heads", None, EXPLICIT),
        ],
    ),
)
def test_tokens_are_written_where_they_belong_and_nothing_is_sent(kind, name, storage, axes):
    cut, cache = Cut(axes, **CUTS[name]), new_cache(kind, storage)
    tokens = [tokens_of(count) for count in (13, 3, 1)]
    expected = jax.jit(filled)(cache, *tokens)
    found, sent = run(cut, filled, cut.placed(cache), *(cut.tokens(cache, *pair) for pair in tokens))
    assert_same(found, expected)
    for array in jax.tree.leaves(found):
        if axes is AxisType.Auto and array.ndim < 4:
            continue  # what is computed from constants alone XLA puts where it likes
        assert array.sharding.is_equivalent_to(NamedSharding(cut.mesh, cut.spec(cache, array)), array.ndim)
    assert sent == []


@pytest.mark.parametrize(
    ("kind", "name", "axes"),
    cuts(
        *("two_part", "rolling", "paged"),
        kept=[
            ("two_part", "batch and heads", AUTO),
            ("two_part", "batch and heads", EXPLICIT),
            ("two_part", "batch and slots", EXPLICIT),
            ("rolling", "batch and slots", AUTO),
            ("rolling", "batch", EXPLICIT),
            ("paged", "heads", EXPLICIT),
        ],
    ),
)
def test_attention_equals_one_device_and_no_cache_is_gathered(kind, name, axes):
    cut, cache, query = Cut(axes, **CUTS[name]), full_cache(kind), normal(B, 1, N, H)
    attend = functools.partial(type(cache).attend, mask=mask_of(cache))
    found, sent = run(cut, attend, cut.placed(cache), *cut.tokens(cache, query))
    assert_same(found, jax.jit(attend)(cache, query), within=CLOSE)
    assert sent == merged(cut)


@pytest.mark.parametrize(
    ("kind", "name", "kernel", "storage"),
    cuts(
        *("two_part", "rolling", "paged"),
        names=("batch", "heads", "slots"),
        each=(("dot_product", "blockwise", "pallas_decode", "ragged"), (None, "int8")),
        kept=[
            ("two_part", "batch", "pallas_decode", None),
            ("two_part", "heads", "ragged", None),
            ("two_part", "slots", "pallas_decode", "int8"),
            ("rolling", "slots", "dot_product", "int8"),
            ("paged", "heads", "pallas_decode", "int8"),
            ("paged", "heads", "ragged", None),
        ],
    ),
)
def test_every_kernel_attends_to_its_shard(kind, name, kernel, storage):
    cut, cache, query = Cut(**CUTS[name]), full_cache(kind, storage), normal(B, 1, N, H)
    attend = functools.partial(type(cache).attend, mask=mask_of(cache), kernel=kernel)
    with testing.interpret():
        found, sent = run(cut, attend, cut.placed(cache), *cut.tokens(cache, query))
        assert_same(found, jax.jit(attend)(cache, query), within=CLOSE)
    assert sent == merged(cut)


SLOTS = Cut(**CUTS["batch and slots"])


@pytest.mark.parametrize(
    "options",
    [
        {"sinks": normal(N, seed=7), "soft_cap": 3.0},
        {"mask": masks.SlidingWindow(5)},
        {"mask": masks.Chunked(4)},
        {"return_partial": True},
        {"lengths": np.array([2, 1, 3, 0])},
    ],
    ids=" ".join,
)
def test_a_chunk_of_queries_over_slots_of_several_devices(options):
    cache, query = full_cache("two_part"), normal(B, 3, N, H)
    cache = jax.jit(TwoPartCache.append)(cache, *tokens_of(3), lengths=np.array([2, 1, 3, 0]))
    options = {"lengths": np.array([2, 1, 3, 0]), **options}

    def attend(cache, query):
        found = cache.attend(query, mode="prefill", **options)
        return {"out": found.out, "lse": found.lse} if options.get("return_partial") else found

    found, sent = run(SLOTS, attend, SLOTS.placed(cache), *SLOTS.tokens(cache, query))
    assert_same(found, jax.jit(attend)(cache, query), within=2 * CLOSE)  # lse is near 4
    assert sent == merged(SLOTS, 3)


def test_largest_logits_over_slots_are_one_more_collective():
    cache, query = full_cache("two_part"), normal(B, 1, N, H)
    attend = functools.partial(TwoPartCache.attend, return_max_logits=True)
    found, sent = run(SLOTS, attend, SLOTS.placed(cache), *SLOTS.tokens(cache, query))
    assert_same(found, jax.jit(attend)(cache, query), within=CLOSE)
    assert sorted(sent) == [*merged(SLOTS), f"all-reduce f32[{B // 2},{N}]"]


@pytest.mark.parametrize(
    ("storage", "heads", "axes"),
    sweep_but(
        list(itertools.product((None, "int8", "int8:heads_and_head_dim"), (1, 2), KINDS)),
        (None, 1, EXPLICIT),
        ("int8:heads_and_head_dim", 2, AUTO),
    ),
)
def test_each_device_reads_its_heads_of_a_cache_with_fewer_than_the_axis(storage, heads, axes):
    cut = Cut(axes, heads=("rows", "cut"))
    cache, query = full_cache("two_part", storage, heads), normal(B, 1, N, H)
    placed = jax.tree.map(cut.put, cache)
    found, sent = run(cut, TwoPartCache.attend, placed, *cut.tokens(cache, query))
    assert_same(found, jax.jit(TwoPartCache.attend)(cache, query), within=CLOSE)
    assert sent == []


@pytest.mark.parametrize(
    ("kind", "name", "axes"),
    cuts(
        *("two_part", "paged"),
        names=("heads", "batch and heads", "batch and slots"),
        kept=[("two_part", "batch and heads", EXPLICIT), ("two_part", "batch and slots", AUTO)],
    ),
)
def test_a_shared_prefix_is_attended_to_by_the_rows_of_each_device(kind, name, axes):
    cut, cache, query = Cut(axes, **CUTS[name]), full_cache(kind), normal(B, 1, N, H)
    prefix = SharedPrefix(jnp.asarray(normal(6, K, H, seed=5)), jnp.asarray(normal(6, K, H, seed=6)))
    placed = jax.tree.map(lambda array: cut.put(array, None, cut.heads, None), prefix)

    def attend(cache, query, prefix):
        return cache.attend(query, prefix=prefix)

    found, sent = run(cut, attend, cut.placed(cache), *cut.tokens(cache, query), placed)
    assert_same(found, jax.jit(attend)(cache, query, prefix), within=CLOSE)
    assert sent == merged(cut)


@pytest.mark.parametrize("axes", sweep_but(KINDS, EXPLICIT))
def test_pages_that_rows_share_are_read_by_heads(axes):
    cut, query = Cut(axes, heads="cut"), normal(B, 1, N, H)

    def attend(cache, query):
        forked = cache.fork(jnp.zeros(3, int), jnp.arange(1, 4), jnp.array([8, 11, 13]))
        forked = forked.free(jnp.array([2])).append(*(jnp.asarray(array) for array in tokens_of(1)))
        return forked.fork(jnp.array([0]), jnp.array([2])).view(shared_pages=2).attend(query)

    cache = full_cache("paged")
    found, sent = run(cut, attend, cut.placed(cache), *cut.tokens(cache, query))
    assert_same(found, jax.jit(attend)(cache, query), within=CLOSE)
    assert sent == []


@pytest.mark.parametrize(
    ("kind", "name", "axes"),
    cuts(
        *("two_part", "rolling", "paged"),
        names=("heads", "batch and heads", "batch and slots"),
        kept=[("rolling", "batch and slots", EXPLICIT), ("two_part", "batch and heads", EXPLICIT)],
    ),
)
def test_a_scan_over_steps_keeps_the_types_of_the_cache(kind, name, axes):
    cut, cache = Cut(axes, **CUTS[name]), new_cache(kind)
    key, value = tokens_of(3)
    query = normal(B, 3, N, H)

    def steps(cache, *tokens):
        def step(cache, at):
            query, key, value = (jax.lax.dynamic_slice_in_dim(array, at, 1, axis=1) for array in tokens)
            out, cache = cache.decode(query, key, value, mask=mask_of(cache))
            return cache, out

        return jax.lax.scan(step, cache, jnp.arange(3))

    found, _ = run(cut, steps, cut.placed(cache), *cut.tokens(cache, query, key, value))
    assert_same(found, jax.jit(steps)(cache, query, key, value), within=CLOSE)


# Pages


POOL = (
    "paged keys cannot be cut: a row's pages may be anywhere in the pool; cut their heads alone, or give each shard a "
    "cache with a pool of its own, inside a shard_map"
)


@pytest.mark.parametrize(
    ("cut", "what"),
    [
        (Cut(batch="rows"), "the batch of "),
        (Cut(slots="cut"), "the sequence of "),
        (Cut(AxisType.Explicit, batch="rows"), "the batch of "),
    ],
)
def test_rows_of_paged_keys_are_not_cut(cut, what):
    cache = cut.placed(full_cache("paged"))
    query = cut.put(normal(B, 1, N, H), cut.batch)
    with cut.active(), pytest.raises(NoKernelError, match=re.escape(what + POOL)) as raised:
        cache.attend(query)
    assert "No plain kernel" not in str(raised.value)


@pytest.mark.parametrize("spec", [("rows",), (None, "rows")])
def test_a_pool_is_not_cut(spec):
    cut, cache = Cut(AxisType.Explicit), full_cache("paged")
    placed = jax.tree.map(lambda array: cut.put(array, *(spec if array.ndim == 4 else ())), cache)
    with cut.active(), pytest.raises(ArgumentError, match=r"pages of key are cut over .*'rows'.*anywhere in the pool"):
        placed.attend(cut.put(normal(B, 1, N, H)))


def test_each_shard_has_a_pool_of_its_own():
    """What the refusal says to do: a cache for the rows of each device, made and kept inside a shard_map."""
    cut = Cut(batch="rows", heads="cut")
    tokens = P("rows", None, "cut", None)
    pools = jax.tree.map(
        lambda array: P("rows", None, "cut", None) if array.ndim == 4 else P("rows"), new_cache("paged", rows=B // 2)
    )
    key, value = tokens_of(5)
    query = normal(B, 1, N, H)

    def one_bit(cache, like):  # a shard_map cuts no scalar: each shard's `overflowed` is an array of one
        return dataclasses.replace(cache, overflowed=cache.overflowed.reshape(like))

    @functools.partial(jax.shard_map, mesh=cut.mesh, in_specs=(tokens, tokens), out_specs=pools, check_vma=False)
    def prefill(key, value):
        return one_bit(new_cache("paged", rows=B // 2, heads=K // 2).prefill(key, value), (1,))

    @functools.partial(
        jax.shard_map, mesh=cut.mesh, in_specs=(pools, *[tokens] * 3), out_specs=(tokens, pools), check_vma=False
    )
    def decode(cache, query, key, value):
        out, cache = one_bit(cache, ()).decode(query, key, value)
        return out, one_bit(cache, (1,))

    with cut.active():
        cache = jax.jit(prefill)(key[:, :4], value[:, :4])
        out, cache = jax.jit(decode)(cache, query, key[:, 4:], value[:, 4:])
    assert cache.keys[0].shape == (2 * 6 * B // 2, 4, K, H)

    @jax.jit
    def on_one_device(query, key, value):
        cache = new_cache("paged").prefill(key[:, :4], value[:, :4])
        return cache.decode(query, key[:, 4:], value[:, 4:])[0]

    assert_same(out, on_one_device(query, key, value), within=CLOSE)


# Layers


def _layer_call(cache, query, mode):
    parts = []
    for part in cache.parts(masks.Causal(), 2):
        slots = jnp.arange(part.key.shape[1])[None]
        starts = jnp.broadcast_to(part.offset, B)[:, None]
        ids = jnp.where(slots < part.lengths[:, None], 1, -1)
        parts.append(CachedPart(key=part.key, value=part.value, segment_ids=ids, positions=slots + starts))
    op = AttentionOp(mask=masks.Causal())
    return op(query, cached=parts, sinks=jnp.arange(N, dtype=jnp.float32), mode=mode, tokens=Tokens(query_offset=12))


@pytest.mark.parametrize(
    ("name", "axes"),
    sweep_but(
        list(itertools.product(("batch and heads", "batch and slots"), KINDS)),
        ("batch and heads", AUTO),
        ("batch and slots", EXPLICIT),
    ),
)
def test_a_layer_attends_to_cached_parts(name, axes):
    cut, cache, query = Cut(axes, **CUTS[name]), full_cache("two_part"), normal(B, 2, N, H)
    attend = functools.partial(_layer_call, mode="decode")
    found, sent = run(cut, attend, cut.placed(cache), *cut.tokens(cache, query))
    assert_same(found, jax.jit(attend)(cache, query), within=CLOSE)
    assert sent == merged(cut, 2)


def test_a_layer_is_differentiated_through_parts_merged_together():
    cache, query = full_cache("two_part"), normal(B, 2, N, H)

    def pull(cache, query):
        def loss(query, key):
            changed = dataclasses.replace(cache, prefill_key=key)
            return jnp.square(_layer_call(changed, query, "train")).sum()

        return jax.grad(loss, argnums=(0, 1))(query, cache.prefill_key)

    found, _ = run(SLOTS, pull, SLOTS.placed(cache), *SLOTS.tokens(cache, query))
    assert_same(found, jax.jit(pull)(cache, query), within=2e-5)


# What cannot be


def test_one_token_is_not_cut_over_a_sequence():
    cache, cut = full_cache("two_part"), Cut(slots="cut")
    with (
        cut.active(),
        kernelry.use(sharding=Sharding(sequence="cut")),
        pytest.raises(ShapeError, match=r"T=1 does not divide over cut: 1 % 2 = 1; .* kv_sequence=\('cut',\) in place"),
    ):
        cut.placed(cache).attend(normal(B, 1, N, H))


def test_a_prefix_of_slots_that_are_cut_divides():
    cut, cache = Cut(slots="cut"), full_cache("two_part")
    prefix = SharedPrefix(*(jnp.asarray(normal(5, K, H)) for _ in range(2)))
    with cut.active(), pytest.raises(ShapeError, match="key length S=5 does not divide over cut: 5 % 2 = 1"):
        cut.placed(cache).attend(normal(B, 1, N, H), prefix=prefix)


def test_slots_that_do_not_divide():
    cut = Cut(slots="cut")
    cache = RollingCache.create(batch=B, window=9, kv_heads=K, head_dim=H, dtype=jnp.float32)
    with cut.active(), pytest.raises(ShapeError, match="key length S=9 does not divide over cut: 9 % 2 = 1; pad to 10"):
        cache.append(*tokens_of(1)).attend(normal(B, 1, N, H), mask=masks.SlidingWindow(8))
