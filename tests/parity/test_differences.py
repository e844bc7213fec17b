"""Where kernelry answers otherwise than MaxText on purpose: our answer, theirs, and the reason.

Fully masked rows: the mask value of MaxText is finite, so a row that sees nothing weighs all S keys
by 1 / S and gives mean(value); here it is 0, the identity of merge, and takes part in no gradient.

Window of a decode step: MaxText lets the query stand at the last slot of each cache, so that it sees
the last slots of both, whether or not those are near it; here a window is about positions.
"""

import functools

import jax
import numpy as np
import pytest

import kernelry
from kernelry import masks

fully_masked = pytest.mark.cases(lambda entry: entry["name"] == "train_fully_masked_rows")
decode_window = pytest.mark.cases(lambda entry: entry["name"] == "ar_local_w8")

_OUTPUT = {"rtol": 0, "atol": 2e-5}
_GRADIENT = {"rtol": 0, "atol": 5e-5}


def _seeing(case):
    """Which rows see a key, [B, T]."""
    seeing = case.arrays["mask"].any(axis=-1)
    assert seeing.any()
    assert not seeing.all()
    return seeing


@fully_masked
def test_fully_masked_rows_are_zero_where_maxtext_gives_the_mean_of_all_values(case, answer):
    masked = ~_seeing(case)
    np.testing.assert_array_equal(answer.out[masked], 0)
    mean = np.repeat(case.arrays["v"].mean(axis=1), 2, axis=1)  # [B, N, D]: two query heads read each value head
    theirs = np.broadcast_to(mean[:, None], case.arrays["out"].shape)[masked]
    np.testing.assert_allclose(case.arrays["out"][masked], theirs, **_OUTPUT)
    assert np.abs(theirs).max() > 0.1


@fully_masked
def test_fully_masked_rows_leave_all_other_rows_as_in_maxtext(case, answer):
    seeing = _seeing(case)
    np.testing.assert_allclose(answer.out[seeing], case.arrays["out"][seeing], **_OUTPUT)


@fully_masked
def test_fully_masked_rows_have_lse_minus_infinity_where_maxtext_counts_every_key(case, answer):
    seeing = np.broadcast_to(_seeing(case)[:, None], answer.partials[""].lse.shape)
    np.testing.assert_array_equal(answer.partials[""].lse[~seeing], -np.inf)
    np.testing.assert_allclose(answer.partials[""].lse[seeing], case.lse()[seeing], **_OUTPUT)
    np.testing.assert_array_equal(case.arrays["out_sum"][~_seeing(case)], case.params["S"])


@fully_masked
def test_fully_masked_rows_have_no_query_gradient(case, answer):
    np.testing.assert_array_equal(answer.gradients["dq"][~_seeing(case)], 0)
    np.testing.assert_allclose(answer.gradients["dq"], case.arrays["dq"], **_GRADIENT)


@fully_masked
def test_fully_masked_rows_leave_the_key_gradient_as_in_maxtext(case, answer):
    np.testing.assert_allclose(answer.gradients["dk"], case.arrays["dk"], **_GRADIENT)


@fully_masked
def test_fully_masked_rows_add_their_uniform_weights_to_the_value_gradient_of_maxtext_alone(case, answer):
    batch, kv_len, kv_heads, value_dim = case.arrays["dv"].shape
    unseen = np.where(_seeing(case)[..., None, None], 0, case.cotangent.astype(np.float64))
    spread = unseen.sum(axis=1).reshape(batch, 1, kv_heads, -1, value_dim).sum(axis=3) / kv_len  # 1 / S for every key
    np.testing.assert_allclose(answer.gradients["dv"], case.arrays["dv"] - spread, **_GRADIENT)
    visible = case.arrays["mask"].any(axis=1)
    added = np.abs(case.arrays["dv"] - answer.gradients["dv"])[visible].max()
    np.testing.assert_allclose(added, 0.03, atol=0.002)  # visible keys get it, too: far above the tolerance


def _in_use(case):
    return np.concatenate([case.arrays["segment_ids_prefill"], case.arrays["segment_ids_ar"]], axis=1) == 1


def _in_float64(case, visible):
    """Attention of the one query of each row over the keys of both caches that it sees, [B, 1, N, D]."""
    query = case.arrays["q"].astype(np.float64)
    key, value = (
        np.repeat(np.concatenate([case.arrays[f"{name}_prefill"], case.arrays[f"{name}_ar"]], axis=1), 2, axis=2)
        for name in "kv"
    )
    logits = np.einsum("btnh,bsnh->bnts", query, key)
    weights = np.where(visible[:, None, None], np.exp(logits - logits.max(axis=-1, keepdims=True)), 0)
    return np.einsum("bnts,bsnd->btnd", weights / weights.sum(axis=-1, keepdims=True), value)


def _near_the_query(case):
    """Slots of both caches whose position is the query's or one of the seven before, [B, P + A]."""
    newest = case.params["P"] + case.arrays["lengths"] - 1  # the query's own key is the newest in the second cache
    positions = np.arange(case.params["P"] + case.params["A"])
    behind = newest[:, None] - positions
    return _in_use(case) & (behind >= 0) & (behind < case.params["sliding_window_size"])


@decode_window
def test_decode_window_lies_around_the_position_of_the_query(case, answer):
    np.testing.assert_allclose(answer.out, _in_float64(case, _near_the_query(case)), **_OUTPUT)


@decode_window
def test_decode_window_of_a_full_cache_shows_as_many_keys_as_its_size(case, structure):
    shown = [structure(case, case.arrays, part).materialize(1, case.arrays[f"k{part}"].shape[1]) for part in case.parts]
    counts = np.concatenate(shown, axis=-1).sum(axis=-1).reshape(-1)
    np.testing.assert_array_equal(counts, case.params["sliding_window_size"])
    theirs = case.arrays["mask_prefill"].sum(axis=-1) + case.arrays["mask_ar"].sum(axis=-1)
    np.testing.assert_array_equal(theirs.reshape(-1), [16, 12])  # eight slots twice; four of the second row are unused


@decode_window
def test_decode_window_gives_another_output_than_the_end_of_each_cache(case, answer):
    assert np.abs(answer.out - case.arrays["out"]).max() > 1


def _at_the_end_of_each_cache(case, part):
    slots = case.arrays[f"k{part}"].shape[1]
    used = masks.Segments(np.ones((case.params["B"], 1), np.int32), case.arrays[f"segment_ids{part}"])
    return used & masks.SlidingWindow(case.params["sliding_window_size"] - 1).at(query_offset=slots - 1)


@decode_window
def test_decode_window_of_maxtext_is_ours_with_the_query_at_the_last_slot_of_each_cache(case, attend):
    masks_of = {part: _at_the_end_of_each_cache(case, part) for part in case.parts}
    for part, mask in masks_of.items():
        slots = case.arrays[f"k{part}"].shape[1]
        np.testing.assert_array_equal(mask.materialize(1, slots)[:, 0], case.arrays[f"mask{part}"].astype(bool))

    @jax.jit
    def merged(arrays):
        part_of = functools.partial(attend, case, arrays, return_partial=True)
        return kernelry.finalize(kernelry.merge([part_of(part, mask) for part, mask in masks_of.items()]))

    np.testing.assert_allclose(merged(case.arrays), case.arrays["out"], **_OUTPUT)
