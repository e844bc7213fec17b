"""Masks as text: expressions are read, and what a mask shows of itself can be read back."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_strategies import ATOMS, BATCH, Q_HEADS, near, placed_masks, strided

from kernelry import masks
from kernelry.errors import ArgumentError, ShapeError
from kernelry.masks import (
    BidirectionalSpans,
    BlockCausal,
    BlockSelection,
    Causal,
    Chunked,
    Dense,
    Full,
    Lengths,
    PrefixLM,
    Segments,
    SlidingWindow,
)
from kernelry.masks.parse import parse_form, parse_mask
from kernelry.testing import reference_mask

IDS = np.array([0, 0, 1, -1])
KEEP = np.array([[True, False], [True, True], [False, True], [True, False]])
NAMES = {**vars(masks), "strided": strided, "near": near}
WRITABLE = tuple(atom for atom in ATOMS if not atom.startswith("predicate"))


def _small(drawn):
    """Arrays of more than 64 elements are shown by shape."""
    return "<" not in repr(drawn[0])


def _assert_same(mask, other, q_len, kv_len):
    sizes = (BATCH, Q_HEADS, q_len, kv_len)
    np.testing.assert_array_equal(reference_mask(mask, *sizes), reference_mask(other, *sizes))
    assert mask.form == other.form


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("full", Full()),
        ("causal", Causal()),
        ("window(1)", SlidingWindow(1)),
        ("window(1, 2)", SlidingWindow(1, 2)),
        ("chunked(2)", Chunked(2)),
        ("block_causal(2)", BlockCausal(2)),
        ("prefix_lm(2)", PrefixLM(2)),
        ("prefix_lm([1, 3])", PrefixLM([1, 3])),
        ("segments(0, 0, 1, -1)", Segments(IDS)),
        ("segments([0, 0, 1, -1], [1, 1, 0, 0])", Segments(IDS, [1, 1, 0, 0])),
        ("segments([[0, 0, 1, 1], [0, 1, 1, 2]])", Segments([[0, 0, 1, 1], [0, 1, 1, 2]])),
        ("spans(0, 0, 1, -1)", BidirectionalSpans(IDS)),
        ("BidirectionalSpans.from_flags([1, 0, 1, 1])", BidirectionalSpans([0, -1, 1, 1])),
        ("lengths(2, 3)", Lengths([2, 3])),
        ("lengths([2, 3], [1, 4])", Lengths([2, 3], [1, 4])),
        ("dense([[1, 0], [1, 1], [0, 1], [0, 0]]) & dense([[true], [false]])", None),
        ("dense([[1, 1, 0, 1]])", Dense([[True, True, False, True]])),
        ("block_selection([[1, 0], [1, 1], [0, 1], [1, 0]], 2)", BlockSelection(KEEP, 2)),
        ("causal & window(3) | ~segments(0, 0, 1, -1)", (Causal() & SlidingWindow(3)) | ~Segments(IDS)),
        ("causal & (window(3) | full)", Causal() & (SlidingWindow(3) | Full())),
        ("causal.at(query_offset=-1, kv_offset=2)", Causal().at(query_offset=-1, kv_offset=2)),
        ("causal.at(query_offset=[1, 2])", Causal().at(query_offset=np.array([1, 2]))),
        ("causal.at(query_positions=[3, 2, 1, 0])", Causal().at(query_positions=np.array([3, 2, 1, 0]))),
        (
            "causal.at(kv_positions=[[3, 2, 1, 0], [0, 1, 2, 3]])",
            Causal().at(kv_positions=[[3, 2, 1, 0], [0, 1, 2, 3]]),
        ),
        ("kernelry.masks.SlidingWindow(left=1) & masks.Causal()", SlidingWindow(1) & Causal()),
    ],
)
def test_expressions_mean_their_masks(text, mask):
    if mask is None:
        with pytest.raises(ValueError, match="do not fit each other"):
            parse_mask(text).materialize(4, 4)
        return
    _assert_same(parse_mask(text), mask, 4, 4)


@given(placed_masks(traced=False, max_len=4, atoms=(*WRITABLE, "predicate")).filter(_small))
@settings(max_examples=200, deadline=None)
def test_repr_of_a_mask_evaluates_to_the_mask(drawn):
    mask, q_len, kv_len = drawn
    _assert_same(eval(repr(mask), dict(NAMES)), mask, q_len, kv_len)


def test_repr_of_a_predicate_shows_its_operands():
    mask = masks.Predicate(near, np.int32(1))
    _assert_same(eval(repr(mask), dict(NAMES)), mask, 3, 3)


@given(placed_masks(traced=False, max_len=4, atoms=WRITABLE).filter(_small))
@settings(max_examples=200, deadline=None)
def test_repr_of_a_mask_is_an_expression(drawn):
    mask, q_len, kv_len = drawn
    _assert_same(parse_mask(repr(mask)), mask, q_len, kv_len)


@given(placed_masks(traced=False, atoms=("full", "causal", "window", "chunked", "block_causal")), st.booleans())
@settings(max_examples=50, deadline=None)
def test_forms_of_masks_without_arrays_are_read_from_reprs(drawn, spaced):
    text = repr(drawn[0])
    assert parse_form(f"  {text}\n" if spaced else text) == drawn[0].form


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("causal & segments", Causal() & Segments(IDS)),
        ("segments_separate", Segments(IDS, IDS)),
        ("segments(1)", Segments(IDS)),
        ("spans | causal", BidirectionalSpans(IDS) | Causal()),
        ("spans_separate", BidirectionalSpans(IDS, IDS)),
        ("(causal | lengths).at(query_offset=4)", (Causal() | Lengths([1])).at(query_offset=4)),
        ("prefix_lm", PrefixLM(1)),
        ("dense", Dense(KEEP)),
        ("block_selection(64)", BlockSelection(KEEP, 64)),
        ("causal.at(query_offset=traced)", Causal().at(query_offset=jnp.int32(1))),
        ("causal.at(kv_positions=traced)", Causal().at(kv_positions=jnp.zeros((4,), jnp.int32))),
    ],
)
def test_forms_need_no_arrays(text, mask):
    assert parse_form(text) == mask.form


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("segments", "write segments(0, 0, 1, 1)"),
        ("segments()", "write segments(0, 0, 1, 1)"),
        ("causal & segments_separate", "write segments([0, 0], [0, 1])"),
        ("segments_separate([0], [1])", "write segments([0, 0], [0, 1])"),
        ("spans", "write spans(-1, 0, 0, -1)"),
        ("spans_separate", "write spans([0, 0], [0, 1])"),
        ("lengths", "write lengths(2)"),
        ("prefix_lm", "write prefix_lm(2)"),
        ("dense", "write dense([[1, 0], [1, 1]])"),
        ("block_selection(2)", "write block_selection([[1, 0], [1, 1]], 2)"),
        ("causal.at(query_offset=traced)", "a picture needs the numbers of query_offset"),
    ],
)
def test_pictures_need_arrays_and_say_how_to_write_them(text, instead):
    with pytest.raises(ArgumentError) as caught:
        parse_mask(text)
    assert instead in str(caught.value)


@pytest.mark.parametrize("read", [parse_form, parse_mask])
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is not an expression"),
        ("causl", "did you mean 'causal'"),
        ("causal &", "not an expression"),
        ("causal\0", "not an expression"),
        ("window('x')", "must be a whole number"),
        ("window(1.5)", "must be a whole number"),
        ("window(true)", "must be an integer"),
        ("window()", "left"),
        ("window(-1)", r"\[0, 2\*\*31\)"),
        ("chunked(0)", r"\[1, 2\*\*31\)"),
        ("__import__('os')", "must be a whole number"),
        ("causal.__class__", "unknown name"),
        ("(lambda: causal)()", "cannot read"),
        ("causal + full", "cannot read"),
        ("causal.at(query_ofset=1)", "did you mean 'query_offset'"),
        ("causal.at(1)", "by name: query_offset"),
        ("causal.at(query_offset=1, query_positions=[1])", "both"),
        ("segments(0, [1])", "either whole numbers or lists"),
        ("segments([[0, 1], [0]])", "differ in length"),
        ("dense([[2]])", "1 for visible and 0 for hidden"),
        ("Predicate(strided)", "kernelry.pictures"),
    ],
)
def test_bad_expressions_say_what_is_wrong(read, text, complaint):
    with pytest.raises(ArgumentError, match=complaint):
        read(text)


@pytest.mark.parametrize("read", [parse_form, parse_mask])
@pytest.mark.parametrize(
    "text",
    [
        "~" * 51 + "causal",
        "~" * 5000 + "causal",
        "~" * 90000 + "causal",
        "causal" + ".at(query_offset=1)" * 60,
        "causal & " * 90000 + "causal",
        "causal + " + "~" * 900 + "causal",
        "(" * 5000 + "causal",
    ],
    ids=lambda text: f"{text[:10]}…{len(text)}",
)
def test_deep_expressions_are_refused(read, text):
    with pytest.raises(ArgumentError, match=r"nested|cannot read") as caught:
        read(text)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["~(causal & " * 24 + "window(3)" + ")" * 24, " & ".join(["causal"] * 200)])
def test_nesting_within_the_limit_has_a_form(text):
    assert parse_form(text) == parse_mask(text).form


def test_plugin_masks_are_known_by_their_names():
    assert parse_mask("strided(3) & causal", {"strided": Chunked}).form == Chunked(3).form


def test_core_names_come_before_those_of_plugins():
    assert parse_mask("causal", {"causal": Full}) == Causal()


def test_ids_must_be_whole_numbers():
    with pytest.raises(ShapeError, match="must be integers"):
        parse_mask("segments([true, false])")
