"""Inside a user's own `shard_map` a call is one of each shard, whether JAX checks manual axes there or not.

Batch and heads are sharded over two axes; what is the same on several devices has its gradients summed over them.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sharded_cases import (
    BY_HEAD,
    CAUSAL,
    PACKED,
    PLAIN,
    SPECS,
    STATISTIC,
    B,
    H,
    N,
    T,
    assert_is_the_whole_call,
    attending,
    close,
    derived,
    mapped,
    mesh,
    normal,
    of_rows,
    operands,
    place,
)

import kernelry
from kernelry import masks
from kernelry.cache import QuantizedArray
from kernelry.testing import reference_attention, reference_gradients

pytestmark = pytest.mark.versions

TRAIN = (*PLAIN, "splash", "tokamax_splash", "pallas_flash", "pallas_mha")
DECODE = (*PLAIN, "ragged", "pallas_decode")


# Kernels × features

BIAS = {"bias": (1, N, T, T)}
CASES = {
    "causal": (CAUSAL, {}, {}),
    "packed": (PACKED, {}, {}),
    "sinks": (CAUSAL, {"sinks": (N,)}, {}),
    "sinks_packed": (PACKED, {"sinks": (N,)}, {}),
    "partial": (PACKED, {}, {"return_partial": True}),
    "max_logits": (CAUSAL, {}, {"return_max_logits": True}),
    "bias": (CAUSAL, BIAS, {}),
    "bias_everywhere": (CAUSAL, {"bias": (1, 1, T, T)}, {}),
    "shared_keys": (CAUSAL, {"kv_heads": 1}, {}),
}
"""Mask, operands, options."""
NOT_SERVED = {
    *itertools.product(("splash", "pallas_mha"), ("max_logits", "bias", "bias_everywhere")),
    *itertools.product(("tokamax_splash",), ("bias", "bias_everywhere")),
}
CONSTANT = {("pallas_flash", "bias"), ("pallas_flash", "bias_everywhere")}
"""Without a gradient of the bias, which the kernel does not have."""
SAMPLE = {
    ("dot_product", "sinks_packed", True),
    ("blockwise", "partial", True),
    ("blockwise", "bias_everywhere", True),
    ("splash", "packed", True),
    ("splash", "sinks", True),
    ("splash", "causal", False),
    ("tokamax_splash", "sinks", True),
    ("tokamax_splash", "max_logits", True),
    ("pallas_flash", "partial", True),
    ("pallas_flash", "shared_keys", True),
    ("pallas_flash", "bias_everywhere", True),
    ("pallas_mha", "packed", True),
}
"""What `make test` runs; the rest is swept."""


def served():
    for kernel, case, check in itertools.product(TRAIN, CASES, (True, False)):
        if (kernel, case) not in NOT_SERVED:
            marks = [] if (kernel, case, check) in SAMPLE else [pytest.mark.sweep]
            yield pytest.param(kernel, case, check, marks=marks, id=f"{kernel}-{case}-{check}")


def flat(result):
    """Arrays of a result: the output, then lse or the maximum logits."""
    if isinstance(result, kernelry.Partial):
        return result.out, result.lse
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.filterwarnings("ignore:adapters of")
@pytest.mark.parametrize(("kernel", "case", "check"), list(served()))
def test_a_call_in_a_shard_map_is_the_whole_call(kernel, case, check):
    mask, more, options = CASES[case]
    arrays = operands(**more)
    specs = SPECS | {name: P() for name, array in arrays.items() if name == "bias" and array.shape[1] == 1}
    specs |= dict.fromkeys(("key", "value"), P("batch")) if "kv_heads" in more else {}
    cotangents = normal(B, T, N, H, seed=8), normal(B, N, T, seed=9)[:, :, slice(None) if case == "partial" else 0]
    outputs = (BY_HEAD, STATISTIC)[: 2 if options else 1]
    needed = [name for name in arrays if name != "bias" or (kernel, case) not in CONSTANT]

    def attend(arrays, mask):
        return flat(kernelry.attention(**arrays, mask=mask, kernel=kernel, gradients=needed, **options))

    @jax.jit
    def derived(arrays, mask):
        in_specs = {name: specs[name] for name in arrays}, of_rows(mask)
        call = jax.shard_map(attend, mesh=mesh(), in_specs=in_specs, out_specs=outputs, check_vma=check)
        wanted = {name: arrays[name] for name in needed}
        found, pull = jax.vjp(lambda wanted: call({**arrays, **wanted}, mask), wanted)
        return found, pull(cotangents[: len(found)])[0]

    with place(kernel):
        found, gradients = derived(arrays, mask)
    wanted = reference_attention(**arrays, mask=mask)
    for mine, theirs in zip(found, (wanted.out, wanted.lse if case == "partial" else wanted.max_logits), strict=False):
        close(mine, theirs, 2e-6)
    d_lse = cotangents[1] if case == "partial" else None
    wanted = reference_gradients(**arrays, mask=mask, d_out=cotangents[0], d_lse=d_lse)
    for name in needed:
        close(gradients[name], getattr(wanted, name), 2e-5, name)


@pytest.mark.parametrize("check", [True, pytest.param(False, marks=pytest.mark.sweep)])
def test_dropout_in_a_shard_map_is_that_of_each_shard(check):
    arrays, key = operands(), jax.random.key(3)
    attend = attending("dot_product", dropout_rate=0.3, dropout_rng=key)
    out, gradients = derived(attend, arrays, CAUSAL, check=check)

    @jax.jit
    def of_shard(shard):
        found, pull = jax.vjp(lambda shard: attend(shard, CAUSAL), shard)
        return found, pull(jnp.ones_like(found))[0]

    for row, column in np.ndindex(2, 2):
        part = np.s_[row : row + 1, :, 2 * column : 2 * column + 2]
        kv_part = np.s_[row : row + 1, :, column : column + 1]
        shard = {name: array[part if name == "query" else kv_part] for name, array in arrays.items()}
        own, own_gradients = of_shard(shard)
        close(out[part], own, 2e-6)
        for name, array in own_gradients.items():
            close(gradients[name][part if name == "query" else kv_part], array, 2e-5, name)


# Decode


def stored(arrays, storage):
    if storage is None:
        return arrays
    return arrays | {name: QuantizedArray.quantize(jnp.asarray(arrays[name]), storage) for name in ("key", "value")}


DECODES = [
    pytest.param(
        kernel,
        storage,
        check,
        marks=[]
        if (kernel, storage, check)
        in (("ragged", None, True), ("pallas_decode", "int8", True), ("blockwise", None, True))
        else [pytest.mark.sweep],
    )
    for kernel, storage, check in itertools.product(DECODE, (None, "int8"), (True, False))
    if (kernel, storage) != ("dot_product", "int8")
]


@pytest.mark.parametrize(("kernel", "storage", "check"), DECODES)
def test_a_decode_step_in_a_shard_map_is_the_whole_step(kernel, storage, check):
    arrays, mask = operands(q_len=1, dim=128), masks.Lengths(np.array([100, 37]))
    given = stored(arrays, storage)

    def attend(arrays, mask):
        partial = kernelry.attention(**arrays, mask=mask, kernel=kernel, mode="decode", return_partial=True)
        return kernelry.finalize(kernelry.merge([partial]))

    with place(kernel):
        out = jax.jit(functools.partial(mapped, attend, check=check))(given, mask)
    plain = {
        name: np.asarray(array.dequantize() if name != "query" and storage else array) for name, array in given.items()
    }
    close(out, reference_attention(**plain, mask=mask).out, 2e-6)


# What is around the call, and what the mesh is


@pytest.mark.parametrize(
    "kernel",
    [
        "splash",
        "pallas_flash",
        *(
            pytest.param(k, marks=pytest.mark.sweep)
            for k in ("dot_product", "blockwise", "tokamax_splash", "pallas_mha")
        ),
    ],
)
def test_calls_under_scan_remat_and_vmap_in_a_shard_map(kernel):
    arrays, scales = operands(), jnp.asarray([0.7, 1.3], jnp.float32)

    def layer(x, arrays, mask, kernel, scale):
        return x + kernelry.attention(**{**arrays, "query": x * scale}, mask=mask, kernel=kernel)

    def deep(arrays, mask, kernel=kernel):
        def body(x, scale):
            one_row = functools.partial(layer, kernel=kernel, scale=scale)
            rows = jax.tree.map(lambda array: array[:, None], (x, arrays))
            return jax.checkpoint(jax.vmap(lambda x, arrays: one_row(x, arrays, mask)))(*rows)[:, 0], None

        return jax.lax.scan(body, arrays["query"], scales)[0]

    with place(kernel):
        out, gradients = derived(deep, arrays, CAUSAL)
    wanted, pull = jax.vjp(lambda arrays: deep(arrays, CAUSAL, "dot_product"), jax.tree.map(jnp.asarray, arrays))
    close(out, wanted, 5e-6)
    for name, gradient in pull(jnp.ones_like(wanted))[0].items():
        close(gradients[name], gradient, 4e-5, name)


@pytest.mark.parametrize("kernel", ["splash", pytest.param("tokamax_splash", marks=pytest.mark.sweep)])
def test_a_call_without_64_bit_types_in_a_shard_map(kernel):
    arrays = operands(sinks=(N,))
    with place(kernel), jax.enable_x64(True):
        found = derived(attending(kernel), arrays, PACKED)
    assert_is_the_whole_call(found, arrays, PACKED)


@pytest.mark.parametrize("kernel", ["splash", pytest.param("pallas_flash", marks=pytest.mark.sweep)])
def test_a_call_that_is_alike_on_every_device_of_a_shard_map(kernel):
    arrays = operands()

    def attend(arrays):
        return kernelry.attention(**arrays, mask=CAUSAL, kernel=kernel)

    @jax.jit
    def run(arrays):
        call = jax.shard_map(attend, mesh=mesh(), in_specs=P(), out_specs=P())
        found, pull = jax.vjp(call, arrays)
        return found, pull(jnp.ones_like(found))[0]

    with place(kernel):
        found = run(arrays)
    assert_is_the_whole_call(found, arrays, CAUSAL)


@pytest.mark.parametrize("kernel", ["splash", pytest.param("pallas_flash", marks=pytest.mark.sweep)])
@pytest.mark.parametrize("kind", ["Explicit", pytest.param("Auto", marks=pytest.mark.sweep)])
def test_a_shard_map_over_one_axis_of_a_mesh(kind, kernel):
    """Batch is the shard_map's, the other axis stays JAX's."""
    arrays, where = operands(), mesh(kind)
    batch = dict.fromkeys(arrays, P("batch"))

    @jax.jit
    def run(arrays):
        call = jax.shard_map(
            lambda arrays: kernelry.attention(**arrays, mask=CAUSAL, kernel=kernel),
            mesh=where,
            in_specs=(batch,),
            out_specs=P("batch"),
            axis_names={"batch"},
        )
        found, pull = jax.vjp(call, arrays)
        return found, pull(jnp.ones_like(found))[0]

    placed = {name: jax.device_put(array, jax.NamedSharding(where, P("batch"))) for name, array in arrays.items()}
    with place(kernel):
        found = run(placed)
    assert_is_the_whole_call(found, arrays, CAUSAL)


def test_a_gradient_through_automatic_axes_in_a_checked_map_is_an_error():
    mesh = jax.make_mesh((2, 4), ("rows", "cut"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    query = jnp.ones((2, 64, 4, 16))
    spec = jax.sharding.PartitionSpec("rows")

    def loss(query, check):
        def attend(query):
            return kernelry.attention(query, query, query, kernel="blockwise")

        placed = {"in_specs": spec, "out_specs": spec, "axis_names": {"rows"}}
        return jax.shard_map(attend, **placed, check_vma=check)(query).sum()

    with jax.set_mesh(mesh), kernelry.use(sharding="sequence=cut ring"):
        assert jax.jit(loss, static_argnums=1)(query, True) == jax.jit(loss, static_argnums=1)(query, False)
        with pytest.raises(kernelry.errors.ArgumentError, match="pass check_vma=False to that shard_map"):
            jax.jit(jax.grad(loss), static_argnums=1)(query, True)
