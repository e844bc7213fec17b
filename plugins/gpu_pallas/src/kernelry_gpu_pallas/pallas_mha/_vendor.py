"""Everything this plugin takes from JAX's Pallas Triton attention, in one place.

Written against jax 0.10.0 … 0.12.0, in which these names have the same signatures. The module is
deprecated since 0.12 in favour of tokamax and warns when imported; it is wrapped on purpose, so
that one warning is silenced here. `mha_backward` is private: the public `mha` refuses to be
differentiated once it returns its logsumexp, and core needs exactly that for sinks and merges.
"""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings(
        "ignore",
        message="jax.experimental.pallas.ops.gpu.attention is deprecated",
        category=DeprecationWarning,
    )
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha
    from jax.experimental.pallas.ops.gpu.attention import _mha_backward as mha_backward

__all__ = ["BlockSizes", "mha", "mha_backward"]
