"""Everything this plugin takes from JAX's attention over pages, in one place; written against jax 0.10.0 … 0.12.0.

`jax.experimental` promises nothing about either; neither is differentiable nor returns statistics.
"""

from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

__all__ = ["paged_attention", "ragged_paged_attention"]
