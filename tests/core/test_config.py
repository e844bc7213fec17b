"""Configs: TOML, YAML and mappings mean the same; what is wrong is named with the nearest right."""

import textwrap
import tomllib

import pytest

import kernelry
from kernelry import Request
from kernelry.config import AttentionConfig, load_config, load_maxtext
from kernelry.config.lines import toml_lines
from kernelry.errors import ConfigError
from kernelry.policy.policy import Policy
from kernelry.policy.rules import Condition, Range, Rule

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
    assert "c.toml:8: rule 1" in resolution.rule


def test_an_absent_table_means_the_defaults(tmp_path):
    config = load_config(_file(tmp_path, "c.toml", "[model]\n"))
    assert (config.kernel, config.rules, config.thresholds) == ("auto", (), ())


def test_an_absent_table_is_an_error_where_it_is_required(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("[model]\nlayers = 2\n[model.attention]\nsinks = true\n")
    with pytest.raises(
        ConfigError, match=r"c\.toml: there is no table \[attention\]; found instead: model\. Write one"
    ):
        load_config(path, required=True)
    assert load_config(path, table="model.attention", required=True).sinks
    with pytest.raises(ConfigError, match=r"there is no table \[model\.decoder\]; found instead: layers, attention"):
        load_config(path, table="model.decoder", required=True)
    path.write_text("")
    with pytest.raises(ConfigError, match=r"there is no table \[attention\]; found instead: nothing"):
        load_config(path, required=True)


def test_maxtext_files_are_read_one_over_the_other(tmp_path):
    base, model = tmp_path / "base.yml", tmp_path / "model.yml"
    base.write_text("attention_type: global\nattn_logits_soft_cap: 30.0\n")
    model.write_text("attention_type: local_sliding\nsliding_window_size: 512\n")
    both = load_maxtext(base, model)
    assert (both.window, both.soft_cap, both.source) == (512, 30.0, f"{base} + {model}")
    model.write_text("attn_logits_soft_cap: many\n")
    with pytest.raises(ConfigError, match=r"base\.yml \+ .*model\.yml: MaxText option attn_logits_soft_cap must be"):
        load_maxtext(base, model)


def test_maxtext_files_warn_where_they_are_read_until_ignored(tmp_path):
    path = tmp_path / "base.yml"
    path.write_text("sliding_window_size: 512\nreshape_q: true\n")
    with pytest.warns(UserWarning, match=r"base\.yml: MaxText") as caught:
        config = load_maxtext(path)
    assert [warning.filename for warning in caught] == [__file__] * 2
    assert load_maxtext(path, ignore=("sliding_window_size", "reshape_q")) == config
    with pytest.raises(ConfigError, match=r"base\.yml: ignore must be names in a tuple"):
        load_maxtext(path, ignore="reshape_q")


def test_rules_of_a_later_file_replace_those_of_the_same_names(tmp_path):
    base = "logical_axis_rules: [[activation_length, [context]], [activation_batch_attn, [data]]]\n"
    later = "logical_axis_rules: [[activation_length, [expert]], [activation_heads, tensor]]\n"
    paths = _file(tmp_path, "base.yml", base), _file(tmp_path, "later.yml", later)
    both = load_maxtext(*paths).sharding
    assert (both.batch, both.heads, both.sequence) == (("data",), ("tensor",), ("expert",))
    replacing = _file(tmp_path, "replacing.yml", f"{later}override_logical_axis_rules: true\n")
    only = load_maxtext(paths[0], replacing).sharding
    assert (only.batch, only.heads, only.sequence) == ((), ("tensor",), ("expert",))
    with pytest.raises(ConfigError, match=r"logical_axis_rules: a rule is a logical name and its mesh axes.*, got 3"):
        load_maxtext(paths[0], _file(tmp_path, "wrong.yml", "logical_axis_rules: [3]"))


@pytest.mark.parametrize("paths", [(), (None,), (3,), ({"attention": "flash"},), ("base.yml", None)])
def test_what_is_no_path_of_maxtexts_says_what_is_taken(paths):
    with pytest.raises(ConfigError, match=r"load_maxtext takes the paths of MaxText's files, got .*from_maxtext"):
        load_maxtext(*paths)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("base.toml", "", "MaxText's files are YAML"),
        ("base.yml", "- attention", "must have MaxText's option names and values"),
        ("base.yml", "a: [", "is not valid YAML"),
    ],
)
def test_files_that_are_not_maxtexts_say_so(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_maxtext(tmp_path / name)


def test_a_kernel_in_the_config_is_absolute_but_yields_to_use():
    config = load_config({"kernel": "blockwise"})
    assert kernelry.resolve(Request(q_len=8), policy=config.policy).kernel == "blockwise"
    with kernelry.use("dot_product"):
        assert kernelry.resolve(Request(q_len=8), policy=config.policy).kernel == "dot_product"
    with pytest.raises(kernelry.errors.NoKernelError, match="config: kernel = 'blockwise'"):
        kernelry.resolve(Request(q_len=8, dtype="float64"), policy=config.policy)


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
        ({"rules": [{"when": {"kv_len": "<0"}, "use": ["a"]}]}, ["rule 1", "when.kv_len", "'<0'", "is empty"]),
        ({"rules": [{"use": ["a"], "tiling": {"block_q": True}}]}, ["rules.0.tiling.block_q", "integer", "got True"]),
        ({"rules": [{"use": ["a"], "tiling": {"block_q": -8}}]}, ["rules.0.tiling.block_q", "greater", "got -8"]),
        ({"rules": [{"when": {"mode": "trian"}, "use": ["a"]}]}, ["rule 1", "did you mean 'train'"]),
        ({"rules": [{"when": {"mask": "casual"}, "use": ["a"]}]}, ["rule 1", "did you mean 'causal'"]),
        ({"rules": [{"use": ["auto", "x"]}]}, ["rule 1", "only come last"]),
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
    with pytest.raises(ConfigError, match=r"10\.\.5 is empty"):
        Range(10, 5)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load_config(tmp_path / "absent.toml")


LINED_TOML = """\
[model]
name = "a # [attention]"
text = '''
[attention]
kernel = 3
'''
[attention]
window = 4  # a size

[attention.thresholds]
flash_min_q_len = 64

[[attention.rules]]
use = [
  "blockwise",
  "auto",
]
[[attention.rules]]
use = ["auto"]
tiling = { block_q = 64 }
[attention.rules.when]
q_len = ">=128"
"""
LINED_YAML = """\
model: {name: a}
attention:
  type: global

  thresholds: {flash_min_q_len: 64}
  rules:
    - use: [blockwise, auto]
    - when:
        q_len: ">=128"
      use: auto
"""


def test_every_key_of_toml_is_found_on_its_line():
    lines = toml_lines(LINED_TOML)
    found = {path: LINED_TOML.splitlines()[line - 1].strip() for path, line in lines.items()}
    assert found["attention", "window"].startswith("window")
    assert found["attention", "rules", 1].startswith("[[attention.rules]]")
    assert found["attention", "rules", 1, "tiling"].startswith("tiling")
    assert found["attention", "rules", 1, "when", "q_len"].startswith("q_len")
    assert lines["attention",] == 7


def _paths(value, path=()):
    """The keys of a document with the values that they lead to."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key), inner
        yield from _paths(inner, (*path, key))


@pytest.mark.parametrize(
    "text",
    [
        LINED_TOML,
        TOML,
        "a.b.c = 1\n'x y'.\"z\\u0041\" = [[1, 2], {k = [3]}]\n",
        't = 1979-05-27T07:32:00Z\nf = -1.5e3 # c\ns = "a\\"]#"\n[[p]]\n[[p.q]]\nr=1\n[[p.q]]\n[[p]]\n[p.s]\n',
        's = """\n[x]\n\\""" """"\n[y]\nk = [ # ]\n 1,\n]\n',
        "s = '''\n[x]\n''''\nk = [\n{ a = 1 },\n[2],\n\"[b]\",\n] # [c\n[d] # e = 3\nf = '[g'\nh = \"]\"\n",
        "[ a . 'b.c' ]\n\"d = [\" = 1\n\t1 = 2\n[[e]]\n[[e.f.g]]\nh.i = 1\nh.j = 2\n[e.f.k]\n[[e]]\n[[e.f.g]]\nh = {}",
        'a = """b = 1"""\nc = { d = "}\\"{", e = [\n1, "f = 2",\n] }\ng = \'\'\n'
        'i = """"""\nj = \'\'\'\'\'\'\nk = ""\r\nl = 1',
    ],
)
def test_a_key_is_on_the_line_where_reading_the_file_first_yields_it(text):
    """The file up to the value's line has the key, and the file before that line has not, read by tomllib."""
    lines, document, rows = toml_lines(text), dict(_paths(tomllib.loads(text))), text.splitlines()
    assert set(lines) <= set(document)
    for path, line in lines.items():
        assert path not in _read_up_to(rows, line - 1)
        assert path in _read_up_to(rows, next(end for end in range(line, len(rows) + 1) if _read_up_to(rows, end)))


