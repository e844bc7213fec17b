"""The data of the interactive support matrix: what `kernelry.explain` says of a grid of requests, and of named models.

Each answer is what `explain` tells of the request, so that the page decides nothing by itself. All libraries are assumed to
be there on every target, as `explain` assumes of another machine; environment variables and measured times of the machine
that builds the site do not count. What still shows of it is its version of Python, which some kernels need to be newer:
the data names it.

Texts repeat a lot, and are written once: a cell of the grid is a number of an answer, an answer numbers of a rule, a plan
and candidates, a candidate the numbers of its lines.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import platform
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import importlib_metadata
import jax

import kernelry
from kernelry.kernel.refusal import RefusalCode
from kernelry.kernel.spec import Environment, Knowledge
from kernelry.masks.form import MaskForm
from kernelry.masks.parse import parse_form
from kernelry.models.named import model_from, named_configs
from kernelry.phases.calls import calls
from kernelry.phases.model_shape import CacheShape, ModelShape
from kernelry.phases.resolving import remarks_on
from kernelry.policy.measurements import Measurements
from kernelry.policy.policy import Policy, Switches
from kernelry.request.request import Request
from kernelry.request.target import Target
from kernelry.resolution.explanation import Candidate, Resolution
from kernelry.resolution.telling import answer_of

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
        "paged", "storage", f"pages of {PAGE_SIZE}", {"page_size": PAGE_SIZE}, f"--page-size {PAGE_SIZE}", modes=_SERVING
    ),
    Option("int8", "storage", "int8", {"kv_quantization": "int8"}, "--kv-quantization int8", modes=_SERVING),
    Option(
        "paged_int8",
        "storage",
        f"pages of {PAGE_SIZE}, int8",
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
    return Request(target=_target(target), mode=mode, q_len=q_len, kv_len=length, mask=form, **fields)  # type: ignore[arg-type]


_target = functools.cache(Target.parse)


@functools.cache
def _form(mask: str, mode: str) -> MaskForm:
    [text] = [each.text(mode) for each in MASKS if each.name == mask]
    assert text is not None, f"{mask} is not offered in {mode}"
    return parse_form(text, anywhere=mode == "decode")


def explained(request: Request) -> Resolution:
    """What `kernelry.explain` says where every library is there, and nothing is set or measured."""
    return kernelry.explain(
        request,
        policy=_shipped(),
        measurements=Measurements(),
        environment=Environment(Knowledge.ASSUMED),
        changes=False,
    )


@functools.cache
def _shipped() -> Policy:
    return Policy.shipped(switches=Switches())


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


class Interned:
    """Values in the order in which they were first seen, and their numbers."""

    def __init__(self) -> None:
        self.values: dict[Hashable, int] = {}

    def __call__(self, value: Hashable) -> int:
        return self.values.setdefault(value, len(self.values))

    @property
    def listed(self) -> list[Any]:
        """The values; that of number i is the one at place i."""
        return list(self.values)


SERVES, RESERVED, REFUSES, ELSEWHERE = range(4)
"""What a kernel answers that is not chosen: it could serve; it is passed over for a reservation; it refuses; it is made
for other platforms."""


def state_of(candidate: Candidate) -> int:
    """What a kernel answers that is not chosen, in one number."""
    if not candidate.refusals:
        return SERVES
    if candidate.reservations:
        return RESERVED
    return ELSEWHERE if any(r.code is RefusalCode.PLATFORM for r in candidate.refusals) else REFUSES


class Answers:
    """Resolutions as numbers of shared texts."""

    def __init__(self) -> None:
        self.answers, self.plans, self.others = Interned(), Interned(), Interned()
        self.candidates, self.lines = Interned(), Interned()

    def __call__(self, resolution: Resolution) -> int:
        """The number of an answer: of its rule, of its plan, of the kernels that were not chosen, of its advice.

        The number of a plan or an advice that there is not is −1.
        """
        others = tuple(self._candidate(resolution, c) for c in resolution.candidates if c.name != resolution.kernel)
        advice = -1 if resolution.advice is None else self.lines(resolution.advice)
        return self.answers((self.lines(resolution.rule), self._plan(resolution), self.others(others), advice))

    def _candidate(self, resolution: Resolution, candidate: Candidate) -> int:
        lines = map(self.lines, answer_of(resolution, candidate))
        return self.candidates((candidate.name, state_of(candidate), *lines))

    def _plan(self, resolution: Resolution) -> int:
        plan, winner = resolution.plan, resolution.winner
        if plan is None or winner is None:
            return -1
        adapters = tuple(part for step in plan.steps for part in (step.adapter.name, str(step.cost)))
        together = str(plan.cost) if len(plan.steps) > 1 else ""
        tiling = str(plan.tiling) if plan.tiling.values else ""
        notes = tuple(map(self.lines, (*map(str, winner.reservations), *winner.notes)))
        return self.plans((plan.kernel.name, tiling, plan.tiling.source or "", together, adapters, notes))

    def to_json(self) -> dict[str, Any]:
        """The tables that the numbers are about."""
        names = ("answers", "plans", "others", "candidates", "lines")
        return {name: getattr(self, name).listed for name in names}


def model_calls(name: str, length: int, cache: str, target: str) -> Iterator[tuple[str, str, Request]]:
    """The calls of a named model, as `kernelry explain --model` lists them: kind of layers, phase, request."""
    shape = ModelShape(q_len=length, max_len=length, cache=CacheShape.parse(cache))
    for kind in model_from(name).kinds:
        for call in calls(kind, shape.of(kind.config), _target(target)):
            yield kind.name, call.name, call.request


def _models(answers: Answers) -> Iterator[dict[str, Any]]:
    for name in sorted(named_configs()):
        model = model_from(name)
        kinds = [{"name": kind.name, "text": str(kind), "remarks": list(remarks_on(kind))} for kind in model.kinds]
        others = [*map(str, model.others), *model.remarks]
        rows: dict[str, list[list[Any]]] = {}
        for cache in MODEL_CACHES:
            called = [list(model_calls(name, length, cache, target)) for target in TARGETS for length in MODEL_LENGTHS]
            rows[cache] = [
                [kind, call, [answers(explained(asked[place][2])) for asked in called]]
                for place, (kind, call, _) in enumerate(called[0])
            ]
        yield {"name": name, "headline": model.headline, "kinds": kinds, "others": others, "rows": rows}


def data() -> dict[str, Any]:
    """The whole matrix as plain data, which docs/assets/matrix.js reads.

    Raises:
      RuntimeError: the plugins of this repository are not all installed, or there are others.
    """
    _check_plugins()
    answers = Answers()
    grid = [
        {
            "mode": block.mode,
            "options": list(block.options),
            "masks": list(block.masks),
            "lengths": list(block.lengths),
            "cells": [answers(explained(request)) for request in block.requests()],
        }
        for block in blocks()
    ]
    models = list(_models(answers))
    return {
        "versions": {"kernelry": kernelry.__version__, "Python": _python(), "jax": jax.__version__},
        "targets": list(TARGETS),
        "modes": list(MODES),
        "lengths": list(LENGTHS),
        "model_lengths": list(MODEL_LENGTHS),
        "caches": [{"name": cache, "arguments": _cache_arguments(cache)} for cache in MODEL_CACHES],
        "masks": [dataclasses.asdict(mask) for mask in MASKS],
        "plain_heads": {"label": PLAIN_HEADS.label, "arguments": PLAIN_HEADS.arguments},
        "options": [_option_json(option) for option in OPTIONS],
        "left_out": list(LEFT_OUT),
        "kernels": {
            kernel.name: {"distribution": kernel.distribution, "summary": kernel.spec.summary}
            for kernel in kernelry.kernels()
        },
        "grid": grid,
        "models": models,
        **answers.to_json(),
    }


def _option_json(option: Option) -> dict[str, Any]:
    names = ("name", "group", "label", "arguments", "config", "modes")
    return {name: getattr(option, name) for name in names}


def _cache_arguments(cache: str) -> str:
    shape = CacheShape.parse(cache)
    size = "" if shape.page_size is None else f"--page-size {shape.page_size}"
    return f"{size} --kv-quantization {shape.storage}" if shape.storage else size


def _python() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def _check_plugins() -> None:
    """The page is about the kernels of this repository: others, and faults, would make another page."""
    found = kernelry.plugins()
    ours = {f"kernelry-{path.parent.name.replace('_', '-')}" for path in _ROOT.glob("plugins/*/pyproject.toml")}
    there = {plugin.distribution.split()[0] for plugin in found if plugin.enabled}
    if ours != there:
        raise RuntimeError(
            f"the support matrix is about the plugins {', '.join(sorted(ours))}, and those that are loaded are "
            f"{', '.join(sorted(there)) or 'none'}; build the site in an environment with these alone, as make docs does."
        )


_ROOT = Path(__file__).parents[2]


if __name__ == "__main__":
    print(json.dumps(data(), separators=(",", ":")))
