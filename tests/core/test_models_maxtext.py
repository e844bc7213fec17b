"""MaxText's models, described from base.yml's defaults and a model's options, against what MaxText builds.

tests/fixtures/maxtext_layers.json has what MaxText 0.2.5 built of its 82 models, and of every decoder block under
different options; tests/parity/test_maxtext_layers.py asks the installed MaxText again.
"""

import enum
import json
import subprocess
import sys
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
from tests.support.maxtext_layers import RECORD, described

from kernelry import masks
from kernelry.config import from_maxtext
from kernelry.config.maxtext.blocks import BLOCKS, LAYERS, MODEL
from kernelry.config.maxtext.options import OPTIONS
from kernelry.config.maxtext.reading import not_attention
from kernelry.errors import ConfigError
from kernelry.models import from_maxtext_model

ASKED = json.loads(RECORD.read_text(encoding="utf-8"))
MODELS, VARIED = ASKED["models"], ASKED["variations"]
GEMMA3 = {"decoder_block": "gemma3", "sliding_window_size": 1024}
LLAMA4 = {"decoder_block": "llama4", "chunk_attn_window_size": 8192}
SMALL = {"decoder_block": "gemma4_small", "sliding_window_size": 512, "model_name": "gemma4-e2b"}
DEEPSEEK = {"decoder_block": "deepseek", "attention_type": "mla"}
DEEPSEEK4 = {
    "decoder_block": "deepseek4",
    "attention_type": "compressed",
    "sliding_window_size": 128,
    "compress_ratios": [0, 4, 128, 0],
    "base_num_decoder_layers": 4,
    "scan_layers": False,
}
DIFFERENT_WHERE_SCANNED = {
    "gpt_oss/scanned one by one",
    "olmo3/scanned with a rest",
    "llama4/scanned out of step",
    "llama2/scanned in cycles",
}
"""The options under which MaxText builds other layers where scan_layers is set than where it is not."""
REFUSED_HERE = {
    "gpt3/mla": "'gpt3' has no latent attention",  # its attention is its own, and reads no type
    "deepseek/absorbed": "use_mla_absorbed_mqa = True is not supported",
}
REFUSED_BY_MAXTEXT_ALONE = {"gemma4_small/images"}  # its vision encoder, which is not described
HYBRID = {"decoder_block": "qwen3_next", "inhomogeneous_layer_cycle_interval": 4}


def _described(*options):
    """What is described of options, later ones over earlier ones, whatever they warn of."""
    base, over = options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return described(from_maxtext_model(base, over))


def test_the_record_is_of_every_model_and_every_decoder_block():
    assert (ASKED["maxtext"], len(MODELS)) == ("0.2.5", 82)
    assert {name.split("/")[0] for name in VARIED} == BLOCKS.keys()
    assert sum(isinstance(entry["layers"], str) for entry in MODELS.values()) == 0


@pytest.mark.parametrize("name", MODELS)
def test_the_layers_of_a_model_are_those_that_maxtext_builds(name):
    model = from_maxtext_model({"model_name": name}, MODELS[name]["options"])  # and nothing is warned of
    assert described(model) == MODELS[name]["layers"]
    layers = [layer for kind in (*model.kinds, *model.others) for layer in kind.layers]
    assert sorted(layers) == list(range(model.layer_count))
    assert (model.facts, model.model_type) == ("MaxText 0.2.5", MODELS[name]["options"]["decoder_block"])


@pytest.mark.parametrize("name", [name for name, entry in VARIED.items() if not isinstance(entry["layers"], str)])
def test_options_change_what_they_change_in_maxtext(name):
    entry = VARIED[name]
    own = MODELS[entry["model"]]["options"] if entry["model"] else {}
    base = {"model_name": entry["model"] or "default", **own, "scan_layers": False}
    if name in REFUSED_HERE:
        with pytest.raises(ConfigError, match=REFUSED_HERE[name]):
            from_maxtext_model(base, entry["options"])
    elif name in DIFFERENT_WHERE_SCANNED:
        with pytest.raises(ConfigError, match="scan_layers = True and inhomogeneous_layer_cycle_interval = "):
            from_maxtext_model(base, entry["options"])
        assert _described(base, {**entry["options"], "scan_layers": False}) != entry["layers"]
    else:
        assert _described(base, entry["options"]) == entry["layers"]


@pytest.mark.parametrize("name", [name for name, entry in VARIED.items() if isinstance(entry["layers"], str)])
def test_what_maxtext_refuses_is_refused_or_a_matter_of_other_options(name):
    entry = VARIED[name]
    own = MODELS[entry["model"]]["options"] if entry["model"] else {}
    base = {"model_name": entry["model"] or "default", **own, "scan_layers": False}
    if name in REFUSED_BY_MAXTEXT_ALONE:
        assert _described(base, entry["options"])
    else:
        with pytest.raises(ConfigError, match="MaxText option"):
            from_maxtext_model(base, entry["options"])


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_scales_its_queries_before_the_call_and_says_so(name):
    model = from_maxtext_model({"model_name": name}, MODELS[name]["options"])
    assert {kind.config.scale for kind in model.kinds} <= {1.0}
    assert model.remarks[0].startswith("scale is 1.0: MaxText scales queries before attention")


