"""What a call has to compute and to move, from its request: the compiler's own estimate leaves out what kernels do."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import jax.numpy as jnp

from kernelry.aot.pairs import PairCounts, count_pairs
from kernelry.config.layer import MoBA
from kernelry.masks.base import Mask
from kernelry.request.request import Mode, Operand, Request
from kernelry.request.sharding import Sharding
from kernelry.resolution.communication import key_bytes
from kernelry.resolution.published import DEVICE_RATES


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """The least that one call takes, where `assumed` is empty.

    Args:
      flops: of the products over visible pairs; a backward pass is counted without recomputing the forward pass.
      bytes: of operands and results, each read or written once; keys that no query sees are not read.
      seconds: the longer of the two at the device's published rates; None where those are not known.
      assumed: the parts of the mask that were left out because they depend on arrays: the call may take less, or more.
    """

    flops: float
    bytes: float
    seconds: float | None
    assumed: tuple[str, ...] = ()

    @classmethod
    def of(cls, request: Request, mask: Mask, moba: MoBA | None = None) -> Work:
        """Counts what a call takes on a single device; on a mesh, on the mean one.

        Args:
          request: the call.
          mask: its visible pairs are counted by `kernelry.aot.pairs.count_pairs`, which says what it assumes of arrays.
          moba: says how many blocks are chosen for a query, its own included, of which it sees at least one key.
        """
        fewest = None if moba is None else (moba.top_k - 1) * moba.chunk_size + 1
        return cls.of_pairs(request, count_pairs(mask, request.batch, request.q_len, request.kv_len, fewest=fewest))

    @classmethod
    def of_pairs(cls, request: Request, seen: PairCounts) -> Work:
        """Counts what a call takes whose mask shows so many pairs."""
        gradients = request.gradients if request.mode is Mode.TRAIN else frozenset()
        devices = 1 if request.sharding is None else Sharding.parse(request.sharding).devices
        flops = 2.0 * request.q_heads * seen.pairs * _dims(request, gradients) / devices
        moved = _bytes(request, seen, gradients) / devices
        figures = DEVICE_RATES.get(request.target.kind or "")
        seconds = None if figures is None else max(flops / figures.flops, moved / figures.bandwidth)
        return cls(flops, moved, seconds, seen.assumed)

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return {
            "flops": self.flops,
            "bytes": self.bytes,
            "intensity": self.intensity,
            "roofline_seconds": self.seconds,
            "assumed": list(self.assumed),
        }


def _dims(request: Request, gradients: frozenset[Operand]) -> int:
    """The multiplications of one pair: the lengths of the rows in its products."""
    forward = request.head_dim + request.value_dim  # the logit, and the weighted value
    of_logits = {Operand.QUERY, Operand.KEY} & gradients
    of_weights = request.value_dim if of_logits or Operand.BIAS in gradients else 0
    of_value = request.value_dim if Operand.VALUE in gradients else 0
    return forward + of_weights + of_value + request.head_dim * len(of_logits)


def _bytes(request: Request, seen: PairCounts, gradients: frozenset[Operand]) -> float:
    """Gradients are written for hidden tokens as well."""
    size = jnp.dtype(request.dtype).itemsize
    rows = request.batch * request.q_len * request.q_heads
    columns = request.batch * request.kv_len * request.kv_heads
    written = {
        Operand.QUERY: rows * request.head_dim,
        Operand.KEY: columns * request.head_dim,
        Operand.VALUE: columns * request.value_dim,
    }
    numbers = seen.queries * request.q_heads * request.head_dim + rows * request.value_dim
    numbers += sum(count for operand, count in written.items() if operand in gradients)
    if gradients:
        numbers += seen.queries * request.q_heads * request.value_dim  # the cotangent of out
    return size * numbers + seen.keys * key_bytes(request)
