"""The Mask protocol: what a mask says, and what core can do with a mask of any class.

Modules that know concrete masks import this one, so they are imported inside functions.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, final

import jax
import jax.numpy as jnp
import numpy as np

from kernelry.errors import ArgumentError, KernelryError, ShapeError
from kernelry.masks.arrays import described, is_array
from kernelry.masks.form import OPERANDS, Atom, AtomKind, MaskForm, register_mask
from kernelry.masks.functions import is_told_by_tiles
from kernelry.masks.positions import from_arguments
from kernelry.masks.run_time import BlockGrid, Decided
from kernelry.masks.side import ArrayLike, Side

if TYPE_CHECKING:
    from kernelry.masks.composition import Conjunct, Visibility
    from kernelry.masks.padding import Padding


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """What a mask must fit: batch B, heads N and K, query length T, key/value length S."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Placeholder:
    """How an expression names a mask whose arrays do not matter, as in `segments`: only their shapes are right.

    Args:
      make: the mask for an extent, and for the numbers that are written.
      instead: what to write where the arrays are needed.
      numbers: how many numbers it takes.
    """

    make: Callable[..., Mask]
    instead: str
    numbers: int = 0


Bounds = tuple[int | None, int | None]
"""How far before and after the query's position a key may be seen; None is unbounded."""

Ranges = tuple[np.ndarray, np.ndarray]
"""The least and the greatest position of each block."""


