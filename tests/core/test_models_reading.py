"""Hugging Face configs of decoders, read without transformers: guesses that were wrong, and what is refused."""

import re
from pathlib import Path

import numpy as np
import pytest
from model_cases import CASES

from kernelry import masks
from kernelry.errors import ConfigError
from kernelry.models import from_huggingface
from kernelry.models.families import families, text_families
from kernelry.models.families.decoders import DECODERS
from kernelry.models.families.hybrids import HYBRIDS

FULL, SLIDING, CHUNKED, LINEAR = "full_attention", "sliding_attention", "chunked_attention", "linear_attention"
LATENT = {"num_attention_heads": 4, "num_key_value_heads": 4, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}


def read(model_type, layers=6, **given):
    return from_huggingface({"model_type": model_type, "num_hidden_layers": layers, **given})


def layers_of(model):
    """The layers of each kind, and of each that is not described."""
    return {each.name: each.layers for each in (*model.kinds, *model.others)}


def seen(kind, length=40):
    """Booleans [T, S]: which keys each query sees."""
    return np.asarray(kind.config.mask.materialize(length, length))[0, 0]


def test_qwen2_slides_from_max_window_layers_on_and_qwen2_moe_the_even_layers_below():
    flags = {"use_sliding_window": True, "max_window_layers": 4, "sliding_window": 7}
    assert layers_of(read("qwen2", **flags)) == {"full": (0, 1, 2, 3), "sliding": (4, 5)}
    assert layers_of(read("qwen2_moe", **flags)) == {"sliding": (0, 2), "full": (1, 3, 4, 5)}


def test_every_layer_of_qwen3_moe_slides_where_its_flag_is_set():
    model = read("qwen3_moe", use_sliding_window=True, max_window_layers=4, sliding_window=7)
    assert layers_of(model) == {"sliding": (0, 1, 2, 3, 4, 5)}
    assert model.kind("sliding").config.mask == masks.SlidingWindow(6, 0)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
def test_a_window_of_qwen_slides_only_where_its_flag_is_set(model_type):
    model = read(model_type, sliding_window=7, max_window_layers=2, use_sliding_window=False)
    assert layers_of(model) == {"full": (0, 1, 2, 3, 4, 5)}


@pytest.mark.parametrize("model_type", ["gemma3_text", "cohere2", "cohere2_moe", "exaone4", "exaone_moe"])
def test_sliding_window_pattern_is_honoured(model_type):
    model = read(model_type, sliding_window_pattern=2)
    assert layers_of(model) == {"sliding": (0, 2, 4), "full": (1, 3, 5)}


@pytest.mark.parametrize(
    ("model_type", "full"), [("olmo3", (3,)), ("gpt_oss", (1, 3, 5)), ("gemma3n_text", (4,)), ("gemma4_text", (5,))]
)
def test_sliding_window_pattern_is_ignored(model_type, full):
    shared = {"num_kv_shared_layers": 0} if model_type == "gemma3n_text" else {}
    assert layers_of(read(model_type, sliding_window_pattern=3, **shared))["full"] == full


@pytest.mark.parametrize("model_type", ["laguna", "mellum", "dots1", "moshi", "cohere_compass_text"])
def test_a_window_alone_does_not_slide_in_every_family(model_type):
    assert layers_of(read(model_type, sliding_window=7)) == {"full": (0, 1, 2, 3, 4, 5)}


@pytest.mark.parametrize("model_type", ["mistral", "mixtral", "phi3", "phimoe", "starcoder2", "ministral", "minimax"])
def test_a_window_slides_in_every_layer_that_attends_and_null_in_none(model_type):
    assert {kind.name for kind in read(model_type, sliding_window=7).kinds} == {"sliding"}
    assert {kind.name for kind in read(model_type, sliding_window=None).kinds} == {"full"}


def test_a_window_is_that_many_keys_with_the_query_itself_in_a_causal_decoder():
    (kind,) = read("mistral", sliding_window=7).kinds
    assert kind.config.mask == masks.SlidingWindow(6, 0)
    assert seen(kind)[20].sum() == 7


