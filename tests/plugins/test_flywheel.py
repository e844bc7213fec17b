"""flywheel in interpret mode against float64; its programs next to the vendor's own; JAX's transformations.

flywheel-tpu needs Python 3.12. Nothing here runs on a TPU.
"""

import contextlib
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rematerialised
from jax.sharding import AbstractDevice, AbstractMesh

import kernelry
from kernelry import masks, testing
from kernelry.errors import KernelRefusedError
from kernelry.execution.attend import BoundKernel, attend
from kernelry.kernel.proof import check_program
from kernelry.kernel.spec import Inputs
from kernelry.request.request import Request
from kernelry_tpu_flywheel.plugin import FLYWHEEL

pytest.importorskip("flywheel_tpu")

from flywheel_tpu import flash_attn_func, flash_attn_varlen_func
from flywheel_tpu.flash_attn_interface import default_block_sizes
from flywheel_tpu.pallas.bwd_pipeline import default_bwd_block

pytestmark = pytest.mark.versions

CLOSE = {"forward": 2e-2, "gradient": 4e-2}
SMALL = {
    "block_q": 128,
    "block_kv": 128,
    "block_q_compute": 64,
    "block_kv_compute": 128,
    "block_q_bwd": 128,
    "block_kv_bwd": 128,
    "block_q_compute_bwd": 128,
    "block_kv_compute_bwd": 128,
}
"""Without it, one block would hold the whole test."""
SINKS = jnp.asarray([-1.0, 2.0])
CAUSAL = masks.Causal()


@pytest.mark.parametrize(
    ("mask", "lengths", "sizes", "options"),
    [
        (CAUSAL, (200, 200), {"batch": 2}, {}),
        (masks.Full(), (100, 256), {"head_dim": 8, "value_dim": 48}, {"scale": 0.3}),
        (CAUSAL.at(query_offset=-40), (256, 128), {"head_dim": 96, "value_dim": 32}, {"sinks": SINKS}),
        (CAUSAL.at(query_offset=20), (128, 384), {}, {"tiling": {}}),
    ],
    ids=["causal", "full", "rows_without_keys_and_sinks", "keys_that_no_row_sees"],
)
def test_output_and_gradients_agree_with_float64(mask, lengths, sizes, options, make_arrays, check_against_dense):
    arrays = make_arrays(*lengths, dtype="bfloat16", **sizes)
    check_against_dense("flywheel", arrays, mask=mask, **{"tiling": SMALL, **options}, **CLOSE)


IDS = np.stack([np.repeat([3, -1, 0, 5], 64), np.repeat([2, 7], 128)])


