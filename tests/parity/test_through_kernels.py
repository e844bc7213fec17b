"""The golden cases through accelerators' kernels in interpret mode: outputs and gradients, or a refusal that names why.

Sequences of a case are shorter than a block, so where a kernel has no edge blocks, padding goes through the adapters,
too; sinks always do.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernelry import testing
from kernelry.errors import KernelRefusedError

pytestmark = pytest.mark.slow

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
