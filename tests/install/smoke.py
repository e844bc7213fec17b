"""One attention call with gradients in an environment of installed files, compared with the float64 reference.

Run by test_dist.py, with that environment's Python; writes where kernelry was imported from, and its version.
"""

import json
import sys
from importlib.metadata import distributions

import jax
import numpy as np

import kernelry
from kernelry import masks
from kernelry.testing import reference_attention, reference_gradients

rng = np.random.default_rng(0)
query = rng.standard_normal((2, 40, 4, 16), np.float32)
key, value = (rng.standard_normal((2, 40, 2, 16), np.float32) for _ in range(2))
out_gradient = rng.standard_normal(query.shape, np.float32)
call = {"mask": masks.Causal() & masks.SlidingWindow(7), "soft_cap": 20.0}

with kernelry.record() as resolutions:
    out, pull = jax.vjp(lambda *arrays: kernelry.attention(*arrays, **call), query, key, value)
gradients = pull(out_gradient)
np.testing.assert_allclose(out, reference_attention(query, key, value, **call).out, atol=2e-6)
expected = reference_gradients(query, key, value, d_out=out_gradient, **call)
for found, name in zip(gradients, ("query", "key", "value"), strict=True):
    np.testing.assert_allclose(found, getattr(expected, name), atol=2e-5, err_msg=name)

ours = {found.name: found.version for found in distributions() if found.name.startswith("kernelry")}
said = {"file": kernelry.__file__, "kernel": resolutions[0].kernel, "versions": ours, "jax": jax.__version__}
sys.stdout.write(json.dumps(said) + "\n")
