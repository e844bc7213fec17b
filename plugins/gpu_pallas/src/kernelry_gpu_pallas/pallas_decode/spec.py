"""What `pallas_decode` declares."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp

from kernelry.plugin import (
    Capabilities,
    Dims,
    Environment,
    Feature,
    KernelSpec,
    Mode,
    PositionKind,
    Refusal,
    RefusalCode,
    Request,
    Statistic,
    Tiling,
    Tolerance,
)
from kernelry_gpu_pallas.blocks import SMALLEST_BLOCK, power_of_two
from kernelry_gpu_pallas.shared_memory import available
from kernelry_gpu_pallas.tile_masks import ATOMS, mask_refusals

_MOST_ROWS = 64
"""T · G, the rows that read one key/value head; their sums stay in registers."""

_BLOCKS = (64, 128, 32, SMALLEST_BLOCK)
"""Slots; blocks of the search space, the default first."""

_OTHER_BYTES = 4096
"""Of shared memory, for what is small."""

_PROGRAMS = 264
"""Programs that keep a device busy: two for each multiprocessor of an H100. Not measured."""

_LEAST_BLOCKS = 4
"""Blocks that a part of the keys has at least."""


def _refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    return (*mask_refusals(request.mask), *_rows(request))


def _rows(request: Request) -> Iterator[Refusal]:
    rows = request.q_len * request.groups
    if rows > _MOST_ROWS:
        detail = f"q_len={request.q_len} × {request.groups} query heads per key head = {rows} rows > {_MOST_ROWS}"
        yield Refusal(RefusalCode.SEQUENCE_LENGTH, detail, "attend to a prompt with mode='prefill'")


def _tilings(request: Request) -> tuple[Tiling, ...]:
    fitting = ((block, _stages(request, block)) for block in _BLOCKS)
    found = tuple(_tiling(request, block, stages) for block, stages in fitting if stages)
    return found or (_tiling(request, _BLOCKS[-1], 1),)


def _stages(request: Request, block: int) -> int:
    """The most stages of the pipeline of loads, at most three, of which the tiles surely fit; 0 where none do."""
    itemsize = jnp.dtype(request.dtype).itemsize
    widths = [power_of_two(width) for width in (request.head_dim, request.value_dim)]
    rows = max(SMALLEST_BLOCK, power_of_two(request.q_len * request.groups))
    twice = 2 if request.dtype == "float32" else 1  # multiplied in three parts, held apart
    stay = twice * rows * (widths[0] + block) * itemsize
    moving = block * sum(widths) * itemsize
    return max(0, min(3, (available(request) - stay - _OTHER_BYTES) // moving))


def _tiling(request: Request, block: int, stages: int) -> Tiling:
    wanted = -(-_PROGRAMS // max(1, request.batch * request.kv_heads))
    most = max(1, -(-request.kv_len // block) // _LEAST_BLOCKS)
    return Tiling.of(block_kv=block, splits=min(wanted, most), num_warps=4, num_stages=stages)


def _signature(request: Request) -> tuple[str, ...]:
    return ("kernelry.pallas_decode",) if request.is_interpreted else ("__gpu$xla.gpu.triton", "kernelry.pallas_decode")


PALLAS_DECODE = KernelSpec(
    name="pallas_decode",
    capabilities=Capabilities(
        platforms=frozenset({"gpu"}),
        interpret=True,
        minimum_generation=(("gpu", 80),),
        modes=frozenset({Mode.DECODE}),
        dtypes=frozenset({"float16", "bfloat16", "float32"}),
        head_dims=Dims(minimum=16, maximum=256),
        split_head_dim=True,
        grouped_heads=True,
        unequal_lengths=True,
        atoms=ATOMS,
        positions=frozenset(PositionKind),
        features=frozenset({Feature.SCALE, Feature.SOFT_CAP, Feature.PRECISION, Feature.MAX_LOGITS}),
        statistics=frozenset({Statistic.MAX_SUM}),
        normalizations=frozenset({"softmax", "softmax_max_sum"}),
        empty_rows=True,
        clean_hidden_slots=True,
        kv_quantizations=frozenset({"int8:head_dim", "int8:heads_and_head_dim"}),
        pages=True,
        tolerances=(
            Tolerance("float32", 2e-6, 2e-5, "float32 products and sums, in another order than the oracle's"),
            Tolerance("bfloat16", 1e-2, 4e-2, "probabilities and output are rounded to 8 bits of mantissa"),
            Tolerance("float16", 2e-3, 1e-2, "probabilities and output are rounded to 11 bits of mantissa"),
        ),
    ),
    load="kernelry_gpu_pallas.pallas_decode.kernel:PallasDecodeKernel",
    refusals=_refusals,
    tilings=_tilings,
    signature=_signature,
    summary="decode in Pallas for NVIDIA GPUs, keys split among programs: arrays and pages, int8 as it is, any mask",
)
