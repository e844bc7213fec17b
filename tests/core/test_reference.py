"""The float64 reference: attention by hand and by plain loops, its gradients by finite differences, its laws."""

import dataclasses
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from kernelry import masks
from kernelry.errors import ArgumentError
from kernelry.testing import reference_attention, reference_gradients, reference_merge

B, T, S, N, K, H, D = 2, 3, 5, 4, 2, 3, 2
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (RNG.standard_normal(shape) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, D)))
D_OUT, D_LSE, SINKS = RNG.standard_normal((B, T, N, D)), RNG.standard_normal((B, N, T)), RNG.standard_normal(N)
BIAS, KEEP = RNG.standard_normal((B, N, T, S)), RNG.random((B, N, T, S)) < 0.6
VISIBLE = RNG.random((B, N, T, S)) < 0.6
VISIBLE[0, 1, 2] = VISIBLE[1, :, 0] = False  # empty rows
VISIBLE[1, :, :, 3] = VISIBLE[0, :2, :, 1] = False  # slots that nobody sees: of all heads, and of one group
MASK = masks.Dense(VISIBLE)
EMPTY = ~VISIBLE.any(axis=3)
DROPOUT = {"dropout_rate": 0.4, "dropout_keep": KEEP}
CASES = {
    "plain": {},
    "scale": {"scale": -0.7},
    "cap": {"soft_cap": 0.8},
    "bias": {"bias": BIAS},
    "sinks": {"sinks": SINKS},
    "dropout": DROPOUT,
    "all": {"scale": 1.3, "soft_cap": 1.1, "bias": BIAS, "sinks": SINKS, **DROPOUT},
    "bias after cap": {"soft_cap": 1.1, "bias": BIAS, "bias_after_cap": True, "sinks": SINKS, **DROPOUT},
}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def _pair(logits, values=(4.0, 8.0), **arguments):
    """One query and two keys with the logits given."""
    key, value = np.reshape(logits, (1, 2, 1, 1)), np.reshape(values, (1, 2, 1, 1))
    found = reference_attention(np.ones((1, 1, 1, 1)), key, value, mask=masks.Full(), **{"scale": 1.0, **arguments})
    return found, found.out.item()


def test_two_keys_worked_out_by_hand():
    found, out = _pair([0.0, math.log(3)])
    np.testing.assert_allclose(out, 0.25 * 4 + 0.75 * 8, **CLOSE)
    statistics = [found.lse.item(), found.max.item(), found.sum.item(), found.max_logits.item()]
    np.testing.assert_allclose(statistics, [math.log(4), math.log(3), 4 / 3, math.log(3)], **CLOSE)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"scale": 2.0}, (4 + 9 * 8) / 10),
        ({"bias": np.array([math.log(3), 0.0])}, 6.0),
        ({"sinks": np.array([math.log(4)])}, 3.5),
        ({"sinks": np.array([-np.inf])}, 7.0),
        ({"sinks": np.array([1e4])}, 0.0),
        ({"sinks": np.array([-1e4])}, 7.0),
        ({"soft_cap": 1e-9}, 6.0),
        ({"dropout_rate": 0.75, "dropout_keep": np.array([False, True])}, 0.75 * 8 * 4),
    ],
)
def test_each_argument_worked_out_by_hand(arguments, expected):
    np.testing.assert_allclose(_pair([0.0, math.log(3)], **arguments)[1], expected, rtol=1e-8)


def test_bias_is_capped_and_sinks_are_not():
    found, out = _pair([0.0, 0.0], bias=np.array([1e9, -1e9]), soft_cap=math.log(2), sinks=np.array([math.log(7.5)]))
    np.testing.assert_allclose(out, (2 * 4 + 0.5 * 8) / (2 + 0.5 + 7.5), **CLOSE)
    np.testing.assert_allclose(found.max_logits.item(), math.log(2), **CLOSE)


