"""splash in interpret mode against dense attention; lowered for TPU; and what it refuses.

Interpret mode proves numbers, lowering proves that the program holds the kernel: nothing here runs
on a TPU.
"""

import re
import subprocess
import sys

import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
    splash_attention_mask_info,
)
from pairs import covering
from policies import NO_ADAPTERS

import kernelry
from kernelry import masks, testing
from kernelry.errors import ConfigError, KernelRefusedError
from kernelry.execution.attend import BoundKernel, attend
from kernelry.kernel.spec import Inputs
from kernelry.request.request import Request
from kernelry_tpu_splash.computed_masks import ComputedMask, SlotMask, query_positions
from kernelry_tpu_splash.plugin import SPLASH
from kernelry_tpu_splash.splash.mask_info import of_columns, of_rows

# Without it, one block would hold the whole test and no block would be skipped or joined.
SMALL = dict.fromkeys(
    (
        "block_q",
        "block_q_dkv",
        "block_q_dq",
        "block_kv",
        "block_kv_compute",
        "block_kv_dkv",
        "block_kv_dkv_compute",
        "block_kv_dq",
    ),
    128,
)
BALANCED = np.concatenate([np.arange(64), np.arange(192, 256), np.arange(64, 192)])


def every_third(query_positions, kv_positions):
    return (query_positions - kv_positions) % 3 == 0


MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(40),
    "window_both_sides": masks.SlidingWindow(40, 30),
    "window_wider_than_the_keys": masks.SlidingWindow(4000, 3000),
    "window_at_offsets": masks.SlidingWindow(150, 20).at(query_offset=200, kv_offset=72),
    "later_queries": masks.Causal().at(query_offset=128),
    "chunked": masks.Chunked(96),
    "block_causal": masks.BlockCausal(48),
    "chunked_at_an_offset": masks.Chunked(96).at(query_offset=40, kv_offset=40),
    "window_in_chunks": masks.Chunked(96) & masks.SlidingWindow(30),
    "predicate": masks.Causal() & masks.Predicate(every_third),
    "any_of": masks.SlidingWindow(20) | masks.BlockCausal(128),
    "not": ~masks.SlidingWindow(20, 20),
    "not_full": masks.Causal() | ~masks.Full(),
    "load_balanced": masks.Causal().at(query_positions=BALANCED, kv_positions=BALANCED),
    "load_balanced_window": masks.SlidingWindow(40).at(query_positions=BALANCED, kv_positions=BALANCED),
}
SELECTED = covering(
    mask=["packed", "window", "traced", "causal"],
    extras=[{"soft_cap": 2.0, "scale": 0.3}, {"sinks": [-1.0, 2.0]}, {}],
    lengths=[(256, 256), (128, 256), (256, 128)],
    tiling=[{}, {"backward_kernels": 1, "q_layout": 2, "k_layout": 2, "v_layout": 2}],
    dims=[(32, 48), (80, 24)],
    kv_heads=[1, 2],
    dtype=["float32", "bfloat16"],
)
ADAPTERS = {"clean_hidden_slots", "empty_rows_from_lse", "sinks_from_lse"}
"""What masks and sinks may need; grouped heads and dims need none."""


def _selected_mask(name, q_len, kv_len):
    ids = np.repeat([3, -1, 0, 5], 64)
    return {
        "causal": masks.Causal().at(query_offset=max(kv_len - q_len, 0)),
        "window": MASKS["window_at_offsets"],
        "packed": MASKS["window_in_chunks"].at(query_offset=9, kv_offset=9) & masks.Segments(ids[:q_len], ids[:kv_len]),
        "traced": masks.Causal().at(query_offset=jnp.asarray([100, -30])),
    }[name]


@pytest.mark.parametrize("case", SELECTED, ids=lambda case: f"{case['mask']}-{case['dtype']}")
def test_selected_cases_agree_with_dense(case, make_arrays, check_against_dense):
    (q_len, kv_len), (head_dim, value_dim), extras = case["lengths"], case["dims"], dict(case["extras"])
    widths = {"head_dim": head_dim, "value_dim": value_dim}
    arrays = make_arrays(q_len, kv_len, kv_heads=case["kv_heads"], batch=2, dtype=case["dtype"], **widths)
    sinks = jnp.asarray(extras.pop("sinks")) if "sinks" in extras else None
    close = {"forward": 1e-2, "gradient": 4e-2} if case["dtype"] == "bfloat16" else {}
    mask = _selected_mask(case["mask"], q_len, kv_len)
    plan = check_against_dense(
        "splash", arrays, mask=mask, sinks=sinks, tiling={**SMALL, **case["tiling"]}, **extras, **close
    )
    assert {step.adapter.name for step in plan.steps} <= ADAPTERS


