"""tokamax_splash in interpret mode against dense attention; what it is told of masks; and what it refuses.

Interpret mode proves numbers, lowering proves that the program holds the kernel: nothing here runs on a TPU.
"""

import dataclasses
import functools

import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from pairs import covering, sweep_but

import kernelry
from kernelry import masks, testing
from kernelry.errors import ConfigError
from kernelry.kernel.spec import Environment, Inputs
from kernelry.plugin import Tiling
from kernelry.request.request import Request
from kernelry_tpu_splash.plugin import TOKAMAX_SPLASH

pytest.importorskip("tokamax")

from kernelry_tpu_splash.tokamax_splash import kernel as body
from kernelry_tpu_splash.tokamax_splash.mask_info import of_booleans, of_columns, of_rows

NAMES = ("block_q", "block_q_dkv", "block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute")
# Without it, one block would hold the whole test and no block would be skipped or joined.
SMALL = dict.fromkeys(NAMES, 128)
BALANCED = np.concatenate([np.arange(64), np.arange(192, 256), np.arange(64, 192)])
IDS = np.repeat([4, -1, 0, 2], 64)


def every_third(query_positions, kv_positions):
    return (query_positions - kv_positions) % 3 == 0


def seen(*shape, q_len=256):
    return masks.Dense(np.random.default_rng(3).random((*shape, q_len, 256)) < 0.5)


MASKS = {
    "full": masks.Full(),
    "window": masks.SlidingWindow(40, 30),
    "chunked": masks.Chunked(96),
    "predicate": masks.Causal() & masks.Predicate(every_third),
    "load_balanced": masks.Causal().at(query_positions=BALANCED, kv_positions=BALANCED),
    "packed": masks.Causal() & masks.Segments(IDS),
    "traced_offset": masks.Causal().at(query_offset=jnp.asarray(17)),
    "rows_that_see_nothing": masks.Causal().at(query_offset=-130),
    "dense": seen(1, 1),
    "dense_of_each_row": masks.Causal() & seen(2, 1),
    "dense_of_each_head": masks.Segments(IDS) & seen(1, 4),
}


SELECTED = covering(
    mask=["dense_of_each_head", "packed", "window", "causal"],
    extras=[{}, {"soft_cap": 2.0, "scale": 0.3}, {"sinks": [0.5, 2.0]}],
    q_len=[128, 256],
    tiling=[{}, {"q_layout": 2, "k_layout": 2, "v_layout": 2}],
    dims=[(32, 48), (80, 24)],
    dtype=["float32", "bfloat16"],
)


@pytest.mark.parametrize("case", SELECTED, ids=lambda case: f"{case['mask']}-{case['dtype']}")
def test_selected_cases_agree_with_dense(case, make_arrays, check_against_dense):
    (head_dim, value_dim), extras = case["dims"], dict(case["extras"])
    arrays = make_arrays(case["q_len"], 256, dtype=case["dtype"], head_dim=head_dim, value_dim=value_dim)
    sinks = jnp.asarray(extras.pop("sinks")) if "sinks" in extras else None
    close = {"forward": 1e-2, "gradient": 4e-2} if case["dtype"] == "bfloat16" else {}
    mask = _selected_mask(case["mask"], case["q_len"])
    tiling = {**SMALL, **case["tiling"]}
    check_against_dense("tokamax_splash", arrays, mask=mask, sinks=sinks, tiling=tiling, **extras, **close)


def _selected_mask(name, q_len):
    """A mask for the first queries; causal ones stand at offset 70."""
    ids = masks.Segments(IDS[:q_len], IDS)
    return {
        "packed": masks.Causal().at(query_offset=70) & ids,
        "window": masks.SlidingWindow(40, 30).at(query_offset=0),
        "causal": masks.Causal().at(query_offset=256 - q_len),
        "dense_of_each_head": ids & seen(1, 2, q_len=q_len),
    }[name]


