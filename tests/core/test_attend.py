"""Core's one custom_vjp and its check of what kernels return.

A kernel with `backward` gets the output and lse of the whole attention.
"""

import dataclasses
import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from careless_kernel import CARELESS

import kernelry
from kernelry import masks
from kernelry.errors import ArgumentError, PluginError
from kernelry.plugin import Feature, Gradients, Operand
from kernelry.registry import installed

pytestmark = pytest.mark.versions


def test_rows_that_see_nothing_contribute_nothing_though_a_sink_makes_their_lse_finite():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 5, 2, 8)), jnp.float32) for _ in range(3))
    sinks = jnp.array([-0.5, 1.0])
    mask = masks.Lengths(jnp.array([0, 3], jnp.int32))

    def gradients(kernel):
        def loss(*arrays):
            out = kernelry.attention(*arrays[:3], sinks=arrays[3], mask=mask, kernel=kernel)
            return jnp.sin(out + 1.0).sum()

        with kernelry.use(kernels=[CARELESS]):
            return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, sinks)

    for found, expected in zip(gradients("careless"), gradients("dot_product"), strict=True):
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-5)


X = jnp.asarray(np.random.default_rng(1).standard_normal((1, 24, 2, 8)), jnp.float32)


def _attend(q, kernel="blockwise"):
    with kernelry.use(kernels=[CARELESS]):
        return kernelry.attention(q, q, q, mask=masks.Causal(), kernel=kernel)


def _squares(q, kernel):
    return jnp.square(_attend(q, kernel)).sum()


FORWARD = {
    "jvp": lambda f: jax.jvp(f, (X,), (X,)),
    "jvp of jit": lambda f: jax.jvp(jax.jit(f), (X,), (X,)),
    "jit of jvp": lambda f: jax.jit(lambda q: jax.jvp(f, (q,), (q,)))(X),
    "linearize": lambda f: jax.linearize(jax.jit(f), X)[1](X),
    "jacfwd": lambda f: jax.jacfwd(lambda scale: f(X * scale))(1.0),
    "vmap of jvp": lambda f: jax.vmap(lambda q: jax.jvp(f, (q,), (q,)))(X[None]),
    "scan": lambda f: jax.jvp(lambda q: jax.lax.scan(lambda c, _: (f(c), None), q, None, length=2)[0], (X,), (X,)),
    "jit of jacfwd": lambda f: jax.jit(jax.jacfwd(lambda scale: f(X * scale)))(1.0),
    "jit of vmap of jvp": lambda f: jax.jit(jax.vmap(lambda q: jax.jvp(f, (q,), (q,))))(X[None]),
    "grad of jvp": lambda f: jax.grad(lambda q: jax.jvp(f, (q,), (X,))[1].sum())(X),
}


@pytest.mark.parametrize("kernel", ["blockwise", "careless"])
@pytest.mark.parametrize("transformation", FORWARD)
def test_forward_mode_of_a_kernel_with_a_backward_pass_is_an_error_that_names_one_with_both(transformation, kernel):
    with pytest.raises(
        ArgumentError, match=rf"kernel '{kernel}' has .* no derivatives? (in forward|of its) .* kernel=\"dot_product\""
    ):
        FORWARD[transformation](functools.partial(_attend, kernel=kernel))


def test_forward_mode_where_auto_chooses_a_kernel_with_a_backward_pass_is_that_error_too():
    q = jnp.ones((1, 1024, 1, 8))
    with pytest.raises(ArgumentError, match='kernel="dot_product"'):
        jax.jvp(lambda q: kernelry.attention(q, q, q), (q,), (q,))


@pytest.mark.parametrize("inner", [jax.grad(_squares), jax.jit(jax.grad(_squares), static_argnums=1)], ids=["", "jit"])
def test_reverse_mode_over_reverse_mode_is_an_error_that_names_what_has_it(inner):
    with pytest.raises(ArgumentError, match=r"no gradient of its gradients .* kernel=\"dot_product\""):
        jax.jit(jax.grad(lambda q: jnp.square(inner(q, "blockwise")).sum()))(X)


SECOND = {
    "jvp of grad": lambda f: jax.jvp(jax.grad(f), (X,), (X,)),
    "jvp of jit of grad": lambda f: jax.jvp(jax.jit(jax.grad(f)), (X,), (X,)),
    "grad of grad": lambda f: jax.grad(lambda q: jax.grad(f)(q).sum())(X),
}


