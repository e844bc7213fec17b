"""Masks of 512 tokens that kernels compute in their blocks, one of each kind."""

import jax.numpy as jnp
import numpy as np

from kernelry import masks

BALANCED = np.r_[0:128, 384:512, 128:384]
IDS = np.repeat([3, -1, 0, 5], 128)


def every_third(query_positions, kv_positions):
    return (query_positions - kv_positions) % 3 == 0


MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(100, 20),
    "chunked": masks.Chunked(100),
    "block_causal": masks.BlockCausal(48),
    "predicate": masks.Causal() & masks.Predicate(every_third),
    "any_of": masks.SlidingWindow(20) | masks.BlockCausal(128),
    "not": ~masks.SlidingWindow(20, 20),
    "offset": masks.Causal().at(query_offset=128),
    "load_balanced": masks.Causal().at(query_positions=BALANCED, kv_positions=BALANCED),
    "packed": masks.SlidingWindow(100) & masks.Segments(jnp.asarray(IDS)),
}
