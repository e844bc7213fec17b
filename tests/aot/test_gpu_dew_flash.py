"""dew_flash lowered for GPUs without one: which call with which operands and attributes each request becomes.

Lowered, not compiled: the kernels are in the wheel's libraries, and the numbers of tests/plugins are a substitute's.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import masks
from kernelry.kernel.spec import Environment, Knowledge
from kernelry.plugin import Request
from kernelry_gpu_flash_attn.plugin import DEW_FLASH

pytestmark = pytest.mark.aot

dew_flash_attn = pytest.importorskip("dew_flash_attn")

TARGETS = {"gpu:a100": "dew_flash_mha", "gpu:h100": "dew_flash3_mha", "gpu:rtxpro6000": "dew_flash_mha"}
IDS = np.repeat([3, -1, 0, 5], 64)
LENGTHS = np.array([100, 7], np.int32)
DENSE = [
    (masks.Full(), 256, False, (-1, -1)),
    (masks.Causal(), 256, True, (-1, -1)),
    (masks.Causal().at(query_offset=9, kv_offset=9), 256, True, (-1, -1)),
    (masks.SlidingWindow(40), 256, True, (40, 0)),
    (masks.SlidingWindow(0), 256, True, (0, 0)),
    (masks.SlidingWindow(40, 5), 256, False, (40, 5)),
    (masks.SlidingWindow(255, 5), 256, False, (-1, 5)),
    (masks.SlidingWindow(5, 2**31 - 1), 256, False, (5, -1)),
    (masks.SlidingWindow(2**31 - 1), 256, True, (-1, -1)),
    (masks.Causal() & masks.SlidingWindow(40, 5), 256, True, (40, 0)),
    (masks.Causal().at(query_offset=128), 384, True, (-1, -1)),
    (masks.SlidingWindow(40, 5).at(query_offset=128), 384, False, (40, 5)),
    (masks.SlidingWindow(383).at(query_offset=128), 384, True, (-1, -1)),
]
PACKED = [
    (masks.Segments(IDS), False, (-1, -1), 32),
    (masks.Causal() & masks.Segments(IDS), True, (-1, -1), 32),
    (masks.SlidingWindow(40, 5) & masks.Segments(IDS), False, (40, 5), 32),
    (masks.Lengths(LENGTHS), False, (-1, -1), 2),
    (masks.Lengths(LENGTHS, LENGTHS), False, (-1, -1), 2),
    (masks.Lengths(50), False, (-1, -1), 2),
]


def _shapes(kv_len=256, head_dim=64, dtype="bfloat16"):
    return [jax.ShapeDtypeStruct((2, *size, head_dim), dtype) for size in ((256, 8), (kv_len, 2), (kv_len, 2))]


def _lowered(target, function, arguments):
    with kernelry.use(target=target), kernelry.record() as resolutions:
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    for resolution in resolutions:
        resolution.verify(lowered)
    return resolutions, _calls(lowered)


def _training(**options):
    def loss(query, key, value):
        out = kernelry.attention(query, key, value, kernel="dew_flash", **options)
        return getattr(out, "out", out).astype(jnp.float32).sum()

    return jax.grad(loss, (0, 1, 2))


def _calls(lowered):
    """Each custom call: its name, its attributes, and the types of its operands and results."""
    pattern = r"custom_call @(\w+)\(.*?mhlo\.backend_config = \{(.*?)\}.*? : \((.*?)\) -> \((.*?)\)"
    return [
        (name, dict(pair.split(" = ") for pair in text.split(", ")), _types(operands), _types(results))
        for name, text, operands, results in re.findall(pattern, lowered.as_text())
    ]


def _types(text):
    return re.findall(r"tensor<([^>]*)>", text)


def _check(attributes, causal, window):
    assert attributes["is_causal"] == str(causal).lower()
    assert float(attributes["softmax_scale"].split(" : ")[0]) == 0.25
    assert tuple(int(attributes[f"window_size_{side}"].split(" : ")[0]) for side in ("left", "right")) == window
    assert attributes.get("deterministic", "false") == attributes.get("zero_tensors", "false") == "false"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("mask", "kv_len", "causal", "window"), DENSE, ids=str)
def test_bands_reach_both_calls(mask, kv_len, causal, window, target):
    resolutions, calls = _lowered(target, _training(mask=mask, scale=0.25), _shapes(kv_len))
    assert [name for name, *_ in calls] == [f"{TARGETS[target]}_fwd", f"{TARGETS[target]}_bwd"]
    for _, attributes, *_ in calls:
        _check(attributes, causal, window)
        assert not any(name.startswith("max_seqlen") for name in attributes)
    query, keys = "2x256x8x64xbf16", f"2x{kv_len}x2x64xbf16"
    (*_, forward, made), (*_, backward, gradients) = calls
    assert forward == [query, keys, keys]
    assert made[:2] == [query, "2x8x256xf32"]
    assert backward == [query, query, keys, keys, query, "2x8x256xf32"]
    assert gradients[0] == query
    if not mask.form.may_hide_slots(256, kv_len):
        assert resolutions[0].plan.steps == ()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("mask", "causal", "window", "runs"), PACKED, ids=str)
def test_packed_rows_reach_both_calls(mask, causal, window, runs, target):
    _, calls = _lowered(target, _training(mask=mask, scale=0.25), _shapes())
    assert [name for name, *_ in calls] == [f"{TARGETS[target]}_varlen_fwd", f"{TARGETS[target]}_varlen_bwd"]
    hopper, starts = "3" in TARGETS[target], f"{2 * runs + 1}xi32"
    lse = "8x512xf32" if hopper else f"{2 * runs}x8x256xf32"
    query, keys = "512x8x64xbf16", "512x2x64xbf16"
    for _, attributes, *_ in calls:
        _check(attributes, causal, window)
        longest = [attributes[name].split(" : ")[0] for name in attributes if name.startswith("max_seqlen")]
        assert longest == ["256", "256"]
    (*_, forward, made), (*_, backward, _) = calls
    assert forward == [query, keys, keys, starts, starts]
    assert made[:2] == [query, lse]
    assert backward == [query, query, keys, keys, query, lse, starts, starts]


@pytest.mark.parametrize("target", TARGETS)
def test_the_programs_call_is_the_vendors(target):
    """Operands, attributes and results of both calls are those of dew_flash_attn.flash_mha, differentiated by it."""
    from kernelry_gpu_flash_attn.dew_flash import _vendor

    def theirs(query, key, value):
        return dew_flash_attn.flash_mha(query, key, value, 0.25, True, (40, 0)).astype(jnp.float32).sum()

    _, ours = _lowered(target, _training(mask=masks.SlidingWindow(40), scale=0.25), _shapes())
    with _vendor._answering(kernelry.Target.parse(target)):
        direct = jax.jit(jax.grad(theirs, (0, 1, 2))).trace(*_shapes()).lower(lowering_platforms=("cuda",))
    assert ours == _calls(direct)


@pytest.mark.parametrize("dtype", sorted(DEW_FLASH.capabilities.dtypes))
@pytest.mark.parametrize("head_dim", [8, 72, 96, 256])
def test_every_dtype_and_head_dim_is_lowered(dtype, head_dim):
    _, calls = _lowered("gpu:h100", _training(mask=masks.Causal()), _shapes(head_dim=head_dim, dtype=dtype))
    short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
    assert calls[0][2][0] == f"2x256x8x{head_dim}x{short}"


def test_sinks_need_one_forward_and_one_backward():
    _, calls = _lowered("gpu:a100", _training(mask=masks.Causal(), sinks=jnp.zeros(8)), _shapes())
    assert [name for name, *_ in calls] == ["dew_flash_mha_fwd", "dew_flash_mha_bwd"]


def test_few_queries_keys_are_split_by_the_targets_multiprocessors():
    """The one scratch buffer that depends on the device: 8 heads of one query are few for 108 multiprocessors."""
    shapes = [jax.ShapeDtypeStruct((1, *size, 64), "bfloat16") for size in ((1, 8), (8192, 2), (8192, 2))]

    def attend(*qkv):
        return kernelry.attention(*qkv, mask=masks.Full(), kernel="dew_flash", mode="prefill")

    splits = {}
    for target in ("gpu:a100", "gpu:rtxpro6000"):
        _, [(*_, results)] = _lowered(target, attend, shapes)
        splits[target] = int(results[2].split("x")[0])
    wanted = {"gpu:a100": dew_flash_attn._splits(8, 2 * 108, 32), "gpu:rtxpro6000": dew_flash_attn._splits(8, 376, 32)}
    assert splits == wanted


def test_the_vendor_answers_for_itself_afterwards():
    before = dew_flash_attn._hopper, dew_flash_attn._multiprocessors
    _lowered("gpu:h100", _training(mask=masks.Causal()), _shapes())
    assert (dew_flash_attn._hopper, dew_flash_attn._multiprocessors) == before


def test_the_devices_are_those_that_the_wheel_says():
    from kernelry_gpu_flash_attn.dew_flash.devices import is_served

    assert sorted(dew_flash_attn.ARCHITECTURES) == ["sm120", "sm80", "sm90"]
    served = [generation for generation in (75, 80, 86, 89, 90, 100, 103, 120, 121) if is_served(generation)]
    assert served == [80, 86, 89, 90, 120]


def test_what_is_served_needs_no_more_than_the_wheel():
    request = Request(target="gpu:h100", q_len=256, head_dim=64, dtype="bfloat16")
    assert DEW_FLASH.refusals(request, Environment(Knowledge.ASSUMED)) == ()
    import importlib_metadata

    installed = {name: importlib_metadata.version(name) for name in ("jax", "dew-flash-attn-cu13")}
    versions = (*installed.items(), ("dew-flash-attn-cu12", None), ("jax-cuda13-plugin", installed["jax"]))
    assert DEW_FLASH.refusals(request, Environment(versions=versions)) == ()
