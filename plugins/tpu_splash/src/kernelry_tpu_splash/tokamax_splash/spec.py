"""What `tokamax_splash` declares."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from kernelry.plugin import (
    AtomKind,
    Environment,
    Feature,
    KernelSpec,
    Operand,
    Refusal,
    RefusalCode,
    Request,
    Tiling,
    largest_divisor,
    signature_of,
    uneven_lengths,
)
from kernelry_tpu_splash.blocks import LAYOUTS, SIZES
from kernelry_tpu_splash.computed_masks import mask_refusals
from kernelry_tpu_splash.lanes import LANES
from kernelry_tpu_splash.splash.spec import SPLASH

_BLOCK_NAMES_Q = ("block_q", "block_q_dkv")
_BLOCK_NAMES_KV = ("block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute")

_MOST_PARTS = 16
"""Blocks of keys up to which each writes a float32 dQ of its own, and all are summed at the end."""


def _refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    missing = environment.vendor("tokamax").refusals("pip install 'kernelry-tpu-splash[tokamax]'")
    return (*missing, *uneven_lengths(request, LANES), *_sinks(request), *_mask(request))


def _sinks(request: Request) -> Iterator[Refusal]:
    """The kernel's own statistics contain its sinks, which ours never do."""
    if not request.sinks:
        return
    if request.max_logits:
        yield Refusal(RefusalCode.SINKS, "max_logits would contain the sinks")
    if request.mask.may_have_empty_rows(request.q_len, request.kv_len):
        yield Refusal(RefusalCode.SINKS, f"mask={request.mask} may leave rows that see no key, and sinks hide them")


def _mask(request: Request) -> Iterator[Refusal]:
    # A dense mask is evaluated beforehand, and what else there is with it.
    if all(atom.kind is not AtomKind.DENSE for atom in request.mask.atoms):
        yield from mask_refusals(request.mask)


def _tilings(request: Request) -> tuple[Tiling, ...]:
    return tuple(dict.fromkeys(_tiling(request, block) for block in SIZES))


def _tiling(request: Request, block: int) -> Tiling:
    block_q, block_kv = (largest_divisor(length, block, LANES) for length in (request.q_len, request.kv_len))
    blocks = {**dict.fromkeys(_BLOCK_NAMES_Q, block_q), **dict.fromkeys(_BLOCK_NAMES_KV, block_kv)}
    steps = 1 if request.kv_len // block_kv <= _MOST_PARTS else 3
    return Tiling.of(**blocks, **LAYOUTS, dq_reduction_steps=steps)


TOKAMAX_SPLASH = KernelSpec(
    name="tokamax_splash",
    capabilities=dataclasses.replace(
        SPLASH.capabilities,
        atoms=SPLASH.capabilities.atoms | {AtomKind.DENSE},
        features=SPLASH.capabilities.features | {Feature.SINKS, Feature.MAX_LOGITS},
        gradients=SPLASH.capabilities.gradients | {Operand.SINKS},
    ),
    load="kernelry_tpu_splash.tokamax_splash.kernel:TokamaxSplashKernel",
    refusals=_refusals,
    tilings=_tilings,
    signature=signature_of("kernelry.tokamax_splash", "tpu_custom_call"),
    summary="tokamax's splash attention for TPUs; like splash, with its own sinks, maximum logits and dense masks",
)
