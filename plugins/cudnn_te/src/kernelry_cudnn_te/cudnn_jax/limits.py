"""What cuDNN through JAX cannot do: each limit with its value, before anything is traced.

Sources: `check_is_flash_attention` and `check_layout` of JAX (0.10 and 0.12 agree); the support matrix of
"Scaled Dot Product Attention" in cuDNN frontend's documentation, cuDNN 9.18; the frontend's sdpa_support_surface.
"""

from __future__ import annotations

from collections.abc import Iterator

from kernelry.plugin import AtomKind, Environment, Operand, Refusal, RefusalCode, Request
from kernelry_cudnn_te.cudnn_jax import probes
from kernelry_cudnn_te.head_dims import LATENT, has_wide_kernels, too_wide


def refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    """Every reason that the capabilities do not state."""
    return (
        *_head_dims(request, environment),
        *_bands(request),
        *_odd_lengths(request),
        *_bias(request, environment),
        *probes.refusals(environment),
    )


def _head_dims(request: Request, environment: Environment) -> Iterator[Refusal]:
    if request.head_dim == request.value_dim:
        yield from too_wide(request, request.head_dim)
        return
    yield from _two_head_dims(request, environment)


def _two_head_dims(request: Request, environment: Environment) -> Iterator[Refusal]:
    dims = request.head_dim, request.value_dim
    widest = max(dims)
    detail = f"value_dim={request.value_dim} differs from head_dim={request.head_dim}"
    pad_to = (("head_dim", widest), ("value_dim", widest))
    if dims != LATENT:
        reason = f"and (head_dim, value_dim) = {LATENT} is the only such pair"
        yield Refusal(RefusalCode.SPLIT_HEAD_DIM, f"{detail}, {reason}", f"pad both to {widest}", pad_to)
    elif not has_wide_kernels(request):
        remedy = "that needs compute capability 9.0; name the device, e.g. gpu:h100"
        yield Refusal(RefusalCode.SPLIT_HEAD_DIM, f"{detail} on {request.target}", remedy, pad_to)
    else:
        old = environment.probe(probes.why_no_two_head_dims)
        if old is not None:
            yield Refusal(RefusalCode.VENDOR_VERSION, f"{detail}, and {old}", probes.UPGRADE)


def _bands(request: Request) -> Iterator[Refusal]:
    bands = [atom for atom in request.mask.atoms if atom.is_band]
    if len(bands) > 1:
        yield Refusal(RefusalCode.MASK_ATOM, f"mask={request.mask} is more than one band")
    for atom in bands:
        left, right = atom.params
        if right != 0:
            yield Refusal(RefusalCode.MASK_ATOM, f"{atom} does not end at the query itself: right={right}, not 0")
        if atom.query.start != atom.kv.start:
            detail = f"{atom}: cuDNN's diagonal starts at the first query and the first key"
            yield Refusal(RefusalCode.POSITIONS, detail, "its lower-right form cannot be asked for through JAX")
        if left is not None and request.q_len > request.kv_len:
            sizes = (("kv_len", request.q_len),)
            detail = f"q_len={request.q_len} > kv_len={request.kv_len} under {atom}"
            yield Refusal(RefusalCode.SEQUENCE_LENGTH, detail, f"pad the keys to {request.q_len}", sizes)


def _odd_lengths(request: Request) -> Iterator[Refusal]:
    """JAX's derivative needs even lengths: it means to say "with a bias", and takes the empty array for one.

    With lengths, core differentiates by `backward`, where only a real bias matters.
    """
    if not request.gradients or (request.bias is None and _has(request, AtomKind.LENGTHS)):
        return
    odd = {name: size for name in ("q_len", "kv_len") if (size := getattr(request, name)) % 2}
    if odd:
        detail = ", ".join(f"{name}={size}" for name, size in odd.items())
        pad_to = tuple((name, size + 1) for name, size in odd.items())
        remedy = f"pad to {', '.join(str(size) for _, size in pad_to)}"
        yield Refusal(RefusalCode.SEQUENCE_LENGTH, f"odd {detail} with gradients", remedy, pad_to)


def _bias(request: Request, environment: Environment) -> Iterator[Refusal]:
    if request.bias is None:
        return
    whole = (request.q_len, request.kv_len)
    if request.bias[2:] != whole:
        shape = (*request.bias[:2], *whole)
        yield Refusal(RefusalCode.BIAS, f"bias={request.bias} lacks T or S", f"broadcast it to {shape}")
    if Operand.BIAS in request.gradients and _has(request, AtomKind.LENGTHS):
        detail = f"no gradient of bias with lengths (mask={request.mask})"
        yield Refusal(RefusalCode.GRADIENT, detail, "leave bias out of gradients= where it is constant")
    if _has(request, AtomKind.WINDOW):
        old = environment.probe(probes.why_no_bias_in_a_window)
        if old is not None:
            yield Refusal(RefusalCode.VENDOR_VERSION, f"bias with mask={request.mask}, and {old}", probes.UPGRADE)


def _has(request: Request, kind: AtomKind) -> bool:
    return any(atom.kind is kind for atom in request.mask.atoms)
