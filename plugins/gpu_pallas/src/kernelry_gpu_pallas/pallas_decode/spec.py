"""What `pallas_decode` declares."""

from __future__ import annotations

from kernelry.plugin import (
    Capabilities,
    Dims,
    Environment,
    Feature,
    KernelSpec,
    ManualAxes,
    Mode,
    PositionKind,
    Refusal,
    Request,
    Statistic,
    signature_of,
    standard_tolerances,
    too_many_rows,
)
from kernelry_gpu_pallas.pallas_decode.tilings import refusals, search_space
from kernelry_gpu_pallas.tile_masks import ATOMS, mask_refusals

_MOST_ROWS = 64
"""T · G, the rows that read one key/value head; their sums stay in registers."""


def _refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    return (*mask_refusals(request.mask), *(tuple(too_many_rows(request, _MOST_ROWS)) or refusals(request)))


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
        manual_axes=ManualAxes.UNCHECKED,
        partitioned_by_xla=False,
        tolerances=standard_tolerances("float32", "bfloat16", "float16", rounded="probabilities and output"),
    ),
    load="kernelry_gpu_pallas.pallas_decode.kernel:PallasDecodeKernel",
    refusals=_refusals,
    tilings=search_space,
    signature=signature_of("kernelry.pallas_decode", "__gpu$xla.gpu.triton"),
    summary="decode in Pallas for NVIDIA GPUs, keys split among programs: arrays and pages, int8 as it is, any mask",
)
