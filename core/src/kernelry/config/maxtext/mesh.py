"""Which axes of MaxText's mesh cut attention, and how devices share sequences: a Sharding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from kernelry.config.maxtext.options import MESH, PARALLELISM, ULYSSES_AXIS, is_none
from kernelry.errors import ArgumentError, ConfigError, nearest

if TYPE_CHECKING:
    from kernelry.request.sharding import Sharding

_NAMES = ("activation_batch_attn", "activation_length", "activation_heads", "activation_kv")
"""The logical names of queries [B, T, N, H]. Source: AttentionOp.flash_axis_names_q of MaxText 0.2.5."""

_STRATEGIES = ("all_gather", "ring", "ulysses", "usp")
_ORDERS = {"dual_chunk_swap": "dual_chunk", "striped": "striped"}
_GPUS = ("gpu", "gpu_multiprocess")


def sharding_of(options: Mapping[str, Any], given: Iterable[str]) -> Sharding | None:
    """Returns the sharding that the options ask for; None where none about a mesh is given.

    Axes of which MaxText's options leave the size open, or say 1, have no size: the mesh decides.

    Args:
      options: all values.
      given: the names that are not defaults of an absent option.

    Raises:
      ConfigError: the options contradict each other, or name what is not supported.
    """
    if not MESH & set(given):
        return None
    from kernelry.request.sharding import Sharding  # imported where calls are sharded

    _check_mode(options)
    sizes = _sizes(options)
    batch, sequence, heads = _axes(options, sizes)
    strategy = _strategy(options)
    if strategy != "usp":
        sequence = _without_ulysses(options, sequence, sizes)
    ulysses = _ulysses(options, sequence) if strategy == "usp" else ()
    sizes = _context_sizes(options, sequence, sizes)
    used = {*batch, *sequence, *heads}
    try:
        return Sharding(
            batch=batch,
            heads=heads,
            sequence=sequence,
            strategy=strategy if sequence else "auto",
            ulysses=ulysses,
            order=_order(options, strategy) if sequence else "contiguous",
            sizes=tuple((axis, size) for axis, size in sizes.items() if axis in used and size > 1),
        )
    except ArgumentError as error:
        raise ConfigError(f"MaxText's mesh options: {error}") from error


def _check_mode(options: Mapping[str, Any]) -> None:
    if options["shard_mode"] not in ("auto", "explicit"):
        raise ConfigError(f"MaxText option shard_mode must be auto or explicit, got {options['shard_mode']!r}.")


def _sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of the axes that are said; an axis that gets the rest of the devices has none."""
    axes = options["mesh_axes"]
    if not all(isinstance(axis, str) for axis in axes):
        raise ConfigError(f"MaxText option mesh_axes must be names, got {axes!r}.")
    sizes: dict[str, int] = {}
    for kind, axis in PARALLELISM.items():
        names = f"ici_{kind}_parallelism", f"dcn_{kind}_parallelism"
        counts = [options[name] for name in names]
        for name, count in zip(names, counts, strict=True):
            if count > 1 and axis not in axes:
                raise ConfigError(
                    f"MaxText option {name} = {count}, and mesh_axes has no axis {axis!r}; set it to 1, or add the "
                    f"axis{nearest(axis, axes)}"
                )
        if -1 not in counts:
            sizes[axis] = counts[0] * counts[1]
    return sizes