@pytest.mark.parametrize(
    ("mask", "lengths", "tiling"),
    [
        (masks.SlidingWindow(40, 30), (256, 256), SMALL),
        (masks.SlidingWindow(150, 0).at(query_offset=-30), (256, 128), {}),
        (CAUSAL & masks.Segments(IDS), (256, 256), SMALL),
        (masks.SlidingWindow(40, 9) & masks.Segments(jnp.asarray(IDS)), (256, 256), {}),
    ],
    ids=["window", "window_behind_the_keys", "causal_segments", "traced_segments_in_a_window"],
)
def test_what_has_no_gradient_agrees_with_float64(mask, lengths, tiling, make_arrays):
    query, key, value, _ = make_arrays(*lengths, dtype="bfloat16", batch=2)
    with testing.interpret(), kernelry.use(tiling=tiling):
        found = kernelry.attention(
            query, key, value, mask=mask, soft_cap=5.0, kernel="flywheel", mode="prefill", return_partial=True
        )
    wanted = testing.reference_attention(*_wide(query, key, value), mask=mask, soft_cap=5.0)
    np.testing.assert_allclose(np.asarray(found.out, np.float32), wanted.out, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(found.lse, wanted.lse, rtol=2e-2, atol=2e-2)
    empty = np.isneginf(wanted.lse)
    assert (np.asarray(found.out, np.float32).swapaxes(1, 2)[empty] == 0).all()


def _wide(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


@jax.jit
def _packed(query, key, value, ids):
    mask = CAUSAL & masks.Segments(ids)
    return kernelry.attention(query, key, value, mask=mask, kernel="flywheel", mode="prefill")


def test_segments_in_any_order_are_served_and_vmap_puts_its_axis_into_the_batch(make_arrays):
    query, key, value, _ = make_arrays(128, dtype="bfloat16", batch=6)
    ids = np.random.default_rng(1).integers(-1, 4, (6, 128))
    mask = CAUSAL & masks.Segments(ids)
    wanted = testing.reference_attention(*_wide(query, key, value), mask=mask).out
    arrays = (query, key, value, jnp.asarray(ids))
    with testing.interpret():
        found = jax.vmap(_packed)(*(array.reshape(3, 2, *array.shape[1:]) for array in arrays))
    np.testing.assert_allclose(np.asarray(found, np.float32).reshape(wanted.shape), wanted, rtol=2e-2, atol=2e-2)


def test_ids_that_no_packed_row_may_hold_give_nan_or_an_error(make_arrays):
    query, key, value, _ = make_arrays(128, dtype="bfloat16", batch=2)
    ids = np.stack([np.repeat([0, 1, 0, 2], 32), np.repeat([0, 1, 2, 3], 32)])

    def run(ids):
        mask = masks.SlidingWindow(9) & masks.Segments(ids)
        return kernelry.attention(query, key, value, mask=mask, kernel="flywheel", mode="prefill")

    with testing.interpret(), pytest.raises(KernelRefusedError, match=r"id 0 of row 0 .* more than one run"):
        run(ids)
    with testing.interpret():
        found = np.asarray(jax.jit(run)(jnp.asarray(ids)), np.float32)
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()


def test_too_many_segments_of_a_row_give_nan(make_arrays):
    query, key, value, _ = make_arrays(128, dtype="bfloat16", batch=2)
    ids = jnp.asarray(np.stack([np.repeat([0, 1, 2, 3], 32), np.repeat([0, 1], 64)]))
    with testing.interpret(), kernelry.use(tiling={"max_segments": 2}):
        found = np.asarray(_packed(query, key, value, ids), np.float32)
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()


def _loss(query, key, value):
    out = kernelry.attention(query, key, value, mask=CAUSAL, kernel="flywheel")
    return jnp.sin(out.astype(jnp.float32)).sum()


def test_gradients_under_vmap_and_scan_are_those_without(make_arrays):
    query, key, value, _ = make_arrays(128, dtype="bfloat16", batch=4)
    stacked = [array.reshape(2, 2, *array.shape[1:]) for array in (query, key, value)]

    def in_a_scan(query, keys, values):
        return jax.lax.scan(lambda total, each: (total + _loss(query[0], *each), None), 0.0, (keys, values))[0]

    def in_a_vmap(query, keys, values):
        return jax.vmap(_loss, in_axes=(None, 0, 0))(query[0], keys, values).sum()

    def plain(query, keys, values):
        return sum(_loss(query[0], *each) for each in zip(keys, values, strict=True))

    with testing.interpret():
        found = jax.jit(lambda *arrays: [jax.grad(f, (0, 1, 2))(*arrays) for f in (plain, in_a_vmap, in_a_scan)])(
            *stacked
        )
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(two, np.float32), rtol=2e-2, atol=2e-2)
    assert all(np.asarray(gradient, np.float32).any() for gradient in found[0])


def test_saving_what_has_the_name_runs_no_kernel_again(make_arrays):
    """In programs for TPUs: JAX's interpreter of their kernels has effects that `jax.checkpoint` does not allow."""
    with _on("tpu:v6e"):
        rematerialised.check(_loss, *make_arrays(128, dtype="bfloat16")[:3])


def _in_two_parts(query, key, value, sinks):
    """Causal attention whose second half of the keys hides from the first half of the queries."""
    cuts = ((slice(None, 128), CAUSAL.at(query_offset=0)), (slice(128, None), CAUSAL.at(kv_offset=128)))
    parts, inputs = [], []
    for cut, mask in cuts:
        request = _request(query, key[:, cut], value, mask, target="cpu", interpret=True)
        parts.append(BoundKernel(FLYWHEEL, request, FLYWHEEL.tilings(request)[0]))
        inputs.append(Inputs(query, key[:, cut], value[:, cut], mask.canonical()))
    return attend(tuple(parts), tuple(inputs), sinks=sinks, statistics=False).out


def _request(query, key, value, mask, **options):
    sizes = {"batch": query.shape[0], "q_len": query.shape[1], "kv_len": key.shape[1]}
    heads = {"q_heads": query.shape[2], "kv_heads": key.shape[2]}
    dims = {"head_dim": query.shape[3], "value_dim": value.shape[3], "dtype": "bfloat16"}
    return Request(**{**sizes, **heads, **dims, "mask": mask, **options})


def test_two_parts_merge_to_the_whole(make_arrays):
    query, key, value, d_out = make_arrays(dtype="bfloat16")

    @jax.jit
    def run(*operands):
        out, pull = jax.vjp(_in_two_parts, *operands)
        return out, pull(d_out.astype(out.dtype))

    found, gradients = run(query, key, value, SINKS)
    whole = {"mask": CAUSAL, "sinks": np.asarray(SINKS)}
    arrays = _wide(query, key, value)
    wanted = testing.reference_gradients(*arrays, d_out=np.asarray(d_out, np.float64), **whole)
    right = testing.reference_attention(*arrays, **whole).out
    np.testing.assert_allclose(np.asarray(found, np.float32), right, rtol=2e-2, atol=2e-2)
    for mine, name in zip(gradients, ("query", "key", "value", "sinks"), strict=True):
        np.testing.assert_allclose(np.asarray(mine, np.float32), getattr(wanted, name), rtol=4e-2, atol=4e-2)


@pytest.mark.parametrize("total", [np.inf, -np.inf])
def test_an_infinite_lse_contributes_no_gradient(total, make_arrays):
    query, key, value, d_out = make_arrays(128, dtype="bfloat16")
    request = _request(query, key, value, CAUSAL, target="cpu", interpret=True)
    with testing.interpret():
        shares = FLYWHEEL.body().backward(
            Inputs(query, key, value, CAUSAL.canonical()),
            request,
            FLYWHEEL.tilings(request)[0],
            d_out,
            jnp.full((1, 2, 128), total),
            d_out,
            None,
        )
    for share in (shares.query, shares.key, shares.value):
        np.testing.assert_array_equal(np.asarray(share, np.float32), 0.0)


def test_what_hidden_slots_hold_is_cleaned_before(make_arrays):
    query, key, value, d_out = make_arrays(128, 256, dtype="bfloat16")
    mask = CAUSAL.at(query_offset=9)

    @jax.jit
    def run(query, key, value):
        out, pull = jax.vjp(lambda *a: kernelry.attention(*a, mask=mask, kernel="flywheel"), query, key, value)
        return out, pull(d_out)

    with testing.interpret(), kernelry.record() as resolutions:
        clean = run(query, key, value)
        dirty = run(query, *(array.at[:, 140:].set(jnp.nan) for array in (key, value)))
    assert [step.adapter.name for step in resolutions[0].plan.steps] == ["clean_hidden_slots"]
    for one, two in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(two, np.float32))


