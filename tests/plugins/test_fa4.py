"""fa4 with the vendor's Python, without a GPU: its reference backend through core's adapters against the oracle.

What runs on a GPU is other code. Here the masks, the operands, the layout and the statistics are proven, and, with the
backend `GIVEN`, that gradients are asked for with the output and logsumexp of the whole attention.
"""

import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import masks, testing
from kernelry.plugin import Inputs, Tiling
from kernelry.request.request import Request

pytest.importorskip("fa4_jax")

import fa4_jax
import fa4_on_cpu

from kernelry.testing.conformance import run
from kernelry_gpu_flash_attn.fa4 import _vendor
from kernelry_gpu_flash_attn.fa4.kernel import Fa4Kernel
from kernelry_gpu_flash_attn.fa4.spec import FA4, GENERATIONS

pytestmark = pytest.mark.versions

B, T, S, N, K, H, D = 2, 24, 40, 4, 2, 16, 24
RNG = np.random.default_rng(5)
ARRAYS = tuple(
    jnp.asarray(RNG.standard_normal(shape), jnp.float32)
    for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, D), (B, T, N, D))
)
IDS, KV_IDS = RNG.integers(-1, 3, (B, T)), RNG.integers(-1, 3, (B, S))


def every_third(query_positions, kv_positions):
    return (query_positions + kv_positions) % 3 == 0


def within(query_positions, kv_positions, reach):
    return abs(query_positions - kv_positions) <= reach


MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal().at(query_offset=S - T),
    "top_left": masks.Causal().at(query_offset=0),
    "rows_without_keys": masks.Causal().at(query_offset=-9),
    "window": masks.SlidingWindow(7, 4).at(query_offset=S - T),
    "window_elsewhere": masks.SlidingWindow(5).at(query_offset=T),
    "traced_offsets": masks.SlidingWindow(9).at(query_offset=jnp.asarray([3, 20])),
    "positions": masks.Causal().at(query_positions=RNG.permutation(T) + 8),
    "chunked": masks.Chunked(7).at(query_offset=-3),
    "block_causal": masks.BlockCausal(6).at(query_offset=jnp.asarray(5)),
    "prefix": masks.PrefixLM(np.asarray([4, 30])).at(query_offset=2),
    "lengths": masks.Lengths(np.asarray([40, 13]), np.asarray([20, 24])),
    "no_keys": masks.Lengths(np.asarray([0, 13])),
    "segments": masks.Segments(IDS, KV_IDS),
    "packed": masks.Causal().at(query_offset=S - T) & masks.Segments(IDS, KV_IDS),
    "spans": masks.Causal().at(query_offset=S - T) | masks.BidirectionalSpans(IDS, KV_IDS),
    "not": ~masks.Segments(IDS, KV_IDS) & masks.Lengths(jnp.asarray([30, 40])),
    "dense": masks.Dense(RNG.random((B, N, T, S)) < 0.4),
    "selection": masks.BlockSelection(RNG.random((B, K, T, 5)) < 0.5, 8).at(query_offset=0),
    "predicate": masks.Predicate(every_third).at(query_offset=0),
    "predicate_with_operands": masks.Predicate(within, jnp.asarray([3, 9]).reshape(2, 1, 1, 1)).at(query_offset=9),
}


