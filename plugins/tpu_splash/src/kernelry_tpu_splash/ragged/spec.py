"""What `ragged` declares."""

from __future__ import annotations

import math
from collections.abc import Iterator

from kernelry.plugin import (
    SEPARATE,
    VALUE_IN_KEY,
    AtomKind,
    Capabilities,
    Dims,
    Environment,
    Feature,
    KernelSpec,
    ManualAxes,
    Mode,
    PositionKind,
    Refusal,
    RefusalCode,
    Request,
    Statistic,
    Tiling,
    signature_of,
    standard_tolerances,
    too_many_rows,
)
from kernelry_tpu_splash.lanes import LANES
from kernelry_tpu_splash.ragged.layout import (
    MOST_PAGES,
    block_sizes,
    is_value_in_key,
    table_bytes,
    unit_of,
    vector_bytes,
    widths,
)

_BLOCKS = (512, 256, 128, 1024)
"""Slots; blocks of the search space. Not measured: a TPU reads 2 MiB in the time of several steps of the grid."""

_SHORTEST, _LONGEST = 512, 2048

_BLOCKS_OF_ROWS = ((32, _SHORTEST), (64, 1024), (math.inf, _LONGEST))
"""T · G up to which blocks of so many slots take no longer than memory does to deliver them, where keys hold their
values: by the schedules of libtpu 0.0.42 for v6e and 576 bfloat16 elements, 512 slots of 16 rows take 541 of 629
cycles, 1024 of 64 rows 1212 of 1259, and 2048 of 128 rows 2507 of 2518; 512 of 128 rows take 1082 of 629. int8 is
delivered in half of the time."""

_MOST_ROWS = 256
"""T · G, the rows that read one key/value head; their sums stay in vector memory."""

_MOST_VECTOR_BYTES = 17 * 2**20
"""Of the smallest block; found by compiling for v5e, whose programs may use 16 MiB by another count than ours."""

_MOST_TABLE_BYTES = 896 * 2**10
"""Of the 1 MiB of scalar memory that v5e has."""


def _refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    return (*too_many_rows(request, _MOST_ROWS), *_pages(request), *_memory(request))


def _pages(request: Request) -> Iterator[Refusal]:
    if request.page_size is None:
        return
    named = zip(("head_dim", "value_dim"), widths(request), strict=False)
    narrow = next((f"{name}={width}" for name, width in named if width % LANES), None)
    if request.page_size % LANES and narrow is not None:
        # XLA lays such pages out with another dimension last, and would copy all of them.
        detail = f"page_size={request.page_size} and {narrow} are no multiples of {LANES}"
        yield Refusal(RefusalCode.PAGES, detail, f"use pages of {LANES} slots")
    pages = unit_of(request) // request.page_size
    if pages > MOST_PAGES:
        detail = f"page_size={request.page_size} makes a block of {pages} pages > {MOST_PAGES}"
        yield Refusal(RefusalCode.PAGES, detail, "use larger pages")
    table = table_bytes(request)
    if table > _MOST_TABLE_BYTES:
        detail = f"a table of {table >> 10} KiB of pages > the {_MOST_TABLE_BYTES >> 10} KiB of scalar memory"
        yield Refusal(RefusalCode.PAGES, detail, "use larger pages, or fewer rows at once")


def _memory(request: Request) -> Iterator[Refusal]:
    needed = vector_bytes(request)
    if needed > _MOST_VECTOR_BYTES:
        detail = (
            f"blocks of {unit_of(request)} slots, the smallest, take {needed / 2**20:.0f} MiB of vector memory "
            f"> {_MOST_VECTOR_BYTES >> 20}"
        )
        in_pages = unit_of(request) > LANES
        remedy = f"use pages whose slots divide {LANES}" if in_pages else "attend to fewer queries, or heads, at once"
        yield Refusal(RefusalCode.PAGES if in_pages else RefusalCode.TILING, detail, remedy)


def _tilings(request: Request) -> tuple[Tiling, ...]:
    return tuple(Tiling.of(block_kv=size) for size in block_sizes(request, _wanted(request)))


def _wanted(request: Request) -> tuple[int, ...]:
    """Slots, the best first."""
    if not is_value_in_key(request):
        return _BLOCKS
    rows = request.q_len * request.groups
    hidden = _LONGEST if request.kv_quantization else next(size for most, size in _BLOCKS_OF_ROWS if rows <= most)
    # In the mean, a row reads half a block more than it has slots.
    best = max(_SHORTEST, min(hidden, request.kv_len // 4 // _SHORTEST * _SHORTEST))
    return tuple(dict.fromkeys((best, *_BLOCKS, _LONGEST)))


RAGGED = KernelSpec(
    name="ragged",
    capabilities=Capabilities(
        platforms=frozenset({"tpu"}),
        interpret=True,
        modes=frozenset({Mode.DECODE}),
        dtypes=frozenset({"float32", "bfloat16"}),
        head_dims=Dims(maximum=640),
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
        kv_layouts=frozenset({SEPARATE, VALUE_IN_KEY}),
        manual_axes=ManualAxes.UNCHECKED,
        partitioned_by_xla=False,
        tolerances=standard_tolerances("float32", "bfloat16", rounded="probabilities and output"),
    ),
    load="kernelry_tpu_splash.ragged.kernel:RaggedKernel",
    refusals=_refusals,
    tilings=_tilings,
    signature=signature_of("kernelry.ragged", "tpu_custom_call"),
    summary="decode on TPUs that reads the blocks each row sees: arrays and pages, int8 as it is, any mask",
)