def test_a_window_is_that_many_keys_on_each_side_where_a_decoder_is_not_causal():
    (kind,) = read("mistral", sliding_window=7, is_causal=False).kinds
    assert seen(kind)[20].sum() == 15


@pytest.mark.parametrize(
    ("model_type", "flag", "side"),
    [("gemma3_text", True, 4), ("gemma4_text", "all", 5), ("gemma4_unified_text", "all", 5)],
)
def test_a_window_of_gemma_is_halved_where_tokens_see_each_other(model_type, flag, side):
    kind = read(model_type, sliding_window=8, use_bidirectional_attention=flag).kind("sliding")
    assert kind.config.window == (side, side)
    assert seen(kind)[20].sum() == 2 * side + 1


def test_modernbert_counts_half_of_its_window():
    assert seen(read("modernbert-decoder", local_attention=14).kind("sliding"))[20].sum() == 7


@pytest.mark.parametrize(
    ("model_type", "given", "scale"),
    [
        ("llama", {}, None),
        ("granite", {}, 1.0),
        ("granite", {"attention_multiplier": 0.125}, 0.125),
        ("granitemoehybrid", {"layer_types": [FULL] * 6}, 1.0),
        ("granite_docling_text", {}, 0.015625),
        ("hyperclovax", {}, None),
        ("gemma", {}, None),
        ("gemma2", {}, 256**-0.5),
        ("gemma3_text", {"query_pre_attn_scalar": 144}, 1 / 12),
        ("gemma3n_text", {"num_kv_shared_layers": 0}, 1.0),
        ("gemma4_text", {}, 1.0),
        ("zamba", {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}, 0.25),
    ],
)
def test_the_default_scale_is_not_that_of_the_head_dim_in_every_family(model_type, given, scale):
    assert {kind.config.scale for kind in read(model_type, **given).kinds} == {scale}


def test_gemma2_caps_logits_and_gemma3_ignores_the_same_key():
    assert {kind.config.soft_cap for kind in read("gemma2").kinds} == {50.0}
    assert {kind.config.soft_cap for kind in read("gemma3_text", attn_logit_softcapping=50.0).kinds} == {None}


YARN = {"factor": 40.0, "mscale_all_dim": 1.0}
M = 0.1 * np.log(40.0) + 1.0


@pytest.mark.parametrize(
    ("given", "factor"),
    [
        ({}, 1.0),
        ({"rope_scaling": {"type": "yarn", **YARN}}, M**2),
        ({"rope_parameters": {"rope_type": "yarn", **YARN}}, M**2),
        ({"rope_parameters": {"rope_type": "default", **YARN}}, 1.0),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 40.0}}, 1.0),
        ({"rope_parameters": {"rope_type": "yarn", **YARN, "factor": 0.5}}, 1.0),
        ({"rope_scaling": {"type": "yarn", **YARN}, "rope_parameters": {"rope_type": "default"}}, M**2),
    ],
)
def test_a_scaled_rotary_embedding_scales_the_logits_of_latent_attention(given, factor):
    (kind,) = read("deepseek_v3", **LATENT, **given).kinds
    assert (kind.config.head_dim, kind.config.value_dim) == (24, 128)
    scale = 24**-0.5 if kind.config.scale is None else kind.config.scale
    assert scale == pytest.approx(24**-0.5 * factor, rel=1e-12)


def test_mistral4_scales_by_default():
    (kind,) = read("mistral4", **LATENT).kinds
    assert kind.config.scale == pytest.approx(24**-0.5 * (0.1 * np.log(128.0) + 1) ** 2, rel=1e-12)


@pytest.mark.parametrize(
    "model_type", ["gemma2", "gemma3_text", "olmo3", "cohere2", "gpt_oss", "mellum", "ministral", "cwm"]
)
def test_layer_types_win_over_every_default(model_type):
    model = read(model_type, layer_types=[FULL, SLIDING, SLIDING, FULL, FULL, SLIDING])
    assert layers_of(model) == {"full": (0, 3, 4), "sliding": (1, 2, 5)}


def test_the_last_layer_of_gemma4_is_full_whatever_is_said():
    assert layers_of(read("gemma4_text", layer_types=[FULL, SLIDING] * 3))["full"] == (0, 2, 4, 5)


