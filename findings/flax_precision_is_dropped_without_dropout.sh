#!/usr/bin/env bash
# flax's nnx.MultiHeadAttention(precision="highest") has six matrix products: of the query, key, value and output projections,
# of the logits and of the weighted values. In the program for a TPU the four projections ask for HIGHEST, and the two products
# of attention for DEFAULT, which are passes in bfloat16 there. A dropout rate changes that, in inference as well, where nothing
# is dropped: with dropout_rate=0.1 and deterministic=True all six ask for HIGHEST. So does sow_weights=True, which is about
# looking at the weights, and linen's MultiHeadDotProductAttention always. nnx.dot_product_attention(precision=…) on its own
# drops it as the module does. The docstring says that the optimized jax.nn.dot_product_attention is used where there is no
# dropout and no module; that one has no argument for a precision. jax.default_matmul_precision("highest") reaches all six.
# Seen with flax 0.12.8 and jax 0.10.2, programs lowered for a TPU on CPU; so a precision has to be looked for in the program.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "flax==0.12.8" "jax==0.10.2" "jaxlib==0.10.2"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import flax
import jax
import jax.numpy as jnp
from flax import linen, nnx

x = jnp.ones((1, 8, 16))


def counted(function):
    """How many products of the program for a TPU ask for HIGHEST, and for DEFAULT."""
    lines = jax.jit(function).trace(x).lower(lowering_platforms=("tpu",)).as_text().splitlines()
    products = [line for line in lines if "stablehlo.dot_general" in line]
    highest = sum("HIGHEST, HIGHEST" in line for line in products)
    assert highest + sum("DEFAULT, DEFAULT" in line for line in products) == len(products), products
    return highest, len(products) - highest


def module(precision="highest", dropout_rate=0.0, **options):
    layer = nnx.MultiHeadAttention(
        2, 16, decode=False, deterministic=True, precision=precision, dropout_rate=dropout_rate, rngs=nnx.Rngs(0)
    )
    graph, state = nnx.split(layer)
    return lambda x: nnx.merge(graph, state)(x, **options)


def alone(x):
    heads = x.reshape(1, 8, 2, 8)
    return nnx.dot_product_attention(heads, heads, heads, precision="highest")


old = linen.MultiHeadDotProductAttention(num_heads=2, precision="highest")
variables = old.init(jax.random.key(0), x, x)
seen = {
    "nnx module": counted(module()),
    "nnx module, dropout_rate=0.1, deterministic": counted(module(dropout_rate=0.1)),
    "nnx module, sow_weights=True": counted(module(sow_weights=True)),
    "linen module": counted(lambda x: old.apply(variables, x, x)),
    "nnx.dot_product_attention": counted(alone),
}
with jax.default_matmul_precision("highest"):
    seen["nnx module under jax.default_matmul_precision"] = counted(module(None))
print("flax", flax.__version__, "jax", jax.__version__)
for name, (highest, default) in seen.items():
    print(f"  {name}: {highest} products HIGHEST, {default} DEFAULT")
assert list(seen.values()) == [(4, 2), (6, 0), (6, 0), (6, 0), (0, 2), (6, 0)], seen
PY
