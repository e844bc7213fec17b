"""Dense attention in plain XLA: materialises B N T S logits."""

from __future__ import annotations

import dataclasses
import functools
from typing import final

import jax

from kernelry.masks import AtomKind
from kernelry.plugin import Inputs, Kernel, Partial, Request, Side, Tiling
from kernelry_dot_product.softmax import attend_dense, visible_of

_FOREIGN = {AtomKind.PREDICATE, AtomKind.CUSTOM}


@final
@dataclasses.dataclass(frozen=True, slots=True)
class DotProductKernel(Kernel):
    """The kernel that serves everything; other kernels are compared with it."""

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        # Code of a user's may depend on more than its arguments, and is run each time.
        is_own = _FOREIGN.isdisjoint(atom.kind for atom in request.mask.walk())
        with jax.named_scope("kernelry.dot_product"):
            return (_traced_once if is_own else _forward)(inputs, request, statistics)


def _forward(inputs: Inputs, request: Request, statistics: bool) -> Partial:
    query = Side.query(inputs.query.shape[1], q_heads=request.q_heads)
    visible = visible_of(inputs.mask, query, Side.kv(inputs.key.shape[1]))
    return attend_dense(inputs, request, visible, statistics=statistics)


_traced_once = functools.partial(jax.jit, static_argnums=(1, 2), inline=True)(_forward)
"""The layers of a model make equal calls: JAX traces and differentiates one of them, and puts a copy in for the others.

`inline` leaves no call of a function in the program.
"""
