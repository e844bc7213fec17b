"""The Mask protocol and composition."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from types import ModuleType
from typing import Any, ClassVar, Protocol, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry._pytree import pytree
from kernelry.errors import ArgumentError, KernelryError, ShapeError
from kernelry.masks.form import Atom, MaskForm
from kernelry.masks.positions import Positions, from_arguments
from kernelry.masks.side import ArrayLike, Side


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """What a mask must fit: batch B, heads N and K, query length T, key/value length S."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int


class Mask(Protocol):
    """Which keys each query may see: True where it may.

    Masks compose with `&`, `|` and `~`, pointwise on the booleans. They are immutable pytrees:
    arrays are leaves, everything else is in the treedef. A mask author inherits from this class,
    registers a frozen dataclass as a pytree, and writes `evaluate`, `atom` and `check`.
    """

    __slots__ = ()

    __array_ufunc__: ClassVar[None] = None  # so that NumPy leaves `array & mask` to __rand__

    positional: ClassVar[bool] = False
    """True when the mask is a predicate over positions, so that `.at` moves it."""

    uses_query_positions: ClassVar[bool] = True
    """False when a positional mask looks only at where the keys stand."""

    @abstractmethod
    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        """Returns booleans that broadcast to B N T S; NumPy in, NumPy out; JAX in, JAX out."""

    @property
    @abstractmethod
    def atom(self) -> Atom:
        """The static side, at default positions."""

    def check(self, extent: Extent) -> None:
        """Raises ShapeError where the mask's arrays do not fit."""
        return

    def __and__(self, other: Mask) -> Mask:
        return And((*_parts(self, And), *_parts(_mask(other), And)))

    def __or__(self, other: Mask) -> Mask:
        return Or((*_parts(self, Or), *_parts(_mask(other), Or)))

    def __rand__(self, other: Any) -> Mask:
        return _mask(other) & self

    def __ror__(self, other: Any) -> Mask:
        return _mask(other) | self

    def __bool__(self) -> bool:
        raise ArgumentError("a mask is neither true nor false: compose masks with &, | and ~, not with and, or, not.")

    def __invert__(self) -> Mask:
        return self.mask if isinstance(self, Not) else Not(self)

    def at(
        self,
        *,
        query_offset: Any = None,
        kv_offset: Any = None,
        query_positions: Any = None,
        kv_positions: Any = None,
    ) -> Mask:
        """Says where the slots stand, for the positional atoms inside; the innermost `.at` wins.

        Args:
          query_offset, kv_offset: slot i stands at offset + i; an int, or integers, scalar or [B].
          query_positions, kv_positions: integers [L] or [B, L]. Python ints and NumPy arrays are
            static, JAX arrays are traced.

        Raises:
          ArgumentError: an offset and positions for the same side.
          ShapeError: not integers, or the wrong rank.
        """
        query = from_arguments("query", query_offset, query_positions)
        kv = from_arguments("kv", kv_offset, kv_positions)
        return At(self, query, kv) if query is not None or kv is not None else self

    @property
    def form(self) -> MaskForm:
        """The canonical static summary of this mask."""
        return MaskForm(tuple(conjunct.atom for conjunct in self.conjuncts()))

    def canonical(self) -> tuple[Mask, ...]:
        """The conjunction this mask is, aligned with `form.atoms`; the masks carry the arrays."""
        return tuple(conjunct.located_mask for conjunct in self.conjuncts())

    def conjuncts(self) -> tuple[Conjunct, ...]:
        """The atoms with their positions: bands merged, sorted."""
        # Imported here because canonicalisation knows the concrete masks, which inherit from this class.
        from kernelry.masks.canonical import conjuncts_of

        return conjuncts_of(self)

    def materialize(self, q_len: int, kv_len: int, *, q_heads: int | None = None) -> ArrayLike:
        """Returns the mask as booleans [B or 1, N or 1, T, S]; NumPy unless arrays are JAX's.

        Args:
          q_len, kv_len: T and S.
          q_heads: N; without it a mask that differs by key/value head has K in place of N.

        Raises:
          ShapeError: a positional mask meets T ≠ S without `.at`, or heads differ and `q_heads` is missing.
        """
        # Imported here because it knows the composites below.
        from kernelry.masks.fit import check_located

        check_located(self, q_len, kv_len)
        xp: ModuleType = jnp if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(self)) else np
        try:
            visible = self.evaluate(Side.query(q_len, xp, q_heads=q_heads), Side.kv(kv_len, xp))
        except (ValueError, TypeError) as error:
            if q_heads is not None or isinstance(error, KernelryError):
                raise
            raise ShapeError(
                f"the parts of mask={self!r} do not fit each other ({error}); where heads differ, pass q_heads=, N."
            ) from error
        xp = jnp if isinstance(visible, jax.core.Tracer) else xp  # of an array that a predicate's function holds
        return xp.broadcast_to(visible, (*visible.shape[:2], q_len, kv_len))

    def block_map(self, q_len: int, kv_len: int, block_q: int, block_kv: int) -> np.ndarray:
        """Says for each block of the static part whether it is EMPTY, PARTIAL or FULL.

        Returns:
          int8 [ceil(T / block_q), ceil(S / block_kv)] of `BlockKind`; the blocks at the end hold
          what is left. Over a batch of positions a block is EMPTY or FULL where it is so in every
          row. Atoms that depend on arrays can only empty a block at run time: where they occur,
          FULL becomes PARTIAL.

        Raises:
          ShapeError: a positional mask meets T ≠ S without `.at`.
          ArgumentError: a block is smaller than 1.
        """
        from kernelry.masks.blocks import block_map_of
        from kernelry.masks.fit import check_located

        check_located(self, q_len, kv_len)
        return block_map_of(self, q_len, kv_len, block_q, block_kv)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Conjunct:
    """One atom of a conjunction with its array-carrying mask and its positions.

    Args:
      mask: the mask; of a disjunction or negation, at its positions already.
      atom: its static side.
      query, kv: where it stands; None is the default.
      key: equal for conjuncts that are certainly the same, arrays compared by identity.
      branches: of a disjunction, the conjunctions it chooses from.
    """

    mask: Mask
    atom: Atom
    query: Positions | None
    kv: Positions | None
    key: tuple[Any, ...]
    branches: tuple[tuple[Conjunct, ...], ...] = ()

    @property
    def places(self) -> tuple[Any, Any]:
        """Equal for atoms that certainly stand at the same positions."""
        return self.key[-2], self.key[-1]

    @property
    def located_mask(self) -> Mask:
        """The mask at its positions."""
        return self.mask if self.query is None and self.kv is None else At(self.mask, self.query, self.kv)


