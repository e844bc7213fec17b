"""A Model where it is used: its phases, its layers in Flax, and its named shapes."""

import dataclasses
import json

import pytest

import kernelry
from kernelry import ModelShape, resolve_phases
from kernelry.config import AttentionConfig
from kernelry.errors import ArgumentError, ConfigError
from kernelry.models import LayerKind, Model, OtherLayers
from kernelry.phases.resolving import ModelPhases, Phases
from kernelry.request.request import Mode

SHAPE = ModelShape(q_len=32, max_len=48, dtype="float32")
HEADS = {"q_heads": 4, "kv_heads": 2, "head_dim": 16, "value_dim": 16, "source": "config.json"}
SLIDING = LayerKind(
    "sliding",
    (0, 1, 3, 4),
    AttentionConfig(type="local_sliding", window=8, soft_cap=30.0, **HEADS),
    bidirectional="image",
)
FULL = LayerKind("full", (2, 5), AttentionConfig(scale=0.5, **HEADS), remarks=("keys are normalised",))
OTHER = OtherLayers("linear_attention", (6,), "linear attention has no softmax.")
MODEL = Model("tiny", (SLIDING, FULL), (OTHER,), source="config.json")


def encoder(name="full", **options):
    return LayerKind(name, (0,), AttentionConfig(**{"type": "full", **options, **HEADS}))


@pytest.fixture(scope="module")
def phases():
    return resolve_phases(MODEL, SHAPE, target="cpu", changes=False)


def test_the_phases_of_a_model_are_those_of_its_kinds(phases):
    assert isinstance(phases, ModelPhases)
    assert list(phases) == ["sliding", "full"]
    assert len(phases) == 2
    assert phases["sliding"] == resolve_phases(SLIDING, SHAPE, target="cpu", changes=False)
    assert dict(phases.items())["full"] is phases["full"]
    train = phases["sliding"].train.request
    assert (str(train.mask), train.soft_cap, train.q_heads, train.kv_heads, train.head_dim) == (
        "window(7, 0)",
        30.0,
        4,
        2,
        16,
    )
    assert phases["full"].decode.request.scale == 0.5


def test_a_kind_that_a_model_does_not_have_is_named_with_the_nearest(phases):
    with pytest.raises(ConfigError, match="unknown kind of layers 'slidng'; did you mean 'sliding'"):
        phases["slidng"]
    with pytest.raises(ConfigError, match="layers 'linear_attention' have no config: linear attention has no softmax"):
        phases["linear_attention"]


def test_the_phases_of_a_model_are_text_and_json(phases):
    text = str(phases)
    assert "sliding: layers 0-1, 3-4: mask=window(7, 0)" in text
    assert "linear_attention: layers 6: linear attention has no softmax." in text
    assert "image tokens see each other: where a call has such tokens, its mask is 'config | spans'" in text
    data = json.loads(json.dumps(phases.to_json()))
    assert sorted(data) == ["disagreements", "kinds", "model"]
    assert data["kinds"]["full"]["remarks"] == ["keys are normalised"]
    assert data["kinds"]["sliding"]["decode"]["request"]["q_len"] == 1


def test_disagreements_of_a_model_name_the_kind():
    model = dataclasses.replace(
        MODEL, kinds=(SLIDING, dataclasses.replace(FULL, config=AttentionConfig(kernel="ragged")))
    )
    found = resolve_phases(model, SHAPE, target="cpu", changes=False).disagreements
    assert found
    assert all(text.startswith("full: ") for text in found)


@pytest.mark.parametrize("options", [{}, {"type": "local_sliding", "window": (4, 4)}])
def test_an_encoder_has_no_decode_and_no_cache(options):
    found = resolve_phases(
        encoder(**options), dataclasses.replace(SHAPE, cache="paged:16"), target="cpu", changes=False
    )
    assert isinstance(found, Phases)
    assert found.decode is None
    assert [resolution.request.mode for resolution in found.all] == [Mode.TRAIN, Mode.PREFILL]
    assert found.disagreements == ()
    assert found.remarks[0].startswith("no decode phase: queries of these layers see later tokens, as in an encoder")
    assert found.remarks[0] in found.explain()
    assert found.to_json()["decode"] is None


def test_cross_attention_decodes_over_the_keys_of_the_encoder():
    found = resolve_phases(encoder("cross"), dataclasses.replace(SHAPE, cache="paged:16"), target="cpu", changes=False)
    assert (found.decode.request.q_len, found.decode.request.kv_len, found.decode.request.page_size) == (1, 48, None)
    assert found.disagreements == ()
    assert found.remarks == ()


def test_block_diffusion_decodes_and_says_that_masks_differ():
    kind = encoder(type="block_diffusion", block_size=4)
    found = resolve_phases(kind, SHAPE, target="cpu", changes=False)
    assert found.decode is not None
    assert found.disagreements[0].startswith("mask meaning: with type 'block_diffusion'")


def test_a_shape_that_contradicts_a_kind_names_the_kind_and_both_sizes():
    with pytest.raises(
        ArgumentError, match=r"layers 'sliding': q_heads=8 is not that of config\.json, q_heads=4; leave q_heads out"
    ):
        resolve_phases(MODEL, dataclasses.replace(SHAPE, q_heads=8), target="cpu")


def test_a_cache_that_a_kind_does_not_fit_names_the_kind():
    with pytest.raises(ArgumentError, match="layers 'full': cache 'rolling' keeps only the last tokens"):
        resolve_phases(MODEL, dataclasses.replace(SHAPE, cache="rolling"), target="cpu")


def test_neither_a_model_nor_a_config_is_refused():
    with pytest.raises(ArgumentError, match=r"config must be a kernelry.config.AttentionConfig, got str"):
        kernelry.resolve_phases("gemma", SHAPE)


def test_kernels_are_chosen_for_a_model_by_a_config():
    model = MODEL.choosing(AttentionConfig(kernel="blockwise"))
    found = resolve_phases(model, SHAPE, target="cpu", changes=False)
    assert {r.kernel for _, phases in found.items() for r in phases.all} == {"blockwise"}
