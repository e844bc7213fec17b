"""Policies: which kernels are preferred for which requests, as frozen data, under the environment variables.

The variables are parsed strictly, and once.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, final

from kernelry.errors import ConfigError, nearest
from kernelry.policy.rules import Rule, check_tiling
from kernelry.policy.shipped import ADAPTERS_MAX_EXTRA_WORK, SHIPPED_RULES, Threshold, shipped_rules, thresholds_with

if TYPE_CHECKING:
    from kernelry.policy.measurements import Measurements

Tilings = tuple[tuple[str, tuple[tuple[str, int], ...]], ...]
"""(kernel name, ((tunable, value), …)) pairs."""


_PREFIX = "KERNELRY_"
KNOWN_SWITCHES = tuple(
    f"{_PREFIX}{name}" for name in ("EXPERIMENTAL", "KERNEL", "LOCK", "MEASUREMENTS", "PLUGINS", "STRICT")
)
_YES_NO = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
LOCK_FILE = "kernelry.lock.json"
_MEASUREMENTS_FILE = "measurements-1.json"
"""With the number of its format, so that versions of kernelry do not replace each other's."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Switches:
    """What the environment variables say.

    Args:
      kernel: KERNELRY_KERNEL, the kernel to use unless a call or a scope names one; None when
        unset or `auto`.
      plugins: KERNELRY_PLUGINS, the entry-point names to load; None when unset.
      strict: KERNELRY_STRICT, whether resolutions must be those of the lock file.
      lock: KERNELRY_LOCK, the path of the lock file; looked at only when strict.
      unknown: the variables named `KERNELRY_*` that mean nothing.
      wrong: of the variables that must be yes or no and are neither: (name, what was found and what to write).
      measurements: KERNELRY_MEASUREMENTS, the file of measured times; empty for none, None when unset.
      experimental: KERNELRY_EXPERIMENTAL, whether kernels may be chosen in spite of their reservations.
    """

    kernel: str | None = None
    plugins: tuple[str, ...] | None = None
    strict: bool = False
    lock: str = LOCK_FILE
    unknown: tuple[str, ...] = ()
    wrong: tuple[tuple[str, str], ...] = ()
    measurements: str | None = None
    experimental: bool = False

    @classmethod
    def parse(cls, environ: Mapping[str, str]) -> Switches:
        """Reads the variables; an unknown `KERNELRY_*` warns with the nearest known one.

        Raises:
          ConfigError: KERNELRY_STRICT or KERNELRY_EXPERIMENTAL is neither yes nor no.
        """
        return cls._read(environ)._checked()

    @staticmethod
    def of_process() -> Switches:
        """Returns the switches of this process, read once.

        Raises:
          ConfigError: KERNELRY_STRICT or KERNELRY_EXPERIMENTAL is neither yes nor no.
        """
        return _of_process()._checked()

    @staticmethod
    def unchecked() -> Switches:
        """Returns the switches of this process for those who list things, and say what is wrong."""
        return _of_process()

    @property
    def measurements_path(self) -> str | None:
        """The file of measured times, by default in the user's cache directory; None for none."""
        from platformdirs import user_cache_path  # looked up once per process

        try:
            default = user_cache_path("kernelry") / _MEASUREMENTS_FILE if self.measurements is None else ""
            return self.measurements or str(default) or None
        except RuntimeError:  # there is no home directory
            return None

    def _checked(self) -> Switches:
        if self.wrong:
            raise ConfigError(f"{'; '.join(detail for _, detail in self.wrong)}.")
        return self

    @classmethod
    def _read(cls, environ: Mapping[str, str]) -> Switches:
        unknown = tuple(sorted(name for name in environ if name.startswith(_PREFIX) and name not in KNOWN_SWITCHES))
        for name in unknown:
            hint = nearest(name, KNOWN_SWITCHES)
            warnings.warn(f"unknown environment variable {name} is ignored{hint}", stacklevel=3)
        kernel = environ.get("KERNELRY_KERNEL", "").strip()
        listed = environ.get("KERNELRY_PLUGINS")
        names = None if listed is None else tuple(name.strip() for name in listed.split(",") if name.strip())
        lock = environ.get("KERNELRY_LOCK", "").strip() or LOCK_FILE
        said = {name: environ.get(name, "").strip() for name in ("KERNELRY_STRICT", "KERNELRY_EXPERIMENTAL")}
        strict, experimental = (_YES_NO.get(text.lower(), False) for text in said.values())
        wrong = tuple(
            (name, f"{name}={text!r} is neither yes nor no; write one of {', '.join(_YES_NO)}")
            for name, text in said.items()
            if text and text.lower() not in _YES_NO
        )
        kernel_or_none = None if kernel in ("", "auto") else kernel
        measurements = environ.get("KERNELRY_MEASUREMENTS")
        return cls(kernel_or_none, names, strict, lock, unknown, wrong, measurements, experimental)


