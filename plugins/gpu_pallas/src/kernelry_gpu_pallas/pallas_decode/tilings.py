"""Blocks and other tunables of `pallas_decode`, and what is wrong with some."""

from __future__ import annotations

from collections.abc import Iterator

from kernelry.errors import ConfigError
from kernelry.plugin import Refusal, RefusalCode, Request, Tiling
from kernelry_gpu_pallas.blocks import SMALLEST_BLOCK, power_of_two, problems
from kernelry_gpu_pallas.pallas_decode.shared_memory import need
from kernelry_gpu_pallas.shared_memory import available

_BLOCKS = (64, 128, 32, SMALLEST_BLOCK)
"""Slots; blocks of the search space, the default first where it fits."""

_WIDE_BLOCKS = (32, 64, 128, SMALLEST_BLOCK)
"""Slots; the same for wide keys and values of float32, of which larger blocks spill about 1000 bytes of a thread."""

_WIDE = 256
"""Columns of keys and values together, each rounded up to a power of two."""

_STAGES = (3, 2, 1)

_PROGRAMS = 264
"""Programs that keep a device busy: two for each multiprocessor of an H100. Not measured."""

_LEAST_BLOCKS = 4
"""Blocks that a part of the keys has at least."""


def search_space(request: Request) -> tuple[Tiling, ...]:
    """Tilings that fit the shared memory of the request's device, each block with most stages; at least one."""
    found: dict[int, Tiling] = {}
    for block in _blocks(request):
        for stages in _STAGES:
            tiling = _tiling(request, block, stages)
            if block not in found and need(request, tiling).most <= available(request):
                found[block] = tiling
    return tuple(found.values()) or (_smallest(request),)


def _blocks(request: Request) -> tuple[int, ...]:
    columns = power_of_two(request.head_dim) + power_of_two(request.value_dim)
    return _WIDE_BLOCKS if request.dtype == "float32" and columns > _WIDE else _BLOCKS


def refusals(request: Request) -> Iterator[Refusal]:
    """Devices on which not even the smallest block surely fits."""
    needed = need(request, _smallest(request)).most
    if request.is_interpreted or needed <= available(request):
        return
    detail = (
        f"blocks of {SMALLEST_BLOCK} slots, the smallest, may take {needed} bytes of shared memory for "
        f"q_len={request.q_len} × {request.groups} query heads per key head of {request.dtype} > {available(request)} "
        f"of {request.target}"
    )
    yield Refusal(RefusalCode.TILING, detail, "use bfloat16, smaller heads, or fewer queries at once")


def check(request: Request, tiling: Tiling) -> None:
    """Raises where a tiling cannot be compiled.

    Raises:
      ConfigError: the block or the number of warps is not a power of two, the block is smaller than 16, a number is
        below 1, or the block takes more shared memory than the device has.
    """
    for problem in (*problems("pallas_decode", tiling), *_memory(request, tiling)):
        raise ConfigError(f"tiling: {problem}")


def _memory(request: Request, tiling: Tiling) -> Iterator[str]:
    if request.is_interpreted:
        return
    least = need(request, tiling).least
    if least > available(request):
        yield (
            f"block_kv={tiling['block_kv']}, num_stages={tiling['num_stages']} of pallas_decode take at least {least} "
            f"bytes of shared memory > {available(request)} of {request.target}; set a smaller block or fewer stages"
        )


def _smallest(request: Request) -> Tiling:
    return _tiling(request, SMALLEST_BLOCK, 1)


def _tiling(request: Request, block: int, stages: int) -> Tiling:
    wanted = -(-_PROGRAMS // max(1, request.batch * request.kv_heads))
    most = max(1, -(-request.kv_len // block) // _LEAST_BLOCKS)
    return Tiling.of(block_kv=block, splits=min(wanted, most), num_warps=4, num_stages=stages)