def heads_of(kind):
    config = kind.config
    return config.q_heads, config.kv_heads, config.head_dim, config.value_dim


def test_full_layers_of_gemma4_have_heads_of_their_own():
    given = {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = read("gemma4_text", **given)
    assert [heads_of(kind) for kind in model.kinds] == [(4, 2, 16, 16), (4, 2, 512, 512)]
    fewer = {"global_head_dim": 32, "num_global_key_value_heads": 1}
    assert heads_of(read("gemma4_text", **given, **fewer).kind("full")) == (4, 2, 32, 32)
    assert heads_of(read("gemma4_text", **given, **fewer, attention_k_eq_v=True).kind("full")) == (4, 1, 32, 32)


@pytest.mark.parametrize("key", ["5", "05"])
def test_per_layer_config_wins_over_the_keys_of_the_first_files(key):
    own = {key: {"head_dim": 64, "num_key_value_heads": 1}}
    model = read("gemma4_text", head_dim=16, num_attention_heads=4, global_head_dim=32, per_layer_config=own)
    assert heads_of(model.kind("full")) == (4, 1, 64, 64)


def test_sliding_layers_of_mimo_have_twice_as_many_key_heads_and_sinks():
    model = read("mimo_v2_flash", head_dim=16, v_head_dim=12, num_attention_heads=8, num_key_value_heads=2)
    assert heads_of(model.kind("full")) == (8, 2, 16, 12)
    assert heads_of(model.kind("sliding")) == (8, 4, 16, 12)
    assert (model.kind("full").config.sinks, model.kind("sliding").config.sinks) == (False, True)
    assert seen(model.kind("sliding"), 400)[300].sum() == 129
    assert seen(read("mimo_v2_flash", sliding_window_size=128).kind("sliding"), 400)[300].sum() == 129


def test_laguna_lists_the_heads_of_its_layers():
    heads = [48, 48, 64, 64, 48, 48]
    model = read("laguna", num_attention_heads_per_layer=heads)
    assert {kind.config.q_heads: kind.layers for kind in model.kinds} == {48: (0, 1, 4, 5), 64: (2, 3)}


@pytest.mark.parametrize("model_type", ["cohere2", "afmoe", "lara_mini", "flint", "exaone4", "kolibri1", "beam"])
def test_only_sliding_layers_are_rotated(model_type):
    model = read(model_type, sliding_window=7)
    assert {kind.name: kind.rope for kind in model.kinds} == {"sliding": True, "full": False}


@pytest.mark.parametrize("model_type", ["exaone4", "kolibri1"])
def test_every_layer_is_rotated_where_no_window_is_set(model_type):
    assert [kind.rope for kind in read(model_type, sliding_window=None, layer_types=[FULL] * 6).kinds] == [True]


@pytest.mark.parametrize(
    ("model_type", "given", "without"),
    [
        ("smollm3", {}, (3,)),
        ("smollm3", {"no_rope_layer_interval": 2}, (1, 3, 5)),
        ("smollm3", {"no_rope_layers": [0, 1, 1, 1, 0, 1]}, (0, 4)),
        ("llama4_text", {}, (3,)),
        ("llama4_text", {"no_rope_layers": []}, (3,)),
        ("muse_spark_text", {}, (1, 5)),
        ("muse_spark_text", {"layer_rope_theta": [0, 1, 1, 1, 1, 0.0]}, (0, 5)),
        ("granite_swa", {"layer_rope_theta": [1e4, 0, 1e4, 1e4, 1e4, 1e4]}, (1,)),
        ("olmo_hybrid", {"rope_theta": None}, (3,)),
        ("olmo_hybrid", {"rope_parameters": {"rope_theta": None}}, (3,)),
        ("olmo_hybrid", {}, ()),
        ("cohere2_moe", {"first_k_dense_replace": 1}, (4,)),
        ("cohere2_moe", {"mlp_layer_types": ["sparse"] * 3 + ["dense"] + ["sparse"] * 2}, ()),
        ("jamba", {"attn_layer_period": 3, "attn_layer_offset": 1}, (1, 4)),
    ],
)
def test_layers_without_rotary_embeddings(model_type, given, without):
    model = read(model_type, **given)
    assert tuple(sorted(n for kind in model.kinds if not kind.rope for n in kind.layers)) == without


def test_llama4_says_that_queries_are_scaled_before_the_call_where_they_are_not_rotated():
    model = read("llama4_text", attention_chunk_size=8)
    assert layers_of(model) == {"chunked": (0, 1, 2, 4, 5), "full": (3,)}
    assert model.kind("chunked").config.mask == masks.Chunked(8)
    assert model.kind("chunked").remarks == ()
    assert "attn_temperature_tuning" in model.kind("full").remarks[0]
    assert read("llama4_text", attn_temperature_tuning=4) == read("llama4_text", attn_temperature_tuning=True)
    for off in (False, 0):
        assert read("llama4_text", attn_temperature_tuning=off).kind("full").remarks == ()
    assert layers_of(read("llama4_text", attention_chunk_size=None)) == {"full 1": (0, 1, 2, 4, 5), "full 2": (3,)}


def test_the_last_layers_of_gemma3n_read_earlier_keys():
    model = read("gemma3n_text", layers=10, num_kv_shared_layers=4)
    pairs = {pair for kind in model.kinds for pair in kind.shared_kv}
    assert pairs == {(6, 5), (7, 5), (8, 5), (9, 4)}


@pytest.mark.parametrize(
    ("model_type", "given", "described"),
    [
        ("qwen3_next", {}, {"full": (3,)}),
        ("qwen3_next", {"full_attention_interval": 2}, {"full": (1, 3, 5)}),
        ("jamba", {}, {"full": (4,)}),
        ("bamba", {"attn_layer_indices": [2, 5]}, {"full": (2, 5)}),
        ("granitemoehybrid", {"layer_types": ["mamba", "attention"] * 3}, {"full": (1, 3, 5)}),
        ("recurrent_gemma", {}, {"sliding": (2, 5)}),
        ("nemotron_h", {"hybrid_override_pattern": "M-M*M*"}, {"full": (3, 5)}),
        ("nemotron_h", {"layers_block_type": ["mamba", "attention", "moe"]}, {"full": (1,)}),
        ("nemotron_h", {}, {"full": (2,)}),
        ("lfm2", {"full_attn_idxs": [2, 4]}, {"full": (2, 4)}),
        ("lfm3", {}, {"full": (2,), "sliding": (4,)}),
        ("kimi_linear", {"num_key_value_heads": 32}, {"full": (4,)}),
        (
            "kimi_linear",
            {"linear_attn_config": {"full_attn_layers": [1, 6], "kda_layers": [2, 3, 4, 5]}},
            {"full": (0, 5)},
        ),
        ("minimax_m3_vl_text", {"layer_types": [FULL, "minimax_m3_sparse"] * 3}, {"full": (0, 2, 4)}),
        ("deepseek_v4", {"compress_ratios": [0, 4, 128, 0, 4, 128, 0]}, {"sliding": (0, 3)}),
        ("zamba", {"attn_layer_period": 2, "attn_layer_offset": 1}, {"full": (2, 4)}),
        ("dory", {"layer_types": [FULL, "mlp", SLIDING, "mlp", FULL, "mlp"]}, {"full": (0, 2), "sliding": (1,)}),
    ],
)
def test_layers_that_do_not_attend_leave_the_others_described(model_type, given, described):
    model = read(model_type, **given)
    assert {kind.name: kind.layers for kind in model.kinds} == described
    total = 3 if model_type == "dory" else model.layer_count
    assert sorted(n for layers in layers_of(model).values() for n in layers) == list(range(total))


def test_a_key_has_the_names_of_its_model_type():
    assert from_huggingface({"model_type": "exaone", "num_layers": 3}).layer_count == 3
    assert read("recurrent_gemma", sliding_window=7).kind("sliding").config.mask == masks.SlidingWindow(6, 0)
    with pytest.raises(ConfigError, match="num_hidden_layers = 6 and num_layers = 3 contradict each other: keep one"):
        read("exaone", num_layers=3)


def test_zamba2_has_its_own_54_layers():
    assert read("zamba2", layers=54).kind("full").layers == (6, 12, 18, 24, 30, 36, 42, 47, 51)


def test_longcat_counts_two_attentions_a_block():
    assert layers_of(read("longcat_flash", num_layers=3)) == {"full": (0, 1, 2, 3, 4, 5)}
    assert layers_of(read("longcat_flash")) == {"full": (0, 1, 2, 3, 4, 5)}


@pytest.mark.parametrize(
    ("model_type", "given", "message"),
    [
        ("qwen2", {"layer_types": [SLIDING] * 6}, "use_sliding_window is false, and layer_types has sliding layers"),
        ("cohere2", {"sliding_window": None}, "sliding_window is missing or null, and there are sliding layers"),
        ("exaone4", {"sliding_window": None}, "sliding_window is missing or null, and there are sliding layers"),
        ("exaone4", {"sliding_window_pattern": "LLLG"}, "sliding_window_pattern must be an integer from 1"),
        (
            "llama4_text",
            {"layer_types": [CHUNKED] * 6, "attention_chunk_size": None},
            "attention_chunk_size is missing",
        ),
        (
            "gemma2",
            {"layer_types": ["slidng_attention"] * 6},
            r"layer_types\[0\]: unknown kind of layer 'slidng_attention'",
        ),
        ("gemma2", {"layer_types": [SLIDING] * 5}, "layer_types has 5 entries for 6 layers"),
        (
            "gemma",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention is true, and it is not described",
        ),
        (
            "deepseek_v3",
            {**LATENT, "num_key_value_heads": 2},
            "num_key_value_heads = 2 must be num_attention_heads = 4",
        ),
        (
            "deepseek_v3",
            {"rope_scaling": {"type": "yarn", "mscale_all_dim": 1}},
            "rope_scaling: mscale_all_dim needs factor",
        ),
        (
            "gemma4_text",
            {"per_layer_config": {FULL: {}}},
            "per_layer_config: 'full_attention' must be the number of a layer",
        ),
        ("gemma4_text", {"per_layer_config": {"1": 3}}, r"per_layer_config\['1'\] must be an object"),
        (
            "llama",
            {"per_layer_config": {"1": {"skip": ["attention"]}}},
            r"per_layer_config of layer 1 skips \['attention'\]",
        ),
        (
            "longcat_flash",
            {"num_layers": 6},
            "num_hidden_layers must be two for each of num_layers, got 6, and num_layers",
        ),
        ("longcat_flash", {"num_hidden_layers": 5}, "num_hidden_layers must be two for each of num_layers, got 5"),
        ("gemma3n_text", {"num_kv_shared_layers": 6}, "num_kv_shared_layers = 6 leaves no layer of some kind"),
        ("gemma3n_text", {"num_kv_shared_layers": 9}, "num_kv_shared_layers = 9 leaves no layer of some kind"),
        ("lfm2_moe", {}, "layer_types is missing, and its model type has no default"),
        ("zamba2", {}, "layers_block_type is missing, and only 54 layers have a default"),
        ("nemotron_h", {"hybrid_override_pattern": "MX"}, "hybrid_override_pattern must be a text of the letters ME"),
        ("nemotron_h", {"hybrid_override_pattern": ""}, "hybrid_override_pattern must be a text of the letters ME"),
        ("deepseek_v4", {"compress_ratios": [0, 4]}, "compress_ratios must have 6 numbers of 0, 4, 128, got 2"),
        (
            "kimi_linear",
            {"linear_attn_config": {"full_attn_layers": [1], "kda_layers": [2]}},
            "linear_attn_config names layer 3 of 6",
        ),
        ("recurrent_gemma", {"block_types": []}, "block_types is missing or empty"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 6 layers"),
        ("muse_spark_text", {"layer_rope_theta": [1]}, "layer_rope_theta must be a list of 6 finite numbers"),
        ("laguna", {"num_attention_heads_per_layer": [48]}, "num_attention_heads_per_layer has 1 entries for 6 layers"),
        ("dory", {"layer_types": [FULL, "mlp"]}, "layer_types has 2 entries for 6 layers"),
        ("llama", {"num_hidden_layers": 5000}, "num_hidden_layers must be at most 4096, got 5000"),
        (
            "llama",
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_key_value_heads = 3 must divide num_attention",
        ),
        ("bamba", {}, "no layer that a config describes: its layers keep a state"),
        ("mamba", {}, "no layer that a config describes: its layers keep a state"),
        ("doge", {}, "no layer that a config describes: it adds a bias made of the values"),
        *(
            (name, {}, "no layer that a config describes: it attends to compressed keys, or to keys that an indexer")
            for name in ("deepseek_v32", "deepseek_v4", "glm_moe_dsa", "axk2", "qwen4_exp_text", "hy_v4")
        ),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(model_type, given, message):
    with pytest.raises(ConfigError, match=f"^config: .*{message}" if "rope_scaling: " not in message else message):
        read(model_type, **given)


def test_every_row_of_decoders_is_proven_by_a_case():
    rows = {name: rows for table in (DECODERS, HYBRIDS) for names, rows in table.items() for name in names.split()}
    described = {name for name, (family,) in rows.items() if family.refused is None}
    without_attention = {"falcon_mamba", "mamba", "mamba2", "rwkv"}
    assert described - without_attention - {case.model_type for case in CASES} == set()
    assert without_attention <= described


def test_a_window_that_no_layer_has_and_dropout_are_remarked():
    model = read("qwen2", sliding_window=4096, use_sliding_window=False)
    assert model.remarks == ("sliding_window = 4096 is not used: no layer slides",)
    assert read("qwen2", sliding_window=4096, use_sliding_window=True, max_window_layers=1).remarks == ()
    [said] = read("llama", attention_dropout=0.1).remarks
    assert said.startswith("attention_dropout = 0.1, dropout of training, is not in the kinds' configs")
    assert read("llama", attention_dropout=0.0).remarks == ()


@pytest.mark.parametrize(
    ("model_type", "given"),
    [
        ("llama", {"layer_types": [SLIDING, FULL] * 3}),
        ("mistral", {"layer_types": [FULL] * 6}),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}),
        ("gpt_oss", {"sliding_window_pattern": 4}),
        ("gemma3n_text", {"use_bidirectional_attention": True, "num_kv_shared_layers": 0}),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 262144}}),
        ("llama", {"attention_chunk_size": 8192}),
        ("minimax", {"attn_type_list": [0, 0, 0, 0, 0, 1]}),
        ("llama", {"no_rope_layers": [1, 1, 1, 0, 1, 1]}),
    ],
)
def test_a_key_about_attention_that_the_code_does_not_read_is_remarked(model_type, given):
    (name, *_) = given
    [said] = read(model_type, **given).remarks
    assert said.startswith(f"{name} = ")
    assert said.endswith(f"is not used: the code of {model_type} does not read it")


