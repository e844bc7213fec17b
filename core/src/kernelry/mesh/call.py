"""One call of attention on a mesh: which sharding holds, how its arrays are cut, and what each device runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from kernelry.execution.apart import in_checked_map, without_gradient
from kernelry.execution.manual_axes import are_checked
from kernelry.execution.normalization import to_lse
from kernelry.execution.plan import Plan
from kernelry.kernel.partial import Partial
from kernelry.kernel.spec import Inputs
from kernelry.masks.band import Full
from kernelry.masks.base import Mask
from kernelry.masks.composition import canonical_of, is_positional
from kernelry.masks.form import Atom
from kernelry.masks.spread import leaf_axes, spread_in_order
from kernelry.mesh.cutting import order_positions, with_traced_rows
from kernelry.mesh.finding import MeshFacts
from kernelry.mesh.pairs import Operands, Source, Steps, TracedMask
from kernelry.mesh.steps import attend_in_steps, merged_across
from kernelry.request.axes import Axes
from kernelry.request.request import Request
from kernelry.request.sharding import Sharding
from kernelry.resolution.explanation import Resolution
from kernelry.resolution.shards import ShardedResolution, Shards, grid_of, with_order
from kernelry.storage import PagedArray


def run_on_mesh(
    resolution: Resolution, request: Request, inputs: Inputs, facts: MeshFacts, apart: bool = False
) -> Partial:
    """Runs the plans of a call's shards inside a shard_map.

    Args:
      resolution: of the call, with its shards; without any where a mesh with explicit axes cuts nothing, or the kernel
        attends across devices itself.
      request: the whole call's.
      inputs: the whole arrays.
      facts: the mesh that cuts them.
      apart: whether devices that share out keys alone leave their results apart, each as rows of a Partial of
        devices · B rows; `finished_across` merges them.
    """
    assert facts.sharding is not None
    if resolution.shards is None and request.sharding is not None:
        assert resolution.plan is not None
        masks = _whole_masks(request, with_order(request, facts.sharding), inputs.mask)
        return resolution.plan.run(dataclasses.replace(inputs, mask=masks))
    whole = ShardedResolution(Shards(facts.sharding, (request,)), (resolution,))
    found = resolution.shards or whole
    cut = found.shards.sharding
    make = _whole_body if found.shards.table is None else functools.partial(_body_in_steps, apart=apart)
    body, masks = make(found, _Cutting(request, cut), inputs.mask)
    operands, specs = body.cutting.operands(inputs, masks)
    results = _partial_specs(cut, request.partial, request.max_logits, request.dtype, apart)
    return _mapped(body, operands, specs, results, facts)


def _plans(found: ShardedResolution) -> tuple[Plan, ...]:
    plans = tuple(resolution.plan for resolution in found.resolutions if resolution.plan is not None)
    assert len(plans) == len(found.resolutions)
    return plans


def _whole_body(
    found: ShardedResolution, cutting: _Cutting, masks: tuple[Mask, ...]
) -> tuple[_Whole, tuple[Mask, ...]]:
    """What a device runs that has all keys which its queries may see, and the masks whose arrays it is given."""
    masks = _whole_masks(cutting.request, cutting.sharding, masks)
    structures = tuple(jax.tree.structure(mask) for mask in masks)
    return _Whole(cutting, _plans(found)[0], structures), masks


def _body_in_steps(
    found: ShardedResolution, cutting: _Cutting, masks: tuple[Mask, ...], *, apart: bool
) -> tuple[_InSteps, tuple[Mask, ...]]:
    """What a device runs whose queries meet keys of others, and the masks whose arrays it is given."""
    table, cut, request = found.shards.table, cutting.sharding, cutting.request
    assert table is not None
    tokens = grid_of(request, cut).tokens
    traced = sorted({piece.index for pieces in table.classes for piece in pieces if piece.traced})
    spread = tuple(spread_in_order(masks[index], tokens) for index in traced)
    axes = cut.ring or cut.kv_axes
    steps = Steps(
        plans=_plans(found),
        table=table,
        form=request.mask,
        masks=tuple(Full() if index in traced else mask for index, mask in enumerate(masks)),
        traced=tuple(
            TracedMask(index, jax.tree.structure(mask), tuple(leaf_axes(mask)))
            for index, mask in zip(traced, spread, strict=True)
        ),
        axes=axes,
        size=cut.size(axes),
        source=_source(cut, request),
        partial=request.partial,
        apart=apart,
    )
    return _InSteps(cutting, steps), spread


def finished_across(partial: Partial, facts: MeshFacts) -> Partial:
    """Merges what devices left apart, in one collective.

    Args:
      partial: of devices · B rows, with lse; the merged results of several calls, if they are cut alike.
      facts: of the calls.
    """
    cut = facts.sharding
    assert cut is not None
    before, after = (
        _partial_specs(cut, True, partial.max_logits is not None, partial.dtype, apart) for apart in (True, False)
    )
    return _mapped(functools.partial(merged_across, axes=cut.kv_axes), partial, before, after, facts)


def _source(sharding: Sharding, request: Request) -> Source:
    if not sharding.sequence:
        return Source.OWN
    if not sharding.kv_axes:
        return Source.WHOLE
    # Of no keys XLA gathers none, and a ring sends none: it ends with a device's own.
    return Source.GATHERED if sharding.strategy == "all_gather" and request.kv_len else Source.RING


def _mapped(body: Any, operands: Any, specs: Any, results: Partial, facts: MeshFacts) -> Partial:
    active = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in facts.mesh.axis_types:
        explicit = {
            name
            for name, kind in zip(facts.mesh.axis_names, facts.mesh.axis_types, strict=True)
            if kind is AxisType.Explicit
        }
        operands = jax.tree.map(
            lambda array, spec: _resharded(array, _only(spec, explicit), facts.mesh), operands, specs
        )
    run = jax.shard_map(
        body,
        mesh=facts.mesh if active.empty else None,
        in_specs=(specs,),
        out_specs=results,
        axis_names=facts.names,
        check_vma=False,
    )
    if are_checked():
        is_explicit = AxisType.Explicit in facts.mesh.axis_types
        run = functools.partial(in_checked_map if is_explicit else without_gradient, run)
    found: Partial = run(operands)
    return found


def _only(spec: Any, kept: Collection[str]) -> Any:
    """A PartitionSpec with only some of its axes."""
    entries = (() if axes is None else (axes,) if isinstance(axes, str) else axes for axes in spec)
    return _partition(*(_one(tuple(axis for axis in axes if axis in kept)) for axes in entries))


def _resharded(array: Any, spec: Any, mesh: Any) -> Any:
    return jax.sharding.reshard(array, jax.sharding.NamedSharding(mesh, spec))  # type: ignore[no-untyped-call]


def _letters(mask: Mask) -> tuple[str, ...]:
    """What the dimensions of a mask's arrays are, `.` for those that are not cut: of size 1 in the whole call."""
    return tuple(
        "".join("." if size == 1 else letter for letter, size in zip(letters, jnp.shape(leaf), strict=True))
        for letters, leaf in zip(leaf_axes(mask), jax.tree.leaves(mask), strict=True)
    )


