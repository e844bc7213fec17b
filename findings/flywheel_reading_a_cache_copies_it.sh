#!/usr/bin/env bash
# flash_attn_with_kvcache of flywheel-tpu without new keys and values writes nothing: it attends to a cache. Compiled for v6e, a
# jitted decode step that reads a cache of 64 MiB so, and returns the output alone, holds 64 MiB of temporary memory: the kernel
# returns the cache in its argument's own memory, also where nothing is appended, so XLA gives it a copy, of every page and not
# only of those in the table. A donated cache that is returned is not copied. Nor is the same pool, without being donated, by
# flash_attn_varlen_func with the same table. The documentation asks to donate the cache because it is updated.
# Seen with flywheel-tpu 0.3.0, jax 0.12.0.1 and libtpu 0.0.50.1 in the memory analysis of programs that are compiled for a TPU
# that is not there; nothing is run. So several readers of one cache, as in beam search or in scoring, cost a copy each. Needs
# Python 3.12, and is skipped where there is no python3.12.
set -euo pipefail
if ! python3.12 -c "" 2>/dev/null; then
    echo "flywheel-tpu 0.3.0 skipped: no python3.12 here"
    exit
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.12 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "flywheel-tpu==0.3.0" "jax==0.12.0.1" "jaxlib==0.12.0.1" \
    "libtpu==0.0.50.1"
TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
from importlib import metadata

import jax
import jax.numpy as jnp
from flywheel_tpu import flash_attn_varlen_func, flash_attn_with_kvcache
from jax.experimental import topologies

BATCH, HEADS, WIDTH, LENGTH, PAGE = 4, 8, 128, 4096, 128
TABLE = LENGTH // PAGE // 2  # pages of a sequence, so that half of the pool is not in use
MIB = 2**20
device = topologies.get_topology_desc("v6e:2x2x1", platform="tpu").devices[0]
placed = jax.sharding.SingleDeviceSharding(device)


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)


def contiguous(query, keys, values, lengths):
    return flash_attn_with_kvcache(query, keys, values, cache_seqlens=lengths, causal=True)[0]


def paged(query, pool, lengths, table):
    return flash_attn_with_kvcache(query, pool, None, cache_seqlens=lengths, block_table=table, causal=True)[0]


def paged_and_returned(query, pool, lengths, table):
    return flash_attn_with_kvcache(query, pool, None, cache_seqlens=lengths, block_table=table, causal=True)


def varlen(query, pool, lengths, table):
    starts = jnp.arange(BATCH + 1, dtype=jnp.int32)
    return flash_attn_varlen_func(
        query[:, 0].swapaxes(0, 1), pool, None, starts, None, 1, TABLE * PAGE, causal=True, block_table=table,
        seqused_k=lengths,
    )


query, lengths = array(BATCH, 1, HEADS, WIDTH), array(BATCH, dtype=jnp.int32)
cache = [array(BATCH, LENGTH, HEADS, WIDTH)] * 2
pages = [array(BATCH * LENGTH // PAGE, PAGE, 2 * HEADS, WIDTH), lengths, array(BATCH, TABLE, dtype=jnp.int32)]
cases = {
    "flash_attn_with_kvcache, contiguous": (contiguous, [query, *cache, lengths], (), 64),
    "flash_attn_with_kvcache, pages": (paged, [query, *pages], (), 64),
    "flash_attn_with_kvcache, pages, donated and returned": (paged_and_returned, [query, *pages], (1,), 0),
    "flash_attn_varlen_func, pages": (varlen, [query, *pages], (), 0),
}
with jax.sharding.use_abstract_mesh(jax.sharding.Mesh([device], ("x",)).abstract_mesh):
    for name, (step, arrays, donated, expected) in cases.items():
        memory = jax.jit(step, donate_argnums=donated).lower(*arrays).compile().memory_analysis()
        temporary = memory.temp_size_in_bytes / MIB
        print(f"{name}: {temporary:.1f} MiB of temporary memory, arguments {memory.argument_size_in_bytes / MIB:.0f} MiB")
        assert abs(temporary - expected) < 1, temporary
        assert round(memory.argument_size_in_bytes / MIB) == 64
print(*(f"{name} {metadata.version(name)}" for name in ("flywheel-tpu", "jax", "libtpu")))
PY
