"""Attention for Flax: a module for nnx and linen, and an `attention_fn` for Flax's own modules.

The names below are public, its modules are internal. Imports `cache`, `config` and what is below.
"""

from kernelry.flax.function import attention_fn
from kernelry.flax.operation import AttentionOp, attention_op_as_linen
from kernelry.flax.tokens import CachedPart, Tokens

__all__ = ["AttentionOp", "CachedPart", "Tokens", "attention_fn", "attention_op_as_linen"]
