"""What `ragged` declares."""

from __future__ import annotations

from kernelry.plugin import (
    AtomKind,
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
from kernelry_tpu_splash.lanes import LANES
from kernelry_tpu_splash.ragged.layout import block_sizes

_BLOCKS = (512, 256, 128, 1024)
"""Slots; blocks of the search space. Not measured: a TPU reads 2 MiB in the time of several steps of the grid."""

_MOST_ROWS = 256
"""T · G, the rows that read one key/value head; their sums stay in vector memory."""


def _refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    rows = request.q_len * request.groups
    found = []
    if rows > _MOST_ROWS:
        detail = f"q_len={request.q_len} of {request.groups} query heads a key head are {rows} rows > {_MOST_ROWS}"
        found.append(Refusal(RefusalCode.SEQUENCE_LENGTH, detail, "attend to a prompt with mode='prefill'"))
    if request.page_size is not None and request.page_size % LANES:
        for name in ("head_dim", "value_dim"):
            if getattr(request, name) % LANES:
                # XLA lays such pages out with another dimension last, and would copy all of them.
                detail = (
                    f"page_size={request.page_size} and {name}={getattr(request, name)} are no multiples of {LANES}"
                )
                found.append(Refusal(RefusalCode.PAGES, detail, f"use pages of {LANES} slots"))
    return tuple(found)


def _tilings(request: Request) -> tuple[Tiling, ...]:
    return tuple(Tiling.of(block_kv=size) for size in block_sizes(request, _BLOCKS))


def _signature(request: Request) -> tuple[str, ...]:
    interpreted = request.interpret and request.target.platform == "cpu"
    return ("kernelry.ragged",) if interpreted else ("tpu_custom_call", "kernelry.ragged")


RAGGED = KernelSpec(
    name="ragged",
    capabilities=Capabilities(
        platforms=frozenset({"tpu"}),
        interpret=True,
        modes=frozenset({Mode.DECODE}),
        dtypes=frozenset({"float32", "bfloat16"}),
        head_dims=Dims(maximum=512),
        split_head_dim=True,
        grouped_heads=True,
        unequal_lengths=True,
        atoms=frozenset(AtomKind),
        positions=frozenset(PositionKind),
        features=frozenset({Feature.SCALE, Feature.SOFT_CAP, Feature.MAX_LOGITS}),
        statistics=frozenset({Statistic.MAX_SUM}),
        normalizations=frozenset({"softmax", "softmax_max_sum"}),
        empty_rows=True,
        clean_hidden_slots=True,
        kv_quantizations=frozenset({"int8:head_dim", "int8:heads_and_head_dim"}),
        pages=True,
        tolerances=(
            Tolerance("float32", 2e-6, 2e-5, "float32 products and sums, in another order than the oracle's"),
            Tolerance("bfloat16", 1e-2, 4e-2, "probabilities and output are rounded to 8 bits of mantissa"),
        ),
    ),
    load="kernelry_tpu_splash.ragged.kernel:RaggedKernel",
    refusals=_refusals,
    tilings=_tilings,
    signature=_signature,
    summary="decode on TPUs that reads the blocks each row sees: arrays and pages, int8 as it is, any mask",
)