def test_a_length_that_fills_no_block_is_padded_and_hidden_by_segments(make_arrays):
    query, key, value, _ = make_arrays(200, dtype="bfloat16")
    with testing.interpret(), kernelry.record() as resolutions:
        found = kernelry.attention(query, key, value, kernel="flywheel", mode="prefill")
    assert next(step.adapter.name for step in resolutions[0].plan.steps) == "pad_sequence"
    wanted = testing.reference_attention(*_wide(query, key, value), mask=masks.Full()).out
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted, rtol=2e-2, atol=2e-2)


CHIPS = {"tpu:v5e": "TPU v5 lite", "tpu:v6e": "TPU v6 lite", "tpu:tpu7x": "TPU7x"}


def _on(target):
    device = AbstractDevice(CHIPS[target], 1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device)
    stack = contextlib.ExitStack()
    stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
    stack.enter_context(kernelry.use(target=target))
    return stack


def _forward(query, key, value, mask=CAUSAL, **options):
    return kernelry.attention(query, key, value, mask=mask, kernel="flywheel", mode="prefill", **options)


def _limits(function, arrays, target):
    """The memory that each kernel of a program may take, in MiB."""
    with _on(target):
        program = jax.make_jaxpr(function)(*arrays)
    return [int(size) >> 20 for size in re.findall(r"vmem_limit_bytes=(\d+)", str(program))]


