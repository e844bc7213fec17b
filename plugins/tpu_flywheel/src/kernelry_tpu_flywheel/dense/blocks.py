"""Blocks of flywheel's passes, the vendor's own choice first."""

from __future__ import annotations

from collections.abc import Iterator

from kernelry.errors import ConfigError
from kernelry.plugin import Request, Tiling, round_up
from kernelry_tpu_flywheel.dense.geometry import Geometry
from kernelry_tpu_flywheel.lanes import LANES

_FORWARD, _BACKWARD = (2048, 1024, 512, 256, 128), (1024, 512, 256, 128)
"""Rows or keys of a block, in the order in which the vendor tries them."""

_KEYS_AT_ONCE, _KEYS_AT_ONCE_OF_WINDOWS = (512, 384, 256, 128), (256, 128)
"""Keys of a block that are multiplied at once. Of windows fewer, unless heads and the window are wide."""

_KEYS_AT_ONCE_BACKWARD = (256, 128)
_ROWS_AT_ONCE = (256, 128)

_MOST_OF_PACKED_WINDOWS = 1024

SEGMENTS = 128
"""Runs of equal ids that a packed row may hold, unless a tiling says another number."""


def tilings(request: Request) -> tuple[Tiling, ...]:
    """The search space: the vendor's choice, then other cuts of the forward pass, then of the backward pass."""
    geometry = Geometry.of(request)
    lengths = _lengths(request, geometry)
    forward = list(dict.fromkeys(_forward(request, geometry, lengths)))
    backward = list(dict.fromkeys(_backward(lengths)))
    extra = {"max_segments": min(SEGMENTS, request.q_len)} if geometry.packed else {}
    values = [{**_named(_OF_FORWARD, blocks), **_named(_OF_BACKWARD, backward[0])} for blocks in forward]
    if request.gradients:
        values += [{**values[0], **_named(_OF_BACKWARD, blocks)} for blocks in backward[1:]]
    return tuple(Tiling.of(**found, **extra) for found in values)


_OF_FORWARD = ("block_q", "block_kv", "block_q_compute", "block_kv_compute")
_OF_BACKWARD = ("block_q_bwd", "block_kv_bwd", "block_q_compute_bwd", "block_kv_compute_bwd")


def is_cut_as(request: Request, length: int) -> bool:
    """Whether the first of the search space is that of so many queries and keys, in both passes."""
    geometry = Geometry.of(request)
    mine, theirs = _lengths(request, geometry), (length, length)
    alike = next(_forward(request, geometry, mine)) == next(_forward(request, geometry, theirs))
    return alike and next(_backward(mine)) == next(_backward(theirs))


def forward_blocks(request: Request, tiling: Tiling) -> tuple[int, int, int, int]:
    """Queries and keys of a block of the forward pass, and how many of each are multiplied at once.

    Raises:
      ConfigError: a block does not divide its length, or the part multiplied at once does not divide the block.
    """
    block_q, block_kv, rows, keys = found = tuple(tiling[name] for name in _OF_FORWARD)
    _check(_OF_FORWARD, found, _lengths(request, Geometry.of(request)))
    if block_q < 2 * rows or block_q % rows or rows % 16:
        raise ConfigError(
            f"tiling: block_q_compute={rows} of flywheel is not a multiple of 16 that divides block_q={block_q} into "
            "two or more parts"
        )
    return block_q, block_kv, rows, keys


def backward_blocks(request: Request, tiling: Tiling) -> tuple[int, int, int, int]:
    """The same of the backward pass.

    Raises:
      ConfigError: as for the forward pass.
    """
    block_q, block_kv, rows, keys = found = tuple(tiling[name] for name in _OF_BACKWARD)
    _check(_OF_BACKWARD, found, _lengths(request, Geometry.of(request)))
    if block_q % rows or rows % LANES:
        raise ConfigError(
            f"tiling: block_q_compute_bwd={rows} of flywheel is not a multiple of {LANES} that divides "
            f"block_q_bwd={block_q}"
        )
    return block_q, block_kv, rows, keys


def _check(names: tuple[str, ...], blocks: tuple[int, ...], lengths: tuple[int, int]) -> None:
    for name, block, side, length in zip(names, blocks, ("q_len", "kv_len"), lengths, strict=False):
        if block % LANES or length % block:
            raise ConfigError(
                f"tiling: {name}={block} of flywheel is not a multiple of {LANES} that divides {side}, padded to "
                f"{length}"
            )
    if blocks[3] % LANES or blocks[1] % blocks[3]:
        raise ConfigError(
            f"tiling: {names[3]}={blocks[3]} of flywheel is not a multiple of {LANES} that divides "
            f"{names[1]}={blocks[1]}"
        )


def _named(names: tuple[str, ...], blocks: tuple[int, ...]) -> dict[str, int]:
    return dict(zip(names, blocks, strict=True))


def _lengths(request: Request, geometry: Geometry) -> tuple[int, int]:
    """The lengths that blocks divide: of packed rows, those of all rows one after another."""
    if geometry.packed:
        total = round_up(request.batch * request.q_len, LANES)
        return total, total
    return geometry.rows, geometry.keys


def _forward(request: Request, geometry: Geometry, lengths: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    banded = geometry.is_window and not geometry.packed
    most = _most(request, geometry)
    for size_q, size_kv in ((2048, 2048), (1024, 1024), (2048, 1024), (1024, 2048), (512, 512)):
        block_q = _block(lengths[0], _FORWARD, min(size_q, most))
        near = 1 << (block_q - 1).bit_length() if banded else most
        block_kv = _block(lengths[1], _FORWARD, min(size_kv, most, near))
        narrow = banded and (request.head_dim <= LANES or _reach(geometry) < block_q + block_kv - 1)
        keys = _first(_KEYS_AT_ONCE_OF_WINDOWS if narrow else _KEYS_AT_ONCE, block_kv)
        rows = _first(_ROWS_AT_ONCE, block_q)
        yield block_q, block_kv, rows if rows < block_q else rows // 2, keys


def _most(request: Request, geometry: Geometry) -> int:
    """What a block may have: of packed rows little more than the longest segment, and less under a window."""
    if not geometry.packed:
        return _FORWARD[0]
    longest = max(LANES, 1 << (request.q_len - 1).bit_length())
    return min(longest, _MOST_OF_PACKED_WINDOWS if geometry.is_window else _FORWARD[0])


def _reach(geometry: Geometry) -> int:
    left = geometry.window[0]
    assert left is not None
    return left


def _backward(lengths: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    for most_q, most_kv in ((1024, 1024), (512, 1024), (1024, 512), (512, 512)):
        block_q, block_kv = _block(lengths[0], _BACKWARD, most_q), _block(lengths[1], _BACKWARD, most_kv)
        yield block_q, block_kv, block_q, _first(_KEYS_AT_ONCE_BACKWARD, block_kv)


def _block(length: int, sizes: tuple[int, ...], most: int) -> int:
    """One block where it is not too long, else the largest of the sizes that divides the length."""
    if length <= min(sizes[0], most):
        return length
    return next(size for size in sizes if size <= most and length % size == 0)


def _first(sizes: tuple[int, ...], block: int) -> int:
    return next(size for size in sizes if block % size == 0)
