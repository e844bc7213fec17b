"""Plain JAX in place of dew-flash-attn's CUDA kernels, on CPU.

Where the wheel is installed, the calls that its Python makes are replaced, so that operands, layouts, attributes and
result shapes are those that the kernels would get; elsewhere a module of the same private functions takes its place.
What the kernels do follows FlashAttention's documentation and sources: the diagonal ends at the last query and the
last key of a sequence, a window counts keys before and behind it, −1 is none, FlashAttention-2 cuts bounds to S, and
the logsumexp is natural. Results that no document promises are NaN, or as different as the two kernels make them:
outputs of rows that see nothing, and their logsumexp, +inf in FlashAttention-2 and −inf in -3.

It proves which arrays and attributes reach the kernels, and what becomes of their answers; of their numbers nothing.
"""

import contextlib
import dataclasses
import importlib.util
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import kernelry
from kernelry_gpu_flash_attn.dew_flash import spec
from kernelry_gpu_flash_attn.plugin import DEW_FLASH

INSTALLED = importlib.util.find_spec("dew_flash_attn") is not None
TARGETS = ("gpu:a100", "gpu:h100")
"""Served by FlashAttention-2 and by -3."""


@contextlib.contextmanager
def substitute(target="gpu:a100"):
    """Calls resolve as for a GPU and run here."""
    with _kernels(), kernelry.use(target=target):
        yield


@contextlib.contextmanager
def on_cpu():
    """The kernel as if it were one for CPUs, by FlashAttention-2: the conformance kit runs it here."""
    capabilities = dataclasses.replace(DEW_FLASH.capabilities, platforms=frozenset({"cpu"}), minimum_generation=())
    nothing = mock.MagicMock(return_value=())
    with _kernels(), mock.patch.multiple(spec, _vendor=nothing, _multiprocessors=nothing, _wide_heads=nothing):
        import dew_flash_attn

        with mock.patch.dict("kernelry_gpu_flash_attn.dew_flash.devices.MULTIPROCESSORS", {None: 108}):
            assert dew_flash_attn is not None
            yield dataclasses.replace(DEW_FLASH, capabilities=capabilities, signature=lambda _: ("kernelry.dew_flash",))


@contextlib.contextmanager
def _kernels():
    if INSTALLED:
        import dew_flash_attn

        with mock.patch.object(dew_flash_attn, "_call", _call):
            yield
        return
    sys.modules.setdefault("dew_flash_attn", _module())
    yield


def _module():
    """dew-flash-attn's private functions, where it is not installed: the layouts of their results differ by chip."""
    module = types.ModuleType("dew_flash_attn")

    def forward(query, key, value, starts, longest, scale, causal, window):
        hopper, packed = module._hopper(), starts is not None
        out, lse = _forward(query, key, value, starts, longest, scale, causal, window, hopper=hopper)
        return out, _laid_out(lse, starts, longest, hopper) if packed else lse

    def backward(d_out, query, key, value, out, lse, starts, longest, scale, causal, window):
        told = starts, longest, scale, causal, window
        return _backward(d_out, query, key, value, out, lse, *told, hopper=module._hopper())

    def no_gpu():
        raise RuntimeError("this process has no GPU")

    module._forward, module._backward = forward, backward
    module._hopper = module._multiprocessors = no_gpu
    return module


