"""MaxText's options become an AttentionConfig; what is not supported, or is misspelt, says so."""

import ast
import dataclasses
import enum
import importlib.util
import itertools
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from kernelry import masks
from kernelry.config import AttentionConfig, AttentionType, MoBA, from_maxtext
from kernelry.config.maxtext import reading
from kernelry.config.maxtext.options import MESH, OPTIONS, PARALLELISM, Fate, Kind
from kernelry.config.maxtext.reading import not_attention
from kernelry.errors import ConfigError, NoKernelError
from kernelry.parallel import Sharding
from kernelry.policy.rules import Range
from kernelry.request.request import Mode, Request
from kernelry.resolution.resolver import resolve

DEFAULT = AttentionConfig(source="MaxText", scale=1.0)
BATCH, HEADS = "batch=data,fsdp,fsdp_transpose,expert", "heads=tensor,tensor_sequence,autoregressive"
SHARDED = dataclasses.replace(DEFAULT, sharding=f"{BATCH} {HEADS} sequence=context all_gather dual_chunk")
FOREIGN = [option for option in OPTIONS if option.fate is Fate.FOREIGN]
UNREAD = [option for option in OPTIONS if option.fate is Fate.UNREAD]
LOCAL = {"attention_type": "local_sliding", "sliding_window_size": 64}
CHANGED = {Kind.SIZE: 256, Kind.INTEGER: 3, Kind.NUMBER: 3.5, Kind.TEXT: "other", Kind.LIST: ["x"]}


def _real():
    found = importlib.util.find_spec("maxtext")
    places = found.submodule_search_locations if found else ()
    return next((path for place in places if (path := pathlib.Path(place, "configs/base.yml")).exists()), None)


def _rules(config):
    return [(rule.when.platform, rule.when.mode, rule.use) for rule in config.rules]


def _whole():
    return {**dict.fromkeys(not_attention(), object()), **{option.name: option.default for option in OPTIONS}}


def test_a_whole_config_at_its_defaults_is_the_default_with_scaled_queries_on_a_mesh():
    assert from_maxtext(_whole()) == SHARDED


def test_an_empty_mapping_means_the_defaults():
    assert from_maxtext({}) == DEFAULT


@pytest.mark.skipif(_real() is None, reason="maxtext is not installed")
def test_the_real_base_yml_is_accepted_and_the_table_has_its_defaults():
    yaml = pytest.importorskip("yaml")
    content = yaml.safe_load(_real().read_text(encoding="utf-8"))
    assert from_maxtext(content) == SHARDED
    table = {option.name: option.default for option in OPTIONS}
    rules, absent = table.pop("logical_axis_rules"), {"context_parallel_size", "using_pipeline_parallelism"}
    assert {name: value for name, value in content.items() if name in table} == {
        name: value for name, value in table.items() if name not in absent
    }
    assert [rule for rule in content["logical_axis_rules"] if rule[0] in dict(rules)] == rules


def test_no_key_is_both_about_attention_and_not():
    names = [option.name for option in OPTIONS]
    assert len(set(names)) == len(names)
    assert not_attention().isdisjoint(names)
    assert len(not_attention()) > 600


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_default_is_accepted_alone(option):
    assert from_maxtext({option.name: option.default}) == (SHARDED if option.name in MESH else DEFAULT)


def _changed(option):
    default = option.neutral[-1] if option.neutral else option.default
    return not default if option.kind is Kind.FLAG else CHANGED[option.kind]


@pytest.mark.parametrize("option", FOREIGN, ids=lambda option: option.name)
def test_an_option_without_meaning_says_why_where_it_is_changed(option):
    changed = _changed(option)
    with pytest.raises(ConfigError) as caught:
        from_maxtext({option.name: changed})
    assert f"{option.name} = {changed!r} is not supported: {option.meaning}" in str(caught.value)
    assert f"ignore=({option.name!r},)" in str(caught.value)
    assert from_maxtext({option.name: changed}, ignore=(option.name,)) == DEFAULT


@pytest.mark.parametrize(
    "name",
    ["quantize_kvcache", "custom_mesh_and_rule", "experimental_sa_quant_k_fp8", "enable_padding_causal_mask"],
)
def test_what_changes_the_numbers_or_the_program_is_never_left_out_in_silence(name):
    assert name in {option.name for option in FOREIGN}


def test_options_that_change_nothing_are_accepted_with_one_warning_that_names_them():
    options = {option.name: _changed(option) for option in UNREAD}
    with pytest.warns(UserWarning, match="not read, as they do not change what attention means") as caught:
        config = from_maxtext({**options, "attention_sink": True})
    assert config == dataclasses.replace(DEFAULT, sinks=True)
    (warning,) = caught
    for option in UNREAD:
        assert f"{option.name} = {options[option.name]!r}" in str(warning.message)
        assert option.meaning in str(warning.message)
    assert warning.filename == __file__
    assert from_maxtext(options, ignore=tuple(options)) == DEFAULT


