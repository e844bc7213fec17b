"""dew_flash with plain JAX in place of the CUDA kernels, against the float64 oracle: plumbing, not their numbers.

The substitute leaves NaN, or what the two FlashAttentions make of it, wherever no document promises a result.
"""

import functools
import threading

import dew_flash_substitute
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dew_flash_substitute import INSTALLED, TARGETS, same, substitute
from pairs import covering

import kernelry
from kernelry import masks, testing
from kernelry.errors import KernelRefusedError
from kernelry.plugin import Inputs, Request, Tiling
from kernelry.testing.conformance import run
from kernelry_gpu_flash_attn.plugin import DEW_FLASH

IDS = np.repeat([[3, -1, 0, 5], [-2, 7, 7, 1]], [5, 11, 20, 12], axis=1)
"""Rows of runs; an id of 0 is one like another, and negative ids attend to nothing."""
LENGTHS = np.array([20, 0], np.int32)
FORMS = [
    masks.Full(),
    masks.Causal(),
    masks.SlidingWindow(5),
    masks.SlidingWindow(3, 7),
    masks.SlidingWindow(1000, 4),
    masks.Causal() & masks.Segments(IDS),
    masks.SlidingWindow(4, 2) & masks.Segments(IDS[0]),
    masks.Segments(IDS),
    masks.Lengths(LENGTHS),
    masks.Lengths(np.array([48, 9], np.int32), np.array([0, 30], np.int32)),
]
SINKS = jnp.asarray([-1.0, 0.0, 1.0, 2.0])


@pytest.fixture
def arrays(make_arrays):
    def make(q_len=48, kv_len=None, **options):
        sizes = {"heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float16", "batch": 2}
        return make_arrays(q_len, kv_len, **{**sizes, **options})

    return make


def check(arrays, target="gpu:a100", extras=None, **options):
    """Compares output and gradients with the oracle; returns the adapters that the call took."""
    extras, (*operands, d_out) = extras or {}, arrays
    dtype = str(d_out.dtype)

    def attend(query, key, value, extras):
        return kernelry.attention(query, key, value, kernel="dew_flash", **extras, **options)

    with substitute(target), kernelry.record() as resolutions:
        out, gradients = _pulled(attend, d_out, *operands, extras)
    wanted, wanted_gradients = _wanted(arrays, extras, **options)
    assert out.dtype == d_out.dtype
    same(out, wanted, dtype)
    jax.tree.map(lambda found, right: same(found, right, dtype), gradients, wanted_gradients)
    return [step.adapter.name for step in resolutions[0].plan.steps]


def _pulled(attend, d_out, *operands):
    def run(d_out, *operands):
        out, pull = jax.vjp(attend, *operands)
        return out, pull(d_out.astype(out.dtype))

    return jax.jit(run)(d_out, *operands)


def _wanted(arrays, extras=None, **options):
    wide, extras = jax.tree.map(lambda array: np.asarray(array, np.float64), (arrays, extras or {}))
    found = testing.reference_gradients(*wide[:3], d_out=wide[3], **extras, **options)
    shares = {name: getattr(found, name) for name in extras}
    out = testing.reference_attention(*wide[:3], **extras, **options).out
    return out, (found.query, found.key, found.value, shares)


MORE = pytest.mark.sweep
SMOKE = covering(
    mask=[FORMS[1], FORMS[3], FORMS[5], FORMS[9]],
    target=list(TARGETS),
    sinks=[False, True],
    dtype=["float16", "bfloat16"],
    kv_heads=[2, 1, 4],
    scale=[None, 0.3],
)


@pytest.mark.parametrize("case", SMOKE, ids=lambda case: " ".join(map(str, case.values())))
def test_every_two_features_agree_with_the_oracle(case, arrays):
    dtype = case["dtype"]
    extras = {"sinks": SINKS.astype(dtype)} if case["sinks"] else {}
    given = arrays(kv_heads=case["kv_heads"], dtype=dtype)
    adapters = check(given, case["target"], extras, mask=case["mask"], scale=case["scale"])
    assert ("sinks_from_lse" in adapters) == case["sinks"]
    assert "repeat_kv_heads" not in adapters


