"""splash through the real TPU compiler: what it declares compiles, what it refuses for the compiler's sake does not.

Compiled, not run: numbers are proven in interpret mode, in tests/plugins/test_splash.py.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from computed_masks import MASKS

import kernelry
from kernelry import masks
from kernelry.plugin import Inputs, Request
from kernelry_tpu_splash.plugin import SPLASH

pytestmark = pytest.mark.aot

TARGETS = ("tpu:v5e", "tpu:v5p", "tpu:v6e")
MORE_TARGETS = ("tpu:v4", "tpu:tpu7x")
HEAD_DIMS = ((8, 8), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (512, 512))
BLOCKS = tuple(name for name, _ in SPLASH.tilings(Request(q_len=512))[0].values if name.startswith("block"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_compiles(target, name, shapes, training, compile_for):
    found = compile_for(target, training("splash", mask=MASKS[name]), shapes())
    assert found.ok, found.reason


@pytest.mark.parametrize("target", MORE_TARGETS)
@pytest.mark.parametrize("name", ["causal", "any_of", "packed"])
def test_other_generations_compile(target, name, shapes, training, compile_for):
    found = compile_for(target, training("splash", mask=MASKS[name]), shapes())
    assert found.ok, found.reason


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", sorted(SPLASH.capabilities.dtypes))
@pytest.mark.parametrize(("head_dim", "value_dim"), HEAD_DIMS)
def test_every_dtype_and_head_dim_compiles(target, dtype, head_dim, value_dim, shapes, training, compile_for):
    assert head_dim <= SPLASH.capabilities.head_dims.maximum
    arguments = shapes(head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    found = compile_for(target, training("splash", soft_cap=30.0), arguments)
    assert found.ok, found.reason


@pytest.mark.parametrize("kv_len", [4096, 5376])
@pytest.mark.parametrize("dtype", sorted(SPLASH.capabilities.dtypes))
@pytest.mark.parametrize(("head_dim", "value_dim"), HEAD_DIMS[1:])
def test_default_blocks_of_long_sequences_fit_the_smallest_vector_memory(
    dtype, head_dim, value_dim, kv_len, shapes, training, compile_for
):
    """5376 has no divisor that is a power of two above 256: its largest block is of 896."""
    ids = jnp.zeros((1, kv_len), jnp.int32)
    arguments = shapes(kv_len, head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    mask = masks.SlidingWindow(4000) & masks.Segments(ids)
    found = compile_for("tpu:v5e", training("splash", mask=mask, soft_cap=30.0), arguments)
    assert found.ok, found.reason


@pytest.mark.parametrize("target", TARGETS)
def test_every_tiling_of_the_search_space_compiles(target, shapes, training, compile_for):
    for tiling in SPLASH.tilings(Request(q_len=2048, head_dim=128, q_heads=4, kv_heads=2, dtype="bfloat16")):
        with kernelry.use(tiling=dict(tiling.values)):
            found = compile_for(target, training("splash"), shapes(2048))
        assert found.ok, (tiling, found.reason)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "tunable", [{"backward_kernels": 1}, {"backward_kernels": 2}, {"q_layout": 2}, {"k_layout": 2}, {"v_layout": 2}]
)
def test_every_tunable_compiles(target, tunable, shapes, training, compile_for):
    with kernelry.use(tiling=tunable):
        found = compile_for(target, training("splash"), shapes())
    assert found.ok, found.reason


@pytest.mark.parametrize("target", TARGETS)
def test_float16_which_is_refused_does_not_compile(target, shapes, compile_for):
    assert "float16" not in SPLASH.capabilities.dtypes
    request = Request(
        target=target, q_len=512, q_heads=4, kv_heads=2, head_dim=128, dtype="float16", mask=masks.Causal()
    )
    kernel, tiling = SPLASH.body(), SPLASH.tilings(request)[0]

    def direct(query, key, value):
        inputs = Inputs(query, key, value, masks.Causal().canonical())
        return kernel.forward(inputs, request, tiling, statistics=False).out

    found = compile_for(target, direct, shapes(dtype="float16"))
    assert not found.ok
    assert str(found.reason) == (
        "Invalid vector type for load; the compiler has no such vectors: choose float32 or bfloat16"
    )


def test_blocks_that_are_too_large_are_said_to_be(shapes, training, compile_for):
    with kernelry.use(tiling=dict.fromkeys(BLOCKS, 2048)):
        found = compile_for("tpu:v5e", training("splash"), shapes(2048))
    assert not found.ok
    assert re.match(
        r"Scoped allocation with size .* exceeded scoped vmem limit by .*; set smaller blocks", str(found.reason)
    )


def test_adapters_compile_around_it(shapes, training, compile_for):
    mask = masks.Causal() & masks.Lengths(jnp.asarray([300]))
    found = compile_for("tpu:v5e", training("splash", mask=mask, sinks=jnp.zeros(4)), shapes(500))
    assert found.ok, found.reason


@pytest.mark.parametrize("given", ["query_offset", "query_positions"])
def test_traced_positions_compile(given, shapes, compile_for):
    def prefill(query, key, value, where):
        mask = masks.Causal().at(**{given: where})
        return kernelry.attention(query, key, value, mask=mask, mode="prefill", kernel="splash")

    where = jax.ShapeDtypeStruct(() if given == "query_offset" else (512,), jnp.int32)
    found = compile_for("tpu:v5e", prefill, (*shapes(512, kv_len=1024), where))
    assert found.ok, found.reason


def test_a_long_sequence_fits_one_chip_and_dense_does_not(shapes, training, compile_for):
    arguments = shapes(131072, heads=8, kv_heads=8)
    sparse = compile_for("tpu:v5e", training("splash"), arguments)
    assert sparse.ok, sparse.reason
    assert sum(sparse.memory.values()) < 15.75 * 2**30
    dense = compile_for("tpu:v5e", training("dot_product"), arguments)
    assert not dense.ok
    assert str(dense.reason).startswith("Ran out of memory on HBM")


@pytest.mark.parametrize("over", ["heads", "queries"])
def test_four_chips(over, over_four_chips):
    with kernelry.use(tiling={"backward_kernels": 2}):
        found = over_four_chips("splash", over)
    assert found.ok, found.reason
    text = found.compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert "all-gather" not in text


@pytest.mark.parametrize("target", TARGETS)
def test_keys_and_values_are_not_copied(target, shapes, training, compile_for):
    """Grouped heads are read through the index map: no array of the repeated size is in the program."""
    with kernelry.use(tiling={"backward_kernels": 2}):
        found = compile_for(target, training("splash"), shapes(2048, heads=16, kv_heads=2))
    calls = [line for line in found.compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    assert len(calls) == 3
    for call in calls:
        operands = call.partition("operand_layout_constraints=")[2]
        assert operands.count("bf16[2,2048,128]") + operands.count("bf16[1,2,2048,128]") == 2, operands
