"""Conditions of rules, the order of authority, and the environment variables."""

import dataclasses
import itertools

import pytest

import kernelry
from kernelry import Request
from kernelry.config import load_config
from kernelry.errors import ConfigError
from kernelry.masks import MaskForm
from kernelry.policy.measurements import Entry, Measurements
from kernelry.policy.policy import Policy, Switches
from kernelry.policy.rules import AnyRange, Condition, Range, Rule
from kernelry_dot_product.plugin import DOT_PRODUCT

REQUEST = Request(q_len=8)


def spec(name):
    """The kernel dot_product under another name."""
    return dataclasses.replace(DOT_PRODUCT, name=name)


AUTHORITIES = ("argument", "use", "environment", "rule", "measurement", "shipped")
KERNELS = tuple(spec(f"by_{name}") for name in AUTHORITIES[:-1])


def _resolve(authorities):
    """Each authority that is at work asks for the kernel named after it; the shipped one for `by_shipped`."""
    has = set(authorities)
    rules = (Rule(Condition(), ("by_rule",), source="r"),) if "rule" in has else ()
    switches = Switches(kernel="by_environment" if "environment" in has else None)
    timed = Measurements((Entry.of(REQUEST, "by_measurement", 1e-3),)) if "measurement" in has else None
    policy = Policy.shipped(rules=rules, switches=switches)
    kernels = (*KERNELS, spec("dot_product"))  # the shipped policy's choice for short queries
    with kernelry.use("by_use" if "use" in has else None):
        asked = "by_argument" if "argument" in has else "auto"
        return kernelry.resolve(REQUEST, kernels=kernels, policy=policy, measurements=timed, kernel=asked).kernel


@pytest.mark.parametrize(
    "authorities", [c for n in range(1, 6) for c in itertools.combinations(AUTHORITIES[:-1], n)], ids="+".join
)
def test_the_first_authority_in_order_decides(authorities):
    assert _resolve(authorities) == f"by_{authorities[0]}"


def test_without_any_authority_the_shipped_policy_decides():
    assert _resolve(()) == "dot_product"


def test_measurements_outrank_votes_and_votes_the_shipped_policy(shelf, install):
    shelf.put_hook("voter", "kernelry_rank(request, candidates)", "return ['voted']")
    install()
    kernels = (spec("dot_product"), spec("measured"), spec("voted"))
    policy = Policy.shipped(switches=Switches())
    request = Request(q_len=23)
    timed = Measurements((Entry.of(request, "measured", 1e-3),))
    assert kernelry.resolve(request, kernels=kernels, policy=policy).kernel == "voted"
    assert kernelry.resolve(request, kernels=kernels, policy=policy, measurements=timed).kernel == "measured"


@pytest.mark.parametrize(
    ("asked", "inside", "outside"),
    [([64, 128], 128, 96), ([">=256", 64], 64, 128), (["1..3", "8..9"], 8, 5), ([7], 7, 8)],
)
def test_a_list_of_ranges_holds_what_any_holds(asked, inside, outside):
    found = AnyRange.parse(asked)
    assert inside in found
    assert outside not in found


def test_an_empty_list_is_no_range():
    with pytest.raises(ConfigError, match="empty list"):
        AnyRange.parse([])


def test_a_config_may_list_sizes_and_says_them():
    rule = load_config({"rules": [{"when": {"head_dim": [64, ">=256"]}, "use": "a"}]}).rules[0]
    assert [rule.when.matches(Request(q_len=8, head_dim=size)) for size in (64, 128, 512)] == [True, False, True]
    assert "head_dim=64|>=256" in str(rule)


def test_a_config_may_ask_for_query_heads_per_key_head():
    rule = load_config({"rules": [{"when": {"groups": ">=2"}, "use": "a"}]}).rules[0]
    heads = ((8, 8), (8, 4), (8, 1))
    assert [rule.when.matches(Request(q_len=8, q_heads=n, kv_heads=k)) for n, k in heads] == [False, True, True]
    assert "when groups>=2 use a" in str(rule)


