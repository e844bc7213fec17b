"""What splash and pallas_mha serve through adapters, in interpret mode, against dense attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import sweep_but

import kernelry
from kernelry import masks, testing

FORWARD, GRADIENT = 5e-6, 2e-5
KERNELS = ("splash", "pallas_mha")
LENGTH = {"splash": 128, "pallas_mha": 32}
UNEVEN = {"splash": 200, "pallas_mha": 40}


def packed(length, rows=1):
    """Ids of three segments, with padding inside and at the end."""
    ids = np.repeat([0, 3, 7], -(-length // 3))[:length]
    ids[length // 2 : length // 2 + 5] = -1
    ids[-length // 8 :] = -1
    return np.stack([np.roll(ids, -row) for row in range(rows)])


IDS = packed(128)


def adapters_of(plan):
    return {step.adapter.name for step in plan.steps}


PLANS = [
    (KERNELS, {"mask": masks.Causal(), "sinks": True}, {"sinks_from_lse"}),
    (KERNELS, {"mask": masks.Causal() & masks.Segments(IDS)}, {"empty_rows_from_lse", "clean_hidden_slots"}),
    (
        KERNELS,
        {"mask": masks.Segments(IDS), "sinks": True},
        {"empty_rows_from_lse", "clean_hidden_slots", "sinks_from_lse"},
    ),
    (
        ["splash"],
        {"mask": masks.Causal().at(query_offset=-60), "sinks": True},
        {"empty_rows_from_lse", "clean_hidden_slots", "sinks_from_lse"},
    ),
    (KERNELS, {"mask": masks.Causal(), "q_len": 203}, {"pad_sequence"}),
    (KERNELS, {"mask": masks.Causal(), "head_dim": 80}, set()),
    (["splash"], {"mask": masks.Causal(), "kv_heads": 1, "value_dim": 24}, set()),
    (["pallas_mha"], {"mask": masks.Causal(), "kv_heads": 1, "value_dim": 24}, {"repeat_kv_heads", "pad_head_dim"}),
    (["pallas_mha"], {"mask": masks.Causal(), "head_dim": 5}, {"pad_head_dim"}),
]


def test_no_more_adapters_are_used_than_a_request_needs():
    usual = {"q_len": 128, "q_heads": 2, "kv_heads": 2, "head_dim": 16, "target": "cpu", "interpret": True}
    wrong = []
    for kernels, facts, wanted in PLANS:
        for kernel in kernels:
            found = adapters_of(kernelry.resolve(kernelry.Request(**{**usual, **facts}), kernel=kernel).plan)
            if found != wanted:
                wrong.append((kernel, facts, found))
    assert not wrong


@pytest.fixture
def check(make_arrays, check_against_dense):
    def run(kernel, *, arrays=None, sinks=None, **options):
        shape = arrays or {"q_len": LENGTH[kernel], "heads": 2, "kv_heads": 2, "head_dim": 16}
        made = make_arrays(**shape)
        sinks = None if sinks is None else jnp.asarray(sinks, jnp.float32)
        return adapters_of(
            check_against_dense(kernel, made, sinks=sinks, forward=FORWARD, gradient=GRADIENT, **options)
        )

    return run


@pytest.mark.sweep
@pytest.mark.parametrize("kernel", KERNELS)
def test_sinks(kernel, check):
    assert check(kernel, sinks=[0.5, -1.0], mask=masks.Causal()) == {"sinks_from_lse"}


@pytest.mark.sweep
@pytest.mark.parametrize("kernel", KERNELS)
def test_negative_ids_and_the_rows_they_leave_empty(kernel, check):
    mask = masks.Causal() & masks.Segments(packed(LENGTH[kernel]))
    assert check(kernel, mask=mask) == {"empty_rows_from_lse", "clean_hidden_slots"}


@pytest.mark.sweep
@pytest.mark.parametrize("kernel", KERNELS)
def test_negative_ids_without_a_causal_mask_and_with_sinks(kernel, check):
    mask = masks.Segments(packed(LENGTH[kernel]))
    assert "sinks_from_lse" in check(kernel, mask=mask, sinks=[0.5, -1.0])


@pytest.mark.sweep
def test_whole_blocks_of_empty_rows_in_splash(check):
    ids = np.where(np.arange(256) < 128, -1, 0)
    check("splash", arrays={"q_len": 256, "heads": 2, "kv_heads": 2, "head_dim": 16}, mask=masks.Segments(ids))


@pytest.mark.sweep
def test_a_band_that_leaves_rows_empty_in_splash(check):
    mask = masks.Causal().at(query_offset=-60)
    assert "empty_rows_from_lse" in check("splash", mask=mask, sinks=[0.5, -1.0])


def test_lengths_become_segments_in_splash(check):
    mask = masks.Causal() & masks.Lengths(np.array([100]), np.array([90]))
    assert "lengths_as_segments" in check("splash", mask=mask)


@pytest.mark.parametrize(
    ("kernel", "mask"),
    sweep_but(
        [(kernel, mask) for kernel in KERNELS for mask in (masks.Causal(), masks.Full())], ("splash", masks.Full())
    ),
    ids=str,
)
def test_any_length(kernel, mask, check):
    shape = {"q_len": UNEVEN[kernel] + 3, "heads": 2, "kv_heads": 2, "head_dim": 16}
    assert "pad_sequence" in check(kernel, arrays=shape, mask=mask)


@pytest.mark.sweep
@pytest.mark.parametrize("kernel", KERNELS)
def test_length_200_is_padded(kernel, check):
    shape = {"q_len": 200, "heads": 1, "kv_heads": 1, "head_dim": 16}
    assert check(kernel, arrays=shape, mask=masks.Causal()) == {"pad_sequence"}


@pytest.mark.sweep
@pytest.mark.parametrize("kernel", KERNELS)
def test_head_dim_80(kernel, check):
    check(kernel, arrays={"q_len": LENGTH[kernel], "heads": 2, "kv_heads": 2, "head_dim": 80}, mask=masks.Causal())


@pytest.mark.sweep
def test_head_dim_5_is_padded_to_what_triton_takes(check):
    shape = {"q_len": 32, "heads": 2, "kv_heads": 2, "head_dim": 5}
    assert check("pallas_mha", arrays=shape, mask=masks.Causal()) == {"pad_head_dim"}


@pytest.mark.parametrize("kernel", sweep_but(KERNELS, "pallas_mha"))
def test_grouped_heads_with_a_value_dim_of_their_own(kernel, check):
    shape = {"q_len": LENGTH[kernel], "heads": 4, "kv_heads": 2, "head_dim": 16, "value_dim": 24}
    found = check(kernel, arrays=shape, mask=masks.Causal())
    assert found == (set() if kernel == "splash" else {"repeat_kv_heads", "pad_head_dim"})


@pytest.mark.parametrize("kernel", KERNELS)
def test_everything_together(kernel, check):
    length = UNEVEN[kernel]
    shape = {"q_len": length, "heads": 4, "kv_heads": 2, "head_dim": 80, "batch": 2}
    mask = masks.Causal() & masks.Segments(packed(length, rows=2))
    found = check(kernel, arrays=shape, mask=mask, sinks=[0.5, -1.0, 0.0, 2.0], scale=0.2)
    assert {"pad_sequence", "sinks_from_lse", "empty_rows_from_lse", "clean_hidden_slots"} <= found


@pytest.mark.parametrize("kernel", sweep_but(KERNELS, "pallas_mha"))
def test_nan_in_slots_that_nobody_sees_stays_there(kernel, make_arrays, check_against_dense):
    length = LENGTH[kernel]
    ids = packed(length)
    query, key, value, d_out = make_arrays(length, heads=2, kv_heads=2, head_dim=16)
    dead = (ids[0] < 0)[None, :, None, None]
    poisoned = (*(jnp.where(dead, jnp.nan, array) for array in (query, key, value)), d_out)
    mask = masks.Causal() & masks.Segments(ids)
    check_against_dense(kernel, poisoned, mask=mask, forward=FORWARD, gradient=GRADIENT)


@pytest.mark.parametrize("kernel", sweep_but(KERNELS, "pallas_mha"))
def test_two_parts_merge_with_gradients_through_their_lse(kernel, make_arrays):
    half = LENGTH[kernel]
    query, key, value, d_out = make_arrays(half, 2 * half, heads=2, kv_heads=2, head_dim=16)

    def merged(query, key, value):
        near = masks.Causal()
        parts = [
            kernelry.attention(
                query, key[:, :half], value[:, :half], mask=masks.Full(), kernel=kernel, return_partial=True
            ),
            kernelry.attention(query, key[:, half:], value[:, half:], mask=near, kernel=kernel, return_partial=True),
        ]
        return kernelry.finalize(kernelry.merge(parts))

    @jax.jit
    def run(query, key, value):
        out, pull = jax.vjp(merged, query, key, value)
        return out, pull(d_out)

    with testing.interpret(), kernelry.record() as resolutions:
        out, gradients = run(query, key, value)
    assert all("lse_gradient_column" in adapters_of(resolution.plan) for resolution in resolutions)
    whole = masks.Causal().at(query_offset=half)
    expected = testing.reference_attention(query, key, value, mask=whole).out
    expected_gradients = testing.reference_gradients(query, key, value, mask=whole, d_out=d_out)
    np.testing.assert_allclose(np.asarray(out), expected, rtol=0, atol=FORWARD)
    for name, found in zip(("query", "key", "value"), gradients, strict=True):
        right = getattr(expected_gradients, name)
        np.testing.assert_allclose(np.asarray(found), right, rtol=0, atol=GRADIENT, err_msg=name)


def test_unequal_lengths_that_are_no_multiples_in_pallas_mha(check):
    shape = {"q_len": 21, "kv_len": 37, "heads": 2, "kv_heads": 2, "head_dim": 16}
    assert "pad_sequence" in check("pallas_mha", arrays=shape, mask=masks.Full())
