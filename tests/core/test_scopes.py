"""To whom a scope belongs: its task and its thread, until it is left, also around functions that are already jitted."""

import asyncio
import concurrent.futures
import contextlib
import contextvars
import gc

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kernelry
from kernelry.errors import ArgumentError
from kernelry.policy.scope import current_recorders, current_scope
from kernelry.testing import interpret

CODES = {None: 0, "a": 1, "b": 2, "c": 3}
NAMES = {code: name for name, code in CODES.items()}
ZERO = jnp.float32(0)
_attention = jax.jit(kernelry.attention)


@jax.jit
def _traced(x):
    return x + CODES[current_scope().kernel]


@jax.jit
def _inside_another(x):
    return _traced(x) * 1


@jax.jit
def _within_its_own(x):
    with kernelry.use("c"):
        inner = _traced(x)
    return inner * 10 + CODES[current_scope().kernel]


def seen():
    """What is in force: here, for a jitted function, for one inside another, and beside a scope inside of one."""
    here = current_scope().kernel
    traced = [NAMES[int(function(ZERO))] for function in (_traced, _inside_another)]
    inner, outer = divmod(int(_within_its_own(ZERO)), 10)
    assert NAMES[inner] == "c"
    assert [*traced, NAMES[outer]] == [here] * 3
    return here


@pytest.fixture(autouse=True)
def no_scope_outlives_a_test():
    assert (seen(), current_scope(), current_recorders()) == (None, kernelry.policy.scope.Scope(), ())
    yield
    assert (seen(), current_scope(), current_recorders()) == (None, kernelry.policy.scope.Scope(), ())


class Task:
    """What a task is to a context variable: a context of its own, in which each of its steps runs."""

    def __init__(self):
        self.context = contextvars.copy_context()
        self.open = []

    def step(self, action):
        self.context.run(self._step, action)

    def _step(self, action):
        if action == "leave":
            if self.open:
                self.open.pop()[1].__exit__(None, None, None)
        elif action is not None:
            scope = kernelry.use(action)
            scope.__enter__()
            self.open.append((action, scope))
        assert seen() == (self.open[-1][0] if self.open else None)


ACTIONS = st.sampled_from(["a", "b", "leave", None])


@given(st.lists(st.tuples(st.integers(0, 2), ACTIONS), max_size=12))
def test_tasks_interleaved_in_any_order_see_their_own_scopes(steps):
    tasks = [Task() for _ in range(3)]
    for place, action in steps:
        tasks[place].step(action)
        assert seen() is None
    for task in tasks:
        while task.open:
            task.step("leave")
    assert seen() is None


@given(st.permutations(range(3)), st.permutations(range(3)))
def test_generators_closed_in_any_order_leave_nothing(opened, closed):
    def scoped(name):
        with kernelry.use(name):
            yield

    generators = [scoped(name) for name in "abc"]
    order = []
    for place in opened:
        next(generators[place])
        order.append("abc"[place])
        assert seen() == order[-1]  # a generator's scope is in force while it waits, as a context manager's must be
    for place in closed:
        generators[place].close()
        order.remove("abc"[place])
        assert seen() == (order[-1] if order else None)


def test_a_generator_closed_by_another_task_or_thread_leaves_nothing():
    def scoped():
        with kernelry.use("a"):
            yield

    for close in (contextvars.Context().run, lambda end: concurrent.futures.ThreadPoolExecutor(1).submit(end).result()):
        generator = scoped()
        next(generator)
        assert seen() == "a"
        close(generator.close)
        assert seen() is None


def test_a_generator_forgotten_inside_its_scope_leaves_nothing():
    def scoped():
        with kernelry.use("a"):
            yield

    for _ in scoped():
        assert seen() == "a"
        break
    gc.collect()
    assert seen() is None


def test_two_tasks_run_their_own_kernels_while_a_third_has_none():
    query = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.float32)

    async def serve(scope):
        names = []
        for _ in range(2):
            with scope or contextlib.nullcontext(), kernelry.record() as resolutions:
                await asyncio.sleep(0)
                _attention.trace(query, query, query)
                await asyncio.sleep(0)
                kernelry.resolve(kernelry.Request(q_len=8))
            names += [resolution.kernel for resolution in resolutions]
            assert len(resolutions) == 2
        return set(names)

    async def main():
        scopes = (kernelry.use("blockwise"), kernelry.use("dot_product"), None, kernelry.use("blockwise"))
        return await asyncio.gather(*map(serve, scopes))

    assert asyncio.run(main()) == [{"blockwise"}, {"dot_product"}, {"dot_product"}, {"blockwise"}]


