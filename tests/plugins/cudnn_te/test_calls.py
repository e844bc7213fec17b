"""Programs lowered for CUDA: which of transformer-engine's calls they hold, with which attributes."""

import cudnn_te_cases as cases
import jax
import jax.numpy as jnp
import pytest
from transformer_engine.jax import attention as te
from transformer_engine.jax.sharding import MeshResource, global_shard_guard
from transformer_engine_calls import named, te_calls

import kernelry
from kernelry import masks

NEWEST = pytest.mark.te(since="2.20")
LENGTH = cases.LENGTH
FULL, BANDED, PACKED = {}, {"mask_type": "CAUSAL"}, {"qkv_layout": "THD_THD_THD", "max_segments_per_seq": 32}

pytestmark = [
    pytest.mark.filterwarnings("ignore:TransformerEngine logical axes:DeprecationWarning"),
    pytest.mark.te(served=True),
]

FORMS = {
    "full": (masks.Full(), FULL),
    "causal": (masks.Causal(), BANDED),
    "window": (masks.SlidingWindow(5), BANDED | {"window": (5, 0)}),
    "window ahead": (masks.SlidingWindow(5, 3), {"window": (5, 3)}),
    "lengths": (cases.MASKS["lengths"], {"mask_type": "PADDING"}),
    "causal, lengths": (cases.MASKS["causal, lengths"], {"mask_type": "PADDING_CAUSAL"}),
    "window, lengths": (cases.MASKS["window, lengths"], {"mask_type": "PADDING_CAUSAL", "window": (4, 0)}),
    "packed": (cases.MASKS["packed"], PACKED | {"mask_type": "PADDING"}),
    "causal, packed": (cases.MASKS["causal, packed"], PACKED | {"mask_type": "PADDING_CAUSAL"}),
    "window, packed": (cases.MASKS["window, packed"], PACKED | {"mask_type": "PADDING_CAUSAL", "window": (5, 0)}),
}


def _arrays(**sizes):
    return cases.arrays(dtype="bfloat16", **sizes)[:3]


def _calls(function, arrays):
    """The forward and the backward call, with enums by name."""

    def loss(*arrays):
        return function(*arrays).astype(jnp.float32).sum()

    gradient = jax.grad(loss, tuple(range(len(arrays))))
    lowered = jax.jit(gradient).trace(*arrays).lower(lowering_platforms=("cuda",))
    return [named(call) for call in te_calls(lowered)]


def _attended(arrays, **options):
    def attend(query, key, value, *rest):
        more = dict(zip((name for name in ("bias", "sinks") if name in options), rest, strict=True))
        return kernelry.attention(query, key, value, kernel="cudnn_te", **{**options, **more})

    rest = [options[name] for name in ("bias", "sinks") if name in options]
    with kernelry.use(target=cases.TARGET):
        return _calls(attend, (*arrays, *rest))


def _expected(call, *, mask_type="NO", qkv_layout="BSHD_BSHD_BSHD", window=(-1, -1), **others):
    wanted = {
        "mask_type": f"NVTE_{mask_type}_MASK",
        "qkv_layout": f"NVTE_{qkv_layout}",
        "window_size_left": window[0],
        "window_size_right": window[1],
        "bias_type": "NVTE_NO_BIAS",
        "softmax_type": "NVTE_VANILLA_SOFTMAX",
        "scaling_factor": 0.25,
        "dropout_probability": 0.0,
        "is_training": True,
        "max_segments_per_seq": 1,
        **others,
    }
    return {name: call[name] for name in wanted}, wanted


@pytest.mark.parametrize("name", FORMS)
def test_masks_reach_both_calls(name):
    mask, expected = FORMS[name]
    forward, backward = _attended(_arrays(), mask=mask)
    assert (forward["call"], backward["call"]) == ("te_fused_attn_forward_ffi", "te_fused_attn_backward_ffi")
    for call in (forward, backward):
        found, wanted = _expected(call, **expected)
        assert found == wanted


@pytest.mark.te(since="2.14")  # 2.11 has the corner in the mask's type alone
def test_the_last_query_beside_the_last_key():
    arrays = (_arrays()[0][:, :16], *_arrays()[1:])
    for call in _attended(arrays, mask=masks.Causal().at(query_offset=16)):
        found, wanted = _expected(call, mask_type="CAUSAL_BOTTOM_RIGHT", bottom_right_diagonal=True)
        assert found == wanted


def test_heads_and_dims_are_in_the_shapes():
    forward, _ = _attended(_arrays(heads=8, kv_heads=2, head_dim=24, value_dim=16), mask=masks.Causal(), scale=0.25)
    assert forward["operands"][:3] == ["2x32x8x24xbf16", "2x32x2x24xbf16", "2x32x2x16xbf16"]
    assert forward["scaling_factor"] == 0.25


