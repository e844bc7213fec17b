"""What `kernelry bench` computes: work, quartiles, errors, and where kernels cross."""

import itertools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mask_strategies import BATCH, KV_HEADS, Q_HEADS, placed_masks

import kernelry
from kernelry.bench import turns, work
from kernelry.bench.cases import Pass, cases_of
from kernelry.bench.crossings import crossings_of
from kernelry.bench.programs import lowered_kernel, of_pass
from kernelry.bench.shapes import ACCELERATOR, CPU, SHAPES, named_cases, shape_of
from kernelry.bench.truth import Truth, dense
from kernelry.bench.turns import Program, quartiles, take_turns
from kernelry.config.layer import AttentionConfig
from kernelry.errors import ArgumentError
from kernelry.masks import Causal, Full, Segments
from kernelry.models.model import config_of
from kernelry.phases.model_shape import ModelShape
from kernelry.request.target import Target
from kernelry.testing import reference_attention, reference_mask

HERE = Target("cpu")
HEAD_DIM, VALUE_DIM = 8, 4
SMALL = {"small": 32, "small-window": 300, "small-sinks": 160, "small-packed": 64, "small-mla-decode": 32}
"""Lengths at which masks still hide something, and nothing takes long."""
_SAMPLED = ("small-sinks", "small-mla-decode")


def brute_force(mask, mode, q_len, kv_len):
    """FLOPs and bytes of float32, pair by pair."""
    visible = reference_mask(mask, BATCH, Q_HEADS, q_len, kv_len)
    flops = channels = 0
    for _ in range(int(visible.sum())):
        channels = HEAD_DIM + VALUE_DIM
        if mode == "train":  # d_value, d_probabilities, d_query, d_key
            channels += 2 * VALUE_DIM + 2 * HEAD_DIM
        flops += 2 * channels
    rows, columns = BATCH * q_len * Q_HEADS, BATCH * kv_len * KV_HEADS
    asking = int(visible.any(axis=3).sum())
    read = int(visible.reshape(BATCH, KV_HEADS, -1, q_len, kv_len).any(axis=(2, 3)).sum())
    numbers = asking * HEAD_DIM + rows * VALUE_DIM + read * (HEAD_DIM + VALUE_DIM)
    if mode == "train":
        numbers += asking * VALUE_DIM + rows * HEAD_DIM + columns * (HEAD_DIM + VALUE_DIM)
    return flops, 4 * numbers


@pytest.mark.parametrize("mode", ["prefill", "train"])
@given(placed=placed_masks())
def test_flops_and_bytes_are_those_of_a_count_of_all_pairs(mode, placed):
    mask, q_len, kv_len = placed
    request = kernelry.Request(
        mode=mode, batch=BATCH, q_len=q_len, kv_len=kv_len, q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM,
        value_dim=VALUE_DIM, mask=mask,
    )  # fmt: skip
    found = work.work_of(request, mask)
    assert found.assumed == ()
    assert (found.flops, found.bytes) == pytest.approx(brute_force(mask, mode, q_len, kv_len))


def test_work_is_counted_in_parts_of_any_size(monkeypatch):
    [case] = named_cases(["small-packed"], HERE, lengths=[64], passes=[Pass.FORWARD])
    mask = case.mask_of(case.arguments())
    whole = work.work_of(case.request, mask)
    monkeypatch.setattr(work, "_CHUNK", 100)
    assert work.work_of(case.request, mask) == whole
    monkeypatch.setattr(work, "_MOST_PAIRS", 100)
    assert work.work_of(case.request, mask).assumed == ("segments",)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12))
def test_quartiles_are_numpys(values):
    low, median, high = quartiles(values)
    assert (low, median, high) == pytest.approx(tuple(np.quantile(values, (0.25, 0.5, 0.75))))
    assert median == statistics.median(values)


# Taking turns


