"""Two honest kernels in plain jax.numpy, one step a method, so that a lie overrides exactly one step."""

import dataclasses

import jax
import jax.numpy as jnp

from kernelry.plugin import (
    AtomKind,
    Capabilities,
    Dims,
    Feature,
    Gradient,
    Gradients,
    Kernel,
    KernelSpec,
    Mode,
    Operand,
    PagedArray,
    Partial,
    PositionKind,
    QuantizedArray,
    Side,
    Statistic,
    Tolerance,
    ValueInKey,
)
from kernelry.storage import KV_LAYOUTS, QUANTIZATIONS

_TOLERANCES = (
    Tolerance("float32", 2e-6, 2e-5, "float32 products and sums"),
    Tolerance("bfloat16", 1e-2, 4e-2, "the output is rounded to 8 bits of mantissa"),
)


class Honest(Kernel):
    """Serves all that it declares, and JAX differentiates it."""

    def __init__(self, name="honest"):
        self.name = name

    def forward(self, inputs, request, tiling, *, statistics):
        with jax.named_scope(f"contract.{self.name}"):
            return self.attend(inputs, request, statistics)

    def attend(self, inputs, request, statistics):
        inputs = self.read(inputs)
        visible = jnp.broadcast_to(self.visible(inputs, request), self.pairs(request))
        query, key, value = self.cleaned(inputs, visible, request)
        key, value = self.expanded(key, request), self.expanded(value, request)
        logits = self.logits(query, key, request)
        if self.adds_after_cap(request):
            capped = self.biased_after_cap(self.capped(logits, inputs, visible, request), inputs, request)
        else:
            capped = self.capped(self.biased(logits, inputs), inputs, visible, request)
        masked = jnp.where(visible, capped, -jnp.inf)
        top = jax.lax.stop_gradient(self.top(masked))
        weights = self.weights(masked, top)
        total = weights.sum(axis=-1)
        empty = total == 0
        safe = jnp.where(empty, 1.0, total)
        probabilities = self.dropped(weights / safe[..., None], inputs, request)
        out = self.output(probabilities, value, empty)
        lse = self.lse(top + jnp.log(safe), empty, request)
        out = self.with_sinks(out, lse, inputs)
        return Partial(
            out if statistics else self.rounded(out, request),
            lse=self.returned_lse(lse) if statistics else None,
            max_logits=self.max_logits(masked, capped) if request.max_logits else None,
            dtype=request.dtype,
        )

    def read(self, inputs):
        key = self.scaled(self.gathered(inputs.key))
        if isinstance(inputs.value, ValueInKey):
            alternate = isinstance(inputs.key, PagedArray) and inputs.key.interleaved
            key, value = self.alternating(key) if alternate else (key, self.columns(key, inputs.value.width))
        else:
            value = self.scaled(self.gathered(inputs.value))
        return dataclasses.replace(inputs, key=key, value=value)

    def alternating(self, both):
        return both[:, :, 0::2], both[:, :, 1::2]

    def columns(self, key, width):
        return key[..., :width]

    def gathered(self, array):
        if not isinstance(array, PagedArray):
            return array
        return jax.tree.map(lambda pages: self.side_by_side(pages, array.table), array.pages)

    def side_by_side(self, pages, table):
        return pages[self.order(table)].reshape(table.shape[0], -1, *pages.shape[2:])

    def order(self, table):
        return jnp.maximum(table, 0)

    def scaled(self, array):
        if not isinstance(array, QuantizedArray):
            return array
        return array.values.astype(jnp.float32) * self.scale_of(array).astype(jnp.float32)

    def scale_of(self, array):
        return array.scale

    def pairs(self, request):
        return request.batch, request.q_heads, request.q_len, request.kv_len

    def masks(self, inputs):
        return inputs.mask

    def sides(self, request):
        return Side.query(request.q_len, q_heads=request.q_heads), Side.kv(request.kv_len)

    def visible(self, inputs, request):
        visible = jnp.ones((1, 1, 1, 1), bool)
        for mask in self.masks(inputs):
            visible = visible & mask.evaluate(*self.sides(request))
        return visible

    def cleaned(self, inputs, visible, request):
        by_group = visible.reshape(visible.shape[0], request.kv_heads, request.groups, *visible.shape[2:])
        seen = by_group.any(axis=(2, 3)).swapaxes(1, 2)[..., None]
        sees = visible.any(axis=3).swapaxes(1, 2)[..., None]
        return jnp.where(sees, inputs.query, 0), jnp.where(seen, inputs.key, 0), jnp.where(seen, inputs.value, 0)

    def expanded(self, array, request):
        return jnp.repeat(array, request.groups, axis=2)

    def scale(self, request):
        return request.scale

    def logits(self, query, key, request):
        product = jnp.einsum("BTNH,BSNH->BNTS", query, key, preferred_element_type=jnp.float32)
        return product * self.scale(request)

    def biased(self, logits, inputs):
        return logits if inputs.bias is None else logits + inputs.bias.astype(jnp.float32)

    def capped(self, logits, inputs, visible, request):
        if request.soft_cap is None:
            return logits
        return request.soft_cap * jnp.tanh(jnp.where(visible, logits, 0) / request.soft_cap)

    def adds_after_cap(self, request):
        return request.bias_after_cap

    def biased_after_cap(self, capped, inputs, request):
        return self.biased(capped, inputs)

    def top(self, masked):
        return jnp.max(masked, axis=-1, initial=jnp.finfo(jnp.float32).min)

    def weights(self, masked, top):
        return jnp.exp(masked - top[..., None])

    def dropped(self, probabilities, inputs, request):
        if not request.dropout_rate:
            return probabilities
        kept = jax.random.bernoulli(self.dropout_key(inputs), 1 - request.dropout_rate, probabilities.shape)
        return jnp.where(kept, probabilities / self.kept_share(request), 0)

    def dropout_key(self, inputs):
        return inputs.dropout_rng

    def kept_share(self, request):
        return 1 - request.dropout_rate

    def output(self, probabilities, value, empty):
        out = jnp.einsum("BNTS,BSND->BTND", probabilities, value.astype(jnp.float32))
        return jnp.where(empty.swapaxes(1, 2)[..., None], 0, out)

    def lse(self, lse, empty, request):
        return jnp.where(empty, -jnp.inf, lse)

    def returned_lse(self, lse):
        return lse

    def with_sinks(self, out, lse, inputs):
        if inputs.sinks is None:
            return out
        empty = jnp.isneginf(lse)
        share = jax.nn.sigmoid(jnp.where(empty, 0, lse) - self.sinks(inputs)[None, :, None])
        return out * jnp.where(empty, 0, share).swapaxes(1, 2)[..., None]

    def sinks(self, inputs):
        return inputs.sinks.astype(jnp.float32)

    def max_logits(self, masked, capped):
        return masked.max(axis=(2, 3), initial=-jnp.inf)

    def rounded(self, out, request):
        return out.astype(request.dtype)