def value_and_gradients(mask, operands, backend, **options):
    spec = fa4_on_cpu.on_cpu(backend)

    def loss(operands):
        query, key, value, *sinks = operands
        extra = {"sinks": sinks[0]} if sinks else {}
        out = kernelry.attention(query, key, value, mask=mask, kernel="fa4", **extra, **options)
        return (out * ARRAYS[3]).sum(), out

    with kernelry.use(kernels=[spec]):
        (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(operands)
    return out, gradients


def check(mask, operands=ARRAYS[:3], backend=fa4_on_cpu.REFERENCE, **options):
    """Compares the output and the gradients with the oracle, to 2e-5."""
    out, gradients = value_and_gradients(mask, operands, backend, **options)
    query, key, value, *sinks = (np.asarray(array, np.float64) for array in operands)
    known = {"mask": mask, "sinks": sinks[0] if sinks else None, **options}
    np.testing.assert_allclose(out, testing.reference_attention(query, key, value, **known).out, rtol=2e-5, atol=2e-5)
    wanted = testing.reference_gradients(query, key, value, d_out=np.asarray(ARRAYS[3], np.float64), **known)
    for name, found in zip(("query", "key", "value", "sinks"), gradients, strict=False):
        np.testing.assert_allclose(found, getattr(wanted, name), rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", MASKS)
def test_the_reference_backend_agrees_with_the_oracle(name):
    check(MASKS[name])


@pytest.mark.parametrize("name", ["full", "causal", "rows_without_keys", "lengths", "packed", "dense"])
def test_gradients_are_asked_for_with_the_output_and_logsumexp_of_the_whole(name):
    sinks = jnp.asarray([0.5, -1.0, 3.0, 0.0], jnp.float32)
    check(MASKS[name], (*ARRAYS[:3], sinks), fa4_on_cpu.GIVEN, scale=0.3)


def test_the_reference_backends_own_gradients_ignore_them():
    sinks = jnp.asarray([0.5, -1.0, 3.0, 0.0], jnp.float32)
    with pytest.raises(AssertionError, match="query"):
        check(MASKS["causal"], (*ARRAYS[:3], sinks))


def test_every_window_is_what_the_vendor_makes_of_it():
    """Booleans of the vendor's own reference: windows one-sided, two-sided, empty, aligned anywhere."""
    lengths, bounds, offsets = ((6, 9), (6, 4), (5, 5)), (None, 0, 2, 20), (-12, -2, 0, 3, 12)
    for (q_len, kv_len), left, right, offset in itertools.product(lengths, bounds, bounds, offsets):
        mask = masks.Full() if left is None else masks.SlidingWindow(left, 2**31 - 1 if right is None else right)
        if left is None and right is not None:
            mask = masks.Causal().at(kv_offset=-right)
        mask = mask.at(query_offset=offset)
        request = Request(q_len=q_len, kv_len=kv_len, mask=mask)
        settings, arrays = Fa4Kernel("reference")._asked(Inputs(None, None, None, mask.canonical()), request)
        leaves, structure = fa4_jax.attention._flatten_mask(_vendor._options(settings, arrays)["mask_mod"])
        config = fa4_jax.attention._make_config(None, False, settings.window, 1.0, structure, "reference", varlen=False)
        found = fa4_jax.reference.dense_mask(1, 1, q_len, kv_len, config.causal, config.window, config.mask_mod(leaves))
        shown = np.ones((1, 1, q_len, kv_len), bool) if found is None else np.asarray(found)
        said = f"left={left} right={right} offset={offset} T={q_len} S={kv_len}"
        np.testing.assert_array_equal(shown, mask.materialize(q_len, kv_len), err_msg=said)


@pytest.mark.parametrize("window", [(2, -5), (-1, 0)])
def test_windows_that_the_vendor_reads_as_none_at_all(window):
    """Why `fa4.masks` hands on no negative bound."""
    query, key, value = (jnp.ones((1, 8, 1, 8)), *(jnp.asarray(RNG.standard_normal((2, 1, 8, 1, 8)), jnp.float32)))
    shown = fa4_jax.flash_attn(query, key, value, window_size=window, backend="reference")
    full = fa4_jax.flash_attn(query, key, value, backend="reference")
    np.testing.assert_array_equal(shown, full)


def test_lse_is_natural_and_float32_also_of_short_floats():
    arrays = tuple(array.astype(jnp.bfloat16) for array in ARRAYS[:3])
    request = Request(
        batch=B, q_len=T, kv_len=S, q_heads=N, kv_heads=K, head_dim=H, value_dim=D, dtype="bfloat16", scale=0.7
    )
    found = Fa4Kernel("reference").forward(Inputs(*arrays), request, Tiling(), statistics=True)
    wanted = testing.reference_attention(
        *(np.asarray(array, np.float64) for array in arrays), mask=masks.Full(), scale=0.7
    )
    assert (found.lse.dtype, found.lse.shape, found.out.dtype) == (jnp.float32, (B, N, T), jnp.bfloat16)
    np.testing.assert_allclose(found.lse, wanted.lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [fa4_on_cpu.REFERENCE, fa4_on_cpu.GIVEN])
@pytest.mark.parametrize("mapped", ["query", "ids", "both"])
def test_vmap_equals_a_loop(mapped, backend):
    queries = jnp.stack([ARRAYS[0], ARRAYS[0] * 0.5, -ARRAYS[0]])
    ids = jnp.asarray(RNG.integers(-1, 3, (3, T)))
    kv_ids = jnp.asarray(KV_IDS)

    def loss(query, ids, key):
        mask = masks.Causal().at(query_offset=S - T) & masks.Segments(ids, kv_ids)
        out = kernelry.attention(query, key, ARRAYS[2], mask=mask, kernel="fa4")
        return (out * ARRAYS[3]).sum()

    axes = (None if mapped == "ids" else 0, None if mapped == "query" else 0, None)
    operands = [array if axis == 0 else array[0] for array, axis in zip((queries, ids), axes, strict=False)]
    run_one = jax.value_and_grad(loss, argnums=(0, 2))
    with kernelry.use(kernels=[fa4_on_cpu.on_cpu(backend)]):
        found = jax.jit(jax.vmap(run_one, in_axes=axes))(*operands, ARRAYS[1])
        one_by_one = [
            jax.jit(run_one)(
                *(array[i] if axis == 0 else array for array, axis in zip(operands, axes, strict=False)), ARRAYS[1]
            )
            for i in range(3)
        ]
    wanted = jax.tree.map(lambda *each: np.stack(each), *one_by_one)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5), found, wanted)