def _whole_masks(request: Request, sharding: Sharding, masks: tuple[Mask, ...]) -> tuple[Mask, ...]:
    """The masks of a call whose devices have whole sequences, aligned with the form that a shard is asked about."""
    pairs: list[tuple[Atom, Mask]] = []
    for mask in masks:
        placed = with_traced_rows(_ordered(mask, request, sharding), sharding)
        form, (alone,) = canonical_of(placed)
        pairs.append((form.atoms[0], alone))
    return tuple(mask for _, mask in sorted(pairs, key=lambda pair: pair[0].sort_key))


def _ordered(mask: Mask, request: Request, sharding: Sharding) -> Mask:
    positions = order_positions(request, sharding)
    if positions is None or not is_positional(mask):
        return mask
    return mask.at(query_positions=positions, kv_positions=positions)


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Cutting:
    """Which axes cut which dimensions of a call's arrays."""

    request: Request
    sharding: Sharding

    @property
    def kv_head_axes(self) -> Axes:
        """The axes that cut K before the strategy moves anything; none where K does not divide over them."""
        heads = self.sharding.heads
        return heads if self.request.kv_heads % self.sharding.size(heads) == 0 else ()

    @property
    def kv_shard_axes(self) -> Axes:
        """The axes whose devices have different keys while attention is computed."""
        cut = self.sharding
        return cut.ring if cut.sequence and cut.kv_axes else cut.kv_axes

    def operands(self, inputs: Inputs, masks: tuple[Mask, ...]) -> tuple[Operands, Operands]:
        """The arrays, and their PartitionSpecs."""
        cut = self.sharding
        letters = [_letters(mask) for mask in masks]
        leaves = tuple(
            tuple(
                self._with_repeated_heads(leaf, axes) for leaf, axes in zip(jax.tree.leaves(mask), named, strict=True)
            )
            for mask, named in zip(masks, letters, strict=True)
        )
        arrays = Operands(inputs.query, inputs.key, inputs.value, inputs.bias, inputs.sinks, inputs.dropout_rng, leaves)
        specs = Operands(
            _partition(_one(cut.batch), _one(cut.sequence), _one(cut.heads)),
            self._keys(inputs.key),
            self._keys(inputs.value),
            None if inputs.bias is None else self.spec("BNTS", inputs.bias),
            None if inputs.sinks is None else _partition(_one(cut.head_axes)),
            None if inputs.dropout_rng is None else _partition(),
            tuple(
                tuple(self.spec(axes, leaf) for axes, leaf in zip(named, of_mask, strict=True))
                for named, of_mask in zip(letters, leaves, strict=True)
            ),
        )
        return arrays, specs

    def _keys(self, keys: Any) -> Any:
        heads = _one(self.kv_head_axes)
        if isinstance(keys, PagedArray):
            # A table has two dimensions; pages that are found through it are everywhere in the pool.
            return jax.tree.map(
                lambda array: _spec(array, (None, None, heads, None)) if array.ndim == 4 else _partition(), keys
            )
        return jax.tree.map(
            lambda array: _spec(array, (_one(self.sharding.batch), _one(self.sharding.kv_axes), heads, None)), keys
        )

    def spec(self, letters: str, array: Any) -> Any:
        """Of an array whose dimensions have letters; sizes of 1 are not cut."""
        cut = self.sharding
        axes = {"B": cut.batch, "N": cut.head_axes, "K": cut.head_axes, "T": cut.ring}
        if "T" not in letters:  # else it is cut along S as each shard of keys is met
            axes["S"] = self.kv_shard_axes
        return _spec(array, tuple(_one(axes.get(letter, ())) for letter in letters))

    def _with_repeated_heads(self, leaf: Any, letters: str) -> Any:
        """A leaf that differs by key/value head, for as many as there are after they are repeated."""
        place = letters.find("N")
        asked = self.request
        repeats = self.sharding.kv_repeats(asked.q_heads, asked.kv_heads)
        if place < 0 or repeats == 1 or leaf.shape[place] != asked.kv_heads:
            return leaf
        return jnp.repeat(jnp.asarray(leaf), repeats, axis=place)

    def on_device(self, operands: Operands) -> Operands:
        """A device's arrays as attention is computed: key/value heads repeated, heads exchanged for tokens."""
        cut = self.sharding
        repeats = cut.kv_repeats(self.request.q_heads, self.request.kv_heads)
        key, value = (self._own_heads(keys, repeats) for keys in (operands.key, operands.value))
        rng = operands.dropout_rng
        apart = (*cut.batch, *cut.head_axes)
        if rng is not None and apart:
            rng = jax.random.fold_in(rng, lax.axis_index(apart))
        arrays = dataclasses.replace(operands, key=key, value=value, dropout_rng=rng)
        if not cut.exchanged:
            return arrays
        query, key, value = (
            jax.tree.map(lambda array: _tokens_for_heads(array, cut.exchanged), keys)
            for keys in (arrays.query, key, value)
        )
        return dataclasses.replace(arrays, query=query, key=key, value=value)

    def _own_heads(self, keys: Any, repeats: int) -> Any:
        """Key/value heads as often as needed; of heads that are not cut, those that a device's queries read."""
        if repeats == 1:
            return keys
        if self.kv_head_axes == self.sharding.heads:
            return _of_heads(keys, lambda array: jnp.repeat(array, repeats, axis=2))
        mine = self.request.kv_heads * repeats // self.sharding.size(self.sharding.heads)
        heads = (lax.axis_index(self.sharding.heads) * mine + jnp.arange(mine)) // repeats
        return _of_heads(keys, lambda array: jnp.take(array, heads, axis=2, mode="clip"))

    def returned(self, partial: Partial) -> Partial:
        """A device's result with tokens exchanged for heads again."""
        cut = self.sharding.exchanged
        partial = to_lse(partial) if self.request.partial else partial  # some kernels return max and sum
        named = {"lse": partial.lse, "lse_rest": partial.lse_rest} if self.request.partial else {}
        out = _exchanged(partial.out, cut, 1, 2) if cut else partial.out
        statistics = {
            name: _exchanged(array, cut, 2, 1) if cut and array is not None else array for name, array in named.items()
        }
        return Partial(out, max_logits=partial.max_logits, dtype=partial.dtype, **statistics)


