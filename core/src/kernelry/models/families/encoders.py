"""Encoders, models with an encoder and a decoder, and decoders with biases or learned positions."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from kernelry.models import encoding, layerwise, patterns, rules
from kernelry.models.families.rows import Rows, decoder, encoder

_SCALED_FIRST = ("queries are multiplied by H ** -0.5 before the call, so the scale is 1",)
_ALIBI = "ALiBi [B, N, 1, S]: slopes times the keys' numbers among those that are not padding"
_NO_CROSS = "the keys of its cross attention are of an encoder that its config does not name"
_BUCKETS = "learned, by buckets of the distance of key and query [1, N, T, S]"

plain = functools.partial(encoder, layer_types=None, heads=rules.equal, rope=layerwise.nowhere)
"""An encoder that sees everything, with positions added to its embeddings and equal heads."""

bert = functools.partial(
    plain,
    causal=encoding.decoder_where("is_decoder"),
    bias=encoding.absolute(),
)
"""An encoder that is a decoder where `is_decoder` is set."""

_BERTS_CROSS = functools.partial(
    plain, stack="cross", count=encoding.cross_count("add_cross_attention", needed="is_decoder")
)

rotary = functools.partial(plain, rope=layerwise.everywhere)
"""An encoder that sees everything, with rotary embeddings and equal heads."""

gpt = functools.partial(decoder, layer_types=None, heads=rules.equal, rope=layerwise.nowhere)
"""A decoder with learned positions and equal heads; those with `causal=True` do not read `is_causal`."""

_DECODER = functools.partial(
    gpt, stack="decoder", count="decoder_layers", heads=encoding.equal_of("decoder_attention_heads")
)
_CROSS = functools.partial(_DECODER, stack="cross", causal=False)
_T5_DECODER = functools.partial(
    gpt,
    stack="decoder",
    count=encoding.count_of("num_decoder_layers", "num_hidden_layers"),
    heads=rules.equal_and_sized,
    scale=rules.unscaled,
)

_MODERNBERT: Mapping[str, Any] = {
    "layers": patterns.first_of(3, "global_attn_every_n_layers"),
    "window": "local_attention",
    "resized": encoding.half_unless("sliding_window"),
    "heads": rules.equal,
}
"""What its encoder and its decoder have in common."""

ENCODERS: Rows = {
    # Encoders of text
    "bert roberta camembert xlm-roberta xlm-roberta-xl electra ernie data2vec-text dpr roberta-prelayernorm "
    "bert-generation roc_bert rembert megatron-bert": (bert(), _BERTS_CROSS()),
    "distilbert albert layoutlm splinter": (plain(),),
    "mpnet": (plain(bias=_BUCKETS),),
    "nomic_bert": (rotary(heads=rules.equal_and_sized),),
    "gte jina_embeddings_v3": (rotary(heads=rules.equal_and_sized),),
    "eurobert": (encoder(layer_types=None),),
    "esm": (
        bert(
            scale=rules.unscaled,
            bias=encoding.absolute("rotary"),
            rope=encoding.rotary_where("position_embedding_type", "rotary"),
            remarks=_SCALED_FIRST,
        ),
    ),
    "modernbert": (encoder(**_MODERNBERT),),
    "modernbert-decoder": (decoder(**_MODERNBERT),),
    "ultrabert": (
        encoder(
            layers=encoding.listed_windows("attention_windows", patterns.every(3)),
            resized=encoding.first_listed("attention_windows"),
        ),
    ),
    "embedding_gemma2_text": (
        encoder(
            layers=patterns.every(6, "sliding_window_pattern"),
            last_full=True,
            own=encoding.wide_full,
            scale=rules.unscaled,
        ),
    ),
    "neomme": (encoder(layers=patterns.every_or_last(6), full_slides=True, own=encoding.short_and_long),),
    "openai_privacy_filter": (
        encoder(
            layers=patterns.all_sliding,
            layer_types=None,
            scale=rules.unscaled,
            sinks=rules.all_sinks,
            remarks=("queries and keys are each multiplied by H ** -0.25 before the call, so the scale is 1",),
        ),
    ),
    # Text models that only multimodal models have
    "mllama_text_model": (
        decoder(layers=encoding.crossing("cross_attention_layers", (3, 8, 13, 18, 23, 28, 33, 38)), layer_types=None),
    ),
    "glm4v_text": (decoder(layer_types=None),),
    # Encoders whose layers no config describes
    "deberta deberta-v2": (
        plain(
            refused="its logits add products of queries and keys with learned distances: pass them as bias= of a call"
        ),
    ),
    "longformer": (
        plain(
            refused="a call marks tokens that see all tokens and are seen by all, besides a window of half of "
            "attention_window on each side: pass what each token sees as mask= of a call"
        ),
    ),
    "big_bird": (plain(refused="it draws blocks of keys at random: pass what each token sees as mask= of a call"),),
    # Encoders of images
    "vit deit dinov2": (plain(heads=rules.equal_and_sized),),
    "clip_vision_model siglip_vision_model siglip_text_model": (plain(),),
    "dinov3_vit": (rotary(),),
    "clip_text_model": (gpt(),),
    # Decoders with learned positions
    "imagegpt": (gpt(scale=encoding.gpt2_scale, causal=True),),
    "gpt2": (
        gpt(scale=encoding.gpt2_scale),
        gpt(
            stack="cross",
            count=encoding.cross_count("add_cross_attention"),
            causal=False,
            scale=encoding.gpt2_scale,
        ),
    ),
    "biogpt ctrl": (gpt(),),
    "openai-gpt": (gpt(causal=True),),
    "gpt_bigcode": (
        gpt(
            heads=encoding.one_kv_where("multi_query"),
            scale=encoding.scaled_where("scale_attn_weights"),
            causal=rules.refused_flag("add_cross_attention", _NO_CROSS),
        ),
    ),
    "opt": (gpt(scale=rules.unscaled, remarks=_SCALED_FIRST),),
    "xglm": (
        gpt(
            scale=rules.unscaled,
            causal=rules.refused_flag("add_cross_attention", _NO_CROSS),
            remarks=_SCALED_FIRST,
        ),
    ),
    "gpt_neo": (gpt(causal=True, layers=encoding.from_attention_types, window="window_size", scale=rules.unscaled),),
    "gptj codegen gpt_neox": (gpt(rope=layerwise.everywhere),),
    # Decoders with biases
    "falcon": (
        gpt(
            heads=encoding.falcon_heads,
            bias=encoding.where_flag("alibi", f"{_ALIBI}, times H ** -0.5"),
            rope=encoding.without("alibi"),  # the eager code adds ALiBi twice, the code with SDPA once
        ),
    ),
    "bloom": (gpt(bias=f"{_ALIBI}, not scaled"),),
    "mpt": (
        gpt(
            causal=True,
            scale=encoding.in_table("attn_config", "softmax_scale"),
            bias="ALiBi [N, 1, S]: slopes times the keys' distances from the last of max_seq_len positions, with a "
            "largest slope of 2 ** -(8 / N), not scaled; alibi and alibi_bias_max of attn_config are not read",
        ),
    ),
    # An encoder and a decoder
    "bart mbart pegasus marian blenderbot blenderbot-small m2m_100 plbart": (
        plain(stack="encoder"),
        _DECODER(),
        _CROSS(),
    ),
    "whisper": (
        plain(stack="encoder", scale=rules.unscaled, remarks=_SCALED_FIRST),
        _DECODER(scale=rules.unscaled, remarks=_SCALED_FIRST),
        _CROSS(scale=rules.unscaled, remarks=_SCALED_FIRST),
    ),
    "t5 mt5 umt5": (
        plain(stack="encoder", heads=rules.equal_and_sized, scale=rules.unscaled, bias=_BUCKETS),
        _T5_DECODER(bias=_BUCKETS),
        _T5_DECODER(stack="cross", causal=False),
    ),
}
