"""What `dew_flash` declares."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from kernelry.plugin import (
    Capabilities,
    Dims,
    Environment,
    Feature,
    Gradient,
    KernelSpec,
    Knowledge,
    ManualAxes,
    Mode,
    Operand,
    PositionKind,
    Refusal,
    RefusalCode,
    Request,
    Statistic,
    Tiling,
    standard_tolerances,
)
from kernelry_gpu_flash_attn.dew_flash import settings
from kernelry_gpu_flash_attn.dew_flash.devices import HOPPER, MULTIPROCESSORS, is_served, why_not_on_this_device
from kernelry_gpu_flash_attn.dew_flash.settings import MOST_SEQUENCES, Packing, packing_of

_MAJORS = (13, 12)
"""Of CUDA, each with a wheel of its own."""

_FIRST, _END = (0, 3, 6), (0, 4)
"""Releases of dew-flash-attn: its private functions are as here in the first, and may not be at the end."""

_FIRST_JAX = (0, 11, 2)
"""dew-flash-attn's requirement."""

_WIDE = 192
"""Elements; the most of a head whose backward FlashAttention-2 has on compute capabilities other than 8.0."""

_SEGMENTS = (32, 8, 16, 64, 128, 256)
"""Of a packed row; the logsumexp of FlashAttention-2 grows with them, and so do the thread blocks of its forward."""


def _refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    return (
        *_generation(request, environment),
        *_vendor(environment),
        *_wide_heads(request),
        *settings.refusals(request),
        *_multiprocessors(request, environment),
    )


def _generation(request: Request, environment: Environment) -> Iterator[Refusal]:
    target = request.target
    if target.platform != "gpu":
        return
    served = "dew-flash-attn has code for 8.0 to 8.9, 9.0 and 12.0"
    if target.generation is not None:
        if not is_served(target.generation):
            yield Refusal(RefusalCode.GENERATION, f"{target} is generation {target.generation}; {served}")
    elif environment.knowledge is Knowledge.ASSUMED:
        detail = f"the generation of target {target} is not known, and they differ in their kernels"
        yield Refusal(RefusalCode.GENERATION, detail, "name it, e.g. target='gpu:h100'")
    else:
        reason = environment.probe(why_not_on_this_device)
        if reason is not None:
            yield Refusal(RefusalCode.GENERATION, f"{reason}; {served}")


def _wide_heads(request: Request) -> Iterator[Refusal]:
    """FlashAttention-2's backward checks this when it runs."""
    target = request.target
    if request.head_dim > _WIDE and request.gradients and target.generation not in (80, HOPPER):
        detail = f"head_dim={request.head_dim} > {_WIDE} on {target} with gradients"
        remedy = "ask for none (gradients=()) or use gpu:a100 or gpu:h100"
        yield Refusal(RefusalCode.HEAD_DIM, detail, remedy)


def _vendor(environment: Environment) -> Iterator[Refusal]:
    """One of the two wheels, of a release that is served, with JAX for the same CUDA."""
    of_each = [list(_wheel(environment, major)) for major in _MAJORS]
    installed = [found for found, major in zip(of_each, _MAJORS, strict=True) if not _is_missing(environment, major)]
    if not installed:
        yield Refusal(RefusalCode.VENDOR_MISSING, _absent(), "pip install 'kernelry-gpu-flash-attn[dew-cu13]'")
    elif all(installed):
        yield from installed[0]
    jax = environment.vendor("jax")
    if jax.version is not None and jax.release < _FIRST_JAX:
        wanted = ".".join(map(str, _FIRST_JAX))
        detail = f"jax {jax.version} < {wanted}, which dew-flash-attn needs"
        yield Refusal(RefusalCode.VENDOR_VERSION, detail, f"pip install 'jax>={wanted}' (Python 3.12 or later)")


def _absent() -> str:
    names = " nor ".join(f"dew-flash-attn-cu{major}" for major in _MAJORS)
    detail = f"neither {names} is installed"
    if sys.version_info < (3, 12):
        found = ".".join(map(str, sys.version_info[:2]))
        detail += f"; they need jax 0.11.2 and so Python 3.12, found {found}"
    return detail


def _is_missing(environment: Environment, major: int) -> bool:
    return environment.vendor(f"dew-flash-attn-cu{major}").missing