class HonestBackward(Honest):
    """Serves masks and the scale, with a backward of its own."""

    def backward(self, inputs, request, tiling, out, lse, d_out, d_lse):
        with jax.named_scope(f"contract.{self.name}"):
            held, inputs = inputs.value, self.read(inputs)
            visible = jnp.broadcast_to(self.visible(inputs, request), self.pairs(request))
            query, key, value = self.cleaned(inputs, visible, request)
            key, value = self.expanded(key, request), self.expanded(value, request)
            weights = jnp.where(visible, jnp.exp(self.logits(query, key, request) - lse[..., None]), 0)
            d_weights = jnp.einsum("BTND,BSND->BNTS", d_out.astype(jnp.float32), value)
            d_logits = weights * (d_weights - self.delta(out, d_out, d_lse)[..., None]) * request.scale
            d_key = self.d_key(self.summed(jnp.einsum("BNTS,BTNH->BSNH", d_logits, query), request))
            d_value = self.summed(jnp.einsum("BNTS,BTND->BSND", weights, d_out.astype(jnp.float32)), request)
            if isinstance(held, ValueInKey):
                d_key = self.both_shares(d_key, d_value)
            return Gradients(jnp.einsum("BNTS,BSNH->BTNH", d_logits, key), d_key, d_value)

    def both_shares(self, d_key, d_value):
        return d_key.at[..., : d_value.shape[3]].add(d_value)

    def delta(self, out, d_out, d_lse):
        delta = jnp.einsum("BTND,BTND->BNT", out.astype(jnp.float32), d_out.astype(jnp.float32))
        return delta if d_lse is None else delta - d_lse

    def d_key(self, d_key):
        return d_key

    def summed(self, by_query_head, request):
        shape = (*by_query_head.shape[:2], request.kv_heads, request.groups, by_query_head.shape[3])
        return by_query_head.reshape(shape).sum(axis=3)


ALL = Capabilities(
    platforms=frozenset({"cpu", "gpu", "tpu"}),
    interpret=True,
    modes=frozenset(Mode),
    dtypes=frozenset({"float32", "bfloat16"}),
    head_dims=Dims(),
    split_head_dim=True,
    grouped_heads=True,
    unequal_lengths=True,
    atoms=frozenset(AtomKind),
    positions=frozenset(PositionKind),
    features=frozenset(Feature) - {Feature.LOGITS_DTYPE, Feature.PRECISION},
    statistics=frozenset({Statistic.LSE}),
    normalizations=frozenset({"softmax"}),
    gradient=Gradient.NATIVE,
    gradients=frozenset(Operand),
    lse_cotangent=True,
    empty_rows=True,
    clean_hidden_slots=True,
    kv_quantizations=QUANTIZATIONS,
    pages=True,
    kv_layouts=frozenset(KV_LAYOUTS),
    tolerances=_TOLERANCES,
)


def spec_of(body, name, capabilities):
    """Describes a kernel whose scope is its own."""
    return KernelSpec(
        name=name, capabilities=capabilities, load=lambda: body(name), signature=lambda _: (f"contract.{name}",)
    )


HONEST = spec_of(Honest, "honest", ALL)
BACKWARD = dataclasses.replace(
    ALL,
    features=frozenset({Feature.SCALE}),
    gradient=Gradient.BACKWARD,
    gradients=frozenset({Operand.QUERY, Operand.KEY, Operand.VALUE}),
)
HONEST_BACKWARD = spec_of(HonestBackward, "honest_backward", BACKWARD)
