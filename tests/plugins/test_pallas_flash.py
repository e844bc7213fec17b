"""pallas_flash in interpret mode against the float64 oracle, lowered for CUDA, and what it refuses.

Interpret mode proves numbers; tests/aot compiles for GPUs: nothing here runs on one.
"""

import contextlib
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import covering

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
from kernelry_gpu_pallas.tile_masks import Along, TileMask

# Without it, one tile would hold the whole test, and no tile would be skipped, full or at an edge.
BLOCKS = ("block_q", "block_kv", "block_q_dq", "block_kv_dq", "block_q_dkv", "block_kv_dkv")
SMALL = dict.fromkeys(BLOCKS, 16)
UNEQUAL = {**SMALL, "block_q": 32, "block_kv_dq": 32, "block_q_dkv": 32}
LENGTH = 56
IDS = np.repeat([3, -1, 0, 5], 14)
SHUFFLED = np.random.default_rng(1).permutation(LENGTH)
BALANCED = np.r_[0:14, 42:56, 14:42]


def every_third(query_positions, kv_positions):
    return (query_positions - kv_positions) % 3 == 0


def shifted(query_positions, kv_positions, shift):
    return query_positions - kv_positions >= shift


def seen(*shape, share=0.4):
    return masks.Dense(jnp.asarray(np.random.default_rng(2).random(shape) < share))


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
    "equal_segments": masks.Segments(jnp.asarray([[0] * LENGTH, list(range(LENGTH))])),
    "dense_by_row": seen(2, 1, LENGTH, LENGTH, share=0.3),
    "dense_by_head": seen(1, 4, 1, LENGTH),
}
NOT = {
    "not_chunked": ~masks.Chunked(20).at(query_offset=-3),
    "not_packed": ~(masks.Causal() & masks.Segments(jnp.asarray(IDS))),
    "not_prefix_or_lengths": ~(masks.PrefixLM(jnp.asarray([10, 31])) | masks.Lengths(jnp.asarray([30, 55]))),
    "not_dense": masks.Lengths(jnp.asarray([40, 55])) & ~seen(2, 4, LENGTH, LENGTH),
    "not_spans": ~masks.BidirectionalSpans(jnp.asarray(IDS), jnp.asarray(IDS[::-1].copy())),
}
SHORT = 24
FEWER_QUERIES = {
    "positions_by_row": masks.Causal().at(
        query_positions=jnp.asarray([SHUFFLED[:SHORT], SHUFFLED[-SHORT:]]), kv_positions=jnp.asarray(SHUFFLED)
    ),
    "keys_at_offsets": masks.SlidingWindow(9).at(query_offset=20, kv_offset=jnp.asarray([7, -7])),
    "prefix_of_one_row": masks.PrefixLM(jnp.asarray(31)).at(query_offset=5),
    "ids_of_both": masks.Segments(jnp.asarray(IDS[10 : 10 + SHORT]), jnp.asarray([IDS, IDS[::-1]])),
    "unsigned_ids_of_both": masks.Segments(
        jnp.asarray(np.repeat([2**32 - 1, 3, 0], 8), jnp.uint32),
        jnp.asarray([np.repeat([3, 2**32 - 1, 0, 2**31], 14), np.repeat([9, 3], 28)], jnp.uint32),
    ),
    "ids_of_two_dtypes": masks.Segments(
        jnp.asarray([np.where(np.arange(SHORT) == 5, -1, 3), np.repeat([-1, 3], 12)]),
        jnp.asarray(np.repeat([[3, 9], [2**32 - 1, 3]], 28, axis=1), jnp.uint32),
    ),
    "lengths_of_both": masks.Lengths(jnp.asarray([30, 40]), jnp.asarray([12, 19])),
    "dense_of_queries": seen(SHORT, 1) & masks.Lengths(jnp.asarray([30, 50])),
}
TILES = {LENGTH: MASKS | NOT, SHORT: FEWER_QUERIES}


def _part(operand, row, head, query, kv):
    """What a kernel reads of an operand in one tile."""
    array = np.asarray(operand.array)
    own = array[min(row, len(array) - 1)]
    match operand.along:
        case Along.ROW:
            return own
        case Along.QUERY:
            return own[query]
        case Along.KV:
            return own[kv]
    pairs = own[min(head, len(own) - 1)]
    return pairs[query if len(pairs) > 1 else slice(None)][:, kv if pairs.shape[1] > 1 else slice(None)]


