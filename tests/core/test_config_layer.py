"""The options of a layer: AttentionConfig checks them, every kind of config says them, tilings reach the plan."""

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kernelry
from kernelry import Request, masks
from kernelry.config import AttentionConfig, AttentionType, MoBA, load_config
from kernelry.errors import ConfigError
from kernelry.parallel import Sharding
from kernelry.policy.policy import Policy
from kernelry.policy.rules import Condition, Rule

LENGTH = 9
OPTIONS = {
    "type": "local_sliding",
    "window": 512,
    "soft_cap": 50.0,
    "scale": 1.0,
    "sinks": True,
    "moba": {"chunk_size": 1024, "top_k": 8},
    "record_max_logits": True,
    "dropout_rate": 0.5,
    "logits_dtype": "bfloat16",
    "precision": "highest",
    "tilings": {"splash": {"block_q": 1024, "block_kv": 256}, "blockwise": {"block_q": 64}},
    "sharding": {"batch": ["data", "fsdp"], "sequence": "context", "strategy": "ring", "sizes": {"context": 4}},
}
TOML = """
[attention]
type = "local_sliding"
window = 512
soft_cap = 50.0
scale = 1.0
sinks = true
moba = { chunk_size = 1024, top_k = 8 }
record_max_logits = true
dropout_rate = 0.5
logits_dtype = "bfloat16"
precision = "highest"
tilings = { splash = { block_q = 1024, block_kv = 256 }, blockwise = { block_q = 64 } }

[attention.sharding]
batch = ["data", "fsdp"]
sequence = "context"
strategy = "ring"
sizes = { context = 4 }
"""
YAML = """
attention:
  type: local_sliding
  window: 512
  soft_cap: 50.0
  scale: 1.0
  sinks: true
  moba: {chunk_size: 1024, top_k: 8}
  record_max_logits: true
  dropout_rate: 0.5
  logits_dtype: bfloat16
  precision: highest
  tilings: {splash: {block_q: 1024, block_kv: 256}, blockwise: {block_q: 64}}
  sharding: batch=data,fsdp sequence=context:4 ring
"""
CONFIG = AttentionConfig(**{**OPTIONS, "moba": MoBA(1024, 8)})


def _picture(mask):
    return np.broadcast_to(mask.materialize(LENGTH, LENGTH), (1, 1, LENGTH, LENGTH))[0, 0]


