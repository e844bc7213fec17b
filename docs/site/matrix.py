"""The data of the interactive support matrix: what `kernelry.explain` says of a grid of requests, and of named models.

Each answer is what `explain` tells of the request, so that the page decides nothing by itself. All libraries are
assumed to be installed on every target, as `explain` assumes of another machine; environment variables and measured
times of the machine that builds the site do not count. Its version of Python does, as some kernels need a newer one:
the data names it.

Texts repeat a lot, and are written once: a cell of the grid is the number of an answer, an answer has the numbers of a
rule, a plan and the kernels that were not chosen, and each of these has the numbers of its lines.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import jax
from choices import (
    LEFT_OUT,
    LENGTHS,
    MASKS,
    MODEL_CACHES,
    MODEL_LENGTHS,
    MODES,
    OPTIONS,
    PLAIN_HEADS,
    TARGETS,
    Option,
    blocks,
)

import kernelry
from kernelry.kernel.refusal import RefusalCode
from kernelry.kernel.spec import Environment, Knowledge
from kernelry.models.model import LayerKind
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

_ROOT = Path(__file__).parents[2]


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


_model = functools.cache(model_from)


def model_calls(name: str, length: int, cache: str, target: str) -> Iterator[tuple[str, str, Request]]:
    """The calls of a named model, as `kernelry explain --model` lists them: kind of layers, phase, request."""
    shape = ModelShape(q_len=length, max_len=length, cache=CacheShape.parse(cache))
    for kind in _model(name).kinds:
        for call in calls(kind, shape, Target.parse(target)):
            yield kind.name, call.name, call.request


def _models(answers: Answers) -> Iterator[dict[str, Any]]:
    for name in sorted(named_configs()):
        model = _model(name)
        kinds = [_kind_json(kind) for kind in model.kinds]
        others = [*map(str, model.others), *model.remarks]
        rows: dict[str, list[list[Any]]] = {}
        for cache in MODEL_CACHES:
            called = [list(model_calls(name, length, cache, target)) for target in TARGETS for length in MODEL_LENGTHS]
            rows[cache] = [
                [kind, call, [answers(explained(asked[place][2])) for asked in called]]
                for place, (kind, call, _) in enumerate(called[0])
            ]
        yield {"name": name, "headline": model.headline, "kinds": kinds, "others": others, "rows": rows}


def _kind_json(kind: LayerKind) -> dict[str, Any]:
    text = str(kind)  # which ends in the kind's own remarks
    return {"name": kind.name, "text": text, "remarks": [each for each in remarks_on(kind) if each not in text]}


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
        "caches": [_cache_json(cache) for cache in MODEL_CACHES],
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


def _cache_json(cache: str) -> dict[str, str]:
    size = CacheShape.parse(cache).page_size
    label, arguments = ("arrays", "") if size is None else (f"pages of {size}", f"--page-size {size}")
    return {"name": cache, "label": label, "arguments": arguments}


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
            f"{', '.join(sorted(there)) or 'none'}; build the site where these alone are installed, as make docs does."
        )
