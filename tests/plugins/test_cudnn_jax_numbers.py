"""cudnn_jax with plain JAX in place of cuDNN, against the float64 oracle: plumbing, not cuDNN's numbers.

The stand-in reads what JAX's primitives are given, and leaves NaN wherever cuDNN promises nothing.
"""

import os
import subprocess
import sys

import cudnn_stand_in
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import covering

import kernelry
from kernelry import masks, testing
from kernelry.plugin import Inputs, Request, Tiling
from kernelry.testing.conformance import run
from kernelry_cudnn_te.plugin import CUDNN_JAX

CLOSE = {"rtol": 4e-3, "atol": 4e-3}
"""float16 has 11 bits of mantissa, and d_out is of order 1."""

LENGTHS = np.array([20, 0], np.int32)
MASKS = [
    masks.Full(),
    masks.Causal(),
    masks.SlidingWindow(5),
    masks.Lengths(LENGTHS),
    masks.Lengths(np.array([48, 9], np.int32), np.array([0, 30], np.int32)),
    masks.Causal() & masks.Lengths(LENGTHS),
    masks.SlidingWindow(3) & masks.Lengths(np.array([20, 5], np.int32)),
]
EDGES = [
    masks.SlidingWindow(0),
    masks.Lengths(jnp.array([99, -3])),
    masks.Lengths(11) & masks.Lengths([7, 20], 40),
]


@pytest.fixture
def arrays(make_arrays):
    def make(q_len=48, kv_len=None, **options):
        sizes = {"heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float16", "batch": 2}
        return make_arrays(q_len, kv_len, **{**sizes, **options})

    return make


def _values(arrays, extras, options):
    """The output, and the gradients of query, key, value and of the extras."""
    *operands, d_out = arrays

    def attend(query, key, value, extras):
        return kernelry.attention(query, key, value, kernel="cudnn_jax", **extras, **options)

    return _pulled(attend, d_out, *operands, extras)


def _pulled(attend, d_out, *operands):
    def run(d_out, *operands):
        out, pull = jax.vjp(attend, *operands)
        return out, pull(d_out.astype(out.dtype))

    return jax.jit(run)(d_out, *operands)


def _wanted(arrays, extras=None, **options):
    """As `_values`, in float64."""
    wide, extras = jax.tree.map(lambda array: np.asarray(array, np.float64), (arrays, extras or {}))
    known = {name: value for name, value in options.items() if name != "gradients"} | extras
    found = testing.reference_gradients(*wide[:3], d_out=wide[3], **known)
    shares = {name: getattr(found, name) for name in extras}
    return testing.reference_attention(*wide[:3], **known).out, (found.query, found.key, found.value, shares)


def check(arrays, extras=None, close=CLOSE, **options):
    """Compares cudnn_jax with the oracle, gradients of the extras included; returns the adapters that it took."""
    extras = extras or {}
    with cudnn_stand_in.stand_in(), kernelry.record() as resolutions:
        out, gradients = _values(arrays, extras, options)
    wanted, wanted_gradients = _wanted(arrays, extras, **options)
    assert out.dtype == arrays[0].dtype
    _same(out, wanted, close)
    jax.tree.map(lambda found, right: _same(found, right, close), gradients, wanted_gradients)
    return [step.adapter.name for step in resolutions[0].plan.steps]


def _same(found, right, close=CLOSE):
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(right, np.float32), **close)


FORMS = [masks.Full(), masks.Causal(), masks.Causal() & masks.Lengths(LENGTHS)]
FORMS += [masks.SlidingWindow(3) & masks.Lengths(np.array([20, 5], np.int32), np.array([48, 30], np.int32))]
SMOKE = covering(
    mask=FORMS,
    extras=[(), ("bias",), ("sinks",)],
    dtype=["float16", "bfloat16"],
    heads=[(2, (1, 4)), (1, (2, 1)), (4, (2, 4))],  # K; rows and heads of the bias
    scale=[None, 0.3],
)
SINKS = jnp.asarray([-1.0, 0.0, 1.0, 2.0])


def _bias(shape, dtype="float16"):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)


@pytest.mark.parametrize("case", SMOKE, ids=lambda case: " ".join(map(str, case.values())))
def test_every_two_features_agree_with_the_oracle(case, arrays):
    kv_heads, alike = case["heads"]
    given = arrays(kv_heads=kv_heads, dtype=case["dtype"])
    drawn = {"bias": _bias((*alike, 48, 48), case["dtype"]), "sinks": SINKS.astype(case["dtype"])}
    extras = {name: drawn[name] for name in case["extras"]}
    options = {"mask": case["mask"], "scale": case["scale"]}
    if "bias" in extras and "lengths" in str(case["mask"].form):  # beside lengths cuDNN gives it no gradient
        options |= {"bias": extras.pop("bias"), "gradients": ("query", "key", "value")}
    close = {"float16": 1e-2 if case["extras"] else 4e-3, "bfloat16": 4e-2}[case["dtype"]]
    adapters = check(given, extras, close={"rtol": close, "atol": close}, **options)
    assert ("sinks_from_lse" in adapters) == ("sinks" in case["extras"])