@pytest.mark.parametrize(("name", "text"), [("c.toml", TOML), ("c.yaml", YAML)])
def test_a_file_says_every_option(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    assert dataclasses.replace(load_config(path), source="config") == CONFIG


def test_a_mapping_says_every_option():
    assert load_config(OPTIONS) == CONFIG


def test_an_empty_table_is_the_default_config():
    assert load_config({}) == AttentionConfig()


def test_every_option_of_a_layer_can_be_said_in_a_table():
    fields = {field.name for field in dataclasses.fields(AttentionConfig)} - {"source"}
    for name in fields:
        with pytest.raises(ConfigError) as caught:
            load_config({name: object()})
        assert "unknown key" not in str(caught.value), name


@pytest.mark.parametrize("type_", AttentionType)
def test_a_type_is_parsed_from_its_name(type_):
    assert AttentionType.parse(type_.value) is type_
    assert AttentionType.parse(type_) is type_


@pytest.mark.parametrize("type_", ["global", "mla"])
def test_global_and_mla_are_causal(type_):
    assert AttentionConfig(type=type_).mask.form == masks.Causal().form


def test_full_sees_everything():
    assert AttentionConfig(type="full").mask.form == masks.Full().form


@given(window=st.integers(1, LENGTH + 2))
def test_a_window_holds_that_many_keys_the_querys_own_included(window):
    picture = _picture(AttentionConfig(type="local_sliding", window=window).mask)
    seen = [min(window, query + 1) for query in range(LENGTH)]
    np.testing.assert_array_equal(picture.sum(axis=-1), seen)
    assert picture.diagonal().all()


@given(size=st.integers(1, LENGTH + 2))
def test_a_chunk_sees_itself_causally(size):
    picture = _picture(AttentionConfig(type="chunk", chunk_size=size).mask)
    q, k = np.indices((LENGTH, LENGTH))
    np.testing.assert_array_equal(picture, (q // size == k // size) & (k <= q))


@given(size=st.integers(1, LENGTH + 2))
def test_block_diffusion_is_causal_between_blocks(size):
    picture = _picture(AttentionConfig(type="block_diffusion", block_size=size).mask)
    q, k = np.indices((LENGTH, LENGTH))
    np.testing.assert_array_equal(picture, k // size <= q // size)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"type": "gobal"}, ["unknown attention type 'gobal'", "did you mean 'global'"]),
        ({"type": 3}, ["unknown attention type 3"]),
        ({"type": "compressed"}, ["'compressed' is not supported", "mask"]),
        ({"type": "local_sliding"}, ["'local_sliding' needs window"]),
        ({"type": "chunk"}, ["'chunk' needs chunk_size"]),
        ({"type": "block_diffusion"}, ["'block_diffusion' needs block_size"]),
        ({"window": 4}, ["window=4 is only valid with type 'local_sliding'", "'global'"]),
        ({"type": "local_sliding", "window": 4, "chunk_size": 4}, ["chunk_size=4 is only valid with type 'chunk'"]),
        ({"type": "full", "block_size": 4}, ["block_size=4 is only valid with type 'block_diffusion'", "'full'"]),
        ({"type": "local_sliding", "window": 0}, ["window must be a positive integer, got 0"]),
        ({"type": "local_sliding", "window": True}, ["window must be a positive integer, got True"]),
        ({"type": "chunk", "chunk_size": 4.0}, ["chunk_size must be a positive integer, got 4.0"]),
        ({"type": "block_diffusion", "block_size": "4"}, ["block_size must be a positive integer, got '4'"]),
        ({"soft_cap": 0}, ["soft_cap must be positive, got 0"]),
        ({"soft_cap": -1.0}, ["soft_cap must be positive, got -1.0"]),
        ({"soft_cap": True}, ["soft_cap must be a finite number or none, got True"]),
        ({"soft_cap": float("inf")}, ["soft_cap must be a finite number or none, got inf"]),
        ({"scale": "1"}, ["scale must be a finite number or none, got '1'"]),
        ({"scale": float("nan")}, ["scale must be a finite number or none, got nan"]),
        ({"sinks": 1}, ["sinks must be true or false, got 1"]),
        ({"record_max_logits": "yes"}, ["record_max_logits must be true or false, got 'yes'"]),
        ({"dropout_rate": 1.0}, ["dropout_rate must be in [0, 1), got 1.0"]),
        ({"dropout_rate": -0.1}, ["dropout_rate must be in [0, 1), got -0.1"]),
        ({"dropout_rate": None}, ["dropout_rate must be a number in [0, 1), got None"]),
        ({"dropout_rate": False}, ["dropout_rate must be a number in [0, 1), got False"]),
        ({"logits_dtype": "float23"}, ["unknown logits_dtype 'float23'", "did you mean 'float32'"]),
        ({"precision": "hihgest"}, ["unknown precision 'hihgest'", "did you mean 'highest'"]),
        ({"kernel": ""}, ["kernel must be a name or 'auto'"]),
    ],
)
def test_an_option_that_means_nothing_is_named_by_constructor_and_table(options, words):
    for build in (lambda: AttentionConfig(**options), lambda: load_config(options)):
        with pytest.raises(ConfigError) as caught:
            build()
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"moba": {"chunk_size": 4}}, ["moba.top_k", "required"]),
        ({"moba": {"chunk_size": 0, "top_k": 1}}, ["moba.chunk_size", "greater", "got 0"]),
        ({"moba": {"chunk_size": True, "top_k": 1}}, ["moba.chunk_size", "integer", "got True"]),
        ({"moba": {"chunk_siz": 4, "top_k": 1}}, ["moba.chunk_siz", "did you mean 'chunk_size'"]),
        ({"windw": 4}, ["'windw'", "did you mean 'window'"]),
        ({"tilings": {"splash": {"block_q": True}}}, ["tilings.splash.block_q", "integer", "got True"]),
        ({"tilings": {"splash": {"block_q": -1}}}, ["tilings.splash.block_q", "greater", "got -1"]),
        ({"tilings": {"splash": 4}}, ["tilings.splash", "dictionary", "got 4"]),
    ],
)
def test_a_table_of_the_wrong_shape_names_the_key(options, words):
    with pytest.raises(ConfigError) as caught:
        load_config(options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("sizes", [(0, 1), (4, 0), (True, 1), (4, 1.0)])
def test_moba_refuses_what_is_no_size(sizes):
    with pytest.raises(ConfigError, match=r"moba\.(chunk_size|top_k) must be a positive integer"):
        MoBA(*sizes)


def test_moba_must_be_a_moba():
    with pytest.raises(ConfigError, match=r"moba must be a MoBA\(chunk_size, top_k\) or None"):
        AttentionConfig(moba=(4, 1))


@pytest.mark.parametrize("tilings", [("splash",), {"splash": 4}, 3, {"splash": {"block_q": 0}}])
def test_tilings_of_the_wrong_shape_are_refused(tilings):
    with pytest.raises(ConfigError, match="tilings"):
        AttentionConfig(tilings=tilings)


def test_default_precision_is_none():
    assert AttentionConfig(precision="default").precision is None
    assert AttentionConfig(precision="high").precision == "high"


def test_a_config_is_a_value():
    again = pickle.loads(pickle.dumps(CONFIG))
    assert again == CONFIG
    assert hash(again) == hash(CONFIG)
    assert again.policy is CONFIG.policy


def test_tilings_are_equal_in_any_order():
    one = AttentionConfig(tilings={"a": {"x": 1, "y": 2}, "b": {"z": 3}})
    other = AttentionConfig(tilings=(("b", (("z", 3),)), ("a", (("y", 2), ("x", 1)))))
    assert one == other
    assert one.tilings == (("a", (("x", 1), ("y", 2))), ("b", (("z", 3),)))


def test_tilings_tell_policies_apart():
    tiled = Policy.shipped(tilings=(("blockwise", (("block_q", 32),)),))
    assert tiled != Policy.shipped()
    assert hash(tiled) != hash(Policy.shipped())
    assert pickle.loads(pickle.dumps(tiled)) == tiled


def test_tilings_reach_the_kernel_chosen_and_no_other():
    policy = AttentionConfig(tilings={"blockwise": {"block_q": 32}, "elsewhere": {"block_q": 16}}).policy
    plan = kernelry.resolve(Request(q_len=256), kernel="blockwise", policy=policy).plan
    assert plan.tiling["block_q"] == 32
    assert kernelry.resolve(Request(q_len=256), kernel="dot_product", policy=policy).plan.tiling.values == ()


def test_tilings_reach_a_kernel_chosen_automatically():
    request = Request(q_len=1024, mask=masks.SlidingWindow(63))
    policy = AttentionConfig(tilings={"blockwise": {"block_q": 512}}).policy
    resolution = kernelry.resolve(request, policy=policy)
    assert (resolution.kernel, resolution.plan.tiling["block_q"]) == ("blockwise", 512)


def test_a_rules_own_tiling_goes_before_tilings_and_a_scopes_before_both():
    rule = Rule(Condition(), ("blockwise",), (("block_q", 64),))
    policy = AttentionConfig(rules=(rule,), tilings={"blockwise": {"block_q": 32}}).policy
    assert kernelry.resolve(Request(q_len=256), policy=policy).plan.tiling["block_q"] == 64
    with kernelry.use(tiling={"block_q": 128}):
        assert kernelry.resolve(Request(q_len=256), policy=policy).plan.tiling["block_q"] == 128


def test_an_unknown_tunable_is_a_refusal_that_names_the_nearest():
    policy = AttentionConfig(kernel="blockwise", tilings={"blockwise": {"blok_q": 32}}).policy
    with pytest.raises(kernelry.errors.NoKernelError, match=r"no tunable 'blok_q'; did you mean 'block_q'"):
        kernelry.resolve(Request(q_len=256), policy=policy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": 3}, "rules must be a tuple of Rule"),
        ({"forbid_adapters": "pad"}, "forbid_adapters must be a tuple of str"),
        ({"thresholds": 3}, "thresholds must be numbers by name"),
    ],
)
def test_choices_of_the_wrong_kind_are_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        AttentionConfig(**options)


