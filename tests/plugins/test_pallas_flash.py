"""pallas_flash in interpret mode against dot_product, lowered for CUDA, and what it refuses.

Interpret mode proves numbers; tests/aot compiles for GPUs: nothing here runs on one.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import masks, testing
from kernelry.errors import ConfigError, KernelRefusedError
from kernelry.masks import BlockKind
from kernelry.plugin import BlockGrid, Environment, Inputs, Request, Tiling
from kernelry_gpu_pallas import slots
from kernelry_gpu_pallas.pallas_flash import shared_memory, tilings
from kernelry_gpu_pallas.pallas_flash.spec import PALLAS_FLASH
from kernelry_gpu_pallas.runs import Runs
from kernelry_gpu_pallas.shared_memory import available

# Without it, one tile would hold the whole test, and no tile would be skipped, full or at an edge.
BLOCKS = ("block_q", "block_kv", "block_q_dq", "block_kv_dq", "block_q_dkv", "block_kv_dkv")
SMALL = dict.fromkeys(BLOCKS, 16)
LENGTH = 56
IDS = np.repeat([3, -1, 0, 5], 14)
SHUFFLED = np.random.default_rng(1).permutation(LENGTH)
BALANCED = np.r_[0:14, 42:56, 14:42]


def every_third(query_positions, kv_positions):
    return (query_positions - kv_positions) % 3 == 0


def shifted(query_positions, kv_positions, shift):
    return query_positions - kv_positions >= shift


MASKS = {
    "full": masks.Full(),
    "window": masks.SlidingWindow(20, 5),
    "chunked": masks.Chunked(20),
    "block_causal": masks.BlockCausal(12),
    "predicate": masks.Causal() & masks.Predicate(every_third),
    "not": ~masks.SlidingWindow(20, 20),
    "load_balanced": masks.Causal().at(query_positions=BALANCED, kv_positions=BALANCED),
    "shuffled": masks.SlidingWindow(9).at(query_positions=SHUFFLED, kv_positions=SHUFFLED),
    "offset_by_row": masks.Causal().at(query_offset=np.asarray([-3, 5])),
    "offset_of_one_row": masks.Causal().at(query_offset=np.asarray([5])),
    "traced_offset": masks.Causal().at(query_offset=jnp.asarray([3, -7])),
    "traced_positions": masks.Chunked(20).at(query_positions=jnp.asarray(SHUFFLED), kv_positions=jnp.asarray(SHUFFLED)),
    "prefix": masks.PrefixLM(jnp.asarray([10, 31])),
    "packed": masks.Causal() & masks.Segments(jnp.asarray(IDS)),
    "segments_separate": masks.Segments(jnp.asarray(IDS), jnp.asarray(IDS[::-1].copy())),
    "segments_unsigned": masks.Segments(jnp.asarray(np.repeat([3, 2**32 - 1, 0, 2**31], 14), jnp.uint32)),
    "lengths": masks.Causal() & masks.Lengths(jnp.asarray([30, 55]), jnp.asarray([50, 3])),
    "spans": masks.Causal() & masks.Segments(jnp.asarray(IDS))
    | masks.BidirectionalSpans.from_flags(jnp.asarray(IDS) == 5),
    "dense_by_row": masks.Dense(jnp.asarray(np.random.default_rng(2).random((2, 1, LENGTH, LENGTH)) < 0.3)),
    "dense_by_head": masks.Dense(jnp.asarray(np.random.default_rng(3).random((1, 4, 1, LENGTH)) < 0.5)),
}
QUICK = ("offset_of_one_row", "segments_unsigned", "shuffled", "spans", "dense_by_head")
GROUPED = {"heads": 4, "kv_heads": 2, "batch": 2, "head_dim": 24, "value_dim": 16}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.sweep) for name in MASKS]
)
def test_masks_agree_with_dense(name, make_arrays, check_against_dense):
    plan = check_against_dense("pallas_flash", make_arrays(LENGTH, **GROUPED), mask=MASKS[name], tiling=SMALL)
    assert plan.steps == ()


def test_bias_soft_cap_and_scale_agree_with_dense(make_arrays, check_against_dense):
    bias = jnp.asarray(np.random.default_rng(4).standard_normal((1, 4, LENGTH, LENGTH)), jnp.float32)
    options = {"bias": bias, "soft_cap": 4.0, "scale": 0.7, "gradients": ("query", "key", "value")}
    with pytest.warns(UserWarning, match="soft cap"):
        check_against_dense(
            "pallas_flash", make_arrays(LENGTH, **GROUPED), mask=masks.Causal(), tiling=SMALL, **options
        )


@pytest.mark.sweep
@pytest.mark.parametrize("shape", [(1, 1, 1, LENGTH), (2, 1, LENGTH, 1), (1, 4, 1, 1), (2, 4, LENGTH, LENGTH)])
def test_a_bias_broadcasts_along_every_axis(shape, make_arrays, check_against_dense):
    bias = jnp.asarray(np.random.default_rng(4).standard_normal(shape), jnp.float32)
    options = {"bias": bias, "gradients": ("query", "key", "value")}
    check_against_dense("pallas_flash", make_arrays(LENGTH, **GROUPED), mask=masks.Causal(), tiling=SMALL, **options)


@pytest.mark.sweep
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (17, 90), (90, 17), (64, 64)])
def test_any_lengths_agree_with_dense(q_len, kv_len, make_arrays, check_against_dense):
    mask = masks.Causal().at(query_offset=kv_len - q_len)
    check_against_dense("pallas_flash", make_arrays(q_len, kv_len, heads=2), mask=mask, tiling=SMALL)


@pytest.mark.sweep
@pytest.mark.parametrize("dims", [(80, 80), (192, 128), (16, 256)])
def test_head_dims_agree_with_dense(dims, make_arrays, check_against_dense):
    arrays = make_arrays(40, head_dim=dims[0], value_dim=dims[1])
    check_against_dense("pallas_flash", arrays, mask=masks.Causal(), forward=5e-6, gradient=5e-5)


@pytest.mark.sweep
@pytest.mark.parametrize(("dtype", "forward", "gradient"), [("bfloat16", 1e-2, 4e-2), ("float16", 2e-3, 1e-2)])
def test_narrow_dtypes_agree_with_dense(dtype, forward, gradient, make_arrays, check_against_dense):
    arrays = make_arrays(LENGTH, **GROUPED, dtype=dtype)
    check_against_dense("pallas_flash", arrays, mask=masks.Causal(), forward=forward, gradient=gradient, tiling=SMALL)


def test_nan_that_only_queries_beyond_the_end_would_see_leaves_no_trace(make_arrays):
    """Tiles of 16 hold queries 16 to 19 and twelve that do not exist; those would see slots 20 to 31."""
    query, key, value, d_out = make_arrays(20, 40, **GROUPED)
    mask = masks.Causal().at(query_offset=0)

    def results(kernel, key, value):
        def attend(*operands):
            return kernelry.attention(*operands, mask=mask, kernel=kernel)

        out, pull = jax.vjp(attend, query, key, value)
        return out, *pull(d_out)

    dirty = (array.at[:, 20:].set(jnp.nan) for array in (key, value))
    with testing.interpret(), kernelry.use(tiling=SMALL):
        found = results("pallas_flash", *dirty)
    for one, wanted in zip(found, results("dot_product", key, value), strict=True):
        np.testing.assert_allclose(one, wanted, rtol=2e-5, atol=2e-5)


def test_sinks_merge_through_lse(make_arrays, check_against_dense):
    sinks = jnp.asarray([0.5, -1.0, 2.0, 0.0])
    plan = check_against_dense(
        "pallas_flash", make_arrays(LENGTH, **GROUPED), mask=MASKS["packed"], sinks=sinks, tiling=SMALL
    )
    assert [step.adapter.name for step in plan.steps] == ["sinks_from_lse"]


def test_the_same_call_gives_the_same_bits(make_arrays):
    query, key, value, d_out = make_arrays(LENGTH, **GROUPED)

    def loss(query, key, value):
        out = kernelry.attention(query, key, value, mask=MASKS["window"], kernel="pallas_flash")
        return (out * d_out).sum()

    with testing.interpret(), kernelry.use(tiling=SMALL):
        gradients = [jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value) for _ in range(2)]
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_array_equal(one, other)


def _grid(block=16):
    return BlockGrid(q_len=LENGTH, kv_len=LENGTH, block_q=block, block_kv=block)


def _visited(runs):
    """[B or 1, own, other]: how often each block is visited by the loops over runs."""
    full, partial = np.asarray(runs.full), np.asarray(runs.partial)
    counts = np.zeros((*full.shape[:2], _grid().columns), int)
    for table in (full, partial):
        for (row, own, _), (start, end) in zip(np.ndindex(table.shape[:3]), table.reshape(-1, 2), strict=True):
            counts[row, own, start:end] += 1
    return counts


@pytest.mark.parametrize("name", MASKS)
def test_runs_visit_each_block_that_holds_anything_once_and_no_other_block_of_the_static_mask(name):
    parts, whole = MASKS[name].canonical(), MASKS[name]
    kinds = whole.block_map(LENGTH, LENGTH, 16, 16)
    visible = np.asarray(whole.materialize(LENGTH, LENGTH, q_heads=4)).any(axis=1)
    edge = -LENGTH % 16
    padded = np.pad(visible, ((0, 0), (0, edge), (0, edge)))
    holds = padded.reshape(len(padded), 4, 16, 4, 16).any(axis=(2, 4))
    for runs, turn in ((Runs.of_queries(parts, _grid()), (0, 1, 2)), (Runs.of_keys(parts, _grid()), (0, 2, 1))):
        visits = _visited(runs).transpose(turn)
        assert visits.max() <= 1
        assert (visits >= holds).all()
        assert (visits <= (kinds != BlockKind.EMPTY)[None]).all()


@pytest.mark.parametrize("name", MASKS)
def test_what_is_visited_without_a_mask_is_visible(name):
    mask = MASKS[name]
    visible = np.asarray(mask.materialize(LENGTH, LENGTH, q_heads=4))
    table = np.asarray(Runs.of_queries(mask.canonical(), _grid()).full)
    for (row, own, _), (start, end) in zip(np.ndindex(table.shape[:3]), table.reshape(-1, 2), strict=True):
        rows = slice(None) if len(table) == 1 else slice(row, row + 1)
        assert visible[rows, :, own * 16 : own * 16 + 16, start * 16 : end * 16].all()
        assert end * 16 <= LENGTH or start == end


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("causal", masks.Causal()),
        ("window", masks.SlidingWindow(20, 5)),
        ("chunked", masks.Chunked(20)),
        ("packed", masks.Causal() & masks.Segments(jnp.zeros(LENGTH, jnp.int32))),
    ],
)
def test_key_blocks_computed_are_those_that_hold_anything(name, mask, make_arrays, monkeypatch):
    """Counted while the kernel runs."""
    counted = []
    plain = slots.load

    def counting(ref, part=None, width=None, **options):
        if part is not None and part.length == LENGTH and width == 24 and part.block == 16:
            jax.debug.callback(lambda start: counted.append(int(start)), part.start)
        return plain(ref, part, width, **options)

    monkeypatch.setattr("kernelry_gpu_pallas.pallas_flash.forward.load", counting)
    query, key, value, _ = make_arrays(LENGTH, head_dim=24, value_dim=16)
    with testing.interpret(), kernelry.use(tiling={**SMALL, "block_q": 32}):
        out = kernelry.attention(query, key, value, mask=mask, mode="prefill", kernel="pallas_flash")
        jax.block_until_ready(out)
        jax.effects_barrier()
    kinds = mask.block_map(LENGTH, LENGTH, 32, 16)
    assert len(counted) == 2 * (kinds != BlockKind.EMPTY).sum()  # two heads


def test_equal_segments_need_no_mask():
    """Where a whole row of the batch is one segment, the blocks below the diagonal are visited unmasked."""
    ids = jnp.stack([jnp.zeros(LENGTH, jnp.int32), jnp.arange(LENGTH, dtype=jnp.int32)])
    mask = masks.Full() & masks.Segments(ids)
    runs = Runs.of_queries(mask.canonical(), _grid())
    full = np.asarray(runs.full[..., 1] - runs.full[..., 0]).sum(axis=(1, 2))
    assert full.tolist() == [4 * 3, 0]
    assert _visited(runs).sum(axis=(1, 2)).tolist() == [16, 4]


def test_a_predicate_with_arrays_goes_through_a_dense_mask(make_arrays, check_against_dense):
    mask = masks.Predicate(shifted, jnp.asarray([[[[2]]], [[[9]]]]))
    plan = check_against_dense("pallas_flash", make_arrays(LENGTH, **GROUPED), mask=mask, tiling=SMALL)
    assert [step.adapter.name for step in plan.steps] == ["dense_mask"]


REQUEST = Request(
    target="gpu:h100", q_len=4096, kv_len=4096, q_heads=8, kv_heads=2, head_dim=128, dtype="bfloat16",
    mask=masks.Causal(), gradients=("query", "key", "value"),
)  # fmt: skip

PAIRS = {"bias": (1, 8, 4096, 4096), "mask": masks.Causal() & masks.Dense(jnp.ones((1, 1, 4096, 4096), bool))}


@pytest.mark.parametrize("target", ["gpu:a100", "gpu:a10g", "gpu:h100", "gpu:b200", "gpu"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (80, 80), (192, 128), (256, 256)])
@pytest.mark.parametrize("pairs", [{}, PAIRS], ids=["", "pairs"])
def test_every_tiling_of_the_search_space_fits_shared_memory_or_there_is_none(
    target, dtype, head_dim, value_dim, pairs
):
    target = kernelry.Target.parse(target)
    facts = {"target": target, "dtype": dtype, "head_dim": head_dim, "value_dim": value_dim}
    request = dataclasses.replace(REQUEST, **facts, **pairs)
    refused = PALLAS_FLASH.refusals(request, Environment())
    if refused:
        assert dtype == "float32"
        assert head_dim > 128
        assert available(request) == 101376
        assert "tiles of 16 × 16, the smallest, may take" in refused[0].detail
        return
    found = PALLAS_FLASH.tilings(request)
    assert found
    for tiling in found:
        tilings.check(request, tiling)
        for need in shared_memory.needs(request, dict(tiling.values)).values():
            assert need.least <= need.most <= available(request)


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({}, 3),
        ({"bias": (1, 8, 4096, 4096)}, 2),
        ({"bias": (1, 8, 1, 4096)}, 3),
        ({"mask": masks.Dense(jnp.ones((1, 1, 4096, 4096), bool))}, 2),
        ({"mask": masks.Causal() | masks.Dense(jnp.ones((1, 1, 4096, 4096), bool))}, 2),
    ],
)
def test_what_is_read_of_each_query_and_key_takes_shared_memory_too(change, stages):
    request = dataclasses.replace(REQUEST, head_dim=192, value_dim=128, **change)
    assert PALLAS_FLASH.tilings(request)[0]["num_stages"] == stages


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_q": 48}, "block_q=48 of pallas_flash is no power of two"),
        ({"block_kv_dq": 8}, "block_kv_dq=8 of pallas_flash < 16"),
        ({"block_q_dkv": 512}, r"block_q_dkv=512, .* take at least \d+ bytes of shared memory > 232448 of gpu:h100"),
        ({"num_warps": 3}, "num_warps=3 of pallas_flash is no power of two"),
        ({"num_warps": 0}, "num_warps=0 of pallas_flash < 1"),
        ({"num_stages_backward": 0}, "num_stages_backward=0 of pallas_flash < 1"),
    ],
)
def test_a_tiling_that_cannot_compile_is_an_error(change, message, make_arrays):
    tiling = Tiling.of(**{**dict(PALLAS_FLASH.tilings(REQUEST)[0].values), **change})
    with pytest.raises(ConfigError, match=message):
        PALLAS_FLASH.body().forward(Inputs(*make_arrays(64)[:3]), REQUEST, tiling, statistics=False)


def test_gradients_of_wide_heads_leave_room_in_the_tensor_memory_of_blackwell():
    facts = {"q_len": 512, "head_dim": 192, "value_dim": 128, "dtype": "bfloat16"}
    on_blackwell, on_hopper = (kernelry.Request(target=target, **facts) for target in ("gpu:b200", "gpu:h100"))
    assert max(tiling["block_kv_dkv"] for tiling in PALLAS_FLASH.tilings(on_blackwell)) == 64
    wide = PALLAS_FLASH.tilings(on_hopper)[0]
    assert wide["block_kv_dkv"] == 128
    with pytest.raises(ConfigError, match="block_kv_dkv=128 of pallas_flash accumulates 384 columns in tensor memory"):
        tilings.check(on_blackwell, wide)
    tilings.check(dataclasses.replace(on_blackwell, gradients=()), wide)


def test_devices_before_ampere_are_refused():
    request = dataclasses.replace(REQUEST, target=kernelry.Target.parse("gpu:v100"))
    refusals = PALLAS_FLASH.capabilities.refusals(request)
    assert [str(refusal.code) for refusal in refusals] == ["RefusalCode.GENERATION"]
    assert "generation 70 < 80" in refusals[0].detail
    assert PALLAS_FLASH.refusals(request, Environment()) == ()


def test_a_bias_gradient_is_refused(make_arrays):
    query, key, value, _ = make_arrays(32)
    bias = jnp.zeros((1, 1, 32, 32))
    with testing.interpret(), pytest.raises(KernelRefusedError, match="no gradient of bias"):
        kernelry.attention(query, key, value, bias=bias, kernel="pallas_flash")


MESH = jax.sharding.AbstractMesh(
    (1,),
    ("x",),
    abstract_device=jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"),
)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_lowered_for_cuda_it_is_three_kernels_and_no_repeated_keys(make_arrays, lower):
    query, key, value, _ = make_arrays(256, heads=8, kv_heads=2, head_dim=64, dtype="bfloat16")

    def loss(query, key, value):
        out = kernelry.attention(query, key, value, mask=masks.Causal(), kernel="pallas_flash")
        return out.astype(jnp.float32).sum()

    resolutions, lowered = lower(jax.grad(loss, argnums=(0, 1, 2)), (query, key, value), "gpu:h100", MESH)
    resolutions[0].verify(lowered)
    text = lowered.as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3
    for name in ("pallas_flash_forward", "pallas_flash_backward_q", "pallas_flash_backward_kv"):
        assert name in text
    assert "256x256" not in text
    assert resolutions[0].plan.steps == ()