@pytest.mark.parametrize(("q_len", "name"), [(q_len, name) for q_len, named in TILES.items() for name in named])
@pytest.mark.parametrize("by_keys", [False, True])
def test_a_tile_shows_what_the_mask_shows(q_len, name, by_keys):
    """Without a kernel: what one is handed of the mask, and what it makes of that, in tiles of either order."""
    mask, query, kv = TILES[q_len][name], np.arange(3, 20, dtype=np.int32), np.arange(16, 48, dtype=np.int32)
    tile_mask = TileMask.of(mask.canonical(), Request(batch=2, q_len=q_len, kv_len=LENGTH, q_heads=4, mask=mask))
    wanted = testing.reference_mask(mask, 2, 4, q_len, LENGTH)[:, :, query][..., kv]
    for row, head in ((0, 0), (1, 3)):
        parts = [_part(operand, row, head, query, kv) for operand in tile_mask.operands]
        if by_keys:
            parts = [
                part.T if operand.along is Along.PAIRS else part
                for part, operand in zip(parts, tile_mask.operands, strict=True)
            ]
        found = tile_mask.visible(jnp.asarray(query), jnp.asarray(kv), parts.__getitem__, by_keys=by_keys)
        found = np.ones((1, 1), bool) if found is None else found.T if by_keys else found
        assert found.dtype == bool
        np.testing.assert_array_equal(np.broadcast_to(found, wanted[row, head].shape), wanted[row, head])


@pytest.mark.parametrize("name", ["full", "window", "load_balanced", "offset_of_one_row", "predicate", "not_chunked"])
def test_a_mask_that_is_arithmetic_hands_a_kernel_nothing(name):
    mask = TILES[LENGTH][name]
    request = Request(batch=2, q_len=LENGTH, kv_len=LENGTH, q_heads=4, mask=mask)
    assert TileMask.of(mask.canonical(), request).operands == ()


TOLERANCES = {"float32": (2e-6, 2e-5), "bfloat16": (1e-2, 4e-2), "float16": (2e-3, 1e-2)}
"""Of the output and of the gradients, relative and absolute."""
GROUPED = {"heads": 4, "kv_heads": 2, "batch": 2, "head_dim": 24, "value_dim": 16}
OPERANDS = ("query", "key", "value", "sinks")


def _program(operands, d_out, *, bias=None, tiling=SMALL, **options):
    """The output and the gradients of all operands, compiled; and what it was resolved to."""
    names = OPERANDS[: len(operands)]
    constant = {} if bias is None else {"bias": bias, "gradients": names}

    def run(*operands):
        def attend(*operands):
            named = dict(zip(names, operands, strict=True))
            return kernelry.attention(**named, kernel="pallas_flash", **constant, **options)

        out, pull = jax.vjp(attend, *operands)
        return out, *pull(d_out.astype(out.dtype))

    caps_bias = bias is not None and "soft_cap" in options and not options.get("bias_after_cap")
    warned = pytest.warns(UserWarning, match="soft cap") if caps_bias else contextlib.nullcontext()
    with testing.interpret(), kernelry.use(tiling=tiling), kernelry.record() as resolutions, warned:
        compiled = jax.jit(run).lower(*operands).compile()
    return compiled, [step.adapter.name for step in resolutions[0].plan.steps]


def _wanted(operands, d_out, options):
    """The same in float64, by NumPy."""
    wide = [np.asarray(array, np.float64) for array in operands]
    known = {"mask": masks.Full(), **options, **dict(zip(OPERANDS[3:], wide[3:], strict=False))}
    gradients = testing.reference_gradients(*wide[:3], d_out=np.asarray(d_out, np.float64), **known)
    out = testing.reference_attention(*wide[:3], **known).out
    return out, *(getattr(gradients, name) for name in OPERANDS[: len(operands)])


def _compare(found, operands, d_out, options):
    dtype = str(operands[0].dtype)
    for at, (one, right) in enumerate(zip(found, _wanted(operands, d_out, options), strict=True)):
        near = {"rtol": TOLERANCES[dtype][at > 0], "atol": TOLERANCES[dtype][at > 0]}
        name = ("out", *OPERANDS)[at]
        np.testing.assert_allclose(np.asarray(one, np.float64), right, **near, err_msg=name)
    assert [array.dtype for array in found] == [operands[0].dtype, *(array.dtype for array in operands)]


def check(arrays, *, tiling=SMALL, **options):
    """Compares pallas_flash with the oracle; returns the names of the adapters that it took."""
    *operands, d_out = arrays
    if (sinks := options.pop("sinks", None)) is not None:
        operands.append(sinks)
    compiled, steps = _program(operands, d_out, tiling=tiling, **options)
    _compare(compiled(*operands), operands, d_out, options)
    return steps