class Clock:
    """Time that passes only when a program runs."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def program(self, name, milliseconds, **more):
        def call():
            self.now += milliseconds / 1e3
            self.calls.append(name)

        return Program(name, call, **more)


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(turns.time, "perf_counter", lambda: found.now)
    return found


def test_programs_take_turns_back_and_forth(clock):
    programs = [clock.program("a", 20.0), clock.program("b", 40.0)]
    for each in programs:
        each.warm_up()
    clock.calls.clear()
    take_turns(programs, 3)
    assert clock.calls == ["a", "b", "b", "a", "a", "b"]
    assert [each.median for each in programs] == pytest.approx([20.0, 40.0])


def test_a_short_call_is_warmed_up_in_each_turn_and_timed_often(clock):
    program = clock.program("short", 0.5)
    program.warm_up()
    clock.calls.clear()
    program.take_turn()
    assert len(clock.calls) == 6 + 20
    assert program.times == pytest.approx([0.5])


def test_after_the_end_no_other_round_is_begun(clock):
    programs = [clock.program("a", 20.0), clock.program("b", 20.0)]
    for each in programs:
        each.warm_up()
    take_turns(programs, 5, ends=clock.now + 0.1)
    assert [len(each.times) for each in programs] == [3, 3]
    take_turns(programs, 5, ends=0.0)
    assert [len(each.times) for each in programs] == [4, 4]


# Crossings

LENGTHS = (64, 128, 256, 512)
times_of_kernels = st.dictionaries(
    st.sampled_from("abcd"),
    st.fixed_dictionaries({}, optional={length: st.floats(0.1, 100.0) for length in LENGTHS}),
    min_size=1,
)


def interpolated(times, length):
    """The time of each kernel at a length between those that were timed, by lines on logarithmic axes."""
    low = max(each for each in LENGTHS if each <= length)
    high = min(each for each in LENGTHS if each >= length)
    found = {}
    for name, each in times.items():
        if low in each and high in each:
            share = 0 if low == high else math.log(length / low) / math.log(high / low)
            found[name] = math.exp(math.log(each[low]) * (1 - share) + math.log(each[high]) * share)
    return found


def test_two_lines_cross_where_their_times_are_equal():
    times = {"flat": {64: 4.0, 256: 4.0}, "steep": {64: 1.0, 256: 16.0}}
    [crossing] = crossings_of(times)
    assert (crossing.before, crossing.after) == ("steep", "flat")
    assert crossing.length == pytest.approx(128)
    assert crossing.milliseconds == pytest.approx(4.0)
    assert str(crossing) == "flat is faster than steep from 128 on"


@given(times_of_kernels)
def test_between_crossings_the_fastest_kernel_stays_the_fastest(times):
    for low, high in itertools.pairwise(LENGTHS):
        here = {name: {at: each[at] for at in (low, high) if at in each} for name, each in times.items()}
        found = list(crossings_of(here))
        edges = [low, *(crossing.length for crossing in found), high]
        assert edges == sorted(edges)
        for crossing in found:
            at = interpolated(here, min(max(crossing.length, low), high))
            assert at[crossing.before] == pytest.approx(at[crossing.after], rel=1e-6)
            assert at[crossing.before] == pytest.approx(min(at.values()), rel=1e-6)
        names = [crossing.before for crossing in found[:1]] + [crossing.after for crossing in found]
        for name, start, end in zip(names, edges, edges[1:], strict=False):
            middle = interpolated(here, math.sqrt(start * end))
            assert middle[name] <= min(middle.values()) * (1 + 1e-6)


# Named shapes


@pytest.mark.parametrize("name", SHAPES)
def test_every_named_shape_has_the_calls_that_it_says(name):
    shape = shape_of(name)
    cases = list(shape.cases(name, Target.parse("gpu:h100")))
    assert [case.which for case in cases] == list(shape.passes)
    for case in cases:
        assert (case.length, case.request.batch, case.request.dtype) == (shape.length, shape.batch, shape.dtype)
    assert (name in CPU) == name.startswith("small")


def test_named_shapes_are_what_their_models_ask():
    asked = {name: config_of(shape.layer()) for name, shape in ACCELERATOR.items()}
    assert (asked["gemma-2-local"].window, asked["gemma-2-local"].soft_cap) == (4096, 50.0)
    assert asked["gemma-2-global"].window is None
    assert asked["gpt-oss-local"].sinks
    assert asked["gpt-oss-global"].sinks
    absorbed, plain = asked["deepseek-mla-decode"], asked["deepseek-mla"]
    assert (absorbed.kv_heads, absorbed.head_dim, absorbed.value_dim) == (1, 576, 512)
    assert (plain.kv_heads, plain.head_dim, plain.value_dim) == (128, 192, 128)
    assert absorbed.scale == plain.scale
    [case] = ACCELERATOR["deepseek-mla-decode"].cases("mla", Target.parse("tpu:v6e"))
    assert case.request.kv_layout == "value_in_key"


def test_documents_keep_their_shares_at_other_lengths():
    for length, ends in ((8192, [1500, 1800, 3900, 4800, 7348]), (1024, [187, 225, 487, 600, 918])):
        [case] = named_cases(["packed"], HERE, lengths=[length], batches=[2], passes=[Pass.FORWARD])
        [ids] = jax.tree.leaves(case.call.mask)
        assert ids.shape == (2, length)
        assert list(np.flatnonzero(np.diff(ids[1])) + 1) == ends


def test_lengths_batches_and_dtypes_are_those_that_were_asked_for():
    cases = named_cases(["vit"], HERE, lengths=[8, 16], batches=[1, 2], dtype="float16", passes=[Pass.FORWARD])
    sizes = [(case.request.q_len, case.request.batch, case.request.dtype) for case in cases]
    assert sizes == [(8, 1, "float16"), (16, 1, "float16"), (8, 2, "float16"), (16, 2, "float16")]
    assert len({case.series for case in cases}) == 2


def test_without_names_the_platform_decides():
    assert {case.name for case in named_cases([], HERE)} == set(CPU)
    assert {case.name for case in named_cases([], Target.parse("tpu:v5e"), passes=[Pass.DECODE])} == {
        name for name, shape in ACCELERATOR.items() if Pass.DECODE in shape.passes
    }
    [asked] = named_cases(["deepseek-mla"], HERE, lengths=[8], passes=[Pass.DECODE])
    assert asked.which is Pass.DECODE


def test_a_shape_without_the_pass_says_which_it_has():
    with pytest.raises(ArgumentError, match=r"'vit' has no decode pass; it has forward, forward\+backward"):
        named_cases(["vit"], HERE, passes=[Pass.DECODE])
    with pytest.raises(ArgumentError, match=r"unknown shape 'lama-3-8b'; did you mean 'llama-3-8b'.*--list"):
        shape_of("lama-3-8b")


# The truth


def of_shape(name, which):
    [case] = named_cases([name], HERE, lengths=[SMALL[name]], batches=[2], passes=[which])
    arguments = case.arguments()
    return case, arguments, Truth(case, arguments)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.sweep] * (name not in _SAMPLED)) for name in SMALL]
)
def test_the_truth_of_a_forward_pass_is_that_of_the_oracle(name):
    which = Pass.DECODE if name.endswith("decode") else Pass.FORWARD
    case, arguments, truth = of_shape(name, which)
    query, key, value, sinks = arguments[:4]
    key, value = dense(key, value)
    config = config_of(shape_of(name).layer())
    oracle = reference_attention(
        query, key, value, mask=case.mask_of(arguments), scale=case.request.scale, soft_cap=config.soft_cap, sinks=sinks
    )
    assert truth.errors(jnp.asarray(oracle.out, jnp.float32)) == {"out": pytest.approx(0, abs=1e-5)}


def test_a_right_kernel_is_right_and_spoilt_gradients_are_not():
    case, arguments, truth = of_shape("small-packed", Pass.BOTH)
    loss, (query, *others) = lowered_kernel(case, "dot_product", arguments).program.compile()(*arguments)
    errors = truth.errors((loss, (query, *others)))
    assert set(errors) == {"d_query", "d_key", "d_value"}
    assert not truth.is_wrong(errors)
    spoilt = {"a block": query.at[:, 40:44].set(0), "heads": query[:, :, ::-1], "NaN": query.at[-1, 3, -1].set(jnp.nan)}
    for what, array in spoilt.items():
        assert truth.is_wrong(truth.errors((loss, (array, *others)))), what
    assert truth.errors((loss, (spoilt["NaN"], *others)))["d_query"] == math.inf


@pytest.mark.sweep
def test_another_mask_is_wrong():
    config = AttentionConfig(q_heads=2, head_dim=8)
    shape = ModelShape(q_len=32, max_len=32, dtype="float32")
    [case] = cases_of(config, shape, HERE, [Pass.FORWARD])
    arguments = case.arguments()
    truth = Truth(case, arguments)

    def attention(mask):
        return of_pass(case, lambda *given: kernelry.attention(*given[:3], mask=mask, kernel="dot_product"))(*arguments)

    assert not truth.is_wrong(truth.errors(attention(Causal())))
    assert truth.is_wrong(truth.errors(attention(Full())))


def test_an_empty_row_is_zero_and_a_bias_is_added_before_the_cap():
    config = AttentionConfig(q_heads=4, kv_heads=2, head_dim=8, soft_cap=2.0, bias=True)
    ids = np.array([[0, 0, 1, 1, -1, -1, 2, 2]] * 2, np.int32)
    shape = ModelShape(q_len=8, max_len=8, batch=2, dtype="float32", mask=Segments(ids))
    [case] = cases_of(config, shape, HERE, [Pass.FORWARD])
    arguments = case.arguments()
    query, key, value, _, bias = arguments[:5]
    oracle = reference_attention(query, key, value, mask=case.mask_of(arguments), soft_cap=2.0, bias=bias)
    truth = Truth(case, arguments)
    assert truth.errors(jnp.asarray(oracle.out, jnp.float32))["out"] < 1e-5
    assert not truth.expected["out"][:, 4:6].any()
