"""Decoders whose layers are reproduced, with the options that are varied."""

from model_case import Case

FULL, SLIDING, CHUNKED, LINEAR = "full_attention", "sliding_attention", "chunked_attention", "linear_attention"
FLAG = {"use_sliding_window": True}

PLAIN = """
    llama apertus apertus1p5_text arcee aria_text bitnet cohere csm ernie4_5 ernie4_5_moe exaone flex_olmo glm glm4
    glm4_moe helium higgs_audio_v2 hunyuan_v1_dense hunyuan_v1_moe hy_v3 internlm3 iquestcoder jais2 minimax_m2
    molmo2_text moshi nanochat nemotron olmo olmo2 olmoe persimmon phi qwen3_moe qwen3_vl_moe_text qwen3_vl_text
    sarvam_moe seed_oss solar_open stablelm jetmoe
"""

GROUPS = {"n_group": 1, "topk_group": 1}

FULL_DECODERS = [
    *(Case(model_type) for model_type in PLAIN.split()),
    Case("llama", {"num_key_value_heads": None, "head_dim": None}),
    Case("llama", {"head_dim": 24, "num_key_value_heads": 1}),
    Case("llama", {"is_causal": False}),
    Case("diffllama", calls_per_layer=2),
    Case("granite"),
    Case("granite", {"attention_multiplier": 0.125}),
    Case("granitemoe"),
    Case("granitemoeshared"),
    Case("granite_docling_text"),
    Case("hyperclovax"),
    Case("hyperclovax", {"attention_multiplier": 0.5}),
    Case("granite_swa"),
    Case("granite_swa", {"layer_rope_theta": [0, 1e4, 1e4, 0, 1e4, 1e5], "sliding_window": 3}),
    Case("granitemoe_swa"),
]

