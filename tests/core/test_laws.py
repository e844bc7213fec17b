"""The laws of attention over random masks and arrays.

Laws of masks are tested as booleans, the ones that attention sees: the conjunction that a mask is. Laws of attention
are tested with booleans that are traced, so that one program serves hundreds of masks. A few masks go through attention
themselves.
"""

import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    GROUPED,
    Answer,
    answer,
    arrays_of,
    assert_twins,
    attend,
    compiled_answer,
    cotangents_of,
    oracle_answer,
    visible_by,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_strategies import BATCH, Q_HEADS, atomic_masks, masks_of

import kernelry
from kernelry import masks
from kernelry.execution.normalization import to_lse, to_max_sum
from kernelry.testing import reference_mask

T, S = 5, 7
POSITIONAL = [
    "causal",
    "window",
    "chunked",
    "block_causal",
    "prefix",
    "predicate",
    "predicate_with_operand",
    "selection",
]
FORMS = st.sampled_from([to_lse, to_max_sum])
STATISTICS = {"return_partial": True, "return_max_logits": True}


def any_mask(depth=2, traced=True):
    """Draws a mask for T queries and S keys."""
    return masks_of(T, S, depth, traced=traced).map(lambda mask: mask.at(query_offset=0))


def any_booleans():
    """Draws what a mask shows: B N T S."""
    return any_mask(traced=False).map(seen)


def seen(mask, kv_len=S):
    """What attention sees of a mask: the conjunction that it is."""
    parts = [part.materialize(T, kv_len, q_heads=Q_HEADS) for part in mask.canonical()]
    shown = functools.reduce(operator.and_, (np.asarray(part) for part in parts), np.ones((1, 1, 1, 1), bool))
    return np.broadcast_to(shown, (BATCH, Q_HEADS, T, kv_len))


def assert_close(left, right, atol):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=atol)


def everything(visible, arrays, cotangents):
    """The statistics, the output and the gradients where these booleans say what is seen."""
    return compiled_answer(masks.Dense(jnp.asarray(visible)), arrays, cotangents, **STATISTICS)


def poisoned(arrays, visible):
    """Puts NaN into the keys and values that no row sees."""
    by_group = visible.reshape(BATCH, GROUPED.kv, -1, T, S)
    hidden = ~by_group.any(axis=(2, 3)).swapaxes(1, 2)[..., None]
    return arrays | {name: jnp.asarray(np.where(hidden, np.nan, arrays[name])) for name in ("key", "value")}


