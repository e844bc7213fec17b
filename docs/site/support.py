"""The tables of docs/support.md: what every kernel declares, from its Capabilities, and what its plugin needs.

Rows are what a request may have, and cells the kernels that take it, so that the tables are narrow enough for a phone.
A section for each kernel lists all that it declares.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterable, Iterator

import importlib_metadata
from packaging.requirements import Requirement

import kernelry
from kernelry.cli.kernels import kernel_json
from kernelry.kernel.capabilities import Capabilities, Feature, Gradient, Statistic
from kernelry.kernel.refusal import RefusalCode
from kernelry.kernel.spec import Environment, KernelSpec, Knowledge
from kernelry.masks.form import AtomKind, PositionKind
from kernelry.registry import installed
from kernelry.registry.contents import InstalledKernel
from kernelry.request.request import Mode, Operand, Request
from kernelry.request.target import PLATFORMS, oldest
from kernelry.storage import INTERLEAVED, VALUE_IN_KEY

Row = tuple[str, ...]

_FEATURES = {
    Feature.SCALE: "a scale other than H ** -0.5",
    Feature.BIAS: "a bias",
    Feature.SOFT_CAP: "a soft cap",
    Feature.BIAS_AFTER_CAP: "a bias after the soft cap",
    Feature.SINKS: "sinks",
    Feature.DROPOUT: "dropout",
    Feature.LOGITS_DTYPE: "another dtype of the logits",
    Feature.PRECISION: "a precision of the products",
    Feature.MAX_LOGITS: "the largest logits",
}
_STATISTICS = {Statistic.LSE: "logsumexp", Statistic.MAX_SUM: "maximum and sum"}
_POSITIONS = {
    PositionKind.OFFSET: "offsets",
    PositionKind.STATIC: "positions known when tracing",
    PositionKind.TRACED: "positions known at run time",
}
_GRADIENTS = {
    Gradient.NONE: "none",
    Gradient.NATIVE: "JAX differentiates it",
    Gradient.BACKWARD: "a backward pass of its own",
}


def markdown() -> str:
    """Returns the tables, as Markdown below the headings of docs/support.md."""
    kernels = list(kernelry.kernels())
    return "\n\n".join(
        [
            "## Where kernels run",
            _table(("on", "in", "kernels"), _places(kernels)),
            "## Masks",
            "Kernels that evaluate each atom themselves; `dense_mask` and `lengths_as_segments` bring others to some.",
            _table(("atom", "kernels"), _masks(kernels)),
            "## Features",
            "Kernels that do it themselves; `sinks_from_lse` brings sinks to all that return a logsumexp.",
            _table(("of a request", "kernels"), _features(kernels)),
            "## Keys and values as they are stored",
            "Kernels that read them as they are; `gather_pages`, `dequantize_kv` and `separate_kv` make arrays of them "
            "for others.",
            _table(("stored", "kernels"), _storage(kernels)),
            "## Shapes",
            _table(("of a request", "kernels"), _shapes(kernels)),
            "## Gradients and statistics",
            _table(("of a kernel", "kernels"), _results(kernels)),
            "## Kernel by kernel",
            *(_section(kernel) for kernel in kernels),
        ]
    )


def _table(head: Row, rows: Iterable[Row]) -> str:
    lines = (f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))
    return "\n".join(lines)


def _named(kernels: Iterable[InstalledKernel], takes: Callable[[Capabilities], bool]) -> str:
    """The kernels that take something, as links to their sections."""
    found = [f"[`{kernel.name}`](#{kernel.name})" for kernel in kernels if takes(kernel.spec.capabilities)]
    return ", ".join(found) or "none"


def _holding(field: str, value: object) -> Callable[[Capabilities], bool]:
    return lambda can: value in getattr(can, field)


def _places(kernels: list[InstalledKernel]) -> Iterator[Row]:
    for platform in PLATFORMS:
        for mode in Mode:
            yield platform, mode.value, _named(kernels, lambda can: platform in can.platforms and mode in can.modes)  # noqa: B023


def _masks(kernels: list[InstalledKernel]) -> Iterator[Row]:
    for atom in AtomKind:
        yield f"`{atom.value}`", _named(kernels, _holding("atoms", atom))
    for kind, text in _POSITIONS.items():
        yield text, _named(kernels, _holding("positions", kind))


def _features(kernels: list[InstalledKernel]) -> Iterator[Row]:
    for feature in Feature:
        yield _FEATURES[feature], _named(kernels, _holding("features", feature))
    for name in sorted({name for kernel in kernels for name in kernel.spec.capabilities.normalizations} - {"softmax"}):
        yield f"normalization `{name}`", _named(kernels, _holding("normalizations", name))


def _storage(kernels: list[InstalledKernel]) -> Iterator[Row]:
    yield "in pages", _named(kernels, lambda can: can.pages)
    yield "values in the keys (MLA)", _named(kernels, _holding("kv_layouts", VALUE_IN_KEY))
    yield "interleaved in pages", _named(kernels, _holding("kv_layouts", INTERLEAVED))
    for name in sorted({name for kernel in kernels for name in kernel.spec.capabilities.kv_quantizations}):
        yield f"`{name}`", _named(kernels, _holding("kv_quantizations", name))


def _shapes(kernels: list[InstalledKernel]) -> Iterator[Row]:
    yield "K < N, grouped heads", _named(kernels, lambda can: can.grouped_heads)
    yield "D ≠ H, another value dim", _named(kernels, lambda can: can.split_head_dim)
    yield "T ≠ S", _named(kernels, lambda can: can.unequal_lengths)
    yield "a batch or length of 0", _named(kernels, lambda can: can.empty_arrays)
    yield "a symbolic batch", _named(kernels, _holding("symbolic_sizes", "batch"))
    yield "symbolic lengths", _named(kernels, lambda can: {"q_len", "kv_len"} <= can.symbolic_sizes)
    for dtype in sorted({dtype for kernel in kernels for dtype in kernel.spec.capabilities.dtypes}):
        yield dtype, _named(kernels, _holding("dtypes", dtype))


def _results(kernels: list[InstalledKernel]) -> Iterator[Row]:
    for gradient, text in _GRADIENTS.items():
        yield f"gradient: {text}", _named(kernels, lambda can: can.gradient is gradient)  # noqa: B023
    for operand in (Operand.BIAS, Operand.SINKS):
        yield f"gradient of {operand.value}", _named(kernels, _holding("gradients", operand))
    yield "second derivatives", _named(kernels, lambda can: can.gradient is Gradient.NATIVE or can.forward_over_reverse)
    for statistic, text in _STATISTICS.items():
        yield f"returns {text}", _named(kernels, _holding("statistics", statistic))
    yield "gradient through the logsumexp", _named(kernels, lambda can: can.lse_cotangent)
    yield "fully masked rows come out as 0", _named(kernels, lambda can: can.empty_rows)
    yield "NaN in hidden slots stays out", _named(kernels, lambda can: can.clean_hidden_slots)


def _section(kernel: InstalledKernel) -> str:
    facts = [(name, text) for name, text in _facts(kernel) if text]
    summary = kernel.spec.summary
    return f"### {kernel.name}\n\n{summary[:1].upper()}{summary[1:]}.\n\n{_table(('declares', ''), facts)}"


def _facts(kernel: InstalledKernel) -> Iterator[tuple[str, str]]:
    can = kernel.spec.capabilities
    yield "from", kernel.distribution
    yield "needs", "; ".join(_needs(kernel.spec))
    yield "only if named", "; ".join(_reservations()[kernel.name])
    yield "platforms", _platforms(can)
    yield "modes", _words(can.modes)
    yield "dtypes", _words(can.dtypes)
    yield "head dims", _head_dims(can)
    yield "shapes", ", ".join(text for text, has in _SHAPES if has(can))
    yield "masks", _words(can.atoms)
    yield "positions", _words(can.positions - {PositionKind.DEFAULT})
    yield "features", _words(can.features)
    yield (
        "keys stored as",
        ", ".join([*(["pages"] if can.pages else []), _words(can.kv_layouts | can.kv_quantizations)]),
    )
    yield "gradient", _GRADIENTS[can.gradient]
    yield "gradients of", _words(can.gradients)
    yield "statistics", _words(can.statistics)
    yield "across devices by", _words(can.context_parallel)
    yield "manual axes", can.manual_axes.value
    yield "automatic axes", "partitioned by XLA" if can.partitioned_by_xla else ""
    yield "interpreted on CPU", "yes, by `kernelry.testing.interpret()`" if _is_interpreted(can) else ""


_SHAPES: tuple[tuple[str, Callable[[Capabilities], bool]], ...] = (
    ("K < N", lambda can: can.grouped_heads),
    ("D ≠ H", lambda can: can.split_head_dim),
    ("T ≠ S", lambda can: can.unequal_lengths),
)


def _is_interpreted(can: Capabilities) -> bool:
    return can.interpret and "cpu" not in can.platforms


def _words(values: Iterable[enum.Enum | str]) -> str:
    return ", ".join(f"`{word}`" for word in sorted(str(getattr(value, "value", value)) for value in values))


def _platforms(can: Capabilities) -> str:
    least = dict(can.minimum_generation)
    since = {name: f" from {oldest(name, generation).kind} on" for name, generation in least.items()}
    return ", ".join(f"{name}{since.get(name, '')}" for name in sorted(can.platforms))


def _head_dims(can: Capabilities) -> str:
    dims = can.head_dims
    if dims is None:
        return ""
    range_ = f"{dims.minimum} and more" if dims.maximum is None else f"{dims.minimum} to {dims.maximum}"
    return range_ if dims.multiple_of == 1 else f"{range_}, multiples of {dims.multiple_of}"


@functools.cache
def _reservations() -> dict[str, list[str]]:
    """Why `auto` does not choose a kernel, by its name, as `kernelry list` says."""
    return {name: kernel_json(kernel)["reservations"] for name, kernel in installed.registry().kernels.items()}


def _needs(spec: KernelSpec) -> tuple[str, ...]:
    """What a kernel asks to be installed on a machine that has none of the libraries of our extras."""
    bare = Environment(Knowledge.ASSUMED, versions=tuple((name, None) for name in _libraries()))
    can = spec.capabilities
    asked = (
        Request(target=target, mode=mode, q_len=1024, head_dim=128, dtype=min(can.dtypes))
        for target in (oldest(name, dict(can.minimum_generation).get(name)) for name in sorted(can.platforms))
        for mode in Mode
        if mode in can.modes
    )
    refusals = (refusal for request in asked for refusal in spec.refusals(request, bare))
    missing = (refusal for refusal in refusals if refusal.code is RefusalCode.VENDOR_MISSING)
    return tuple(dict.fromkeys(refusal.remedy or refusal.detail for refusal in missing))


@functools.cache
def _libraries() -> tuple[str, ...]:
    """The distributions that the extras of the installed plugins bring."""
    plugins = sorted({plugin.distribution.split()[0] for plugin in kernelry.plugins()})
    required = (Requirement(text) for plugin in plugins for text in importlib_metadata.requires(plugin) or ())
    names = sorted({each.name for each in required if "extra" in str(each.marker)})
    return tuple(spelled for name in names for spelled in (name, name.replace("-", "_")))  # as plugins ask for them