WINDOWS = [
    *(
        Case(name)
        for name in ["mistral", "mixtral", "phi3", "phi4_multimodal", "phimoe", "starcoder2", "ministral3", "ministral"]
    ),
    *(Case(name, {"sliding_window": None}) for name in ["mistral", "mixtral", "phi3", "phimoe", "starcoder2"]),
    Case("mistral", {"is_causal": False}),
    Case("ministral", {"layer_types": [SLIDING, FULL] * 3}),
    *(Case(name) for name in ["qwen2", "qwen3", "qwen2_moe"]),
    *(Case(name, {**FLAG, "max_window_layers": 2}) for name in ["qwen2", "qwen3", "qwen2_moe"]),
    Case("qwen2", {**FLAG, "sliding_window": None, "max_window_layers": 2}),
    Case("qwen3_moe", FLAG),
    Case("qwen3_moe", {**FLAG, "sliding_window": None}),
    Case("qwen2", {**FLAG, "layer_types": [SLIDING, FULL] * 3}),
    *(
        Case(name, {**FLAG, "max_window_layers": 4, "rope_parameters": {"mrope_section": [2, 3, 3], "rope_theta": 1e4}})
        for name in ("qwen2_vl_text", "qwen2_5_vl_text")
    ),
    Case("dots1", {**GROUPS, "n_shared_experts": 1}),
    Case("dots1", {**GROUPS, "n_shared_experts": 1, "max_window_layers": 3}),
    Case("mellum"),
    Case("mellum", {"layer_types": [SLIDING, FULL] * 3}),
    Case("laguna"),
    Case("laguna", {"num_attention_heads_per_layer": [4, 8, 4, 2, 2, 2], "layer_types": [FULL, SLIDING] * 3}),
    *(
        Case(
            "cohere_compass_text",
            {
                "rope_parameters": {FULL: None, SLIDING: {"rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
                "layer_types": words,
            },
        )
        for words in ([SLIDING, FULL] * 3, None)
    ),
    *(
        Case(name)
        for name in ["olmo3", "cohere2", "cohere2_moe", "exaone4", "exaone_moe", "afmoe", "kolibri1", "cwm", "smollm3"]
    ),
    Case("olmo3", {"sliding_window_pattern": 2}),
    Case("cohere2", {"sliding_window_pattern": 2}),
    Case("cohere2", {"is_causal": False}),
    Case("cohere2_moe", {"first_k_dense_replace": 2, "sliding_window_pattern": 3}),
    Case("cohere2_moe", {"first_k_dense_replace": 2, "prefix_dense_sliding_window_pattern": 2}),
    Case("exaone4", {"sliding_window_pattern": 3}),
    Case("exaone4", {"sliding_window": None, "layer_types": [FULL] * 6}),
    Case("exaone4", {"layer_types": [FULL] * 6}),
    Case("afmoe", {"global_attn_every_n_layers": 2}),
    Case("kolibri1", {"layer_types": [FULL, SLIDING] * 3}),
    Case("cwm", {"layer_types": [SLIDING] * 6}),
    Case("smollm3", {**FLAG}),
    Case("smollm3", {**FLAG, "no_rope_layers": [0, 1, 1, 0, 1, 0]}),
    Case("smollm3", {"no_rope_layer_interval": 2}),
    Case("muse_glimmer_text"),
    Case("muse_glimmer_text", {"layer_rope_theta": [1e4, 0, 0, 1e4, 0, 1e4]}),
    Case("muse_spark_text"),
    Case("beam", {**GROUPS}),
    Case("beam", {**GROUPS, "rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 1e4}, SLIDING: None}}),
    Case("dory", {"n_input_layers": 2, "n_output_layers": 2, "n_recurrent_loops": 1}),
    Case(
        "dory",
        {
            "num_hidden_layers": 12,
            "n_input_layers": 4,
            "n_output_layers": 4,
            "n_recurrent_loops": 1,
            "layer_types": [word for word in [FULL, SLIDING] * 3 for word in (word, "mlp")],
        },
    ),
    Case("modernbert-decoder", {"local_attention": 14}),
    Case("modernbert-decoder", {"local_attention": 14, "global_attn_every_n_layers": 2}),
]

KINDS = [
    Case("gpt_oss"),
    Case("gpt_oss", {"layer_types": [FULL, FULL, SLIDING] * 2}),
    Case("gpt_oss", {"sliding_window_pattern": 3}),
    Case("flint"),
    Case("mimo_v2_flash", {"v_head_dim": 12}),
    Case("mimo_v2_flash", {"sliding_window_size": 4, "layer_types": [SLIDING, FULL] * 3, "v_head_dim": 12}),
    Case("llama4_text", {"attention_chunk_size": 8}),
    Case("llama4_text", {"attention_chunk_size": 8, "no_rope_layers": [0, 1, 1, 0, 1, 1]}),
    Case("llama4_text", {"attention_chunk_size": 8, "no_rope_layer_interval": 2, "attn_temperature_tuning": False}),
    Case("llama4_text", {"attention_chunk_size": 8, "layer_types": [CHUNKED] * 6}),
    Case("llama4_text", {"attention_chunk_size": None, "floor_scale": 8}),
]

PER_LAYER = {
    **{f"{layer:02}": {"head_dim": 8} for layer in (0, 2, 4)},
    **{str(layer): {"head_dim": 32, "num_key_value_heads": 4} for layer in (1, 3, 5)},
}
EACH_OTHER = "use_bidirectional_attention"

GEMMA = [
    Case("gemma"),
    Case("gemma2"),
    Case("gemma2", {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0}),
    Case("gemma2", {"attn_logit_softcapping": None, "layer_types": [FULL, SLIDING, FULL] * 2}),
    Case("gemma2", {"is_causal": False}),
    Case("vaultgemma"),
    Case("gemma3_text"),
    Case("gemma3_text", {"sliding_window_pattern": 2, "query_pre_attn_scalar": 24}),
    Case("gemma3_text", {"layer_types": [FULL, SLIDING, SLIDING] * 2}),
    Case("gemma3_text", {"attn_logit_softcapping": 5.0}),
    Case("gemma3_text", {EACH_OTHER: True, "sliding_window_pattern": 2}),
    Case("gemma3_text", {EACH_OTHER: True, "sliding_window": 8, "sliding_window_pattern": 2}),
    Case("gemma3n_text", {"num_kv_shared_layers": 0}),
    Case("gemma3n_text", {"num_hidden_layers": 10, "num_kv_shared_layers": 4, "sliding_window_pattern": 2}),
    *(
        Case(name, {"global_head_dim": 32, **options}, tolerance=1e-4)
        for name in ("gemma4_text", "gemma4_unified_text")
        for options in (
            {},
            {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
            {EACH_OTHER: "all", "layer_types": [SLIDING, FULL] * 3},
        )
    ),
    Case("gemma4_text", {"sliding_window_pattern": 2, "num_global_key_value_heads": 1}, tolerance=1e-4),
    Case("gemma4_text", {"layer_types": [FULL, SLIDING] * 3, EACH_OTHER: "vision"}, tolerance=1e-4),
    Case("gemma4_text", {"layer_types": [SLIDING, FULL] * 3, "num_kv_shared_layers": 3}, tolerance=1e-4),
    Case("gemma4_text", {"per_layer_config": PER_LAYER, "layer_types": [SLIDING, FULL] * 3}, tolerance=1e-4),
    Case("gemma4_text", {"layer_types": [SLIDING, FULL] * 3, EACH_OTHER: "all"}, tolerance=1e-9, dtype="float64"),
    Case("gemma4_text", tolerance=1e-9, dtype="float64"),
]

LATENT = {
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "head_dim": 8,
}
YARN = {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.8, "original_max_position_embeddings": 64}
NEW_YARN = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN}}
OLD_YARN = {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", **YARN}}
SCALED_YARN = {"rope_parameters": {**NEW_YARN["rope_parameters"], "llama_4_scaling_beta": 0.1}}
WITHOUT = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN, "mscale_all_dim": 0}}

LATENT_GAINS = {"minicpm3": 4.0, "youtu": 4.0}
"""Their logits are large as they are."""

LATENT_DECODERS = [
    *(
        Case(name, {**LATENT, **GROUPS, **options}, name=f"{name}-{label}", gain=LATENT_GAINS.get(name, 12.0))
        for name in ["axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "sarvam_mla", "youtu"]
        for label, options in (("default", {}), ("yarn", NEW_YARN))
    ),
    Case("deepseek_v3", {**LATENT, **GROUPS, **OLD_YARN}, name="deepseek_v3-yarn in rope_scaling"),
    Case("deepseek_v2", {**LATENT, **OLD_YARN}, name="deepseek_v2-yarn in rope_scaling"),
    Case("deepseek_v3", {**LATENT, **GROUPS, **WITHOUT}, name="deepseek_v3-yarn without mscale_all_dim"),
    Case("minicpm3", {**LATENT, "v_head_dim": None}, name="minicpm3-v_head_dim=None", gain=4.0),
    Case("mistral4", {**LATENT, "head_dim": 24}, name="mistral4-default"),
    Case("mistral4", {**LATENT, "head_dim": 24, **SCALED_YARN}, name="mistral4-yarn"),
    Case("longcat_flash", {**LATENT, "num_layers": 3}, name="longcat_flash-default", gain=4.0),
    Case("longcat_flash", {**LATENT, "num_hidden_layers": 4}, name="longcat_flash-num_hidden_layers", gain=4.0),
    Case("longcat_flash", {**LATENT, "num_layers": 3, **NEW_YARN}, name="longcat_flash-yarn", gain=4.0),
]

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8}

ZAMBA2 = {
    "layers_block_type": [LINEAR, "hybrid", "hybrid"] * 2,
    "mamba_d_state": 8,
    "mamba_ngroups": 1,
    "n_mamba_heads": 4,
    "num_mem_blocks": 2,
    "adapter_rank": 4,
}

HYBRIDS = [
    *(Case(name) for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")),
    Case("qwen3_next", {"full_attention_interval": 2}),
    Case("qwen3_5_text", {"layer_types": [FULL, LINEAR] * 3}),
    Case("olmo_hybrid"),
    Case("olmo_hybrid", {"rope_parameters": {"rope_theta": None, "rope_type": "default"}}),
    Case("olmo_hybrid", {"rope_theta": None}),
    Case("olmo_hybrid", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "num_hidden_layers": 3}),
    Case("minimax"),
    Case("minimax", {"sliding_window": None, "layer_types": [LINEAR, FULL, FULL] * 2}),
    Case("minimax_m3_vl_text"),
    Case("jamba"),
    Case("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    Case("bamba", {**MAMBA, "attn_layer_indices": [1, 4]}),
    Case("granitemoehybrid", {**MAMBA, "layer_types": [LINEAR, FULL] * 3}),
    Case("granitemoehybrid", {**MAMBA, "layer_types": ["mamba", "attention"] * 3, "position_embedding_type": "rope"}),
    Case("falcon_h1", {**MAMBA, "mamba_d_ssm": 128}),
    Case("nemotron_h"),
    Case("nemotron_h", {"hybrid_override_pattern": "M*-M*E"}),
    Case("nemotron_h", {"layers_block_type": ["mamba", "attention", "mlp", "attention"]}),
    Case("recurrent_gemma", gain=2.0),
    Case("recurrent_gemma", {"block_types": ["attention", "recurrent"]}, gain=2.0),
    Case("lfm2"),
    Case("lfm2", {"full_attn_idxs": [2, 5]}),
    Case("lfm2_moe", {"layer_types": ["conv", FULL] * 3}),
    Case("lfm3"),
    Case("lfm3", {"layer_types": [SLIDING, FULL] * 3}),
    Case("lara_mini"),
    Case("kimi_linear", LATENT, name="kimi_linear-default", gain=4.0),
    Case(
        "kimi_linear",
        {**LATENT, "linear_attn_config": {"full_attn_layers": [2, 6], "kda_layers": [1, 3, 4, 5]}},
        name="kimi_linear-linear_attn_config",
    ),
    Case("zamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "head_dim": 32}, in_order=True),
    *(
        Case("zamba2", {**ZAMBA2, "use_mem_rope": rope}, name=f"zamba2-use_mem_rope={rope}", in_order=True)
        for rope in (False, True)
    ),
    Case("deepseek_v4", {"layer_types": [SLIDING, "heavily_compressed_attention", "compressed_sparse_attention"] * 2}),
]

DECODERS = [*FULL_DECODERS, *WINDOWS, *KINDS, *GEMMA, *LATENT_DECODERS, *HYBRIDS]
_IN_SPLASH = [
    "mistral",
    "mistral-is_causal=False",
    "cohere2",
    "gpt_oss",
    "llama4_text-attention_chunk_size=8",
    "gemma2-query_pre_attn_scalar=24-attn_logit_softcapping=5.0",
    "deepseek_v3-yarn",
]
SPLASH = [case for case in DECODERS if str(case) in _IN_SPLASH]
"""Windows of one and of two sides, sinks, chunks, a soft cap, and values of another head dim."""
