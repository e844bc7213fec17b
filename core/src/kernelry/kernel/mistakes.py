"""Checks a KernelSpec without importing its kernel: its functions, the words it declares, where its body is."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, final

from kernelry.errors import ArgumentError, nearest
from kernelry.kernel.capabilities import Capabilities, Dims, Feature, Gradient, ManualAxes, Statistic, Tolerance
from kernelry.kernel.spec import AUTO, KernelSpec
from kernelry.masks.form import AtomKind, PositionKind
from kernelry.request.checks import DTYPES, SYMBOLIC, is_dtype, spelled
from kernelry.request.context_parallel import STRATEGIES
from kernelry.request.request import Mode, Operand
from kernelry.request.target import PLATFORMS, platform_meant
from kernelry.storage import KV_LAYOUTS, QUANTIZATIONS

_SETS: dict[str, type | tuple[type, ...]] = {
    "platforms": str,
    "modes": Mode,
    "dtypes": str,
    "symbolic_sizes": str,
    "atoms": AtomKind,
    "positions": PositionKind,
    "features": Feature,
    "statistics": Statistic,
    "normalizations": str,
    "gradients": Operand,
    "kv_quantizations": str,
    "kv_layouts": str,
    "context_parallel": str,
}
"""What the sets of Capabilities hold; a set of anything else holds nothing that a request could have."""

_FLAGS = tuple(field.name for field in dataclasses.fields(Capabilities) if isinstance(field.default, bool))

_NEEDED = {
    "platforms": "frozenset({'gpu'})",
    "modes": "frozenset(Mode)",
    "dtypes": "frozenset({'bfloat16', 'float32'})",
    "head_dims": "Dims()",
    "normalizations": "frozenset({'softmax'})",
    "kv_layouts": "frozenset({'separate'})",
}
"""What every request asks for, with an example of what to declare."""

_DEFINED = re.compile(r"^(?:class +|def +)?(\w+)", re.MULTILINE)
_FROM_ELSEWHERE = re.compile(r"import\s*\(?\s*\*|__getattr__|__dict__|globals|setattr|vars|exec")
"""How a module gets names that are not written in it."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Mistake:
    """Something wrong with a KernelSpec.

    Args:
      detail: what was found.
      fix: what its author should write.
      usable: whether the kernel can serve nevertheless.
    """

    detail: str
    fix: str
    usable: bool = False


def mistakes(spec: KernelSpec) -> tuple[Mistake, ...]:
    """Returns what is wrong with a KernelSpec; imports nothing, not even the packages around its body."""
    try:
        malformed = tuple(_malformed(spec))
        return malformed or (*_body(spec.load), *_undeclared(spec.capabilities), *_unknown_words(spec.capabilities))
    except Exception as error:  # of the objects in it, and of finders on sys.meta_path
        return (Mistake(f"checking it raised {error!r}", "write it with the types that KernelSpec names"),)


def _malformed(spec: KernelSpec) -> Iterator[Mistake]:
    if not isinstance(spec.name, str) or spec.name in ("", AUTO):
        yield Mistake(f"name must be a text other than {AUTO!r}, got {spec.name!r}", "give the kernel another name")
    for name in ("refusals", "reservations", "tilings", "signature"):
        value = getattr(spec, name)
        if not callable(value):
            yield Mistake(f"{name} must be a function, got {short(value)}", f"pass a function as {name}=")
    if not callable(spec.load) and not _names_body(spec.load):
        detail = f"load must be 'module:attribute' or a function, got {short(spec.load)}"
        yield Mistake(detail, "write load='package.module:attribute'")
    if not isinstance(spec.summary, str):
        yield Mistake(f"summary must be a text, got {short(spec.summary)}", "write one line of text as summary=")
    if not _are_pairs(spec.known_failures, str):
        detail = f"known_failures must be a tuple of (case, reason) pairs, got {short(spec.known_failures)}"
        yield Mistake(detail, "write known_failures=((case, reason),)")
    if not isinstance(spec.capabilities, Capabilities):
        yield Mistake(f"capabilities must be Capabilities, got {short(spec.capabilities)}", "pass a Capabilities")
        return
    yield from _wrong_types(spec.capabilities)


