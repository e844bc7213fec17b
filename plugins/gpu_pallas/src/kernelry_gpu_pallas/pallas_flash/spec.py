"""What `pallas_flash` declares."""

from __future__ import annotations

from kernelry.plugin import (
    Capabilities,
    Dims,
    Environment,
    Feature,
    Gradient,
    KernelSpec,
    ManualAxes,
    Mode,
    Operand,
    PositionKind,
    Refusal,
    Request,
    Statistic,
    signature_of,
    standard_tolerances,
)
from kernelry_gpu_pallas.pallas_flash.tilings import refusals, search_space
from kernelry_gpu_pallas.tile_masks import ATOMS, mask_refusals


def _refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    return (*mask_refusals(request.mask), *refusals(request))


PALLAS_FLASH = KernelSpec(
    name="pallas_flash",
    capabilities=Capabilities(
        platforms=frozenset({"gpu"}),
        interpret=True,
        minimum_generation=(("gpu", 80),),
        modes=frozenset({Mode.TRAIN, Mode.PREFILL}),
        dtypes=frozenset({"float16", "bfloat16", "float32"}),
        head_dims=Dims(minimum=16, maximum=256),
        split_head_dim=True,
        grouped_heads=True,
        unequal_lengths=True,
        atoms=ATOMS,
        positions=frozenset(PositionKind),
        features=frozenset(
            {
                Feature.SCALE,
                Feature.BIAS,
                Feature.SOFT_CAP,
                Feature.BIAS_AFTER_CAP,
                Feature.PRECISION,
                Feature.MAX_LOGITS,
            }
        ),
        statistics=frozenset({Statistic.LSE}),
        normalizations=frozenset({"softmax"}),
        gradient=Gradient.BACKWARD,
        backward_only=True,
        gradients=frozenset({Operand.QUERY, Operand.KEY, Operand.VALUE}),
        lse_cotangent=True,
        empty_rows=True,
        clean_hidden_slots=True,
        manual_axes=ManualAxes.UNCHECKED,
        partitioned_by_xla=False,
        tolerances=standard_tolerances(
            "float32",
            "bfloat16",
            "float16",
            rounded="probabilities, output and Σ out · d_out",
        ),
    ),
    load="kernelry_gpu_pallas.pallas_flash.kernel:PallasFlashKernel",
    refusals=_refusals,
    tilings=search_space,
    signature=signature_of("kernelry.pallas_flash", "__gpu$xla.gpu.triton"),
    summary="flash attention in Pallas for NVIDIA GPUs: any mask in registers, hidden blocks skipped, any lengths",
)