@functools.lru_cache(maxsize=1)
def _of_process() -> Switches:
    return Switches._read(os.environ)


@functools.lru_cache(maxsize=1)
def measurements_of_process() -> Measurements | None:
    """Returns the times that this process was started with; None where there is no file of them, or an unusable one."""
    path = Switches.unchecked().measurements_path
    if path is None or not os.path.exists(path):
        return None
    from kernelry.policy.store import Store  # imported where there is a file

    return Store(path).usable()


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Which kernels are preferred, as frozen data.

    Args:
      rules: of the user's config; the first that applies decides.
      defaults: shipped preferences; the first that applies orders the kernels it names, the
        others follow by name.
      thresholds: the numbers in the defaults.
      kernel: what KERNELRY_KERNEL says; absolute.
      forbidden_adapters: names of adapters that must not be used.
      tilings: overrides of the tunables of kernels, by kernel name; a rule's own win over them.
      experimental: what KERNELRY_EXPERIMENTAL says: whether reservations leave no kernel out.
    """

    rules: tuple[Rule, ...] = ()
    defaults: tuple[Rule, ...] = ()
    thresholds: tuple[Threshold, ...] = ()
    kernel: str | None = None
    forbidden_adapters: frozenset[str] = frozenset()
    tilings: Tilings = ()
    experimental: bool = False
    _hash: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for kernel, tiling in self.tilings:
            check_tiling(tiling, f"tilings: {kernel}")
        if self.forbidden_adapters:
            _check_adapters(self.forbidden_adapters)
        parts = (getattr(self, field.name) for field in dataclasses.fields(self) if field.init)
        object.__setattr__(self, "_hash", hash(tuple(parts)))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        return functools.partial(Policy, **facts), ()  # hashes differ between processes

    def demotes(self, extra_work: float) -> bool:
        """Says whether adapters add so much work that the kernel ranks below those that need less.

        Args:
          extra_work: what they add, as a multiple of the call's own multiplications.
        """
        limits = (t.value for t in self.thresholds if t.name == ADAPTERS_MAX_EXTRA_WORK.name)
        return any(100 * extra_work > limit for limit in limits)

    @property
    def length_bounds(self) -> tuple[int, ...]:
        """The lengths around which its rules may decide differently, sorted."""
        conditions = (rule.when for rule in (*self.rules, *self.defaults))
        ranges = (part for when in conditions for part in (when.q_len, when.kv_len) if part is not None)
        return tuple(sorted({number for part in ranges for number in part.bounds}))

    @classmethod
    def shipped(
        cls,
        *,
        rules: Iterable[Rule] = (),
        thresholds: Mapping[str, int] | None = None,
        forbidden_adapters: Iterable[str] = (),
        switches: Switches | None = None,
        tilings: Tilings = (),
    ) -> Policy:
        """The shipped preferences, with a user's rules and thresholds.

        Args:
          rules: come before the shipped preferences.
          thresholds: replace shipped values, by name.
          forbidden_adapters: adapters that must not be used.
          switches: the environment variables; None reads those of the process.
          tilings: overrides of the tunables of kernels, by kernel name.

        Raises:
          ConfigError: a threshold is unknown, or a number is not one that it may be.
        """
        chosen = thresholds_with(thresholds or {})
        switches = Switches.of_process() if switches is None else switches
        return cls(
            rules=tuple(rules),
            defaults=shipped_rules(chosen) if thresholds else SHIPPED_RULES,
            thresholds=tuple(chosen.values()),
            kernel=switches.kernel,
            forbidden_adapters=frozenset(forbidden_adapters),
            tilings=tilings,
            experimental=switches.experimental,
        )

    @staticmethod
    def of_process() -> Policy:
        """Returns the shipped preferences under the environment variables of this process, always the same object."""
        switches = Switches.of_process()
        return _shipped_under(switches.kernel, switches.experimental)


def _check_adapters(names: frozenset[str]) -> None:
    from kernelry.execution.adapters.order import ADAPTERS  # imported for those who forbid some

    known = {adapter.name for adapter in ADAPTERS}
    for name in sorted(names - known):
        raise ConfigError(f"forbid_adapters: unknown adapter {name!r}{nearest(name, known)}")


@functools.lru_cache(maxsize=8)
def _shipped_under(kernel: str | None, experimental: bool) -> Policy:
    return Policy.shipped(switches=Switches(kernel, experimental=experimental))


def check_policy(policy: Any) -> None:
    """Checks what was given as `policy=`.

    Raises:
      ArgumentError: it is not a Policy.
    """
    if policy is not None and not isinstance(policy, Policy):
        from kernelry.kernel.mistakes import not_a_policy  # an error alone needs text

        raise not_a_policy(policy)
