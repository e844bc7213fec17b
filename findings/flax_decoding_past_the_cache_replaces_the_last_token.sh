#!/usr/bin/env bash
# flax's MultiHeadAttention that decodes into a cache of 4 tokens can be called a fifth time and on. Nothing is raised, also
# outside jit, where the index is known. The cache is neither a ring, which would forget the oldest token, nor full, which would
# leave it as it is: each further token replaces the newest one. Its query sees tokens 0, 1, 2 and itself, so from then on a
# model remembers how its prompt began and nothing of what it has said; and the index counts on, past the length of the cache.
# linen's MultiHeadDotProductAttention does the same. jax.lax.dynamic_update_slice moves a start that is out of bounds back in.
# Seen with flax 0.12.8 and jax 0.10.2 on CPU; the output is finite and plausible, so a cache has to count overflow itself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "flax==0.12.8" "jax==0.10.2" "jaxlib==0.10.2"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

SLOTS, STEPS = 4, 7
x = jax.random.normal(jax.random.key(0), (1, STEPS, 16))

new = nnx.MultiHeadAttention(2, 16, decode=True, rngs=nnx.Rngs(0))
new.init_cache((1, SLOTS, 16))
old = linen.MultiHeadDotProductAttention(num_heads=2, decode=True)
whole = linen.MultiHeadDotProductAttention(num_heads=2)
started = old.init(jax.random.key(1), jnp.ones((1, SLOTS, 16)), jnp.ones((1, SLOTS, 16)))
params, cache = started["params"], started["cache"]


def in_nnx(token):
    return new(token), int(new.cache_index[...])


def in_linen(token):
    global cache
    out, changed = old.apply({"params": params, "cache": cache}, token, mutable=["cache"])
    cache = changed["cache"]
    return out, int(cache["cache_index"])


def nnx_of(query, keys):
    return new(query, keys, decode=False)


def linen_of(query, keys):
    return whole.apply({"params": params}, query, keys)


print("flax", flax.__version__, "jax", jax.__version__)
for name, step, of in (("nnx", in_nnx, nnx_of), ("linen", in_linen, linen_of)):
    print(name)
    for t in range(STEPS):
        query = x[:, t : t + 1]
        out, index = step(query)
        visible = {
            "all tokens": [*range(t + 1)],
            "the last 4 tokens": [*range(max(0, t + 1 - SLOTS), t + 1)],
            "the first 4 tokens": [*range(min(t + 1, SLOTS))],
            "the first 3 tokens and itself": sorted({*range(min(t + 1, SLOTS - 1)), t}),
        }
        off = {what: float(np.abs(out - of(query, x[:, jnp.array(tokens)])).max()) for what, tokens in visible.items()}
        alike = [what for what, distance in off.items() if distance < 1e-5]
        print(f"  token {t}, index {index} of {SLOTS}: as with {'; '.join(alike)}")
        assert np.isfinite(out).all() and index == t + 1
        assert alike == ([*visible] if t < SLOTS else ["the first 3 tokens and itself"]), off
PY
