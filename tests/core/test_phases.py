"""Training, prefill and decode of one model, resolved together."""

import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import ModelShape, masks, resolve_phases
from kernelry.cache import PagedCache, QuantizedArray, RollingCache, TwoPartCache
from kernelry.config import AttentionConfig, MoBA
from kernelry.errors import ArgumentError, ConfigError, KernelryError
from kernelry.flax import AttentionOp, Tokens
from kernelry.phases.calls import calls
from kernelry.phases.model_shape import CacheShape
from kernelry.plugin import (
    AtomKind,
    Capabilities,
    Dims,
    Feature,
    Gradient,
    Kernel,
    KernelSpec,
    Mode,
    Operand,
    PositionKind,
    Statistic,
)
from kernelry.policy.lock import Lock
from kernelry.request.target import Target

SHAPE = ModelShape(q_len=64, max_len=128, batch=2, q_heads=4, kv_heads=2, head_dim=32, dtype="float32")
PLAIN = Capabilities(
    platforms=frozenset({"cpu"}),
    modes=frozenset(Mode),
    dtypes=frozenset({"float32"}),
    head_dims=Dims(maximum=128),
    atoms=frozenset({AtomKind.CAUSAL}),
    normalizations=frozenset({"softmax"}),
    gradient=Gradient.NATIVE,
    gradients=frozenset({Operand.QUERY, Operand.KEY, Operand.VALUE}),
    features=frozenset({Feature.SCALE}),
)
STEP = {
    "atoms": frozenset({AtomKind.CAUSAL, AtomKind.LENGTHS}),
    "positions": frozenset(PositionKind),
    "unequal_lengths": True,
    "empty_rows": True,
    "clean_hidden_slots": True,
}


def _spec(name, **changes):
    return KernelSpec(
        name=name, capabilities=dataclasses.replace(PLAIN, **changes), load=Kernel, signature=lambda _: ("x",)
    )


def test_the_three_phases_ask_what_a_model_asks():
    phases = resolve_phases(AttentionConfig(dropout_rate=0.5, sinks=True), SHAPE)
    train, prefill, decode = (resolution.request for resolution in phases.all)
    assert [(r.mode, r.q_len, r.kv_len) for r in (train, prefill, decode)] == [
        (Mode.TRAIN, 64, 64),
        (Mode.PREFILL, 64, 64),
        (Mode.DECODE, 1, 128),
    ]
    assert (train.dropout_rate, prefill.dropout_rate, decode.dropout_rate) == (0.5, 0.0, 0.0)
    assert Operand.SINKS in train.gradients
    assert not prefill.gradients | decode.gradients
    assert {atom.kind for atom in decode.mask.atoms} == {AtomKind.CAUSAL, AtomKind.LENGTHS}
    assert "traced" in str(decode.mask)


def test_a_plain_model_agrees():
    assert resolve_phases(AttentionConfig(), SHAPE).disagreements == ()


def test_a_phase_that_no_kernel_serves_is_named_with_reasons():
    trained = _spec("trained", modes=frozenset({Mode.TRAIN, Mode.PREFILL}))
    phases = resolve_phases(AttentionConfig(kernel="trained"), SHAPE, kernels=(trained,))
    assert phases.decode.plan is None
    assert len(phases.disagreements) == 1
    assert phases.disagreements[0].startswith("decode: no kernel serves it (trained: mode=decode")


def test_a_cache_that_decode_repeats_and_prefill_does_not_is_named():
    grouped = _spec("grouped", modes=frozenset({Mode.TRAIN, Mode.PREFILL}), grouped_heads=True)
    single = _spec("single", modes=frozenset({Mode.DECODE}), **STEP)
    phases = resolve_phases(AttentionConfig(), SHAPE, kernels=(grouped, single))
    assert phases.decode.kernel == "single"
    [text] = phases.disagreements
    assert "prefill reads kv_heads=2 (grouped)" in text
    assert "decode kv_heads=4 (single through repeat_kv_heads" in text


