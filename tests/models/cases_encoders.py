"""Encoders, and models with biases or several stacks, whose layers are reproduced."""

import functools
import types
from unittest import mock

import numpy as np
from model_case import Case

SOURCE, TARGET = 40, 24
"""Tokens of an encoder and of its decoder: unlike, so that a call says its stack by its lengths."""


def stack_of(call):
    """The stack of a call of a model with an encoder and a decoder."""
    lengths = call.query.shape[1], call.key.shape[1]
    return {(SOURCE, SOURCE): "encoder", (TARGET, TARGET): "decoder", (TARGET, SOURCE): "cross"}[lengths]


def source_and_target(ids):
    """The ids of an encoder and of a decoder."""
    return {"input_ids": ids, "decoder_input_ids": ids[:, :TARGET]}


def attending(ids):
    """The ids of a decoder, and the output of an encoder."""
    import torch

    states = torch.randn(2, SOURCE, 64, generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids[:, :TARGET], "encoder_hidden_states": states}


def self_or_cross(call):
    """The stack of a call of a decoder that attends to an encoder."""
    return "" if call.key.shape[1] == TARGET else "cross"


def speech(ids):
    """Random features for Whisper's encoder, whose convolution halves their number, and ids of its decoder."""
    import torch

    features = torch.randn(2, 16, 2 * SOURCE, generator=torch.Generator().manual_seed(2))
    return {"input_features": features, "decoder_input_ids": ids[:, :TARGET]}


def unpadded(ids):
    """Ids with a padding mask, from which BLOOM makes its bias."""
    import torch

    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def images(size=28, channels=3):
    """Random images."""

    def inputs(ids):
        import torch

        return {"pixel_values": torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(2))}

    return inputs


def position_bias(call):
    """T5's bias, which its code passes to attention."""
    return call.more["position_bias"]


def made_bias(call):
    """The bias that the code made for a whole model, [B N, 1, S] or [1, N, T, S]."""
    bias = call.more["bias"]
    return bias if bias.ndim == 4 else bias.reshape(call.query.shape[0], -1, *bias.shape[1:])


def falcon_bias(call):
    """Falcon's bias, times H ** -0.5."""
    return made_bias(call) * call.query.shape[3] ** -0.5


def mpt_bias(call):
    """MPT's bias [N, 1, max_seq_len], of the last keys."""
    return call.more["bias"][None, :, :, -call.key.shape[1] :]


IMAGES = np.isin(np.arange(SOURCE), [*range(5, 11), *range(20, 27)])
"""Two images, none longer than the window."""
PREFIX = np.arange(SOURCE) < 15


def with_images(name):
    """Ids whose images are said by an input of a name."""

    def inputs(ids):
        import torch

        return {"input_ids": ids, name: torch.tensor(IMAGES).int().expand(2, -1)}

    return inputs


def with_prefix(ids):
    """Ids whose prefix has the type 0."""
    import torch

    return {"input_ids": ids, "token_type_ids": torch.tensor(~PREFIX).int().expand(2, -1)}


def as_generated(ids):
    """Ids with images, and the masks that `generate` makes for them: a plain forward pass makes others."""
    import torch
    from capture import tiny_config, tiny_options
    from transformers import Gemma4UnifiedForConditionalGeneration

    config = tiny_config(tiny_options("gemma4_unified", {}))
    config._attn_implementation = "eager"
    states, positions = torch.zeros(*ids.shape, 64), torch.arange(SOURCE)[None]
    types = torch.tensor(IMAGES).int().expand(2, -1)
    make = Gemma4UnifiedForConditionalGeneration.create_masks_for_generate
    return {"input_ids": ids, "attention_mask": make(config, states, None, None, positions, mm_token_type_ids=types)}


def without_tower():
    """Makes no tower for images, which needs packages that are not installed."""
    import torch
    from transformers import AutoModel

    def from_config(config, **options):
        return (
            torch.nn.Identity() if config.model_type == "gemma3n_vision" else AutoModel.from_config(config, **options)
        )

    name = "transformers.models.gemma3n.modeling_gemma3n.AutoModel"
    return mock.patch(name, types.SimpleNamespace(from_config=from_config))


