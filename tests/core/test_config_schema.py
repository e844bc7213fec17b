"""The JSON schema of configs: it accepts what load_config accepts, and rejects misspelt keys, modes and types."""

import copy
import dataclasses
import json
import re
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import event, given
from hypothesis import strategies as st

import kernelry
from kernelry import cli
from kernelry.config import AttentionConfig, json_schema, load_config
from kernelry.config.schema import AttentionTable
from kernelry.errors import ConfigError

ROOT = Path(__file__).parents[2]
SCHEMA = json_schema()
TABLES = SCHEMA["$defs"]
CHECK = jsonschema.Draft202012Validator(SCHEMA)

WHEN = {
    "platform": ["gpu", "tpu"],
    "kind": ["v5*", "h100", "NVIDIA A100-SXM4-80GB"],
    "mode": ["train", "autoregressive"],
    "q_len": ">=128",
    "kv_len": [1, "2..8", " < 4 "],
    "batch": None,
    "head_dim": 64,
    "dtype": "bfloat16",
    "mask": ["causal", "window"],
}
FULL = {
    "kernel": "auto",
    "rules": [
        {"when": WHEN, "use": ["splash", "auto"], "tiling": {"block_q": 64}},
        {"use": "mine"},
        {"when": {"mode": "prefill", "platform": (), "mask": "full"}, "use": ["auto"]},
    ],
    "thresholds": {"flash_min_q_len": 0},
    "forbid_adapters": ["pad_sequence"],
    "type": "local_sliding",
    "window": [3, 0],
    "chunk_size": None,
    "block_size": None,
    "soft_cap": 50,
    "scale": 0.125,
    "sinks": True,
    "bias": True,
    "bias_after_cap": True,
    "q_heads": 8,
    "kv_heads": 2,
    "head_dim": 64,
    "value_dim": None,
    "moba": {"chunk_size": 128, "top_k": 2},
    "record_max_logits": False,
    "dropout_rate": 0,
    "logits_dtype": "bfloat16",
    "precision": "highest",
    "tilings": {"splash": {"block_q": 1024}, "mine": {}},
    "sharding": {
        "batch": ["data", "fsdp"],
        "heads": None,
        "sequence": "context",
        "kv_sequence": [],
        "ulysses": [],
        "strategy": "ring",
        "order": "dual",
        "sizes": {"context": 4},
    },
}
VALID = [
    {},
    FULL,
    {"type": "chunk", "chunk_size": 8},
    {"type": "block_diffusion", "block_size": 8, "window": None},
    {"type": "local_sliding", "window": 4},
    {"type": "mla", "moba": None, "soft_cap": None, "scale": -1},
    {"sharding": "batch=data sequence=context ring"},
    {"sharding": {"sequence": ["a", "b"], "strategy": "usp", "ulysses": "b"}},
    {"sharding": None, "precision": None},
    {"rules": (), "kernel": "a kernel of others"},
]
WRONG = [
    {"kernl": "auto"},
    {"kernel": 3},
    {"kernel": ""},
    {"rules": {}},
    {"rules": [{"wen": {}, "use": "auto"}]},
    {"rules": [{"when": {}}]},
    {"rules": [{"use": []}]},
    {"rules": [{"when": {"qlen": 3}, "use": "auto"}]},
    {"rules": [{"when": {"mode": "trian"}, "use": "auto"}]},
    {"rules": [{"when": {"mode": ["train", "test"]}, "use": "auto"}]},
    {"rules": [{"when": {"platform": "cuda"}, "use": "auto"}]},
    {"rules": [{"when": {"mask": "casual"}, "use": "auto"}]},
    {"rules": [{"when": {"dtype": "f4"}, "use": "auto"}]},
    {"rules": [{"when": {"kv_len": "long"}, "use": "auto"}]},
    {"rules": [{"when": {"kv_len": -1}, "use": "auto"}]},
    {"rules": [{"when": {"kv_len": []}, "use": "auto"}]},
    {"rules": [{"use": "auto", "tiling": {"block_q": 0}}]},
    {"thresholds": {"flash_min_qlen": 3}},
    {"thresholds": {"flash_min_q_len": -1}},
    {"thresholds": {"flash_min_q_len": "many"}},
    {"forbid_adapters": ["repeat_kv"]},
    {"forbid_adapters": "repeat_kv_heads"},
    {"type": "local"},
    {"type": None},
    {"type": "local_sliding"},
    {"type": "local_sliding", "window": None},
    {"type": "local_sliding", "window": [3]},
    {"type": "local_sliding", "window": 0},
    {"window": 4},
    {"type": "chunk", "chunk_size": 4, "block_size": 4},
    {"soft_cap": 0},
    {"soft_cap": "50"},
    {"scale": True},
    {"sinks": 1},
    {"bias": None},
    {"q_heads": 0},
    {"head_dim": 64.5},
    {"moba": {"chunk_size": 4}},
    {"moba": {"chunk_size": 4, "top_k": 2, "top": 1}},
    {"dropout_rate": 1},
    {"dropout_rate": None},
    {"logits_dtype": "half"},
    {"precision": "higher"},
    {"precision": 2},
    {"tilings": {"splash": 4}},
    {"tilings": {"splash": {"block_q": "big"}}},
    {"sharding": {"sequnce": "context"}},
    {"sharding": {"strategy": "rings"}},
    {"sharding": {"sizes": {"context": 0}}},
    {"sharding": 3},
]


