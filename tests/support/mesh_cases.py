"""Calls on a mesh of simulated devices, next to the same call by the float64 reference."""

import collections
import contextlib
import dataclasses
import functools
import math
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mask_strategies import near, strided

import kernelry
from kernelry import masks, testing
from kernelry.cache import QuantizedArray
from kernelry.parallel import Sharding, load_balanced_order
from kernelry.plugin import pytree
from kernelry.testing import reference_attention, reference_gradients

QKV = ("query", "key", "value")
OUT, GRADIENT = 2e-6, 2e-5
"""Tolerances in float32."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """B, T, S, N, K, H and D of a call."""

    batch: int = 2
    q_len: int = 64
    kv_len: int = 64
    q_heads: int = 8
    kv_heads: int = 2
    dim: int = 8
    value_dim: int = 8


SMALL = Sizes()


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """A mesh, sizes by axis, and how a call is cut over it."""

    mesh: tuple[tuple[str, int], ...]
    sharding: Sharding

    @classmethod
    def of(cls, axes: dict[str, int], **sharding: Any) -> "Cut":
        return cls(tuple(axes.items()), Sharding(**sharding))

    def ordered(self, order: str) -> "Cut":
        return dataclasses.replace(self, sharding=dataclasses.replace(self.sharding, order=order))

    def positions(self, length: int) -> np.ndarray | None:
        """Where the tokens of the order stand; None where they are contiguous."""
        located = self.sharding.on(dict(self.mesh))
        if located.order == "contiguous":
            return None
        return load_balanced_order(length, located.size(located.ordered), located.order)


STRATEGIES = {
    "batch": Cut.of({"d": 2}, batch="d"),
    "heads": Cut.of({"t": 4}, heads="t"),
    "ring": Cut.of({"d": 2, "c": 4}, batch="d", sequence="c", strategy="ring"),
    "ring_of_two": Cut.of({"c": 2, "t": 4}, heads="t", sequence="c", strategy="ring"),
    "ring_of_eight": Cut.of({"c": 8}, sequence="c", strategy="ring"),
    "all_gather": Cut.of({"c": 4, "t": 2}, sequence="c", heads="t", strategy="all_gather"),
    "ulysses": Cut.of({"d": 2, "c": 4}, batch="d", sequence="c", strategy="ulysses"),
    "usp": Cut.of({"r": 2, "u": 4}, sequence=("r", "u"), ulysses="u", strategy="usp"),
    "keys_whole": Cut.of({"d": 2, "c": 4}, batch="d", sequence="c", kv_sequence=()),
    "keys_alone": Cut.of({"d": 2, "c": 4}, batch="d", kv_sequence="c"),
}


@functools.cache
def mesh_of(axes: tuple[tuple[str, int], ...], kinds: tuple[str, ...] = ()):
    """A mesh of the first devices; its axes are Auto unless their kinds say otherwise."""
    types = tuple(getattr(AxisType, kind) for kind in kinds) or (AxisType.Auto,) * len(axes)
    count = math.prod(size for _, size in axes)
    devices = jax.devices()[:count]
    return jax.make_mesh(
        tuple(size for _, size in axes), tuple(name for name, _ in axes), axis_types=types, devices=devices
    )


@pytree()
@dataclasses.dataclass(frozen=True, slots=True)
class Strided(masks.Mask):
    """Keys whole steps away, a third party's mask of positions."""

    step: int

    word: ClassVar[str] = "steps"
    positional: ClassVar[bool] = True

    def evaluate(self, query, kv):
        return (query.positions - kv.positions) % self.step == 0


@pytree("listed")
@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Listed(masks.Mask):
    """Keys that an array [S, B] lists, a third party's mask whose array runs along S and B."""

    listed: Any

    word: ClassVar[str] = "listed"
    axes: ClassVar[dict[str, str]] = {"listed": "SB"}

    def evaluate(self, query, kv):
        return kv.take(self.listed.T)