def test_options_of_one_reason_are_named_together():
    options = {"sa_bwd_dkv_megacore": True, "reshape_q": True, "use_splash_scheduler": True}
    words = (
        "sa_bwd_dkv_megacore = True, use_splash_scheduler = True (kernels here have no such tunable); "
        "reshape_q = True (layouts are internal to kernels"
    )
    with pytest.warns(UserWarning, match=re.escape(words)):
        from_maxtext(options)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_a_value_of_the_wrong_kind_names_key_value_and_what_was_expected(option):
    numbers = (Kind.SIZE, Kind.COUNT, Kind.INTEGER, Kind.DEVICES, Kind.LIST)
    wrong = 0.5 if option.kind in numbers else ["x"]
    with pytest.raises(ConfigError) as caught:
        from_maxtext({option.name: wrong})
    assert f"{option.name} must be {option.expected}, got {wrong!r}" in str(caught.value)
    with pytest.raises(ConfigError, match=f"{option.name} must be"):
        from_maxtext({option.name: np.arange(3)})


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_a_flag_is_no_number_and_no_text(option):
    wrong = 1 if option.kind is Kind.FLAG else True
    with pytest.raises(ConfigError, match=f"{option.name} must be"):
        from_maxtext({option.name: wrong})


@pytest.mark.parametrize(
    ("given", "kernel"),
    [
        ("autoselected", "auto"),
        ("dot_product", "dot_product"),
        ("cudnn_flash_te", "cudnn_te"),
    ],
)
def test_attention_names_a_kernel(given, kernel):
    config = from_maxtext({"attention": given})
    assert (config.kernel, config.rules) == (kernel, ())


@pytest.mark.parametrize(
    ("attention", "rules"),
    [
        (
            "flash",
            [
                ((), (Mode.DECODE,), ("dot_product",)),
                (("tpu",), (), ("splash", "blockwise")),
                (("gpu",), (), ("pallas_mha", "pallas_flash", "blockwise")),
                (("cpu",), (), ("blockwise",)),
            ],
        ),
        ("paged", [(("tpu",), (Mode.DECODE,), ("paged", "dot_product")), ((), (), ("dot_product",))]),
        ("cudnn_flash_jax", [(("gpu",), (Mode.DECODE,), ("dot_product",)), ((), (), ("cudnn_jax",))]),
    ],
)
def test_attention_that_is_several_kernels_is_exhaustive_rules(attention, rules):
    config = from_maxtext({"attention": attention})
    assert config.kernel == "auto"
    assert _rules(config) == rules
    assert all(rule.is_exhaustive for rule in config.rules)


ATTENTION = {
    **{
        name: {"attention": name}
        for name in ("autoselected", "dot_product", "flash", "paged", "cudnn_flash_te", "cudnn_flash_jax")
    },
    "tokamax": {"attention": "flash", "use_tokamax_splash": True},
    "jax_splash": {"use_jax_splash": True},
    "ragged": {"attention": "flash", "use_ragged_attention": True},
}
LAYERS = {
    "global": {},
    "local": LOCAL,
    "chunk": {"attention_type": "chunk", "chunk_attn_window_size": 64},
    "full": {"attention_type": "full"},
    "mla": {"attention_type": "mla"},
    "blocks": {"attention_type": "block_diffusion"},
    "cap": {"attn_logits_soft_cap": 50.0},
    "sinks": {"attention_sink": True},
    "clip": {"use_qk_clip": True},
    "dropout": {"dropout_rate": 0.1},
    "highest": {"matmul_precision": "highest"},
    "packed": {},
}
DROPPED = {
    "cudnn_flash_te": {"chunk", "blocks", "cap", "highest"},
    "cudnn_flash_jax": {"chunk", "blocks", "cap", "highest", "clip", "dropout", "packed"},
}
"""What MaxText leaves out of a call, or refuses, where one kernel is named that cannot do it."""
IDS = masks.Segments(jnp.zeros((2, 512), jnp.int32))
OFFSET = jnp.array([5, 9])


def _cell(options, layer, platform, mode):
    config = from_maxtext(options)
    mask = config.mask & IDS if layer == "packed" else config.mask
    facts = {"q_len": 512}
    if mode is Mode.DECODE:
        mask = config.mask.at(query_offset=OFFSET) & masks.Lengths(OFFSET + 1)
        facts = {"q_len": 1, "page_size": 16 if options.get("attention") == "paged" else None}
    dropout = config.dropout_rate if mode is Mode.TRAIN else 0.0
    dims = {"head_dim": 192, "value_dim": 128, "kv_heads": 8} if layer == "mla" else {"head_dim": 128, "kv_heads": 2}
    fields = {"soft_cap": config.soft_cap, "sinks": config.sinks, "dropout_rate": dropout, "scale": config.scale}
    fields |= {"precision": config.precision, "max_logits": config.record_max_logits, "mask": mask.form, **dims}
    target = {"cpu": "cpu", "gpu": "gpu:h100", "tpu": "tpu:v5p"}[platform]
    request = Request(batch=2, kv_len=512, q_heads=8, dtype="bfloat16", mode=mode, target=target, **facts, **fields)
    try:
        return resolve(request, policy=config.policy).kernel
    except NoKernelError:
        return None


@pytest.fixture(scope="module")
def cells():
    """The kernel of every value of `attention`, kind of layer, platform and mode; None where none serves."""
    everywhere = itertools.product(ATTENTION, LAYERS, ("cpu", "gpu", "tpu"), Mode)
    return {cell: _cell({**LAYERS[cell[1]], **ATTENTION[cell[0]]}, *cell[1:]) for cell in everywhere}