@pytest.mark.parametrize(("target", "room"), [("tpu:v5e", 100), ("tpu:v6e", 100), ("tpu:tpu7x", 64)])
def test_the_vendor_is_answered_for_the_target(target, room, make_arrays):
    arrays = make_arrays(256, head_dim=128, dtype="bfloat16")
    _query, _key, _value, d_out = arrays

    def backward(query, key, value):
        return jax.vjp(lambda *a: kernelry.attention(*a, mask=CAUSAL, kernel="flywheel"), query, key, value)[1](d_out)

    assert _limits(_forward, arrays[:3], target) == [room]
    assert _limits(backward, arrays[:3], target) == [room] * 2


def test_rows_of_a_packed_program_begin_where_the_target_tiles_them(make_arrays):
    """Where sequences begin is rounded down to rows of a tile: 8, and on TPU7x 16."""
    query, key, value, _ = make_arrays(256, dtype="bfloat16")

    def run(query, key, value, ids):
        return _forward(query, key, value, masks.Segments(ids))

    programs = {}
    for target in CHIPS:
        with _on(target):
            [[_, *programs[target]]] = _kernels(run, query, key, value, jnp.asarray(IDS[:1]))
    assert programs["tpu:v5e"] == programs["tpu:v6e"] != programs["tpu:tpu7x"]


def test_answers_for_a_target_are_of_one_thread_and_of_the_call_alone(make_arrays):
    arrays = make_arrays(256, head_dim=128, dtype="bfloat16")[:3]
    found = {}

    def trace(target):
        found[target] = _limits(_forward, arrays, target)

    threads = [threading.Thread(target=trace, args=(name,)) for name in CHIPS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"tpu:v5e": [100], "tpu:v6e": [100], "tpu:tpu7x": [64]}
    direct = str(jax.make_jaxpr(lambda q, k, v: flash_attn_func(q, k, v, causal=True))(*_heads_first(*arrays)))
    assert re.findall(r"vmem_limit_bytes=(\d+)", direct) == [str(100 << 20)]


def _heads_first(*arrays):
    return [array.swapaxes(1, 2) for array in arrays]


def _kernels(function, *arrays):
    """The kernels of a program, each as lines of text: what they compute, and how they are to be compiled."""
    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                found.append([str(equation.params["compiler_params"]), *_lines(equation.params["jaxpr"])])
                continue
            for inside in _inside(equation):
                walk(inside)

    walk(jax.make_jaxpr(function)(*arrays).jaxpr)
    return found


def _inside(equation):
    for each in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
        if _is_program(each):
            yield getattr(each, "jaxpr", each)


def _is_program(leaf):
    return hasattr(getattr(leaf, "jaxpr", leaf), "eqns")


def _lines(jaxpr):
    """The operations of a kernel in order: names, kinds of operands, constants; not how variables are called."""
    for equation in jaxpr.eqns:
        operands = [getattr(each, "val", each.aval) for each in equation.invars]
        results = [each.aval for each in equation.outvars]
        plain = {name: value for name, value in equation.params.items() if not isinstance(value, tuple | list)}
        told = {name: value for name, value in plain.items() if not _is_program(value) and isinstance(value, _PLAIN)}
        yield f"{equation.primitive.name} {operands} {results} {told}"
        for inside in _inside(equation):
            yield from _lines(inside)


_PLAIN = (bool, int, float, str)


DIRECT = {
    "full": (masks.Full(), {}),
    "causal": (CAUSAL, {"causal": True}),
    "window": (masks.SlidingWindow(600), {"causal": True, "window_size": (600, -1)}),
    "capped": (masks.SlidingWindow(600), {"window_size": (600, 0), "softcap": 7.0}),
}