def test_the_models_whose_layers_the_yml_alone_does_not_say():
    several = {name for name, entry in MODELS.items() if len({kind["type"] for kind in entry["layers"]}) > 1}
    assert {MODELS[name]["options"]["decoder_block"] for name in several} == {*LAYERS, "qwen3_next", "qwen3_5"}
    for name in several:
        options = {key: value for key, value in MODELS[name]["options"].items() if key != "attention_type"}
        if options["decoder_block"] in LAYERS:
            with pytest.warns(UserWarning, match=r"kernelry\.models\.from_maxtext_model\(base, model_yml\)"):
                from_maxtext(options)


def test_a_kind_is_what_from_maxtext_gives_with_heads():
    chosen = {"attention": "flash", "sa_block_q": 1024, "local_sa_block_q": 256, "mesh_axes": ["fsdp", "context"]}
    model = from_maxtext_model(chosen, GEMMA3)
    local = from_maxtext({**chosen, **GEMMA3, "attention_type": "local_sliding"})
    sliding = model.kind("sliding").config
    assert (sliding.rules, sliding.tilings, sliding.sharding) == (local.rules, local.tilings, local.sharding)
    assert sliding.mask.form == masks.SlidingWindow(1023).form
    assert model.kind("full").config.tilings != sliding.tilings
    assert (sliding.q_heads, sliding.kv_heads, sliding.head_dim, sliding.value_dim) == (16, 16, 128, 128)


def test_files_and_mappings_are_read_alike(tmp_path):
    base, own = tmp_path / "base.yml", tmp_path / "gemma4-e2b.yml"
    base.write_text("model_name: default\nbase_num_query_heads: 32\nattn_logits_soft_cap: 20.0\n", encoding="utf-8")
    own.write_text("decoder_block: gemma4_small\nsliding_window_size: 512\nattn_logits_soft_cap: 30.0\n", "utf-8")
    from_files = from_maxtext_model(str(base), own)
    assert from_files.source == f"{base} + {own}"
    assert from_files.kind("full").layers == (4, 9, 14)  # as in the model of that name
    assert {kind.config.source for kind in from_files.kinds} == {from_files.source}
    from_options = from_maxtext_model({"base_num_query_heads": 32}, {**SMALL, "attn_logits_soft_cap": 30.0})
    assert described(from_options) == described(from_files)
    assert from_options.source == "options"


def test_a_whole_config_is_accepted_with_members_of_enums():
    whole = {**dict.fromkeys(not_attention(), object()), **{option.name: option.default for option in OPTIONS}}
    whole |= {name: option.default for name, option in MODEL.items()}
    whole |= {"decoder_block": enum.Enum("Block", {"ONE": "gemma3"}).ONE, "sliding_window_size": 128}
    model = from_maxtext_model(whole, {})
    assert [(kind.name, len(kind.layers)) for kind in model.kinds] == [("sliding", 14), ("full", 2)]


def test_layers_that_are_not_described_are_named():
    linear = from_maxtext_model({}, HYBRID)
    (other,) = linear.others
    assert (other.name, other.layers[:4], linear.kind("full").layers) == (
        "linear_attention",
        (0, 1, 2, 4),
        (3, 7, 11, 15),
    )
    with pytest.raises(ConfigError, match="layer 0 has no config: a gated delta net"):
        linear.of_layer(0)
    compressed = from_maxtext_model({"base_num_kv_heads": 1}, DEEPSEEK4)
    assert compressed.kind("sliding").layers == (0, 3)
    with pytest.raises(ConfigError, match="'compressed_attention' have no config: its keys and values are"):
        compressed.kind("compressed_attention")


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({**DEEPSEEK, "use_indexer": True}, "full", "use_indexer: the indexer's choice of keys is a mask of the call"),
        (
            {**LLAMA4, "nope_layer_interval": 4, "scan_layers": False, "temperature_tuning": True},
            "full",
            "temperature_tuning: queries are scaled by their positions before the call",
        ),
    ],
)
def test_what_a_call_must_do_besides_is_a_remark_of_the_kind(options, kind, words):
    (remark,) = from_maxtext_model({}, options).kind(kind).remarks
    assert remark.startswith(words)