@pytest.mark.parametrize("name", sweep_but(MASKS, "full", "traced_offset", "dense_of_each_row"))
def test_masks_agree_with_dense(name, make_arrays, check_against_dense):
    batch, heads = (2, 4) if name.startswith("dense_of") else (1, 2)
    arrays = make_arrays(heads=heads, kv_heads=heads // 2, batch=batch)
    check_against_dense("tokamax_splash", arrays, mask=MASKS[name], tiling=SMALL)


@pytest.mark.parametrize(
    ("name", "through"),
    [
        ("window", []),
        ("packed", ["empty_rows_from_lse", "sinks_from_lse"]),
        ("dense", ["empty_rows_from_lse", "sinks_from_lse"]),
    ],
)
def test_sinks_are_the_kernels_own_where_every_row_sees_a_key(name, through):
    request = Request(target="cpu", interpret=True, q_len=256, q_heads=2, kv_heads=1, mask=MASKS[name], sinks=True)
    plan = kernelry.resolve(request, kernel="tokamax_splash").plan
    assert sorted({step.adapter.name for step in plan.steps} - {"clean_hidden_slots"}) == through


def test_maximum_logits_know_nothing_of_sinks(make_arrays):
    query, key, value, d_out = make_arrays()
    options = {"mask": masks.Causal(), "sinks": jnp.asarray([50.0, 50.0])}

    @jax.jit
    def run(query):
        def attend(query):
            return kernelry.attention(query, key, value, kernel="tokamax_splash", return_max_logits=True, **options)

        found, pull, top = jax.vjp(attend, query, has_aux=True)
        return found, pull(d_out)[0], top

    with testing.interpret(), kernelry.use(tiling=SMALL):
        found, gradient, top = run(query)
    wanted = testing.reference_attention(query, key, value, **options)
    np.testing.assert_allclose(top, wanted.max_logits, rtol=2e-6)
    np.testing.assert_allclose(found, wanted.out, rtol=2e-6, atol=2e-6)
    wanted_gradient = testing.reference_gradients(query, key, value, d_out=d_out, **options).query
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=2e-5, atol=2e-5)


def test_maximum_logits_of_nothing_are_minus_infinity(make_arrays):
    options = {"mask": masks.Causal().at(query_offset=-500), "return_max_logits": True}
    with testing.interpret():
        _, top = jax.jit(lambda *arrays: kernelry.attention(*arrays, kernel="tokamax_splash", **options))(
            *make_arrays(128)[:3]
        )
    assert np.isneginf(top).all()


