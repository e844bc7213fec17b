"""Scopes around calls: `use(...)` overrides choices, `record()` collects resolutions.

Which scopes are open is a fact of the running task, kept in a context variable. JAX looks up what it compiled by a
value that belongs to a thread, and nothing is called when a thread goes on with another task; so while a scope is open
that value is a `_Key`, which asks the context variable when JAX compares it. A call of a compiled function compares it
with the keys of that function's programs and does nothing else: the path to keep short.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, final

from kernelry._compat import scope_key as _jax_key
from kernelry.errors import ArgumentError
from kernelry.kernel.spec import AUTO, KernelSpec, check_kernel_name
from kernelry.policy.policy import Policy, check_policy
from kernelry.request.context_parallel import ContextParallel
from kernelry.request.target import Target

if TYPE_CHECKING:
    from kernelry.policy.lock import Lock
    from kernelry.request.sharding import Sharding
    from kernelry.resolution.explanation import Resolution

_T = TypeVar("_T")
_Function = TypeVar("_Function", bound=Callable[..., Any])


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
    sharding: Sharding | None = None


@final
class Recorder:
    """Where `record()` collects; compared by identity, so each one makes JAX trace anew."""

    def __init__(self) -> None:
        self.resolutions: list[Resolution] = []


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Said:
    """What the open scopes say together."""

    scope: Scope = Scope()
    recorders: tuple[Recorder, ...] = ()
    _hash: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.scope, self.recorders)))

    def __hash__(self) -> int:
        return self._hash  # a policy's takes long

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, _Said) or self._hash != other._hash:
            return False
        return self.scope == other.scope and self.recorders == other.recorders


_NOTHING = _Said()


@final
class _Opening:
    """One `with` that was entered: what it changes, in which thread, and whether it is still open."""

    __slots__ = ("_known", "change", "is_open", "thread")

    def __init__(self, change: Callable[[_Said], _Said], thread: _Thread) -> None:
        self.change, self.thread, self.is_open = change, thread, True
        self._known: tuple[_Said, _Said] | None = None

    def after(self, outer: _Said) -> _Said:
        """What this scope says inside another; computed again where that one has ended."""
        if self._known is None or self._known[0] is not outer:
            self._known = outer, self.change(outer)
        return self._known[1]


@final
class _Key:
    """A part of the key of JAX's caches: what is said when it is first hashed, in the thread that made it.

    From then on it stays what it is, for the cache may have kept it; the thread gets a new one. JAX hashes it before it
    traces, and where it finds a compiled program it only compares.
    """

    __slots__ = ("_said", "_thread")

    def __init__(self, thread: _Thread) -> None:
        self._thread = thread
        self._said: _Said | None = None

    def settled(self) -> _Said | None:
        """Decides at the first call; None in another thread before that: nothing that was traced depends on it."""
        if self._said is None and self._thread is _local.thread:
            self._said = self._thread.said()
            self._thread.install()
        return self._said

    def _now(self) -> _Said | None:
        """What it is, or would be if it were decided now."""
        return self._thread.said() if self._said is None and self._thread is _local.thread else self._said

    def __eq__(self, other: object) -> bool:
        mine = self._now()
        if mine is None:
            return False
        if other is None:
            return mine == _NOTHING  # outside all scopes JAX has None
        return isinstance(other, _Key) and mine == other._now()

    def __hash__(self) -> int:
        mine = self.settled()
        return hash(None if mine == _NOTHING else mine)


@final
class _Thread:
    """One thread's part: the scopes that were opened in it, and the value that JAX has while there are any."""

    __slots__ = ("_known", "_openings", "_outermost")

    def __init__(self) -> None:
        self._openings: list[_Opening] = []
        self._outermost: Any = None
        self._known: tuple[tuple[_Opening, ...], _Said] = (), _NOTHING

    def said(self) -> _Said:
        """What is said now; computed again where the running task is another, or one of its scopes has ended."""
        here, known = _openings.get(), self._known
        if here is not known[0]:
            return self._said_by(here)
        for opening in here:
            if not opening.is_open:
                return self._said_by(here)
        return known[1]

    def _said_by(self, here: tuple[_Opening, ...]) -> _Said:
        """A worker that was given a copy of the context is not inside the scopes of the thread it was copied in."""
        openings = (opening for opening in here if opening.is_open and opening.thread is self)
        said = functools.reduce(lambda outer, opening: opening.after(outer), openings, _NOTHING)
        if self._outermost is not None:
            self._known = here, said
        return said

    def opened(self, opening: _Opening) -> None:
        """Puts a key in place of JAX's own value."""
        self._openings.append(opening)
        if self._outermost is None:
            self._outermost = _jax_key(_Key(self))
            self._outermost.__enter__()

    def install(self) -> None:
        """Gives JAX a key that was not hashed yet."""
        if self._outermost is not None:
            _jax_key(_Key(self)).__enter__()

    def tidy(self) -> None:
        """Gives JAX back its own value when all scopes have ended, and lets go of what they hold."""
        self._openings = [opening for opening in self._openings if opening.is_open]
        self._known = (), _NOTHING
        if not self._openings and self._outermost is not None:
            self._outermost.__exit__(None, None, None)
            self._outermost = None


