"""Configs: TOML, YAML and mappings mean the same; what is wrong is named with the nearest right."""

import textwrap

import pytest

import kernelry
from kernelry import Request
from kernelry.config import AttentionConfig, load_config
from kernelry.errors import ConfigError
from kernelry.policy import Condition, Policy, Range, Rule

TOML = """
[model]
whatever = 1
[attention]
forbid_adapters = ["repeat_kv_heads"]
[attention.thresholds]
flash_min_q_len = 64
[[attention.rules]]
when = { mode = ["train"], q_len = ">=128", mask = "causal" }
use = ["blockwise", "auto"]
tiling = { block_q = 64 }
"""
YAML = """
attention:
  forbid_adapters: [repeat_kv_heads]
  thresholds: {flash_min_q_len: 64}
  rules:
    - when: {mode: train, q_len: ">=128", mask: [causal]}
      use: [blockwise, auto]
      tiling: {block_q: 64}
"""


def _file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(textwrap.dedent(text))
    return path


def test_toml_and_yaml_mean_the_same(tmp_path):
    toml, yaml = load_config(_file(tmp_path, "c.toml", TOML)), load_config(_file(tmp_path, "c.yaml", YAML))
    assert [(r.when, r.use, r.tiling) for r in toml.rules] == [(r.when, r.use, r.tiling) for r in yaml.rules]
    assert (toml.thresholds, toml.forbid_adapters) == (yaml.thresholds, yaml.forbid_adapters)
    assert toml.policy.forbidden_adapters == {"repeat_kv_heads"}


def test_a_file_is_named_as_the_rules_source(tmp_path):
    config = load_config(_file(tmp_path, "c.toml", TOML))
    resolution = kernelry.resolve(Request(q_len=256, mask=kernelry.masks.Causal()), policy=config.policy)
    assert resolution.kernel == "blockwise"
    assert resolution.plan.tiling["block_q"] == 64
    assert "c.toml: rule 1" in resolution.rule


def test_an_absent_table_means_the_defaults(tmp_path):
    config = load_config(_file(tmp_path, "c.toml", "[model]\n"))
    assert (config.kernel, config.rules, config.thresholds) == ("auto", (), ())


def test_a_kernel_in_the_config_is_absolute_but_yields_to_use():
    config = load_config({"kernel": "blockwise"})
    assert kernelry.resolve(Request(q_len=8), policy=config.policy).kernel == "blockwise"
    with kernelry.use("dot_product"):
        assert kernelry.resolve(Request(q_len=8), policy=config.policy).kernel == "dot_product"
    with pytest.raises(kernelry.errors.NoKernelError, match="config: kernel = 'blockwise'"):
        kernelry.resolve(Request(q_len=8, mode="decode"), policy=config.policy)


