"""Blocks and other tunables of `pallas_flash`, and what is wrong with some."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import final

from kernelry.errors import ConfigError
from kernelry.plugin import Refusal, RefusalCode, Request, Tiling
from kernelry_gpu_pallas.blocks import SMALLEST_BLOCK, power_of_two, problems
from kernelry_gpu_pallas.generations import AMPERE, BLACKWELL, HOPPER, multiplies_as
from kernelry_gpu_pallas.pallas_flash.shared_memory import needs
from kernelry_gpu_pallas.shared_memory import available

_FORWARD = ((128, 64), (128, 128), (64, 64), (128, 32), (64, 32), (32, 32), (16, 16))
"""Elements; block_q and block_kv of the search space."""

_BACKWARD = ((128, 32), (64, 64), (64, 32), (32, 32), (32, 16), (16, 16))
"""Elements; of the tile that stays and the tile that comes and goes."""

_STAGES = (3, 2, 1)

_WIDE = 128
"""Elements; from this head dim on eight warps share what four would have to spill."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Tiles:
    """The tiles that are the default where they fit.

    Args:
      forward: block_q, block_kv, warps, and stages at most.
      backward: slots of the tile that stays, of the one that comes and goes, warps, and stages at most.
    """

    forward: tuple[int, int, int, int]
    backward: tuple[int, int, int, int]


_HALF: dict[int, dict[int, _Tiles]] = {
    AMPERE: {
        128: _Tiles((128, 64, 8, 3), (64, 64, 4, 3)),
        256: _Tiles((128, 64, 8, 3), (64, 64, 8, 3)),
        384: _Tiles((128, 64, 8, 2), (64, 64, 8, 2)),
        512: _Tiles((64, 64, 8, 2), (32, 64, 8, 2)),
    },
    HOPPER: {
        128: _Tiles((128, 64, 4, 3), (64, 64, 4, 3)),
        256: _Tiles((128, 64, 8, 3), (128, 32, 8, 3)),
        384: _Tiles((128, 64, 8, 3), (64, 32, 8, 2)),
        512: _Tiles((128, 64, 8, 2), (64, 32, 8, 3)),
    },
    BLACKWELL: {
        128: _Tiles((128, 64, 8, 3), (128, 32, 4, 3)),
        256: _Tiles((128, 64, 8, 3), (64, 64, 8, 3)),
        384: _Tiles((128, 64, 8, 3), (64, 32, 8, 1)),
        512: _Tiles((128, 64, 8, 2), (64, 16, 8, 1)),
    },
}
"""Of bfloat16 and float16, by compute capability and the columns of keys and values together, each rounded up to a
power of two: ptxas spills no register, and products take the fastest path of the generation. Not measured."""

_FLOAT32 = {
    128: _Tiles((64, 32, 8, 2), (32, 32, 8, 2)),
    256: _Tiles((32, 32, 8, 2), (32, 16, 8, 2)),
    384: _Tiles((16, 32, 8, 1), (16, 16, 8, 1)),
    512: _Tiles((16, 32, 4, 1), (16, 16, 8, 1)),
}
"""The same of float32, of every generation; each kernel spills 512 bytes of a thread at most, most of them none."""

_TENSOR_ROWS, _TENSOR_COLUMNS = 128, 256
"""Of the gradients of keys and values that a Blackwell accumulates in its tensor memory. It has 512 columns; for head
dims of 192, rounded up to 256, and 128 the compiler asks for 640, and 128 and 128 fit (found with jax 0.10)."""


def search_space(request: Request) -> tuple[Tiling, ...]:
    """Tilings that fit the shared memory of the request's device, the best guess first. None of them is measured."""
    tiles = _default(request)
    forward = _first_fits(
        request, [_of_forward(request, *each) for each in (*_fewer(tiles.forward), *_every(request, _FORWARD))]
    )
    backward = _first_fits(
        request, [_of_backward(request, *each) for each in (*_fewer(tiles.backward), *_every(request, _BACKWARD))]
    )
    best = {**forward[0], **backward[0]}
    every = [{**best, **part} for part in (*forward, *backward)]
    return tuple(dict.fromkeys(Tiling.of(**values) for values in (best, *every)))


def _fewer(tile: tuple[int, int, int, int]) -> Iterator[tuple[int, int, int, int]]:
    """A tile with as many stages, and with fewer."""
    one, other, warps, most = tile
    return ((one, other, warps, stages) for stages in range(most, 0, -1))


def _every(request: Request, blocks: tuple[tuple[int, int], ...]) -> Iterator[tuple[int, int, int, int]]:
    """Tiles of all blocks with all stages."""
    return ((*each, _warps(request, each[0]), stages) for each in blocks for stages in _STAGES)