def test_what_maxtext_runs_is_served_and_a_kernel_named_refuses_what_it_drops(cells):
    def refused(attention, layer, platform, mode):
        if attention not in DROPPED:
            return False
        if platform != "gpu" or mode is Mode.DECODE:
            return platform != "gpu" or attention == "cudnn_flash_te"
        return layer in DROPPED[attention] and (layer, mode) != ("dropout", Mode.PREFILL)

    assert {cell for cell, kernel in cells.items() if kernel is None} == {cell for cell in cells if refused(*cell)}


def test_flash_on_gpus_takes_the_first_kernel_that_has_what_the_layer_wants(cells):
    found = {layer: cells["flash", layer, "gpu", Mode.TRAIN] for layer in LAYERS}
    assert {found[layer] for layer in ("global", "full", "packed", "sinks")} == {"pallas_mha"}
    assert {found[layer] for layer in ("local", "chunk", "blocks", "cap", "clip", "highest")} == {"pallas_flash"}
    assert found["dropout"] == "blockwise"


def test_paged_is_the_kernel_for_pages_in_decode_on_tpus_alone(cells):
    assert cells["paged", "global", "tpu", Mode.PREFILL] == "dot_product"
    served = {platform: cells["paged", "local", platform, Mode.DECODE] for platform in ("cpu", "gpu", "tpu")}
    assert served == dict.fromkeys(served, "dot_product")
    request = Request(
        q_len=1, kv_len=512, page_size=16, mode="decode", target="tpu:v5p", head_dim=128, dtype="bfloat16"
    )
    request = dataclasses.replace(request, mask=masks.Lengths(OFFSET).form, batch=2, scale=1.0)
    assert resolve(request, policy=from_maxtext({"attention": "paged"}).policy).kernel == "paged"


@pytest.mark.parametrize(
    ("option", "kernel"), [("use_tokamax_splash", "tokamax_splash"), ("use_jax_splash", "blockwise")]
)
def test_a_variant_of_flash_replaces_it_on_tpu(option, kernel):
    config = from_maxtext({"attention": "flash", option: True})
    assert [use for platform, _, use in _rules(config) if platform == ("tpu",)] == [
        tuple(dict.fromkeys((kernel, "blockwise")))
    ]


@pytest.mark.parametrize(
    ("option", "kernel"), [("use_tokamax_splash", "tokamax_splash"), ("use_jax_splash", "blockwise")]
)
def test_a_variant_of_flash_goes_first_where_autoselected_takes_flash(option, kernel):
    config = from_maxtext({option: True})
    assert _rules(config) == [(("tpu",), (Mode.TRAIN, Mode.PREFILL), (kernel, "auto"))]
    assert config.rules[0].when.q_len == Range(minimum=128)


def test_two_variants_of_flash_are_an_error():
    with pytest.raises(ConfigError, match="use_tokamax_splash and use_jax_splash"):
        from_maxtext({"use_tokamax_splash": True, "use_jax_splash": True})


