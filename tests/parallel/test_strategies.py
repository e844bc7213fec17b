"""Attention on a mesh is attention on one device: every strategy, mask form, order of tokens and feature.

`make test` runs a sample in which each of them occurs; `make test-all` the matrix.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import mesh_cases
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_cases import FEATURES, QKV, SMALL, STRATEGIES, Cut, Sizes, check, close, masks_of, masks_of_other_lengths

import kernelry
from kernelry import masks, testing
from kernelry.errors import ArgumentError, KernelRefusedError, NoKernelError, ShapeError
from kernelry.parallel import Sharding, shard_attention
from kernelry.testing import reference_attention, reference_gradients

pytestmark = pytest.mark.versions

ORDERS = ("contiguous", "dual_chunk", "striped")
MASKS = masks_of()
ROUNDED = {"bfloat16": {"out": 2e-2, "gradient": 6e-2}}
"""Tolerances of features whose arrays are not float32."""


def run(strategy, mask, order, feature, kernel="blockwise"):
    asked = FEATURES[feature]
    masks_here = masks_of(dataclasses.replace(SMALL, **asked.sizes)) if asked.sizes else MASKS
    check(STRATEGIES[strategy].ordered(order), masks_here[mask], asked, kernel=kernel, **ROUNDED.get(feature, {}))


def _cycled(values, step, place):
    names = list(values)
    return names[place * step % len(names)]


SAMPLE = [
    (_cycled(STRATEGIES, 3, place), mask, ORDERS[place % 3], _cycled(FEATURES, 1, place))
    for place, mask in enumerate(MASKS)
]
"""Each mask once; every strategy, order and feature at least once."""


def test_the_sample_has_everything():
    strategies, _, orders, features = (set(values) for values in zip(*SAMPLE, strict=True))
    assert (strategies, orders, features) == (set(STRATEGIES), set(ORDERS), set(FEATURES))


@pytest.mark.parametrize(("strategy", "mask", "order", "feature"), SAMPLE)
def test_a_mesh_changes_nothing(strategy, mask, order, feature):
    run(strategy, mask, order, feature)


def _matrix():
    features = itertools.cycle(FEATURES)
    every = list(itertools.product(STRATEGIES, MASKS, ORDERS))
    turned = [(*case, next(features)) for case in every]
    alone = [(strategy, "packed", "contiguous", feature) for strategy in STRATEGIES for feature in FEATURES]
    return sorted({*turned, *alone} - set(SAMPLE))


@pytest.mark.sweep
@pytest.mark.parametrize(("strategy", "mask", "order", "feature"), _matrix())
def test_a_mesh_changes_nothing_of_the_matrix(strategy, mask, order, feature):
    run(strategy, mask, order, feature)


@pytest.mark.sweep
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parts_of_a_kernel_whose_derivative_is_its_own(strategy, mask):
    run(strategy, mask, "contiguous", "sinks", "dot_product")


def test_a_part_of_a_kernel_whose_derivative_is_its_own():
    run("ring", "packed", "striped", "partial_max_logits", "dot_product")


# Sizes and axes

AXES = {
    "ring_over_two": Cut.of({"c1": 2, "c2": 4}, sequence=("c1", "c2"), strategy="ring"),
    "ring_in_another_order": Cut.of({"c1": 2, "c2": 4}, sequence=("c2", "c1"), strategy="ring"),
    "ulysses_in_another_order": Cut.of({"c1": 2, "c2": 4}, sequence=("c2", "c1"), strategy="ulysses"),
    "all_gather_in_another_order": Cut.of({"c1": 2, "c2": 4}, sequence=("c2", "c1"), strategy="all_gather"),
    "usp_in_another_order": Cut.of(
        {"u1": 2, "r": 2, "u2": 2}, sequence=("r", "u2", "u1"), ulysses=("u2", "u1"), strategy="usp"
    ),
    "keys_over_two": Cut.of({"c1": 2, "c2": 4}, kv_sequence=("c2", "c1")),
    "heads_over_two": Cut.of({"a": 2, "b": 4}, heads=("b", "a")),
    "heads_and_ulysses": Cut.of({"t": 2, "c": 4}, heads="t", sequence="c", strategy="ulysses"),
    "heads_and_usp": Cut.of({"t": 2, "u": 2, "r": 2}, heads="t", sequence=("r", "u"), ulysses="u", strategy="usp"),
    "three_dimensions": Cut.of({"c": 2, "d": 2, "t": 2}, batch="d", heads="t", sequence="c"),
    "unused_axes": Cut.of({"x": 2, "c": 2, "y": 2}, sequence="c", strategy="ring"),
    "unused_axes_of_keys": Cut.of({"x": 2, "c": 2}, kv_sequence="c"),
    "whole_keys_and_ulysses": Cut.of({"c": 4}, sequence="c", kv_sequence=(), strategy="ulysses"),
    "an_axis_of_one": Cut.of({"c": 4, "u": 1}, sequence=("c", "u"), ulysses="u", strategy="usp"),
}
KEPT = {"ring_in_another_order", "usp_in_another_order", "unused_axes_of_keys", "heads_and_usp"}


@pytest.mark.parametrize(
    "name", [name if name in KEPT else pytest.param(name, marks=pytest.mark.sweep) for name in AXES]
)
def test_several_axes_of_a_dimension(name):
    check(AXES[name].ordered("striped"), MASKS["packed_window"], FEATURES["max_logits"])
    check(AXES[name], MASKS["selection_of_kv_heads"], FEATURES["bias"])


SIZES = {
    "batch_over_two": (
        Cut.of({"d": 2, "f": 2, "t": 2}, batch=("d", "f"), heads="t"),
        Sizes(batch=4),
        "positions_of_rows",
        "bias_of_slots",
    ),
    "three_kv_heads_over_two": (
        Cut.of({"t": 2}, heads="t"),
        Sizes(q_heads=6, kv_heads=3),
        "selection_of_kv_heads",
        "quantized_alike",
    ),
    "three_kv_heads_exchanged": (
        Cut.of({"t": 3, "c": 2}, heads="t", sequence="c", strategy="ulysses"),
        Sizes(q_heads=6, kv_heads=3),
        "selection_of_kv_heads",
        "sinks",
    ),
    "a_ring_of_three": (
        Cut.of({"c": 3}, sequence="c", strategy="ring", order="dual_chunk"),
        Sizes(q_len=48, kv_len=48),
        "packed_window",
        "sinks",
    ),
    "one_row": (
        Cut.of({"c": 8}, sequence="c", strategy="ring", order="dual_chunk"),
        Sizes(batch=1),
        "lengths",
        "bias_of_slots",
    ),
    "one_token_each": (Cut.of({"c": 8}, sequence="c", strategy="ring"), Sizes(q_len=8, kv_len=8), "packed", "bias"),
    "as_many_key_heads": (Cut.of({"t": 4}, heads="t"), Sizes(kv_heads=8), "selection_of_heads", "sinks"),
}


@pytest.mark.parametrize("name", SIZES)
def test_odd_sizes(name):
    cut, sizes, mask, feature = SIZES[name]
    check(cut, masks_of(sizes)[mask], FEATURES[feature], sizes)


OTHER_LENGTHS = Sizes(q_len=32, kv_len=64)


@pytest.mark.parametrize("mask", masks_of_other_lengths(OTHER_LENGTHS))
@pytest.mark.parametrize(
    "strategy",
    ["ring", "keys_alone", *(pytest.param(name, marks=pytest.mark.sweep) for name in ("all_gather", "usp", "ulysses"))],
)
def test_fewer_queries_than_keys(strategy, mask):
    check(STRATEGIES[strategy], masks_of_other_lengths(OTHER_LENGTHS)[mask], FEATURES["sinks"], OTHER_LENGTHS)


def test_one_token_to_keys_of_several_devices():
    sizes = Sizes(q_len=1)
    mask = masks.Causal().at(query_offset=jnp.array([40, 9])) & masks.Lengths(np.array([41, 10]))
    check(STRATEGIES["keys_alone"], mask, FEATURES["forward"], sizes)


def test_nothing_to_attend_to():
    """No rows at all, and rows without a key."""
    check(STRATEGIES["ring"], masks.Causal(), FEATURES["plain"], Sizes(batch=0), "dot_product")
    check(STRATEGIES["ring"], masks.Lengths(np.array([0, 0])), FEATURES["sinks"])


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "keys_alone"])
def test_a_mask_that_hides_everything_before_the_program_runs(strategy):
    tokens = np.arange(SMALL.q_len)
    mask = masks.Causal().at(query_positions=tokens, kv_positions=tokens + SMALL.q_len)
    check(STRATEGIES[strategy], mask, FEATURES["sinks"])


@pytest.mark.parametrize("lengths", [(SMALL.q_len, 0), (0, SMALL.kv_len)])
@pytest.mark.parametrize("strategy", ["ring", "all_gather", "keys_alone"])
def test_no_queries_or_no_keys(strategy, lengths):
    cut, (q_len, kv_len) = STRATEGIES[strategy], lengths
    query = jnp.ones((SMALL.batch, q_len, SMALL.q_heads, 8))
    key = value = jnp.ones((SMALL.batch, kv_len, SMALL.kv_heads, 8))

    def attend(*arrays):
        return shard_attention(*arrays, sharding=cut.sharding, kernel="blockwise").sum()

    with jax.set_mesh(mesh_cases.mesh_of(cut.mesh)):
        out, gradients = jax.jit(jax.value_and_grad(attend, (0, 1, 2)))(query, key, value)
    close(out, 0.0, 0.0, "out")
    for found, array in zip(gradients, (query, key, value), strict=True):
        close(found, np.zeros(array.shape), 0.0, "gradients")


@pytest.mark.parametrize(("given", "active"), [(("Explicit",) * 2, ()), ((), ("Explicit",) * 2)])
def test_a_mesh_whose_axes_are_of_another_kind_than_those_of_the_active_one(given, active):
    cut = STRATEGIES["ring"]
    query = jnp.ones((SMALL.batch, SMALL.q_len, SMALL.q_heads, 8))
    sharding = dataclasses.replace(cut.sharding, mesh=mesh_cases.mesh_of(cut.mesh, given))
    with jax.set_mesh(mesh_cases.mesh_of(cut.mesh, active)):
        out = jax.jit(lambda query: shard_attention(query, query, query, sharding=sharding))(query)
    close(out, query, 1e-6, "out")


@pytest.mark.parametrize("strategy", ["ring", "usp", "keys_alone"])
def test_hidden_slots_do_not_leak(strategy):
    """NaN in keys and values that no row may see, nor in the cotangent of rows that see nothing."""
    cut, mask = STRATEGIES[strategy], MASKS["lengths"]
    hidden = np.arange(64)[None] >= np.asarray(mask.kv_lengths)[:, None]
    unseeing = np.arange(64)[None] >= np.asarray(mask.query_lengths)[:, None]
    arrays = mesh_cases.arrays_of(SMALL, FEATURES["plain"])
    dirty = {name: jnp.where(hidden[:, :, None, None], jnp.nan, arrays[name]) for name in ("key", "value")}
    d_out = jnp.where(unseeing[:, :, None, None], jnp.nan, COTANGENT)

    def run(arrays, d_out):
        out, pull = jax.vjp(lambda arrays: kernelry.attention(**arrays, mask=mask, kernel="blockwise"), arrays)
        return out, pull(d_out)[0]

    with jax.set_mesh(mesh_cases.mesh_of(cut.mesh)), kernelry.use(sharding=cut.sharding):
        program = jax.jit(run)
        found, clean = program(arrays | dirty, d_out), program(arrays, COTANGENT)
    jax.tree.map(np.testing.assert_array_equal, found, clean)


# Kernels of accelerators, interpreted

LONG = Sizes(batch=1, q_len=256, kv_len=256, q_heads=2, kv_heads=1, dim=32, value_dim=32)
FLASH = Sizes(batch=1, q_heads=2, kv_heads=1, dim=16, value_dim=16)
OF_TWO = Cut.of({"c": 2}, sequence="c", strategy="ring")
EXCHANGED = Cut.of({"c": 2}, sequence="c", strategy="ulysses")
SPLASH_REFUSES = {
    "prefix": "mask atom prefix_lm",
    "prefix_for_all": "mask atom prefix_lm",
    "spans": "mask atom spans_separate",
    "dense": "mask atom dense",
    "dense_of_rows": "mask atom dense",
    "dense_of_slots": "mask atom dense",
    "selection_of_kv_heads": r"mask atom block_selection\(5\)",
    "selection_of_heads": r"mask atom block_selection\(5\)",
    "predicate": "may leave rows that see no key",
    "predicate_with_operands": "may leave rows that see no key",
    "traced_positions": "at query=traced, kv=traced",
    "traced_offset": "at query=traced, kv=traced",
    "third_party": "may leave rows that see no key",
    "third_party_of_slots": "mask atom custom",
    "not_window": "may leave rows that see no key",
    "not_packed": "may leave rows that see no key",
}
SPLASH_REFUSES_FEATURES = {
    "max_logits": "max_logits=True is not supported",
    "bias": "bias=.* is not supported",
}


IN_MANY_RUNS = ("offsets_of_rows", "striped")
"""Queries at positions of their own and keys that are striped: a mask in many runs."""


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("mask", "order"), sorted({*itertools.product(set(MASKS) - set(SPLASH_REFUSES), ORDERS)} - {IN_MANY_RUNS})
)
def test_splash_in_a_ring_of_the_matrix(mask, order):
    check(OF_TWO.ordered(order), masks_of(LONG)[mask], FEATURES["sinks"], LONG, "splash")


@pytest.mark.parametrize(("cut", "feature"), [(OF_TWO.ordered("striped"), "sinks"), (EXCHANGED, "partial")])
def test_splash(cut, feature):
    check(cut, masks_of(LONG)["packed"], FEATURES[feature], LONG, "splash")


@pytest.mark.parametrize("mask", SPLASH_REFUSES)
def test_what_splash_refuses(mask):
    with pytest.raises(
        KernelRefusedError, match=rf"(?s)mask=.*sharding=sequence=c:2 ring.*splash.*{SPLASH_REFUSES[mask]}"
    ):
        check(OF_TWO, masks_of(LONG)[mask], FEATURES["plain"], LONG, "splash")


def test_splash_refuses_stripes_of_keys_alone():
    mask, order = IN_MANY_RUNS
    with pytest.raises(KernelRefusedError, match="positions by row or in many runs"):
        check(OF_TWO.ordered(order), masks_of(LONG)[mask], FEATURES["plain"], LONG, "splash")


@pytest.mark.parametrize("feature", SPLASH_REFUSES_FEATURES)
def test_features_that_splash_refuses(feature):
    with pytest.raises(KernelRefusedError, match=SPLASH_REFUSES_FEATURES[feature]):
        check(OF_TWO, masks_of(LONG)["causal"], FEATURES[feature], LONG, "splash")


@pytest.mark.sweep
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask", MASKS)
def test_pallas_flash_in_a_ring_of_the_matrix(mask, order):
    check(OF_TWO.ordered(order), masks_of(FLASH)[mask], FEATURES["sinks"], FLASH, "pallas_flash")


@pytest.mark.parametrize(("cut", "feature"), [(OF_TWO.ordered("dual_chunk"), "partial"), (EXCHANGED, "sinks")])
def test_pallas_flash(cut, feature):
    check(cut, masks_of(FLASH)["packed"], FEATURES[feature], FLASH, "pallas_flash")


# Ways in

D2C4 = (("d", 2), ("c", 4))
MASK = MASKS["packed"]
ARRAYS = mesh_cases.arrays_of(SMALL, FEATURES["sinks"])
COTANGENT = jnp.asarray(np.random.default_rng(1).standard_normal(ARRAYS["query"].shape), jnp.float32)
RING = Sharding(batch="d", sequence="c", strategy="ring")


def attend(query, key, value, sinks, mask=MASK, **options):
    return kernelry.attention(query, key, value, sinks=sinks, mask=mask, kernel="blockwise", **options)


def value_and_gradients(function):
    """Of four arrays, in one program."""

    def loss(*arrays):
        out = function(*arrays)
        return (out * COTANGENT).sum(), out

    def run(*arrays):
        gradients, out = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*arrays)
        return out, gradients

    return run


def assert_right(found, mask=MASK):
    out, gradients = found
    qkv = [ARRAYS[name] for name in QKV]
    close(out, reference_attention(*qkv, mask=mask, sinks=ARRAYS["sinks"]).out, 2e-6, "out")
    expected = reference_gradients(*qkv, mask=mask, sinks=ARRAYS["sinks"], d_out=COTANGENT)
    for name, gradient in zip(ARRAYS, gradients, strict=True):
        close(gradient, getattr(expected, name), 2e-5, f"gradient of {name}")


def put(mesh, *, rows=None, tokens=None, heads=None):
    specs = {"query": P(rows, tokens, heads), "key": P(rows, tokens), "value": P(rows, tokens), "sinks": P(heads)}
    return [jax.device_put(array, NamedSharding(mesh, specs[name])) for name, array in ARRAYS.items()]


@pytest.mark.parametrize(("tokens", "heads"), [("c", None), (None, "c"), (None, None)])
def test_explicit_axes_need_nothing(tokens, heads):
    mesh = mesh_cases.mesh_of(D2C4, ("Explicit", "Explicit"))
    arrays = put(mesh, rows="d", tokens=tokens, heads=heads)
    with jax.set_mesh(mesh), kernelry.record() as made:
        found = jax.jit(value_and_gradients(attend))(*arrays)
    assert made[0].request.sharding.startswith("batch=d:2")
    assert jax.typeof(found[0]).sharding.spec == P("d", tokens, heads, None)
    assert_right(found)


def test_automatic_axes_within_explicit_ones():
    mesh = mesh_cases.mesh_of(D2C4, ("Auto", "Explicit"))
    arrays = put(mesh, rows="d", tokens="c")
    with jax.set_mesh(mesh), pytest.warns(UserWarning, match="is not partitioned by XLA"):
        found = jax.jit(value_and_gradients(attend))(*arrays)
    assert_right(found)


@pytest.mark.parametrize("kinds", [(), ("Explicit", "Explicit"), ("Explicit", "Auto")])
def test_a_sharding_that_is_given(kinds):
    mesh = mesh_cases.mesh_of(D2C4, kinds)
    with jax.set_mesh(mesh), kernelry.use(sharding=RING):
        assert_right(jax.jit(value_and_gradients(attend))(*ARRAYS.values()))


def test_a_mesh_that_is_given():
    sharding = dataclasses.replace(RING, mesh=mesh_cases.mesh_of(D2C4))

    def attend_on_it(query, key, value, sinks):
        return shard_attention(query, key, value, sinks=sinks, mask=MASK, kernel="blockwise", sharding=sharding)

    assert_right(jax.jit(value_and_gradients(attend_on_it))(*ARRAYS.values()))
    with jax.set_mesh(mesh_cases.mesh_of(D2C4)):
        assert_right(jax.jit(value_and_gradients(attend_on_it))(*ARRAYS.values()))


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_calls_outside_of_jit(strategy):
    sharding = dataclasses.replace(RING, strategy=strategy)
    with jax.set_mesh(mesh_cases.mesh_of(D2C4)), kernelry.use(sharding=sharding):
        assert_right(value_and_gradients(attend)(*ARRAYS.values()))


@pytest.mark.parametrize("kinds", [(), ("Explicit", "Explicit")])
def test_inside_a_shard_map_over_another_axis(kinds):
    by_row = P("d")

    def attend_to_rows(query, key, value, sinks, ids):
        mask = masks.Causal() & masks.Segments(ids)
        run = jax.shard_map(
            lambda *arrays: attend(
                *arrays[:4], mask=mask if arrays[4] is ids else masks.Causal() & masks.Segments(arrays[4])
            ),
            in_specs=(by_row, by_row, by_row, P(), by_row),
            out_specs=by_row,
            axis_names={"d"},
            check_vma=False,
        )
        return run(query, key, value, sinks, ids)

    mesh = mesh_cases.mesh_of(D2C4, kinds)
    ids = jnp.asarray(mesh_cases.packed_ids())
    with jax.set_mesh(mesh), kernelry.use(sharding=RING):
        arrays = put(mesh, rows="d") if kinds else ARRAYS.values()
        ids = jax.device_put(ids, NamedSharding(mesh, by_row)) if kinds else ids
        assert_right(jax.jit(value_and_gradients(lambda *arrays: attend_to_rows(*arrays, ids)))(*arrays))


def test_inside_a_shard_map_over_its_axes_a_call_is_a_shards():
    by_row = P(("d", "c"))
    arrays = [jnp.concatenate([ARRAYS[name]] * 4) for name in QKV]
    mask = masks.Causal()
    mesh = mesh_cases.mesh_of(D2C4)
    with jax.set_mesh(mesh), kernelry.use(sharding=RING), kernelry.record() as made:
        run = jax.shard_map(
            lambda *arrays: kernelry.attention(*arrays, mask=mask), in_specs=by_row, out_specs=by_row, check_vma=False
        )
        found = jax.jit(run)(*arrays)
    assert made[0].request.sharding is None
    close(found, reference_attention(*arrays, mask=mask).out, 2e-6, "out")


def test_layers_in_a_scan_with_remat():
    """Three layers, each with the same keys and sinks."""
    mesh = mesh_cases.mesh_of(D2C4)

    def loss(arrays, mask):
        @jax.checkpoint
        def layer(query, _):
            return attend(query, *arrays[1:], mask=mask), None

        return jax.lax.scan(layer, arrays[0], length=3)[0].sum()

    arrays = list(ARRAYS.values())
    expected = jax.jit(jax.value_and_grad(loss))(arrays, MASK)
    with jax.set_mesh(mesh), kernelry.use(sharding=RING):
        found = jax.jit(jax.value_and_grad(loss))(arrays, MASK)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=3e-6, atol=3e-6), found, expected)


@pytest.mark.parametrize("options", [{}, {"spmd_axis_name": "v"}])
def test_vmap(options):
    mesh = mesh_cases.mesh_of((("v", 2), ("c", 4)))
    arrays = [jnp.stack([ARRAYS[name], ARRAYS[name][::-1]]) for name in QKV]
    mask = masks.SlidingWindow(9)

    def one(*arrays):
        return kernelry.attention(*arrays, mask=mask, kernel="blockwise")

    def loss(*arrays):
        return jax.vmap(one, **options)(*arrays), jax.vmap(
            jax.grad(lambda *a: (one(*a) ** 2).sum(), (0, 1, 2)), **options
        )(*arrays)

    expected = jax.jit(loss)(*arrays)
    with jax.set_mesh(mesh), kernelry.use(sharding=Sharding(sequence="c", strategy="ring")):
        found = jax.jit(loss)(*arrays)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5), found, expected)


# Dropout


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "heads", "all_gather", "keys_alone"])
def test_dropout(strategy):
    """Forward and backward drop the same, shards draw different bits, and the mean stays.

    Values are one-hot in no way: ⟨d_value, value⟩ = ⟨out, d_out⟩ holds for each key only if both passes drop alike.
    """
    cut = STRATEGIES[strategy]
    sizes = dataclasses.replace(SMALL, dim=64, value_dim=64)
    query = jnp.zeros((2, 64, 8, 64))
    value = jnp.broadcast_to(jnp.eye(64)[None, :, None], (2, 64, 2, 64))  # out is what remains of the probabilities
    d_out = jnp.asarray(np.random.default_rng(4).standard_normal(query.shape), jnp.float32)

    def attend_with(value, rng):
        return kernelry.attention(
            query, query[:, :, :2], value, dropout_rate=0.25, dropout_rng=rng, kernel="blockwise", gradients=["value"]
        )

    def run(value, rng):
        out, pull = jax.vjp(lambda value: attend_with(value, rng), value)
        return out, pull(d_out)[0]

    with jax.set_mesh(mesh_cases.mesh_of(cut.mesh)), kernelry.use(sharding=cut.sharding):
        program = jax.jit(run)
        out, d_value = map(np.asarray, program(value, jax.random.key(3)))
        again, other = (np.asarray(program(value, jax.random.key(seed))[0]) for seed in (3, 4))
    assert sizes.dim == out.shape[3]
    np.testing.assert_array_equal(out, again)
    assert (out != other).any()
    kept = out > 0  # B T N S
    np.testing.assert_allclose(out[kept], 1 / 64 / 0.75, rtol=1e-5)
    assert abs(kept.mean() - 0.75) < 4 * (0.25 * 0.75 / kept.size) ** 0.5
    expected = np.einsum("btns,btnd->bsnd", out, np.asarray(d_out)).reshape(2, 64, 2, 4, 64).sum(3)
    np.testing.assert_allclose(d_value, expected, rtol=1e-4, atol=1e-5)
    parts = [kept[:, i : i + 16, n, s : s + 16] for i in range(0, 64, 16) for n in (0, 4) for s in range(0, 64, 16)]
    parts = [row for part in parts for row in part]
    assert all((one != another).any() for one, another in itertools.combinations(parts, 2))


# What is refused, before tracing


@pytest.mark.parametrize(
    ("sharding", "sizes", "error", "words"),
    [
        (
            {"sequence": "c"},
            Sizes(q_len=250, kv_len=250),
            ShapeError,
            "query length T=250 does not divide over c: 250 % 4 = 2",
        ),
        ({"kv_sequence": "c"}, Sizes(kv_len=250), ShapeError, "key length S=250 does not divide over c: 250 % 4 = 2"),
        ({"batch": "d"}, Sizes(batch=3), ShapeError, "batch B=3 does not divide over d: 3 % 2 = 1"),
        ({"heads": "c"}, Sizes(q_heads=6), ShapeError, "heads N=6 does not divide over c: 6 % 4 = 2"),
        (
            {"sequence": "c", "strategy": "ulysses"},
            Sizes(q_heads=6),
            NoKernelError,
            "heads N=6 do not divide over c: 6 % 4 = 2",
        ),
        (
            {"sequence": "c", "order": "dual_chunk"},
            Sizes(q_len=68, kv_len=68),
            ShapeError,
            "two chunks for each device: 68 % 8 = 4",
        ),
        ({"sequence": "context"}, SMALL, ArgumentError, "has no such axis"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_before_tracing(sharding, sizes, error, words):
    arrays = mesh_cases.arrays_of(sizes, FEATURES["plain"])
    with (
        jax.set_mesh(mesh_cases.mesh_of(D2C4)),
        kernelry.use(sharding=Sharding(**sharding)),
        pytest.raises(error, match=words),
    ):
        kernelry.attention(*arrays.values(), kernel="blockwise")


def test_a_kernel_without_statistics_is_refused_in_a_ring():
    arrays = mesh_cases.arrays_of(FLASH, FEATURES["plain"])
    with (
        jax.set_mesh(mesh_cases.mesh_of((("c", 2),))),
        kernelry.use(sharding=Sharding(sequence="c", strategy="ring")),
        testing.interpret(),
        pytest.raises(KernelRefusedError, match="sharding=sequence=c:2 ring"),
    ):
        kernelry.attention(*arrays.values(), kernel="pallas_decode")
