"""Saving what is named `context` is enough: the backward pass of a rematerialised layer repeats no forward pass."""

import functools

import cudnn_stand_in
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rematerialised
from flax import nnx
from pairs import covering, sweep_but

import kernelry
from kernelry import masks, testing
from kernelry.flax import AttentionOp
from kernelry.plugin import Mode

pytestmark = [
    pytest.mark.versions,
    pytest.mark.filterwarnings("ignore:adapters of .* more than double the memory:UserWarning"),
]

KERNELS = ["splash", "tokamax_splash", "pallas_flash", "pallas_mha", "blockwise"]
"""Those that run here, and have a backward pass."""
SIZES = {"as they are": (128, 64), "padded": (120, 80)}
"""T and H; those that are padded are no multiples of a block or of 128."""
AXES = {"kernel": KERNELS, "mask": ["causal", "packed"], "sinks": [False, True], "size": list(SIZES)}


def _mask(kernel, name, length):
    packed = masks.Segments(jnp.asarray(np.repeat([4, -1, 2], [length // 2, 9, length - length // 2 - 9])))
    if name == "causal":
        return masks.Causal()
    return packed if kernel == "pallas_mha" else masks.Causal() & packed


def _case(case, *, dtype="float32"):
    """A loss whose backward pass reads the output, and its arrays."""
    length, head_dim = SIZES[case["size"]]
    rng = np.random.default_rng(0)
    shapes = [(1, length, 2, head_dim), (1, length, 1, head_dim), (1, length, 1, head_dim)]
    shapes += [(2,)] if case["sinks"] else []
    mask = _mask(case["kernel"], case["mask"], length)

    def loss(query, key, value, *sinks):
        extra = {"sinks": sinks[0]} if sinks else {}
        out = kernelry.attention(query, key, value, mask=mask, kernel=case["kernel"], **extra)
        return jnp.sin(out.astype(jnp.float32)).sum()

    return loss, [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def _check(case):
    loss, arrays = _case(case)
    with testing.interpret():
        rematerialised.check(loss, *arrays)


def _name(case):
    return " ".join(map(str, case.values()))


@pytest.mark.parametrize("case", covering(**AXES), ids=_name)
def test_no_kernel_runs_forward_again(case):
    _check(case)


@pytest.mark.sweep
@pytest.mark.parametrize("mask", AXES["mask"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_kernel_runs_forward_again_in_any_case(kernel, mask):
    for sinks in AXES["sinks"]:
        for size in AXES["size"]:
            _check({"kernel": kernel, "mask": mask, "sinks": sinks, "size": size})


@pytest.mark.parametrize("kernel", sweep_but(KERNELS, "splash", "blockwise"))
def test_gradients_are_the_same(kernel):
    loss, arrays = _case({"kernel": kernel, "mask": "packed", "sinks": True, "size": "padded"})
    losses = (loss, jax.checkpoint(loss, policy=rematerialised.SAVED))
    with testing.interpret():
        plain, again = jax.jit(lambda *arrays: [jax.grad(f, (0, 1, 2, 3))(*arrays) for f in losses])(*arrays)
    assert all(np.asarray(gradient).any() for gradient in plain)
    for one, other in zip(plain, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("kernel", [*KERNELS, "dot_product"])
def test_what_is_saved_is_one_output_and_statistics_of_rows(kernel, sinks):
    """An array with two names would be kept twice, once under each."""
    loss, arrays = _case({"kernel": kernel, "mask": "packed", "sinks": sinks, "size": "as they are"})
    with testing.interpret():
        shapes = rematerialised.saved(loss, *arrays)
    elements = [int(np.prod(shape)) for shape in shapes]
    assert elements.count(arrays[0].size) == 1
    statistics = [size for size in elements if size != arrays[0].size]
    assert set(statistics) <= {2 * 128}  # N T
    # lse, and what rounding took from it; `dot_product` has probabilities instead, which no policy should save.
    assert len(statistics) in ([0] if kernel == "dot_product" else [1, 2])


def test_a_partial_names_its_statistics():
    _, (query, key, value) = _case({"kernel": "splash", "mask": "causal", "sinks": False, "size": "as they are"})

    def loss(query, key, value):
        found = kernelry.attention(query, key, value, mask=masks.Causal(), kernel="splash", return_partial=True)
        return (found.lse * jnp.sin(found.out.sum(axis=-1)).swapaxes(1, 2)).sum()

    with testing.interpret():
        rematerialised.check(loss, query, key, value)


@pytest.mark.parametrize("kernel", ["splash", "tokamax_splash"])
def test_no_kernel_runs_forward_again_with_64_bit_types_enabled(kernel):
    loss, arrays = _case({"kernel": kernel, "mask": "causal", "sinks": False, "size": "as they are"})
    with jax.enable_x64(True), testing.interpret():
        rematerialised.check(loss, *arrays)


def test_no_kernel_runs_forward_again_with_largest_logits():
    _, arrays = _case({"kernel": "tokamax_splash", "mask": "causal", "sinks": False, "size": "as they are"})

    def loss(query, key, value):
        out, largest = kernelry.attention(
            query, key, value, mask=masks.Causal(), kernel="tokamax_splash", return_max_logits=True
        )
        return jnp.sin(out).sum() + largest.sum()

    with testing.interpret():
        rematerialised.check(loss, *arrays)


@pytest.mark.parametrize("kernel", ["splash", "pallas_flash", "blockwise"])
def test_no_kernel_runs_forward_again_under_vmap(kernel):
    loss, arrays = _case({"kernel": kernel, "mask": "causal", "sinks": False, "size": "as they are"})
    both = [jnp.stack([array, array]) for array in arrays]
    with testing.interpret():
        rematerialised.check(lambda *arrays: jax.vmap(loss)(*arrays).sum(), *both)


@pytest.mark.parametrize("kernel", ["splash", "pallas_flash", "blockwise"])
def test_no_kernel_runs_forward_again_in_a_shard_map(kernel):
    loss, arrays = _case({"kernel": kernel, "mask": "causal", "sinks": False, "size": "as they are"})
    mesh = jax.make_mesh((1,), ("x",))
    everywhere = jax.sharding.PartitionSpec()
    mapped = jax.shard_map(loss, mesh=mesh, in_specs=(everywhere,) * 3, out_specs=everywhere, check_vma=False)
    with testing.interpret():
        rematerialised.check(mapped, *arrays)


# Layers


LAYERS = 3


@pytest.mark.parametrize("kernel", ["splash", "tokamax_splash", "pallas_flash", "blockwise"])
def test_no_kernel_runs_forward_again_in_a_scan_over_layers(kernel):
    _, (query, key, value) = _case({"kernel": kernel, "mask": "causal", "sinks": False, "size": "as they are"})

    def model(policy, weights):
        def layer(query, weight):
            return kernelry.attention(query * weight, key, value, mask=masks.Causal(), kernel=kernel), None

        body = layer if policy is None else jax.checkpoint(layer, policy=policy, prevent_cse=False)
        return jnp.sin(jax.lax.scan(body, query, weights)[0]).sum()

    weights = jnp.ones((LAYERS, 1, 1, 1, 1))
    with testing.interpret():
        found = [
            rematerialised.calls(functools.partial(model, policy), weights)
            for policy in (None, rematerialised.SAVED, rematerialised.NOTHING)
        ]
    assert found[1] == found[0]
    assert found[2] > found[0]


@pytest.mark.parametrize("kernel", ["pallas_flash", "splash"])
def test_no_kernel_runs_forward_again_in_a_flax_layer(kernel):
    _, arrays = _case({"kernel": kernel, "mask": "causal", "sinks": False, "size": "as they are"})

    def loss(policy, query, key, value):
        module = AttentionOp(mask=masks.Causal())
        run = lambda module, *arrays: module(*arrays)  # noqa: E731
        run = run if policy is None else nnx.remat(run, policy=policy)
        return jnp.sin(run(module, query, key, value)).sum()

    with testing.interpret(), kernelry.use(kernel=kernel):
        found = [
            rematerialised.calls(functools.partial(loss, policy), *arrays)
            for policy in (None, rematerialised.SAVED, rematerialised.NOTHING)
        ]
    assert found[1] == found[0]
    assert found[2] > found[0]


# Kernels that JAX differentiates, or that run elsewhere


def test_dot_product_saves_its_output_for_what_follows():
    """Its own derivative reads probabilities of T × S, which no policy should save: both products are repeated."""
    loss, arrays = _case({"kernel": "dot_product", "mask": "causal", "sinks": False, "size": "as they are"})
    assert rematerialised.saved(loss, *arrays) == [arrays[0].shape]


def test_an_output_without_gradients_of_its_own_has_the_name():
    """Where attention is not trained, what follows it may be."""
    _, arrays = _case({"kernel": "splash", "mask": "causal", "sinks": False, "size": "as they are"})

    def loss(weight):
        out = kernelry.attention(*arrays, mask=masks.Causal(), kernel="splash", mode=Mode.PREFILL)
        return jnp.sin(out * weight).sum()

    with testing.interpret():
        rematerialised.check(loss, jnp.float32(1))


@pytest.mark.parametrize("more", ["causal", "lengths", "sinks", "bias"])
def test_cudnn_jax_runs_forward_once(more):
    arrays = _case(
        {"kernel": "cudnn_jax", "mask": "causal", "sinks": more == "sinks", "size": "padded"}, dtype="bfloat16"
    )[1]
    mask = masks.Causal() & masks.Lengths(np.array([77], np.int32)) if more == "lengths" else masks.Causal()
    arrays += [jnp.zeros((1, 2, 120, 120), "bfloat16")] if more == "bias" else []

    def loss(query, key, value, *rest):
        extra = {more: rest[0]} if rest else {}
        out = kernelry.attention(query, key, value, mask=mask, kernel="cudnn_jax", **extra)
        return jnp.sin(out.astype(jnp.float32)).sum()

    with cudnn_stand_in.cudnn(), kernelry.use(target=cudnn_stand_in.TARGET):
        rematerialised.check(loss, *arrays)
        found = rematerialised.calls(loss, *arrays)
    assert found["dot_product_attention_fwd_wrapper"] == 1


@pytest.mark.parametrize("sinks", sweep_but([False, True], False))
def test_tokamax_mosaic_runs_forward_once(sinks, lower):
    """Counted in the program: its calls are not made by `pallas_call`."""
    loss, arrays = _case(
        {"kernel": "tokamax_mosaic", "mask": "causal", "sinks": sinks, "size": "as they are"}, dtype="bfloat16"
    )

    def count(function):
        gradients = jax.value_and_grad(function, tuple(range(len(arrays))))
        return lower(gradients, arrays, "gpu:h100")[1].as_text().count("@mosaic_gpu_v2")

    assert count(loss) == 3
    assert count(jax.checkpoint(loss, policy=rematerialised.SAVED)) == 3
    assert count(jax.checkpoint(loss, policy=rematerialised.NOTHING)) == 4