VISION = {"image_size": 28, "patch_size": 7, "num_hidden_layers": 2}
STACKS = {
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
translation = functools.partial(Case, options=STACKS, inputs=source_and_target, stack_of=stack_of, in_order=True)
crossing = functools.partial(Case, inputs=attending, stack_of=self_or_cross, in_order=True)
t5 = functools.partial(Case, inputs=source_and_target, stack_of=stack_of, in_order=True, bias=position_bias, gain=2.0)

TEXT_ENCODERS = [
    *map(
        Case,
        [
            "bert",
            "roberta",
            "camembert",
            "xlm-roberta",
            "xlm-roberta-xl",
            "electra",
            "ernie",
            "data2vec-text",
            "dpr",
            "roberta-prelayernorm",
            "bert-generation",
            "roc_bert",
            "distilbert",
            "albert",
            "layoutlm",
            "splinter",
            "nomic_bert",
            "gte",
            "jina_embeddings_v3",
            "eurobert",
            "esm",
            "ultrabert",
            "openai_privacy_filter",
        ],
    ),
    Case("gte", {"head_dim": 32}),
    Case("bert", {"is_decoder": True}),
    Case("roberta", {"is_decoder": True}),
    *(
        crossing(model_type, {"is_decoder": True, "add_cross_attention": True})
        for model_type in ["bert", "electra", "xlm-roberta-xl", "roc_bert"]
    ),
    Case("rembert", products=True),
    Case("megatron-bert", products=True),
    Case("esm", {"position_embedding_type": "rotary"}),
    Case("modernbert", {"local_attention": 12, "global_attn_every_n_layers": 2}),
    Case("modernbert", {"local_attention": 13}),
    Case("modernbert-decoder", {"local_attention": 12}),
    Case("embedding_gemma2_text", dtype="float64", tolerance=1e-9),
    Case("neomme"),
    Case("neomme", {"per_layer_config": {1: {"sliding_window": 3}, 5: {"sliding_window": None}}}),
    Case("mpnet", products=True, bias=made_bias),
]
VISION_ENCODERS = [
    *(
        Case(model_type, VISION, inputs=images(), gain=6.0)
        for model_type in ["vit", "deit", "dinov2", "dinov3_vit", "clip_vision_model", "siglip_vision_model"]
    ),
    Case("dinov2", {**VISION, "head_dim": 32}, inputs=images(), gain=6.0),
    Case("clip_text_model"),
    Case("siglip_text_model", class_name="SiglipTextModel", gain=2.0),
]
LEARNED_POSITIONS = [
    *map(Case, ["biogpt", "ctrl", "gpt_bigcode", "opt", "gpt_neox"]),
    Case("gptj", {"rotary_dim": 8}),
    Case("codegen", {"rotary_dim": 8}),
    Case("gpt2", gain=6.0),
    Case("gpt2", {"scale_attn_by_inverse_layer_idx": True}, gain=6.0),
    Case("gpt2", {"scale_attn_weights": False}, gain=4.0),
    Case("gpt2", {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}, gain=4.0),
    crossing("gpt2", {"add_cross_attention": True, "scale_attn_by_inverse_layer_idx": True}, gain=6.0),
    Case("gpt_bigcode", {"multi_query": False}),
    Case("gpt_bigcode", {"scale_attn_weights": False}, gain=4.0),
    Case("gpt_neo", {"attention_types": [[["global", "local"], 3]], "window_size": 7}, products=True),
    Case("gpt_neo", {"attention_types": [[["global"], 2], [["local"], 4]], "window_size": 5}, products=True),
    Case("xglm", products=True),
    Case("imagegpt", products=True),
    Case("imagegpt", {"scale_attn_by_inverse_layer_idx": True}, products=True),
    Case("openai-gpt", products=True),
]
WITH_BIASES = [
    Case("falcon", products=True),
    Case("falcon", {"multi_query": False}, products=True),
    Case("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, products=True),
    # Its eager code adds the bias twice.
    Case("falcon", {"alibi": True}, products=True, bias=falcon_bias, implementation="sdpa"),
    Case("bloom", products=True, bias=made_bias, inputs=unpadded),
    Case("bloom", {"hidden_size": 32, "n_embed": 32}, products=True, bias=made_bias, inputs=unpadded),
    Case("bloom", {"num_attention_heads": 8}, products=True, bias=made_bias, inputs=unpadded),
    Case("mpt", {"max_seq_len": 64}, products=True, bias=mpt_bias),
    Case("mpt", {"attn_config": {"softmax_scale": 0.4}}, products=True, bias=mpt_bias),
    Case("mpt", {"attn_config": {"alibi": False, "alibi_bias_max": 4}}, products=True, bias=mpt_bias),
]
STACKED = [
    *map(translation, ["bart", "mbart", "pegasus", "marian", "blenderbot", "blenderbot-small", "m2m_100", "plbart"]),
    translation(
        "whisper",
        options={
            **STACKS,
            "d_model": 64,
            "num_mel_bins": 16,
            "max_source_positions": SOURCE,
            "max_target_positions": 64,
        },
        inputs=speech,
    ),
    *(t5(model_type, options={"num_layers": 3}) for model_type in ["t5", "mt5", "umt5"]),
    t5("t5", options={"num_layers": 2, "num_decoder_layers": 3, "num_heads": 8}),
    t5("t5", options={"num_layers": 2, "num_key_value_heads": 1}),
]
SECTIONS = {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}}
GEMMA4 = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16}
gemma4 = functools.partial(
    Case, inputs=with_images("mm_token_type_ids"), marked=IMAGES, dtype="float64", tolerance=1e-9
)
MULTIMODAL = [
    *map(
        Case,
        [
            *("llava", "llava_next", "llava_next_video", "vipllava", "video_llava", "idefics3", "smolvlm"),
            *("deepseek_vl", "idefics2", "mistral3", "internvl", "llava_onevision", "qwen2_audio", "got_ocr2"),
            *("aria", "aya_vision", "cohere2_vision", "exaone4_5", "lfm2_vl", "modernvbert", "qwen3_5"),
            *("ultravbert", "qwen3_vl", "qwen3_vl_moe"),
        ],
    ),
    Case("llava", {"text_config": {"model_type": "mistral"}}),
    Case("granite_speech", {"text_config": {"attention_multiplier": 0.4}}),
    Case("qwen2_vl", SECTIONS),
    Case("qwen2_5_vl", SECTIONS),
    Case(
        "glm4v",
        {
            "text_config": {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [1, 1, 2],
                    "partial_rotary_factor": 0.5,
                }
            }
        },
    ),
    Case("glm4v_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}),
    Case("embedding_gemma2", dtype="float64", tolerance=1e-9),
    Case("mllama"),
    Case("mllama_text_model", {"cross_attention_layers": [0, 4]}, class_name="MllamaTextModel"),
    Case("llama4", ignored=(AttributeError,)),
    Case(
        "gemma3n",
        {"text_config": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 128}},
        building=without_tower,
    ),
    Case("gemma3", inputs=with_images("token_type_ids"), marked=IMAGES),
    gemma4("gemma4", {"text_config": {**GEMMA4, "use_bidirectional_attention": "vision"}}),
    gemma4("gemma4", {"text_config": GEMMA4}),
    gemma4("gemma4_unified", inputs=as_generated),
    Case("paligemma", inputs=with_prefix, marked=PREFIX),
    Case("paligemma", {"text_config": {"model_type": "gemma2"}}, inputs=with_prefix, marked=PREFIX),
]
ENCODERS = [*TEXT_ENCODERS, *VISION_ENCODERS, *LEARNED_POSITIONS, *WITH_BIASES, *STACKED, *MULTIMODAL]
SPLASH = [case for case in ENCODERS if case.model_type in ("openai_privacy_filter", "bart", "whisper", "modernbert")]