def test_configs_are_values():
    assert load_config({"kernel": "a"}) == load_config({"kernel": "a"})
    assert hash(load_config({"kernel": "a"})) == hash(load_config({"kernel": "a"}))
    assert AttentionConfig().policy is AttentionConfig().policy


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"kernl": "x"}, ["'kernl'", "did you mean 'kernel'"]),
        ({"rules": [{"wen": {}, "use": ["a"]}]}, ["rules.0.wen", "did you mean 'when'"]),
        ({"rules": [{"when": {"qlen": 3}, "use": ["a"]}]}, ["rules.0.when.qlen", "did you mean 'q_len'"]),
        ({"rules": [{"when": {"q_len": "abc"}, "use": ["a"]}]}, ["rule 1", "'abc'", ">=128"]),
        ({"rules": [{"when": {"q_len": "10..5"}, "use": ["a"]}]}, ["rule 1", "when.q_len", "10..5", "low end first"]),
        ({"rules": [{"when": {"q_len": True}, "use": ["a"]}]}, ["rule 1", "when.q_len", "True", ">=128"]),
        ({"rules": [{"when": {"batch": -1}, "use": ["a"]}]}, ["rule 1", "when.batch", "-1", ">=128"]),
        ({"rules": [{"when": {"kv_len": 12.0}, "use": ["a"]}]}, ["rule 1", "when.kv_len", "12.0", ">=128"]),
        ({"rules": [{"when": {"kv_len": "<0"}, "use": ["a"]}]}, ["rule 1", "when.kv_len", "'<0'", "no number"]),
        ({"rules": [{"use": ["a"], "tiling": {"block_q": True}}]}, ["rules.0.tiling.block_q", "integer", "got True"]),
        ({"rules": [{"use": ["a"], "tiling": {"block_q": -8}}]}, ["rules.0.tiling.block_q", "greater", "got -8"]),
        ({"rules": [{"when": {"mode": "trian"}, "use": ["a"]}]}, ["rule 1", "did you mean 'train'"]),
        ({"rules": [{"when": {"mask": "casual"}, "use": ["a"]}]}, ["rule 1", "did you mean 'causal'"]),
        ({"rules": [{"use": ["auto", "x"]}]}, ["rule 1", "only stand last"]),
        ({"rules": [{"when": {}}]}, ["rules.0.use", "required"]),
        ({"thresholds": {"flash_min_qlen": 3}}, ["did you mean 'flash_min_q_len'"]),
        ({"thresholds": {"flash_min_q_len": "many"}}, ["flash_min_q_len", "'many'"]),
        ({"thresholds": {"flash_min_q_len": True}}, ["flash_min_q_len", "integer", "got True"]),
        ({"thresholds": {"flash_min_q_len": -1}}, ["flash_min_q_len", "greater", "got -1"]),
        ({"forbid_adapters": ["repeat_kv"]}, ["did you mean 'repeat_kv_heads'"]),
        ({"kernel": 3}, ["kernel", "got 3"]),
    ],
)
def test_wrong_content_names_the_key_and_the_nearest(content, words):
    with pytest.raises(ConfigError) as caught:
        load_config(content)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("c.toml", "[attention", "not valid TOML"),
        ("c.yaml", "a: [", "not valid YAML"),
        ("c.ini", "", "unknown kind of config"),
        ("c.toml", "attention = 3", "must be a table"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path, name, text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        load_config(_file(tmp_path, name, text))


def test_a_file_that_is_not_utf8_says_where(tmp_path):
    path = tmp_path / "c.toml"
    path.write_bytes(b"[attention]\nkernel = '\xe9'\n")
    with pytest.raises(ConfigError, match=r"c\.toml is not UTF-8: .* at byte 22"):
        load_config(path)


@pytest.mark.parametrize("threshold", [True, -1, 1.5, "64"])
def test_a_policy_refuses_a_threshold_that_is_no_length(threshold):
    with pytest.raises(ConfigError, match=r"threshold flash_min_q_len must be an integer, 0 or more query tokens"):
        Policy.shipped(thresholds={"flash_min_q_len": threshold})


def test_a_threshold_of_zero_leaves_no_short_query():
    config = load_config({"thresholds": {"flash_min_q_len": 0}})
    request = Request(q_len=1, kv_len=1024, target="tpu:v5e", mask=kernelry.masks.Causal().at(query_offset=1023))
    default = next(rule for rule in config.policy.defaults if rule.when.matches(request))
    assert default.names[0] == "splash"


@pytest.mark.parametrize("value", [True, 0, -8, 8.0])
def test_a_rule_refuses_a_tunable_that_is_no_size(value):
    with pytest.raises(ConfigError, match=r"tiling: block_q must be a positive integer, got"):
        Rule(Condition(), ("blockwise",), (("block_q", value),))


def test_a_range_refuses_its_ends_turned_round():
    with pytest.raises(ConfigError, match=r"10\.\.5 holds no number"):
        Range(10, 5)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load_config(tmp_path / "absent.toml")
