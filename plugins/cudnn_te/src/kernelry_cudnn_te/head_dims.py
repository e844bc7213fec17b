"""Which head dims cuDNN has kernels for, by compute capability.

Sources: JAX's check_is_flash_attention; the support matrix of "Scaled Dot Product Attention" in cuDNN frontend's
documentation, cuDNN 9.18.
"""

from __future__ import annotations

from collections.abc import Iterator

from kernelry.plugin import Refusal, RefusalCode, Request

HOPPER, BLACKWELL = 90, 100
"""Compute capability times ten."""

LATENT = (192, 128)
"""Elements, (H, D): multi-head latent attention, for which there are kernels of their own from Hopper on."""

_SMALL = 128
"""Elements; the most before Hopper, and of a backward pass from Blackwell on."""


def too_wide(request: Request, head_dim: int) -> Iterator[Refusal]:
    """Refuses a head dim that the target's cuDNN has no kernels for."""
    target = request.target
    if head_dim <= _SMALL:
        return
    detail = f"head_dim={head_dim} > {_SMALL} on {target}"
    if target.generation is None:
        remedy = "larger ones need compute capability 9.0; name the device, e.g. gpu:h100"
        yield Refusal(RefusalCode.HEAD_DIM, detail, remedy)
    elif target.generation < HOPPER:
        yield Refusal(RefusalCode.HEAD_DIM, detail, "larger ones need compute capability 9.0")
    elif target.generation >= BLACKWELL and request.gradients:
        yield Refusal(RefusalCode.HEAD_DIM, f"{detail}, with gradients", "ask for none (gradients=()) or use gpu:h100")
