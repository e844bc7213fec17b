"""A dense kernel with a backward of its own that is as careless as a vendor's."""

import dataclasses

import jax
import jax.numpy as jnp

import kernelry
from kernelry.plugin import Gradient, Gradients, Kernel, KernelSpec, Operand, Partial, Side


class Careless(Kernel):
    """Like a vendor's kernel: its backward does not mask a row that sees nothing."""

    def forward(self, inputs, request, tiling, *, statistics):
        logits, visible = self._logits(inputs, request)
        lse = jax.nn.logsumexp(jnp.where(visible, logits, -jnp.inf), axis=-1)
        empty = jnp.isneginf(lse)
        weights = jnp.where(visible, jnp.exp(logits - jnp.where(empty, 0.0, lse)[..., None]), 0.0)
        out = jnp.einsum("BNTS,BSND->BTND", weights, inputs.value)
        return Partial(out, lse=lse if statistics else None, dtype=request.dtype)

    def backward(self, inputs, request, tiling, out, lse, d_out, d_lse):
        logits, visible = self._logits(inputs, request)
        weights = jnp.exp(logits - lse[..., None])
        weights = jnp.where(visible | ~visible.any(axis=-1, keepdims=True), weights, 0.0)
        delta = jnp.einsum("BTND,BTND->BNT", out, d_out)
        d_logits = weights * (jnp.einsum("BTND,BSND->BNTS", d_out, inputs.value) - delta[..., None]) * request.scale
        return Gradients(
            jnp.einsum("BNTS,BSNH->BTNH", d_logits, inputs.key),
            jnp.einsum("BNTS,BTNH->BSNH", d_logits, inputs.query),
            jnp.einsum("BNTS,BTND->BSND", weights, d_out),
        )

    def _logits(self, inputs, request):
        visible = jnp.ones((request.batch, 1, request.q_len, request.kv_len), bool)
        for mask in inputs.mask:
            visible = visible & mask.evaluate(Side.query(request.q_len), Side.kv(request.kv_len))
        return jnp.einsum("BTNH,BSNH->BNTS", inputs.query, inputs.key) * request.scale, visible


DENSE = next(kernel.spec for kernel in kernelry.kernels() if kernel.name == "dot_product")
CARELESS = KernelSpec(
    name="careless",
    capabilities=dataclasses.replace(
        DENSE.capabilities,
        features=frozenset(),
        gradient=Gradient.BACKWARD,
        gradients=frozenset({Operand.QUERY, Operand.KEY, Operand.VALUE}),
    ),
    load=Careless,
    signature=lambda _: (),
)
