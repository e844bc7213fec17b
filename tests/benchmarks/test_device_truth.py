"""The errors of a device run: small for what is right, large for what is off in one place."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from on_device import truth
from on_device.calls import of_pass
from on_device.kernels import contender
from on_device.shapes import BOTH, FORWARD, Shape

import kernelry
from kernelry import masks

pytestmark = pytest.mark.sweep

_SIZES = {"q_len": 64, "kv_len": 64, "q_heads": 4, "kv_heads": 2, "head_dim": 8, "batch": 2, "dtype": "float32"}
SHAPES = {
    "causal": Shape(**_SIZES),
    "window": Shape(**_SIZES, window=16),
    "packed": Shape(**_SIZES, documents=(20, 44)),
    "soft cap": Shape(**_SIZES, soft_cap=5.0),
    "other value dim": Shape(**_SIZES, value_dim=4),
    "full": Shape(**_SIZES, causal=False),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("which", [FORWARD, BOTH])
def test_a_right_kernel_is_right(shape, which):
    arrays = shape.arrays()
    program, facts = contender("dot_product").lower(shape, which, arrays)
    found = truth.errors(shape, which, program.compile()(*arrays), truth.expected(shape, arrays))
    assert set(found) == ({"out"} if which == FORWARD else {"d_query", "d_key", "d_value"})
    assert max(found.values()) < 1e-5
    assert not truth.is_wrong(shape, found)
    assert facts["kernel"] == "dot_product"


def test_a_decode_step_has_an_output_alone():
    sizes = _SIZES | {"q_len": 1, "mode": "decode", "causal": False}
    shape = Shape(**sizes)
    assert set(truth.expected(shape, shape.arrays())) == {"out"}


@pytest.mark.parametrize(
    "spoil",
    [lambda out: out.at[:, 40:44].set(0), lambda out: out[:, :, ::-1], lambda out: out.at[-1, 3, -1].set(jnp.nan)],
    ids=["a block", "the order of heads", "a NaN"],
)
def test_what_is_off_in_one_place_is_wrong(spoil):
    shape = SHAPES["causal"]
    arrays = shape.arrays()
    out = kernelry.attention(*arrays[:3], mask=masks.Causal(), kernel="dot_product")
    assert truth.is_wrong(shape, truth.errors(shape, FORWARD, spoil(out), truth.expected(shape, arrays)))


def test_another_mask_is_wrong_in_output_and_gradients():
    shape, arrays = SHAPES["window"], SHAPES["window"].arrays()
    expected = truth.expected(shape, arrays)

    def attend(query, key, value, ids):
        del ids
        return kernelry.attention(query, key, value, mask=masks.Causal(), kernel="dot_product")

    for which in (FORWARD, BOTH):
        found = truth.errors(shape, which, of_pass(attend, which)(*arrays), expected)
        assert min(found.values()) > truth.LARGEST_ERROR["float32"]


def test_an_error_that_is_not_a_number_is_infinite():
    shape, arrays = SHAPES["full"], SHAPES["full"].arrays()
    out = np.full((2, 64, 4, 8), np.nan, np.float32)
    assert truth.errors(shape, FORWARD, out, truth.expected(shape, arrays)) == {"out": math.inf}
