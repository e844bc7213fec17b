"""Configs of every model type, mutated: they are read, or refused with the name of a key that was changed."""

import copy
import json
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelry.errors import ConfigError, KernelryError
from kernelry.models import from_huggingface
from kernelry.models.families import families, text_families
from kernelry.models.keys import defaults
from kernelry.models.named import named_configs

NAMES = {model_type: row.get("names", {}) for model_type, row in defaults().items()}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-(2**63), -7, -1, 0, 1, 2, 3, 5, 8, 2**20, 2**20 + 1, 2**64]),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), -1.5, 0.0, 1e-320, 0.5, 1e308]),
    st.sampled_from(["", "full_attention", "sliding_attention", "linear_attention", "yarn", "12", "é\0"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["rope_type", "factor", "0", "full_attention", "x"]), inner, max_size=3),
    ),
    max_leaves=5,
)
LAYERS = st.lists(st.sampled_from(["full_attention", "sliding_attention", "mamba", "wide", ""]), max_size=40)
DELETED = object()


def readable(content):
    """Whether a config can be read."""
    try:
        from_huggingface(content)
    except ConfigError:
        return False
    return True


def starts():
    """Contents to start from: the defaults of each model type that can be read, and the named models."""
    known = [name for name in sorted(families()) if readable({"model_type": name})]
    contents = [{"model_type": name, **defaults()[name]["defaults"]} for name in known]
    outer = [
        {"model_type": name, "text_config": {"model_type": inner, **defaults()[inner]["defaults"]}}
        for name, (inner, _) in text_families().items()
        if inner in known
    ]
    return [*contents, *outer, *named_configs().values()]


STARTS = starts()


@st.composite
def mutated(draw):
    """A config, and the names of the keys that were changed."""
    content = copy.deepcopy(draw(st.sampled_from(STARTS)))
    inner = content.get("text_config", content)
    model_type = inner["model_type"]
    changed = set()
    for _ in range(draw(st.integers(1, 3))):
        changed |= draw(mutation_of(inner, model_type))
    if inner is not content and draw(st.integers(0, 9)) == 0:
        content["text_config"] = draw(VALUES)
        changed.add("text_config")
    return content, changed


@st.composite
def mutation_of(draw, content, model_type):
    """Changes a content; returns the names that it concerns."""
    added = ["layer_types", "sliding_window", "per_layer_config", "rope_scaling", "num_key_value_heads", "head_dim"]
    key = draw(st.sampled_from(sorted({*content, *added, *NAMES[model_type]})))
    value = draw(st.one_of(st.just(DELETED), LAYERS if key == "layer_types" else VALUES, VALUES))
    if value is DELETED:
        content.pop(key, None)
    else:
        content[key] = value
    other = NAMES[model_type].get(key, key)
    return {key, other, *(common for common, own in NAMES[model_type].items() if own == other)}


def check(content, changed):
    """Reads a config, or checks that its refusal names a key that was changed."""
    refusal = None
    try:
        model = from_huggingface(content)
    except KernelryError as error:
        refusal = error
    if refusal is None:
        assert model.kinds
        assert str(model)
        json.dumps(model.to_json())
        return
    assert isinstance(refusal, ConfigError)
    assert any(key in str(refusal) for key in changed), (str(refusal), changed)
    assert len(str(refusal)) < 1500


@given(mutated())
@settings(max_examples=400, deadline=None)
def test_mutated_configs_are_read_or_refused_by_name(config):
    check(*config)


@pytest.mark.fuzz
@given(mutated())
@settings(max_examples=10_000, deadline=None)
def test_ten_thousand_mutated_configs_are_read_or_refused_by_name(config):
    check(*config)


def outcome(content):
    """The kinds of layers of a config, or None where it is refused."""
    return from_huggingface(content).kinds if readable(content) else None


@pytest.mark.parametrize("model_type", sorted(families()))
def test_both_names_of_a_key_are_read_alike(model_type):
    own = {"model_type": model_type, **defaults()[model_type]["defaults"]}
    common = dict(own)
    for name, other in NAMES[model_type].items():
        if common.get(other) is not None:
            common[name] = common.pop(other)
    found = outcome({"model_type": model_type})
    assert outcome(own) == found
    assert outcome(common) == found


@pytest.mark.parametrize("model_type", sorted(name for name in families() if "num_attention_heads" in NAMES[name]))
def test_two_names_of_a_key_that_differ_are_refused(model_type):
    own = NAMES[model_type]["num_attention_heads"]
    with pytest.raises(ConfigError, match=f"{own} = 3 and num_attention_heads = 5 contradict each other"):
        from_huggingface({"model_type": model_type, own: 3, "num_attention_heads": 5})


def test_a_file_cut_anywhere_is_refused_by_its_name(tmp_path):
    path = tmp_path / "config.json"
    text = json.dumps({"model_type": "llama", "num_hidden_layers": 2, "note": "é"}, ensure_ascii=False).encode()
    for length in range(len(text)):
        path.write_bytes(text[:length])
        with pytest.raises(ConfigError) as raised:
            from_huggingface(path)
        assert str(path) in str(raised.value)
    path.write_bytes(text)
    assert from_huggingface(path).kinds[0].layers == (0, 1)


@pytest.mark.parametrize("content", [[], 3, "llama", None, [{"model_type": "llama"}]])
def test_a_file_that_is_no_object_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match="must have an object"):
        from_huggingface(path)


def test_every_model_type_is_in_one_table_and_every_text_model_is_known():
    assert not set(families()) & set(text_families())
    for outer, (inner, changes) in text_families().items():
        assert inner in families(), outer
        assert isinstance(changes, Mapping)
