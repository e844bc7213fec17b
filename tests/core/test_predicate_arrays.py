"""Predicates whose function holds arrays: kernels that evaluate it in registers are told so, and caches hold none."""

import copy
import functools
import gc
import itertools
import pickle
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernelry
from kernelry import masks
from kernelry.errors import ArgumentError, KernelRefusedError
from kernelry.masks.form import FunctionRef
from kernelry.plugin import Atom, AtomKind, Policy, RefusalCode, array_refusals, static_block_map

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
    mask = masks.Predicate(lambda query, kv: table[query % 6] <= kv)
    (refusal,) = array_refusals(mask.atom)
    assert "shape (6,)" in refusal.detail


def test_an_array_of_the_program_that_is_being_traced_is_an_array():
    found = []

    def program(table):
        mask = masks.Predicate(lambda query, kv: table[query % 6] <= kv)
        found.extend(array_refusals(mask.atom))
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


Q = jnp.asarray(np.random.default_rng(0).standard_normal((2, 24, 2, 8)), jnp.float32)
REACH = jnp.asarray(5)
NEAR = np.abs(np.arange(24)[:, None] - np.arange(24)) < 5


def _squares(q, reach, kernel, wrapped=lambda mask: mask):
    mask = wrapped(masks.Predicate(lambda query, kv: abs(query - kv) < reach))
    return jnp.square(kernelry.attention(q, q, q, mask=mask, kernel=kernel)).sum()


PROGRAMS = {
    "jit": lambda f: jax.jit(f)(Q, REACH),
    "gradient": lambda f: jax.jit(jax.grad(f))(Q, REACH),
    "gradient of jit": lambda f: jax.grad(jax.jit(f))(Q, REACH),
    "remat": lambda f: jax.jit(jax.grad(jax.checkpoint(f)))(Q, REACH),
    "vmap": lambda f: jax.jit(jax.vmap(jax.grad(f), in_axes=(None, 0)))(Q, REACH[None])[0],
    "scan": lambda f: jax.jit(jax.grad(lambda q: jax.lax.scan(lambda c, x: (c + f(q, x), None), 0.0, REACH[None])[0]))(
        Q
    ),
}


REPEATED = [
    pytest.param(kernel, program, marks=pytest.mark.sweep)
    for kernel in ("dot_product", "blockwise")
    for program in PROGRAMS
    if (kernel, program) not in {("blockwise", "gradient of jit"), ("blockwise", "vmap")}
]


