"""Causal decoders whose every layer attends to all keys, to a window of them or to chunks."""

from __future__ import annotations

from kernelry.models import layerwise, patterns, rules
from kernelry.models.families.rows import Rows, decoder
from kernelry.models.patterns import CHUNKED, FULL, SLIDING

_PLAIN = (
    "llama apertus apertus1p5_text arcee aria_text bitnet cohere csm ernie4_5 ernie4_5_moe exaone flex_olmo glm glm4 "
    "glm4_moe helium higgs_audio_v2 hunyuan_v1_dense hunyuan_v1_moe hy_v3 internlm3 iquestcoder jais2 minimax_m2 "
    "molmo2_text moshi nanochat nemotron olmo olmo2 olmoe phi qwen3_vl_moe_text qwen3_vl_text sarvam_moe "
    "seed_oss solar_open stablelm"
)
"""Every layer is full, also where a window is set, as in Moshi's configs."""

_EAGER_ONLY = "eager attention stays causal in its code, and whether sdpa does depends on padding"

DECODERS: Rows = {
    _PLAIN: (decoder(layer_types=None),),
    "persimmon": (decoder(layer_types=None, heads=rules.equal),),
    "diffllama": (decoder(layer_types=None, remarks=("two calls a layer, whose outputs are subtracted",)),),
    "jetmoe": (
        decoder(
            layer_types=None,
            own=layerwise.heads_of_experts,
            remarks=("keys and values are repeated for each expert of a token",),
        ),
    ),
    "granite granitemoe granitemoeshared granite_docling_text hyperclovax": (
        decoder(layer_types=None, scale=rules.value_of("attention_multiplier")),
    ),
    "granite_swa granitemoe_swa": (
        decoder(
            layers=patterns.first_of(4),
            scale=rules.value_of("attention_multiplier"),
            sinks=rules.all_sinks,
            rope=layerwise.where_theta(),
        ),
    ),
    # Windows in every layer
    "mistral mixtral phi3 phi4_multimodal phimoe starcoder2": (
        decoder(layers=patterns.windowed("sliding_window"), layer_types=None),
    ),
    "ministral3": (
        decoder(
            layers=patterns.windowed("sliding_window"),
            layer_types=None,
            remarks=("queries are scaled by their positions before the call (llama_4_scaling_beta)",),
        ),
    ),
    "ministral": (decoder(layers=patterns.windowed("sliding_window")),),
    # Windows in some layers
    "qwen2 qwen3 qwen2_vl_text qwen2_5_vl_text": (
        decoder(
            layers=patterns.from_layer("use_sliding_window", "max_window_layers"),
            resized=rules.only_where("use_sliding_window"),
        ),
    ),
    "qwen2_moe": (
        decoder(
            layers=patterns.even_below("use_sliding_window", "max_window_layers"),
            resized=rules.only_where("use_sliding_window"),
        ),
    ),
    "qwen3_moe": (decoder(layers=patterns.windowed("sliding_window", flag="use_sliding_window"), layer_types=None),),
    "dots1": (decoder(layers=patterns.from_layer(None, "max_window_layers")),),
    "mellum": (decoder(),),
    "laguna": (decoder(own=layerwise.listed_heads),),
    "cohere_compass_text": (decoder(rope=layerwise.where_parameters(())),),
    "olmo3": (decoder(layers=patterns.every(4)),),
    "cohere2": (decoder(layers=patterns.every(4, "sliding_window_pattern"), rope=layerwise.on_sliding),),
    "cohere2_moe": (
        decoder(
            layers=patterns.with_prefix(
                "first_k_dense_replace", "prefix_dense_sliding_window_pattern", 4, "sliding_window_pattern"
            ),
            rope=layerwise.dense_or_sliding,
        ),
    ),
    "exaone4 exaone_moe": (
        decoder(layers=patterns.every(4, "sliding_window_pattern"), rope=layerwise.unless_windowed_or_sliding),
    ),
    "afmoe": (decoder(layers=patterns.every(4, "global_attn_every_n_layers"), rope=layerwise.on_sliding),),
    "kolibri1": (decoder(layers=patterns.every(5), rope=layerwise.unless_windowed_or_sliding),),
    "cwm": (decoder(layers=patterns.first_of(4)),),
    "smollm3": (
        decoder(
            layers=patterns.on_rotary_layers(
                4,
                lambda keys, rotary: (
                    SLIDING
                    if keys.flag("use_sliding_window") and keys.get("sliding_window") is not None and not rotary
                    else FULL
                ),
            ),
            rope=layerwise.on_rotary(4),
        ),
    ),
    "muse_glimmer_text muse_spark_text": (
        decoder(
            layers=patterns.back_from_last(4),
            rope=layerwise.where_theta(except_every=4),
        ),
    ),
    "beam": (decoder(layers=patterns.every_or_last(6), rope=layerwise.where_parameters((SLIDING,))),),
    "dory": (
        decoder(
            count=patterns.besides("mlp"), layers=patterns.named_besides("mlp", patterns.every(4)), layer_types=None
        ),
    ),
    # Sinks, chunks, and heads that differ between kinds
    "gpt_oss": (decoder(layers=patterns.every(2), sinks=rules.all_sinks),),
    "flint": (
        decoder(
            layers=patterns.each(lambda layer: FULL if layer < 2 or layer % 4 == 1 else SLIDING, last=FULL),
            sinks=rules.all_sinks,
            rope=layerwise.on_sliding,
        ),
    ),
    "mimo_v2_flash": (
        decoder(
            layers=patterns.each(lambda layer: FULL if layer == 0 or (layer + 1) % 6 == 0 else SLIDING),
            own=layerwise.twice_as_many_sliding,
            heads=rules.other_values,
            resized=rules.or_one_more_than("sliding_window_size"),
            sinks=rules.sliding_sinks,
        ),
    ),
    "llama4_text": (
        decoder(
            layers=patterns.on_rotary_layers(
                4,
                lambda keys, rotary: CHUNKED if rotary and keys.get("attention_chunk_size") is not None else FULL,
            ),
            rope=layerwise.on_rotary(4),
            remarks=layerwise.on_layers_without_rope(
                layerwise.on_rotary(4),
                "attn_temperature_tuning",
                "queries are scaled by their positions before the call (attn_temperature_tuning)",
            ),
        ),
    ),
    # Gemma
    "gemma": (decoder(layer_types=None, causal=rules.refused_flag("use_bidirectional_attention", _EAGER_ONLY)),),
    "gemma2": (
        decoder(
            layers=patterns.every(2),
            scale=rules.root_of("query_pre_attn_scalar"),
            soft_cap="attn_logit_softcapping",
            causal=rules.refused_flag("use_bidirectional_attention", "the code of its attention ignores it"),
        ),
    ),
    "vaultgemma": (
        decoder(
            layers=patterns.every(2), scale=rules.root_of("query_pre_attn_scalar"), soft_cap="attn_logit_softcapping"
        ),
    ),
    "gemma3_text": (
        decoder(
            layers=patterns.every(6, "sliding_window_pattern"),
            scale=rules.root_of("query_pre_attn_scalar"),
            causal=rules.unless_bidirectional,
            resized=rules.half_where_bidirectional,
        ),
    ),
    "gemma3n_text": (decoder(layers=patterns.every(5), scale=rules.unscaled, shared_kv="num_kv_shared_layers"),),
    "gemma4_text gemma4_unified_text": (
        decoder(
            layers=patterns.every(6),
            last_full=True,
            own=layerwise.global_heads,
            scale=rules.unscaled,
            causal=rules.unless_all,
            resized=rules.half_where_all,
            shared_kv="num_kv_shared_layers",
        ),
    ),
    # Latent attention
    "axk1 deepseek_v2 deepseek_v3 glm4_moe_lite minicpm3 sarvam_mla youtu": (
        decoder(layer_types=None, heads=rules.latent, scale=rules.latent_scale()),
    ),
    "mistral4": (
        decoder(
            layer_types=None,
            heads=rules.latent,
            scale=rules.latent_scale({"rope_type": "yarn", "factor": 128.0, "mscale_all_dim": 1.0}),
            remarks=("queries are scaled by their positions before the call (llama_4_scaling_beta)",),
        ),
    ),
    "longcat_flash": (
        decoder(
            count=patterns.twice("num_layers"),
            layer_types=None,
            heads=rules.latent,
            scale=rules.latent_scale(),
            remarks=("layers are attentions, of which each block of the model has two",),
        ),
    ),
}
