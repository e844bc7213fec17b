"""What a call on a mesh sends, holds and computes on each device, from its sizes and its mask.

Bytes follow from the collectives that `kernelry.mesh` runs; arrays of masks, which are small, are not counted. Times
are those of published rates (`resolution.published`): transfers at the full rate of one link, compute at half the peak.
"""

from __future__ import annotations

import dataclasses
from typing import final

import numpy as np

from kernelry.execution.adapters.base import itemsize, stored_width
from kernelry.request.request import Mode, Operand, Request
from kernelry.resolution.balance import LEAST_BLOCKS, MOST_BLOCKS, blocks_by_pair
from kernelry.resolution.published import DEVICE_RATES, Link, links_between
from kernelry.resolution.shards import Shards, grid_of, ring_offsets
from kernelry.storage import SEPARATE, Quantization

PEAK_SHARE = 0.5
"""Of the published FLOP/s: what attention kernels reach on long sequences, by and large."""

_FORWARD, _BACKWARD = "forward", "backward"
_FLOAT32 = 4


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Transfer:
    """Collectives of one kind.

    Args:
      kind: the collective.
      what: what is sent, e.g. `K and V`.
      count: how many a device takes part in, one for each array.
      bytes: what a device sends in all of them.
      hides: whether they run while the device computes.
    """

    kind: str
    what: str
    count: int
    bytes: int
    hides: bool = False

    def __str__(self) -> str:
        return f"{self.count} {self.kind}{'' if self.count == 1 else 's'} of {self.what}"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Pass:
    """The forward or the backward pass of one device.

    Args:
      transfers: what it sends.
      held: bytes of what it received or is about to send, in addition to its arguments and results.
      step_flops: what the slowest device computes in each step.
      step_bytes: what each device sends while it computes a step.
    """

    transfers: tuple[Transfer, ...]
    held: int
    step_flops: tuple[float, ...]
    step_bytes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What a device sends."""
        return sum(transfer.bytes for transfer in self.transfers)

    def times(self, link: Link, flops: float) -> Times:
        """The seconds of compute, of transfers, and of those that no compute hides.

        Args:
          link: what transfers go over.
          flops: what a device computes in a second.
        """
        compute = [step / flops for step in self.step_flops]
        sending = [size / link.bandwidth for size in self.step_bytes]
        waited = sum(max(0.0, send - work) for send, work in zip(sending, compute, strict=True))
        apart = sum(transfer.bytes for transfer in self.transfers if not transfer.hides) / link.bandwidth
        return Times(sum(compute), self.bytes / link.bandwidth, waited + apart)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Times:
    """Seconds: of compute, of transfers, and of the transfers that no compute hides."""

    compute: float
    transfers: float
    not_hidden: float


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Communication:
    """What a sharded call takes on each device.

    Args:
      steps: in how many steps queries meet keys.
      forward: the forward pass. backward: the backward pass; None without gradients.
      links: what connects the devices, where that is published.
      flops: FLOP/s assumed of a device; None where the peak of its kind and dtype is not published.
    """

    steps: int
    forward: Pass
    backward: Pass | None
    links: tuple[Link, ...]
    flops: float | None

    @property
    def passes(self) -> dict[str, Pass]:
        """By name."""
        found = {_FORWARD: self.forward, _BACKWARD: self.backward}
        return {name: each for name, each in found.items() if each is not None}


def communication_of(request: Request, shards: Shards) -> Communication:
    """Counts what a call takes.

    Args:
      request: the whole call.
      shards: how it is cut.
    """
    counted = _Counted(request, shards)
    rates = DEVICE_RATES.get(request.target.kind or "")
    halves = ("bfloat16", "float16") if request.target.platform == "gpu" else ("bfloat16",)
    return Communication(
        len(counted.offsets),
        counted.forward(),
        counted.backward() if counted.gradients else None,
        links_between(request.target.kind, shards.sharding.devices),
        rates.flops * PEAK_SHARE if rates is not None and request.dtype in halves else None,
    )


def key_bytes(request: Request) -> float:
    """Bytes of the key and the value of one token, as they are stored."""
    numbers = request.kv_heads * stored_width(request)
    if request.kv_quantization is None:
        return float(itemsize(request.dtype) * numbers)
    quantization = Quantization.parse(request.kv_quantization)
    arrays = 2 if request.kv_layout == SEPARATE else 1
    scales = arrays * (request.kv_heads if quantization.axis == "head_dim" else 1)
    values = numbers * (0.5 if quantization.dtype == "int4" else 1.0)
    return float(values + scales * itemsize("bfloat16"))


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Counted:
    """The bytes and FLOPs of one device.

    Args:
      request: the whole call.
      shards: how it is cut.
    """

    request: Request
    shards: Shards

    @property
    def _own(self) -> Request:
        """What a device is asked about: its queries, and the keys of one shard."""
        return self.shards.requests[0] if self.shards.requests else self.request

    @property
    def gradients(self) -> frozenset[Operand]:
        """Those needed."""
        return self.request.gradients if self.request.mode is Mode.TRAIN else frozenset()

    @property
    def offsets(self) -> tuple[int, ...]:
        """The steps; one where a device has all keys at once."""
        table = self.shards.table
        return (0,) if table is None or not self.shards.sharding.sequence else ring_offsets(table)

    @property
    def _is_ring(self) -> bool:
        cut = self.shards.sharding
        return bool(cut.ring and cut.kv_axes) and cut.strategy != "all_gather"

    @property
    def _keys(self) -> int:
        """Bytes of the keys and values of one shard, as they are sent."""
        return round(self._own.batch * self._own.kv_len * key_bytes(self._own))

    @property
    def _key_arrays(self) -> int:
        """K and V, or one array of both, and their scales where they are quantised."""
        arrays = 2 if self.request.kv_layout == SEPARATE else 1
        return arrays if self.request.kv_quantization is None else 2 * arrays

    @property
    def _gradient_arrays(self) -> int:
        return len(self.gradients & {Operand.KEY, Operand.VALUE})

    def _rows(self, dim: int, size: int) -> int:
        """Bytes of an array of a device's queries."""
        return self._own.batch * self._own.q_len * self._own.q_heads * dim * size

    @property
    def _key_gradients(self) -> int:
        """Bytes of the gradients of one shard of keys and values, in float32."""
        own = self._own
        return own.batch * own.kv_len * own.kv_heads * self._gradient_dims * _FLOAT32

    @property
    def _gradient_dims(self) -> int:
        dims = ((Operand.KEY, self.request.head_dim), (Operand.VALUE, self.request.value_dim))
        return sum(dim for operand, dim in dims if operand in self.gradients)

    def forward(self) -> Pass:
        """The forward pass."""
        own, cut = self._own, self.shards.sharding
        transfers = [*self._exchanges(), *self._gathered_keys(), *self._sent_keys()]
        held = 2 * self._keys if self._sent_keys() else 0
        if cut.strategy == "all_gather" and self._gathered_keys():
            held = cut.size(cut.kv_axes) * self._keys
        if cut.exchanged:
            held += self._rows(own.head_dim + own.value_dim, itemsize(own.dtype)) + self._keys
        if not cut.sequence and cut.kv_axes:
            devices = cut.size(cut.kv_axes)
            gathered = self._rows(own.value_dim + 2, _FLOAT32)
            transfers.append(Transfer("all_gather", "results with their lse", 1, (devices - 1) * gathered))
            held = devices * gathered
        flops = self._step_flops(own.head_dim + own.value_dim)
        return Pass(tuple(transfers), held, flops, self._while_computing(0))

    def backward(self) -> Pass:
        """The backward pass, in which logits are computed again."""
        own, cut = self._own, self.shards.sharding
        devices, gradients = cut.size(cut.kv_axes), self._key_gradients
        transfers = [*self._exchanges(), *self._gathered_keys(), *self._sent_keys()]
        held = self.forward().held * (2 if cut.exchanged else 1)
        if self._gathered_keys():
            count = self._gradient_arrays
            transfers.append(Transfer("reduce_scatter", "dK and dV in float32", count, (devices - 1) * gradients))
            held += devices * gradients
        homeward = self._homeward
        if homeward and gradients:
            steps, count = len(self.offsets) - 1, self._gradient_arrays
            transfers.append(Transfer("permute", "dK and dV in float32", steps * count, steps * gradients, hides=True))
            transfers.append(Transfer("permute", "dK and dV home", count, gradients))
            held += 2 * gradients
        transfers += self._summed()
        flops = self._step_flops(3 * own.head_dim + 2 * own.value_dim)
        return Pass(tuple(transfers), held, flops, self._while_computing(gradients if homeward else 0))

    @property
    def _homeward(self) -> bool:
        """Whether gradients of keys travel with the keys."""
        return self._is_ring and self.offsets[-1] % self.shards.sharding.size(self.shards.sharding.ring) != 0

    def _exchanges(self) -> list[Transfer]:
        cut, own = self.shards.sharding, self._own
        if not cut.exchanged:
            return []
        size = itemsize(own.dtype)
        whole = self._rows(own.head_dim + own.value_dim, size) + self._keys
        devices = cut.size(cut.exchanged)
        return [
            Transfer("all_to_all", "Q, K, V and the output", 2 + self._key_arrays, whole * (devices - 1) // devices)
        ]

    def _gathered_keys(self) -> list[Transfer]:
        cut = self.shards.sharding
        if cut.strategy != "all_gather" or not (cut.sequence and cut.kv_axes):
            return []
        return [Transfer("all_gather", "K and V", self._key_arrays, (cut.size(cut.kv_axes) - 1) * self._keys)]

    def _sent_keys(self) -> list[Transfer]:
        count = sum(self._sends)
        arrays = self._key_arrays
        found = [Transfer("permute", "K and V", count * arrays, count * self._keys, hides=True)] if count else []
        if self._is_ring and self.offsets[0]:
            found.append(Transfer("permute", "K and V before the first step", arrays, self._keys))
        return found

    @property
    def _sends(self) -> tuple[int, ...]:
        """How often keys are sent on during each step; a loop sends them once more than needed."""
        steps = len(self.offsets)
        if not self._is_ring or steps == 1:
            return (0,)
        return (1,) * (steps - 1) + (int(steps > 2),)

    def _while_computing(self, gradients: int) -> tuple[int, ...]:
        """Bytes sent during each step; gradients are sent from the second step on."""
        return tuple(count * self._keys + (gradients if step else 0) for step, count in enumerate(self._sends))

    def _summed(self) -> list[Transfer]:
        """Gradients of what several devices have whole: keys, or queries where only keys are cut."""
        cut, own = self.shards.sharding, self._own
        found = []
        split = cut.heads if self.request.kv_heads % cut.size(cut.heads) == 0 else ()
        over = (*(() if split else cut.heads), *(() if cut.kv_axes else cut.sequence))
        if over and self._gradient_arrays:
            shares = cut.size((*cut.batch, *cut.kv_axes, *split))
            numbers = self.request.batch * self.request.kv_len * self.request.kv_heads * self._gradient_dims // shares
            size = _all_reduced(numbers * itemsize(own.dtype), cut.size(over))
            found.append(Transfer("all_reduce", f"dK and dV over {','.join(over)}", self._gradient_arrays, size))
        if not cut.sequence and cut.kv_axes:
            rows = self._rows(own.head_dim + own.value_dim, itemsize(own.dtype)) + self._rows(1, _FLOAT32)
            what = f"d_out, dQ and the rows that see a key over {','.join(cut.kv_axes)}"
            found.append(Transfer("all_reduce", what, 3, _all_reduced(rows, cut.size(cut.kv_axes))))
        return found

    def _step_flops(self, dims: int) -> tuple[float, ...]:
        """What the slowest device computes in each step: two FLOPs for each product of a visible block."""
        grid = grid_of(self.request, self.shards.sharding)
        finer = LEAST_BLOCKS if grid.order == "striped" else MOST_BLOCKS
        counts, block = blocks_by_pair(self.request.mask, grid, finer)
        devices = np.arange(grid.q_shards)
        if self._is_ring:
            blocks = [counts[devices, (devices - offset) % grid.kv_shards].max() for offset in self.offsets]
        elif not self.shards.sharding.sequence:  # a device has one shard of keys
            blocks = [counts.max()]
        else:
            blocks = [counts.sum(axis=1).max()]
        each = 2.0 * self._own.batch * self._own.q_heads * dims * block[0] * block[1]
        return tuple(float(count) * each for count in blocks)


def _all_reduced(size: int, devices: int) -> int:
    """What a device sends in an all_reduce: a reduce_scatter and an all_gather along a ring."""
    return 2 * (devices - 1) * size // devices
