"""Calls of transformer_engine's own `fused_attn`, and their float64 oracle. Import it when the stand-in is installed.

attend = functools.partial(attend, described=lengths(), mask="CAUSAL", window_size=(3, 0))
check(attend, masks.SlidingWindow(3))          # outputs and gradients, in float32
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
from transformer_engine.jax import attention as te

from kernelry.testing import reference_attention, reference_gradients

B, T, N, K, H = 2, 16, 4, 2, 8
SCALE = 0.4
LENGTHS = np.array([11, 16], np.int32)
IDS = np.array([[1] * 5 + [2] * 7 + [0] * 4, [1] * 8 + [2] * 3 + [3] * 5], np.int32)  # 0 is padding
POSITIONS = np.array([[*range(5), *range(7), *[0] * 4], [*range(8), *range(3), *range(5)]], np.int32)
SINKS = np.linspace(-1, 1, N).astype(np.float32)


def make_arrays(dtype="float32", length=T):
    rng = np.random.default_rng(0)
    shapes = ((B, length, N, H), (B, length, K, H), (B, length, K, H), (B, length, N, H))
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def lengths(of_rows=(T, T)):
    of_rows = jnp.asarray(of_rows, jnp.int32)
    return te.SequenceDescriptor.from_seqlens((of_rows, of_rows))


def segments(ids=IDS, positions=POSITIONS):
    make = te.SequenceDescriptor.from_segment_ids_and_pos
    more = {"is_thd": True, "is_segment_ids_reordered": False}
    wanted = {name: value for name, value in more.items() if name in inspect.signature(make).parameters}
    return make(*((jnp.asarray(array),) * 2 for array in (ids, positions)), **wanted)


def attend(
    *qkv_and_sinks,
    described,
    mask="CAUSAL",
    softmax="VANILLA",
    layout="BSHD_BSHD_BSHD",
    thd=False,
    bias=None,
    scale=SCALE,
    dropout=0.0,
    **options,
):
    """`fused_attn` of query, key, value and, where softmax is LEARNABLE, sinks; or of one tuple of packed arrays."""
    qkv, sinks = qkv_and_sinks[:3], qkv_and_sinks[3:]
    if isinstance(qkv[0], tuple):
        qkv = qkv[0]
    if thd:
        layout, options = "THD_THD_THD", {"max_segments_per_seq": 3} | options
    if softmax == "LEARNABLE":
        options = {"softmax_offset": sinks[0].reshape(1, N, 1, 1)} | options
    return te.fused_attn(
        qkv,
        bias,
        described,
        jnp.zeros((8, 2), jnp.uint32) if dropout else None,
        attn_bias_type=te.AttnBiasType.NO_BIAS if bias is None else te.AttnBiasType.POST_SCALE_BIAS,
        attn_mask_type=te.AttnMaskType[f"{mask}_MASK"],
        qkv_layout=te.QKVLayout[layout],
        softmax_type=te.AttnSoftmaxType[f"{softmax}_SOFTMAX"],
        scaling_factor=scale,
        dropout_probability=dropout,
        is_training=True,
        **options,
    )


def with_gradients(attend, arrays, sinks=None):
    *qkv, d_out = arrays
    operands = qkv if sinks is None else (*qkv, jnp.asarray(sinks))

    def run(operands, d_out):
        out, pull = jax.vjp(attend, *operands)
        return out, pull(d_out)

    return jax.jit(run)(operands, d_out)


def check(attend, mask, *, sinks=None, rows=None, arrays=None):
    """Compares attention and its gradients with the oracle; `rows` (batch, tokens) are those that a sequence holds."""
    arrays = arrays or make_arrays()
    out, gradients = with_gradients(attend, arrays, sinks)
    *qkv, d_out = (np.asarray(array) for array in arrays)
    wanted = reference_attention(*qkv, mask=mask, scale=SCALE, sinks=sinks).out
    wanted_gradients = reference_gradients(*qkv, d_out=d_out, mask=mask, scale=SCALE, sinks=sinks)
    rows = np.ones(out.shape[:2], bool) if rows is None else rows
    np.testing.assert_allclose(np.asarray(out)[rows], wanted[rows], rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(np.asarray(out)[~rows], 0)
    for name, found in zip(("query", "key", "value", "sinks"), gradients, strict=False):
        np.testing.assert_allclose(found, getattr(wanted_gradients, name), rtol=2e-5, atol=2e-5, err_msg=name)
