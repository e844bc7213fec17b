"""What a kernel declares, and core's check of a request against it.

Every field of a Request is decided by exactly one check below; a kernel that declares nothing
refuses everything, so forgetting to declare is safe.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator
from typing import Any, final

from kernelry.kernel.refusal import Refusal, RefusalCode
from kernelry.masks.form import Atom, AtomKind, PositionKind
from kernelry.masks.predicate import holds_traced
from kernelry.request.context_parallel import ContextParallel
from kernelry.request.request import NEUTRAL, Mode, Operand, Request
from kernelry.storage import INTERLEAVED, SEPARATE


@final
class Feature(enum.Enum):
    """Optional request fields that a kernel honours."""

    __hash__ = object.__hash__  # by identity, as members compare

    SCALE = "scale"
    BIAS = "bias"
    SOFT_CAP = "soft_cap"
    BIAS_AFTER_CAP = "bias_after_cap"
    SINKS = "sinks"
    DROPOUT = "dropout_rate"
    LOGITS_DTYPE = "logits_dtype"
    PRECISION = "precision"
    MAX_LOGITS = "max_logits"


@final
class Statistic(enum.Enum):
    """The forms of statistics a kernel can return in a Partial."""

    LSE = "lse"
    MAX_SUM = "max_sum"


@final
class Gradient(enum.Enum):
    """How a kernel is differentiated.

    NONE: not at all. NATIVE: JAX differentiates `forward`, statistics included. BACKWARD: JAX
    differentiates `forward` without statistics; with them, core calls `backward`.
    """

    NONE = "none"
    NATIVE = "native"
    BACKWARD = "backward"


@final
class ManualAxes(enum.Enum):
    """How a kernel runs inside a `shard_map` that checks over which axes arrays vary (`check_vma=True`, the default).

    CHECKED: as it is; what it computes passes the check. UNCHECKED: inside a `shard_map` of core's that does not check.
    """

    CHECKED = "checked"
    UNCHECKED = "unchecked"


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Dims:
    """Head dims a kernel takes: minimum ≤ dim ≤ maximum, a multiple of `multiple_of`."""

    minimum: int = 1
    maximum: int | None = None
    multiple_of: int = 1

    def why_not(self, name: str, value: int) -> str | None:
        """Returns the comparison that fails, with its values."""
        if value < self.minimum:
            return f"{name}={value} < {self.minimum}"
        if self.maximum is not None and value > self.maximum:
            return f"{name}={value} > {self.maximum}"
        if value % self.multiple_of:
            return f"{name}={value} is not a multiple of {self.multiple_of}"
        return None

    def padded(self, value: int) -> int | None:
        """Returns the smallest dim taken that is at least `value`; None where there is none."""
        dim = -(-max(value, self.minimum) // self.multiple_of) * self.multiple_of
        return None if self.maximum is not None and dim > self.maximum else dim


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a kernel may be from the float64 result for one dtype, and why that far."""

    dtype: str
    forward: float
    gradient: float
    reason: str


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a kernel declares. The defaults declare nothing.

    Args:
      platforms: where it runs compiled, e.g. `gpu`.
      interpret: whether it also runs on CPU in interpret mode.
      minimum_generation: (platform, generation) pairs; see `Target.generation`.
      modes: the modes it serves.
      dtypes: of query, key and value.
      head_dims: of query and key, and of value.
      split_head_dim: whether H ≠ D is served.
      grouped_heads: whether K < N is served.
      unequal_lengths: whether T ≠ S is served.
      empty_arrays: whether a batch or length of 0 is served.
      symbolic_sizes: which of `batch`, `q_len` and `kv_len` may be symbolic, as in an exported program: it reads them
        from the arrays, not from the request.
      atoms: the mask atoms it understands.
      positions: the ways of giving positions it understands, in addition to the default.
      features: the optional request fields it honours.
      statistics: what it can return in a Partial.
      normalizations: e.g. `softmax`.
      gradient: how it is differentiated.
      backward_only: whether `forward` has no derivative of its own, so that core differentiates every call by
        `backward`. Core then applies the sinks, too: the kernel is given none where a gradient is asked for.
      names_residuals: whether `forward` without statistics gives the name `REMAT_NAME` to its output and logsumexp as
        its own derivative keeps them; see `kernelry.plugin.named`. Core names the output of kernels that do not.
      gradients: the operands it has gradients of.
      forward_over_reverse: of a kernel with `gradient=BACKWARD`, whether JAX can differentiate its forward and backward
        passes in forward mode, as `jax.hessian` does; elsewhere second derivatives are an error.
      lse_cotangent: whether `backward` takes a cotangent of lse.
      empty_rows: whether fully masked rows come out as 0 with lse −inf and zero gradients.
      clean_hidden_slots: whether NaN or inf in a slot that no row may see stays out of results.
      kv_quantizations: the quantised keys and values it reads as they are, e.g. `int8:head_dim`.
      pages: whether it reads keys and values through a table of pages.
      kv_layouts: how keys and values may be stored relative to each other: `separate`; `value_in_key`, where
        `inputs.value` is a ValueInKey; `interleaved`, where it is one too, and the key is interleaved pages.
      context_parallel: the strategies by which it attends across devices itself, e.g. `ring`.
      manual_axes: how it runs inside a `shard_map`.
      partitioned_by_xla: whether XLA partitions it over the automatic axes of a mesh; other kernels compute the whole
        call on every device, or do not compile, unless the call says how it is sharded.
      tolerances: per dtype.
    """

    platforms: frozenset[str] = frozenset()
    interpret: bool = False
    minimum_generation: tuple[tuple[str, int], ...] = ()
    modes: frozenset[Mode] = frozenset()
    dtypes: frozenset[str] = frozenset()
    head_dims: Dims | None = None
    split_head_dim: bool = False
    grouped_heads: bool = False
    unequal_lengths: bool = False
    empty_arrays: bool = False
    symbolic_sizes: frozenset[str] = frozenset()
    atoms: frozenset[AtomKind] = frozenset()
    positions: frozenset[PositionKind] = frozenset()
    features: frozenset[Feature] = frozenset()
    statistics: frozenset[Statistic] = frozenset()
    normalizations: frozenset[str] = frozenset()
    gradient: Gradient = Gradient.NONE
    backward_only: bool = False
    names_residuals: bool = False
    gradients: frozenset[Operand] = frozenset()
    forward_over_reverse: bool = False
    lse_cotangent: bool = False
    empty_rows: bool = False
    clean_hidden_slots: bool = False
    kv_quantizations: frozenset[str] = frozenset()
    pages: bool = False
    kv_layouts: frozenset[str] = frozenset({SEPARATE})
    context_parallel: frozenset[str] = frozenset()
    manual_axes: ManualAxes = ManualAxes.UNCHECKED
    partitioned_by_xla: bool = False
    tolerances: tuple[Tolerance, ...] = ()

    def takes(self, atom: Atom) -> bool:
        """Whether it understands an atom: a custom mask without arrays is a predicate, too."""
        return atom.kind in self.atoms or (atom.is_predicate and AtomKind.PREDICATE in self.atoms)

    def refusals(self, request: Request) -> tuple[Refusal, ...]:
        """Returns every reason why a kernel with these capabilities cannot serve the request."""
        return tuple(refusal for check in CHECKS for refusal in check.run(self, request))


@final
@dataclasses.dataclass(frozen=True, slots=True)
class FieldCheck:
    """Decides some fields of a Request against the Capabilities."""

    fields: tuple[str, ...]
    run: Callable[[Capabilities, Request], Iterable[Refusal]]


def _platform(can: Capabilities, request: Request) -> Iterator[Refusal]:
    target = request.target
    if request.is_interpreted and can.interpret:
        return
    if target.platform not in can.platforms:
        yield Refusal(RefusalCode.PLATFORM, f"platform={target.platform} is not {_either(can.platforms)}", _remedy(can))
        return
    needed = dict(can.minimum_generation).get(target.platform)
    if needed is not None and target.generation is not None and target.generation < needed:
        yield Refusal(RefusalCode.GENERATION, f"{target} is generation {target.generation} < {needed}")


def _remedy(can: Capabilities) -> str | None:
    if not can.platforms:
        return None
    remedy = f"run on {_either(can.platforms)} or choose another kernel"
    if can.interpret:
        remedy += "; to try it out on CPU, enter kernelry.testing.interpret()"
    return remedy


def _mode(can: Capabilities, request: Request) -> Iterator[Refusal]:
    if request.mode not in can.modes:
        yield Refusal(RefusalCode.MODE, f"mode={request.mode.value} is not {_either(can.modes)}")


def _dtype(can: Capabilities, request: Request) -> Iterator[Refusal]:
    if request.dtype not in can.dtypes:
        yield Refusal(RefusalCode.DTYPE, f"dtype={request.dtype} is not {_either(can.dtypes)}")


def _head_dims(can: Capabilities, request: Request) -> Iterator[Refusal]:
    for name in ("head_dim", "value_dim"):
        value = getattr(request, name)
        why = "no head_dim is declared" if can.head_dims is None else can.head_dims.why_not(name, value)
        if why and (name == "head_dim" or request.value_dim != request.head_dim):
            yield Refusal(RefusalCode.HEAD_DIM, why)
    if request.head_dim != request.value_dim and not can.split_head_dim:
        detail = f"value_dim={request.value_dim} differs from head_dim={request.head_dim}"
        yield Refusal(RefusalCode.SPLIT_HEAD_DIM, detail)


def _heads(can: Capabilities, request: Request) -> Iterator[Refusal]:
    if request.q_heads != request.kv_heads and not can.grouped_heads:
        yield Refusal(RefusalCode.HEAD_GROUPS, f"q_heads={request.q_heads} share kv_heads={request.kv_heads}")


def _lengths(can: Capabilities, request: Request) -> Iterator[Refusal]:
    for name in request.symbolic_sizes:
        if name not in can.symbolic_sizes:
            detail = f"{name}={getattr(request, name)} is symbolic"
            yield Refusal(RefusalCode.SYMBOLIC_SIZE, detail, "export the program for a number")
    if request.q_len != request.kv_len and not can.unequal_lengths:
        yield Refusal(RefusalCode.UNEQUAL_LENGTHS, f"q_len={request.q_len} differs from kv_len={request.kv_len}")
    for name in ("batch", "q_len", "kv_len"):
        if not can.empty_arrays and getattr(request, name) == 0:
            yield Refusal(RefusalCode.EMPTY_ARRAY, f"{name}=0")


def _mask(can: Capabilities, request: Request) -> Iterator[Refusal]:
    for atom in request.mask.walk():
        if not can.takes(atom):
            yield Refusal(RefusalCode.MASK_ATOM, f"mask atom {atom} is not {_either(can.atoms)}")
        elif can.gradient is Gradient.BACKWARD and holds_traced(atom):
            # Its passes are traced apart, some after the program that the array belongs to.
            detail = f"mask atom {atom} holds an array that is being traced"
            yield Refusal(RefusalCode.MASK_ATOM, detail, "pass it as an operand: Predicate(fn, array)")
    for kind in sorted(request.mask.moved_kinds - can.positions, key=lambda k: k.value):
        yield Refusal(RefusalCode.POSITIONS, f"mask={request.mask} has {kind.value} positions")
    if not can.empty_rows and request.mask.may_have_empty_rows(request.q_len, request.kv_len):
        yield Refusal(RefusalCode.EMPTY_ROWS, f"mask={request.mask} may leave rows that see no key")
    if not can.clean_hidden_slots and request.mask.may_hide_slots(request.q_len, request.kv_len):
        yield Refusal(RefusalCode.HIDDEN_SLOTS, f"mask={request.mask} may hide slots that hold NaN or inf")


def _normalization(can: Capabilities, request: Request) -> Iterator[Refusal]:
    if request.normalization not in can.normalizations:
        detail = f"normalization={request.normalization} is not {_either(can.normalizations)}"
        yield Refusal(RefusalCode.NORMALIZATION, detail)


def _gradients(can: Capabilities, request: Request) -> Iterator[Refusal]:
    missing = request.gradients - can.gradients if can.gradient is not Gradient.NONE else request.gradients
    if missing:
        names = ", ".join(sorted(operand.value for operand in missing))
        yield Refusal(RefusalCode.GRADIENT, f"no gradient of {names}")


def _partial(can: Capabilities, request: Request) -> Iterator[Refusal]:
    if not (request.partial or request.statistics):
        return
    if not can.statistics:
        asked = "return_partial" if request.partial else "attention to keys of several devices"
        yield Refusal(RefusalCode.STATISTICS, f"{asked} needs statistics, which it does not return")
    elif request.partial and request.gradients and can.gradient is Gradient.BACKWARD and not can.lse_cotangent:
        yield Refusal(RefusalCode.STATISTICS_GRADIENT, "no gradient through the lse of a Partial")


def _storage(can: Capabilities, request: Request) -> Iterator[Refusal]:
    if request.kv_quantization is not None and request.kv_quantization not in can.kv_quantizations:
        detail = f"kv_quantization={request.kv_quantization} is not {_either(can.kv_quantizations)}"
        yield Refusal(RefusalCode.KV_QUANTIZATION, detail)
    if request.page_size is not None and not can.pages:
        yield Refusal(RefusalCode.PAGES, f"keys and values are in pages of page_size={request.page_size}")
    if request.kv_layout not in can.kv_layouts:
        alike = request.head_dim == request.value_dim and request.kv_quantization is None  # as interleaved pages need
        others = [layout for layout in (SEPARATE, INTERLEAVED)[: 1 + alike] if layout in can.kv_layouts and can.pages]
        remedy = f"keep them in PagedCache.create(layout={others[0]!r})" if others and not request.gradients else None
        yield Refusal(RefusalCode.KV_LAYOUT, f"kv_layout={request.kv_layout} is not {_either(can.kv_layouts)}", remedy)


def _context_parallel(can: Capabilities, request: Request) -> Iterator[Refusal]:
    if request.context_parallel is None:
        return
    strategy = ContextParallel.parse(request.context_parallel).strategy
    if strategy not in can.context_parallel:
        why = f"not {_either(can.context_parallel)}" if can.context_parallel else "not supported: it runs on one device"
        yield Refusal(RefusalCode.CONTEXT_PARALLEL, f"context_parallel={request.context_parallel} is {why}")


def _sharding(can: Capabilities, request: Request) -> Iterator[Refusal]:
    """A kernel is asked about the shards of a call that says how it is sharded; of others XLA must find out."""
    if request.sharding is not None:
        yield Refusal(RefusalCode.SHARDING, f"sharding={request.sharding}: ask about a shard of it")
    if request.partitioned and not can.partitioned_by_xla and can.platforms == {"tpu"} and not request.is_interpreted:
        detail = "XLA does not partition it over the automatic axes of the active mesh"
        remedy = 'say how the call is sharded, e.g. kernelry.use(sharding=kernelry.parallel.Sharding(batch="data"))'
        yield Refusal(RefusalCode.SHARDING, detail, remedy)


def _feature(feature: Feature, code: RefusalCode) -> FieldCheck:
    name = feature.value
    if feature is Feature.SCALE:
        return FieldCheck((name,), _scale)
    neutral = NEUTRAL[name]

    def run(can: Capabilities, request: Request) -> Iterable[Refusal]:
        value = getattr(request, name)
        return _no_feature(code, name, value) if value != neutral and feature not in can.features else ()

    return FieldCheck((name,), run)


def _scale(can: Capabilities, request: Request) -> Iterable[Refusal]:
    if Feature.SCALE in can.features or request.scale == request.default_scale:
        return ()
    return _no_feature(RefusalCode.SCALE, "scale", request.scale)


def _no_feature(code: RefusalCode, name: str, value: object) -> tuple[Refusal, ...]:
    return (Refusal(code, f"{name}={value} is not supported"),)


def _either(names: Iterable[Any]) -> str:
    listed = sorted(str(getattr(name, "value", name)) for name in names)
    return " or ".join(listed) if listed else "declared"


CHECKS: tuple[FieldCheck, ...] = (
    FieldCheck(("target", "interpret"), _platform),
    FieldCheck(("mode",), _mode),
    FieldCheck(("dtype",), _dtype),
    FieldCheck(("head_dim", "value_dim"), _head_dims),
    FieldCheck(("q_heads", "kv_heads"), _heads),
    FieldCheck(("batch", "q_len", "kv_len"), _lengths),
    FieldCheck(("mask",), _mask),
    _feature(Feature.SCALE, RefusalCode.SCALE),
    _feature(Feature.BIAS, RefusalCode.BIAS),
    _feature(Feature.SOFT_CAP, RefusalCode.SOFT_CAP),
    _feature(Feature.BIAS_AFTER_CAP, RefusalCode.BIAS_AFTER_CAP),
    _feature(Feature.SINKS, RefusalCode.SINKS),
    _feature(Feature.DROPOUT, RefusalCode.DROPOUT),
    FieldCheck(("normalization",), _normalization),
    _feature(Feature.LOGITS_DTYPE, RefusalCode.LOGITS_DTYPE),
    _feature(Feature.PRECISION, RefusalCode.PRECISION),
    FieldCheck(("gradients",), _gradients),
    FieldCheck(("partial", "statistics"), _partial),
    FieldCheck(("kv_quantization", "page_size", "kv_layout"), _storage),
    FieldCheck(("context_parallel",), _context_parallel),
    FieldCheck(("sharding", "partitioned"), _sharding),
    _feature(Feature.MAX_LOGITS, RefusalCode.MAX_LOGITS),
)
"""Every check of core. A field of Request that no check decides fails a test."""
