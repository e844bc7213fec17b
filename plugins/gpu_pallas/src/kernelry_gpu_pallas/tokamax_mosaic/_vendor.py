"""Everything this plugin takes from tokamax, in one place.

Written against tokamax 0.0.12 … 0.0.17. All of it is private: tokamax's public attention asks the device of this
process which kernel to take, so that nothing could be lowered for another one; it silently rounds
float32 arrays to bfloat16; and it has no backward pass that takes the output and the logsumexp of the whole attention.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator

from tokamax._src.ops.attention import pallas_mosaic_gpu_kernel_sm90 as forward_sm90
from tokamax._src.ops.attention import pallas_mosaic_gpu_kernel_sm100 as forward_sm100
from tokamax._src.ops.attention import pallas_mosaic_gpu_vjp_kernel_sm90 as backward_sm90
from tokamax._src.ops.attention import pallas_mosaic_gpu_vjp_kernel_sm100 as backward_sm100

# The kernels for Blackwell are served as tokamax 0.0.17 has them, whose forward pass may be persistent; see spec.py.
HAS_BLACKWELL = any(field.name == "persistent" for field in dataclasses.fields(forward_sm100.Config))

__all__ = ["HAS_BLACKWELL", "backward_sm90", "backward_sm100", "forward_sm90", "forward_sm100", "quietly"]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Around the calls: tokamax 0.0.12 names arguments as jax 0.10 wishes they were not named any more."""
    with warnings.catch_warnings():
        message = "The out_shape and scratch_shapes arguments to plgpu.kernel are deprecated"
        warnings.filterwarnings("ignore", message=message, category=DeprecationWarning)
        yield
