"""The verb `list`: the installed kernels and what they declare."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from kernelry.cli.completion import kernel_names
from kernelry.cli.output import Json, Paragraph, show
from kernelry.errors import ConfigError, nearest, sentence
from kernelry.kernel.spec import KernelSpec, no_reservations
from kernelry.registry import installed
from kernelry.registry.contents import InstalledKernel, Registry
from kernelry.request.request import Mode, Request
from kernelry.request.target import Target, home_target
from kernelry.resolution.reserved import reservations_of
from kernelry.storage import SEPARATE

_SETS = ("platforms", "modes", "dtypes", "atoms", "features", "statistics")
"""What a listing says of every kernel, by the names of Capabilities."""


def show_list(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="show all that these kernels declare.", autocompletion=kernel_names),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show all that every kernel declares.")] = False,
    as_json: Json = False,
) -> None:
    """The installed kernels: their platforms, and what they are; with --all, or by name, all that they declare."""
    found = installed.registry()
    for name in names or ():
        if name not in found.kernels:
            raise ConfigError(sentence(f"no installed kernel is called {name!r}{nearest(name, found.kernels)}"))
    kernels = [found.kernels[name] for name in dict.fromkeys(names or ())] or list(found.kernels.values())
    rows = [kernel_json(kernel) for kernel in kernels]
    show(as_json, {"kernels": rows}, _parts(found, rows, in_full=everything or bool(names)))


def kernel_json(kernel: InstalledKernel) -> dict[str, Any]:
    """What a kernel is and declares, as plain data."""
    can = kernel.spec.capabilities
    return {
        "name": kernel.name,
        "plugin": kernel.plugin,
        "distribution": kernel.distribution,
        "summary": kernel.spec.summary,
        **{name: sorted(getattr(word, "value", word) for word in getattr(can, name)) for name in _SETS},
        "kv_quantizations": sorted(can.kv_quantizations),
        "pages": can.pages,
        "kv_layouts": sorted(can.kv_layouts),
        "context_parallel": sorted(can.context_parallel),
        "manual_axes": can.manual_axes.value,
        "partitioned_by_xla": can.partitioned_by_xla,
        "gradient": can.gradient.value,
        "reservations": list(_reservations(kernel.spec)),
    }


def _reservations(spec: KernelSpec) -> Iterator[str]:
    """Why `auto` does not choose a kernel for a plain request, each reason once; that it may not for another one."""
    if spec.reservations is no_reservations:
        return
    can = spec.capabilities
    target = Target(min(can.platforms, default="cpu"))
    plain = Request(target=target, q_len=1024, dtype=min(can.dtypes, default="float32"))
    asked = (dataclasses.replace(plain, mode=mode) for mode in Mode if mode in can.modes)
    found = dict.fromkeys(str(reservation) for request in asked for reservation in reservations_of(spec, request))
    yield from found or ("for some requests; kernelry explain says why",)


def _parts(registry: Registry, rows: list[dict[str, Any]], *, in_full: bool) -> Iterator[RenderableType]:
    """The kernels, by distribution or each in full, and what is missing or wrong."""
    if not rows:
        yield Paragraph(f"No kernels: {installed.why_none()}.")
    yield from itertools.chain.from_iterable(map(_in_full, rows)) if in_full else _by_distribution(rows)
    advice = advice_on(registry)
    if advice is not None:
        yield Paragraph(advice)
    if registry.faults:
        yield Paragraph(f"{len(registry.faults)} plugin fault(s): run kernelry doctor")


def _by_distribution(rows: list[dict[str, Any]]) -> Iterator[RenderableType]:
    by_distribution: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_distribution.setdefault(row["distribution"], []).append(row)
    for distribution, own in by_distribution.items():
        yield Paragraph(distribution)
        for row in own:
            about = " ".join(row["platforms"]) + (", only if named" if row["reservations"] else "")
            yield Paragraph(f"{row['name']} ({about}): {row['summary']}", 2, head=len(row["name"]))
    if rows:
        yield ""
        yield Paragraph("kernelry list NAME, or --all, shows what a kernel declares: masks, dtypes, features and more.")


def _in_full(row: dict[str, Any]) -> Iterator[RenderableType]:
    yield Paragraph(f"{row['name']} [{row['distribution']}]", head=len(row["name"]))
    yield Paragraph(row["summary"], 2)
    yield from (Paragraph(f"{name}: {words}", 2, hang=4) for name, words in _facts(row))
    yield ""


def _facts(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name in _SETS:
        yield "masks" if name == "atoms" else name, _words(row[name])
    layouts = [layout for layout in row["kv_layouts"] if row["kv_layouts"] != [SEPARATE]]
    stored = [*row["kv_quantizations"], *(["pages"] if row["pages"] else []), *layouts]
    if stored:
        yield "keys stored as", _words(stored)
    if row["context_parallel"]:
        yield "across devices by", _words(row["context_parallel"])
    if row["partitioned_by_xla"]:
        yield "Auto axes", "partitioned by XLA"
    yield "manual axes", row["manual_axes"]
    yield "gradient", row["gradient"]
    if row["reservations"]:
        yield "only if named", "; ".join(row["reservations"])


def _words(names: Iterable[str]) -> str:
    return " ".join(names) or "–"


def advice_on(registry: Registry) -> str | None:
    """What to do where no plain kernel is installed, with the kernels for this machine."""
    if installed.has_plain_kernel(registry.kernels):
        return None
    return installed.without_plain_kernel(home().partition(":")[0], registry.kernels)


def home() -> str:
    """This machine's target, as text."""
    try:
        return str(home_target())
    except Exception:  # see backend_fault
        return "unknown, for JAX can use no device"
