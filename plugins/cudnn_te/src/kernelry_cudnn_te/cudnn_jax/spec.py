"""What `cudnn_jax` declares."""

from __future__ import annotations

from kernelry.plugin import (
    AtomKind,
    Capabilities,
    Dims,
    Feature,
    Gradient,
    KernelSpec,
    ManualAxes,
    Mode,
    Operand,
    PositionKind,
    Request,
    Statistic,
    standard_tolerances,
)
from kernelry_cudnn_te.cudnn_jax.limits import refusals


def _signature(request: Request) -> tuple[str, ...]:
    # No scope: a compiled program that is sharded has lost the names of what JAX partitions by custom_partitioning.
    return ("__cudnn$fmhaSoftmax" if request.bias is None else "__cudnn$fmhaScaleBiasSoftmax",)


CUDNN_JAX = KernelSpec(
    name="cudnn_jax",
    capabilities=Capabilities(
        platforms=frozenset({"gpu"}),
        minimum_generation=(("gpu", 80),),
        modes=frozenset({Mode.TRAIN, Mode.PREFILL}),
        dtypes=frozenset({"float16", "bfloat16"}),
        head_dims=Dims(minimum=8, maximum=256, multiple_of=8),
        split_head_dim=True,
        grouped_heads=True,
        unequal_lengths=True,
        atoms=frozenset({AtomKind.CAUSAL, AtomKind.WINDOW, AtomKind.LENGTHS}),
        positions=frozenset({PositionKind.OFFSET}),
        features=frozenset({Feature.SCALE, Feature.BIAS}),
        statistics=frozenset({Statistic.LSE}),
        normalizations=frozenset({"softmax"}),
        gradient=Gradient.BACKWARD,
        names_residuals=True,
        gradients=frozenset({Operand.QUERY, Operand.KEY, Operand.VALUE, Operand.BIAS}),
        manual_axes=ManualAxes.UNCHECKED,
        partitioned_by_xla=True,  # by the vendor's custom_partitioning: batch and heads
        tolerances=standard_tolerances(
            "bfloat16",
            "float16",
            rounded="not measured: as in dot_product, inputs, probabilities and output",
        ),
    ),
    load="kernelry_cudnn_te.cudnn_jax.kernel:CudnnJaxKernel",
    refusals=refusals,
    signature=_signature,
    summary="cuDNN's fused attention through JAX; full, causal, left windows, lengths, bias; 16-bit dtypes",
)
