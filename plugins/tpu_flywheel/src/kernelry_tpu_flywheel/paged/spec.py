"""What `flywheel_paged` declares."""

from __future__ import annotations

from collections.abc import Iterator

from kernelry.plugin import (
    INTERLEAVED,
    AtomKind,
    Capabilities,
    Dims,
    Environment,
    Feature,
    KernelSpec,
    ManualAxes,
    Mode,
    PositionForm,
    PositionKind,
    Refusal,
    RefusalCode,
    Request,
    Statistic,
    Tolerance,
    signature_of,
)
from kernelry_tpu_flywheel.installed import not_installed
from kernelry_tpu_flywheel.lanes import LANES
from kernelry_tpu_flywheel.paged.layout import (
    MOST_KEYS,
    MOST_LOGITS_BYTES,
    MOST_TABLE_BYTES,
    logits_bytes,
    staging_keys,
    table_bytes,
    tilings_of,
    vector_bytes,
    vector_limit,
)


def _refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    return (*not_installed(environment), *_why_not(request))


def _why_not(request: Request) -> Iterator[Refusal]:
    if request.kv_layout != INTERLEAVED:
        return  # core refuses it
    yield from _mask(request)
    if request.kv_heads > 2 and request.kv_heads % 4:
        # XLA puts the slots before the heads then, and a kernel that needs another order has the pool copied.
        detail = f"kv_heads={request.kv_heads} is not 1, 2 or a multiple of 4, and a TPU orders such pages otherwise"
        yield Refusal(RefusalCode.HEAD_GROUPS, detail, "kernel='ragged' reads such pages, separate ones")
    assert request.page_size is not None
    if request.page_size % LANES:
        detail = f"page_size={request.page_size} is not a multiple of {LANES}"
        yield Refusal(RefusalCode.PAGES, detail, f"use pages of {LANES} slots")
        return
    yield from _memory(request)


def _mask(request: Request) -> Iterator[Refusal]:
    bands = [atom for atom in request.mask.atoms if atom.is_band]
    if len(bands) > 1:
        detail = f"mask={request.mask} bounds the distance of positions more than once"
        yield Refusal(RefusalCode.MASK_ATOM, detail, "give both bounds the same positions, so that they become one")
    for atom in bands:
        right = atom.params[1]
        if right not in (0, None):
            yield Refusal(RefusalCode.MASK_ATOM, f"mask atom {atom} ends {right} slots after the query, not 0")
        if _is_permuted(atom.query) or _is_permuted(atom.kv):
            detail = f"mask atom {atom} has positions that are not consecutive"
            yield Refusal(RefusalCode.POSITIONS, detail, "number the tokens by .at(query_offset=…, kv_offset=…)")


def _is_permuted(where: PositionForm) -> bool:
    return isinstance(where.value, tuple) and any(len(runs) > 1 for runs in where.value)


def _memory(request: Request) -> Iterator[Refusal]:
    table = table_bytes(request)
    if table > MOST_TABLE_BYTES:
        detail = f"a table of {table >> 10} KiB of pages > the {MOST_TABLE_BYTES >> 10} KiB of scalar memory"
        yield Refusal(RefusalCode.PAGES, detail, "use larger pages, or fewer rows at once")
    needed, limit = min(vector_bytes(request, tiling) for tiling in tilings_of(request)), vector_limit(request.target)
    if needed > limit:
        detail = f"blocks and results take {needed >> 20} MiB of vector memory > {limit >> 20}"
        yield Refusal(RefusalCode.TILING, detail, "use smaller pages, or attend to fewer rows, or queries, at once")
    logits = logits_bytes(request)
    if logits > MOST_LOGITS_BYTES:
        detail = f"q_len={request.q_len}: the logits of a page take {logits >> 20} MiB > {MOST_LOGITS_BYTES >> 20}"
        yield Refusal(RefusalCode.SEQUENCE_LENGTH, detail, "attend to shorter chunks, or fewer rows at once")
    keys = staging_keys(request)
    if request.q_len > 1 and keys > MOST_KEYS:
        detail = f"{keys} blocks and heads of all rows > {MOST_KEYS}, which the kernel can number"
        yield Refusal(RefusalCode.PAGES, detail, "attend to fewer rows at once")


def _reservations(request: Request) -> tuple[Refusal, ...]:
    if not (request.partial or request.statistics):
        return ()
    detail = (
        "its logits come from scaled queries that are rounded to 8 bits of mantissa, so its lse is off by up to 2^-9 "
        "of the largest logit, and so are the weights of a merge with another kernel's parts"
    )
    return (Refusal(RefusalCode.STATISTICS, detail),)


FLYWHEEL_PAGED = KernelSpec(
    name="flywheel_paged",
    capabilities=Capabilities(
        platforms=frozenset({"tpu"}),
        interpret=True,
        modes=frozenset({Mode.DECODE, Mode.PREFILL}),
        dtypes=frozenset({"bfloat16"}),
        head_dims=Dims(minimum=LANES, maximum=2 * LANES, multiple_of=LANES),
        grouped_heads=True,
        unequal_lengths=True,
        atoms=frozenset({AtomKind.LENGTHS, AtomKind.CAUSAL, AtomKind.WINDOW}),
        positions=frozenset({PositionKind.OFFSET, PositionKind.STATIC, PositionKind.TRACED}),
        features=frozenset({Feature.SCALE, Feature.SOFT_CAP}),
        statistics=frozenset({Statistic.LSE}),
        normalizations=frozenset({"softmax"}),
        empty_rows=True,
        clean_hidden_slots=True,
        pages=True,
        kv_layouts=frozenset({INTERLEAVED}),
        manual_axes=ManualAxes.UNCHECKED,
        partitioned_by_xla=False,
        tolerances=(
            Tolerance(
                "bfloat16",
                2e-2,
                4e-2,
                "scaled queries, in base 2, are rounded to 8 bits of mantissa, and so logits are off by up to 2^-9 of "
                "the sum of |q k|; probabilities, the running sum of a decode step and the output are rounded, too",
            ),
        ),
    ),
    load="kernelry_tpu_flywheel.paged.kernel:FlywheelPagedKernel",
    refusals=_refusals,
    reservations=_reservations,
    tilings=tilings_of,
    signature=signature_of("kernelry.flywheel_paged", "tpu_custom_call"),
    summary="flywheel's attention over interleaved pages for TPUs, bfloat16; decode and chunks of a prompt",
)