@pytest.mark.parametrize("transformation", SECOND)
def test_second_derivatives_of_a_kernel_that_does_not_declare_them_are_an_error_that_names_what_has_them(
    transformation,
):
    with pytest.raises(ArgumentError, match=r"kernel 'careless' .* no derivatives of its .* kernel=\"dot_product\""):
        jax.eval_shape(lambda: SECOND[transformation](functools.partial(_squares, kernel="careless")))


def test_forward_mode_over_reverse_mode_is_served_where_a_kernel_declares_it():
    def along(q, kernel):
        return jax.jvp(jax.grad(lambda q: _squares(q, kernel)), (q,), (jnp.cos(q),))[1]

    found, expected = (jax.jit(along, static_argnums=1)(X, kernel) for kernel in ("blockwise", "dot_product"))
    assert np.abs(np.asarray(expected)).max() > 1
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-4)


def test_dot_product_has_forward_mode_and_every_order():
    @jax.jit
    def derivatives(q):
        gradient = jax.grad(lambda q: _squares(q, "dot_product"))
        tangent = jax.jvp(lambda q: _squares(q, "dot_product"), (q,), (jnp.cos(q),))[1]
        second = jax.grad(lambda q: (gradient(q) * jax.lax.stop_gradient(jnp.cos(q))).sum())(q)
        along = jax.jvp(gradient, (q,), (jnp.cos(q),))[1]
        return (tangent, (gradient(q) * jnp.cos(q)).sum()), (second, along)

    for found, expected in derivatives(X):
        assert np.abs(np.asarray(found)).max() > 1
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-4, atol=1e-4)


Q, K, V = (jax.ShapeDtypeStruct((2, 6, heads, 8), jnp.bfloat16) for heads in (4, 2, 2))
OUT = jnp.zeros((2, 6, 4, 8), jnp.bfloat16)
LSE = jnp.zeros((2, 4, 6))
PARTIAL = kernelry.Partial(OUT, dtype="bfloat16")


class Returns:
    """Returns what it was made with."""

    def __init__(self, partial, gradients=None):
        self.partial, self.gradients = partial, gradients

    def forward(self, inputs, request, tiling, *, statistics):
        return self.partial

    def backward(self, *arguments):
        return self.gradients


def traced(returned, *, gradients=None, **arguments):
    """Traces a call of a kernel that returns this, and its derivative where it returns gradients."""
    features = frozenset({Feature.BIAS, Feature.MAX_LOGITS, Feature.LOGITS_DTYPE})
    changes = {"dtypes": frozenset({"bfloat16"}), "features": features, "lse_cotangent": True}
    if gradients is not None:
        changes["gradients"] = frozenset({Operand.QUERY, Operand.KEY, Operand.VALUE, Operand.BIAS})
    can = dataclasses.replace(CARELESS.capabilities, grouped_heads=True, **changes)
    spec = dataclasses.replace(CARELESS, name="sloppy", capabilities=can, load=lambda: Returns(returned, gradients))
    attend = functools.partial(kernelry.attention, kernel="sloppy", **arguments)
    bias = jax.ShapeDtypeStruct((1, 4, 6, 6), jnp.float32)

    def differentiated(*arrays):
        loss = lambda q, k, v, bias: attend(q, k, v, bias=bias, return_partial=True).lse.sum()  # noqa: E731
        return jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays)

    with kernelry.use(kernels=[spec]):
        if gradients is None:
            return jax.eval_shape(functools.partial(attend, mode="prefill"), Q, K, V)
        return jax.eval_shape(differentiated, Q, K, V, bias)


def test_other_errors_of_type_in_a_kernel_stay_as_they_are():
    def forward(*_, **__):
        raise TypeError("can't do this")

    body = Returns(None)
    body.forward = forward
    spec = dataclasses.replace(CARELESS, name="fails", load=lambda: body)
    with kernelry.use(kernels=[spec]), pytest.raises(TypeError, match="can't do this"):
        kernelry.attention(X, X, X, kernel="fails")


def test_bodies_of_kernels_that_are_made_again_and_again_are_let_go():
    """As where a cell of a notebook defines a kernel."""
    bodies = weakref.WeakSet()
    for place in range(300):
        spec = dataclasses.replace(CARELESS, name=f"made_{place}", load=lambda: Returns(None))
        assert spec.body() is spec.body()
        bodies.add(spec.body())
    del spec
    gc.collect()
    assert len(bodies) <= 256