@pytest.mark.sweep
@pytest.mark.parametrize("name", MASKS)
def test_masks_agree_with_dense(name, make_arrays, check_against_dense):
    check_against_dense("splash", make_arrays(), mask=MASKS[name], tiling=SMALL)


def test_partial_holds_a_natural_lse(make_arrays):
    query, key, value, _ = make_arrays()
    options = {"mode": "prefill", "return_partial": True, "kernel": "splash"}
    with testing.interpret(), kernelry.use(tiling=SMALL):
        found = jax.jit(lambda *arrays: kernelry.attention(*arrays, mask=masks.Causal(), **options))(query, key, value)
    wanted = testing.reference_attention(query, key, value, mask=masks.Causal())
    assert found.lse.dtype == jnp.float32
    np.testing.assert_allclose(found.lse, wanted.lse, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(found.out, wanted.out, rtol=2e-6, atol=2e-6)


def _part(query, key, value, mask):
    request = Request(
        target="cpu",
        q_len=query.shape[1],
        kv_len=key.shape[1],
        q_heads=query.shape[2],
        kv_heads=key.shape[2],
        head_dim=query.shape[3],
        mask=mask,
        interpret=True,
    )
    return BoundKernel(SPLASH, request, SPLASH.tilings(request)[0]), Inputs(query, key, value, mask.canonical())


def _in_two_parts(query, key, value, sinks):
    """Causal attention whose second half of the keys hides from the first half of the queries."""
    first = _part(query, key[:, :128], value[:, :128], masks.Causal().at(query_offset=0))
    second = _part(query, key[:, 128:], value[:, 128:], masks.Causal().at(kv_offset=128))
    return attend((first[0], second[0]), (first[1], second[1]), sinks=sinks, statistics=False).out


def test_two_parts_merge_to_the_whole(make_arrays):
    query, key, value, d_out = make_arrays()
    sinks = jnp.asarray([-1.0, 2.0])

    @jax.jit
    def run(*operands):
        out, pull = jax.vjp(_in_two_parts, *operands)
        return out, pull(d_out)

    found, gradients = run(query, key, value, sinks)
    whole = {"mask": masks.Causal(), "sinks": sinks}
    wanted = testing.reference_gradients(query, key, value, d_out=d_out, **whole)
    np.testing.assert_allclose(found, testing.reference_attention(query, key, value, **whole).out, rtol=5e-6, atol=5e-6)
    for mine, name in zip(gradients, ("query", "key", "value", "sinks"), strict=True):
        np.testing.assert_allclose(mine, getattr(wanted, name), rtol=2e-5, atol=2e-5)


def test_rows_that_see_nothing_are_the_identity_of_merge(make_arrays):
    query, key, value, _ = make_arrays(256, 128)
    part, inputs = _part(query, key, value, masks.Causal().at(kv_offset=130))
    partial = jax.jit(lambda inputs: part.forward(inputs, statistics=True))(inputs)
    np.testing.assert_array_equal(partial.lse[..., :130], -np.inf)
    np.testing.assert_array_equal(partial.out[:, :130], 0.0)
    assert np.isfinite(partial.lse[..., 130:]).all()


def test_infinite_lse_contributes_no_gradient(make_arrays):
    query, key, value, d_out = make_arrays(128)
    part, inputs = _part(query, key, value, masks.Causal())
    lse = jnp.full((1, 2, 128), jnp.inf)

    @jax.jit
    def backward(inputs, d_out, lse):
        shares = part.kernel.body().backward(inputs, part.request, part.tiling, d_out, lse, d_out, None)
        return shares.query, shares.key, shares.value

    for share in backward(inputs, d_out, lse):
        np.testing.assert_array_equal(share, 0.0)


def test_a_mask_of_slots_is_the_mask():
    slots = jnp.broadcast_to(jnp.arange(256, dtype=jnp.int32)[:, None], (256, 256))
    computed = {name: mask for name, mask in MASKS.items() if name != "full"}

    @jax.jit
    def evaluate(query, kv):
        return {name: SlotMask(mask.canonical())(query, kv) for name, mask in computed.items()}

    found = evaluate(slots, slots.T)
    assert not [name for name, mask in computed.items() if not np.array_equal(found[name], _seen(mask))]


def test_blocks_of_a_mask_are_empty_or_full_only_where_all_their_slots_are():
    wrong = []
    for name, mask in MASKS.items():
        request = Request(q_len=256, kv_len=256, mask=mask)
        kinds = ComputedMask.of(Inputs(None, None, None, mask.canonical()), request).kinds(64, 128)
        blocks = _seen(mask).reshape(4, 64, 2, 128)
        hidden, whole = kinds == masks.BlockKind.EMPTY, kinds == masks.BlockKind.FULL
        if blocks.any((1, 3))[hidden].any() or not blocks.all((1, 3))[whole].all():
            wrong.append(name)
    assert not wrong


def _seen(mask):
    return np.broadcast_to(np.asarray(mask.materialize(256, 256)), (1, 1, 256, 256))[0, 0]


PLACES = [{"query_offset": jnp.asarray([100, 30])}, {"query_positions": jnp.arange(128)[::-1] * 2}]
TRACED = [kind.at(**place) for kind in (masks.Causal(), masks.SlidingWindow(60), masks.Chunked(96)) for place in PLACES]


def test_where_only_the_running_program_knows_the_mask_is_evaluated_at_its_positions():
    """What the vendor's kernel compares with the slots of keys is the positions of queries."""
    slots = jnp.broadcast_to(jnp.arange(256, dtype=jnp.int32), (2, 128, 256))

    @jax.jit
    def evaluate(slots):
        found = []
        for mask in TRACED:
            request = Request(q_len=128, kv_len=256, batch=2, mask=mask)
            inputs = Inputs(None, None, None, mask.canonical())
            positions = jnp.broadcast_to(query_positions(inputs, request)[..., None], slots.shape)
            found.append(ComputedMask.of(inputs, request).function(positions, slots))
        return found

    for mask, found in zip(TRACED, evaluate(slots), strict=True):
        np.testing.assert_array_equal(found, testing.reference_mask(mask, 2, 1, 128, 256)[:, 0])


def test_where_only_the_running_program_knows_every_block_is_computed():
    for mask in TRACED:
        request = Request(q_len=256, kv_len=256, batch=2, mask=mask)
        made = ComputedMask.of(Inputs(None, None, None, mask.canonical()), request)
        assert (made.kinds(128, 128) == masks.BlockKind.PARTIAL).all()


KINDS = hypothesis.extra.numpy.arrays(
    np.int8, hypothesis.extra.numpy.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.integers(0, 2)
)


@given(KINDS)
def test_rows_visit_every_block_that_holds_anything_once(kinds):
    info = of_rows(kinds, None)
    for row, (steps, found) in enumerate(zip(info.data_next[0], info.block_mask[0], strict=True)):
        visited = [(int(column), int(kind)) for column, kind in zip(steps, found, strict=True) if kind]
        assert visited == [(column, kind) for column, kind in enumerate(kinds[row].tolist()) if kind]


@given(KINDS, st.booleans())
def test_columns_visit_every_block_that_holds_anything_once(kinds, shrink):
    info = of_columns(kinds, None, shrink=shrink)
    assert shrink or info.block_mask.shape[1:] == kinds.shape
    for column in range(kinds.shape[1]):
        steps, found = info.data_next[0, :, column], info.block_mask[0, :, column]
        visited = [(int(row), int(kind)) for row, kind in zip(steps, found, strict=True) if kind]
        assert visited == [(row, kind) for row, kind in enumerate(kinds[:, column].tolist()) if kind]
        assert np.isin(steps, np.arange(kinds.shape[0])).all()


@pytest.mark.parametrize(
    ("mine", "vendors"),
    [
        (masks.Causal(), splash_attention_mask.CausalMask((1024, 1024))),
        (masks.SlidingWindow(200, 30), splash_attention_mask.LocalMask((1024, 1024), (200, 30), 0)),
    ],
)
def test_blocks_are_those_that_the_vendor_finds(mine, vendors):
    kinds = SlotMask(mine.canonical()).kinds(1024, 1024, 128, 256)
    several = splash_attention_mask.MultiHeadMask([vendors])
    rows = splash_attention_mask_info.process_mask(several, (128, 256))[0]
    columns = splash_attention_mask_info.process_mask_dkv(several, (128, 256))[0]
    for found, wanted in ((of_rows(kinds, None), rows), (of_columns(kinds, None, shrink=True), columns)):
        np.testing.assert_array_equal(found.block_mask, wanted.block_mask)
        np.testing.assert_array_equal(found.data_next[found.block_mask > 0], wanted.data_next[wanted.block_mask > 0])
        assert (found.data_next.dtype, found.block_mask.dtype) == (wanted.data_next.dtype, wanted.block_mask.dtype)


def test_masks_of_one_shape_are_told_apart():
    one, other = (SlotMask(masks.Chunked(size).canonical()) for size in (64, 128))
    assert one != other
    assert hash(one) != hash(other)
    assert one == SlotMask(masks.Chunked(64).canonical())


@pytest.mark.sweep
@pytest.mark.parametrize("mask", TRACED, ids=str)
def test_queries_may_stand_where_only_the_running_program_knows(mask, make_arrays, check_against_dense):
    check_against_dense("splash", make_arrays(128, 256, batch=2), mask=mask, tiling=SMALL)


@pytest.mark.sweep
def test_one_fused_backward_kernel(make_arrays, check_against_dense):
    tiling = {**SMALL, "backward_kernels": 1}
    for mask in (masks.Causal(), masks.SlidingWindow(40), masks.Chunked(128)):
        check_against_dense("splash", make_arrays(), mask=mask, tiling=tiling)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["q_layout", "k_layout", "v_layout"])