@final
class _Local(threading.local):
    """Which thread this is: an object of its own, for an identifier is used again."""

    def __init__(self) -> None:
        self.thread = _Thread()


_openings: contextvars.ContextVar[tuple[_Opening, ...]] = contextvars.ContextVar("kernelry.scope", default=())
_local = _Local()


def _open_here() -> tuple[_Opening, ...]:
    return tuple(opening for opening in _openings.get() if opening.is_open)


def _settled() -> _Said:
    """What is said now, of which a function that is being traced takes note."""
    key = _jax_key.value
    said = key.settled() if isinstance(key, _Key) else None
    return _local.thread.said() if said is None else said


def current_scope() -> Scope:
    """Returns what the surrounding `use` scopes say."""
    return _settled().scope


def current_recorders() -> tuple[Recorder, ...]:
    """Returns the recorders of the surrounding `record` scopes."""
    return _settled().recorders


@final
class Opener(Generic[_T]):
    """A context manager that opens a scope, for the task and thread that enters it, until it is left.

    It can be entered again, and decorates functions, also those defined with `async def`.
    """

    def __init__(self, begin: Callable[[], tuple[Callable[[_Said], _Said], _T]]) -> None:
        self._begin = begin
        self._entered: list[_Opening] = []

    def __enter__(self) -> _T:
        change, result = self._begin()
        opening = _Opening(change, _local.thread)
        _settled()
        self._entered.append(opening)
        _openings.set((*_open_here(), opening))
        _local.thread.opened(opening)
        return result

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _settled()
        opening = self._left()
        opening.is_open = False
        self._entered.remove(opening)
        _openings.set(_open_here())
        _local.thread.tidy()

    def _left(self) -> _Opening:
        """The scope that ends: the innermost of this task; of all where another task or thread closes a generator."""
        here = [opening for opening in _open_here() if opening in self._entered]
        if self._entered:
            return here[-1] if here else self._entered[-1]
        raise ArgumentError("this scope is not open: it was left already, or never entered.")

    def __call__(self, function: _Function) -> _Function:
        """Returns the function with each call of it inside the scope.

        Raises:
          ArgumentError: a generator function, whose body does not run during the call.
        """
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise ArgumentError(
                f"a scope cannot decorate {function.__qualname__}, a generator: its body does not run during the call; "
                "write the `with` inside it."
            )
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return await function(*args, **kwargs)

            return awaited  # type: ignore[return-value]

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return called  # type: ignore[return-value]