@pytest.mark.parametrize(("kernel", "program"), [("blockwise", "gradient of jit"), ("blockwise", "vmap"), *REPEATED])
def test_a_function_may_hold_an_array_that_is_being_traced(kernel, program):
    def plainly(q, reach):
        return jnp.square(kernelry.attention(q, q, q, mask=masks.Dense(NEAR), kernel="dot_product")).sum()

    with kernelry.use(tiling={"block_q": 8, "block_kv": 8} if kernel == "blockwise" else {}):
        found = PROGRAMS[program](lambda q, reach: _squares(q, reach, kernel))
    np.testing.assert_allclose(np.asarray(found), np.asarray(PROGRAMS[program](plainly)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("wrapped", [lambda m: m | masks.SlidingWindow(1), lambda m: ~m & masks.Causal()])
def test_composites_with_such_a_function_are_served_too(wrapped):
    found, expected = (
        jax.jit(lambda q, reach, kernel=kernel: _squares(q, reach, kernel, wrapped))(Q, REACH)
        for kernel in ("blockwise", "dot_product")
    )
    np.testing.assert_allclose(float(found), float(expected), rtol=1e-5)


def test_auto_serves_such_a_function_at_every_length():
    for length in (32, 800):
        with kernelry.record() as made:
            jax.eval_shape(lambda q, reach: _squares(q, reach, "auto"), jnp.ones((1, length, 1, 8)), REACH)
        assert made[0].kernel == ("dot_product" if length < 768 else "blockwise")


def test_a_kernel_that_cannot_serve_such_a_function_says_what_to_pass():
    with (
        kernelry.use(policy=Policy.shipped(forbidden_adapters=["dense_mask"])),
        pytest.raises(KernelRefusedError) as error,
    ):
        jax.eval_shape(lambda q, reach: _squares(q, reach, "blockwise"), Q, REACH)
    assert "holds an array that is being traced; pass it as an operand: Predicate(fn, array)" in str(error.value)


@pytest.mark.parametrize("function", [looks_up_on_device, shifted_by_an_array, looks_up])
def test_functions_that_hold_arrays_which_are_known_are_served_as_they_are(function):
    with kernelry.record() as made:
        found, expected = (
            jax.jit(lambda q, k=k: kernelry.attention(q, q, q, mask=masks.Predicate(function), kernel=k))(Q)
            for k in ("blockwise", "dot_product")
        )
    assert not made[0].plan.steps
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-5)


def test_block_maps_and_whole_masks_of_such_a_function():
    found = {}

    def program(reach):
        mask = masks.Causal() & masks.Predicate(lambda query, kv: abs(query - kv) < reach)
        found["blocks"] = mask.block_map(24, 24, 8, 8)
        return mask.materialize(24, 24)

    visible = jax.jit(program)(REACH)
    assert np.array_equal(np.asarray(visible)[0, 0], NEAR & np.tri(24, dtype=bool))
    assert found["blocks"].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


class Table(np.ndarray):
    """An array that can be asked whether it is still alive."""


def holding(table):
    """A predicate whose function holds an array that tracing it does not find, so that every kernel takes it."""
    return masks.Predicate(lambda query, kv: kv - query <= len(table))


def attended(kernel, transform):
    def attend(mask):
        def call(x):
            return kernelry.attention(x, x, x, mask=mask, kernel=kernel).sum()

        transform(call)(QUERY)

    return attend


QUERY = jnp.ones((1, 16, 1, 8))
USES = {
    "form": lambda mask: hash((mask & masks.Causal()).form),
    "canonical": lambda mask: hash((~mask | masks.Causal()).form),
    "request": lambda mask: hash(kernelry.Request(q_len=16, mask=mask)),
    "resolve": lambda mask: kernelry.resolve(kernelry.Request(q_len=16, mask=mask)),
    "explain": lambda mask: str(kernelry.explain(kernelry.Request(q_len=16, mask=mask))),
    "block_map": lambda mask: mask.block_map(16, 16, 8, 8),
    "materialize": lambda mask: mask.materialize(16, 16),
    **{f"{name} eagerly": attended(name, lambda call: call) for name in ("dot_product", "blockwise")},
    **{
        f"gradient of {name}": attended(name, lambda call: lambda x: jax.eval_shape(jax.grad(call), x))
        for name in ("dot_product", "blockwise")
    },
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_no_cache_keeps_what_a_function_holds(use):
    tables = [np.arange(20).view(Table) for _ in range(5)]
    alive = [weakref.ref(table) for table in tables]
    while tables:
        use(holding(tables.pop()))
    gc.collect()
    assert sum(table() is not None for table in alive) == 0


def test_a_function_that_is_gone_is_not_taken_for_another():
    forms = [holding([]).form for _ in range(20)]  # functions at addresses that were used before
    gc.collect()
    mask = holding([])
    assert mask.form == mask.form
    assert len({*forms, mask.form}) == 21
    assert forms[0] == forms[0]
    assert forms[0].atoms[0].params[0].function is None
    assert "holding" in str(forms[0])


def test_a_request_knows_what_a_function_held_that_is_gone():
    table = jnp.arange(6)
    request = kernelry.Request(
        q_len=16, mask=masks.Causal() | masks.Predicate(lambda query, kv: table[query % 6] <= kv)
    )
    gc.collect()
    (atom,) = (atom for form in request.mask.atoms[0].params for atom in form.atoms if not atom.is_band)
    (refusal,) = array_refusals(atom)
    assert "holds an array of shape (6,)" in refusal.detail


def test_a_function_that_is_gone_and_was_not_asked_is_refused():
    (refusal,) = array_refusals(holding([]).atom)
    assert "is a function that no longer exists; keep the mask while its form is in use" in str(refusal)


def test_equal_functions_stay_equal():
    class Within:
        def near(self, query, kv):
            return query - kv <= 3

    within = Within()
    assert masks.Predicate(within.near).form == masks.Predicate(within.near).form
    assert masks.Predicate(within.near).form != masks.Predicate(Within().near).form
    assert masks.Predicate(within.near).form.atoms[0].params[0].function == within.near


def test_a_function_that_allows_no_weak_reference_is_held():
    class Near:
        __slots__ = ()

        def __call__(self, query, kv):
            return query - kv <= 3

    near = Near()
    held = FunctionRef(near)
    assert held == FunctionRef(near) != FunctionRef(Near())
    assert held.function is near
    kernelry.resolve(kernelry.Request(q_len=16, mask=masks.Predicate(near)))


def test_a_function_defined_anew_under_its_name_is_evaluated_anew(monkeypatch):
    found = []
    for reach in (0, 8):

        def near(query, kv, reach=reach):
            return abs(query - kv) <= reach

        near.__qualname__ = "always"
        monkeypatch.setitem(globals(), "always", near)
        mask = masks.Predicate(near)
        assert mask.form.atoms[0].params == (f"{__name__}:always",)
        found.append(static_block_map((mask,), 16, 16, 8, 8).tolist())
    assert found == [[[1, 0], [0, 1]], [[2, 1], [1, 2]]]


def test_block_maps_are_kept_for_equal_masks():
    mask = masks.Predicate(lambda query, kv: kv <= query) & masks.SlidingWindow(5)
    again = masks.SlidingWindow(5) & mask
    assert static_block_map(mask.canonical(), 16, 16, 8, 8) is static_block_map(again.canonical(), 16, 16, 8, 8)


@pytest.mark.parametrize("kernel", ["auto", "dot_product"])
def test_a_function_that_holds_a_traced_array_leaks_nothing(kernel):
    @jax.jit
    def attend(x, reach):
        mask = masks.Predicate(lambda query, kv: query - kv <= reach)
        return kernelry.attention(x, x, x, mask=mask, kernel=kernel).sum()

    with jax.checking_leaks():
        jax.eval_shape(jax.grad(attend), QUERY, jnp.int32(1))


@pytest.mark.parametrize("write", [pickle.dumps, lambda form: form.to_json()], ids=["pickle", "json"])
def test_a_form_of_an_anonymous_function_says_how_it_can_be_serialised(write):
    mask = masks.Predicate(lambda query, kv: kv <= query) | masks.Causal()
    message = r"<function .*<lambda>> cannot be serialised: it is not importable by name; define it with def at module"
    with pytest.raises(ArgumentError, match=message):
        write(mask.form)
    with pytest.raises(ArgumentError, match=message):
        write(kernelry.Request(q_len=8, mask=mask))


def test_a_form_of_an_anonymous_function_can_be_copied():
    mask = masks.Predicate(lambda query, kv: kv <= query)
    request = kernelry.Request(q_len=8, mask=mask)
    assert copy.copy(request) == copy.deepcopy(request) == request
    assert copy.deepcopy(mask.form) == mask.form


def test_functions_without_a_name_are_ordered_alike_in_every_process():
    class Seen:
        def __call__(self, query, kv):
            return kv <= query

    def before(query, kv, *, reach):
        return kv <= query + reach

    def after(query, kv, *, reach):
        return kv >= query - reach

    functions = [*(functools.partial(f, reach=r) for r in range(3) for f in (before, after)), Seen(), Seen(), Seen()]
    for one, other in itertools.combinations(map(masks.Predicate, functions), 2):
        titles = [atom.params[0].title for atom in (one & other).form.atoms]
        assert titles == [atom.params[0].title for atom in (other & one).form.atoms] == sorted(titles)
        assert "0x" not in f"{one & other} {(one & other).form} {(one | other).form!r}"