@MORE
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mask", FORMS, ids=str)
def test_every_mask_on_both_kernels(mask, target, arrays):
    check(arrays(), target, mask=mask)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("q_len", "kv_len", "mask"),
    [
        pytest.param(24, 40, masks.Causal().at(query_offset=16), marks=MORE),
        (40, 24, masks.Causal().at(kv_offset=16)),  # the first 16 queries see nothing
        (24, 40, masks.SlidingWindow(6, 3).at(query_offset=16)),
        pytest.param(40, 24, masks.SlidingWindow(6, 3).at(query_offset=-16), marks=MORE),
        pytest.param(24, 40, masks.SlidingWindow(6, 1000).at(query_offset=16), marks=MORE),
        pytest.param(40, 24, masks.Full(), marks=MORE),
        pytest.param(40, 24, masks.Lengths(LENGTHS), marks=MORE),
        pytest.param(1, 40, masks.Causal().at(query_offset=39), marks=MORE),
    ],
    ids=str,
)
def test_the_last_query_is_aligned_with_the_last_key(q_len, kv_len, mask, target, arrays):
    check(arrays(q_len, kv_len), target, mask=mask)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 24), pytest.param(32, 16, marks=MORE), (13, 13)])
def test_other_head_dims_are_padded(head_dim, value_dim, arrays):
    assert check(arrays(head_dim=head_dim, value_dim=value_dim), mask=masks.Causal()) == ["pad_head_dim"]


def _steps(mask, arrays):
    """The adapters of a call that is traced only."""
    with substitute(), kernelry.record() as resolutions:
        jax.eval_shape(lambda *qkv: kernelry.attention(*qkv, mask=mask, kernel="dew_flash"), *arrays[:3])
    return [step.adapter.name for step in resolutions[0].plan.steps]


@pytest.mark.parametrize("mask", [masks.Full(), masks.Causal(), masks.SlidingWindow(5, 2)], ids=str)
def test_no_adapter_where_each_query_sees_a_key(mask, arrays):
    assert _steps(mask, arrays()) == []


def _attended(target, mask, arrays, **options):
    attend = jax.jit(lambda *qkv: kernelry.attention(*qkv, mask=mask, kernel="dew_flash", **options))
    with substitute(target):
        return attend(*arrays[:3])


@pytest.mark.parametrize(
    ("ids", "target"),
    [(np.repeat([1, 2, 1], 16), TARGETS[0]), (np.arange(48), TARGETS[1])],
    ids=["an id in two runs", "48 runs"],
)
def test_ids_that_packed_sequences_cannot_express_give_nan_in_their_row_alone(target, ids, arrays):
    given, rows = arrays(), np.stack([np.zeros_like(ids), ids])
    with substitute(target):
        attend = functools.partial(kernelry.attention, mask=masks.Segments(rows), kernel="dew_flash")
        out, gradients = _pulled(attend, given[3], *given[:3])
    for array in (out, *gradients):
        assert np.isfinite(array[0]).all()
        assert np.isnan(array[1]).all()


def test_more_runs_are_a_tunable(arrays):
    given = arrays()
    with substitute(), kernelry.use(tiling={"max_segments": 48}):
        out = jax.jit(lambda *qkv: kernelry.attention(*qkv, mask=masks.Segments(np.arange(48)), kernel="dew_flash"))
        same(out(*given[:3]), np.repeat(given[2], 2, axis=2))