def test_ragged_attention_is_for_decode():
    ragged = [
        (("tpu",), (Mode.DECODE,), ("ragged", "dot_product")),
        (("gpu",), (Mode.DECODE,), ("pallas_decode", "dot_product")),
    ]
    assert _rules(from_maxtext({"use_ragged_attention": True})) == ragged
    config = from_maxtext({"use_ragged_attention": True, "attention": "dot_product"})
    assert config.kernel == "auto"
    assert _rules(config) == [*ragged, ((), (), ("dot_product",))]
    assert _rules(from_maxtext({"use_ragged_attention": True, "attention": "flash"}))[:2] == ragged


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        ("flsh", ["unknown kernel 'flsh'", "did you mean 'flash'"]),
        ("cudnn_flash", ["unknown kernel 'cudnn_flash'", "did you mean 'cudnn_flash_"]),
        ("vllm_rpa", ["is not supported", "vLLM"]),
    ],
)
def test_an_attention_that_is_no_kernel_here_says_why(attention, words):
    with pytest.raises(ConfigError) as caught:
        from_maxtext({"attention": attention})
    for word in ("attention", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({"attention_type": "full"}, "type", AttentionType.FULL),
        ({"attention_type": "mla"}, "type", AttentionType.MLA),
        (LOCAL, "window", 64),
        ({"attention_type": "chunk", "chunk_attn_window_size": 8192}, "chunk_size", 8192),
        ({"attention_type": "block_diffusion"}, "block_size", 32),
        ({"attention_type": "block_diffusion", "causal_block_size": 4}, "block_size", 4),
        ({"attn_logits_soft_cap": 50.0}, "soft_cap", 50.0),
        ({"attn_logits_soft_cap": 50}, "soft_cap", 50.0),
        ({"attn_logits_soft_cap": 0}, "soft_cap", None),
        ({"attn_logits_soft_cap": None}, "soft_cap", None),
        ({"attn_logits_soft_cap": "None"}, "soft_cap", None),
        ({"attention_sink": True}, "sinks", True),
        ({"matmul_precision": "highest"}, "precision", "highest"),
        ({"dropout_rate": 0.1}, "dropout_rate", 0.1),
        ({"dropout_rate": 0.1, "enable_dropout": False}, "dropout_rate", 0.0),
        ({"use_qk_clip": True}, "record_max_logits", True),
        ({"moba": True}, "moba", MoBA(1024, 8)),
        ({"moba": True, "moba_chunk_size": 64, "moba_topk": 2}, "moba", MoBA(64, 2)),
        ({"moba_chunk_size": 64, "moba_topk": 2}, "moba", None),
        ({"float32_qk_product": True, "float32_logits": True}, "logits_dtype", "float32"),
    ],
)
def test_an_option_becomes_a_field(options, field, value):
    assert getattr(from_maxtext(options), field) == value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"sliding_window_size": 4096},
            "sliding_window_size = 4096 is not used: attention_type is 'global', so the mask is Causal(). "
            "from_maxtext({**options, 'attention_type': 'local_sliding'}) builds the config of such a layer, and "
            "kernelry.models.from_maxtext_model(base, model_yml) those of all layers of a model. "
            "If Causal() is right for this layer, pass ignore=('sliding_window_size',).",
        ),
        ({"chunk_attn_window_size": 8192}, "chunk_attn_window_size = 8192 is not used: attention_type is 'global'"),
        ({"causal_block_size": 4}, "causal_block_size = 4 is not used: attention_type is 'global'"),
        (
            {**LOCAL, "chunk_attn_window_size": 8},
            "chunk_attn_window_size = 8 is not used: attention_type is 'local_sliding', so the mask is "
            "SlidingWindow(63, 0)",
        ),
        (
            {"attention_type": "full", "sliding_window_size": 8},
            "attention_type is 'full', so the mask is Full(). "
            "from_maxtext({**options, 'attention_type': 'local_sliding'})",
        ),
        (
            {"decoder_block": "llama4", "chunk_attn_window_size": 8192},
            "chunk_attn_window_size = 8192 and decoder_block = 'llama4' are not used: attention_type is 'global', so "
            "the mask is Causal(). MaxText's layers of llama4 are chunk and global. from_maxtext({**options, "
            "'attention_type': 'chunk'})",
        ),
        (
            {"decoder_block": "gemma2", **LOCAL, "chunk_attn_window_size": 8},
            "SlidingWindow(63, 0). from_maxtext({**options, 'attention_type': 'chunk'})",
        ),
        (
            {"decoder_block": "gemma2", **LOCAL, "attention_type": "mla"},
            "layers of gemma2 are local_sliding and global",
        ),
    ],
)
def test_a_size_that_is_set_and_not_used_warns_with_the_mask_that_was_made(options, words):
    with pytest.warns(UserWarning, match=re.escape(words)) as caught:
        config = from_maxtext(options)
    assert caught[0].filename == __file__
    assert repr(config.mask) in str(caught[0].message)
    said = re.search(r"ignore=(\(.*\))\.$", str(caught[0].message)).group(1)
    from_maxtext(options, ignore=ast.literal_eval(said))  # silent: warnings are errors here


@pytest.mark.parametrize("block", ["gemma2", "gemma3", "gemma4", "gemma4_small", "gpt_oss", "olmo3"])
def test_a_decoder_block_whose_layers_differ_warns_until_one_is_chosen(block):
    with pytest.warns(UserWarning, match=f"decoder_block = '{block}' is not used: .* so the mask is Causal"):
        assert from_maxtext({"decoder_block": block}) == DEFAULT
    local = from_maxtext({"decoder_block": enum.Enum("Block", {"ONE": block}).ONE, **LOCAL})
    assert local == from_maxtext(LOCAL)


def test_local_layers_are_built_from_the_same_options():
    base = {"sliding_window_size": 4096, "attn_logits_soft_cap": 50.0}
    local = from_maxtext({**base, "attention_type": "local_sliding"})
    others = from_maxtext(base, ignore=("sliding_window_size",))
    assert local.mask.form == masks.SlidingWindow(4095).form
    assert others.mask.form == masks.Causal().form
    assert local.soft_cap == others.soft_cap == 50.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention_type": "local_sliding"}, ["'local_sliding' needs sliding_window_size", "it is 0"]),
        ({"attention_type": "chunk"}, ["'chunk' needs chunk_attn_window_size", "it is 0"]),
        ({"attention_type": "compressed"}, ["attention_type", "not supported"]),
        ({"attention_type": "gobal"}, ["attention_type", "did you mean 'global'"]),
        ({"sliding_window_size": -1}, ["sliding_window_size must be an integer, 0 or more, got -1"]),
        ({"causal_block_size": 0}, ["causal_block_size must be a positive integer, got 0"]),
        ({"attn_logits_soft_cap": -1.0}, ["attn_logits_soft_cap must be 0 or more, got -1.0"]),
        ({"attn_logits_soft_cap": "50"}, ["attn_logits_soft_cap must be a finite number, or none, got '50'"]),
        ({"dropout_rate": 1.0}, ["dropout_rate must be in [0, 1), got 1.0"]),
        ({"matmul_precision": "hi"}, ["matmul_precision must be default, high or highest, got 'hi'"]),
    ],
)
def test_a_value_that_means_nothing_names_the_option(options, words):
    with pytest.raises(ConfigError) as caught:
        from_maxtext(options)
    for word in words:
        assert word in str(caught.value)


