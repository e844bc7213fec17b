"""The options of an attention layer, and how its kernels are chosen, as one frozen value."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

from kernelry.errors import ArgumentError, ConfigError, nearest
from kernelry.kernel.spec import AUTO
from kernelry.masks.base import Mask
from kernelry.policy.policy import Policy, Tilings
from kernelry.policy.rules import Condition, Rule, check_tiling
from kernelry.request.arguments import CallOptions
from kernelry.request.checks import DTYPES, is_finite
from kernelry.request.names import precision_name

if TYPE_CHECKING:
    from kernelry.request.sharding import Sharding


@final
class AttentionType(enum.Enum):
    """Which keys the queries of a layer see, by position."""

    GLOBAL = "global"
    LOCAL_SLIDING = "local_sliding"
    CHUNK = "chunk"
    FULL = "full"
    MLA = "mla"
    BLOCK_DIFFUSION = "block_diffusion"

    @classmethod
    def parse(cls, value: str | AttentionType) -> AttentionType:
        """Reads an attention type.

        Raises:
          ConfigError: it is unknown, or `compressed`, which is not supported.
        """
        if isinstance(value, AttentionType):
            return value
        if isinstance(value, str) and value == "compressed":
            raise ConfigError(
                "attention type 'compressed' is not supported: it compresses the keys and values before attention. "
                "Compress them before the call and pass what each query sees as a mask, e.g. with type 'full'."
            )
        try:
            return cls(value)
        except (ValueError, TypeError):  # arrays are neither equal nor unequal
            known = [member.value for member in cls]
            raise ConfigError(f"unknown attention type {value!r}{nearest(str(value), known)}") from None


@final
@dataclasses.dataclass(frozen=True, slots=True)
class MoBA:
    """Mixture of block attention: each query sees its own block of keys and the best earlier blocks.

    Args:
      chunk_size: keys of one block.
      top_k: blocks that a query sees, its own included.

    Source: Lu et al. 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs".
    """

    chunk_size: int
    top_k: int

    def __post_init__(self) -> None:
        _check_whole("moba.chunk_size", self.chunk_size)
        _check_whole("moba.top_k", self.top_k)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class AttentionConfig:
    """The options of an attention layer, and how its kernels are chosen.

    Args:
      kernel: the name of the only kernel to use, or `auto`.
      rules: the first that applies decides.
      thresholds: (name, value) pairs that replace shipped thresholds. A mapping is accepted.
      forbid_adapters: adapters that must not be used.
      source: where this was read, for explanations.
      type: which keys a query sees, by position; a name or an AttentionType.
      window: keys that a query sees, its own included; or a pair (left, right), the keys that it sees before and
        after its own, as encoders count them. Only with `local_sliding`, which needs it.
      chunk_size: keys of one chunk; only with `chunk`, which needs it.
      block_size: tokens of one block; only with `block_diffusion`, which needs it.
      soft_cap: logits are capped to soft_cap · tanh(logits / soft_cap); None means no cap.
      scale: of the logits; None means H ** -0.5.
      sinks: whether the layer has one sink logit per query head.
      bias: whether the layer adds a bias [1, N, T, S] to the logits, such as ALiBi or relative positions.
      bias_after_cap: whether the bias is added after the soft cap.
      q_heads, kv_heads: N and K; None means that calls decide.
      head_dim, value_dim: H and D; None means that calls decide.
      moba: how the blocks that a query sees are chosen by their keys; None means that it sees all of them.
      record_max_logits: whether the largest visible logits are returned, for QK-clip.
      dropout_rate: on the probabilities, in [0, 1).
      logits_dtype: of logits, softmax and statistics.
      precision: of the products: `high`, `highest` or another name of `jax.lax.Precision`; None and
        `default` mean JAX's default.
      tilings: overrides of a kernel's tunables where that kernel is chosen, by kernel name; a rule's
        tiling takes precedence. Mappings are accepted.
      sharding: which axes of a mesh cut the calls of the layer, unless an enclosing `use(sharding=…)` says it: a
        `kernelry.parallel.Sharding`, its text, a mapping of its fields, or None.

    Raises:
      ConfigError: an option has a value that is not valid, or not valid with the type.
    """

    kernel: str = AUTO
    rules: tuple[Rule, ...] = ()
    thresholds: tuple[tuple[str, int], ...] = ()
    forbid_adapters: tuple[str, ...] = ()
    source: str = "config"
    type: AttentionType = AttentionType.GLOBAL
    window: int | tuple[int, int] | None = None
    chunk_size: int | None = None
    block_size: int | None = None
    soft_cap: float | None = None
    scale: float | None = None
    sinks: bool = False
    bias: bool = False
    bias_after_cap: bool = False
    q_heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    moba: MoBA | None = None
    record_max_logits: bool = False
    dropout_rate: float = 0.0
    logits_dtype: str = "float32"
    precision: str | None = None
    tilings: Tilings = ()
    sharding: Sharding | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "type", AttentionType.parse(self.type))
        object.__setattr__(self, "precision", _precision(self.precision))
        object.__setattr__(self, "tilings", _tilings(self.tilings))
        object.__setattr__(self, "thresholds", _pairs(self.thresholds))
        object.__setattr__(self, "sharding", _sharding(self.sharding))
        for name, kind in (("rules", Rule), ("forbid_adapters", str)):
            object.__setattr__(self, name, _listed(name, getattr(self, name), kind))
        if not isinstance(self.kernel, str) or not self.kernel:
            raise ConfigError(f"kernel must be a name or 'auto', got {self.kernel!r}.")
        if not isinstance(self.source, str):
            raise ConfigError(f"source must be text, e.g. a file's name, got {self.source!r}.")
        if self.moba is not None and not isinstance(self.moba, MoBA):
            raise ConfigError(f"moba must be a MoBA(chunk_size, top_k) or None, got {self.moba!r}.")
        for name in ("sinks", "bias", "bias_after_cap", "record_max_logits"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        self._check_sizes()
        self._check_heads()
        self._check_numbers()

    def _check_sizes(self) -> None:
        for name, owner in SIZES.items():
            size = getattr(self, name)
            if size is None and self.type is owner:
                raise ConfigError(f"type {owner.value!r} needs {name}, a positive integer.")
            if size is None:
                continue
            if name == "window" and isinstance(size, list | tuple):
                object.__setattr__(self, name, _both_sides(size))
            else:
                _check_whole(name, size)
            if self.type is not owner:
                raise ConfigError(
                    f"{name}={size} is only valid with type {owner.value!r}, and the type is {self.type.value!r}; "
                    f"leave {name} out or set the type."
                )

    def _check_heads(self) -> None:
        for name in HEADS:
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name))
        if self.q_heads is not None and self.kv_heads is not None and self.q_heads % self.kv_heads:
            raise ConfigError(f"kv_heads={self.kv_heads} must divide q_heads={self.q_heads}.")

    def _check_numbers(self) -> None:
        for name in ("soft_cap", "scale", "dropout_rate"):
            number = getattr(self, name)
            optional = name != "dropout_rate"
            if not (optional and number is None) and not is_finite(number):
                kind = "a finite number or none" if optional else "a number in [0, 1)"
                raise ConfigError(f"{name} must be {kind}, got {number!r}.")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise ConfigError(f"soft_cap must be positive, got {self.soft_cap}; leave it out for no cap.")
        if not 0 <= self.dropout_rate < 1:
            raise ConfigError(f"dropout_rate must be in [0, 1), got {self.dropout_rate}.")
        if not isinstance(self.logits_dtype, str) or self.logits_dtype not in DTYPES:
            raise ConfigError(f"unknown logits_dtype {self.logits_dtype!r}{nearest(str(self.logits_dtype), DTYPES)}")

    @property
    def mask(self) -> Mask:
        """The positional mask of the type, at the default positions; `.at` moves it."""
        return _mask(self.type, self.window, self.chunk_size, self.block_size)

    @property
    def sees_later_tokens(self) -> bool:
        """Whether the mask of the type shows a query any token after its own."""
        two_sided = isinstance(self.window, tuple) and self.window[1] > 0
        return two_sided or self.type in (AttentionType.FULL, AttentionType.BLOCK_DIFFUSION)

    @property
    def policy(self) -> Policy:
        """The policy that this config asks for, including environment variables."""
        return _policy(self)


HEADS = ("q_heads", "kv_heads", "head_dim", "value_dim")
"""The options that are sizes of the arrays of a call."""

SIZES = {
    "window": AttentionType.LOCAL_SLIDING,
    "chunk_size": AttentionType.CHUNK,
    "block_size": AttentionType.BLOCK_DIFFUSION,
}
"""The type that needs each size; no other type accepts it."""


def _mask(
    type_: AttentionType, window: int | tuple[int, int] | None, chunk_size: int | None, block_size: int | None
) -> Mask:
    from kernelry import masks

    if isinstance(window, tuple):
        return masks.SlidingWindow(*window)
    if window is not None:
        return masks.SlidingWindow(window - 1)
    if chunk_size is not None:
        return masks.Chunked(chunk_size)
    if block_size is not None:
        return masks.BlockCausal(block_size)
    return masks.Full() if type_ is AttentionType.FULL else masks.Causal()


@functools.lru_cache(maxsize=64)
def _policy(config: AttentionConfig) -> Policy:
    rules = config.rules
    if config.kernel != AUTO:
        rules = (Rule(Condition(), (config.kernel,), source=f"{config.source}: kernel = {config.kernel!r}"), *rules)
    return Policy.shipped(
        rules=rules,
        thresholds=dict(config.thresholds),
        forbidden_adapters=config.forbid_adapters,
        tilings=config.tilings,
    )


def options_of(config: AttentionConfig) -> CallOptions:
    """Returns the options of a call that a config gives; the caller sets the others, such as the mode."""
    return CallOptions(
        scale=config.scale,
        soft_cap=config.soft_cap,
        bias_after_cap=config.bias_after_cap,
        dropout_rate=config.dropout_rate,
        logits_dtype=config.logits_dtype,
        precision=config.precision,
        max_logits=config.record_max_logits,
    )


def _check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, got {value!r}.")


def _both_sides(window: Any) -> tuple[int, int]:
    if len(window) == 2 and all(type(side) is int and side >= 0 for side in window):
        return tuple(window)
    raise ConfigError(
        f"window must be a positive integer, or a pair (left, right) of integers, 0 or more, got {window!r}."
    )


def _precision(value: Any) -> str | None:
    if isinstance(value, int):  # JAX takes the numbers of its enumeration, too
        raise ConfigError(f"precision must be a name, e.g. 'highest', got {value!r}.")
    try:
        return precision_name(value)
    except ArgumentError as error:
        raise ConfigError(str(error)) from None


def _pairs(thresholds: Any) -> tuple[tuple[str, int], ...]:
    try:
        found = dict(thresholds)
        if all(isinstance(name, str) and type(value) is int for name, value in found.items()):
            return tuple(sorted(found.items()))
    except (TypeError, ValueError):
        pass
    raise ConfigError(f"thresholds must be numbers by name, got {thresholds!r}.")


def _listed(name: str, values: Any, kind: type) -> tuple[Any, ...]:
    if isinstance(values, list | tuple) and all(isinstance(value, kind) for value in values):
        return tuple(values)
    raise ConfigError(f"{name} must be a tuple of {kind.__name__}, got {values!r}.")


def _tilings(tilings: Any) -> Tilings:
    try:
        found = {name: tuple(sorted(dict(values).items())) for name, values in dict(tilings).items()}
    except (TypeError, ValueError):
        raise ConfigError(
            f"tilings must be numbers by tunable by kernel, e.g. {{'splash': {{'block_q': 1024}}}}, got {tilings!r}."
        ) from None
    for kernel, tiling in found.items():
        check_tiling(tiling, f"tilings: {kernel}")
    return tuple(sorted(found.items()))


def _sharding(given: Any) -> Sharding | None:
    if given is None:
        return None
    from kernelry.request.sharding import Sharding  # imported where calls are sharded

    if isinstance(given, Mapping):
        return Sharding.from_json(given)
    try:
        return Sharding.parse(given)
    except ArgumentError as error:
        message = str(error).removeprefix("Sharding: ")
        named = message.startswith(("sharding ", "a sharding "))
        raise ConfigError(message if named else f"sharding: {message}") from error


def check_config(config: Any) -> None:
    """Checks that a value is a config.

    Raises:
      ArgumentError: it is not an AttentionConfig.
    """
    if not isinstance(config, AttentionConfig):
        raise ArgumentError(
            f"config must be a kernelry.config.AttentionConfig, got {type(config).__name__}; a file or a mapping is "
            "read by kernelry.config.load_config(source)."
        )
