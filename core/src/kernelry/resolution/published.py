"""Published rates of devices and of the links between them; nothing here is measured."""

from __future__ import annotations

import dataclasses
from typing import final


@final
@dataclasses.dataclass(frozen=True, slots=True)
class DeviceRates:
    """The published rates of one device.

    Args:
      flops: bfloat16 products, FLOP/s, for dense matrices.
      bandwidth: of its main memory, bytes/s.
    """

    flops: float
    bandwidth: float


DEVICE_RATES: dict[str, DeviceRates] = {
    "v4": DeviceRates(137.5e12, 614e9),
    "v5e": DeviceRates(197e12, 819e9),
    "v5p": DeviceRates(459e12, 2765e9),
    "v6e": DeviceRates(918e12, 1640e9),
    "tpu7x": DeviceRates(1153.5e12, 3690e9),
    "a100": DeviceRates(312e12, 2039.04e9),
    "h100": DeviceRates(989.4e12, 3352.32e9),
    "h200": DeviceRates(989.4e12, 4800e9),
    "b200": DeviceRates(2250e12, 7672.32e9),
}
"""Source of the TPUs: Google Cloud's TPU documentation, one page per version. The compiler describes a v4 and a TPU7x
chip as two devices, each with half of what the chip has, and the others as one. Source of the GPUs: for FLOP/s NVIDIA's
data sheets of the SXM modules (of HGX B200, an eighth), halved where they count sparse matrices; for bandwidth what XLA
says of the same modules (see `kernelry.aot.devices.GPUS`)."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """What connects a device with its neighbour along a mesh axis.

    Args:
      name: e.g. `NVLink`.
      bandwidth: bytes/s that a device sends in one direction.
      source: who published which figure, and what it was divided by.
    """

    name: str
    bandwidth: float
    source: str

    def __str__(self) -> str:
        return f"{self.name}, {self.bandwidth / 1e9:g} GB/s in one direction ({self.source})"


def _torus(chip: float, links: int) -> tuple[Link, ...]:
    source = f"Google Cloud: {chip:g} GB/s per chip both ways, over {links} links"
    return (Link("one ICI link", chip * 1e9 / 2 / links, source),)


def _nvlink(both_ways: float) -> Link:
    return Link("NVLink", both_ways * 1e9 / 2, f"NVIDIA: {both_ways:g} GB/s per GPU both ways")


_NDR = Link("InfiniBand NDR", 50e9, "NVIDIA: 400 Gbit/s per ConnectX-7, one for each GPU")

_LINKS: dict[str, tuple[Link, ...]] = {
    "v5e": _torus(400, 4),
    "v5p": _torus(1200, 6),
    "v6e": _torus(800, 4),
    "tpu7x": _torus(1200, 6),
    "a100": (_nvlink(600),),
    "h100": (_nvlink(900), _NDR),
    "h200": (_nvlink(900), _NDR),
    "b200": (_nvlink(1800),),
}
"""Source: docs.cloud.google.com/tpu/docs, one page per version, the bidirectional bandwidth of a chip's ICI, which has
4 links in a 2D torus and 6 in a 3D torus (for v4 there is no such figure); NVIDIA's data sheets of the SXM modules and
of ConnectX-7, the adapter of DGX H100."""

GPUS_OF_HOST = 8
"""Of HGX and DGX systems; beyond a host NVLink ends."""


def links_between(kind: str | None, devices: int) -> tuple[Link, ...]:
    """The links that a mesh may use: for GPUs of more than one host also the network; none where none is published.

    Args:
      kind: as in a Target, e.g. `v5e`.
      devices: of the mesh.
    """
    found = _LINKS.get(kind or "", ())
    return found if devices > GPUS_OF_HOST else found[:1]
