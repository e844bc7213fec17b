"""Array adapters around a picky kernel, forward and backward, beside the float64 oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    MASKS,
    QKV,
    Answer,
    Heads,
    arrays_of,
    assert_twins,
    cotangents_of,
    masks_of_every_class,
    masks_that_hide,
    oracle_answer,
)
from pairs import sweep_but

import kernelry
from kernelry import masks
from kernelry.execution.adapters.base import Cost
from kernelry.execution.adapters.order import (
    CastInputs,
    CleanHiddenSlots,
    DenseMask,
    EmptyRowsFromLse,
    LengthsAsSegments,
    LseGradientColumn,
    PadHeadDim,
    PadSequence,
    RepeatKVHeads,
    SinksFromLse,
)
from kernelry.execution.plan import Plan, Step
from kernelry.masks.form import AtomKind
from kernelry.plugin import Capabilities, Dims, Feature, Inputs, Kernel, Refusal, RefusalCode, Request, Side, Tiling
from kernelry.testing import reference_mask

pytestmark = pytest.mark.versions

DENSE = next(kernel.spec for kernel in kernelry.kernels() if kernel.name == "dot_product")
ODD = Heads(4, 2, 5, 3)
Q_BLOCK, KV_BLOCK = 4, 8


def up(size, block):
    return -(-size // block) * block


def in_blocks(request, environment):
    """What a kernel says that works on whole blocks only."""
    wanted = ("q_len", up(request.q_len, Q_BLOCK)), ("kv_len", up(request.kv_len, KV_BLOCK))
    if all(getattr(request, name) == size for name, size in wanted):
        return ()
    return (Refusal(RefusalCode.SEQUENCE_LENGTH, "lengths must be whole blocks", pad_to=wanted),)


class Leaky(Kernel):
    """Masks by adding a large negative number, as vendors do: nonsense in hidden slots gets out."""

    def forward(self, inputs, request, tiling, *, statistics):
        key, value = (jnp.repeat(array, request.groups, axis=2) for array in (inputs.key, inputs.value))
        logits = jnp.einsum("BTNH,BSNH->BNTS", inputs.query, key) * request.scale
        query = Side.query(request.q_len, q_heads=request.q_heads)
        kv = Side.kv(request.kv_len)
        hidden = jnp.zeros((1, 1, 1, 1))
        for mask in inputs.mask:
            hidden = hidden + jnp.where(mask.evaluate(query, kv), 0.0, -1e30)
        logits = logits + hidden
        weights = jax.nn.softmax(logits, axis=-1) * (logits > -1e29)
        return kernelry.Partial(jnp.einsum("BNTS,BSND->BTND", weights, value), dtype=request.dtype)


def picky(**narrowed):
    """A kernel like dot_product that takes less."""
    others = {name: narrowed.pop(name) for name in ("refusals", "load") if name in narrowed}
    narrow = dataclasses.replace(DENSE.capabilities, **narrowed)
    return dataclasses.replace(DENSE, name="picky", capabilities=narrow, signature=lambda _: (), **others)


def served(kernel, mask, arrays, cotangents, **arguments):
    """Runs a call through the picky kernel, forward and backward; also the names of its adapters."""

    def forward(moving):
        others = {name: array for name, array in moving.items() if name not in QKV}
        result = kernelry.attention(*(moving[name] for name in QKV), mask=mask, kernel="picky", **others, **arguments)
        result, max_logits = result if arguments.get("return_max_logits") else (result, None)
        is_partial = isinstance(result, kernelry.Partial)
        return {"out": result.out, "lse": result.lse} if is_partial else {"out": result, "lse": None}, max_logits

    def run(moving, cotangents):
        returned, pull, max_logits = jax.vjp(forward, moving, has_aux=True)
        return returned["out"], returned["lse"], max_logits, pull(cotangents)[0]

    with kernelry.use(kernels=[kernel]):
        return Answer(*jax.jit(run)(arrays, cotangents))


def assert_served(kernel, mask, q_len, kv_len, heads=ODD, *, lse=False, bias=None, sinks=False, **arguments):
    arrays = arrays_of(q_len, kv_len, heads, bias=bias, sinks=sinks)
    cotangents = cotangents_of(arrays, lse=lse)
    arguments |= {"return_partial": True} if lse else {}
    found = served(kernel, mask, arrays, cotangents, **arguments)
    known = {name: arguments[name] for name in ("scale", "soft_cap") if name in arguments}
    assert_twins(found, oracle_answer(mask, arrays, cotangents, **known))


@pytest.mark.parametrize(("split", "lse"), [(True, True), (False, False)])
def test_a_padded_head_dim_changes_nothing(split, lse):
    kernel = picky(head_dims=Dims(minimum=4, maximum=16, multiple_of=8), split_head_dim=split)
    assert_served(kernel, masks.Causal(), 6, 6, lse=lse, bias=(1, 4, 6, 6))


def test_a_head_dim_is_padded_as_far_as_the_kernel_says():
    request = Request(q_len=4, head_dim=80, value_dim=64)
    refusal = Refusal(RefusalCode.HEAD_DIM, "80 is no power of 2", pad_to=(("head_dim", 128), ("value_dim", 100)))
    together, apart = Capabilities(head_dims=Dims()), Capabilities(head_dims=Dims(), split_head_dim=True)
    after = [PadHeadDim().rewrite(request, can, (refusal,)) for can in (together, apart)]
    assert [(one.head_dim, one.value_dim) for one in after] == [(128, 128), (128, 100)]
    assert {one.scale for one in after} == {80**-0.5}


@pytest.mark.parametrize("dims", [None, Dims(maximum=64), Dims(maximum=100, multiple_of=64), Dims(multiple_of=16)])
def test_a_head_dim_that_padding_cannot_help_is_left_alone(dims):
    request = Request(q_len=4, head_dim=80)
    capabilities = Capabilities(head_dims=dims, split_head_dim=True)
    assert PadHeadDim().rewrite(request, capabilities, capabilities.refusals(request)) is None


def test_a_value_dim_that_padding_cannot_help_is_left_alone():
    capabilities = Capabilities(head_dims=Dims(maximum=64, multiple_of=16), split_head_dim=True)
    refusal = Refusal(RefusalCode.HEAD_DIM, "too wide")
    for dims in ({"head_dim": 40, "value_dim": 80}, {"head_dim": 80, "value_dim": 40}):
        assert PadHeadDim().rewrite(Request(q_len=4, **dims), capabilities, (refusal,)) is None


@pytest.mark.parametrize(("value", "expected"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, None)])
def test_dims_are_padded_to_the_next_that_is_taken(value, expected):
    assert Dims(minimum=10, maximum=64, multiple_of=16).padded(value) == expected


@pytest.mark.parametrize(
    "name", sweep_but([name for name in MASKS if name != "predicate"], "prefix", "selection", "and", "or")
)
def test_any_length_is_served_in_whole_blocks(name):
    mask = masks_of_every_class(7, 7, ODD)[name]
    assert_served(picky(refusals=in_blocks), mask, 7, 7, lse=True, return_max_logits=True)


@pytest.mark.parametrize(
    ("mask", "q_len", "kv_len", "arguments"),
    [
        (masks.Full(), 3, 9, {"bias": (2, 1, 3, 9)}),
        (masks.Full(), 3, 9, {"bias": (1, 4, 1, 9), "sinks": True}),
        (masks.Full(), 1, 1, {"bias": (2, 4, 1, 1)}),
        (masks.Causal().at(query_offset=6), 3, 9, {"lse": True, "scale": 0.3, "soft_cap": 2.0}),
        (masks.Causal().at(query_positions=np.array([8, 0, 4])), 3, 9, {"return_max_logits": True}),
        (masks.SlidingWindow(2).at(kv_positions=jnp.arange(9)[::-1]), 3, 9, {"lse": True}),
        (masks.Full(), 0, 3, {"lse": True}),
        (masks.Full(), 3, 0, {"lse": True}),
    ],
    ids=str,
)
def test_what_is_padded_with_the_lengths_changes_nothing(mask, q_len, kv_len, arguments):
    assert_served(picky(refusals=in_blocks), mask, q_len, kv_len, **arguments)


def test_unequal_lengths_are_served_by_a_kernel_that_wants_equal_ones():
    assert_served(picky(unequal_lengths=False), masks.Causal().at(query_offset=2), 3, 8, lse=True)


def test_nan_that_only_padded_rows_would_see_does_not_leak():
    arrays = arrays_of(3, 8, ODD)
    hidden = dict(arrays) | {name: arrays[name].at[:, 5:].set(jnp.nan) for name in ("key", "value")}
    cotangents = cotangents_of(arrays)
    mask = masks.Causal().at(query_offset=2)
    found = served(picky(refusals=in_blocks), mask, hidden, cotangents)
    assert_twins(found, oracle_answer(mask, arrays, cotangents))


@pytest.mark.parametrize(
    ("name", "atoms"),
    [
        ("and", frozenset(AtomKind)),
        ("selection", frozenset(AtomKind)),
        ("or", frozenset({AtomKind.DENSE})),
        ("prefix", frozenset({AtomKind.DENSE})),
    ],
)
def test_traced_masks_are_adapted_under_jit_and_vmap(name, atoms):
    mask, arrays = masks_of_every_class(7, 7, ODD)[name], arrays_of(7, 7, ODD)
    kernel = picky(refusals=in_blocks, atoms=atoms, clean_hidden_slots=False)

    def call(scale, mask, arrays):
        query, key, value = (arrays[name] for name in QKV)
        with kernelry.use(kernels=[kernel]):
            return kernelry.attention(query * scale, key, value, mask=mask, kernel="picky")

    found = jax.jit(jax.vmap(call, in_axes=(0, None, None)))(jnp.array([1.0, 0.5]), mask, arrays)
    for scale, out in zip((1.0, 0.5), found, strict=True):
        scaled = arrays | {"query": arrays["query"] * scale}
        expected = oracle_answer(mask, scaled, cotangents_of(arrays)).out
        np.testing.assert_allclose(np.asarray(out), expected, atol=2e-6)


def through(adapter, kernel, request, inputs, refusals=()):
    """Runs one adapter around a kernel."""
    after = adapter.rewrite(request, kernel.capabilities, refusals)
    assert after is not None
    return Plan(kernel, (Step(adapter, request, after),), request, Tiling()).run(inputs)


def test_a_padded_partial_keeps_its_maximum_and_sum():
    class MaxSum(Kernel):
        def forward(self, inputs, request, tiling, *, statistics):
            partial = DENSE.body().forward(inputs, request, tiling, statistics=True)
            return dataclasses.replace(partial, lse=None, max=partial.lse, sum=jnp.ones_like(partial.lse))

    mask, arrays = masks.Causal(), arrays_of(5, 5, ODD)
    request = Request(
        batch=2, q_len=5, q_heads=4, kv_heads=2, head_dim=5, value_dim=3, mask=mask, partial=True, gradients=()
    )
    refusal = Refusal(RefusalCode.SEQUENCE_LENGTH, "too short", pad_to=(("q_len", 8), ("kv_len", 8)))
    inputs = Inputs(**arrays, mask=mask.canonical())
    found = through(PadSequence(), picky(load=MaxSum), request, inputs, (refusal,))
    expected = oracle_answer(mask, arrays, cotangents_of(arrays))
    np.testing.assert_allclose(np.asarray(found.max), expected.lse, atol=2e-6)
    assert found.sum.shape == (2, 4, 5)


@pytest.mark.parametrize("name", sweep_but(["and", "or", "prefix", "selection", "predicate"], "or", "predicate"))
def test_any_mask_is_served_as_a_dense_one(name):
    kernel = picky(atoms=frozenset({AtomKind.DENSE}), positions=frozenset())
    mask = masks_of_every_class(6, 6, ODD)[name]
    assert_served(kernel, mask, 6, 6, lse=True)


def test_positions_are_served_in_a_dense_mask():
    kernel = picky(atoms=frozenset({AtomKind.CAUSAL, AtomKind.DENSE}), positions=frozenset())
    assert_served(kernel, masks.Causal().at(query_offset=jnp.array([2, 5])), 3, 8)


def test_lengths_are_served_as_segments():
    kernel = picky(atoms=frozenset({AtomKind.CAUSAL, AtomKind.SEGMENTS_SEPARATE, AtomKind.SEGMENTS}))
    mask = masks.Causal() & masks.Segments(np.array([0, 0, 1, 1, 1, 2])) & masks.Lengths(jnp.array([3, 5]))
    assert_served(kernel, mask, 6, 6, lse=True)


def test_padding_lengths_and_a_head_dim_compose():
    kernel = picky(
        refusals=in_blocks,
        head_dims=Dims(multiple_of=8),
        split_head_dim=False,
        grouped_heads=False,
        atoms=frozenset({AtomKind.CAUSAL, AtomKind.SEGMENTS_SEPARATE}),
    )
    assert_served(kernel, masks.Lengths(np.array([4, 7])), 5, 7, lse=True, return_max_logits=True)


@pytest.mark.parametrize(
    ("dtype", "takes", "expected"),
    [
        ("bfloat16", {"float32", "float16", "float64"}, "float32"),
        ("float16", {"bfloat16", "float32"}, "float32"),
        ("float16", {"bfloat16"}, None),
        ("float32", {"bfloat16", "float64"}, None),
        ("float64", {"float32"}, None),
        ("float8_e4m3fn", {"float32", "bfloat16"}, "bfloat16"),
        ("float8_e5m2", {"float32", "float16"}, "float16"),
        ("int8", {"float32"}, None),
    ],
)
def test_inputs_are_cast_only_where_nothing_is_lost(dtype, takes, expected):
    request = Request(q_len=4, dtype=dtype)
    after = CastInputs().rewrite(request, Capabilities(dtypes=frozenset(takes)), ())
    assert (after and after.dtype) == expected


@pytest.mark.parametrize("partial", [False, True])
def test_cast_inputs_come_back_in_their_dtype_with_gradients(partial):
    kernel = picky(dtypes=frozenset({"float32"}))
    arrays = arrays_of(6, 6, ODD, dtype=jnp.bfloat16)
    cotangents = cotangents_of(arrays, lse=partial)
    cotangents["out"] = cotangents["out"].astype(jnp.float32 if partial else jnp.bfloat16)
    found = served(kernel, masks.Causal(), arrays, cotangents, return_partial=partial)
    assert_twins(found, oracle_answer(masks.Causal(), arrays, cotangents), atol=2e-2, gradient_atol=4e-2)
    assert {array.dtype for array in found.gradients.values()} == {jnp.dtype("bfloat16")}
    assert found.out.dtype == ("float32" if partial else "bfloat16")


@pytest.mark.parametrize("name", sweep_but(["segments", "lengths", "selection", "causal", "or"], "selection", "or"))
def test_a_kernel_that_leaks_is_clean_behind_the_adapter(name):
    heads = Heads(4, 2, 8, 8)
    mask, arrays = masks_that_hide(9)[name], arrays_of(9, 9, heads)
    cotangents = cotangents_of(arrays)
    visible = reference_mask(mask, 2, 4, 9, 9)
    slots = visible.reshape(2, 2, 2, 9, 9).any(axis=(2, 3)).swapaxes(1, 2)[..., None]
    rows = visible.any(axis=3).swapaxes(1, 2)[..., None]
    poison = {"query": rows, "key": slots, "value": slots}
    poisoned = {key: jnp.where(keep, arrays[key], jnp.nan) for key, keep in poison.items()}
    kernel = picky(load=Leaky, statistics=frozenset(), features=frozenset({Feature.SCALE}), clean_hidden_slots=False)
    found = served(kernel, mask, poisoned, cotangents)
    assert_twins(found, oracle_answer(mask, arrays, cotangents))


def test_the_leaky_kernel_leaks_without_the_adapter():
    mask, arrays = masks_that_hide(9)["segments"], arrays_of(9, 9)
    poisoned = arrays | {"value": arrays["value"].at[:, 1].set(jnp.nan)}
    found = served(picky(load=Leaky, features=frozenset({Feature.SCALE})), mask, poisoned, cotangents_of(arrays))
    assert np.isnan(np.asarray(found.out)).any()


@pytest.mark.parametrize(
    "adapter",
    [PadHeadDim(), PadSequence(), DenseMask(), LengthsAsSegments(), CastInputs(), CleanHiddenSlots()],
    ids=lambda a: a.name,
)
def test_an_adapter_costs_what_its_arrays_weigh(adapter):
    request = Request(
        batch=2, q_len=5, q_heads=4, kv_heads=2, head_dim=6, mask=masks.Lengths(np.int32(3)), dtype="bfloat16"
    )
    can = Capabilities(
        head_dims=Dims(multiple_of=8),
        atoms=frozenset({AtomKind.DENSE, AtomKind.SEGMENTS_SEPARATE}),
        dtypes=frozenset({"float32"}),
    )
    refusal = Refusal(RefusalCode.SEQUENCE_LENGTH, "too short", pad_to=(("q_len", 8), ("kv_len", 8)))
    cost = adapter.cost(request, adapter.rewrite(request, can, (refusal,)))
    rows, slots = 2 * 4, 2 * 2  # B·N and B·K
    expected = {
        "pad_head_dim": (rows + slots) * 5 * (8 + 8) * 2,
        "pad_sequence": (rows + slots) * 8 * (6 + 6) * 2,
        "dense_mask": 2 * 5 * 5,
        "lengths_as_segments": 2 * (5 + 5) * 4,
        "cast_inputs": (rows + slots) * 5 * (6 + 6) * 4,
        "clean_hidden_slots": (rows * 5 * 6 + slots * 5 * (6 + 6)) * 2,
    }
    assert cost.extra_bytes == expected[adapter.name]
    padded_pairs = {"pad_head_dim": 5 * 5 * 4, "pad_sequence": (64 - 25) * 12}
    if adapter.name in padded_pairs:
        assert cost.extra_flops == 2 * rows * padded_pairs[adapter.name]


def test_an_adapter_of_statistics_costs_a_few_numbers_a_row():
    request = Request(batch=2, q_len=5, kv_len=7, q_heads=4, kv_heads=2, head_dim=6, value_dim=3, dtype="bfloat16")
    rows, values = 2 * 4 * 5, 3
    assert EmptyRowsFromLse().cost(request, request) == Cost(4 * rows, rows * values)
    assert SinksFromLse().cost(request, request) == Cost(4 * rows, rows * (values + 4))
    repeated = dataclasses.replace(request, kv_heads=4)
    assert RepeatKVHeads().cost(request, repeated) == Cost(2 * 4 * 7 * (6 + 3) * 2)
    spare = dataclasses.replace(request, value_dim=4)
    assert LseGradientColumn().cost(request, spare) == Cost(2 * (5 * 4 + 7 * 2) * 4 * 2, 2 * 2 * 4 * 5 * 7)


def test_lengths_are_padded_with_their_bias():
    capabilities = Capabilities(atoms=frozenset(AtomKind), unequal_lengths=True)
    refusal = Refusal(RefusalCode.SEQUENCE_LENGTH, "too short", pad_to=(("q_len", 8), ("kv_len", 16)))
    for before, after in (((2, 4, 5, 7), (2, 4, 8, 16)), ((1, 1, 1, 7), (1, 1, 1, 16)), ((1, 4, 5, 1), (1, 4, 8, 1))):
        request = Request(batch=2, q_len=5, kv_len=7, q_heads=4, bias=before)
        assert PadSequence().rewrite(request, capabilities, (refusal,)).bias == after


def test_packed_sequences_are_cleaned_without_looking_at_pairs():
    length = 64
    mask = masks.Causal() & masks.Segments(np.repeat([0, -1, 1, 2], length // 4))
    request = Request(batch=2, q_len=length, q_heads=4, kv_heads=2, head_dim=8, mask=mask)
    inputs = Inputs(**arrays_of(length, length), mask=mask.canonical())
    program = jax.make_jaxpr(lambda inputs: CleanHiddenSlots().prepare(inputs, request, request))(inputs)
    assert f"{length},{length}" not in str(program)
