"""The verb `lock`: writes the resolutions of a config to a file, or checks that they are unchanged."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import typer

from kernelry.cli import answer, completion, options
from kernelry.cli.output import Json, print_json, tell
from kernelry.errors import ConfigError, KernelryError, followed
from kernelry.models.model import LayerKind, config_of
from kernelry.phases.calls import calls
from kernelry.phases.model_shape import ModelShape
from kernelry.phases.resolving import resolve_phases
from kernelry.policy.lock import Entry, Lock, Origin, changed_fields
from kernelry.policy.policy import LOCK_FILE
from kernelry.request.request import NEUTRAL, Request
from kernelry.request.target import Target, current_target
from kernelry.resolution.explanation import Resolution
from kernelry.resolution.resolver import explain

_TARGET = "target"
"""The fact of an origin that is not part of the shape."""


_WITH_CHECK = {"config", "maxtext", "ignore", "model", "layer_kind", "file", "check", "as_json"}
"""The options that --check reads; the file has the others."""


@options.takes(options.ModelOptions)
def lock(
    model: options.ModelOptions,
    *,
    context: typer.Context,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="platform[:kind[:topology]]; default: this machine; may be repeated.",
            autocompletion=completion.targets,
        ),
    ] = None,
    file: Annotated[Path, typer.Option("--file", "-o", help="the lock file.")] = Path(LOCK_FILE),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; status 1 when a resolution changed.")] = False,
    as_json: Json = False,
) -> None:
    """The kernels of train, prefill and decode, written down for strict mode; --check compares.

    With --model every kind of its layers is locked. What the file says of other configs, models, sizes, caches and
    masks is kept. Status 1: no kernel serves one of the calls, which is then not written; or, with
    --check, a resolution changed.
    """
    layers = {model.files.origin(layer, file.parent): layer for layer in model.files.read()}
    if check:
        _refuse_sizes(context)
        _check(Lock.read(file), layers, model.files, file.parent, as_json)
        return
    targets = [Target.parse(text) for text in target or ()] or [current_target()]
    locked, disagreements = Lock(()), {}
    found: list[Resolution] = []
    for where, (name, layer) in itertools.product(targets, layers.items()):
        for sizes in model.shapes(layer):
            phases = resolve_phases(layer, sizes, target=where, changes=False)
            answer.check_names(phases.all)
            found.extend(phases.all)
            locked = locked.merged(Lock.of(phases.all, _origin(name, where, sizes)))
            disagreements.update(dict.fromkeys(f"{_kind(layer)}{text}" for text in phases.disagreements))
    unserved = [str(entry.request) for entry in locked.entries if entry.kernel is None]
    nothing = len(unserved) == len(locked.entries) and not file.exists()
    gone = model.files.gone(Lock.read(file), layers, file.parent) if file.exists() else ()
    written = Lock(()) if nothing else locked.write(file, merge=True, gone=gone)
    if as_json:
        told = {"unserved": unserved, "disagreements": list(disagreements), "advice": answer.advice_of(found)}
        print_json({"file": str(file), **written.to_json(), **told})
    else:
        _tell_written(file, layers, locked, written)
        tell(f"disagreement: {text}" for text in disagreements)
        tell(answer.advice_of(found))
    raise typer.Exit(1 if unserved else 0)


def _refuse_sizes(context: typer.Context) -> None:
    """Refuses options that --check does not read, because they would then seem to be checked.

    Raises:
      BadParameter: an option of the sizes or the target was given.
    """
    given = [
        option.opts[0]
        for option in context.command.params
        if option.name not in _WITH_CHECK
        and getattr(context.get_parameter_source(str(option.name)), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise typer.BadParameter(
            f"--check asks again for what the file remembers, and does not read {', '.join(given)}: leave it out, or "
            "lock that first, without --check"
        )


def _kind(layer: options.Layer) -> str:
    """What lines about a kind of a model's layers begin with."""
    return f"{layer.name}: " if isinstance(layer, LayerKind) else ""


def _tell_written(file: Path, layers: Mapping[str, options.Layer], locked: Lock, written: Lock) -> None:
    for entry in locked.entries:
        left_out = "" if entry.kernel else f"; not written to {file}"
        kinds = "".join(dict.fromkeys(_kind(layers[origin.config]) for origin in entry.origins))
        tell([f"{kinds}{_shown(entry.request)}: {entry.choice}{left_out}"])
    kept = len(written.entries) - sum(entry.kernel is not None for entry in locked.entries)
    if kept:
        tell([f"{kept} other resolutions of {file} were kept."])