def test_layouts(name, make_arrays, check_against_dense):
    check_against_dense("splash", make_arrays(), mask=masks.Causal(), tiling={**SMALL, name: 2})


@pytest.mark.sweep
def test_packed_windows_and_negative_ids(make_arrays, check_against_dense):
    ids = jnp.asarray(np.repeat([[3, -1, 0, 5]], 64, axis=1).reshape(1, 256))
    for mask in (masks.SlidingWindow(40), masks.Chunked(96), masks.BlockCausal(48)):
        check_against_dense("splash", make_arrays(), mask=mask & masks.Segments(ids), tiling=SMALL)


def _refusal(arrays, **options):
    with testing.interpret(), kernelry.use(policy=NO_ADAPTERS), pytest.raises(KernelRefusedError) as caught:
        kernelry.attention(*arrays[:3], kernel="splash", **options)
    return str(caught.value)


def test_uneven_query_length_is_refused_with_its_values(make_arrays):
    text = _refusal(make_arrays(200, 256))
    assert "q_len=200 is not a multiple of 128, the smallest block_q; pad to 256" in text


def test_uneven_key_length_is_refused_with_its_values(make_arrays):
    text = _refusal(make_arrays(128, 130))
    assert "kv_len=130 is not a multiple of 128, the smallest block_kv; pad to 256" in text


