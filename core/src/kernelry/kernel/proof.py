"""Finds out from a program's text whether a kernel's work is in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kernelry.errors import PluginError

if TYPE_CHECKING:
    from kernelry.kernel.spec import KernelSpec
    from kernelry.request.request import Request

_WORK = frozenset({"dot_general", "exp", "exp2", "pallas_call", "closed_call", "jit", "while", "scan"})
"""Operations that do an attention's work: products, the softmax's exponentials (XLA renames products), and calls and
loops, whose bodies lowered programs name apart. A scope around anything else proves nothing."""

_NAMES = re.compile(r'(?:loc\(|op_name=)"([^"]+)"')
"""The names of operations: `loc("…")` in lowered programs, `op_name="…"` in compiled ones."""

_TARGETS = re.compile(r'(?:custom_call @|call_target_name = |custom_call_target=)"?([^"\s(,]+)')
_WRAPPED = re.compile(r"(?:(\w+)\()?([^()]*)\)*$")


def missing(signature: tuple[str, ...], program: Any) -> tuple[str, ...]:
    """Returns the parts of a signature that a program lacks.

    A part is the exact target of a custom call, how such a target begins where the part ends in `*`, or a scope: a
    whole component in the name of an operation. Where no custom call of the signature is there, the operation must be
    one that does an attention's work. Names are what a body says of itself: one that does another's work in its own
    scope, and hides the other's, is not found out.

    Args:
      signature: what the kernel says its program contains.
      program: what `jax.jit(f).lower(...)` or `.compile()` returned.
    """
    text = _text(program)
    targets = _targets(text)
    called = [part for part in signature if _is_called(part, targets)]
    scopes = {scope for name in _NAMES.findall(text) for scope in _scopes(name, anything=bool(called))}
    return tuple(part for part in signature if part not in called and part not in scopes)


def _is_called(part: str, targets: frozenset[str]) -> bool:
    if part.endswith("*") and part != "*":
        return any(target.startswith(part[:-1]) for target in targets)
    return part in targets


def check_program(kernel: KernelSpec, request: Request, program: Any) -> None:
    """Checks that a program contains a kernel's work.

    Args:
      kernel: the kernel.
      request: what it was asked itself, inside all adapters.
      program: as for `missing`.

    Raises:
      PluginError: the signature is missing, so something else ran; or it is not a tuple of texts, or empty.
    """
    wanted = kernel.signature(request)
    if isinstance(wanted, str):  # each of its letters is in every program
        raise PluginError(f"kernel {kernel.name!r}: signature must return a tuple of texts, got {wanted!r}.")
    if not wanted:
        raise PluginError(f"kernel {kernel.name!r} has an empty signature: nothing could prove that it ran.")
    lacking = missing(wanted, program)
    if lacking:
        raise PluginError(
            f"the program does not contain {', '.join(map(repr, lacking))}, the signature of kernel "
            f"{kernel.name!r}: another kernel ran, or this program is not the one that was resolved."
        )


def custom_calls(program: Any) -> frozenset[str]:
    """Returns the targets of a program's custom calls: what it leaves to libraries and to kernels.

    Args:
      program: as for `missing`.
    """
    return _targets(_text(program))


def _targets(text: str) -> frozenset[str]:
    return frozenset(_TARGETS.findall(text))


def _scopes(name: str, *, anything: bool) -> Iterator[str]:
    """The scopes around an operation; none around one that does no work, unless `anything` is set."""
    *around, operation = name.split("/")
    if not anything and operation not in _WORK and "pallas_call" not in around:
        return
    for component in around:
        match = _WRAPPED.search(component)
        if match is not None and match[1] not in ("jit", "pjit"):  # jit(name) is a function's name, not a scope
            yield match[2]


def _text(program: Any) -> str:
    try:
        return str(program.as_text(debug_info=True))  # a lowered program
    except TypeError:
        return str(program.as_text())  # a compiled one, which always carries its names
