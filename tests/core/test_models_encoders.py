"""What configs of encoders, of two stacks, of biases and of multimodal models say, by small mappings."""

import json

import pytest

from kernelry import masks
from kernelry.errors import ConfigError
from kernelry.models import from_huggingface


def read(model_type, **keys):
    return from_huggingface({"model_type": model_type, **keys})


def only(model_type, **keys):
    """The only kind of layers of a model."""
    (kind,) = read(model_type, **keys).kinds
    return kind


def masks_of(model):
    return {kind.name: kind.config.mask for kind in model.kinds}


# Encoders


def test_an_encoder_sees_everything_and_is_a_decoder_where_it_says_so():
    assert only("bert").config.mask == masks.Full()
    assert only("bert", is_decoder=True).config.mask == masks.Causal()
    assert not only("bert").rope
    assert only("nomic_bert").rope


def test_a_decoder_that_also_attends_to_an_encoder_has_cross_layers():
    model = read("bert", num_hidden_layers=2, is_decoder=True, add_cross_attention=True)
    assert masks_of(model) == {"full": masks.Causal(), "cross": masks.Full()}
    assert model.of_layer(1, "cross").layers == (0, 1)
    assert read("gpt2", add_cross_attention=True).kinds[-1].name == "cross"
    with pytest.raises(ConfigError, match="add_cross_attention is true and is_decoder is not"):
        read("bert", add_cross_attention=True)


def test_the_windows_of_encoders_count_each_side_without_the_token_itself():
    model = read("ultrabert", num_hidden_layers=6, sliding_window=7)
    assert masks_of(model) == {"sliding": masks.SlidingWindow(7, 7), "full": masks.Full()}
    assert model.kind("full").layers == (2, 5)
    assert only("openai_privacy_filter", sliding_window=7).config.mask == masks.SlidingWindow(7, 7)


def test_windows_may_be_listed_for_each_layer():
    model = read("ultrabert", num_hidden_layers=3, attention_windows=[7, 0, None])
    assert masks_of(model) == {"sliding": masks.SlidingWindow(7, 7), "full": masks.Full()}
    assert model.kind("sliding").layers == (0,)
    with pytest.raises(ConfigError, match="attention_windows has 1 entries, num_hidden_layers = 3; both must agree"):
        read("ultrabert", num_hidden_layers=3, attention_windows=[7])
    with pytest.raises(ConfigError, match="attention_windows must be a list of windows"):
        read("ultrabert", num_hidden_layers=1, attention_windows=["7"])


def test_the_last_layer_of_embedding_gemma_2_is_full_and_full_layers_are_wide():
    model = read("embedding_gemma2_text", num_hidden_layers=4, sliding_window=7)
    assert masks_of(model) == {"sliding": masks.SlidingWindow(7, 7), "full": masks.Full()}
    full, sliding = model.kind("full"), model.kind("sliding")
    assert full.layers == (3,)
    assert (full.config.head_dim, full.config.kv_heads) == (512, 1)
    assert (sliding.config.head_dim, sliding.config.kv_heads) == (256, 2)
    assert (full.config.scale, sliding.config.scale) == (1.0, 1.0)
    newer = read("embedding_gemma2_text", num_hidden_layers=1, per_layer_config={"0": {"head_dim": 64}})
    assert newer.kind("full").config.head_dim == 64


def test_every_other_window_of_neomme_is_long_unless_each_layer_says_its_own():
    model = read("neomme", num_hidden_layers=6, sliding_window=7)
    windows = [kind.config.mask for kind in model.kinds]
    assert windows == [masks.SlidingWindow(7, 7), masks.SlidingWindow(1024, 1024), masks.Full()]
    assert model.kind("sliding 2").layers == (1, 3)
    own = read("neomme", num_hidden_layers=2, sliding_window=7, per_layer_config={"1": {"sliding_window": None}})
    assert own.kind("sliding").layers == (0,)
    assert own.kind("full").layers == (1,)


