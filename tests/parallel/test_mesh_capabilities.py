"""What a kernel declares of meshes: `manual_axes`, `partitioned_by_xla`, and what compiled programs have of it."""

import collections
import dataclasses
import functools
import re

import cudnn_stand_in
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import sweep_but
from sharded_cases import (
    BY_HEAD,
    CAUSAL,
    PLAIN,
    B,
    H,
    K,
    N,
    assert_is_the_whole_call,
    attending,
    derived,
    mapped,
    mesh,
    operands,
    place,
)

import kernelry
from kernelry.cache import PagedCache
from kernelry.errors import PluginError
from kernelry.plugin import Capabilities, Kernel, ManualAxes, Partial
from kernelry.testing import reference_attention, reference_gradients

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


# Programs


def of_program(function, *arguments):
    """How often each operation is in the compiled program."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return collections.Counter(re.findall(r"= \S+ ([\w-]+)\(", text))


@pytest.mark.parametrize("kernel", ["splash", "pallas_flash"])
def test_being_checked_in_a_shard_map_adds_nothing_to_the_compiled_program(kernel):
    def run(arrays, check):
        found, pull = jax.vjp(lambda arrays: mapped(attending(kernel), arrays, CAUSAL, check=check), arrays)
        return found, pull(jnp.ones_like(found))[0]

    with place(kernel):
        checked, plain = (of_program(functools.partial(run, check=check), operands()) for check in (True, False))
    assert checked == plain
    assert not set(COLLECTIVES) & set(checked)


@pytest.mark.filterwarnings("ignore:.*every device of the active mesh computes the whole call")
@pytest.mark.parametrize("kernel", ["splash", "dot_product"])
def test_a_mesh_without_a_shard_map_changes_no_program(kernel):
    def primitives():
        """How often each is in the program, derivatives that are waiting included."""
        with place(kernel):
            return collections.Counter(
                re.findall(r" = (\w+)", str(jax.make_jaxpr(attending(kernel))(operands(), CAUSAL)))
            )

    wanted = primitives()
    with jax.set_mesh(mesh()):
        assert primitives() == wanted
    assert wanted["dot_general"] + wanted["pallas_call"]


ACCELERATED = {"splash": "tpu:v5e", "tokamax_splash": "tpu:v5e", "tokamax_mosaic": "gpu:h100", "paged": "tpu:v5e"}


@pytest.mark.parametrize("kernel", sweep_but(ACCELERATED, "tokamax_mosaic", "paged"))
def test_programs_for_accelerators_make_the_same_calls_checked_and_unchecked(kernel):
    shapes = {
        "query": (B, 1 if kernel == "paged" else 256, N, 128),
        **dict.fromkeys(("key", "value"), (B, 256, K, 128)),
    }
    arrays = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}

    def step(arrays, mask):
        query, key, value = arrays["query"], arrays["key"], arrays["value"]
        sizes = {"rows": 1, "pages": 16, "page_size": 16, "max_length": 256, "kv_heads": 1, "head_dim": 128}
        cache = PagedCache.create(**sizes, dtype=jnp.bfloat16).append(key, value)
        return cache.attend(query, kernel=kernel)

    def gradients(arrays, mask, check):
        call = functools.partial(mapped, attending(kernel), mask=mask, check=check)
        found, pull = jax.vjp(call, arrays)
        return pull(found)

    def calls(check):
        run = functools.partial(mapped, step) if kernel == "paged" else gradients
        traced = jax.jit(functools.partial(run, mask=CAUSAL, check=check)).trace(arrays)
        platform = "tpu" if ACCELERATED[kernel].startswith("tpu") else "cuda"
        return traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.custom_call")

    with kernelry.use(target=ACCELERATED[kernel]):
        assert calls(True) == calls(False) > 0


@pytest.mark.filterwarnings("ignore:.*every device of the active mesh computes the whole call")
def test_xla_gathers_nothing_for_a_kernel_that_is_declared_partitioned_by_it():
    """Batch and heads over Auto axes, forward and backward, without a shard_map; several blocks of keys."""
    placed = jax.ShapeDtypeStruct((B, 1024, N, H), jnp.float32, sharding=jax.NamedSharding(mesh(), BY_HEAD))

    def run(query, kernel):
        def attend(query):
            return kernelry.attention(query, query, query, mask=CAUSAL, kernel=kernel)

        found, pull = jax.vjp(attend, query)
        return found, pull(jnp.ones_like(found))[0]

    declared = {kernel.name for kernel in kernelry.kernels() if kernel.spec.capabilities.partitioned_by_xla}
    programs = {kernel: of_program(functools.partial(run, kernel=kernel), placed) for kernel in PLAIN}
    gathering = {kernel for kernel, program in programs.items() if set(COLLECTIVES) & set(program)}
    assert (declared, gathering) == ({"dot_product", "cudnn_jax", "cudnn_te"}, {"blockwise"})


# Kernels


@pytest.mark.parametrize("check", [True, pytest.param(False, marks=pytest.mark.sweep)])
def test_cudnn_jax_in_a_shard_map_is_the_whole_call(check):
    arrays = {name: array.astype(np.float16) for name, array in operands(sinks=(N,)).items()}
    with cudnn_stand_in.stand_in():
        out, gradients = derived(attending("cudnn_jax"), arrays, CAUSAL, check=check)
    wanted = reference_gradients(**arrays, mask=CAUSAL, d_out=np.ones(out.shape))
    np.testing.assert_allclose(out, reference_attention(**arrays, mask=CAUSAL).out, rtol=4e-3, atol=4e-3)
    for name, found in gradients.items():
        np.testing.assert_allclose(found, getattr(wanted, name), rtol=1e-2, atol=1e-2, err_msg=name)


@dataclasses.dataclass(frozen=True)
class LoopedKernel(Kernel):
    """dot_product inside a loop whose start varies over no axis, as vendors' kernels have them."""

    def forward(self, inputs, request, tiling, *, statistics):
        body = next(kernel.spec for kernel in kernelry.kernels() if kernel.name == "dot_product").body()

        def visit(_, out):
            return out + body.forward(inputs, request, tiling, statistics=False).out

        out = jax.lax.fori_loop(0, 1, visit, jnp.zeros(inputs.query.shape, jnp.float32))
        found = body.forward(inputs, request, tiling, statistics=statistics)
        return dataclasses.replace(found, out=out.astype(found.out.dtype))


