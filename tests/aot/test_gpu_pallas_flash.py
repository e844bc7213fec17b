"""pallas_flash through the real compilers of XLA and Triton: what it declares compiles, and fits shared memory.

Compiled, not run: numbers are proven in interpret mode, in tests/plugins/test_pallas_flash.py.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from computed_masks import IDS, MASKS

import kernelry
from kernelry import masks
from kernelry.aot.devices import GPUS
from kernelry.plugin import Inputs, Request, Tiling
from kernelry_gpu_pallas.pallas_flash import kernel as body
from kernelry_gpu_pallas.pallas_flash.shared_memory import needs
from kernelry_gpu_pallas.pallas_flash.spec import PALLAS_FLASH

pytestmark = pytest.mark.aot

TARGETS = ("gpu:a100", "gpu:h100", "gpu:b200")
HEAD_DIMS = ((64, 64), (80, 80), (128, 128), (192, 128), (256, 256))
SHUFFLED = np.random.default_rng(0).permutation(512)
MORE_MASKS = {
    "shuffled": masks.Causal().at(query_positions=SHUFFLED, kv_positions=SHUFFLED),
    "traced": masks.Causal().at(query_offset=jnp.asarray([7])),
    "lengths": masks.Causal() & masks.Lengths(jnp.asarray([300])),
    "prefix": masks.PrefixLM(jnp.asarray([100])),
    "spans": masks.Causal() & masks.Segments(jnp.asarray(IDS))
    | masks.BidirectionalSpans.from_flags(jnp.asarray(IDS) == 5),
    "dense": masks.Dense(jnp.ones((1, 4, 512, 512), bool)),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MASKS | MORE_MASKS)
def test_every_mask_compiles(target, name, shapes, training, compile_for):
    found = compile_for(target, training("pallas_flash", mask=(MASKS | MORE_MASKS)[name]), shapes())
    assert found.ok, found.reason


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", sorted(PALLAS_FLASH.capabilities.dtypes))
@pytest.mark.parametrize(("head_dim", "value_dim"), HEAD_DIMS)
def test_every_dtype_and_head_dim_compiles(target, dtype, head_dim, value_dim, shapes, training, compile_for):
    arguments = shapes(500, head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    found = compile_for(target, training("pallas_flash", soft_cap=30.0), arguments)
    assert found.ok, found.reason


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 512), (1, 1, 512, 1), (1, 1, 512, 512), (1, 4, 512, 512)])
def test_a_bias_compiles(target, shape, shapes, compile_for):
    found = compile_for(target, with_bias, (*shapes(), jax.ShapeDtypeStruct(shape, jnp.float32)))
    assert found.ok, found.reason


def with_bias(query, key, value, bias, *visible):
    """Attention's value and gradients."""

    def loss(query, key, value):
        mask = masks.Causal() & masks.Dense(visible[0]) if visible else masks.Causal()
        options = {"mask": mask, "bias": bias, "kernel": "pallas_flash", "gradients": ("query", "key", "value")}
        return kernelry.attention(query, key, value, **options).astype(jnp.float32).sum()

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(query, key, value)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", sorted(PALLAS_FLASH.capabilities.dtypes))
@pytest.mark.parametrize(("head_dim", "value_dim"), HEAD_DIMS)
def test_tiles_of_a_bias_and_a_dense_mask_fit_beside_the_others(
    target, dtype, head_dim, value_dim, shapes, compile_for
):
    pairs = (jax.ShapeDtypeStruct((1, 4, 512, 512), kind) for kind in (jnp.float32, bool))
    arguments = (*shapes(head_dim=head_dim, value_dim=value_dim, dtype=dtype), *pairs)
    found = compile_for(target, with_bias, arguments)
    assert found.ok, found.reason


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (128, "float32")]
)
def test_every_tiling_of_the_search_space_compiles(target, head_dim, dtype, shapes, training, compile_for):
    request = Request(
        target=target, q_len=512, kv_len=512, q_heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype,
        mask=masks.Causal(), gradients=("query", "key", "value"),
    )  # fmt: skip
    found = PALLAS_FLASH.tilings(request)
    for tiling in found if dtype == "bfloat16" else found[-2:]:
        with kernelry.use(tiling=dict(tiling.values)):
            compiled = compile_for(target, training("pallas_flash"), shapes(head_dim=head_dim, dtype=dtype))
        assert compiled.ok, (tiling, compiled.reason)