@pytest.mark.parametrize(
    ("written", "known"),
    [("H100", "h100"), ("NVIDIA H100 80GB HBM3", "h100"), ("TPU v5 lite", "v5e"), ("v5p", "v5p"), ("V5*", "v5*")],
)
def test_kinds_are_known_by_jaxs_names_too(written, known):
    assert Condition(kind=(written,)).kind == (known,)


def test_a_kind_by_jaxs_name_matches_that_device():
    condition = Condition(kind=("NVIDIA A100-SXM4-40GB",))
    assert condition.matches(Request(q_len=8, target="gpu:a100"))
    assert not condition.matches(Request(q_len=8, target="gpu:h100"))


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(ConfigError, match=r"when\.kind: unknown kind 'v5f'; did you mean 'v5"):
        Condition(kind=("v5f",))


@pytest.mark.parametrize("platform", ["cuda", "rocm", "CUDA"])
def test_names_of_gpu_stacks_hint_at_gpu(platform):
    with pytest.raises(ConfigError, match="did you mean 'gpu'"):
        Condition(platform=(platform,))


@pytest.mark.parametrize(
    ("text", "strict"), [("1", True), ("TRUE", True), ("on", True), ("0", False), ("no", False), ("", False)]
)
def test_strict_is_read(text, strict):
    assert Switches.parse({"KERNELRY_STRICT": text}).strict is strict


@pytest.mark.parametrize("text", ["2", "ture", "strict", "-1"])
def test_strict_must_be_yes_or_no(text):
    with pytest.raises(ConfigError, match=r"KERNELRY_STRICT='.*' is neither yes nor no; write one of 1, true"):
        Switches.parse({"KERNELRY_STRICT": text})


def test_the_lock_file_has_a_default_and_a_switch():
    assert Switches.parse({}).lock == "kernelry.lock.json"
    assert Switches.parse({"KERNELRY_LOCK": "x.json"}).lock == "x.json"


def test_an_unknown_variable_warns_with_the_nearest():
    with pytest.warns(UserWarning, match="KERNELRY_STRIC is ignored; did you mean 'KERNELRY_STRICT'"):
        Switches.parse({"KERNELRY_STRIC": "1"})


@pytest.mark.parametrize(
    "data",
    [
        {"q_len": "8 8"},
        {"q_len": 8, "mode": "trian"},
        {"q_len": 8, "target": 3},
        {"q_len": 8, "bias": 3},
        {},
        {"q_len": 8, "gradients": [3]},
        {"q_len": 8, "mask": [{"kind": "casual"}]},
        {"q_len": 8, "mask": [{}]},
        {"q_len": 8, "mask": 3},
    ],
)
def test_requests_that_cannot_be_read_are_config_errors(data):
    with pytest.raises(ConfigError, match="cannot be read"):
        Request.from_json(data)


@pytest.mark.parametrize("data", [3, [3], [{}], [{"kind": "causal"}], [{"kind": "x", "params": []}]])
def test_mask_forms_that_cannot_be_read_are_config_errors(data):
    with pytest.raises(ConfigError, match="mask: cannot be read from"):
        MaskForm.from_json(data)


def test_adapters_that_do_not_exist_cannot_be_forbidden():
    with pytest.raises(
        ConfigError, match="forbid_adapters: unknown adapter 'gather_page'; did you mean 'gather_pages'"
    ):
        Policy.shipped(forbidden_adapters=("gather_page",))
    with pytest.raises(ConfigError, match="unknown adapter 'gather_page'"):
        _ = kernelry.config.AttentionConfig(forbid_adapters=("gather_page",)).policy


@pytest.mark.parametrize(
    ("written", "bounds"),
    [
        ("128..1024", (127, 128, 1024, 1025)),
        (">=128", (127, 128)),
        ("<=1024", (1024, 1025)),
        (7, (6, 7, 7, 8)),
        (">=0", (0,)),
    ],
)
def test_the_bounds_of_a_range_are_its_ends_and_the_numbers_just_outside(written, bounds):
    assert Range.parse(written).bounds == bounds