def _shown(request: Request) -> str:
    sizes = f"B={request.batch} T={request.q_len} S={request.kv_len}"
    fields = ("kv_quantization", "page_size", "kv_layout")
    stored = [f"{name}={value}" for name in fields if (value := getattr(request, name)) != NEUTRAL[name]]
    return " ".join([request.mode.value, str(request.target), sizes, f"mask={request.mask}", *stored])


def _origin(name: str, target: Target, sizes: ModelShape) -> Origin:
    return Origin(name, tuple(sorted({_TARGET: str(target), **sizes.to_json()}.items())))


def _asked_again(origin: Origin, layer: options.Layer) -> tuple[Request, ...]:
    facts = dict(origin.facts)
    try:
        target, sizes = Target.parse(facts.pop(_TARGET)), ModelShape(**facts)
    except (KeyError, TypeError, KernelryError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        unread = f"the lock file's facts {dict(origin.facts)} cannot be read: {reason}"
        raise ConfigError(followed(unread, "run kernelry lock again.")) from error
    return tuple(call.request for call in calls(layer, sizes, target))


def _check(
    locked: Lock, layers: Mapping[str, options.Layer], files: options.LayerFiles, start: Path, as_json: bool
) -> None:
    """Resolves again what the layers asked for, so that no option has to be repeated, and compares.

    What a program recorded was resolved under rules that the file does not contain, so it is not compared.
    """
    mine, differences, advice = set[Request](), list[str](), list[str]()
    for name, layer in layers.items():
        entries = [entry for entry in locked.entries if any(o.config == name for o in entry.origins)]
        mine.update(entry.request for entry in entries)
        origins = dict.fromkeys(o for entry in entries for o in entry.origins if o.config == name)
        asked = dict.fromkeys(request for origin in origins for request in _asked_again(origin, layer))
        found = {request: explain(request, policy=config_of(layer).policy, changes=False) for request in asked}
        differences += _differences(locked, entries, found, name, files.arguments())
        advice += answer.advice_of(found.values())
    gone = files.gone(locked, layers, start)
    differences += (_gone(locked, name, files.arguments()) for name in gone)
    recorded = sum(not entry.origins for entry in locked.entries)
    others = sorted({o.config for entry in locked.entries for o in entry.origins} - {*layers, *gone})
    told = list(dict.fromkeys((*differences, *advice)))
    if as_json:
        facts = {"file": locked.source, "checked": len(mine), "differences": differences}
        unchecked = {"not_checked": others, "not_checked_recorded": recorded}
        print_json({**facts, "advice": list(dict.fromkeys(advice)), **unchecked})
    else:
        tell(told or [f"{len(mine)} resolutions are unchanged."])
        if others:
            tell([f"not checked: what {', '.join(others)} asked for; pass it with --check."])
        if recorded:
            tell([f"not checked: what a program recorded, without a config ({recorded})."])
    raise typer.Exit(1 if differences else 0)


def _differences(
    locked: Lock, mine: list[Entry], found: dict[Request, Resolution], name: str, arguments: str
) -> Iterator[str]:
    if not mine:
        yield f"{locked.source} has nothing that {name} asked for; run kernelry lock {arguments}"
    new = [request for request in found if all(entry.request != request for entry in mine)]
    for entry in mine:
        if entry.request not in found:
            yield _stale(entry, new, name)
            continue
        yield from _difference(locked, found[entry.request])
    for request in new:
        yield from _difference(locked, found[request])


def _gone(locked: Lock, name: str, arguments: str) -> str:
    """Says that the model has no kind of layers any more that it had when the file was written."""
    count = sum(any(origin.config == name for origin in entry.origins) for entry in locked.entries)
    return (
        f"{name}: there are no such layers any more, and {locked.source} has {count} resolutions of them; run kernelry "
        f"lock {arguments} again"
    )


def _difference(locked: Lock, resolution: Resolution) -> Iterator[str]:
    text = locked.difference(resolution)
    if resolution.plan is None:
        yield f"{resolution.request}: {resolution.unserved}"
    elif text is not None:
        yield text


def _stale(entry: Entry, new: list[Request], name: str) -> str:
    """Says what a config now asks for instead of an entry, and removes that from `new`."""
    alike = [request for request in new if request.mode is entry.request.mode]
    if not alike:
        return f"{entry.request}: {name} no longer asks for this; run kernelry lock again"
    instead = min(alike, key=lambda request: len(changed_fields(entry.request, request)))
    new.remove(instead)
    fields = ", ".join(f"{field}={now} instead of {was}" for field, was, now in changed_fields(entry.request, instead))
    return f"{entry.request}: {name} no longer asks for this, but for {fields}; run kernelry lock again"
