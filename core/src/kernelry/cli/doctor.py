"""The verb `doctor`: versions, plugins, environment switches, and what is wrong."""

from __future__ import annotations

import collections
import platform
from collections.abc import Iterator
from typing import Any

import importlib_metadata
import jax
import typer
from rich.console import RenderableType
from rich.table import Table

from kernelry._version import __version__
from kernelry.cli.kernels import advice_on, home
from kernelry.cli.output import Json, Text, show
from kernelry.errors import ConfigError
from kernelry.policy.policy import Switches
from kernelry.policy.store import Store
from kernelry.registry import installed
from kernelry.registry.contents import Fault, Registry, switch_faults
from kernelry.registry.hooks import CONTRACT


def doctor(as_json: Json = False) -> None:
    """Versions, plugins, environment switches, and what is wrong, with a fix for each fault.

    Status 1: something is wrong.
    """
    found, switches = installed.registry(), Switches.unchecked()
    show(as_json, doctor_json(found, switches), doctor_parts(found, switches))
    raise typer.Exit(1 if all_faults(found, switches) else 0)


def doctor_json(registry: Registry, switches: Switches) -> dict[str, Any]:
    """Versions, plugins, switches and faults as plain data."""
    return {
        "versions": _versions(),
        "target": home(),
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
    """Versions, plugins, switches and faults for people."""
    yield "  ".join(f"{name} {version}" for name, version in _versions().items())
    yield Text(f"this machine is {home()}")
    for name, value in _switches(switches).items():
        if value is not None:
            text = ", ".join(value) or "no plugins" if isinstance(value, tuple) else value
            yield Text(f"{name} is set: {text if text != '' else 'no file'}")
    measurements = _measurements(switches)
    if measurements["times"]:
        counts = ", ".join(f"{count} {name}" for name, count in measurements["times"].items())
        yield Text(f"times of kernels in {measurements['path']}: {counts}")
    plugins = Table(title="Plugins", title_justify="left")
    for column in ("plugin", "distribution", "module", "kernels"):
        plugins.add_column(column, overflow="fold")
    for plugin in registry.plugins:
        kernels = Text(" ".join(plugin.kernels)) if plugin.enabled else Text("not in KERNELRY_PLUGINS")
        plugins.add_row(plugin.name, plugin.distribution, plugin.module, kernels)
    yield plugins
    advice = advice_on(registry)
    if advice is not None:
        yield Text(advice)
    found = all_faults(registry, switches)
    if not found:
        yield "No faults."
        return
    faults = Table(title="Faults", title_justify="left", show_lines=True)
    for column in ("plugin or variable", "from", "fault", "what happened", "fix"):
        faults.add_column(column, overflow="fold")
    for fault in found:
        faults.add_row(fault.plugin, fault.distribution, fault.kind.value, Text(fault.detail), Text(fault.fix))
    yield faults
