"""The shipped policy's orders against what predicts or publishes them; a change of either fails until both agree."""

import dataclasses
import functools
import importlib.util
import json
import math
import re
import statistics
from importlib import metadata
from pathlib import Path

import pytest

import kernelry
from kernelry import masks
from kernelry.plugin import Environment, Mode, Request
from kernelry.policy.policy import Policy, Switches
from kernelry.policy.rules import first_match
from kernelry.policy.shipped import SHIPPED_RULES, TOKAMAX_SPLASH_MIN_TRAIN_KV_LEN
from kernelry_tpu_splash.plugin import SPLASH, TOKAMAX_SPLASH
from kernelry_tpu_splash.predictions import cycles_to_move, predictions, source, visited

KINDS = ("v5e", "v5p", "v6e", "tpu7x")
DIMS = (64, 128, 256)
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
MASKS = {"causal": masks.Causal(), "full": masks.Full(), "window": masks.SlidingWindow(1023)}
SHIPPED = Policy.shipped(switches=Switches())


def request(kind, length, mask, dims=128, mode=Mode.TRAIN, dtype="bfloat16"):
    facts = {"head_dim": dims, "value_dim": dims, "mode": mode, "dtype": dtype}
    return Request(target=f"tpu:{kind}" if kind else "tpu", q_len=length, mask=MASKS[mask], **facts)


def cycles(spec, asked):
    """Predicted cycles of a head with the default tiling: forward, and in training backward with what dQ moves."""
    tiling, walks = spec.tilings(asked)[0], spec is TOKAMAX_SPLASH
    forward = _of(spec, "forward", asked, tiling, ("block_q", "block_kv", "block_kv_compute"), walks)
    return forward if asked.mode is Mode.PREFILL else forward + _backward(spec, asked, tiling)


def _of(spec, part, asked, tiling, names, walks=False):
    blocks = tuple(tiling[name] for name in names)
    return next(p.cycles for p in predictions(spec.name, part, asked, walks=walks) if p.blocks[: len(blocks)] == blocks)


_KEYS = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")


def _backward(spec, asked, tiling):
    parts, rows = asked.kv_len // tiling["block_kv_dkv"], asked.q_len
    if spec is SPLASH:
        if tiling["backward_kernels"] == 2:
            apart = _of(spec, "dq", asked, tiling, ("block_q_dq", "block_kv_dq"))
            return _of(spec, "dkv", asked, tiling, _KEYS) + apart
        written = 2 * parts * rows * 2  # bytes of a column of dQ: written and read in bfloat16
        return _of(spec, "fused", asked, tiling, _KEYS) + cycles_to_move(written * asked.head_dim, asked)
    walks = tiling["dq_reduction_steps"] != 1
    written = 2 * parts * rows * 4  # in float32
    if walks:  # each visited block reads and writes its rows of one of three sums
        blocks = visited(asked.mask, (rows, asked.kv_len), tiling["block_q_dkv"], tiling["block_kv_dkv"]).blocks
        written = 2 * 4 * (blocks * tiling["block_q_dkv"] + 3 * rows)
    return _of(spec, "fused", asked, tiling, _KEYS, walks) + cycles_to_move(written * asked.head_dim, asked)


@functools.cache
def share(group, kind):
    """tokamax_splash's cycles over splash's, the geometric mean over head dims, lengths and masks."""
    mode, lengths, names = GROUPS[group]
    asked = [request(kind, length, name, dims, mode) for length in lengths for name in names for dims in DIMS]
    ratios = [cycles(TOKAMAX_SPLASH, each) / cycles(SPLASH, each) for each in asked]
    return math.exp(statistics.fmean(map(math.log, ratios)))


def order(asked):
    return [name for name in first_match(SHIPPED.defaults, asked).names if name in ("splash", "tokamax_splash")]