def test_a_bias_after_the_cap_is_not_capped():
    cap = math.log(2)
    late = {"soft_cap": cap, "bias_after_cap": True}
    found, out = _pair([1e9, -1e9], bias=np.array([math.log(3), math.log(5)]), **late)
    np.testing.assert_allclose(out, (2 * 3 * 4 + 0.5 * 5 * 8) / (2 * 3 + 0.5 * 5), **CLOSE)
    np.testing.assert_allclose(found.max_logits.item(), cap + math.log(3), **CLOSE)
    assert _pair([0.0, 9.0], bias=np.array([0.0, -1e9]), **late)[1] == 4
    assert _pair([0.0, 9.0], bias=np.array([0.0, -1e9]), soft_cap=cap)[1] > 4


@pytest.mark.parametrize("case", ["plain", "cap", "bias"])
def test_without_cap_or_bias_their_order_changes_nothing(case):
    found, plain = (
        reference_attention(QUERY, KEY, VALUE, mask=MASK, bias_after_cap=after, **CASES[case])
        for after in (True, False)
    )
    for one, other in zip(dataclasses.astuple(found), dataclasses.astuple(plain), strict=True):
        np.testing.assert_array_equal(one, other)


def _looped(
    scale=None, soft_cap=None, bias=None, sinks=None, dropout_rate=0.0, dropout_keep=None, bias_after_cap=False
):
    """Attention and lse by plain loops over (b, n, t, s)."""
    out, lse, largest = np.zeros((B, T, N, D)), np.full((B, N, T), -np.inf), np.full((B, N), -np.inf)
    for b, n, t in np.ndindex(B, N, T):
        logits = {}
        for s in np.flatnonzero(VISIBLE[b, n, t]):
            dot = sum(QUERY[b, t, n, h] * KEY[b, s, n // (N // K), h] for h in range(H))
            logit, added = dot * (1 / math.sqrt(H) if scale is None else scale), 0 if bias is None else bias[b, n, t, s]
            before, after = (0, added) if bias_after_cap else (added, 0)
            logit += before
            logits[s] = after + (logit if soft_cap is None else soft_cap * math.tanh(logit / soft_cap))
        if not logits:
            continue
        total = sum(math.exp(logit) for logit in logits.values())
        lse[b, n, t], largest[b, n] = math.log(total), max(largest[b, n], *logits.values())
        total += 0 if sinks is None else math.exp(sinks[n])
        for s, logit in logits.items():
            kept = dropout_keep[b, n, t, s] / (1 - dropout_rate) if dropout_rate else 1
            out[b, t, n] += math.exp(logit) / total * kept * VALUE[b, s, n // (N // K)]
    return out, lse, largest


@pytest.mark.parametrize("case", CASES)
def test_attention_equals_plain_loops(case):
    found, (out, lse, largest) = (
        reference_attention(QUERY, KEY, VALUE, mask=MASK, **CASES[case]),
        _looped(**CASES[case]),
    )
    np.testing.assert_allclose(found.out, out, **CLOSE)
    np.testing.assert_allclose(found.lse, lse, **CLOSE)
    np.testing.assert_allclose(found.max_logits, largest, **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_the_keys_alone(case):
    found = reference_attention(QUERY, KEY, VALUE, mask=MASK, **CASES[case])
    np.testing.assert_allclose(found.max[~EMPTY] + np.log(found.sum[~EMPTY]), found.lse[~EMPTY], **CLOSE)
    np.testing.assert_array_equal(found.max.max(axis=2), found.max_logits)
    without = {name: value for name, value in CASES[case].items() if name not in ("sinks", *DROPOUT)}
    np.testing.assert_array_equal(found.lse, reference_attention(QUERY, KEY, VALUE, mask=MASK, **without).lse)


@pytest.mark.parametrize("case", CASES)
def test_fully_masked_rows_are_the_identity_of_merge(case):
    found = reference_attention(QUERY, KEY, VALUE, mask=MASK, **CASES[case])
    assert (found.out.swapaxes(1, 2)[EMPTY] == 0).all()
    assert (found.sum[EMPTY] == 0).all()
    assert np.isneginf([found.lse[EMPTY], found.max[EMPTY]]).all()


def test_rows_whose_logits_are_all_minus_infinity_are_empty():
    found, out = _pair([1.0, 2.0], bias=np.full(2, -np.inf), sinks=np.zeros(1))
    assert (out, found.sum.item(), found.lse.item()) == (0, 0, -np.inf)


@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(0, T, S), (B, 0, S), (B, T, 0)])
def test_nothing_gives_zeros_of_the_right_shape(batch, q_len, kv_len):
    query, key, value = np.ones((batch, q_len, N, H)), np.ones((batch, kv_len, K, H)), np.ones((batch, kv_len, K, D))
    call = {"mask": masks.Full(), "sinks": SINKS, "bias": np.ones((1, N, 1, 1)), "soft_cap": 2.0}
    found = reference_attention(query, key, value, **call)
    np.testing.assert_array_equal(found.out, np.zeros((batch, q_len, N, D)))
    np.testing.assert_array_equal(found.lse, np.full((batch, N, q_len), -np.inf))
    np.testing.assert_array_equal(found.max_logits, np.full((batch, N), -np.inf))
    gradients = reference_gradients(query, key, value, d_out=np.ones((batch, q_len, N, D)), **call)
    for found, operand in zip(dataclasses.astuple(gradients), (query, key, value, call["bias"], SINKS), strict=True):
        np.testing.assert_array_equal(found, np.zeros_like(operand))


def test_half_precision_arrays_are_read_exactly():
    half = [jnp.asarray(array, "bfloat16") for array in (QUERY, KEY, VALUE)]
    found = reference_attention(*half, mask=MASK).out
    assert found.dtype == np.float64
    exact = [np.asarray(array.astype("float32"), np.float64) for array in half]
    np.testing.assert_array_equal(found, reference_attention(*exact, mask=MASK).out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"dropout_rate": 0.5}, "needs dropout_keep"), ({"dropout_rate": 1.0, "dropout_keep": KEEP}, r"\[0, 1\)")],
)
def test_dropout_that_means_nothing_is_an_error(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        reference_attention(QUERY, KEY, VALUE, mask=MASK, **arguments)


def _operands(bias=BIAS):
    return {"query": QUERY, "key": KEY, "value": VALUE, "bias": bias, "sinks": SINKS}


def _slopes(loss, operands, name):
    """The gradient of `loss` with respect to one operand by central differences, entry by entry."""
    step, found = 1e-5, np.zeros(np.shape(operands[name]))
    for index in np.ndindex(found.shape):
        ends = []
        for sign in (1, -1):
            moved = np.array(operands[name])
            moved[index] += sign * step
            ends.append(loss(**{**operands, name: moved}))
        found[index] = (ends[0] - ends[1]) / (2 * step)
    return found


def _check_slopes(names, operands, d_lse=None, **fixed):
    def loss(**operands):
        found = reference_attention(**operands, **fixed)
        return (found.out * D_OUT).sum() + (0 if d_lse is None else (found.lse * d_lse)[~EMPTY].sum())

    cotangents = {"d_out": D_OUT} if d_lse is None else {"d_out": D_OUT, "d_lse": d_lse}
    gradients = reference_gradients(**operands, **fixed, **cotangents)
    for name in names:
        found, slopes = getattr(gradients, name), _slopes(loss, operands, name)
        assert np.abs(slopes).max() > 1e-3
        np.testing.assert_allclose(found, slopes, rtol=1e-7, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_finite_differences(case):
    case = CASES[case]
    operands = {name: array for name, array in _operands().items() if name in ("query", "key", "value") or name in case}
    fixed = {name: value for name, value in case.items() if name not in operands}
    _check_slopes(operands, operands, mask=MASK, **fixed)


@pytest.mark.parametrize("shape", [(), (1,), (S,), (T, 1), (N, 1, S), (B, 1, T, 1), (1, N, 1, S), (B, N, T, S)])
def test_bias_gradient_has_the_shape_of_the_bias(shape):
    operands = _operands(np.random.default_rng(1).standard_normal(shape))
    assert reference_gradients(**operands, d_out=D_OUT, mask=MASK).bias.shape == shape
    _check_slopes(["bias"], operands, mask=MASK, soft_cap=1.5, **DROPOUT)


def test_gradients_of_lse_equal_finite_differences():
    operands = {name: array for name, array in _operands().items() if name != "sinks"}
    _check_slopes(["query", "key", "bias"], operands, mask=MASK, soft_cap=1.5, d_lse=D_LSE, **DROPOUT)


def test_gradient_of_lse_with_sinks_is_an_error():
    with pytest.raises(ArgumentError, match="no part contains sinks"):
        reference_gradients(**_operands(), d_out=D_OUT, mask=MASK, d_lse=D_LSE)


def test_gradients_of_what_is_absent_are_none():
    found = reference_gradients(QUERY, KEY, VALUE, d_out=D_OUT, mask=MASK)
    assert (found.bias, found.sinks) == (None, None)


def _poisoned(poison):
    """The operands and cotangents with a poison wherever no row may look, and what is clean of it."""
    seen = VISIBLE.any(axis=2).reshape(B, K, N // K, S).any(axis=2).swapaxes(1, 2)
    sees = ~EMPTY.swapaxes(1, 2)
    bad = [np.where(where[..., None], array, poison) for where, array in ((sees, QUERY), (seen, KEY), (seen, VALUE))]
    bad = dict(zip(("query", "key", "value"), bad, strict=True), bias=np.where(VISIBLE, BIAS, poison))
    return bad, np.where(sees[..., None], D_OUT, poison), np.where(EMPTY, poison, D_LSE), (sees, seen)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("order", [{}, {"bias_after_cap": True}], ids=["bias before cap", "bias after cap"])
def test_hidden_slots_take_no_part(poison, order):
    capped = {"mask": MASK, "soft_cap": 1.5, **order}
    bad, d_out, d_lse, _ = _poisoned(poison)
    clean = {name: array for name, array in _operands().items() if name != "sinks"}
    pairs = itertools.chain(
        zip(*(dataclasses.astuple(reference_attention(**a, **capped)) for a in (bad, clean)), strict=True),
        zip(
            dataclasses.astuple(reference_gradients(**bad, d_out=d_out, d_lse=d_lse, **capped))[:4],
            dataclasses.astuple(reference_gradients(**clean, d_out=D_OUT, d_lse=D_LSE, **capped))[:4],
            strict=True,
        ),
    )
    for found, expected in pairs:
        np.testing.assert_array_equal(found, expected)


def test_gradients_of_hidden_slots_and_empty_rows_are_exactly_zero():
    bad, d_out, _, (sees, seen) = _poisoned(np.nan)
    found = reference_gradients(**bad, sinks=SINKS, d_out=d_out, mask=MASK)
    hidden = found.query[~sees], found.key[~seen], found.value[~seen], found.bias[~VISIBLE]
    assert all(array.size and (array == 0).all() for array in hidden)


def test_gradients_where_nothing_is_seen_are_exactly_zero_sinks_included():
    found = reference_gradients(**_operands(), d_out=D_OUT, mask=~masks.Full())
    assert all((array == 0).all() for array in dataclasses.astuple(found))


def _parts(bounds, **arguments):
    """Attention over runs of the keys."""
    return [
        reference_attention(
            QUERY,
            KEY[:, low:high],
            VALUE[:, low:high],
            mask=masks.Dense(VISIBLE[..., low:high]),
            bias=BIAS[..., low:high],
            soft_cap=1.5,
            **arguments,
        )
        for low, high in itertools.pairwise(bounds)
    ]


def _check_equal(found, expected):
    for field in dataclasses.fields(expected):
        np.testing.assert_allclose(getattr(found, field.name), getattr(expected, field.name), **CLOSE)


@pytest.mark.parametrize("bounds", [(0, 2, 5), (0, 1, 4, 5), (0, 0, 3, 3, 5), (0, 5)])
@pytest.mark.parametrize("sinks", [None, SINKS])
def test_merged_parts_equal_attention_over_the_concatenated_keys(bounds, sinks):
    whole = reference_attention(QUERY, KEY, VALUE, mask=MASK, bias=BIAS, soft_cap=1.5, sinks=sinks)
    _check_equal(reference_merge(_parts(bounds), sinks=sinks), whole)


def test_merge_is_associative_and_commutative():
    first, second, third = _parts((0, 1, 3, 5))
    merged = reference_merge([first, second, third])
    _check_equal(reference_merge([first, reference_merge([second, third])]), merged)
    _check_equal(reference_merge([third, first, second]), merged)


def test_merge_survives_statistics_far_apart():
    low, high = (
        reference_attention(QUERY, KEY, VALUE, mask=MASK, bias=np.full(1, shift)) for shift in (-2000.0, 2000.0)
    )
    _check_equal(reference_merge([low, high]), high)


def test_merge_of_no_parts_is_an_error():
    with pytest.raises(ArgumentError, match="no parts"):
        reference_merge([])


def test_unnormalised_outputs_add_up_after_rescaling():
    whole, parts = reference_merge(_parts((0, 2, 5))), _parts((0, 2, 5))
    scale = [np.exp(part.max - np.where(EMPTY, 0, whole.max)) for part in parts]
    total = sum((part.out.swapaxes(1, 2) * (part.sum * by)[..., None]) for part, by in zip(parts, scale, strict=True))
    np.testing.assert_allclose(whole.out.swapaxes(1, 2) * whole.sum[..., None], total, **CLOSE)


def test_gradients_of_merged_parts_equal_those_of_the_whole():
    bounds = (0, 2, 5)
    whole = reference_merge(_parts(bounds))
    found = []
    for part, (low, high) in zip(_parts(bounds), itertools.pairwise(bounds), strict=True):
        weight = np.exp(part.lse - np.where(EMPTY, 0, whole.lse))
        d_lse = weight * ((part.out - whole.out) * D_OUT).sum(axis=-1).swapaxes(1, 2)
        operands = {"query": QUERY, "key": KEY[:, low:high], "value": VALUE[:, low:high], "bias": BIAS[..., low:high]}
        cotangents = {"d_out": weight.swapaxes(1, 2)[..., None] * D_OUT, "d_lse": d_lse}
        mask = masks.Dense(VISIBLE[..., low:high])
        found.append(reference_gradients(**operands, **cotangents, mask=mask, soft_cap=1.5))
    wanted = reference_gradients(QUERY, KEY, VALUE, bias=BIAS, d_out=D_OUT, mask=MASK, soft_cap=1.5)
    np.testing.assert_allclose(sum(part.query for part in found), wanted.query, **CLOSE)
    for name, axis in (("key", 1), ("value", 1), ("bias", 3)):
        joined = np.concatenate([getattr(part, name) for part in found], axis=axis)
        np.testing.assert_allclose(joined, getattr(wanted, name), **CLOSE)


@pytest.mark.parametrize("mask", [masks.Causal(), masks.SlidingWindow(1, 1), masks.Chunked(2), masks.BlockCausal(3)])
def test_attention_depends_on_differences_of_positions_alone(mask):
    here = reference_attention(QUERY, KEY, VALUE, mask=mask.at(query_offset=2, kv_offset=0))
    there = reference_attention(QUERY, KEY, VALUE, mask=mask.at(query_offset=14, kv_offset=12))  # a multiple of sizes
    _check_equal(there, here)
    elsewhere = reference_attention(QUERY, KEY, VALUE, mask=mask.at(query_offset=14, kv_offset=9))
    assert (elsewhere.lse != here.lse).any()


def test_attention_at_permuted_positions_is_the_permuted_attention():
    order = np.array([3, 0, 4, 2, 1])
    query = np.concatenate([QUERY, QUERY[:, :2]], axis=1)
    plain = reference_attention(query, KEY, VALUE, mask=masks.Causal())
    mask = masks.Causal().at(query_positions=order, kv_positions=order)
    permuted = reference_attention(query[:, order], KEY[:, order], VALUE[:, order], mask=mask)
    np.testing.assert_allclose(permuted.out, plain.out[:, order], **CLOSE)


def test_decode_steps_equal_the_rows_of_the_whole():
    whole = reference_attention(QUERY, KEY, VALUE, mask=masks.SlidingWindow(2).at(query_offset=2)).out
    for t in range(T):
        step = reference_attention(QUERY[:, t : t + 1], KEY, VALUE, mask=masks.SlidingWindow(2).at(query_offset=t + 2))
        np.testing.assert_allclose(step.out, whole[:, t : t + 1], **CLOSE)
