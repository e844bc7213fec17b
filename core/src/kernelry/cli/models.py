"""The kernels of a model, as a table: the kinds of its layers and their phases, on each of several targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, final

import typer
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table

from kernelry.cli.answer import Asked, resolution_parts
from kernelry.cli.output import Paragraph, Text
from kernelry.config.layer import AttentionConfig
from kernelry.kernel.refusal import RefusalCode
from kernelry.models.model import LayerKind, Model, ranges
from kernelry.phases.model_shape import ModelShape
from kernelry.phases.resolving import compared, remarks_on, resolved_calls
from kernelry.request.request import Mode
from kernelry.request.target import Target
from kernelry.resolution.explanation import Resolution


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A call of a kind of layers on every target.

    Args:
      kind: the kind of layers.
      call: e.g. `train` or `decode part 1`.
      resolutions: by target.
    """

    kind: LayerKind
    call: str
    resolutions: dict[str, Resolution]


@final
@dataclasses.dataclass(frozen=True, slots=True)
class ModelTable:
    """The kernels of a model.

    Args:
      model: the model.
      kinds: those of its kinds that are shown.
      shapes: the sizes of their calls.
      targets: the columns.
      rows: the calls of all kinds, one after another.
      disagreements: what does not fit together in a kind on a target, one sentence each.
      is_detailed: whether each row's explanation is shown, in place of the table.
      everything: whether these have the answers of all kernels in full.
    """

    model: Model
    kinds: tuple[LayerKind, ...]
    shapes: tuple[ModelShape, ...]
    targets: tuple[str, ...]
    rows: tuple[Row, ...]
    disagreements: tuple[str, ...]
    is_detailed: bool
    everything: bool

    @classmethod
    def of(
        cls,
        model: Model,
        kinds: tuple[LayerKind, ...],
        shape_for: Callable[[AttentionConfig], ModelShape],
        targets: Sequence[Target],
        *,
        mode: Mode | None,
        kernel: str,
        everything: bool = False,
    ) -> ModelTable:
        """Resolves the calls of kinds of a model's layers.

        Args:
          model: the model.
          kinds: those of its kinds that are shown.
          shape_for: returns the sizes of the calls, for the config of a kind.
          targets: where.
          mode: the only mode whose calls are shown, or None.
          kernel: a kernel's name, absolutely, or `auto`.
          everything: whether every call is explained, with the answers of all kernels in full.

        Raises:
          ArgumentError, ConfigError: the sizes or the target are invalid.
        """
        shapes = tuple(shape_for(kind.config).of(kind.config) for kind in kinds)
        detailed = everything or (len(kinds) == len(targets) == 1 and mode is not None)
        rows: dict[tuple[str, str], Row] = {}
        disagreements: list[str] = []
        for kind, shape in zip(kinds, shapes, strict=True):
            for target in targets:
                asked = resolved_calls(kind, shape, target=target, kernel=kernel, changes=detailed)
                for call, resolution in asked:
                    if mode in (None, call.request.mode):
                        row = rows.setdefault((kind.name, call.name), Row(kind, call.name, {}))
                        row.resolutions[str(target)] = resolution
                if mode is None and kernel == "auto":
                    found = compared(kind, [resolution for _, resolution in asked]).disagreements
                    disagreements += [f"{kind.name} on {target}: {text}" for text in found]
        if not rows:
            why = "; ".join(_joined((kind.name, text) for kind in kinds for text in remarks_on(kind)))
            raise typer.BadParameter(f"--mode {mode.value if mode else ''}: there is no such phase: {why}")
        names = tuple(map(str, targets))
        return cls(model, kinds, shapes, names, tuple(rows.values()), tuple(disagreements), detailed, everything)

    @property
    def is_served(self) -> bool:
        """Whether every call has a kernel."""
        return all(found.plan is not None for row in self.rows for found in row.resolutions.values())

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        rows = [
            {
                "kind": row.kind.name,
                "call": row.call,
                "targets": {name: found.to_json() for name, found in row.resolutions.items()},
            }
            for row in self.rows
        ]
        return {"model": self.model.to_json(), "rows": rows, "disagreements": list(self.disagreements)}

    def parts(self) -> Iterator[RenderableType]:
        """Returns the table and its reasons, or the explanation of each row, for people."""
        yield Paragraph(self.model.headline)
        yield Paragraph(_sizes(self.shapes[0]))
        if self.is_detailed:
            for row in self.rows:
                title = f"{row.call} of {row.kind}"
                for resolution in row.resolutions.values():
                    yield ""
                    yield Paragraph(title, head=len(row.call))
                    yield from resolution_parts(resolution, _asked(row.kind, resolution), everything=self.everything)
            yield ""
        else:
            yield _Table(self)
            for target in self.targets:
                yield Text(f"{target}:")
                yield from (Paragraph(line, 2) for line in self._reasons(target))
        yield from map(Paragraph, (str(other) for other in self.model.others))
        yield from map(Paragraph, (*_joined((kind.name, text) for kind in self.kinds for text in remarks_on(kind)),))
        yield from map(Paragraph, self.model.remarks)
        yield from (Paragraph(f"disagreement: {text}") for text in self.disagreements)

    def _reasons(self, target: str) -> Iterator[str]:
        """What decided, and the better kernels that were refused, once for all rows where it is so."""
        found = [(row, row.resolutions[target]) for row in self.rows]
        for rule, rows in _grouped((resolution.rule, row) for row, resolution in found).items():
            yield f"{_named(rows, self.rows)}decided by {rule}"
        refused = ((reason, row) for row, resolution in found for reason in _better(resolution))
        for reason, rows in _grouped(refused).items():
            yield f"{_named(rows, self.rows)}not {reason}"
        reserved = ((reason, row) for row, resolution in found for reason in _reservations(resolution))
        for reason, rows in _grouped(reserved).items():
            yield f"{_named(rows, self.rows)}{reason}"


