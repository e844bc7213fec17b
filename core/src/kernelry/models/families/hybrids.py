"""Decoders some of whose layers do not attend, or attend to keys that a config cannot describe."""

from __future__ import annotations

from kernelry.models import layerwise, patterns, rules
from kernelry.models.families.rows import Rows, decoder
from kernelry.models.patterns import CONV, FULL, INDEXED, LINEAR, SLIDING

_NEMOTRON = patterns.lettered(
    "hybrid_override_pattern",
    {"M": LINEAR, "E": "moe", "*": FULL, "-": "mlp"},
    default=(LINEAR, "moe", FULL, "mlp"),
)

_ZAMBA2 = (LINEAR, *(*(LINEAR,) * 5, "hybrid") * 7, *(LINEAR,) * 4, "hybrid", *(LINEAR,) * 3, "hybrid", LINEAR, LINEAR)

HYBRIDS: Rows = {
    "qwen3_next qwen3_5_text qwen3_5_moe_text": (
        decoder(layers=patterns.every(4, "full_attention_interval", other=LINEAR)),
    ),
    "olmo_hybrid": (
        decoder(layers=patterns.every_or_last(4, LINEAR, always=False), rope=layerwise.unless_theta_is_null),
    ),
    "minimax": (decoder(layers=patterns.alternating(FULL, LINEAR), full_slides=True),),
    "minimax_m3_vl_text": (decoder(),),
    "jamba": (
        decoder(
            layers=patterns.periodic("attn_layer_period", "attn_layer_offset"),
            layer_types=None,
            rope=layerwise.nowhere,
        ),
    ),
    "bamba": (
        decoder(
            layers=patterns.numbered("attn_layer_indices", LINEAR, default=patterns.all_of(LINEAR)), layer_types=None
        ),
    ),
    "granitemoehybrid": (
        decoder(
            layers=patterns.all_of(LINEAR),
            scale=rules.value_of("attention_multiplier"),
            rope=layerwise.where_key("position_embedding_type", "rope"),
        ),
    ),
    "falcon_h1": (decoder(layer_types=None, remarks=("each layer keeps a state too, besides its attention",)),),
    "nemotron_h": (
        decoder(
            count=patterns.length_of(_NEMOTRON, "layer_types"),
            layers=_NEMOTRON,
            rope=layerwise.nowhere,
        ),
    ),
    "recurrent_gemma": (
        decoder(
            layers=patterns.cycled("block_types", {"recurrent": LINEAR, "attention": SLIDING}),
            layer_types=None,
            window="attention_window_size",
        ),
    ),
    "lfm2": (decoder(layers=patterns.numbered("full_attn_idxs", CONV, default=patterns.all_full)),),
    "lfm2_moe": (decoder(layers=patterns.said),),
    "lfm3": (decoder(layers=patterns.after((CONV,), patterns.alternating(CONV, FULL, CONV, SLIDING))),),
    "lara_mini": (
        decoder(
            layers=patterns.alternating(LINEAR, SLIDING, LINEAR, FULL, SLIDING),
            rope=layerwise.on_sliding,
        ),
    ),
    "kimi_linear": (
        decoder(
            layers=patterns.within(
                "linear_attn_config",
                {"full_attn_layers": FULL, "kda_layers": LINEAR},
                default=patterns.each(lambda layer: FULL if layer and layer % 4 == 0 else LINEAR),
            ),
            heads=rules.latent,
            rope=layerwise.nowhere,
        ),
    ),
    "zamba": (
        decoder(
            layers=patterns.after(
                (LINEAR, LINEAR, "hybrid"), patterns.periodic("attn_layer_period", "attn_layer_offset", word="hybrid")
            ),
            heads=rules.wide,
            scale=rules.half_dim_scale,
            rope=layerwise.nowhere,
            remarks=("each of these layers keeps a state too, besides its attention",),
        ),
    ),
    "zamba2": (
        decoder(
            layers=patterns.constant(_ZAMBA2),
            heads=rules.wide,
            scale=rules.half_dim_scale,
            rope=layerwise.where_key("use_mem_rope", True),
            remarks=("each of these layers keeps a state too, besides its attention",),
        ),
    ),
    "deepseek_v4": (
        decoder(
            layers=patterns.ratios(
                "compress_ratios",
                {0: SLIDING, 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"},
                default=patterns.each(
                    lambda layer: (
                        "compressed_sparse_attention" if layer > 2 and layer % 2 else "heavily_compressed_attention"
                    )
                ),
            ),
            heads=rules.single,
            sinks=rules.all_sinks,
        ),
    ),
    "axk2 deepseek_v32 glm_moe_dsa hy_v4 hy_v4_vl_text mistral_large4_text qwen4_exp_text": (
        decoder(layers=patterns.all_of(INDEXED), layer_types=None, refused=patterns.CHOSEN_KEYS),
    ),
    "doge": (
        decoder(
            layer_types=None,
            refused="it adds a bias made of the values, and sees the keys of the largest: pass it to a call",
        ),
    ),
    "falcon_mamba mamba mamba2 rwkv": (decoder(layers=patterns.all_of(LINEAR), layer_types=None),),
}
