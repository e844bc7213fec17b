"""What `splash` declares."""

from __future__ import annotations

from kernelry.plugin import (
    AtomKind,
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
    Tiling,
    largest_divisor,
    signature_of,
    standard_tolerances,
    uneven_lengths,
)
from kernelry_tpu_splash.blocks import LAYOUTS, SIZES
from kernelry_tpu_splash.computed_masks import COMPUTED, SEGMENTS, mask_refusals
from kernelry_tpu_splash.lanes import LANES

_BACKWARD_KERNELS = {"backward_kernels": 2}
"""2: one over dQ, one over dK and dV. 1: fused; dQ then comes in S / block_kv_dkv parts that are summed."""

_BLOCK_NAMES_Q = ("block_q", "block_q_dkv", "block_q_dq")
_BLOCK_NAMES_KV = ("block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute", "block_kv_dq")


def _refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    return (*uneven_lengths(request, LANES), *mask_refusals(request.mask))


def _tilings(request: Request) -> tuple[Tiling, ...]:
    return tuple(dict.fromkeys(_tiling(request, block) for block in SIZES))


def _tiling(request: Request, block: int) -> Tiling:
    block_q, block_kv = (largest_divisor(length, block, LANES) for length in (request.q_len, request.kv_len))
    blocks = {**dict.fromkeys(_BLOCK_NAMES_Q, block_q), **dict.fromkeys(_BLOCK_NAMES_KV, block_kv)}
    return Tiling.of(**blocks, **LAYOUTS, **_BACKWARD_KERNELS)


SPLASH = KernelSpec(
    name="splash",
    capabilities=Capabilities(
        platforms=frozenset({"tpu"}),
        interpret=True,
        modes=frozenset({Mode.TRAIN, Mode.PREFILL}),
        dtypes=frozenset({"float32", "bfloat16"}),
        head_dims=Dims(maximum=512),
        split_head_dim=True,
        grouped_heads=True,
        unequal_lengths=True,
        atoms=COMPUTED | SEGMENTS | {AtomKind.ANY_OF, AtomKind.NOT},
        positions=frozenset({PositionKind.OFFSET, PositionKind.STATIC, PositionKind.TRACED}),
        features=frozenset({Feature.SCALE, Feature.SOFT_CAP}),
        statistics=frozenset({Statistic.LSE}),
        normalizations=frozenset({"softmax"}),
        gradient=Gradient.BACKWARD,
        names_residuals=True,
        gradients=frozenset({Operand.QUERY, Operand.KEY, Operand.VALUE}),
        manual_axes=ManualAxes.UNCHECKED,
        partitioned_by_xla=False,
        tolerances=standard_tolerances(
            "float32",
            "bfloat16",
            rounded="scaled queries, output and gradients",
            note="for logits to 1e4, see the README",
        ),
    ),
    load="kernelry_tpu_splash.splash.kernel:SplashKernel",
    refusals=_refusals,
    tilings=_tilings,
    signature=signature_of("kernelry.splash", "tpu_custom_call"),
    summary="JAX's splash attention for TPUs; computes static masks, skips hidden blocks; lengths in multiples of 128",
)
