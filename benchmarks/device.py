"""Whether this machine's kernels are right, and how fast compared with others. Run: python benchmarks/device.py.

Tests every kernel that runs here against what it declares; then times each one, `auto`, and the attention of jax.nn,
JAX's Pallas and tokamax on named shapes, next to a matrix product and a copy that take turns with them. What is timed
is compared with float32 first. Writes one JSON and, where matplotlib is installed, one PNG. The modules are in
on_device/.
Forward+backward is `jax.value_and_grad` of Σ out · weights with respect to query, key and value.
"""

import os

import on_device.clock  # noqa: F401  first: the minutes count from here

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # JAX takes 0.75; the largest shapes need more


def main() -> None:
    from on_device.command import main as run

    run(__doc__.splitlines()[0])


if __name__ == "__main__":
    main()
