"""transformer_engine's own API, without kernelry, beside the float64 oracle: what the plugin's tests stand on."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformer_engine_stand_in as stand_in
from transformer_engine.jax import attention as te
from transformer_engine.jax.flax import DotProductAttention
from transformer_engine.jax.sharding import MeshResource, global_shard_guard
from transformer_engine_calls import named, te_calls

from kernelry import masks
from kernelry.testing import reference_attention, reference_gradients

B, T, N, K, H = 2, 16, 4, 2, 8
SCALE = 0.4
LENGTHS = np.array([11, 16], np.int32)
IDS = np.array([[1] * 5 + [2] * 7 + [0] * 4, [1] * 8 + [2] * 3 + [3] * 5], np.int32)  # 0 is padding
POSITIONS = np.array([[*range(5), *range(7), *[0] * 4], [*range(8), *range(3), *range(5)]], np.int32)
SINKS = np.linspace(-1, 1, N).astype(np.float32)

NEWEST = pytest.mark.te(since="2.20")

# The vendor warns of its own use of its own axes.
pytestmark = pytest.mark.filterwarnings("ignore:TransformerEngine logical axes:DeprecationWarning")


@pytest.fixture(autouse=True)
def _mesh_resource():
    with global_shard_guard(MeshResource()):
        yield


def _arrays(dtype="float32", length=T):
    rng = np.random.default_rng(0)
    shapes = ((B, length, N, H), (B, length, K, H), (B, length, K, H), (B, length, N, H))
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def _lengths(lengths=(T, T)):
    lengths = jnp.asarray(lengths, jnp.int32)
    return te.SequenceDescriptor.from_seqlens((lengths, lengths))


def _segments(ids=IDS, positions=POSITIONS):
    make = te.SequenceDescriptor.from_segment_ids_and_pos
    more = {"is_thd": True, "is_segment_ids_reordered": False}
    wanted = {name: value for name, value in more.items() if name in inspect.signature(make).parameters}
    return make(*((jnp.asarray(array),) * 2 for array in (ids, positions)), **wanted)


def _attend(
    query, key, value, sinks=None, *, described, mask="CAUSAL", softmax="VANILLA", thd=False, dropout=0.0, **options
):
    options = {"max_segments_per_seq": 3} | options if thd else options
    return te.fused_attn(
        (query, key, value),
        None,
        described,
        jnp.zeros((8, 2), jnp.uint32) if dropout else None,
        attn_bias_type=te.AttnBiasType.NO_BIAS,
        attn_mask_type=te.AttnMaskType[f"{mask}_MASK"],
        qkv_layout=te.QKVLayout.THD_THD_THD if thd else te.QKVLayout.BSHD_BSHD_BSHD,
        softmax_type=te.AttnSoftmaxType[f"{softmax}_SOFTMAX"],
        scaling_factor=SCALE,
        dropout_probability=dropout,
        is_training=True,
        **options,
        **({} if sinks is None else {"softmax_offset": sinks.reshape(1, N, 1, 1)}),
    )


def _with_gradients(attend, arrays, sinks=None):
    *qkv, d_out = arrays
    operands = qkv if sinks is None else (*qkv, jnp.asarray(sinks))

    def run(operands, d_out):
        out, pull = jax.vjp(attend, *operands)
        return out, pull(d_out)

    return jax.jit(run)(operands, d_out)


def _check(attend, mask, *, sinks=None, rows=None, arrays=None):
    """Compares attention and its gradients with the oracle; `rows` (batch, tokens) are those that a sequence holds."""
    arrays = arrays or _arrays()
    out, gradients = _with_gradients(attend, arrays, sinks)
    *qkv, d_out = (np.asarray(array) for array in arrays)
    wanted = reference_attention(*qkv, mask=mask, scale=SCALE, sinks=sinks).out
    wanted_gradients = reference_gradients(*qkv, d_out=d_out, mask=mask, scale=SCALE, sinks=sinks)
    rows = np.ones(out.shape[:2], bool) if rows is None else rows
    np.testing.assert_allclose(np.asarray(out)[rows], wanted[rows], rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(np.asarray(out)[~rows], 0)
    for name, found in zip(("query", "key", "value", "sinks"), gradients, strict=False):
        np.testing.assert_allclose(found, getattr(wanted_gradients, name), rtol=2e-5, atol=2e-5, err_msg=name)


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
    _check(functools.partial(_attend, described=_lengths()), masks.Causal())


@NEWEST
@pytest.mark.parametrize(("left", "right", "mask"), [(3, 0, "CAUSAL"), (2, 4, "NO")])
def test_window_is_the_oracles(left, right, mask):
    attend = functools.partial(_attend, described=_lengths(), mask=mask, window_size=(left, right))
    _check(attend, masks.SlidingWindow(left, right))


@NEWEST
def test_padding_is_the_oracles():
    mask = masks.Causal() & masks.Lengths(LENGTHS, LENGTHS)
    attend = functools.partial(_attend, described=_lengths(LENGTHS), mask="PADDING_CAUSAL")
    _check(attend, mask, rows=np.arange(T) < LENGTHS[:, None])


@NEWEST
def test_bottom_right_diagonal_is_the_oracles():
    query, key, value, d_out = _arrays()
    arrays = query[:, :6], key, value, d_out[:, :6]
    described = te.SequenceDescriptor.from_seqlens((jnp.full(B, 6, jnp.int32), jnp.full(B, T, jnp.int32)))
    attend = functools.partial(_attend, described=described, mask="CAUSAL_BOTTOM_RIGHT")
    _check(attend, masks.Causal().at(query_positions=np.arange(T - 6, T)), arrays=arrays)


def test_packed_sequences_are_the_oracles():
    mask = masks.Causal() & masks.Segments(np.where(IDS, IDS, -1))
    _check(functools.partial(_attend, described=_segments(), mask="PADDING_CAUSAL", thd=True), mask, rows=IDS > 0)


def test_learned_sinks_are_the_oracles():
    attend = functools.partial(_attend, described=_lengths(), softmax="LEARNABLE")
    _check(attend, masks.Causal(), sinks=SINKS)


@NEWEST
def test_off_by_one_is_a_sink_of_zero():
    attend = functools.partial(_attend, described=_lengths(), softmax="OFF_BY_ONE")
    out, _ = _with_gradients(attend, _arrays())
    wanted = reference_attention(*map(np.asarray, _arrays()[:3]), mask=masks.Causal(), scale=SCALE, sinks=np.zeros(N))
    np.testing.assert_allclose(out, wanted.out, rtol=2e-5, atol=2e-6)


@NEWEST
def test_largest_logits_and_logsumexp_are_the_oracles():
    from transformer_engine.jax import cpp_extensions

    query, key, value, _ = _arrays()
    out, logsumexp, _, largest = cpp_extensions.fused_attn_fwd(
        (query, key, value),
        None,
        None,
        _lengths(),
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
    query, key, value, _ = _arrays("bfloat16")
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
    out = layer.apply({}, query, key, value, _lengths(), deterministic=True)
    in_float32 = (np.asarray(array, np.float32) for array in (query, key, value))
    wanted = reference_attention(*in_float32, mask=masks.Causal(), scale=SCALE)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), wanted.out, rtol=2e-2, atol=2e-2)


def _ring(mesh, order, *, balanced):
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "context"))
    arrays = tuple(jax.device_put(array[:, order], spec) for array in _arrays())
    attend = functools.partial(
        _attend,
        described=_lengths(),
        context_parallel_strategy=te.CPStrategy.RING,
        context_parallel_causal_load_balanced=balanced,
        context_parallel_axis="context",
    )
    return attend, arrays


@pytest.mark.parametrize("balanced", [False, True])
def test_a_ring_of_four_devices_is_the_oracles(mesh, balanced):
    order = np.arange(T)
    if balanced:
        swap = te.ReorderStrategy.DualChunkSwap
        order = np.ravel(te.reorder_causal_load_balancing(jnp.arange(T).reshape(1, T), swap, len(mesh.devices), 1))
    with global_shard_guard(MeshResource(cp_resource="context")):
        attend, arrays = _ring(mesh, order, balanced=balanced)
        _check(attend, masks.Causal().at(query_positions=order, kv_positions=order), arrays=arrays)


@pytest.mark.te(before="2.20")
def test_a_ring_takes_its_outputs_gradient_as_it_is_sharded(mesh):
    with global_shard_guard(MeshResource(cp_resource="context")):
        attend, (*qkv, d_out) = _ring(mesh, np.arange(T), balanced=False)
        whole = np.asarray(d_out)
        run = jax.jit(lambda *qkv: jax.vjp(attend, *qkv)[1](whole))
        with pytest.raises(jax.errors.JaxRuntimeError, match="shard it alike"):
            run(*qkv)


def test_dropout_is_refused_on_cpu():
    attend = functools.partial(_attend, described=_lengths(), dropout=0.5)
    with pytest.raises(NotImplementedError, match=r"dropout_probability=0\.5"):
        attend(*_arrays()[:3])


def test_attributes_of_a_cuda_program_are_read():
    attend = functools.partial(_attend, described=_lengths(), softmax="LEARNABLE", window_size=(3, 0))
    operands = (*_arrays("bfloat16")[:3], jnp.asarray(SINKS))
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
        jax.eval_shape(functools.partial(_attend, described=_lengths()), *_arrays(length=2 * T)[:3])