@pytest.mark.parametrize("traced", [jax.eval_shape, lambda f, x: jax.make_jaxpr(f)(x)], ids=["eval_shape", "jaxpr"])
def test_tracing_alone_computes_no_tangent_and_is_no_error(traced):
    """As docs/transformations.md says; the call itself is refused."""

    def tangent(q):
        return jax.jvp(lambda q: _squares(q, "blockwise"), (q,), (q,))[1]

    traced(tangent, X)
    with pytest.raises(ArgumentError, match="no derivative in forward mode"):
        jax.jit(tangent).lower(X)


def test_all_partials_with_lse_have_one_structure():
    """In a loop, and in the branches of lax.cond: one kernel says what rounding took from lse, another does not."""

    query = jnp.zeros(Q.shape)

    def part(key, kernel):
        return kernelry.attention(query, key, key, return_partial=True, kernel=kernel, mode="prefill")

    def chunks(first, keys):
        def step(carry, key):
            chosen = jax.lax.cond(key[0, 0, 0, 0] > 0, *(functools.partial(part, kernel=name) for name in kernels), key)
            return kernelry.merge([carry, chosen]), None

        return jax.lax.scan(step, first, keys)[0]

    kernels, keys = ("dot_product", "careless"), jax.ShapeDtypeStruct((3, *query.shape), query.dtype)
    nothing = kernelry.Partial(query, jnp.full((2, 4, 6), -jnp.inf), dtype="float32")
    with kernelry.use(kernels=[CARELESS]):
        parts = [jax.eval_shape(functools.partial(part, kernel=kernel), query) for kernel in kernels]
        assert len({jax.tree.structure(part) for part in parts}) == 1
        first = jax.eval_shape(lambda key: kernelry.merge([part(key, "careless")]), query)
        assert jax.eval_shape(chunks, first, keys).lse_rest.shape == first.lse.shape
        assert jax.eval_shape(chunks, nothing, keys).lse_rest is None  # made by hand, a carry stays as it was given


WRONG_RESULTS = {
    "a bare array": (OUT, {}, "it is an array bfloat16 [2, 6, 4, 8], expected a kernelry.plugin.Partial"),
    "a tuple": ((OUT, LSE), {}, "it is a tuple, expected a kernelry.plugin.Partial"),
    "another layout": (
        dataclasses.replace(PARTIAL, out=OUT.swapaxes(1, 2)),
        {},
        "out is an array bfloat16 [2, 4, 6, 8], expected bfloat16 or float32 [2, 6, 4, 8] (B T N D)",
    ),
    "a narrower output": (
        dataclasses.replace(PARTIAL, out=OUT.astype(jnp.float16)),
        {},
        "out is an array float16 [2, 6, 4, 8], expected bfloat16 or float32",
    ),
    "another dtype": (
        dataclasses.replace(PARTIAL, dtype="float32"),
        {},
        "Partial.dtype is 'float32', expected the query's 'bfloat16'",
    ),
    "no statistics": (
        PARTIAL,
        {"return_partial": True},
        "its statistics are missing, expected Partial(…, lse=lse)",
    ),
    "max without sum": (dataclasses.replace(PARTIAL, max=LSE), {"return_partial": True}, "its statistics are max,"),
    "every statistic": (
        dataclasses.replace(PARTIAL, lse=LSE, max=LSE, sum=LSE),
        {"return_partial": True},
        "its statistics are lse and max and sum,",
    ),
    "a rest of another shape": (
        dataclasses.replace(PARTIAL, lse=LSE, lse_rest=LSE[0]),
        {"return_partial": True},
        "lse_rest is an array float32 [4, 6], expected float32 [2, 4, 6] (B N T)",
    ),
    "lse by query": (
        dataclasses.replace(PARTIAL, lse=LSE.swapaxes(1, 2)),
        {"return_partial": True},
        "lse is an array float32 [2, 6, 4], expected float32 [2, 4, 6] (B N T)",
    ),
    "a rounded lse": (
        dataclasses.replace(PARTIAL, lse=LSE.astype(jnp.bfloat16)),
        {"return_partial": True},
        "lse is an array bfloat16 [2, 4, 6], expected float32",
    ),
    "no max_logits": (PARTIAL, {"return_max_logits": True}, "max_logits is missing, expected float32 [2, 4] (B N)"),
    "max_logits of every row": (
        dataclasses.replace(PARTIAL, max_logits=LSE),
        {"return_max_logits": True},
        "max_logits is an array float32 [2, 4, 6], expected float32 [2, 4] (B N)",
    ),
    "a number": (dataclasses.replace(PARTIAL, lse=0.0), {}, "lse is a float, expected float32 [2, 4, 6] (B N T)"),
}


