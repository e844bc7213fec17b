#!/usr/bin/env bash
# flax 0.12.0 and 0.12.1 ask for a jax from some release on and name no last one; so a resolver that is asked for either with
# jax 0.10.0 installs them, and `pip check` finds nothing broken. With flax 0.12.0, `import flax` and linen work, and
# flax.nnx cannot be imported: it takes mutable_array from jax's private core. With 0.12.1 nnx modules compute, but nnx.jit
# raises a TypeError when it is given a function, before anything is traced: it passes jax.jit the abstracted_axes that jax no
# longer has. With 0.12.8 the same lines run. So a test of flax's lowest version that imports flax, or that runs a module
# without nnx.jit, says yes to a pair that is no use.
# Seen with flax 0.12.0, 0.12.1, 0.12.8 and jax 0.10.0 on CPU; a lower bound on flax depends on the lowest jax next to it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/try.py" <<'PY'
import importlib.metadata
import sys

asked = [need for need in importlib.metadata.requires("flax") if need.startswith("jax>") or need.startswith("jax=")]
print("flax", importlib.metadata.version("flax"), "asks for", *asked, "and has jax", importlib.metadata.version("jax"))
assert len(asked) == 1 and "<" not in asked[0], asked


def outcome(function):
    try:
        function()
    except (ImportError, TypeError) as error:
        return f"{type(error).__name__}: {str(error).partition(' (/')[0]}"
    return "runs"


def with_linen():
    import jax
    from flax import linen

    x = jax.numpy.ones((1, 2))
    linen.Dense(3).init_with_output(jax.random.key(0), x)


def with_nnx():
    import jax
    from flax import nnx

    nnx.Linear(2, 3, rngs=nnx.Rngs(0))(jax.numpy.ones((1, 2)))


def with_nnx_jit():
    import jax
    from flax import nnx

    nnx.jit(lambda layer, x: layer(x))(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jax.numpy.ones((1, 2)))


missing = "ImportError: cannot import name 'mutable_array' from 'jax._src.core'"
unknown = "TypeError: jit() got an unexpected keyword argument 'abstracted_axes'"
expected = {"0.12.0": ["runs", missing, missing], "0.12.1": ["runs", "runs", unknown], "0.12.8": ["runs"] * 3}
seen = [outcome(each) for each in (with_linen, with_nnx, with_nnx_jit)]
for name, said in zip(("linen", "nnx", "nnx.jit"), seen, strict=True):
    print(f"  {name}: {said}")
assert seen == expected[sys.argv[1]], seen
PY
for version in 0.12.0 0.12.1 0.12.8; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "flax==$version" "jax==0.10.0" "jaxlib==0.10.0"
    "$folder/$version/bin/pip" check
    JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/try.py" "$version"
done