def _axes(options: Mapping[str, Any], sizes: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
    """The axes of batch, sequence and heads, by the logical axis rules; those that the mesh lacks cut nothing."""
    from kernelry.request.axis_rules import LogicalRules  # imported only where rules are read

    try:
        rules = LogicalRules.of(options["logical_axis_rules"])
    except ArgumentError as error:
        words = str(error).removeprefix("Sharding.of_rules: ")
        raise ConfigError(f"MaxText option logical_axis_rules: {words}") from error
    *axes, head_dim = (tuple(axis for axis in found if axis in options["mesh_axes"]) for found in rules.axes(_NAMES))
    cut = [axis for axis in head_dim if sizes.get(axis) != 1]
    if cut:
        raise ConfigError(
            f"MaxText option logical_axis_rules: {_NAMES[3]} cuts head dims over {' and '.join(cut)}, which no kernel "
            f"here does; let {_NAMES[2]} have the axes."
        )
    return tuple(axes)


def _strategy(options: Mapping[str, Any]) -> str:
    given: str = options["context_parallel_strategy"]
    if given.lower() not in _STRATEGIES:
        known = nearest(given, _STRATEGIES)
        raise ConfigError(f"MaxText option context_parallel_strategy: unknown strategy {given!r}{known}")
    return given.lower()


def _without_ulysses(
    options: Mapping[str, Any], sequence: tuple[str, ...], sizes: Mapping[str, int]
) -> tuple[str, ...]:
    """The axes of the sequence where heads are exchanged along none: as in MaxText, that axis has one device."""
    axis = options["ulysses_context_sharding"]
    if axis == ULYSSES_AXIS and sizes.get(axis) != 1:
        raise ConfigError(
            f"MaxText options ici_{axis}_parallelism and dcn_{axis}_parallelism must be 1 with "
            f"context_parallel_strategy = {options['context_parallel_strategy']!r}: the axis is for 'usp'."
        )
    return tuple(other for other in sequence if other != axis)


def _ulysses(options: Mapping[str, Any], sequence: tuple[str, ...]) -> tuple[str, ...]:
    axis = options["ulysses_context_sharding"]
    if axis not in sequence or len(sequence) < 2:
        raise ConfigError(
            f"MaxText option context_parallel_strategy = 'usp': {_NAMES[1]} must be cut over an axis for the ring and "
            f"over ulysses_context_sharding = {axis!r}, and logical_axis_rules and mesh_axes cut it over "
            f"{' and '.join(sequence) or 'none'}."
        )
    return (axis,)


def _context_sizes(options: Mapping[str, Any], sequence: tuple[str, ...], sizes: dict[str, int]) -> dict[str, int]:
    """The sizes with what context_parallel_size says of the axis of context_sharding."""
    axis: str = options["context_sharding"]
    if axis not in sequence and axis != "context":  # MaxText's default, which custom rules may cut nothing over
        raise ConfigError(
            f"MaxText option context_sharding = {axis!r}, and logical_axis_rules and mesh_axes cut {_NAMES[1]} over "
            f"{' and '.join(sequence) or 'none'}{nearest(axis, sequence)}"
        )
    size = options["context_parallel_size"]
    owner = axis if axis in sequence else next(iter(sequence), None)
    if is_none(size) or (owner is None and size == 1):
        return sizes
    if owner is None:
        raise ConfigError(
            f"MaxText option context_parallel_size = {size}, and logical_axis_rules and mesh_axes cut {_NAMES[1]} over "
            "none."
        )
    if sizes.get(owner, size) != size:
        raise ConfigError(
            f"MaxText option context_parallel_size = {size}, and by ici_ and dcn_{owner}_parallelism the size of "
            f"{owner!r} is {sizes[owner]}; set these, and leave context_parallel_size out."
        )
    return {**sizes, owner: size}


def _order(options: Mapping[str, Any], strategy: str) -> str:
    """The order in which MaxText's input pipeline puts the tokens. Source: utils/train_utils.py of MaxText 0.2.5."""
    given = options["context_parallel_reorder_strategy"]
    if given not in ("auto", *_ORDERS):
        known = nearest(given, ("auto", *_ORDERS))
        raise ConfigError(f"MaxText option context_parallel_reorder_strategy: unknown strategy {given!r}{known}")
    if not options["context_parallel_load_balance"]:
        return "contiguous"
    if strategy == "ulysses":
        raise ConfigError(
            "MaxText option context_parallel_load_balance = True with context_parallel_strategy = 'ulysses': as in "
            "MaxText, tokens are not reordered for it, since every device has whole sequences; set it to false."
        )
    if given != "auto":
        return _ORDERS[given]
    packed_ring = options["packing"] and strategy == "ring" and options["hardware"] in _GPUS
    return "striped" if packed_ring else "dual_chunk"
