"""The shipped policy is what the recordings give, and `auto` loses little in recordings that it was not fitted to."""

import dataclasses
import json
import statistics
from pathlib import Path

import fitting
import policy
import pytest
from choosing import GOAL, Case, Recording

import kernelry
from kernelry import Request
from kernelry.policy.policy import Policy, Switches
from kernelry.policy.rules import first_match
from kernelry.policy.shipped import SHIPPED, SHIPPED_RULES, shipped_rules, thresholds_with

pytestmark = pytest.mark.xdist_group("shipped policy")

RESULTS = policy.RESULTS
WORST = 1.25
"""No single call of a recording takes longer with `auto` than this multiple of the time of its quickest kernel."""


@pytest.fixture(scope="module")
def data():
    return policy.built()


@pytest.mark.parametrize("name", ["choosing-cpu", "choosing-cpu-held-out"])
def test_auto_is_within_five_per_cent_of_the_quickest_kernels_and_nowhere_far_behind(name):
    found = list(policy.regrets(SHIPPED, Recording(RESULTS / f"{name}.json")))
    assert len(found) == 204
    assert statistics.geometric_mean(each.lost for each in found) <= GOAL
    assert {str(each.case): each.lost for each in found if each.lost > WORST} == {}


def test_every_rule_for_cpus_is_within_five_per_cent_on_the_held_out_recording():
    by_rule = {}
    for each in policy.regrets(SHIPPED, Recording(RESULTS / "choosing-cpu-held-out.json")):
        by_rule.setdefault(str(each.rule.when), []).append(each.lost)
    assert len(by_rule) >= 10
    assert {when: lost for when, lost in by_rule.items() if statistics.geometric_mean(lost) > GOAL} == {}


def test_the_committed_file_is_what_the_sources_give(data):
    assert policy.SHIPPED.read_text(encoding="utf-8") == policy.text_of(data), "run make policy and commit the file"


def test_the_file_follows_from_the_times_alone(data, tmp_path):
    """Neither the order of the cases nor what a held-out recording says changes it."""
    for name in ("choosing-cpu", "choosing-cpu-held-out"):
        held = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        held["cases"].reverse()
        if name.endswith(policy.HELD_OUT):
            for case in held["cases"]:
                case["kernels"]["blockwise"]["ms"] = [1e6, 1e6, 1e6]
        (tmp_path / f"{name}.json").write_text(json.dumps(held), encoding="utf-8")
    assert policy.text_of(policy.built(tmp_path)) == policy.text_of(data)


def test_other_times_give_another_file(data, tmp_path):
    held = json.loads((RESULTS / "choosing-cpu.json").read_text(encoding="utf-8"))
    for case in held["cases"]:
        if case["which"] == "decode":
            case["kernels"]["blockwise"]["ms"][1] *= 1000
    (tmp_path / "choosing-cpu.json").write_text(json.dumps(held), encoding="utf-8")
    found = {row["name"]: row["value"] for row in policy.built(tmp_path)["thresholds"]}
    assert found["cpu_blockwise_min_decode_kv_len"] == found["cpu_blockwise_min_decode_grouped_kv_len"] == 8193
    usual = {row["name"]: row["value"] for row in data["thresholds"]}
    assert [name for name in usual if usual[name] != found[name] and "decode" not in name] == []


def test_every_rule_and_threshold_has_a_source_and_says_its_kind():
    words = {"measured": ("measured by",), "predicted": ("predicted by",), "not measured": ("",)}
    words["published"] = ("published with", "shipped H100 timings", "MaxText")
    reasons = {row["name"]: row["reason"] for row in SHIPPED["thresholds"]}
    for row in (*SHIPPED["thresholds"], *SHIPPED["rules"]):
        source, reason = (
            SHIPPED["sources"][row["source"]],
            reasons[row["follows"]] if "follows" in row else row["reason"],
        )
        assert any(word in reason for word in words[source["kind"]]), row
        if source["kind"] == "not measured":
            assert "predicted by" not in reason
            assert "measured by" not in reason
        else:
            assert source["by"].split()[0] in reason, row
            assert (policy.ROOT / source.get("file", "")).exists()


def test_measured_sources_say_where_when_and_with_what():
    found = SHIPPED["sources"]["choosing-cpu"]
    recorded = json.loads((policy.ROOT / found["file"]).read_text(encoding="utf-8"))
    assert (found["date"], found["versions"]) == (recorded["date"], recorded["versions"])
    assert found["device"] == f"{recorded['cores']} cores, {recorded['cpu']['model']}"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Request(target="cpu", q_len=512, mode="prefill"), "measured by benchmarks/choosing.py"),
        (Request(target="tpu:v6e", q_len=4096, mode="train", dtype="bfloat16"), "predicted by libtpu"),
        (Request(target="gpu:h100", q_len=4096, mode="prefill", dtype="bfloat16"), "published with tokamax"),
        (Request(target="gpu:b200", q_len=4096, mode="train", dtype="bfloat16"), "; not measured: "),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_explanation_tells_measured_predicted_and_published_apart(asked, words):
    rule = str(first_match(SHIPPED_RULES, asked))
    others = {"measured by", "predicted by", "published with", "; not measured: "} - {words}
    assert words in rule
    assert not [other for other in others if other in rule and other not in words]


