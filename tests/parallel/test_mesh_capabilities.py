"""What a kernel declares of meshes: `manual_axes`, `partitioned_by_xla`, and what compiled programs have of it."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from sharded_cases import (
    BY_HEAD,
    CAUSAL,
    PLAIN,
    B,
    H,
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
from kernelry.errors import PluginError
from kernelry.plugin import Capabilities, Kernel, ManualAxes, Partial

pytestmark = pytest.mark.versions

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
    assert (declared, gathering) == ({"dot_product"}, {"blockwise"})


# Other people's kernels


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
