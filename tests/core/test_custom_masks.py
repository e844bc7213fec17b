"""What core does with a mask of a third party: its atom, what it is asked, and the answers where it gives none."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import masks, pictures
from kernelry.errors import ArgumentError
from kernelry.masks import AtomKind
from kernelry.plugin import BlockGrid, Capabilities, Mask, decided_at_run_time, pytree
from kernelry.testing import reference_attention

TABLE = np.arange(8) % 3
SHIFT = jnp.asarray(2)


@pytree()
@dataclasses.dataclass(frozen=True)
class Recent(Mask):
    """A mask without arrays that says what it shows."""

    reach: int

    word = "test.recent"
    positional = True

    def evaluate(self, query, kv):
        return (kv.positions <= query.positions) & (query.positions - kv.positions <= self.reach)

    @classmethod
    def band_around(cls, atom):
        return atom.params[1], 0


@pytree("weights")
@dataclasses.dataclass(frozen=True, eq=False)
class Heavy(Mask):
    """A mask with an array and a plain field."""

    weights: np.ndarray
    least: int = 1

    word = "test.heavy"
    axes: ClassVar[dict[str, str]] = {"weights": "BS"}

    def evaluate(self, query, kv):
        return kv.take(self.weights) >= self.least


@pytree()
@dataclasses.dataclass(frozen=True)
class ByTable(Mask):
    """A mask whose code holds an array."""

    def evaluate(self, query, kv):
        return jnp.asarray(TABLE)[kv.slots % 8] == 0


@pytree()
@dataclasses.dataclass(frozen=True)
class ByNumber(Mask):
    """A mask whose code holds an array of one number."""

    def evaluate(self, query, kv):
        return kv.slots - query.slots <= SHIFT


@pytree()
@dataclasses.dataclass(frozen=True)
class ByHead(Mask):
    """A mask that differs by head, so that no tile of queries and keys says all of it."""

    def evaluate(self, query, kv):
        return query.slots % jnp.arange(1, 1 + (query.q_heads or 1)).reshape(1, -1, 1, 1) >= 0 * kv.slots


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (Recent(3), "custom(test.recent, 3)"),
        (Heavy(np.ones(4, int)), "custom(test.heavy, 1, operands)"),
        (ByTable(), "custom(ByTable, operands)"),
        (ByNumber(), "custom(ByNumber, operands)"),
        (ByHead(), "custom(ByHead, operands)"),
    ],
    ids=lambda value: str(value)[:8],
)
def test_atom_is_the_word_with_the_plain_fields_and_says_whether_it_needs_arrays(mask, text):
    assert str(mask.form) == text
    assert mask.form.atoms[0].is_static == ("operands" not in text)


def test_a_kernel_that_takes_predicates_takes_custom_masks_without_arrays():
    predicates, custom = (Capabilities(atoms=frozenset({kind})) for kind in (AtomKind.PREDICATE, AtomKind.CUSTOM))
    [recent], [heavy] = Recent(3).form.atoms, Heavy(np.ones(4, int)).form.atoms
    assert predicates.takes(recent)
    assert custom.takes(recent)
    assert custom.takes(heavy)
    assert not predicates.takes(heavy)


def test_the_band_around_a_custom_mask_narrows_bands_and_implies_them():
    assert str((masks.SlidingWindow(9, 2) & Recent(3)).form) == "custom(test.recent, 3)"
    assert str((masks.SlidingWindow(1, 2) & Recent(3)).form) == "custom(test.recent, 3) & window(1, 0)"


def test_the_band_around_a_custom_mask_hides_the_keys_put_behind():
    class_, at = Recent(3).atom.mask_class, Recent(3).at(query_offset=4)
    assert class_.hides_keys_behind(Recent(3).form.atoms[0], 8, 8)
    assert not class_.hides_keys_behind(at.form.atoms[0], 8, 8), "queries stand behind the keys"
    traced = Recent(3).at(query_offset=jnp.int32(0))
    assert not class_.hides_keys_behind(traced.form.atoms[0], 8, 8)


def test_a_mask_with_arrays_has_no_hash():
    assert hash(Recent(3)) == hash(Recent(3))
    with pytest.raises(TypeError, match="unhashable"):
        hash(Heavy(np.ones((1, 8))))


def test_a_word_that_two_classes_claim_answers_for_neither():
    [first] = pytree()(type("First", (Recent,), {"word": "test.claimed"}))(3).form.atoms
    assert first.mask_class.band_around(first) == (3, 0)
    type("Second", (Recent,), {"word": "test.claimed"})
    assert first.mask_class.band_around(first) == (None, None)


@pytest.mark.parametrize("mask", [Recent(3), Heavy(np.array([1, 0, 2, 0, 1, 1]), 2)], ids=["recent", "heavy"])
def test_custom_masks_are_not_decided_at_run_time_and_serve_all_the_same(mask):
    decided = decided_at_run_time(mask, BlockGrid(q_len=6, kv_len=6, block_q=2, block_kv=2))
    assert decided.some.all()
    assert not decided.full.any()
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 6, 2, 8), np.float32) for _ in range(3))
    out = kernelry.attention(query, key, value, mask=mask, kernel="blockwise")
    np.testing.assert_allclose(out, reference_attention(query, key, value, mask=mask).out, atol=1e-5)


def test_sizes_of_a_custom_mask_follow_from_its_axes():
    assert Heavy(np.ones((2, 7), int)).sizes() == {"B": 2, "S": 7}
    assert pictures.text(Heavy(np.array([1, 0, 1]))).splitlines()[1] == "3 queries (rows), 3 keys (columns)"


def test_a_mask_that_is_not_a_pytree_says_how_it_becomes_one():
    @dataclasses.dataclass(frozen=True)
    class Even(Mask):
        positional: ClassVar[bool] = True

        def evaluate(self, query, kv):
            return (query.positions - kv.positions) % 2 == 0

    with pytest.raises(ArgumentError, match=r"Even is not a pytree: decorate the class Even with @kernelry.plugin"):
        _ = Even().form
