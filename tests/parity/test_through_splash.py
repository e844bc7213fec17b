"""The golden cases through splash, in interpret mode: outputs and gradients, or a refusal that names the mask.

Sequences of a case are shorter than a block, so padding, sinks and empty rows go through the adapters, too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernelry import testing
from kernelry.errors import KernelRefusedError

pytestmark = pytest.mark.slow

_REFUSED = {
    "train_bidirectional_crosses_segments": "mask atom spans",
    "train_indexer": "mask atom dense",
    "train_moba_c8_k3_packed": "mask atom block_selection",
    "chunked_prefill_moba": "mask atom block_selection",
}
"""The cases whose masks are arrays, and which atom is named."""


def _is_for_splash(entry):
    return entry["params"]["model_mode"] != "autoregressive" and entry["params"]["kernel"] != "ragged"


@pytest.mark.cases.with_args(_is_for_splash)
def test_splash_gives_the_golden_answer_or_names_what_it_refuses(case, attend):
    operands = {name: jnp.asarray(case.arrays[name]) for name in ("q", "k", "v", "sinks") if name in case.arrays}

    def run(operands):
        arrays = {**case.arrays, **operands}
        return attend(case, arrays, "", sinks=arrays.get("sinks"), kernel="splash")

    def program(operands):
        if not case.params["has_grads"]:
            return run(operands), {}
        out, pull = jax.vjp(run, operands)
        return out, pull(jnp.asarray(case.cotangent))[0]

    with testing.interpret():
        if case.name in _REFUSED:
            with pytest.raises(KernelRefusedError, match=_REFUSED[case.name]):
                jax.jit(program)(operands)
            return
        out, gradients = jax.jit(program)(operands)
    seen = np.asarray(case.arrays["mask"]).astype(bool).any(axis=-1)  # where a row sees nothing, MaxText differs
    np.testing.assert_allclose(np.asarray(out)[seen], case.arrays["out"][seen], rtol=0, atol=2e-5)
    if seen.all():
        for name, gradient in gradients.items():
            np.testing.assert_allclose(gradient, case.arrays[f"d{name}"], rtol=0, atol=5e-5, err_msg=name)