@pytest.mark.parametrize(
    ("options", "remark"),
    [
        ({"decoder_block": "gemma2", "sliding_window_size": 8}, "number i is in its layer i // 2"),
        ({"use_multimodal": True}, "the vision encoder is not described"),
        ({"vision_encoder_block": "gemma3"}, "the vision encoder is not described"),
        ({"use_audio": True}, "the audio encoder is not described"),
        ({"mtp_num_layers": 1}, "the layers of multi-token prediction are not described"),
    ],
)
def test_what_a_description_leaves_out_is_a_remark(options, remark):
    assert from_maxtext_model({}, options).remarks[-1].endswith(remark)
    assert len(from_maxtext_model({}, {}).remarks) == 1


def test_image_spans_are_named_where_the_model_has_images():
    images = from_maxtext_model({"use_multimodal": True}, {**GEMMA3, "decoder_block": "gemma4"})
    assert (images.kind("sliding").bidirectional, images.kind("full").bidirectional) == ("image", None)
    assert from_maxtext_model({}, GEMMA3).kind("sliding").bidirectional is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"sliding_window_size": 4096, "decoder_block": "mistral"},
            "sliding_window_size = 4096 is not used: the layers of decoder_block 'mistral', which are global, do not "
            "read it. If that is right for this model, pass ignore=('sliding_window_size',).",
        ),
        ({**GEMMA3, "chunk_attn_window_size": 8}, "chunk_attn_window_size = 8 is not used"),
        ({"attention_type": "local_sliding", "sliding_window_size": 8}, "attention_type = 'local_sliding' and sliding"),
        ({**GEMMA3, "attention_type": "full"}, "attention_type = 'full' is not used"),
        ({"causal_block_size": 4}, "causal_block_size = 4 is not used"),
        ({"decoder_block": "mixtral", "attn_logits_soft_cap": 50.0}, "attn_logits_soft_cap = 50.0 is not used"),
        ({**DEEPSEEK, "attention_sink": True}, "attention_sink = True is not used"),
        ({**SMALL, "num_kv_shared_layers": 16}, "num_kv_shared_layers = 16 is not used"),
        ({"num_kv_shared_layers": 4, "nope_layer_interval": 4}, "nope_layer_interval = 4 and num_kv_shared_layers = 4"),
        (
            {**GEMMA3, "global_num_kv_heads": 2, "global_head_dim": 64},
            "global_num_kv_heads = 2 and global_head_dim = 64 are not used",
        ),
    ],
)
def test_an_option_that_no_layer_reads_warns(options, words):
    with pytest.warns(UserWarning, match="not used") as caught:
        model = from_maxtext_model({}, options)
    (warning,) = caught
    assert words in str(warning.message)
    assert warning.filename == __file__
    ignore = tuple(name for name in options if f"{name} = " in str(warning.message))
    assert described(from_maxtext_model({}, options, ignore=ignore)) == described(model)


def test_options_that_from_maxtext_warns_of_warn_here():
    with pytest.warns(UserWarning, match="options: MaxText options that are not read"):
        from_maxtext_model({}, {"reshape_q": True})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decoder_block": "gema3"}, "decoder_block: unknown block 'gema3'; did you mean 'gemma"),
        ({"decoder_block": "simple"}, "decoder_block = 'simple': its layers have no attention"),
        ({"decoder_block": "deepseek"}, "attention_type = 'global': decoder_block 'deepseek' needs 'mla'"),
        ({"decoder_block": "deepseek4"}, "attention_type = 'global': decoder_block 'deepseek4' needs 'compressed'"),
        ({"attention_type": "mla"}, "attention_type = 'mla': decoder_block 'llama2' has no latent attention"),
        ({**DEEPSEEK, "use_mla_absorbed_mqa": True}, "use_mla_absorbed_mqa = True is not supported"),
        (DEEPSEEK4, "decoder_block 'deepseek4' and 16 heads of queries, 1 heads of keys and values are needed"),
        (
            {**DEEPSEEK, "base_num_kv_heads": 4},
            "16 heads of queries, 16 heads of keys and values are needed, and not 4",
        ),
        ({"base_num_kv_heads": 3}, "3 heads of keys (base_num_kv_heads, global_num_kv_heads) must divide 16"),
        ({"decoder_block": "gemma2"}, "'local_sliding' needs sliding_window_size"),
        ({"decoder_block": "llama4"}, "'chunk' needs chunk_attn_window_size"),
        ({**SMALL, "model_name": "default"}, "model_name = 'default': the layers of decoder_block 'gemma4_small'"),
        ({**SMALL, "num_kv_shared_layers": 12}, "num_kv_shared_layers = 12: of 16 layers, none of type 'global'"),
        ({**DEEPSEEK4, "compress_ratios": [0]}, "compress_ratios has 1 numbers for 4 layers"),
        ({**DEEPSEEK4, "compress_ratios": [0, 1, 0, 0]}, "compress_ratios must be integers, each 0, or 4 or more"),
        ({**DEEPSEEK4, "compress_ratios": [0, "4", 0, 0]}, "compress_ratios must be integers"),
        ({**LLAMA4, "nope_layer_interval": 4}, "The interval must be a multiple of 4 that divides 16; or set scan_lay"),
        ({"inhomogeneous_layer_cycle_interval": 2}, "MaxText would build 8 times the same step, and these are not"),
        (
            {**DEEPSEEK4, "scan_layers": True, "first_num_hash_layers": 2},
            "first_num_hash_layers = 2, MaxText builds layers with compress_ratios 128 and 4 by turns, got [128, 0]",
        ),
        ({"global_parameter_scale": 6}, "global_parameter_scale must be a power of 2, got 6"),
        ({"base_num_decoder_layer": 4}, "Unknown MaxText option 'base_num_decoder_layer'; did you mean"),
        ({"kv_heads": 4}, "Unknown MaxText option 'kv_heads'; did you mean 'base_num_kv_heads'?"),
        ({"sliding_windw_size": 4}, "Unknown MaxText option 'sliding_windw_size'; did you mean 'sliding_window_size'?"),
        ({"attn_logits_soft_cap": "x"}, "attn_logits_soft_cap must be a finite number"),
    ],
)
def test_what_cannot_be_described_names_the_option(options, words):
    with pytest.raises(ConfigError) as caught:
        from_maxtext_model({}, options)
    assert words in str(caught.value)
    assert str(caught.value).startswith("options: ")


