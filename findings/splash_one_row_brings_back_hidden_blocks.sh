#!/usr/bin/env bash
# Splash attention leaves out the blocks of a mask that are hidden: a window of 512 over 8192 tokens in blocks of 512 has 31
# visible blocks, and a kernel walks 32 steps for each head. What it walks is a rectangle, as wide as the row of blocks that
# sees most. So a causal mask, whose last row sees every block, walks 256 steps for 136 visible blocks. If in the same window
# the first token alone sees every key, 46 blocks are visible and 256 steps are walked, forward and for dQ, while dK and dV walk
# 48. And if one of 4 heads has no window, all 4 walk 256. A step over a hidden block computes nothing, but it is a step of the
# grid, and counting visible blocks, or the work of the mask, does not tell how many there are.
# Seen with jax 0.10.2 in the grids of the traced kernels; nothing is run or timed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "jaxlib==0.10.2"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask as masks

HEADS, LENGTH, WIDTH, BLOCK = 4, 8192, 128, 512
names = [f"block_{side}{ending}" for side in ("q", "kv") for ending in ("", "_dkv", "_dq")]
blocks = splash_attention_kernel.BlockSizes(**dict.fromkeys([*names, "block_kv_compute", "block_kv_dkv_compute"], BLOCK))


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


def steps(by_head):
    """Steps of a head by kernel."""
    attend = splash_attention_kernel.make_splash_mha(
        masks.MultiHeadMask(by_head), head_shards=1, q_seq_shards=1, block_sizes=blocks
    )
    array = jax.ShapeDtypeStruct((HEADS, LENGTH, WIDTH), jnp.bfloat16)
    traced = jax.make_jaxpr(lambda q, k, v, d_out: jax.vjp(attend, q, k, v)[1](d_out))(*[array] * 4)
    found = {}
    for equation in kernels(traced.jaxpr):
        kernel = re.search(r"splash_mha_(fwd|dq|dkv)", str(equation.params))[1]
        found[kernel] = int(np.prod(equation.params["grid_mapping"].grid)) // HEADS
    return tuple(found[kernel] for kernel in ("fwd", "dq", "dkv"))


def visible(mask):
    rows = (mask[start : start + BLOCK, :] for start in range(0, LENGTH, BLOCK))
    return sum(int(row.reshape(BLOCK, -1, BLOCK).any(axis=(0, 2)).sum()) for row in rows)


shape = (LENGTH, LENGTH)
window, full = masks.LocalMask(shape, (BLOCK, 0), 0), masks.FullMask(shape)
first = masks.NumpyMask(np.arange(LENGTH)[:, None] + np.zeros(LENGTH, int) == 0)
seen = {
    "window of 512": ([window] * HEADS, (32, 32, 32)),
    "causal": ([masks.CausalMask(shape)] * HEADS, (256, 256, 256)),
    "window, the first token sees every key": ([masks.LogicalOr(window, first)] * HEADS, (256, 256, 48)),
    "window, but one head of 4 without": ([window] * (HEADS - 1) + [full], (256, 256, 256)),
}
for name, (by_head, expected) in seen.items():
    found = steps(by_head)
    shown = ", ".join(f"{kernel} {count}" for kernel, count in zip(("forward", "dq", "dkv"), found))
    print(f"{name}: {visible(by_head[0])} visible blocks in the first head, steps of each head: {shown}")
    assert found == expected, found
assert [visible(by_head[0]) for by_head, _ in seen.values()] == [31, 136, 46, 31]
print("jax", jax.__version__)
PY
