"""tokamax_splash through the real TPU compiler: what it declares compiles.

Compiled, not run: numbers are proven in interpret mode, in tests/plugins/test_tokamax_splash.py.
"""

import jax
import jax.numpy as jnp
import pytest
from computed_masks import MASKS

import kernelry
from kernelry import masks
from kernelry.plugin import Request
from kernelry_tpu_splash.plugin import TOKAMAX_SPLASH

pytestmark = pytest.mark.aot

TARGETS = ("tpu:v5e", "tpu:v5p", "tpu:v6e")
DENSE = {
    "dense": masks.Causal() & masks.Dense(jnp.ones((1, 1, 512, 512), bool)),
    "dense_by_head": masks.Dense(jnp.ones((1, 4, 512, 512), bool)),
}
HEAD_DIMS = ((64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (512, 512))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MASKS | DENSE)
def test_every_mask_compiles(target, name, shapes, training, compile_for):
    found = compile_for(target, training("tokamax_splash", mask=(MASKS | DENSE)[name]), shapes())
    assert found.ok, found.reason


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", sorted(TOKAMAX_SPLASH.capabilities.dtypes))
@pytest.mark.parametrize(("head_dim", "value_dim"), HEAD_DIMS)
def test_every_dtype_and_head_dim_compiles(target, dtype, head_dim, value_dim, shapes, training, compile_for):
    arguments = shapes(head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    found = compile_for(target, training("tokamax_splash", soft_cap=30.0), arguments)
    assert found.ok, found.reason


@pytest.mark.parametrize("kv_len", [4096, 5376])
@pytest.mark.parametrize("dtype", sorted(TOKAMAX_SPLASH.capabilities.dtypes))
@pytest.mark.parametrize(("head_dim", "value_dim"), HEAD_DIMS)
def test_default_blocks_of_long_sequences_fit_the_smallest_vector_memory(
    dtype, head_dim, value_dim, kv_len, shapes, training, compile_for
):
    """5376 has no divisor that is a power of two above 256: its largest block is of 896."""
    ids = jnp.zeros((1, kv_len), jnp.int32)
    arguments = shapes(kv_len, head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    mask = masks.SlidingWindow(4000) & masks.Segments(ids)
    found = compile_for("tpu:v5e", training("tokamax_splash", mask=mask, soft_cap=30.0), arguments)
    assert found.ok, found.reason


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(128, "bfloat16"), (256, "bfloat16"), (128, "float32"), (256, "float32")]
)
def test_default_blocks_of_dense_masks_fit_the_smallest_vector_memory(head_dim, dtype, shapes, training, compile_for):
    mask = masks.Dense(jnp.ones((1, 1, 4096, 4096), bool))
    found = compile_for("tpu:v5e", training("tokamax_splash", mask=mask), shapes(4096, head_dim=head_dim, dtype=dtype))
    assert found.ok, found.reason


@pytest.mark.parametrize("target", TARGETS)
def test_every_tiling_of_the_search_space_compiles(target, shapes, training, compile_for):
    request = Request(q_len=2048, head_dim=128, q_heads=4, kv_heads=2, dtype="bfloat16")
    for tiling in TOKAMAX_SPLASH.tilings(request):
        with kernelry.use(tiling=dict(tiling.values)):
            found = compile_for(target, training("tokamax_splash"), shapes(2048))
        assert found.ok, (tiling, found.reason)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tunable", [{"dq_reduction_steps": 3}, {"q_layout": 2}, {"k_layout": 2}, {"v_layout": 2}])
@pytest.mark.parametrize("name", ["causal", "dense"])
def test_every_tunable_compiles(target, tunable, name, shapes, training, compile_for):
    blocks = {"block_kv_dkv": 128, "block_kv_dkv_compute": 128}
    with kernelry.use(tiling={**blocks, **tunable}):
        found = compile_for(target, training("tokamax_splash", mask=(MASKS | DENSE)[name]), shapes())
    assert found.ok, found.reason


@pytest.mark.parametrize("target", TARGETS)
def test_sinks_and_maximum_logits_compile(target, shapes, compile_for):
    def loss(query, key, value, sinks):
        options = {"mask": masks.Causal(), "kernel": "tokamax_splash"}
        one = kernelry.attention(query, key, value, sinks=sinks, **options)
        other, top = kernelry.attention(query, key, value, return_max_logits=True, **options)
        return (one + other).astype(jnp.float32).sum() + jax.lax.stop_gradient(top).sum()

    arguments = (*shapes(), jax.ShapeDtypeStruct((4,), jnp.bfloat16))
    found = compile_for(target, jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), arguments)
    assert found.ok, found.reason


def test_a_long_sequence_fits_one_chip(shapes, training, compile_for):
    found = compile_for("tpu:v5e", training("tokamax_splash"), shapes(131072, heads=8, kv_heads=8))
    assert found.ok, found.reason
    assert sum(found.memory.values()) < 15.75 * 2**30


@pytest.mark.parametrize("over", ["heads", "queries"])
def test_four_chips(over, over_four_chips):
    found = over_four_chips("tokamax_splash", over)
    assert found.ok, found.reason
    text = found.compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2  # forward; dQ, dK and dV in one
    assert "all-gather" not in text