def test_parts_of_a_cache_return_statistics_and_leave_sinks_to_the_end():
    phases = resolve_phases(AttentionConfig(sinks=True), dataclasses.replace(SHAPE, two_part=True))
    assert phases.train.request.sinks
    for resolution in (phases.prefill, phases.decode):
        assert (resolution.request.partial, resolution.request.sinks) == (True, False)
        assert Statistic.LSE in resolution.plan.kernel.capabilities.statistics
    assert phases.disagreements == ()


def test_a_kernel_without_statistics_does_not_serve_parts():
    bare = _spec("bare", **STEP)
    phases = resolve_phases(AttentionConfig(), dataclasses.replace(SHAPE, two_part=True), kernels=(bare,))
    assert any(text.startswith("prefill: no kernel serves it (bare: return_partial") for text in phases.disagreements)


@pytest.mark.parametrize(
    "options",
    [{"type": "full"}, {"type": "block_diffusion", "block_size": 8}, {"type": "local_sliding", "window": (8, 1)}],
)
def test_masks_that_look_ahead_mean_something_else_in_decode(options):
    found = resolve_phases(AttentionConfig(**options), SHAPE).disagreements
    assert any(text.startswith("mask meaning") and options["type"] in text for text in found)


def test_a_window_of_earlier_keys_only_means_the_same_in_decode():
    assert resolve_phases(AttentionConfig(type="local_sliding", window=(8, 0)), SHAPE).disagreements == ()


def test_a_shape_without_heads_has_those_of_the_config_or_the_defaults():
    bare = dataclasses.replace(SHAPE, q_heads=None, kv_heads=None, head_dim=None)
    assert bare.of(AttentionConfig()).heads == (1, 1, 64, 64)
    config = AttentionConfig(q_heads=8, kv_heads=2, head_dim=16, value_dim=24)
    assert bare.of(config).heads == (8, 2, 16, 24)
    assert SHAPE.of(dataclasses.replace(config, q_heads=4, head_dim=None)).heads == (4, 2, 32, 24)
    assert {(r.q_heads, r.kv_heads, r.head_dim, r.value_dim) for r in _requests_of(config, bare)} == {(8, 2, 16, 24)}


@pytest.mark.parametrize("name", ["q_heads", "kv_heads", "head_dim", "value_dim"])
def test_a_size_other_than_the_configs_is_an_error_that_names_both(name):
    config = AttentionConfig(**{name: 16}, source="c.toml")
    with pytest.raises(ArgumentError, match=rf"{name}=8 contradicts {name}=16 of c.toml; leave it out"):
        resolve_phases(config, ModelShape(q_len=4, max_len=4, q_heads=8, kv_heads=8, head_dim=8, value_dim=8))


def test_a_mask_with_heads_is_checked_once_the_heads_are_known():
    per_head = masks.Dense(np.ones((1, 4, 8, 8), bool))
    shape = ModelShape(q_len=8, max_len=8, mask=per_head)
    assert _requests_of(AttentionConfig(q_heads=4), shape)
    with pytest.raises(ArgumentError, match="Dense"):
        _requests_of(AttentionConfig(q_heads=3), shape)


def test_a_bias_of_the_config_is_asked_for_in_every_phase():
    train, prefill, decode = _requests_of(AttentionConfig(bias=True), SHAPE)
    assert (train.bias, prefill.bias, decode.bias) == ((1, 4, 64, 64), (1, 4, 64, 64), (1, 4, 1, 128))
    assert Operand.BIAS in train.gradients
    with pytest.raises(ArgumentError, match=r"cache 'paged:4' with a bias: .* use 'contiguous'"):
        _requests_of(AttentionConfig(bias=True), dataclasses.replace(SHAPE, cache="paged:4"))


def test_chosen_blocks_are_asked_for_in_every_phase():
    phases = resolve_phases(AttentionConfig(moba=MoBA(16, 2)), SHAPE)
    for resolution in phases.all:
        assert AtomKind.BLOCK_SELECTION in {atom.kind for atom in resolution.request.mask.atoms}


def test_another_target_is_answered_for():
    assert str(resolve_phases(AttentionConfig(), SHAPE, target="tpu:v5e").train.request.target) == "tpu:v5e"
    with kernelry.use(target="gpu:h100"):
        assert str(resolve_phases(AttentionConfig(), SHAPE).decode.request.target) == "gpu:h100"
    with pytest.raises(ConfigError, match="unknown platform"):
        resolve_phases(AttentionConfig(), SHAPE, target="tqu")


