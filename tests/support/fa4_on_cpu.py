"""fa4 without a GPU: the vendor's backend in plain JAX computes, or one whose backward pass reads what it is given.

The vendor's own backward pass in plain JAX differentiates its forward pass again and ignores the output and logsumexp
that its GPU kernels read. `GIVEN` is the same forward pass with a backward pass by the formulas of FlashAttention-2
(Dao 2023, algorithm 2): probabilities exp(logits − lse) and Σ out · d_out of the arrays given.
"""

import dataclasses

import jax.numpy as jnp
from fa4_jax import attention, reference
from fa4_jax._reference_backend import ReferenceBackend

from kernelry.plugin import signature_of, standard_tolerances
from kernelry_gpu_flash_attn.fa4 import _vendor
from kernelry_gpu_flash_attn.fa4.kernel import Fa4Kernel
from kernelry_gpu_flash_attn.fa4.spec import FA4

REFERENCE, GIVEN = _vendor.REFERENCE, "kernelry_tests_given"


class GivenBackend(ReferenceBackend):
    """A backward pass from the output and logsumexp that it is given."""

    def vjp(self, cfg, q, k, v, out, lse, d_out, d_lse, aux, seqlens=None):
        assert d_lse is None
        assert seqlens is None
        assert out.dtype == d_out.dtype == q.dtype
        assert lse.dtype == jnp.float32
        (batch, q_len, heads, _), (kv_len, kv_heads) = q.shape, k.shape[1:3]
        visible = reference.dense_mask(batch, heads, q_len, kv_len, cfg.causal, cfg.window, cfg.mask_mod(aux))
        query, key, value, out, d_out = (array.astype(jnp.float32) for array in (q, k, v, out, d_out))
        key, value = (jnp.repeat(array, heads // kv_heads, axis=2) for array in (key, value))
        logits = jnp.einsum("btnh,bsnh->bnts", query, key) * cfg.scale
        weights = jnp.exp(logits - lse[..., None])
        weights = weights if visible is None else jnp.where(visible, weights, 0.0)
        delta = (out * d_out).sum(axis=3).swapaxes(1, 2)
        d_logits = weights * (jnp.einsum("btnd,bsnd->bnts", d_out, value) - delta[..., None])
        d_query = jnp.einsum("bnts,bsnh->btnh", d_logits, key) * cfg.scale
        d_key = jnp.einsum("bnts,btnh->bsnh", d_logits, query) * cfg.scale
        d_value = jnp.einsum("bnts,btnd->bsnd", weights, d_out)
        d_key, d_value = (
            array.reshape(batch, kv_len, kv_heads, heads // kv_heads, -1).sum(axis=3) for array in (d_key, d_value)
        )
        return d_query.astype(q.dtype), d_key.astype(k.dtype), d_value.astype(v.dtype)


attention.register_backend(GIVEN, GivenBackend())


def on_cpu(backend=REFERENCE):
    """The kernel as it is declared, but on CPU, and for float32, too."""
    capabilities = dataclasses.replace(
        FA4.capabilities,
        platforms=frozenset({"cpu"}),
        minimum_generation=(),
        dtypes=FA4.capabilities.dtypes | {"float32"},
        tolerances=standard_tolerances("float32", "bfloat16", "float16"),
    )
    return dataclasses.replace(
        FA4,
        capabilities=capabilities,
        load=lambda: Fa4Kernel(backend),
        signature=signature_of("kernelry.fa4"),
    )
