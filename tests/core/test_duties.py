"""What core does with a kernel's statistics: empty rows, the gradient of lse, sinks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import GROUPED, QKV, arrays_of, assert_twins, cotangents_of, oracle_answer
from careless_kernel import CARELESS

import kernelry
from kernelry import masks
from kernelry.plugin import Dims, Feature, Gradient, KernelSpec, Partial

pytestmark = pytest.mark.versions

MHA = dataclasses.replace(GROUPED, kv=4)


class Nonsense:
    """A body around another that leaves NaN in rows that see nothing, as vendors do."""

    def __init__(self):
        self.inner = CARELESS.body()

    def forward(self, inputs, request, tiling, *, statistics):
        partial = self.inner.forward(inputs, request, tiling, statistics=True)
        empty = jnp.isneginf(partial.lse).swapaxes(1, 2)[..., None]
        return Partial(
            jnp.where(empty, jnp.nan, partial.out), lse=partial.lse if statistics else None, dtype=request.dtype
        )

    def backward(self, *arguments):
        return self.inner.backward(*arguments)


def _spec(name, **capabilities):
    known = dataclasses.replace(
        CARELESS.capabilities,
        grouped_heads=False,
        empty_rows=False,
        lse_cotangent=False,
        head_dims=Dims(minimum=8, multiple_of=4),
        features=frozenset({Feature.SCALE}),
        **capabilities,
    )
    return KernelSpec(name=name, capabilities=known, load=Nonsense, signature=lambda _: ())


NONSENSE = _spec("nonsense")
ONE_DIM = _spec("one_dim", split_head_dim=False)
NATIVE = _spec("native", gradient=Gradient.NATIVE)


def _answer(spec, mask, arrays, cotangents, partial):
    def run(arrays, cotangents):
        def forward(arrays):
            q, k, v = (arrays[name] for name in QKV)
            result = kernelry.attention(
                q, k, v, sinks=arrays.get("sinks"), mask=mask, kernel=spec.name, return_partial=partial
            )
            return {"out": result.out, "lse": result.lse} if partial else {"out": result, "lse": None}

        returned, pull = jax.vjp(forward, arrays)
        return returned, pull(cotangents)[0]

    with kernelry.use(kernels=[spec]), kernelry.record() as resolutions:
        returned, gradients = jax.jit(run)(arrays, cotangents)
    return returned, gradients, [step.adapter.name for step in resolutions[0].plan.steps]


@dataclasses.dataclass
class Found:
    out: object
    lse: object
    gradients: dict
    max_logits: object = None


@pytest.mark.parametrize("sinks", [False, True])
def test_empty_rows_come_out_as_zero_with_zero_gradients(sinks):
    arrays = arrays_of(6, 6, MHA, sinks=sinks)
    mask = masks.Lengths(np.array([4, 0]), np.array([3, 6]))
    cotangents = cotangents_of(arrays)
    returned, gradients, adapters = _answer(NONSENSE, mask, arrays, cotangents, partial=False)
    assert adapters == sorted(["empty_rows_from_lse", *["sinks_from_lse"] * sinks])
    assert_twins(Found(**returned, gradients=gradients), oracle_answer(mask, arrays, cotangents))
    assert not np.asarray(returned["out"])[1].any()


def test_a_nan_in_the_cotangent_of_an_empty_row_stops_there():
    arrays = arrays_of(6, 6, MHA)
    mask = masks.Lengths(np.array([4, 0]), np.array([3, 6]))
    clean = cotangents_of(arrays)
    poisoned = clean | {"out": clean["out"].at[1].set(jnp.nan).at[0, 3:].set(jnp.nan)}
    expected = _answer(NONSENSE, mask, arrays, clean, partial=False)[1]
    found = _answer(NONSENSE, mask, arrays, poisoned, partial=False)[1]
    for name in found:
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(expected[name]), err_msg=name)


@pytest.mark.parametrize("spec", [NONSENSE, ONE_DIM], ids=lambda spec: spec.name)
def test_the_gradient_of_lse_goes_through_a_spare_column(spec):
    arrays = arrays_of(6, 6, MHA)
    mask = masks.Causal() & masks.Segments(np.array([[0, 0, 1, 1, -1, 1], [2, 2, 2, 2, 2, -1]]))
    cotangents = cotangents_of(arrays, lse=True)
    returned, gradients, adapters = _answer(spec, mask, arrays, cotangents, partial=True)
    assert "lse_gradient_column" in adapters
    assert_twins(Found(**returned, gradients=gradients), oracle_answer(mask, arrays, cotangents))


def test_a_nan_in_the_cotangent_of_an_empty_rows_lse_stops_there():
    arrays = arrays_of(6, 6, MHA)
    mask = masks.Lengths(np.array([4, 0]))
    clean = cotangents_of(arrays, lse=True)
    poisoned = clean | {"lse": clean["lse"].at[1].set(jnp.nan)}
    expected = _answer(NONSENSE, mask, arrays, clean, partial=True)[1]
    found = _answer(NONSENSE, mask, arrays, poisoned, partial=True)[1]
    for name in found:
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(expected[name]), err_msg=name)


def test_a_kernel_differentiated_by_jax_is_not_helped_with_empty_rows_in_training():
    arrays = arrays_of(6, 6, MHA)
    with kernelry.use(kernels=[NATIVE]), pytest.raises(kernelry.errors.KernelRefusedError, match="see no key"):
        kernelry.attention(*arrays.values(), mask=masks.Lengths(np.array([4, 0])), kernel="native")


def test_a_kernel_differentiated_by_jax_is_helped_with_empty_rows_where_no_gradient_is_wanted():
    arrays = arrays_of(6, 6, MHA)
    with kernelry.use(kernels=[NATIVE]):
        out = kernelry.attention(
            *arrays.values(), mask=masks.Lengths(np.array([4, 0])), kernel="native", mode="prefill"
        )
    assert np.isfinite(np.asarray(out)).all()


def test_merged_halves_and_their_gradients_equal_the_whole():
    arrays = arrays_of(6, 6, MHA)
    mask = masks.Causal()
    cotangents = cotangents_of(arrays)

    def run(arrays, cotangents):
        def forward(arrays):
            q, k, v = (arrays[name] for name in QKV)
            parts = [
                kernelry.attention(
                    q,
                    k[:, half],
                    v[:, half],
                    mask=mask.at(query_offset=0, kv_offset=half.start),
                    kernel="nonsense",
                    return_partial=True,
                )
                for half in (slice(0, 3), slice(3, 6))
            ]
            return {"out": kernelry.finalize(kernelry.merge(parts)), "lse": None}

        returned, pull = jax.vjp(forward, arrays)
        return returned, pull(cotangents)[0]

    with kernelry.use(kernels=[NONSENSE]):
        returned, gradients = jax.jit(run)(arrays, cotangents)
    assert_twins(Found(**returned, gradients=gradients), oracle_answer(mask, arrays, cotangents))
