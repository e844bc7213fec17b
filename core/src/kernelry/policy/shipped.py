"""The shipped preferences: thresholds and rules, each with the source of its number or of its order.

A source says whether an order was measured, predicted by a device's compiler, or published, and by whom. Where there is
none, it says so. tests/plugins/test_shipped_order.py compares the orders with the predictions and publications.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import final

from kernelry.errors import ConfigError, nearest
from kernelry.kernel.spec import AUTO
from kernelry.policy.rules import Condition, Range, Rule
from kernelry.request.request import Mode


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Threshold:
    """A number that decides between kernels, with its unit and where it comes from."""

    name: str
    value: int
    unit: str
    source: str


FLASH_MIN_Q_LEN = Threshold(
    "flash_min_q_len", 128, "query tokens", "MaxText 0.2.5: dot_product below 128 query tokens, flash from there on"
)
_LIBTPU = "predicted by libtpu 0.0.42.1, not measured"
_CHOOSING = "measured by benchmarks/choosing.py on two CPU cores"
CPU_BLOCKWISE = tuple(
    (mode, atoms, Threshold(f"cpu_blockwise_min_{'_'.join((mode.value, *atoms))}_kv_len", least, "key tokens", source))
    for mode, atoms, least, source in (
        (Mode.DECODE, (), 2048, "measured by benchmarks/decode.py on two CPU cores"),
        (Mode.PREFILL, (), 64, _CHOOSING),
        (Mode.TRAIN, ("segments",), 128, _CHOOSING),
        (Mode.TRAIN, ("full",), 1024, _CHOOSING),
        (Mode.TRAIN, (), 256, _CHOOSING),
    )
)
"""(mode, atoms of the mask, least S), the first that applies: training's backward pass has crossings of its own."""
BLOCKWISE_MIN_KV_LEN = Threshold(
    "blockwise_min_kv_len",
    8192,
    "key tokens, on accelerators where no kernel of their own serves",
    "dense float32 logits of 8 heads take 2 GiB from there on",
)
ADAPTERS_MAX_EXTRA_WORK = Threshold(
    "adapters_max_extra_work",
    300,
    "percent of the call's own multiplications",
    "tokamax's shipped H100 timings: Triton is 4.7 times as fast as XLA's dense attention (head dim 128, S = 16384)",
)
TOKAMAX_SPLASH_MIN_TRAIN_KV_LEN = Threshold(
    "tokamax_splash_min_train_kv_len",
    8192,
    "key tokens, in training on TPUs whose schedules are known",
    f"{_LIBTPU}: forward and backward, tokamax_splash takes 0.81 to 0.88 of splash's cycles with 8192 key tokens and "
    "more, and 1.00 to 1.05 with fewer",
)
SHIPPED_THRESHOLDS = (
    FLASH_MIN_Q_LEN,
    *(t for _, _, t in CPU_BLOCKWISE),
    BLOCKWISE_MIN_KV_LEN,
    TOKAMAX_SPLASH_MIN_TRAIN_KV_LEN,
    ADAPTERS_MAX_EXTRA_WORK,
)


