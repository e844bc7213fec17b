"""What the array adapters make of masks, held to the definition of each mask."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import HIDING, MASKS, Heads, arrays_of, masks_of_every_class, masks_that_hide, visible_by
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mask_strategies import BATCH, KV_HEADS, Q_HEADS, near, placed_masks

from kernelry import masks
from kernelry.errors import PluginError
from kernelry.execution.adapters.order import CleanHiddenSlots, DenseMask, LengthsAsSegments, PadSequence
from kernelry.masks.form import AtomKind
from kernelry.plugin import Atom, Capabilities, Inputs, Mask, Refusal, RefusalCode, Request, Side, pytree
from kernelry.testing import reference_mask

QUICK = settings(max_examples=30, deadline=None)
EVERYTHING = Capabilities(atoms=frozenset(AtomKind), unequal_lengths=True)
TAKES = {
    "segments": EVERYTHING,
    "separate": dataclasses.replace(EVERYTHING, atoms=frozenset({AtomKind.SEGMENTS_SEPARATE})),
    "lengths": dataclasses.replace(EVERYTHING, atoms=frozenset({AtomKind.LENGTHS})),
}


@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class Striped(Mask):
    """A third party's mask."""

    step: int

    word = "striped"

    def evaluate(self, query, kv):
        return (query.slots - kv.slots) % self.step == 0


@pytree("visible")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Disguised(Mask):
    """A third party's mask with arrays that says it is another."""

    visible: np.ndarray

    @property
    def atom(self):
        return Atom(AtomKind.PREFIX_LM)

    def evaluate(self, query, kv):
        return kv.take(self.visible)


@pytree("keys")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Seen(Mask):
    """A third party's mask with an array."""

    keys: np.ndarray

    word = "seen"

    def evaluate(self, query, kv):
        return kv.take(self.keys) | (query.slots == kv.slots)


UNKNOWN_ARRAYS = {
    "predicate": masks.Predicate(near, np.int32(2)),
    "placed predicate": masks.Predicate(near, np.int32(2)).at(query_offset=1, kv_positions=np.array([3, 0, 1, 2])),
    "custom": Seen(np.array([True, False, True, False])),
}


def asked(mask, q_len, kv_len, **others):
    return Request(
        batch=BATCH, q_len=q_len, kv_len=kv_len, q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=2, mask=mask, **others
    )


def inputs_of(mask, q_len, kv_len):
    """Two columns per head: nothing here depends on the numbers in them."""
    return Inputs(**arrays_of(q_len, kv_len, Heads(Q_HEADS, KV_HEADS, 2, 2)), mask=mask.canonical())


def defined(mask, request):
    """The definition's booleans."""
    return reference_mask(mask, request.batch, request.q_heads, request.q_len, request.kv_len)


def shown(conjunction, request):
    """What canonical masks show, bands among them, which the definitions do not know."""
    full = (request.batch, request.q_heads, request.q_len, request.kv_len)
    xp = jnp if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(conjunction)) else np
    query, kv = Side.query(request.q_len, xp, q_heads=request.q_heads), Side.kv(request.kv_len, xp)
    parts = [np.broadcast_to(mask.evaluate(query, kv), full) for mask in conjunction]
    return np.logical_and.reduce([np.ones(full, bool), *parts])


def too_short(q_len, kv_len):
    return Refusal(RefusalCode.SEQUENCE_LENGTH, "too short", pad_to=(("q_len", q_len), ("kv_len", kv_len)))


def assert_aligned(conjunction, request):
    assert [mask.form.atoms for mask in conjunction] == [(atom,) for atom in request.mask.atoms]
    assert list(request.mask.atoms) == sorted(request.mask.atoms, key=lambda atom: atom.sort_key)


def padded_beyond(mask, q_len, kv_len, more, *, takes="segments", **others):
    """The request and the conjunction before and after padding; None where the adapter cannot help."""
    before = asked(mask, q_len, kv_len, **others)
    refusal = too_short(q_len + more[0], kv_len + more[1])
    after = PadSequence().rewrite(before, TAKES[takes], (refusal,))
    if after is None:
        return None
    found = PadSequence().prepare(inputs_of(mask, q_len, kv_len), before, after)
    return before, after, found


def assert_padding_is_out_of_sight(mask, before, after, found):
    assert_aligned(found.mask, after)
    assert found.query.shape[1] == after.q_len
    assert found.key.shape[1] == found.value.shape[1] == after.kv_len
    expected = defined(mask, before)
    visible = shown(found.mask, after)
    rows, slots = before.q_len, before.kv_len
    np.testing.assert_array_equal(visible[:, :, :rows, :slots], expected)
    assert not visible[:, :, :rows, slots:].any()
    news_of_old_slots = visible[:, :, rows:, :slots].any(axis=2)
    assert not (news_of_old_slots & ~expected.any(axis=2)).any()  # NaN may stand where no row of the call looks
    if after.max_logits:
        assert not visible[:, :, rows:].any()


