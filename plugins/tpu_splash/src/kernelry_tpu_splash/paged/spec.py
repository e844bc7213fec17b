"""What `paged` declares."""

from __future__ import annotations

from collections.abc import Iterator

from kernelry.plugin import (
    AtomKind,
    Capabilities,
    Dims,
    Environment,
    Feature,
    KernelSpec,
    ManualAxes,
    Mode,
    Refusal,
    RefusalCode,
    Request,
    Tiling,
    largest_divisor,
    signature_of,
    standard_tolerances,
)
from kernelry_tpu_splash.lanes import LANES, SUBLANES

_BLOCKS = (512, 256, 1024, 128)
"""Slots that are attended to at once, of the search space. Not measured."""


def _refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    return tuple(_why_not(request))


def _why_not(request: Request) -> Iterator[Refusal]:
    if request.q_len > 1:
        detail = f"q_len={request.q_len} > 1, and it has no mask by which queries of one row differ"
        yield Refusal(RefusalCode.SEQUENCE_LENGTH, detail, "kernel='ragged' takes several")
    if request.page_size is None:
        yield Refusal(RefusalCode.PAGES, "keys and values are not in pages", "kernel='ragged' takes arrays")
    elif request.page_size % SUBLANES:
        detail = f"page_size={request.page_size} is not a multiple of {SUBLANES}"
        yield Refusal(RefusalCode.PAGES, detail, "kernel='ragged' takes such pages")


def _tilings(request: Request) -> tuple[Tiling, ...]:
    if request.page_size is None:
        return (Tiling(),)
    pages = -(-request.kv_len // request.page_size)
    sizes = dict.fromkeys(largest_divisor(pages, slots // request.page_size) for slots in _BLOCKS)
    ways = (1, 2) if why_not_combined(request) is None else (1,)
    return tuple(Tiling.of(pages_per_block=size, combined=combined) for combined in ways for size in sizes)


def why_not_combined(request: Request) -> str | None:
    """Why keys and values cannot be side by side, as ragged paged attention needs them; found by compiling."""
    if request.head_dim != LANES:
        return f"head_dim={request.head_dim} is not {LANES}"
    if request.kv_heads & (request.kv_heads - 1):
        return f"kv_heads={request.kv_heads} is not a power of two"
    return None


PAGED = KernelSpec(
    name="paged",
    capabilities=Capabilities(
        platforms=frozenset({"tpu"}),
        modes=frozenset({Mode.DECODE}),
        dtypes=frozenset({"bfloat16"}),  # the vendor rounds float32 keys and values to it
        head_dims=Dims(minimum=LANES, maximum=256, multiple_of=LANES),
        grouped_heads=True,
        unequal_lengths=True,
        atoms=frozenset({AtomKind.LENGTHS}),
        features=frozenset({Feature.SCALE, Feature.SOFT_CAP}),
        normalizations=frozenset({"softmax"}),
        empty_rows=True,
        clean_hidden_slots=True,
        pages=True,
        manual_axes=ManualAxes.UNCHECKED,
        partitioned_by_xla=False,
        tolerances=standard_tolerances("bfloat16", rounded="probabilities and output"),
    ),
    load="kernelry_tpu_splash.paged.kernel:PagedKernel",
    refusals=_refusals,
    tilings=_tilings,
    signature=signature_of("kernelry.paged", "tpu_custom_call"),
    summary="JAX's paged and ragged paged attention for TPUs; one query a row; transposes all pages first",
)
