"""What `tokamax_mosaic` declares."""

from __future__ import annotations

from collections.abc import Iterator

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
    RefusalCode,
    Request,
    Statistic,
    signature_of,
    standard_tolerances,
    uneven_lengths,
)
from kernelry_gpu_pallas.tokamax_mosaic.blocks import BLACKWELL, HOPPER, NAME, STEP, tilings
from kernelry_gpu_pallas.tokamax_mosaic.visibility import RANGES, mask_refusals

_REMEDY = "pip install 'kernelry-gpu-pallas[tokamax]'"

_FIRST_FOR_BLACKWELL = (0, 0, 17)
"""tokamax 0.0.12's own tests leave out most of its backward pass on Blackwell, and call the rest not deterministic."""


def _refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    return (
        *_generation(request),
        *_vendor(request, environment),
        *uneven_lengths(request, STEP, "which blocks divide"),
        *mask_refusals(request),
        *_no_room(request),
    )


def _generation(request: Request) -> Iterator[Refusal]:
    target = request.target
    if target.platform != "gpu" or target.generation in (HOPPER, BLACKWELL):
        return
    if target.generation is None:
        detail = f"the generation of target {target} is not known, and each has a kernel of its own"
        yield Refusal(RefusalCode.GENERATION, detail, "name it, e.g. target='gpu:h100'")
    elif target.generation > HOPPER:
        detail = f"{target} is generation {target.generation}; tokamax has kernels for {HOPPER} and {BLACKWELL}"
        yield Refusal(RefusalCode.GENERATION, detail)


def _vendor(request: Request, environment: Environment) -> Iterator[Refusal]:
    tokamax = environment.vendor("tokamax")
    yield from tokamax.refusals(_REMEDY)
    if tokamax.version and request.target.generation == BLACKWELL and tokamax.release < _FIRST_FOR_BLACKWELL:
        wanted = ".".join(map(str, _FIRST_FOR_BLACKWELL))
        detail = f"tokamax {tokamax.version} < {wanted}, the first whose kernels for Blackwell are served"
        yield Refusal(RefusalCode.VENDOR_VERSION, detail, f"pip install 'tokamax>={wanted}' (Python 3.12 or later)")


def _no_room(request: Request) -> Iterator[Refusal]:
    if request.q_len % STEP or request.kv_len % STEP or tilings(request):
        return
    with_bias = "" if request.bias is None else " with a bias"
    backward = " and its gradients" if request.gradients else ""
    sizes = f"head_dim={request.head_dim} value_dim={request.value_dim}{with_bias}{backward}"
    detail = f"{sizes}: the smallest blocks need more memory than a multiprocessor has"
    yield Refusal(RefusalCode.HEAD_DIM, detail)


TOKAMAX_MOSAIC = KernelSpec(
    name=NAME,
    capabilities=Capabilities(
        platforms=frozenset({"gpu"}),
        minimum_generation=(("gpu", HOPPER),),
        modes=frozenset({Mode.TRAIN, Mode.PREFILL}),
        dtypes=frozenset({"float16", "bfloat16"}),
        head_dims=Dims(minimum=16, maximum=256, multiple_of=16),
        split_head_dim=True,
        grouped_heads=True,
        unequal_lengths=True,
        atoms=RANGES | {AtomKind.DENSE},
        positions=frozenset({PositionKind.OFFSET, PositionKind.STATIC, PositionKind.TRACED}),
        features=frozenset({Feature.SCALE, Feature.BIAS, Feature.MAX_LOGITS}),
        statistics=frozenset({Statistic.LSE}),
        normalizations=frozenset({"softmax"}),
        gradient=Gradient.BACKWARD,
        names_residuals=True,
        gradients=frozenset({Operand.QUERY, Operand.KEY, Operand.VALUE, Operand.BIAS}),
        manual_axes=ManualAxes.UNCHECKED,
        partitioned_by_xla=False,
        tolerances=standard_tolerances("bfloat16", "float16", rounded="probabilities, output and Σ out · d_out"),
    ),
    load="kernelry_gpu_pallas.tokamax_mosaic.kernel:TokamaxMosaicKernel",
    refusals=_refusals,
    tilings=tilings,
    signature=signature_of("kernelry.tokamax_mosaic", "mosaic_gpu_v2"),
    summary="tokamax's Mosaic GPU attention for Hopper and Blackwell; masks of ranges, dense masks, bias",
)