@given(any_mask(), st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_any_composition_of_masks_means_what_the_oracle_says(mask, seed):
    """Whatever hidden slots hold."""
    arrays = arrays_of(T, S, seed=seed)
    cotangents = cotangents_of(arrays, lse=True)
    found = Answer(*answer(mask, poisoned(arrays, visible_by(mask, arrays)), cotangents, **STATISTICS))
    assert_twins(found, oracle_answer(mask, arrays, cotangents))


@given(any_booleans(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_booleans_mean_what_the_oracle_says(visible, seed):
    arrays = arrays_of(T, S, seed=seed)
    cotangents = cotangents_of(arrays, lse=True)
    found = everything(visible, arrays, cotangents)
    assert_twins(found, oracle_answer(masks.Dense(visible), arrays, cotangents))


@given(any_mask(traced=False))
@settings(max_examples=60, deadline=None)
def test_a_mask_and_its_materialised_dense_give_the_same(mask):
    dense = masks.Dense(mask.materialize(T, S, q_heads=Q_HEADS))
    np.testing.assert_array_equal(seen(dense), reference_mask(mask, BATCH, Q_HEADS, T, S))
    np.testing.assert_array_equal(seen(mask), seen(dense))


@given(any_mask(traced=False))
@settings(max_examples=60, deadline=None)
def test_double_negation_changes_nothing(mask):
    assert (~~mask).form == mask.form
    np.testing.assert_array_equal(seen(~~mask), seen(mask))
    np.testing.assert_array_equal(seen(~mask), ~seen(mask))


@given(any_mask(1, traced=False), any_mask(1, traced=False))
@settings(max_examples=60, deadline=None)
def test_de_morgan(one, other):
    np.testing.assert_array_equal(seen(~(one & other)), seen(~one | ~other))
    np.testing.assert_array_equal(seen(~(one | other)), seen(~one & ~other))


@given(any_mask(1, traced=False), any_mask(1, traced=False), any_mask(1, traced=False))
@settings(max_examples=60, deadline=None)
def test_and_distributes_over_or(one, other, third):
    np.testing.assert_array_equal(seen(one & (other | third)), seen((one & other) | (one & third)))


_offsets = st.sampled_from([int, np.int32, jnp.int32])


@given(
    st.sampled_from([masks.Causal(), masks.SlidingWindow(2), masks.SlidingWindow(1, 2)]),
    st.integers(-999, 999),
    _offsets,
)
@settings(max_examples=60, deadline=None)
def test_bands_do_not_move_when_both_sides_do(mask, shift, as_given):
    moved = mask.at(query_offset=as_given(2 + shift), kv_offset=as_given(shift))
    np.testing.assert_array_equal(seen(moved), seen(mask.at(query_offset=2)))


@given(st.sampled_from([masks.Chunked, masks.BlockCausal]), st.integers(1, 5), st.integers(-99, 99), _offsets)
@settings(max_examples=60, deadline=None)
def test_grids_do_not_move_when_both_sides_do_by_a_multiple_of_the_size(grid, size, times, as_given):
    mask, shift = grid(size), size * times
    moved = mask.at(query_offset=as_given(2 + shift), kv_offset=as_given(shift))
    np.testing.assert_array_equal(seen(moved), seen(mask.at(query_offset=2)))


@st.composite
def positional_masks(draw):
    """Draws masks whose atoms are all positional and that say nowhere where they stand."""
    one, other = (draw(atomic_masks(T, S, POSITIONAL)) for _ in range(2))
    return draw(st.sampled_from([one, one & other, one | other, ~one & other, ~(one | other)]))


_orders = st.permutations(range(S)).map(np.asarray)


@given(positional_masks(), _orders, st.lists(st.integers(-3, 9), min_size=S, max_size=S))
@settings(max_examples=60, deadline=None)
def test_positional_masks_move_with_the_positions_of_the_keys(mask, order, positions):
    positions = np.asarray(positions, np.int32)
    whole, permuted = (mask.at(query_offset=1, kv_positions=where) for where in (positions, positions[order]))
    np.testing.assert_array_equal(seen(permuted), seen(whole)[..., order])


@given(any_booleans(), _orders, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_permuting_keys_with_what_is_seen_of_them_changes_nothing(visible, order, seed):
    arrays = arrays_of(T, S, seed=seed)
    cotangents = cotangents_of(arrays, lse=True)
    of_keys = ("key", "value")
    permuted = arrays | {name: np.asarray(arrays[name])[:, order] for name in of_keys}
    found, plain = everything(visible[..., order], permuted, cotangents), everything(visible, arrays, cotangents)
    expected = plain.gradients | {name: np.asarray(plain.gradients[name])[:, order] for name in of_keys}
    assert_close((found.out, found.lse, found.max_logits), (plain.out, plain.lse, plain.max_logits), atol=2e-6)
    assert_close(found.gradients, expected, atol=1e-5)


@jax.jit
def _whole(visible, arrays, d_out):
    """The output and the gradients of attention over all keys."""
    out, pull = jax.vjp(lambda arrays: attend(masks.Dense(visible), arrays), arrays)
    return out, pull(d_out)


@functools.partial(jax.jit, static_argnames=("cuts", "form"))
def _in_slices(visible, arrays, d_out, cuts, form):
    """As `_whole`, over consecutive slices of the keys, merged."""

    def call(arrays):
        pieces = []
        for first, last in itertools.pairwise(cuts):
            piece = {"query": arrays["query"]} | {name: arrays[name][:, first:last] for name in ("key", "value")}
            pieces.append(form(attend(masks.Dense(visible[..., first:last]), piece, return_partial=True)))
        return kernelry.finalize(kernelry.merge(pieces), arrays["sinks"])

    out, pull = jax.vjp(call, arrays)
    return out, pull(d_out)


def _parts_of(visible, arrays):
    """Attention by part, [parts] first, where `visible` has what each part sees: parts B N T S."""
    qkv = {name: arrays[name] for name in ("query", "key", "value")}
    return jax.vmap(lambda seen: attend(masks.Dense(seen), qkv, return_partial=True))(visible)


def _split(partials, count):
    return [jax.tree.map(lambda leaf, part=part: leaf[part], partials) for part in range(count)]


@functools.partial(jax.jit, static_argnames="form")
def _dealt_out(visible, arrays, d_out, form):
    """As `_whole`, over parts that see what `visible` says, merged."""

    def call(arrays):
        parts = _split(_parts_of(visible, arrays), len(visible))
        return kernelry.finalize(kernelry.merge([form(part) for part in parts]), arrays["sinks"])

    out, pull = jax.vjp(call, arrays)
    return out, pull(d_out)


def assert_parts_are_the_whole(found, visible, arrays, d_out):
    (out, gradients), (expected, whole) = found, _whole(visible, arrays, d_out)
    assert_close(out, expected, atol=2e-6)
    assert_close(gradients, whole, atol=1e-5)


@pytest.mark.parametrize(("cuts", "form"), [((0, 0, 3, S), to_lse), ((0, 3, S, S), to_max_sum)])
@given(visible=any_booleans(), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_splitting_the_keys_changes_neither_output_nor_gradients(cuts, form, visible, seed):
    arrays = arrays_of(T, S, seed=seed, sinks=True)
    d_out = cotangents_of(arrays)["out"]
    assert_parts_are_the_whole(_in_slices(visible, arrays, d_out, cuts, form), visible, arrays, d_out)


@given(any_booleans(), st.lists(st.integers(0, 2), min_size=S, max_size=S), FORMS, st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_dealing_out_the_keys_in_any_way_changes_neither_output_nor_gradients(visible, owners, form, seed):
    arrays = arrays_of(T, S, seed=seed, sinks=True)
    d_out = cotangents_of(arrays)["out"]
    of_parts = np.stack([visible & (np.asarray(owners) == part) for part in range(3)])
    assert_parts_are_the_whole(_dealt_out(of_parts, arrays, d_out, form), visible, arrays, d_out)


@pytest.mark.parametrize("mask", [masks.Causal(), masks.SlidingWindow(3, 1), masks.Chunked(3), masks.PrefixLM(2)])
def test_parts_of_a_positional_mask_are_the_mask_at_the_offset_of_the_keys(mask):
    whole = seen(mask.at(query_offset=2))
    for first, last in itertools.combinations(range(S + 1), 2):
        part = mask.at(query_offset=2, kv_offset=first)
        np.testing.assert_array_equal(seen(part, last - first), whole[..., first:last])


_compiled_parts = jax.jit(_parts_of)


@st.composite
def parts_of_keys(draw, count=3):
    """Draws the parts of an attention: each key belongs to one of them, and some may get none."""
    arrays = arrays_of(T, S, seed=draw(st.integers(0, 99)))
    visible = draw(any_booleans())
    owner = np.asarray(draw(st.lists(st.integers(0, count - 1), min_size=S, max_size=S)))
    of_parts = np.stack([visible & (owner == part) for part in range(count)])
    form = draw(FORMS)
    return [form(part) for part in _split(_compiled_parts(of_parts, arrays), count)]


def merged(*parts):
    """What merging gives, whatever its form: the output and lse."""
    partial = to_lse(kernelry.merge(parts))
    return partial.out, partial.lse


@given(parts_of_keys())
@settings(max_examples=25, deadline=None)
def test_merge_is_associative(parts):
    a, b, c = parts
    assert_close(merged(kernelry.merge([a, b]), c), merged(a, kernelry.merge([b, c])), atol=2e-6)
    assert_close(merged(kernelry.merge([a, b]), c), merged(a, b, c), atol=2e-6)


@given(parts_of_keys(), st.permutations(range(3)))
@settings(max_examples=25, deadline=None)
def test_merge_is_commutative(parts, order):
    assert_close(merged(*(parts[i] for i in order)), merged(*parts), atol=2e-6)


@given(parts_of_keys(), FORMS)
@settings(max_examples=25, deadline=None)
def test_a_part_that_sees_nothing_is_the_identity_of_merge_on_both_sides(parts, form):
    part = parts[0]
    nothing = np.zeros((3, BATCH, Q_HEADS, T, S), bool)
    identity = form(_split(_compiled_parts(nothing, arrays_of(T, S)), 1)[0])
    alone = to_lse(part).out, to_lse(part).lse
    assert_close(merged(part, identity), alone, atol=2e-6)
    assert_close(merged(identity, part), alone, atol=2e-6)


@functools.partial(jax.jit, static_argnames=("kernel", "cap"))
def _bias_after_cap(arrays, d_out, kernel, cap):
    """The output and the gradients under a bias that is added after the cap."""

    def call(arrays):
        return kernelry.attention(**arrays, soft_cap=cap, scale=1.3, bias_after_cap=True, kernel=kernel)

    out, pull = jax.vjp(call, arrays)
    return out, pull(d_out)


@pytest.mark.parametrize("kernel", ["dot_product", "blockwise"])
@given(visible=any_booleans(), cap=st.sampled_from([0.5, 6.0]), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_bias_after_the_cap_is_added_to_capped_logits_and_minus_a_billion_hides(kernel, visible, cap, seed):
    arrays = arrays_of(T, S, seed=seed, bias=(BATCH, Q_HEADS, T, S))
    d_out = cotangents_of(arrays)["out"]
    visible = visible | np.eye(T, S, dtype=bool)  # a row whose every bias is −1e9 is not empty
    biased = arrays | {"bias": jnp.where(visible, arrays["bias"], -1e9)}
    out, gradients = _bias_after_cap(biased, d_out, kernel, cap)

    query, key, value, bias = (np.asarray(biased[name], np.float64) for name in ("query", "key", "value", "bias"))
    key, value = (np.repeat(array, Q_HEADS // GROUPED.kv, axis=2) for array in (key, value))
    logits = cap * np.tanh(1.3 * np.einsum("btnh,bsnh->bnts", query, key) / cap) + bias
    weights = np.exp(logits - logits.max(axis=3, keepdims=True))
    expected = np.einsum("bnts,bsnd->btnd", weights / weights.sum(axis=3, keepdims=True), value)
    assert_close(out, expected, atol=2e-6)

    given = {"soft_cap": cap, "scale": 1.3, "bias_after_cap": True}
    hidden = oracle_answer(masks.Dense(visible), arrays, {"out": d_out, "lse": None}, **given)
    assert_close(out, hidden.out, atol=2e-6)
    assert_close(gradients, hidden.gradients, atol=2e-5)


@jax.jit
def _with_sinks_and_without(visible, arrays):
    without = {name: array for name, array in arrays.items() if name != "sinks"}
    mask = masks.Dense(visible)
    return attend(mask, arrays), attend(mask, without, return_partial=True)


@given(any_booleans(), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_sinks_join_once_at_the_end(visible, seed):
    arrays = arrays_of(T, S, seed=seed, sinks=True)
    whole, partial = _with_sinks_and_without(visible, arrays)
    assert_close(whole, kernelry.finalize(partial, arrays["sinks"]), atol=1e-6)