def test_modernbert_halves_its_window_and_every_third_layer_is_full():
    model = read("modernbert", num_hidden_layers=7, local_attention=13)
    assert masks_of(model) == {"full": masks.Full(), "sliding": masks.SlidingWindow(6, 6)}
    assert model.kind("full").layers == (0, 3, 6)
    assert read("modernbert", num_hidden_layers=4, global_attn_every_n_layers=2).kind("full").layers == (0, 2)
    newer = read("modernbert", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    assert newer.kind("sliding").layers == (0,)


def test_modernberts_decoder_sees_half_of_its_window_with_the_token_itself():
    model = read("modernbert-decoder", num_hidden_layers=4, local_attention=12)
    assert model.kind("sliding").config.mask == masks.SlidingWindow(5, 0)


def test_a_half_window_must_be_left():
    with pytest.raises(ConfigError, match="local_attention must be at least 2"):
        read("modernbert", local_attention=1)


def test_queries_that_are_scaled_first_leave_a_scale_of_one():
    for model_type in ("esm", "opt", "xglm", "openai_privacy_filter"):
        kind = only(model_type)
        assert kind.config.scale == 1.0
        assert "before the call" in kind.remarks[0]


def test_esm_rotates_only_where_its_positions_are_rotary():
    assert only("esm", position_embedding_type="rotary").rope
    assert not only("esm").rope


def test_clip_reads_text_causally_and_siglip_does_not():
    assert only("clip_text_model").config.mask == masks.Causal()
    assert only("siglip_text_model").config.mask == masks.Full()
    assert only("clip_vision_model").config.mask == masks.Full()


def test_the_sentence_encoder_of_the_example_is_read(tmp_path):
    content = {
        "_name_or_path": "nreimers/MiniLM-L6-H384-uncased",
        "architectures": ["BertModel"],
        "hidden_size": 384,
        "intermediate_size": 1536,
        "model_type": "bert",
        "num_attention_heads": 12,
        "num_hidden_layers": 6,
        "position_embedding_type": "absolute",
    }
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    (kind,) = from_huggingface(tmp_path).kinds
    assert kind.config.mask == masks.Full()
    assert kind.layers == tuple(range(6))
    assert (kind.config.q_heads, kind.config.kv_heads, kind.config.head_dim) == (12, 12, 32)


def test_relative_positions_of_old_berts_are_refused():
    with pytest.raises(ConfigError, match="position_embedding_type = 'relative_key' is not described"):
        read("bert", position_embedding_type="relative_key")
    with pytest.raises(ConfigError, match="position_embedding_type = 'relative_key' is not described"):
        read("esm", position_embedding_type="relative_key")


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("deberta-v2", "learned distances"),
        ("longformer", "a call marks tokens that see all tokens"),
        ("big_bird", "blocks of keys at random"),
    ],
)
def test_encoders_that_no_config_describes_are_refused_with_a_reason(model_type, why):
    with pytest.raises(ConfigError, match=f"{model_type!r} has no layer that a config describes: .*{why}"):
        read(model_type)


# Decoders with learned positions


def test_gpt2_divides_its_scale_by_the_number_of_the_layer():
    model = read("gpt2", n_layer=3, n_embd=64, n_head=4, scale_attn_by_inverse_layer_idx=True)
    assert [kind.name for kind in model.kinds] == ["full 1", "full 2", "full 3"]
    assert [kind.config.scale for kind in model.kinds] == pytest.approx([0.25, 0.125, 0.25 / 3])
    assert only("gpt2").config.scale is None
    assert only("gpt2", scale_attn_weights=False).config.scale == 1.0


def test_gpt_bigcode_has_one_key_head_unless_it_says_otherwise():
    assert only("gpt_bigcode").config.kv_heads == 1
    assert only("gpt_bigcode", multi_query=False).config.kv_heads == 12


def test_gpt_neo_expands_its_pairs_of_kinds_and_times():
    model = read("gpt_neo", num_layers=5, attention_types=[[["global"], 1], [["local", "global"], 2]], window_size=4)
    assert masks_of(model) == {"full": masks.Causal(), "sliding": masks.SlidingWindow(3, 0)}
    assert model.kind("sliding").layers == (1, 3)
    assert {kind.config.scale for kind in model.kinds} == {1.0}
    assert read("gpt_neo").kind("sliding").layers == tuple(range(1, 24, 2))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention_types": [[["global"], 2]]}, "attention_types says 2 layers, num_layers = 24; both must agree"),
        ({"attention_types": "global"}, "attention_types must be a list"),
        ({"attention_types": [["global", 2]]}, "attention_types must have pairs"),
        ({"attention_types": [[["global"], -1]]}, "attention_types must say how many times"),
        ({"attention_types": [[["wide"], 24]]}, "attention_types must be 'global' and 'local'"),
        ({"attention_layers": ["global"] * 24}, "attention_layers and attention_types contradict each other"),
    ],
)
def test_gpt_neo_refuses_what_does_not_agree(keys, message):
    with pytest.raises(ConfigError, match=message):
        read("gpt_neo", **keys)


