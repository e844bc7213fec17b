"""Predicates that hold arrays, or are constant, through the kernels that evaluate them in registers."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import sweep_but

import kernelry
from kernelry import masks, testing
from kernelry.errors import KernelRefusedError
from kernelry.plugin import Mask, pytree

LENGTH = 56
TABLE = np.random.default_rng(0).integers(0, LENGTH, LENGTH)
SHIFT = jnp.asarray(9)
SMALL = {"block_q": 16, "block_kv": 16}


def looks_up(query, kv):
    return (jnp.asarray(TABLE)[query % LENGTH] <= kv) | (query == kv)


def shifted(query, kv):
    return query - kv <= SHIFT


def everything(query, kv):
    return True


def nothing(query, kv):
    return np.False_


DENSE, EVALUATED = ["dense_mask"], []
STEPS = {looks_up: DENSE, shifted: DENSE, everything: EVALUATED, nothing: EVALUATED}
PLANS = [
    *((masks.Predicate(function), steps) for function, steps in STEPS.items()),
    (masks.SlidingWindow(5) | masks.Predicate(looks_up), DENSE),
]


def test_one_that_holds_an_array_is_a_dense_mask_and_a_constant_one_is_evaluated():
    rows = {"q_heads": 2, "kv_heads": 1, "head_dim": 32, "kv_len": LENGTH, "target": "cpu", "interpret": True}
    wrong = []
    for kernel, facts in (("pallas_flash", {"q_len": LENGTH}), ("pallas_decode", {"q_len": 1, "mode": "decode"})):
        for mask, wanted in PLANS:
            placed = mask.at(query_offset=LENGTH - facts["q_len"])
            plan = kernelry.resolve(kernelry.Request(**rows, **facts, mask=placed), kernel=kernel).plan
            if [step.adapter.name for step in plan.steps] != wanted:
                wrong.append((kernel, mask))
    assert not wrong


@pytest.mark.parametrize("function", sweep_but(STEPS, looks_up, nothing))
def test_pallas_flash_agrees_with_dense(function, make_arrays, check_against_dense):
    mask = masks.Causal() & masks.Predicate(function)
    plan = check_against_dense("pallas_flash", make_arrays(LENGTH), mask=mask, tiling=SMALL)
    assert [step.adapter.name for step in plan.steps] == STEPS[function]


@pytest.mark.parametrize("function", sweep_but(STEPS, shifted, everything))
def test_pallas_decode_does_likewise(function, make_arrays):
    query, key, value, _ = make_arrays(1, LENGTH, batch=2)
    mask = masks.Predicate(function).at(query_offset=jnp.asarray([LENGTH - 1, 20]))

    @jax.jit
    def attend(query, key, value):
        return kernelry.attention(query, key, value, mask=mask, mode="decode", kernel="pallas_decode")

    with testing.interpret(), kernelry.use(tiling={"block_kv": 16, "splits": 2}), kernelry.record() as resolutions:
        found = attend(query, key, value)
    assert [step.adapter.name for step in resolutions[0].plan.steps] == STEPS[function]
    wanted = testing.reference_attention(query, key, value, mask=mask).out
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.sweep
def test_inside_a_disjunction_it_is_seen_too(make_arrays, check_against_dense):
    mask = masks.SlidingWindow(5) | masks.Predicate(looks_up)
    plan = check_against_dense("pallas_flash", make_arrays(LENGTH), mask=mask, tiling=SMALL)
    assert [step.adapter.name for step in plan.steps] == ["dense_mask"]


@pytest.mark.parametrize("mask", [masks.Predicate(looks_up), ~masks.Predicate(looks_up)])
def test_splash_which_takes_no_dense_mask_refuses_it(mask, make_arrays):
    query, key, value, _ = make_arrays(256, head_dim=128)
    message = r"looks_up\).* holds an array of shape \(56,\); pass it as an operand of Predicate"
    with testing.interpret(), pytest.raises(KernelRefusedError, match=message):
        kernelry.attention(query, key, value, mask=mask & masks.Causal(), kernel="splash")


def test_splash_evaluates_a_constant_one(make_arrays, check_against_dense):
    mask = masks.Causal() & masks.Predicate(everything)
    check_against_dense("splash", make_arrays(256, head_dim=128), mask=mask)


class Table(np.ndarray):
    """An array that can be asked whether it is still alive."""


def test_no_kernel_keeps_what_a_function_holds(make_arrays):
    query = make_arrays(128, head_dim=128)[0]
    alive = {}
    for kernel in ("splash", "tokamax_splash", "pallas_flash", "blockwise"):
        table = np.arange(200).view(Table)
        alive[kernel] = weakref.ref(table)
        mask = masks.Predicate(lambda query, kv, table=table: kv - query <= len(table))

        def call(query, kernel=kernel, mask=mask):
            return kernelry.attention(query, query, query, mask=mask, kernel=kernel).sum()

        with testing.interpret():
            jax.eval_shape(jax.grad(call), query)
        del table, mask, call
    jax.clear_caches()  # JAX keeps what the vendors' kernels are made of
    gc.collect()
    assert {kernel for kernel, table in alive.items() if table() is not None} == set()


@pytree()
@dataclasses.dataclass(frozen=True)
class LooksUp(Mask):
    """A third party's mask that depends on nothing but positions, and on a table where it is told to."""

    table: bool

    word = "looks_up"
    positional = True

    def evaluate(self, query, kv):
        return looks_up(query.positions, kv.positions) if self.table else kv.positions <= query.positions + 2


@pytest.mark.parametrize("kernel", ["splash", "tokamax_splash", "pallas_flash", "pallas_decode"])
def test_a_custom_mask_is_a_predicate_where_it_needs_no_array(kernel):
    facts = {"q_len": 1, "mode": "decode"} if kernel == "pallas_decode" else {"q_len": 256}
    facts |= {"kv_len": 256, "head_dim": 128, "target": "cpu", "interpret": True}
    for table in (True, False):
        mask = (LooksUp(table) & masks.Causal()).at(query_offset=256 - facts["q_len"])
        found = kernelry.explain(kernelry.Request(**facts, mask=mask), kernel=kernel)
        alone = found.plan is not None and not any(step.adapter.name == "dense_mask" for step in found.plan.steps)
        assert alone != table


def test_splash_evaluates_a_custom_mask(make_arrays, check_against_dense):
    check_against_dense("splash", make_arrays(256, head_dim=128), mask=LooksUp(table=False) & ~masks.Chunked(64))