@pytest.mark.parametrize(
    ("mask", "target"),
    [
        (FORMS[5], TARGETS[0]),
        (FORMS[5], TARGETS[1]),
        (FORMS[9], TARGETS[0]),
        pytest.param(FORMS[9], TARGETS[1], marks=MORE),
        pytest.param(FORMS[1], TARGETS[0], marks=MORE),
    ],
    ids=str,
)
def test_partial_holds_a_natural_float32_lse(mask, target, arrays):
    given = arrays()
    found = _attended(target, mask, given, mode="prefill", return_partial=True)
    assert found.lse.dtype == jnp.float32
    wanted = testing.reference_attention(*given[:3], mask=mask).lse
    np.testing.assert_allclose(found.lse, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", [TARGETS[0], pytest.param(TARGETS[1], marks=MORE)])
def test_merged_parts_have_the_gradients_of_the_whole(target, arrays):
    query, key, value, d_out = arrays()

    def merged(query, key, value):
        halves = [
            kernelry.attention(query, key[:, part], value[:, part], mask=mask, kernel="dew_flash", return_partial=True)
            for part, mask in ((slice(24), masks.Lengths([24, 0])), (slice(24, None), masks.Lengths([11, 24])))
        ]
        return kernelry.finalize(kernelry.merge(halves))

    with substitute(target):
        out, gradients = _pulled(merged, d_out, query, key, value)
    visible = np.ones((2, 1, 1, 48), bool)
    visible[0, ..., 35:] = visible[1, ..., :24] = False
    wanted, wanted_gradients = _wanted((query, key, value, d_out), mask=masks.Dense(visible))
    same(out, wanted)
    for found, right in zip(gradients, wanted_gradients, strict=False):
        same(found, right)


@pytest.mark.parametrize("target", [TARGETS[0], pytest.param(TARGETS[1], marks=MORE)])
@pytest.mark.parametrize("mask", [masks.Causal(), FORMS[7], pytest.param(FORMS[8], marks=MORE)], ids=str)
def test_infinite_lse_contributes_no_gradient(mask, target, arrays):
    query, key, value, d_out = arrays()
    sizes = {"batch": 2, "q_len": 48, "q_heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float16"}
    request = Request(target=target, mask=mask, **sizes)
    lse, tiling = jnp.full((2, 4, 48), jnp.inf), DEW_FLASH.tilings(request)[0]
    with substitute(target):
        body, inputs = DEW_FLASH.body(), Inputs(query, key, value, mask=(mask,))
        found = jax.jit(lambda: _three(body.backward(inputs, request, tiling, d_out, lse, d_out, None)))()
    for share in found:
        np.testing.assert_array_equal(share, 0.0)


def _three(gradients):
    return gradients.query, gradients.key, gradients.value


@pytest.mark.parametrize("target", [TARGETS[0], pytest.param(TARGETS[1], marks=MORE)])
def test_nan_in_hidden_slots_never_leaks(target, arrays):
    query, key, value, d_out = arrays()
    hidden = (IDS < 0)[..., None, None]
    poisoned = tuple(jnp.where(hidden, jnp.nan, array) for array in (query, key, value, d_out))

    def attend(*operands):
        return kernelry.attention(*operands, mask=masks.Causal() & masks.Segments(IDS), kernel="dew_flash")

    with substitute(target):
        found, clean = (_pulled(attend, given[3], *given[:3]) for given in (poisoned, (query, key, value, d_out)))
    jax.tree.map(np.testing.assert_array_equal, found, clean)


@pytest.mark.parametrize(
    ("masked", "target"),
    [
        pytest.param("by no ids", TARGETS[0], marks=MORE),
        ("by no ids", TARGETS[1]),
        ("by mapped ids", TARGETS[0]),
        pytest.param("by mapped ids", TARGETS[1], marks=MORE),
        pytest.param("by ids for all", TARGETS[0], marks=MORE),
    ],
)
def test_vmap_of_gradients_twice(masked, target, arrays):
    """The axes join the batch; the second array of ids is mapped by the inner axis alone."""
    stacked = tuple(jnp.stack([jnp.stack([array, array[::-1]])] * 2) for array in arrays())
    ids = np.stack([IDS, IDS[::-1]])

    def mask_of(ids):
        given = {"by no ids": [], "by mapped ids": [masks.Segments(ids)], "by ids for all": [masks.Segments(IDS)]}
        return functools.reduce(lambda one, other: one & other, given[masked], masks.Causal())

    def attend(query, key, value, ids):
        sinks = jnp.ones(4, query.dtype)
        return kernelry.attention(query, key, value, mask=mask_of(ids), kernel="dew_flash", sinks=sinks)

    def pulled(query, key, value, ids, d_out):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, ids), query, key, value)
        return out, *pull(d_out)

    inner = jax.vmap(pulled)
    with substitute(target):
        found = jax.jit(jax.vmap(inner, in_axes=(0, 0, 0, None, 0)))(*stacked[:3], jnp.asarray(ids), stacked[3])
    for at in range(2):
        one = tuple(array[1, at] for array in stacked)
        wanted, wanted_gradients = _wanted(one, mask=mask_of(ids[at]), sinks=np.ones(4))
        for array, right in zip(found, (wanted, *wanted_gradients[:3]), strict=True):
            same(array[1, at], right)