def packed_ids(sizes=SMALL, side="q"):
    """Documents of two lengths in each row, the last of them padding; [B, L]."""
    length = sizes.q_len if side == "q" else sizes.kv_len
    slots = np.arange(length)
    rows = [np.where(slots >= length - 3, -1, slots // (length // (2 + row))) for row in range(sizes.batch)]
    return np.stack(rows).astype(np.int32)


def masks_of(sizes=SMALL):
    """Returns a mask of every form by name, for T = S."""
    rng = np.random.default_rng(2)
    batch, length = sizes.batch, sizes.q_len
    ids, spans = packed_ids(sizes), np.where(rng.random((batch, length)) < 0.5, np.arange(length) // 7, -1)
    causal = masks.Causal()
    keep = {
        heads: rng.random((batch, heads, length, -(-length // 5))) < 0.6 for heads in (sizes.kv_heads, sizes.q_heads)
    }
    lengths = masks.Lengths(
        np.linspace(length - 1, length // 3, batch).astype(np.int32),
        np.linspace(length, length // 2, batch).astype(np.int32),
    )
    return {
        "causal": causal,
        "window": masks.SlidingWindow(9),
        "symmetric_window": masks.SlidingWindow(5, 4),
        "chunked": masks.Chunked(12),
        "block_causal": masks.BlockCausal(6),
        "full": masks.Full(),
        "packed": causal & masks.Segments(ids),
        "packed_window": masks.SlidingWindow(9) & masks.Segments(ids),
        "two_ids": causal & masks.Segments(ids, ids[:, ::-1].copy()),
        "lengths": lengths,
        "causal_lengths": causal & lengths,
        "prefix": masks.PrefixLM(np.linspace(5, length // 2, batch).astype(np.int32)),
        "prefix_for_all": masks.PrefixLM(np.int32(11)),
        "spans": (causal & masks.Segments(ids)) | masks.BidirectionalSpans(spans),
        "dense": masks.Dense(rng.random((batch, sizes.q_heads, length, length)) < 0.4),
        "dense_of_rows": masks.Dense(rng.random((1, 1, length, length)) < 0.4),
        "dense_of_slots": causal & masks.Dense(rng.random((batch, 1, 1, length)) < 0.6),
        "selection_of_kv_heads": causal & masks.BlockSelection(keep[sizes.kv_heads], 5),
        "selection_of_heads": masks.BlockSelection(keep[sizes.q_heads], 5),
        "predicate": masks.Predicate(strided),
        "predicate_with_operands": masks.Predicate(near, rng.integers(2, 30, (batch, 1, length, 1))),
        "traced_positions": causal.at(query_positions=jnp.arange(length), kv_positions=jnp.arange(length)),
        "positions_of_rows": causal.at(
            query_positions=np.stack([np.roll(np.arange(length), 3 * row) for row in range(batch)]),
            kv_positions=np.stack([np.roll(np.arange(length), 2 * row) for row in range(batch)]),
        ),
        "offsets_of_rows": masks.SlidingWindow(20).at(query_offset=np.arange(batch) * 7),
        "traced_offset": causal.at(query_offset=jnp.int32(4)),
        "third_party": causal & Strided(3),
        "third_party_of_slots": causal & Listed(rng.random((length, batch)) < 0.7),
        "not_window": ~masks.SlidingWindow(9, 9),
        "not_packed": causal & ~masks.Segments(ids),
    }


def masks_of_other_lengths(sizes):
    """Returns masks for T ≠ S."""
    suffix = sizes.kv_len - sizes.q_len
    ids = packed_ids(sizes), packed_ids(sizes, "kv")
    return {
        "suffix": masks.Causal().at(query_offset=suffix),
        "traced_suffix": masks.SlidingWindow(15).at(query_offset=jnp.int32(suffix)),
        "suffix_of_rows": masks.Causal().at(query_offset=np.arange(sizes.batch) + suffix - 1),
        "cross_packed": masks.Segments(*ids),
        "cross": masks.Full(),
    }


@dataclasses.dataclass(frozen=True, slots=True)
class Feature:
    """What a call has but for its mask.

    Args:
      arrays: shapes of further arrays by name, in letters.
      options: arguments of `attention`.
      sizes: those that differ.
      dtype: of the arrays.
      quantized: the format of keys and values, and the heads that a scale is for: its own, or all.
    """

    arrays: dict[str, str] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    dtype: Any = np.float32
    quantized: tuple[str, str] | None = None
    huge: bool = False


FEATURES = {
    "plain": Feature(),
    "sinks": Feature({"sinks": "N"}),
    "soft_cap": Feature(options={"soft_cap": 3.0, "scale": 0.7}),
    "bias": Feature({"bias": "BNTS"}),
    "bias_after_cap": Feature({"bias": "BNTS"}, {"soft_cap": 3.0, "scale": 0.7, "bias_after_cap": True}),
    "bias_of_heads": Feature({"bias": "1NTS"}),
    "bias_of_slots": Feature({"bias": "B11S"}),
    "bias_of_rows": Feature({"bias": "11T1"}),
    "one_kv_head": Feature(sizes={"kv_heads": 1}),
    "all_kv_heads": Feature(sizes={"kv_heads": 8}),
    "value_dim": Feature(sizes={"value_dim": 12}),
    "max_logits": Feature({"sinks": "N"}, {"return_max_logits": True}),
    "partial": Feature(options={"return_partial": True}),
    "partial_max_logits": Feature({"bias": "BNTS"}, {"return_partial": True, "return_max_logits": True}),
    "quantized": Feature(options={"gradients": ("query",)}, quantized=("int8", "own")),
    "quantized_alike": Feature(options={"gradients": ("query",)}, quantized=("int8", "all")),
    "bfloat16": Feature({"sinks": "N"}, dtype=jnp.bfloat16),
    "huge_lse": Feature({"bias": "11T1"}, {"scale": 1.0, "gradients": QKV}, huge=True),
    "huge_lse_of_partial": Feature(
        {"bias": "11T1"}, {"scale": 1.0, "gradients": QKV, "return_partial": True}, huge=True
    ),
    "forward": Feature({"sinks": "N"}, {"mode": "prefill"}),
}


def arrays_of(sizes, feature, seed=0):
    """Draws the arrays of a call, by argument name."""
    rng = np.random.default_rng(seed)
    letters = {"B": sizes.batch, "T": sizes.q_len, "S": sizes.kv_len, "N": sizes.q_heads, "1": 1}
    shapes = {
        "query": (sizes.batch, sizes.q_len, sizes.q_heads, sizes.dim),
        "key": (sizes.batch, sizes.kv_len, sizes.kv_heads, sizes.dim),
        "value": (sizes.batch, sizes.kv_len, sizes.kv_heads, sizes.value_dim),
        **{name: tuple(letters[letter] for letter in named) for name, named in feature.arrays.items()},
    }
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    if feature.huge:  # logits near 2²¹ whose fractions are exact
        arrays |= {name: np.round(2 * arrays[name]) / 2 for name in ("query", "key")}
        arrays["bias"] = np.full(shapes["bias"], 2.0**21, np.float32)
    return {name: jnp.asarray(array, feature.dtype) for name, array in arrays.items()}


def _call(arrays, mask, options):
    given = {name: array for name, array in arrays.items() if name not in QKV}
    found = kernelry.attention(*(arrays[name] for name in QKV), mask=mask, **given, **options)
    found, most = found if options.get("return_max_logits") else (found, None)
    partial = isinstance(found, kernelry.Partial)
    return ({"out": found.out, "lse": found.lse} if partial else {"out": found}), most


@functools.partial(jax.jit, static_argnames=("options", "names"))
def _run(arrays, mask, cotangents, options, names):
    moving = {name: arrays[name] for name in names}
    if not names:
        found, most = _call(arrays, mask, dict(options))
        return found, most, {}
    found, pull, most = jax.vjp(lambda moving: _call(arrays | moving, mask, dict(options)), moving, has_aux=True)
    return found, most, pull(cotangents)[0]


def _quantized(array, dtype, heads):
    own = QuantizedArray.quantize(array, dtype)
    if heads == "own":
        return own
    scale = own.scale.max(axis=2, keepdims=True)
    return QuantizedArray(jnp.round(array / scale).astype(dtype), scale)


def place_of(kernel):
    """Where a kernel runs on CPU."""
    plain = kernel in ("auto", "blockwise", "dot_product")
    return contextlib.nullcontext() if plain else testing.interpret()


def check(cut, mask, feature, sizes=SMALL, kernel="blockwise", *, out=OUT, gradient=GRADIENT, kinds=(), jitted=True):
    """Runs a call on a mesh and compares results and gradients with the reference."""
    sizes = dataclasses.replace(sizes, **feature.sizes)
    arrays = arrays_of(sizes, feature)
    options = {"kernel": kernel, **feature.options}
    forward = options.get("mode", "train") != "train"
    names = () if forward else tuple(options.get("gradients", arrays))
    rng = np.random.default_rng(1)
    rows = sizes.batch, sizes.q_len, sizes.q_heads
    cotangents = {"out": jnp.asarray(rng.standard_normal((*rows, sizes.value_dim)), feature.dtype)}
    if options.get("return_partial"):
        cotangents["lse"] = jnp.asarray(rng.standard_normal((rows[0], rows[2], rows[1])), jnp.float32)
    given = dict(arrays)
    if feature.quantized:
        for name in ("key", "value"):
            given[name] = _quantized(arrays[name], *feature.quantized)
            arrays[name] = given[name].dequantize(jnp.float32)
    with jax.set_mesh(mesh_of(cut.mesh, kinds)), kernelry.use(sharding=cut.sharding), place_of(kernel):
        found, most, gradients = _run(given, mask, cotangents, tuple(sorted(options.items())), names)
    compare(cut, mask, arrays, cotangents, options, (found, most, gradients), (out, gradient), sizes)


def compare(cut, mask, arrays, cotangents, options, found, tolerances, sizes=SMALL):
    """Compares what a call returned with the reference."""
    known = {name: options[name] for name in ("scale", "soft_cap", "bias_after_cap") if name in options}
    known |= {name: array for name, array in arrays.items() if name not in QKV}
    positions = cut.positions(sizes.q_len) if sizes.q_len == sizes.kv_len else None
    if positions is not None:
        mask = mask.at(query_positions=positions, kv_positions=positions)
    qkv = [arrays[name] for name in QKV]
    expected = reference_attention(*qkv, mask=mask, **known)
    found, most, gradients = found
    for name, array in found.items():
        close(array, getattr(expected, name), tolerances[0], name)  # an infinite lse is compared, too
    if most is not None:
        close(most, expected.max_logits, tolerances[0], "max_logits")
    if gradients:
        d_lse = cotangents.get("lse")
        whole = reference_gradients(*qkv, mask=mask, d_out=cotangents["out"], d_lse=d_lse, **known)
        for name, array in gradients.items():
            close(array, getattr(whole, name), tolerances[1], f"gradient of {name}")


def close(found, expected, tolerance, name):
    """Compares with NumPy, relative to numbers above 1."""
    expected = np.asarray(expected, np.float64)
    found = np.asarray(found, np.float64)
    assert found.shape == expected.shape, (name, found.shape, expected.shape)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance, err_msg=name)


_COLLECTIVE = re.compile(r" = (.*?) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\(")


def program(cut, mask, sizes, kernel="blockwise", *, backward=True, sinks=False, **options):
    """Compiles a call, or its gradients, whose arrays are sharded as it is cut; nothing runs."""
    mesh, sharding = mesh_of(cut.mesh), cut.sharding.on(dict(cut.mesh))
    kv_heads = sharding.heads if sizes.kv_heads % sharding.size(sharding.heads) == 0 else ()

    def array(shape, *axes):
        spec = PartitionSpec(*(named or None for named in axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    rows = sizes.batch, sizes.q_len, sizes.q_heads, sizes.dim
    query = array(rows, sharding.batch, sharding.sequence, sharding.heads)
    slots = sizes.batch, sizes.kv_len, sizes.kv_heads
    key, value = (
        array((*slots, dim), sharding.batch, sharding.kv_axes, kv_heads) for dim in (sizes.dim, sizes.value_dim)
    )
    given = {"query": query, "key": key, "value": value}
    given |= {"sinks": array((sizes.q_heads,), sharding.heads)} if sinks else {}
    mask = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), mask)

    def attend(arrays, mask):
        return _call(arrays, mask, {"kernel": kernel, **options})[0]["out"]

    def differentiated(arrays, mask, d_out):
        return jax.vjp(lambda arrays: attend(arrays, mask), arrays)[1](d_out)[0]

    d_out = array((*rows[:3], sizes.value_dim), sharding.batch, sharding.sequence, sharding.heads)
    with jax.set_mesh(mesh), kernelry.use(sharding=cut.sharding), place_of(kernel):
        if backward:
            return jax.jit(differentiated).lower(given, mask, d_out).compile()
        return jax.jit(attend).lower(given, mask).compile()


def collectives(compiled):
    """Returns the collectives of a program as pairs of an operation and the shape of its result, counted."""
    text = re.sub(r"/\*.*?\*/", "", compiled.as_text())
    return collections.Counter(
        (found[2], shape)
        for found in _COLLECTIVE.finditer(text)
        for shape in sorted(set(re.findall(r"\w+\[[\d,]*\]", found[1])))
    )
