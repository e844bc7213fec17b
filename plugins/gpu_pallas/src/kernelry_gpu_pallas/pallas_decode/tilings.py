"""Blocks and other tunables of `pallas_decode`, and what is wrong with some."""

from __future__ import annotations

from collections.abc import Iterator

from kernelry.errors import ConfigError
from kernelry.plugin import Refusal, RefusalCode, Request, Tiling
from kernelry_gpu_pallas.blocks import SMALLEST_BLOCK, power_of_two, problems
from kernelry_gpu_pallas.generations import BLACKWELL, multiplies_as
from kernelry_gpu_pallas.pallas_decode.columns import has_value_in_key
from kernelry_gpu_pallas.pallas_decode.shared_memory import need
from kernelry_gpu_pallas.shared_memory import available

_BLOCKS = (64, 128, 32, SMALLEST_BLOCK)
"""Slots; blocks of the search space, the default first where it fits."""

_WIDE_BLOCKS = (32, 64, 128, SMALLEST_BLOCK)
"""Slots; the same for wide keys and values of float32, of which larger blocks spill about 1000 bytes of a thread."""

_SMALL_BLOCKS_WITH_VALUES = (SMALLEST_BLOCK, 32, 64)
_BLOCKS_WITH_VALUES = (32, SMALLEST_BLOCK, 64)
_LARGE_BLOCKS_WITH_VALUES = (64, 32, SMALLEST_BLOCK)
"""Slots; the same for keys that hold the values: the more registers the rest of a program takes, the smaller. With
what is first, no register is spilled in bfloat16 and float16 under lengths."""

_WIDE = 256
"""Columns of keys and values together, each rounded up to a power of two."""

_STAGES = (3, 2, 1)

_PROGRAMS = 264
"""Programs that keep a device busy: two for each multiprocessor of an H100. Not measured."""

_LEAST_BLOCKS = 4
"""Blocks that a part of the keys has at least."""

_PROGRAMS_WITH_VALUES = 132
"""The same for keys that hold the values: a multiprocessor has registers for one. Not measured."""

_LEAST_SLOTS_WITH_VALUES = 256
"""Slots that a part of such keys has at least: the sums of 64 rows of 512 columns, written and read once, are as many
bytes as 227 slots of 576 columns in bfloat16."""

_MOST_ROWS_OF_TILE = 64
"""Rows of a tile of queries: of 64, eight warps keep sums of 512 columns in registers; of 128, no device can."""


def search_space(request: Request) -> tuple[Tiling, ...]:
    """Tilings that fit the shared memory of the request's device, each block with most stages; at least one."""
    found: dict[tuple[int, int | None], Tiling] = {}
    for rows in _rows(request):
        for block in _blocks(request, rows):
            for stages in _STAGES:
                tiling = _tiling(request, block, stages, rows)
                if (block, rows) not in found and need(request, tiling).most <= available(request):
                    found[block, rows] = tiling
    return tuple(found.values()) or (_smallest(request),)


def _rows(request: Request) -> tuple[int | None, ...]:
    """Rows of a tile of queries, the default first, where they are split among programs: with values in the keys."""
    if not has_value_in_key(request):
        return (None,)
    most = _MOST_ROWS_OF_TILE
    if request.dtype == "float32":
        most = SMALLEST_BLOCK  # more spill thousands of bytes of a thread
    elif request.kv_quantization is not None and multiplies_as(request) < BLACKWELL:
        most = 32  # the conversion takes the registers of the other rows
    rows = min(most, max(SMALLEST_BLOCK, power_of_two(request.q_len * request.groups)))
    return tuple(each for each in (64, 32, SMALLEST_BLOCK) if each <= rows)


def _blocks(request: Request, rows: int | None) -> tuple[int, ...]:
    if rows is not None:
        spares = multiplies_as(request) >= BLACKWELL and request.kv_quantization is None
        in_pages = request.page_size is not None and not spares  # whose addresses take registers
        if request.dtype == "float32" or (rows == _MOST_ROWS_OF_TILE and in_pages):
            return _SMALL_BLOCKS_WITH_VALUES
        return _LARGE_BLOCKS_WITH_VALUES if rows == SMALLEST_BLOCK else _BLOCKS_WITH_VALUES
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
    return _tiling(request, SMALLEST_BLOCK, 1, SMALLEST_BLOCK if has_value_in_key(request) else None)


def _tiling(request: Request, block: int, stages: int, rows: int | None) -> Tiling:
    if rows is not None:
        return _with_values(request, block, stages, rows)
    wanted = -(-_PROGRAMS // max(1, request.batch * request.kv_heads))
    most = max(1, -(-request.kv_len // block) // _LEAST_BLOCKS)
    return Tiling.of(block_kv=block, splits=min(wanted, most), num_warps=4, num_stages=stages)


def _with_values(request: Request, block: int, stages: int, rows: int) -> Tiling:
    """Of keys that hold the values."""
    tiles = -(-request.q_len * request.groups // rows)
    wanted = -(-_PROGRAMS_WITH_VALUES // max(1, request.batch * request.kv_heads * tiles))
    most = max(1, request.kv_len // max(_LEAST_SLOTS_WITH_VALUES, _LEAST_BLOCKS * block))
    few = request.dtype == "float32" or (rows == SMALLEST_BLOCK and request.kv_quantization is None)
    return Tiling.of(
        block_rows=rows, block_kv=block, splits=min(wanted, most), num_warps=4 if few else 8, num_stages=stages
    )