def _rejected(attention):
    """The first thing that the schema finds wrong; None where it accepts the table."""
    error = next(CHECK.iter_errors({"model": 1, "attention": _plain(attention)}), None)
    return error and error.message


def _plain(value):
    """As a file has it: lists, not tuples."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _is_read(attention):
    try:
        return bool(load_config({"attention": _plain(attention)}))
    except ConfigError:
        return False


def test_it_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == jsonschema.Draft202012Validator.META_SCHEMA["$id"]


def test_it_has_every_option_and_says_what_each_is():
    options = {field.name for field in dataclasses.fields(AttentionConfig)} - {"source"}
    assert set(TABLES["AttentionTable"]["properties"]) == options == set(AttentionTable.model_fields)
    assert [
        (name, key)
        for name, table in TABLES.items()
        for key, told in table["properties"].items()
        if not told.get("description", "").endswith(".")
    ] == []


@pytest.mark.parametrize("attention", VALID, ids=str)
def test_what_is_read_is_accepted(attention):
    assert _is_read(attention)
    assert _rejected(attention) is None


@pytest.mark.parametrize("attention", WRONG, ids=str)
def test_what_is_wrong_is_rejected_as_it_is_when_it_is_read(attention):
    assert not _is_read(attention)
    assert _rejected(attention)


def _enumerations(told, path=()):
    """Every list of names in the schema of a table, with the keys that lead to it."""
    for key, inner in told.items() if isinstance(told, dict) else enumerate(told) if isinstance(told, list) else ():
        if key == "enum":
            yield path, inner
        yield from _enumerations(inner, (*path, key))


def test_every_name_that_editors_offer_is_read():
    sizes = {"local_sliding": "window", "chunk": "chunk_size", "block_diffusion": "block_size"}
    tried = 0
    for table in ("AttentionTable", "WhenTable"):
        for key, told in TABLES[table]["properties"].items():
            for path, names in _enumerations(told):
                for name in names:
                    value = name
                    if key == "sharding":
                        usp = {"sequence": "c", "ulysses": "c"} if name == "usp" else {}
                        value = {path[path.index("properties") + 1]: name, **usp}
                    elif key == "forbid_adapters":
                        value = [name]
                    content = {key: value} | ({sizes[name]: 4} if key == "type" and name in sizes else {})
                    content = content if table == "AttentionTable" else {"rules": [{"when": content, "use": "auto"}]}
                    assert load_config(content)
                    tried += 1
    assert tried > 60


def _configs_of_pages():
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for language, text in re.findall(r"```(toml|yaml)\n(.*?)```", page.read_text(), re.DOTALL):
            if "attention" in text:
                yield page.name, tomllib.loads(text) if language == "toml" else yaml.safe_load(text)


def test_the_configs_of_examples_and_pages_are_accepted():
    files = [(path.name, tomllib.loads(path.read_text())) for path in sorted(ROOT.glob("examples/**/*.toml"))]
    found = [(name, content) for name, content in (*files, *_configs_of_pages()) if "attention" in content]
    assert {"tiny.toml", "choosing.md", "config.md"} <= {name for name, _ in found}
    for name, content in found:
        assert [error.message for error in CHECK.iter_errors(content)] == [], name


def test_a_table_inside_another_is_described_where_it_is():
    check = jsonschema.Draft202012Validator(json_schema(table="model.attention"))
    assert check.is_valid({"model": {"layers": 2, "attention": {"sinks": True}}, "attention": 3})
    assert not check.is_valid({"model": {"attention": {"sink": True}}})
    for table in ("", "model.", 3):
        with pytest.raises(ConfigError, match=r"table must be a name such as 'attention'"):
            json_schema(table=table)


def test_the_installed_kernels_are_offered_and_others_are_valid():
    offered, _ = TABLES["AttentionTable"]["properties"]["kernel"]["anyOf"]
    assert offered["enum"] == ["auto", *(kernel.name for kernel in kernelry.kernels())]


def test_the_command_prints_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernelry", "schema"])
    assert cli.main() == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA
    monkeypatch.setattr(sys, "argv", ["kernelry", "schema", "--table", "model."])
    assert (cli.main(), "got 'model.'" in capsys.readouterr().err) == (2, True)


def test_the_page_says_of_every_key_what_editors_say():
    page = (ROOT / "docs" / "config.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", page, re.MULTILINE)
    told = [
        (key, said["description"])
        for table in ("AttentionTable", "RuleTable", "WhenTable", "MoBATable")
        for key, said in TABLES[table]["properties"].items()
    ]
    assert rows == told
    named = {key: line for line in page.splitlines() for key in re.findall(r"^\| `(\w+)`", line)}
    closed = {"AttentionTable": ("type", "precision"), "WhenTable": ("platform", "mode", "dtype", "mask")}
    for table, keys in closed.items():
        for key in keys:
            for _, names in _enumerations(TABLES[table]["properties"][key]):
                assert [name for name in names if f"`{name}`" not in named[key]] == [], key


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.sampled_from([0.0, 0.5, 1.0, -1.0, 64.0, float("inf")]),
    st.sampled_from(
        ["auto", "train", "", "ring", "causal", "full", "128", ">=1", "8..4", "float32", "highest", "data"]
    ),
    st.just([]),
    st.just({}),
    st.lists(st.sampled_from(["auto", "gpu", "train", 4, ">=8", None]), max_size=3),
    st.dictionaries(st.sampled_from(["block_q", "use", "when", "top_k", "batch"]), st.integers(0, 9), max_size=2),
)


def _places(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(inner, (*path, key))


@st.composite
def configs(draw):
    """A valid config of which up to three places are left out, replaced, renamed, or get another key."""
    config = copy.deepcopy(_plain(draw(st.sampled_from(VALID))))
    for _ in range(draw(st.integers(0, 3))):
        *outer, last = draw(st.sampled_from([*_places(config)][1:] or [("kernel",)]))
        inside = config
        for key in outer:
            inside = inside[key]
        change = draw(st.sampled_from(["leave out", "replace", "rename"]))
        if change == "leave out" and (isinstance(inside, list) or last in inside):
            del inside[last]
        elif change == "rename" and isinstance(inside, dict) and last in inside:
            inside[draw(st.sampled_from([*AttentionTable.model_fields, "use", "mode", f"{last}s"]))] = inside.pop(last)
        else:
            inside[last] = draw(VALUES)
    return config


@given(configs())
def test_nothing_that_is_read_is_rejected(config):
    read, rejected = _is_read(config), _rejected(config)
    event(f"read: {read}, rejected: {bool(rejected)}")
    assert not (read and rejected), rejected