SMOKE = covering(
    mask=["static", "carried", "dense"],
    extras=[
        "none",
        "sinks and a bias of queries",
        "soft cap and a bias of pairs",
        "a bias of pairs after the soft cap",
    ],
    dtype=list(TOLERANCES),
    sizes=[(48, 48, 16), (40, 56, 16), (48, 48, 24)],
    kv_heads=[4, 2],
    tiling=[SMALL, UNEQUAL],
)


def _smoke_mask(name, q_len, kv_len):
    ids = np.repeat([3, -1, 0, 5], 14).astype(np.int32)
    return {
        "static": masks.Full() if q_len == kv_len else masks.Causal().at(query_offset=0),
        "carried": masks.Causal().at(query_offset=jnp.asarray([9, -3]))
        & masks.Segments(jnp.asarray(ids[:q_len]), jnp.asarray(ids[:kv_len]))
        & masks.Lengths(jnp.asarray([kv_len - 7, 30]), jnp.asarray([q_len, q_len - 9])),
        "dense": seen(1, 4, 1, kv_len) | masks.SlidingWindow(3).at(query_offset=0),
    }[name]


def _poisoned(query, key, value, mask):
    """NaN in keys and values that no query sees, and in queries that see no key."""
    rows, q_len, heads, _ = query.shape
    kv_len, kv_heads = key.shape[1:3]
    visible = testing.reference_mask(mask, rows, heads, q_len, kv_len)
    by_key = visible.reshape(rows, kv_heads, -1, q_len, kv_len).any(axis=(2, 3)).swapaxes(1, 2)[..., None]
    by_query = visible.any(axis=3).swapaxes(1, 2)[..., None]
    return jnp.where(by_query, query, jnp.nan), *(jnp.where(by_key, array, jnp.nan) for array in (key, value))


@functools.cache
def _smoke(number, make_arrays):
    """A case: compiled, its operands, the cotangent, its options and the adapters it took."""
    case = SMOKE[number]
    q_len, kv_len, head_dim = case["sizes"]
    sizes = {"heads": 4, "kv_heads": case["kv_heads"], "batch": 2, "head_dim": head_dim, "value_dim": 16}
    *operands, d_out = make_arrays(q_len, kv_len, **sizes, dtype=case["dtype"])
    mask = _smoke_mask(case["mask"], q_len, kv_len)
    options = {"mask": mask}
    rng = np.random.default_rng(4)
    if "bias of queries" in case["extras"]:
        options |= {"bias": jnp.asarray(rng.standard_normal((2, 1, q_len, 1)), jnp.float32)}
    if "bias of pairs" in case["extras"]:
        options |= {"bias": jnp.asarray(rng.standard_normal((1, 4, q_len, kv_len)), jnp.float32)}
    if "soft cap" in case["extras"]:
        options |= {"soft_cap": 4.0, "scale": 0.7}
    if "after" in case["extras"]:
        options |= {"bias_after_cap": True}
    operands = [*_poisoned(*operands, mask)]
    if "sinks" in case["extras"]:
        operands.append(jnp.asarray([0.5, -1.0, 2.0, 0.0]))
    return *_program(operands, d_out, tiling=case["tiling"], **options), operands, d_out, options


@pytest.mark.parametrize("number", range(len(SMOKE)), ids=[" ".join(map(str, list(c.values())[:5])) for c in SMOKE])
def test_every_two_features_agree_with_the_oracle_whatever_hidden_slots_hold(number, make_arrays):
    """The last tiles hold queries that do not exist; what only those would see is hidden, too."""
    compiled, steps, operands, d_out, options = _smoke(number, make_arrays)
    _compare(compiled(*operands), operands, d_out, options)
    assert steps == (["sinks_from_lse"] if "sinks" in SMOKE[number]["extras"] else [])


def test_the_same_call_gives_the_same_bits(make_arrays):
    compiled, _, operands, _, _ = _smoke(0, make_arrays)
    for one, other in zip(compiled(*operands), compiled(*operands), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.sweep
@pytest.mark.parametrize("name", TILES[LENGTH])
def test_masks_agree_with_the_oracle(name, make_arrays):
    assert check(make_arrays(LENGTH, **GROUPED), mask=TILES[LENGTH][name]) == []


@pytest.mark.sweep
@pytest.mark.parametrize("shape", [(1, 1, 1, LENGTH), (2, 1, LENGTH, 1), (1, 4, 1, 1), (2, 4, LENGTH, LENGTH)])
def test_a_bias_broadcasts_along_every_axis(shape, make_arrays):
    bias = jnp.asarray(np.random.default_rng(4).standard_normal(shape), jnp.float32)
    check(make_arrays(LENGTH, **GROUPED), mask=masks.Causal(), bias=bias)


@pytest.mark.sweep
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (17, 90), (90, 17), (64, 64)])
def test_any_lengths_agree_with_the_oracle(q_len, kv_len, make_arrays):
    mask = masks.Causal().at(query_offset=kv_len - q_len)
    check(make_arrays(q_len, kv_len, heads=2), mask=mask)


