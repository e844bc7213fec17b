"""Plain JAX in place of cuDNN, on CPU: JAX's two inner primitives get a lowering that does what their parameters say.

It proves which arrays and attributes reach cuDNN and what becomes of its answers, and nothing of cuDNN's numbers. A
wrong mask type, window, scale, layout or length gives wrong numbers here; what no document promises is NaN: outputs,
logsumexps and gradients of slots behind a length, and rows that see nothing.
"""

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as vendor
from jax.interpreters import mlir

import kernelry
from kernelry_cudnn_te.cudnn_jax import probes
from kernelry_cudnn_te.plugin import CUDNN_JAX

TARGET = "gpu:h100"
CUDNN = 91800


@contextlib.contextmanager
def cudnn():
    """JAX believes that it sees a Hopper GPU with this cuDNN."""
    with (
        mock.patch.object(vendor, "check_cudnn_version", return_value=CUDNN),
        mock.patch.object(vendor, "check_compute_capability", return_value=True),
    ):
        yield


@contextlib.contextmanager
def stand_in():
    """Calls resolve as on a GPU and run here."""
    _register()
    with cudnn(), kernelry.use(target=TARGET):
        yield


@contextlib.contextmanager
def at_home():
    """The kernel as if it were one for CPUs: the conformance kit runs it here."""
    _register()
    capabilities = dataclasses.replace(CUDNN_JAX.capabilities, platforms=frozenset({"cpu"}), minimum_generation=())
    with cudnn(), mock.patch.object(probes, "refusals", return_value=()):
        yield dataclasses.replace(CUDNN_JAX, capabilities=capabilities, signature=lambda _: ("kernelry.cudnn_jax",))


@functools.cache
def _register():
    for primitive, function in (
        (vendor._dot_product_attention_fwd_p, _forward),
        (vendor._dot_product_attention_bwd_p, _backward),
    ):
        mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=True), platform="cpu")


def _forward(*arrays, is_training, **attributes):
    query, key, value, bias, query_lengths, kv_lengths = _checked(arrays[:10], attributes)
    logits, visible = _logits(query, key, bias, query_lengths, kv_lengths, attributes)
    lse = jax.nn.logsumexp(jnp.where(visible, logits, -jnp.inf), axis=-1)
    weights = jnp.where(visible, jnp.exp(logits - lse[..., None]), 0)
    out = jnp.einsum("bnts,bsnd->btnd", weights, _expanded(value, query))
    unknown = ~visible.any(axis=-1)
    out = jnp.where(unknown.swapaxes(1, 2)[..., None], jnp.nan, out).astype(query.dtype)
    return [out, jnp.where(unknown, jnp.nan, lse)] if is_training else [out]


def _backward(*arrays, **attributes):
    query, key, value, bias, query_lengths, kv_lengths = _checked(arrays[:10], attributes)
    lse, out, d_out = arrays[10:13]
    assert lse.dtype == jnp.float32
    assert lse.shape == (query.shape[0], query.shape[2], query.shape[1])
    assert out.dtype == d_out.dtype == query.dtype
    logits, visible = _logits(query, key, bias, query_lengths, kv_lengths, attributes)
    careless = visible | ~visible.any(axis=-1, keepdims=True)  # only lse = inf keeps a row that sees nothing out
    weights = jnp.where(careless, jnp.exp(logits - lse[..., None]), 0)
    out, d_out = out.astype(jnp.float32), d_out.astype(jnp.float32)
    delta = jnp.einsum("btnd,btnd->bnt", out, d_out)
    d_weights = jnp.einsum("btnd,bsnd->bnts", d_out, _expanded(value, query))
    d_logits = weights * (d_weights - delta[..., None])
    d_query = jnp.einsum("bnts,bsnh->btnh", d_logits, _expanded(key, query)) * attributes["scale"]
    d_key = jnp.einsum("bnts,btnh->bsnh", d_logits, query.astype(jnp.float32)) * attributes["scale"]
    d_value = jnp.einsum("bnts,btnd->bsnd", weights, d_out)
    found = [
        _unwritten(d_query.astype(query.dtype), query_lengths),
        _unwritten(_summed(d_key, key).astype(key.dtype), kv_lengths),
        _unwritten(_summed(d_value, value).astype(value.dtype), kv_lengths),
    ]
    has_bias, has_bias_gradient = attributes["variadic_args"]
    if not has_bias_gradient:
        return found
    assert has_bias
    alike = tuple(axis for axis, size in enumerate(bias.shape) if size == 1)
    return [*found, d_logits.sum(axis=alike, keepdims=True).astype(bias.dtype)]


def _checked(arrays, attributes):
    """The operands that the attributes say are read; the others must be empty."""
    query, key, value, bias, query_lengths, kv_lengths, *offsets_and_tables = arrays
    assert attributes["layout"] == vendor.AttentionLayout.BTNH.value
    assert attributes["dropout_rate"] == 0
    assert all(array.size == 0 for array in offsets_and_tables)
    assert query.dtype == key.dtype == value.dtype
    has_bias, _ = attributes["variadic_args"]
    assert has_bias == bool(bias.size)
    assert not has_bias or bias.dtype == query.dtype
    if not vendor.has_padding(attributes["mask_type"]):
        assert query_lengths.size == kv_lengths.size == 0
        return query, key, value, bias if has_bias else None, None, None
    assert query_lengths.dtype == kv_lengths.dtype == np.int32
    assert query_lengths.shape == kv_lengths.shape == (query.shape[0],)
    return query, key, value, bias if has_bias else None, query_lengths, kv_lengths


def _logits(query, key, bias, query_lengths, kv_lengths, attributes):
    product = jnp.einsum("btnh,bsnh->bnts", query.astype(jnp.float32), _expanded(key, query))
    logits = product * attributes["scale"]
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    row, slot = jnp.arange(query.shape[1])[:, None], jnp.arange(key.shape[1])[None]
    visible = jnp.ones((1, 1, query.shape[1], key.shape[1]), bool)
    if attributes["mask_type"] in (vendor.MaskType.CAUSAL, vendor.MaskType.PADDING_CAUSAL):
        visible = visible & (slot <= row)[None, None]
    if attributes["sliding_window_length"] is not None:
        visible = visible & (slot > row - attributes["sliding_window_length"])[None, None]
    if kv_lengths is not None:
        inside = (slot < kv_lengths[:, None])[:, None, None, :] & (query_lengths[:, None] > row.T)[:, None, :, None]
        visible = visible & inside
    return logits, jnp.broadcast_to(visible, logits.shape)


def _expanded(array, query):
    return jnp.repeat(array.astype(jnp.float32), query.shape[2] // array.shape[2], axis=2)


def _summed(gradient, array):
    batch, length, heads, dim = array.shape
    return gradient.reshape(batch, length, heads, -1, dim).sum(axis=3)


def _unwritten(gradient, lengths):
    if lengths is None:
        return gradient
    written = jnp.arange(gradient.shape[1])[None] < lengths[:, None]
    return jnp.where(written[..., None, None], gradient, jnp.nan)
