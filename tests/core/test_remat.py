"""What core names for `jax.checkpoint` policies: several parts at once, and kernels that give no name themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rematerialised
from honest_kernels import BACKWARD, HONEST_BACKWARD

import kernelry
from kernelry import masks
from kernelry.execution.attend import BoundKernel, attend
from kernelry.plugin import REMAT_NAME, Inputs, Request, Tiling

pytestmark = pytest.mark.versions

B, T, N, H = 1, 16, 2, 8
QKV = [jnp.asarray(np.random.default_rng(seed).standard_normal((B, T, N, H)), jnp.float32) for seed in range(3)]
NAMING = dataclasses.replace(HONEST_BACKWARD, capabilities=dataclasses.replace(BACKWARD, names_residuals=True))


def _names(function, *arrays):
    return str(jax.make_jaxpr(function)(*arrays)).count(f"name={REMAT_NAME}")


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_several_parts_of_the_keys_run_forward_once(sinks):
    request = Request(batch=B, q_len=T, kv_len=T // 2, q_heads=N, head_dim=H, mode="train", sinks=False)
    spec = next(kernel.spec for kernel in kernelry.kernels() if kernel.name == "blockwise")
    parts = (BoundKernel(spec, request, Tiling.of(block_q=8, block_kv=8)),) * 2

    def loss(query, key, value, *sinks):
        halves = (slice(None, T // 2), slice(T // 2, None))
        inputs = tuple(Inputs(query, key[:, half], value[:, half]) for half in halves)
        return jnp.sin(attend(parts, inputs, sinks=sinks[0] if sinks else None, statistics=False).out).sum()

    arrays = [*QKV, jnp.zeros(N)] if sinks else QKV
    rematerialised.check(loss, *arrays)
    assert rematerialised.saved(loss, *arrays) == sorted([(B, T, N, H), *[(B, N, T)] * 4])  # lse and rest of each part


@pytest.mark.parametrize(("spec", "count"), [(HONEST_BACKWARD, 1), (NAMING, 0)], ids=["core", "kernel"])
def test_core_names_the_output_of_a_kernel_unless_its_own_derivative_does(spec, count):
    def call(query, key, value):
        return kernelry.attention(query, key, value, mask=masks.Causal(), kernel=spec.name)

    with kernelry.use(kernels=[spec]):
        assert _names(call, *QKV) == count


def test_core_names_the_output_where_no_gradient_is_asked_for():
    """The kernel's own derivative is not taken then, and gives no names."""

    def call(query, key, value):
        return kernelry.attention(query, key, value, mask=masks.Causal(), mode="prefill", kernel=NAMING.name)

    with kernelry.use(kernels=[NAMING]):
        assert _names(call, *QKV) == 1