def test_lists_and_mappings_are_accepted():
    config = AttentionConfig(thresholds={"flash_min_q_len": 64}, forbid_adapters=["repeat_kv_heads"])
    assert config == AttentionConfig(thresholds=(("flash_min_q_len", 64),), forbid_adapters=("repeat_kv_heads",))
    assert hash(config.policy)


# The sharding of a layer


def _sharded(**facts):
    return AttentionConfig(sharding=Sharding(**facts))


@pytest.mark.parametrize(
    "given",
    [
        Sharding(batch="data", sequence="context", strategy="ring"),
        "batch=data sequence=context ring",
        {"batch": "data", "sequence": ["context"], "strategy": "ring"},
    ],
    ids=["value", "text", "table"],
)
def test_a_sharding_is_a_value_a_text_or_a_table(given):
    expected = _sharded(batch="data", sequence="context", strategy="ring")
    assert AttentionConfig(sharding=given) == load_config({"sharding": given}) == expected
    assert hash(AttentionConfig(sharding=given)) == hash(expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            "batch=data rng",
            "sharding 'batch=data rng': 'rng' is neither axes nor a strategy nor an order; did you mean ",
        ),
        ("batch=data heads=data", "sharding: mesh axis 'data' is named twice"),
        ({"strategy": "rings"}, "sharding: unknown strategy 'rings'; did you mean 'ring'"),
        ({"sequnce": "c"}, "sharding: unknown field 'sequnce'; did you mean 'sequence'"),
        (3, "a sharding is written e.g. 'batch=d:4 sequence=c:8 ring', got 3"),
        ([], r"a sharding is written e.g. .*, got \[\]"),
    ],
)
def test_a_sharding_of_another_form_is_an_error_of_the_config(given, words):
    with pytest.raises(ConfigError, match=f"^{words}"):
        AttentionConfig(sharding=given)
    with pytest.raises(ConfigError, match=f"^config: {words}"):
        load_config({"sharding": given})


@pytest.mark.parametrize(
    ("name", "text", "line", "words"),
    [
        ("c.toml", '[attention]\nscale = 1.0\nsharding = "batsh=d"\n', 3, "sharding 'batsh=d': .*mean 'batch'"),
        ("c.toml", '[attention.sharding]\nbatch = "d"\nsequnce = "c"\n', 3, "unknown field 'sequnce'; .*'sequence'"),
        ("c.toml", '[attention.sharding]\nbatch = "d"\nstrategy = "rings"\n', 3, "unknown strategy 'rings'"),
        ("c.toml", '[attention.sharding]\nsequence = "c"\nkv_sequence = "d"\n', 1, "queries are cut over"),
        ("c.yaml", "attention:\n  sharding:\n    batch: d\n    order: stripes\n", 4, "did you mean 'striped'"),
        ("c.yaml", "attention:\n  sharding: ringg\n", 2, "'ringg' is neither .*did you mean 'ring'"),
    ],
)
def test_a_sharding_in_a_file_that_is_wrong_has_its_line(tmp_path, name, text, line, words):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"{name}:{line}: .*{words}"):
        load_config(path)
