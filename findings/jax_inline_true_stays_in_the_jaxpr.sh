#!/usr/bin/env bash
# A function under jax.jit(..., inline=True), called in a function that is traced: with jax 0.10.2 its equations stand in the
# caller's jaxpr and no jit equation is left. With jax 0.12.0.1 the same program leaves a jit equation, also after vmap, and
# two under grad, where 0.10.2 leaves none: True now means jax.Inline.JAX_LATE, and the call is inlined when it is lowered. The
# StableHLO is the same, without a call. A program that counts the matrix products of a jaxpr's equations finds none, and the
# old meaning is spelled inline=jax.Inline.JAX_EARLY, which 0.10.2 does not know.
# Seen with jax 0.10.2 and 0.12.0.1 on CPU; so what reads a jaxpr has to look into its jit equations. The newer needs Python
# 3.12, and is skipped where there is no python3.12.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/inline.py" <<'PY'
import collections
import sys

import jax
import jax.numpy as jnp


def product(x):
    return jax.lax.dot(x, x)


def caller(inline):
    inner = jax.jit(product, inline=inline)
    return lambda x: inner(x) + 1.0


def counted(function):
    """How many jit equations and matrix products are among the equations of a function's jaxpr, not looking into them."""
    names = collections.Counter(equation.primitive.name for equation in jax.make_jaxpr(function)(x).eqns)
    return names["jit"], names["dot_general"]


x = jnp.ones((4, 4))
batch = jax.vmap(caller(True), axis_size=2, in_axes=None)
gradient = jax.grad(lambda x: caller(True)(x).sum())
seen = {
    "inline=False": counted(caller(False)),
    "inline=True": counted(caller(True)),
    "inline=True, vmap": counted(batch),
    "inline=True, grad": counted(gradient),
}
late = sys.argv[1] == "late"
if late:
    seen["inline=jax.Inline.JAX_EARLY"] = counted(caller(jax.Inline.JAX_EARLY))
print("jax", jax.__version__)
for name, (calls, products) in seen.items():
    print(f"  {name}: {calls} jit equations, {products} products")
lowered = [jax.jit(caller(inline)).lower(x).as_text().count("call @") for inline in (False, True)]
print(f"  calls in the StableHLO: {lowered[0]} with inline=False, {lowered[1]} with inline=True")
assert lowered == [1, 0], lowered
assert seen.pop("inline=False") == (1, 0)
assert seen.pop("inline=jax.Inline.JAX_EARLY", (0, 1)) == (0, 1)
assert hasattr(jax, "Inline") == late
assert list(seen.values()) == ([(1, 0), (1, 0), (2, 0)] if late else [(0, 1), (0, 1), (0, 3)]), seen
PY
seen() {
    "$1" -m venv "$folder/$2"
    "$folder/$2/bin/pip" install --quiet --disable-pip-version-check "jax==$2" "jaxlib==$2"
    JAX_PLATFORMS=cpu "$folder/$2/bin/python" "$folder/inline.py" "$3"
}
seen python3 0.10.2 early
if python3.12 -c "" 2>/dev/null; then
    seen python3.12 0.12.0.1 late
else
    echo "jax 0.12.0.1 skipped: no python3.12 here"
fi
