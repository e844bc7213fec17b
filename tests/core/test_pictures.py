"""Pictures of masks: as text and as images; the pictures of the docstrings are true."""

import inspect
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from mask_strategies import BATCH, KV_HEADS, Q_HEADS, placed_masks

from kernelry import masks, pictures
from kernelry.errors import ArgumentError, ConfigError, ShapeError
from kernelry.masks.parse import parse_mask
from kernelry.pictures.drawn_mask import DrawnMask
from kernelry.testing import reference_mask

FIGURE = re.compile(r"(?:^ *[1.](?: [1.])+ *$\n?)+", re.MULTILINE)
DRAWN = [
    cls
    for cls in vars(masks).values()
    if inspect.isclass(cls) and masks.Mask in cls.__mro__[1:] and FIGURE.search(inspect.getdoc(cls))
]


def _grid(text):
    [found] = FIGURE.findall(text)
    return np.array([line.split() for line in found.strip().splitlines()]) == "1"


def _example(cls):
    """The call that the docstring names, else the class without arguments."""
    named = re.findall(rf"`({cls.__name__}\(.*\))`:$", inspect.getdoc(cls), re.MULTILINE)
    return parse_mask(named[0] if named else cls.__name__)


def test_docstrings_with_pictures_are_found():
    assert {"Causal", "Full", "SlidingWindow", "Segments", "BlockSelection", "PrefixLM"} <= {c.__name__ for c in DRAWN}


@pytest.mark.parametrize("cls", DRAWN, ids=lambda cls: cls.__name__)
def test_picture_of_the_docstring_is_true(cls):
    picture = _grid(inspect.getdoc(cls))
    mask = _example(cls)
    np.testing.assert_array_equal(picture, mask.materialize(*picture.shape)[0, 0])
    np.testing.assert_array_equal(picture, _grid(pictures.text(mask, *picture.shape)))


def test_text_is_form_sizes_grid_and_legend():
    mask = masks.Causal() & masks.SlidingWindow(3) & masks.Segments([0, 0, 0, 1, 1, 1])
    assert pictures.text(mask).splitlines() == [
        "segments & window(3, 0)",
        "6 queries (rows), 6 keys (columns)",
        "",
        "1 . . . . .",
        "1 1 . . . .",
        "1 1 1 . . .",
        ". . . 1 . .",
        ". . . 1 1 .",
        ". . . 1 1 1",
        "",
        "1 visible   . hidden",
    ]


def test_positions_stand_at_the_edges():
    text = pictures.text(masks.Causal().at(query_offset=9), 2, 11)
    assert text.splitlines()[2:8] == [
        "The numbers at the edges are positions.",
        "",
        "                        1",
        "    0 1 2 3 4 5 6 7 8 9 0",
        " 9  1 1 1 1 1 1 1 1 1 1 .",
        "10  1 1 1 1 1 1 1 1 1 1 1",
    ]


def test_positions_that_differ_are_said_to():
    mask = masks.Causal().at(query_offset=1) & masks.SlidingWindow(1)
    assert "different positions" in pictures.text(mask, 4, 4)


def test_rows_and_heads_are_drawn_one_by_one():
    mask = masks.Segments([[0, 0, 1], [0, 1, 1]]) & masks.Dense(np.ones((1, 2, 3, 3), bool))
    text = pictures.text(mask)
    assert [line for line in text.splitlines() if line.startswith("batch")] == [
        f"batch row {row}, head {head}" for row in (0, 1) for head in (0, 1)
    ]


def test_many_rows_are_counted_not_drawn():
    text = pictures.text(masks.Lengths(np.arange(40)), 4, 4)
    assert text.count("batch row ") == 16
    assert "... and 24 more batch rows" in text


def test_large_masks_are_drawn_in_blocks_that_fit():
    lines = pictures.text(masks.Causal(), 128).splitlines()
    assert lines[1] == "128 queries (rows), 128 keys (columns), in blocks of 4 x 4"
    assert lines[3].split() == ["▨"] + ["·"] * 31
    assert lines[34].split() == ["■"] * 31 + ["▨"]
    assert lines[-1] == "■ full   ▨ partial   · empty"


def test_blocks_are_drawn_where_sizes_are_given():
    assert pictures.text(masks.Causal(), 4, block_q=2, block_kv=2).splitlines()[3:5] == ["▨ ·", "■ ▨"]


def test_narrow_terminals_get_blocks():
    assert "in blocks of" in pictures.text(masks.Causal(), 8, columns=4)


def test_arrays_of_masks_too_large_are_not_looked_into():
    mask = masks.Segments(np.zeros(2**14, np.int32))
    text = pictures.text(mask)
    assert "Too large to look into its arrays" in text
    assert "■" not in text.splitlines()[3]
    assert "Too large" not in pictures.text(masks.Causal(), 2**14)


@pytest.mark.parametrize(
    ("mask", "sizes"),
    [
        (masks.Causal(), (8, 8)),
        (masks.Segments([0, 0, 1]), (3, 3)),
        (masks.Segments([0, 0, 1], [0, 1]), (3, 2)),
        (masks.Dense(np.ones((2, 5), bool)), (2, 5)),
        (masks.BlockSelection(np.ones((6, 3), bool), 2), (6, 6)),
        (masks.Causal().at(query_positions=[4, 5], kv_positions=[1, 2, 3]), (2, 3)),
        (masks.Causal().at(query_positions=jnp.arange(5)), (5, 5)),
    ],
)
def test_lengths_default_to_the_arrays(mask, sizes):
    extent = DrawnMask.of(mask).extent
    assert (extent.q_len, extent.kv_len) == sizes


