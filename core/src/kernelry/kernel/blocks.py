"""What the specs of kernels that work in blocks share: arithmetic of block sizes, and refusals of lengths."""

from __future__ import annotations

from collections.abc import Iterator

from kernelry.kernel.refusal import Refusal, RefusalCode
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
