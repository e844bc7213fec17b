"""What `cudnn_te` declares."""

from __future__ import annotations

from collections.abc import Iterator

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
    RefusalCode,
    Request,
    Statistic,
    Tiling,
    signature_of,
    standard_tolerances,
)
from kernelry_cudnn_te.cudnn_te.availability import Asked, why_not_here
from kernelry_cudnn_te.cudnn_te.settings import ATOMS, FIRST_WITH_ALL, SEGMENTS, is_packed, refusals
from kernelry_cudnn_te.head_dims import LATENT, has_wide_kernels, too_wide

_DISTRIBUTION = "transformer_engine"
_INSTALL = "pip install 'kernelry-cudnn-te[te]'"

_FIRST = (2, 11)
_BROKEN = ((2, 12), (2, 13))
"""Whose SequenceDescriptor.from_segment_ids_and_pos needs two further arguments, later removed again."""

_SEGMENTS = (SEGMENTS, 8, 16, 64, 128, 256)
"""Of a row; memory and compile time grow with it. A row that is not packed is one, whatever the tunable says."""


def _refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    static = (*_version(request, environment), *_head_dim(request), *refusals(request))
    return (*static, *_driver(environment), *_answer(request, environment, static))


def _version(request: Request, environment: Environment) -> Iterator[Refusal]:
    vendor = environment.vendor(_DISTRIBUTION)
    yield from vendor.refusals(_INSTALL)
    if vendor.version is None:
        return
    release = vendor.release[:2]
    if release < _FIRST:
        detail = f"transformer-engine {vendor.version} < {_text(_FIRST)}"
        yield Refusal(RefusalCode.VENDOR_VERSION, detail, _INSTALL)
    elif release in _BROKEN:
        detail = (
            f"transformer-engine {vendor.version}: its from_segment_ids_and_pos needs is_thd and "
            "is_segment_ids_reordered, which no other release has"
        )
        yield Refusal(RefusalCode.VENDOR_VERSION, detail, f"{_INSTALL} takes another release")
    if request.max_logits and release < FIRST_WITH_ALL:
        detail = f"max_logits=True needs transformer-engine {_text(FIRST_WITH_ALL)}, found {vendor.version}"
        yield Refusal(RefusalCode.MAX_LOGITS, detail)
    if request.context_parallel is not None and is_packed(request) and release < FIRST_WITH_ALL:
        detail = f"packed rows in a ring need transformer-engine {_text(FIRST_WITH_ALL)}, found {vendor.version}"
        yield Refusal(RefusalCode.CONTEXT_PARALLEL, f"{detail}, which gets segments that do not divide wrong")


def _text(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


def _head_dim(request: Request) -> Iterator[Refusal]:
    if (request.head_dim, request.value_dim) != LATENT or not has_wide_kernels(request):
        yield from too_wide(request, max(request.head_dim, request.value_dim))


def _driver(environment: Environment) -> Iterator[Refusal]:
    reason = environment.probe(why_not_here)
    if reason is not None:
        remedy = f"{_INSTALL} with JAX for CUDA, on a machine with an NVIDIA GPU and its driver"
        yield Refusal(RefusalCode.DRIVER, reason, remedy)


def _answer(request: Request, environment: Environment, static: tuple[Refusal, ...]) -> Iterator[Refusal]:
    """Asks transformer-engine itself, where nothing known beforehand speaks against the request."""
    if static or environment.probe(why_not_here) is not None:
        return
    reason = environment.probe(Asked.of(request))
    if reason is not None:
        yield Refusal(RefusalCode.VENDOR_DECLINES, reason)


def _tilings(request: Request) -> tuple[Tiling, ...]:
    if not is_packed(request):
        return (Tiling.of(max_segments=1),)
    return tuple(dict.fromkeys(Tiling.of(max_segments=min(most, request.q_len)) for most in _SEGMENTS))


_ALL = frozenset({Operand.QUERY, Operand.KEY, Operand.VALUE, Operand.BIAS, Operand.SINKS})

CUDNN_TE = KernelSpec(
    name="cudnn_te",
    capabilities=Capabilities(
        platforms=frozenset({"gpu"}),
        minimum_generation=(("gpu", 80),),
        modes=frozenset({Mode.TRAIN, Mode.PREFILL}),
        dtypes=frozenset({"float16", "bfloat16"}),
        head_dims=Dims(minimum=8, maximum=256, multiple_of=8),
        split_head_dim=True,
        grouped_heads=True,
        unequal_lengths=True,
        atoms=ATOMS,
        positions=frozenset({PositionKind.OFFSET, PositionKind.STATIC}),
        features=frozenset({Feature.SCALE, Feature.BIAS, Feature.SINKS, Feature.DROPOUT, Feature.MAX_LOGITS}),
        statistics=frozenset({Statistic.LSE}),
        normalizations=frozenset({"softmax"}),
        gradient=Gradient.BACKWARD,
        names_residuals=True,
        gradients=_ALL,
        empty_rows=True,
        context_parallel=frozenset({"all_gather", "ring"}),
        manual_axes=ManualAxes.UNCHECKED,
        partitioned_by_xla=True,  # by the vendor's custom_partitioning: batch and heads
        tolerances=standard_tolerances(
            "bfloat16",
            "float16",
            rounded="not measured: as in dot_product, inputs, probabilities and output",
        ),
    ),
    load="kernelry_cudnn_te.cudnn_te.kernel:CudnnTeKernel",
    refusals=_refusals,
    tilings=_tilings,
    signature=signature_of("kernelry.cudnn_te", "te_fused_attn_forward_ffi"),
    summary="cuDNN's fused attention through transformer-engine; packed segments, sinks, bias, dropout; 16-bit dtypes",
)
