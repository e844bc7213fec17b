"""What `flywheel` declares."""

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
    Tolerance,
    signature_of,
)
from kernelry_tpu_flywheel.dense.blocks import SEGMENTS, tilings
from kernelry_tpu_flywheel.dense.geometry import Geometry
from kernelry_tpu_flywheel.installed import not_installed


def _refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    geometry = Geometry.of(request)
    return (*not_installed(environment), *geometry.refusals(request), *_gradient(request, geometry))


def _gradient(request: Request, geometry: Geometry) -> Iterator[Refusal]:
    """The vendor differentiates full and causal attention alone."""
    if not request.gradients:
        return
    remedy = "mode='prefill', or gradients=() where none is needed"
    if geometry.packed:
        yield Refusal(RefusalCode.GRADIENT, f"mask={request.mask} has segments, and no gradient", remedy)
    elif geometry.is_window:
        yield Refusal(RefusalCode.GRADIENT, f"mask={request.mask} is a window, and has no gradient", remedy)
    if request.soft_cap is not None:
        yield Refusal(RefusalCode.GRADIENT, f"soft_cap={request.soft_cap} has no gradient", remedy)


def _reservations(request: Request) -> tuple[Refusal, ...]:
    return (*_merged(request), *_packed(request))


def _merged(request: Request) -> Iterator[Refusal]:
    """Parts are weighted by their logsumexp, whose error is that of the logits."""
    asked = next((name for name in ("partial", "statistics") if getattr(request, name)), None)
    if asked is not None:
        detail = f"{asked}=True: logits are rounded to bfloat16, and a logsumexp near 100 is off by tenths"
        yield Refusal(RefusalCode.STATISTICS, detail)


def _packed(request: Request) -> Iterator[Refusal]:
    if Geometry.of(request).packed:
        under = ", or with an id in two places," if not Geometry.of(request).is_movable else ""
        detail = f"mask={request.mask} has segments, and a row of more than {SEGMENTS}{under} comes out as NaN"
        yield Refusal(RefusalCode.MASK_ATOM, detail, "raise the tunable max_segments where there are more")


FLYWHEEL = KernelSpec(
    name="flywheel",
    capabilities=Capabilities(
        platforms=frozenset({"tpu"}),
        interpret=True,
        modes=frozenset({Mode.TRAIN, Mode.PREFILL}),
        dtypes=frozenset({"bfloat16"}),
        head_dims=Dims(minimum=8, maximum=256, multiple_of=8),
        split_head_dim=True,
        grouped_heads=True,
        unequal_lengths=True,
        atoms=frozenset({AtomKind.CAUSAL, AtomKind.WINDOW, AtomKind.SEGMENTS}),
        positions=frozenset({PositionKind.OFFSET}),
        features=frozenset({Feature.SCALE, Feature.SOFT_CAP}),
        statistics=frozenset({Statistic.LSE}),
        normalizations=frozenset({"softmax"}),
        gradient=Gradient.BACKWARD,
        backward_only=True,
        gradients=frozenset({Operand.QUERY, Operand.KEY, Operand.VALUE}),
        empty_rows=True,
        manual_axes=ManualAxes.UNCHECKED,
        partitioned_by_xla=False,
        tolerances=(
            Tolerance(
                "bfloat16",
                2e-2,
                4e-2,
                "scaled queries, in base 2, are rounded to 8 bits of mantissa, and so logits are off by up to 2^-9 of "
                "the sum of |q k|; output and gradients are rounded, too",
            ),
        ),
    ),
    load="kernelry_tpu_flywheel.dense.kernel:FlywheelKernel",
    refusals=_refusals,
    reservations=_reservations,
    tilings=tilings,
    signature=signature_of("kernelry.flywheel", "tpu_custom_call"),
    known_failures=(("band & segments", "under a window, rows with an id in several runs come out as NaN"),),
    summary="flywheel's attention for TPUs, bfloat16; full and causal with gradients; windows, segments, caps without",
)
