"""A request and its arrays in the vendor's words."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kernelry.masks import Lengths
from kernelry.plugin import Inputs, Request
from kernelry_cudnn_te.arrays import depending_on, rounded
from kernelry_cudnn_te.cudnn_jax._vendor import Attributes, MaskType, Operands


def attributes_of(request: Request) -> Attributes:
    """The static side of a call."""
    is_causal = any(atom.is_band for atom in request.mask.atoms)
    if all(atom.is_band for atom in request.mask.atoms):
        mask_type = MaskType.CAUSAL if is_causal else MaskType.NO_MASK
    else:
        mask_type = MaskType.PADDING_CAUSAL if is_causal else MaskType.PADDING
    return Attributes(mask_type, _window(request), request.scale)


def operands_of(inputs: Inputs, request: Request) -> Operands:
    """The arrays of a call; a length of 0 becomes 1, and `empty_rows` knows better.

    What cuDNN does with a length of 0 depends on its version.
    """
    lengths = _lengths(inputs, request)
    query_lengths, kv_lengths = (None, None) if lengths is None else (_given(array, inputs) for array in lengths)
    bias = None if inputs.bias is None else rounded(inputs.bias, request.dtype)
    return Operands(inputs.query, inputs.key, inputs.value, bias, query_lengths, kv_lengths)


def _given(lengths: Int[Array, " B"], inputs: Inputs) -> Int[Array, " B"]:
    """The lengths, mapped and cut as the queries are: under `vmap`, jax 0.10 needs all arrays mapped or none."""
    return depending_on(jnp.maximum(lengths, 1), inputs.query)


def empty_rows(inputs: Inputs, request: Request) -> Bool[Array, "B T"] | None:
    """Which rows see no key; None where each sees one. What cuDNN leaves in them is documented nowhere."""
    lengths = _lengths(inputs, request)
    if lengths is None:
        return None
    query_lengths, kv_lengths = (array[:, None] for array in lengths)
    row, left = jnp.arange(request.q_len, dtype=jnp.int32)[None], _left(request)
    first = jnp.zeros_like(row) if left is None else jnp.maximum(row - left, 0)
    return (row >= query_lengths) | (first >= kv_lengths)


def _lengths(inputs: Inputs, request: Request) -> tuple[Int[Array, " B"], Int[Array, " B"]] | None:
    """The least of all lengths of queries, and of keys, at most T and S."""
    given = [mask for mask in inputs.mask if isinstance(mask, Lengths)]
    if not given:
        return None
    query_lengths = jnp.full((request.batch,), request.q_len, jnp.int32)
    kv_lengths = jnp.full((request.batch,), request.kv_len, jnp.int32)
    for mask in given:
        kv_lengths = _least(kv_lengths, mask.kv_lengths)
        if mask.query_lengths is not None:
            query_lengths = _least(query_lengths, mask.query_lengths)
    return query_lengths, kv_lengths


def _least(most: Int[Array, " B"], lengths: object) -> Int[Array, " B"]:
    return jnp.minimum(most, jnp.broadcast_to(jnp.asarray(lengths), most.shape)).astype(jnp.int32)


def _left(request: Request) -> int | None:
    return next((atom.params[0] for atom in request.mask.atoms if atom.is_band), None)


def _window(request: Request) -> int | None:
    """The vendor counts the query's own key, too; None where the window would hide nothing."""
    left = _left(request)
    return None if left is None or left >= request.q_len - 1 else left + 1
