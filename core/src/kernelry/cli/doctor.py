"""The verb `doctor`: what this machine has, what extras would add, plugins, switches, and what is wrong."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import platform
from collections.abc import Iterable, Iterator
from typing import Any

import importlib_metadata
import jax
import typer
from rich.console import RenderableType
from rich.table import Table

from kernelry._version import __version__
from kernelry.cli import extras, machine
from kernelry.cli.kernels import advice_on, home
from kernelry.cli.output import Json, Paragraph, Rows, show
from kernelry.errors import ConfigError
from kernelry.policy.policy import Switches
from kernelry.policy.store import Store
from kernelry.registry import installed
from kernelry.registry.contents import Fault, Plugin, Registry, switch_faults
from kernelry.registry.hooks import CONTRACT


def doctor(as_json: Json = False) -> None:
    """What this machine has, what each extra would add, and what is wrong, with a fix for each fault.

    Status 1: something is wrong.
    """
    found, switches = installed.registry(), Switches.unchecked()
    show(as_json, doctor_json(found, switches), doctor_parts(found, switches))
    raise typer.Exit(1 if all_faults(found, switches) else 0)


def doctor_json(registry: Registry, switches: Switches) -> dict[str, Any]:
    """What doctor prints, as plain data.

    Its keys: `versions`, of kernelry, its contract, Python, jax and jaxlib; `target`, this machine's; `accelerators`,
    each with `target`, `kind`, `count`, `memory` in bytes or null, and `runtime`; `unused`, what to do about
    accelerators that JAX does not use; `drivers`, each with `name`, `version` and `source`; `compilers`, each with
    `name`, `serves`, `version`, `path`, and `fix`, null where it is here; `extras`, each with `distribution`, `name`,
    `state`, `adds`, `missing`, `kernels`, and `install`, null unless something is missing; `switches`, by name;
    `measurements`, with `path` and `times`; `plugins`; `faults`.
    """
    return {
        "versions": _versions(),
        "target": home(),
        "accelerators": [dataclasses.asdict(each) for each in machine.accelerators()],
        "unused": list(machine.unused()),
        "drivers": [dataclasses.asdict(each) for each in machine.drivers()],
        "compilers": [dataclasses.asdict(each) for each in machine.compilers()],
        "extras": [extra.to_json() for extra in extras.extras(registry)],
        "switches": _switches(switches),
        "measurements": _measurements(switches),
        "plugins": [plugin.to_json() for plugin in registry.plugins],
        "faults": [fault.to_json() for fault in all_faults(registry, switches)],
    }


def all_faults(registry: Registry, switches: Switches) -> tuple[Fault, ...]:
    """The faults of the plugins and of the environment variables."""
    return (*registry.faults, *switch_faults(registry, switches))


def _switches(switches: Switches) -> dict[str, Any]:
    """The environment variables by name; None for those that are not set."""
    return {
        "KERNELRY_KERNEL": switches.kernel,
        "KERNELRY_EXPERIMENTAL": True if switches.experimental else None,
        "KERNELRY_PLUGINS": switches.plugins,
        "KERNELRY_STRICT": True if switches.strict else None,
        "KERNELRY_LOCK": switches.lock if switches.strict else None,
        "KERNELRY_MEASUREMENTS": switches.measurements,
    }


def _measurements(switches: Switches) -> dict[str, Any]:
    """Where times are read, and how many there are of which device."""
    path = switches.measurements_path
    try:
        entries = () if path is None else Store(path).read()
    except ConfigError:  # which is among the faults
        entries = ()
    counts = collections.Counter(f"{entry.kind.value} {entry.device}" for entry in entries)
    return {"path": path, "times": dict(sorted(counts.items()))}


def _versions() -> dict[str, str]:
    return {
        "kernelry": __version__,
        "contract": str(CONTRACT),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib_metadata.version("jaxlib"),
    }


def doctor_parts(registry: Registry, switches: Switches) -> Iterator[RenderableType]:
    """The same for people."""
    yield Paragraph("  ".join(f"{name} {version}" for name, version in _versions().items()))
    yield Paragraph(f"this machine is {home()}")
    for name, value in _switches(switches).items():
        if value is not None:
            text = ", ".join(value) or "no plugins" if isinstance(value, tuple) else value
            yield Paragraph(f"{name} is set: {text if text != '' else 'no file'}")
    measurements = _measurements(switches)
    if measurements["times"]:
        counts = ", ".join(f"{count} {name}" for name, count in measurements["times"].items())
        yield Paragraph(f"times of kernels in {measurements['path']}: {counts}")
    accelerators = [*map(str, machine.accelerators())] or ["none that JAX uses"]
    yield from _section("Accelerators", [*accelerators, *machine.unused()])
    yield from _section("Drivers and their libraries", map(str, machine.drivers()))
    yield from _section("Compilers, for kernelry check", map(str, machine.compilers()))
    for distribution, of_one in itertools.groupby(extras.extras(registry), lambda extra: extra.distribution):
        yield from _section(f"Extras of {distribution}", (f"{extra.name}: {extra}" for extra in of_one))
    plugins = Table(title="Plugins", title_justify="left", title_style="bold")
    for column in ("plugin", "distribution", "module", "kernels"):
        plugins.add_column(column, overflow="fold")
    yield ""
    yield Rows(plugins, [_plugin_row(plugin) for plugin in registry.plugins])
    advice = advice_on(registry)
    if advice is not None:
        yield Paragraph(advice)
    found = all_faults(registry, switches)
    if not found:
        yield "No faults."
        return
    faults = Table(title="Faults", title_justify="left", title_style="bold", show_lines=True)
    for column in ("plugin or variable", "from", "fault", "what happened", "fix"):
        faults.add_column(column, overflow="fold")
    yield Rows(faults, [(each.plugin, each.distribution, each.kind.value, each.detail, each.fix) for each in found])


def _section(title: str, lines: Iterable[str]) -> Iterator[RenderableType]:
    """A title, and a line for each fact; nothing where there are no facts."""
    for number, line in enumerate(lines):
        if number == 0:
            yield ""
            yield Paragraph(title, style="bold")
        yield Paragraph(line, indent=1)


def _plugin_row(plugin: Plugin) -> tuple[str, ...]:
    kernels = " ".join(plugin.kernels) or "–" if plugin.enabled else "not in KERNELRY_PLUGINS"
    return plugin.name, plugin.distribution, plugin.module, kernels