def _call(name, results):
    """One of the wheel's calls: reads operands and attributes as its C++ does, and fills the results."""
    hopper, packed, is_forward = "3" in name, "varlen" in name, name.endswith("fwd")
    assert name == f"dew_flash{'3' * hopper}_mha_{'varlen_' * packed}{'fwd' if is_forward else 'bwd'}"

    def call(*operands, softmax_scale, is_causal, window_size_left, window_size_right, **attributes):
        operands, starts = (operands[:-2], operands[-2:]) if packed else (operands, None)
        longest = _longest(attributes, hopper) if packed else None
        told = starts, longest, float(softmax_scale), is_causal, (int(window_size_left), int(window_size_right))
        assert attributes.pop("deterministic", False) is False
        assert attributes.pop("zero_tensors", False) is False
        assert not attributes
        width = operands[0].shape[-1]
        assert width % 8 == 0
        if is_forward:
            query, *_ = operands
            out, lse = _forward(*operands, *told, hopper=hopper)
            found = out, _laid_out(lse, starts, longest, hopper) if packed else lse
        else:
            query = operands[1]
            d_query, d_key, d_value = _backward(*operands, *told, hopper=hopper, by_head=not hopper)
            found = d_query, d_key, d_value
        assert all(array.dtype == query.dtype for array in (operands if is_forward else operands[:5]))
        scratch = [jnp.full(result.shape, jnp.nan, result.dtype) for result in results[len(found) :]]
        for array, result in zip(found, results, strict=False):
            assert (array.shape, array.dtype) == (result.shape, result.dtype), (name, array.shape, result.shape)
        return [*found, *scratch]

    return call


def _longest(attributes, hopper):
    names = ("max_seqlen" if hopper else "max_seqlen_q", "max_seqlen_k")
    return tuple(int(attributes.pop(name)) for name in names)


def _forward(query, key, value, starts, longest, scale, causal, window, *, hopper):
    """The output, and the logsumexp [B, N, T]; of packed sequences [N, tokens]."""
    shape = query.shape
    query, key, value, logits, visible = _logits(query, key, value, starts, longest, scale, causal, window, hopper)
    lse = jax.nn.logsumexp(jnp.where(visible, logits, -jnp.inf), axis=-1)
    weights = jnp.where(visible, jnp.exp(logits - lse[..., None]), 0)
    empty = ~visible.any(axis=-1)
    out = jnp.einsum("nts,snd->tnd", weights, value)
    out = jnp.where(empty.T[..., None], jnp.nan, out).reshape(shape).astype(query.dtype)
    lse = jnp.where(empty, -jnp.inf if hopper else jnp.inf, lse)
    if starts is None:
        lse = lse.reshape(lse.shape[0], *shape[:2]).swapaxes(0, 1)
    return out, lse


def _laid_out(lse, starts, longest, hopper):
    """[N, tokens] as FlashAttention-3 has it, or [sequences, N, longest], with NaN behind the end of a sequence."""
    if hopper:
        return lse
    place = starts[0][:-1, None] + jnp.arange(longest[0])[None]
    inside = place < starts[0][1:, None]
    found = jnp.where(inside, lse[:, jnp.where(inside, place, 0)], jnp.nan)
    return found.swapaxes(0, 1)


def _backward(d_out, query, key, value, out, lse, starts, longest, scale, causal, window, *, hopper, by_head=False):
    shapes = query.shape, key.shape, value.shape
    assert lse.dtype == jnp.float32
    assert out.shape == d_out.shape == query.shape
    lse = _by_token(lse, query, starts, longest, hopper)
    groups = query.shape[-2] // key.shape[-2]
    query, key, value, logits, visible = _logits(query, key, value, starts, longest, scale, causal, window, hopper)
    weights = jnp.where(visible, jnp.exp(logits - lse[..., None]), 0)
    out, d_out = (array.reshape(query.shape).astype(jnp.float32) for array in (out, d_out))
    delta = jnp.einsum("tnd,tnd->nt", out, d_out)
    # A NaN of one sequence reaches no other: the kernels compute each by itself.
    d_logits = jnp.where(visible, weights * (jnp.einsum("tnd,snd->nts", d_out, value) - delta[..., None]), 0)
    d_query = jnp.einsum("nts,snd->tnd", d_logits, key) * scale
    d_key = jnp.einsum("nts,tnd->snd", d_logits, query.astype(jnp.float32)) * scale
    d_value = jnp.einsum("nts,tnd->snd", weights, d_out)
    d_query = jnp.where(visible.any(axis=-1).T[..., None], d_query, jnp.nan)
    d_key, d_value = (jnp.where(visible.any(axis=1).T[..., None], share, jnp.nan) for share in (d_key, d_value))
    if by_head:
        shapes = (shapes[0], *((*shape[:-2], query.shape[-2], shape[-1]) for shape in shapes[1:]))
    else:
        d_key, d_value = (
            share.reshape(share.shape[0], -1, groups, share.shape[-1]).sum(2) for share in (d_key, d_value)
        )
    return tuple(
        share.reshape(shape).astype(query.dtype) for share, shape in zip((d_query, d_key, d_value), shapes, strict=True)
    )