def _tokens_for_heads(array: jax.Array, axes: Axes) -> jax.Array:
    """All tokens of some heads; a scale of all heads remains one."""
    if array.shape[2] == 1:
        gathered: jax.Array = lax.all_gather(array, axes, axis=1, tiled=True)
        return gathered
    return _exchanged(array, axes, 2, 1)


def _of_heads(keys: Any, chosen: Callable[[jax.Array], jax.Array]) -> Any:
    """Keys with other heads; a page table, a scale of all heads and a value that is in the keys are as they were."""
    if isinstance(keys, PagedArray) and keys.interleaved:
        pages = jnp.asarray(keys.pages)
        pairs = chosen(pages.reshape(*pages.shape[:2], -1, 2, pages.shape[3]))
        return dataclasses.replace(keys, pages=pairs.reshape(*pages.shape[:2], -1, pages.shape[3]))
    return jax.tree.map(lambda array: chosen(array) if array.shape[2:3] == keys.shape[2:3] else array, keys)


def _exchanged(array: jax.Array, axes: Axes, split: int, concatenated: int) -> jax.Array:
    found: jax.Array = lax.all_to_all(  # type: ignore[no-untyped-call]
        array, axes, split_axis=split, concat_axis=concatenated, tiled=True
    )
    return found


def _partial_specs(cut: Sharding, statistics: bool, max_logits: bool, dtype: str, apart: bool) -> Partial:
    """The PartitionSpecs of a Partial."""
    batch = _one((*cut.kv_axes, *cut.batch) if apart else cut.batch)
    heads, length = _one(cut.heads), _one(cut.sequence)
    statistic = _partition(batch, heads, length) if statistics else None
    return Partial(
        _partition(batch, length, heads),
        lse=statistic,
        lse_rest=statistic,
        max_logits=_partition(batch, _one(cut.head_axes)) if max_logits else None,
        dtype=dtype,
    )