def _default(request: Request) -> _Tiles:
    """The tiles of a device's generation; of one that is not known those of the least, which any serves."""
    columns = power_of_two(request.head_dim) + power_of_two(request.value_dim)
    generation = max((known for known in _HALF if known <= multiplies_as(request)), default=AMPERE)
    table = _FLOAT32 if request.dtype == "float32" else _HALF[generation]
    return table[min(most for most in table if columns <= most)]


def refusals(request: Request) -> Iterator[Refusal]:
    """Devices on which not even the smallest tiles surely fit."""
    smallest = _smallest(request)
    if request.is_interpreted or _fits(request, smallest):
        return
    needed = max(need.most for need in needs(request, smallest).values())
    detail = (
        f"tiles of {SMALLEST_BLOCK} × {SMALLEST_BLOCK}, the smallest, may take {needed} bytes of shared memory "
        f"> {available(request)} of {request.target}"
    )
    yield Refusal(RefusalCode.TILING, detail, "use bfloat16, or smaller heads")


def _smallest(request: Request) -> dict[str, int]:
    blocks = SMALLEST_BLOCK, SMALLEST_BLOCK
    return {**_of_forward(request, *blocks, 4, 1), **_of_backward(request, *blocks, 4, 1)}


def _first_fits(request: Request, candidates: list[dict[str, int]]) -> list[dict[str, int]]:
    """Of the candidates that fit, for each pair of blocks the one with most stages; at least one."""
    smallest = _smallest(request)
    found: dict[tuple[int, ...], dict[str, int]] = {}
    for values in candidates:
        blocks = tuple(size for name, size in values.items() if name.startswith("block"))
        if blocks not in found and _fits(request, {**smallest, **values}):
            found[blocks] = values
    return list(found.values()) or candidates[-1:]


def _fits(request: Request, values: Mapping[str, int]) -> bool:
    in_shared = all(need.most <= available(request) for need in needs(request, values).values())
    return in_shared and not any(_tensor_memory(request, values))


def _of_forward(request: Request, block_q: int, block_kv: int, warps: int, stages: int) -> dict[str, int]:
    return {
        "block_q": _within(block_q, request.q_len),
        "block_kv": _within(block_kv, request.kv_len),
        "num_warps": warps,
        "num_stages": stages,
    }


def _of_backward(request: Request, stay: int, move: int, warps: int, stages: int) -> dict[str, int]:
    return {
        "block_q_dq": _within(stay, request.q_len),
        "block_kv_dq": _within(move, request.kv_len),
        "block_q_dkv": _within(move, request.q_len),
        "block_kv_dkv": _within(stay, request.kv_len),
        "num_warps_backward": warps,
        "num_stages_backward": stages,
    }


def _warps(request: Request, block: int) -> int:
    return 8 if block >= 128 and power_of_two(max(request.head_dim, request.value_dim)) >= _WIDE else 4


def _within(block: int, length: int) -> int:
    """A block no longer than its length needs: a power of two, at least 16."""
    return max(SMALLEST_BLOCK, min(block, power_of_two(length)))


def check(request: Request, tiling: Tiling) -> None:
    """Raises where a tiling cannot be compiled.

    Raises:
      ConfigError: a block or a number of warps is not a power of two, a block is smaller than 16, a number is below 1,
        or the blocks take more shared memory than the device has.
    """
    values = dict(tiling.values)
    for problem in (*problems("pallas_flash", tiling), *_memory(request, values), *_tensor_memory(request, values)):
        raise ConfigError(f"tiling: {problem}")


def _tensor_memory(request: Request, values: Mapping[str, int]) -> Iterator[str]:
    rows = values["block_kv_dkv"]
    if request.is_interpreted or request.dtype == "float32" or multiplies_as(request) < BLACKWELL:
        return
    columns = power_of_two(request.head_dim) + power_of_two(request.value_dim)
    if request.gradients and rows >= _TENSOR_ROWS and columns > _TENSOR_COLUMNS:
        yield (
            f"block_kv_dkv={rows} of pallas_flash accumulates {columns} columns in tensor memory of {request.target}, "
            f"which has room for {_TENSOR_COLUMNS} besides the rest; set block_kv_dkv=64"
        )


def _memory(request: Request, values: Mapping[str, int]) -> Iterator[str]:
    if request.is_interpreted:
        return
    for end, need in needs(request, values).items():
        if need.least > available(request):
            blocks = f"block_q{end}={values[f'block_q{end}']}, block_kv{end}={values[f'block_kv{end}']}"
            yield (
                f"{blocks} of pallas_flash take at least {need.least} bytes of shared memory > {available(request)} "
                f"of {request.target}; set smaller blocks or fewer stages"
            )
