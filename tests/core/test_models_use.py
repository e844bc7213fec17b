"""A Model where it is used: its phases, its layers in Flax, and its named shapes."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import kernelry
from kernelry import ModelShape, masks, resolve_phases
from kernelry.config import AttentionConfig, MoBA
from kernelry.errors import ArgumentError, ConfigError, ShapeError
from kernelry.flax import AttentionOp, CachedPart, Tokens, attention_fn, attention_op_as_linen
from kernelry.models import LayerKind, Model, OtherLayers
from kernelry.phases.resolving import ModelPhases, Phases
from kernelry.request.request import Mode

SHAPE = ModelShape(q_len=32, max_len=48, dtype="float32")
HEADS = {"q_heads": 4, "kv_heads": 2, "head_dim": 16, "value_dim": 16}
SLIDING = LayerKind(
    "sliding",
    (0, 1, 3, 4),
    AttentionConfig(type="local_sliding", window=8, soft_cap=30.0, source="config.json: sliding", **HEADS),
    bidirectional="image",
)
FULL = LayerKind(
    "full", (2, 5), AttentionConfig(scale=0.5, source="config.json: full", **HEADS), remarks=("keys are normalised",)
)
OTHER = OtherLayers("linear_attention", (6,), "linear attention has no softmax.")
MODEL = Model("tiny", (SLIDING, FULL), (OTHER,), source="config.json")


def encoder(name="full", **options):
    return LayerKind(name, (0,), AttentionConfig(**{"type": "full", **options, **HEADS}))


@pytest.fixture(scope="module")
def phases():
    return resolve_phases(MODEL, SHAPE, target="cpu", changes=False)


def test_the_phases_of_a_model_are_those_of_its_kinds(phases):
    assert isinstance(phases, ModelPhases)
    assert list(phases) == ["sliding", "full"]
    assert len(phases) == 2
    assert phases["sliding"] == resolve_phases(SLIDING, SHAPE, target="cpu", changes=False)
    assert dict(phases.items())["full"] is phases["full"]
    train = phases["sliding"].train.request
    assert (str(train.mask), train.soft_cap, train.q_heads, train.kv_heads, train.head_dim) == (
        "window(7, 0)",
        30.0,
        4,
        2,
        16,
    )
    assert phases["full"].decode.request.scale == 0.5


def test_a_kind_that_a_model_does_not_have_is_named_with_the_nearest(phases):
    with pytest.raises(ConfigError, match="unknown kind of layers 'slidng'; did you mean 'sliding'"):
        phases["slidng"]
    with pytest.raises(ConfigError, match="layers 'linear_attention' have no config: linear attention has no softmax"):
        phases["linear_attention"]


def test_the_phases_of_a_model_are_text_and_json(phases):
    text = str(phases)
    assert "sliding: layers 0-1, 3-4: mask=window(7, 0)" in text
    assert "linear_attention: layers 6: linear attention has no softmax." in text
    assert "image tokens see each other: where a call has such tokens, its mask is 'config | spans'" in text
    data = json.loads(json.dumps(phases.to_json()))
    assert sorted(data) == ["disagreements", "kinds", "model"]
    assert data["kinds"]["full"]["remarks"] == ["keys are normalised"]
    assert data["kinds"]["sliding"]["decode"]["request"]["q_len"] == 1


def test_disagreements_of_a_model_name_the_kind():
    model = dataclasses.replace(
        MODEL, kinds=(SLIDING, dataclasses.replace(FULL, config=AttentionConfig(kernel="ragged")))
    )
    found = resolve_phases(model, SHAPE, target="cpu", changes=False).disagreements
    assert found
    assert all(text.startswith("full: ") for text in found)


@pytest.mark.parametrize("options", [{}, {"type": "local_sliding", "window": (4, 4)}])
def test_an_encoder_has_no_decode_and_no_cache(options):
    found = resolve_phases(
        encoder(**options), dataclasses.replace(SHAPE, cache="paged:16"), target="cpu", changes=False
    )
    assert isinstance(found, Phases)
    assert found.decode is None
    assert [resolution.request.mode for resolution in found.all] == [Mode.TRAIN, Mode.PREFILL]
    assert found.disagreements == ()
    assert found.remarks[0].startswith("no decode phase: queries of these layers see later tokens, as in an encoder")
    assert found.remarks[0] in found.explain()
    assert found.to_json()["decode"] is None


def test_cross_attention_decodes_over_the_keys_of_the_encoder():
    found = resolve_phases(encoder("cross"), dataclasses.replace(SHAPE, cache="paged:16"), target="cpu", changes=False)
    assert (found.decode.request.q_len, found.decode.request.kv_len, found.decode.request.page_size) == (1, 48, None)
    assert found.disagreements == ()
    assert found.remarks == ()


def test_block_diffusion_decodes_and_says_that_masks_differ():
    kind = encoder(type="block_diffusion", block_size=4)
    found = resolve_phases(kind, SHAPE, target="cpu", changes=False)
    assert found.decode is not None
    assert found.disagreements[0].startswith("mask meaning: with type 'block_diffusion'")


def test_a_shape_that_contradicts_a_kind_names_the_kind_and_both_sizes():
    with pytest.raises(ArgumentError, match=r"^q_heads=8 contradicts q_heads=4 of config\.json: sliding; leave it out"):
        resolve_phases(MODEL, dataclasses.replace(SHAPE, q_heads=8), target="cpu")


def test_a_cache_that_a_kind_does_not_fit_names_the_kind():
    with pytest.raises(ArgumentError, match="layers 'full': cache 'rolling' keeps only the last tokens"):
        resolve_phases(MODEL, dataclasses.replace(SHAPE, cache="rolling"), target="cpu")


def test_neither_a_model_nor_a_config_is_refused():
    with pytest.raises(ArgumentError, match=r"config must be a kernelry.config.AttentionConfig, got str"):
        kernelry.resolve_phases("gemma", SHAPE)


@pytest.mark.parametrize(
    "call",
    [AttentionOp, attention_op_as_linen, lambda model: attention_fn(*arrays(), layer=model)],
    ids=["op", "linen", "function"],
)
def test_a_whole_model_is_not_a_layer(call):
    kinds = r"is a whole model, with layers of these kinds: sliding, full; pass one of them, model\.kind\('sliding'\)"
    with pytest.raises(ArgumentError, match=kinds):
        call(MODEL)


def test_kernels_are_chosen_for_a_model_by_a_config():
    model = MODEL.choosing(AttentionConfig(kernel="blockwise"))
    found = resolve_phases(model, SHAPE, target="cpu", changes=False)
    assert {r.kernel for _, phases in found.items() for r in phases.all} == {"blockwise"}


# In Flax


def arrays(q_len=8, *, kv_len=None, q_heads=4, kv_heads=2, head_dim=16):
    kv_len = q_len if kv_len is None else kv_len
    rng = np.random.default_rng(0)
    shapes = (2, q_len, q_heads, head_dim), (2, kv_len, kv_heads, head_dim), (2, kv_len, kv_heads, head_dim)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def asked(function, *operands, **options):
    with kernelry.record() as made:
        jax.eval_shape(functools.partial(function, **options), *operands)
    return made[0].request


def op(kind, **options):
    return AttentionOp(kind, **options)


def linen(kind, **options):
    return lambda *operands, **call: attention_op_as_linen(kind, **options).apply({}, *operands, **call)


def function(kind, **options):
    return functools.partial(attention_fn, layer=kind, **options)


FRONT_ENDS = [op, linen, function]


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("kind", MODEL.kinds, ids=lambda kind: kind.name)
def test_a_layer_of_a_kind_asks_what_is_locked(front_end, kind):
    request = asked(front_end(kind), *arrays(32))
    wanted = resolve_phases(kind, dataclasses.replace(SHAPE, batch=2), changes=False).train.request
    assert request == wanted


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_kind_chooses_its_kernels(front_end):
    kind = MODEL.choosing(AttentionConfig(kernel="blockwise")).kind("sliding")
    with kernelry.record() as made:
        jax.eval_shape(front_end(kind), *arrays())
    assert made[0].kernel == "blockwise"


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"q_heads": 8}, r"query has q_heads=8, and config\.json: sliding has q_heads=4"),
        ({"kv_heads": 4}, "key has kv_heads=4, and .* has kv_heads=2"),
        ({"head_dim": 8}, "query has head_dim=8, and .* has head_dim=16"),
    ],
)
def test_arrays_of_other_heads_are_refused_with_both_sizes(front_end, sizes, words):
    with pytest.raises(ShapeError, match=words):
        front_end(SLIDING)(*arrays(**sizes))


def test_values_and_parts_of_a_cache_have_the_heads_of_the_kind():
    query, key, value = arrays()
    with pytest.raises(ShapeError, match=r"value has value_dim=8, and .* has value_dim=16"):
        AttentionOp(FULL)(query, key, value[..., :8])
    with pytest.raises(ShapeError, match=r"key has kv_heads=1, and .* has kv_heads=2"):
        AttentionOp(FULL)(query, key, value, cached=CachedPart(key[:, :, :1], value[:, :, :1]))


def test_inside_shard_map_heads_may_be_those_of_one_device():
    mesh = jax.make_mesh((2,), ("t",), axis_types=(AxisType.Auto,))
    heads = PartitionSpec(None, None, "t")
    layer = AttentionOp(dataclasses.replace(FULL, config=dataclasses.replace(FULL.config, kernel="dot_product")))
    split = jax.shard_map(layer, mesh=mesh, in_specs=(heads,) * 3, out_specs=heads)
    assert jax.eval_shape(split, *arrays()).shape == (2, 8, 4, 16)
    with pytest.raises(ShapeError, match=r"query has q_heads=3, and .* has q_heads=4"):
        jax.eval_shape(split, *arrays(q_heads=6))


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_bias_that_a_kind_needs_must_be_passed(front_end):
    kind = dataclasses.replace(FULL, config=dataclasses.replace(FULL.config, bias=True))
    with pytest.raises(ArgumentError, match=r"config\.json: full adds a bias to the logits, and the call has none"):
        front_end(kind)(*arrays())
    request = asked(front_end(kind), *arrays(), bias=jnp.zeros((1, 4, 8, 8)))
    assert request.bias == (1, 4, 8, 8)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_bias_after_the_cap_is_asked_for(front_end):
    kind = with_options(bias=True, soft_cap=5.0, bias_after_cap=True)
    request = asked(front_end(kind), *arrays(32), bias=jnp.zeros((1, 4, 32, 32)))
    assert request.bias_after_cap
    shape = dataclasses.replace(SHAPE, batch=2)
    assert request == resolve_phases(kind, shape, changes=False).train.request


def with_options(**options):
    return dataclasses.replace(FULL, config=dataclasses.replace(FULL.config, **options))


def test_sinks_that_a_kind_needs_must_be_bound():
    kind = with_options(sinks=True)
    with pytest.raises(ArgumentError, match=r"config\.json: full has sinks, one logit per query head: bind them"):
        attention_fn(*arrays(), layer=kind)
    assert asked(function(kind), *arrays(), sinks=jnp.zeros(4)).sinks


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        (FULL, {"scale": 0.25}, r"scale=0.25 contradicts config\.json: full, which says 0.5; leave scale out"),
        (SLIDING, {"scale": 0.5}, "scale=0.5 contradicts .* which says 0.25;"),
        (SLIDING, {"soft_cap": 50.0}, "soft_cap=50.0 contradicts .* which says 30.0;"),
        (FULL, {"soft_cap": 50.0}, "soft_cap=50.0 contradicts .* which says None;"),
        (FULL, {"sinks": jnp.zeros(4)}, "sinks=an array contradicts .* which says no sinks;"),
        (FULL, {"bias_after_cap": True}, "bias_after_cap=True contradicts .* which says False;"),
        (with_options(precision="high"), {"precision": "highest"}, "precision=highest contradicts .* says high;"),
        (
            with_options(dropout_rate=0.5),
            {"dropout_rate": 0.25, "broadcast_dropout": False},
            "dropout_rate=0.25 contradicts .* says 0.5;",
        ),
        (FULL, {"config": AttentionConfig(kernel="blockwise")}, "layer= and config= both say how kernels are chosen"),
        (SLIDING, {"layer_mask": masks.Causal()}, r"layer_mask=Causal\(\) contradicts SlidingWindow\(7, 0\), the mask"),
        (SLIDING, {"layer_mask": masks.Full()}, r"layer_mask=Full\(\) contradicts"),
        (encoder(), {"layer_mask": masks.Causal()}, r"layer_mask=Causal\(\) contradicts Full\(\)"),
        (encoder(), {"is_causal": True}, r"is_causal=True contradicts config, whose mask Full\(\) shows later tokens"),
        (with_options(moba=MoBA(2, 2)), {}, "attention_fn does not support moba of .*: use AttentionOp"),
        (with_options(record_max_logits=True), {}, "attention_fn does not support record_max_logits of"),
    ],
)
def test_arguments_that_contradict_a_layer_are_refused(kind, given, words):
    with pytest.raises(ArgumentError, match=words):
        attention_fn(*arrays(), layer=kind, **given)


def test_a_traced_number_is_refused_as_without_a_layer():
    for name in ("scale", "soft_cap"):
        with pytest.raises(ArgumentError, match=f"{name} must be a Python number, got a traced array"):
            jax.jit(lambda number, name=name: attention_fn(*arrays(), layer=SLIDING, **{name: number}))(0.25)


@pytest.mark.parametrize("scale", [np.float32(0.1), jnp.float32(0.1)])
def test_a_scale_in_float32_is_that_of_the_layer(scale):
    assert asked(function(with_options(scale=0.1)), *arrays(), scale=scale).scale == 0.1


def test_precision_of_a_module_is_compared_by_what_it_means():
    given = {"precision": jax.lax.Precision.HIGHEST}
    assert asked(function(with_options(precision="highest")), *arrays(), **given).precision == "highest"


def test_arguments_that_say_what_the_layer_says_are_accepted():
    same = {"scale": 0.25, "soft_cap": 30.0, "layer_mask": SLIDING.config.mask, "is_causal": True}
    assert asked(function(SLIDING), *arrays(), **same) == asked(function(SLIDING), *arrays())


def test_options_of_the_layer_that_flax_does_not_know_are_asked_for():
    kind = with_options(logits_dtype="bfloat16", precision="highest")
    request = asked(function(kind), *arrays())
    assert (request.logits_dtype, request.precision) == ("bfloat16", "highest")
    assert asked(function(FULL), *arrays(), precision="high").precision == "high"


def test_dropout_of_the_layer_does_not_matter_where_there_is_none():
    assert asked(function(with_options(dropout_rate=0.5)), *arrays(), deterministic=True).dropout_rate == 0.0


def test_the_mask_of_a_layer_can_be_placed_and_narrowed():
    query, key, value = arrays(8)
    step = SLIDING.config.mask.at(query_offset=5) & masks.Lengths(jnp.full(2, 6))
    found = attention_fn(query[:, 5:6], key, value, layer=SLIDING, layer_mask=step, mode="decode")
    whole = AttentionOp(SLIDING)(query, key, value)
    np.testing.assert_allclose(found, whole[:, 5:6], atol=1e-6)


@pytest.mark.parametrize("flags", [[0, 0, 1, 1, 0, 1, 1, 1], [[0, 0, 1, 1, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0, 1]]])
def test_runs_of_bidirectional_tokens_see_themselves(flags):
    operands, flags = arrays(8), np.array(flags, bool)
    found = attention_fn(*operands, layer=SLIDING, bidirectional=flags)
    layer = AttentionOp(SLIDING)(*operands, tokens=Tokens(bidirectional=flags))
    np.testing.assert_allclose(found, layer, atol=1e-6)
    plain = attention_fn(*operands, layer=SLIDING)
    assert np.abs(np.asarray(found - plain)).max() > 1e-3


def test_bidirectional_flags_of_more_keys_than_queries_are_refused():
    query, key, value = arrays(8)
    with pytest.raises(ShapeError, match=r"bidirectional must be booleans \[\*batch, S\] with T = S, got shape \(8,\)"):
        attention_fn(query[:, :4], key, value, bidirectional=np.ones(8, bool))
    with pytest.raises(ShapeError, match=r"bidirectional must be booleans .* \*batch = \[2\], got shape \(3, 8\)"):
        attention_fn(query, key, value, bidirectional=np.ones((3, 8), bool))


def test_a_layer_in_an_nnx_module_equals_its_op():
    inputs = jnp.asarray(np.random.default_rng(1).standard_normal((2, 8, 64)), jnp.float32)

    def module(attend):
        return nnx.MultiHeadAttention(4, 64, num_kv_heads=2, decode=False, attention_fn=attend, rngs=nnx.Rngs(0))(
            inputs
        )

    bound = functools.partial(attention_fn, layer=SLIDING)
    by_hand = functools.partial(attention_fn, layer_mask=masks.SlidingWindow(7), soft_cap=30.0)
    np.testing.assert_array_equal(module(bound), module(by_hand))
