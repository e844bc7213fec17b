"""The defaults that the reader of configs uses are those of the installed transformers."""

import json

import model_defaults
import pytest

pytestmark = pytest.mark.models


def changes_between(ours, theirs):
    """Sentences that say which default, or which name of a key, differs."""
    for model_type in sorted({*ours, *theirs}):
        mine, other = ours.get(model_type, {}), theirs.get(model_type, {})
        for part in ("defaults", "names"):
            left, right = mine.get(part, {}), other.get(part, {})
            for key in sorted({*left, *right}):
                if left.get(key, "nothing") != right.get(key, "nothing"):
                    told = f"{left.get(key, 'nothing')!r} here, {right.get(key, 'nothing')!r} in transformers"
                    yield f"{model_type}: {part[:-1]} {key} is {told}"


def test_the_defaults_are_those_of_transformers():
    recorded = json.loads(model_defaults.FILE.read_text(encoding="utf-8"))
    changes = list(
        changes_between(recorded["types"], json.loads(model_defaults.as_text(model_defaults.current()))["types"])
    )
    assert not changes, "; ".join([*changes[:20], "if this is meant, run make model-defaults"])


def test_a_change_is_told_by_its_key():
    ours = {"llama": {"defaults": {"head_dim": None}}, "gpt2": {"names": {"hidden_size": "n_embd"}}}
    theirs = {"llama": {"defaults": {"head_dim": 64}}, "gpt2": {}}
    assert list(changes_between(ours, theirs)) == [
        "gpt2: name hidden_size is 'n_embd' here, 'nothing' in transformers",
        "llama: default head_dim is None here, 64 in transformers",
    ]
