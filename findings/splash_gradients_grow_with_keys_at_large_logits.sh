#!/usr/bin/env bash
# Splash attention keeps the logsumexp alone for its backward pass. Where every logit of a row is the same number, each of the
# 128 keys has probability 1/128, and the forward pass says so whatever that number is. At 1e9 the next float32 is 64 away, so
# log(128) = 4.9 vanishes in the logsumexp, the backward pass takes each probability for 1, and the gradient of the values is
# 128 times too large, though the output is exact and nothing is NaN. At 1e6 it is off by 2 %.
# Seen with jax 0.10.2 in interpret mode on CPU; so an additive mask of very negative numbers is not safe in training.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "jaxlib==0.10.2"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

KEYS = DIM = 128
rng = np.random.default_rng(0)
value, d_out = (jnp.asarray(rng.standard_normal((1, KEYS, DIM)), jnp.float32) for _ in range(2))
mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((KEYS, KEYS))])
attend = splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1, interpret=True)
mean = np.asarray(value, np.float64).mean(axis=1, keepdims=True)
wanted = np.asarray(d_out, np.float64).mean(axis=1, keepdims=True)  # the gradient of every value


def measured(level):
    """How far the output is from the mean of the values, and the gradient of the values in units of the right one."""
    query = jnp.zeros((1, KEYS, DIM)).at[..., 0].set(level)
    key = jnp.zeros((1, KEYS, DIM)).at[..., 0].set(1.0)
    out, pull = jax.vjp(lambda value: attend(query, key, value), value)
    off = np.abs(np.asarray(out, np.float64) - mean).max()
    return float(off), float(np.median(np.asarray(pull(d_out)[0], np.float64) / wanted))


for level, expected in ((1e3, 1.0), (1e6, 0.977), (1e9, 128.0), (-1e9, 128.0)):
    off, factor = measured(level)
    print(f"every logit {level:+.0e}: output off by {off:.1e}, gradient of the values {factor:.3f} times the right one")
    assert off < 1e-6, off
    assert abs(factor - expected) < 1e-3 * expected, (factor, expected)
print("jax", jax.__version__)
PY
