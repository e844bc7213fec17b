#!/usr/bin/env bash
# keras.layers.MultiHeadAttention on JAX computes attention in two ways, and a row of the mask that sees no key comes out
# differently: as the mean of all values, hidden ones included, or, where return_attention_scores=True or the layer has a dropout
# rate (also in inference, where nothing is dropped), as zeros. The same weights, the same inputs, the same mask. And with
# value_dim unlike key_dim, which are two arguments of the layer, the first way ends in a TypeError about reshaping, unless the
# scores are asked for.
# Seen with keras 3.15.1 and jax 0.10.2 on CPU; so a padded row of a batch can change with an option that is only about looking.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "keras==3.15.1" "jax==0.10.2" "jaxlib==0.10.2"
JAX_PLATFORMS=cpu KERAS_BACKEND=jax "$folder/venv/bin/python" - <<'PY'
import logging

import jax
import keras
import numpy as np

S = 6
x = np.random.default_rng(0).standard_normal((1, S, 16), np.float32)
mask = np.ones((1, S, S), bool)
mask[0, 3] = False  # query 3 sees no key
layer = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8)
plain = np.asarray(layer(x, x, attention_mask=mask))[0]
scored, scores = layer(x, x, attention_mask=mask, return_attention_scores=True)
scored = np.asarray(scored)[0]
dropping = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8, dropout=0.1)
dropping.build(x.shape, x.shape)
dropping.set_weights(layer.get_weights())
rate = np.asarray(dropping(x, x, attention_mask=mask, training=False))[0]
for name, other in (("with the scores", scored), ("with a dropout rate, in inference", rate)):
    off = np.abs(plain - other).max(axis=-1)
    print(f"{name}: rows that see keys off by {np.delete(off, 3).max():.0e}, the row that sees none by {off[3]:.2f}")
    assert np.delete(off, 3).max() < 1e-5 < 0.1 < off[3], off
assert not np.any(np.asarray(scores)[0, :, 3]) and not np.any(np.abs(scored[3]) > 1e-6)

narrow = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8, value_dim=5)
narrow.build(x.shape, x.shape)
logging.disable(logging.ERROR)  # Keras logs what jax.nn says
try:
    narrow(x, x)
except TypeError as error:
    refused = next(line for line in str(error).splitlines() if "reshape" in line)
with_scores, _ = narrow(x, x, return_attention_scores=True)
print("value_dim=5:", refused.removeprefix("\x1b[1m").removesuffix("\x1b[0m"), "| with the scores: shape", with_scores.shape)
assert with_scores.shape == x.shape
print("keras", keras.__version__, "jax", jax.__version__)
PY