LONG = tuple(length for length in LENGTHS if length >= TOKAMAX_SPLASH_MIN_TRAIN_KV_LEN.value)
SHORT = tuple(length for length in LENGTHS if length not in LONG)
GROUPS = {
    "prefill": (Mode.PREFILL, LENGTHS, ("causal", "full", "window")),
    "train-long": (Mode.TRAIN, LONG, ("causal", "full")),
    "train-short": (Mode.TRAIN, SHORT, ("causal", "full")),
    "train-window": (Mode.TRAIN, LENGTHS, ("window",)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", GROUPS)
def test_of_the_splash_kernels_the_one_predicted_to_be_faster_comes_first(group, kind):
    """Within three per cent it is splash, which needs no further package."""
    mode, lengths, names = GROUPS[group]
    faster = ["tokamax_splash", "splash"] if share(group, kind) < 0.97 else ["splash", "tokamax_splash"]
    for length in lengths:
        for name in names:
            assert order(request(kind, length, name, mode=mode)) == faster, (length, name)


@pytest.mark.parametrize("group", GROUPS)
def test_the_source_of_an_order_says_the_range_of_what_is_predicted(group):
    mode, lengths, names = GROUPS[group]
    found = [share(group, kind) for kind in KINDS]
    reason = first_match(SHIPPED.defaults, request("v5e", lengths[0], names[0], mode=mode)).reason
    assert reason.startswith(f"{source()}: ")
    assert f"{min(found):.2f} to {max(found):.2f}" in reason


@pytest.mark.parametrize(
    "asked",
    [request(None, 8192, "causal"), request("v4", 8192, "causal"), request("v6e", 8192, "causal", dtype="float32")],
    ids=["no kind", "v4", "float32"],
)
@pytest.mark.parametrize("mode", [Mode.TRAIN, Mode.PREFILL])
def test_where_nothing_is_predicted_splash_comes_first_and_the_policy_says_so(asked, mode):
    asked = dataclasses.replace(asked, mode=mode)
    assert order(asked) == ["splash", "tokamax_splash"]
    assert "not predicted for this kind or dtype" in first_match(SHIPPED.defaults, asked).reason


def test_kinds_are_met_by_jaxs_names_of_the_devices():
    for name, kind in (("TPU v5 lite", "v5e"), ("TPU v6 lite", "v6e"), ("TPU v5p", "v5p"), ("TPU7x", "tpu7x")):
        asked = Request(target=f"tpu:{name}", q_len=4096, mode=Mode.PREFILL, dtype="bfloat16")
        assert asked.target.kind == kind
        assert order(asked) == ["tokamax_splash", "splash"]


def test_every_shipped_rule_says_where_its_order_comes_from():
    assert all(rule.reason for rule in SHIPPED_RULES)
    words = ("measured", "predicted", "published", "MaxText", "platform")
    assert [rule.reason for rule in SHIPPED_RULES if not any(word in rule.reason for word in words)] == []


def test_an_explanation_says_it():
    asked = request("v6e", 4096, "causal", mode=Mode.PREFILL)
    found = kernelry.explain(asked, policy=SHIPPED)
    assert found.kernel == "tokamax_splash"
    assert "tokamax_splash, splash, dot_product, auto; predicted by libtpu" in found.rule


def test_without_tokamax_splash_serves_and_says_nothing(caplog):
    asked = request("v6e", 4096, "causal", mode=Mode.PREFILL)
    bare = Environment(versions=(("tokamax", None),))
    assert kernelry.resolve(asked, policy=SHIPPED, environment=bare).kernel == "splash"
    assert caplog.records == []


TABLES = "data/autotuning"
GPUS = {"h100": "nvidia_h100_80gb_hbm3", "a100": "nvidia_a100-sxm4-40gb"}


def _published(device, operation):
    """Median milliseconds of the fastest tiling, by call; those without a bias and a mask array."""
    found = importlib.util.find_spec("tokamax")
    if found is None or metadata.version("tokamax") != "0.0.17":
        pytest.skip("tokamax 0.0.17 is not installed")
    path = Path(found.submodule_search_locations[0]) / TABLES / GPUS[device] / f"{operation}.json"
    table = {key: value for key, value in json.loads(path.read_text()).items() if not json.loads(key)["bias"]}
    medians = {
        key: [
            statistics.median(each["evaluation_times_ms"]) for each in tilings.values() if each["evaluation_times_ms"]
        ]
        for key, tilings in table.items()
    }
    return {key: min(times) for key, times in medians.items() if times}


def _mean_ratio(device, operation, other):
    one, two = _published(device, operation), _published(device, other)
    common = one.keys() & two.keys()
    assert len(common) >= 40
    return math.exp(statistics.fmean(math.log(one[key] / two[key]) for key in common))


CUDNN, MOSAIC, TRITON = (
    "jax_nn_dot_product_attention",
    "pallas_mosaic_gpu_flash_attention",
    "pallas_triton_flash_attention",
)


@pytest.mark.versions
def test_the_order_on_an_h100_is_that_of_the_published_times():
    ratios = _mean_ratio("h100", CUDNN, MOSAIC), _mean_ratio("h100", MOSAIC, TRITON)
    rule = first_match(SHIPPED.defaults, Request(target="gpu:h100", q_len=4096, mode=Mode.PREFILL))
    assert re.findall(r"takes ([\d.]+)", rule.reason) == [f"{ratio:.2f}" for ratio in ratios]
    assert ratios < (1, 1)
    assert rule.names[:3] == ("cudnn_jax", "tokamax_mosaic", "pallas_flash")


@pytest.mark.versions
def test_on_an_a100_cudnn_is_as_fast_as_the_published_triton_kernel():
    ratio = _mean_ratio("a100", CUDNN, TRITON)
    rule = first_match(SHIPPED.defaults, Request(target="gpu:a100", q_len=4096, mode=Mode.PREFILL))
    assert f"cuDNN takes {ratio:.2f} of" in rule.reason
    assert rule.names[:2] == ("cudnn_jax", "pallas_flash")
