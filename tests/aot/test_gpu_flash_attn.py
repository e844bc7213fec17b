"""fa4 through the vendor's compiler and XLA's for GPUs: what it declares becomes machine code, without a GPU.

Compiled, not run: numbers on a GPU are unproven. The target of a custom call ends in a hash of the code and of the
instruction set, so that equal names are equal kernels.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import kernelry
from kernelry import aot, masks

pytest.importorskip("fa4_jax")
pytest.importorskip("cutlass")

import fa4_jax

from kernelry_gpu_flash_attn.fa4 import _vendor

pytestmark = pytest.mark.aot

LENGTH = 512
GENERATIONS = {"gpu:a100": 80, "gpu:h100": 90, "gpu:b200": 100}
FORWARD = {"fa4_fwd"}
WITH_LSE = {"fa4_fwd_lse"}
"""Where rows may see no key, an adapter of core asks for it."""
GROUPED = {"fa4_fwd_lse", "fa4_bwd_pre", "fa4_bwd_gqa", "fa4_bwd_post", "fa4_bwd_post_dk", "fa4_bwd_post_dv"}
ALIKE = {"fa4_fwd_lse", "fa4_bwd_pre", "fa4_bwd", "fa4_bwd_post"}
IDS = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
PAIRS = jax.ShapeDtypeStruct((2, 1, LENGTH, LENGTH), jnp.bool_)
LENGTHS = jax.ShapeDtypeStruct((2,), jnp.int32)

MASKS = {
    "full": (masks.Full, ()),
    "causal": (masks.Causal, ()),
    "window": (lambda: masks.SlidingWindow(100, 20), ()),
    "behind": (lambda: masks.Causal().at(query_offset=-40), ()),
    "packed": (lambda ids: masks.Causal() & masks.Segments(ids), (IDS,)),
    "positions": (lambda ids: masks.Causal().at(query_positions=ids), (IDS,)),
    "padded_images": (
        lambda ids, lengths: (masks.Causal() | masks.BidirectionalSpans(ids)) & masks.Lengths(lengths),
        (IDS, LENGTHS),
    ),
    "dense": (masks.Dense, (PAIRS,)),
}


def shapes(head_dim=64, value_dim=None, *, heads=4, kv_heads=2, kv_len=LENGTH, dtype=jnp.bfloat16):
    sizes = (LENGTH, heads, head_dim), (kv_len, kv_heads, head_dim), (kv_len, kv_heads, value_dim or head_dim)
    return [jax.ShapeDtypeStruct((2, *size), dtype) for size in sizes]


def attention(name, **options):
    def attend(query, key, value, *arrays):
        return kernelry.attention(query, key, value, mask=MASKS[name][0](*arrays), kernel="fa4", **options)

    return attend


def training(name, **options):
    def loss(*operands):
        return attention(name, **options)(*operands).astype(jnp.float32).sum()

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def targets(program):
    """The vendor's custom calls: their names, and with the hash of each."""
    found = set(re.findall(r"cutejax\.\w+\.[0-9a-f]{16}", program))
    return {name.split(".")[1] for name in found}, found


@functools.cache
def compiled(target, name, operands=(), *, grad=False):
    function = (training if grad else functools.partial(attention, mode="prefill"))(name)
    with kernelry.record() as resolutions:
        found = aot.compile_for(target, function, *shapes(**dict(operands)), *MASKS[name][1])
    assert found.ok, found.reason
    for resolution in resolutions:
        resolution.verify(found.compiled)
    return targets(found.compiled.as_text())


@functools.cache
def directly(target, **options):
    """The custom calls of the vendor's own function, lowered for the target."""
    attend = functools.partial(fa4_jax.flash_attn, backend="cute", **options)
    with _vendor._built_for(GENERATIONS[target]):
        lowered = jax.jit(attend).trace(*shapes()).lower(lowering_platforms=("cuda",))
    return targets(lowered.as_text())[1]


@pytest.mark.parametrize("target", GENERATIONS)
@pytest.mark.parametrize(
    ("name", "options"),
    [("full", {}), ("causal", {"causal": True}), ("window", {"window_size": (100, 20)})],
    ids=["full", "causal", "window"],
)
def test_a_program_calls_the_kernel_of_the_direct_call(target, name, options):
    names, found = compiled(target, name)
    assert names == FORWARD
    assert found == directly(target, **options)


@pytest.mark.parametrize("target", GENERATIONS)
@pytest.mark.parametrize("name", ["behind", "packed", "positions", "padded_images", "dense"])
def test_masks_become_code_of_the_kernel(target, name):
    names, found = compiled(target, name)
    assert names == WITH_LSE
    assert not found & (directly(target, return_lse=True) | directly(target, causal=True, return_lse=True))


@pytest.mark.parametrize("target", GENERATIONS)
@pytest.mark.parametrize("name", ["causal", "packed"])
def test_gradients_of_grouped_heads(target, name):
    assert compiled(target, name, grad=True)[0] == GROUPED


def test_every_generation_has_kernels_of_its_own():
    of_each = [compiled(target, "causal", grad=True)[1] for target in GENERATIONS]
    assert len(set.union(*of_each)) == sum(map(len, of_each))


@pytest.mark.parametrize("target", GENERATIONS)
def test_gradients_of_as_many_heads(target):
    assert compiled(target, "causal", (("kv_heads", 4), ("dtype", jnp.float16)), grad=True)[0] == ALIKE


@pytest.mark.parametrize(
    ("target", "dims"),
    [("gpu:a100", (256, None)), ("gpu:h100", (192, 128)), ("gpu:h100", (256, None)), ("gpu:b200", (128, 64))],
)
def test_gradients_of_other_head_dims(target, dims):
    assert compiled(target, "causal", (("head_dim", dims[0]), ("value_dim", dims[1])), grad=True)[0] == GROUPED
