"""What the command prints: rich tables for people, plain data for programs."""

from __future__ import annotations

import collections
import dataclasses
import platform
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, final

import importlib_metadata
import jax
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table

from kernelry._version import __version__
from kernelry.cli.output import Text
from kernelry.errors import ConfigError
from kernelry.kernel.spec import KernelSpec, no_reservations
from kernelry.policy.policy import Switches
from kernelry.policy.store import Store
from kernelry.registry import installed
from kernelry.registry.contents import Fault, InstalledKernel, Registry, switch_faults
from kernelry.registry.hooks import CONTRACT
from kernelry.request.request import NEUTRAL, Mode, Request
from kernelry.request.target import Target, home_target
from kernelry.resolution.explanation import Resolution
from kernelry.resolution.reserved import reservations_of
from kernelry.resolution.telling import answer_of, remarks_on, told_of_shards
from kernelry.storage import SEPARATE

_SETS = ("platforms", "modes", "dtypes", "atoms", "features", "statistics")
"""What a listing says of every kernel, by the names of Capabilities."""


def kernels_json(registry: Registry) -> dict[str, Any]:
    """The installed kernels as plain data."""
    return {"kernels": [_kernel_json(kernel) for kernel in registry.kernels.values()]}


def _kernel_json(kernel: InstalledKernel) -> dict[str, Any]:
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


def kernels_parts(registry: Registry) -> Iterator[RenderableType]:
    """The installed kernels, and what is missing or wrong, for people."""
    yield _kernels_table(registry) if registry.kernels else Text(f"No kernels: {installed.why_none()}.")
    advice = _without_plain_kernel(registry)
    if advice is not None:
        yield Text(advice)
    if registry.faults:
        yield f"{len(registry.faults)} plugin fault(s): run kernelry doctor"


def _kernels_table(registry: Registry) -> RenderableType:
    table = Table(show_lines=True)
    table.add_column("kernel", no_wrap=True)
    table.add_column("serves")
    for row in kernels_json(registry)["kernels"]:
        name = Text(row["name"] + "\n", style="bold").append(row["distribution"].replace(" ", "\n"), style="dim")
        table.add_row(name, _serves(row))
    return table


def _serves(row: dict[str, Any]) -> RenderableType:
    facts = Table.grid(padding=(0, 1))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    for name in _SETS:
        facts.add_row("masks" if name == "atoms" else name, _words(row[name]))
    layouts = [layout for layout in row["kv_layouts"] if row["kv_layouts"] != [SEPARATE]]
    stored = [*row["kv_quantizations"], *(["pages"] if row["pages"] else []), *layouts]
    if stored:
        facts.add_row("keys stored as", _words(stored))
    if row["context_parallel"]:
        facts.add_row("across devices by", _words(row["context_parallel"]))
    if row["partitioned_by_xla"]:
        facts.add_row("Auto axes", "partitioned by XLA")
    facts.add_row("manual axes", row["manual_axes"])
    facts.add_row("gradient", row["gradient"])
    if row["reservations"]:
        facts.add_row("only if named", Text("; ".join(row["reservations"])))
    return Group(Text(row["summary"]), facts)


def _words(names: Iterable[str]) -> Text:
    return Text(" ".join(names) or "–")


def doctor_json(registry: Registry, switches: Switches) -> dict[str, Any]:
    """Versions, plugins, switches and faults as plain data."""
    return {
        "versions": _versions(),
        "target": _home(),
        "switches": _switches(switches),
        "measurements": _measurements(switches),
        "plugins": [plugin.to_json() for plugin in registry.plugins],
        "faults": [fault.to_json() for fault in all_faults(registry, switches)],
    }


def _without_plain_kernel(registry: Registry) -> str | None:
    """What to do where no plain kernel is installed, with the kernels for this machine."""
    if installed.has_plain_kernel(registry.kernels):
        return None
    return installed.without_plain_kernel(_home().partition(":")[0], registry.kernels)


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


def _home() -> str:
    try:
        return str(home_target())
    except Exception:  # see backend_fault
        return "unknown, for JAX can use no device"


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
    yield Text(f"this machine is {_home()}")
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
        kernels = _words(plugin.kernels) if plugin.enabled else Text("not in KERNELRY_PLUGINS")
        plugins.add_row(plugin.name, plugin.distribution, plugin.module, kernels)
    yield plugins
    advice = _without_plain_kernel(registry)
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


def resolution_parts(resolution: Resolution, asked: Asked | None = None) -> Iterator[RenderableType]:
    """A resolution for people: what was asked, what decided, and each candidate's answer."""
    yield Text(str(resolution.request))
    if asked is not None:
        yield Text(str(asked))
    for line in told_of_shards(resolution):
        yield Padding(Text(line.lstrip()), (0, 0, 0, len(line) - len(line.lstrip())), expand=False)
    yield Text(f"decided by: {resolution.rule}")
    table = Table(show_lines=True)
    for column in ("", "kernel", "from", "answer"):
        table.add_column(column, overflow="fold")
    for candidate in resolution.candidates:
        mark = Text("→" if candidate.name == resolution.kernel else "")
        answer = Text("\n".join(answer_of(resolution, candidate)))
        table.add_row(mark, candidate.name, candidate.distribution, answer)
    yield table
    if resolution.plan is None:
        yield Text("No kernel serves this request.")
    for remark in remarks_on(resolution):
        yield Text(remark)
