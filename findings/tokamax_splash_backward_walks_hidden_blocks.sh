#!/usr/bin/env bash
# The splash attention of tokamax walks a list of the visible blocks of a mask, one step each: a window of 512 over 8192 tokens
# in blocks of 512 has 31, and the forward kernel takes 31 steps for each head. The backward kernel of the same call takes 256,
# one for each block, visible or not, though its blocks are the same and the list would serve. It takes 31 if the option
# dq_reduction_steps is 3, whose text in the source is about sums of dQ in the kernel and names no grid. It is None unless set:
# the operation that tokamax builds on the kernel sets it for more than 3 blocks of keys, and a kernel that is made with blocks
# of one's own has to. JAX's splash attention, which walks a rectangle and no list, takes 32 steps in each backward kernel.
# Seen with tokamax 0.0.17 and jax 0.12.0.1 in the grids of the traced kernels; nothing is run or timed. A step over a hidden
# block computes nothing, but it is a step of the grid. Needs Python 3.12, and is skipped where there is no python3.12.
set -euo pipefail
if ! python3.12 -c "" 2>/dev/null; then
    echo "tokamax 0.0.17 skipped: no python3.12 here"
    exit
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.12 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip "tokamax==0.0.17" "jax==0.12.0.1" "jaxlib==0.12.0.1"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as jax_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as jax_masks
from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as kernel
from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

HEADS, LENGTH, WIDTH, BLOCK = 4, 8192, 128, 512
SHAPE = (LENGTH, LENGTH)


def kernels(jaxpr):
    """The equations that call a kernel, also those in the jaxprs of others."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from kernels(inner)


def steps(attend, listed=()):
    """Steps of a head by kernel, in the order of the call; a grid of traced length takes its own from `listed`."""
    array = jax.ShapeDtypeStruct((HEADS, LENGTH, WIDTH), jnp.bfloat16)
    traced = jax.make_jaxpr(lambda q, k, v, d_out: jax.vjp(attend, q, k, v)[1](d_out))(*[array] * 4)
    found = []
    for equation in kernels(traced.jaxpr):
        mapping = equation.params["grid_mapping"]
        lengths = listed[len(found)] if mapping.num_dynamic_grid_bounds else ()
        static = [size for size in mapping.grid if isinstance(size, int)]
        assert len(static) + len(lengths) == len(mapping.grid), mapping.grid
        found.append(int(np.prod([*static, *lengths])) // HEADS)
    return tuple(found)


def tokamax_steps(mask, reduction):
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    config = kernel.SplashConfig(**dict.fromkeys(names, BLOCK), dq_reduction_steps=reduction)
    attend = kernel.make_splash_mha_single_device(mask, config=config)
    lists = [info.num_active_blocks for info in (attend.fwd_mask_info, attend.dkv_mask_info)]
    return steps(attend, [() if length is None else np.asarray(length) for length in lists])


names = [f"block_{side}{ending}" for side in ("q", "kv") for ending in ("", "_dkv", "_dq")]
blocks = jax_kernel.BlockSizes(**dict.fromkeys([*names, "block_kv_compute", "block_kv_dkv_compute"], BLOCK))
windowed = jax_masks.MultiHeadMask([jax_masks.LocalMask(SHAPE, (BLOCK, 0), 0)] * HEADS)
jax_splash = jax_kernel.make_splash_mha(windowed, head_shards=1, q_seq_shards=1, block_sizes=blocks)
assert kernel.SplashConfig.get_default().dq_reduction_steps is None
seen = {
    "tokamax, window": (tokamax_steps(masks.LocalMask(SHAPE, (BLOCK, 0), 0), None), (31, 256)),
    "tokamax, window, dq_reduction_steps=3": (tokamax_steps(masks.LocalMask(SHAPE, (BLOCK, 0), 0), 3), (31, 31)),
    "tokamax, causal": (tokamax_steps(masks.CausalMask(SHAPE), None), (136, 256)),
    "tokamax, causal, dq_reduction_steps=3": (tokamax_steps(masks.CausalMask(SHAPE), 3), (136, 136)),
    "JAX, window": (steps(jax_splash), (32, 32, 32)),
}
for name, (found, expected) in seen.items():
    print(f"{name}: steps of a head, forward {found[0]}, backward {' and '.join(map(str, found[1:]))}")
    assert found == expected, found
print("tokamax", metadata.version("tokamax"), "jax", jax.__version__)
PY
