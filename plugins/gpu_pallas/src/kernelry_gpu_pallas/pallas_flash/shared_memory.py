"""How much shared memory the kernels take, so that a tiling that cannot fit is refused before anything is compiled.

The formulas follow what the Triton compilers of jax 0.10 and 0.12 ask for. Tiles that stay are held once; tiles that
come and go, those of a bias and of dense masks among them, once per stage of the pipeline of loads. What lies between
`least` and `most` is left to the compiler.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from kernelry.plugin import Request
from kernelry_gpu_pallas.blocks import power_of_two
from kernelry_gpu_pallas.generations import BLACKWELL, HOPPER, multiplies_as
from kernelry_gpu_pallas.shared_memory import Need
from kernelry_gpu_pallas.tile_masks import dense_masks

_WARP_GROUP_ROWS = 64
"""Of a tile [kv, q], from which on a warp group multiplies it, out of shared memory: one stage more is held there."""

_BIAS_BYTES = 4

_REARRANGED_BYTES = 4
"""Of a dense mask's boolean where the compiler rearranges a tile: it is an int32 meanwhile."""

_FEW_BYTES = 4096
"""Of whatever is small."""

_SLOT_BYTES = 32
"""Of lse, delta, ids and positions, for each query and key of a tile, in all stages."""


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
    generation = multiplies_as(request)
    # What is certain of float32 is little: Blackwell keeps what stays elsewhere.
    least = (0 if is_split else stay) + (move if end == "_dkv" else (stages - 1) * move)
    pairs = block_q * block_kv * _bytes_of_a_pair(request, max(1, stages - 1))
    rest = held + pairs + _FEW_BYTES + _SLOT_BYTES * (block_q + block_kv)
    if generation < HOPPER:
        return Need(least, rest + probabilities + max(1, stages - 1) * move)
    again = 1 if end and generation >= BLACKWELL else 0  # a second copy, transposed
    if end != "_dkv":
        return Need(least, rest + (stages + again) * move)
    keeps_a_stage = is_split or block_kv >= _WARP_GROUP_ROWS
    copies = (max(2, stages) if keeps_a_stage else max(2, stages - 1)) + again
    return Need(least, rest + 2 * block_q * block_kv * itemsize + copies * move)


def _bytes_of_a_pair(request: Request, copies: int) -> int:
    """Of what is read of each query and key: a bias that has a value of each, and the booleans of dense masks."""
    bias = _BIAS_BYTES if request.bias is not None and min(request.bias[2:]) > 1 else 0
    booleans = dense_masks(request.mask)
    return copies * (bias + booleans) + (_REARRANGED_BYTES if booleans else 0)
