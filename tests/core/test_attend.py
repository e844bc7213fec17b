"""Core's one custom_vjp: a kernel with `backward` gets the output and lse of the whole attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from careless_kernel import CARELESS

import kernelry
from kernelry import masks
from kernelry.errors import ArgumentError

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


Q = jnp.asarray(np.random.default_rng(1).standard_normal((1, 24, 2, 8)), jnp.float32)


def _attend(q, kernel="blockwise"):
    with kernelry.use(kernels=[CARELESS]):
        return kernelry.attention(q, q, q, mask=masks.Causal(), kernel=kernel)


def _squares(q, kernel):
    return jnp.square(_attend(q, kernel)).sum()


FORWARD = {
    "jvp": lambda f: jax.jvp(f, (Q,), (Q,)),
    "jvp of jit": lambda f: jax.jvp(jax.jit(f), (Q,), (Q,)),
    "jit of jvp": lambda f: jax.jit(lambda q: jax.jvp(f, (q,), (q,)))(Q),
    "linearize": lambda f: jax.linearize(jax.jit(f), Q)[1](Q),
    "jacfwd": lambda f: jax.jacfwd(lambda scale: f(Q * scale))(1.0),
    "vmap of jvp": lambda f: jax.vmap(lambda q: jax.jvp(f, (q,), (q,)))(Q[None]),
    "scan": lambda f: jax.jvp(lambda q: jax.lax.scan(lambda c, _: (f(c), None), q, None, length=2)[0], (Q,), (Q,)),
    "grad of jvp": lambda f: jax.grad(lambda q: jax.jvp(f, (q,), (Q,))[1].sum())(Q),
}


@pytest.mark.parametrize("kernel", ["blockwise", "careless"])
@pytest.mark.parametrize("transformation", FORWARD)
def test_forward_mode_of_a_kernel_with_a_backward_pass_is_an_error_that_names_one_with_both(transformation, kernel):
    with pytest.raises(
        ArgumentError, match=rf"kernel '{kernel}' has .* no derivatives? (in forward|of its) .* kernel=\"dot_product\""
    ):
        FORWARD[transformation](functools.partial(_attend, kernel=kernel))


def test_forward_mode_where_auto_chooses_a_kernel_with_a_backward_pass_is_that_error_too():
    q = jnp.ones((1, 768, 1, 8))
    with pytest.raises(ArgumentError, match='kernel="dot_product"'):
        jax.jvp(lambda q: kernelry.attention(q, q, q), (q,), (q,))


@pytest.mark.parametrize("inner", [jax.grad(_squares), jax.jit(jax.grad(_squares), static_argnums=1)], ids=["", "jit"])
def test_reverse_mode_over_reverse_mode_is_an_error_that_names_what_has_it(inner):
    with pytest.raises(ArgumentError, match=r"no gradient of its gradients .* kernel=\"dot_product\""):
        jax.jit(jax.grad(lambda q: jnp.square(inner(q, "blockwise")).sum()))(Q)


SECOND = {
    "jvp of grad": lambda f: jax.jvp(jax.grad(f), (Q,), (Q,)),
    "jvp of jit of grad": lambda f: jax.jvp(jax.jit(jax.grad(f)), (Q,), (Q,)),
    "grad of grad": lambda f: jax.grad(lambda q: jax.grad(f)(q).sum())(Q),
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

    found, expected = (jax.jit(along, static_argnums=1)(Q, kernel) for kernel in ("blockwise", "dot_product"))
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

    for found, expected in derivatives(Q):
        assert np.abs(np.asarray(found)).max() > 1
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-4, atol=1e-4)