@final
class _Table:
    """The kernels of every call on every target: a table where it fits the terminal, elsewhere lines."""

    def __init__(self, found: ModelTable) -> None:
        self._found = found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = self._table(options.max_width)
        yield from self._lines() if table is None else [table]

    def _table(self, width: int) -> Table | None:
        """The table, in which the facts of layers alone may be broken, between words; None where it does not fit."""
        found = self._found
        kinds = [
            (_rows_of(found, kind), _facts(kind, shape)) for kind, shape in zip(found.kinds, found.shapes, strict=True)
        ]
        calls = _widest(("phase", *(row.call for row in found.rows)))
        cells = [_widest((each, *(_cell(row.resolutions.get(each)) for row in found.rows))) for each in found.targets]
        facts = _widest(("layers", *(word for _, lines in kinds for line in lines for word in line.split())))
        spare = width - 1 - sum(each + 3 for each in (facts, calls, *cells))
        if spare < 0:
            return None
        table = Table()
        table.add_column("layers", width=min(facts + spare, _widest(line for _, lines in kinds for line in lines)))
        table.add_column("phase", width=calls)
        for target, each in zip(found.targets, cells, strict=True):
            table.add_column(target, width=each)
        for rows, lines in kinds:
            for number, row in enumerate(rows):
                last = number == len(rows) - 1
                own = lines[number:] if last else lines[number : number + 1]
                answers = (Text(_cell(row.resolutions.get(target))) for target in found.targets)
                table.add_row(Text("\n".join(own)), row.call, *answers, end_section=last)
        return table

    def _lines(self) -> Iterator[RenderableType]:
        for kind, shape in zip(self._found.kinds, self._found.shapes, strict=True):
            first, *facts = _facts(kind, shape)
            yield ""
            yield Paragraph(first, head=len(kind.name))
            yield from (Paragraph(fact, 2) for fact in facts)
            for row in _rows_of(self._found, kind):
                yield Text(f"  {row.call}")
                for target, resolution in row.resolutions.items():
                    yield Paragraph(f"{target}: {' '.join(_cell(resolution).splitlines())}", 4)
        yield ""


def _rows_of(found: ModelTable, kind: LayerKind) -> list[Row]:
    return [row for row in found.rows if row.kind == kind]