BLOCKS = ("q", "q_dkv", "q_dq", "kv", "kv_compute", "kv_dkv", "kv_dkv_compute", "kv_dq")


def blocks_of(*names, **changed):
    """All blocks, as sorted tunables; 512 where nothing else is said."""
    return tuple(sorted({f"block_{name}": changed.get(name, 512) for name in names or BLOCKS}.items()))


def test_a_block_that_differs_from_the_default_makes_all_of_them_tilings_of_splash():
    """They are chosen together: none is mixed with the kernel's own choice."""
    options = {"sa_block_q": 1024, "sa_block_kv_dkv_compute": 256, "sa_block_kv": 512}
    assert from_maxtext(options).tilings == (("splash", blocks_of(q=1024, kv_dkv_compute=256)),)
    assert from_maxtext({"sa_block_q": 512, "sa_block_kv": 512}).tilings == ()


@pytest.mark.parametrize("none", [None, "None"])
def test_local_layers_take_their_own_blocks_or_inherit(none):
    blocks = {"sa_block_q": 1024, "local_sa_block_q": none, "sa_block_kv": 1024, "local_sa_block_kv": 256}
    assert from_maxtext({**LOCAL, **blocks}).tilings == (("splash", blocks_of(q=1024, kv=256)),)
    assert from_maxtext(blocks).tilings == (("splash", blocks_of(q=1024, kv=1024)),)


def test_blocks_go_to_the_variant_that_reads_them():
    blocks = {"sa_block_q": 1024, "sa_block_kv": 256}
    of_tokamax = blocks_of(*(name for name in BLOCKS if not name.endswith("_dq")), q=1024, kv=256)
    assert from_maxtext({**blocks, "use_tokamax_splash": True}).tilings == (("tokamax_splash", of_tokamax),)
    jax_splash = from_maxtext({**blocks, "use_jax_splash": True}).tilings
    assert jax_splash == (("blockwise", (("block_q", 1024),)), ("splash", blocks_of(q=1024, kv=256)))


def test_a_ragged_block_is_a_tiling_where_ragged_attention_is_used():
    block = (("block_kv", 128),)
    options = {"use_ragged_attention": True, "ragged_block_size": 128}
    assert from_maxtext(options).tilings == (("pallas_decode", block), ("ragged", block))
    assert from_maxtext({"ragged_block_size": 128}) == DEFAULT


@pytest.mark.parametrize("variant", ["splash", "tokamax_splash"])
def test_the_tunables_named_are_those_of_the_installed_splash(variant):
    plugin = pytest.importorskip("kernelry_tpu_splash.plugin")
    options = {option.name: 128 for option in OPTIONS if option.name.startswith("sa_block_")}
    [(kernel, tiling)] = from_maxtext({**options, "use_tokamax_splash": variant == "tokamax_splash"}).tilings
    assert kernel == variant
    [spec] = [spec for spec in plugin.kernelry_kernels() if spec.name == variant]
    tunables = dict(spec.tilings(Request(q_len=1024, target="tpu:v5e"))[0].values)
    assert {name for name in tunables if name.startswith("block_")} == dict(tiling).keys()


@pytest.mark.parametrize(
    ("options", "tilings"),
    [
        ({"sa_use_fused_bwd_kernel": True}, {"splash": {"backward_kernels": 1}}),
        ({"sa_use_fused_bwd_kernel": True, "use_tokamax_splash": True}, {}),
        ({"local_sa_use_fused_bwd_kernel": True}, {}),
        ({**LOCAL, "local_sa_use_fused_bwd_kernel": True}, {"splash": {"backward_kernels": 1}}),
        ({**LOCAL, "sa_use_fused_bwd_kernel": True, "local_sa_use_fused_bwd_kernel": False}, {}),
        ({"sa_q_layout": "SEQ_MINOR"}, {"splash": {"q_layout": 2}}),
        ({"sa_v_layout": "SEQ_MINOR", "use_tokamax_splash": True}, {"tokamax_splash": {"v_layout": 2}}),
        (
            {**LOCAL, "sa_k_layout": "SEQ_MINOR", "local_sa_q_layout": "SEQ_MINOR"},
            {"splash": {"k_layout": 2, "q_layout": 2}},
        ),
        ({"dq_reduction_steps": 3}, {"tokamax_splash": {"dq_reduction_steps": 3}}),
        ({"max_segments_per_seq": 16}, {"cudnn_te": {"max_segments": 16}}),
        ({"max_segments_per_seq": -1}, {}),
        (
            {"sa_block_q": 128, "sa_k_layout": "SEQ_MINOR", "sa_use_fused_bwd_kernel": True},
            {"splash": {"backward_kernels": 1, "k_layout": 2, **dict(blocks_of(q=128))}},
        ),
    ],
)
def test_other_tunables_reach_the_kernels_that_have_them(options, tilings):
    assert from_maxtext(options).tilings == dataclasses.replace(DEFAULT, tilings=tilings).tilings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sa_q_layout": "SEQ"}, "sa_q_layout must be HEAD_DIM_MINOR or SEQ_MINOR, got 'SEQ'"),
        ({"dq_reduction_steps": 2}, "dq_reduction_steps must be 0 or 3, got 2"),
        ({"max_segments_per_seq": 0}, "max_segments_per_seq must be a positive integer, or -1, got 0"),
        ({"max_segments_per_seq": -2}, "max_segments_per_seq must be a positive integer, or -1, got -2"),
    ],
)
def test_a_tunable_that_no_kernel_takes_is_an_error(options, words):
    with pytest.raises(ConfigError, match=f"MaxText option {words}"):
        from_maxtext(options)


