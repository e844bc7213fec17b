"""Sharding: which mesh axes share out batch, heads and sequences, by which strategy, and where the tokens stand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, final

import jax

from kernelry.errors import ArgumentError, ConfigError, ShapeError, nearest
from kernelry.request.axes import Axes, checked_axes, checked_sizes, dimensions_of, parsed_axes

STRATEGIES = ("auto", "ring", "all_gather", "ulysses", "usp", "native")
TOKEN_ORDERS = ("contiguous", "dual_chunk", "striped")

_AXES = ("batch", "heads", "sequence", "kv_sequence", "ulysses")
_WORDS = {name: ("order", name) for name in TOKEN_ORDERS} | {name: ("strategy", name) for name in STRATEGIES}
_WORDS["dual"] = ("order", "dual")


@final
@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How the arrays of a call are cut over the axes of a mesh, and how sequences that are cut are attended to.

    Each of the axes is a name, names, or nothing. Sizes come from `mesh`, from the mesh that is active, or from
    `sizes`; an axis of size 1 shares out nothing.

    Args:
      batch: the axes that share out B.
      heads: those that share out N, and K where it divides; else key/value heads are repeated as often as needed: each
        device then has all of them, of a cache too, and reads those of its queries.
      sequence: those that share out T, and S unless `kv_sequence` says otherwise.
      kv_sequence: those that share out S: None means as T, () that each device has all keys.
      strategy: how queries meet the keys of other devices. `ring` passes keys around, `all_gather` brings all keys to
        every device, `ulysses` exchanges heads for tokens, `usp` does that along the axes `ulysses` and passes keys
        around along the others, `native` leaves it to the kernel; `auto` takes the first of these that serves the call.
      ulysses: of `usp`, the last of the axes of `sequence`.
      order: where tokens stand: `contiguous`, or as `load_balanced_order` puts them, `dual_chunk` (`dual` for short) or
        `striped`; `auto` is what `choose_order` says of the mask. Masks without positions are read so where T = S.
      sizes: of the axes that are named, where no mesh tells them.
      mesh: the mesh; None is the one that is active, or that of the arrays.

    Raises:
      ArgumentError: a value is invalid, or an axis is named twice.
    """

    batch: Axes = ()
    heads: Axes = ()
    sequence: Axes = ()
    kv_sequence: Axes | None = None
    strategy: str = "auto"
    ulysses: Axes = ()
    order: str = "contiguous"
    sizes: tuple[tuple[str, int], ...] = ()
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None

    def __post_init__(self) -> None:
        for name in _AXES:
            object.__setattr__(self, name, checked_axes(name, getattr(self, name)))
        if self.kv_sequence == self.sequence:
            object.__setattr__(self, "kv_sequence", None)
        for name, known in (("strategy", STRATEGIES), ("order", (*TOKEN_ORDERS, "auto", "dual"))):
            found = getattr(self, name)
            if not isinstance(found, str) or found not in known:
                raise ArgumentError(f"Sharding: unknown {name} {found!r}{nearest(str(found), known)}")
        if self.order == "dual":
            object.__setattr__(self, "order", "dual_chunk")
        object.__setattr__(self, "sizes", checked_sizes(self.sizes))
        if not isinstance(self.mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh | None):
            raise ArgumentError(f"Sharding: mesh must be a jax.sharding.Mesh, got {self.mesh!r}.")
        self._check_axes()

    def _check_axes(self) -> None:
        used = [axis for axes in (self.batch, self.heads, self.sequence) for axis in axes]
        used += [axis for axis in self.kv_sequence or () if axis not in self.sequence]
        twice = sorted({axis for axis in used if used.count(axis) > 1})
        if twice:
            raise ArgumentError(f"Sharding: mesh axis {twice[0]!r} is named twice in {self}; name it once.")
        for axis, size in self.sizes:
            if axis not in used:
                known = nearest(axis, used)
                raise ArgumentError(
                    f"Sharding: sizes has {axis}:{size}, and {axis!r} is none of the axes of {self}{known}"
                )
        if self.sequence and self.kv_sequence and self.kv_sequence != self.sequence:
            raise ArgumentError(
                f"Sharding: queries are cut over {self.sequence} and keys over {self.kv_sequence}; cut both over the "
                "same axes, or one of them over none."
            )
        if self.ulysses and self.strategy != "usp":
            raise ArgumentError(
                f"Sharding: ulysses={self.ulysses} is for strategy='usp', and the strategy is {self.strategy!r}; leave "
                "one of them out."
            )
        if self.ulysses and self.sequence[len(self.sequence) - len(self.ulysses) :] != self.ulysses:
            raise ArgumentError(
                f"Sharding: ulysses={self.ulysses} must be the last of the axes of sequence={self.sequence}."
            )
        if self.strategy == "usp" and not self.ulysses:
            raise ArgumentError(
                "Sharding: strategy='usp' needs ulysses=, the last axes of sequence, along which heads are exchanged."
            )

    @classmethod
    def of_specs(cls, query: Any, key: Any = None, **options: Any) -> Sharding:
        """Reads PartitionSpecs of BTNH arrays.

        Args:
          query: the PartitionSpec of query, [B, T, N, H].
          key: that of key and value, [B, S, K, H]; None means as query.
          options: the other arguments of Sharding, e.g. `strategy`.

        Raises:
          ArgumentError: head dims are cut, or batch or heads of query and key are cut in two ways.
        """
        batch, length, heads, dim = dimensions_of("query", query)
        kv_length = length
        if key is not None:
            kv_batch, kv_length, kv_heads, kv_dim = dimensions_of("key", key)
            dim = dim or kv_dim
            for name, own, other in (("batch", batch, kv_batch), ("heads", heads, kv_heads)):
                if other not in (own, ()):
                    raise ArgumentError(f"Sharding: {name} are cut over {own} in query and over {other} in key.")
        if dim:
            raise ArgumentError(f"Sharding: the head dim cannot be cut, got {dim}.")
        return cls(
            batch=batch,
            heads=heads,
            sequence=length,
            kv_sequence=None if kv_length == length else kv_length,
            **options,
        )

    @classmethod
    def of_rules(
        cls,
        rules: Iterable[tuple[str, Any]] | None = None,
        *,
        batch: str | None = "activation_batch",
        heads: str | None = "activation_heads",
        q_length: str | None = "activation_length",
        kv_length: str | None = None,
        **options: Any,
    ) -> Sharding:
        """Reads flax's logical axis rules; the names are those of MaxText, whose attention has `activation_batch_attn`.

        Of several rules of a name the first holds whose mesh axes no other dimension has, as in flax.

        Args:
          rules: pairs of a logical name and its mesh axes: a name, names, or None. None are the current rules of
            `flax.linen`.
          batch, heads, q_length: the logical names of B, N and T; None is a dimension that is not cut.
          kv_length: that of S; None means as T.
          options: the other arguments of Sharding, e.g. `strategy`.

        Raises:
          ArgumentError: a name has no rule, no rules are given or active, or a rule has another form.
        """
        from kernelry.request.axis_rules import LogicalRules  # imported only where rules are read

        read = LogicalRules.of(rules)
        read.check(batch=batch, heads=heads, q_length=q_length, kv_length=kv_length)
        query = read.axes((batch, q_length, heads))
        return cls.of_specs(query, query if kv_length is None else read.axes((batch, kv_length, heads)), **options)

    @classmethod
    def parse(cls, text: str | Sharding) -> Sharding:
        """Reads e.g. `batch=d:4 heads=t:2 sequence=c:8 ring dual`: axes with their sizes, a strategy, an order.

        `order=auto` is the order that suits the mask; the word `auto` alone is a strategy.

        Raises:
          ArgumentError: it has another form.
        """
        if isinstance(text, Sharding):
            return text
        if not isinstance(text, str):
            raise ArgumentError(f"a sharding is written e.g. 'batch=d:4 sequence=c:8 ring', got {text!r}.")
        facts: dict[str, Any] = {}
        sizes: dict[str, int] = {}
        found: Any
        for word in text.split():
            name, equals, value = word.partition("=")
            if not equals and word in _WORDS:
                name, found = _WORDS[word]
            elif equals and name in _AXES:
                found = parsed_axes(text, value, sizes)
            elif equals and name in ("strategy", "order"):
                found = value
            else:
                hint = nearest(name, [*_AXES, *_WORDS])
                raise ArgumentError(f"sharding {text!r}: {word!r} is neither axes nor a strategy nor an order{hint}")
            if name in facts:
                raise ArgumentError(f"sharding {text!r}: {name} is given twice.")
            facts[name] = found
        return cls(sizes=tuple(sorted(sizes.items())), **facts)

    def __str__(self) -> str:
        sizes = dict(self.sizes)

        def written(axes: Axes) -> str:
            return ",".join(f"{axis}:{sizes[axis]}" if axis in sizes else axis for axis in axes) or "none"

        named = [f"{name}={written(axes)}" for name in _AXES if (axes := getattr(self, name))]
        if self.kv_sequence == () and self.sequence:
            named.append("kv_sequence=none")
        words = [self.strategy] if self.strategy != "auto" else []
        words += [] if self.order == "contiguous" else ["order=auto"] if self.order == "auto" else [self.order]
        return " ".join([*named, *words])

    def to_json(self) -> dict[str, Any]:
        """Returns plain data; a mesh is written as the sizes of its axes."""
        located = self if self.mesh is None else self.on(dict(self.mesh.shape))
        return {
            **{name: None if (axes := getattr(located, name)) is None else list(axes) for name in _AXES},
            "strategy": located.strategy,
            "order": located.order,
            "sizes": dict(located.sizes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sharding:
        """Reads what `to_json` wrote.

        Raises:
          ConfigError: a field is unknown or has another form.
        """
        known = {field.name for field in dataclasses.fields(cls)} - {"mesh"}
        if not isinstance(data, Mapping):
            raise ConfigError(f"sharding: expected an object with its fields, got {data!r}.")
        for name in data:
            if name not in known:
                raise ConfigError(f"sharding: unknown field {name!r}{nearest(name, known)}")
        try:
            return cls(**data)
        except (ArgumentError, TypeError) as error:
            raise ConfigError(f"sharding: {str(error).removeprefix('Sharding: ')}") from error

    def on(self, sizes: Mapping[str, int]) -> Sharding:
        """Returns this sharding with the sizes of its axes, and without the axes of size 1.

        Args:
          sizes: of the axes of a mesh, by name.

        Raises:
          ArgumentError: the mesh has no such axis, or one of another size.
        """
        given = dict(self.sizes)
        for name in _AXES:
            for axis in getattr(self, name) or ():
                if axis not in sizes:
                    raise ArgumentError(
                        f"Sharding: {name}={axis!r}, and the mesh {dict(sizes)} has no such axis{nearest(axis, sizes)}"
                    )
                if given.get(axis, sizes[axis]) != sizes[axis]:
                    raise ArgumentError(
                        f"Sharding: axis {axis!r} has size {sizes[axis]} in the mesh {dict(sizes)}, not {given[axis]}."
                    )
        kept: dict[str, Any] = {
            name: None if axes is None else tuple(axis for axis in axes if sizes[axis] > 1)
            for name in _AXES
            for axes in (getattr(self, name),)
        }
        named = sorted({axis for axes in kept.values() for axis in axes or ()})
        strategy = self.strategy
        if strategy == "usp" and (not kept["ulysses"] or kept["ulysses"] == kept["sequence"]):
            strategy = "ulysses" if kept["ulysses"] else "ring"
            kept["ulysses"] = ()
        if not kept["sequence"] and not kept["kv_sequence"]:
            strategy = "auto"
        return Sharding(
            **kept,
            strategy=strategy,
            order=self.order if kept["sequence"] or kept["kv_sequence"] else "contiguous",
            sizes=tuple((axis, sizes[axis]) for axis in named),
            mesh=self.mesh,
        )

    @property
    def located(self) -> Sharding:
        """This sharding with the sizes that it says itself, and without the axes of size 1.

        Raises:
          ArgumentError: it does not say the size of an axis.
        """
        sizes = dict(self.sizes)
        unsized = [axis for name in _AXES for axis in getattr(self, name) or () if axis not in sizes]
        if unsized:
            raise ArgumentError(
                f"sharding {str(self)!r}: the size of axis {unsized[0]!r} is not said; write e.g. {unsized[0]}:8."
            )
        return self.on(sizes)

    @property
    def of_one_token(self) -> Sharding:
        """How a decode step is cut whose keys are cut as here: one query per row, which all devices along S have."""
        if not self.sequence:
            return self
        return dataclasses.replace(
            self, sequence=(), kv_sequence=self.kv_axes, strategy="auto", ulysses=(), order="contiguous"
        )

    @property
    def devices(self) -> int:
        """Those along all axes, of a sharding that knows their sizes."""
        return math.prod(size for _, size in self.sizes)

    def size(self, axes: Iterable[str]) -> int:
        """The devices along some axes, of a sharding that knows their sizes."""
        sizes = dict(self.sizes)
        return math.prod(sizes[axis] for axis in axes)

    @property
    def kv_axes(self) -> Axes:
        """The axes that share out S."""
        return self.sequence if self.kv_sequence is None else self.kv_sequence

    @property
    def exchanged(self) -> Axes:
        """The axes along which heads are exchanged for tokens; none where each device has all keys."""
        if self.kv_sequence == ():
            return ()
        return self.sequence if self.strategy == "ulysses" else self.ulysses if self.strategy == "usp" else ()

    @property
    def ring(self) -> Axes:
        """The axes of `sequence` along which each device keeps its queries."""
        return self.sequence[: len(self.sequence) - len(self.exchanged)]

    @property
    def head_axes(self) -> Axes:
        """The axes that share out heads while attention is computed."""
        return (*self.heads, *self.exchanged)

    @property
    def ordered(self) -> Axes:
        """The axes over whose devices `order` shares out the tokens."""
        return self.ring or self.sequence or self.kv_axes

    @property
    def is_empty(self) -> bool:
        """Whether nothing is cut."""
        return not (self.batch or self.heads or self.sequence or self.kv_axes)

    @property
    def cuts_sequences(self) -> bool:
        """Whether a query may meet keys of other devices."""
        return bool(self.sequence or self.kv_axes)

    def kv_repeats(self, q_heads: int, kv_heads: int) -> int:
        """How often key/value heads are repeated so that they divide over the axes of heads: the least that does."""
        shards = self.size(self.head_axes)
        groups = q_heads // kv_heads
        return next(r for r in range(1, groups + 1) if groups % r == 0 and kv_heads * r % shards == 0)

    def check(self, *, batch: int, q_len: int, kv_len: int, q_heads: int) -> None:
        """Checks that the sizes of a call divide over the axes.

        Raises:
          ShapeError: one does not, with the arithmetic.
        """
        two = self.order == "dual_chunk" and q_len == kv_len
        for what, size, axes, parts in (
            ("batch B", batch, self.batch, 1),
            ("heads N", q_heads, self.heads, 1),
            ("query length T", q_len, self.sequence, 1),
            ("query length T", q_len, self.ordered if two else (), 2),
            ("key length S", kv_len, self.kv_axes, 1),
        ):
            shards = self.size(axes) * parts
            if not axes or size % shards == 0:
                continue
            over = " and ".join(axes) + (", two chunks for each device" if parts == 2 else "")
            pad = f"; pad to {-(-size // shards) * shards}"
            if size == 1 and axes == self.sequence:
                pad = f"; to decode cut the slots of the cache alone, kv_sequence={axes} in place of sequence"
            remedy = "" if what == "heads N" else pad
            raise ShapeError(f"{what}={size} does not divide over {over}: {size} % {shards} = {size % shards}{remedy}.")
