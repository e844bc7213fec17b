"""tokamax_mosaic in JAX's interpreter of Mosaic GPU kernels against dot_product: `python mosaic_cases.py TARGET CASE`.

A process of its own, for the interpreter wants more threads than JAX's CPU backend starts. Prints one line of JSON.
"""

import json
import os
import sys

from mosaic_interpreter import THREADS

os.environ.update(THREADS, JAX_PLATFORMS="cpu")

import jax
import jax.numpy as jnp
import numpy as np
from mosaic_interpreter import interpreted

import kernelry
from kernelry import masks

KERNEL = "tokamax_mosaic"
RNG = np.random.default_rng(0)


def sizes(batch=1, q_len=256, kv_len=256, heads=2, kv_heads=1, head_dim=64, value_dim=64, dtype="bfloat16"):
    return {
        "query": ((batch, q_len, heads, head_dim), dtype),
        "key": ((batch, kv_len, kv_heads, head_dim), dtype),
        "value": ((batch, kv_len, kv_heads, value_dim), dtype),
    }


def ids(*counts):
    return np.repeat(np.arange(len(counts)) - 1, counts)


def padded(level):
    """The bias that an additive mask makes of padding at the left, and of padded rows."""
    bias = np.zeros((1, 1, 128, 256), np.float32)
    bias[..., :150] = level
    bias[:, :, 5:9] = level
    return jnp.asarray(bias)


CASES = {
    "causal": (sizes(), {"mask": masks.Causal()}),
    "full_float16_with_sinks": (
        sizes(batch=2, q_len=128, kv_len=128, dtype="float16") | {"sinks": ((2,), "float32")},
        {"scale": 0.2},
    ),
    "window_of_a_later_chunk": (
        sizes(q_len=128, head_dim=80, value_dim=48),
        {"mask": masks.SlidingWindow(90).at(query_offset=120)},
    ),
    "rows_at_traced_offsets": (
        sizes(batch=2, q_len=128, kv_len=128),
        {"mask": masks.Chunked(48).at(query_offset=jnp.asarray([0, 9])) & masks.Lengths(jnp.asarray([128, 70]))},
    ),
    "rows_that_see_nothing": (
        sizes(q_len=128, kv_len=128),
        {"mask": masks.Causal().at(query_offset=-64) & masks.Lengths(100)},
    ),
    "prefix": (sizes(q_len=128, kv_len=128), {"mask": masks.PrefixLM(40)}),
    "packed_through_a_dense_mask": (
        sizes(q_len=128, kv_len=128, heads=4, kv_heads=2),
        {"mask": masks.Causal() & masks.Segments(ids(30, 50, 48))},
    ),
    "dense_by_head": (
        sizes(q_len=128, kv_len=128, heads=4, kv_heads=2),
        {"mask": masks.Dense(RNG.random((1, 4, 128, 128)) < 0.5)},
    ),
    "bias_of_each_head": (
        sizes(q_len=128, kv_len=128, heads=4, kv_heads=2) | {"bias": ((1, 4, 1, 128), "float32")},
        {"mask": masks.Causal()},
    ),
    "bias_in_short": (
        sizes(batch=2, q_len=128, kv_len=128) | {"bias": ((2, 1, 128, 128), "bfloat16")},
        {"mask": masks.Dense(RNG.random((2, 1, 128, 128)) < 0.7)},
    ),
    "head_dim_128_with_largest_logits": (
        sizes(q_len=128, kv_len=128, head_dim=128, value_dim=128),
        {"mask": masks.Causal(), "return_max_logits": True},
    ),
    "padded_rows_and_keys": (sizes(q_len=128), {"bias": padded(np.finfo(np.float32).min)}),
    "uneven_lengths": (sizes(q_len=100, kv_len=140), {}),
}


def measured(target, case):
    """Errors of the output and of each gradient against dot_product in float32, and what ran."""
    described, options = CASES[case]
    names = tuple(described)
    arrays = [jnp.asarray(RNG.standard_normal(shape), dtype) for shape, dtype in described.values()]
    d_out = jnp.asarray(RNG.standard_normal((*described["query"][0][:3], described["value"][0][3])), jnp.float32)

    def run(kernel, *arrays):
        def attend(*arrays):
            named = dict(zip(names, arrays, strict=True))
            return kernelry.attention(**named, kernel=kernel, **options)

        with_top = options.get("return_max_logits", False)
        out, pull, *top = jax.vjp(attend, *arrays, has_aux=with_top)
        return out, *top, *pull(d_out.astype(out.dtype))

    with interpreted() as kernels, kernelry.use(target=target), kernelry.record() as resolutions:
        found = run(KERNEL, *arrays)
    wanted = run("dot_product", *(array.astype(jnp.float32) for array in arrays))
    labels = ("out", *(("max_logits",) if len(found) > len(names) + 1 else ()), *names)
    errors = {
        label: float(np.max(np.abs(np.asarray(a, np.float32) - np.asarray(b)) / (1 + np.abs(np.asarray(b)))))
        for label, a, b in zip(labels, found, wanted, strict=True)
    }
    plan = resolutions[0].plan
    return {
        "kernel": plan.kernel.name,
        "adapters": sorted(step.adapter.name for step in plan.steps),
        "warpgroups": kernels,
        "dtypes": [str(array.dtype) for array in found],
        "finite": all(bool(np.isfinite(np.asarray(array, np.float32)).all()) for array in found),
        "errors": errors,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measured(*sys.argv[1:])) + "\n")