@settings(max_examples=100, deadline=None)
@given(
    placed_masks(max_len=4),
    st.tuples(st.sampled_from([0, 2]), st.sampled_from([0, 2])),
    st.sampled_from(sorted(TAKES)),
    st.booleans(),
)
def test_padding_is_seen_by_no_row_of_the_call(drawn, more, takes, max_logits):
    mask, q_len, kv_len = drawn
    assume(any(more))
    done = padded_beyond(mask, q_len, kv_len, more, takes=takes, max_logits=max_logits)
    assert_padding_is_out_of_sight(mask, *done)


@pytest.mark.parametrize(
    ("takes", "more"), [("segments", (2, 2)), ("separate", (0, 3)), ("segments", (3, 0)), ("lengths", (1, 4))]
)
@pytest.mark.parametrize("name", [name for name in MASKS if name != "predicate"])
def test_masks_of_every_class_are_padded_at_equal_lengths(name, more, takes):
    mask = masks_of_every_class(7, 7)[name]
    done = padded_beyond(mask, 7, 7, more, takes=takes)
    assert done is not None
    assert_padding_is_out_of_sight(mask, *done)


@pytest.mark.parametrize(
    ("mask", "more", "atoms"),
    [
        (masks.Causal(), (3, 3), "causal"),
        (masks.SlidingWindow(3, 2).at(query_offset=-2), (0, 5), "window(3, 2) at query=-2"),
        (masks.Chunked(4), (3, 3), "chunked(4)"),
        (masks.Full(), (3, 3), "segments"),
        (masks.Full(), (3, 4), "segments_separate"),
        (masks.Full(), (3, 0), "full"),
        (masks.Segments(np.zeros(6, int)), (3, 3), "segments"),
        (masks.Segments(np.zeros(6, int)), (0, 3), "segments_separate"),
        (masks.Lengths(np.int32(4)), (3, 3), "lengths"),
        (masks.SlidingWindow(1, 1), (3, 3), "segments & window(1, 1)"),
        (masks.BlockCausal(3), (3, 3), "block_causal(3)"),
        (masks.BlockCausal(4), (2, 2), "block_causal(4) & segments"),
    ],
)
def test_padding_adds_an_atom_only_where_the_mask_needs_one(mask, more, atoms):
    _, after, _ = padded_beyond(mask, 6, 6, more)
    assert str(after.mask) == atoms


@pytest.mark.parametrize(
    ("mask", "atoms"),
    [
        (masks.Full(), "segments"),
        (masks.Causal(), "causal & segments"),
        (masks.Lengths(np.int32(4)), "lengths(query)"),
        (masks.Lengths(np.int32(4)) & masks.Segments(np.zeros(6, int)), "lengths & segments"),
        (masks.Dense(np.ones((1, 1, 1, 6), bool)), "dense"),
        (masks.BidirectionalSpans(np.zeros(6, int)), "spans"),
    ],
)
def test_no_padding_is_seen_by_a_padded_row_where_the_largest_logit_is_wanted(mask, atoms):
    before, after, found = padded_beyond(mask, 6, 6, (3, 3), max_logits=True)
    assert str(after.mask) == atoms
    assert_padding_is_out_of_sight(mask, before, after, found)


@pytest.mark.parametrize(
    ("mask", "atoms"),
    [
        (masks.Causal().at(query_offset=-2), "causal at query=-2 & segments_separate"),
        (masks.Causal().at(query_offset=-2) & masks.Lengths(np.int32(5)), "causal at query=-2 & lengths(query)"),
        (masks.Causal() & masks.Lengths(np.int32(5)), "causal & lengths"),
        (masks.Dense(np.ones((1, 1, 1, 6), bool)), "dense"),
    ],
)
def test_a_padded_row_sees_no_slot_that_is_hidden_from_the_others(mask, atoms):
    before, after, found = padded_beyond(mask, 6, 6, (3, 0))
    assert str(after.mask) == atoms
    assert_padding_is_out_of_sight(mask, before, after, found)


def test_lengths_beyond_the_keys_do_not_show_the_padding():
    mask = masks.Lengths(np.array([9, 3]), np.array([99, 2]))
    assert_padding_is_out_of_sight(mask, *padded_beyond(mask, 5, 5, (3, 3)))


def test_narrow_ids_and_lengths_survive_padding_beyond_their_range():
    lengths = masks.Lengths(jnp.array([255, 3], jnp.uint8)) & masks.Segments(jnp.zeros(300, jnp.uint8))
    assert_padding_is_out_of_sight(lengths, *padded_beyond(lengths, 300, 300, (2, 2)))


