"""JAX's interpreter of Mosaic GPU kernels, with what tokamax's kernels need and jax 0.12.0 leaves out.

The kernels are the vendor's, unchanged, and JAX's interpreter models their memories, copies and barriers. Lent are:
  * `pl.run_state` over an accumulator, of which the interpreter knows nothing;
  * products of a matrix in registers;
  * named barriers at which single warps arrive, and the fence after them, which orders what is in order here;
  * copies under a condition.
What `approx_math` rounds on a GPU is not rounded here, and neither layouts nor registers are modelled.
"""

import contextlib
import os
from unittest import mock

import jax
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUP, WARP = 128, 32

# A thread that waits at a barrier keeps a thread of the CPU backend, which starts one per core; Blackwell's kernels
# wait with 6 at once. Read when the backend starts.
THREADS = {"PJRT_NPROC": "32", "NPROC": "32"}


class Held:
    """A value that is read and written like a Ref."""

    def __init__(self, value):
        self.value = value

    def __getitem__(self, index):
        return self.value

    def __setitem__(self, index, value):
        self.value = value


def run_state(body):
    """`pl.run_state` of (an accumulator, a value): what the products add up to is added to what was there."""

    def run(state):
        accumulator, value = state
        held = Held(value)

        def added(ref):
            body((ref, held))
            return ref[...], held.value

        more, after = pl.run_scoped(added, plgpu.ACC(accumulator.shape, accumulator.dtype))
        return accumulator._init + more, after

    return run


@contextlib.contextmanager
def interpreted():
    """Runs Mosaic GPU kernels on CPU; yields a list of each kernel's warpgroups, in the order they were traced."""
    from jax._src import callback
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, shared_memory

    for name, value in THREADS.items():
        assert os.environ.get(name) == value, f"{name}={value} must be set before JAX's backend starts"
    interpreter = jaxpr_interpret.JaxprInterpreter
    copy, product = interpreter._interpret_copy_gmem_to_smem_p, interpreter._interpret_wgmma_ref_p
    inline, initialize = interpreter._interpret_inline_mgpu_p, gpu_callbacks.call_initialize_shared_memory
    kernels = []

    def copied(self, eqn, token, operands):
        if not eqn.params["has_user_predicate"]:
            return copy(self, eqn, token, operands)
        *arrays, wanted = operands()
        return lax.cond(wanted, lambda t: copy(self, eqn, t, lambda: arrays)[0], lambda t: t, token), []

    def multiplied(self, eqn, token, operands):
        if hasattr(eqn.invars[1].aval, "inner_aval"):
            return product(self, eqn, token, operands)
        sums, left, right, *leaves = operands()
        empty = jax.tree.structure([])
        trees = [eqn.params[f"{name}_transforms_tree"] or empty for name in ("acc", "a", "b")]
        of_sums, _, of_right = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
        sums = jaxpr_interpret.resolve_ref(eqn.invars[0].aval, sums, of_sums)
        right = jaxpr_interpret.resolve_ref(eqn.invars[2].aval, right, of_right)
        place = {"thread": self.thread, "mesh_location": self.mesh_location}
        form = gpu_callbacks.TOKEN_SHAPE_DTYPE
        return callback.io_callback(add_product, form, token=token, sums=sums, left=left, right=right, **place), []

    @gpu_callbacks.fail_on_exception
    def add_product(*, token, sums, left, right, thread, mesh_location):
        memory = gpu_callbacks._get_shared_memory()
        where = {"logging_info": shared_memory.GPULoggingInfo(mesh_location, thread, None)}

        def found(ref):
            key = gpu_callbacks.HostAllocationKey.from_array(ref[0])
            access = memory.access(key, jax.tree.map(int, gpu_callbacks._remove_noop_transforms(ref[1])))
            return key, access, memory.get_buffer_content(key, access, thread, **where)[0]

        key, access, before = found(sums)
        after = before + np.matmul(np.asarray(left), found(right)[2], dtype=before.dtype)
        memory.store_buffer_content(key, access, after, thread, **where)
        return token

    @gpu_callbacks.fail_on_exception
    def meet(token, mesh_location, thread, barrier_id, *, num_threads, sync, source_info=None):
        memory = gpu_callbacks._get_shared_memory()
        groups, rest = divmod(num_threads, WARPGROUP)
        barrier = memory.named_barrier(thread, int(barrier_id), groups + rest // WARP)
        info = shared_memory.GPULoggingInfo(mesh_location, thread, source_info)
        barrier.arrive(thread, memory.incr_clock(thread) if memory.detect_races else None, info)
        if sync:
            barrier.wait(thread, info)
        return token

    def inlined(self, eqn, token, operands):
        if eqn.params["mgpu_fn"].__qualname__.endswith("tcgen05_fence_after_thread_sync"):
            return token, []
        return inline(self, eqn, token, operands)

    def initialized(**arguments):
        kernels.append(arguments["interpret_params"].num_cores_or_threads)
        return initialize(**arguments)

    lent = (
        mock.patch.object(pl, "run_state", run_state),
        mock.patch.object(interpreter, "_interpret_copy_gmem_to_smem_p", copied),
        mock.patch.object(interpreter, "_interpret_wgmma_ref_p", multiplied),
        mock.patch.object(interpreter, "_interpret_inline_mgpu_p", inlined),
        mock.patch.object(gpu_callbacks, "_named_barrier", meet),
        mock.patch.object(gpu_callbacks, "call_initialize_shared_memory", initialized),
    )
    # This setting is the interpreter's own: it models the instructions that tokamax writes out.
    settings = plgpu.InterpretGPUParams(inline_mgpu="_hack_model_inline_mgpu_tokamax")
    with contextlib.ExitStack() as stack:
        for patch in lent:
            stack.enter_context(patch)
        stack.enter_context(plgpu.force_gpu_interpret_mode(settings))
        yield kernels
