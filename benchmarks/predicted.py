"""What libtpu's schedules say of the two splash kernels: cycles of a head, with each kernel's default blocks.

The predictions are the table of kernelry-tpu-splash; nothing is timed. A training pass is forward and backward, with
what the gradient of the queries moves between the parts of the backward pass.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from fitting import Row, mean

from kernelry import masks
from kernelry.plugin import KernelSpec, Mode, Request, Tiling
from kernelry_tpu_splash.plugin import SPLASH, TOKAMAX_SPLASH
from kernelry_tpu_splash.predictions import cycles_to_move, predictions, visited

FILE = "plugins/tpu_splash/src/kernelry_tpu_splash/predictions.json"
KINDS = ("v5e", "v5p", "v6e", "tpu7x")
DIMS = (64, 128, 256)
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
MASKS: Mapping[str, masks.Mask] = {
    "causal": masks.Causal(),
    "full": masks.Full(),
    "window": masks.SlidingWindow(1023),
}
_FORWARD = ("block_q", "block_kv", "block_kv_compute")
_KEYS = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")


def compiler() -> str:
    """Who predicted."""
    return str(json.loads((Path(__file__).parents[1] / FILE).read_text(encoding="utf-8"))["compiler"])


def request(kind: str | None, length: int, mask: str, dim: int, mode: Mode, dtype: str = "bfloat16") -> Request:
    target = f"tpu:{kind}" if kind else "tpu"
    return Request(
        target=target, q_len=length, mask=MASKS[mask], head_dim=dim, value_dim=dim, mode=mode, dtype=dtype
    )  # fmt: skip


def rows(mode: Mode, names: Iterable[str], lengths: Iterable[int] = LENGTHS, kinds: Iterable[str] = KINDS) -> list[Row]:
    """The cycles of both kernels, by length."""
    names = tuple(names)
    return [
        (length, {spec.name: cycles(spec, request(kind, length, name, dim, mode)) for spec in (SPLASH, TOKAMAX_SPLASH)})
        for kind in kinds
        for length in lengths
        for name in names
        for dim in DIMS
    ]


def shares(mode: Mode, names: Iterable[str], lengths: Iterable[int]) -> Iterator[float]:
    """Of each kind the cycles of tokamax_splash over those of splash: the geometric mean."""
    for kind in KINDS:
        found = rows(mode, names, lengths, [kind])
        yield mean(times[TOKAMAX_SPLASH.name] / times[SPLASH.name] for _, times in found)


@functools.cache
def cycles(spec: KernelSpec, asked: Request) -> float:
    """Of a head, with the default tiling."""
    tiling, walks = spec.tilings(asked)[0], spec is TOKAMAX_SPLASH
    forward = _of(spec, "forward", asked, tiling, _FORWARD, walks)
    return forward if asked.mode is Mode.PREFILL else forward + _backward(spec, asked, tiling)


def _of(
    spec: KernelSpec, part: str, asked: Request, tiling: Tiling, names: tuple[str, ...], walks: bool = False
) -> float:
    blocks = tuple(tiling[name] for name in names)
    found = predictions(spec.name, part, asked, walks=walks)
    known = next(each.cycles for each in found if each.blocks[: len(blocks)] == blocks)
    assert known is not None  # the kinds, dims and dtype above are in the table
    return known


def _backward(spec: KernelSpec, asked: Request, tiling: Tiling) -> float:
    parts, length = asked.kv_len // tiling["block_kv_dkv"], asked.q_len
    if spec is SPLASH:
        if tiling["backward_kernels"] == 2:
            apart = _of(spec, "dq", asked, tiling, ("block_q_dq", "block_kv_dq"))
            return _of(spec, "dkv", asked, tiling, _KEYS) + apart
        written = 2 * parts * length * 2  # bytes of a column of dQ: written and read in bfloat16
        return _of(spec, "fused", asked, tiling, _KEYS) + cycles_to_move(written * asked.head_dim, asked)
    walks = tiling["dq_reduction_steps"] != 1
    written = 2 * parts * length * 4  # in float32
    if walks:  # each visited block reads and writes its rows of one of three sums
        blocks = visited(asked.mask, (length, asked.kv_len), tiling["block_q_dkv"], tiling["block_kv_dkv"]).blocks
        written = 2 * 4 * (blocks * tiling["block_q_dkv"] + 3 * length)
    return _of(spec, "fused", asked, tiling, _KEYS, walks) + cycles_to_move(written * asked.head_dim, asked)