@pytest.mark.parametrize("attention", ["global", "packed"])
def test_max_segments_reach_cudnn_te_whether_or_not_rows_are_packed(attention):
    plugin = pytest.importorskip("kernelry_cudnn_te.plugin")
    [spec] = [spec for spec in plugin.kernelry_kernels() if spec.name == "cudnn_te"]
    [(_, tiling)] = from_maxtext({"max_segments_per_seq": 16}).tilings
    mask = masks.Causal() & IDS if attention == "packed" else masks.Causal()
    request = Request(q_len=512, batch=2, mask=mask, target="gpu:h100", dtype="bfloat16", head_dim=128)
    assert spec.tilings(request)[0].replace(dict(tiling), spec.name)["max_segments"] == 16


def test_the_other_tunables_named_are_those_of_the_installed_kernels():
    plugin = pytest.importorskip("kernelry_tpu_splash.plugin")
    layouts = {f"sa_{array}_layout": "SEQ_MINOR" for array in "qkv"}
    options = {**layouts, "sa_use_fused_bwd_kernel": True, "dq_reduction_steps": 3}
    for more in ({}, {"use_tokamax_splash": True}):
        for kernel, tiling in from_maxtext({**options, **more}).tilings:
            [spec] = [spec for spec in plugin.kernelry_kernels() if spec.name == kernel]
            replaced = spec.tilings(Request(q_len=1024, target="tpu:v5e"))[0].replace(dict(tiling), kernel)
            assert dict(tiling).items() <= dict(replaced.values).items()


def test_blocks_that_tokamax_never_reads_change_nothing():
    assert from_maxtext({"sa_block_q_dq": 128, "use_tokamax_splash": True}).tilings == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [("packing", False), ("use_chunked_prefill", True), ("use_indexer", True)],
)
def test_what_belongs_to_a_call_is_accepted_at_any_value(name, value):
    assert from_maxtext({name: value}) == DEFAULT


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("sliding_windw_size", "sliding_window_size"),
        ("Sliding-Window-Size", "sliding_window_size"),
        ("attn_logit_softcap", "attn_logits_soft_cap"),
        ("sa_blok_q", "sa_block_q"),
        ("attention_sinks", "attention_sink"),
        ("sliding_window", "sliding_window_size"),
        ("soft_cap", "attn_logits_soft_cap"),
    ],
)
def test_a_misspelt_option_is_an_error_that_names_the_nearest(name, nearest):
    with pytest.raises(ConfigError) as caught:
        from_maxtext({name: 1})
    assert f"Unknown MaxText option {name!r}; did you mean {nearest!r}?" in str(caught.value)
    assert f"ignore=({name!r},)" in str(caught.value)


