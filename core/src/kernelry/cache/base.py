"""The protocol of key/value caches: append tokens, and attend to the parts of the cache."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any, Protocol, Self, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernelry.api import attention_with_options
from kernelry.cache.parts import CachePart, MaskedPart, check_positional, finished, over_earlier_keys, partials_of
from kernelry.cache.prefix import SharedPrefix
from kernelry.cache.slots import bytes_of, is_known, token_counts
from kernelry.errors import ArgumentError, CacheFullError, ShapeError
from kernelry.kernel.partial import checking_output
from kernelry.kernel.spec import AUTO
from kernelry.masks import Causal, Full, Mask
from kernelry.masks.base import is_mask
from kernelry.masks.fit import not_a_mask
from kernelry.request.arguments import CallOptions, as_array
from kernelry.request.checks import check_sinks
from kernelry.request.request import Mode

_CAUSAL = Causal()
_SLOTS_MOVE = "slots of a cache move: use masks of positions, and lengths= for rows of different length"


class AttendOptions(TypedDict, total=False):
    """The keywords of `attend`."""

    mask: Mask | None
    lengths: Int[Array, " B"] | None
    prefix: SharedPrefix | None
    scale: float | None
    soft_cap: float | None
    sinks: Float[Array, " N"] | None
    mode: str | Mode
    kernel: str
    logits_dtype: Any
    precision: str | jax.lax.Precision | None
    return_partial: bool
    return_max_logits: bool


class KVCache(Protocol):
    """Keys and values of the tokens so far: an immutable pytree, usable under jit, scan and donation.

    `append` comes before `attend`: the queries of `attend` are the last tokens appended. Tokens that do not fit are an
    error outside of jit. Under jit they are not written, the rows keep their lengths, `overflowed` is set until
    `recovered()`, `attend` returns NaN, and `check()`, called outside, raises.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def lengths(self) -> Int[Array, " B"]:
        """The number of tokens in each row."""

    @property
    @abstractmethod
    def overflowed(self) -> jax.Array:
        """A boolean: whether tokens were appended that did not fit."""

    @property
    def bytes(self) -> int:
        """The memory of its arrays, in bytes; an int4 takes half a byte."""
        return bytes_of(self)

    @abstractmethod
    def append(
        self,
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K D"],
        *,
        lengths: Int[Array, " B"] | None = None,
    ) -> Self:
        """Writes the next tokens of every row.

        Args:
          key, value: T tokens per row, stored in the cache's dtype; a PagedCache whose values are in its keys takes no
            value, but None.
          lengths: [B], how many of the T are tokens, counted from the first; None means all. Under jit, numbers
            outside [0, T] are clipped.

        Raises:
          CacheFullError: the tokens do not fit; nothing was written.
          ShapeError: an array does not fit the cache.
          ArgumentError: lengths are outside [0, T].
        """

    @abstractmethod
    def parts(self, base: Mask, q_len: int) -> tuple[CachePart, ...]:
        """The disjoint parts of the keys.

        Raises:
          ArgumentError: the mask, or the number of queries, needs keys that are not kept.
        """

    def check(self) -> Self:
        """Returns this cache.

        Raises:
          CacheFullError: tokens were appended that did not fit, also under jit.
        """
        if bool(self.overflowed):
            raise CacheFullError(
                f"{type(self).__name__}: tokens were appended that did not fit, and not written; create a larger cache."
            )
        return self

    def recovered(self) -> Self:
        """Returns this cache with `overflowed` unset: the tokens that did not fit are given up, or appended again."""
        return dataclasses.replace(self, overflowed=jnp.zeros_like(self.overflowed))  # type: ignore[type-var]

    def decode(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K D"] | None,
        **options: Unpack[AttendOptions],
    ) -> tuple[Any, Self]:
        """One step: appends the tokens and attends from them.

        Args:
          query, key, value: the same T tokens per row.
          options: the keywords of `attend`.

        Returns:
          What `attend` returns, and the cache after it.
        """
        after = self.append(key, value, lengths=options.get("lengths"))  # type: ignore[arg-type]  # which checks it
        return after.attend(query, **options), after

    @checking_output
    def attend(
        self,
        query: Float[Array, "B T N H"],
        *,
        mask: Mask | None = _CAUSAL,
        lengths: Int[Array, " B"] | None = None,
        prefix: SharedPrefix | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
        sinks: Float[Array, " N"] | None = None,
        mode: str | Mode = Mode.DECODE,
        kernel: str = AUTO,
        logits_dtype: Any = jnp.float32,
        precision: str | jax.lax.Precision | None = None,
        return_partial: bool = False,
        return_max_logits: bool = False,
    ) -> Any:
        """Attention of the last T tokens of every row to all its tokens; see `kernelry.attention`.

        Args:
          query: [B, T, N, H], the tokens appended last.
          mask: a mask of positions; token i of a row has position i, counted from the end of the prefix. None means
            `Full()`, as in `kernelry.attention`: the queries see each other.
          lengths: [B], how many of the T queries are tokens, as given to `append`; the result of the others is 0.
          prefix: keys that every row sees before its own.
          scale, soft_cap, sinks, kernel, logits_dtype, precision: as in `kernelry.attention`.
          mode: `prefill` for the chunks of a prompt.
          return_partial, return_max_logits: as in `kernelry.attention`.

        Returns:
          [B, T, N, D] in query's dtype, or a Partial; with `return_max_logits` a pair.

        Raises:
          ArgumentError: the mask is about slots, or needs keys that are not kept, or a row that is not empty has fewer
            tokens than there are queries.
          ShapeError, NoKernelError, KernelRefusedError: as `kernelry.attention`.
        """
        mask = Full() if mask is None else mask
        _check_mask(mask)
        query = as_array("query", query, 4)
        if query.shape[0] != self.lengths.shape[0]:
            raise ShapeError(f"query must be [B, T, N, H] with B={self.lengths.shape[0]}, got shape {query.shape}.")
        q_len = query.shape[1]
        counts = token_counts(lengths, query.shape[0], q_len)
        own = None if lengths is None else counts
        short = (self.lengths > 0) & (self.lengths < counts)
        if is_known(short) and short.any():
            raise ArgumentError(
                f"attend: {counts.tolist()} queries are the last tokens of each row, and the rows have "
                f"{self.lengths.tolist()} tokens: pass lengths=, how many of the queries are tokens."
            )
        if prefix is not None and not isinstance(prefix, SharedPrefix):
            raise ShapeError(f"prefix must be a kernelry.cache.SharedPrefix, got {type(prefix).__name__}.")
        check_sinks(sinks is not None, return_partial)
        options = CallOptions(
            mode=mode,
            scale=scale,
            soft_cap=soft_cap,
            logits_dtype=logits_dtype,
            precision=precision,
            partial=return_partial,
            max_logits=return_max_logits,
        )
        start = 0 if prefix is None else prefix.length
        offset = self.lengths - counts + start
        parts = self.masked_parts(mask, q_len, offset, own, start)
        if len(parts) == 1 and prefix is None and not return_partial:
            [part] = parts
            return self._poisoned(
                attention_with_options(
                    query, part.key, part.value, mask=part.mask, sinks=sinks, options=options, kernel=kernel
                )
            )
        found = partials_of(query, parts, options, kernel=kernel)
        if prefix is not None:
            found.append(prefix.attend(query, offset, _base(mask, q_len), own, options, kernel=kernel))
        return self._poisoned(finished(found, sinks, options))

    def masked_parts(
        self, mask: Mask, q_len: int, offset: jax.Array, lengths: jax.Array | None = None, start: int = 0
    ) -> tuple[MaskedPart, ...]:
        """The disjoint parts of the keys, each with what the last tokens see of it.

        Args:
          mask: a mask of positions.
          q_len: T, the number of tokens that attend.
          offset: [B], the position of the first of them.
          lengths: [B], how many of them are tokens; None means all.
          start: the position of the first token of every row.

        Raises:
          ArgumentError: the mask, or the number of queries, needs keys that are not kept.
        """
        base = _base(mask, q_len)
        return tuple(part.masked(base, start, offset, lengths) for part in self.parts(mask, q_len))

    def _poisoned(self, result: Any) -> Any:
        """NaN everywhere if tokens did not fit: a result without them would be wrong."""
        bad = self.overflowed
        return jax.tree.map(lambda array: jnp.where(bad, jnp.asarray(jnp.nan, array.dtype), array), result)


def _base(mask: Mask, q_len: int) -> Mask:
    """One token sees all before it, which the lengths alone express: so kernels without a causal mask can serve."""
    return over_earlier_keys(mask) if q_len == 1 else mask


def _check_mask(mask: Any) -> None:
    if not is_mask(mask):
        instead = not_a_mask(mask)
        if hasattr(mask, "shape"):
            instead = f"{mask.dtype} of shape {mask.shape}; {_SLOTS_MOVE}"
        raise ShapeError(f"mask must be a kernelry mask, got {instead}.")
    check_positional(mask, placed="which the cache itself decides: leave kv_… out", slots=f"and {_SLOTS_MOVE}")
