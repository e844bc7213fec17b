"""Saving what is named `context` is enough for cudnn_te: transformer-engine's forward pass runs once."""

import cudnn_te_cases as cases
import jax.numpy as jnp
import numpy as np
import pytest
import rematerialised

import kernelry

pytestmark = [
    pytest.mark.filterwarnings("ignore:TransformerEngine logical axes:DeprecationWarning"),
    pytest.mark.te(served=True),
]


@pytest.mark.parametrize("more", ["nothing", "sinks", "statistics"])
@pytest.mark.parametrize("name", ["causal", "causal, packed"])
def test_no_kernel_runs_forward_again(name, more):
    *arrays, _ = cases.arrays()
    arrays += [jnp.asarray(np.linspace(-1, 1, 4), jnp.float32)] if more == "sinks" else []

    def loss(query, key, value, *sinks):
        options = {"sinks": sinks[0]} if sinks else {"return_partial": more == "statistics"}
        found = kernelry.attention(query, key, value, mask=cases.MASKS[name], kernel=cases.IN_FLOAT32.name, **options)
        return jnp.sin(kernelry.finalize(found) if more == "statistics" else found).sum()

    with kernelry.use(target=cases.TARGET, kernels=[cases.IN_FLOAT32]):
        rematerialised.check(loss, *arrays)
        found = rematerialised.calls(loss, *arrays)
    assert sorted(count for call, count in found.items() if "attn" in call) == [1, 1], found
