"""What `splash` declares."""

from __future__ import annotations

import jax.numpy as jnp

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
    signature_of,
    standard_tolerances,
    uneven_lengths,
)
from kernelry_tpu_splash.blocks import LAYOUTS, OF_KEYS, OF_QUERIES, named, ranked, search_space
from kernelry_tpu_splash.computed_masks import COMPUTED, SEGMENTS, mask_refusals
from kernelry_tpu_splash.lanes import LANES
from kernelry_tpu_splash.predictions import Blocks, Prediction, cycles_to_move, predictions

_MOST_PARTS = 4
"""Blocks of keys up to which dQ may come in parts by default: each takes the memory of dQ."""


def _refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    return (*uneven_lengths(request, LANES), *mask_refusals(request.mask))


def _tilings(request: Request) -> tuple[Tiling, ...]:
    return search_space(ranked("splash", "forward", request), [{**LAYOUTS, **found} for found in _backward(request)])


def _backward(request: Request) -> list[dict[str, int]]:
    """The backward passes, the fastest first.

    `backward_kernels` is 2 where one is over dK and dV and one over dQ, and 1 where they are fused: dQ then comes in
    S / block_kv_dkv parts, in the queries' dtype, that are written to memory and summed.
    """
    keys, queries = ranked("splash", "dkv", request), ranked("splash", "dq", request)
    of_queries = named(OF_QUERIES, queries[0].blocks)
    apart = [{**named(OF_KEYS, found.blocks), **of_queries, "backward_kernels": 2} for found in keys]
    apart += [{**apart[0], **named(OF_QUERIES, found.blocks)} for found in queries[1:]]
    together = sorted((_with_parts(found, request), found.blocks) for found in predictions("splash", "fused", request))
    fused = [{**named(OF_KEYS, blocks), **of_queries, "backward_kernels": 1} for _, blocks in together]
    if fused and _is_faster(together[0], keys[0], queries[0], request):
        return [*fused, *apart]
    return [*apart, *fused]


def _with_parts(found: Prediction, request: Request) -> float:
    """Cycles of a fused pass, and of writing and reading the parts of dQ."""
    parts = request.kv_len // found.blocks[1]
    size = request.q_len * request.head_dim * jnp.dtype(request.dtype).itemsize
    return (found.cycles or 0.0) + cycles_to_move(2.0 * parts * size, request)


def _is_faster(fused: tuple[float, Blocks], keys: Prediction, queries: Prediction, request: Request) -> bool:
    if keys.cycles is None or queries.cycles is None or request.kv_len // fused[1][1] > _MOST_PARTS:
        return False
    return fused[0] < keys.cycles + queries.cycles


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
