#!/usr/bin/env bash
# A length of 2**40 hides every key. With 64-bit types on, `jnp.asarray(2**40)` prints as int64 and holds 1099511627776, but it
# is weakly typed, for it was made of a Python number: compared with int32 slots it is converted to int32, where it is 0, and no
# slot is below it. NumPy's int64 is not weak, and says what one expects, as does `jnp.int64(2**40)`.
# Seen with jax 0.10.2 on CPU; so a mask library has to clip lengths that it is given, before it compares them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "jaxlib==0.10.2"
JAX_PLATFORMS=cpu JAX_ENABLE_X64=1 "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

slots = jnp.arange(8, dtype=jnp.int32)
lengths = {"jnp.asarray(2**40)": jnp.asarray(2**40), "jnp.int64(2**40)": jnp.int64(2**40), "np.int64(2**40)": np.int64(2**40)}
seen = {name: (str(length.dtype), int(length), int((slots < length).sum())) for name, length in lengths.items()}
for name, (dtype, value, visible) in seen.items():
    print(f"{name}: {dtype}, holds {value}, slots below it: {visible} of 8")
print("jax", jax.__version__)
assert [visible for _, _, visible in seen.values()] == [0, 8, 8], seen
assert all(dtype == "int64" and value == 2**40 for dtype, value, _ in seen.values()), seen
PY