@pytest.mark.parametrize("mask", [*EDGES, *(pytest.param(mask, marks=pytest.mark.sweep) for mask in MASKS)], ids=str)
def test_masks(mask, arrays):
    check(arrays(), mask=mask)


@pytest.mark.parametrize("mask", [masks.Causal().at(query_offset=0), masks.Lengths([7, 90])], ids=str)
@pytest.mark.parametrize(("q_len", "kv_len"), [(48, 96), pytest.param(96, 48, marks=pytest.mark.sweep)])
def test_unequal_lengths(mask, q_len, kv_len, arrays):
    check(arrays(q_len, kv_len), mask=mask)


def test_a_window_over_fewer_keys_is_padded(arrays):
    assert "pad_sequence" in check(arrays(48, 24), mask=masks.SlidingWindow(3).at(query_offset=0))


@pytest.mark.parametrize(
    "mask", [pytest.param(masks.Full(), marks=pytest.mark.sweep), masks.Causal(), masks.Lengths(LENGTHS)], ids=str
)
def test_odd_lengths(mask, arrays):
    adapters = check(arrays(47), mask=mask)
    assert ("pad_sequence" in adapters) == (not isinstance(mask, masks.Lengths))


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_grouped_heads_are_read_where_they_stand(kv_heads, arrays):
    assert _steps(arrays(kv_heads=kv_heads)) == []


def test_latent_attention(arrays):
    assert check(arrays(16, head_dim=192, value_dim=128), mask=masks.Causal()) == []


@pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 32), pytest.param(32, 16, marks=pytest.mark.sweep), (13, 13)])
def test_other_head_dims_are_padded(head_dim, value_dim, arrays):
    assert check(arrays(head_dim=head_dim, value_dim=value_dim), mask=masks.Causal()) == ["pad_head_dim"]


def _steps(arrays):
    """The adapters of a call that is traced only."""
    with cudnn_stand_in.stand_in(), kernelry.record() as resolutions:
        jax.eval_shape(lambda *qkv: kernelry.attention(*qkv, mask=masks.Causal(), kernel="cudnn_jax"), *arrays[:3])
    return [step.adapter.name for step in resolutions[0].plan.steps]


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), pytest.param((1, 4), marks=pytest.mark.sweep), (2, 4)], ids=str)
def test_bias_and_its_gradient(shape, arrays):
    check(arrays(), {"bias": _bias((*shape, 48, 48))}, mask=masks.Causal(), close={"rtol": 1e-2, "atol": 1e-2})


def test_a_bias_beside_sinks_has_a_gradient_by_the_kernels_own_backward(arrays):
    """Where there are no statistics to give back, JAX differentiates the kernel."""
    extras = {"bias": _bias((1, 4, 48, 48)), "sinks": SINKS.astype("float16")}
    check(arrays(), extras, mask=masks.Causal(), close={"rtol": 1e-2, "atol": 1e-2})


@pytest.mark.parametrize("mask", [masks.Lengths(LENGTHS), masks.SlidingWindow(5)], ids=str)
def test_a_constant_bias_beside_other_masks(mask, arrays):
    bias = _bias((1, 4, 48, 48), "float32")
    check(arrays(), mask=mask, bias=bias, gradients=("query", "key", "value"))


def test_a_bias_of_another_dtype_is_rounded_to_the_querys(arrays):
    bias = _bias((1, 4, 48, 48), "float32").at[..., 3].set(-1e9)  # beyond float16, whose −inf would give NaN
    check(arrays(), {"bias": bias}, mask=masks.Full())


@pytest.mark.parametrize("mask", [masks.Causal(), MASKS[-1]], ids=str)
def test_partial_holds_a_natural_float32_lse(mask, arrays):
    operands, options = arrays()[:3], {"mode": "prefill", "return_partial": True}
    with cudnn_stand_in.stand_in():
        attend = jax.jit(lambda *qkv: kernelry.attention(*qkv, mask=mask, kernel="cudnn_jax", **options))
        found = attend(*operands)
    assert found.lse.dtype == jnp.float32
    wanted = testing.reference_attention(*operands, mask=mask).lse
    np.testing.assert_allclose(found.lse, wanted, rtol=1e-5, atol=1e-5)


def test_merged_parts_have_the_gradients_of_the_whole(arrays):
    query, key, value, d_out = arrays()

    def merged(query, key, value):
        halves = [
            kernelry.attention(query, key[:, part], value[:, part], mask=mask, kernel="cudnn_jax", return_partial=True)
            for part, mask in ((slice(24), masks.Lengths([24, 0])), (slice(24, None), masks.Lengths([11, 24])))
        ]
        return kernelry.finalize(kernelry.merge(halves))

    with cudnn_stand_in.stand_in():
        out, gradients = _pulled(merged, d_out, query, key, value)
    visible = np.ones((2, 1, 1, 48), bool)
    visible[0, ..., 35:] = visible[1, ..., :24] = False
    wanted, wanted_gradients = _wanted((query, key, value, d_out), mask=masks.Dense(visible))
    _same(out, wanted)
    for found, right in zip(gradients, wanted_gradients, strict=False):
        _same(found, right, {"rtol": 2e-2, "atol": 1e-2})


