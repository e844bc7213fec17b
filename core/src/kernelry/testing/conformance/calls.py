"""A call of the kit as data: its request, its arrays and its arguments."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry.masks import Full, Mask
from kernelry.request.arguments import CallOptions
from kernelry.request.request import Mode, Operand, Request
from kernelry.storage import INTERLEAVED, SEPARATE, VALUE_IN_KEY, ValueInKey
from kernelry.testing.conformance import stored
from kernelry.testing.conformance.host import KernelHost

QKV = ("query", "key", "value")
_FULL = Full()


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionCall:
    """One attention call; the arguments are those of `kernelry.attention`.

    Args:
      bias: its shape, B N T S or 1 each.
      gradients: the operands differentiated; those that the call lacks are left out.
      poison: whether slots that no row may see have NaN and inf, and queries that see nothing have NaN.
      kv_quantization: how keys and values are quantised.
      page_size: of paged keys and values.
      kv_layout: how keys and values are stored relative to each other; values in the keys are not drawn.
      magnitude: a factor of the queries, so of the logits; and of sinks.
      level: added to queries and subtracted from keys, so that every logit is near −level² · scale · H.
      value_mean: added to the values.
      biased_out: the bias of slots that hardly count, e.g. −1e9; see `_biased_out`.
      peaks: whether the largest logit of one head is at the last query and key, of another at the first; see `_peaks`.
    """

    batch: int = 2
    q_len: int = 16
    kv_len: int = 16
    q_heads: int = 4
    kv_heads: int = 4
    head_dim: int = 8
    value_dim: int = 8
    dtype: str = "float32"
    mask: Mask = _FULL
    mode: Mode = Mode.TRAIN
    scale: float | None = None
    bias: tuple[int, ...] | None = None
    soft_cap: float | None = None
    bias_after_cap: bool = False
    sinks: bool = False
    dropout_rate: float = 0.0
    gradients: frozenset[Operand] = frozenset()
    normalization: str = "softmax"
    logits_dtype: str = "float32"
    precision: str | None = None
    partial: bool = False
    max_logits: bool = False
    poison: bool = False
    kv_quantization: str | None = None
    page_size: int | None = None
    kv_layout: str = SEPARATE
    magnitude: float = 1.0
    level: float = 0.0
    value_mean: float = 0.0
    biased_out: float | None = None
    peaks: bool = False

    @property
    def pairs(self) -> tuple[int, int, int, int]:
        """B N T S: the shape of a bias for every pair."""
        return self.batch, self.q_heads, self.q_len, self.kv_len

    @property
    def wanted(self) -> frozenset[Operand]:
        """The operands with a gradient that this call passes."""
        absent = {Operand.BIAS} if self.bias is None else set()
        absent |= set() if self.sinks else {Operand.SINKS}
        absent |= set() if self.kv_layout == SEPARATE else {Operand.VALUE}
        absent |= set() if self.kv_quantization is None and self.page_size is None else {Operand.KEY, Operand.VALUE}
        return self.gradients - absent if self.mode is Mode.TRAIN else frozenset()

    def request(self, host: KernelHost) -> Request:
        """The static facts."""
        shared = {name: getattr(self, name) for name in _OF_REQUEST}
        own = {"target": host.target, "interpret": host.interpreted, "mask": self.mask.form, "gradients": self.wanted}
        return Request(**{**shared, **own})

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `kernelry.attention` that are not arrays."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(CallOptions)}
        returned = {f"return_{name}": options.pop(name) for name in ("partial", "max_logits")}
        return {**options, **returned, "gradients": tuple(sorted(operand.value for operand in self.wanted))}

    def arrays(self, seed: int = 0) -> dict[str, Any]:
        """Draws the arrays that the kernel is given, by argument name; paged keys and values come with their table."""
        drawn = self._drawn(seed)
        if self.kv_layout == VALUE_IN_KEY:
            drawn["value"] = ValueInKey(self.value_dim)
        if self.poison or self.page_size is not None:
            drawn = self._stored(drawn, stored.MaskedOut.of(self))
        given: dict[str, Any] = jax.tree.map(jnp.asarray, drawn)
        return given

    def numbers(self, seed: int = 0) -> dict[str, np.ndarray]:
        """The same arrays for the oracle: dequantised, not in pages, keys and values apart, without NaN, float64."""
        drawn = self._drawn(seed)
        if self.kv_layout == VALUE_IN_KEY:
            drawn["value"] = stored.numbers(drawn["key"])[..., : self.value_dim]
        return {name: stored.numbers(array) for name, array in drawn.items()}

    def _drawn(self, seed: int) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        shapes: dict[str, tuple[int, ...]] = {
            "query": (self.batch, self.q_len, self.q_heads, self.head_dim),
            "key": (self.batch, self.kv_len, self.kv_heads, self.head_dim),
            "value": (self.batch, self.kv_len, self.kv_heads, self.value_dim),
        }
        shapes |= {} if self.bias is None else {"bias": self.bias}
        shapes |= {"sinks": (self.q_heads,)} if self.sinks else {}
        drawn = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        if self.peaks:
            _peaks(drawn["query"], drawn["key"])
        drawn["query"] = self.magnitude * drawn["query"] + self.level
        if self.sinks:
            drawn["sinks"] = self.magnitude * drawn["sinks"]
        drawn["key"] = drawn["key"] - self.level
        drawn["value"] = drawn["value"] + self.value_mean
        if self.sinks:
            drawn["sinks"] = drawn["sinks"] + np.log(max(1.0, self.kv_len / _FEW_KEYS))
        if self.biased_out is not None:
            drawn["bias"] = _biased_out(drawn["bias"], self.biased_out)
        return {name: self._rounded(name, array) for name, array in drawn.items()}

    def _rounded(self, name: str, array: np.ndarray) -> Any:
        if name in ("key", "value") and self.kv_quantization is not None:
            return stored.quantized(array, self.kv_quantization)
        return np.asarray(jnp.asarray(array, self.dtype))

    def _stored(self, drawn: dict[str, Any], masked_out: stored.MaskedOut) -> dict[str, Any]:
        """Puts NaN and inf into slots that no query may see, and NaN into queries that see nothing; then cuts pages."""
        if self.poison:
            query = np.where(masked_out.queries, np.asarray(np.nan).astype(drawn["query"].dtype), drawn["query"])
            kv = {name: stored.poisoned(drawn[name], masked_out.slots) for name in ("key", "value")}
            drawn |= {"query": query} | kv
        if self.page_size is None:
            return drawn
        paged = stored.together_in_pages if self.kv_layout == INTERLEAVED else stored.in_pages
        return drawn | paged(drawn["key"], drawn["value"], self.page_size, masked_out.slots)

    def cotangents(self, seed: int = 0) -> dict[str, jax.Array]:
        """Draws d_out, and d_lse where the call returns a Partial."""
        rng = np.random.default_rng([seed, 1])
        d_out = rng.standard_normal((self.batch, self.q_len, self.q_heads, self.value_dim))
        drawn = {"out": jnp.asarray(d_out, self.dtype)}
        if self.partial:
            drawn["lse"] = jnp.asarray(rng.standard_normal((self.batch, self.q_heads, self.q_len)), jnp.float32)
        return drawn


_OF_REQUEST = {field.name for field in dataclasses.fields(Request)} & {
    field.name for field in dataclasses.fields(AttentionCall)
}

_FEW_KEYS = 16
"""Among more keys sinks are drawn larger, so that their share stays the same."""

_LOW = -2e4


def _biased_out(bias: np.ndarray, lowest: float) -> np.ndarray:
    """Lowers slot 1 for every row, and for odd rows all but the row's own slot, which is at −2e4.

    So an odd row is its own value, if −2e4 is above `lowest` by as much as the numbers say. Queries and keys leave no
    trace there: their logits are rounded away, or their probabilities are 0 and 1.
    """
    rows, slots = np.arange(bias.shape[2])[:, None], np.arange(bias.shape[3])
    own = slots == rows % bias.shape[3]
    odd = rows % 2 == 1
    lowered = np.where((slots == 1) | odd, lowest, bias)
    return np.where(own & odd, _LOW, lowered)


_PEAK = 8.0
"""A product of a query and a key, in standard deviations of the others."""


def _peaks(query: np.ndarray, key: np.ndarray) -> None:
    """Makes the largest logit of each head that of the last query and key, or one of the first two of either.

    Causal masks show the first key to the second query, too.
    """
    (batch, q_len, heads, head_dim), (kv_len, kv_heads) = query.shape, key.shape[1:3]
    places = ((q_len - 1, kv_len - 1), (q_len - 1, min(1, kv_len - 1)), (min(1, q_len - 1), 0))
    for index, (row, head) in enumerate(np.ndindex(batch, heads)):
        token, slot = places[index % len(places)]
        peak = query[row, token, head]
        peak *= (_PEAK * head_dim**0.5) ** 0.5 / np.linalg.norm(peak)
        key[row, slot, head // (heads // kv_heads)] = peak