def _wrong_types(can: Capabilities) -> Iterator[Mistake]:
    for name, kind in _SETS.items():
        yield from _wrong_members(name, getattr(can, name), kind)
    for name in _FLAGS:
        if not isinstance(getattr(can, name), bool):
            yield Mistake(
                f"{name} must be True or False, got {short(getattr(can, name))}", f"write {name}=True or False"
            )
    if not isinstance(can.gradient, Gradient):
        detail = f"gradient must be a Gradient, got {short(can.gradient)}"
        yield Mistake(detail, "write Gradient.NONE, Gradient.NATIVE or Gradient.BACKWARD")
    if not isinstance(can.manual_axes, ManualAxes):
        detail = f"manual_axes must be a ManualAxes, got {short(can.manual_axes)}"
        yield Mistake(detail, "write ManualAxes.CHECKED or ManualAxes.UNCHECKED")
    if can.head_dims is not None and not _are_dims(can.head_dims):
        detail = f"head_dims must be Dims of integers from 1 on, got {short(can.head_dims)}"
        yield Mistake(detail, "write head_dims=Dims(minimum=…, maximum=…, multiple_of=…)")
    if not _are_pairs(can.minimum_generation, int):
        detail = (
            f"minimum_generation must be a tuple of (platform, generation) pairs, got {short(can.minimum_generation)}"
        )
        yield Mistake(detail, "write minimum_generation=(('gpu', 80),)")
    if not _are_tolerances(can.tolerances):
        expected = "a tuple of Tolerances, each a dtype's name and two numbers"
        detail = f"tolerances must be {expected}, got {short(can.tolerances)}"
        yield Mistake(detail, "write tolerances=(Tolerance('float32', forward, gradient, reason),)")


def _are_pairs(values: Any, second: type) -> bool:
    return isinstance(values, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], second)
        for pair in values
    )


def _are_tolerances(values: Any) -> bool:
    return isinstance(values, tuple) and all(
        isinstance(one, Tolerance) and isinstance(one.dtype, str) and _are_numbers(one.forward, one.gradient)
        for one in values
    )


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _are_dims(dims: Any) -> bool:
    if not isinstance(dims, Dims):
        return False
    sizes = (dims.minimum, 1 if dims.maximum is None else dims.maximum, dims.multiple_of)
    return all(isinstance(size, int) and size >= 1 for size in sizes)


def _wrong_members(name: str, values: Any, kind: Any) -> Iterator[Mistake]:
    of = "texts" if kind is str else f"{kind.__name__} members"
    if not isinstance(values, frozenset | tuple):
        yield Mistake(f"{name} must be a frozenset of {of}, got {short(values)}", f"write {name}=frozenset({{…}})")
        return
    for value in values:
        if not isinstance(value, kind):
            yield Mistake(f"{name} must hold {of}, got {short(value)}", f"write {of} in {name}=")


def _names_body(load: Any) -> bool:
    """Says whether it is 'module:attribute', of one attribute, as `KernelSpec.body` looks it up."""
    module, _, attribute = load.partition(":") if isinstance(load, str) else ("", "", "")
    return all(name.isidentifier() for name in (*module.split("."), attribute))


def _body(load: Any) -> Iterator[Mistake]:
    if not isinstance(load, str):
        return
    module, _, attribute = load.partition(":")
    absent, found = _located(module)
    fix = "reinstall the distribution; its author: correct load="
    if absent is not None:
        yield Mistake(f"its body {load!r} cannot be imported: there is no module {absent!r}", fix)
        return
    source = _source(found)
    if source is not None and not _may_have(source, attribute):
        hint = nearest(attribute, _DEFINED.findall(source), listed=False)
        yield Mistake(f"its body {load!r} cannot be imported: {module} has no {attribute!r}{hint}", fix)


def _located(module: str) -> tuple[str | None, ModuleSpec | None]:
    """Finds a module; imports nothing.

    Returns:
      The outermost of it and its packages that cannot be found, or None and its spec, where it has one.
    """
    path = None
    names = module.split(".")
    for name in (".".join(names[: count + 1]) for count in range(len(names))):
        loaded = sys.modules.get(name)
        spec = _find(name, path) if loaded is None else getattr(loaded, "__spec__", None)
        if loaded is None and spec is None:
            return name, None
        path = getattr(loaded, "__path__", None) if loaded is not None else spec and spec.submodule_search_locations
        if path is None and name != module:
            return module, None
    return None, spec


def _source(spec: ModuleSpec | None) -> str | None:
    """Returns the source of a module, without importing it; None where there is none that can be read."""
    get_source = getattr(spec.loader, "get_source", None) if spec is not None else None
    try:
        return None if spec is None or get_source is None else get_source(spec.name)
    except (ImportError, SyntaxError, UnicodeError):
        return None


def _may_have(source: str, name: str) -> bool:
    """Says whether a module may have a name: its source has the word, or takes names from elsewhere."""
    return re.search(rf"\b{name}\b", source) is not None or _FROM_ELSEWHERE.search(source) is not None