@pytest.mark.parametrize(("returned", "arguments", "said"), WRONG_RESULTS.values(), ids=WRONG_RESULTS)
def test_a_wrong_result_is_an_error_that_names_the_kernel(returned, arguments, said):
    with pytest.raises(PluginError) as caught:
        traced(returned, **arguments)
    message = str(caught.value)
    assert message.startswith(f"kernel 'sloppy' ({__name__}.Returns) returned a wrong result from forward, asked for ")
    assert said in message
    assert message.endswith("report it to its authors, or choose another kernel.")


@pytest.mark.parametrize(
    "right",
    [
        PARTIAL,
        dataclasses.replace(PARTIAL, out=OUT.astype(jnp.float32)),  # rounded when it is finalised
        dataclasses.replace(PARTIAL, lse=LSE),  # more than was asked for
        dataclasses.replace(PARTIAL, max=LSE, sum=LSE),
    ],
)
def test_what_the_contract_leaves_free_is_accepted(right):
    assert traced(right) == jax.ShapeDtypeStruct((2, 6, 4, 8), jnp.bfloat16)


def test_statistics_may_have_the_dtype_of_the_logits():
    partial = dataclasses.replace(PARTIAL, lse=LSE.astype(jnp.bfloat16))
    assert traced(partial, return_partial=True, logits_dtype=jnp.bfloat16).lse.dtype == jnp.bfloat16


D_QKV = tuple(jnp.zeros(array.shape) for array in (Q, K, V))
D_BIAS = jnp.zeros((1, 4, 6, 6))


@pytest.mark.parametrize(
    ("gradients", "said"),
    [
        (D_QKV, "it is a tuple, expected a kernelry.plugin.Gradients"),
        (Gradients(*D_QKV), "the gradient of bias is missing, expected floating [1, 4, 6, 6]"),
        (Gradients(*D_QKV, jnp.zeros((2, 4, 6, 6))), "the gradient of bias is an array float32 [2, 4, 6, 6], expected"),
        (
            Gradients(D_QKV[0], jnp.zeros((2, 6, 4, 8)), D_QKV[2], D_BIAS),
            "the gradient of key is an array float32 [2, 6, 4, 8], expected floating [2, 6, 2, 8] (B S K H)",
        ),
        (
            Gradients(D_QKV[0].astype(jnp.int32), *D_QKV[1:], D_BIAS),
            "the gradient of query is an array int32 [2, 6, 4, 8]",
        ),
    ],
    ids=["a tuple", "no bias", "a bias for every row", "by query head", "integers"],
)
def test_wrong_gradients_are_an_error_that_names_the_kernel(gradients, said):
    with pytest.raises(PluginError) as caught:
        traced(dataclasses.replace(PARTIAL, lse=LSE), gradients=gradients)
    message = str(caught.value)
    assert message.startswith(f"kernel 'sloppy' ({__name__}.Returns) returned a wrong result from backward, asked for ")
    assert said in message


def test_right_gradients_are_accepted():
    found = traced(dataclasses.replace(PARTIAL, lse=LSE), gradients=Gradients(*D_QKV, D_BIAS))
    assert [array.shape for array in found] == [Q.shape, K.shape, V.shape, D_BIAS.shape]


class Unfinished:
    """A normalization that returns the statistics along with the output."""

    def finalize(self, partial, sinks=None):
        return partial.out, partial.lse


def test_a_wrong_result_of_a_normalization_is_an_error_that_names_it(monkeypatch):
    known = installed.registry()
    ours = dataclasses.replace(known, normalizations={**known.normalizations, "softmax": Unfinished()})
    monkeypatch.setattr(installed, "registry", lambda: ours)
    with pytest.raises(PluginError, match=r"normalization 'softmax' \(.*Unfinished\) finalized .* to a tuple"):
        traced(PARTIAL)
