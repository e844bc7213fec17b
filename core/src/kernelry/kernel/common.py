"""What the specs of many kernels repeat: block sizes, refusals of lengths and of arrays, tolerances, signatures.

Plugins use it, and the conformance kit; a call does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from kernelry.kernel.capabilities import Tolerance
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.masks.form import OPERANDS, Atom, AtomKind
from kernelry.masks.predicate import arrays_held
from kernelry.request.request import Request


def round_up(size: int, multiple_of: int) -> int:
    """The smallest multiple of a number that is at least `size`."""
    return -(-size // multiple_of) * multiple_of


def largest_divisor(size: int, most: int, multiple_of: int = 1) -> int:
    """The largest block, at most `most`, that divides a length.

    Args:
      size: the length, a multiple of `multiple_of`.
      most: a multiple of `multiple_of`, too; what is smaller counts as `multiple_of`.
      multiple_of: a divisor of every block, e.g. the lanes of a register.
    """
    units = size // multiple_of
    blocks = range(max(1, min(units, most // multiple_of)), 0, -1)
    return multiple_of * next(block for block in blocks if units % block == 0)


def uneven_lengths(
    request: Request, multiple_of: int, reason: str | None = None, *, alike: bool = False
) -> Iterator[Refusal]:
    """Refuses T and S where blocks do not divide them, and says how far to pad; the adapter `pad_sequence` cures it.

    Args:
      request: whose lengths are looked at.
      multiple_of: what both must be multiples of.
      reason: what that number is; None is the smallest block of that side.
      alike: whether the kernel serves T = S alone, so that both are padded as T is.
    """
    for name, block in (("q_len", "block_q"), ("kv_len", "block_kv"))[: 1 if alike else 2]:
        length = getattr(request, name)
        if length % multiple_of:
            padded = round_up(length, multiple_of)
            detail = f"{name}={length} is not a multiple of {multiple_of}, {reason or f'the smallest {block}'}"
            pad_to = (("q_len", padded), ("kv_len", padded)) if alike else ((name, padded),)
            yield Refusal(RefusalCode.SEQUENCE_LENGTH, detail, f"pad to {padded}", pad_to)


def too_many_rows(request: Request, most: int) -> Iterator[Refusal]:
    """Refuses more than `most` rows of T · G queries that read one key/value head, for kernels that decode."""
    rows = request.q_len * request.groups
    if rows > most:
        detail = f"q_len={request.q_len} × {request.groups} query heads per key head = {rows} rows > {most}"
        yield Refusal(RefusalCode.SEQUENCE_LENGTH, detail, "attend to a prompt with mode='prefill'")


def array_refusals(atom: Atom) -> Iterator[Refusal]:
    """Refuses a PREDICATE that needs arrays, for kernels that evaluate one where they have positions alone.

    Args:
      atom: of any kind; only PREDICATE and CUSTOM are looked at.
    """
    if atom.kind in (AtomKind.PREDICATE, AtomKind.CUSTOM) and OPERANDS in atom.params:
        yield Refusal(RefusalCode.MASK_ATOM, f"mask atom {atom} depends on arrays")
    held = arrays_held(atom)
    if held is None:
        detail = f"mask atom {atom} is a function that no longer exists"
        yield Refusal(RefusalCode.MASK_ATOM, detail, "keep the mask while its form is in use")
        return
    for shape in held[:1]:
        detail = f"mask atom {atom} holds an array of shape {shape}"
        remedy = "pass it as an operand of Predicate" if shape else "make it a Python number"
        yield Refusal(RefusalCode.MASK_ATOM, detail, remedy)


_STANDARD = {
    "float64": (2e-6, 2e-5, 0),
    "float32": (2e-6, 2e-5, 0),
    "bfloat16": (1e-2, 4e-2, 8),
    "float16": (2e-3, 1e-2, 11),
}
"""Errors of the forward pass and of gradients, for values of about 1, and the bits of a mantissa that make them."""


def standard_tolerances(
    *dtypes: str, rounded: str = "inputs, probabilities and output", note: str = ""
) -> tuple[Tolerance, ...]:
    """Returns the tolerances of a kernel that sums in float32: what rounding to each dtype costs, and no more.

    Args:
      dtypes: those of the kernel; of `float64`, too, logits and statistics are float32.
      rounded: what a 16-bit kernel rounds to the dtype.
      note: what else is to be said of the wide ones, e.g. how large logits may be.
    """
    found = []
    for dtype in dtypes:
        forward, gradient, bits = _STANDARD[dtype]
        reason = f"{rounded} are rounded to {bits} bits of mantissa"
        if not bits:
            reason = "; ".join(filter(None, ("float32 products and sums, in another order than the oracle's", note)))
        found.append(Tolerance(dtype, forward, gradient, reason))
    return tuple(found)


def signature_of(scope: str, custom_call: str | None = None) -> Callable[[Request], tuple[str, ...]]:
    """Returns the `signature` of a KernelSpec whose body sets a scope around its work.

    Args:
      scope: what its `jax.named_scope` is called, e.g. `kernelry.splash`.
      custom_call: the target that its program calls, e.g. `tpu_custom_call`, which interpret mode does not; how that
        begins, and `*`, where it ends in a hash of the code; None where its work is XLA's.
    """
    return functools.partial(_signature, scope, custom_call)


def _signature(scope: str, custom_call: str | None, request: Request) -> tuple[str, ...]:
    return (scope,) if custom_call is None or request.is_interpreted else (custom_call, scope)