def test_one_length_given_is_both():
    assert DrawnMask.of(masks.Causal(), kv_len=5).extent.q_len == 5


@given(placed_masks())
@settings(max_examples=50, deadline=None)
def test_what_is_seen_is_the_mask(drawn):
    mask, q_len, kv_len = drawn
    wanted = reference_mask(mask, BATCH, Q_HEADS, q_len, kv_len)
    visible = DrawnMask.of(mask, q_len, kv_len).visible()
    if visible.shape[1] == KV_HEADS:  # nothing tells the query heads of a group apart
        visible = np.repeat(visible, Q_HEADS // KV_HEADS, axis=1)
    np.testing.assert_array_equal(np.broadcast_to(visible, wanted.shape), wanted)


@given(placed_masks())
@settings(max_examples=50, deadline=None)
def test_kinds_are_those_of_the_elements(drawn):
    mask, q_len, kv_len = drawn
    found = DrawnMask.of(mask, q_len, kv_len).blocks(2, 3)
    visible = DrawnMask.of(mask, q_len, kv_len).visible()
    assert found.exact
    for row, head, q, kv in np.ndindex(found.kinds.shape):
        block = visible[row, head, 2 * q : 2 * q + 2, 3 * kv : 3 * kv + 3]
        assert found.kinds[row, head, q, kv] == (2 if block.all() else 1 if block.any() else 0)


def test_kinds_of_a_static_mask_are_its_block_map():
    mask = masks.Chunked(6) & masks.SlidingWindow(4)
    np.testing.assert_array_equal(DrawnMask.of(mask, 20, 20).blocks(3, 4).kinds[0, 0], mask.block_map(20, 20, 3, 4))


@pytest.mark.parametrize("draw", [pictures.text, pictures.image])
@pytest.mark.parametrize(
    ("mask", "sizes", "error", "complaint"),
    [
        (masks.Causal(), {"q_len": 2, "kv_len": 4}, ShapeError, "query_offset"),
        (masks.Segments([0, 1]), {"q_len": 3}, ShapeError, "query_ids must be"),
        (masks.Causal(), {"q_len": 0}, ArgumentError, "cannot be drawn"),
        (masks.Causal(), {"q_len": 2**20}, ArgumentError, "cannot be drawn"),
        (masks.Causal(), {"q_len": 4096, "block_q": 1}, ArgumentError, "choose at least 4"),
        (masks.Causal(), {"q_len": 8, "block_kv": 0}, ArgumentError, "choose at least 1"),
        (
            masks.Dense(np.ones((1, 3, 4, 4), bool)) & masks.BlockSelection(np.ones((1, 2, 4, 2), bool), 2),
            {},
            ShapeError,
            "one must divide",
        ),
    ],
)
def test_sizes_that_cannot_be_drawn_are_refused(draw, mask, sizes, error, complaint):
    with pytest.raises(error, match=complaint):
        draw(mask, **sizes)


def test_image_has_axes_title_and_legend():
    figure = pictures.image(masks.Causal().at(query_offset=4), 4, 8)
    [ax] = figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key position", "query position")
    assert figure.get_suptitle().startswith("causal at query=4\n4 queries, 8 keys")
    assert ax.yaxis.get_major_formatter()(0) == "4"
    words = {text.get_text() for text in figure.legends[0].get_texts()}
    assert words == {"full block", "partial block: visible", "partial block: hidden", "empty block"}


def test_image_colours_tokens_by_their_blocks():
    figure = pictures.image(masks.Causal(), 4, block_q=2, block_kv=2)
    colours = np.asarray(figure.axes[0].images[0].get_array())
    kinds = [[2, 1, 0, 0], [2, 2, 0, 0], [3, 3, 2, 1], [3, 3, 2, 2]]
    of_kind = {kind: tuple(colours[place]) for kind, place in ((0, (0, 2)), (1, (0, 1)), (2, (0, 0)), (3, (2, 0)))}
    assert len(set(of_kind.values())) == 4
    np.testing.assert_array_equal(colours, [[of_kind[kind] for kind in row] for row in kinds])


def test_image_of_many_tokens_shows_blocks_alone():
    figure = pictures.image(masks.Causal(), 4096)
    assert figure.axes[0].images[0].get_array().shape[:2] == (16, 16)


def test_image_of_rows_has_a_panel_each():
    figure = pictures.image(masks.Lengths([1, 2, 3]), 4, 4)
    assert [ax.get_title() for ax in figure.axes] == ["batch row 0", "batch row 1", "batch row 2"]


def test_image_of_too_many_rows_is_refused():
    with pytest.raises(ArgumentError, match="an image holds 16"):
        pictures.image(masks.Lengths(np.arange(17)), 4, 4)


def test_image_without_matplotlib_names_the_extra(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'kernelry[plot]'")):
        pictures.image(masks.Causal())


def test_importing_pictures_imports_no_matplotlib_and_drawing_no_pyplot():
    code = (
        "import sys, kernelry, kernelry.pictures as p\n"
        "assert not any(name.startswith('matplotlib') for name in sys.modules)\n"
        "p.image(kernelry.masks.Causal())\n"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
