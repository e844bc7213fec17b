"""What `jax.vmap` makes of a call: all its arrays get the new axis, or the call is refused.

transformer-engine's own batching rules let an array without the axis pass, and count on lengths having it; sums over
the axis what a shared bias or sinks should have for each entry; and do not support packed rows with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from kernelry.errors import KernelRefusedError
from kernelry.plugin import Request
from kernelry_cudnn_te.cudnn_te.settings import TeSettings

_together: Any = Primitive("kernelry_cudnn_te_together")
_together.multiple_results = True


def together(tree: Any, alone: str) -> Any:
    """Returns a tree of arrays as it is; under `jax.vmap` all of them have its axis.

    Args:
      alone: what of the call `computed_alone` names.

    Raises:
      KernelRefusedError: by `jax.vmap`, where transformer-engine would not compute what it should.
    """
    leaves, structure = jax.tree.flatten(tree)
    # Seeds are the devices' and get no axis; what is left out of a call is an array of no elements.
    places = [i for i, leaf in enumerate(leaves) if leaf.size and (alone or leaf.dtype != jnp.uint32)]
    for i, leaf in zip(places, _together.bind(*(leaves[i] for i in places), alone=alone), strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


def computed_alone(request: Request, settings: TeSettings) -> str:
    """Names what transformer-engine computes for one batch only; empty where it has rules for more."""
    given = {
        "packed rows": settings.packed,
        "a bias": request.bias is not None,
        "sinks": request.sinks,
        "dropout": bool(request.dropout_rate),
        "max_logits": request.max_logits,
        "context_parallel": settings.shared is not None,
    }
    return ", ".join(name for name, present in given.items() if present)


def _same(*arrays: Any, alone: str) -> list[Any]:
    return list(arrays)


def _batched(arrays: Sequence[Any], axes: Sequence[int | None], *, alone: str) -> tuple[list[Any], list[int]]:
    if alone:
        raise KernelRefusedError(
            f"cudnn_te: jax.vmap over a call with {alone}: transformer-engine computes that for one batch only. Put "
            "the axis into the batch of the call, or let another kernel serve it."
        )
    size = next(array.shape[axis] for array, axis in zip(arrays, axes, strict=True) if axis is not None)
    wide = [
        jnp.broadcast_to(array, (size, *array.shape)) if axis is None else jnp.moveaxis(array, axis, 0)
        for array, axis in zip(arrays, axes, strict=True)
    ]
    return _together.bind(*wide, alone=alone), [0] * len(wide)


_instantiated: Any = ad.instantiate_zeros


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, alone: str) -> tuple[list[Any], list[Any]]:
    floating = [i for i, array in enumerate(primals) if jnp.issubdtype(array.dtype, jnp.floating)]
    moved = iter(_together.bind(*(_instantiated(tangents[i]) for i in floating), alone=alone))
    out = [next(moved) if i in floating else tangent for i, tangent in enumerate(tangents)]
    return _together.bind(*primals, alone=alone), out


def _transposed(cotangents: Sequence[Any], *tangents: Any, alone: str) -> list[Any]:
    return list(cotangents)


def _lowered(context: Any, *arrays: Any, alone: str) -> list[Any]:
    return list(arrays)


_together.def_impl(_same)
_together.def_abstract_eval(_same)
mlir.register_lowering(_together, _lowered)
ad.primitive_jvps[_together] = _jvp
ad.primitive_transposes[_together] = _transposed
batching.primitive_batchers[_together] = _batched
