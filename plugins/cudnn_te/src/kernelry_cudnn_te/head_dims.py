"""Which head dims cuDNN has kernels for, by compute capability.

Sources: JAX's check_is_flash_attention; the support matrix of "Scaled Dot Product Attention" in cuDNN frontend's
documentation, cuDNN 9.18.
"""

from __future__ import annotations

from collections.abc import Iterator

from kernelry.plugin import Refusal, RefusalCode, Request

_HOPPER, _BLACKWELL, _RTX_BLACKWELL = 90, 100, 120
"""Compute capability times ten."""

LATENT = (192, 128)
"""Elements, (H, D): multi-head latent attention, for which there are kernels of their own from Hopper on."""

_SMALL = 128
"""Elements; the most before Hopper, and of a backward pass from Blackwell on."""


def has_wide_kernels(request: Request) -> bool:
    """Whether the target's cuDNN has kernels for more than 128 elements, and for `LATENT`.

    Of compute capability 12.0 the support matrix says nothing.
    """
    generation = request.target.generation
    return generation is not None and _HOPPER <= generation < _RTX_BLACKWELL


def too_wide(request: Request, head_dim: int) -> Iterator[Refusal]:
    """Refuses a head dim that the target's cuDNN has no kernels for."""
    target = request.target
    if head_dim <= _SMALL:
        return
    detail = f"head_dim={head_dim} > {_SMALL} on {target}"
    if target.generation is None:
        remedy = "larger ones need compute capability 9.0; name the device, e.g. gpu:h100"
        yield Refusal(RefusalCode.HEAD_DIM, detail, remedy)
    elif not has_wide_kernels(request):
        yield Refusal(RefusalCode.HEAD_DIM, detail, "larger ones need compute capability 9.0 or 10.0")
    elif target.generation >= _BLACKWELL and request.gradients:
        yield Refusal(RefusalCode.HEAD_DIM, f"{detail}, with gradients", "ask for none (gradients=()) or use gpu:h100")