def test_phases_are_text_and_json():
    phases = resolve_phases(AttentionConfig(type="full"), SHAPE)
    assert "disagreement: mask meaning" in str(phases)
    data = json.loads(json.dumps(phases.to_json()))
    assert sorted(data) == ["decode", "disagreements", "more", "prefill", "remarks", "train"]


def test_a_prompt_must_fit_into_the_cache():
    with pytest.raises(ArgumentError, match="max_len=8 slots cannot hold the prompt of q_len=9"):
        ModelShape(q_len=9, max_len=8)


TINY = ModelShape(q_len=6, max_len=10, batch=2, q_heads=4, kv_heads=2, head_dim=32, dtype="float32")
HELD = (
    "contiguous",
    "contiguous:int8",
    "two-part",
    "two-part:int4",
    "rolling",
    "rolling:int8",
    "paged:4",
    "paged:4:int8",
    "paged:4:interleaved",
)


def _requests(config, **changes):
    return [call.request for call in calls(config, dataclasses.replace(TINY, **changes), Target("cpu"))]


def _requests_of(config, shape):
    return [call.request for call in calls(config, shape, Target("cpu"))]


def _shapes(q_len):
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return array((2, q_len, 4, 32)), array((2, q_len, 2, 32)), array((2, q_len, 2, 32))


def _cache_of(held, window):
    kind, _, storage = held.replace("paged:4", "paged").partition(":")
    layout, storage = ("interleaved", None) if storage == "interleaved" else ("separate", storage)
    facts = {"kv_heads": 2, "head_dim": 32, "dtype": jnp.float32, "storage": storage or None}
    if kind == "two-part":
        return TwoPartCache.create(batch=2, prefill=6, decode=4, **facts)
    if kind == "rolling":
        return RollingCache.create(batch=2, window=window, **facts)
    return PagedCache.create(rows=2, pages=9, page_size=4, max_length=10, layout=layout, **facts)


def _prompt(mask, options, query, key, value):
    return kernelry.attention(query, key, value, mask=mask, mode="prefill", **options)


def _served_by_a_cache(held, mask, options, prompt, token):
    """A prompt that is written, and read where the cache keeps it all, and a decode step."""
    _prompt(mask, options, *prompt)
    cache = _cache_of(held, 4).prefill(*prompt[1:])
    if "rolling" not in held:
        cache.attend(prompt[0], mask=mask, mode="prefill", **options)
    return cache.decode(*token, mask=mask, **options)


def _served_by_arrays(held, mask, options, prompt, token):
    _prompt(mask, options, *prompt)
    keys = [jnp.zeros((2, 10, 2, 32), jnp.float32)] * 2
    if held.endswith("int8"):
        keys = [QuantizedArray.quantize(array) for array in keys]
    lengths = jnp.full(2, 6)
    step = mask.at(query_offset=lengths[0]) & masks.Lengths(lengths + 1)
    return kernelry.attention(token[0], *keys, mask=step, mode="decode", **options)


LAYERS = {
    "window": {"type": "local_sliding", "window": 4, "soft_cap": 9.0},
    "chunks": {"type": "chunk", "chunk_size": 4},
    "causal": {"scale": 0.5},
}


@pytest.mark.parametrize(
    ("layer", "held"),
    [(layer, held) for layer in LAYERS for held in HELD if layer != "causal" or not held.startswith("rolling")],
)
def test_serving_from_a_cache_asks_what_is_locked(layer, held):
    config = AttentionConfig(**LAYERS[layer])
    requests = _requests(config, cache=held)
    options = {"scale": config.scale, "soft_cap": config.soft_cap}
    serve = _served_by_arrays if held.startswith("contiguous") else _served_by_a_cache
    with kernelry.record() as made:
        jax.eval_shape(functools.partial(serve, held, config.mask, options), _shapes(6), _shapes(1))
    asked = {resolution.request for resolution in made}
    assert asked == {request for request in requests if request.mode is not Mode.TRAIN}