def direct(request, tiling, outputs, mask=None, *, bias=False):
    """The kernels that compute these outputs, of `out`, `query` and `key`: a function of query, key, value and lse."""

    def run(query, key, value, lse, *pairs):
        given = masks.Causal() if mask is None else mask(*pairs)
        inputs = Inputs(query, key, value, given.canonical(), pairs[0] if bias else None)
        kernel = PALLAS_FLASH.body()
        out = kernel.forward(inputs, request, tiling, statistics=False).out
        d_out = jnp.zeros_like(out)
        gradients = kernel.backward(inputs, request, tiling, d_out, lse, d_out, None)
        found = {"out": out, "query": gradients.query, "key": gradients.key}
        return [found[name] for name in outputs]

    return run


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("end", ["", "_dq", "_dkv"])
def test_what_is_refused_for_shared_memory_does_not_compile(target, end, shapes, compile_for, monkeypatch):
    arguments = (*shapes(1024, head_dim=256), jax.ShapeDtypeStruct((1, 4, 1024), jnp.float32))
    request = Request(
        target=target, q_len=1024, kv_len=1024, q_heads=4, kv_heads=2, head_dim=256, dtype="bfloat16",
        mask=masks.Causal(), gradients=("query", "key", "value"),
    )  # fmt: skip
    values = dict(PALLAS_FLASH.tilings(request)[0].values)
    values |= {f"block_q{end}": 256, f"block_kv{end}": 256}
    every = direct(request, Tiling.of(**values), ("out", "query", "key"))
    with pytest.raises(kernelry.errors.ConfigError, match=f"block_q{end}=256.*bytes of shared memory"):
        compile_for(target, every, arguments)
    monkeypatch.setattr(body, "check", lambda *_: None)
    found = compile_for(target, every, arguments)
    assert str(found.reason).startswith("Shared memory size limit exceeded")


@pytest.mark.parametrize("kind", ["a100", "h100", "b200"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("pairs", ["none", "bias and dense"])
def test_the_compilers_ask_for_what_is_expected(kind, dtype, head_dim, pairs, shapes, compile_for, monkeypatch):
    """A device with next to no shared memory makes them say how much of it each kernel asks for."""
    monkeypatch.setitem(GPUS, kind, dataclasses.replace(GPUS[kind], block_memory=64))
    target = f"gpu:{kind}:3"  # no other test describes three
    sizes = {"q_len": 256, "kv_len": 256, "q_heads": 4, "kv_heads": 2, "head_dim": head_dim, "dtype": dtype}
    arguments = [*shapes(256, head_dim=head_dim, dtype=dtype), jax.ShapeDtypeStruct((1, 4, 256), jnp.float32)]
    given = {"mask": masks.Causal(), "bias": None}
    if pairs != "none":
        shape = (1, 4, 256, 256)
        arguments += [jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, bool)]
        given = {"mask": masks.Causal() & masks.Dense(jnp.ones(shape, bool)), "bias": shape}
    request = Request(target=target, gradients=("query", "key", "value"), **sizes, **given)
    seen = set()
    for tiling in PALLAS_FLASH.tilings(request):
        for end, need in needs(request, dict(tiling.values)).items():
            own = tuple(size for name, size in tiling.values if name.endswith(("_dq", "_dkv")) == bool(end))
            if (end, own) in seen:
                continue
            seen.add((end, own))
            output = {"": "out", "_dq": "query", "_dkv": "key"}[end]
            mask = None if pairs == "none" else lambda _, visible: masks.Causal() & masks.Dense(visible)
            found = compile_for(target, direct(request, tiling, (output,), mask, bias=pairs != "none"), arguments)
            asked = int(re.search(r"requested (\d+)", str(found.reason))[1])
            assert need.least <= asked <= need.most, (end, tiling)


def _sizes(text):
    """The largest number of elements of an array in a program."""
    shapes = re.findall(r"(?:bf16|f16|f32|s32|u32|s8|pred)\[([\d,]+)\]", text)
    return max(int(np.prod([int(size) for size in shape.split(",")], dtype=np.int64)) for shape in shapes)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["causal", "packed"])
def test_no_repeated_keys_and_no_square_of_the_length(target, name, shapes, compile_for, training):
    """Memory grows as T, and no array of the program is larger than the query."""
    temporaries = []
    for length in (4096, 8192):
        ids = jnp.zeros(length, jnp.int32)
        mask = masks.Causal() & masks.Segments(ids) if name == "packed" else masks.Causal()
        found = compile_for(target, training("pallas_flash", mask=mask), shapes(length, heads=8, kv_heads=2))
        assert found.ok, found.reason
        assert _sizes(found.compiled.as_text()) == length * 8 * 128
        temporaries.append(found.memory["temporaries"])
    assert temporaries[1] < 2.1 * temporaries[0]


@pytest.mark.parametrize("over", ["heads", "queries"])
def test_four_gpus(over, over_four_chips):
    found = over_four_chips("pallas_flash", over, "gpu:h100:4")
    assert found.ok, found.reason
    text = found.compiled.as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 3
    assert "all-gather" not in text


def test_the_default_tiling_follows_the_generation():
    request = Request(
        q_len=8192, kv_len=8192, q_heads=8, kv_heads=2, head_dim=256, dtype="bfloat16", mask=masks.Causal(),
        gradients=("query", "key", "value"),
    )  # fmt: skip
    found = {
        target: PALLAS_FLASH.tilings(dataclasses.replace(request, target=kernelry.Target.parse(target)))[0]
        for target in ("gpu:a100", "gpu:h100")
    }
    assert found["gpu:a100"] != found["gpu:h100"]