def test_a_users_number_moves_the_rules_that_name_it():
    usual = Request(target="cpu", q_len=1, kv_len=128, mode="decode")
    assert first_match(SHIPPED_RULES, usual).names == ("blockwise", "dot_product")
    moved = shipped_rules(thresholds_with({"cpu_blockwise_min_decode_kv_len": 129}))
    assert first_match(moved, usual).names == ("dot_product",)
    assert first_match(moved, usual).reason == "the user's config"
    none = shipped_rules(thresholds_with({"flash_min_q_len": 0}))
    assert first_match(none, Request(target="tpu", q_len=1, mode="prefill")).names[0] == "splash"


def test_two_bounds_of_a_length_hold_both():
    asked = Request(target="tpu:v6e", q_len=12288, mode="train", dtype="bfloat16")
    for least, first in ((8192, "tokamax_splash"), (16384, "splash")):
        rules = shipped_rules(thresholds_with({"tokamax_splash_min_train_kv_len": least}))
        rule = first_match(rules, asked)
        assert rule.names[0] == first
        assert "blockwise" in rule.names


# A device that was recorded


def recorded(times):
    """The file of a made recording on an H100: {(mask, which, length, keys): {kernel: milliseconds}}."""
    rows = []
    for (mask, which, length, keys), each in times.items():
        span = {"window": 256, "packed": 64, "cache": keys}.get(mask, 0)
        case = Case(length, mask, which, span, heads=8, head_dim=128, dtype="bfloat16", keys=keys)
        kernels = {name: {"ms": [ms, ms, ms], "turns": 9} for name, ms in each.items()}
        rows.append(dataclasses.asdict(case) | {"kernels": kernels})
    facts = {"target": "gpu:h100", "device": "NVIDIA H100 80GB HBM3", "date": "2026-01-02", "cores": 8}
    return json.dumps({**facts, "cpu": {"model": "x"}, "versions": {"jax": "0.10.2"}, "cases": rows})


CROSSES = {
    ("causal", "forward", 1024, 0): {"cudnn_jax": 2.0, "pallas_flash": 1.0, "dot_product": 9.0},
    ("causal", "forward", 2048, 0): {"cudnn_jax": 3.0, "pallas_flash": 2.0, "dot_product": 20.0},
    ("causal", "forward", 4096, 0): {"cudnn_jax": 4.0, "pallas_flash": 6.0, "dot_product": 90.0},
    ("full", "forward+backward", 4096, 0): {"cudnn_jax": 4.0, "pallas_flash": 3.9, "dot_product": 90.0},
    ("window", "forward+backward", 4096, 0): {"pallas_flash": 3.0, "dot_product": 90.0, "pallas_mha": 2.0},
    ("cache", "decode", 1, 4096): {"pallas_decode": 5.0, "dot_product": 4.0},
}


@pytest.fixture(scope="module")
def with_h100(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    (folder / "choosing-h100.json").write_text(recorded(CROSSES), encoding="utf-8")
    (folder / "choosing-cpu.json").write_bytes((RESULTS / "choosing-cpu.json").read_bytes())
    return policy.built(folder)


def order(data, asked):
    return first_match(policy.policy_of(data).defaults, asked).names


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({"mode": "prefill", "q_len": 2048}, ("pallas_flash", "cudnn_jax", "dot_product")),
        ({"mode": "prefill", "q_len": 4096}, ("cudnn_jax", "pallas_flash", "dot_product")),
        # within three per cent the order of preference decides
        ({"mode": "train", "q_len": 4096}, ("cudnn_jax", "pallas_flash", "dot_product")),
        (
            {"mode": "train", "q_len": 4096, "mask": kernelry.masks.SlidingWindow(255)},
            ("pallas_mha", "pallas_flash", "dot_product"),
        ),
        ({"mode": "decode", "q_len": 1, "kv_len": 4096}, ("dot_product",)),
    ],
    ids=lambda value: "-".join(map(str, value.values()))[:30] if isinstance(value, dict) else None,
)
def test_on_a_recorded_device_the_times_decide(with_h100, asked, names):
    facts = {"head_dim": 128, "value_dim": 128, "dtype": "bfloat16"}
    assert order(with_h100, Request(target="gpu:h100", **facts, **asked)) == names
    elsewhere = Request(target="gpu:a100", **facts, **asked)
    assert first_match(policy.policy_of(with_h100).defaults, elsewhere) == first_match(SHIPPED_RULES, elsewhere)


