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
    signature_of,
    uneven_lengths,
)
from kernelry_tpu_splash.blocks import LAYOUTS, OF_KEYS, named, ranked, search_space
from kernelry_tpu_splash.computed_masks import mask_refusals
from kernelry_tpu_splash.lanes import LANES
from kernelry_tpu_splash.predictions import Blocks
from kernelry_tpu_splash.splash.spec import SPLASH

_MOST_PARTS, _MOST_KEYS = 16, 8192
"""Blocks of keys, and keys, up to which each block writes a float32 dQ of its own, and all are summed at the end."""


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
    forward = ranked("tokamax_splash", "forward", request, walks=True)
    backward = ranked("tokamax_splash", "fused", request, walks=request.kv_len > _MOST_KEYS)
    return search_space(forward, [_backward(request, found.blocks) for found in backward])


def _backward(request: Request, blocks: Blocks) -> dict[str, int]:
    parts = request.kv_len // blocks[1]
    steps = 1 if parts <= _MOST_PARTS and request.kv_len <= _MOST_KEYS else 3
    return {**named(OF_KEYS, blocks), **LAYOUTS, "dq_reduction_steps": steps}


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
