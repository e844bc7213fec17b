"""Blocks of the splash kernels: multiples of the lanes that divide a length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kernelry.errors import ConfigError
from kernelry.plugin import Request, Tiling
from kernelry_tpu_splash.lanes import LANES
from kernelry_tpu_splash.predictions import Blocks, Prediction, fitting, predictions, source

_SIZES = (512, 1024, 256, 128)
"""Elements; the blocks of every pass where no schedule is known. The default, 512, is MaxText's (sa_block_q and its
siblings)."""

FORWARD = ("block_q", "block_kv", "block_kv_compute")
OF_KEYS = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
OF_QUERIES = ("block_q_dq", "block_kv_dq")
"""The vendors' names of a pass's blocks."""

LAYOUTS = {"q_layout": 1, "k_layout": 1, "v_layout": 1}
"""1 has the head dimension last, 2 the sequence: the vendors' QKVLayout."""


def ranked(kernel: str, part: str, request: Request, *, walks: bool = False) -> tuple[Prediction, ...]:
    """The blocks of a pass, the fastest first; one size after another where no schedule is known.

    Args:
      kernel, part, request, walks: as of `predictions`.
    """
    known, lengths = predictions(kernel, part, request, walks=walks), (request.q_len, request.kv_len)
    return known or tuple(dict.fromkeys(Prediction(fitting((size, size, size), lengths)) for size in _SIZES))


def named(names: tuple[str, ...], blocks: Blocks) -> dict[str, int]:
    """The tunables of a pass."""
    return dict(zip(names, blocks, strict=False))


def search_space(forward: Sequence[Prediction], backward: Sequence[Mapping[str, int]]) -> tuple[Tiling, ...]:
    """The default, then every other way to cut the forward pass, then every other backward pass.

    Args:
      forward: the fastest first.
      backward: all other tunables, the fastest first.
    """
    said = "" if forward[0].cycles is None else source()
    first = named(FORWARD, forward[0].blocks)
    values = [{**named(FORWARD, found.blocks), **backward[0]} for found in forward]
    values += [{**first, **found} for found in backward]
    tilings = (Tiling(tuple(sorted(found.items())), said) for found in values)
    return tuple(dict.fromkeys(tilings))


def checked_sizes(kernel: str, tiling: Tiling, lengths: tuple[int, int]) -> dict[str, int]:
    """The blocks of a tiling, by the vendors' names.

    Raises:
      ConfigError: one does not divide its length, or what contains it.
    """
    sizes: dict[str, int] = {}
    for name, size in tiling.values:
        if not name.startswith("block_") or name.endswith("_compute"):
            continue
        side, length = ("q_len", lengths[0]) if name.startswith("block_q") else ("kv_len", lengths[1])
        block = sizes[name] = min(size, length)  # one block of 1024 holds a sequence of 512
        if block % LANES or length % block:
            raise ConfigError(
                f"tiling: {name}={block} of {kernel} is not a multiple of {LANES} that divides {side}={length}"
            )
    for whole in ("block_kv", "block_kv_dkv"):
        part = f"{whole}_compute"
        size = sizes[part] = min(tiling[part], sizes[whole])
        if size % LANES or sizes[whole] % size:
            raise ConfigError(
                f"tiling: {part}={size} of {kernel} is not a multiple of {LANES} that divides {whole}={sizes[whole]}"
            )
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
