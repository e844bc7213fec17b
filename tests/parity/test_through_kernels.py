"""The golden cases through accelerators' kernels in interpret mode: outputs and gradients, or a refusal that names why.

Sequences of a case are shorter than a block, so where a kernel has no edge blocks, padding goes through the adapters,
too; sinks always do. Decode cases go through the decode kernel one cache at a time, and their parts are merged.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policies import NO_ADAPTERS

import kernelry
from kernelry import testing
from kernelry.errors import KernelRefusedError

pytestmark = pytest.mark.sweep

_REFUSED = {
    "splash": {
        "train_bidirectional_crosses_segments": "mask atom spans",
        "train_indexer": "mask atom dense",
        "train_moba_c8_k3_packed": "mask atom block_selection",
        "chunked_prefill_moba": "mask atom block_selection",
    },
    "pallas_flash": {},
}
"""The cases that a kernel does not serve, and what it says."""

_ADAPTED = {
    "pallas_decode": {"ar_kvquant_int4_dkv": ("dequantize_kv", "kv_quantization=int4:head_dim is not int8:head_dim")}
}
"""The decode cases that a kernel serves through an adapter alone, and what it says without: it refuses no other."""


def _is_for_training_kernels(entry):
    return entry["params"]["model_mode"] != "autoregressive" and entry["params"]["kernel"] != "ragged"


@pytest.mark.cases.with_args(_is_for_training_kernels)
@pytest.mark.parametrize("kernel", _REFUSED)
def test_a_kernel_gives_the_golden_answer_or_names_what_it_refuses(kernel, case, attend):
    operands = {name: jnp.asarray(case.arrays[name]) for name in ("q", "k", "v", "sinks") if name in case.arrays}

    def run(operands):
        arrays = {**case.arrays, **operands}
        return attend(case, arrays, "", sinks=arrays.get("sinks"), kernel=kernel)

    def program(operands):
        if not case.params["has_grads"]:
            return run(operands), {}
        out, pull = jax.vjp(run, operands)
        return out, pull(jnp.asarray(case.cotangent))[0]

    with testing.interpret():
        if case.name in _REFUSED[kernel]:
            with pytest.raises(KernelRefusedError, match=_REFUSED[kernel][case.name]):
                jax.jit(program)(operands)
            return
        out, gradients = jax.jit(program)(operands)
    seen = np.asarray(case.arrays["mask"]).astype(bool).any(axis=-1)  # where a row sees nothing, MaxText differs
    np.testing.assert_allclose(np.asarray(out)[seen], case.arrays["out"][seen], rtol=0, atol=2e-5)
    if seen.all():
        for name, gradient in gradients.items():
            np.testing.assert_allclose(gradient, case.arrays[f"d{name}"], rtol=0, atol=5e-5, err_msg=name)


_IN_BFLOAT16 = {
    "train_chunk24_packed": "mask atom chunked",
    "train_bidirectional_crosses_segments": "mask atom spans",
    "train_indexer": "mask atom dense",
    "train_moba_c8_k3_packed": "mask atom block_selection",
    "train_block_diffusion24_packed": "mask atom block_causal",
    "chunked_prefill_chunk16_unaligned": "mask atom segments_separate",
    "chunked_prefill_moba": "mask atom segments_separate",
}
"""What flywheel, which has no float32, does not serve."""


@pytest.mark.versions
@pytest.mark.cases.with_args(_is_for_training_kernels)
def test_a_kernel_of_bfloat16_gives_the_golden_output_or_names_what_it_refuses(case, attend):
    pytest.importorskip("flywheel_tpu")
    rounded = {name: jnp.asarray(case.arrays[name], jnp.bfloat16) for name in ("q", "k", "v") if name in case.arrays}
    arrays = {**case.arrays, **rounded}
    options = {"sinks": arrays.get("sinks"), "kernel": "flywheel", "gradients": ()}
    with testing.interpret():
        if case.name in _IN_BFLOAT16:
            with pytest.raises(KernelRefusedError, match=_IN_BFLOAT16[case.name]):
                attend(case, arrays, "", **options)
            return
        out = attend(case, arrays, "", **options)
    seen = np.asarray(case.arrays["mask"]).astype(bool).any(axis=-1)
    np.testing.assert_allclose(np.asarray(out, np.float32)[seen], case.arrays["out"][seen], rtol=0, atol=5e-2)


def _is_decode(entry):
    return entry["params"]["model_mode"] == "autoregressive"


@pytest.mark.cases.with_args(_is_decode)
@pytest.mark.parametrize("kernel", _ADAPTED)
def test_a_decode_kernel_gives_the_golden_answer(kernel, case, answer, merged):
    """Of a window MaxText has another answer (test_differences), so that ours is compared to kernelry's own."""
    with testing.interpret(), kernelry.use(tiling={"block_kv": 16, "splits": 2}), kernelry.record() as resolutions:
        out, max_logits = jax.jit(lambda arrays: merged(case, arrays, kernel=kernel))(case.arrays)
    steps = {step.adapter.name for resolution in resolutions for step in resolution.plan.steps}
    assert steps == set(_ADAPTED[kernel].get(case.name, ())[:1])
    wanted = answer.out if case.name == "ar_local_w8" else case.arrays["out"]
    np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-5)
    np.testing.assert_allclose(max_logits, answer.max_logits, rtol=0, atol=2e-5)


@pytest.mark.cases.with_args(lambda entry: any(entry["name"] in adapted for adapted in _ADAPTED.values()))
@pytest.mark.parametrize("kernel", _ADAPTED)
def test_without_an_adapter_a_decode_kernel_names_what_it_refuses(kernel, case, merged):
    _, message = _ADAPTED[kernel][case.name]
    with testing.interpret(), kernelry.use(policy=NO_ADAPTERS), pytest.raises(KernelRefusedError, match=message):
        jax.jit(lambda arrays: merged(case, arrays, kernel=kernel))(case.arrays)