@pytest.mark.sweep
@pytest.mark.parametrize("dims", [(80, 80), (192, 128), (16, 256)])
def test_head_dims_agree_with_the_oracle(dims, make_arrays, check_against_dense):
    arrays = make_arrays(40, head_dim=dims[0], value_dim=dims[1])
    check_against_dense("pallas_flash", arrays, mask=masks.Causal(), forward=5e-6, gradient=5e-5)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_agree_with_the_oracle(dtype, make_arrays):
    check(make_arrays(LENGTH, **GROUPED, dtype=dtype), mask=masks.Causal())


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


@functools.cache
def _runs():
    """The runs of queries and those of keys by name of a mask, in one program."""

    def run(named):
        parts = {name: mask.canonical() for name, mask in named.items()}
        found = {name: (Runs.of_queries(each, _grid()), Runs.of_keys(each, _grid())) for name, each in parts.items()}
        return {name: [(runs.full, runs.partial) for runs in both] for name, both in found.items()}

    return {name: [Runs(*runs) for runs in both] for name, both in jax.jit(run)(MASKS).items()}


def _visible(name):
    return testing.reference_mask(MASKS[name], 2, 4, LENGTH, LENGTH)


@pytest.mark.parametrize("name", MASKS)
def test_runs_visit_each_block_that_holds_anything_once_and_no_other_block_of_the_static_mask(name):
    kinds = MASKS[name].block_map(LENGTH, LENGTH, 16, 16)
    visible = _visible(name).any(axis=1)
    edge = -LENGTH % 16
    padded = np.pad(visible, ((0, 0), (0, edge), (0, edge)))
    holds = padded.reshape(len(padded), 4, 16, 4, 16).any(axis=(2, 4))
    for runs, turn in zip(_runs()[name], ((0, 1, 2), (0, 2, 1)), strict=True):
        visits = _visited(runs).transpose(turn)
        assert visits.max() <= 1
        assert (visits >= holds).all()
        assert (visits <= (kinds != BlockKind.EMPTY)[None]).all()


@pytest.mark.parametrize("name", MASKS)
def test_what_is_visited_without_a_mask_is_visible(name):
    visible = _visible(name)
    table = np.asarray(_runs()[name][0].full)
    for (row, own, _), (start, end) in zip(np.ndindex(table.shape[:3]), table.reshape(-1, 2), strict=True):
        rows = slice(None) if len(table) == 1 else slice(row, row + 1)
        assert visible[rows, :, own * 16 : own * 16 + 16, start * 16 : end * 16].all()
        assert end * 16 <= LENGTH or start == end


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(masks.Causal(), marks=pytest.mark.sweep),
        masks.SlidingWindow(20, 5),
        pytest.param(masks.Chunked(20), marks=pytest.mark.sweep),
        masks.Causal() & masks.Segments(jnp.zeros(LENGTH, jnp.int32)),
    ],
    ids=lambda mask: str(mask.form),
)
def test_key_blocks_computed_are_those_that_hold_anything(mask, make_arrays, monkeypatch):
    """Counted while the kernel runs."""
    counted = []
    plain = slots.load

    def counting(ref, part=None, width=None, **options):
        if part is not None and part.length == LENGTH and width == 32 and part.block == 16:
            jax.debug.callback(lambda start: counted.append(int(start)), part.start)
        return plain(ref, part, width, **options)

    monkeypatch.setattr("kernelry_gpu_pallas.pallas_flash.forward.load", counting)
    query, key, value, _ = make_arrays(LENGTH, head_dim=32, value_dim=16)
    with testing.interpret(), kernelry.use(tiling={**SMALL, "block_q": 32}):
        run = jax.jit(lambda *qkv: kernelry.attention(*qkv, mask=mask, mode="prefill", kernel="pallas_flash"))
        jax.block_until_ready(run(query, key, value))
        jax.effects_barrier()
    kinds = mask.block_map(LENGTH, LENGTH, 32, 16)
    assert len(counted) == 2 * (kinds != BlockKind.EMPTY).sum()  # two heads