def _read_up_to(rows, count):
    """The keys of the first rows of a document; none where they are not a document."""
    try:
        return dict(_paths(tomllib.loads("\n".join(rows[:count]))))
    except tomllib.TOMLDecodeError:
        return {}


def test_only_keys_within_arrays_and_inline_tables_have_no_line_of_their_own():
    text = "a = [\n  { b = 1 },\n  [2],\n]\n[[c]]\nd = { e = 1 }\n'f'.g = 1\n"
    within = {path for path, _ in _paths(tomllib.loads(text)) if path[0] == "a" and path != ("a",)}
    assert set(dict(_paths(tomllib.loads(text)))) - set(toml_lines(text)) == {*within, ("c", 0, "d", "e")}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.toml", "[attention]\n\nkernl = 'x'\n", ["c.toml:3: unknown key 'kernl'", "did you mean 'kernel'"]),
        ("c.toml", "[attention]\nkernel = 3\n", ["c.toml:2: kernel", "got 3"]),
        ("c.toml", "[attention]\nsinks = 3\n", ["c.toml:2: sinks must be true or false, got 3"]),
        ("c.toml", "[attention]\ntype = 'local_sliding'\n", ["c.toml:2: type 'local_sliding' needs window"]),
        ("c.toml", "[attention]\nforbid_adapters = [\n'pad',\n]\n", ["c.toml:2: forbid_adapters", "'pad'"]),
        ("c.toml", "[attention.thresholds]\n\nflash_min = 3\n", ["c.toml:3: thresholds", "'flash_min_q_len'"]),
        ("c.toml", "[[attention.rules]]\nuse='a'\n[[attention.rules]]\n", ["c.toml:3: rules.1.use", "required"]),
        (
            "c.toml",
            "[[attention.rules]]\nuse = 'a'\n[attention.rules.when]\nmode = 'train'\nq_len = 'abc'\n",
            ["c.toml:5: rule 1: when.q_len", "'abc'"],
        ),
        ("c.yaml", "attention:\n\n  kernl: x\n", ["c.yaml:3: unknown key 'kernl'", "did you mean 'kernel'"]),
        (
            "c.yaml",
            "attention:\n  rules:\n    - use: a\n    - use: a\n      when:\n        mode: trian\n",
            ["c.yaml:6: rule 2: when.mode", "did you mean 'train'"],
        ),
        ("c.yaml", "a: 1\natention:\n  kernel: a\n", ["c.yaml:2: unknown table 'atention'", "mean 'attention'"]),
        ("c.toml", "[Attention]\nkernel = 'a'\n", ["c.toml:1: unknown table 'Attention'", "mean 'attention'"]),
    ],
)
def test_wrong_content_of_a_file_names_the_line(tmp_path, name, text, words):
    with pytest.raises(ConfigError) as caught:
        load_config(_file(tmp_path, name, text))
    for word in words:
        assert word in str(caught.value)


def test_a_misspelt_table_inside_another_is_noticed(tmp_path):
    with pytest.raises(ConfigError, match=r"c\.toml:2: unknown table 'attentoin'; did you mean 'attention'"):
        load_config(_file(tmp_path, "c.toml", "[model]\n[model.attentoin]\n"), table="model.attention")


@pytest.mark.parametrize(("name", "text", "line"), [("c.toml", LINED_TOML, 18), ("c.yaml", LINED_YAML, 8)])
def test_a_rules_source_is_its_line(tmp_path, name, text, line):
    text = text.replace("window = 4", "sinks = true")
    assert load_config(_file(tmp_path, name, text)).rules[1].source.endswith(f"{name}:{line}: rule 2")


def test_a_kernel_of_a_file_is_explained_by_its_line(tmp_path):
    config = load_config(_file(tmp_path, "c.toml", "[attention]\nsinks = false\nkernel = 'blockwise'\n"))
    assert "c.toml:3: kernel = 'blockwise'" in kernelry.explain(Request(q_len=9), policy=config.policy).rule