@pytest.mark.parametrize("model_type", ["gte", "jina_embeddings_v3", "vit", "deit", "dinov2", "nomic_bert"])
def test_some_encoders_read_the_head_dim_and_bert_does_not(model_type):
    sizes = {"hidden_size": 64, "num_attention_heads": 4}
    assert only(model_type, **sizes).config.head_dim == 16
    assert only(model_type, **sizes, head_dim=32).config.value_dim == 32
    assert only("bert", **sizes, head_dim=32).config.head_dim == 16


@pytest.mark.parametrize("model_type", ["t5", "umt5", "nomic_bert"])
def test_encoders_without_grouped_heads_do_not_read_num_key_value_heads(model_type):
    model = read(model_type, num_key_value_heads=1)
    assert {kind.config.kv_heads == kind.config.q_heads for kind in model.kinds} == {True}


# Decoders with biases


def test_falcon_scales_its_alibi_and_bloom_and_mpt_do_not():
    falcon = only("falcon", hidden_size=64, num_attention_heads=4, alibi=True)
    assert falcon.config.bias
    assert "times H ** -0.5" in falcon.remarks[0]
    assert not falcon.rope
    for model_type in ("bloom", "mpt"):
        assert only(model_type).config.bias
        assert "not scaled" in only(model_type).remarks[0]
    plain = only("falcon", hidden_size=64, num_attention_heads=4)
    assert not plain.config.bias
    assert plain.rope


@pytest.mark.parametrize("model_type", ["bloom", "falcon"])
def test_published_files_say_the_hidden_size_by_an_older_name(model_type):
    assert only(model_type, n_embed=96, num_attention_heads=4).config.head_dim == 24
    assert only(model_type, n_embed=96, hidden_size=96, num_attention_heads=4).config.head_dim == 24
    with pytest.raises(ConfigError, match="hidden_size = 64 and n_embed = 96 contradict each other"):
        only(model_type, n_embed=96, hidden_size=64, num_attention_heads=4)


def test_falcon_counts_its_key_heads_by_its_architecture():
    sizes = {"hidden_size": 64, "num_attention_heads": 4}
    assert only("falcon", **sizes).config.kv_heads == 1
    assert only("falcon", **sizes, num_kv_heads=2).config.kv_heads == 1
    assert only("falcon", **sizes, multi_query=False).config.kv_heads == 4
    assert only("falcon", **sizes, new_decoder_architecture=True, num_kv_heads=2).config.kv_heads == 2
    with pytest.raises(ConfigError, match="num_kv_heads = 3 must divide num_attention_heads = 4"):
        only("falcon", **sizes, new_decoder_architecture=True, num_kv_heads=3)


def test_mpt_says_its_scale_in_a_table_and_its_flag_of_alibi_is_not_read():
    assert only("mpt", attn_config={"softmax_scale": 0.4}).config.scale == 0.4
    assert only("mpt").config.scale is None
    assert only("mpt", attn_config={"alibi": False}).config.bias
    with pytest.raises(ConfigError, match="attn_config must be an object"):
        only("mpt", attn_config=[0.4])
    with pytest.raises(ConfigError, match="attn_config: softmax_scale must be a finite number"):
        only("mpt", attn_config={"softmax_scale": "0.4"})


def test_mpnet_adds_a_bias_to_scaled_products():
    assert only("mpnet").config.bias
    assert only("mpnet").config.scale is None


# Two stacks


def test_t5_does_not_scale_and_adds_its_bias_except_across():
    model = read("t5", num_layers=2, num_decoder_layers=3, num_heads=8, d_kv=16)
    assert masks_of(model) == {"encoder full": masks.Full(), "decoder full": masks.Causal(), "cross": masks.Full()}
    assert {kind.config.scale for kind in model.kinds} == {1.0}
    assert [kind.config.bias for kind in model.kinds] == [True, True, False]
    assert [len(kind.layers) for kind in model.kinds] == [2, 3, 3]
    assert {kind.config.head_dim for kind in model.kinds} == {16}
    assert len(read("t5", num_layers=4).kind("cross").layers) == 4