def test_equal_segments_need_no_mask():
    """Where a whole row of the batch is one segment, the blocks below the diagonal are visited unmasked."""
    runs = _runs()["equal_segments"][0]
    full = np.asarray(runs.full[..., 1] - runs.full[..., 0]).sum(axis=(1, 2))
    assert full.tolist() == [4 * 3, 0]
    assert _visited(runs).sum(axis=(1, 2)).tolist() == [16, 4]


SHIFTED = masks.Predicate(shifted, jnp.asarray([[[[2]]], [[[9]]]]))


def test_a_predicate_with_arrays_goes_through_a_dense_mask(make_arrays):
    query, key, value, _ = make_arrays(LENGTH, **GROUPED)
    with testing.interpret(), kernelry.record() as resolutions:
        jax.eval_shape(lambda *qkv: kernelry.attention(*qkv, mask=SHIFTED, kernel="pallas_flash"), query, key, value)
    assert [step.adapter.name for step in resolutions[0].plan.steps] == ["dense_mask"]


@pytest.mark.sweep
def test_a_predicate_with_arrays_agrees_with_the_oracle(make_arrays):
    assert check(make_arrays(LENGTH, **GROUPED), mask=SHIFTED) == ["dense_mask"]


REQUEST = Request(
    target="gpu:h100", q_len=4096, kv_len=4096, q_heads=8, kv_heads=2, head_dim=128, dtype="bfloat16",
    mask=masks.Causal(), gradients=("query", "key", "value"),
)  # fmt: skip

PAIRS = {"bias": (1, 8, 4096, 4096), "mask": masks.Causal() & masks.Dense(jnp.ones((1, 1, 4096, 4096), bool))}


def _wrong_tilings(request):
    """What is wrong with the tilings for a request, or with its refusal."""
    if refused := PALLAS_FLASH.refusals(request, Environment()):
        told = "tiles of 16 × 16, the smallest, may take" in refused[0].detail
        is_small = request.dtype == "float32" and request.head_dim > 128 and available(request) == 101376
        return [] if told and is_small else [refused[0].detail]
    found = PALLAS_FLASH.tilings(request)
    for tiling in found:
        tilings.check(request, tiling)
    needs = [need for tiling in found for need in shared_memory.needs(request, dict(tiling.values)).values()]
    return [need for need in needs if not need.least <= need.most <= available(request)] if found else ["none"]


@pytest.mark.parametrize("pairs", [{}, PAIRS], ids=["", "pairs"])
def test_every_tiling_of_the_search_space_fits_shared_memory_or_there_is_none(pairs):
    targets = [kernelry.Target.parse(f"gpu{name}") for name in (":a100", ":a10g", ":h100", ":b200", "")]
    dims = [(64, 64), (80, 80), (192, 128), (256, 256)]
    wrong = {}
    for target, dtype, (head_dim, value_dim) in itertools.product(targets, ("bfloat16", "float32"), dims):
        facts = {"target": target, "dtype": dtype, "head_dim": head_dim, "value_dim": value_dim}
        wrong[str(facts)] = _wrong_tilings(dataclasses.replace(REQUEST, **facts, **pairs))
    assert {facts: problems for facts, problems in wrong.items() if problems} == {}


def test_rtx_blackwell_multiplies_as_ampere_does():
    """Without a warp group's products and without tensor memory; shared memory as of compute capability 8.6."""
    for dims in (64, 128, 256):
        one, other = (
            dataclasses.replace(REQUEST, target=kernelry.Target.parse(f"gpu:{kind}"), head_dim=dims, value_dim=dims)
            for kind in ("rtx5090", "a10g")
        )
        assert PALLAS_FLASH.tilings(one) == PALLAS_FLASH.tilings(other)
        assert shared_memory.needs(one, dict(PALLAS_FLASH.tilings(one)[0].values)) == shared_memory.needs(
            other, dict(PALLAS_FLASH.tilings(other)[0].values)
        )


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
        ({"block_q": 48}, "block_q=48 of pallas_flash is not a power of two"),
        ({"block_kv_dq": 8}, "block_kv_dq=8 of pallas_flash < 16"),
        ({"block_q_dkv": 512}, r"block_q_dkv=512, .* take at least \d+ bytes of shared memory > 232448 of gpu:h100"),
        ({"num_warps": 3}, "num_warps=3 of pallas_flash is not a power of two"),
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
    wide = Tiling.of(**{**dict(PALLAS_FLASH.tilings(on_hopper)[0].values), "block_q_dkv": 32, "block_kv_dkv": 128})
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
