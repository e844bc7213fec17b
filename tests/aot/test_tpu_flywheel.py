"""flywheel through the real TPU compiler: what it declares compiles for the chip that is asked about.

Compiled, not run: numbers are proven in interpret mode, in tests/plugins/test_flywheel.py. flywheel-tpu needs Python
3.12: `make test-aot-tpu PYTHON=python3.12 AOT_VENV=.venv-aot-312 ARGS="-k flywheel"`.
"""

import jax
import jax.numpy as jnp
import pytest
from flywheel_passes import Pass

import kernelry
from kernelry import masks

pytest.importorskip("flywheel_tpu")
pytest.importorskip("libtpu")
pytestmark = pytest.mark.aot

TARGETS = ("tpu:v5e", "tpu:v6e", "tpu:tpu7x")
HEAD_DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
FORWARD = {
    "full": masks.Full(),
    "window": masks.SlidingWindow(300),
    "both sides": masks.SlidingWindow(200, 100),
    "window at an offset": masks.SlidingWindow(200).at(query_offset=256),
}


def _forward(**options):
    options = {"mask": masks.Causal(), "mode": "prefill", "kernel": "flywheel", **options}
    return lambda query, key, value: kernelry.attention(query, key, value, **options)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("head_dim", "value_dim"), HEAD_DIMS)
def test_forward_and_backward_compile(target, head_dim, value_dim, shapes, training, compile_for):
    arguments = shapes(2048, head_dim=head_dim, value_dim=value_dim)
    found = compile_for(target, training("flywheel"), arguments)
    assert found.ok, found.reason


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", FORWARD)
def test_masks_of_the_forward_pass_compile(target, name, shapes, compile_for):
    kv_len = 768 if "offset" in name else 512
    found = compile_for(target, _forward(mask=FORWARD[name], soft_cap=30.0), shapes(512, kv_len=kv_len))
    assert found.ok, found.reason


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("head_dim", "value_dim"), HEAD_DIMS)
def test_packed_rows_compile(target, head_dim, value_dim, shapes, compile_for):
    ids = jax.ShapeDtypeStruct((1, 1024), jnp.int32)

    def packed(query, key, value, ids):
        return _forward(mask=masks.Causal() & masks.Segments(ids))(query, key, value)

    found = compile_for(target, packed, (*shapes(1024, head_dim=head_dim, value_dim=value_dim), ids))
    assert found.ok, found.reason


def test_lengths_that_are_padded_compile(shapes, training, compile_for):
    found = compile_for("tpu:v6e", training("flywheel"), shapes(500))
    assert found.ok, found.reason


@pytest.mark.parametrize(("kind", "most"), [("v6e", 100), ("tpu7x", 64)])
def test_the_program_is_built_for_the_chip_that_is_asked_about(kind, most):
    """A core of TPU7x has 64 MiB of vector memory, of which kernels may take all; they take 100 of v6e's 128."""
    function, arguments = Pass("forward", kind, (128, 128)).program()
    text = str(jax.make_jaxpr(function)(*arguments))
    assert f"vmem_limit_bytes={most * 2**20}" in text
