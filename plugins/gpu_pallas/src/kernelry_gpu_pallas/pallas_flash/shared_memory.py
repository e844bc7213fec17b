"""How much shared memory the kernels take, so that a tiling that cannot fit is refused before anything is compiled.

The formulas follow what the Triton compilers of jax 0.10 and 0.12 ask for: tiles that stay are held once, tiles that
come and go once per stage of the pipeline of loads. What lies between `least` and `most` is left to the compiler.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from kernelry.plugin import Request
from kernelry_gpu_pallas.blocks import power_of_two
from kernelry_gpu_pallas.shared_memory import Need

_HOPPER, _BLACKWELL = 90, 100

_ROWS_BYTES = 4096
"""Of lse and delta of the rows of a tile, and whatever else is small."""


def needs(request: Request, tiling: Mapping[str, int]) -> dict[str, Need]:
    """What each kernel needs, by the end of the names of its blocks: none for the forward pass, `_dq`, `_dkv`."""
    found = {"": _need(request, tiling, "")}
    if request.gradients:
        found |= {end: _need(request, tiling, end) for end in ("_dq", "_dkv")}
    return found


def _need(request: Request, tiling: Mapping[str, int], end: str) -> Need:
    itemsize = jnp.dtype(request.dtype).itemsize
    block_q, block_kv = tiling[f"block_q{end}"], tiling[f"block_kv{end}"]
    stages = tiling["num_stages_backward" if end else "num_stages"]
    widths = power_of_two(request.head_dim), power_of_two(request.value_dim)
    queries = block_q * itemsize * (sum(widths) if end else widths[0])
    keys = block_kv * itemsize * sum(widths)
    stay, move = (keys, queries) if end == "_dkv" else (queries, keys)
    is_split = request.dtype == "float32"
    held = (2 if is_split else 1) * stay  # float32 is multiplied in three parts, held apart
    probabilities = (2 if is_split else 1) * block_q * block_kv * itemsize
    generation = request.target.generation or 0
    # What is certain of float32 is little: Blackwell keeps what stays elsewhere.
    least = (0 if is_split else stay) + (move if end == "_dkv" else (stages - 1) * move)
    if generation < _HOPPER:
        return Need(least, held + probabilities + max(1, stages - 1) * move + _ROWS_BYTES)
    again = 1 if end and generation >= _BLACKWELL else 0  # a second copy, turned around
    if end == "_dkv":
        return Need(least, held + probabilities + (max(2, stages - 1) + again) * move + _ROWS_BYTES)
    return Need(least, held + (stages + again) * move + _ROWS_BYTES)