@pytest.mark.parametrize("around", [lambda mask: mask, operator.invert, lambda mask: masks.Causal() | mask])
@pytest.mark.parametrize("more", [(1, 1), (0, 3), (2, 0)])
@pytest.mark.parametrize("max_logits", [False, True])
@pytest.mark.parametrize("name", UNKNOWN_ARRAYS)
def test_a_mask_of_unknown_arrays_is_asked_about_the_slots_of_before(name, around, more, max_logits):
    mask = around(UNKNOWN_ARRAYS[name])
    assert_padding_is_out_of_sight(mask, *padded_beyond(mask, 4, 4, more, max_logits=max_logits))


def test_a_mask_of_unknown_arrays_needs_no_other_atom_when_padded():
    _, after, _ = padded_beyond(UNKNOWN_ARRAYS["custom"], 4, 4, (1, 1), max_logits=True)
    assert str(after.mask) == "custom(kernelry.padded, custom(seen, operands), operands)"


def test_a_custom_mask_without_arrays_stays_as_it_is_when_padded():
    mask = Striped(2)
    before, after, found = padded_beyond(mask, 4, 4, (1, 1))
    assert str(after.mask) == "custom(striped, 2) & segments"
    assert mask in found.mask
    assert_padding_is_out_of_sight(mask, before, after, found)


def test_a_mask_that_hides_its_class_cannot_be_padded():
    mask = masks.Causal() | Disguised(np.array([True, False, True]))
    with pytest.raises(PluginError, match="only Disguised can pad"):
        padded_beyond(mask, 3, 3, (1, 1))