def _wheel(environment: Environment, major: int) -> Iterator[Refusal]:
    wheel = environment.vendor(f"dew-flash-attn-cu{major}")
    if wheel.version is None:
        return
    if not _FIRST <= wheel.release < _END:
        wanted = f">={'.'.join(map(str, _FIRST))},<{'.'.join(map(str, _END))}"
        detail = f"{wheel.distribution} {wheel.version} is not {wanted}"
        yield Refusal(RefusalCode.VENDOR_VERSION, detail, f"pip install '{wheel.distribution}{wanted}'")
    cuda = environment.vendor(f"jax-cuda{major}-plugin")
    if cuda.missing:
        detail = f"{wheel.distribution} needs JAX for CUDA {major}, and {cuda.distribution} is not installed"
        yield Refusal(RefusalCode.VENDOR_MISSING, detail, f"pip install 'jax[cuda{major}]'")


def _multiprocessors(request: Request, environment: Environment) -> Iterator[Refusal]:
    """Refuses another machine's GPU where the program would hold buffers of a size that is not known."""
    target = request.target
    splits = packing_of(request) is Packing.WHOLE and target.generation not in (None, HOPPER)
    if splits and environment.knowledge is Knowledge.ASSUMED and target.kind not in MULTIPROCESSORS:
        detail = f"FlashAttention-2 needs buffers by the number of multiprocessors, which is not known of {target}"
        known = ", ".join(f"gpu:{kind}" for kind in MULTIPROCESSORS)
        yield Refusal(RefusalCode.VENDOR_DECLINES, detail, f"lower on that machine, or for one of {known}")


def _tilings(request: Request) -> tuple[Tiling, ...]:
    if packing_of(request) is not Packing.SEGMENTS:
        return (Tiling(),)
    most = min(request.q_len, MOST_SEQUENCES // max(request.batch, 1))
    return tuple(dict.fromkeys(Tiling.of(max_segments=max(1, min(runs, most))) for runs in _SEGMENTS))


def _signature(request: Request) -> tuple[str, ...]:
    generation = request.target.generation
    name = "dew_flash" if generation is None else "dew_flash3_mha" if generation == HOPPER else "dew_flash_mha"
    if generation is not None:
        name += "_fwd" if packing_of(request) is Packing.WHOLE else "_varlen_fwd"
    return name, "kernelry.dew_flash"


_NOT_IN_RUNS = "ids of this case are in several runs, and packed sequences cannot express that: the row is NaN"
_CASES_NOT_IN_RUNS = (
    "segments",
    "segments of large ids",
    "band & segments",
    "through adapters: empty rows: segments",
    "through adapters: empty rows: causal segments",
    "through adapters: hidden slots: segments",
    "through adapters: hidden slots: causal segments",
)


def _reservations(request: Request) -> tuple[Refusal, ...]:
    detail = "its numbers on a GPU are unproven, and it calls private functions of dew-flash-attn"
    return (Refusal(RefusalCode.EXPERIMENTAL, detail),)


DEW_FLASH = KernelSpec(
    name="dew_flash",
    capabilities=Capabilities(
        platforms=frozenset({"gpu"}),
        minimum_generation=(("gpu", 80),),
        modes=frozenset({Mode.TRAIN, Mode.PREFILL}),
        dtypes=frozenset({"float16", "bfloat16"}),
        head_dims=Dims(minimum=8, maximum=256, multiple_of=8),
        grouped_heads=True,
        unequal_lengths=True,
        atoms=settings.ATOMS,
        positions=frozenset({PositionKind.OFFSET}),
        features=frozenset({Feature.SCALE}),
        statistics=frozenset({Statistic.LSE}),
        normalizations=frozenset({"softmax"}),
        gradient=Gradient.BACKWARD,
        backward_only=True,
        gradients=frozenset({Operand.QUERY, Operand.KEY, Operand.VALUE}),
        manual_axes=ManualAxes.UNCHECKED,
        partitioned_by_xla=False,
        tolerances=standard_tolerances(
            "bfloat16",
            "float16",
            rounded="not measured: inputs, probabilities, output and gradients of heads before their sum",
        ),
    ),
    load="kernelry_gpu_flash_attn.dew_flash.kernel:DewFlashKernel",
    refusals=_refusals,
    reservations=_reservations,
    tilings=_tilings,
    signature=_signature,
    summary="FlashAttention-2 and -3 through dew-flash-attn; causal, windows, packed segments, lengths; 16-bit dtypes",
    known_failures=tuple((case, _NOT_IN_RUNS) for case in _CASES_NOT_IN_RUNS),
)