def test_a_partial_holds_a_natural_lse(make_arrays):
    arrays, mask = make_arrays()[:3], MASKS["packed"]
    options = {"mask": mask, "mode": "prefill", "return_partial": True, "kernel": "tokamax_splash"}
    with testing.interpret(), kernelry.use(tiling=SMALL):
        found = jax.jit(lambda *arrays: kernelry.attention(*arrays, **options))(*arrays)
    wanted = testing.reference_attention(*arrays, mask=mask)
    np.testing.assert_allclose(found.lse, wanted.lse, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(found.out, wanted.out, rtol=2e-6, atol=2e-6)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["window", "dense"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_three_parts_of_dq_are_added_to_in_place(name, kv_heads, make_arrays, monkeypatch):
    """Interpret mode proper does not see what aliased inputs were written; the interpreter of TPUs does."""
    query, key, value, d_out = make_arrays(512, kv_heads=kv_heads)
    visible = np.random.default_rng(0).random((512, 512)) < 0.5
    mask = masks.SlidingWindow(40, 300) if name == "window" else masks.Dense(visible)
    request = Request(q_len=512, q_heads=2, kv_heads=kv_heads, head_dim=32, mask=mask)
    inputs = Inputs(query, key, value, mask.canonical())
    tiling = Tiling.of(**SMALL, q_layout=1, k_layout=1, v_layout=1, dq_reduction_steps=3)
    made = body._KernelSettings.config

    def with_interpreter(facts, lengths):
        return dataclasses.replace(made(facts, lengths), interpret=pltpu.InterpretParams())

    monkeypatch.setattr(body._KernelSettings, "config", with_interpreter)
    body._built.cache_clear()
    wanted = kernelry.attention(query, key, value, mask=mask, kernel="dot_product", return_partial=True, gradients=())
    found = TOKAMAX_SPLASH.body().backward(inputs, request, tiling, wanted.out, wanted.lse, d_out, None)
    body._built.cache_clear()
    _, pull = jax.vjp(lambda *arrays: kernelry.attention(*arrays, mask=mask, kernel="dot_product"), query, key, value)
    for share, right in zip((found.query, found.key, found.value), pull(d_out), strict=True):
        np.testing.assert_allclose(share, right, rtol=2e-5, atol=2e-5)


KINDS = hypothesis.extra.numpy.arrays(
    np.int8, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.integers(0, 2)
)


@given(kinds=KINDS)
def test_rows_visit_every_block_that_holds_anything_and_each_row_once_at_least(kinds):
    info = of_rows(kinds.copy(), 128 * kinds.shape[0])
    visited = {(int(row), int(column)): int(kind) for row, column, kind in zip(*info[1:4], strict=True)}
    assert set(visited) >= {tuple(place) for place in np.argwhere(kinds > 0).tolist()}
    assert {row for row, _ in visited} == set(range(kinds.shape[0]))
    assert all(visited[place] == max(1, kinds[place]) for place in visited)
    assert info.num_active_blocks == [len(visited)]


@given(kinds=KINDS)
def test_columns_walk_as_rows_do_and_compute_nothing_in_empty_blocks(kinds):
    info = of_columns(kinds.copy(), 128 * kinds.shape[0], walks=True)
    visited = {(int(row), int(column)): int(kind) for row, column, kind in zip(*info[1:4], strict=True)}
    assert {row for row, _ in visited} == set(range(kinds.shape[1]))
    assert all(visited[place] == kinds.T[place] for place in visited)
    everything = of_columns(kinds.copy(), 128 * kinds.shape[0], walks=False)
    np.testing.assert_array_equal(everything.block_mask, kinds.T.reshape(-1))


@functools.partial(jax.jit, static_argnames="of_keys")
def _of_booleans(visible, *, of_keys):
    info = of_booleans(visible, 2, 4, of_keys=of_keys, walks=True)
    return info[1:4], info.mask_next, info.partial_mask_blocks


@settings(deadline=None)  # the first example compiles
@given(visible=hypothesis.extra.numpy.arrays(bool, (6, 8)))
def test_blocks_of_booleans_are_those_of_the_mask(visible):
    for of_keys, whole in ((False, visible), (True, visible.T)):
        places, mask_next, partial = map(_as_numpy, _of_booleans(visible, of_keys=of_keys))
        height, width = (4, 2) if of_keys else (2, 4)
        for row, column, kind, fetched in zip(*places, mask_next, strict=True):
            block = whole[row * height : (row + 1) * height, column * width : (column + 1) * width]
            assert kind == (2 if block.all() else 1 if block.any() or not of_keys else 0)
            if kind == 1:
                np.testing.assert_array_equal(partial[fetched], block)


def _as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def test_without_tokamax_it_is_refused_with_what_to_install():
    absent = Environment(versions=(("tokamax", None),))
    request = Request(q_len=256, target="tpu:v5e")
    refusals = TOKAMAX_SPLASH.refusals(request, absent)
    assert [(refusal.detail, refusal.remedy) for refusal in refusals] == [
        ("tokamax is not installed", "pip install 'kernelry-tpu-splash[tokamax]'")
    ]


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"q_len": 200}, "q_len=200 is not a multiple of 128"),
        ({"dtype": "float16"}, "dtype=float16 is not bfloat16 or float32"),
        ({"sinks": True, "max_logits": True}, "max_logits would contain the sinks"),
        ({"sinks": True, "mask": masks.Segments(IDS)}, "may leave rows that see no key, and sinks hide them"),
        ({"mask": masks.Causal().at(kv_offset=jnp.asarray(1))}, "traced positions of keys"),
    ],
)
def test_refusals_have_values(facts, words):
    request = Request(**{"q_len": 256, "target": "tpu:v5e", **facts})
    refusals = (*TOKAMAX_SPLASH.capabilities.refusals(request), *TOKAMAX_SPLASH.refusals(request, Environment()))
    assert any(words in refusal.detail for refusal in refusals)


def test_an_unknown_number_of_steps_is_an_error(make_arrays):
    with (
        testing.interpret(),
        kernelry.use(tiling={"dq_reduction_steps": 2}),
        pytest.raises(ConfigError, match="dq_reduction_steps=2 of tokamax_splash is not 1 or 3"),
    ):
        kernelry.attention(*make_arrays(128)[:3], kernel="tokamax_splash")


def test_lowered_for_tpu_holds_the_kernel(make_arrays, lower):
    def loss(query, key, value):
        out = kernelry.attention(query, key, value, mask=masks.Causal(), kernel="tokamax_splash")
        return out.astype(jnp.float32).sum()

    arrays = make_arrays(dtype="bfloat16", head_dim=128)[:3]
    resolutions, lowered = lower(jax.grad(loss, (0, 1, 2)), arrays, "tpu:v5e")
    resolutions[0].verify(lowered)
    assert lowered.as_text().count("stablehlo.custom_call @tpu_custom_call") == 2