def test_float16_is_refused(make_arrays):
    assert "dtype=float16 is not bfloat16 or float32" in _refusal(make_arrays(128, dtype="float16"))


def test_decode_is_refused(make_arrays):
    assert "mode=decode is not prefill or train" in _refusal(make_arrays(128), mode="decode")


def test_lengths_are_refused(make_arrays):
    mask = masks.Causal() & masks.Lengths(np.int32(100))
    assert "mask atom lengths is not any_of or block_causal" in _refusal(make_arrays(128), mask=mask)


def test_two_pairs_of_ids_are_refused():
    mask = masks.Segments(np.zeros(128, np.int32)) & masks.Segments(np.arange(128))
    request = Request(target="tpu:v5e", q_len=128, mask=mask)
    assert "has 2 pairs of ids" in str(kernelry.explain(request, kernel="splash"))


def _why(mask, batch=1):
    request = Request(target="tpu:v5e", batch=batch, q_len=256, mask=mask)
    (refused,) = kernelry.explain(request, kernel="splash").refused
    return "; ".join(map(str, refused.refusals))


def test_disjunctions_over_arrays_are_refused():
    mask = masks.Causal() | masks.Segments(np.zeros(256, np.int32))
    assert "depends on arrays" in _why(mask)


def test_positions_in_many_runs_are_refused():
    positions = np.arange(256).reshape(2, 128).T.reshape(-1)
    why = _why(masks.Causal().at(query_positions=positions))
    assert "in many runs; reorder the tokens so that all rows have the same few runs" in why


def test_positions_of_each_row_are_refused():
    assert "has positions by row or in many runs" in _why(masks.Causal().at(query_offset=np.asarray([0, 8])), batch=2)