def use(
    kernel: str | None = None,
    *,
    policy: Policy | None = None,
    target: str | Target | None = None,
    kernels: Sequence[KernelSpec] = (),
    tiling: dict[str, int] | None = None,
    strict: str | Path | Lock | None = None,
    context_parallel: ContextParallel | None = None,
    sharding: Sharding | str | None = None,
) -> Opener[None]:
    """Overrides choices for the calls inside, also for functions that are already jitted.

    A scope belongs to the task and the thread that enter it, and to tasks that are made inside, until it is left.
    Worker threads inherit nothing: open the scope in the function that runs there, or decorate that function with it.

    Args:
      kernel: the kernel to use, absolutely; `auto` lifts an outer scope's choice.
      policy: replaces the policy.
      target: answers for that hardware instead of the local one.
      kernels: adds kernels that no plugin registers.
      tiling: overrides tunables by name.
      strict: a lock file, as `kernelry lock` writes it; a resolution that differs from it is a ConfigError.
      context_parallel: how to attend to sequences that are sharded over a mesh axis; a size of 1 takes it back. Of it
        and `sharding` the one that an inner scope gives holds.
      sharding: how calls are cut over the axes of a mesh, as a `kernelry.parallel.Sharding` or its text; an empty one
        takes it back.

    Raises:
      ArgumentError: an argument is of another kind, a KernelSpec cannot be hashed or used, or sharding and
        context_parallel are both given.
      ConfigError: the target is unknown, or the lock file cannot be read.
    """
    check_kernel_name(AUTO if kernel is None else kernel)
    check_policy(policy)
    if not isinstance(kernels, Iterable):
        given = f"one; write kernels=[spec] for {kernels.name!r}" if isinstance(kernels, KernelSpec) else repr(kernels)
        raise ArgumentError(f"use(kernels=…) takes a sequence of KernelSpecs, got {given}.")
    if not isinstance(tiling, dict | None):
        raise ArgumentError(f"use(tiling=…) takes tunables by name, e.g. {{'block_q': 128}}, got {tiling!r}.")
    if kernels:
        from kernelry.kernel.mistakes import check_given  # imported for kernels that no plugin registers

        for spec in kernels:
            check_given(spec)
    if not isinstance(context_parallel, ContextParallel | None):
        raise ArgumentError(f"use(context_parallel=…) takes a ContextParallel, got {context_parallel!r}.")
    cut = None if sharding is None else _sharding(sharding)
    if cut is not None and context_parallel is not None:
        both = f"use(context_parallel={context_parallel!r}, sharding={str(cut)!r})"
        raise ArgumentError(f"{both}: both say how sequences are cut; name the axis in sharding alone, as sequence.")
    where = None if target is None else Target.parse(target)
    written = None if strict is None else _lock(strict)

    def inside(outer: Scope) -> Scope:
        return dataclasses.replace(
            outer,
            kernel=outer.kernel if kernel is None else (None if kernel == AUTO else kernel),
            policy=policy or outer.policy,
            target=where or outer.target,
            kernels=(*outer.kernels, *kernels),
            tiling=tuple(sorted({**dict(outer.tiling), **(tiling or {})}.items())),
            strict=written or outer.strict,
            context_parallel=None if cut and not cut.is_empty else context_parallel or outer.context_parallel,
            sharding=None if context_parallel and context_parallel.size != 1 else cut or outer.sharding,
        )

    return _changing(inside)


def _sharding(given: object) -> Sharding:
    from kernelry.request.sharding import Sharding  # imported where calls are sharded

    if isinstance(given, str | Sharding):
        return given if isinstance(given, Sharding) else Sharding.parse(given)
    text = "or its text, e.g. 'batch=data sequence=context'; Sharding.of_specs reads PartitionSpecs"
    raise ArgumentError(f"use(sharding=…) takes a kernelry.parallel.Sharding, {text}; got {given!r}.")


def _lock(strict: object) -> Lock:
    from kernelry.policy.lock import Lock  # imported for strict mode alone

    if not isinstance(strict, str | Path | Lock):
        raise ArgumentError(f"use(strict=…) takes a lock file, as `kernelry lock` writes it, got {strict!r}.")
    return strict if isinstance(strict, Lock) else Lock.read(strict)


def _changing(inside: Callable[[Scope], Scope]) -> Opener[None]:
    def change(outer: _Said) -> _Said:
        return dataclasses.replace(outer, scope=inside(outer.scope))

    return Opener(lambda: (change, None))


def interpret() -> Opener[None]:
    """Lets accelerator kernels resolve, and run in interpret mode, on CPU."""
    return _changing(lambda outer: dataclasses.replace(outer, interpret=True))


def record() -> Opener[list[Resolution]]:
    """Collects the Resolutions made inside, in order, one per call that is traced or run.

    Like `use`, it hears the task and the thread that enter it, and tasks that are made inside.
    """

    def begin() -> tuple[Callable[[_Said], _Said], list[Resolution]]:
        recorder = Recorder()
        return lambda outer: dataclasses.replace(outer, recorders=(*outer.recorders, recorder)), recorder.resolutions

    return Opener(begin)
