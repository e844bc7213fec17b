"""What `pallas_decode` declares."""

from __future__ import annotations

from collections.abc import Iterator

from kernelry.plugin import (
    SEPARATE,
    VALUE_IN_KEY,
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
    signature_of,
    standard_tolerances,
    too_many_rows,
)
from kernelry_gpu_pallas.pallas_decode.columns import has_value_in_key
from kernelry_gpu_pallas.pallas_decode.tilings import refusals, search_space
from kernelry_gpu_pallas.tile_masks import ATOMS, mask_refusals

_MOST_ROWS = 64
"""T · G, the rows that read one key/value head; their sums stay in registers."""

_MOST_ROWS_IN_TILES = 1024
"""The same where rows are split among programs: 8 queries of 128 heads. Each tile of rows reads the keys once more."""

_WIDEST = 256
"""Columns of keys and values in arrays of their own."""

_WIDEST_IN_KEY = 512
"""Columns of values in the keys."""


def _refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    in_key = has_value_in_key(request)
    rows = too_many_rows(request, _MOST_ROWS_IN_TILES if in_key else _MOST_ROWS)
    limits = tuple(_too_wide(request)) or tuple(rows) or tuple(refusals(request))
    return (*mask_refusals(request.mask), *limits)


def _too_wide(request: Request) -> Iterator[Refusal]:
    if has_value_in_key(request):
        if request.value_dim > _WIDEST_IN_KEY:
            detail = f"value_dim={request.value_dim} > {_WIDEST_IN_KEY}, the widest values in keys"
            yield Refusal(RefusalCode.HEAD_DIM, detail)
        return
    for name in ("head_dim", "value_dim"):
        width = getattr(request, name)
        if width > _WIDEST and (name == "head_dim" or width != request.head_dim):
            detail = f"{name}={width} > {_WIDEST}, unless the values are the first columns of the keys"
            yield Refusal(RefusalCode.HEAD_DIM, detail, "where they are, pass value=ValueInKey(value_dim)")


PALLAS_DECODE = KernelSpec(
    name="pallas_decode",
    capabilities=Capabilities(
        platforms=frozenset({"gpu"}),
        interpret=True,
        minimum_generation=(("gpu", 80),),
        modes=frozenset({Mode.DECODE}),
        dtypes=frozenset({"float16", "bfloat16", "float32"}),
        head_dims=Dims(minimum=16, maximum=576),
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
        kv_layouts=frozenset({SEPARATE, VALUE_IN_KEY}),
        manual_axes=ManualAxes.UNCHECKED,
        partitioned_by_xla=False,
        tolerances=standard_tolerances("float32", "bfloat16", "float16", rounded="probabilities and output"),
    ),
    load="kernelry_gpu_pallas.pallas_decode.kernel:PallasDecodeKernel",
    refusals=_refusals,
    tilings=search_space,
    signature=signature_of("kernelry.pallas_decode", "__gpu$xla.gpu.triton"),
    summary="decode in Pallas for NVIDIA GPUs, keys split among programs: arrays and pages, int8, any mask, MLA",
)
