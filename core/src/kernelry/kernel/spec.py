"""The Kernel protocol: a light description that is importable anywhere, and a body loaded when chosen.

A description may ask an Environment which vendor libraries and drivers are present.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, final

import jax

from kernelry._pytree import pytree, short_repr
from kernelry.errors import ConfigError, PluginError, nearest
from kernelry.kernel.capabilities import Capabilities
from kernelry.kernel.partial import Partial
from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.masks.base import Mask
from kernelry.request.request import Request

if TYPE_CHECKING:
    from jaxtyping import Array, Float

AUTO = "auto"
"""Given in place of a kernel's name, so that the policy chooses."""


@final
@pytree("query", "key", "value", "mask", "bias", "sinks", "dropout_rng")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The arrays of one call.

    Args:
      query: [B, T, N, H]. key: [B, S, K, H]. value: [B, S, K, D]; where the request says so, QuantizedArrays, or
        PagedArrays that share one table. With a `request.kv_layout` other than `separate` the value is a ValueInKey.
      mask: the conjunction, aligned with `request.mask.atoms`.
      bias: broadcastable to B N T S, rank 4. sinks: [N]. dropout_rng: a PRNG key.
    """

    query: Float[Array, "B T N H"]
    key: Any
    value: Any
    mask: tuple[Mask, ...] = ()
    bias: Float[Array, "#B #N #T #S"] | None = None
    sinks: Float[Array, " N"] | None = None
    dropout_rng: jax.Array | None = None

    __repr__ = short_repr


@final
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """What `Kernel.backward` returns: the cotangents of the operands, in their dtypes.

    Where the values are stored in the keys, `key` is the cotangent of both, and `value` is not read.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None = None


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Tiling:
    """Block sizes and other tunables of a kernel, by name, in the vendor's units; `source` says who found them best."""

    values: tuple[tuple[str, int], ...] = ()
    source: str = dataclasses.field(default="", compare=False)  # no kernel may depend on it

    @classmethod
    def of(cls, **values: int) -> Tiling:
        """`Tiling.of(block_q=128)`."""
        return cls(tuple(sorted(values.items())))

    def __getitem__(self, name: str) -> int:
        return dict(self.values)[name]

    def replace(self, values: Mapping[str, int], kernel: str) -> Tiling:
        """Overrides some values.

        Raises:
          ConfigError: the kernel has no tunable of that name.
        """
        mine = dict(self.values)
        for name in values:
            if name not in mine:
                raise ConfigError(f"tiling: {kernel} has no tunable {name!r}{nearest(name, mine)}")
            if isinstance(values[name], bool) or not isinstance(values[name], int) or values[name] < 1:
                raise ConfigError(f"tiling: {name}={values[name]!r} of {kernel} must be a positive integer")
        return Tiling.of(**{**mine, **values}) if values else self

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.values) or "none"


_RELEASE = re.compile(r"(\d+(\.\d+)*)?")
"""The numbers that a version begins with; it always matches."""


@final
class Knowledge(enum.Enum):
    """How an Environment answers: by looking, by assuming, or not at all."""

    PROBED = "probed"
    ASSUMED = "assumed"
    NOT_PROBED = "not probed"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Vendor:
    """An answer about one distribution: `version` is None when it is known to be absent."""

    distribution: str
    version: str | None
    knowledge: Knowledge

    @property
    def missing(self) -> bool:
        """True only when the distribution was looked for and not found."""
        return self.knowledge is Knowledge.PROBED and self.version is None

    @property
    def release(self) -> tuple[int, ...]:
        """The numbers of the version, (2, 21) for `2.21rc1`, to compare with those of a release; () without one."""
        return tuple(map(int, re.findall(r"\d+", _RELEASE.match(self.version or "")[0])))  # type: ignore[index]

    def refusals(self, remedy: str) -> Iterator[Refusal]:
        """Refuses a request where the distribution is missing; `remedy` is the pip command that brings it."""
        if self.missing:
            detail = f"{self.distribution.replace('_', '-')} is not installed"
            yield Refusal(RefusalCode.VENDOR_MISSING, detail, remedy)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Environment:
    """The vendor facts of the machine where a request would run.

    On this machine, questions are answered by looking; for the Target of another one the answers are assumed in the
    kernel's favour, and for a candidate that is not about to win nothing is asked. `versions` are facts stated
    beforehand, e.g. by a test or of a recorded machine; they override what is found here. With `made_here` a program
    for the Target of another machine is made on this one, where a library must be installed for it.
    """

    knowledge: Knowledge = Knowledge.PROBED
    versions: tuple[tuple[str, str | None], ...] = ()
    made_here: bool = False
    _unanswered: list[str] = dataclasses.field(default_factory=list, init=False, repr=False, compare=False)

    def vendor(self, distribution: str) -> Vendor:
        """Returns what is known of an installed distribution. Imports nothing."""
        stated = dict(self.versions)
        if distribution in stated:
            return Vendor(distribution, stated[distribution], Knowledge.PROBED)
        if self.knowledge is not Knowledge.PROBED:
            if self.made_here and _installed_version(distribution) is None:
                return Vendor(distribution, None, Knowledge.PROBED)
            self._unanswered.append(distribution)
            return Vendor(distribution, None, self.knowledge)
        return Vendor(distribution, _installed_version(distribution), Knowledge.PROBED)

    def probe(self, question: Callable[[], str | None]) -> str | None:
        """Asks a question that may import a vendor or touch a driver.

        Args:
          question: returns None when all is well, else the reason why not: a module-level function, or an object
            that is called and compares by value where the question has facts of its own. Each is asked once per
            process, and only when looking is allowed.
        """
        if self.knowledge is not Knowledge.PROBED:
            self._unanswered.append(question.__name__)
            return None
        return _answer(question)

    @property
    def left_open(self) -> bool:
        """Whether this Environment was asked something that it did not look up."""
        return bool(self._unanswered)

    def fresh(self) -> Environment:
        """Returns an equal Environment that was asked nothing so far."""
        return dataclasses.replace(self)

    def without_probing(self) -> Environment:
        """Returns the same Environment for candidates that are not about to win."""
        if self.knowledge is Knowledge.PROBED:
            return dataclasses.replace(self, knowledge=Knowledge.NOT_PROBED)
        return self


