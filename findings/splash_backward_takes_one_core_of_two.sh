#!/usr/bin/env bash
# A v5p chip shows itself as one device with two cores, which share the steps of a kernel along a grid dimension that the kernel
# declares "parallel". JAX's splash attention declares its heads so in the forward pass, and nothing in the backward pass: of
# 4 heads a core's forward code walks 2, while its code for dQ, and for dK and dV, walks all 4. The same call under jax.vmap
# over a batch of 2 is shared, forward and backward, for the batch is a "parallel" dimension of its own; over a batch of 1 it is
# not. On v6e, whose chip has one core, forward code walks all 4 heads.
# Seen with jax 0.10.2 and libtpu 0.0.42.1, in the bounds of the loops that libtpu writes when it compiles for a TPU that is not
# there: nothing is run. So on v5p one sequence at a time, as in a scan over sequences, leaves the second core nothing to do in
# the backward pass, and a time measured so is not that of a batch.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "jax==0.10.2" "jaxlib==0.10.2" "libtpu==0.0.42.1"
cat > "$folder/bounds.py" <<'PY'
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

topology, batch, folder = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
HEADS, LENGTH, WIDTH, BLOCK = 4, 1024, 128, 512
mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((LENGTH, LENGTH))] * HEADS)
names = [f"block_{side}{ending}" for side in ("q", "kv") for ending in ("", "_dkv", "_dq")]
blocks = splash_attention_kernel.BlockSizes(**dict.fromkeys([*names, "block_kv_compute", "block_kv_dkv_compute"], BLOCK))
attend = splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=blocks)
attend = jax.vmap(attend) if batch else attend
device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
shape = (batch, HEADS, LENGTH, WIDTH) if batch else (HEADS, LENGTH, WIDTH)
array = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))
jax.jit(lambda q, k, v, d_out: jax.vjp(attend, q, k, v)[1](d_out)).lower(*[array] * 4).compile()

found = {}
for path in folder.glob("*-final_bundles.txt"):
    kernel = re.search(r"splash_mha_(fwd|dq|dkv)", path.name)
    bounds = set(re.findall(r"^iteration_bounds: \(([\d, ]+)\)", path.read_text(), re.MULTILINE))
    if kernel and bounds:
        [text] = bounds
        found[kernel[1]] = tuple(int(bound) for bound in text.split(","))
grids = {"fwd": (HEADS, 2, 2), "dq": (HEADS, 2, 2), "dkv": (2, HEADS, 2)}
whole = {name: (batch, *grid) if batch else grid for name, grid in grids.items()}
print(f"{device.device_kind}, {f'vmap over {batch}' if batch else 'no vmap'}: a core's bounds " + ", ".join(
    f"{name} {found[name]} of {whole[name]}" for name in whole
))
half = {"fwd": (2, 2, 2), **{name: grids[name] for name in ("dq", "dkv")}}
expected = {
    ("v5:2x2x1", 0): half,
    ("v5:2x2x1", 1): half,
    ("v5:2x2x1", 2): {name: (1, *grid) for name, grid in grids.items()},
    ("v6e:2x2x1", 0): grids,
}[topology, batch]
assert found == expected, found
PY
compiled() {
    local dumped
    dumped=$(mktemp -d -p "$folder")
    LIBTPU_INIT_ARGS="--xla_jf_dump_to=$dumped --xla_jf_dump_llo_pass_label_regex=final.*" TPU_SKIP_MDS_QUERY=1 \
        ALLOW_MULTIPLE_LIBTPU_LOAD=1 JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/bounds.py" "$1" "$2" "$dumped"
}
for batch in 0 1 2; do
    compiled v5:2x2x1 $batch
done
compiled v6e:2x2x1 0
echo "jax 0.10.2, libtpu 0.0.42.1"