class Mask(Protocol):
    """Which keys each query may see: True where it may.

    Masks compose with `&`, `|` and `~`, pointwise on the booleans. They are immutable pytrees: arrays are leaves,
    everything else is in the treedef.

    To write one, inherit from this class, make it a frozen dataclass, register it with `kernelry.plugin.pytree`, which
    is told the fields that hold arrays, and write

    - `word`, its name in forms; with the other fields, if they are plain data, it makes up the `atom`;
    - `evaluate`, which must say the same of a query and a key whatever other slots it is asked about;
    - `positional = True`, if it compares positions, so that `.at` moves it;
    - `check` and `axes`, if it has arrays: whether they fit a call, and which axes of it they run along.

    Such a mask can be composed, placed, parsed, drawn, padded and made dense. Without arrays it is also a predicate:
    every kernel that takes predicates serves it, and blocks in which it shows nothing are skipped. The methods after
    `conjuncts` say more about it, for shorter forms, fewer adapters and faster kernels. Their answers here are right
    for any mask; those that get an atom are asked before there are arrays.
    """

    __slots__ = ()

    __array_ufunc__: ClassVar[None] = None  # so that NumPy leaves `array & mask` to __rand__

    word: ClassVar[str] = ""
    """What forms and expressions call it."""

    kinds: ClassVar[tuple[AtomKind, ...]] = ()
    """The kinds of its atoms, if they are not CUSTOM."""

    positional: ClassVar[bool] = False
    """True when the mask is a predicate over positions, so that `.at` moves it."""

    uses_query_positions: ClassVar[bool] = True
    """False when a positional mask looks only at where the keys stand."""

    axes: ClassVar[Mapping[str, str] | None] = None
    """By field, the axes of B N T S that its array has, from the right; N may be K, `.` is another. None: unknown."""

    decides_ranges: ClassVar[bool] = False
    """True when `of_ranges` and `seen_from` decide blocks of static positions, so that none need be evaluated."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = vars(cls)
        for key in own.get("kinds", (own["word"],) if "word" in own else ()):
            register_mask(key, cls)

    @abstractmethod
    def evaluate(self, query: Side, kv: Side) -> ArrayLike:
        """Returns booleans that broadcast to B N T S; NumPy in, NumPy out; JAX in, JAX out."""

    @property
    def atom(self) -> Atom:
        """The static side, at default positions: by default the first of `kinds`, or else CUSTOM with the word first.

        Its parameters are the fields without arrays.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        if self.kinds:
            return Atom(self.kinds[0], tuple(value for name, value in fields.items() if name not in (self.axes or ())))
        plain = (value for value in fields.values() if not any(map(is_array, jax.tree.leaves(value))))
        return Atom(AtomKind.CUSTOM, (self.word or type(self).__name__, *plain))

    def check(self, extent: Extent) -> None:
        """Raises ShapeError where the mask's arrays do not fit."""
        return

    def __and__(self, other: Mask) -> Mask:
        from kernelry.masks.composition import And

        return And.of(self, _mask(other))

    def __or__(self, other: Mask) -> Mask:
        from kernelry.masks.composition import Or

        return Or.of(self, _mask(other))

    def __rand__(self, other: Any) -> Mask:
        return _mask(other) & self

    def __ror__(self, other: Any) -> Mask:
        return _mask(other) | self

    def __repr__(self) -> str:
        """As it is constructed, where a class asks for it with `repr=False`; small arrays as lists."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(described(value) for value in values if value is not None)})"

    def __bool__(self) -> bool:
        raise ArgumentError("a mask is neither true nor false: compose masks with &, | and ~, not with and, or, not.")

    def __invert__(self) -> Mask:
        from kernelry.masks.composition import Not

        return Not(self)

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
        from kernelry.masks.composition import At

        query = from_arguments("query", query_offset, query_positions)
        kv = from_arguments("kv", kv_offset, kv_positions)
        return At(self, query, kv) if query is not None or kv is not None else self

    @property
    def form(self) -> MaskForm:
        """The canonical static summary of this mask."""
        from kernelry.masks.composition import canonical_of

        return canonical_of(self)[0]

    def canonical(self) -> tuple[Mask, ...]:
        """The conjunction this mask is, aligned with `form.atoms`; the masks carry the arrays."""
        from kernelry.masks.composition import canonical_of

        return canonical_of(self)[1]

    def materialize(self, q_len: int, kv_len: int, *, q_heads: int | None = None) -> ArrayLike:
        """Returns the mask as booleans [B or 1, N or 1, T, S]; NumPy unless arrays are JAX's.

        Args:
          q_len, kv_len: T and S.
          q_heads: N; without it a mask that differs by key/value head has K in place of N.

        Raises:
          ShapeError: a positional mask meets T ≠ S without `.at`, or heads differ and `q_heads` is missing.
        """
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

    def conjuncts(self) -> tuple[Conjunct, ...]:
        """The atoms with their positions: bands merged, sorted."""
        from kernelry.masks.composition import conjuncts_of

        return conjuncts_of(self)

    @property
    def canonical_mask(self) -> Mask:
        """The mask that kernels are given in its place; forms are made of its atom."""
        return self

    @classmethod
    def read(cls, *values: Any, **named: Any) -> Mask:
        """Makes the mask of the whole numbers and NumPy arrays of an expression."""
        return cls(*values, **named)

    @classmethod
    def readers(cls) -> dict[str, Callable[..., Mask]]:
        """What expressions may call, by name."""
        return {cls.word: cls.read, cls.__name__: cls.read}

    @classmethod
    def placeholders(cls) -> dict[str, Placeholder]:
        """The words that name it in a form without its arrays."""
        return {}

    def sizes(self) -> dict[str, int]:
        """The sizes B, N, K, T and S as far as its arrays tell, by letter."""
        found: dict[str, int] = {}
        for name, letters in (self.axes or {}).items():
            for letter, size in zip(letters[::-1], np.shape(getattr(self, name))[::-1], strict=False):
                found[letter] = max(size, found.get(letter, 0))
        return found

    @classmethod
    def sees_itself(cls, atom: Atom) -> bool:
        """Whether a query certainly sees the key at its own position, whatever the arrays hold."""
        return False

    @classmethod
    def has_live_slots(cls, atom: Atom) -> bool:
        """Whether `live_slots` answers."""
        return False

    def live_slots(self) -> ArrayLike:
        """Booleans [B or 1, L]: the slots that see themselves, where others see nothing and are seen by nothing."""
        raise TypeError(f"{type(self).__name__} has no live slots")

    @classmethod
    def visibility(cls, atom: Atom, q_len: int, kv_len: int) -> Visibility | None:
        """Whether, under this atom alone, a row may see nothing or a slot be hidden; None where that is unknown."""
        return None

    @classmethod
    def band_around(cls, atom: Atom) -> Bounds:
        """The narrowest band that holds all it shows."""
        return None, None

    @classmethod
    def follows_from(cls, atom: Atom, other: Atom) -> bool:
        """Whether it certainly shows every pair that another mask at the same positions shows."""
        return False

    @classmethod
    def of_ranges(cls, atom: Atom, query: Ranges, kv: Ranges) -> tuple[np.ndarray, np.ndarray, bool]:
        """Which blocks are EMPTY, which FULL, and whether that is exact for ranges with gaps, too.

        Without gaps it must be; else FULL must be, and EMPTY blocks may be missed.
        """
        raise TypeError(f"{cls.__name__} decides no ranges")

    @classmethod
    def seen_from(cls, atom: Atom, kv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last position from which each key is seen."""
        raise TypeError(f"{cls.__name__} decides no ranges")

    def decide(self, conjunct: Conjunct, grid: BlockGrid) -> Decided:
        """Classifies blocks when the program runs, from the arrays and the positions of a conjunct."""
        return Decided.unknown(grid)

    @classmethod
    def spread_atom(cls, atom: Atom) -> Atom:
        """The atom of what `spread`, cut, is `within` a pair of shards: positions are traced where they are read."""
        from kernelry.masks.spread import with_traced_positions

        return with_traced_positions(cls, atom)

    def spread(self) -> Mask:
        """The mask with no array that queries and keys share, to be cut to shards along `masks.spread.leaf_axes`."""
        from kernelry.masks.spread import spread_inside

        return spread_inside(self)

    def within(self, query_start: Any, kv_start: Any, q_len: int, kv_len: int) -> Mask:
        """Of a spread mask, cut to a pair of shards that begin at slots (int or traced), the mask over their slots."""
        from kernelry.masks.spread import mask_within

        return mask_within(self, (query_start, kv_start, q_len, kv_len))

    @classmethod
    def padded_atom(cls, atom: Atom, padding: Padding) -> Atom:
        """The atom of what `padded` returns; its positions are lengthened elsewhere."""
        from kernelry.masks.padding import Padded

        return Padded.atom_around(atom) if OPERANDS in atom.params else atom

    def padded(self, padding: Padding) -> Mask:
        """The mask for a call with slots put behind; what it shows of the others stays."""
        from kernelry.masks.padding import Padded

        return Padded.around(self, padding)

    @classmethod
    def hides_keys_behind(cls, atom: Atom, q_len: int, kv_len: int) -> bool:
        """Whether, padded, it hides the keys put behind S keys from T queries; by default as its band does."""
        right, query, kv = cls.band_around(atom)[1], atom.query.start, atom.kv.start
        return None not in (right, query, kv) and kv + kv_len > query + q_len - 1 + right  # type: ignore[operator]

    @classmethod
    def hides_rows_behind(cls, atom: Atom) -> bool:
        """Whether, padded, it hides everything from the queries put behind."""
        return False

    @classmethod
    def hides_by_key_alone(cls, atom: Atom) -> bool:
        """Whether every query of a batch row sees the same keys."""
        return False


register_mask(None, Mask)  # type: ignore[type-abstract]


def atom_of(mask: Mask) -> Atom:
    """A mask's atom; that of a custom mask says whether it needs arrays."""
    atom = mask.atom
    if atom.kind is not AtomKind.CUSTOM:
        return atom
    if any(leaf is mask for leaf in jax.tree.leaves(mask)):
        kind = type(mask).__name__
        raise ArgumentError(f"{kind} is not a pytree: decorate the class {kind} with @kernelry.plugin.pytree().")
    if OPERANDS in atom.params or is_told_by_tiles(mask):
        return atom
    return dataclasses.replace(atom, params=(*atom.params, OPERANDS))


def _mask(value: Any) -> Mask:
    if is_mask(value):
        return value  # type: ignore[no-any-return]
    from kernelry.masks.fit import not_a_mask

    raise ArgumentError(f"a mask composes with masks, got {not_a_mask(value)}.")


def is_mask(value: Any) -> bool:
    """True for instances of classes that inherit from Mask; a Protocol allows no isinstance."""
    return Mask in type(value).__mro__
