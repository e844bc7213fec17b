"""Scopes around calls: `use(...)` overrides choices, `record()` collects resolutions.

Both are part of JAX's trace-cache key, so they take effect around functions already jitted.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import jax

from kernelry.context_parallel import ContextParallel
from kernelry.errors import ArgumentError
from kernelry.kernel import KernelSpec, check_kernel_name
from kernelry.lock import Lock
from kernelry.policy import AUTO, Policy, check_policy
from kernelry.target import Target

if TYPE_CHECKING:
    from kernelry.resolution import Resolution


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Scope:
    """What the `use` scopes around a call say together; the innermost wins."""

    kernel: str | None = None
    policy: Policy | None = None
    target: Target | None = None
    kernels: tuple[KernelSpec, ...] = ()
    tiling: tuple[tuple[str, int], ...] = ()
    interpret: bool = False
    strict: Lock | None = None
    context_parallel: ContextParallel | None = None


@final
class Recorder:
    """Where `record()` collects; compared by identity, so each one makes JAX trace anew."""

    def __init__(self) -> None:
        self.resolutions: list[Resolution] = []


_NO_SCOPE = Scope()
_scope: Any = jax.make_user_context(None)  # type: ignore[no-untyped-call]
_recorders: Any = jax.make_user_context(())  # type: ignore[no-untyped-call]


def current_scope() -> Scope:
    """Returns what the surrounding `use` scopes say."""
    scope: Scope | None = _scope.value
    return _NO_SCOPE if scope is None else scope


def current_recorders() -> tuple[Recorder, ...]:
    """Returns the recorders of the surrounding `record` scopes."""
    recorders: tuple[Recorder, ...] = _recorders.value
    return recorders


@contextlib.contextmanager
def use(
    kernel: str | None = None,
    *,
    policy: Policy | None = None,
    target: str | Target | None = None,
    kernels: Sequence[KernelSpec] = (),
    tiling: dict[str, int] | None = None,
    strict: str | Path | Lock | None = None,
    context_parallel: ContextParallel | None = None,
) -> Iterator[None]:
    """Overrides choices for the calls inside, also for functions that are already jitted.

    Args:
      kernel: the kernel to use, absolutely; `auto` lifts an outer scope's choice.
      policy: replaces the policy.
      target: answers for that hardware instead of the one at hand.
      kernels: adds kernels that no plugin registers.
      tiling: overrides tunables by name.
      strict: a lock file, as `kernelry lock` writes it; a resolution that is not the one written
        there is a ConfigError.
      context_parallel: says that query, key and value are sharded along their sequences, and how to attend to them;
        a size of 1 takes it back.

    Raises:
      ArgumentError: an argument is of another kind, or a KernelSpec cannot be hashed.
      ConfigError: the target is unknown, or the lock file cannot be read.
    """
    if kernel is not None:
        check_kernel_name(kernel)
    check_policy(policy)
    if isinstance(kernels, KernelSpec):
        raise ArgumentError(f"use(kernels=…) takes a sequence; write kernels=[spec] for {kernels.name!r}.")
    if not isinstance(tiling, dict | None):
        raise ArgumentError(f"use(tiling=…) takes tunables by name, e.g. {{'block_q': 128}}, got {tiling!r}.")
    if not isinstance(strict, str | Path | Lock | None):
        raise ArgumentError(f"use(strict=…) takes a lock file, as `kernelry lock` writes it, got {strict!r}.")
    for spec in kernels:
        _check_spec(spec)
    if not isinstance(context_parallel, ContextParallel | None):
        raise ArgumentError(f"use(context_parallel=…) takes a ContextParallel, got {context_parallel!r}.")
    outer = current_scope()
    inner = dataclasses.replace(
        outer,
        kernel=outer.kernel if kernel is None else (None if kernel == AUTO else kernel),
        policy=policy or outer.policy,
        target=outer.target if target is None else (target if isinstance(target, Target) else Target.parse(target)),
        kernels=(*outer.kernels, *kernels),
        tiling=tuple(sorted({**dict(outer.tiling), **(tiling or {})}.items())),
        strict=Lock.read(strict) if isinstance(strict, str | Path) else strict or outer.strict,
        context_parallel=context_parallel or outer.context_parallel,
    )
    with _scope(inner):
        yield


def _check_spec(spec: object) -> None:
    if not isinstance(spec, KernelSpec):
        raise ArgumentError(f"use(kernels=…) takes KernelSpecs, got {spec!r}.")
    try:
        hash(spec)
    except TypeError as error:
        raise ArgumentError(
            f"use(kernels=…): kernel {spec.name!r} cannot be hashed ({error}); write its capabilities with frozenset "
            "and tuple."
        ) from error


@contextlib.contextmanager
def interpret() -> Iterator[None]:
    """Lets accelerator kernels resolve, and run in interpret mode, on CPU."""
    with _scope(dataclasses.replace(current_scope(), interpret=True)):
        yield


@contextlib.contextmanager
def record() -> Iterator[list[Resolution]]:
    """Collects the Resolutions made inside, in order, one per call that is traced or run."""
    recorder = Recorder()
    with _recorders((*current_recorders(), recorder)):
        yield recorder.resolutions