@functools.lru_cache(maxsize=256)
def _installed_version(distribution: str) -> str | None:
    import importlib_metadata  # not needed to import kernelry

    try:
        return importlib_metadata.version(distribution)
    except importlib_metadata.PackageNotFoundError:
        return None


@functools.lru_cache(maxsize=256)
def _answer(question: Callable[[], str | None]) -> str | None:
    return question()


class Kernel(Protocol):
    """The body of a kernel.

    Where the kernel declares a gradient, JAX must be able to differentiate `forward` without statistics, or the kernel
    declares `backward_only`. Then it needs no derivative of its own: core differentiates every call by `backward`.
    """

    @abstractmethod
    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        """Computes attention, with statistics when asked for."""

    def backward(
        self,
        inputs: Inputs,
        request: Request,
        tiling: Tiling,
        out: Float[Array, "B T N D"],
        lse: Float[Array, "B N T"],
        d_out: Float[Array, "B T N D"],
        d_lse: Float[Array, "B N T"] | None,
    ) -> Gradients:
        """Returns this part's exact share of the gradients; written where `gradient=BACKWARD`.

        Args:
          out, lse: of the whole attention: all parts merged, sinks included, natural logarithm,
            float32. `lse = +inf` marks a row that is empty in this part and contributes zero.
          d_out: the cotangent of out.
          d_lse: the cotangent of lse; None unless the kernel declares `lse_cotangent`.
        """
        return _no_backward(self)


def _no_backward(kernel: Kernel) -> Gradients:
    raise NotImplementedError(f"{type(kernel).__name__} declares gradient=BACKWARD and has no backward")


def no_refusals(request: Request, environment: Environment) -> tuple[Refusal, ...]:
    """The refusals of a kernel whose capabilities say it all."""
    return ()


def no_reservations(request: Request) -> tuple[Refusal, ...]:
    """The reservations of a kernel that may be chosen for everything it serves."""
    return ()


def one_tiling(request: Request) -> tuple[Tiling, ...]:
    """The tilings of a kernel without tunables."""
    return (Tiling(),)


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """The light description of a kernel: pure data and small functions, no vendor imports.

    Args:
      name: how users ask for it; unique among the installed plugins.
      capabilities: what it can do.
      load: `module:attribute` of the body, a Kernel or a class of no arguments; imported when the
        kernel is first chosen. A function that returns the body serves notebooks and tests.
      refusals: what data cannot say: divisibility, vendor probes; a function of its arguments alone, for a kernel
        behind the winner is asked later, or never.
      reservations: why the kernel is not chosen for a request that it can serve, unless a call, a scope, a rule or
        KERNELRY_KERNEL names it or KERNELRY_EXPERIMENTAL is set, e.g. a first release (RefusalCode.EXPERIMENTAL); a
        function of the request inside the adapters alone. Explanations tell them, also of the kernel that is chosen.
      tilings: the search space for a request, the default first.
      signature: texts that a lowered program must contain if this kernel really ran: scopes, and targets of custom
        calls, or how a target begins and `*`; see `kernelry.plugin.signature_of`.
      summary: one line for listings.
      known_failures: (name of a conformance case, reason) pairs: what the author knows to be wrong. A case listed
        here that passes fails the kit, so that the list is kept honest.
    """

    name: str
    capabilities: Capabilities
    load: str | Callable[[], Kernel]
    refusals: Callable[[Request, Environment], tuple[Refusal, ...]] = no_refusals
    reservations: Callable[[Request], tuple[Refusal, ...]] = no_reservations
    tilings: Callable[[Request], tuple[Tiling, ...]] = one_tiling
    signature: Callable[[Request], tuple[str, ...]]
    summary: str = ""
    known_failures: tuple[tuple[str, str], ...] = ()

    def body(self) -> Kernel:
        """Imports the body; those of the 256 kernels used last are kept.

        Raises:
          PluginError: the import fails.
        """
        return _loaded(self)

    def _import(self) -> Kernel:
        if not isinstance(self.load, str):
            return self.load()
        module, _, attribute = self.load.partition(":")
        try:
            found: Any = getattr(importlib.import_module(module), attribute)
            body: Kernel = found() if isinstance(found, type) else found
        except Exception as error:
            raise PluginError(f"kernel {self.name!r}: cannot load its body {self.load!r}: {error!r}") from error
        return body


@functools.lru_cache(maxsize=256)  # a notebook makes a new spec each time a cell is run
def _loaded(spec: KernelSpec) -> Kernel:
    # A lazy import under a trace would leak tracers into the vendor's module constants.
    with jax.ensure_compile_time_eval():
        return spec._import()


def check_kernel_name(kernel: Any) -> None:
    """Checks what was given as `kernel=`.

    Raises:
      ArgumentError: it is not a name.
    """
    if not isinstance(kernel, str):
        from kernelry.kernel.mistakes import not_a_name  # an error alone needs text

        raise not_a_name(kernel)
