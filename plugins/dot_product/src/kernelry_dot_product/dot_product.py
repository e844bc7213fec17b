"""Dense attention in plain XLA: materialises B N T S logits."""

from __future__ import annotations

import dataclasses
from typing import final

import jax

from kernelry.plugin import Inputs, Kernel, Partial, Request, Side, Tiling
from kernelry_dot_product.softmax import attend_dense, visible_of


@final
@dataclasses.dataclass(frozen=True, slots=True)
class DotProductKernel(Kernel):
    """The kernel that serves everything; other kernels are compared with it."""

    def forward(self, inputs: Inputs, request: Request, tiling: Tiling, *, statistics: bool) -> Partial:
        with jax.named_scope("kernelry.dot_product"):
            query = Side.query(inputs.query.shape[1], q_heads=request.q_heads)
            visible = visible_of(inputs.mask, query, Side.kv(inputs.key.shape[1]))
            return attend_dense(inputs, request, visible, statistics=statistics)