def test_nested_vmap_equals_loops():
    queries = jnp.stack([jnp.stack([ARRAYS[0] * (i + 2 * j) for i in range(2)]) for j in range(2)])
    lengths = jnp.asarray([[3, 9], [40, 17]])

    def attend(query, length):
        return kernelry.attention(query, *ARRAYS[1:3], mask=masks.Lengths(length), kernel="fa4", mode="prefill")

    with kernelry.use(kernels=[fa4_on_cpu.on_cpu()]):
        found = jax.vmap(jax.vmap(attend), in_axes=(0, 0))(queries, lengths)
        wanted = np.stack([np.stack([attend(queries[j, i], lengths[j, i]) for i in range(2)]) for j in range(2)])
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


TOLD = {
    "full": (masks.Full(), (False, False, (None, None)), 0),
    "causal": (masks.Causal(), (True, False, (None, None)), 0),
    "window": (masks.SlidingWindow(7, 4), (False, True, (7, 4)), 0),
    "left_window": (masks.SlidingWindow(7), (False, True, (7, 0)), 0),
    "ahead": (masks.Causal().at(query_offset=5), (False, True, (None, 5)), 0),
    "behind": (masks.Causal().at(query_offset=-5), (False, False, (None, None)), 0),
    "packed": (masks.Causal() & masks.Segments(IDS), (True, False, (None, None)), 2),
    "lengths": (masks.Lengths(np.asarray([3, 5])), (False, False, (None, None)), 1),
    "dense": (masks.Dense(RNG.random((B, 1, T, T)) < 0.5), (False, False, (None, None)), 1),
    "traced": (masks.Causal().at(query_positions=jnp.arange(T)), (False, False, (None, None)), 1),
}


