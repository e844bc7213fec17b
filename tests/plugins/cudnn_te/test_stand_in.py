"""transformer_engine's own API, without kernelry, beside the float64 oracle: what the plugin's tests stand on."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformer_engine_cases as case
import transformer_engine_stand_in as stand_in
from transformer_engine.jax import attention as te
from transformer_engine.jax.flax import DotProductAttention
from transformer_engine.jax.sharding import MeshResource, global_shard_guard
from transformer_engine_calls import named, te_calls
from transformer_engine_cases import IDS, LENGTHS, SCALE, SINKS, B, H, K, N, T

from kernelry import masks
from kernelry.testing import reference_attention, reference_gradients

NEWEST = pytest.mark.te(since="2.20")

# The vendor warns of its own use of its own axes.
pytestmark = pytest.mark.filterwarnings("ignore:TransformerEngine logical axes:DeprecationWarning")


@pytest.fixture(autouse=True)
def _mesh_resource():
    with global_shard_guard(MeshResource()):
        yield


def test_fused_attn_takes_what_the_notes_say_in_every_version():
    known = inspect.signature(te.fused_attn).parameters
    assert {"softmax_type", "softmax_offset", "window_size", "stripe_size", "context_parallel_strategy"} <= set(known)
    assert ("return_max_logit" in known) is (stand_in.version() >= (2, 20))
    asked = inspect.signature(te.is_fused_attn_kernel_available).parameters
    assert ("batch_size" in asked) is (stand_in.version() >= (2, 20))


def test_segment_ids_want_two_more_keywords_in_two_versions_only():
    known = inspect.signature(te.SequenceDescriptor.from_segment_ids_and_pos).parameters
    assert ("is_thd" in known) is ((2, 12) <= stand_in.version() < (2, 14))


def test_causal_is_the_oracles():
    case.check(functools.partial(case.attend, described=case.lengths()), masks.Causal())


@NEWEST
@pytest.mark.parametrize(("left", "right", "mask"), [(3, 0, "CAUSAL"), (2, 4, "NO")])
def test_window_is_the_oracles(left, right, mask):
    attend = functools.partial(case.attend, described=case.lengths(), mask=mask, window_size=(left, right))
    case.check(attend, masks.SlidingWindow(left, right))


@NEWEST
def test_padding_is_the_oracles():
    mask = masks.Causal() & masks.Lengths(LENGTHS, LENGTHS)
    attend = functools.partial(case.attend, described=case.lengths(LENGTHS), mask="PADDING_CAUSAL")
    case.check(attend, mask, rows=np.arange(T) < LENGTHS[:, None])


@NEWEST
def test_bottom_right_diagonal_is_the_oracles():
    query, key, value, d_out = case.make_arrays()
    arrays = query[:, :6], key, value, d_out[:, :6]
    described = te.SequenceDescriptor.from_seqlens((jnp.full(B, 6, jnp.int32), jnp.full(B, T, jnp.int32)))
    attend = functools.partial(case.attend, described=described, mask="CAUSAL_BOTTOM_RIGHT")
    case.check(attend, masks.Causal().at(query_positions=np.arange(T - 6, T)), arrays=arrays)


def test_packed_sequences_are_the_oracles():
    mask = masks.Causal() & masks.Segments(np.where(IDS, IDS, -1))
    case.check(
        functools.partial(case.attend, described=case.segments(), mask="PADDING_CAUSAL", thd=True), mask, rows=IDS > 0
    )


def test_learned_sinks_are_the_oracles():
    attend = functools.partial(case.attend, described=case.lengths(), softmax="LEARNABLE")
    case.check(attend, masks.Causal(), sinks=SINKS)


@NEWEST
def test_off_by_one_is_a_sink_of_zero():
    attend = functools.partial(case.attend, described=case.lengths(), softmax="OFF_BY_ONE")
    out, _ = case.with_gradients(attend, case.make_arrays())
    wanted = reference_attention(
        *map(np.asarray, case.make_arrays()[:3]), mask=masks.Causal(), scale=SCALE, sinks=np.zeros(N)
    )
    np.testing.assert_allclose(out, wanted.out, rtol=2e-5, atol=2e-6)


@NEWEST
def test_largest_logits_and_logsumexp_are_the_oracles():
    from transformer_engine.jax import cpp_extensions

    query, key, value, _ = case.make_arrays()
    out, logsumexp, _, largest = cpp_extensions.fused_attn_fwd(
        (query, key, value),
        None,
        None,
        case.lengths(),
        None,
        attn_bias_type=te.AttnBiasType.NO_BIAS,
        attn_mask_type=te.AttnMaskType.CAUSAL_MASK,
        qkv_layout=te.QKVLayout.BSHD_BSHD_BSHD,
        softmax_type=te.AttnSoftmaxType.VANILLA_SOFTMAX,
        scaling_factor=SCALE,
        dropout_probability=0.0,
        is_training=True,
        max_segments_per_seq=1,
        window_size=None,
        return_max_logit=True,
    )
    wanted = reference_attention(*map(np.asarray, (query, key, value)), mask=masks.Causal(), scale=SCALE)
    np.testing.assert_allclose(out, wanted.out, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(logsumexp[..., 0], wanted.lse, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(largest, wanted.max_logits.max(0), rtol=2e-5, atol=2e-6)


def test_the_flax_layer_is_the_oracles():
    query, key, value, _ = case.make_arrays("bfloat16")
    asked_by_dtype = {} if stand_in.version() >= (2, 12) else {"dtype": jnp.bfloat16}
    layer = DotProductAttention(
        head_dim=H,
        num_attention_heads=N,
        num_gqa_groups=K,
        attn_mask_type="causal",
        scale_factor=SCALE,
        transpose_batch_sequence=False,
        **asked_by_dtype,
    )
    out = layer.apply({}, query, key, value, case.lengths(), deterministic=True)
    in_float32 = (np.asarray(array, np.float32) for array in (query, key, value))
    wanted = reference_attention(*in_float32, mask=masks.Causal(), scale=SCALE)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), wanted.out, rtol=2e-2, atol=2e-2)


@NEWEST
@pytest.mark.parametrize(
    "other",
    [
        {"mask": "NO", "window_size": None},
        {"mask": "CAUSAL_BOTTOM_RIGHT"},
        {"softmax": "OFF_BY_ONE"},
        {"window_size": (2, 0)},
        {"window_size": None},
        {"scale": SCALE * 1.01},
    ],
    ids=str,
)
def test_a_wrong_attribute_gives_wrong_numbers(other):
    query, key, value, _ = case.make_arrays()
    described = te.SequenceDescriptor.from_seqlens((jnp.full(B, 6, jnp.int32), jnp.full(B, T, jnp.int32)))
    options = {"described": described, "softmax": "LEARNABLE", "window_size": (3, 0)}
    operands = query[:, :6], key, value, jnp.asarray(SINKS)
    right, wrong = (case.attend(*operands, **options), case.attend(*operands, **options | other))
    assert np.abs(np.asarray(right - wrong)).max() > 1e-3


@NEWEST
@pytest.mark.parametrize("packed", ["BS3HD", "BSHD_BS2HD"])
def test_packed_layouts_are_the_separate_one(packed):
    query, key, value, d_out = case.make_arrays()
    query = query if packed == "BSHD_BS2HD" else query[:, :, :K]
    d_out = d_out[:, :, : query.shape[2]]
    arrays = (query, jnp.stack([key, value], 2)) if packed == "BSHD_BS2HD" else (jnp.stack([query, key, value], 2),)
    out, gradients = case.with_gradients(
        lambda *arrays: case.attend(arrays, described=case.lengths(), layout=packed), (*arrays, d_out)
    )
    wanted, (d_query, d_key, d_value) = case.with_gradients(
        functools.partial(case.attend, described=case.lengths()), (query, key, value, d_out)
    )
    np.testing.assert_allclose(out, wanted, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(gradients[-1][:, :, -1], d_value, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(gradients[-1][:, :, -2], d_key, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(gradients[0] if packed == "BSHD_BS2HD" else gradients[0][:, :, 0], d_query, atol=2e-5)


@NEWEST
def test_bias_is_the_oracles():
    *qkv, d_out = case.make_arrays()
    bias = jnp.asarray(np.random.default_rng(1).standard_normal((1, N, T, T)), jnp.float32)
    attend = lambda *operands: case.attend(*operands[:3], described=case.lengths(), bias=operands[3])  # noqa: E731
    out, gradients = case.with_gradients(attend, (*qkv, bias, d_out))
    options = {"mask": masks.Causal(), "scale": SCALE, "bias": np.asarray(bias)}
    in_numpy = [np.asarray(array) for array in qkv]
    np.testing.assert_allclose(out, reference_attention(*in_numpy, **options).out, rtol=2e-5, atol=2e-6)
    wanted = reference_gradients(*in_numpy, d_out=np.asarray(d_out), **options)
    np.testing.assert_allclose(gradients[0], wanted.query, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(gradients[3], wanted.bias, rtol=2e-5, atol=2e-5)


def test_dropout_is_refused_on_cpu():
    attend = functools.partial(case.attend, described=case.lengths(), dropout=0.5)
    with pytest.raises(NotImplementedError, match=r"dropout_probability=0\.5"):
        attend(*case.make_arrays()[:3])


def test_attributes_of_a_cuda_program_are_read():
    attend = functools.partial(case.attend, described=case.lengths(), softmax="LEARNABLE", window_size=(3, 0))
    operands = (*case.make_arrays("bfloat16")[:3], jnp.asarray(SINKS))
    grad = jax.jit(jax.grad(lambda *operands: attend(*operands).astype(jnp.float32).sum(), argnums=(0, 1, 2, 3)))
    forward, backward = te_calls(grad.trace(*operands).lower(lowering_platforms=("cuda",)))
    assert (forward["call"], backward["call"]) == ("te_fused_attn_forward_ffi", "te_fused_attn_backward_ffi")
    for call in (named(forward), named(backward)):
        assert (call["mask_type"], call["softmax_type"]) == ("NVTE_CAUSAL_MASK", "NVTE_LEARNABLE_SOFTMAX")
        assert (call["qkv_layout"], call["bias_type"]) == ("NVTE_BSHD_BSHD_BSHD", "NVTE_NO_BIAS")
        assert (call["window_size_left"], call["window_size_right"]) == (3, 0)
        assert (call["scaling_factor"], call["deterministic"], call["num_gqa_groups"]) == (SCALE, False, K)
        assert call["operands"][:3] == ["2x16x4x8xbf16", "2x16x2x8xbf16", "2x16x2x8xbf16"]


def _available():
    more = {"batch_size": B} if stand_in.version() >= (2, 20) else {}
    return te.is_fused_attn_kernel_available(
        is_training=True,
        q_dtype=jnp.bfloat16,
        kv_dtype=jnp.bfloat16,
        qkv_layout=te.QKVLayout.BSHD_BSHD_BSHD,
        attn_bias_type=te.AttnBiasType.NO_BIAS,
        attn_mask_type=te.AttnMaskType.CAUSAL_MASK,
        softmax_type=te.AttnSoftmaxType.VANILLA_SOFTMAX,
        dropout_probability=0.0,
        q_num_heads=N,
        kv_num_heads=K,
        q_max_seqlen=T,
        kv_max_seqlen=T,
        head_dim_qk=H,
        head_dim_v=H,
        window_size=(3, 0),
        **more,
    )


def test_the_native_module_answers_as_told():
    assert _available()
    with stand_in.answering("head_dim is odd"):
        assert not _available()
    with stand_in.answering(RuntimeError("no driver")), pytest.raises(RuntimeError, match="no driver"):
        _available()
    assert _available()


def test_the_native_module_tells_what_it_was_asked():
    with stand_in.answering() as asked:
        _available()
    (question,) = asked
    assert question["attn_mask_type"].name == "NVTE_CAUSAL_MASK"
    assert question["qkv_dtype"].name == "kBFloat16"
    assert (question["num_attn_heads"], question["num_gqa_groups"], question["head_dim_qk"]) == (N, K, H)
    assert (question["window_size_left"], question["window_size_right"]) == (3, 0)


def test_no_kernel_is_an_error_when_traced():
    with stand_in.answering("head_dim is odd"), pytest.raises(ValueError, match="Unsupported"):
        jax.eval_shape(functools.partial(case.attend, described=case.lengths()), *case.make_arrays(length=2 * T)[:3])