def test_stacks_have_their_own_layers_and_heads():
    keys = {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 8}
    model = read("bart", d_model=64, **keys)
    assert model.of_layer(2, "decoder").config.q_heads == 8
    assert model.of_layer(1, "encoder").config.head_dim == 16
    assert model.of_layer(0, "cross").name == "cross"
    assert model.of_layer(0, "cross").config.mask == masks.Full()
    several = r"encoder full and decoder full have a layer 0; say which, e\.g\. stack='encoder'"
    with pytest.raises(ConfigError, match=several):
        model.of_layer(0)
    with pytest.raises(
        ConfigError, match=r"no stack 'vision'; the kinds of layers are encoder full, decoder full, cross"
    ):
        model.of_layer(0, "vision")
    with pytest.raises(ConfigError, match="decoder_attention_heads = 7 must divide d_model = 64"):
        read("bart", d_model=64, **{**keys, "decoder_attention_heads": 7})


def test_whisper_scales_its_queries_first():
    assert {kind.config.scale for kind in read("whisper").kinds} == {1.0}


# Multimodal models


def test_text_config_is_read_nested_and_flat():
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    nested, flat = read("llava", text_config={"model_type": "llama", **sizes}), read("llava", **sizes)
    assert nested.kinds == flat.kinds
    assert nested.kinds[0].layers == (0, 1)
    assert read("llava", text_config=sizes).kinds == nested.kinds
    assert read("llava", text_config={"model_type": "mistral", **sizes}).kinds[0].name == "sliding"


def test_a_multimodal_config_without_text_is_refused():
    with pytest.raises(ConfigError, match="text_config is missing"):
        read("llava", vision_config={})


def test_a_text_config_must_be_an_object_of_a_known_type():
    with pytest.raises(ConfigError, match="text_config of 'llava' must be an object"):
        read("llava", text_config=3)
    with pytest.raises(ConfigError, match="text_config: unknown model_type 'lama'; did you mean 'llama'"):
        read("llava", text_config={"model_type": "lama"})
    with pytest.raises(ConfigError, match="text_config: model_type 'gemma3' is that of a whole multimodal model"):
        read("gemma3", text_config={"model_type": "gemma3"})


def test_gemma_3s_images_see_each_other():
    model = read("gemma3", text_config={"num_hidden_layers": 6})
    assert {kind.bidirectional for kind in model.kinds} == {"image"}
    assert "longer than the window" in model.kind("sliding").remarks[-1]
    assert model.kind("full").remarks == ()


def test_gemma_4s_images_see_each_other_on_sliding_layers_where_it_says_so():
    sizes = {"num_hidden_layers": 6}
    model = read("gemma4", text_config={**sizes, "use_bidirectional_attention": "vision"})
    assert model.kind("sliding").bidirectional == "image and video"
    assert model.kind("full").bidirectional is None
    assert {kind.bidirectional for kind in read("gemma4", text_config=sizes).kinds} == {None}
    assert read("gemma4_unified", text_config=sizes).kind("sliding").bidirectional == "image and video"


def test_layers_of_mllama_that_attend_to_an_image_are_named_and_not_described():
    model = read("mllama", text_config={"num_hidden_layers": 5})
    assert model.kind("full").layers == (0, 1, 2, 4)
    (other,) = model.others
    assert other.layers == (3,)
    assert "keys of an image" in other.why
    assert read("mllama_text_model", cross_attention_layers=[0], num_hidden_layers=2).others[0].layers == (0,)


def test_paligemmas_prefix_sees_itself():
    model = read("paligemma", text_config={"num_hidden_layers": 2, "use_bidirectional_attention": True})
    (kind,) = model.kinds
    assert kind.bidirectional == "prefix"
    assert kind.config.mask == masks.Causal()


@pytest.mark.parametrize("model_type", ["gpt_bigcode", "xglm"])
def test_cross_attention_that_is_not_described_is_refused(model_type):
    with pytest.raises(ConfigError, match="add_cross_attention is true, and it is not described: the keys of"):
        read(model_type, add_cross_attention=True)
    assert only(model_type, add_cross_attention=False).config.mask == masks.Causal()


def test_a_layer_is_its_own_attention_where_a_decoder_has_cross_attention_too():
    model = read("gpt2", num_hidden_layers=2, add_cross_attention=True)
    assert model.of_layer(1).name == "full"
    assert model.of_layer(1, "cross").name == "cross"
    with pytest.raises(ConfigError, match="encoder full and decoder full have a layer 0"):
        read("t5").of_layer(0)
