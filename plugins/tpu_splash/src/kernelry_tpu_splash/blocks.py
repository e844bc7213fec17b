"""Blocks of the splash kernels: multiples of the lanes that divide a length."""

from __future__ import annotations

import numpy as np

from kernelry.errors import ConfigError
from kernelry.plugin import Tiling
from kernelry_tpu_splash.lanes import LANES

SIZES = (512, 1024, 256, 128)
"""Elements; the block sizes of the search space. The default, 512, is MaxText's (sa_block_q and its
siblings); 2048 runs out of vector memory on v5e."""

LAYOUTS = {"q_layout": 1, "k_layout": 1, "v_layout": 1}
"""1 has the head dimension last, 2 the sequence: the vendors' QKVLayout."""


def checked_sizes(kernel: str, tiling: Tiling, lengths: tuple[int, int]) -> dict[str, int]:
    """The blocks of a tiling, by the vendors' names.

    Raises:
      ConfigError: one does not divide its length, or what contains it.
    """
    sizes: dict[str, int] = {}
    for name, size in tiling.values:
        if not name.startswith("block_"):
            continue
        side, length = ("q_len", lengths[0]) if name.startswith("block_q") else ("kv_len", lengths[1])
        block = sizes[name] = min(size, length)  # one block of 1024 holds a sequence of 512
        if block % LANES or length % block:
            raise ConfigError(
                f"tiling: {name}={block} of {kernel} is not a multiple of {LANES} that divides {side}={length}"
            )
    for part, whole in (("block_kv_compute", "block_kv"), ("block_kv_dkv_compute", "block_kv_dkv")):
        if sizes[whole] % sizes[part]:
            raise ConfigError(f"tiling: {part}={sizes[part]} of {kernel} does not divide {whole}={sizes[whole]}")
    return sizes


def one_of(kernel: str, tiling: Tiling, name: str, allowed: tuple[int, ...]) -> int:
    """A tunable that has few values.

    Raises:
      ConfigError: it is none of them.
    """
    value = tiling[name]
    if value not in allowed:
        raise ConfigError(f"tiling: {name}={value} of {kernel} is not {' or '.join(map(str, allowed))}")
    return value


def narrowest(numbers: np.ndarray) -> np.ndarray:
    """In the narrowest integers that hold them: they live in the scalar memory, of which there is little."""
    kinds = (np.int8, np.int16, np.int32)
    return numbers.astype(next(kind for kind in kinds if numbers.max(initial=0) <= np.iinfo(kind).max))