def _partition(*entries: Any) -> Any:
    """A PartitionSpec, in place of an array."""
    return jax.sharding.PartitionSpec(*entries)  # type: ignore[no-untyped-call]


def _one(axes: Axes) -> Any:
    """Axes as one entry of a PartitionSpec."""
    return None if not axes else axes[0] if len(axes) == 1 else axes


def _spec(array: Any, entries: Sequence[Any]) -> Any:
    shape = jnp.shape(array)
    return _partition(*(None if size == 1 else entry for size, entry in zip(shape, entries, strict=True)))


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _Whole:
    """What a device runs that has all keys which its queries may see."""

    cutting: _Cutting
    plan: Plan
    structures: tuple[Any, ...]

    def __call__(self, operands: Operands) -> Partial:
        own = self.cutting.on_device(operands)
        masks = tuple(
            jax.tree.unflatten(structure, leaves) for structure, leaves in zip(self.structures, own.leaves, strict=True)
        )
        inputs = Inputs(own.query, own.key, own.value, masks, own.bias, own.sinks, own.dropout_rng)
        return self.cutting.returned(self.plan.run(inputs))


@final
@dataclasses.dataclass(frozen=True, slots=True)
class _InSteps:
    """What a device runs whose queries meet keys of others."""

    cutting: _Cutting
    steps: Steps

    def __call__(self, operands: Operands) -> Partial:
        return self.cutting.returned(attend_in_steps(self.steps, self.cutting.on_device(operands)))