def looped(**declared):
    spec = next(kernel.spec for kernel in kernelry.kernels() if kernel.name == "dot_product")
    capabilities = dataclasses.replace(spec.capabilities, **declared)
    return dataclasses.replace(spec, name="looped", load=LoopedKernel, capabilities=capabilities)


@pytest.mark.parametrize("partial", [False, True])
def test_a_kernel_that_jax_differentiates_need_not_pass_the_check(partial):
    arrays = operands()

    def attend(arrays, mask):
        found = kernelry.attention(**arrays, mask=mask, kernel="looped", return_partial=partial)
        return kernelry.finalize(found) if partial else found

    with kernelry.use(kernels=[looped(manual_axes=ManualAxes.UNCHECKED)]):
        assert_is_the_whole_call(derived(attend, arrays, CAUSAL), arrays, CAUSAL)


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_a_key_that_differs_by_device_reaches_a_kernel_that_is_not_checked(make_key):
    def attend(arrays, mask, kernel):
        key = jax.random.fold_in(make_key(0), jax.lax.axis_index("batch"))
        return kernelry.attention(**arrays, mask=mask, kernel=kernel, dropout_rate=0.4, dropout_rng=key)

    with kernelry.use(kernels=[looped(manual_axes=ManualAxes.UNCHECKED)]):
        found, wanted = (
            derived(functools.partial(attend, kernel=kernel), operands(), CAUSAL)
            for kernel in ("looped", "dot_product")
        )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), found, wanted)


def test_a_kernel_is_unchecked_unless_it_declares_otherwise():
    assert Capabilities().manual_axes is ManualAxes.UNCHECKED
    with (
        kernelry.use(kernels=[looped(manual_axes=ManualAxes.CHECKED)]),
        pytest.raises(TypeError, match="carry input and carry output must have equal types"),
    ):
        derived(attending("looped"), operands(), CAUSAL)


def test_what_a_kernel_returns_is_checked_in_a_shard_map_too():
    spec = dataclasses.replace(looped(manual_axes=ManualAxes.UNCHECKED), name="careless", load=CarelessKernel)
    with kernelry.use(kernels=[spec]), pytest.raises(PluginError, match=r"kernel 'careless' .* returned a wrong"):
        derived(attending("careless"), operands(), CAUSAL)


class CarelessKernel(Kernel):
    """Returns an output without its heads."""

    def forward(self, inputs, request, tiling, *, statistics):
        return Partial(inputs.query[:, :, 0], dtype=request.dtype)
