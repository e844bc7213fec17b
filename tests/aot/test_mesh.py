"""Attention on a mesh through the real compilers of TPUs and GPUs: what compiles, what is sent, and when.

Compiled, not run: numbers are proven on simulated devices, in tests/parallel.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

import kernelry
from kernelry import masks
from kernelry.parallel import Sharding

pytestmark = pytest.mark.aot

CUT = Sharding(batch="data", heads="tensor")
SPEC = PartitionSpec("data", None, "tensor")
LOOP_OF_STEPS = {"forward": 2, "backward": 4}
"""Arrays that each step sends on: keys and values, and in the backward pass their gradients."""


def shapes(batch=4, q_len=1024, kv_len=1024, heads=8, kv_heads=4, head_dim=128):
    sizes = ((q_len, heads), (kv_len, kv_heads), (kv_len, kv_heads))
    return [jax.ShapeDtypeStruct((batch, *size, head_dim), jnp.bfloat16) for size in sizes]


def collectives(text):
    return sorted(
        set(re.findall(r" (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\(", text))
    )


MODES = {
    "train": (lambda **options: jax.grad(_sum(mode="train", **options), argnums=(0, 1, 2)), {}),
    "prefill": (lambda **options: _sum(mode="prefill", **options), {}),
    "decode": (lambda **options: _sum(mode="decode", **options), {"q_len": 1, "kv_len": 4096}),
}


def _sum(mask=None, **options):
    def run(query, key, value):
        shown = masks.Causal() if query.shape[1] == key.shape[1] else masks.Causal().at(query_offset=key.shape[1] - 1)
        out = kernelry.attention(query, key, value, mask=mask or shown, **options)
        return out.astype(jnp.float32).sum()

    return run


@pytest.mark.parametrize("target", ["tpu:v5e:2x2", "gpu:h100:4"])
@pytest.mark.parametrize("mode", MODES)
def test_auto_compiles_for_a_mesh_and_sends_no_operand(target, mode, compile_for):
    make, sizes = MODES[mode]
    with kernelry.use(sharding=CUT), kernelry.record() as made:
        found = compile_for(
            target, make(), shapes(**sizes), mesh_shape={"data": 2, "tensor": 2}, specs=(SPEC, SPEC, SPEC)
        )
    assert made[0].shards is not None
    assert found.outcome in (found.outcome.OK, found.outcome.UNCHECKED), found.reason
    if found.compiled is not None:
        assert set(collectives(found.compiled.as_text())) <= {"all-reduce"}  # of the sum, a scalar


@pytest.mark.parametrize("kernel", ["splash", "tokamax_splash"])
def test_a_kernel_that_xla_cannot_partition_is_refused_before_it_fails(kernel, compile_for):
    with pytest.raises(kernelry.errors.KernelRefusedError, match="XLA does not partition it over the automatic axes"):
        compile_for(
            "tpu:v5e:2x2", _sum(kernel=kernel), shapes(), mesh_shape={"data": 2, "tensor": 2}, specs=(SPEC, SPEC, SPEC)
        )


def test_auto_without_a_sharding_says_that_work_is_repeated(compile_for):
    with pytest.warns(UserWarning, match="every device of the active mesh computes the whole call"):
        found = compile_for(
            "tpu:v5e:2x2", _sum(), shapes(), mesh_shape={"data": 2, "tensor": 2}, specs=(SPEC, SPEC, SPEC)
        )
    assert found.ok, found.reason


def ring(compile_for, target, devices, sharding, *, length, heads, kv_heads, kernel="splash", mask=None):
    spec = PartitionSpec(None, "context")
    step = jax.grad(_sum(kernel=kernel, mask=mask), argnums=(0, 1, 2))
    sizes = {"batch": 1, "q_len": length, "kv_len": length, "heads": heads, "kv_heads": kv_heads}
    with kernelry.use(sharding=sharding):
        return compile_for(target, step, shapes(**sizes), mesh_shape={"context": devices}, specs=(spec, spec, spec))


def loops(text):
    """The instructions of each loop that sends something, in the order of the schedule."""
    bodies = re.split(r"\n(?=%|ENTRY)", text)
    wanted = re.compile(r" (collective-permute-start|collective-permute-done|conditional)\(")
    found = [wanted.findall(body) for body in bodies if not body.startswith("ENTRY")]
    return [names for names in found if "collective-permute-start" in names]


@pytest.mark.parametrize("order", ["contiguous", "dual_chunk", "striped"])
def test_keys_and_their_gradients_are_sent_while_a_kernel_runs(order, compile_for):
    found = ring(compile_for, "tpu:v5e:2x4", 8, f"sequence=context ring {order}", length=8192, heads=8, kv_heads=2)
    assert found.ok, found.reason
    text = found.compiled.as_text()
    assert collectives(text) == ["all-reduce", "collective-permute"] or collectives(text) == ["collective-permute"]
    sent = {len([name for name in names if name.endswith("start")]): names for names in loops(text)}
    assert set(sent) == set(LOOP_OF_STEPS.values())
    for count, names in sent.items():
        kernel = names.index("conditional") if "conditional" in names else None
        if kernel is not None:  # with striped tokens every step of a loop may be of one class
            assert names[:kernel].count("collective-permute-start") == count
            assert names[kernel:].count("collective-permute-done") == count


@pytest.mark.parametrize(
    ("heads", "kv_heads", "most"), [(8, 1, 2.4e9), (8, 8, 5.5e9)], ids=["one key/value head", "eight"]
)
def test_a_million_tokens_fit(heads, kv_heads, most, compile_for):
    sizes = {"length": 2**20, "heads": heads, "kv_heads": kv_heads}
    found = ring(compile_for, "tpu:v5e:4x4", 16, "sequence=context ring dual", **sizes)
    assert found.ok, found.reason
    assert found.memory["temporaries"] <= most
    assert found.compiled.as_text().count('custom_call_target="tpu_custom_call"') <= 9


def test_the_program_does_not_grow_with_the_devices(compile_for):
    calls = {}
    for target, devices in (("tpu:v5e:2x2", 4), ("tpu:v5e:2x4", 8), ("tpu:v5e:4x4", 16)):
        found = ring(
            compile_for, target, devices, "sequence=context ring dual", length=1024 * devices, heads=8, kv_heads=2
        )
        calls[devices] = found.compiled.as_text().count('custom_call_target="tpu_custom_call"')
    assert len(set(calls.values())) == 1, calls


@pytest.mark.parametrize("kernel", ["splash", "tokamax_splash"])
@pytest.mark.parametrize("sharding", ["heads=context", "sequence=context ring", "sequence=context ulysses"])
def test_saving_one_name_runs_no_kernel_again(kernel, sharding, compile_for):
    spec = PartitionSpec(None, None, "context") if "heads" in sharding else PartitionSpec(None, "context")
    attend = _sum(kernel=kernel)
    policies = jax.checkpoint_policies
    saved = {"kept": policies.everything_saveable, "nothing": policies.nothing_saveable}
    saved["named"] = policies.save_only_these_names("context")
    calls = {}
    for name, policy in saved.items():
        step = jax.value_and_grad(jax.checkpoint(attend, policy=policy), argnums=(0, 1, 2))
        with kernelry.use(sharding=sharding):
            found = compile_for(
                "tpu:v5e:2x2", step, shapes(2, 2048, 2048), mesh_shape={"context": 4}, specs=(spec, spec, spec)
            )
        assert found.ok, found.reason
        calls[name] = found.compiled.as_text().count('custom_call_target="tpu_custom_call"')
    assert calls["named"] == calls["kept"] < calls["nothing"]