def test_infinite_lse_contributes_no_gradient(arrays):
    query, key, value, d_out = arrays()
    request = Request(
        target="gpu:h100", batch=2, q_len=48, q_heads=4, kv_heads=2, head_dim=16, dtype="float16", mask=masks.Causal()
    )
    lse = jnp.full((2, 4, 48), jnp.inf)
    with cudnn_stand_in.stand_in():
        body, inputs = CUDNN_JAX.body(), Inputs(query, key, value, mask=(masks.Causal(),))
        shares = jax.jit(lambda: _three(body.backward(inputs, request, Tiling(), d_out, lse, d_out, None)))()
    for share in shares:
        np.testing.assert_array_equal(share, 0.0)


def _three(gradients):
    return gradients.query, gradients.key, gradients.value


def test_nan_in_hidden_slots_never_leaks(arrays):
    query, key, value, d_out = arrays()
    lengths = np.array([20, 48], np.int32)
    hidden = (np.arange(48) >= lengths[:, None])[..., None, None]
    poisoned = (query, *(jnp.where(hidden, jnp.nan, array) for array in (key, value)), d_out)

    def attend(*operands):
        return kernelry.attention(*operands, mask=masks.Lengths(lengths), kernel="cudnn_jax")

    def run(*given):
        out, pull = jax.vjp(attend, *given[:3])
        return out, *pull(given[3])

    with cudnn_stand_in.stand_in():
        run = jax.jit(run)
        found, clean = run(*poisoned), run(query, key, value, d_out)
    jax.tree.map(np.testing.assert_array_equal, found, clean)


@pytest.mark.parametrize("masked", ["by no lengths", "by mapped lengths", "by lengths for all"])
def test_vmap(masked, arrays):
    stacked = tuple(jnp.stack([array, array[::-1]]) for array in arrays())
    lengths = np.array([[48, 7], [20, 0]], np.int32)

    def mask_of(lengths):
        return {
            "by no lengths": masks.Causal(),
            "by mapped lengths": masks.Causal() & masks.Lengths(lengths),
            "by lengths for all": masks.Causal() & masks.Lengths(np.int32([48, 7])),
        }[masked]

    def attend(query, key, value, lengths):
        sinks = jnp.ones(4, query.dtype)
        return kernelry.attention(query, key, value, mask=mask_of(lengths), kernel="cudnn_jax", sinks=sinks)

    def mapped(*operands):
        return jax.vmap(attend)(*operands, jnp.asarray(lengths))

    with cudnn_stand_in.stand_in():
        out, gradients = _pulled(mapped, stacked[3], *stacked[:3])
    for at in range(2):
        one = tuple(array[at] for array in stacked)
        wanted, wanted_gradients = _wanted(one, mask=mask_of(lengths[at]), sinks=np.ones(4))
        for found, right in zip((out, *gradients), (wanted, *wanted_gradients[:3]), strict=True):
            _same(found[at], right, {"rtol": 1e-2, "atol": 1e-2})


def test_latent_attention_under_vmap_fails_aloud(arrays):
    """JAX's rule for vmap gives values the keys' shape; the day it does not, README says too little."""
    operands = tuple(array[None] for array in arrays(16, head_dim=192, value_dim=128)[:3])
    with cudnn_stand_in.stand_in(), pytest.raises(TypeError, match="reshape"):
        jax.vmap(lambda *qkv: kernelry.attention(*qkv, mask=masks.Causal(), kernel="cudnn_jax"))(*operands)


SHARDED = """
import cudnn_stand_in, jax, jax.numpy as jnp, kernelry, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kernelry import masks

query, *kv = (jax.random.normal(jax.random.key(i), (2, 48, n, 16), jnp.float16) for i, n in enumerate((4, 2, 2)))
mask = masks.Causal() & masks.Lengths(jnp.array([20, 48]))

def loss(query, key, value):
    out = kernelry.attention(query, key, value, mask=mask, kernel="cudnn_jax", sinks=jnp.ones(4, jnp.float16))
    return (out.astype(jnp.float32) ** 2).sum(), out

run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
rows = NamedSharding(Mesh(jax.devices(), ("rows",)), PartitionSpec("rows"))
with cudnn_stand_in.stand_in():
    whole, parts = run(query, *kv), run(*jax.device_put((query, *kv), rows))
assert parts[1][0].sharding.is_equivalent_to(rows, 4)
jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3), whole, parts)
"""


def test_rows_on_two_devices():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environ = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", SHARDED], env=environ, check=True)


@pytest.mark.sweep
@pytest.mark.parametrize("quick", [True, False], ids=["quick", "whole"])
def test_conformance_kit_finds_nothing(quick):
    with cudnn_stand_in.at_home() as spec:
        report = run(spec, quick=quick)
    assert report.ok, [(case.name, case.detail) for case in report.failures]
    assert report.served >= (30 if quick else 55)