@pytest.mark.parametrize(
    ("model_type", "given"),
    [
        ("llama", {"layer_types": [FULL] * 6}),
        ("jamba", {"layer_types": [LINEAR] * 4 + [FULL, LINEAR]}),
        ("mistral", {"layer_types": [SLIDING] * 6}),
        ("gemma3_text", {"attn_logit_softcapping": None, "sliding_window_pattern": 3}),
        ("gemma4_text", {"use_bidirectional_attention": "all"}),
        ("llama4_text", {"no_rope_layers": [1, 1, 1, 0, 1, 1], "attention_chunk_size": 8}),
        ("gemma", {"use_bidirectional_attention": False}),
        (
            "exaone4",
            {"sliding_window_pattern": "LLLG", "layer_types": [SLIDING, SLIDING, SLIDING, FULL] + [SLIDING] * 2},
        ),
    ],
)
def test_a_key_that_is_read_or_says_nothing_else_is_not_remarked(model_type, given):
    assert read(model_type, **given).remarks == ()


def test_a_dropout_that_is_no_number_is_refused_by_its_name():
    with pytest.raises(ConfigError, match="attn_pdrop must be a finite number, got 'much'"):
        read("gpt2", attn_pdrop="much")


def test_the_page_about_models_lists_every_type():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    lists = page.partition("## Model types")[2]
    assert set(re.findall(r"`([^` ]+)`", lists)) == {*families(), *text_families()}