@final
@pytree("mask", "query", "kv")
@dataclasses.dataclass(frozen=True, slots=True)
class At(Mask):
    """A mask whose slots stand at given positions."""

    mask: Mask
    query: Positions | None
    kv: Positions | None

    @property
    def atom(self) -> Atom:
        raise TypeError("At is not an atom; use form")

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        return self.mask.evaluate(query.at(self.query), kv.at(self.kv))

    def __repr__(self) -> str:
        named = (("query", self.query), ("kv", self.kv))
        given = ", ".join(f"{side}_{where.word}={where}" for side, where in named if where is not None)
        inner = f"({self.mask!r})" if isinstance(self.mask, And | Or | Not) else repr(self.mask)
        return f"{inner}.at({given})"


@final
@pytree("parts")
@dataclasses.dataclass(frozen=True, slots=True)
class And(Mask):
    """A key is visible where every part says so."""

    parts: tuple[Mask, ...]

    @property
    def atom(self) -> Atom:
        raise TypeError("And is not an atom; use form")

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        visible = self.parts[0].evaluate(query, kv)
        for part in self.parts[1:]:
            visible = visible & part.evaluate(query, kv)
        return visible

    def __repr__(self) -> str:
        return " & ".join(f"({p!r})" if isinstance(p, Or) else repr(p) for p in self.parts)


@final
@pytree("parts")
@dataclasses.dataclass(frozen=True, slots=True)
class Or(Mask):
    """A key is visible where any part says so."""

    parts: tuple[Mask, ...]

    @property
    def atom(self) -> Atom:
        raise TypeError("the atom of Or depends on positions; use form")

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        visible = self.parts[0].evaluate(query, kv)
        for part in self.parts[1:]:
            visible = visible | part.evaluate(query, kv)
        return visible

    def __repr__(self) -> str:
        return " | ".join(f"({p!r})" if isinstance(p, And) else repr(p) for p in self.parts)


@final
@pytree("mask")
@dataclasses.dataclass(frozen=True, slots=True)
class Not(Mask):
    """A key is visible where the mask inside hides it."""

    mask: Mask

    @property
    def atom(self) -> Atom:
        raise TypeError("the atom of Not depends on positions; use form")

    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        return ~self.mask.evaluate(query, kv)

    def __repr__(self) -> str:
        return f"~({self.mask!r})" if isinstance(self.mask, And | Or | At) else f"~{self.mask!r}"


def _parts(mask: Mask, of: type[And] | type[Or]) -> tuple[Mask, ...]:
    return mask.parts if isinstance(mask, of) else (mask,)


def _mask(value: Any) -> Mask:
    if is_mask(value):
        return value  # type: ignore[no-any-return]
    # Imported here because it knows this module.
    from kernelry.masks.fit import not_a_mask

    raise ArgumentError(f"a mask composes with masks, got {not_a_mask(value)}.")


def is_mask(value: Any) -> bool:
    """True for instances of classes that inherit from Mask; a Protocol allows no isinstance."""
    return Mask in type(value).__mro__


def children(mask: Mask) -> tuple[Mask, ...]:
    """The masks directly inside a composite; none for an atom."""
    if isinstance(mask, And | Or):
        return mask.parts
    return (mask.mask,) if isinstance(mask, Not | At) else ()


def is_positional(mask: Mask) -> bool:
    """True where some atom inside is a predicate over positions."""
    inside = children(mask)
    return any(is_positional(part) for part in inside) if inside else mask.positional