@pytest.mark.parametrize("lengths", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("name", ["full", "lengths", "dense", "causal"])
def test_an_empty_side_gets_a_slot_out_of_sight(name, lengths):
    mask = masks_of_every_class(*lengths)[name].at(query_offset=1)
    before = asked(mask, *lengths)
    after = PadSequence().rewrite(before, EVERYTHING, EVERYTHING.refusals(before))
    found = PadSequence().prepare(inputs_of(mask, *lengths), before, after)
    assert min(after.q_len, after.kv_len) == 1
    assert_padding_is_out_of_sight(mask, before, after, found)


@pytest.mark.parametrize("lengths", [(1, 6), (6, 1), (3, 5)])
def test_unequal_lengths_are_padded_to_the_longer(lengths):
    mask = masks.Causal().at(query_offset=jnp.array([2, 4]), kv_positions=np.arange(lengths[1])[::-1].copy())
    before = asked(mask, *lengths)
    capabilities = dataclasses.replace(EVERYTHING, unequal_lengths=False)
    after = PadSequence().rewrite(before, capabilities, capabilities.refusals(before))
    assert (after.q_len, after.kv_len) == (max(lengths), max(lengths))
    assert_padding_is_out_of_sight(mask, before, after, PadSequence().prepare(inputs_of(mask, *lengths), before, after))


@QUICK
@given(placed_masks(max_len=3))
def test_a_dense_mask_shows_what_the_conjunction_shows(drawn):
    mask, q_len, kv_len = drawn
    before = asked(mask, q_len, kv_len)
    after = DenseMask().rewrite(before, EVERYTHING, ())
    assume(after is not None)
    found = DenseMask().prepare(inputs_of(mask, q_len, kv_len), before, after)
    assert_aligned(found.mask, after)
    np.testing.assert_array_equal(shown(found.mask, after), defined(mask, before))


@pytest.mark.parametrize(
    ("mask", "shape"),
    [
        (masks.Causal(), (1, 1)),
        (masks.Causal().at(query_offset=jnp.array([1, 2])), (BATCH, 1)),
        (masks.Dense(np.ones((1, Q_HEADS, 4, 4), bool)) & masks.Causal(), (1, Q_HEADS)),
    ],
)
def test_a_dense_mask_varies_only_where_the_mask_does_and_costs_that(mask, shape):
    before = asked(mask, 4, 4)
    after = DenseMask().rewrite(before, EVERYTHING, ())
    [dense] = DenseMask().prepare(inputs_of(mask, 4, 4), before, after).mask
    assert dense.visible.shape == (*shape, 4, 4)
    assert DenseMask().cost(before, after).extra_bytes >= dense.visible.size


def test_a_dense_mask_needs_a_kernel_that_takes_it_and_a_mask_that_is_another():
    assert DenseMask().rewrite(asked(masks.Causal(), 4, 4), TAKES["lengths"], ()) is None
    assert DenseMask().rewrite(asked(masks.Dense(np.ones((4, 4), bool)), 4, 4), EVERYTHING, ()) is None


@QUICK
@given(placed_masks(depth=1, max_len=5, atoms=("lengths", "segments", "causal")))
def test_lengths_as_segments_show_what_lengths_show(drawn):
    mask, q_len, kv_len = drawn
    mask = mask & masks.Lengths(np.array([kv_len, 1]), np.array([1, q_len]))
    check_lengths_as_segments(mask, q_len, kv_len)


def check_lengths_as_segments(mask, q_len, kv_len):
    before = asked(mask, q_len, kv_len)
    after = LengthsAsSegments().rewrite(before, TAKES["separate"], ())
    assert AtomKind.LENGTHS not in {atom.kind for atom in after.mask.atoms}
    found = LengthsAsSegments().prepare(inputs_of(mask, q_len, kv_len), before, after)
    assert_aligned(found.mask, after)
    np.testing.assert_array_equal(shown(found.mask, after), defined(mask, before))


@pytest.mark.parametrize("lengths", [(5, 5), (3, 6), (0, 2), (2, 0)])
@pytest.mark.parametrize("query_lengths", [None, np.array([2, 9])])
def test_lengths_alone_become_segments(lengths, query_lengths):
    check_lengths_as_segments(masks.Lengths(jnp.array([2, 9]), query_lengths), *lengths)


def test_lengths_join_the_segments_of_the_mask():
    ids = jnp.array([0, 0, 1, 1, 2], jnp.uint8)
    mask = masks.Segments(ids) & masks.Lengths(np.array([3, 5])) & masks.Causal() & masks.Lengths(np.int32(4))
    check_lengths_as_segments(mask, 5, 5)
    after = LengthsAsSegments().rewrite(asked(mask, 5, 5), TAKES["separate"], ())
    assert str(after.mask) == "causal & segments_separate"


def test_lengths_are_left_alone_where_the_kernel_takes_them_or_one_array_of_ids_only():
    request = asked(masks.Lengths(np.int32(2)), 4, 4)
    shared = Capabilities(atoms=frozenset({AtomKind.SEGMENTS}))
    assert [LengthsAsSegments().rewrite(request, can, ()) for can in (EVERYTHING, shared)] == [None, None]


def assert_cleaned(mask, q_len, kv_len):
    """Slots out of every row's sight are 0 in the arrays; the others are as they were."""
    request = asked(mask, q_len, kv_len)
    given_here = inputs_of(mask, q_len, kv_len)
    poisoned, seen = poisoned_where_hidden(given_here, visible_by(mask, arrays_of(q_len, kv_len)))
    found = CleanHiddenSlots().prepare(dataclasses.replace(given_here, **poisoned), request, request)
    for name, keep in seen.items():
        expected = np.where(keep, getattr(given_here, name), 0)
        np.testing.assert_array_equal(np.asarray(getattr(found, name)), expected, err_msg=name)


def poisoned_where_hidden(inputs, visible):
    batch, _, q_len, kv_len = visible.shape
    rows = visible.any(axis=3).swapaxes(1, 2)[..., None]
    by_group = visible.reshape(batch, KV_HEADS, Q_HEADS // KV_HEADS, q_len, kv_len)
    slots = by_group.any(axis=(2, 3)).swapaxes(1, 2)[..., None]
    seen = {"query": rows, "key": slots, "value": slots}
    return {name: jnp.where(keep, getattr(inputs, name), jnp.nan) for name, keep in seen.items()}, seen


@pytest.mark.parametrize("name", HIDING)
def test_nan_in_hidden_slots_is_cleaned(name):
    assert_cleaned(masks_that_hide(9)[name], 9, 9)


@settings(max_examples=20, deadline=None)
@given(placed_masks(max_len=3))
def test_cleaning_leaves_every_visible_slot_as_it_is(drawn):
    assert_cleaned(*drawn)


@pytest.mark.parametrize(
    "mask",
    [
        masks.Segments(np.array([[0, 0, -1, 1, 1], [-1, 2, 2, 2, -1]])),
        masks.Segments(np.array([0, 0, -1, 1, 1])) & masks.SlidingWindow(1, 1),
        masks.Segments(np.array([0, 0, -1, 1, 1])) & masks.Chunked(2).at(query_offset=3, kv_offset=3),
        masks.Segments(np.array([0, 0, -1, 1, 1])) & masks.Causal().at(query_offset=-2),
        masks.Lengths(np.array([0, 3])),
        masks.Lengths(np.array([2, 3]), np.array([4, 0])),
        masks.Lengths(np.int32(3)),
    ],
    ids=str,
)
def test_cheap_forms_are_cleaned_like_any_other(mask):
    assert_cleaned(mask, 5, 5)