@pytest.mark.parametrize("option", MODEL.values(), ids=lambda option: option.name)
def test_a_value_of_the_wrong_kind_names_key_value_and_what_was_expected(option):
    for wrong in (None, 0.5, {"x": 1}):
        with pytest.raises(ConfigError) as caught:
            from_maxtext_model({option.name: wrong}, {})
        assert f"MaxText option {option.name} must be {option.expected}, got {wrong!r}" in str(caught.value)
    assert from_maxtext_model({option.name: wrong}, {}, ignore=(option.name,)) == from_maxtext_model({}, {})


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ((None, {}), "from_maxtext_model takes paths or mappings, got NoneType"),
        (({}, [1]), "from_maxtext_model takes paths or mappings, got list"),
        (("missing.yml", {}), "cannot read the config missing.yml"),
        (({}, "model.toml"), "MaxText's files are YAML"),
    ],
)
def test_what_is_no_source_is_named(sources, words):
    with pytest.raises(ConfigError, match=words):
        from_maxtext_model(*sources)
    with pytest.raises(ConfigError, match=r"write ignore=\('moba',\)"):
        from_maxtext_model({}, {}, ignore="moba")


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "gemma3-4b.yml"
    path.write_text("decoder_block: [gemma3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"gemma3-4b\.yml is not valid YAML"):
        from_maxtext_model({}, path)
    path.write_text("- gemma3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"gemma3-4b\.yml must have MaxText's option names and values"):
        from_maxtext_model({}, path)


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**6),
    st.floats(),
    st.sampled_from(["None", "global", "mla", "chunk", "x", *BLOCKS]),
    st.lists(st.sampled_from([-1, 0, 4, 128, "x", None]), max_size=4),
    st.just({"x": 1}),
)
_READ = sorted({*MODEL, *(option.name for option in OPTIONS)} - {"base_num_decoder_layers", "global_parameter_scale"})


@hypothesis.given(st.sampled_from(sorted(MODELS)), st.dictionaries(st.sampled_from(_READ), _VALUES, max_size=3))
def test_a_mutated_config_is_described_or_refused_with_the_name_of_a_key(name, changed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refusal = None
        try:
            count = from_maxtext_model(MODELS[name]["options"], {"model_name": name, **changed}).layer_count
        except ConfigError as error:
            refusal = str(error)
    assert any(option in refusal for option in _READ) if refusal else count > 0


def test_neither_maxtext_nor_flax_is_imported():
    code = (
        "import sys; from kernelry.models import from_maxtext_model; from_maxtext_model({}, {}); "
        "print(*{'maxtext', 'flax', 'torch', 'transformers', 'pydantic', 'yaml'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


@pytest.mark.parametrize("options", [{"base_num_decoder_layers": 10**9}, {"global_parameter_scale": 2**60}])
def test_more_layers_than_any_model_has_are_refused(options):
    with pytest.raises(ConfigError, match=r"base_num_decoder_layers = \d+: at most 4096 layers of attention are"):
        from_maxtext_model({}, options)


def test_an_empty_base_is_not_named(tmp_path):
    file = tmp_path / "llama.yml"
    file.write_text("decoder_block: llama2\n")
    assert from_maxtext_model({}, file).source == from_maxtext_model(file, {}).source == str(file)
    assert from_maxtext_model({"head_dim": 64}, file).source == f"options + {file}"
    assert from_maxtext_model({}, {}).source == "options"
