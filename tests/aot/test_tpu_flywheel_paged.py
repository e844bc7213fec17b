"""flywheel_paged through the real TPU compiler: what it declares compiles, and copies no pool.

Compiled, not run: numbers are proven in interpret mode, in tests/plugins/test_flywheel_paged.py. flywheel-tpu needs
Python 3.12: `make test-aot-tpu PYTHON=python3.12 AOT_VENV=.venv-aot-312 ARGS="-k flywheel_paged"`.
"""

import jax
import jax.numpy as jnp
import pytest

import kernelry
from kernelry import masks
from kernelry.plugin import Inputs, PagedArray, ValueInKey
from kernelry.request.request import Request
from kernelry_tpu_flywheel.paged.spec import FLYWHEEL_PAGED

pytest.importorskip("flywheel_tpu")
pytest.importorskip("libtpu")
pytestmark = pytest.mark.aot

TARGETS = ("tpu:v5e", "tpu:v6e", "tpu:tpu7x")
ROWS, PAGES, POOL, PAGE = 8, 64, 1024, 128
CASES = {
    "decode": (1, (32, 8), 128, None),
    "wide heads": (1, (16, 8), 256, None),
    "one key head": (1, (8, 1), 128, None),
    "four key heads": (1, (32, 4), 128, None),
    "window": (1, (32, 8), 128, 1023),
    "draft tokens": (5, (32, 8), 128, None),
    "window of draft tokens": (5, (16, 8), 256, 1023),
}


def arguments(q_len, heads, width):
    return (
        jax.ShapeDtypeStruct((ROWS, q_len, heads[0], width), jnp.bfloat16),
        jax.ShapeDtypeStruct((POOL, PAGE, 2 * heads[1], width), jnp.bfloat16),
        jax.ShapeDtypeStruct((ROWS, PAGES), jnp.int32),
        jax.ShapeDtypeStruct((ROWS,), jnp.int32),
    )


def mask_of(lengths, q_len, left):
    base = masks.Causal() if left is None else masks.SlidingWindow(left, 0)
    return base.at(query_offset=lengths - q_len) & masks.Lengths(lengths)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_pages_are_read_where_they_are(target, name, compile_for):
    q_len, heads, width, left = CASES[name]

    def step(query, pool, table, lengths):
        held = PagedArray(pool, table, interleaved=True), ValueInKey(width)
        mask = mask_of(lengths, q_len, left)
        return kernelry.attention(query, *held, mask=mask, soft_cap=30.0, mode="decode", kernel="flywheel_paged")

    found = compile_for(target, step, arguments(q_len, heads, width))
    assert found.ok, found.reason
    pool = POOL * PAGE * 2 * heads[1] * width * 2
    assert found.memory["temporaries"] < pool / 20


@pytest.mark.parametrize(("heads", "width"), [((12, 3), 128), ((32, 8), 64)])
def test_pools_that_are_refused_would_be_copied(heads, width, compile_for):
    """The kernel's body, past its refusals."""
    facts = {"q_heads": heads[0], "kv_heads": heads[1], "head_dim": width, "dtype": "bfloat16", "target": "tpu:v6e"}
    stored = {"page_size": PAGE, "kv_layout": "interleaved", "kv_len": PAGES * PAGE}
    request = Request(q_len=1, batch=ROWS, mode="decode", mask=masks.Lengths(jnp.zeros(ROWS, int)), **facts, **stored)

    def step(query, pool, table, lengths):
        held = PagedArray(pool, table, interleaved=True), ValueInKey(width)
        inputs = Inputs(query, *held, masks.Lengths(lengths).canonical())
        tiling = FLYWHEEL_PAGED.tilings(request)[0]
        return FLYWHEEL_PAGED.body().forward(inputs, request, tiling, statistics=False).out

    found = compile_for("tpu:v6e", step, arguments(1, heads, width))
    assert found.ok, found.reason
    assert found.memory["temporaries"] > POOL * PAGE * 2 * heads[1] * width * 2
