#!/usr/bin/env bash
# The window of fa4-jax is a band: a query at position p sees the keys from p - left to p + right, so that a negative bound
# moves the band off the query's own position. As the right bound of (2, right) goes from 0 to -2, six queries see 15, 9 and 4
# keys. At -3 the band is empty: rows without a key are documented to be zeros, but all 36 keys are seen. So it is for (-1, 0),
# which is how flash-attn writes "causal": later tokens are seen, and nothing is refused. reference_attn of the same package,
# documented to have exactly the semantics of flash_attn, gives zeros. The rule is applied before a backend is chosen, so it
# holds for the GPU's kernels too.
# Seen with fa4-jax 0.1.0 and jax 0.12.0.1 on CPU with backend="reference". Its CUDA dependencies are not installed: nothing here
# needs them. Needs Python 3.12, and is skipped where there is no python3.12.
set -euo pipefail
if ! python3.12 -c "" 2>/dev/null; then
    echo "fa4-jax 0.1.0 skipped: no python3.12 here"
    exit
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.12 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip "jax==0.12.0.1" "jaxlib==0.12.0.1" "jaxtyping==0.3.11"
pip --no-deps "fa4-jax==0.1.0"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import fa4_jax
import jax
import jax.numpy as jnp
import numpy as np

S = 6
alike = jnp.zeros((1, S, 1, S))  # equal logits
identity = jnp.eye(S)[None, :, None]  # so the output is probabilities


def seen(attend, **mask):
    """Which keys, by query, get a part of the probability."""
    return np.asarray(attend(alike, alike, identity, **mask))[0, :, 0] > 0


def by_both(**mask):
    return seen(fa4_jax.flash_attn, backend="reference", **mask), seen(fa4_jax.reference_attn, **mask)


distance = np.subtract.outer(np.arange(S), np.arange(S))
for window, expected in (((2, 0), 15), ((2, -1), 9), ((2, -2), 4), ((2, -3), 36), ((2, -5), 36), ((-1, 0), 36)):
    left, right = window
    band = (-right <= distance) & (distance <= left)
    one, other = by_both(window_size=window)
    print(f"window_size={window}: {band.sum()} keys in the band, flash_attn sees {one.sum()}, reference_attn {other.sum()}")
    assert (other == band).all()
    assert (one == band).all() == (band.sum() > 0), one
    assert one.sum() == expected, one
one, other = by_both(causal=True)
assert (one == (distance >= 0)).all() and (other == one).all()
print(f"causal=True: both see {one.sum()}")
print("fa4-jax", fa4_jax.__version__, "jax", jax.__version__)
PY
