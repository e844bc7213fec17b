"""The tokens of a call, and the parts of a key/value cache: two frozen pytrees."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, final

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kernelry._pytree import pytree
from kernelry.errors import ArgumentError, ShapeError


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """The positions and segments of the tokens of a call; the same value serves every layer.

    Packed sequences need only `segment_ids`. Leave `positions` out unless tokens are permuted, as
    in load-balanced context parallelism: traced positions rule kernels out, and chunks are counted
    from position 0. Offsets and positions that are Python ints or NumPy arrays stay static, also
    through jit; JAX arrays are traced.

    Args:
      segment_ids: integers [B, S] or [S] of the keys: a query sees the keys of its own segment;
        a negative id is padding. The query's are the same if T = S, else those from `query_offset` on.
        With a cache: the query's own, [B, T].
      query_offset: the slot of the first query among the keys, an int or integers, scalar or [B]:
        the length of the previous chunks in chunked prefill, the index of the step in decode.
      positions: integers [T] or [B, T], the positions of the queries. A sharding with a load-balanced order gives
        them by itself where T = S.
      kv_positions: integers [S] or [B, S], the positions of the keys; None means the queries'
        positions if they are given and T = S, else 0 … S − 1.
      bidirectional: booleans [B, S] or [S]: the keys of each run of True see each other, whatever
        the mask and the segments are.
      indexer: booleans [B, T, S] or [B, 1, T, S]: the keys that stay visible.

    Raises:
      ArgumentError: positions together with query_offset, or kv_positions with neither.
      ShapeError: indexer is not such an array.
    """

    __hash__ = None  # type: ignore[assignment]  # arrays have no hash

    segment_ids: Int[Array, "#B S"] | None = None
    query_offset: int | Int[Array, ""] | Int[Array, " B"] | None = None
    positions: Int[Array, "#B T"] | None = None
    kv_positions: Int[Array, "#B S"] | None = None
    bidirectional: Bool[Array, "#B S"] | None = None
    indexer: Bool[Array, "B T S"] | None = None

    def __post_init__(self) -> None:
        if self.positions is not None and self.query_offset is not None:
            raise ArgumentError("Tokens got both positions and query_offset, which say the same: pass one of them.")
        if self.kv_positions is not None and self.positions is None and self.query_offset is None:
            raise ArgumentError(
                "Tokens got kv_positions, but not the queries' positions: add positions= or query_offset=."
            )
        offset = self.query_offset
        if isinstance(offset, np.integer | np.ndarray) and offset.ndim == 0 and offset.dtype.kind in "iu":
            object.__setattr__(self, "query_offset", int(offset))
        if self.indexer is not None:
            _check_indexer(self.indexer)

    @property
    def is_located(self) -> bool:
        """Whether this gives the queries' positions."""
        return self.positions is not None or self.query_offset is not None


def _check_indexer(indexer: Any) -> None:
    shape, dtype = np.shape(indexer), getattr(indexer, "dtype", type(indexer).__name__)
    if dtype != np.bool_:
        raise ShapeError(
            f"indexer must be booleans, True for the keys that stay visible, got {dtype}; for an additive mask of 0 "
            "and large negative numbers pass mask == 0."
        )
    if len(shape) != 3 and not (len(shape) == 4 and shape[1] == 1):
        raise ShapeError(f"indexer must be [B, T, S] or [B, 1, T, S], got shape {shape}.")


_PLACES = ("query_offset", "positions", "kv_positions")
"""The fields that are static if they are Python's or NumPy's, as in `Mask.at`."""


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Constant:
    """A NumPy array that compares by value, for the static part of a pytree."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes

    @property
    def array(self) -> np.ndarray:
        return np.frombuffer(self.content, self.dtype).reshape(self.shape)


def _static(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _Constant(value.dtype.str, value.shape, value.tobytes())
    return value if isinstance(value, int) else None


def _flatten_with_keys(tokens: Tokens) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
    values = [(field.name, getattr(tokens, field.name)) for field in dataclasses.fields(tokens)]
    static = tuple(_static(value) if name in _PLACES else None for name, value in values)
    leaves = (None if known is not None else value for (_, value), known in zip(values, static, strict=True))
    return tuple((jax.tree_util.GetAttrKey(name), leaf) for (name, _), leaf in zip(values, leaves, strict=True)), static


def _unflatten(static: tuple[Any, ...], leaves: Iterable[Any]) -> Tokens:
    # Without __init__: JAX puts sentinels and batched arrays into containers.
    tokens = object.__new__(Tokens)
    for field, known, leaf in zip(dataclasses.fields(Tokens), static, leaves, strict=True):
        value = known.array if isinstance(known, _Constant) else known
        object.__setattr__(tokens, field.name, leaf if known is None else value)
    return tokens


jax.tree_util.register_pytree_with_keys(Tokens, _flatten_with_keys, _unflatten)


@final
@pytree("key", "value", "segment_ids", "positions")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class CachedPart:
    """A part of a key/value cache: the prompt, the tokens decoded since, or a shared prefix.

    Args:
      key: [B, S, K, H].
      value: [B, S, K, D].
      segment_ids: integers [B, S] or [S]; the slots that have tokens have the query's id, which is
        1 unless `Tokens.segment_ids` is given. None: every slot has a token.
      positions: integers [S] or [B, S], the positions of the keys. None: before every query, which
        is enough for masks that see everything earlier.
    """

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K D"]
    segment_ids: Int[Array, "#B S"] | None = None
    positions: Int[Array, "#B S"] | None = None