IDS = np.zeros((2, 6), np.int32)
PACKED = {
    "segments": masks.Causal() & masks.Segments(IDS),
    "(config & segments) | spans": (masks.Causal() & masks.Segments(IDS)) | masks.BidirectionalSpans(IDS),
    "config | prefix_lm(2)": masks.Causal() | masks.PrefixLM(2),
    "dense": masks.Causal() & masks.Dense(np.ones((2, 1, 6, 6), bool)),
}


@pytest.mark.parametrize("text", PACKED)
def test_training_with_more_masks_asks_what_is_locked(text):
    lock = Lock.of(map(kernelry.resolve, _requests(AttentionConfig(sinks=True), mask=text)))

    def loss(query, key, value):
        return kernelry.attention(query, key, value, mask=PACKED[text], sinks=jnp.zeros(4)).sum()

    with kernelry.use(strict=lock):
        jax.eval_shape(jax.grad(loss), *_shapes(6))


def test_a_mask_is_added_to_that_of_the_config():
    config = AttentionConfig(type="local_sliding", window=3)
    train, prefill, decode = _requests(config, mask=masks.Segments(IDS))
    assert [str(request.mask) for request in (train, prefill)] == ["segments & window(2, 0)"] * 2
    assert "segments" not in str(decode.mask)


IN_KEYS = ("contiguous:value_in_key", "contiguous:value_in_key:int8", "paged:4:value_in_key:int8")


@pytest.mark.parametrize("text", [*HELD, *IN_KEYS, "paged:16:int8:heads_and_head_dim"])
def test_caches_are_written_as_they_are_read(text):
    assert CacheShape.parse(str(CacheShape.parse(text))) == CacheShape.parse(text)


@pytest.mark.parametrize("text", IN_KEYS)
def test_a_decode_step_reads_the_values_from_the_keys(text):
    train, *_, decode = _requests(AttentionConfig(), cache=text, kv_heads=1, value_dim=24)
    assert (train.kv_layout, decode.kv_layout, decode.value_dim) == ("separate", "value_in_key", 24)
    assert decode.kv_quantization == ("int8:head_dim" if "int8" in text else None)
    assert decode.page_size == (4 if "paged" in text else None)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"cache": "pagd:16"}, "unknown cache 'pagd:16'; did you mean 'paged'?"),
        ({"cache": "paged"}, "a paged cache needs its page size, e.g. 'paged:16'"),
        ({"cache": "paged:0"}, "a paged cache needs its page size, e.g. 'paged:16', got 0"),
        ({"cache": "paged:x"}, "a paged cache needs its page size"),
        (
            {"cache": CacheShape(storage="int8"), "two_part": True, "max_len": 6},
            "leaves no slot for these; raise max_len",
        ),
        ({"cache": "rolling:int9"}, "unknown dtype 'int9'; did you mean 'int8'?"),
        ({"cache": "rolling:value_in_key"}, "goes with 'contiguous' and 'paged' only, got rolling:value_in_key"),
        ({"cache": "contiguous:interleaved"}, "is one of pages that are not quantised"),
        ({"cache": "paged:4", "two_part": True}, "two_part=True and cache='paged:4' are two caches"),
        ({"mask": "segmnts"}, "did you mean 'segments'?"),
        ({"mask": np.ones(3)}, "mask must be a kernelry mask or an expression such as 'segments', got ndarray"),
        ({"cache": "rolling"}, "type 'global' sees all tokens; use 'two-part' or 'paged:16'"),
    ],
)
def test_caches_and_masks_that_mean_nothing_say_what_to_write(facts, words):
    with pytest.raises(ArgumentError) as raised:
        _requests(AttentionConfig(), **facts)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"q_len": None}, "q_len must be an integer from 1 to 2147483647, got None."),
        ({"batch": -1}, "batch must be an integer from 1 to 2147483647, got -1."),
        ({"batch": "8"}, "batch must be an integer from 1 to 2147483647, got '8'."),
        ({"head_dim": 2.5}, "head_dim must be an integer"),
        ({"kv_heads": 0}, "kv_heads must be an integer"),
        ({"max_len": 10**30}, "max_len must be an integer"),
        ({"batch": np.ones(3)}, "got an array of shape (3,)."),
        ({"q_heads": 4, "kv_heads": 3}, "kv_heads=3 must divide q_heads=4."),
        ({"batch": 2**31 - 1, "max_len": 2**31 - 1}, "too large for any machine; use smaller sizes."),
        ({"dtype": "fp32"}, "dtype must be the name of a dtype, e.g. bfloat16, got 'fp32'; write 'float32'."),
        ({"dtype": float}, "got <class 'float'>."),
        ({"two_part": 1}, "two_part must be True or False, got 1."),
        ({"mask": masks.Segments(np.zeros((3, 7), np.int32))}, "Segments"),
        ({"mask": "segments(0, 0, 1)"}, "Segments"),
    ],
)
def test_facts_that_mean_nothing_say_what_to_write(facts, words):
    with pytest.raises(ArgumentError) as raised:
        _requests(AttentionConfig(), **facts)
    assert words in str(raised.value)