def test_every_option_with_one_letter_missing_is_an_error():
    names = [option.name for option in OPTIONS if len(option.name) > 4]
    misspelt = [name[: len(name) // 2] + name[len(name) // 2 + 1 :] for name in names]
    for name in misspelt:
        with pytest.raises(ConfigError, match=re.escape(f"Unknown MaxText option {name!r}")):
            from_maxtext({name: 1})


def test_all_misspelt_options_are_named_at_once():
    with pytest.raises(ConfigError, match=r"ignore=\('atention', 'mob_topk'\)"):
        from_maxtext({"atention": 1, "new_key": 1, "mob_topk": 2})


def test_a_new_key_that_names_no_option_warns_and_the_rest_is_read():
    words = "Unknown MaxText options that are not read: 'qqqqqq', 'learning_rat' (MaxText 0.2.5 has 'learning_rate')"
    with pytest.warns(UserWarning, match=re.escape(words)) as caught:
        config = from_maxtext({"qqqqqq": 1, "learning_rat": 2, "attention_sink": True})
    assert config.sinks
    assert "Pass ignore=('qqqqqq', 'learning_rat') if they are not about attention." in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.mark.sweep
def test_no_key_of_base_yml_would_be_taken_for_an_option_if_it_were_new(monkeypatch):
    keys = not_attention()
    taken = []
    for key in sorted(keys):
        monkeypatch.setattr(reading, "not_attention", lambda left=keys - {key}: left)
        taken += [key] if reading.misspelt(key, reading._BY_NAME) else []
    assert taken == ["custom_mesh", "mtc_data_parallelism"]  # which are about the mesh


def test_ignore_lets_keys_pass():
    assert from_maxtext({"my_key": 1, "attention_sink": True}, ignore=("my_key",)).sinks
    assert from_maxtext({"attention_sink": True}, ignore=["attention_sink"]) == DEFAULT


def test_ignore_as_a_text_is_an_error():
    with pytest.raises(ConfigError, match=r"write ignore=\('moba',\)"):
        from_maxtext({}, ignore="moba")
    with pytest.raises(ConfigError, match=r"ignore must be names in a tuple, got \(\['moba'\],\)"):
        from_maxtext({}, ignore=(["moba"],))


def test_what_is_no_mapping_is_named():
    with pytest.raises(ConfigError, match=r"got list; of a config of MaxText, pass config\.get_keys\(\)"):
        from_maxtext([("attention", "flash")])


def test_a_config_is_a_value():
    options = {**LOCAL, "attention": "flash", "sa_block_q": 1024, "moba": True}
    assert from_maxtext(options) == from_maxtext(options)
    assert hash(from_maxtext(options)) == hash(from_maxtext(options))
    assert from_maxtext(options).policy.tilings == (("splash", blocks_of(q=1024)),)


def test_neither_importing_nor_reading_needs_an_optional_library():
    code = (
        "import sys; from kernelry.config import from_maxtext; from_maxtext({'run_name': 'a'}); "
        "print(*{'pydantic', 'yaml', 'flax', 'maxtext'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


# The mesh


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ici_context_parallelism": 4}, f"{BATCH} {HEADS} sequence=context:4 all_gather dual"),
        (
            {"ici_context_parallelism": 4, "dcn_context_parallelism": 2},
            f"{BATCH} {HEADS} sequence=context:8 all_gather dual",
        ),
        ({"ici_context_parallelism": -1}, f"{BATCH} {HEADS} sequence=context all_gather dual"),
        (
            {"ici_context_parallelism": -1, "context_parallel_size": 4},
            f"{BATCH} {HEADS} sequence=context:4 all_gather dual",
        ),
        ({"context_parallel_strategy": "Ring"}, f"{BATCH} {HEADS} sequence=context ring dual"),
        (
            {"context_parallel_strategy": "ulysses", "context_parallel_load_balance": False},
            f"{BATCH} {HEADS} sequence=context ulysses",
        ),
        (
            {
                "context_parallel_strategy": "usp",
                "ici_context_parallelism": 4,
                "ici_context_usp_ulysses_parallelism": 2,
            },
            f"{BATCH} {HEADS} sequence=context:4,context_usp_ulysses:2 ulysses=context_usp_ulysses:2 usp dual",
        ),
        ({"context_parallel_load_balance": False}, f"{BATCH} {HEADS} sequence=context all_gather"),
        ({"context_parallel_reorder_strategy": "striped"}, f"{BATCH} {HEADS} sequence=context all_gather striped"),
        ({"context_parallel_reorder_strategy": "dual_chunk_swap"}, f"{BATCH} {HEADS} sequence=context all_gather dual"),
        ({"context_parallel_strategy": "ring", "hardware": "gpu"}, f"{BATCH} {HEADS} sequence=context ring striped"),
        (
            {"context_parallel_strategy": "ring", "hardware": "gpu_multiprocess", "packing": False},
            f"{BATCH} {HEADS} sequence=context ring dual",
        ),
        ({"mesh_axes": [], "hardware": "gpu"}, ""),
        ({"mesh_axes": ["fsdp"]}, "batch=fsdp"),
        ({"mesh_axes": ["data", "tensor", "context"]}, "batch=data heads=tensor sequence=context all_gather dual"),
        (
            {"logical_axis_rules": [["activation_batch_attn", "data"], ["activation_length", ["expert"]]]},
            "batch=data sequence=expert all_gather dual",
        ),
        (
            {
                "logical_axis_rules": [["activation_length", ["expert"]]],
                "context_sharding": "expert",
                "ici_expert_parallelism": 4,
                "context_parallel_size": 4,
            },
            "sequence=expert:4 all_gather dual",
        ),
        ({"logical_axis_rules": [["activation_heads", "tensor"], ["activation_kv", "tensor"]]}, "heads=tensor"),
        ({"logical_axis_rules": [["activation_kv", "tensor"]]}, ""),
        ({"logical_axis_rules": [], "context_parallel_size": 1}, ""),
        (
            {"mesh_axes": ["data", "tensor"], "ici_tensor_parallelism": 8, "dcn_data_parallelism": 2},
            "batch=data:2 heads=tensor:8",
        ),
        ({"shard_mode": "explicit"}, f"{BATCH} {HEADS} sequence=context all_gather dual"),
    ],
)
def test_options_about_a_mesh_make_a_sharding(options, text):
    assert from_maxtext(options) == dataclasses.replace(DEFAULT, sharding=text)


def test_options_around_the_mesh_alone_make_none():
    for options in ({"hardware": "gpu"}, {"using_pipeline_parallelism": True}, {"override_logical_axis_rules": True}):
        assert from_maxtext(options) == DEFAULT


RULES = "MaxText option logical_axis_rules: "


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shard_mode": "manual"}, "shard_mode must be auto or explicit, got 'manual'"),
        ({"mesh_axes": [3]}, r"mesh_axes must be names, got \[3\]"),
        (
            {"mesh_axes": ["data"], "ici_context_parallelism": 4},
            "ici_context_parallelism = 4, and mesh_axes has no axis ",
        ),
        (
            {"dcn_sequence_parallelism": 2},
            "dcn_sequence_parallelism = 2, and mesh_axes has no axis 'sequence'; set it to 1",
        ),
        (
            {"ici_data_parallelism": 0},
            "ici_data_parallelism must be a positive integer, or -1 for the rest of the devices",
        ),
        ({"ici_data_parallelism": -2}, "ici_data_parallelism must be a positive integer, or -1"),
        ({"logical_axis_rules": [["activation_heads"]]}, f"{RULES}a rule is a logical name and its mesh axes"),
        (
            {"logical_axis_rules": [["activation_kv", "tensor"]], "ici_tensor_parallelism": 2},
            f"{RULES}activation_kv cuts head dims over tensor, .* let activation_heads have the axes",
        ),
        (
            {"logical_axis_rules": [["activation_batch_attn", ["data", "data"]]]},
            "MaxText's mesh options: Sharding: mesh axis 'data' is named twice",
        ),
        (
            {"context_parallel_strategy": "rings"},
            "context_parallel_strategy: unknown strategy 'rings'; did you mean 'ring'",
        ),
        (
            {"context_parallel_strategy": "ring", "ici_context_usp_ulysses_parallelism": 2},
            "ici_context_usp_ulysses_parallelism and dcn_.* must be 1 with context_parallel_strategy = 'ring'",
        ),
        (
            {"context_parallel_strategy": "usp", "mesh_axes": ["context"]},
            "'usp': activation_length must be cut over an axis for the ring and over ulysses_context_sharding = "
            "'context_usp_ulysses', and logical_axis_rules and mesh_axes cut it over context",
        ),
        (
            {"context_parallel_strategy": "usp", "ulysses_context_sharding": "tensor"},
            "over ulysses_context_sharding = 'tensor', .* over context and context_usp_ulysses",
        ),
        (
            {"context_parallel_strategy": "ulysses"},
            "context_parallel_load_balance = True with context_parallel_strategy = 'ulysses': .*set it to false",
        ),
        (
            {"context_parallel_reorder_strategy": "dual_chunk"},
            "context_parallel_reorder_strategy: unknown strategy 'dual_chunk'; did you mean 'dual_chunk_swap'",
        ),
        (
            {"context_sharding": "expert"},
            "context_sharding = 'expert', and logical_axis_rules and mesh_axes cut activation_length over context",
        ),
        ({"context_sharding": "contxt"}, "cut activation_length over context; did you mean 'context'"),
        (
            {"context_parallel_size": 4, "mesh_axes": ["data"]},
            "context_parallel_size = 4, and logical_axis_rules and mesh_axes cut activation_length over none",
        ),
        ({"context_parallel_size": 4}, "context_parallel_size = 4, and .* the size of 'context' is 1; set these"),
        (
            {"context_parallel_size": 8, "ici_context_parallelism": 4},
            "context_parallel_size = 8, and by ici_ and dcn_context_parallelism the size of 'context' is 4; set these",
        ),
        (
            {"context_parallel_size": 1, "ici_context_parallelism": 4},
            r"context_parallel_size = 1, and .* is 4; set these",
        ),
        (
            {"custom_mesh_and_rule": "ep-as-cp"},
            "custom_mesh_and_rule = 'ep-as-cp' is not supported: its rules are in a ",
        ),
    ],
)
def test_options_about_a_mesh_that_cannot_be_honoured_say_why(options, words):
    with pytest.raises(ConfigError, match=words):
        from_maxtext(options)


