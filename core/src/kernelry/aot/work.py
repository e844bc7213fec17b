"""What a call has to compute and to move, from its request: the compiler's own estimate knows nothing of kernels."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import jax.numpy as jnp
import numpy as np

from kernelry.aot.devices import FIGURES
from kernelry.masks import BlockKind
from kernelry.masks.base import Mask
from kernelry.request import Mode, Request

_BLOCKS = 128
"""Blocks along each side of the grid on which visible pairs are counted."""

_BACKWARD = 2.5
"""The products of the backward pass, five, by those of the forward pass, two."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What one call takes at least.

    Args:
      flops: of the products over visible pairs; blocks of which the mask hides a part count half.
      bytes: of operands and results, each read or written once.
      seconds: the longer of the two at the device's published rates; None where they are not known.
    """

    flops: float
    bytes: float
    seconds: float | None

    @classmethod
    def of(cls, request: Request, mask: Mask) -> Work:
        """Counts for one device that does it all.

        Args:
          request: the call. mask: what it says without arrays counts; what depends on them is taken to hide nothing.
        """
        backward = request.mode is Mode.TRAIN and bool(request.gradients)
        pairs = request.batch * request.q_heads * _visible(request, mask)
        flops = 2.0 * pairs * (request.head_dim + request.value_dim) * (1 + _BACKWARD * backward)
        moved = _bytes(request, backward)
        figures = FIGURES.get(request.target.kind or "")
        seconds = None if figures is None else max(flops / figures.flops, moved / figures.bandwidth)
        return cls(flops, moved, seconds)

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {"flops": self.flops, "bytes": self.bytes, "intensity": self.intensity, "roofline_seconds": self.seconds}


def _visible(request: Request, mask: Mask) -> float:
    """Pairs of a query and a key that the static part of the mask shows, for one head of one row."""
    sizes = tuple(max(1, -(-length // _BLOCKS)) for length in (request.q_len, request.kv_len))
    static = [part for part in mask.canonical() if part.form.atoms[0].is_static]
    if not static:
        return float(request.q_len * request.kv_len)
    whole = static[0]
    for part in static[1:]:
        whole = whole & part
    kinds = whole.block_map(request.q_len, request.kv_len, *sizes)
    rows, columns = (
        np.minimum(size, length - np.arange(0, length, size))
        for size, length in zip(sizes, (request.q_len, request.kv_len), strict=True)
    )
    share = np.select([kinds == BlockKind.FULL, kinds == BlockKind.PARTIAL], [1.0, 0.5], 0.0)
    return float(rows @ share @ columns)


def _bytes(request: Request, backward: bool) -> float:
    size = jnp.dtype(request.dtype).itemsize
    query = request.q_len * request.q_heads * request.head_dim
    out = request.q_len * request.q_heads * request.value_dim
    stored = request.kv_len * request.kv_heads * (request.head_dim + request.value_dim)
    forward = query + out + stored
    again = 2 * query + 2 * out + 2 * stored  # read with out and its cotangent; three gradients written
    return float(size * request.batch * (forward + again * backward))