def test_sinks_bias_and_dropout_reach_the_call():
    sinks, bias = jnp.zeros(4), jnp.zeros((1, 4, LENGTH, LENGTH))
    forward, _ = _attended(_arrays(), sinks=sinks)
    assert forward["softmax_type"] == "NVTE_LEARNABLE_SOFTMAX"
    assert forward["operands"][4] == "1x4x1x1xf32"
    forward, _ = _attended(_arrays(), bias=bias)
    assert forward["bias_type"] == "NVTE_POST_SCALE_BIAS"
    assert forward["operands"][3] == "1x4x32x32xbf16"
    forward, backward = _attended(_arrays(), dropout_rate=0.25, dropout_rng=jax.random.key(0))
    assert (forward["dropout_probability"], backward["dropout_probability"]) == (0.25, 0.25)


def test_a_key_of_dropout_decides_its_seed():
    """The seed that reaches the call is drawn from the key, 64 bits for each device."""

    def attend(key, *arrays):
        return kernelry.attention(*arrays, kernel="cudnn_te", dropout_rate=0.5, dropout_rng=key, mode="prefill")

    with kernelry.use(target=cases.TARGET):
        lowered = jax.jit(attend).trace(jax.random.key(0), *_arrays()).lower(lowering_platforms=("cuda",))
    (call,) = te_calls(lowered)
    assert call["operands"][5] == f"{len(jax.devices())}x2xui32"
    assert call["is_training"] is True  # else probabilities would not be dropped


def test_prefill_keeps_no_statistics():
    def attend(*arrays):
        return kernelry.attention(*arrays, kernel="cudnn_te", mode="prefill")

    with kernelry.use(target=cases.TARGET):
        lowered = jax.jit(attend).trace(*_arrays()).lower(lowering_platforms=("cuda",))
    (call,) = te_calls(lowered)
    assert call["is_training"] is False


def _directly(descriptor, layout="BSHD_BSHD_BSHD", segments=1, **told):
    def attend(*qkv):
        with global_shard_guard(MeshResource()):
            return te.fused_attn(
                qkv,
                None,
                descriptor(),
                None,
                attn_bias_type=te.AttnBiasType.NO_BIAS,
                qkv_layout=te.QKVLayout[layout],
                softmax_type=te.AttnSoftmaxType.VANILLA_SOFTMAX,
                scaling_factor=0.25,
                dropout_probability=0.0,
                is_training=True,
                max_segments_per_seq=segments,
                **told,
            )

    with global_shard_guard(MeshResource()):
        return _calls(attend, _arrays())


def _lengths():
    return te.SequenceDescriptor.from_seqlens((jnp.full(2, LENGTH, jnp.int32), jnp.full(2, LENGTH, jnp.int32)))


def _segments():
    ids = jnp.asarray(cases.IDS) + 1
    return te.SequenceDescriptor.from_segment_ids_and_pos((ids, ids), (ids, ids))


@pytest.mark.parametrize(
    ("mask", "direct"),
    [
        (masks.Causal(), {"descriptor": _lengths, "attn_mask_type": te.AttnMaskType.CAUSAL_MASK}),
        (
            masks.SlidingWindow(5),
            {"descriptor": _lengths, "attn_mask_type": te.AttnMaskType.CAUSAL_MASK, "window_size": (5, 0)},
        ),
        (
            cases.MASKS["causal, packed"],
            {
                "descriptor": _segments,
                "attn_mask_type": te.AttnMaskType.PADDING_CAUSAL_MASK,
                "layout": "THD_THD_THD",
                "segments": 32,
            },
        ),
    ],
    ids=["causal", "window", "causal, packed"],
)
def test_calls_equal_those_written_by_hand(mask, direct):
    assert _attended(_arrays(), mask=mask) == _directly(**direct)


def test_the_program_without_adapters_is_the_one_written_by_hand():
    def attend(*qkv):
        return kernelry.attention(*qkv, kernel="cudnn_te", mask=masks.Causal())

    def direct(*qkv):
        told = {
            "attn_bias_type": te.AttnBiasType.NO_BIAS,
            "attn_mask_type": te.AttnMaskType.CAUSAL_MASK,
            "qkv_layout": te.QKVLayout.BSHD_BSHD_BSHD,
            "softmax_type": te.AttnSoftmaxType.VANILLA_SOFTMAX,
            "scaling_factor": 0.25,
            "dropout_probability": 0.0,
            "is_training": True,
        }
        return te.fused_attn(qkv, None, _lengths(), None, **told)

    def text(function):
        def run(*qkv):
            return function(*qkv)

        return jax.jit(run).trace(*_arrays()).lower(lowering_platforms=("cuda",)).as_text()

    with kernelry.use(target=cases.TARGET), global_shard_guard(MeshResource()):
        assert text(attend) == text(direct)
