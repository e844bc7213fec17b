"""Keys that every row shares, attended to once for all rows."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, final

import jax
import jax.numpy as jnp

from kernelry._pytree import pytree, short_repr
from kernelry.cache.parts import MaskedPart, over_earlier_keys, partials_of
from kernelry.errors import ArgumentError, ShapeError
from kernelry.kernel.partial import Partial
from kernelry.masks import Mask
from kernelry.masks.composition import At, walk
from kernelry.policy.scope import current_scope, use
from kernelry.request.arguments import CallOptions
from kernelry.storage import ValueInKey
from kernelry.storage.quantized import Stored

if TYPE_CHECKING:
    from kernelry.request.sharding import Sharding


@final
@pytree("key", "value")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SharedPrefix:
    """The keys and values of tokens that precede those of every row, at positions 0 … P − 1.

    The queries of all rows attend to them as if they were one row (cascade attention): the keys are read once, not
    once per row, and the result is merged with attention to the keys of each row. On a mesh that cuts rows, each device
    has all of them, for the queries of its own rows; one that cuts slots alone cuts them, too, and P must divide.

    Args:
      key, value: [P, K, H] and [P, K, D], arrays or QuantizedArrays; the value may be a ValueInKey.

    Raises:
      ShapeError: a rank is not 3, or the lengths differ.
    """

    __repr__ = short_repr

    key: Stored
    value: Stored | ValueInKey

    def __post_init__(self) -> None:
        key, value = self.key, self.key if isinstance(self.value, ValueInKey) else self.value
        for name, array in (("key", key), ("value", value)):
            if not hasattr(array, "ndim"):
                raise ShapeError(f"SharedPrefix: {name} must be an array [P, K, …], got {type(array).__name__}.")
        if key.ndim != 3 or value.ndim != 3 or key.shape[0] != value.shape[0]:
            raise ShapeError(
                f"SharedPrefix: key and value must be [P, K, H] and [P, K, D], got {key.shape} and {value.shape}."
            )

    @property
    def length(self) -> int:
        """P, the number of tokens."""
        return int(self.key.shape[0])

    def attend(
        self,
        query: jax.Array,
        query_offset: jax.Array,
        mask: Mask,
        lengths: jax.Array | None,
        options: CallOptions,
        *,
        kernel: str,
    ) -> Partial:
        """Attends from the queries of all rows at once.

        Args:
          query: [B, T, N, H].
          query_offset: [B], the position of its first token.
          mask: a mask of positions.
          lengths: [B], how many queries of each row are tokens; None means all.
          options: the options of the call, without `max_logits`: the largest logit of each row is not available.
          kernel: as in `kernelry.attention`.

        Raises:
          ArgumentError: the mask has arrays, which belong to rows, or gives the queries' positions, or max_logits are
            requested.
        """
        if options.max_logits:
            raise ArgumentError("return_max_logits with prefix= is not available: rows are joined; attend without it.")
        _check_mask(mask)
        q_len = query.shape[1]
        positions = query_offset[:, None] + jnp.arange(q_len, dtype=jnp.int32)[None]
        if lengths is not None:
            # The result of a query that is not a token is not used.
            query = jnp.where(_real(lengths, q_len)[..., None, None], query, 0)
        placed = over_earlier_keys(mask).at(query_positions=_joined(positions), kv_offset=0)
        key, value = jax.tree.map(lambda array: array[None], (self.key, self.value))
        part = MaskedPart(key, value, placed)
        with use(sharding=_of_joined(current_scope().sharding)):
            [partial] = partials_of(_joined(query), [part], options, kernel=kernel)
        return _apart(partial, query, lengths)


def _check_mask(mask: Mask) -> None:
    """Refuses masks that mean something different once the rows are joined."""
    if any(jnp.ndim(leaf) for leaf in jax.tree.leaves(mask)):
        raise ArgumentError(f"mask={mask!r} has arrays, which belong to rows; with prefix= rows are joined.")
    if is_placed(mask):
        raise ArgumentError(f"mask={mask!r} gives the queries' positions; with prefix= rows are joined: leave .at out.")


def is_placed(mask: Mask) -> bool:
    """Whether the mask, or one inside it, gives positions of queries or keys."""
    return any(isinstance(part, At) for part in walk(mask))


def _of_joined(sharding: Sharding | None) -> Sharding | None:
    """How joined rows are cut: what cuts rows cuts their queries, and each device then has all keys."""
    if sharding is None or not sharding.batch:
        return sharding
    return dataclasses.replace(sharding, batch=(), sequence=sharding.batch, kv_sequence=(), strategy="auto")


def _joined(array: jax.Array) -> jax.Array:
    """[B, T, …] → [1, B·T, …], cut over B·T where B is."""
    rows, _, *rest = jax.typeof(array).sharding.spec
    return _reshaped(array, (1, -1, *array.shape[2:]), (None, rows, *rest))


def _reshaped(array: jax.Array, shape: tuple[int, ...], cut: tuple[Any, ...]) -> jax.Array:
    """The array in another shape; where mesh axes are explicit, `cut` says how, because JAX does not."""
    mesh = jax.typeof(array).sharding.mesh
    if jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return array.reshape(shape)
    spec = jax.sharding.PartitionSpec(*cut)  # type: ignore[no-untyped-call]
    return array.reshape(shape, out_sharding=jax.sharding.NamedSharding(mesh, spec))


def _real(lengths: jax.Array, q_len: int) -> jax.Array:
    """The queries [B, T] that are tokens."""
    return jnp.arange(q_len, dtype=jnp.int32)[None] < lengths[:, None]


def _apart(partial: Partial, query: jax.Array, lengths: jax.Array | None) -> Partial:
    """[1, B·T, N, D] → [B, T, N, D], as query [B, T, N, H] is, and the statistics likewise."""
    batch, q_len = query.shape[:2]
    real = None if lengths is None else _real(lengths, q_len)[:, None]
    rows, tokens, heads, _ = jax.typeof(query).sharding.spec

    def of_rows(statistic: jax.Array | None, empty: float) -> jax.Array | None:
        if statistic is None:
            return None
        found = _reshaped(statistic, (statistic.shape[1], batch, q_len), (heads, rows, tokens)).swapaxes(0, 1)
        return found if real is None else jnp.where(real, found, empty)

    out = _reshaped(partial.out, (batch, q_len, *partial.out.shape[2:]), (rows, tokens, heads, None))
    if real is not None:
        out = jnp.where(real[:, 0, :, None, None], out, 0)
    return dataclasses.replace(
        partial,
        out=out,
        lse=of_rows(partial.lse, -jnp.inf),
        lse_rest=of_rows(partial.lse_rest, 0.0),
        max=of_rows(partial.max, -jnp.inf),
        sum=of_rows(partial.sum, 0.0),
    )