def test_a_recorded_device_is_named_as_the_source(with_h100):
    source = with_h100["sources"]["choosing-h100"]
    assert (source["kind"], source["device"], source["date"]) == ("measured", "NVIDIA H100 80GB HBM3", "2026-01-02")
    named = {row["name"]: row for row in with_h100["thresholds"]}
    assert named["h100_cudnn_jax_min_prefill_kv_len"]["value"] == 4096
    assert named["h100_cudnn_jax_min_prefill_kv_len"]["source"] == "choosing-h100"
    asked = Request(target="gpu:h100", q_len=4096, mode="train", dtype="bfloat16")
    rule = first_match(policy.policy_of(with_h100).defaults, asked)
    assert rule.reason == "measured by benchmarks/choosing.py on a device of kind h100"


def test_short_queries_go_to_dot_product_on_a_recorded_device_too(with_h100):
    assert order(with_h100, Request(target="gpu:h100", q_len=64, kv_len=4096, mode="prefill")) == ("dot_product",)


def test_dense_logits_that_are_too_large_are_the_last_resort_of_a_recorded_device_too(with_h100):
    asked = Request(target="gpu:h100", q_len=16384, mode="prefill", head_dim=128, value_dim=128, dtype="bfloat16")
    assert order(with_h100, asked) == ("cudnn_jax", "pallas_flash", "blockwise", "dot_product")


def test_the_regret_on_a_recorded_device_is_that_of_the_kernels_that_serve(with_h100, tmp_path):
    """pallas_mha, the quickest of the made times with a window, refuses windows."""
    (tmp_path / "choosing-h100.json").write_text(recorded(CROSSES), encoding="utf-8")
    found = list(policy.regrets(with_h100, Recording(tmp_path / "choosing-h100.json")))
    kernels = ["pallas_flash", "pallas_flash", "cudnn_jax", "cudnn_jax", "pallas_flash", "dot_product"]
    assert [each.kernel for each in found] == kernels
    assert [each.lost for each in found] == pytest.approx([1, 1, 1, 4 / 3.9, 1.5, 1])


# How lengths and orders are found

SLOW_FIRST = [(64, {"a": 2.0, "b": 1.0}), (128, {"a": 1.0, "b": 1.0}), (256, {"a": 1.0, "b": 2.0})]


def test_a_crossing_leaves_the_least_regret_and_is_the_greatest_of_those_that_tie():
    found = fitting.crossing(SLOW_FIRST, ("b",), ("a",))
    assert (found.least, found.mean, found.worst) == (256, 1.0, 1.0)
    assert fitting.crossing([(64, {"a": 1.0, "b": 2.0})], ("b",), ("a",)).least == 64
    assert fitting.crossing([(64, {"a": 2.0, "b": 1.0})], ("b",), ("a",)).least == 65


def test_a_ranking_ends_at_the_kernel_that_serves_everything_and_ties_by_preference():
    rows = [(64, {"a": 1.02, "b": 1.0, "dot_product": 3.0, "c": 9.0}), (64, {"a": 1.0, "b": 1.0, "dot_product": 2.0})]
    assert fitting.ranking(rows, ("a", "b")) == ("a", "b", "dot_product")
    assert fitting.ranking(rows, ("b", "a")) == ("b", "a", "dot_product")
    assert fitting.ranking([(64, {"a": 1.04, "b": 1.0})], ("a", "b")) == ("b", "a")


def test_one_order_serves_where_two_are_no_better():
    rows = [(length, {"a": 1.0, "dot_product": 3.0}) for length in (64, 128, 256)]
    found = fitting.measured_orders(rows, ())
    assert (found.least, found.above) == (0, ("a", "dot_product"))


def test_the_regret_of_an_order_without_a_time_is_infinite():
    assert fitting.regret(("c",), {"a": 1.0}) == float("inf")
    assert fitting.regret(("c", "a"), {"a": 2.0, "b": 1.0}) == 2.0


def test_the_table_has_every_rule_with_its_source_and_both_regrets(data, capsys):
    policy.show(data, RESULTS)
    told = capsys.readouterr().out
    for rule in Policy.shipped(switches=Switches()).defaults:
        assert f"{rule.when!s}: " in told
    assert "predicted by libtpu" in told
    assert "published by tokamax" in told
    assert told.splitlines()[-1].count("(204)") == 2
    page = (RESULTS.parents[1] / "docs" / "choosing.md").read_text(encoding="utf-8")
    assert told.splitlines()[-1].split() in [line.split() for line in page.splitlines()]


def test_a_stale_file_fails_the_check(monkeypatch, tmp_path, data, capsys):
    stale = tmp_path / "shipped.json"
    stale.write_text("{}\n", encoding="utf-8")
    monkeypatch.setattr(policy, "SHIPPED", stale)
    monkeypatch.setattr(policy, "built", lambda: data)
    monkeypatch.setattr("sys.argv", ["policy.py", "--check"])
    with pytest.raises(SystemExit, match="is not what the recordings give: run make policy"):
        policy.main()
    assert stale.read_text(encoding="utf-8") == "{}\n"
    monkeypatch.setattr("sys.argv", ["policy.py"])
    policy.main()
    assert Path(stale).read_text(encoding="utf-8") == policy.text_of(data)