def _find(name: str, path: Any) -> ModuleSpec | None:
    """Asks the finders as `import` does; `importlib.util.find_spec` would import the package around a module."""
    if "." not in name:
        try:
            return importlib.util.find_spec(name)
        except ValueError:  # __main__ and other modules without a spec, set to None in sys.modules
            return None
    found = (finder.find_spec(name, path, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    return next((spec for spec in found if spec is not None), None)


def _undeclared(can: Capabilities) -> Iterator[Mistake]:
    for name, example in _NEEDED.items():
        if not getattr(can, name) and not (name == "platforms" and can.interpret):
            yield Mistake(f"it declares no {name}, so no request reaches it", f"write {name}={example}", usable=True)


def _unknown_words(can: Capabilities) -> Iterator[Mistake]:
    for platform in sorted({*can.platforms, *(platform for platform, _ in can.minimum_generation)}):
        meant = platform_meant(platform)
        if platform not in PLATFORMS and meant is not None:
            yield _unknown("platforms", platform, f"write {meant!r}")
    for dtype in sorted({*can.dtypes, *(tolerance.dtype for tolerance in can.tolerances)}):
        if not is_dtype(dtype):
            yield _unknown("dtypes", dtype, spelled(dtype).removeprefix("; ") or _one_of(dtype, DTYPES))
    for name, values, known in (
        ("kv_quantizations", can.kv_quantizations, QUANTIZATIONS),
        ("kv_layouts", can.kv_layouts, KV_LAYOUTS),
        ("context_parallel", can.context_parallel, STRATEGIES),
        ("symbolic_sizes", can.symbolic_sizes, SYMBOLIC),
    ):
        for value in sorted(set(values) - set(known)):
            yield _unknown(name, value, _one_of(value, known))


def _unknown(field: str, word: str, fix: str) -> Mistake:
    return Mistake(f"{field}: {word!r} is unknown, so no request has it", fix, usable=True)


def _one_of(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f"write {close[0]!r}" if close else f"write one of {', '.join(sorted(known))}"


def short(value: Any) -> str:
    """Returns the repr of a value, cut where it is long; of a KernelSpec or a module its name."""
    if isinstance(value, ModuleType):
        return f"the module {value.__name__!r}"
    if isinstance(value, KernelSpec):
        return f"the KernelSpec {value.name!r}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}… ({type(value).__name__})"


def check_given(spec: object) -> None:
    """Checks what `kernelry.use(kernels=[…])` is given.

    Raises:
      ArgumentError: it is not a KernelSpec, cannot be hashed, or cannot be used.
    """
    if not isinstance(spec, KernelSpec):
        raise ArgumentError(f"use(kernels=…) takes KernelSpecs, got {spec!r}.")
    try:
        hash(spec)
    except TypeError as error:
        raise ArgumentError(
            f"use(kernels=…): kernel {spec.name!r} cannot be hashed ({error}); write its capabilities with frozenset "
            "and tuple."
        ) from error
    _check_usable(spec)


@functools.lru_cache(maxsize=256)
def _check_usable(spec: KernelSpec) -> None:
    """Looks at a spec once, where it passes: a scope may be entered in every step."""
    fatal = [mistake for mistake in mistakes(spec) if not mistake.usable]
    if fatal:
        said = "; ".join(f"{mistake.detail}; {mistake.fix}" for mistake in fatal)
        raise ArgumentError(f"use(kernels=…): kernel {spec.name!r} cannot be used: {said}.")


def not_a_name(kernel: Any) -> ArgumentError:
    """The error of a call that was given something else than a name as `kernel=`."""
    name = getattr(kernel, "name", None)
    if not isinstance(name, str):
        return ArgumentError(f"kernel must be a name or 'auto', got {kernel!r}.")
    adding = ", inside kernelry.use(kernels=[spec]) where no plugin has it" if isinstance(kernel, KernelSpec) else ""
    return ArgumentError(
        f"kernel must be a name or 'auto', got {type(kernel).__name__} {name!r}; write kernel={name!r}{adding}."
    )


def not_a_policy(policy: Any) -> ArgumentError:
    """The error of a call that was given something else than a Policy as `policy=`."""
    has_one = type(getattr(policy, "policy", None)).__name__ == "Policy"
    instead = "write policy=config.policy" if has_one else "read one with kernelry.config.load_config(source).policy"
    return ArgumentError(f"policy must be a Policy, got {type(policy).__name__}; {instead}.")