def test_traced_positions_of_keys_are_refused():
    assert "has traced positions of keys" in _why(masks.Causal().at(kv_offset=jnp.asarray(3)))


def test_traced_positions_beside_another_atom_are_refused():
    mask = masks.Causal().at(query_offset=jnp.asarray(3)) & masks.Chunked(8)
    assert "has traced positions next to another atom" in _why(mask)


def test_unknown_layouts_and_numbers_of_kernels_are_errors(make_arrays):
    arrays = make_arrays(128)[:3]
    for name, value in (("k_layout", 3), ("backward_kernels", 3)):
        with testing.interpret(), kernelry.use(tiling={name: value}), pytest.raises(ConfigError, match=f"{name}=3"):
            kernelry.attention(*arrays, kernel="splash")


def test_gradient_through_lse_is_refused(make_arrays):
    assert "no gradient through the lse of a Partial" in _refusal(make_arrays(128), return_partial=True)


def test_default_blocks_divide_the_lengths():
    tilings = SPLASH.tilings(Request(q_len=768, kv_len=4096))
    assert (tilings[0]["block_q"], tilings[0]["block_kv"]) == (384, 512)
    assert all(768 % t["block_q"] == 0 and 4096 % t["block_kv"] == 0 for t in tilings)


def test_blocks_that_do_not_divide_are_an_error(make_arrays):
    arrays = make_arrays(128)
    with testing.interpret(), kernelry.use(tiling={"block_q": 96}), pytest.raises(ConfigError, match="block_q=96"):
        kernelry.attention(*arrays[:3], kernel="splash")


def test_blocks_longer_than_a_sequence_are_the_sequence(make_arrays, lower):
    def program(**tiling):
        with kernelry.use(tiling=tiling):
            return lower(_on_splash, make_arrays(128)[:3], "tpu:v5e")[1].as_text()

    assert program(block_q=1024, block_kv=512) == program()


def _on_splash(query, key, value):
    return kernelry.attention(query, key, value, kernel="splash")


def test_lowered_for_tpu_holds_the_kernel(make_arrays, lower):
    def loss(query, key, value):
        out = kernelry.attention(query, key, value, mask=masks.Causal(), kernel="splash")
        return out.astype(jnp.float32).sum()

    arrays = make_arrays(dtype="bfloat16", head_dim=128)[:3]
    for backward_kernels in (1, 2):
        with kernelry.use(tiling={"backward_kernels": backward_kernels}):
            resolutions, lowered = lower(jax.grad(loss, (0, 1, 2)), arrays, "tpu:v5e")
        resolutions[0].verify(lowered)
        assert lowered.as_text().count("stablehlo.custom_call @tpu_custom_call") == 1 + backward_kernels


def test_program_equals_the_direct_call(make_arrays, lower):
    arrays = make_arrays(dtype="float32", head_dim=128)[:3]
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((256, 256))] * 2)
    blocks = splash_attention_kernel.BlockSizes(**dict.fromkeys(SMALL, 256))
    vendor = splash_attention_kernel.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)

    def direct(query, key, value):
        query, key, value = ((query * 128**-0.5).swapaxes(1, 2), key.swapaxes(1, 2), value.swapaxes(1, 2))
        return jax.vmap(vendor)(query, key, value).swapaxes(1, 2)

    def ours(query, key, value):
        with kernelry.use(tiling={"backward_kernels": 2}):
            return kernelry.attention(query, key, value, mask=masks.Causal(), kernel="splash")

    def program(function):
        gradient = jax.grad(lambda *arrays: function(*arrays).sum(), (0, 1, 2))
        text = lower(gradient, arrays, "tpu:v5e")[1].as_text()
        bodies = re.compile(r'backend_config = "(?:[^"\\]|\\.)*"')
        assert len(bodies.findall(text)) == 3
        # The vendor asks whether q ≥ k, we whether k ≤ q: the compiled bodies of the calls differ in that.
        return bodies.sub("", text)

    assert program(ours) == program(direct)


def test_listing_imports_no_vendor():
    code = (
        "import sys, kernelry_tpu_splash.plugin, kernelry_gpu_pallas.plugin, kernelry_cudnn_te.plugin\n"
        "vendors = ('jax.experimental.pallas', 'tokamax', 'transformer_engine')\n"
        "sys.exit([name for name in sys.modules if name.startswith(vendors)] or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
