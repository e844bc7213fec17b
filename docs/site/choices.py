"""What can be chosen in the interactive support matrix, and which combinations of it are resolved for it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kernelry.masks.form import MaskForm
from kernelry.masks.parse import parse_form
from kernelry.request.request import Request
from kernelry.request.target import Target

TARGETS = ("cpu", "gpu:a100", "gpu:h100", "gpu:b200", "tpu:v5e", "tpu:v5p", "tpu:v6e", "tpu:tpu7x")
MODES = ("train", "prefill", "decode")
LENGTHS = (128, 1024, 4096, 8192, 32768, 131072)
SOME_LENGTHS = (1024, 8192, 32768)
FEW_LENGTHS = (1024, 8192)
MODEL_LENGTHS = (1024, 8192, 32768)
MODEL_CACHES = ("contiguous", "paged:128")
PAGE_SIZE = 128


@dataclasses.dataclass(frozen=True)
class Mask:
    """A mask to choose, as the command writes it: of queries and keys of one length, and of a decode step over a cache.

    None means that it is not offered there.
    """

    name: str
    label: str
    whole: str | None
    step: str | None

    def text(self, mode: str) -> str | None:
        """The expression in a mode."""
        return self.step if mode == "decode" else self.whole


MASKS = (
    Mask("causal", "causal", "causal", "causal & lengths"),
    Mask("full", "full", "full", "lengths"),
    Mask("window", "causal, window of 1,024 keys", "window(1023)", "window(1023) & lengths"),
    Mask("chunked", "causal in chunks of 8,192", "chunked(8192)", "chunked(8192) & lengths"),
    Mask("packed", "causal & segments", "causal & segments", None),
    Mask("packed_window", "window & segments", "window(1023) & segments", None),
    Mask("prefix", "prefix, then causal", "prefix_lm", "prefix_lm & lengths"),
    Mask("spans", "causal | spans (image tokens)", "causal | spans", None),
    Mask("around", "window of 512 on each side", "window(512, 512)", None),
    Mask("padding", "full & lengths (padding)", "lengths", None),
    Mask("blocks", "causal in blocks of 32 (diffusion)", "block_causal(32)", None),
    Mask("dense", "dense", "dense", "dense"),
)
FEW_MASKS = ("causal", "window", "packed")


@dataclasses.dataclass(frozen=True)
class Option:
    """What a request may have besides the plain one.

    Args:
      name: its name in the page's address.
      group: `heads`, `storage` and `dtype`, of which one is chosen, or `feature`.
      label: how the page shows it.
      fields: of the request; a bias is shaped by the request's sizes.
      arguments: of `kernelry explain`.
      config: lines of the `[attention]` table of a config, for what has no argument.
      modes: in which it is offered.
      bias: whether there is a bias [1, N, T, S].
    """

    name: str
    group: str
    label: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arguments: str = ""
    config: str = ""
    modes: tuple[str, ...] = MODES
    bias: bool = False


def _heads(name: str, label: str, n: int, k: int, h: int, d: int | None = None) -> Option:
    fields = {"q_heads": n, "kv_heads": k, "head_dim": h, "value_dim": h if d is None else d}
    value_dim = "" if d is None else f" --value-dim {d}"
    return Option(name, "heads", label, fields, f"--heads {n} --kv-heads {k} --head-dim {h}{value_dim}")


_SERVING = ("prefill", "decode")
PLAIN_HEADS = _heads("grouped", "grouped: N=32 K=8 H=128", 32, 8, 128)
OPTIONS = (
    _heads("equal", "equal: N=32 K=32 H=128", 32, 32, 128),
    _heads("h64", "H=64: N=32 K=8", 32, 8, 64),
    _heads("h256", "H=256: N=32 K=8", 32, 8, 256),
    _heads("mla", "MLA: N=128 K=128 H=192 D=128", 128, 128, 192, 128),
    Option(
        "absorbed",
        "heads",
        "MLA, absorbed: N=128 K=1 H=576 D=512, values in keys",
        {"q_heads": 128, "kv_heads": 1, "head_dim": 576, "value_dim": 512, "kv_layout": "value_in_key"},
        "--heads 128 --kv-heads 1 --head-dim 576 --value-dim 512 --kv-layout value_in_key",
        modes=_SERVING,
    ),
    Option("float32", "dtype", "float32", {"dtype": "float32"}, "--dtype float32"),
    Option(
        "paged",
        "storage",
        f"pages of {PAGE_SIZE}",
        {"page_size": PAGE_SIZE},
        f"--page-size {PAGE_SIZE}",
        modes=_SERVING,
    ),
    Option("int8", "storage", "int8", {"kv_quantization": "int8"}, "--kv-quantization int8", modes=_SERVING),
    Option(
        "paged_int8",
        "storage",
        f"int8, in pages of {PAGE_SIZE}",
        {"page_size": PAGE_SIZE, "kv_quantization": "int8"},
        f"--page-size {PAGE_SIZE} --kv-quantization int8",
        modes=_SERVING,
    ),
    Option("soft_cap", "feature", "soft cap", {"soft_cap": 50.0}, "--soft-cap 50"),
    Option("sinks", "feature", "sinks", {"sinks": True}, "--sinks"),
    Option("bias", "feature", "bias [1, N, T, S]", config="bias = true", bias=True),
    Option("dropout", "feature", "dropout", {"dropout_rate": 0.1}, config="dropout_rate = 0.1", modes=("train",)),
    Option("partial", "feature", "partial result, with statistics", {"partial": True}, "--partial"),
    Option("max_logits", "feature", "largest logits", {"max_logits": True}, config="record_max_logits = true"),
)
BY_NAME = {option.name: option for option in OPTIONS}
PAIRS = (
    *(("soft_cap", other) for other in ("bias", "sinks", "float32", "h256", "paged")),
    *(("sinks", other) for other in ("float32", "h64", "paged", "max_logits")),
    *(("bias", other) for other in ("dropout", "equal", "float32", "h64")),
    *(("dropout", other) for other in ("equal", "h64")),
    *(("partial", other) for other in ("h64", "mla", "paged", "paged_int8", "absorbed")),
    *(("max_logits", other) for other in ("h64", "mla")),
    *(("paged", other) for other in ("equal", "h64", "h256", "absorbed")),
    *(("paged_int8", other) for other in ("h64", "h256", "absorbed")),
    *(("float32", other) for other in ("equal", "h64", "h256", "mla")),
    ("int8", "absorbed"),
)
LEFT_OUT = (
    "other sizes: the batch is 1, and lengths, heads, windows and pages are those that can be chosen here",
    "float16, int4 and float8, interleaved pages, scales, precision and other normalizations",
    f"one option with another length than {', '.join(f'{n:,}' for n in SOME_LENGTHS)}",
    f"two options with another length than {', '.join(f'{n:,}' for n in FEW_LENGTHS)}, or with another mask than "
    "causal, a window, or causal & segments",
    "most pairs of two options, and all of three or more",
    "a chunk of a prompt, where queries are fewer than keys but more than one",
    "meshes: `kernelry explain --sharding`",
    "what one change would make another kernel win: explain looks for that, too",
)


def request_of(target: str, mode: str, length: int, mask: str, options: Iterable[str] = ()) -> Request:
    """The request of a cell.

    Args:
      target, mode, mask, options: names of what can be chosen.
      length: S, and T but in decode, where T is 1.
    """
    chosen = [PLAIN_HEADS, *(BY_NAME[name] for name in options)]
    fields = {"dtype": "bfloat16"} | {name: value for option in chosen for name, value in option.fields.items()}
    q_len = 1 if mode == "decode" else length
    if any(option.bias for option in chosen):
        fields["bias"] = (1, fields["q_heads"], q_len, length)
    form = _form(mask, mode)
    return Request(target=Target.parse(target), mode=mode, q_len=q_len, kv_len=length, mask=form, **fields)  # type: ignore[arg-type]


@functools.cache
def _form(mask: str, mode: str) -> MaskForm:
    [text] = [each.text(mode) for each in MASKS if each.name == mask]
    assert text is not None, f"{mask} is not offered in {mode}"
    return parse_form(text, anywhere=mode == "decode")


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of the grid: one mode, one set of options, and the masks and lengths that are resolved for them."""

    mode: str
    options: tuple[str, ...]
    masks: tuple[str, ...]
    lengths: tuple[int, ...]

    def requests(self) -> Iterator[Request]:
        """The requests, targets first, then masks, then lengths."""
        for target, mask, length in itertools.product(TARGETS, self.masks, self.lengths):
            yield request_of(target, self.mode, length, mask, self.options)


def blocks() -> Iterator[Block]:
    """The grid."""
    for mode in MODES:
        masks = tuple(mask.name for mask in MASKS if mask.text(mode))
        few = tuple(name for name in FEW_MASKS if name in masks)
        offered = [option.name for option in OPTIONS if mode in option.modes]
        yield Block(mode, (), masks, LENGTHS)
        yield from (Block(mode, (name,), masks, SOME_LENGTHS) for name in offered)
        pairs = (pair for pair in PAIRS if set(pair) <= set(offered))
        yield from (Block(mode, tuple(sorted(pair)), few, FEW_LENGTHS) for pair in pairs)
