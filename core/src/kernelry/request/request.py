"""The static facts of one attention call."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Iterable, Mapping
from typing import Any, cast, final

from kernelry._values import SymbolicSize
from kernelry.errors import ArgumentError, ConfigError, nearest
from kernelry.masks.base import Extent
from kernelry.masks.fit import as_mask, check_located
from kernelry.masks.form import MaskForm
from kernelry.masks.predicate import note_arrays
from kernelry.request.checks import SYMBOLIC, check_kinds, check_sizes, check_storage
from kernelry.request.context_parallel import ContextParallel
from kernelry.request.names import named_dtype
from kernelry.request.target import Target
from kernelry.storage import SEPARATE, Quantization


@final
class Mode(enum.Enum):
    """What the model is doing."""

    __hash__ = object.__hash__  # by identity, as members compare

    TRAIN = "train"
    PREFILL = "prefill"
    DECODE = "decode"

    @classmethod
    def parse(cls, value: str | Mode) -> Mode:
        """Reads a mode; `autoregressive` is an alias of `decode`.

        Raises:
          ArgumentError: the mode is unknown.
        """
        if isinstance(value, Mode):
            return value
        try:
            return cls.DECODE if value == "autoregressive" else cls(value)
        except (ValueError, TypeError):  # arrays are neither equal nor unequal
            known = [mode.value for mode in cls]
            raise ArgumentError(f"unknown mode {value!r}{nearest(str(value), known)}") from None


@final
class Operand(enum.Enum):
    """The arrays of a call that can have a gradient."""

    __hash__ = object.__hash__  # by identity, as members compare

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    BIAS = "bias"
    SINKS = "sinks"

    @classmethod
    def parse(cls, value: str | Operand) -> Operand:
        """Reads an operand's name.

        Raises:
          ArgumentError: there is no such operand.
        """
        try:
            return cls(value)
        except (ValueError, TypeError):
            known = [operand.value for operand in cls]
            raise ArgumentError(f"gradients: unknown operand {value!r}{nearest(str(value), known)}") from None


def operands_of(gradients: Any) -> frozenset[Operand]:
    """Reads the names of the operands whose gradient is needed.

    Raises:
      ArgumentError: it is not a sequence of names, or there is no such operand.
    """
    if isinstance(gradients, str) or not isinstance(gradients, Iterable) or getattr(gradients, "ndim", 1) == 0:
        raise ArgumentError(f"gradients must be names of operands, e.g. ('query', 'bias'), got {gradients!r}.")
    if isinstance(gradients, frozenset) and all(type(name) is Operand for name in gradients):
        return gradients
    return frozenset(Operand.parse(name) for name in gradients)


_CPU = Target("cpu")
_FULL = MaskForm()
_QKV = frozenset({Operand.QUERY, Operand.KEY, Operand.VALUE})
_STORED = frozenset({Operand.KEY, Operand.VALUE})
"""The operands that may be quantised or in pages, and then have no gradient."""


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The static facts of one attention call: hashable, comparable, JSON-serialisable.

    Strings are accepted where an enum or a Target is kept, dtypes such as `jnp.bfloat16` where their name is
    kept, a Mask where its form is kept, and None where a value follows from the others.

    Args:
      target: where it will run, e.g. `gpu:h100`.
      mode: train, prefill or decode.
      batch, q_len, kv_len: B, T and S; `kv_len=None` is T. Of a program to be exported one may be symbolic, written as
        in `jax.export.symbolic_shape`, e.g. `b`.
      q_heads, kv_heads: N and K; `kv_heads=None` is N.
      head_dim, value_dim: H and D; `value_dim=None` is H.
      dtype: of query, key and value, e.g. `bfloat16`.
      mask: the static side of the mask; of a Mask only the form is kept, so its arrays may be of other sizes. Where
        T ≠ S it must say the positions of the queries, as in a call.
      scale: the factor on the logits; None is H ** -0.5.
      bias: the bias's shape, each of its four dimensions 1 or that of B N T S; None without bias.
      soft_cap: the logits' cap; None without.
      bias_after_cap: whether the bias is added to capped logits; always False without bias or without cap.
      sinks: whether a sink logit per query head joins the denominator.
      dropout_rate: on the probabilities, in [0, 1).
      gradients: the operands whose gradient is needed; None is all floating arrays in train mode and none otherwise.
      normalization: the Normalization's name.
      logits_dtype: of logits, softmax and statistics.
      precision: of the products, as in `jax.lax.Precision`; None is JAX's default.
      partial: whether the result is a Partial with statistics instead of an array.
      max_logits: whether the largest visible logit per batch row and head is asked for.
      interpret: whether accelerator kernels may run on CPU in interpret mode.
      kv_quantization: how keys and values are quantised, e.g. `int8:head_dim`; None where they are not.
      page_size: the slots of a page, where keys and values are in pages; None where they are not.
      kv_layout: how keys and values are stored relative to each other: `separate`, each by itself; `value_in_key`, the
        values are the first D columns of the keys; `interleaved`, in pages in which a key head and its value alternate.
      context_parallel: how a kernel attends across devices itself to sequences sharded over a mesh axis, e.g.
        `ring:context:4`; None where it need not.
      statistics: whether the kernel's statistics are needed, though no gradient goes through them: the call is one of
        several whose results are merged.
      sharding: which mesh axes share out the call, with their sizes, e.g. `batch=d:4 sequence=c:8 ring`; all sizes in
        the request are those of the whole call. None where it runs on one device.
      partitioned: whether XLA is to partition the call over a mesh, for which no sharding is given.
    """

    target: Target = _CPU
    mode: Mode = Mode.TRAIN
    batch: int = 1
    q_len: int
    kv_len: int = cast(int, None)
    q_heads: int = 1
    kv_heads: int = cast(int, None)
    head_dim: int = 64
    value_dim: int = cast(int, None)
    dtype: str = "float32"
    mask: MaskForm = _FULL
    scale: float = cast(float, None)
    bias: tuple[int, ...] | None = None
    soft_cap: float | None = None
    bias_after_cap: bool = False
    sinks: bool = False
    dropout_rate: float = 0.0
    gradients: frozenset[Operand] = cast("frozenset[Operand]", None)
    normalization: str = "softmax"
    logits_dtype: str = "float32"
    precision: str | None = None
    partial: bool = False
    max_logits: bool = False
    interpret: bool = False
    kv_quantization: str | None = None
    page_size: int | None = None
    kv_layout: str = SEPARATE
    context_parallel: str | None = None
    statistics: bool = False
    sharding: str | None = None
    partitioned: bool = False
    _hash: int = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in SYMBOLIC:
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, SymbolicSize.parse(getattr(self, name)))
        if isinstance(self.bias, tuple):
            object.__setattr__(self, "bias", tuple(map(_sized, self.bias)))
        self._fill("kv_len", self.q_len)
        self._fill("kv_heads", self.q_heads)
        self._fill("value_dim", self.head_dim)
        check_sizes(self)
        self._fill("scale", self.default_scale)
        if not isinstance(self.target, Target):
            object.__setattr__(self, "target", Target.parse(self.target))
        if not isinstance(self.mode, Mode):
            object.__setattr__(self, "mode", Mode.parse(self.mode))
        if not isinstance(self.mask, MaskForm):
            object.__setattr__(self, "mask", self._form_of(self.mask))
        self.mask.check_positions(self.batch, self.q_len, self.kv_len)
        for name in ("dtype", "logits_dtype"):
            object.__setattr__(self, name, named_dtype(getattr(self, name)))
        check_kinds(self, _FLAGS)
        if self.bias is None or self.soft_cap is None:  # both orders are the same: no kernel need know them apart
            object.__setattr__(self, "bias_after_cap", False)
        if self.kv_quantization is not None:
            kind = Quantization.parse(self.kv_quantization).of_heads(self.kv_heads)
            object.__setattr__(self, "kv_quantization", str(kind))
        if self.context_parallel is not None:
            object.__setattr__(self, "context_parallel", str(ContextParallel.parse(self.context_parallel)))
        if self.sharding is not None:
            object.__setattr__(self, "sharding", self._located(self.sharding))
        self._fill("gradients", self._default_gradients)
        object.__setattr__(self, "gradients", operands_of(self.gradients))
        check_storage(self, _STORED & self.gradients)
        object.__setattr__(self, "_hash", hash(self._key()))

    def _fill(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _form_of(self, mask: Any) -> MaskForm:
        extent = Extent(
            batch=self.batch, q_heads=self.q_heads, kv_heads=self.kv_heads, q_len=self.q_len, kv_len=self.kv_len
        )
        meant = as_mask(mask, extent)
        check_located(meant, self.q_len, self.kv_len)  # its arrays may be of other sizes: only their form is kept
        form = meant.form
        note_arrays(form)  # the request may outlive the mask
        return form

    def _located(self, text: str) -> str | None:
        from kernelry.request.sharding import Sharding  # imported where a call is sharded

        located = Sharding.parse(text).located
        located.check(batch=self.batch, q_len=self.q_len, kv_len=self.kv_len, q_heads=self.q_heads)
        return None if located.is_empty else str(located)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        # Strings hash differently in every process, so the hash is made anew where this arrives.
        return functools.partial(Request, **self._facts()), ()

    def _facts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _NAMES}

    def rewritten(self, **fields: Any) -> Request:
        """Returns a copy with other values, written as a Request keeps them: nothing is checked or derived again."""
        copy = object.__new__(Request)
        for name, value in (self._facts() | fields).items():
            object.__setattr__(copy, name, value)
        object.__setattr__(copy, "_hash", hash(copy._key()))
        return copy

    def _key(self) -> tuple[Any, ...]:
        # These few fields tell requests apart.
        sizes = self.batch, self.q_len, self.kv_len, self.head_dim, self.page_size
        return self.target, self.mode, sizes, self.dtype, self.kv_quantization, self.mask

    @property
    def default_scale(self) -> float:
        """The scale that `scale=None` means: H ** -0.5."""
        return float(self.head_dim) ** -0.5 if self.head_dim else 1.0

    @property
    def is_interpreted(self) -> bool:
        """Whether a kernel made for an accelerator runs in interpret mode: on a CPU, where that is allowed."""
        return self.interpret and self.target.platform == "cpu"

    @property
    def groups(self) -> int:
        """G, the query heads that share one key/value head."""
        return self.q_heads // self.kv_heads if self.kv_heads else 1

    @property
    def symbolic_sizes(self) -> tuple[str, ...]:
        """Which of `batch`, `q_len` and `kv_len` are symbolic: a kernel reads them from the arrays."""
        return tuple(name for name in SYMBOLIC if isinstance(getattr(self, name), SymbolicSize))

    @property
    def has_plain_kv(self) -> bool:
        """Whether keys and values are an array each, [B, S, K, H] and [B, S, K, D], neither quantised nor in pages."""
        return self.has_plain_keys and self.kv_layout == SEPARATE

    @property
    def has_plain_keys(self) -> bool:
        """Whether keys are an array [B, S, K, H], neither quantised nor in pages."""
        return self.kv_quantization is None and self.page_size is None

    @property
    def _default_gradients(self) -> frozenset[Operand]:
        if self.mode is not Mode.TRAIN:
            return frozenset()
        always = _QKV if self.has_plain_kv else _QKV - {Operand.VALUE} if self.has_plain_keys else _QKV - _STORED
        if self.bias is None and not self.sinks:
            return always
        present = {Operand.BIAS: self.bias is not None, Operand.SINKS: self.sinks}
        return always.union(operand for operand, given in present.items() if given)

    def __str__(self) -> str:
        heads = f"N={self.q_heads}" if self.q_heads == self.kv_heads else f"N={self.q_heads} K={self.kv_heads}"
        dims = f"H={self.head_dim}" if self.head_dim == self.value_dim else f"H={self.head_dim} D={self.value_dim}"
        extra = [f"{name}={value}" for name, value in self._unusual()]
        return " ".join(
            (
                f"platform={self.target} mode={self.mode.value} B={self.batch} T={self.q_len} S={self.kv_len}",
                f"{heads} {dims} dtype={self.dtype} mask={self.mask}",
                *extra,
            )
        )

    def _unusual(self) -> Iterable[tuple[str, Any]]:
        for name, neutral in NEUTRAL.items():
            value = getattr(self, name)
            if value != neutral and name != "mask":
                yield name, value
        if self.scale != self.default_scale:
            yield "scale", self.scale
        if self.gradients != self._default_gradients:
            yield "gradients", ",".join(sorted(o.value for o in self.gradients)) or "none"

    def to_json(self) -> dict[str, Any]:
        """Returns plain data; `from_json` reads it back."""
        return {
            **self._facts(),
            "target": str(self.target),
            "mode": self.mode.value,
            "mask": self.mask.to_json(),
            "bias": None if self.bias is None else [_plain(size) for size in self.bias],
            **{name: _plain(getattr(self, name)) for name in SYMBOLIC},
            "gradients": sorted(operand.value for operand in self.gradients),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Request:
        """Reads what `to_json` wrote.

        Raises:
          ConfigError: a field is unknown, or has a value that `to_json` does not write.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"request: expected an object with its fields, got {data!r}.")
        for name in data:
            if name not in _NAMES:
                raise ConfigError(f"request: unknown field {name!r}{nearest(name, _NAMES)}")
        facts = {**data, "mask": MaskForm.from_json(data.get("mask", ()))}
        try:
            return cls(**{**facts, "bias": None if data.get("bias") is None else tuple(data["bias"])})
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"request: cannot be read from {dict(data)!r}: {error}") from error


_NAMES = tuple(field.name for field in dataclasses.fields(Request) if field.init)

NEUTRAL: Mapping[str, Any] = {
    "mask": MaskForm(),
    "bias": None,
    "soft_cap": None,
    "bias_after_cap": False,
    "sinks": False,
    "dropout_rate": 0.0,
    "normalization": "softmax",
    "logits_dtype": "float32",
    "precision": None,
    "partial": False,
    "max_logits": False,
    "interpret": False,
    "kv_quantization": None,
    "page_size": None,
    "kv_layout": SEPARATE,
    "context_parallel": None,
    "statistics": False,
    "sharding": None,
    "partitioned": False,
}
"""The value of each optional field that asks nothing of a kernel (softmax is declared all the same)."""

_FLAGS = tuple(name for name, neutral in NEUTRAL.items() if neutral is False)


def _plain(size: int) -> int | str:
    return size.text if isinstance(size, SymbolicSize) else size


def _sized(size: Any) -> Any:
    return SymbolicSize.parse(size) if isinstance(size, str) else size
