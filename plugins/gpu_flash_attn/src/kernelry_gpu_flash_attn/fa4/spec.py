"""What `fa4` declares."""

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
)
from kernelry_gpu_flash_attn.fa4.masks import ATOMS

NAME = "fa4"

GENERATIONS = (80, 86, 89, 90, 100)
"""Compute capability times ten. The vendor has kernels for 12.0, too, which have not been tried."""

_BLACKWELL = 100
_WIDEST_ON_BLACKWELL = 128
"""Of queries, keys and values: fa4_jax.kernels._can_implement."""

_PYTHON = (3, 12)
_VERSIONS = (0, 1)
_INSTALL = "pip install 'kernelry-gpu-flash-attn[fa4-cu13]' (or [fa4-cu12])"

_UNPROVEN = (
    "first release of fa4-jax: its kernels are compiled for GPUs, but kernelry has not run them on one, so their "
    "numbers, and gradients by the logsumexp of sinks and merges, are unproven"
)


def _refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    return (*_generation(request), *_vendor(environment))


def _reservations(request: Request) -> tuple[Refusal, ...]:
    return (Refusal(RefusalCode.EXPERIMENTAL, _UNPROVEN),)


def _generation(request: Request) -> Iterator[Refusal]:
    target = request.target
    if target.platform != "gpu":
        return
    if target.generation is None:
        detail = f"the generation of target {target} is not known, and each has a kernel of its own"
        yield Refusal(RefusalCode.GENERATION, detail, "name it, e.g. target='gpu:h100'")
    elif target.generation >= min(GENERATIONS) and target.generation not in GENERATIONS:
        listed = ", ".join(map(str, GENERATIONS))
        yield Refusal(RefusalCode.GENERATION, f"{target} is generation {target.generation}, not one of {listed}")
    elif target.generation == _BLACKWELL:
        for name in ("head_dim", "value_dim"):
            if (size := getattr(request, name)) > _WIDEST_ON_BLACKWELL:
                yield Refusal(RefusalCode.HEAD_DIM, f"{name}={size} > {_WIDEST_ON_BLACKWELL} on {target}")


def _vendor(environment: Environment) -> Iterator[Refusal]:
    vendor = environment.vendor("fa4-jax")
    if vendor.missing and sys.version_info < _PYTHON:
        found = ".".join(map(str, sys.version_info[:2]))
        wanted = ".".join(map(str, _PYTHON))
        detail = f"fa4-jax needs Python {wanted} or later, and this is {found}"
        yield Refusal(RefusalCode.VENDOR_MISSING, detail, f"with Python {wanted}: {_INSTALL}")
        return
    yield from vendor.refusals(_INSTALL)
    if vendor.version and vendor.release[:2] != _VERSIONS:
        known = ".".join(map(str, _VERSIONS))
        detail = f"fa4-jax {vendor.version} is not {known}, whose private functions this kernel calls"
        yield Refusal(RefusalCode.VENDOR_VERSION, detail, f"pip install 'fa4-jax=={known}.*'")
    elif not vendor.missing and (reason := environment.probe(why_no_compiler)):
        yield Refusal(RefusalCode.VENDOR_MISSING, reason, _INSTALL)


def why_no_compiler() -> str | None:
    """Says why the vendor's compiler cannot be imported on this machine."""
    from kernelry_gpu_flash_attn.fa4 import _vendor

    return _vendor.why_no_compiler()


FA4 = KernelSpec(
    name=NAME,
    capabilities=Capabilities(
        platforms=frozenset({"gpu"}),
        minimum_generation=(("gpu", min(GENERATIONS)),),
        modes=frozenset({Mode.TRAIN, Mode.PREFILL}),
        dtypes=frozenset({"float16", "bfloat16"}),
        head_dims=Dims(minimum=8, maximum=256, multiple_of=8),
        split_head_dim=True,
        grouped_heads=True,
        unequal_lengths=True,
        atoms=ATOMS,
        positions=frozenset({PositionKind.OFFSET, PositionKind.STATIC, PositionKind.TRACED}),
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
            rounded="not measured on a GPU: as in dot_product, inputs, probabilities and output",
        ),
    ),
    load="kernelry_gpu_flash_attn.fa4.kernel:Fa4Kernel",
    refusals=_refusals,
    reservations=_reservations,
    signature=signature_of("kernelry.fa4", "cutejax.fa4_*"),
    summary="FlashAttention-4 by fa4-jax, for Ampere, Hopper and Blackwell; every mask but users' predicates",
)