def test_a_task_made_inside_a_scope_is_in_it_until_it_ends():
    async def main():
        first, second = asyncio.Event(), asyncio.Event()

        async def child():
            before = seen()
            with kernelry.use(tiling={"block_q": 16}):
                first.set()
                await second.wait()
                after, scope = seen(), current_scope()
            return before, after, scope.tiling, current_scope()

        with kernelry.use("a"):
            task = asyncio.create_task(child())
            await first.wait()
        second.set()
        return await task

    assert asyncio.run(main()) == ("a", None, (("block_q", 16),), kernelry.policy.scope.Scope())


def test_a_cancelled_task_and_one_that_fails_end_their_scopes():
    async def fails():
        with kernelry.use("a"):
            await asyncio.sleep(0)
            raise RuntimeError

    async def waits():
        with kernelry.use("b"), interpret(), kernelry.record():
            await asyncio.sleep(60)

    async def main():
        tasks = [asyncio.create_task(waits()), asyncio.create_task(fails())]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return seen()

    assert asyncio.run(main()) is None


def test_worker_threads_inherit_nothing():
    async def main():
        with kernelry.use("a"), interpret(), kernelry.record():
            return await asyncio.to_thread(lambda: (seen(), current_scope(), current_recorders()))

    with kernelry.use("b"), concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(seen).result() is None
        assert pool.submit(kernelry.use("a")(seen)).result() == "a"
        assert pool.submit(seen).result() is None
        assert pool.submit(contextvars.copy_context().run, seen).result() is None
        assert seen() == "b"
    assert asyncio.run(main()) == (None, kernelry.policy.scope.Scope(), ())


def test_threads_at_the_same_time_see_their_own_scopes():
    def work(name):
        for _ in range(20):
            with kernelry.use(name):
                assert seen() == name
            assert seen() is None

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(work, ["a", "b", "c"] * 2))


def test_a_scope_decorates_functions_and_coroutine_functions():
    @kernelry.use("a")
    def plain():
        return seen()

    @kernelry.use("b")
    async def coroutine():
        await asyncio.sleep(0)
        return seen()

    async def main():
        return await asyncio.gather(coroutine(), coroutine()), seen()

    assert (plain(), plain(), seen()) == ("a", "a", None)
    assert asyncio.run(main()) == (["b", "b"], None)


@pytest.mark.parametrize("kind", ["generator", "async_generator"])
def test_a_scope_refuses_to_decorate_a_generator(kind):
    def generator():
        yield

    async def async_generator():
        yield

    with pytest.raises(ArgumentError, match=f"cannot decorate .*{kind}, a generator.*write the `with` inside"):
        kernelry.use("a")(locals()[kind])


def test_one_scope_can_be_entered_again():
    scope = kernelry.use("a")
    with scope, kernelry.use("b"):
        with scope:
            assert seen() == "a"
        assert seen() == "b"


def test_a_scope_that_was_left_finds_its_programs_again():
    traces = []

    @jax.jit
    def function(x):
        traces.append(current_scope().kernel)
        return x

    for _ in range(2):
        function(ZERO)
        with kernelry.use("a"):
            function(ZERO)
            function(ZERO)
            with kernelry.use("auto"):
                function(ZERO)
    assert traces == [None, "a"]


_WRAPPED = {
    "jit": jax.jit,
    "vmap": lambda function: lambda x: jax.vmap(function)(x[None])[0],
    "grad": lambda function: lambda x: jax.value_and_grad(function)(x)[0],
    "checkpoint": jax.checkpoint,
    "scan": lambda function: lambda x: jax.lax.scan(lambda at, _: (function(at), None), x, None, length=1)[0],
}


@pytest.mark.versions
@pytest.mark.parametrize("wrapped", _WRAPPED.values(), ids=_WRAPPED)
def test_a_program_of_parts_already_traced_belongs_to_the_task_that_made_it(wrapped):
    tasks = {"a": Task(), "b": Task()}
    for name, task in tasks.items():
        task.step(name)  # what is called below is traced here, so that nothing in it asks for the scope again
    outer = jax.jit(wrapped(_traced))
    for name in "abba":  # no scope is entered or left between these calls
        assert NAMES[int(tasks[name].context.run(outer, ZERO))] == name
    for task in tasks.values():
        task.step("leave")


@pytest.mark.versions
def test_a_call_of_a_compiled_function_only_compares():
    with kernelry.use("a"):
        _traced(ZERO)
        key = kernelry.policy.scope._jax_key.value
        _traced(ZERO)
        assert kernelry.policy.scope._jax_key.value is key


def test_a_scope_that_is_not_open_cannot_be_left():
    scope = kernelry.use("dot_product")
    with pytest.raises(ArgumentError, match="this scope is not open"):
        scope.__exit__(None, None, None)
    with pytest.raises(ArgumentError, match=r"use\(kernels=…\) takes a sequence of KernelSpecs, got 3"):
        kernelry.use(kernels=3)