def thresholds_with(values: Mapping[str, int]) -> dict[str, Threshold]:
    """Returns the shipped thresholds by name, some with a user's values.

    Raises:
      ConfigError: a name is unknown, or a value is not a number that it may be.
    """
    chosen = {threshold.name: threshold for threshold in SHIPPED_THRESHOLDS}
    for name, value in values.items():
        if name not in chosen:
            raise ConfigError(f"unknown threshold {name!r}{nearest(name, chosen)}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"threshold {name} must be an integer, 0 or more {chosen[name].unit}, got {value!r}.")
        chosen[name] = dataclasses.replace(chosen[name], value=value, source="the user's config")
    return chosen


_PREDICTED = ("v5e", "v5p", "v6e", "tpu7x")
"""TPUs whose schedules of splash and tokamax_splash are known, in bfloat16."""

_SPLASH, _TOKAMAX = ("splash", "tokamax_splash"), ("tokamax_splash", "splash")

_GPU = ("cudnn_jax", "pallas_flash", "pallas_mha", "tokamax_mosaic", "cudnn_te")
"""For training and prefill on GPUs: the vendor's library, then what serves most."""

_PUBLISHED_H100 = ("cudnn_jax", "tokamax_mosaic", "pallas_flash", "pallas_mha", "cudnn_te")

_PREFILL = f"{_LIBTPU}: tokamax_splash takes 0.95 to 0.97 of splash's cycles"
_WINDOWS = f"{_LIBTPU}: with a window, forward and backward, tokamax_splash takes 0.98 to 1.14 of splash's cycles"
_NOT_PREDICTED = "not measured, and not predicted for this kind or dtype: what needs no further package comes first"
_ON_H100 = (
    "published with tokamax 0.0.17, forward on an H100: cuDNN takes 0.93 of Mosaic's time, which takes 0.61 of that of "
    "tokamax's Triton kernel; the others are not measured"
)
_ON_A100 = (
    "published with tokamax 0.0.17, forward on an A100: cuDNN takes 1.03 of the time of tokamax's Triton kernel; the "
    "others are not measured"
)
_NOT_MEASURED = "not measured: the vendor's library, then what serves most"


def shipped_rules(thresholds: Mapping[str, Threshold]) -> tuple[Rule, ...]:
    """Returns the shipped preferences; the first that applies orders the kernels it names.

    Args:
      thresholds: by name.
    """
    short = thresholds[FLASH_MIN_Q_LEN.name]
    return (
        *_cpu(thresholds),
        _shipped(
            Condition(platform=("tpu",), mode=(Mode.DECODE,)),
            ("ragged", "dot_product"),
            f"{_LIBTPU}: on {', '.join(_PREDICTED)} ragged takes fewer cycles than its copies of separate keys and "
            "values",
        ),
        _shipped(
            Condition(platform=("gpu",), mode=(Mode.DECODE,)),
            ("pallas_decode", "dot_product"),
            "not measured: pallas_decode fetches the keys of a row in parts, and only those that it sees",
        ),
        _shipped(Condition(mode=(Mode.DECODE,)), ("dot_product",), "not measured: a decode step has few logits"),
        _shipped(Condition(q_len=Range(maximum=short.value - 1)), ("dot_product",), short.source),
        *_tpu(thresholds),
        *_gpu(thresholds),
        _shipped(Condition(), ("dot_product",), "the kernel for every platform"),
    )


def _cpu(thresholds: Mapping[str, Threshold]) -> Iterator[Rule]:
    for mode, atoms, threshold in CPU_BLOCKWISE:
        chosen = thresholds[threshold.name]
        short = Condition(platform=("cpu",), mode=(mode,), mask=atoms)
        long = dataclasses.replace(short, kv_len=Range(minimum=chosen.value))
        yield _shipped(long, ("blockwise", "dot_product"), chosen.source)
        yield _shipped(short, ("dot_product",), chosen.source)


def _tpu(thresholds: Mapping[str, Threshold]) -> Iterator[Rule]:
    blockwise = thresholds[BLOCKWISE_MIN_KV_LEN.name].value
    known = Condition(platform=("tpu",), kind=_PREDICTED, mode=(Mode.PREFILL,), dtype=("bfloat16",))
    training = dataclasses.replace(known, mode=(Mode.TRAIN,))
    windows = dataclasses.replace(training, mask=("window",))
    long = thresholds[TOKAMAX_SPLASH_MIN_TRAIN_KV_LEN.name]
    yield from _accelerator(known, _TOKAMAX, _PREFILL, blockwise)
    yield from _accelerator(windows, _SPLASH, _WINDOWS, blockwise)
    yield from _accelerator(training, _TOKAMAX, long.source, blockwise, long.value)
    yield from _accelerator(training, _SPLASH, long.source, blockwise)
    yield from _accelerator(Condition(platform=("tpu",)), _SPLASH, _NOT_PREDICTED, blockwise)


def _gpu(thresholds: Mapping[str, Threshold]) -> Iterator[Rule]:
    blockwise = thresholds[BLOCKWISE_MIN_KV_LEN.name].value
    hopper = Condition(platform=("gpu",), kind=("h100",), mode=(Mode.PREFILL,))
    ampere = dataclasses.replace(hopper, kind=("a100",))
    yield from _accelerator(hopper, _PUBLISHED_H100, _ON_H100, blockwise)
    yield from _accelerator(ampere, _GPU, _ON_A100, blockwise)
    yield from _accelerator(Condition(platform=("gpu",)), _GPU, _NOT_MEASURED, blockwise)


def _accelerator(
    when: Condition, use: tuple[str, ...], reason: str, blockwise: int, least: int | None = None
) -> Iterator[Rule]:
    """The rule from so many key tokens on, and before it the one with `blockwise` before `dot_product`."""
    long = dataclasses.replace(when, kv_len=Range(minimum=max(blockwise, least or 0)))
    yield _shipped(long, (*use, "blockwise", "dot_product"), reason)
    if least is None or least < blockwise:
        kv_len = None if least is None else Range(minimum=least)
        yield _shipped(dataclasses.replace(when, kv_len=kv_len), (*use, "dot_product"), reason)


def _shipped(when: Condition, use: tuple[str, ...], reason: str) -> Rule:
    return Rule(when, (*use, AUTO), source="shipped policy", reason=reason)


SHIPPED_RULES = shipped_rules(thresholds_with({}))