def _widest(texts: Iterable[str]) -> int:
    return max(len(line) for text in texts for line in text.splitlines() or [""])


def _sizes(shape: ModelShape) -> str:
    said = [f"B={shape.batch} T={shape.q_len} S={shape.max_len} dtype={shape.dtype}"]
    if shape.encoder_len is not None:
        said.append(f"S={shape.encoder_len} in cross attention")
    if str(shape.cache) != "contiguous":
        said.append(f"cache={shape.cache}")
    if shape.mask != "config":
        said.append(f"mask={shape.mask}")
    return " ".join([*said, *([f"sharding={shape.sharding}"] if shape.sharding else [])])


def _facts(kind: LayerKind, shape: ModelShape) -> list[str]:
    """A kind of layers, line by line: its name, its layers, its mask, its heads, and its other options."""
    config = kind.config
    q_heads, kv_heads, head_dim, value_dim = shape.heads
    dims = f"H={head_dim}" if head_dim == value_dim else f"H={head_dim} D={value_dim}"
    more = [f"{name}={value:.4g}" for name, value in (("scale", config.scale), ("soft_cap", config.soft_cap)) if value]
    more += [name for name in ("sinks", "bias", "bias_after_cap") if getattr(config, name)]
    more += [] if kind.rope else ["no RoPE"]
    facts = [f"{kind.name}: layers {_shortened(ranges(kind.layers))}", str(config.mask.form)]
    return [*facts, f"N={q_heads} K={kv_heads} {dims}", *([", ".join(more)] if more else [])]


def _shortened(layers: str) -> str:
    parts = layers.split(", ")
    return layers if len(parts) < 5 else ", ".join([*parts[:2], "…", parts[-1]])


def _cell(resolution: Resolution | None) -> str:
    """The kernels, and the adapters around the first, line by line."""
    if resolution is None:
        return ""
    if resolution.plan is None:
        return "none"
    through = [f"+ {step.adapter.name}" for step in resolution.plan.steps]
    return "\n".join([" and ".join(resolution.kernels), *through])


def _better(resolution: Resolution) -> Iterator[str]:
    """The kernels ranked above the winner that refuse, each with its first reason; not those of other platforms."""
    for candidate in resolution.candidates:
        if candidate.name == resolution.kernel:
            return
        if candidate.refusals and all(refusal.code is not RefusalCode.PLATFORM for refusal in candidate.refusals):
            yield f"{candidate.name}: {candidate.refusals[0].detail}"


def _reservations(resolution: Resolution) -> Iterator[str]:
    """Why the winner would not have been chosen if it had not been named."""
    for reservation in resolution.winner.reservations if resolution.winner else ():
        yield f"{resolution.kernel} has a reservation: {reservation}"


def _grouped(pairs: Iterable[tuple[str, Row]]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for text, row in pairs:
        found.setdefault(text, []).append(row)
    return found


def _named(rows: Sequence[Row], everything: Sequence[Row]) -> str:
    """Which rows a line is about: nothing where it is all of them, phases where it is these of all kinds."""
    if len(rows) == len(everything):
        return ""
    calls = dict.fromkeys(row.call for row in rows)
    if sum(row.call in calls for row in everything) == len(rows):
        return f"{', '.join(calls)}: "
    of_kinds = {row.kind.name: ", ".join(other.call for other in rows if other.kind == row.kind) for row in rows}
    return f"{'; '.join(f'{kind} {phases}' for kind, phases in of_kinds.items())}: "


def _joined(remarks: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Remarks with the names of the kinds that they are about."""
    found: dict[str, list[str]] = {}
    for name, text in remarks:
        found.setdefault(text, []).append(name)
    return (f"{' and '.join(names)}: {text}" for text, names in found.items())


def _asked(kind: LayerKind, resolution: Resolution) -> Asked:
    """What of a request the kind says."""
    fields = ("mask", "soft_cap", "sinks", "bias", "logits_dtype", "precision", "max_logits", "dropout_rate")
    said = {name: getattr(resolution.request, name) for name in fields}
    return Asked.of(kind.config.source, {**said, "scale": kind.config.scale}, {})
