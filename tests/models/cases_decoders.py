"""Decoders whose layers are reproduced, with the options that are varied."""

from model_case import Case

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"

PLAIN = [Case(t) for t in """llama apertus apertus1p5_text arcee aria_text bitnet cohere csm ernie4_5 ernie4_5_moe exaone flex_olmo glm glm4
glm4_moe helium higgs_audio_v2 hunyuan_v1_dense hunyuan_v1_moe hy_v3 internlm3 iquestcoder jais2 minimax_m2
molmo2_text moshi nanochat nemotron olmo olmo2 olmoe qwen3_moe qwen3_vl_moe_text qwen3_vl_text sarvam_moe seed_oss
solar_open stablelm persimmon phi diffllama jetmoe granite granitemoe granitemoeshared granite_docling_text hyperclovax
granite_swa granitemoe_swa mistral mixtral phi3 phi4_multimodal phimoe starcoder2 ministral3 ministral qwen2 qwen3 qwen2_vl_text qwen2_5_vl_text qwen2_moe dots1 mellum laguna cohere_compass_text olmo3 cohere2 cohere2_moe
exaone4 exaone_moe afmoe kolibri1 cwm smollm3 muse_glimmer_text muse_spark_text beam dory modernbert-decoder gpt_oss flint mimo_v2_flash llama4_text gemma gemma2 vaultgemma gemma3_text gemma3n_text gemma4_text gemma4_unified_text
axk1 deepseek_v2 deepseek_v3 glm4_moe_lite minicpm3 sarvam_mla youtu mistral4 longcat_flash
qwen3_next qwen3_5_text qwen3_5_moe_text olmo_hybrid minimax minimax_m3_vl_text jamba bamba granitemoehybrid falcon_h1 nemotron_h recurrent_gemma lfm2 lfm2_moe lfm3 lara_mini kimi_linear zamba zamba2 deepseek_v4""".split()]
DECODERS = PLAIN
SPLASH = [case for case in DECODERS if case.model_type in ("gemma2",)]