def test_a_dtype_of_jax_is_kept_by_its_name():
    assert dataclasses.replace(TINY, dtype=jnp.bfloat16).to_json()["dtype"] == "bfloat16"


def test_large_batches_take_no_memory():
    shape = dataclasses.replace(TINY, batch=2**31 - 1)
    for config in (AttentionConfig(), AttentionConfig(moba=MoBA(4, 2))):
        assert {call.request.batch for call in calls(config, shape, Target("cpu"))} == {2**31 - 1}


def test_absurd_shapes_are_refused_or_answered():
    rng = np.random.default_rng(0)
    absurd = [None, 0, -1, 1, 2, 3, 2.5, "8", True, 10**30, 2**31 - 1, 2**31, float("nan"), [], np.ones(2), jnp.ones(1)]
    kinds = {
        "cache": ["paged:2147483647", "paged:99999999999", "rolling", "two-part:int8", 3, None, "paged:²"],
        "mask": ["segments", "dense", "segments(0)", "lengths", 5, None, masks.Dense(np.ones((9, 9), bool)), "("],
        "dtype": [jnp.float32, "f4", "int32", None, 7, np.ones(2), "bfloat16", object()],
        "two_part": [True, False, None, np.ones(2)],
    }
    names = [field.name for field in dataclasses.fields(ModelShape)]
    configs = [AttentionConfig(), AttentionConfig(type="local_sliding", window=3), AttentionConfig(moba=MoBA(4, 2))]
    for _ in range(300):
        changed = rng.choice(names, size=rng.integers(1, 4), replace=False)
        facts = {name: (given := kinds.get(name, absurd))[rng.integers(len(given))] for name in changed}
        # Anything else than an error of kernelry fails here.
        with contextlib.suppress(KernelryError):
            calls(configs[rng.integers(len(configs))], dataclasses.replace(TINY, **facts), Target("cpu"))


def test_chosen_blocks_need_one_array_of_keys():
    with pytest.raises(ArgumentError, match=r"cache 'paged:4' with moba: blocks are chosen .* use 'contiguous'"):
        _requests(AttentionConfig(moba=MoBA(4, 2)), cache="paged:4")


def test_a_shape_is_plain_data():
    shape = dataclasses.replace(TINY, cache="paged:4:int8", mask="segments")
    assert ModelShape(**json.loads(json.dumps(shape.to_json()))) == shape
    with pytest.raises(ArgumentError, match=r"pass an expression, e.g. 'segments'"):
        dataclasses.replace(TINY, mask=masks.Causal()).to_json()


@pytest.mark.parametrize(
    "options",
    [
        {"type": "local_sliding", "window": 3, "soft_cap": 30.0},
        {"sinks": True, "scale": 0.5},
        {"record_max_logits": True, "precision": "highest"},
        {"moba": MoBA(2, 2)},
        {"type": "block_diffusion", "block_size": 2},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("mode", ["train", "prefill"])
def test_a_flax_layer_asks_what_is_locked(options, mode):
    config = AttentionConfig(**options)

    def called(*operands):
        layer = AttentionOp(config, sink_heads=4 if config.sinks else None)
        return layer(*operands, tokens=Tokens(segment_ids=IDS), mode=mode)

    with kernelry.record() as made:
        jax.eval_shape(called, *_shapes(6))
    wanted = [request for request in _requests(config, mask="segments") if request.mode.value == mode]
    assert [resolution.request for resolution in made] == wanted