@pytest.mark.parametrize(
    ("options", "packed"),
    [
        ({"context_parallel_strategy": "ring"}, True),
        ({"context_parallel_strategy": "ring", "packing": False}, False),
        ({"context_parallel_strategy": "all_gather", "packing": False}, False),
        ({"context_parallel_strategy": "all_gather", "packing": False, "context_parallel_load_balance": False}, False),
    ],
)
def test_context_parallel_that_maxtext_leaves_to_transformer_engine_is_served(options, packed):
    mesh = {"mesh_axes": ["context"], "ici_context_parallelism": 4, "max_segments_per_seq": 16}
    config = from_maxtext({"attention": "cudnn_flash_te", "hardware": "gpu", **mesh, **options})
    mask = masks.Causal() & IDS if packed else masks.Causal()
    facts = {"batch": 2, "q_len": 512, "q_heads": 8, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    request = Request(**facts, mask=mask, target="gpu:h100", sharding=str(config.sharding))
    assert resolve(request, policy=config.policy).kernel == "cudnn_te"


def test_every_parallelism_has_a_default_and_both_networks():
    for kind in PARALLELISM:
        assert {f"ici_{kind}_parallelism", f"dcn_{kind}_parallelism"} <= MESH


def test_rules_for_evaluation_that_are_those_of_training_are_silent():
    rules = [["activation_length", ["context"]]]
    both = {"logical_axis_rules": rules, "logical_axis_rules_for_eval": rules}
    assert from_maxtext(both).sharding == Sharding.parse("sequence=context all_gather dual")
    long = [["activation_length", ["context"]]] * 9
    with pytest.warns(UserWarning, match=r"logical_axis_rules_for_eval = \[…\] \(there is one sharding per config"):
        from_maxtext({**both, "logical_axis_rules_for_eval": long})
