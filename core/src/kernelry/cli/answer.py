"""A resolution for people: what was asked, the winner and its reasons, then the other kernels in brief or in full."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, final

from rich.console import RenderableType

from kernelry.cli.output import Paragraph
from kernelry.errors import ConfigError, sentence
from kernelry.kernel.refusal import RefusalCode
from kernelry.registry import installed
from kernelry.request.request import NEUTRAL
from kernelry.resolution.explanation import Candidate, Resolution
from kernelry.resolution.telling import answer_of, left_out_of, told_of_shards

_FEW = 2
"""Kernels of other platforms whose reasons are shown although others are refused for theirs."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """The part of a request that comes from a config.

    Args:
      source: the config.
      fields: the fields that the config sets to something other than their neutral value, as text.
      overridden: the config's values of fields that were given on the command line.
    """

    source: str
    fields: dict[str, str]
    overridden: dict[str, str]

    @classmethod
    def of(cls, source: str, said: Mapping[str, Any], instead: Mapping[str, Any]) -> Asked:
        """Compares what a config says and what was given instead, both as fields of a request."""
        neutral = {**NEUTRAL, "scale": None, "gradients": None}
        taken = {name: value for name, value in said.items() if instead.get(name, value) == value}
        asked = {name: value for name, value in taken.items() if value != neutral[name]}
        overridden = {name: str(said[name]) for name in instead if name not in taken}
        return cls(source, {name: str(value) for name, value in asked.items()}, overridden)

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        fields = " ".join(f"{name}={value}" for name, value in self.fields.items()) or "nothing but its rules"
        instead = " ".join(f"{name}={value}" for name, value in self.overridden.items())
        return f"from {self.source}: {fields}" + (f"; not its {instead}, as given here" if instead else "")


def resolution_parts(
    resolution: Resolution, asked: Asked | None = None, *, everything: bool = False
) -> Iterator[RenderableType]:
    """A resolution for people.

    Args:
      resolution: the resolution.
      asked: what of its request came from a config.
      everything: whether each of the other kernels is shown with its full answer, in order of preference.
    """
    yield Paragraph(str(resolution.request))
    if asked is not None:
        yield Paragraph(str(asked))
    yield ""
    yield from _without_winner(resolution) if resolution.plan is None else _of_winner(resolution)
    yield from _block("Nearest changes:", (Paragraph(str(change), 2) for change in resolution.changes))
    yield from _block("On the mesh:", _of_devices(resolution))
    if everything:
        others = [candidate for candidate in resolution.candidates if candidate.name != resolution.kernel]
        yield from _block("Other kernels:" if resolution.plan else "Why:", _in_full(resolution, others))
    elif resolution.plan is None:
        yield from _block("Why:", _refusals(resolution))
    else:
        yield from _block("Other kernels (--all shows their answers in full):", _folded(resolution))
    left_out = left_out_of(resolution)
    yield from _block("", [] if left_out is None else [Paragraph(f"{left_out[:1].upper()}{left_out[1:]}")])


def _block(title: str, parts: Iterable[RenderableType]) -> Iterator[RenderableType]:
    """Parts below an empty line and a title; nothing where there are none."""
    found = list(parts)
    if found:
        yield ""
        yield from [Paragraph(title, head=len(title))] if title else []
        yield from found


def _of_winner(resolution: Resolution) -> Iterator[RenderableType]:
    """The kernel that was chosen, why, and with what."""
    plan, winner = resolution.plan, resolution.winner
    assert plan is not None
    assert winner is not None
    yield Paragraph(f"→ {winner.name} [{winner.distribution}]", hang=4, head=2 + len(winner.name))
    if plan.kernel.summary:
        yield Paragraph(plan.kernel.summary, 4)
    _, *more = answer_of(resolution, winner)
    yield from (Paragraph(line, 4) for line in more)
    if plan.tiling.values:
        source = f" ({plan.tiling.source})" if plan.tiling.source else ""
        yield Paragraph(f"tiling: {plan.tiling}{source}", 4)
    yield Paragraph(f"decided by: {resolution.rule}", 4)


def _without_winner(resolution: Resolution) -> Iterator[RenderableType]:
    text = "No kernel serves this request."
    yield Paragraph(text, head=len(text))
    if resolution.advice is not None:
        yield Paragraph(resolution.advice, 4)
    yield Paragraph(f"decided by: {resolution.rule}", 4)


def _of_devices(resolution: Resolution) -> Iterator[RenderableType]:
    for line in told_of_shards(resolution):
        yield Paragraph(line.lstrip(), 2 + len(line) - len(line.lstrip()))


def _refusals(resolution: Resolution) -> Iterator[RenderableType]:
    """All reasons of all kernels, but for those of other platforms where there are more than two of them."""
    elsewhere = [candidate for candidate in resolution.candidates if _is_elsewhere(candidate)]
    if len(elsewhere) <= _FEW:
        elsewhere = []
    yield from _in_full(resolution, [each for each in resolution.candidates if each not in elsewhere])
    yield from _named(f"not for {resolution.request.target.platform}", elsewhere)


def _in_full(resolution: Resolution, candidates: Iterable[Candidate]) -> Iterator[RenderableType]:
    """The answers of candidates; that there are no kernels, where there are none."""
    if not resolution.candidates:
        yield Paragraph(f"no kernels: {installed.why_none()}", 2)
    for candidate in candidates:
        yield Paragraph(f"{candidate.name} [{candidate.distribution}]", 2, head=len(candidate.name))
        yield from (Paragraph(line, 4) for line in answer_of(resolution, candidate))


def _folded(resolution: Resolution) -> Iterator[RenderableType]:
    """The other kernels: those that are preferred first, each refusal by its first reason."""
    names = [candidate.name for candidate in resolution.candidates]
    place = names.index(str(resolution.kernel))
    preferred, lower = resolution.candidates[:place], resolution.candidates[place + 1 :]
    yield from _reasons([each for each in preferred if not _is_elsewhere(each)], "preferred, but ")
    able = [each for each in lower if not each.refusals]
    yield from _named("could serve, ranked lower", able)
    yield from _reasons([each for each in lower if each.refusals and not _is_elsewhere(each)], "")
    yield from _named(f"not for {resolution.request.target.platform}", filter(_is_elsewhere, resolution.candidates))


def _reasons(refused: Iterable[Candidate], head: str) -> Iterator[RenderableType]:
    """Kernels by their first reason, and how many more they have."""
    found: dict[str, list[str]] = {}
    for candidate in refused:
        first, *others = candidate.refusals
        passed_over = "passed over: " if candidate.reservations else ""
        more = f" (and {len(others)} more)" if others else ""
        found.setdefault(f"{passed_over}{first.detail}{more}", []).append(candidate.name)
    yield from (Paragraph(f"{', '.join(names)}: {head}{reason}", 2) for reason, names in found.items())


def _named(what: str, candidates: Iterable[Candidate]) -> Iterator[RenderableType]:
    """Kernels of which one thing is to be said, with the adapters that they would need."""
    told = [f"{each.name}{_through(each)}" for each in candidates]
    if told:
        yield Paragraph(f"{what}: {', '.join(told)}", 2)


def _through(candidate: Candidate) -> str:
    adapters = " and ".join(step.adapter.name for step in candidate.steps)
    return f" (through {adapters})" if adapters else ""


def _is_elsewhere(candidate: Candidate) -> bool:
    return any(refusal.code is RefusalCode.PLATFORM for refusal in candidate.refusals)


def advice_of(resolutions: Iterable[Resolution]) -> list[str]:
    """What to do where no kernel serves, each piece of advice once."""
    return list(dict.fromkeys(found.advice for found in resolutions if found.advice is not None))


def check_names(resolutions: Sequence[Resolution]) -> None:
    """Raises where a kernel was asked for by name that no installed plugin has.

    Raises:
      ConfigError: there is such a kernel.
    """
    for resolution in resolutions:
        for candidate in resolution.candidates:
            for refusal in candidate.refusals:
                if refusal.code is RefusalCode.NOT_INSTALLED:
                    asked = f"kernel {candidate.name!r}, by {resolution.rule}"
                    raise ConfigError(sentence(f"{asked}: {refusal}"))