def test_a_batch_beyond_a_grid_is_refused_where_vmap_makes_it(make_arrays):
    query, key, value, _ = make_arrays(8, heads=1, kv_heads=1, head_dim=8, dtype="float16", batch=1)
    request = Request(q_len=8, q_heads=1, head_dim=8, dtype="float16", mask=masks.Segments([0] * 8), target=TARGETS[0])

    def attend(query):
        inputs = Inputs(query, key, value, mask=(masks.Segments([0] * 8),))
        return DEW_FLASH.body().forward(inputs, request, Tiling.of(max_segments=8), statistics=False).out

    with substitute(), pytest.raises(KernelRefusedError, match="65544 packed sequences > 65535, CUDA's limit of a gri"):
        jax.eval_shape(jax.vmap(attend), jnp.broadcast_to(query, (8193, *query.shape)))


@pytest.mark.skipif(not INSTALLED, reason="dew-flash-attn is not installed")
@pytest.mark.parametrize("mask", [masks.Causal(), masks.SlidingWindow(5, 2), FORMS[5]], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_sinks_are_those_of_the_vendor(mask, target, arrays):
    """Core's adapter and the vendor's own code say the same of sinks, gradients included."""
    import dew_flash_attn

    from kernelry_gpu_flash_attn.dew_flash import _vendor

    query, key, value, d_out = arrays()
    packed = mask is FORMS[5]
    starts = jnp.asarray([0, 5, 16, 36, 48, 53, 84, 96]) if packed else None
    left, right = {"window(5, 2)": (5, 2)}.get(str(mask.form), (-1, -1))

    def theirs(query, key, value, sinks):
        if not packed:
            options = {"is_causal": (left, right) == (-1, -1), "window_size": (left, right)}
            return dew_flash_attn.flash_mha(query, key, value, sinks=sinks, **options)
        flat = (array.reshape(-1, *array.shape[2:]) for array in (query, key, value))
        out = dew_flash_attn.flash_mha_varlen(*flat, starts, 48, is_causal=True, sinks=sinks)
        live = (IDS >= 0)[..., None, None]
        return jnp.where(live, out.reshape(query.shape), 0)

    def ours(query, key, value, sinks):
        return kernelry.attention(query, key, value, mask=mask, kernel="dew_flash", sinks=sinks)

    if packed:
        live = (IDS >= 0)[..., None, None]
        query, key, value, d_out = (jnp.where(live, array, 0) for array in (query, key, value, d_out))
    with substitute(target):
        found = _pulled(ours, d_out, query, key, value, SINKS)
        with jax.numpy_rank_promotion("allow"), _vendor._answering(kernelry.Target.parse(target)):
            wanted = _pulled(theirs, d_out, query, key, value, SINKS)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3), found, wanted)


def test_a_thread_for_the_own_gpu_waits_for_one_for_another(monkeypatch):
    with substitute():
        import dew_flash_attn

        from kernelry_gpu_flash_attn.dew_flash import _vendor
    here, there = kernelry.Target.parse("gpu:a100"), kernelry.Target.parse("gpu:h100")
    monkeypatch.setattr(_vendor, "_is_here", lambda target: target == here)
    monkeypatch.setattr(dew_flash_attn, "_hopper", own := lambda: "own", raising=False)
    inside, seen = threading.Event(), []

    def second():
        inside.wait()
        with _vendor._answering(here):
            seen.append(dew_flash_attn._hopper)

    waiting = threading.Thread(target=second)
    waiting.start()
    with _vendor._answering(there):
        inside.set()
        waiting.join(0.3)
        assert waiting.is_alive()
        assert dew_flash_attn._hopper() is True
        assert _vendor.is_hopper(there)
    waiting.join()
    assert seen == [own]


@pytest.mark.sweep
@pytest.mark.parametrize("quick", [True, False], ids=["quick", "whole"])
def test_conformance_kit_finds_ids_in_several_runs_and_nothing_else(quick):
    with dew_flash_substitute.on_cpu() as spec:
        report = run(spec, quick=quick)
    assert report.ok, [(case.name, case.detail) for case in report.failures]
    assert report.served >= (30 if quick else 65)