def _by_token(lse, query, starts, longest, hopper):
    """[N, tokens]."""
    if starts is None:
        assert lse.shape == (query.shape[0], query.shape[2], query.shape[1])
        return lse.swapaxes(0, 1).reshape(query.shape[2], -1)
    if hopper:
        assert lse.shape == (query.shape[1], query.shape[0])
        return lse
    assert lse.shape == (starts[0].shape[0] - 1, query.shape[1], longest[0])
    token = jnp.arange(query.shape[0])
    sequence = jnp.searchsorted(starts[0], token, side="right") - 1
    return lse[sequence, :, token - starts[0][sequence]].T


def _logits(query, key, value, starts, longest, scale, causal, window, hopper):
    """Everything as one list of tokens: query, keys and values of each query head, logits and what is visible."""
    if starts is None:
        longest = query.shape[1], key.shape[1]
        starts = tuple(jnp.arange(array.shape[0] + 1) * array.shape[1] for array in (query, key))
        query, key, value = (array.reshape(-1, *array.shape[2:]) for array in (query, key, value))
    assert query.dtype == key.dtype == value.dtype
    assert key.shape == value.shape
    assert query.shape[-1] == key.shape[-1]
    groups = query.shape[1] // key.shape[1]
    wide_key, wide_value = (jnp.repeat(array.astype(jnp.float32), groups, axis=1) for array in (key, value))
    logits = jnp.einsum("tnd,snd->nts", query.astype(jnp.float32), wide_key) * scale
    visible = _visible(starts, query.shape[0], key.shape[0], *_bounds(causal, window, longest, hopper))
    return query, wide_key, wide_value, logits, jnp.broadcast_to(visible[None], logits.shape)


def _bounds(causal, window, longest, hopper):
    """What the kernels make of a window; None is no bound."""
    left, right = window
    q_len, kv_len = longest
    right = 0 if causal else right
    if hopper:
        return (None if left < 0 or left >= kv_len - 1 else left), (None if right < 0 or right >= q_len - 1 else right)
    left, right = (-1 if bound >= kv_len else bound for bound in (left, right))
    if left < 0 and right < 0:
        return None, None
    return (kv_len if left < 0 else left), (kv_len if right < 0 else right)


def _visible(starts, queries, keys, left, right):
    sequence, place, ends = [], [], []
    for start, count in zip(starts, (queries, keys), strict=True):
        token = jnp.arange(count)
        of = jnp.searchsorted(start, token, side="right") - 1
        sequence.append(of)
        place.append(token - start[of])
        ends.append(start[1:] - start[:-1])
    corner = (ends[1] - ends[0])[sequence[0]]
    diagonal = (place[0] + corner)[:, None]
    visible = sequence[0][:, None] == sequence[1][None]
    if left is not None:
        visible = visible & (place[1][None] >= diagonal - left)
    if right is not None:
        visible = visible & (place[1][None] <= diagonal + right)
    return visible


def close(dtype):
    """How far float16 or bfloat16 arithmetic may be from float64, for values of about 1."""
    tolerance = {"float16": 1e-2, "bfloat16": 5e-2}[dtype]
    return {"rtol": tolerance, "atol": tolerance}


def same(found, right, dtype="float16"):
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(right, np.float32), **close(dtype))
