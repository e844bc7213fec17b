"""The shipped policy's orders against what predicts or publishes them; a change of either fails until both agree."""

import dataclasses
import functools
import json
import re

import predicted
import published
import pytest
from predicted import KINDS, LENGTHS

import kernelry
from kernelry.plugin import Environment, Mode, Request
from kernelry.policy.policy import Policy, Switches
from kernelry.policy.rules import first_match
from kernelry.policy.shipped import SHIPPED_THRESHOLDS
from kernelry_tpu_splash.predictions import source

pytestmark = pytest.mark.xdist_group("shipped policy")

SHIPPED = Policy.shipped(switches=Switches())


def request(kind, length, mask, dim=128, mode=Mode.TRAIN, dtype="bfloat16"):
    return predicted.request(kind, length, mask, dim, mode, dtype)


@functools.cache
def shares(group):
    """Of each kind tokamax_splash's cycles over splash's, the geometric mean over head dims, lengths and masks."""
    mode, lengths, names = GROUPS[group]
    return dict(zip(KINDS, predicted.shares(mode, names, lengths), strict=True))


def order(asked):
    return [name for name in first_match(SHIPPED.defaults, asked).names if name in ("splash", "tokamax_splash")]


LEAST = next(each.value for each in SHIPPED_THRESHOLDS if each.name == "tokamax_splash_min_train_kv_len")
LONG = tuple(length for length in LENGTHS if length >= LEAST)
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
    faster = ["tokamax_splash", "splash"] if shares(group)[kind] < 0.97 else ["splash", "tokamax_splash"]
    for length in lengths:
        for name in names:
            assert order(request(kind, length, name, mode=mode)) == faster, (length, name)


@pytest.mark.parametrize("group", GROUPS)
def test_the_source_of_an_order_says_the_range_of_what_is_predicted(group):
    mode, lengths, names = GROUPS[group]
    found = shares(group).values()
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


def test_the_order_on_an_h100_is_that_of_the_published_times():
    rows = published.read()["h100"]
    ratios = published.ratio(rows, "cudnn", "mosaic"), published.ratio(rows, "mosaic", "triton")
    rule = first_match(SHIPPED.defaults, Request(target="gpu:h100", q_len=4096, mode=Mode.PREFILL))
    assert re.findall(r"takes ([\d.]+)", rule.reason) == [f"{ratio:.2f}" for ratio in ratios]
    assert ratios < (1, 1)
    assert rule.names[:3] == ("cudnn_jax", "tokamax_mosaic", "pallas_flash")


def test_on_an_a100_cudnn_is_as_fast_as_the_published_triton_kernel():
    ratio = published.ratio(published.read()["a100"], "cudnn", "triton")
    rule = first_match(SHIPPED.defaults, Request(target="gpu:a100", q_len=4096, mode=Mode.PREFILL))
    assert f"cuDNN takes {ratio:.2f} of" in rule.reason
    assert rule.names[:2] == ("cudnn_jax", "pallas_flash")


@pytest.mark.versions
def test_the_file_of_published_times_is_what_the_wheel_contains():
    folder = published.tables()
    if folder is None:
        pytest.skip(f"tokamax {published.RELEASE} is not installed")
    assert published.extracted(folder) == published.read()


def test_of_a_call_the_median_of_the_fastest_tiling_is_kept(tmp_path):
    call = {"q": "bf16[1]", "k": "bf16[1]", "v": "bf16[1]", "mask": {"causal_mask": {"offset": 0}}, "bias": None}
    tables = {
        "jax_nn_dot_product_attention": {json.dumps(call): {"{}": {"evaluation_times_ms": [3.0, 1.0, 2.0]}}},
        "pallas_triton_flash_attention": {
            json.dumps(call): {
                "slow": {"evaluation_times_ms": [9.0]},
                "fast": {"evaluation_times_ms": [4.0, 5.0]},
                "none": {"evaluation_times_ms": []},
            },
            json.dumps(call | {"bias": "bf16[1]"}): {"{}": {"evaluation_times_ms": [1.0]}},
        },
    }
    for folder in published.DEVICES.values():
        (tmp_path / folder).mkdir()
        for name, table in tables.items():
            (tmp_path / folder / f"{name}.json").write_text(json.dumps(table), encoding="utf-8")
    row = {"call": 'q=bf16[1] k=bf16[1] v=bf16[1] causal_mask={"offset": 0}', "ms": {"cudnn": 2.0, "triton": 4.5}}
    assert published.extracted(tmp_path) == {"h100": [row], "a100": [row]}
