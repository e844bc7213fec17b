"""Predicates whose function holds arrays: kernels that evaluate it in registers are told so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernelry import masks
from kernelry.plugin import Atom, AtomKind, RefusalCode, array_refusals

pytestmark = pytest.mark.versions

TABLE = np.arange(8)
ON_DEVICE = jnp.arange(5)
SHIFT = jnp.asarray(3)
NUMPY_SHIFT = np.int32(3)


def looks_up(query, kv):
    return jnp.asarray(TABLE)[query % 8] <= kv


def looks_up_on_device(query, kv):
    return ON_DEVICE[query % 5] <= kv


def in_an_inner_program(query, kv):
    return jax.jit(looks_up)(query, kv)


def in_a_branch(query, kv):
    return jax.lax.cond(query.sum() > 0, lambda: looks_up(query, kv), lambda: query >= kv)


def shifted_by_an_array(query, kv):
    return query - kv > SHIFT


def shifted_by_a_number(query, kv):
    return query - kv > NUMPY_SHIFT


def makes_its_own_array(query, kv):
    return (query[..., None] == jnp.arange(8)).any(axis=-1) | (query >= kv)


def always(query, kv):
    return True


def fails(query, kv):
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("function", "shape", "remedy"),
    [
        (looks_up, "(8,)", "operand of Predicate"),
        (looks_up_on_device, "(5,)", "operand of Predicate"),
        (in_an_inner_program, "(8,)", "operand of Predicate"),
        (in_a_branch, "(8,)", "operand of Predicate"),
        (shifted_by_an_array, "()", "Python number"),
    ],
)
def test_a_function_that_holds_an_array_is_named_with_its_shape(function, shape, remedy):
    (refusal,) = array_refusals(masks.Predicate(function).atom)
    assert refusal.code is RefusalCode.MASK_ATOM
    assert function.__name__ in refusal.detail
    assert f"holds an array of shape {shape}" in refusal.detail
    assert remedy in refusal.remedy


@pytest.mark.parametrize("function", [shifted_by_a_number, makes_its_own_array, always, fails])
def test_a_function_of_positions_alone_is_not_refused(function):
    assert not list(array_refusals(masks.Predicate(function).atom))


def test_a_function_without_a_name_is_looked_at_too():
    table = jnp.arange(6)
    (refusal,) = array_refusals(masks.Predicate(lambda query, kv: table[query % 6] <= kv).atom)
    assert "shape (6,)" in refusal.detail


def test_an_array_of_the_program_that_is_being_traced_is_an_array():
    found = []

    def program(table):
        found.extend(array_refusals(masks.Predicate(lambda query, kv: table[query % 6] <= kv).atom))
        return table

    jax.eval_shape(program, jnp.arange(6))
    assert "shape (6,)" in found[0].detail


def test_operands_are_arrays_and_other_atoms_have_no_function():
    (refusal,) = array_refusals(masks.Predicate(looks_up, jnp.ones((1, 1, 1, 1))).atom)
    assert "depends on arrays" in refusal.detail
    assert not list(array_refusals(masks.Causal().atom))


def test_a_function_that_is_nowhere_to_be_found_is_not_judged():
    assert not list(array_refusals(Atom(AtomKind.PREDICATE, ("no.such.module:function",))))


def test_the_answer_is_kept():
    traced = []

    def counted(query, kv):
        traced.append(1)
        return query >= kv

    for _ in range(3):
        list(array_refusals(masks.Predicate(counted).atom))
    assert len(traced) == 1


def test_a_constant_answer_is_an_array_of_the_module_that_asks():
    for module, kind in ((np, np.ndarray), (jnp, jax.Array)):
        visible = masks.Predicate(always).evaluate(masks.Side.query(3, module), masks.Side.kv(4, module))
        assert isinstance(visible, kind)
        np.testing.assert_array_equal(visible, np.ones((1, 1, 3, 4), bool))
