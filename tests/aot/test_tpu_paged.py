"""paged through the real TPU compiler: what it declares compiles, what it refuses for the compiler's sake does not."""

import jax
import jax.numpy as jnp
import pytest

import kernelry
from kernelry import masks
from kernelry.kernel.spec import Inputs
from kernelry.plugin import PagedArray, Tiling
from kernelry.request.request import Request
from kernelry_tpu_splash.plugin import PAGED

pytestmark = pytest.mark.aot

TARGETS = ("tpu:v5e", "tpu:v5p", "tpu:v6e")
ROWS, SLOTS = 4, 2048
CASES = (
    ((32, 8), 128, 16),
    ((8, 8), 128, 32),
    ((32, 1), 128, 128),
    ((12, 3), 128, 16),
    ((64, 8), 256, 64),
    ((8, 2), 128, 8),
)


def arguments(heads, width, page_size):
    pages = (512, page_size, heads[1], width)
    return (
        jax.ShapeDtypeStruct((ROWS, 1, heads[0], width), jnp.bfloat16),
        jax.ShapeDtypeStruct(pages, jnp.bfloat16),
        jax.ShapeDtypeStruct(pages, jnp.bfloat16),
        jax.ShapeDtypeStruct((ROWS, SLOTS // page_size), jnp.int32),
        jax.ShapeDtypeStruct((ROWS,), jnp.int32),
    )


def request_of(heads, width, page_size):
    facts = {"q_heads": heads[0], "kv_heads": heads[1], "head_dim": width, "dtype": "bfloat16", "mode": "decode"}
    return Request(
        q_len=1, kv_len=SLOTS, batch=ROWS, page_size=page_size, mask=masks.Lengths(jnp.zeros(ROWS, int)), **facts
    )


def step(query, key, value, table, lengths):
    held = PagedArray(key, table), PagedArray(value, table)
    options = {"mask": masks.Lengths(lengths), "mode": "decode", "soft_cap": 30.0, "kernel": "paged"}
    return kernelry.attention(query, *held, **options)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("heads", "width", "page_size"), CASES)
def test_paged_attention_compiles(target, heads, width, page_size, compile_for):
    found = compile_for(target, step, arguments(heads, width, page_size))
    assert found.ok, found.reason


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("heads", "width", "page_size"), [CASES[0], CASES[2]])
def test_ragged_paged_attention_compiles(target, heads, width, page_size, compile_for):
    tilings = [tiling for tiling in PAGED.tilings(request_of(heads, width, page_size)) if tiling["combined"] == 2]
    with kernelry.use(tiling=dict(tilings[0].values)):
        found = compile_for(target, step, arguments(heads, width, page_size))
    assert found.ok, found.reason


def refused(heads, width, page_size, combined):
    """The kernel's body, past its refusals."""
    request, table_of = request_of(heads, width, page_size), PagedArray

    def direct(query, key, value, table, lengths):
        inputs = Inputs(query, table_of(key, table), table_of(value, table), masks.Lengths(lengths).canonical())
        tiling = Tiling.of(pages_per_block=8, combined=combined)
        return PAGED.body().forward(inputs, request, tiling, statistics=False).out

    return direct


@pytest.mark.parametrize(
    ("heads", "width", "page_size", "combined"),
    [((32, 8), 64, 16, 1), ((32, 8), 256, 16, 2), ((12, 3), 128, 16, 2)],
    ids=["head dim 64", "combined, head dim 256", "combined, three heads"],
)
def test_what_is_refused_does_not_compile(heads, width, page_size, combined, compile_for, monkeypatch):
    monkeypatch.setattr("kernelry_tpu_splash.paged.kernel.why_not_combined", lambda _: None)
    direct = refused(heads, width, page_size, combined)
    found = compile_for("tpu:v5e", direct, arguments(heads, width, page_size))
    assert not found.ok