@pytest.mark.parametrize("name", DIRECT)
def test_a_forward_program_is_the_vendors_own(name, make_arrays):
    mask, options = DIRECT[name]
    arrays = make_arrays(2048, heads=4, kv_heads=2, head_dim=64, dtype="bfloat16")[:3]
    cap = options.get("softcap")
    with _on("tpu:v6e"):
        mine = _kernels(lambda *a: _forward(*a, mask, soft_cap=cap), *arrays)
    theirs = _kernels(lambda *a: flash_attn_func(*_heads_first(*a), **options), *arrays)
    assert mine == theirs
    assert len(mine) == 1


def test_a_packed_program_is_the_vendors_own(make_arrays):
    query, key, value, _ = make_arrays(256, heads=4, kv_heads=2, head_dim=64, dtype="bfloat16")
    ids = np.repeat([0, 1], 128)[None]

    def direct(query, key, value):
        starts = jnp.asarray([0, 128, 256], jnp.int32)
        arrays = (array[0].swapaxes(0, 1) for array in (query, key, value))
        return flash_attn_varlen_func(*arrays, starts, starts, 256, 256, causal=True)

    with _on("tpu:v6e"):
        mine = _kernels(lambda *a: _forward(*a, CAUSAL & masks.Segments(ids)), query, key, value)
    assert mine == _kernels(direct, query, key, value)


def test_a_training_program_is_the_vendors_own(make_arrays):
    query, key, value, d_out = make_arrays(1024, heads=4, kv_heads=2, head_dim=64, dtype="bfloat16")

    def mine(*arrays):
        return jax.vjp(lambda *a: kernelry.attention(*a, mask=CAUSAL, kernel="flywheel"), *arrays)[1](d_out)

    def theirs(*arrays):
        return jax.vjp(lambda *a: flash_attn_func(*_heads_first(*a), causal=True).swapaxes(1, 2), *arrays)[1](d_out)

    with _on("tpu:v6e"):
        found = _kernels(mine, query, key, value)
    assert found == _kernels(theirs, query, key, value)
    assert len(found) == 2


def test_a_lowered_program_holds_the_kernel(make_arrays):
    query, key, value, d_out = make_arrays(128, dtype="bfloat16")

    def run(*arrays):
        return jax.vjp(lambda *a: kernelry.attention(*a, mask=CAUSAL, kernel="flywheel"), *arrays)[1](d_out)

    with _on("tpu:v6e"), kernelry.record() as resolutions:
        lowered = jax.jit(run).trace(query, key, value).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("@tpu_custom_call") == 2
    check_program(FLYWHEEL, resolutions[0].request, lowered)


def test_the_first_tiling_is_the_vendors_choice():
    windows = [None, 1, 100, 1024, 5000]
    for q_len, kv_len in ((128, 128), (384, 2048), (2048, 2048), (2176, 2176), (4096, 8192), (3072, 6144)):
        for head_dim in (64, 128, 256):
            for window in windows:
                offset = kv_len - q_len
                mask = CAUSAL.at(query_offset=offset)
                if window is not None:
                    mask = masks.SlidingWindow(window).at(query_offset=offset)
                request = Request(q_len=q_len, kv_len=kv_len, head_dim=head_dim, mask=mask, dtype="bfloat16")
                values = dict(FLYWHEEL.tilings(request)[0].values)
                reach = -1 if window is None or window >= kv_len - 1 else window
                wanted = default_block_sizes(q_len, kv_len, window_size=(reach, -1), head_dim=head_dim)
                assert values["block_q"] == wanted.block_q, (request, wanted)
                assert values["block_kv"] == wanted.block_kv, (request, wanted)
                assert values["block_q_compute"] == wanted.block_q_compute, (request, wanted)
                assert values["block_kv_compute"] == wanted.block_kv_compute, (request, wanted)
                assert values["block_q_bwd"] == default_bwd_block(q_len)
                assert values["block_kv_bwd"] == default_bwd_block(kv_len)