def primitives(jaxpr, name):
    """The equations of that primitive, also inside others."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner, name)


@pytest.mark.parametrize("name", TOLD)
def test_what_the_vendors_primitives_are_told(name):
    mask, (causal, local, window), arrays = TOLD[name]
    query, key, value = (array.astype(jnp.bfloat16)[:, :T] for array in ARRAYS[:3])

    def loss(query, key, value):
        out = kernelry.attention(query, key, value, mask=mask, scale=0.3, kernel="fa4")
        return out.astype(jnp.float32).sum()

    with kernelry.use(target="gpu:b200"):
        traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value)
    [forward], [backward] = (list(primitives(traced.jaxpr, primitive)) for primitive in ("fa4_fwd", "fa4_vjp"))
    assert forward.params["need_lse"] is True
    assert backward.params["has_d_lse"] is False
    assert [var.aval.dtype for var in backward.invars[:6]] == [jnp.bfloat16] * 4 + [jnp.float32, jnp.bfloat16]
    for equation, operands in ((forward, 3), (backward, 6)):
        config = equation.params["cfg"]
        assert (config.causal, config.local, config.window) == (causal, local, window)
        assert (config.scale, config.varlen, config.backend) == (0.3, False, "kernelry_sm_100")
        assert len(equation.invars) == operands + arrays


def test_masks_of_one_form_share_a_compiled_kernel():
    """The vendor keys its kernels by the mask's structure."""

    def structure(ids, scale=1):
        mask = masks.Segments(ids, KV_IDS)
        request = Request(batch=B, q_len=T, kv_len=S, q_heads=N, kv_heads=K, mask=mask, target="gpu:h100")
        settings, arrays = Fa4Kernel("reference")._asked(Inputs(None, None, None, mask.canonical()), request)
        return jax.tree.structure(_vendor._options(settings, arrays)["mask_mod"])

    assert structure(IDS) == structure(1 - IDS)
    assert hash(structure(IDS)) == hash(structure(1 - IDS))
    assert structure(IDS) != structure(IDS[0])  # one row for all: another index


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("generation", GENERATIONS)
def test_head_dims_that_are_claimed_are_those_the_vendor_has_kernels_for(generation):
    """The vendor's own arithmetic of shared memory: no head dim that is claimed is missing, and none is left out."""
    kernels = pytest.importorskip("fa4_jax.kernels")
    import cutlass

    kind = {80: "a100", 86: "a10g", 89: "l4", 90: "h100", 100: "b200"}[generation]
    environment = kernelry.plugin.Environment(versions=(("fa4-jax", "0.1.0"),)).without_probing()
    dims = range(8, 265, 8)
    for head_dim, value_dim in itertools.product(dims, dims):
        request = Request(target=f"gpu:{kind}", q_len=128, head_dim=head_dim, value_dim=value_dim, dtype="bfloat16")
        served = not (*FA4.capabilities.refusals(request), *FA4.refusals(request, environment))
        possible = max(head_dim, value_dim) <= 256 and all(
            kernels._can_implement(kind, cutlass.BFloat16, head_dim, value_dim, groups, causal, local, generation)
            for kind in ("fwd", "bwd")
            for groups in (1, 4)
            for causal, local in ((False, False), (True, False), (False, True))
        )
        assert served == possible, (head_dim, value_dim)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_threads_that_compile_for_two_generations_wait_for_each_other():
    kernels = pytest.importorskip("fa4_jax.kernels")
    own, inside, seen = kernels._cute_mask_mod, threading.Event(), []

    def second():
        inside.wait()
        with _vendor._built_for(80):
            seen.append((kernels._device_arch(), kernels._cute_mask_mod.args))

    waiting = threading.Thread(target=second)
    waiting.start()
    with _vendor._built_for(90):
        inside.set()
        waiting.join(0.3)
        assert waiting.is_alive()
        assert (kernels._device_arch(), kernels._cute_mask_mod.args) == (90, (90, own))
    waiting.join()
    assert seen == [(80, (80, own))]
    assert kernels._cute_mask_mod is own


def test_the_vendors_compiler_can_be_imported():
    pytest.importorskip("cutlass")
    assert _vendor.why_no_compiler() is None


def test_conformance_kit_finds_nothing_quickly():
    report = run(fa4_on_cpu.on_cpu(fa4_on_cpu.GIVEN), quick=True)
    assert report.ok, [(case.name, case.detail) for case in report.failures]
    assert report.served >= 50


@pytest.mark.sweep
def test_conformance_kit_finds_nothing():
    report = run(fa4_on_cpu.on_cpu(fa4_on_cpu.GIVEN))
    assert report.ok, [(case.name, case.detail) for case in report.failures]
    assert report.served >= 100
